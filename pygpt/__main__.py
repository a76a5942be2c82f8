"""The `pygpt` command: token ids or "-" are completed, and everything else is a subcommand of its own.

`python -m pygpt 31373 612` completes ids (commands/complete.py). `python -m pygpt train ...` runs commands/train. Only the
module of the command that runs is imported.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

import sys
from collections.abc import Sequence

from .commands.console import import_command

COMMANDS = {  # the module of each subcommand
    "chat": "chat",
    "train": "train.main",
    "eval": "eval",
    "shards": "shards",
    "convert": "convert",
    "quantize": "quantize",
    "download": "download",
    "bench": "bench.main",
    "profile": "profile.main",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        return import_command(COMMANDS[arguments[0]])(arguments[1:])
    return import_command("complete")(arguments)


if __name__ == "__main__":
    sys.exit(main())
