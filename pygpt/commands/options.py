"""The command-line options of a completion, shared by `pygpt` and `pygpt chat`."""

import argparse

from ..errors import InputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TOKENIZER_HELP = "use this vocabulary: tokenizer.json, vocab.json, llm.c's tokenizer.bin, .gguf (default: the model's own)"
TEXT_ONLY_HELP = "never choose an id that the tokenizer does not have, such as one of a padded vocabulary"
END_OF_TEXT = 50256  # GPT-2's <|endoftext|>: without --stop-at-eot, generation continues after it


def add_completion_options(parser: argparse.ArgumentParser) -> None:
    """Add all options that read_options() reads, except the lengths."""
    parser.add_argument(
        "--sampler", metavar="NAME", help="median (default), greedy or sample; each of the next six options implies sample"
    )
    parser.add_argument("--temp", dest="temperature", metavar="X", help="divide the logits by X (default 1)")
    parser.add_argument("--top-k", metavar="K", help="keep only the K most probable tokens (default 0: all)")
    parser.add_argument(
        "--top-p", metavar="P", help="keep only the most probable tokens whose probabilities add up to P (default 1: all)"
    )
    parser.add_argument(
        "--min-p", metavar="P", help="keep only tokens at least P times as probable as the most probable one (default 0: all)"
    )
    parser.add_argument(
        "--repeat-penalty",
        dest="repetition_penalty",
        metavar="X",
        help="above 1, make tokens that already occurred less probable (default 1: off)",
    )
    parser.add_argument("-s", "--seed", metavar="N", help="random seed; the same seed gives the same tokens (default: random)")
    parser.add_argument("--stop", dest="stop_strings", action="append", metavar="TEXT", help="stop after TEXT; may be repeated")
    parser.add_argument(
        "--stop-token", dest="stop_token_ids", action="append", metavar="ID", help="stop after this token; may be repeated"
    )
    parser.add_argument("--stop-at-eot", action="store_true", help=f"stop after <|endoftext|>, token {END_OF_TEXT}")
    parser.add_argument(
        "--overflow",
        metavar="HOW",
        help="when the model's context is full: stop, or slide to keep its latest half (default: refuse more tokens)",
    )


def read_options(options: argparse.Namespace) -> "dict[str, Any]":
    """Return the given options as keyword arguments of a Request. Raises InputError for a value that is not a number."""
    asked: dict[str, Any] = {}
    for name, flag in ("total", "-n"), ("max_new_tokens", "--max-new-tokens"), ("top_k", "--top-k"), ("seed", "--seed"):
        if (text := getattr(options, name)) is not None:
            asked[name] = parse_count(f"{name} ({flag})", text)
    for name, flag in (
        ("temperature", "--temp"),
        ("top_p", "--top-p"),
        ("min_p", "--min-p"),
        ("repetition_penalty", "--repeat-penalty"),
    ):
        if (text := getattr(options, name)) is not None:
            asked[name] = parse_number(f"{name} ({flag})", text)
    for name in "sampler", "stop_strings", "overflow":
        if (text := getattr(options, name)) is not None:
            asked[name] = text
    stop_tokens = [parse_id(text) for text in options.stop_token_ids or ()] + [END_OF_TEXT] * options.stop_at_eot
    return {**asked, "stop_token_ids": stop_tokens} if stop_tokens else asked


def parse_id(text: str) -> int:
    """Read a token id. Raises InputError if the text is anything but ASCII digits."""
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"token {text[:40]!r} is not a token id: ids are whole numbers written in digits, such as 31373")
    if len(text.lstrip("0")) > 18:
        raise InputError(f"token {text[:40]!r} is not a token id: it is larger than any vocabulary")
    return int(text[-18:])


def parse_count(name: str, text: str) -> int:
    """Read an option's whole number. Raises InputError if the text is anything but 1 to 20 ASCII digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InputError(f"{name} is {text[:40]!r}: it must be a whole number")
    return int(text)


def parse_number(name: str, text: str) -> float:
    """Read an option's number, in any form that float() reads except with underscores, spaces or non-ASCII digits."""
    try:
        return float("" if "_" in text or not text.isascii() or text != text.strip() else text)
    except ValueError:
        raise InputError(f"{name} is {text[:40]!r}: it must be a number") from None
