"""Measure a model: perplexity of a text, HellaSwag accuracy, the most probable next tokens, the difference from another model.

    pygpt eval perplexity book.txt
    pygpt eval perplexity val.bin -m gpt2_124M.bin --stride 256 -n 100000
    pygpt eval hellaswag hellaswag_val.bin -m gpt2_124M.bin -n 1000
    pygpt eval next "The capital of France is" -k 5
    pygpt eval next "To be, or not to" -o json
    pygpt eval compare gpt2_124M.bin gpt2_q8.gguf book.txt -n 10000

perplexity slides a window of --window tokens (default maxT) over the text, by --stride tokens (default half a window). Each
window scores the tokens after the previous window, so each token except the first is scored once. In all windows except the
first, a scored token has at least window - stride tokens of context. --window T+1 --stride T scores blocks of T tokens, as in
training. If the stride equals the window, the first token of each window has no context and is not scored.

compare slides the same windows over the text for two models A and B, in any formats. It prints the perplexity of each, the mean
Kullback-Leibler divergence of B from A, and the top-1 agreement. The divergence is the sum of p_A (log p_A - log p_B) over the
vocabulary, in nats. The agreement is the share of positions at which both models have the same most probable token.

hellaswag reads llm.c's hellaswag_val.bin, or HellaSwag's own .jsonl file, whose rows have the fields ctx, endings and label.
Each ending begins with a space, as in llm.c. It counts an example as right if its right ending has the lowest sum of losses
(acc) or the lowest mean loss (acc_norm).

next prints the most probable tokens after the prompt.

JSON (-o json) is one object with the fields task, model, threads, seconds, tokens_per_s (computed rows per second), and

    perplexity    file, tokens (number read), scored (number scored), window, stride, loss (nats per token), perplexity (null
                  above 1e307), bits_per_byte (of the scored text without <|endoftext|>; null for an unknown vocabulary)
    hellaswag     file, examples, right, right_norm (right examples by sum and by mean), acc, acc_norm
    compare       file, tokens, scored, window, stride, loss [A, B], perplexity [A, B], kl_divergence (nats), top1_agreement
                  (0 to 1); model is [A, B]
    next          prompt (ids), next [id, text (null for a part of a character), bytes (hex), probability, logprob (nats)]

Exit status: 0 for success; 1 for a failure at run time; 2 for bad input, with one line on stderr; 130 after Ctrl-C.
Sources: Hugging Face, "Perplexity of fixed-length models"; llm.c, dev/data/hellaswag.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, InputError, shown
from ..formats.llmc import Example, read_examples
from ..formats.shards import read_tokens
from ..formats.text import encode_file, field_of, given_text, holds_rows, joined, read_rows, read_text
from ..hub.find import find_model
from ..inspection.losses import FLOAT64_ROWS, ROWS, Losses, log_sums, losses_of, score
from ..model import GPT2
from ..network import KVCache
from ..tokenizer import tokenizer_of
from .console import Parser, check_stdout, status_of, whole
from .options import TOKENIZER_HELP, add_text_options
from .progress import Progress

LARGEST_LOSS = 709  # nats: for a larger loss, e^loss overflows a float
BAR = 30  # columns of the longest bar
MOST = 2**31 - 1  # largest number of tokens or examples
Result = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


# ------------------------------------------------------------------------------------------------ arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    one_model, shared = Parser(add_help=False), Parser(add_help=False)
    model = "a model file or a downloaded model"
    one_model.add_argument("-m", "--model", metavar="MODEL", help=f"{model} (default: see pygpt --help)")
    add = shared.add_argument
    add("-t", "--threads", metavar="N", type=whole(1, 256), help="threads (default $PYGPT_THREADS, else one per usable core)")
    add("--tokenizer", metavar="FILE", help=TOKENIZER_HELP)
    add("-o", "--output", metavar="FORMAT", default="text", help="text (default) or json")
    parser = Parser(prog="pygpt eval", usage="pygpt eval perplexity|hellaswag|next|compare ... [options]", description=__doc__)
    tasks = parser.add_subparsers(dest="task", metavar="TASK")

    def task(name: str, positional: str, meaning: str, summary: str, before: Sequence[str] = ()) -> argparse.ArgumentParser:
        made = tasks.add_parser(
            name,
            parents=[shared] if before else [one_model, shared],
            usage=f"pygpt eval {' '.join([name, *before, positional])} [options]",
            description=summary,
            help=summary,
        )
        for name in before:
            made.add_argument(name.lower(), metavar=name, help=model)
        made.add_argument("subject", metavar=positional, help=meaning)
        return made

    text = "UTF-8 text, JSON lines (.jsonl), - for stdin, or a token file (.bin)"
    one = task("perplexity", "TEXT", text, "print the perplexity and the loss of a text")
    four = task("compare", "TEXT", text, "compare two models on a text: perplexity, divergence, agreement", before=("A", "B"))
    count, stride = whole(1, MOST), "tokens from one window to the next (default half a window)"
    for made in (one, four):
        made.add_argument("--window", metavar="W", type=count, help="tokens in a window (default maxT, at most maxT + 1)")
        made.add_argument("--stride", metavar="S", type=count, help=stride)
        made.add_argument("-n", "--limit", metavar="N", type=count, help="use only the first N tokens")
        add_text_options(made.add_argument)
    file = "llm.c's hellaswag_val.bin, or HellaSwag's .jsonl"
    two = task("hellaswag", "FILE", file, "print the accuracy on HellaSwag's multiple-choice examples")
    two.add_argument("-n", "--limit", metavar="N", type=count, help="use only the first N examples")
    three = task("next", "PROMPT", "the text before the next token", "print the most probable next tokens")
    three.add_argument("-k", "--top", metavar="K", type=count, default=10, help="number of tokens to print (default 10)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, open the models, run the task, and print the result."""
    if options.task is None:
        raise InputError("the task is missing: give perplexity, hellaswag, next or compare; see --help")
    if options.output not in ("text", "json"):
        raise InputError(f"-o is {options.output[:40]!r}: it must be text or json")
    check_stdout("the result")
    names = [options.a, options.b] if options.task == "compare" else [options.model]
    paths = [find_model(name)[0] for name in names]
    with ExitStack() as opened:
        models = [opened.enter_context(GPT2.load(path, threads=options.threads, tokenizer=options.tokenizer)) for path in paths]
        start = time.perf_counter()
        result, rows, text = TASKS[options.task](*models, options)
        seconds = time.perf_counter() - start
        facts = {"task": options.task, "model": paths if len(paths) > 1 else paths[0], "threads": models[0].threads}
        facts |= {"seconds": seconds, "tokens_per_s": rows / seconds}
    print(json.dumps(facts | result) if options.output == "json" else text)
    if options.output == "text" and options.task != "next":
        print(f"{rows / seconds:.1f} tokens/s in {seconds:.1f} s, {facts['threads']} threads, {', '.join(paths)}")


