// SPDX-License-Identifier: Apache-2.0
// Part of the result's script, after view.js: the history of this tab, links to a query, and the Enter key.
// The history is kept in this tab's memory only.

const MOST_PAST = 12;
const MOST_LINK = 2000; // letters of words in a link
const past = []; // { answer, words, src: of the picture field, name }, the last first
let pending = { words: "", src: "" }; // the query being answered

const field = () => document.querySelector("#ovd-words textarea");
const shownPicture = () => document.querySelector("#ovd-image img")?.src || "";
const pickedWeights = () => document.querySelector("#wordbox-header input[type=radio]:checked")?.value || "";

async function until(found, seconds = 15) {
  for (const end = performance.now() + seconds * 1000; performance.now() < end; await new Promise((done) => setTimeout(done, 50))) {
    const what = found();
    if (what) return what;
  }
  return null;
}

function setWords(text) {
  field().value = text;
  field().dispatchEvent(new Event("input", { bubbles: true }));
}

// Puts a picture of this server into the picture field, as if it had been dropped there; false if it is gone.
async function putPicture(src, name) {
  if (shownPicture() === src) return true;
  const reply = await fetched(src).catch(() => null);
  if (!reply?.ok) return false;
  const blob = await reply.blob(), frame = document.querySelector("#ovd-image");
  frame.querySelector("button[aria-label='Remove Image']")?.click();
  const input = await until(() => !shownPicture() && frame.querySelector("input[type=file]"));
  if (!input) return false;
  const files = new DataTransfer();
  files.items.add(new File([blob], name, { type: blob.type }));
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  return Boolean(await until(shownPicture));
}

const nameIn = (src) => { try { return decodeURIComponent(new URL(src).pathname.split("/").pop()); } catch { return ""; } };

// ---- history ---------------------------------------------------------------------------------------------------

function remember() {
  const words = answer.everything ? "everything" : pending.words;
  const same = past.findIndex((p) => p.words === words && p.answer.preview === answer.preview && p.answer.model.name === answer.model.name);
  if (same >= 0) past.splice(same, 1);
  past.unshift({ answer, words, src: pending.src, name: nameIn(pending.src) });
  past.length = Math.min(past.length, MOST_PAST);
  drawPast();
}

function drawPast() {
  one(".wordbox-history").hidden = past.length < 2;
  if (past.length < 2) return;
  one(".wordbox-history ol").replaceChildren(...past.map((p) => {
    const item = make("li"), button = make("button", { type: "button" });
    const words = p.answer.everything ? "What is in this picture?" : p.words.replace(/\s*\n\s*/g, ", ").trim() || p.answer.classes.map((c) => c.name).join(", ");
    const count = p.answer.detections.filter((d) => d.score >= p.answer.threshold).length;
    button.append(make("img", { src: p.answer.preview, alt: "" }), make("span", { class: "words" }, words), make("span", { class: "count" }, `${count} found`));
    if (p.answer === answer) button.setAttribute("aria-current", "true");
    button.addEventListener("click", async () => {
      show(p.answer, { again: true });
      drawPast();
      setWords(p.words);
      pick(p.answer.model.name);
      if (p.src && !(await putPicture(p.src, p.name))) say("The picture has been deleted; add it again to search it for something else.");
    });
    item.append(button);
    return item;
  }));
}

function say(text) { one(".wordbox-action-status").textContent = text; }

function pick(name) { document.dispatchEvent(new CustomEvent("wordbox:weights", { detail: name })); }

// ---- links -----------------------------------------------------------------------------------------------------

// Of the answer that is shown, which another query or a click on the history does not change yet, or has changed.
const shownWords = () => past.find((p) => p.answer === answer).words;

function linkOf() {
  const parts = new URLSearchParams({ words: shownWords() });
  if (moved) parts.set("from", two(level));
  if (answer.example) parts.set("example", answer.example);
  if (pickedWeights()) parts.set("weights", answer.model.name);
  return `${location.origin}${location.pathname}#${parts}`;
}

function drawLink() { say(""); }

one(".wordbox-copy-link").addEventListener("click", async () => {
  const words = shownWords();
  if (!words.trim()) return say("A link holds words only, and this query has crops alone.");
  if (words.length > MOST_LINK) return say(`These words are too long for a link (${words.length} letters, at most ${MOST_LINK}).`);
  const link = linkOf(), own = answer.example ? "" : " It does not contain your picture.";
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say(`Link copied.${own}`);
  } catch { say(`The link is in the address bar.${own}`); } // no clipboard without HTTPS
});

(async () => {
  const linked = new URLSearchParams(location.hash.slice(1)), words = (linked.get("words") || "").slice(0, MOST_LINK);
  if (!words || !(await until(() => field() && document.querySelector("#ovd-image input[type=file]")))) return;
  setWords(words);
  if (linked.get("weights")) pick(linked.get("weights"));
  const from = Number(linked.get("from"));
  if (linked.get("from") && from >= 0 && from <= 1) { level = from; moved = true; }
  const name = linked.get("example");
  const ready = name && await until(() => Array.from(document.querySelectorAll(".wordbox-packaged-pictures img")).find((img) => nameIn(img.src) === name));
  if (!ready) {
    one(".wordbox-placeholder .lead").textContent = "This link contains a query, but no picture.";
    one(".wordbox-placeholder .more").textContent = "Add your picture and press Find.";
    return;
  }
  if (await putPicture(ready.src, name)) document.querySelector("#ovd-find").click();
})();

// ---- keys ------------------------------------------------------------------------------------------------------

// Enter searches, Shift+Enter begins a new line; Gradio has it the other way round, at keypress.
for (const kind of ["keydown", "keypress"])
  document.addEventListener(kind, (event) => {
    if (event.key !== "Enter" || event.target !== field() || event.isComposing) return;
    event.stopPropagation();
    if (event.shiftKey) return;
    event.preventDefault();
    if (kind === "keydown" && !event.repeat) document.querySelector("#ovd-find").click();
  }, true);

// Shows why the server refused a request, where Gradio would say "Error". Gradio reads 422 as remarks on its fields:
// with none it stops waiting and adds no message of its own.
const fetched = window.fetch;
window.fetch = async (...request) => {
  const isQuery = /\/queue\/join(\?|$)/.test(String(request[0]?.url ?? request[0]));
  if (isQuery) {
    let data = [];
    try { data = JSON.parse(request[1].body).data; } catch { /* another kind of body: no words are remembered */ }
    pending = { words: typeof data[1] === "string" ? data[1] : "", src: shownPicture() };
  }
  const reply = await fetched(...request).catch((problem) => {
    if (isQuery) show({ error: "The page's server does not answer. Is it running?" });
    throw problem;
  });
  if (!isQuery || reply.ok) return reply;
  const body = await reply.text();
  let words = `The server refused this request (status ${reply.status}).`;
  try { words = String(JSON.parse(body).detail || words); } catch { /* not from this server: keep the number */ }
  show({ error: words });
  return new Response(JSON.stringify({ detail: [] }), { status: 422, headers: { "Content-Type": "application/json" } });
};
