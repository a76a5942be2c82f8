// Tokens on the page. Text from a model is only ever set as textContent.
const whole = new TextDecoder("utf-8", { fatal: true });
const hex = (byte) => "\\x" + byte.toString(16).padStart(2, "0");
export const byId = (id) => document.getElementById(id);

/** Return the class of a probability's colour, p1 to p5. */
export const shade = (probability) => `p${1 + Math.min(4, Math.floor(5 * probability))}`;

/** Return a token's text with visible white space; bytes that are not whole characters are shown as numbers. */
export function shown(bytes) {
  let text;
  try { text = whole.decode(new Uint8Array(bytes)); } catch { return bytes.map(hex).join(""); }
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\ufeff]/g, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`)
    .replaceAll(" ", "\u00b7").replaceAll("\t", "\u2192").replaceAll("\n", "\u21b5");
}

export const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 9.95 ? value.toFixed(0) : value >= 0.095 ? value.toFixed(1) : "<0.1";
};

export function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Return the button of a token {bytes, logprob, given}. */
export function chip(token, place) {
  const text = shown(token.bytes), known = token.logprob != null;
  const kind = token.given ? "given" : shade(Math.exp(token.logprob ?? 0));
  const button = make("button", { type: "button", tabIndex: -1, className: `chip ${kind}` }, text);
  button.dataset.place = place;
  button.setAttribute("aria-pressed", "false");
  if (token.given) button.setAttribute("aria-description", "given");
  button.append(make("small", { textContent: known ? percent(token.logprob) : "\u2013" }));
  return text.endsWith("\u21b5") ? [button, make("br")] : [button];
}

/** Return a row of a table: a name, which may be a button, a value, and perhaps a picture of it. */
export const row = (name, value, ...more) =>
  make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value), ...more.map((one) => make("td", {}, one)));

/** Return the row of an alternative. */
export function share(name, probability) {
  const meter = make("meter", { min: 0, max: 1, value: probability });
  meter.setAttribute("aria-label", "probability");
  return row(name, `${percent(Math.log(probability))} %`, meter);
}
