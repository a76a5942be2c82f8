"""Look inside a model: its prediction layer by layer, and the heads that matter.

    pygpt look "The king is dead, long live the"
    pygpt look "To be, or not to" -m gpt2 -k 3
    pygpt look "To be, or not to" --plot pictures -o json

Each token has a loss, which is minus the logarithm of its probability. The logit lens shows what each layer would predict after
the last token if it were the last layer. Then the lead of the most probable token over the second is split into what each part
of the network adds to it. For the heads that add or remove most, three facts follow. These are the lead's change if the head's
output is zero, the token that the head attends to most, and the head's attention to that token.

--plot writes lens, heads and attention (of the first of these heads) as .svg and .png.

JSON (-o json) is one object with the fields model, threads, and

    tokens     [id, text (null for a part of a character), loss (nats; null for the first token)]
    lens       [layer (null for the embedding), top [id, text, probability]]
    lead       token, against (ids), logits (the lead), embedding, heads (by layer), mlps (by layer), rest: parts of the lead
    heads      [layer, head, adds, zeroed (the lead's change), attends (position), attention]

Exit status: 0 for success; 1 for a failure at run time; 2 for bad input, with one line on stderr; 130 after Ctrl-C.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..activations import zero
from ..errors import InputError
from ..formats.text import given_text
from ..generation.logprobs import token_info
from ..hub.find import find_model
from ..inspection.lens import Logit, attention_patterns, logit_attribution, logit_lens
from ..inspection.losses import loss_by_position
from ..inspection.show import FORMATS, heat_map, matplotlib, table
from ..model import GPT2
from ..tokenizer import Tokenizer, tokenizer_of
from .console import Parser, check_stdout, status_of, whole
from .eval import as_text, quoted
from .options import THREADS_HELP, TOKENIZER_HELP

LONGEST = 16  # characters of a token in the tables
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt look", usage="pygpt look TEXT [options]", description=__doc__)
    add = parser.add_argument
    add("text", metavar="TEXT", help="the text to look at, at least two tokens")
    add("-m", "--model", metavar="MODEL", help="a model file or a downloaded model (default: see pygpt --help)")
    add("-t", "--threads", metavar="N", type=whole(1, 256), help=THREADS_HELP)
    add("--tokenizer", metavar="FILE", help=TOKENIZER_HELP)
    add("-k", "--top", metavar="K", type=whole(2, 50), default=5, help="number of predictions and heads to show (default 5)")
    add("-o", "--output", metavar="FORMAT", default="text", help="text (default) or json")
    add("--plot", metavar="DIR", help="write pictures into this folder as SVG and PNG (needs matplotlib)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, look, and print the result."""
    if options.output not in ("text", "json"):
        raise InputError(f"-o is {options.output[:40]!r}: it must be text or json")
    check_stdout("the result")
    if options.plot is not None:
        matplotlib()  # if it is missing, report that now
        os.makedirs(options.plot, exist_ok=True)
    path = find_model(options.model)[0]
    with GPT2.load(path, threads=options.threads, tokenizer=options.tokenizer) as model:
        tokenizer = tokenizer_of(model.config)
        ids = tokenizer.encode(given_text(options.text))
        if not 2 <= len(ids) <= model.config.maxT:
            raise InputError(f"the text has {len(ids)} tokens: give a text of 2 to {model.config.maxT} tokens")
        result = {"model": path, "threads": model.threads, **look(model, tokenizer, ids, min(options.top, model.config.V))}
        if options.plot is not None:
            draw(options.plot, model, tokenizer, result)
    print(json.dumps(result) if options.output == "json" else text_of(tokenizer, result))


def look(model: GPT2, tokenizer: Tokenizer, ids: list[int], k: int) -> Result:
    """Return the facts about the last token's prediction, as the JSON output has them."""

    def fact(token: int, name: str, value: float | None) -> Result:
        return {"id": token, "text": as_text(tokenizer.decode_bytes([token])), name: value}

    last = len(ids) - 1
    losses = [None, *loss_by_position(model, ids).tolist()]
    lens = logit_lens(model, ids, positions=[last])[:, 0]  # [L + 1, V]
    tops = [token_info(memoryview(lens), row, 0, k).top for row in range(len(lens))]
    lead = Logit(*(token for token, _ in tops[-1][:2]))
    parts = {name: part.tolist() for name, part in logit_attribution(model, ids, lead).items()}
    return {
        "tokens": [fact(token, "loss", loss) for token, loss in zip(ids, losses, strict=True)],
        "lens": [
            {"layer": row - 1 if row else None, "top": [fact(token, "probability", math.exp(chance)) for token, chance in top]}
            for row, top in enumerate(tops)
        ],
        "lead": {"token": lead.token, "against": lead.against, "logits": lead(lens[-1:]), **parts},
        "heads": heads_of(model, ids, lead, lead(lens[-1:]), parts["heads"], k),
    }


