"""The options of a completion, as every command that completes takes them."""

import argparse

from ..errors import InputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

END_OF_TEXT = 50256  # GPT-2's <|endoftext|>: an id like any other unless --stop-at-eot is given


def add_completion_options(parser: argparse.ArgumentParser) -> None:
    """The options that read_options() reads, but for the lengths: what chat.py takes, too."""
    parser.add_argument("--sampler", metavar="NAME", help="median (default), greedy or sample, which the next six imply")
    parser.add_argument("--temp", dest="temperature", metavar="X", help="divide the logits by this (default 1)")
    parser.add_argument("--top-k", metavar="K", help="only the K most probable tokens (default 0: all)")
    parser.add_argument("--top-p", metavar="P", help="only the most probable tokens that hold this share (default 1: all)")
    parser.add_argument("--min-p", metavar="P", help="only tokens at least P times as probable as the first (default 0)")
    parser.add_argument(
        "--repeat-penalty", dest="repetition_penalty", metavar="X", help="make tokens of the sequence less probable (default 1)"
    )
    parser.add_argument("-s", "--seed", metavar="N", help="the same tokens for the same seed (default: a random one)")
    parser.add_argument(
        "--stop", dest="stop_strings", action="append", metavar="TEXT", help="end after this text; may be given again"
    )
    parser.add_argument(
        "--stop-token", dest="stop_token_ids", action="append", metavar="ID", help="end after this token; may be given again"
    )
    parser.add_argument("--stop-at-eot", action="store_true", help=f"end after <|endoftext|>, token {END_OF_TEXT}")
    parser.add_argument(
        "--overflow", metavar="HOW", help="past the model's context: stop, or slide to its latest half (default: refuse)"
    )


def read_options(options: argparse.Namespace) -> "dict[str, Any]":
    """What the options ask of every completion, in the words of a request; only those that were given."""
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
    """A token id: ASCII digits only."""
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"token {text[:40]!r} is not a token id: ids are whole numbers written in digits, such as 31373")
    if len(text.lstrip("0")) > 18:
        raise InputError(f"token {text[:40]!r} is not a token id: no vocabulary is that large")
    return int(text[-18:])


def parse_count(name: str, text: str) -> int:
    """A count of an option: ASCII digits only."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InputError(f"{name} is {text[:40]!r}: it must be a whole number")
    return int(text)


def parse_number(name: str, text: str) -> float:
    """A number of an option, in any form that a computer prints one."""
    try:
        return float("" if "_" in text or not text.isascii() or text != text.strip() else text)
    except ValueError:
        raise InputError(f"{name} is {text[:40]!r}: it must be a number") from None
