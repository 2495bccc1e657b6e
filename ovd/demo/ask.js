// SPDX-License-Identifier: Apache-2.0
// Search by example: boxes dragged on the picture above and uploaded crops, kept here and sent with the next request.
// Runs inside Gradio's HTML component, which gives `element` and `props`. Names go through value and textContent only.

const SVG = "http://www.w3.org/2000/svg";
const MIN_SIDE = 8; // pixels of the picture, as the detector wants it
const CONTEXT = 0.25; // of the box on each side: the detector also looks at 1.5 times the box
const LONGEST = 384; // pixels sent; the encoder sees fewer
const MOST = 20;

const one = (selector) => element.querySelector(selector);
const list = one(".wordbox-crops"), note = one(".wordbox-example-search-status"), drawButton = one(".wordbox-draw-box"), file = one(".wordbox-crop-file");
let frame = null; // Gradio's picture field; it may be built after this
const crops = []; // { name, image: data URL, box or null in its pixels, thumb: canvas, from: src of the picture, at: box there }
let counter = 0;

function say(text, wrong = false) {
  note.textContent = text;
  note.classList.toggle("wrong", wrong);
}

function send() {
  props.value = crops.map(({ name, image, box }) => ({ name, image, box })); // null would leave the old value in place
}

function hint() {
  const names = crops.map((c) => c.name.trim().toLowerCase());
  const shared = names.find((n, i) => names.indexOf(n) !== i);
  say(shared !== undefined ? `Crops of the same name are averaged: ${crops[names.indexOf(shared)].name}.`
    : crops.length ? "Name the crops and press Find. Words typed above are searched as well." : "");
}

