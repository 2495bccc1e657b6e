// SPDX-License-Identifier: Apache-2.0
// The choice of weights: parts of the page that belong to other weights are hidden.

const radios = Array.from(element.querySelectorAll("input[type=radio]")), purpose = element.querySelector(".wordbox-purpose");

function choose(radio) {
  radio.checked = true;
  props.value = radio.value;
  for (const other of radios) for (const node of document.querySelectorAll(`.wordbox-weights-${other.dataset.number}`)) node.classList.toggle("wordbox-other-weights", other !== radio);
  purpose.replaceChildren("Weights ", Object.assign(document.createElement("b"), { textContent: radio.value }), radio.dataset.purpose ? `: ${radio.dataset.purpose}` : "");
}

for (const radio of radios) radio.addEventListener("change", () => choose(radio));
document.addEventListener("wordbox:weights", (event) => { // from a link, or from the history
  const wanted = radios.find((radio) => radio.value === event.detail);
  if (wanted && !wanted.checked) choose(wanted);
});
