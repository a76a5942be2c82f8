"""The command-line options of a completion, shared by `pygpt` and `pygpt chat`."""

import argparse

from ..cpus import MAX_THREADS
from ..errors import TYPE_CHECKING, InputError
from .console import whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

TOKENIZER_HELP = "use this vocabulary: tokenizer.json, vocab.json, llm.c's tokenizer.bin, .gguf (default: the model's own)"
THREADS_HELP = "threads (default $PYGPT_THREADS, else one per usable core)"
SPECULATE_HELP = "guess tokens ahead and check them: auto (the fastest number), a number, or off; the same tokens"
DRAFT_HELP = """the draft for --speculate: q8_0 or q4_0 (the model's weights, quantised in memory), lookup (only the text so \
far), or a smaller model with the same vocabulary (default: q8_0 or q4_0, by the model's format)"""
CONTROL = (  # flag, name of a request's option, metavar, help; with every sampler
    ("--repeat-penalty", "repetition_penalty", "X", "above 1, make tokens that occurred less probable (default 1: off)"),
    ("--frequency-penalty", "frequency_penalty", "X", "subtract X from a logit for each time that the token was generated"),
    ("--presence-penalty", "presence_penalty", "X", "subtract X from the logits of tokens that were generated"),
    ("--no-repeat-ngram-size", "no_repeat_ngram_size", "N", "never repeat N tokens in a row (default 0: off)"),
    ("--logit-bias", "logit_bias", "ID=X", "add X to the logit of this token; may be repeated"),
    ("--suppress-token", "suppress_tokens", "ID", "never choose this token; may be repeated"),
    ("--bad-words", "bad_words_ids", "IDS", "never complete this sequence of ids, as in '31373 612'; may be repeated"),
)
LISTS = ("logit_bias", "suppress_tokens", "bad_words_ids", "stop_token_ids")
WHOLE = ("total", "max_new_tokens", "top_k", "seed", "no_repeat_ngram_size")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
FLAGS = {"total": "-n", "temperature": "--temp", "repetition_penalty": "--repeat-penalty"}  # those that are not as the name
SEED = "random seed; the same seed gives the same tokens (default: random)"


def add_completion_options(parser: argparse.ArgumentParser, *, seed: str = SEED) -> None:
    """Add all options that read_options() reads, except the lengths. seed: the help of --seed."""
    add = parser.add_argument
    add("--sampler", metavar="NAME", help="median (default), greedy or sample; each of the next five options implies sample")
    add("--temp", "--temperature", dest="temperature", metavar="X", help="divide the logits by X (default 1); 0 means greedy")
    add("--top-k", metavar="K", help="keep only the K most probable tokens (default 0: all)")
    add("--top-p", metavar="P", help="keep only the most probable tokens whose probabilities add up to P (default 1: all)")
    add("--min-p", metavar="P", help="keep only tokens at least P times as probable as the most probable one (default 0: all)")
    add("-s", "--seed", metavar="N", help=seed)
    for flag, name, metavar, text in CONTROL:
        add(flag, dest=name, metavar=metavar, action="append" if name in LISTS else "store", help=text)
    add("--stop", dest="stop_strings", action="append", metavar="TEXT", help="stop after TEXT; may be repeated")
    add("--stop-token", dest="stop_token_ids", action="append", metavar="ID", help="stop after this token; may be repeated")
    eot = "stop after <|endoftext|>, or the token that ends a text in the model's vocabulary (default: only in chat)"
    add("--stop-at-eot", action=argparse.BooleanOptionalAction, help=eot)
    full = "when the model's context is full: stop, or slide to keep its latest half (default: refuse; in chat, drop the start)"
    add("--overflow", metavar="HOW", help=full)
    add("--speculate", dest="speculation", metavar="K", help=f"{SPECULATE_HELP} (default off)")


