"""Measure a model: perplexity of a text, HellaSwag, and the most probable next tokens.

    pygpt eval perplexity book.txt                          each token once, with at least half a window of context
    pygpt eval perplexity val.bin -m gpt2_124M.bin --stride 256 -n 100000
    pygpt eval hellaswag hellaswag_val.bin -m gpt2_124M.bin -n 1000
    pygpt eval next "The capital of France is" -k 5
    pygpt eval next "To be, or not to" -o json

Perplexity slides a window of --window tokens (default maxT) over the text, by --stride tokens (default half a window). Each
window scores the tokens that the window before did not reach. So each token except the first is scored once, and in later
windows with at least window - stride tokens of context. --window T+1 --stride T scores blocks of T tokens, as training does.
If the stride is the whole window, the first token of each window is left out, because it has no context.
HellaSwag counts an example as right if its right ending has the lowest summed loss (acc) or mean loss (acc_norm).

JSON (-o json), one object: task, model, threads, seconds, tokens_per_s (of the rows that ran), and
    perplexity    file, tokens, scored, window, stride, loss (nats a token), perplexity (null above 1e307)
    hellaswag     file, examples, right, right_norm, acc, acc_norm
    next          prompt [ids], next [id, text (null for a part of a character), bytes (hex), probability, logprob (nats)]

Exit status: 0; 1 for a failure at run time; 2 for bad input, with one line on stderr; 130 after Ctrl-C.
Sources: Hugging Face, "Perplexity of fixed-length models"; llm.c, dev/data/hellaswag.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, NumericalError
from ..formats.llmc import Example, read_examples
from ..formats.shards import read_tokens
from ..formats.text import read_text, tokens_of_text
from ..hub.find import find_model
from ..model import GPT2
from ..network import KVCache
from ..tokenizer import Tokenizer
from .console import HelpFormatter, Parser, check_stdout, status_of, whole
from .progress import Progress

ROWS = 128  # of one step: their logits take 26 MB with GPT-2's vocabulary
FLOAT64_ROWS = 16  # rows of logits widened at a time: 6 MB
LARGEST_LOSS = 709  # nats: e to a higher power overflows a float
BAR = 30  # columns
MOST = 2**31 - 1  # tokens or examples
Losses = npt.NDArray[np.float64]
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


# ------------------------------------------------------------------------------------------------ arguments


def build_parser() -> argparse.ArgumentParser:
    """The options and their help."""
    shared = Parser(add_help=False)
    add = shared.add_argument
    add("-m", "--model", metavar="MODEL", help="a checkpoint, or a downloaded model's name (default: as the command finds one)")
    add(
        "-t", "--threads", metavar="N", type=whole(1, 256), help="workers (default $PYGPT_THREADS, else what fits this machine)"
    )
    add("-o", "--output", metavar="FORMAT", default="text", help="text (default) or json")
    parser = Parser(
        prog="pygpt eval",
        usage="pygpt eval perplexity|hellaswag|next ... [options]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK")

    def task(name: str, positional: str, meaning: str, summary: str) -> argparse.ArgumentParser:
        made = tasks.add_parser(
            name,
            parents=[shared],
            usage=f"pygpt eval {name} {positional} [options]",
            description=summary,
            help=summary,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        made.add_argument("subject", metavar=positional, help=meaning)
        return made

    one = task("perplexity", "TEXT", "UTF-8 text, or - for stdin, or a token file (.bin)", "perplexity and loss of a text")
    count = whole(1, MOST)
    one.add_argument(
        "--window", metavar="W", type=count, help="tokens that the model sees at once (default maxT, at most maxT + 1)"
    )
    one.add_argument("--stride", metavar="S", type=count, help="tokens from one window to the next (default half a window)")
    one.add_argument("-n", "--limit", metavar="N", type=count, help="take the first N tokens only")
    two = task("hellaswag", "FILE", "llm.c's hellaswag_val.bin, or any file of its format", "multiple choice: acc and acc_norm")
    two.add_argument("-n", "--limit", metavar="N", type=count, help="take the first N examples only")
    three = task("next", "PROMPT", "the text before", "what the model expects next")
    three.add_argument("-k", "--top", metavar="K", type=count, default=10, help="how many tokens to show (default 10)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, open the model, do the task, print what it gave."""
    if options.task is None:
        raise InputError("no task was given: perplexity, hellaswag or next; see --help")
    if options.output not in ("text", "json"):
        raise InputError(f"-o is {options.output[:40]!r}: it must be text or json")
    check_stdout("the result")
    path, _ = find_model(options.model)
    with GPT2.load(path, threads=options.threads) as model:
        start = time.perf_counter()
        result, rows, text = {"perplexity": perplexity, "hellaswag": hellaswag, "next": following}[options.task](model, options)
        seconds = time.perf_counter() - start
        facts = {
            "task": options.task,
            "model": path,
            "threads": model.threads,
            "seconds": seconds,
            "tokens_per_s": rows / seconds,
        }
    print(json.dumps(facts | result) if options.output == "json" else text)
    if options.output == "text" and options.task != "next":
        print(f"{rows / seconds:.1f} tokens/s in {seconds:.1f} s, {facts['threads']} threads, {path}")


