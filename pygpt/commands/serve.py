"""Serve models over HTTP: OpenAI's completions API with continuous batching, and a page at /.

    pygpt serve -m gpt2_124M.bin                              serve on http://127.0.0.1:8000
    pygpt serve -m small=gpt2_124M.bin -m xl=gpt2-xl          two models, by name
    pygpt serve --host :: --port 8080 --api-key-file key.txt  on all addresses, with a key
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Hello", "max_tokens": 20}'

A request gets the same bytes alone and among others, cached or not, for any number of threads. After SIGTERM or Ctrl-C, running
requests have --grace seconds to end. The exit status is then 0 or 130. A second signal ends the requests at once."""

import argparse
import os
import re
from contextlib import suppress
from typing import Any

from ..errors import InputError, PyGPTError
from ..generation.request import check_speculation
from .console import Parser, command, say, whole
from .options import SPECULATE_HELP, add_model_options, load_options, parse_speculation


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt serve", usage="pygpt serve [-m [NAME=]MODEL]... [options]", description=__doc__)
    add, count = parser.add_argument, whole(1, 1 << 40)
    add("-m", "--model", metavar="[NAME=]MODEL", action="append", help="a model file or a downloaded model; may be repeated")
    add("--host", metavar="HOST", default="127.0.0.1", help="address to listen at (default 127.0.0.1; :: for all)")
    add("--port", metavar="PORT", type=whole(0, 65535), default=8000, help="TCP port (default 8000; 0: a free one)")
    add("--uds", metavar="PATH", help="listen at a Unix socket instead")
    add("--api-key", metavar="KEY", action="append", default=[], help="require this key; may be repeated")
    add("--api-key-file", metavar="FILE", help="require one of the keys in this file, one key a line; # begins a comment line")
    add_model_options(add)
    guesses = f"for requests without the field speculation: {SPECULATE_HELP} (default auto)"
    add("--speculate", metavar="K", default="auto", help=guesses)
    add("--max-live", metavar="N", type=whole(1, 4096), default=64, help="most sequences in a step (default 64)")
    add("--cache-bytes", metavar="N", type=count, help="most bytes of all keys and values (default: a quarter of the RAM)")
    add("--queue", metavar="N", type=whole(0, 1 << 20), default=256, help="most sequences that wait (default 256)")
    add("--target-ms", metavar="N", type=whole(1, 60000), default=60, help="a step's time while prompts join (default 60)")
    add("--request-timeout", metavar="S", type=count, help="seconds until a request ends with an error (default: none)")
    add("--grace", metavar="S", type=whole(0, 86400), default=30, help="seconds of running requests after SIGTERM (default 30)")
    add("--body-limit", metavar="N", type=count, default=2 << 20, help="most bytes of a request's body (default 2 MB)")
    add("--root-path", metavar="P", default="", help="prefix of all paths behind a proxy; paths without it work, too")
    cors = "let pages of this origin send requests; may be repeated"
    add("--cors-origins", dest="origins", metavar="URL", action="append", default=[], help=cors)
    add("--chat-template", choices=("plain",), help="plain: answer /v1/chat/completions with `role: content` lines")
    add("--fingerprint", action="store_true", help="hash the weights at the start, for system_fingerprint in answers")
    add("--no-page", dest="page", action="store_false", help="do not serve the page")
    return parser


def run(options: argparse.Namespace) -> int:
    """Check the arguments, open the models, and serve; return the exit status."""
    if options.root_path and not options.root_path.startswith("/"):
        raise InputError(f"--root-path is {options.root_path[:40]!r}: it must begin with /")
    for origin in options.origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s*?#]+", origin):
            raise InputError(f"--cors-origins is {origin[:40]!r}: it must be *, or such as https://example.org, without a path")
    speculation = parse_speculation(options.speculate)
    check_speculation(speculation)
    keys = options.api_key + ([] if options.api_key_file is None else _keys(options.api_key_file))
    if not all([key] == key.split() and key.isascii() and key.isprintable() for key in keys):
        raise InputError("an API key (--api-key, --api-key-file) is empty, or has spaces or non-ASCII characters")
    try:
        from ..server.app import Options, Server, listen
        from ..server.app import run as serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "h11", "prometheus_client"):
            raise
        way = "python -m pip install starlette uvicorn prometheus_client"
        raise PyGPTError(f"{error.name} is not installed: {way}") from None
    named = {name: value for name, value in vars(options).items() if name in Options.__dataclass_fields__}
    settings = Options(**named, keys=keys, chat=options.chat_template is not None, speculation=speculation)
    listening = listen(options.host, options.port, options.uds)
    made = os.stat(options.uds) if options.uds else None
    try:
        server = Server(open_models(options), settings)
        host = f"[{options.host}]" if ":" in options.host else options.host
        where = options.uds or f"http://{host}:{listening.getsockname()[1]}"
        started = f"serving {', '.join(server.by_name)} at {where}"
        return serve(server, listening, grace_s=options.grace, started=lambda: say(started))
    finally:
        listening.close()
        with suppress(FileNotFoundError):  # else, another server may listen there; it can have the same number
            if made and (made.st_ino, made.st_mtime_ns) == ((now := os.stat(options.uds)).st_ino, now.st_mtime_ns):
                os.unlink(options.uds)


def _keys(path: str) -> list[str]:
    """Return the keys in a file, one key a line. A line that begins with # is a comment. Raises InputError without any key."""
    try:
        with open(path, encoding="utf-8") as file:
            keys = [key for line in file if (key := line.strip()) and not key.startswith("#")]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the keys: {getattr(error, 'strerror', None) or error}") from None
    if not keys:
        raise InputError(f"{path}: the file has no key: write one key a line")
    return keys


def open_models(options: argparse.Namespace) -> list[Any]:
    """Open the models, and return them as Served. A file that is given under several names is opened once."""
    from ..hub.find import find_model
    from ..model import GPT2
    from ..server.call import Served

    named: dict[str, list[str]] = {}
    for given in options.model or [None]:
        name, equals, model = (given or "").partition("=")
        path, origin = find_model(model if equals else given)
        if not equals:
            base = os.path.basename(os.path.abspath(given if given and not os.path.exists(given) else path))
            name = "shakespeare" if origin == "embedded" else base if os.path.isdir(path) else os.path.splitext(base)[0]
        if not name or any(name in names for names in named.values()):
            raise InputError(f"the name {name[:40]!r} of a model is empty or given twice: use -m NAME=MODEL with another name")
        named.setdefault(path, []).append(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = []
    for path, names in named.items():
        model = GPT2.load(path, threads=options.threads, draft=options.draft_model, **load_options(options))
        least = model.network.position_bytes * model.config.maxT
        share = max((options.cache_bytes or memory // 4) // len(named), 1)
        limits = {"cache_bytes": share if options.cache_bytes else max(share, least), "max_live": options.max_live}
        found.append(Served(model, names, path, **limits, target_ms=options.target_ms, fingerprint=options.fingerprint))
    return found


main = command(build_parser, run)