def add_model_options(add: "Callable[..., object]", *, stops: str = "") -> None:
    """Add the options of a model, except -m, to a parser's add_argument(). stops: a word before the help of --tokenizer."""
    add("-t", "--threads", metavar="N", type=whole(1, MAX_THREADS), help=THREADS_HELP)
    add("--tokenizer", metavar="FILE", help=f"{stops}{TOKENIZER_HELP}")
    unknown = "never choose an id that the tokenizer does not have, such as one of a padded vocabulary"
    add("--text-only", action="store_true", help=unknown)
    add("--weights", metavar="FORMAT", help="quantise the weights in memory to q8_0 or q4_0 (default: use the file's weights)")
    add("--draft-model", metavar="MODEL", help=DRAFT_HELP)
    add("--no-mmap", action="store_true", help="copy the model into memory, in case another program changes its file")


def load_options(options: argparse.Namespace) -> "dict[str, Any]":
    """Return the options of add_model_options() as keyword arguments of GPT2.load(), except threads and the draft."""
    return {name: getattr(options, name) for name in ("weights", "tokenizer", "text_only")} | {"mmap": not options.no_mmap}


def add_text_options(add: "Callable[..., object]") -> None:
    """Add the options that say how texts are read, to a parser's or group's add_argument()."""
    add("--field", metavar="NAME", help="read JSON lines, whose texts are in this field (default for .jsonl: text)")
    add("--no-special", action="store_true", help="take <|endoftext|> in texts as ordinary text, not as its one id")


def read_options(options: argparse.Namespace) -> "dict[str, Any]":
    """Return the given options as keyword arguments of a Request. Raises InputError for a value that is not a number."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    same = ("sampler", "stop_strings", "stop_at_eot", "overflow")
    asked: dict[str, Any] = {name: given[name] for name in same if name in given}
    for name in WHOLE + NUMBERS:
        if name in given:
            read = parse_count if name in WHOLE else parse_number
            asked[name] = read(f"{name} ({FLAGS.get(name, '--' + name.replace('_', '-'))})", given[name])
    asked |= {name: parse_list(name, given[name]) for name in LISTS if name in given}
    return asked | {name: parse_speculation(given[name]) for name in ("speculation",) if name in given}


def parse_speculation(text: str) -> int | bool:
    """Read the value of --speculate. Raises InputError unless it is auto, off or a whole number."""
    return text == "auto" if text in ("auto", "off") else parse_count("speculation (--speculate)", text, "auto, off or 1 to 64")


def parse_list(name: str, texts: "list[str]") -> "Any":
    """Read the texts of one of LISTS as the value of a request's option. Raises InputError for a bad one."""
    if name == "bad_words_ids":
        return [[parse_id(word) for word in text.replace(",", " ").split()] for text in texts]
    if name != "logit_bias":
        return [parse_id(text) for text in texts]
    pairs = [text.partition("=") for text in texts]
    return {parse_id(token): parse_number(f"logit_bias of token {token}", value) for token, _, value in pairs}


def parse_id(text: str) -> int:
    """Read a token id. Raises InputError if the text is anything but ASCII digits."""
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"token {text[:40]!r} is not a token id: ids are whole numbers written in digits, such as 31373")
    if len(text.lstrip("0")) > 18:
        raise InputError(f"token {text[:40]!r} is not a token id: it is larger than any vocabulary")
    return int(text[-18:])


def parse_count(name: str, text: str, rule: str = "a whole number, 0 or more") -> int:
    """Read an option's whole number. Raises InputError if the text is anything but 1 to 20 ASCII digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InputError(f"{name} is {text[:40]!r}: it must be {rule}")
    return int(text)


def parse_number(name: str, text: str) -> float:
    """Read an option's number, in any form that float() reads except with underscores, spaces or non-ASCII digits."""
    try:
        return float("" if "_" in text or not text.isascii() or text != text.strip() else text)
    except ValueError:
        raise InputError(f"{name} is {text[:40]!r}: it must be a number") from None