def heads_of(model: GPT2, ids: list[int], lead: Logit, plain: float, adds: list[list[float]], k: int) -> list[Result]:
    """Return facts about the k heads that add or remove most."""
    last, found = [len(ids) - 1], []
    patterns = model.activations(ids, ["probs"], positions=last)["probs"][:, :, 0]  # [L, NH, T]
    places = sorted(np.ndindex(patterns.shape[:2]), key=lambda place: -abs(adds[place[0]][place[1]]))
    for layer, head in places[:k]:
        edits = {("atty", layer, None): zero(heads=[head])}
        zeroed = lead(model.activations(ids, ["logits"], positions=last, edits=edits)["logits"]) - plain
        at = int(patterns[layer, head].argmax())
        seen = {"attends": at, "attention": float(patterns[layer, head, at])}
        found.append({"layer": layer, "head": head, "adds": adds[layer][head], "zeroed": zeroed, **seen})
    return found


def text_of(tokenizer: Tokenizer, result: Result) -> str:
    """Return the result as text of at most 100 columns."""
    tokens, lens, lead, heads = result["tokens"], result["lens"], result["lead"], result["heads"]
    names = [shortened(tokenizer, token["id"]) for token in tokens]
    losses = ["" if token["loss"] is None else f"{token['loss']:.2f}" for token in tokens]
    layers = ["embedding", *(f"layer {row['layer']}" for row in lens[1:])]
    ranks = [f"{rank}." for rank in range(1, len(lens[0]["top"]) + 1)]
    tops = [[f"{shortened(tokenizer, top['id'])} {100 * top['probability']:5.1f}" for top in row["top"]] for row in lens]
    parts = {"embedding": lead["embedding"], "heads": sum(map(sum, lead["heads"])), "mlps": sum(lead["mlps"])}
    parts |= {"rest": lead["rest"], "sum": lead["logits"]}
    facts = [
        [f"{row['adds']:+.2f}", f"{row['zeroed']:+.2f}", f"{row['attends']} {names[row['attends']]}", f"{row['attention']:.2f}"]
        for row in heads
    ]
    ahead = " over ".join(shortened(tokenizer, lead[name]) for name in ("token", "against") if lead[name] is not None)
    return "\n".join(
        [
            f"{len(tokens)} tokens, {result['model']}, {result['threads']} threads",
            table([[str(token["id"]) for token in tokens], losses], ["id", "loss"], names),
            f"\nwhat each layer would predict after {names[-1]}, with probabilities in %",
            table(tops, layers, ranks),
            f"\nthe lead of {ahead}, in logits: what the parts of the network add to it",
            table([[f"{part:+.2f}" for part in parts.values()]], [""], list(parts)),
            "\nthe heads that add or remove most, and the lead's change if the head's output is zero",
            table(facts, [f"layer {row['layer']} head {row['head']}" for row in heads], ["adds", "zeroed", "attends to", "by"]),
        ]
    )


def shortened(tokenizer: Tokenizer, token: int) -> str:
    """Return a token for a table."""
    name = quoted(tokenizer.decode_bytes([token]))
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def draw(folder: str, model: GPT2, tokenizer: Tokenizer, result: Result) -> None:
    """Write the pictures into the folder."""
    names = [shortened(tokenizer, token["id"]) for token in result["tokens"]]
    layers = ["embedding", *(f"layer {layer}" for layer in range(model.config.L))]
    tops = [[shortened(tokenizer, top["id"]) for top in row["top"]] for row in result["lens"]]
    chances = [[top["probability"] for top in row["top"]] for row in result["lens"]]
    first, ids = result["heads"][0], [token["id"] for token in result["tokens"]]
    pattern = attention_patterns(model, ids, layers=[first["layer"]])[0, first["head"]]
    heads = [f"head {head}" for head in range(model.config.NH)]
    for ending in FORMATS:
        place = os.path.join(folder, "{}" + ending)
        ranks = [f"{rank}." for rank in range(1, len(tops[0]) + 1)]
        heat_map(chances, place.format("lens"), rows=layers, columns=ranks, title=f"after {names[-1]}: probability", cells=tops)
        adds = result["lead"]["heads"]
        heat_map(adds, place.format("heads"), rows=layers[1:], columns=heads, title="what each head adds to the lead")
        title = f"attention of layer {first['layer']} head {first['head']}"
        heat_map(pattern, place.format("attention"), rows=names, columns=names, title=title)
