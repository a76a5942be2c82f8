// The page: a text of tokens, its branches, and the address that keeps them.
import { ApiError, ask, stream } from "./api.js";
import { byId, chip, make, share, shown } from "./chips.js";
import { openFour, recordStep, showAttention, showNumbers } from "./engine.js";

const form = byId("ask"), chips = byId("chips");
const FIELDS = ["max_tokens", "temperature", "top_p", "top_k", "seed"];
const END = 50256; // <|endoftext|>: an empty prompt begins a document
let tokens = []; // {id, bytes, logprob, top, given}
let branches = []; // {label, tokens, request, parent}: each text that was left or visited
let place = 0; // of the current branch
let chosen = -1; // the chosen token's place
let running = null; // the AbortController of the running request
let request = null; // the latest request, with its prompt as ids

const say = (text) => { byId("status").textContent = text; };
const settings = () => Object.fromEntries(FIELDS.map((name) => [name, Number(form.elements[name].value)]));
const model = () => byId("model").value;

/** Run something that may fail, and show its error. */
async function attempt(action) {
  try { await action(); } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else {
      say(`Error: ${error.message}`);
      if (error instanceof ApiError && error.status === 401) byId("key").hidden = false;
    }
  }
}

/** Complete the tokens, or a prompt's text. echo: also get the prompt's probabilities. */
async function complete(prompt, echo, length) {
  const asked = { model: model(), prompt, ...settings(), ignore_eos: true, ...(length !== undefined && { max_tokens: length }) };
  const given = echo ? (typeof prompt === "string" ? Infinity : prompt.length) : 0;
  if (echo) tokens = [];
  running = new AbortController();
  busy(true);
  say("Running.");
  let left = typeof prompt === "string" ? new TextEncoder().encode(prompt).length : Infinity, taken = 0;
  try {
    for await (const { logprobs: found } of stream({ ...asked, logprobs: 10, echo }, running.signal)) {
      const fresh = found.token_ids.map((id, i) => ({ id, bytes: found.bytes[i], logprob: found.token_logprobs[i], top: found.top[i] }));
      for (const token of fresh) {
        token.given = echo && taken < given && left > 0;
        left -= token.bytes.length;
        taken += 1;
      }
      draw(tokens.length, fresh);
    }
    say(`${tokens.length} tokens.`);
  } finally {
    running = null;
    const ids = typeof prompt === "string" ? tokens.filter((token) => token.given).map((token) => token.id) : prompt;
    request = { ...asked, prompt: ids };
    keep();
  }
}

function busy(on) {
  byId("stop").disabled = !on;
  byId("start").disabled = on;
  byId("more").disabled = on || !tokens.length;
  byId("undo").disabled = on || branches[place]?.parent === undefined;
}

/** Add tokens to the text from `from` on, and draw them. */
function draw(from, fresh) {
  tokens = [...tokens.slice(0, from), ...fresh];
  if (from === 0) chips.replaceChildren();
  for (let last = chips.lastElementChild; last && (last.dataset.place ?? last.previousElementSibling?.dataset.place) >= from; last = chips.lastElementChild) last.remove();
  const piece = document.createDocumentFragment();
  fresh.forEach((token, i) => piece.append(...chip(token, from + i)));
  chips.append(piece);
  if (!chips.querySelector('[tabindex="0"]')) chips.querySelector("button")?.setAttribute("tabindex", "0");
}

const button = (at) => chips.querySelector(`[data-place="${at}"]`);

/** Choose a token, and show its alternatives. */
function choose(at, focus = true) {
  if (!tokens[at]) return;
  for (const old of chips.querySelectorAll('[tabindex="0"]')) { old.tabIndex = -1; old.setAttribute("aria-pressed", "false"); }
  chosen = at;
  const now = button(at);
  now.tabIndex = 0;
  now.setAttribute("aria-pressed", "true");
  if (focus) now.focus();
  const token = tokens[at];
  byId("choice").hidden = !token.top;
  byId("choice-title").textContent = `Alternatives to ${shown(token.bytes)}`;
  const rows = (token.top ?? []).map(([id, , logprob]) => {
    const bytes = bytesOf(token, id);
    const other = make("button", { type: "button", textContent: shown(bytes) });
    other.addEventListener("click", () => attempt(() => branch(at, id, bytes, logprob)));
    return share(other, Math.exp(logprob));
  });
  const rest = 1 - (token.top ?? []).reduce((sum, [, , logprob]) => sum + Math.exp(logprob), 0);
  byId("others").replaceChildren(...rows, share("all others", Math.max(0, rest)));
  if (byId("inside").open) attempt(() => showAttention(model(), tokens, at));
}

/** Return the bytes of an alternative: of its name, which the server writes as bytes:\xNN if it is not text. */
function bytesOf(token, id) {
  const name = token.top.find(([other]) => other === id)[1];
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(name)) return name.slice(6).match(/[0-9a-f]{2}/g).map((digits) => parseInt(digits, 16));
  return [...new TextEncoder().encode(name)];
}

/** Put another token at a place, and continue from there. */
async function branch(at, id, bytes, logprob) {
  if (running) return;
  remember(`${shown(tokens[at].bytes)} \u2192 ${shown(bytes)}`);
  const { top } = tokens[at];
  draw(at, [{ id, bytes, logprob, top, given: false }]);
  choose(at, false);
  await complete(tokens.map((token) => token.id), false);
}

