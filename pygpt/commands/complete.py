"""Complete a sequence of GPT-2 token ids. Each new id is printed on its own line as soon as it is computed."""

import argparse
import codecs
import sys
from collections.abc import Iterator
from contextlib import closing
from time import perf_counter

from .. import __version__
from ..errors import TYPE_CHECKING, InputError, plural
from . import COMMANDS
from .console import Parser, check_stdout, command, say
from .options import add_completion_options, add_model_options, load_options, parse_id, read_options

if TYPE_CHECKING:
    from typing import Any

    from ..config import Config
    from ..generation.engine import Engine
    from ..generation.request import Request
    from ..model import GPT2
    from ..reference import SerialGPT2

EXAMPLES = """\
examples:
  python -m pygpt 31373 612                     continue "hello there" to a total of 10 tokens
  python -m pygpt -m gpt2_124M.bin -n 64 31373  continue to 64 tokens, with the model in this file
  python -m pygpt --sampler greedy 31373 612    choose the most probable token each time
  python -m pygpt --temp 0.8 -s 7 31373 612     choose at random; seed 7 makes the choice repeatable
  python -m pygpt --reference 31373 612         run the serial reference, for comparison
  echo 31373 612 | python -m pygpt -            answer one request per line; the model stays loaded
  echo '{"tokens": [31373], "max_new_tokens": 5, "sampler": "greedy"}' | python -m pygpt -

The model is MODEL if given, else $PYGPT_MODEL, else ./gpt2_124M.bin, else the small model in the package.

commands (`pygpt COMMAND --help` shows the options of each):
""" + "".join(f"  {name:<10}{summary}\n" for name, (_, summary) in COMMANDS.items())

LINE_LIMIT = 1 << 20  # bytes of one request: enough for the longest sequence of any model


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    usage = "python -m pygpt [options] TOKEN... | -\n       python -m pygpt COMMAND ..."
    parser = Parser(prog="pygpt", usage=usage, description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("tokens", nargs="*", metavar="TOKEN", help="token ids, or - to answer requests from stdin")
    files = "a model file (llm.c's .bin, .safetensors, .gguf, or of `pygpt quantize`)"
    add("-m", "--model", metavar="MODEL", help=f"{files}, a Hugging Face folder, or a downloaded model's name")
    add("-n", "--total", metavar="N", help="total number of tokens, prompt included (default 10)")
    add("--max-new-tokens", metavar="N", help="number of new tokens, instead of --total")
    add_completion_options(parser)
    add_model_options(add, stops="for --stop: ")
    add("--stats", action="store_true", help="print the speed on stderr after each answer")
    add("--reference", action="store_true", help="run the slow serial reference; -t has no effect")
    add("--version", action="version", version=f"pygpt {__version__}")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, open the model, and complete the tokens or answer requests from stdin."""
    check_stdout("the ids")
    serving = options.tokens == ["-"]
    tokens = [] if serving else [parse_id(text) for text in options.tokens]
    if not serving and not tokens:
        raise InputError("the list of token ids is empty: give at least one, as in `pygpt 31373 612`, or - to read stdin")
    defaults = read_options(options)
    if options.draft_model is not None and not serving and not defaults.get("speculation"):
        raise InputError("--draft-model guesses only with --speculate: give both, or leave out --draft-model")
    from ..generation.request import Request

    model, notice = load(options)
    with model:
        request = Request(model.config, tokens or [0], **defaults)  # report bad options before serving
        if serving:
            return serve(model, defaults, notice, stats=options.stats)
        say(notice)
        with closing(model.engine()) as engine:
            for token, _ in answered(engine, request, stats=options.stats):
                put(f"{token}\n")
    return None


def load(options: argparse.Namespace) -> "tuple[GPT2 | SerialGPT2, str]":
    """Open the model; return it with a notice to print before its first answer, or ""."""
    from ..hub.find import GPT2_FILE, find_model

    path, origin = find_model(options.model)
    way = "for GPT-2, run `pygpt download gpt2`, then use -m gpt2 or PYGPT_MODEL=gpt2"
    small = f"using the small embedded Shakespeare model, because {GPT2_FILE} is not in this folder; {way}"
    notice = small if origin == "embedded" else ""
    if options.reference:  # import only the class that is used
        from ..reference import SerialGPT2

        return SerialGPT2.load(path, **load_options(options)), notice  # without a draft: guesses come from the text
    from ..model import GPT2

    return GPT2.load(path, threads=options.threads, draft=options.draft_model, **load_options(options)), notice


def answered(engine: "Engine", request: "Request", *, stats: bool, early: bool = False) -> "Iterator[tuple[int | None, bool]]":
    """Yield each new token of a request, and whether it is the last one. stats: describe the speed on stderr at the end, or
    if `early` before the last token, so that a client with the whole answer has it, too."""
    [completion], began = engine.add(request).completions, perf_counter()

    def describe() -> None:
        new, drafted, seconds = len(completion.tokens), completion.drafted, perf_counter() - began
        guesses = f"; {completion.accepted} of {drafted} guessed tokens were right" if drafted else ""
        say(f"{plural(new, 'token')} in {seconds:.2f} s, {new / seconds:.1f} tokens/s{guesses}")

    for event in engine.run():
        if event.error is not None:
            raise event.error
        ended = event.finish_reason is not None
        if stats and ended and early:
            describe()
        yield event.token, ended
    if stats and not early:
        describe()


def serve(model: "GPT2 | SerialGPT2", defaults: "dict[str, Any]", notice: str, *, stats: bool = False) -> None:
    """Answer the requests on stdin, one per line, until stdin ends. Ctrl-C ends the current answer, or else the process."""
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
            for token, ended in answered(engine, request, stats=stats, early=True):
                put(f"{token}\n" if ended else f"{token} ")  # the space marks the end of the id
        except KeyboardInterrupt:  # put() wrote its whole text: stdout's buffer holds the part that a full pipe refused
            engine.close()
            put("" if ended else "\n")  # one newline per request: the client would take a second one for the next answer


def put(text: str) -> None:
    """Write text to stdout, and flush. print() would write the newline in a second call, and Ctrl-C may come between them."""
    sys.stdout.write(text)
    sys.stdout.flush()


def parse_request(line: bytes, config: "Config", defaults: "dict[str, Any]") -> "Request | None":
    """Read one line of stdin, ids or a JSON object, as a Request; return None for a blank line. Raises InputError."""
    from ..generation.request import Request, request_from_json

    if len(line) > LINE_LIMIT:
        raise InputError(f"a request is longer than {LINE_LIMIT} bytes: write one request per line")
    text = line.removeprefix(codecs.BOM_UTF8).strip()
    if text.startswith(b"{"):
        return request_from_json(config, text, defaults)
    tokens = [parse_id(word.decode("utf-8", "replace")) for word in text.split()]
    return Request(config, tokens, **defaults) if tokens else None


main = command(build_parser, run)
