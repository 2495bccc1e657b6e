// SPDX-License-Identifier: Apache-2.0
// Part of the result's script, after view.js: what was asked in this tab, links that ask again, and the Enter key.
// Questions stay in this tab's memory, and go with it.

const MOST_PAST = 12;
const MOST_LINK = 2000; // letters of words in a link
const past = []; // { answer, words, src: of the picture field, name }, the last first
let asking = { words: "", src: "" }; // the question under way

const field = () => document.querySelector("#ovd-words textarea");
const shownPicture = () => document.querySelector("#ovd-image img")?.src || "";
const pickedWeights = () => document.querySelector("#ovd-header input[type=radio]:checked")?.value || "";

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

// ---- asked in this tab -----------------------------------------------------------------------------------------

function remember() {
  const words = answer.everything ? "everything" : asking.words;
  const same = past.findIndex((p) => p.words === words && p.answer.preview === answer.preview && p.answer.model.name === answer.model.name);
  if (same >= 0) past.splice(same, 1);
  past.unshift({ answer, words, src: asking.src, name: nameIn(asking.src) });
  past.length = Math.min(past.length, MOST_PAST);
  drawPast();
}

function drawPast() {
  one(".ovd-past").hidden = past.length < 2;
  if (past.length < 2) return;
  one(".ovd-past ol").replaceChildren(...past.map((p) => {
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
      if (p.src && !(await putPicture(p.src, p.name))) say("The picture itself was deleted meanwhile; to ask more about it, add it again.");
    });
    item.append(button);
    return item;
  }));
}

function say(text) { one(".ovd-said").textContent = text; }

function pick(name) { document.dispatchEvent(new CustomEvent("ovd:weights", { detail: name })); }

// ---- links -----------------------------------------------------------------------------------------------------

function linkOf() {
  const words = answer.everything ? "everything" : asking.words;
  const parts = new URLSearchParams({ words });
  if (moved) parts.set("from", two(level));
  if (answer.example) parts.set("example", answer.example);
  const weights = pickedWeights();
  if (weights) parts.set("weights", weights);
  return `${location.origin}${location.pathname}#${parts}`;
}

function drawLink() { say(""); }

one(".ovd-link").addEventListener("click", async () => {
  const words = answer.everything ? "everything" : asking.words;
  if (!words.trim()) return say("Boxes and crops do not go into a link: there are no words in this question.");
  if (words.length > MOST_LINK) return say(`These words are too long for a link (${words.length} letters, at most ${MOST_LINK}).`);
  const link = linkOf(), own = answer.example ? "" : " Your picture is not in it: whoever opens it adds one.";
  history.replaceState(null, "", link);
  try {
    await navigator.clipboard.writeText(link);
    say(`Link copied.${own}`);
  } catch { say(`The link stands in the address bar.${own}`); } // no clipboard without HTTPS
});

(async () => {
  const asked = new URLSearchParams(location.hash.slice(1)), words = (asked.get("words") || "").slice(0, MOST_LINK);
  if (!words || !(await until(() => field() && document.querySelector("#ovd-image input[type=file]")))) return;
  setWords(words);
  if (asked.get("weights")) pick(asked.get("weights"));
  const from = Number(asked.get("from"));
  if (asked.get("from") && from >= 0 && from <= 1) { level = from; moved = true; }
  const name = asked.get("example");
  const ready = name && await until(() => Array.from(document.querySelectorAll(".ovd-ready img")).find((img) => nameIn(img.src) === name), 5);
  if (!ready) {
    one(".ovd-empty .lead").textContent = "This link holds a question without its picture.";
    one(".ovd-empty .more").textContent = "Add your picture and press Find.";
    return;
  }
  if (await putPicture(ready.src, name)) document.querySelector("#ovd-find").click();
})();

// ---- keys ------------------------------------------------------------------------------------------------------

// Enter asks, Shift+Enter begins a new line; Gradio has it the other way round, at keypress.
for (const kind of ["keydown", "keypress"])
  document.addEventListener(kind, (event) => {
    if (event.key !== "Enter" || event.target !== field() || event.isComposing) return;
    event.stopPropagation();
    if (event.shiftKey) return;
    event.preventDefault();
    if (kind === "keydown" && !event.repeat) document.querySelector("#ovd-find").click();
  }, true);

// A question that the server refuses never becomes an answer. Gradio would say "Error"; the server says why, and when to
// come back. Gradio takes 422 for remarks on its fields: with none it stops waiting and adds nothing of its own.
const fetched = window.fetch;
window.fetch = async (...request) => {
  const asks = /\/queue\/join(\?|$)/.test(String(request[0]?.url ?? request[0]));
  if (asks) {
    let data = [];
    try { data = JSON.parse(request[1].body).data; } catch { /* another kind of body: no words are remembered */ }
    asking = { words: typeof data[1] === "string" ? data[1] : "", src: shownPicture() };
  }
  const reply = await fetched(...request).catch((problem) => {
    if (asks) show({ error: "The page's server does not answer. Is it still running?" });
    throw problem;
  });
  if (!asks || reply.ok) return reply;
  const body = await reply.text();
  let words = `The server refused this question (status ${reply.status}).`;
  try { words = String(JSON.parse(body).detail || words); } catch { /* not from this server: keep the number */ }
  show({ error: words });
  return new Response(JSON.stringify({ detail: [] }), { status: 422, headers: { "Content-Type": "application/json" } });
};
