// SPDX-License-Identifier: Apache-2.0
// Draws one answer of the detector. Runs inside Gradio's HTML component, which gives `element`, `props` and `watch`;
// save.js, zoom.js and session.js follow in the same scope.
// Everything typed by a person goes through textContent or setAttribute, never through HTML.

const SVG = "http://www.w3.org/2000/svg";
const one = (selector) => element.querySelector(selector);
const all = (selector) => Array.from(element.querySelectorAll(selector));
const svg = one(".wordbox-boxes"), picture = one(".wordbox-searched-picture"), stage = one(".wordbox-viewport"), slider = one(".wordbox-threshold");
const pen = document.createElement("canvas").getContext("2d");
const FONT = "600 12px system-ui, sans-serif";
const MOST_ROWS = 300, MOST_CHIPS = 40, MOST_MISSING = 12;

let answer = null; // the last good answer
let level = 0; // lowest score shown
let moved = false; // has the person moved the slider?
let sort = { key: "score", down: true };
let chosen = null; // index into answer.detections
const hidden = new Set(); // names of classes switched off; kept when words change

function make(name, attributes = {}, text = null) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function draw(name, attributes = {}) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function swatch(entry) {
  const node = draw("svg", { class: "wordbox-colour-swatch", viewBox: "0 0 18 12", width: 18, height: 12, "aria-hidden": "true" });
  const dash = entry.dash.map((d) => d * 1.6).join(" ");
  node.append(
    draw("rect", { x: 1, y: 1, width: 16, height: 10, rx: 2, fill: entry.colour, "fill-opacity": 0.3 }),
    draw("rect", { x: 1, y: 1, width: 16, height: 10, rx: 2, fill: "none", stroke: entry.colour, "stroke-width": 2, "stroke-dasharray": dash }),
  );
  return node;
}

const nameOf = (d) => answer.classes[d.class].name;
const isShown = (d) => d.score >= level && !hidden.has(nameOf(d));
const shown = () => answer.detections.map((d, i) => i).filter((i) => isShown(answer.detections[i]));
// Weights whose scores are all small get a finer slider and one more digit.
const fine = () => answer !== null && answer.threshold < 0.1;
const two = (x) => x.toFixed(fine() ? 3 : 2);

function place(d) {
  const x = (d.box[0] + d.box[2]) / 2 / answer.size[0], y = (d.box[1] + d.box[3]) / 2 / answer.size[1];
  const row = y < 1 / 3 ? "upper" : y > 2 / 3 ? "lower" : "middle", column = x < 1 / 3 ? "left" : x > 2 / 3 ? "right" : "centre";
  return row === "middle" && column === "centre" ? "centre" : `${row} ${column}`;
}

// ---- the picture -----------------------------------------------------------------------------------------------

function drawBoxes() {
  svg.replaceChildren();
  if (!answer) return;
  const order = shown();
  // Large boxes first, so that a small one inside a large one can be hovered.
  const area = (i) => { const b = answer.detections[i].box; return (b[2] - b[0]) * (b[3] - b[1]); };
  for (const i of order.slice().sort((a, b) => area(b) - area(a))) {
    const d = answer.detections[i], entry = answer.classes[d.class];
    const [x1, y1, x2, y2] = d.box;
    const frame = { x: x1, y: y1, width: Math.max(x2 - x1, 0.5), height: Math.max(y2 - y1, 0.5) };
    const item = draw("g", {
      class: "item", role: "listitem", tabindex: -1, "data-i": i,
      "aria-label": `${entry.name}, score ${two(d.score)}, ${place(d)}`,
    });
    if (one(".wordbox-show-masks").checked)
      for (const points of d.polygons) item.append(draw("polygon", { class: "mask", points: points.join(" "), fill: entry.colour }));
    item.append(
      draw("rect", { class: "halo", ...frame }),
      draw("rect", { class: "under", ...frame }),
      draw("rect", { class: "edge", ...frame, stroke: entry.colour, "stroke-dasharray": entry.dash.map((v) => v * 2.5).join(" ") }),
    );
    svg.append(item);
  }
  const first = order.length ? svg.querySelector(`[data-i="${order[0]}"]`) : null;
  if (first) first.setAttribute("tabindex", 0); // one stop for the tab key; arrows go on from there
  drawLabels();
  light(chosen);
}