# ------------------------------------------------------------------------------------------------ losses


def losses_of(logits: npt.NDArray[np.float32], targets: Sequence[int]) -> Losses:
    """Minus the log-probability of each row's target, in nats: [rows, V], [rows] -> [rows], computed in float64."""
    out = np.empty(len(targets))
    for start in range(0, len(targets), FLOAT64_ROWS):
        rows = logits[start : start + FLOAT64_ROWS].astype(np.float64)  # [16, V]
        chosen = rows[np.arange(len(rows)), targets[start : start + FLOAT64_ROWS]]  # [16]
        out[start : start + FLOAT64_ROWS] = log_sums(rows) - chosen  # [16]
    return out


def log_sums(rows: Losses) -> Losses:
    """The logarithm of the summed exponentials of each row's logits: [rows, V] -> [rows]."""
    top = rows.max(axis=1)  # [rows]
    out: Losses = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))  # [rows]
    if not np.isfinite(out).all():
        raise NumericalError("the network's logits are not finite: the model file's weights are damaged or out of range")
    return out


def score(model: GPT2, cache: KVCache, tokens: Sequence[int], targets: Sequence[int]) -> Losses:
    """Append tokens to the cache; return the losses of the last ones' successors, `targets`."""
    silent = len(tokens) - len(targets)  # rows that only give context
    found = [np.empty(0)]
    for start in range(0, len(tokens), ROWS):
        stop = min(start + ROWS, len(tokens))
        logits = model.step([(tokens[i], cache, i >= silent) for i in range(start, stop)])
        found.append(losses_of(logits, targets[max(0, start - silent) : max(0, stop - silent)]))
    return np.concatenate(found)


# ------------------------------------------------------------------------------------------------ perplexity


