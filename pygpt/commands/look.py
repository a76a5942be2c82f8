"""Look inside a model: its prediction layer by layer, and the heads that matter.

    pygpt look "The king is dead, long live the"
    pygpt look "To be, or not to" -m gpt2 -k 3
    pygpt look "To be, or not to" --plot pictures -o json

docs/reference/look.md explains the tables and the pictures, and describes the JSON."""

import argparse
import json
import math
import os
import sys
from typing import Any

import numpy as np

from ..activations import zero
from ..errors import plural
from ..formats.text import given_text
from ..generation.logprobs import token_info
from ..hub.find import find_model
from ..inspection.inside import Logit, logit_attribution, logit_lens, loss_by_position
from ..inspection.show import FORMATS, heat_map, make_plot_folder, text_table
from ..model import GPT2
from ..tokenizer import Tokenizer, tokenizer_of
from .console import Parser, check_stdout, command, piece, text_of, whole
from .options import THREADS_HELP, TOKENIZER_HELP

LONGEST, LONGEST_PATH = 16, 70  # characters of a token in the tables, and of the model's path
Result = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt look", usage="pygpt look TEXT ... [options]", description=__doc__)
    add = parser.add_argument
    add("words", nargs="+", metavar="TEXT", help="the text to look at, at least two tokens")
    add("-m", "--model", metavar="MODEL", help="a model file or a downloaded model (default: see pygpt --help)")
    add("-t", "--threads", metavar="N", type=whole(1, 256), help=THREADS_HELP)
    add("--tokenizer", metavar="FILE", help=TOKENIZER_HELP)
    add("-k", "--top", metavar="K", type=whole(2, 50), default=5, help="number of predictions and heads to show (default 5)")
    add("-o", "--output", metavar="FORMAT", choices=("text", "json"), default="text", help="text (default) or json")
    add("--plot", metavar="DIR", help="write pictures into this folder as SVG and PNG (needs matplotlib)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, look, and print the result."""
    check_stdout("the result")
    path = find_model(options.model)[0]
    if options.plot is not None:
        make_plot_folder(options.plot)
    with GPT2.load(path, threads=options.threads, tokenizer=options.tokenizer) as model:
        tokenizer = tokenizer_of(model.config)
        ids = tokenizer.encode(given_text(" ".join(options.words)))
        result = {"model": path, "threads": model.threads, **look(model, tokenizer, ids, min(options.top, model.config.V))}
        if options.plot is not None:
            draw(options.plot, model, ids, result)
    print(json.dumps(result) if options.output == "json" else report_of(result))


def look(model: GPT2, tokenizer: Tokenizer, ids: list[int], k: int) -> Result:
    """Return the facts about the last token's prediction, as the JSON output has them."""

    def fact(token: int, **more: float | None) -> Result:
        content = tokenizer.decode_bytes([token])
        return {"id": token, "text": text_of(content), "bytes": content.hex(), **more}

    losses, last = [None, *loss_by_position(model, ids).tolist()], [len(ids) - 1]
    lens = logit_lens(model, ids, positions=last)[:, 0]  # [L + 1, V]
    tops = [token_info(lens.data, row, 0, k).top for row in range(len(lens))]
    lead = Logit(*(token for token, _ in tops[-1][:2]))
    plain = lead(lens[-1:])
    parts = {name: part.tolist() for name, part in logit_attribution(model, ids, lead).items()}
    patterns, heads = model.activations(ids, "probs", positions=last)["probs"][:, :, 0], []  # [L, NH, T]
    for layer, head in sorted(np.ndindex(patterns.shape[:2]), key=lambda at: -abs(parts["heads"][at[0]][at[1]]))[:k]:
        found = model.activations(ids, "logits", positions=last, edits={("atty", layer, None): zero(heads=[head])})
        facts = {"layer": layer, "head": head, "adds": parts["heads"][layer][head], "zeroed": lead(found["logits"]) - plain}
        at = int(patterns[layer, head].argmax())
        heads.append({**facts, "attends": at, "attention": float(patterns[layer, head, at])})
    rows = [[fact(token, probability=math.exp(logprob)) for token, logprob in top] for top in tops]
    return {
        "tokens": [fact(token, loss=loss) for token, loss in zip(ids, losses, strict=True)],
        "lens": [{"layer": row - 1 if row else None, "top": top} for row, top in enumerate(rows)],
        "lead": {"token": lead.token, "against": lead.against, "logits": plain, **parts},
        "heads": heads,
    }


def name_of(fact: Result) -> str:
    """Return a token for a table or a picture."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    name = piece(bytes.fromhex(fact["bytes"])).encode(encoding, "backslashreplace").decode(encoding)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def labels_of(result: Result) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the tokens, and the labels of the lens' rows and columns."""
    layers = ["embedding", *(f"layer {row['layer']}" for row in result["lens"][1:])]
    ranks = [f"{rank}." for rank, _ in enumerate(result["lens"][0]["top"], 1)]
    return [name_of(token) for token in result["tokens"]], layers, ranks


def report_of(result: Result) -> str:
    """Return the result as text of at most 100 columns."""
    tokens, lead, (names, layers, ranks) = result["tokens"], result["lead"], labels_of(result)
    losses = ["" if token["loss"] is None else f"{token['loss']:.2f}" for token in tokens]
    tops = [[f"{name_of(top)} {100 * top['probability']:5.1f}" for top in row["top"]] for row in result["lens"]]
    parts = {"embedding": lead["embedding"], "heads": sum(map(sum, lead["heads"])), "mlps": sum(lead["mlps"])}
    parts |= {"rest": lead["rest"], "sum": lead["logits"]}
    heads = [
        [f"{one['adds']:+.2f}", f"{one['zeroed']:+.2f}", f"{(at := one['attends'])} {names[at]}", f"{one['attention']:.2f}"]
        for one in result["heads"]
    ]
    labels = [f"layer {one['layer']} head {one['head']}" for one in result["heads"]]
    path = result["model"] if len(result["model"]) <= LONGEST_PATH else f"...{result['model'][3 - LONGEST_PATH :]}"
    return f"""\
{len(tokens)} tokens, {path}, {plural(result["threads"], "thread")}
{text_table([[str(token["id"]) for token in tokens], losses], ["id", "loss"], names)}

what each layer would predict after {names[-1]}, with probabilities in %
{text_table(tops, layers, ranks)}

the lead of 1. over 2. in the last layer, in logits: what the parts of the network add to it
{text_table([[f"{part:+.2f}" for part in parts.values()]], [""], list(parts))}

the heads that add or remove most, and the lead's change if the head's output is zero
{text_table(heads, labels, ["adds", "zeroed", "attends to", "by"])}"""


def draw(folder: str, model: GPT2, ids: list[int], result: Result) -> None:
    """Write the pictures into the folder."""
    names, layers, ranks = labels_of(result)
    tops = [[name_of(top) for top in row["top"]] for row in result["lens"]]
    chances = [[top["probability"] for top in row["top"]] for row in result["lens"]]
    adds, layer, head = result["lead"]["heads"], result["heads"][0]["layer"], result["heads"][0]["head"]
    pattern = model.activations(ids, "probs", layers=[layer])["probs"][0, head]
    heads = [f"head {number}" for number in range(len(adds[0]))]
    for ending in FORMATS:
        place = os.path.join(folder, "{}" + ending).format
        heat_map(chances, place("lens"), rows=layers, columns=ranks, title=f"after {names[-1]}: probability", cells=tops)
        heat_map(adds, place("heads"), rows=layers[1:], columns=heads, title="what each head adds to the lead")
        heat_map(pattern, place("attention"), rows=names, columns=names, title=f"attention of layer {layer} head {head}")


main = command(build_parser, run)