// Labels are laid out in screen pixels, so that they stay readable at every size of the page.
function drawLabels() {
  for (const node of svg.querySelectorAll(".tag")) node.remove();
  const frame = { width: picture.clientWidth, height: picture.clientHeight };
  if (!answer || !frame.width || !frame.height) return;  // not laid out yet
  svg.setAttribute("viewBox", `0 0 ${answer.size[0]} ${answer.size[1]}`);
  Object.assign(svg.style, { left: `${picture.offsetLeft}px`, top: `${picture.offsetTop}px`, width: `${frame.width}px`, height: `${frame.height}px` });
  if (!one(".wordbox-show-labels").checked) return;
  // A small upright picture does not fill its frame: it stands in the middle, as wide as its height allows.
  const scale = Math.max(answer.size[0] / frame.width, answer.size[1] / frame.height), taken = [];
  const width = answer.size[0] / scale, height = answer.size[1] / scale;
  pen.font = FONT;
  for (const i of shown().slice(0, 100)) {
    const d = answer.detections[i], entry = answer.classes[d.class];
    const text = labelText(entry.name, d.score, Math.max(60, width * 0.6));
    const w = pen.measureText(text).width + 10, h = 18;
    const [x1, y1, x2, y2] = d.box.map((v) => v / scale);
    const x = Math.max(0, Math.min(x1 - 1, width - w));
    const spots = [[x, y1 - h], [x, y1], [x, y2], [x, y2 - h], [Math.max(0, Math.min(x2 - w, width - w)), y1 - h], [Math.max(0, Math.min(x2 - w, width - w)), y2]]
      .filter(([, y]) => y >= 0 && y + h <= height);
    const free = spots.find(([a, b]) => !taken.some((t) => a < t[0] + t[2] && a + w > t[0] && b < t[1] + h && b + h > t[1]));
    const [lx, ly] = free || spots[0] || [x, Math.max(0, Math.min(y1, height - h))];
    taken.push([lx, ly, w]);
    const tag = draw("g", { class: "tag", transform: `translate(${lx * scale} ${ly * scale}) scale(${scale})` });
    const line = draw("text", { x: 5, y: 13, fill: entry.ink });
    line.textContent = text;
    tag.append(draw("rect", { width: w, height: h, rx: 3, fill: entry.colour }), line);
    const item = svg.querySelector(`.item[data-i="${i}"]`);
    if (item) item.append(tag);
  }
}

function labelText(name, score, room) {
  const tail = ` ${two(score)}`;
  if (pen.measureText(name + tail).width <= room) return name + tail;
  let short = name;
  while (short.length > 3 && pen.measureText(`${short}…${tail}`).width > room) short = short.slice(0, -1);
  return `${short}…${tail}`;
}

function light(i) {
  svg.classList.toggle("focus", i !== null);
  for (const node of all(".item, tbody tr[data-i]")) {
    const on = i !== null && node.dataset.i === String(i);
    node.classList.toggle("on", on);
    if (node.tagName === "TR") node.setAttribute("aria-selected", on);
  }
}

const WHY = "Click a box, or walk through them with the arrow keys, to see which known words it is nearest to.";

function showNearest(i) {
  const why = one(".wordbox-explanation");
  if (i === null || !answer) return why.replaceChildren(WHY);
  const d = answer.detections[i];
  why.replaceChildren(make("b", {}, nameOf(d)), ` ${two(d.score)}, ${place(d)}.`);
  if (d.near?.length) why.append(` Nearest known words: ${d.near.join(", ")}.`);
}

function select(i, scroll) {
  chosen = i;
  light(i);
  showNearest(i);
  const row = i === null ? null : one(`tbody tr[data-i="${i}"]`);
  if (row && scroll) {
    const box = one(".wordbox-detection-table");
    box.scrollTop = row.offsetTop - box.clientHeight / 2; // scrolls the table, never the page
  }
}

// ---- words, table, counts --------------------------------------------------------------------------------------

