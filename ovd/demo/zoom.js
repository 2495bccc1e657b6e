// SPDX-License-Identifier: Apache-2.0
// Part of the result's script, after view.js: zoom and pan. The stage scrolls, so a finger, a wheel and the keyboard pan it.

const MOST_ZOOM = 8;
let zoom = 1;

// Sets the zoom and keeps the point (x, y) of the stage where it is.
function zoomTo(wanted, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const next = Math.max(1, Math.min(MOST_ZOOM, wanted));
  if (next !== zoom && picture.clientWidth) {
    const base = { width: picture.clientWidth / zoom, height: picture.clientHeight / zoom };
    const at = { x: (stage.scrollLeft + x - picture.offsetLeft) / picture.clientWidth, y: (stage.scrollTop + y - picture.offsetTop) / picture.clientHeight };
    if (zoom === 1) stage.style.height = `${stage.offsetHeight}px`;
    zoom = next;
    stage.classList.toggle("zoomed", zoom > 1);
    if (zoom > 1) {
      Object.assign(picture.style, { width: `${base.width * zoom}px`, height: `${base.height * zoom}px`, maxWidth: "none", maxHeight: "none" });
      stage.setAttribute("tabindex", 0);
      stage.scrollLeft = at.x * picture.clientWidth + picture.offsetLeft - x;
      stage.scrollTop = at.y * picture.clientHeight + picture.offsetTop - y;
    } else {
      picture.removeAttribute("style");
      stage.style.height = "";
      stage.removeAttribute("tabindex");
      stage.scrollLeft = stage.scrollTop = 0; // the boxes still overflow until they follow the picture: nothing clamps this yet
    }
  }
  one(".wordbox-zoom-level").textContent = `${Math.round(zoom * 100)} %`;
  one("[data-zoom=out]").disabled = one("[data-zoom=fit]").disabled = zoom === 1;
  one("[data-zoom=in]").disabled = zoom === MOST_ZOOM;
}

const pointOn = (event) => { const at = stage.getBoundingClientRect(); return [event.clientX - at.left, event.clientY - at.top]; };

one(".wordbox-zoom").addEventListener("click", (event) => {
  const kind = event.target.closest("button")?.dataset.zoom;
  if (kind) zoomTo({ in: zoom * 1.5, out: zoom / 1.5, fit: 1 }[kind]);
});
stage.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return; // a plain wheel scrolls; with Ctrl, or two fingers on a touchpad, it zooms
  event.preventDefault();
  zoomTo(zoom * Math.exp(-event.deltaY / 300), ...pointOn(event));
}, { passive: false });
stage.addEventListener("dblclick", (event) => { event.preventDefault(); zoomTo(zoom < 2 ? 2 : 1, ...pointOn(event)); });
one(".wordbox-viewport-frame").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const next = { "+": zoom * 1.5, "=": zoom * 1.5, "-": zoom / 1.5, 0: 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  zoomTo(next);
});

let drag = null; // where the mouse went down, and where the stage was then
let dragged = false;
stage.addEventListener("pointerdown", (event) => {
  dragged = false;
  if (zoom > 1 && event.button === 0 && event.pointerType === "mouse") drag = { x: event.clientX, y: event.clientY, left: stage.scrollLeft, top: stage.scrollTop };
});
window.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const x = event.clientX - drag.x, y = event.clientY - drag.y;
  dragged ||= Math.hypot(x, y) > 4;
  if (dragged) { stage.scrollLeft = drag.left - x; stage.scrollTop = drag.top - y; }
});
window.addEventListener("pointerup", () => { drag = null; });
stage.addEventListener("click", (event) => { if (dragged) event.stopPropagation(); }, true); // the end of a drag is no choice
let room = 0; // for the stage; when it changes, the picture has another size at 100 %
new ResizeObserver(() => {
  const width = one(".wordbox-viewport-frame").clientWidth;
  if (width !== room) zoomTo(1);
  room = width;
}).observe(one(".wordbox-viewport-frame"));