function canvasOf(source, x, y, w, h, longest) {
  const scale = Math.min(1, longest / Math.max(w, h)), canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(w * scale));
  canvas.height = Math.max(1, Math.round(h * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // what is transparent is white, as on the server
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, x, y, w, h, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function thumbOf(source, [x1, y1, x2, y2]) {
  const w = x2 - x1, h = y2 - y1, scale = 96 / Math.max(w, h), canvas = document.createElement("canvas");
  canvas.width = canvas.height = 96;
  canvas.setAttribute("aria-hidden", "true");
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, x1, y1, w, h, (96 - w * scale) / 2, (96 - h * scale) / 2, w * scale, h * scale);
  return canvas;
}

function add(crop) {
  if (crops.length >= MOST) return say(`At most ${MOST} crops; remove one first.`, true);
  crops.push({ name: `example ${++counter}`, from: null, at: null, ...crop });
  redraw();
  hint();
  send();
}

function redraw() {
  list.replaceChildren(...crops.map((crop, i) => {
    const item = document.createElement("li"), name = document.createElement("input"), drop = document.createElement("button");
    Object.assign(name, { type: "text", value: crop.name, maxLength: 100, ariaLabel: `Name of crop ${i + 1}`, spellcheck: false });
    name.addEventListener("input", () => { crop.name = name.value; drop.ariaLabel = `Remove ${crop.name}`; hint(); send(); });
    name.addEventListener("keydown", (event) => { if (event.key === "Enter") document.querySelector("#ovd-find")?.click(); });
    Object.assign(drop, { type: "button", className: "wordbox-remove-crop", textContent: "×", ariaLabel: `Remove ${crop.name}` });
    drop.addEventListener("click", () => {
      crops.splice(crops.indexOf(crop), 1);
      redraw();
      hint();
      send();
      (one(".wordbox-remove-crop") || one(".wordbox-upload-crop")).focus();
    });
    item.append(crop.thumb, name, drop);
    return item;
  }));
  drawBoxes();
}

// ---- boxes on the picture --------------------------------------------------------------------------------------

const sheet = document.createElementNS(SVG, "svg"), rubber = document.createElementNS(SVG, "rect");
sheet.setAttribute("class", "wordbox-drawing-layer");
sheet.setAttribute("aria-hidden", "true"); // with a keyboard: upload a crop
rubber.setAttribute("class", "rubber");
let picture = null; // the <img> that Gradio shows
let start = null; // where the drag began, pixels of the picture

function fit() {
  const found = frame?.querySelector("img");
  const ready = found && found.naturalWidth > 0 && found.clientWidth > 0;
  if (found && found !== picture) found.addEventListener("load", fit);
  picture = ready ? found : null;
  drawButton.hidden = !ready;
  if (!ready) return sheet.remove();
  // The picture is drawn as large as fits into its element, in the middle of it.
  const outer = frame.getBoundingClientRect(), inner = found.getBoundingClientRect();
  const contained = ["contain", "scale-down"].includes(getComputedStyle(found).objectFit);
  let scale = Math.min(inner.width / found.naturalWidth, inner.height / found.naturalHeight);
  if (getComputedStyle(found).objectFit === "scale-down") scale = Math.min(scale, 1);
  const width = contained ? found.naturalWidth * scale : inner.width, height = contained ? found.naturalHeight * scale : inner.height;
  sheet.setAttribute("viewBox", `0 0 ${found.naturalWidth} ${found.naturalHeight}`);
  sheet.setAttribute("preserveAspectRatio", "none");
  Object.assign(sheet.style, {
    left: `${inner.left - outer.left - frame.clientLeft + (inner.width - width) / 2}px`,
    top: `${inner.top - outer.top - frame.clientTop + (inner.height - height) / 2}px`, width: `${width}px`, height: `${height}px`,
  });
  if (sheet.parentNode !== frame) frame.append(sheet);
  drawBoxes();
}

function drawBoxes() {
  for (const node of sheet.querySelectorAll(".mine")) node.remove();
  for (const crop of crops) {
    if (!picture || crop.from !== picture.src) continue;
    const [x1, y1, x2, y2] = crop.at;
    for (const kind of ["under", "edge"]) {
      const rect = document.createElementNS(SVG, "rect");
      for (const [key, value] of Object.entries({ class: `mine ${kind}`, x: x1, y: y1, width: x2 - x1, height: y2 - y1 })) rect.setAttribute(key, value);
      sheet.append(rect);
    }
  }
}

function pointOf(event) {
  const at = sheet.getBoundingClientRect(), clamp = (v, most) => Math.max(0, Math.min(most, v));
  return [clamp(((event.clientX - at.left) / at.width) * picture.naturalWidth, picture.naturalWidth),
    clamp(((event.clientY - at.top) / at.height) * picture.naturalHeight, picture.naturalHeight)];
}

function boxTo([x, y]) {
  return [Math.min(start[0], x), Math.min(start[1], y), Math.max(start[0], x), Math.max(start[1], y)];
}

const armed = () => drawButton.getAttribute("aria-pressed") === "true";
function arm(on) {
  drawButton.setAttribute("aria-pressed", on);
  sheet.classList.toggle("armed", on); // a finger then draws and does not scroll
  if (on) say("Drag a box around the object in the picture.");
}

sheet.addEventListener("pointerdown", (event) => {
  if (!picture || event.button !== 0 || (event.pointerType === "touch" && !armed())) return;
  event.preventDefault();
  start = pointOf(event);
  sheet.setPointerCapture(event.pointerId);
  sheet.append(rubber);
});
sheet.addEventListener("pointermove", (event) => {
  if (!start) return;
  const [x1, y1, x2, y2] = boxTo(pointOf(event));
  for (const [key, value] of Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1 })) rubber.setAttribute(key, value);
});
function leave() {
  start = null;
  rubber.remove();
  for (const key of ["width", "height"]) rubber.setAttribute(key, 0);
}
sheet.addEventListener("pointercancel", leave);
sheet.addEventListener("lostpointercapture", leave);
sheet.addEventListener("pointerup", (event) => {
  if (!start) return;
  const box = boxTo(pointOf(event)), w = box[2] - box[0], h = box[3] - box[1];
  leave();
  if (w < 2 && h < 2) return; // a click
  if (Math.min(w, h) < MIN_SIDE)
    return say(`The box is ${Math.round(w)}×${Math.round(h)} pixels; it must be at least ${MIN_SIDE}×${MIN_SIDE}.`, true);
  arm(false);
  // Sent with its surroundings, which help to recognise it; the box says which part is meant.
  const x1 = Math.max(0, Math.floor(box[0] - CONTEXT * w)), y1 = Math.max(0, Math.floor(box[1] - CONTEXT * h));
  const x2 = Math.min(picture.naturalWidth, Math.ceil(box[2] + CONTEXT * w)), y2 = Math.min(picture.naturalHeight, Math.ceil(box[3] + CONTEXT * h));
  const canvas = canvasOf(picture, x1, y1, x2 - x1, y2 - y1, LONGEST);
  const sx = canvas.width / (x2 - x1), sy = canvas.height / (y2 - y1);
  add({ image: canvas.toDataURL("image/png"), thumb: thumbOf(picture, box), from: picture.src, at: box,
    box: [(box[0] - x1) * sx, (box[1] - y1) * sy, (box[2] - x1) * sx, (box[3] - y1) * sy] });
});
drawButton.addEventListener("click", () => {
  arm(!armed());
  if (!armed()) hint();
  else frame.scrollIntoView({ block: "nearest" });
});
(function attach() {
  frame = document.querySelector("#ovd-image");
  if (!frame) return requestAnimationFrame(attach);
  new MutationObserver((changes) => { if (changes.some((c) => c.target !== frame && !sheet.contains(c.target))) fit(); })
    .observe(frame, { subtree: true, childList: true, attributes: true, attributeFilter: ["src"] });
  new ResizeObserver(fit).observe(frame);
  fit();
})();

// ---- crops from files ------------------------------------------------------------------------------------------

one(".wordbox-upload-crop").addEventListener("click", () => file.click());
file.addEventListener("change", async () => {
  for (const chosen of Array.from(file.files)) {
    try {
      const bitmap = await createImageBitmap(chosen), { width: w, height: h } = bitmap;
      if (Math.min(w, h) < MIN_SIDE) { say(`${chosen.name} has ${w}×${h} pixels; at least ${MIN_SIDE}×${MIN_SIDE} are needed.`, true); continue; }
      const canvas = canvasOf(bitmap, 0, 0, w, h, LONGEST);
      add({ name: chosen.name.replace(/\.[^.]*$/, "").replace(/^[-\s]+/, "").slice(0, 100) || `example ${++counter}`,
        image: canvas.toDataURL("image/png"), box: null, thumb: thumbOf(bitmap, [0, 0, w, h]) });
    } catch { say(`${chosen.name} cannot be read as a picture (PNG, JPEG, WebP or BMP).`, true); }
  }
  file.value = "";
});

// A click on one of the page's examples searches for its words alone: crops are removed.
document.addEventListener("click", (event) => {
  if (!crops.length || !event.target.closest?.("#wordbox-examples tr")) return;
  crops.length = 0;
  redraw();
  hint();
  send();
});
