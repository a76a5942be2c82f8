// The page: a text of tokens, its branches, and the address that keeps them. Text from a model is only ever set as textContent.
const byId = (id) => document.getElementById(id);
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
const button = (at) => chips.querySelector(`[data-place="${at}"]`);
const typed = () => byId("prompt").value || [END];

/** Ask the server. Paths are relative, so the page works under any prefix. */
async function ask(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  throw Object.assign(new Error(found.error?.message ?? `the server answered ${answer.status}`), { status: answer.status });
}

/** Yield the choices of a streamed completion. */
async function* stream(body, signal) {
  const answer = await ask("v1/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended early: the text is not complete");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts.filter((one) => one.startsWith("data: "))) {
      if (part === "data: [DONE]") return;
      const found = JSON.parse(part.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield* found.choices;
    }
  }
}

const whole = new TextDecoder("utf-8", { fatal: true });
const hex = (byte) => "\\x" + byte.toString(16).padStart(2, "0");

/** Return the class of a probability's colour, p1 to p5. */
const shade = (probability) => `p${1 + Math.min(4, Math.floor(5 * probability))}`;

/** Return a token's text with visible white space; bytes that are not whole characters are shown as numbers. */
function shown(bytes) {
  let text;
  try { text = whole.decode(new Uint8Array(bytes)); } catch { return bytes.map(hex).join(""); }
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\ufeff]/g, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`)
    .replaceAll(" ", "\u00b7").replaceAll("\t", "\u2192").replaceAll("\n", "\u21b5");
}

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 9.95 ? value.toFixed(0) : value >= 0.095 ? value.toFixed(1) : "<0.1";
};

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Return the button of a token {bytes, logprob, given}. */
function chip(token, place) {
  const text = shown(token.bytes), known = token.logprob != null;
  const kind = token.given ? "given" : shade(Math.exp(token.logprob ?? 0));
  const small = make("small", { textContent: known ? percent(token.logprob) : "\u2013" }), names = { ariaPressed: "false" };
  if (token.given) names.ariaDescription = "given";
  const button = make("button", { type: "button", tabIndex: -1, className: `chip ${kind}`, ...names }, text, small);
  button.dataset.place = place;
  return text.endsWith("\u21b5") ? [button, make("br")] : [button];
}

/** Return a row of a table: a name, which may be a button, a value, and perhaps a picture of it. */
const row = (name, value, ...more) =>
  make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value), ...more.map((one) => make("td", {}, one)));

/** Return the row of an alternative. */
const share = (name, value) =>
  row(name, `${percent(Math.log(value))} %`, make("meter", { min: 0, max: 1, value, ariaLabel: "probability" }));

const SVG = "http://www.w3.org/2000/svg";
let before = null;

/** Show the server's numbers; call it again after a second. */
async function showNumbers(model) {
  const now = {};
  for (const line of (await (await ask("metrics")).text()).split("\n")) {
    const [, name, labels, value] = line.match(/^pygpt:(\w+)\{(.*)\} (\S+)$/) ?? [];
    if (name && labels.startsWith(`model_name=${JSON.stringify(model)}`) && !labels.includes("le=")) now[name] = +value;
  }
  const at = performance.now();
  const rate = before && before.model === model ? (1000 * (now.generation_tokens_total - before.tokens)) / (at - before.at) : 0;
  before = { model, at, tokens: now.generation_tokens_total };
  const mean = (name) => (now[`${name}_count`] ? `${((1000 * now[`${name}_sum`]) / now[`${name}_count`]).toFixed(1)} ms` : "\u2013");
  const rows = {
    "New tokens a second": rate.toFixed(1),
    "Running sequences": now.num_requests_running,
    "Waiting sequences": now.num_requests_waiting,
    "Time to the first token, mean": mean("time_to_first_token_seconds"),
    "Between two tokens, mean": mean("inter_token_latency_seconds"),
    "Prompt tokens from the prefix cache": `${now.prefix_cache_hits_total} of ${now.prefix_cache_queries_total}`,
    "Keys and values, share in use": `${(100 * now.kv_cache_usage_perc).toFixed(2)} %`,
    "Drafted tokens that were accepted": `${now.spec_decode_num_accepted_tokens_total} of ${now.spec_decode_num_draft_tokens_total}`,
  };
  byId("numbers").replaceChildren(...Object.entries(rows).map(([name, value]) => row(name, value)));
}

/** Run four completions of one prompt at once, with four seeds. */
async function openFour(request) {
  const lines = [1, 2, 3, 4].map(() => make("li"));
  byId("lines").replaceChildren(...lines);
  await Promise.all(lines.map(async (line, seed) => {
    for await (const choice of stream({ ...request, seed: seed + 1 })) line.textContent += choice.text;
  }));
}

/** Draw one real step: a line for each worker, a box for each phase, and a table of the sums. */
async function recordStep(model, request) {
  let traced = false; // a completion may end before the server is asked for the next step: then another one runs
  const run = async () => { while (!traced) for await (const _ of stream({ ...request, max_tokens: 3 })); };
  const [answer] = await Promise.all([ask("trace", { model }).finally(() => { traced = true; }), run()]);
  const { workers } = await answer.json();
  const end = Math.max(1, ...workers.flat().map((phase) => phase[4]));
  const picture = document.createElementNS(SVG, "svg"), wide = byId("timeline").clientWidth; // so text keeps its size
  picture.setAttribute("viewBox", `0 0 ${wide} ${40 * workers.length + 20}`);
  picture.ariaLabel = `One step of ${workers.length} workers in ${end.toFixed(0)} microseconds; the table has the sums`;
  picture.role = "img";
  const add = (tag, attributes, text = "") => {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    picture.append(made);
  };
  const sums = new Map();
  workers.forEach((phases, worker) => {
    add("text", { x: 0, y: 40 * worker + 12 }, `worker ${worker}`);
    phases.forEach(([name, , begin, stop], i) => {
      add("rect", { x: (wide * begin) / end, y: 40 * worker + 16, width: Math.max(0.3, (wide * (stop - begin)) / end), height: 20, class: i % 2 ? "odd" : "even" });
      sums.set(name, (sums.get(name) ?? 0) + stop - begin);
    });
  });
  const rows = [...sums].sort((a, b) => b[1] - a[1]).map(([name, us]) => row(name, `${us.toFixed(0)} \u00b5s`));
  byId("timeline").replaceChildren(picture, make("table", {}, make("caption", { className: "hint", textContent: `Work of all workers by phase, in a step of ${end.toFixed(0)} \u00b5s` }), make("tbody", {}, ...rows)));
}

/** Show the attention of one head from the token at `place`, as a table and as shading of the chips, and the logit lens. */
async function showAttention(model, tokens, place) {
  const layer = +byId("layer").value, head = +byId("head").value;
  const asked = { model, tokens: tokens.slice(0, place + 1).map((token) => token.id), layer };
  const { attention, lens } = await (await ask("inspect", asked)).json();
  const weights = attention[head];
  if (!weights) throw new Error(`layer ${layer} has the heads 0 to ${attention.length - 1}`);
  const most = weights.map((weight, i) => [weight, i]).sort((a, b) => b[0] - a[0]).slice(0, 10);
  byId("attention").replaceChildren(...most.map(([weight, i]) => share(`${i}: ${shown(tokens[i].bytes)}`, weight)));
  const guess = ({ bytes, logprob }) => `${shown(bytes)} ${(100 * Math.exp(logprob)).toFixed(0)}%`;
  byId("lens").replaceChildren(...lens.map((top, i) => row(i ? `layer ${i - 1}` : "embedding", ...top.map(guess))));
  byId("attention-text").textContent = `Layer ${layer}, head ${head}, from token ${place}: ${shown(tokens[place].bytes)}`;
  for (const button of document.querySelectorAll(".chip")) button.className = `chip ${shade(weights[button.dataset.place] ?? 0)}`;
}

/** Run something that may fail, and show its error. */
async function attempt(action) {
  try { await action(); } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : `Error: ${error.message}`);
    if (error.status === 401) byId("key").hidden = false;
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
  let left = typeof prompt === "string" ? new TextEncoder().encode(prompt).length : Infinity;
  try {
    for await (const { logprobs: found } of stream({ ...asked, logprobs: 10, echo }, running.signal)) {
      draw(tokens.length, found.token_ids.map((id, i) => {
        const bytes = found.bytes[i], isGiven = tokens.length + i < given && left > 0;
        left -= bytes.length;
        return { id, bytes, logprob: found.token_logprobs[i], top: found.top[i], given: isGiven };
      }));
    }
    say(`${tokens.length} token${tokens.length === 1 ? "" : "s"}.`);
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
  chips.append(...fresh.flatMap((token, i) => chip(token, from + i)));
  if (!chips.querySelector('[tabindex="0"]')) chips.querySelector("button")?.setAttribute("tabindex", "0");
}

/** Choose a token, and show its alternatives. */
function choose(at, focus = true) {
  if (!tokens[at]) return;
  for (const old of chips.querySelectorAll('[tabindex="0"]')) Object.assign(old, { tabIndex: -1, ariaPressed: "false" });
  chosen = at;
  Object.assign(button(at), { tabIndex: 0, ariaPressed: "true" });
  if (focus) button(at).focus();
  const token = tokens[at];
  byId("choice").hidden = !token.top;
  byId("choice-title").textContent = `Alternatives to ${shown(token.bytes)}`;
  const rows = (token.top ?? []).map(([id, name, logprob]) => {
    const bytes = bytesOf(name);
    const take = () => attempt(() => branch(at, id, bytes, logprob));
    return share(make("button", { type: "button", textContent: shown(bytes), onclick: take }), Math.exp(logprob));
  });
  const rest = 1 - (token.top ?? []).reduce((sum, [, , logprob]) => sum + Math.exp(logprob), 0);
  byId("others").replaceChildren(...rows, share("all others", Math.max(0, rest)));
  if (byId("inside").open) attempt(() => showAttention(model(), tokens, at));
}

/** Return the bytes of an alternative's name, which the server writes as bytes:\xNN if it is not text. */
function bytesOf(name) {
  if (/^bytes:(\\x[0-9a-f]{2})+$/.test(name)) return name.slice(6).match(/[0-9a-f]{2}/g).map((digits) => parseInt(digits, 16));
  return [...new TextEncoder().encode(name)];
}

/** Put another token at a place, and continue from there. */
async function branch(at, id, bytes, logprob) {
  if (running) return;
  remember(`${shown(tokens[at].bytes)} \u2192 ${shown(bytes)}`);
  draw(at, [{ id, bytes, logprob, top: tokens[at].top, given: false }]);
  choose(at, false);
  await complete(tokens.map((token) => token.id), false);
}

/** Begin a new branch: the current text stays in the list. */
function remember(label) { place = branches.push({ label, tokens, request, parent: place }) - 1; }

/** Keep the current text in the list and in the address, and show how to get it elsewhere. */
function keep() {
  if (!branches.length) branches.push({ label: "the beginning" });
  const { prompt, ...rest } = { ...request, max_tokens: tokens.length - request.prompt.length };
  Object.assign(branches[place], { tokens, request });
  const address = new URLSearchParams({ ...rest, given: tokens.filter((token) => token.given).length, from: prompt.length });
  history.replaceState(null, "", `#${address}&ids=${tokens.map((token) => token.id).join(",")}`);
  const list = branches.map(({ label }, i) => {
    const how = { ariaCurrent: `${i === place}`, onclick: () => visit(i) };
    return make("li", {}, make("button", { type: "button", textContent: label, ...how }));
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
  attempt(() => complete(typed(), true));
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
byId("four").addEventListener("click", () => attempt(() => openFour({ model: model(), prompt: typed(), ...settings() })));
byId("record").addEventListener("click", () => attempt(() => recordStep(model(), { model: model(), prompt: typed() })));
for (const id of ["layer", "head"]) byId(id).addEventListener("change", () => attempt(() => showAttention(model(), tokens, Math.max(chosen, 0))));
const watch = () => { if (byId("engine").open) attempt(() => showNumbers(model())).then(() => setTimeout(watch, 1000)); };
byId("engine").addEventListener("toggle", watch);
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
