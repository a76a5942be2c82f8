"""The `pygpt` command: completes a sequence of GPT-2 token ids. `python -m pygpt --help` says how.

stdout carries ids and nothing else. Exit status: 0; 1 for a failure at run time; 2 for bad input, with one line on stderr;
130 after Ctrl-C; 141 when the reader of stdout has gone.
"""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import InputError
from . import COMMANDS
from .console import HelpFormatter, Parser, check_stdout, say, status_of
from .options import add_completion_options, parse_count, parse_id, read_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..config import Config
    from ..generation.request import Request
    from ..model import GPT2
    from ..reference import SerialGPT2

EXAMPLES = """\
examples:
  python -m pygpt 31373 612                     complete "hello there" to 10 tokens in all
  python -m pygpt -m gpt2_124M.bin -n 64 31373  64 tokens in all, with the model in this file
  python -m pygpt --sampler greedy 31373 612    the most probable token each time
  python -m pygpt --temp 0.8 -s 7 31373 612     at random, and the same again for the same seed
  python -m pygpt --reference 31373 612         the serial program, for comparison
  echo 31373 612 | python -m pygpt -            serve requests: one a line, the model stays loaded
  echo '{"tokens": [31373], "max_new_tokens": 5, "sampler": "greedy"}' | python -m pygpt -

the model is MODEL, else $PYGPT_MODEL, else ./gpt2_124M.bin, else a small one that comes with the package

commands, each with a --help of its own:
""" + "".join(f"  {name:<10}{summary}\n" for name, (_, summary) in COMMANDS.items())

LINE_LIMIT = 1 << 20  # bytes of one request: more than the longest sequence of any model needs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt",
        usage="python -m pygpt [options] TOKEN... | -\n       python -m pygpt COMMAND ...",
        description="Complete a sequence of GPT-2 token ids; print each new id on a line of its own as soon as it is known.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("tokens", nargs="*", metavar="TOKEN", help="token ids, or - to serve requests from stdin")
    parser.add_argument(
        "-m", "--model", metavar="MODEL", help="an llm.c checkpoint (version 1, 3 or 5), or the name of a downloaded model"
    )
    parser.add_argument("-n", "--total", metavar="N", help="tokens in all, the given ones included (default 10)")
    parser.add_argument("--max-new-tokens", metavar="N", help="new tokens, instead of --total")
    parser.add_argument("-t", "--threads", metavar="N", help="workers (default $PYGPT_THREADS, else what fits this machine)")
    add_completion_options(parser)
    parser.add_argument("--no-mmap", action="store_true", help="read the model into memory: others may write to its file")
    parser.add_argument("--reference", action="store_true", help="compute as the serial program does; -t has no effect")
    parser.add_argument("--version", action="version", version=f"pygpt {__version__}")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, open the model, complete or serve."""
    check_stdout("the ids")
    serving = options.tokens == ["-"]
    tokens = [] if serving else [parse_id(text) for text in options.tokens]
    if not serving and not tokens:
        raise InputError("no token was given: name at least one token id, as in `python -m pygpt 31373 612`")
    threads = None if options.threads is None else parse_count("threads (-t)", options.threads)
    defaults = read_options(options)
    from ..cpus import check_threads
    from ..generation.request import Request

    if threads is not None:
        check_threads(threads)  # --reference does not use them, but a typing error is one
    model, notice = load(options.model, threads, reference=options.reference, mmap=not options.no_mmap)
    with model:
        request = Request(model.config, tokens or [0], **defaults)  # bad options are refused first
        if serving:
            serve(model, defaults, notice)
        else:
            say(notice)
            for token in model.complete(request):
                put(f"{token}\n")


def load(path: str | None, threads: int | None, *, reference: bool, mmap: bool) -> "tuple[GPT2 | SerialGPT2, str]":
    """Open the model; return it with what is to be said when it answers. Only what is used is imported."""
    from ..hub.find import GPT2_FILE, find_model

    path, origin = find_model(path)
    model = open_reference(path, mmap=mmap) if reference else open_model(path, threads, mmap=mmap)
    notice = (
        f"no {GPT2_FILE} here: a small embedded model (Shakespeare) answers; for GPT-2 run `pygpt download gpt2`, "
        "then name it with -m gpt2 or PYGPT_MODEL=gpt2"
    )
    return model, notice if origin == "embedded" else ""


def open_model(path: str, threads: int | None, *, mmap: bool) -> "GPT2":
    """The cached, parallel model."""
    from ..model import GPT2

    return GPT2.load(path, threads=threads, mmap=mmap)


def open_reference(path: str, *, mmap: bool) -> "SerialGPT2":
    """The serial reference."""
    from ..reference import SerialGPT2

    return SerialGPT2.load(path, mmap=mmap)


def serve(model: "GPT2 | SerialGPT2", defaults: "dict[str, Any]", notice: str) -> None:
    """Answer requests from stdin, one a line, until it ends. Ctrl-C ends an answer's line; when idle, the process."""
    engine = model.engine(prefix=model.new_prefix_cache())
    while sys.stdin is not None and (line := sys.stdin.buffer.readline(LINE_LIMIT + 1)):
        ended = False
        try:
            request = parse_request(line, model.config, defaults)
            if request is None:
                ended = True
                put("\n")
                continue
            say(notice)
            notice = ""
            job = engine.add(request)
            for event in engine.run():
                if event.error is not None:
                    raise event.error
                ended = job.done
                put(f"{event.token}\n" if ended else f"{event.token} ")  # the space says at once that the id is whole
        except KeyboardInterrupt:  # put() leaves nothing half-done: stdout's buffer holds what a full pipe did not take
            engine.close()
            put("" if ended else "\n")  # a second newline would answer a request that nobody made


def put(text: str) -> None:
    """Write to stdout at once, and in one piece: where it is unbuffered (PYTHONUNBUFFERED), print() writes a line's end on its
    own, and Ctrl-C may come before that."""
    sys.stdout.write(text)
    sys.stdout.flush()


def parse_request(line: bytes, config: "Config", defaults: "dict[str, Any]") -> "Request | None":
    """One line of stdin -> what it asks for: ids, or a JSON object; None for a blank line."""
    from ..generation.request import Request, request_from_json

    if len(line) > LINE_LIMIT:
        raise InputError(f"a request is longer than {LINE_LIMIT} bytes: give one request a line")
    text = line.strip()
    if not text:
        return None
    if not text.startswith(b"{"):
        return Request(config, [parse_id(word.decode("utf-8", "replace")) for word in text.split()], **defaults)
    return request_from_json(config, text, defaults)
