"""Measure a model: perplexity of a text, HellaSwag accuracy, the most probable next tokens, the difference from another model.

    pygpt eval perplexity book.txt
    pygpt eval perplexity val.bin -m gpt2_124M.bin --stride 256 -n 100000
    pygpt eval hellaswag hellaswag_val.bin -m gpt2_124M.bin -n 1000
    pygpt eval next "The capital of France is" -k 5
    pygpt eval next "To be, or not to" -o json
    pygpt eval compare gpt2_124M.bin gpt2_q8.gguf book.txt -n 10000

docs/reference/eval.md says how each number is computed, and describes the JSON."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, InputError, plural, shown
from ..formats.llmc import Example, read_examples, read_tokens
from ..formats.text import encode_file, field_of, given_text, holds_rows, joined, read_rows, read_text
from ..generation.logprobs import score
from ..generation.request import check_tokens
from ..generation.sampling import not_finite
from ..hub.find import find_model
from ..model import GPT2
from ..tokenizer import tokenizer_of
from .console import Parser, Progress, check_stdout, command, table, text_of, whole
from .options import TOKENIZER_HELP, add_text_options

ROWS = 128  # rows of a step: their logits take 26 MB with GPT-2's vocabulary
FLOAT64_ROWS = 16  # rows of logits that are float64 at a time: 6 MB
LARGEST_LOSS = 709  # nats: for a larger loss, e^loss overflows a float
MOST = 2**31 - 1  # largest number of tokens or examples
Losses = npt.NDArray[np.float64]
Ids = Sequence[int]
Result = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    one_model, shared = Parser(add_help=False), Parser(add_help=False)
    model = "a model file or a downloaded model"
    one_model.add_argument("-m", "--model", metavar="MODEL", help=f"{model} (default: see pygpt --help)")
    add = shared.add_argument
    add("-t", "--threads", metavar="N", type=whole(1, 256), help="threads (default $PYGPT_THREADS, else one per usable core)")
    add("--tokenizer", metavar="FILE", help=TOKENIZER_HELP)
    add("-o", "--output", metavar="FORMAT", choices=("text", "json"), default="text", help="text (default) or json")
    parser = Parser(prog="pygpt eval", usage="pygpt eval perplexity|hellaswag|next|compare ... [options]", description=__doc__)
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)

    def task(name: str, positional: str, meaning: str, summary: str, before: Sequence[str] = ()) -> argparse.ArgumentParser:
        parents = [shared] if before else [one_model, shared]
        usage = f"pygpt eval {' '.join([name, *before, positional])} [options]"
        made = tasks.add_parser(name, parents=parents, usage=usage, description=summary, help=summary)
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
    check_stdout("the result")
    paths = [find_model(name)[0] for name in ([options.a, options.b] if options.task == "compare" else [options.model])]
    with ExitStack() as opened:
        models = [opened.enter_context(GPT2.load(path, threads=options.threads, tokenizer=options.tokenizer)) for path in paths]
        start = time.perf_counter()
        result, rows, text = TASKS[options.task](*models, options)
        seconds = time.perf_counter() - start
        facts = {"task": options.task, "model": paths if len(paths) > 1 else paths[0], "threads": models[0].threads}
        facts |= {"seconds": seconds, "tokens_per_s": rows / seconds}
    print(json.dumps(facts | result) if options.output == "json" else text)
    if options.output == "text" and options.task != "next":
        print(f"{rows / seconds:.1f} tokens/s in {seconds:.1f} s, {plural(facts['threads'], 'thread')}, {', '.join(paths)}")


def log_sums(rows: Losses) -> Losses:
    """Return the log-sum-exp of each row of logits: [rows, V] -> [rows]. Raises NumericalError if one is not finite."""
    top = rows.max(axis=1)  # [rows]
    out: Losses = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))  # [rows]
    if not np.isfinite(out).all():
        raise not_finite()
    return out


def blocks(models: Sequence[GPT2], tokens: Ids, targets: Ids) -> Iterator[tuple[list[Losses], Ids]]:
    """Run tokens through each model. Yield blocks of the last len(targets) rows: each model's logits, [16, V], and targets."""
    pairs = [(model, model.new_cache(len(tokens))) for model in models]
    silent = len(tokens) - len(targets)  # number of rows that are only context
    for start in range(0, len(tokens), ROWS):
        stop = min(start + ROWS, len(tokens))
        logits = [model.step([(tokens[i], cache, i >= silent) for i in range(start, stop)]) for model, cache in pairs]
        wanted = targets[max(0, start - silent) : max(0, stop - silent)]
        for at in range(0, len(wanted), FLOAT64_ROWS):
            yield [rows[at : at + FLOAT64_ROWS].astype("f8") for rows in logits], wanted[at : at + FLOAT64_ROWS]


