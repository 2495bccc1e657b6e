// SPDX-License-Identifier: Apache-2.0
// Many pictures at once: each is one upload and one request, so that other people's come in between. What was found
// stays in this tab; the server makes the zip of it and keeps nothing.

const one = (selector) => element.querySelector(selector);
const MOST = 200, MOST_BYTES = 10_000_000, TRIES = 60;
const file = one(".wordbox-batch-file"), go = one(".wordbox-batch-start"), note = one(".wordbox-batch-status"), list = one(".wordbox-batch-pictures"), bar = one(".wordbox-batch-progress");
let rows = []; // { file, item, what, found: as the server packs it, or null }
let running = false, stopped = false;

const api = (path) => `${window.gradio_config?.root || ""}/gradio_api/${path}`;
const words = () => document.querySelector("#ovd-words textarea").value;
const weights = () => document.querySelector("#wordbox-header input[type=radio]:checked")?.value || null;
const plain = (text) => new DOMParser().parseFromString(String(text), "text/html").documentElement.textContent; // the server escapes it

// Posts; waits and tries again while the queue is full.
async function post(path, body, report) {
  for (let i = 0; i < TRIES && !stopped; i++) {
    const reply = await fetch(api(path), body instanceof FormData ? { method: "POST", body }
      : { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
    if (reply.ok) return reply.json();
    const text = await reply.text();
    let problem = `status ${reply.status}`;
    try { problem = JSON.parse(text).detail || problem; } catch { /* not from this server */ }
    if (reply.status !== 503) throw new Error(problem);
    const seconds = Number(reply.headers.get("Retry-After")) || 5;
    report(`waiting: ${problem}`);
    await new Promise((done) => setTimeout(done, seconds * 1000));
  }
  throw new Error(stopped ? "stopped" : "the queue stayed full");
}

async function call(name, values, report) {
  const { event_id: event } = await post(`call/v2/${name}`, values, report);
  const reply = await fetch(api(`call/${name}/${event}`));
  const blocks = (await reply.text()).split("\n\n").map((block) => Object.fromEntries(block.split("\n").filter((l) => l.includes(": ")).map((l) => [l.slice(0, l.indexOf(": ")), l.slice(l.indexOf(": ") + 2)])));
  const end = blocks.find((block) => block.event === "complete" || block.event === "error");
  if (!end) throw new Error("the server gave no answer");
  const data = JSON.parse(end.data || "null");
  if (end.event === "error") throw new Error(plain(data?.error ?? data ?? "internal error"));
  return data[0];
}

async function search(row) {
  const report = (text, wrong = false) => { row.what.textContent = text; row.item.classList.toggle("wrong", wrong); };
  try {
    if (row.file.size > MOST_BYTES) throw new Error("larger than 10 MB");
    report("searching …");
    const form = new FormData();
    form.append("files", row.file);
    const [path] = await post("upload", form, report);
    const answer = await call("detect", { image: { path, meta: { _type: "gradio.FileData" } }, classes: words(), weights: weights() }, report);
    const typed = one(".wordbox-batch-threshold").value, level = typed === "" ? answer.threshold : Number(typed);
    const boxes = answer.detections.filter((d) => d.score >= level)
      .map((d) => ({ name: answer.classes[d.class].name, score: d.score, box: d.box, polygons: d.polygons }));
    row.found = { name: row.file.name, size: answer.size, boxes };
    const count = new Map();
    for (const b of boxes) count.set(b.name, (count.get(b.name) || 0) + 1);
    report(boxes.length ? Array.from(count, ([name, n]) => `${name} × ${n}`).join(", ") : "nothing found");
  } catch (problem) { report(problem.message, true); }
}

function redraw() {
  go.textContent = running ? "Stop" : "Find in all";
  go.disabled = !rows.length;
  one(".wordbox-batch-add").disabled = running;
  one(".wordbox-batch-results").hidden = running || !rows.some((row) => row.found);
}

one(".wordbox-batch-add").addEventListener("click", () => file.click());
file.addEventListener("change", () => {
  const chosen = Array.from(file.files);
  list.replaceChildren();
  rows = chosen.slice(0, MOST).map((f) => {
    const item = document.createElement("li"), name = document.createElement("span"), what = document.createElement("span");
    name.textContent = f.name;
    what.className = "what";
    item.append(name, what);
    list.append(item);
    return { file: f, item, what, found: null };
  });
  list.tabIndex = rows.length ? 0 : -1; // it scrolls
  note.textContent = `${rows.length} picture${rows.length === 1 ? "" : "s"} chosen.${chosen.length > MOST ? ` At most ${MOST} at once; the others are left out.` : ""}`;
  bar.hidden = true;
  file.value = "";
  redraw();
});
go.addEventListener("click", async () => {
  if (running) { stopped = true; note.textContent = "Stopping after this picture."; return; }
  if (!words().trim()) { note.textContent = "Type above what to look for, or the word everything for all words that these weights know."; return; }
  running = true;
  stopped = false;
  for (const row of rows) { row.found = null; row.what.textContent = ""; row.item.classList.remove("wrong"); }
  bar.hidden = false;
  bar.max = rows.length;
  redraw();
  const start = performance.now();
  let done = 0;
  for (const row of rows) {
    if (stopped) break;
    bar.value = done;
    const left = done ? Math.round(((performance.now() - start) / done) * (rows.length - done) / 1000) : 0;
    note.textContent = `${done} of ${rows.length} done${left ? `, about ${left} s left` : ""}.`;
    await search(row);
    done += 1;
  }
  bar.value = done;
  const boxes = rows.reduce((sum, row) => sum + (row.found?.boxes.length || 0), 0), failed = rows.filter((row) => row.item.classList.contains("wrong")).length;
  note.textContent = `${boxes} box${boxes === 1 ? "" : "es"} in ${rows.filter((row) => row.found).length} pictures.${failed ? ` ${failed} could not be used.` : ""}`;
  running = false;
  redraw();
});
one(".wordbox-batch-download").addEventListener("click", async () => {
  const form = one(".wordbox-batch-format").value, report = (text) => { note.textContent = text; };
  stopped = false;
  try {
    const answer = await call("pack", { found: rows.filter((row) => row.found).map((row) => row.found), form }, report);
    const bytes = Uint8Array.from(atob(answer.zip), (c) => c.charCodeAt(0)), link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: "application/zip" }));
    link.download = answer.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    report("The zip contains labels only: put your pictures beside them.");
  } catch (problem) { report(problem.message); }
});