# ------------------------------------------------------------------------------------------------ perplexity


def perplexity(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of computed rows, and the result as text."""
    window, stride = window_of(model.config.maxT, options)
    tokens = scored_tokens(model, options)
    rows = scored = text_bytes = 0
    sums: list[float] = []  # the sum of losses of each window
    tokenizer = None
    with suppress(InputError):  # the vocabulary is unknown
        tokenizer = tokenizer_of(model.config)
    with Progress("tokens", len(tokens) - 1) as progress:
        for begin, first, end in windows(len(tokens), window, stride):
            ids = tokens[begin:end].tolist()
            sums.append(math.fsum(score(model, model.new_cache(len(ids) - 1), ids[:-1], ids[first - begin :])))
            rows, scored = rows + len(ids) - 1, scored + end - first
            if tokenizer is not None:
                text_bytes += len(tokenizer.decode_bytes(token for token in ids[first - begin :] if token != tokenizer.eot))
            progress.update(scored, f", loss {sum(sums) / scored:.4f}")
    loss = math.fsum(sums) / scored
    power = power_of(loss)
    facts = {"file": options.subject, "tokens": len(tokens), "scored": scored, "window": window, "stride": stride}
    per_byte = math.fsum(sums) / math.log(2) / text_bytes if text_bytes else None
    result = {**facts, "loss": loss, "perplexity": power, "bits_per_byte": per_byte}
    bits = f"{per_byte:.4f} bits per byte, " if per_byte is not None else ""
    where = f"{scored} tokens, window {window}, stride {stride}"
    return result, rows, f"perplexity {shown_power(power)}, loss {loss:.6f} nats per token, {bits}{where}"


def power_of(loss: float) -> float | None:
    """Return the perplexity of a loss, or None if it overflows a float."""
    return math.exp(loss) if loss < LARGEST_LOSS else None


def shown_power(power: float | None) -> str:
    """Return a perplexity as text."""
    return "infinite" if power is None else f"{power:.4f}"


def window_of(maxT: int, options: argparse.Namespace) -> tuple[int, int]:
    """Return the window and the stride of the options. Raises InputError if they are out of range."""
    most = maxT + 1  # the last token of a window is a target, not an input
    window = max(2, maxT) if options.window is None else options.window
    if not 2 <= window <= most:
        raise InputError(f"--window is {window}: it must be from 2 to maxT + 1 = {most}")
    stride = window // 2 if options.stride is None else options.stride
    if not 1 <= stride <= window:
        raise InputError(f"--stride is {stride}: it must be from 1 to the window's {window}")
    return window, stride


def scored_tokens(model: GPT2, options: argparse.Namespace) -> npt.NDArray[np.integer[Any]]:
    """Return the first --limit tokens of the subject. Raises InputError if there are fewer than 2."""
    tokens = tokens_in(options, model)[: options.limit]
    if len(tokens) < 2:
        raise InputError(f"{options.subject}: {len(tokens)} tokens: at least 2 are needed, because the first is not scored")
    return tokens


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end) for each window: it contains the tokens [begin, end), and scores [first, end), at least one."""
    first = 1
    for begin in range(0, count - 1, stride):
        end = min(begin + window, count)
        yield begin, max(first, begin + 1), end
        first = end
        if end == count:
            return


def tokens_in(options: argparse.Namespace, model: GPT2) -> npt.NDArray[np.integer[Any]]:
    """Return the tokens of a token file (.bin), of a text, or of JSON lines with <|endoftext|> before each document.

    Raises DataError for a bad file, and InputError for a text if the model's vocabulary is unknown."""
    subject = options.subject
    if subject.endswith(".bin"):
        return read_tokens(subject, V=model.config.V)
    tokenizer = tokenizer_of(model.config)
    eot = "document" if holds_rows(subject, options.field) else "none"
    reading = {"field": options.field, "allow_special": not options.no_special, "tokenizer": tokenizer}
    return joined(encode_file(read_text(subject), subject, eot=eot, **reading))


# ------------------------------------------------------------------------------------------------ two models


def compare(model: GPT2, other: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of rows computed by both models, and the result as text."""
    if model.config.V != other.config.V:
        raise InputError(f"A has {model.config.V} ids and B {other.config.V}: give two models with the same vocabulary")
    window, stride = window_of(min(model.config.maxT, other.config.maxT), options)
    tokens = scored_tokens(model, options)
    rows = scored = 0
    found: list[npt.NDArray[np.float64]] = []  # of each window: the sums that divergence() returns
    with Progress("tokens", len(tokens) - 1) as progress:
        for begin, first, end in windows(len(tokens), window, stride):
            ids = tokens[begin:end].tolist()
            found.append(divergence(model, other, ids[:-1], ids[first - begin :]))
            rows, scored = rows + 2 * (len(ids) - 1), scored + end - first
            progress.update(scored)
    loss, loss_of_other, kl, agreement = (math.fsum(column) / scored for column in np.transpose(found))
    powers = power_of(loss), power_of(loss_of_other)
    facts = {"file": options.subject, "tokens": len(tokens), "scored": scored, "window": window, "stride": stride}
    differences = {"kl_divergence": kl, "top1_agreement": agreement}
    result = {**facts, "loss": [loss, loss_of_other], "perplexity": powers, **differences}
    lines = [
        f"A: perplexity {shown_power(powers[0])}, loss {loss:.6f} nats per token",
        f"B: perplexity {shown_power(powers[1])}, loss {loss_of_other:.6f} ({loss_of_other - loss:+.6f})",
        f"KL divergence {kl:.6f} nats, top-1 agreement {100 * agreement:.2f} %",
        f"{scored} tokens, window {window}, stride {stride}",
    ]
    return result, rows, "\n".join(lines)


def divergence(model: GPT2, other: GPT2, tokens: Sequence[int], targets: Sequence[int]) -> npt.NDArray[np.float64]:
    """Run tokens through both models; return four sums over the last len(targets) tokens, whose successors are `targets`.

    Three sums are in nats: the loss of `model`, the loss of `other`, and the divergence of `other` from `model`. The fourth sum
    is the number of rows at which both models have the same most probable token."""
    caches = [one.new_cache(len(tokens)) for one in (model, other)]
    silent = len(tokens) - len(targets)  # number of rows that are only context
    sums = np.zeros(4)
    for start in range(0, len(tokens), ROWS):
        stop = min(start + ROWS, len(tokens))
        pair = [
            one.step([(tokens[i], cache, i >= silent) for i in range(start, stop)])
            for one, cache in zip((model, other), caches, strict=True)
        ]
        wanted = targets[max(0, start - silent) : max(0, stop - silent)]
        for at in range(0, len(wanted), FLOAT64_ROWS):
            logits = [rows[at : at + FLOAT64_ROWS].astype(np.float64) for rows in pair]  # [16, V] each
            logprobs, others = (rows - log_sums(rows)[:, None] for rows in logits)
            chosen = np.arange(len(logprobs)), wanted[at : at + FLOAT64_ROWS]
            kl = (np.exp(logprobs) * (logprobs - others)).sum()
            agreements = (logprobs.argmax(axis=1) == others.argmax(axis=1)).sum()
            sums += [-logprobs[chosen].sum(), -others[chosen].sum(), kl, agreements]
    return sums


# ------------------------------------------------------------------------------------------------ HellaSwag


def hellaswag(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of computed rows, and the result as text."""
    done = right = right_norm = rows = 0
    cache = model.new_cache()
    with Progress("examples", options.limit) as progress:
        for example in islice(examples_in(options.subject, model), options.limit):
            cache.truncate(0)
            losses = ending_losses(model, cache, example)
            done += 1
            right += int(np.argmin([loss.sum() for loss in losses])) == example.label
            right_norm += int(np.argmin([loss.mean() for loss in losses])) == example.label
            rows += len(example.context) + sum(len(ending) - 1 for ending in example.endings)
            progress.update(done, f", acc {right / done:.4f}, acc_norm {right_norm / done:.4f}")
    if not done:
        raise DataError(f"{options.subject}: there are no examples: give a file with at least one")
    acc, acc_norm = right / done, right_norm / done
    counts = {"examples": done, "right": right, "right_norm": right_norm}
    result = {"file": options.subject, **counts, "acc": acc, "acc_norm": acc_norm}
    return result, rows, f"acc {acc:.4f} ({right}/{done}), acc_norm {acc_norm:.4f} ({right_norm}/{done})"


def examples_in(subject: str, model: GPT2) -> Iterator[Example]:
    """Yield the examples of llm.c's file, or of HellaSwag's JSON lines. Raises DataError for a bad file."""
    if not holds_rows(subject):
        yield from read_examples(subject, V=model.config.V)
        return
    tokenizer = tokenizer_of(model.config)
    for number, (where, row) in enumerate(read_rows(read_text(subject), subject)):
        endings, label = row.get("endings"), row.get("label")
        if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(text, str) and text for text in endings):
            raise DataError(f"{where}: the field 'endings' is {shown(endings)}: it must be a list of texts")
        if str(label) not in [str(i) for i in range(len(endings))]:
            raise DataError(f"{where}: the field 'label' is {shown(label)}: it must be the number of the right ending")
        context = tokenizer.encode(field_of(where, row, "ctx"))
        if not context:
            raise DataError(f"{where}: the field 'ctx' is empty: it must be a text")
        yield Example(number, int(str(label)), context, [tokenizer.encode(f" {ending}") for ending in endings])


def ending_losses(model: GPT2, cache: KVCache, example: Example) -> list[Losses]:
    """Return the losses of the tokens of each ending. The context runs once for all endings.

    Raises InputError if the example exceeds the model's context."""
    longest = len(example.context) + max(map(len, example.endings)) - 1  # the last token of an ending is not an input
    if longest > cache.capacity:
        raise InputError(f"example {example.number} has {longest} tokens to run: the model takes at most {cache.capacity}")
    after_context = model.prefill(cache, example.context)[None]  # [1, V]
    losses = []
    for ending in example.endings:
        first = losses_of(after_context, ending[:1])
        losses.append(np.concatenate([first, score(model, cache, ending[:-1], ending[1:])]))
        cache.truncate(len(example.context))
    return losses


# ------------------------------------------------------------------------------------------------ next tokens


def next_tokens(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of computed rows, and the result as a table."""
    tokenizer = tokenizer_of(model.config)
    if options.top > tokenizer.V:
        raise InputError(f"--top is {options.top}: it must be at most {tokenizer.V}, the number of ids in the vocabulary")
    prompt = tokenizer.encode(given_text(options.subject))
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    logits = model.prefill(model.new_cache(), prompt).astype(np.float64)  # [V]
    logprobs = logits - log_sums(logits[None])  # [V]
    choices = []
    for token in np.argsort(-logits, kind="stable")[: options.top].tolist():  # equal logits: the lowest id first
        logprob = float(logprobs[token])
        content = tokenizer.decode_bytes([token])
        names = {"id": token, "text": as_text(content), "bytes": content.hex()}
        choices.append({**names, "probability": math.exp(logprob), "logprob": logprob})
    return {"prompt": prompt, "next": choices}, len(prompt), table(choices)


def as_text(content: bytes) -> str | None:
    """Return bytes as text, or None for a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def quoted(content: bytes) -> str:
    """Return a token's bytes as a literal in the characters of stdout: a text, or bytes for a part of a character."""
    text, encoding = as_text(content), stdout_encoding()
    return repr(content if text is None else text).encode(encoding, "backslashreplace").decode(encoding)


def stdout_encoding() -> str:
    """Return the encoding of stdout, ascii if it is unknown."""
    return getattr(sys.stdout, "encoding", None) or "ascii"


def table(choices: list[Result]) -> str:
    """Return a line for each token: id, text, probability, and a bar that compares it with the most probable token."""
    encoding = stdout_encoding()
    names = [quoted(bytes.fromhex(choice["bytes"])) for choice in choices]
    width = max(map(len, names))
    block = "█" if "█".encode(encoding, "ignore") else "#"
    lines = [f"{'id':>6}  {'token':<{width}}  {'%':>7}"]
    for choice, name in zip(choices, names, strict=True):
        bar = block * round(BAR * choice["probability"] / choices[0]["probability"])
        lines.append(f"{choice['id']:>6}  {name:<{width}}  {100 * choice['probability']:7.3f}  {bar}".rstrip())
    return "\n".join(lines)


TASKS: dict[str, Callable[..., tuple[Result, int, str]]]
TASKS = {"perplexity": perplexity, "hellaswag": hellaswag, "next": next_tokens, "compare": compare}