/** Begin a new branch: the current text stays in the list. */
function remember(label) {
  branches.push({ label, tokens, request, parent: place });
  place = branches.length - 1;
}

/** Keep the current text in the list and in the address, and show how to get it elsewhere. */
function keep() {
  if (!branches.length) branches.push({ label: "the beginning" });
  const { prompt, ...rest } = { ...request, max_tokens: tokens.length - request.prompt.length };
  Object.assign(branches[place], { tokens, request });
  const address = new URLSearchParams({ ...rest, given: tokens.filter((token) => token.given).length, from: prompt.length });
  history.replaceState(null, "", `#${address}&ids=${tokens.map((token) => token.id).join(",")}`);
  const list = branches.map(({ label }, i) => {
    const go = make("button", { type: "button", textContent: label });
    go.setAttribute("aria-current", i === place);
    go.addEventListener("click", () => visit(i));
    return make("li", {}, go);
  });
  byId("branches").hidden = branches.length < 2;
  byId("branches").querySelector("ol").replaceChildren(...list);
  byId("share").hidden = rest.max_tokens < 1;
  const base = new URL("v1", document.baseURI.split("#")[0]);
  const text = JSON.stringify({ ...rest, prompt }).replaceAll("'", "'\\''");
  byId("curl").textContent = `curl ${base}/completions -H 'Content-Type: application/json' -d '${text}'`;
  const { top_k, ignore_eos, ...known } = rest;
  const lines = Object.entries({ ...known, prompt }).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`).join("");
  byId("python").textContent = `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="none")\n`
    + `answer = client.completions.create(\n${lines}    extra_body={"top_k": ${top_k}, "ignore_eos": True},\n)\nprint(answer.choices[0].text)`;
  busy(false);
}

function visit(to) {
  if (running || !branches[to]) return;
  place = to;
  request = branches[to].request;
  draw(0, branches[to].tokens);
  byId("choice").hidden = true;
  keep();
}

/** Read the address: settings, and the ids or the text of the prompt. */
async function restore() {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) if (found.has(name)) form.elements[name].value = found.get(name);
  if (found.has("text")) byId("prompt").value = found.get("text");
  const ids = (found.get("ids") ?? "").split(",").filter(Boolean).map(Number);
  if (!ids.length) return;
  branches = [];
  place = 0;
  const given = Number(found.get("given"));
  await complete(ids, true, 0);
  draw(0, tokens.map((token, i) => ({ ...token, given: i < given })));
  request = { ...request, prompt: ids.slice(0, Number(found.get("from"))) };
  byId("prompt").value = new TextDecoder().decode(new Uint8Array(tokens.filter((token) => token.given).flatMap((token) => token.bytes)));
  keep();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  branches = [];
  place = 0;
  byId("choice").hidden = true;
  attempt(() => complete(byId("prompt").value || [END], true));
});
byId("more").addEventListener("click", () => attempt(() => { remember("continued"); return complete(tokens.map((token) => token.id), false); }));
byId("stop").addEventListener("click", () => running?.abort());
byId("undo").addEventListener("click", () => visit(branches[place].parent));
chips.addEventListener("click", (event) => { const at = event.target.closest(".chip")?.dataset.place; if (at) choose(+at); });
chips.addEventListener("keydown", (event) => {
  const at = Number(document.activeElement.dataset.place);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (to !== undefined) { event.preventDefault(); choose(to); }
  if (event.key === "ArrowDown" || event.key === "Enter") { event.preventDefault(); choose(at); byId("others").querySelector("button")?.focus(); }
});
byId("others").addEventListener("keydown", (event) => {
  const all = [...byId("others").querySelectorAll("button")], at = all.indexOf(document.activeElement);
  const to = { ArrowDown: all[at + 1], ArrowUp: all[at - 1], Escape: button(chosen) }[event.key];
  if (to) { event.preventDefault(); to.focus(); }
});
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", event.target.elements.key.value);
  byId("key").hidden = true;
  attempt(begin);
});
for (const copy of document.querySelectorAll("[data-copy]"))
  copy.addEventListener("click", () => attempt(async () => { await navigator.clipboard.writeText(byId(copy.dataset.copy).textContent); say("Copied."); }));
byId("four").addEventListener("click", () => attempt(() => openFour({ model: model(), prompt: byId("prompt").value || [END], ...settings() })));
byId("record").addEventListener("click", () => attempt(() => recordStep(model(), { model: model(), prompt: byId("prompt").value || [END] })));
for (const id of ["layer", "head"]) byId(id).addEventListener("change", () => attempt(() => showAttention(model(), tokens, Math.max(chosen, 0))));
byId("engine").addEventListener("toggle", () => {
  const again = () => { if (byId("engine").open) attempt(() => showNumbers(model())).then(() => setTimeout(again, 1000)); };
  again();
});
window.addEventListener("hashchange", () => attempt(restore));

async function begin() {
  const { data } = await (await ask("v1/models")).json();
  byId("model").replaceChildren(...data.map(({ id }) => make("option", { textContent: id, value: id })));
  const wanted = new URLSearchParams(location.hash.slice(1)).get("model");
  if (data.some(({ id }) => id === wanted)) byId("model").value = wanted;
  say("");
  await restore();
}
attempt(begin);
