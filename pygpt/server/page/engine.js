// The folds: what the engine does, and what the network attends to.
import { ask, metrics, stream } from "./api.js";
import { byId, make, row, shade, share, shown } from "./chips.js";

const SVG = "http://www.w3.org/2000/svg";
let before = null;

/** Show the server's numbers; call it again after a second. */
export async function showNumbers(model) {
  const now = await metrics(model), at = performance.now();
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
export async function openFour(request) {
  const lines = [1, 2, 3, 4].map(() => make("li"));
  byId("lines").replaceChildren(...lines);
  await Promise.all(lines.map(async (line, seed) => {
    for await (const choice of stream({ ...request, seed: seed + 1 })) line.textContent += choice.text;
  }));
}

/** Draw one real step: a line for each worker, a box for each phase, and a table of the sums. */
export async function recordStep(model, request) {
  let traced = false; // a completion may end before the server is asked for the next step: then another one runs
  const run = async () => { while (!traced) for await (const _ of stream({ ...request, max_tokens: 3 })); };
  const [answer] = await Promise.all([ask("trace", { model }).finally(() => { traced = true; }), run()]);
  const { workers } = await answer.json();
  const end = Math.max(1, ...workers.flat().map((phase) => phase[4]));
  const picture = document.createElementNS(SVG, "svg"), wide = byId("timeline").clientWidth; // so text keeps its size
  picture.setAttribute("viewBox", `0 0 ${wide} ${40 * workers.length + 20}`);
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", `One step of ${workers.length} workers in ${end.toFixed(0)} microseconds; the table has the sums`);
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

/** Show the attention of one head from the token at `place`, as a table and as shading of the chips. */
export async function showAttention(model, tokens, place) {
  const layer = +byId("layer").value, head = +byId("head").value;
  const asked = { model, tokens: tokens.slice(0, place + 1).map((token) => token.id), layer };
  const { attention } = await (await ask("inspect", asked)).json();
  const weights = attention[head];
  if (!weights) throw new Error(`layer ${layer} has the heads 0 to ${attention.length - 1}`);
  const most = weights.map((weight, i) => [weight, i]).sort((a, b) => b[0] - a[0]).slice(0, 10);
  byId("attention").replaceChildren(...most.map(([weight, i]) => share(`${i}: ${shown(tokens[i].bytes)}`, weight)));
  byId("attention-text").textContent = `Layer ${layer}, head ${head}, from token ${place}: ${shown(tokens[place].bytes)}`;
  for (const button of document.querySelectorAll(".chip")) button.className = `chip ${shade(weights[button.dataset.place] ?? 0)}`;
}