def sums_of(models: Sequence[GPT2], tokens: Ids, targets: Ids) -> list[float]:
    """Run tokens through each model; return sums over the last len(targets) tokens, whose successors are `targets`.

    Each model has a sum of losses, in nats. Two models also have the sum of divergences of the second from the first, and the
    number of rows at which their most probable tokens agree."""
    found: list[tuple[float, ...]] = []  # of each row
    for logits, wanted in blocks(models, tokens, targets):
        totals = [log_sums(rows) for rows in logits]
        columns = [total - rows[np.arange(len(rows)), wanted] for rows, total in zip(logits, totals, strict=True)]
        if len(models) == 2:
            logprobs, others = (rows - total[:, None] for rows, total in zip(logits, totals, strict=True))
            columns.append((np.exp(logprobs) * (logprobs - others)).sum(axis=1))
            columns.append(logprobs.argmax(axis=1) == others.argmax(axis=1))
        found += zip(*(column.tolist() for column in columns), strict=True)
    return [math.fsum(column) for column in zip(*found, strict=True)]


def slide(models: Sequence[GPT2], options: argparse.Namespace) -> tuple[Result, int, list[float], int]:
    """Slide windows over the subject. Return the facts for the result, the number of computed rows, the means of what sums_of()
    sums, and the bytes of the scored text without <|endoftext|> (0 for an unknown vocabulary)."""
    tokenizer = None
    with suppress(InputError):
        tokenizer = tokenizer_of(models[0].config)
    window, stride = window_of(min(model.config.maxT for model in models), options)
    tokens = tokens_in(options, models[0])[: options.limit]
    if len(tokens) < 2:
        raise InputError(f"{options.subject}: {plural(len(tokens), 'token')}: at least 2 are needed: the first is not scored")
    rows = scored = text_bytes = 0
    found: list[list[float]] = []  # of each window
    with Progress("tokens", len(tokens) - 1) as progress:
        for begin, first, end in windows(len(tokens), window, stride):
            ids = tokens[begin:end].tolist()
            targets = ids[first - begin :]
            found.append(sums_of(models, ids[:-1], targets))
            rows, scored = rows + len(models) * (len(ids) - 1), scored + len(targets)
            if tokenizer is not None:
                text_bytes += len(tokenizer.decode_bytes([token for token in targets if token != tokenizer.eot]))
            progress.update(scored, f", loss {sum(sums[0] for sums in found) / scored:.4f}")
    facts = {"file": options.subject, "tokens": len(tokens), "scored": scored, "window": window, "stride": stride}
    return facts, rows, [math.fsum(column) / scored for column in zip(*found, strict=True)], text_bytes


