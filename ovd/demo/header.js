// SPDX-License-Identifier: Apache-2.0
// The choice of weights: parts of the page that belong to other weights are hidden.

const radios = Array.from(element.querySelectorAll("input[type=radio]")), purpose = element.querySelector(".ovd-purpose");

function choose(radio) {
  radio.checked = true;
  props.value = radio.value;
  for (const other of radios) for (const node of document.querySelectorAll(`.ovd-of-${other.dataset.number}`)) node.classList.toggle("ovd-away", other !== radio);
  purpose.replaceChildren("Weights ", Object.assign(document.createElement("b"), { textContent: radio.value }), radio.dataset.purpose ? `: ${radio.dataset.purpose}` : "");
}

for (const radio of radios) radio.addEventListener("change", () => choose(radio));
document.addEventListener("ovd:weights", (event) => { // from a link, or from the history
  const wanted = radios.find((radio) => radio.value === event.detail);
  if (wanted && !wanted.checked) choose(wanted);
});