function drawLists() {
  const visible = shown();
  const counts = new Map(), above = new Map();
  for (const d of answer.detections) if (d.score >= level) above.set(d.class, (above.get(d.class) || 0) + 1);
  for (const i of visible) counts.set(answer.detections[i].class, (counts.get(answer.detections[i].class) || 0) + 1);

  const found = answer.classes.filter((c) => above.has(c.id)).sort((a, b) => above.get(b.id) - above.get(a.id) || b.best - a.best);
  const chips = one(".wordbox-class-chips");
  chips.replaceChildren();
  for (const c of found.slice(0, MOST_CHIPS)) {
    const chip = make("button", { type: "button", class: "wordbox-class-chip", "aria-pressed": !hidden.has(c.name), title: hidden.has(c.name) ? "Show this class" : "Hide this class" });
    chip.append(swatch(c), make("span", { class: "name" }, c.name), make("span", { class: "count" }, String(above.get(c.id))));
    chip.dataset.id = c.id;
    chips.append(chip);
  }
  if (found.length > MOST_CHIPS) chips.append(make("span", {}, `and ${found.length - MOST_CHIPS} more`));

  const missing = answer.everything ? [] : answer.classes.filter((c) => !above.has(c.id)); // not typed by the person
  const list = one(".wordbox-not-found");
  list.replaceChildren();
  for (const c of missing.slice(0, MOST_MISSING)) {
    const line = make("li");
    const lost = ` has no box of its own: where it scores best (${two(c.best)}), another word fits as well or better`;
    line.append(make("b", {}, c.name), c.best >= level ? lost : ` not found at ${two(level)} or more; best score ${two(c.best)}`);
    const weaker = answer.detections.some((d) => d.class === c.id);
    if (weaker) line.append(" ", make("button", { type: "button", class: "wordbox-show-best-guess", "data-id": c.id, "aria-label": `Show the best guess for ${c.name}` }, "show it"));
    list.append(line);
  }
  if (missing.length > MOST_MISSING) list.append(make("li", {}, `and ${missing.length - MOST_MISSING} more classes not found`));

  const notices = one(".wordbox-notices");
  notices.replaceChildren(...answer.notices.map((text) => make("li", {}, text)));
  const pooled = answer.classes.filter((c) => c.synonyms.length).slice(0, 8);
  for (const c of pooled) notices.append(make("li", {}, `${c.name} also stands for: ${c.synonyms.slice(0, 12).join(", ")}`));
  const several = answer.classes.filter((c) => c.crops > 1).slice(0, 8);
  for (const c of several) notices.append(make("li", {}, `${c.name} is the mean of ${c.crops} crops`));
  if (answer.negatives.length) notices.append(make("li", {}, `Left out what looks more like: ${answer.negatives.slice(0, 20).join(", ")}`));

  const parts = found.filter((c) => counts.has(c.id)).slice(0, 8).map((c) => `${c.name} × ${counts.get(c.id)}`);
  const total = answer.detections.length;
  one(".wordbox-summary").textContent = visible.length
    ? `${parts.join(", ")}${counts.size > 8 ? " …" : ""} — ${visible.length} of ${total} boxes shown`
    : total ? `Nothing scores ${two(level)} or more. ${total} weaker ${total === 1 ? "guess" : "guesses"}: move the slider to the left to see.` : "Nothing found.";
  one(".wordbox-threshold-value").textContent = two(level);
  one(".wordbox-reset").hidden = !(moved || hidden.size);
  drawTable(visible);
}

function value(i, key) {
  const d = answer.detections[i], b = d.box;
  return { name: nameOf(d).toLowerCase(), score: d.score, left: b[0], top: b[1], width: b[2] - b[0], height: b[3] - b[1] }[key];
}

// As the table lists them; of one class the best first. The arrow keys walk in this order.
function ordered(visible) {
  const sign = sort.down ? -1 : 1;
  return visible.slice().sort((a, b) => {
    const x = value(a, sort.key), y = value(b, sort.key);
    return x < y ? -sign : x > y ? sign : a - b;
  });
}

function drawTable(visible) {
  const rows = ordered(visible);
  for (const head of all("th")) {
    const key = head.firstElementChild.dataset.sort;
    head.setAttribute("aria-sort", key === sort.key ? (sort.down ? "descending" : "ascending") : "none");
  }
  const body = one("tbody");
  body.replaceChildren();
  for (const i of rows.slice(0, MOST_ROWS)) {
    const d = answer.detections[i], row = make("tr", { "data-i": i });
    const name = make("td");
    name.append(swatch(answer.classes[d.class]), nameOf(d));
    row.append(name, make("td", {}, two(d.score)));
    for (const key of ["left", "top", "width", "height"]) row.append(make("td", {}, String(Math.round(value(i, key)))));
    body.append(row);
  }
  if (!rows.length) {
    const row = make("tr");
    row.append(make("td", { colspan: 6, class: "none" }, "No boxes to list"));
    body.replaceChildren(row);
  }
  light(chosen);
}

function redraw() {
  if (!answer) return;
  if (chosen !== null && !isShown(answer.detections[chosen])) chosen = null;
  showNearest(chosen);
  drawBoxes();
  drawLists();
}

// ---- events ----------------------------------------------------------------------------------------------------

