"""The `pygpt` command: complete token ids, or run a subcommand. It imports only the chosen command."""

import gc
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

import sys
from collections.abc import Sequence

from .commands import COMMANDS
from .commands.console import complain, import_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named by the first argument; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return import_command(COMMANDS[first][0])(arguments[1:])
    if first[:1].isalpha():
        way = f"complete a text with `pygpt chat TEXT`; the commands are {', '.join(COMMANDS)}"
        return complain(f"{first[:40]!r} is neither a token id nor a command: {way}", 2)
    return import_command("complete")(arguments)


def start(arguments: Sequence[str] | None = None) -> int:
    """Run main() as the whole of a process, which then starts and ends about 4 ms sooner."""
    gc.set_threshold(50_000)  # imports make many objects and hardly any garbage
    status = main(arguments)
    gc.freeze()  # the interpreter ends with three collections, which skip frozen objects
    return status


if __name__ == "__main__":
    sys.exit(start())
