// The server's API: requests, streams, metrics. Paths are relative, so the page works under any prefix.

export class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function ask(path, body, signal) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  throw new ApiError(answer.status, found.error?.message ?? `the server answered ${answer.status}`);
}

/** Yield the choices of a streamed completion. */
export async function* stream(body, signal) {
  const answer = await ask("v1/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended early: the text is not complete");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (!part.startsWith("data: ")) continue;
      const found = JSON.parse(part.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield* found.choices;
    }
  }
}

/** Return the metrics of one model: name to value, labels other than the model's left out. */
export async function metrics(model) {
  const found = {};
  for (const line of (await (await ask("metrics")).text()).split("\n")) {
    const [, name, labels, value] = line.match(/^pygpt:(\w+)\{(.*)\} (\S+)$/) ?? [];
    if (name && labels.startsWith(`model_name=${JSON.stringify(model)}`) && !labels.includes("le=")) found[name] = +value;
  }
  return found;
}