slider.addEventListener("input", () => { level = Number(slider.value); moved = true; redraw(); });
one(".wordbox-show-masks").addEventListener("change", drawBoxes);
one(".wordbox-show-labels").addEventListener("change", drawLabels);
one(".wordbox-reset").addEventListener("click", () => {
  moved = false; hidden.clear(); level = answer.threshold; slider.value = level; redraw(); slider.focus();
});
one(".wordbox-class-chips").addEventListener("click", (event) => {
  const chip = event.target.closest(".wordbox-class-chip");
  if (!chip) return;
  const name = answer.classes[Number(chip.dataset.id)].name;
  hidden.has(name) ? hidden.delete(name) : hidden.add(name);
  redraw();
  one(`.wordbox-class-chip[data-id="${chip.dataset.id}"]`)?.focus();
});
one(".wordbox-not-found").addEventListener("click", (event) => {
  const id = event.target.closest(".wordbox-show-best-guess")?.dataset.id;
  if (id === undefined) return;
  const best = Math.max(...answer.detections.filter((d) => d.class === Number(id)).map((d) => d.score));
  level = Math.max(answer.floor, Math.floor(best / slider.step) * slider.step);
  slider.value = level;
  moved = true;
  hidden.delete(answer.classes[Number(id)].name);
  redraw();
  slider.focus();
});
one("thead").addEventListener("click", (event) => {
  const key = event.target.closest("button")?.dataset.sort;
  if (!key || !answer) return;
  sort = { key, down: sort.key === key ? !sort.down : key === "score" || key === "width" || key === "height" };
  drawTable(shown());
});
let before = null; // chosen before the pointer went down, which may focus a box and so choose it
element.addEventListener("pointerdown", () => { before = chosen; }, true);
for (const place of [svg, one("tbody")]) {
  place.addEventListener("pointerover", (event) => { const at = event.target.closest("[data-i]"); if (at) light(Number(at.dataset.i)); });
  place.addEventListener("pointerout", () => light(chosen));
  place.addEventListener("click", (event) => {
    const at = event.target.closest("[data-i]"), i = at ? Number(at.dataset.i) : null;
    select(i === before ? null : i, place === svg);
  });
}
svg.addEventListener("focusin", (event) => { const at = event.target.closest(".item"); if (at) select(Number(at.dataset.i), true); });
svg.addEventListener("focusout", () => select(null));
svg.addEventListener("keydown", (event) => {
  const order = ordered(shown()), at = order.indexOf(chosen);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") { event.target.blur?.(); select(null); event.preventDefault(); }
  if (!step || !order.length) return;
  event.preventDefault();
  const next = order[at < 0 ? 0 : (at + step + order.length) % order.length];
  const node = svg.querySelector(`.item[data-i="${next}"]`);
  for (const item of svg.querySelectorAll(".item")) item.setAttribute("tabindex", item === node ? 0 : -1);
  node?.focus({ preventScroll: true });
});
new ResizeObserver(drawLabels).observe(picture);
picture.addEventListener("load", drawLabels);

// ---- a new answer ----------------------------------------------------------------------------------------------

function show(data, { again = false } = {}) {
  const alert = one(".wordbox-alert");
  alert.hidden = !data?.error;
  alert.textContent = data?.error || "";
  if (data?.error) { // the last answer was to another query: it must not stay beside an error
    answer = null;
    one(".wordbox-detections").hidden = true;
  }
  if (!data || data.error) {
    one(".wordbox-placeholder").hidden = Boolean(answer) || Boolean(data?.error);
    return;
  }
  const samePicture = answer && answer.preview === data.preview;
  answer = data;
  if (!samePicture) zoomTo(1);
  one(".wordbox-masks-toggle").hidden = !data.masks; // a detector of boxes has none
  chosen = null;
  one(".wordbox-placeholder").hidden = true;
  one(".wordbox-detections").hidden = false;
  slider.step = fine() ? 0.001 : 0.01;
  slider.min = answer.floor;
  slider.max = fine() ? Math.max(10 * answer.threshold, 0.1) : 0.99;
  if (!moved) level = answer.threshold;
  slider.value = level;
  if (!samePicture) {
    picture.src = answer.preview;
    picture.classList.toggle("small", answer.size[0] < 640);
  }
  const ms = answer.ms, network = answer.cached ? "picture remembered" : `network ${Math.round(ms.network)} ms`;
  one(".wordbox-timing").textContent = `${answer.regions} regions · ${network} · words ${Math.round(ms.words)} ms`;
  redraw();
  drawLink();
  if (!again) remember();
  // On a narrow page the result is below the words: bring it into view.
  if (one(".wordbox-detections").getBoundingClientRect().top > window.innerHeight * 0.7)
    stage.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

watch("value", () => show(props.value && typeof props.value === "object" ? JSON.parse(JSON.stringify(props.value)) : null));