def perplexity(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of computed rows, and the result as text."""
    facts, rows, (loss,), text_bytes = slide([model], options)
    per_byte = loss * facts["scored"] / math.log(2) / text_bytes if text_bytes else None
    bits = f"{per_byte:.4f} bits per byte, " if per_byte is not None else ""
    power, shown_power = power_of(loss)
    text = f"perplexity {shown_power}, loss {loss:.6f} nats per token, {bits}{where(facts)}"
    return {**facts, "loss": loss, "perplexity": power, "bits_per_byte": per_byte}, rows, text


def where(facts: Result) -> str:
    """Return what was scored as text."""
    return f"{facts['scored']} tokens, window {facts['window']}, stride {facts['stride']}"


def power_of(loss: float) -> tuple[float | None, str]:
    """Return the perplexity of a loss, and its text; None if it overflows a float."""
    power = math.exp(loss) if loss < LARGEST_LOSS else None
    return power, "infinite" if power is None else f"{power:.4f}"


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
    """Return the tokens of a token file (.bin), of a text, or of JSON lines with <|endoftext|> before each document."""
    subject = options.subject
    if subject.endswith(".bin"):
        return read_tokens(subject, V=model.config.V)
    tokenizer = tokenizer_of(model.config)
    eot = "document" if holds_rows(subject, options.field) else "none"
    reading = {"field": options.field, "allow_special": not options.no_special, "tokenizer": tokenizer}
    return joined(encode_file(read_text(subject), subject, eot=eot, **reading))


def compare(model: GPT2, other: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of rows computed by both models, and the result as text."""
    if model.config.V != other.config.V:
        raise InputError(f"A has {model.config.V} ids and B {other.config.V}: give two models with the same vocabulary")
    facts, rows, (loss, other_loss, kl, agreement), _ = slide([model, other], options)
    powers, texts = zip(power_of(loss), power_of(other_loss), strict=True)
    result = {**facts, "loss": [loss, other_loss], "perplexity": powers, "kl_divergence": kl, "top1_agreement": agreement}
    first = f"A: perplexity {texts[0]}, loss {loss:.6f} nats per token"
    second = f"B: perplexity {texts[1]}, loss {other_loss:.6f} ({other_loss - loss:+.6f})"
    both = f"KL divergence {kl:.6f} nats, top-1 agreement {100 * agreement:.2f} %"
    return result, rows, "\n".join([first, second, both, where(facts)])


def hellaswag(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of computed rows, and the result as text."""
    done = right = right_norm = rows = 0
    cache, held = model.new_cache(), list[int]()
    with Progress("examples", options.limit) as progress:
        for example in islice(examples_in(options.subject, model), options.limit):
            longest = len(example.context) + max(map(len, example.endings)) - 1  # the last token of an ending is not an input
            if longest > cache.capacity:
                text = f"example {example.number} has {longest} tokens to run: the model takes at most {cache.capacity}"
                raise InputError(text)
            scores = score(model.network, cache, held, example.context, example.endings)
            logprobs = [[info.logprob for info in infos] for infos in scores]
            done += 1
            right += int(np.argmax([math.fsum(one) for one in logprobs])) == example.label
            right_norm += int(np.argmax([math.fsum(one) / len(one) for one in logprobs])) == example.label
            rows += len(example.context) - 1 + sum(map(len, example.endings))
            progress.update(done, f", acc {right / done:.4f}, acc_norm {right_norm / done:.4f}")
    if not done:
        raise DataError(f"{options.subject}: there are no examples: give a file with at least one")
    acc, acc_norm = right / done, right_norm / done
    text = f"acc {acc:.4f} ({right}/{done}), acc_norm {acc_norm:.4f} ({right_norm}/{done})"
    result = {"examples": done, "right": right, "right_norm": right_norm, "acc": acc, "acc_norm": acc_norm}
    return {"file": options.subject, **result}, rows, text


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


def next_tokens(model: GPT2, options: argparse.Namespace) -> tuple[Result, int, str]:
    """Return the result, the number of computed rows, and the result as a table."""
    tokenizer = tokenizer_of(model.config)
    if options.top > tokenizer.V:
        raise InputError(f"--top is {options.top}: it must be at most {tokenizer.V}, the number of ids in the vocabulary")
    prompt = tokenizer.encode(given_text(options.subject))
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    logits = model.prefill(model.new_cache(), check_tokens(model.config, prompt)).astype(np.float64)  # [V]
    logprobs = logits - log_sums(logits[None])  # [V]
    choices = []
    for token in np.argsort(-logits, kind="stable")[: options.top].tolist():  # equal logits: the lowest id first
        logprob = float(logprobs[token])
        content = tokenizer.decode_bytes([token])
        names = {"id": token, "text": text_of(content), "bytes": content.hex()}
        choices.append({**names, "probability": math.exp(logprob), "logprob": logprob})
    rows = [(choice["id"], bytes.fromhex(choice["bytes"]), choice["probability"]) for choice in choices]
    return {"prompt": prompt, "next": choices}, len(prompt), table(rows, sys.stdout)


TASKS: dict[str, Any] = {"perplexity": perplexity, "hellaswag": hellaswag, "next": next_tokens, "compare": compare}


main = command(build_parser, run)
