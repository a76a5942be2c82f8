"""The `gpt` command: completes a sequence of GPT-2 token ids. `python -m pygpt --help` says how.

stdout carries ids and nothing else. Exit status: 0; 1 for a failure at run time; 2 for bad input, with one line on stderr;
130 after Ctrl-C; 141 when the reader of stdout has gone.
"""

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .cli import HelpFormatter, Parser, say, status_of
from .errors import InputError, PyGPTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .config import Config
    from .generate import Request
    from .model import GPT2
    from .serial import SerialGPT2

EXAMPLES = """\
examples:
  python -m pygpt 31373 612                     complete "hello there" to 10 tokens in all
  python -m pygpt -m gpt2_124M.bin -n 64 31373  64 tokens in all, with the model in this file
  python -m pygpt --sampler greedy 31373 612    the most probable token each time
  python -m pygpt --reference 31373 612         the serial program, for comparison
  echo 31373 612 | python -m pygpt -            serve requests: one a line, the model stays loaded
  echo '{"tokens": [31373], "max_new_tokens": 5, "sampler": "greedy"}' | python -m pygpt -

the model is MODEL, else $PYGPT_MODEL, else ./gpt2_124M.bin, else a small one that comes with the package
"""

LINE_LIMIT = 1 << 20  # bytes of one request: more than the longest sequence of any model needs
REQUEST_KEYS = {"tokens", "total", "max_new_tokens", "sampler"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt",
        usage="python -m pygpt [options] TOKEN... | -",
        description="Complete a sequence of GPT-2 token ids; print each new id on a line of its own as soon as it is known.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("tokens", nargs="*", metavar="TOKEN", help="token ids, or - to serve requests from stdin")
    parser.add_argument("-m", "--model", metavar="PATH", help="an llm.c checkpoint (.bin, version 1, 3 or 5)")
    parser.add_argument("-n", "--total", metavar="N", help="tokens in all, the given ones included (default 10)")
    parser.add_argument("-t", "--threads", metavar="N", help="workers (default $PYGPT_THREADS, else what fits this machine)")
    parser.add_argument("--sampler", metavar="NAME", default="median", help="median (default) or greedy")
    parser.add_argument("--reference", action="store_true", help="compute as the serial program does; -t has no effect")
    parser.add_argument("--version", action="version", version=f"pygpt {__version__}")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, open the model, complete or serve."""
    if sys.stdout is None:
        raise PyGPTError("stdout is closed: there is nowhere to print the ids")
    serving = options.tokens == ["-"]
    tokens = [] if serving else [parse_id(text) for text in options.tokens]
    if not serving and not tokens:
        raise InputError("no token was given: name at least one token id, as in `python -m pygpt 31373 612`")
    total = None if options.total is None else parse_count("total (-n)", options.total)
    threads = None if options.threads is None else parse_count("threads (-t)", options.threads)
    from .generate import Request
    from .pool import check_threads

    if threads is not None:
        check_threads(threads)  # --reference does not use them, but a typing error is one
    model, notice = load(options.model, threads, options.reference)
    with model:
        request = Request(model.config, tokens or [0], total=total, sampler=options.sampler)  # bad options are refused first
        if serving:
            serve(model, total, options.sampler, notice)
        else:
            say(notice)
            for token in model.complete(request):
                print(token, flush=True)


def load(path: str | None, threads: int | None, reference: bool) -> "tuple[GPT2 | SerialGPT2, str]":
    """Open the model; return it with what is to be said when it answers. Only what is used is imported."""
    from .checkpoint import GPT2_FILE, find_model

    path, origin = find_model(path)
    model = open_reference(path) if reference else open_model(path, threads)
    notice = (
        f"no {GPT2_FILE} here: a small embedded model (Shakespeare) answers; for GPT-2 124M put llm.c's "
        f"{GPT2_FILE} into this folder, or name it with -m or PYGPT_MODEL"
    )
    return model, notice if origin == "embedded" else ""


def open_model(path: str, threads: int | None) -> "GPT2":
    """The cached, parallel model."""
    from .model import GPT2

    return GPT2.load(path, threads=threads)


def open_reference(path: str) -> "SerialGPT2":
    """The serial reference."""
    from .serial import SerialGPT2

    return SerialGPT2.load(path)


def serve(model: "GPT2 | SerialGPT2", total: int | None, sampler: str, notice: str) -> None:
    """Answer requests from stdin, one a line, until it ends. Ctrl-C ends an answer's line; when idle, the process."""
    while sys.stdin is not None and (line := sys.stdin.buffer.readline(LINE_LIMIT + 1)):
        ended = False
        try:
            request = parse_request(line, model.config, total, sampler)
            if request is not None:
                say(notice)
                notice = ""
                for left, token in zip(range(request.new - 1, -1, -1), model.complete(request), strict=True):
                    print(token, end=" " if left else "\n", flush=True)  # the space says at once that the id is whole
                    ended = not left
            else:
                print(flush=True)
                ended = True
        except KeyboardInterrupt:
            if not ended:  # a second newline would answer a request that nobody made
                print(flush=True)


def parse_request(line: bytes, config: "Config", total: int | None, sampler: str) -> "Request | None":
    """One line of stdin -> what it asks for: ids, or a JSON object; None for a blank line."""
    from .generate import Request

    if len(line) > LINE_LIMIT:
        raise InputError(f"a request is longer than {LINE_LIMIT} bytes: give one request a line")
    text = line.strip()
    if not text:
        return None
    if not text.startswith(b"{"):
        ids = [parse_id(word.decode("utf-8", "replace")) for word in text.split()]
        return Request(config, ids, total=total, sampler=sampler)
    order = parse_json(text)
    tokens = order.pop("tokens")
    if not isinstance(tokens, list):
        raise InputError('request: "tokens" must be a list of token ids, as in {"tokens": [31373, 612]}')
    if "max_new_tokens" not in order:
        order.setdefault("total", total)
    order.setdefault("sampler", sampler)
    return Request(config, tokens, **order)


def parse_json(text: bytes) -> "dict[str, Any]":
    """A request's JSON object, its keys checked."""
    import json

    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"request {text[:60].decode('utf-8', 'replace')!r} is not JSON: {error}") from None
    if unknown := sorted(set(request) - REQUEST_KEYS):
        raise InputError(f"request: unknown key {unknown[0]!r}: keys are {', '.join(sorted(REQUEST_KEYS))}")
    if "tokens" not in request:
        raise InputError('request: the key "tokens" is missing')
    return dict(request)


def parse_id(text: str) -> int:
    """A token id: ASCII digits only."""
    if not (text.isascii() and text.isdigit()):
        raise InputError(f"token {text[:40]!r} is not a token id: ids are whole numbers written in digits, such as 31373")
    if len(text.lstrip("0")) > 18:
        raise InputError(f"token {text[:40]!r} is not a token id: no vocabulary is that large")
    return int(text[-18:])


def parse_count(name: str, text: str) -> int:
    """A count of an option: ASCII digits only."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InputError(f"{name} is {text[:40]!r}: it must be a whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