def perplexity(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """The result, the rows that ran, and the result in words."""
    most = model.config.maxT + 1  # a window's last token is only predicted
    window = max(2, model.config.maxT) if options.window is None else options.window
    if not 2 <= window <= most:
        raise InputError(f"--window is {window}: it must be from 2 to maxT + 1 = {most}")
    stride = window // 2 if options.stride is None else options.stride
    if not 1 <= stride <= window:
        raise InputError(f"--stride is {stride}: it must be from 1 to the window's {window}")
    tokens = tokens_in(options.subject, model)[: options.limit]
    if len(tokens) < 2:
        raise InputError(f"{options.subject}: {len(tokens)} tokens: at least 2 are needed: the first one has no context")
    rows = scored = 0
    sums: list[float] = []  # of the losses, by window
    with Progress("tokens", len(tokens) - 1) as progress:
        for begin, first, end in windows(len(tokens), window, stride):
            ids = tokens[begin:end].tolist()
            sums.append(math.fsum(score(model, model.new_cache(len(ids) - 1), ids[:-1], ids[first - begin :])))
            rows, scored = rows + len(ids) - 1, scored + end - first
            progress.update(scored, f", loss {sum(sums) / scored:.4f}")
    loss = math.fsum(sums) / scored
    power = math.exp(loss) if loss < LARGEST_LOSS else None
    result = {
        "file": options.subject,
        "tokens": len(tokens),
        "scored": scored,
        "window": window,
        "stride": stride,
        "loss": loss,
        "perplexity": power,
    }
    shown = "infinite" if power is None else f"{power:.4f}"
    return result, rows, f"perplexity {shown}, loss {loss:.6f} nats a token, {scored} tokens, window {window}, stride {stride}"


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end): a window [begin, end) scores the tokens [first, end), one at least."""
    first = 1
    for begin in range(0, count - 1, stride):
        end = min(begin + window, count)
        yield begin, max(first, begin + 1), end
        first = end
        if end == count:
            return


def tokens_in(subject: str, model: GPT2) -> npt.NDArray[np.integer[Any]]:
    """The tokens of a token file (.bin), or of a text, to which nothing is added."""
    if subject.endswith(".bin"):
        return read_tokens(subject, V=model.config.V)
    tokenizer_of(model)
    return tokens_of_text(read_text(subject), eot="none")


def tokenizer_of(model: GPT2) -> Tokenizer:
    """GPT-2's tokenizer, if the model's ids are its ids."""
    tokenizer = Tokenizer()
    if model.config.V != tokenizer.V:
        raise InputError(
            f"the model has {model.config.V} ids, GPT-2's vocabulary {tokenizer.V}: its ids cannot be read as text"
        )
    return tokenizer


# ------------------------------------------------------------------------------------------------ HellaSwag


def hellaswag(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """The result, the rows that ran, and the result in words."""
    done = right = right_norm = rows = 0
    cache = model.new_cache()
    with Progress("examples", options.limit) as progress:
        for example in islice(read_examples(options.subject, V=model.config.V), options.limit):
            cache.truncate(0)
            losses = ending_losses(model, cache, example)
            done += 1
            right += int(np.argmin([loss.sum() for loss in losses])) == example.label
            right_norm += int(np.argmin([loss.mean() for loss in losses])) == example.label
            rows += len(example.context) + sum(len(ending) - 1 for ending in example.endings)
            progress.update(done, f", acc {right / done:.4f}, acc_norm {right_norm / done:.4f}")
    result = {
        "file": options.subject,
        "examples": done,
        "right": right,
        "right_norm": right_norm,
        "acc": right / done,
        "acc_norm": right_norm / done,
    }
    return result, rows, f"acc {right / done:.4f} ({right}/{done}), acc_norm {right_norm / done:.4f} ({right_norm}/{done})"


def ending_losses(model: GPT2, cache: KVCache, example: Example) -> list[Losses]:
    """The losses of each ending's tokens, after the context, which runs once."""
    longest = len(example.context) + max(map(len, example.endings)) - 1  # an ending's last token is only predicted
    if longest > cache.capacity:
        raise InputError(f"example {example.number} has {longest} tokens to run: the model takes {cache.capacity}")
    after_context = model.prefill(cache, example.context)[None]  # [1, V]
    losses = []
    for ending in example.endings:
        first = losses_of(after_context, ending[:1])
        losses.append(np.concatenate([first, score(model, cache, ending[:-1], ending[1:])]))
        cache.truncate(len(example.context))
    return losses


# ------------------------------------------------------------------------------------------------ what comes next


def following(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """The result, the rows that ran, and the result as a table."""
    tokenizer = tokenizer_of(model)
    if options.top > tokenizer.V:
        raise InputError(f"--top is {options.top}: the vocabulary has {tokenizer.V} ids")
    prompt = tokenizer.encode(options.subject)
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    logits = model.prefill(model.new_cache(), prompt).astype(np.float64)  # [V]
    logprobs = logits - log_sums(logits[None])  # [V]
    choices = []
    for token in np.argsort(-logits, kind="stable")[: options.top].tolist():  # the lowest id of equals first
        logprob = float(logprobs[token])
        content = tokenizer.decode_bytes([token])
        choices.append(
            {
                "id": token,
                "text": as_text(content),
                "bytes": content.hex(),
                "probability": math.exp(logprob),
                "logprob": logprob,
            }
        )
    return {"prompt": prompt, "next": choices}, len(prompt), table(choices)


def as_text(content: bytes) -> str | None:
    """Bytes as text, or None for a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def table(choices: list[Result]) -> str:
    """One line a token: its id, its text, its probability, and a bar as long as that is beside the first one's."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    names = [repr(bytes.fromhex(choice["bytes"])) if choice["text"] is None else repr(choice["text"]) for choice in choices]
    names = [name.encode(encoding, "backslashreplace").decode(encoding) for name in names]
    width = max(map(len, names))
    block = "█" if "█".encode(encoding, "ignore") else "#"
    lines = [f"{'id':>6}  {'token':<{width}}  {'%':>7}"]
    for choice, name in zip(choices, names, strict=True):
        bar = block * round(BAR * choice["probability"] / choices[0]["probability"])
        lines.append(f"{choice['id']:>6}  {name:<{width}}  {100 * choice['probability']:7.3f}  {bar}".rstrip())
    return "\n".join(lines)
