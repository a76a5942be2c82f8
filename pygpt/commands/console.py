"""What the commands share: one-line errors, exit statuses, argument parsing, help of one width.

Exit status: 0; 1 for a failure at run time; 2 for bad input; 130 after Ctrl-C; 141 if the reader of stdout has gone.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ..errors import CheckpointError, InputError, PyGPTError
from .interrupts import Interrupts, made_of_ctrl_c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn, TextIO

CUT_SHORT = (
    b"pygpt: error: a file in use was cut short by another process, or its disk failed (SIGBUS): replace a file by renaming "
    b"a new one over it; for models that are written in place there is --no-mmap\n"
)
LONGEST_LINE = 5000  # characters: a path may have 4,096


def status_of(job: Callable[[], object]) -> int:
    """Run a command's job; report an exception in one line; return the exit status.

    If a mapped file is cut short, SIGBUS ends the process, after one line, too.
    """
    try:
        with Interrupts():
            explained(job)
            if sys.stdout is not None:
                sys.stdout.flush()  # here: at exit, the interpreter would report a failure with a traceback
    except KeyboardInterrupt:
        return 130
    except (InputError, CheckpointError) as error:
        return complain(error, 2)
    except (PyGPTError, MemoryError) as error:
        return complain(str(error) or "out of memory", 1)
    except (ImportError, RuntimeError, SystemError) as error:
        if made_of_ctrl_c(error):
            return 130
        if isinstance(error, ImportError):  # a module that is not built, or no memory to map it
            return complain(str(error) or "out of memory", 1)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's last flush must not fail
        return 141
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return complain(error, 1)
    return 0


def import_command(name: str) -> "Callable[[Sequence[str]], int]":
    """Import a command's module and return its main(). If the import fails, say so in one line and exit."""
    found: list[Callable[[Sequence[str]], int]] = []
    if status := status_of(lambda: found.append(import_module(f".{name}", __package__).main)):
        sys.exit(status)
    return found[0]


def explained(job: Callable[[], object]) -> None:
    """Do a job. If a mapped file is cut short meanwhile, print CUT_SHORT before the process ends."""
    from .. import _signals  # here: if it is not built, status_of() reports that in one line

    begun = _signals.begin(CUT_SHORT)
    try:
        job()
    finally:
        if begun:
            _signals.end()


def complain(error: object, status: int) -> int:
    """Print one line on stderr; return the status."""
    say(f"error: {error}")
    return status


def say(text: str) -> None:
    """Print one line on stderr. The job goes on if stderr is closed or full."""
    if text and sys.stderr is not None:
        try:
            print("pygpt:", one_line(text), file=sys.stderr, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the interpreter's last flush must not fail


def check_stdout(what: str) -> None:
    """Raise PyGPTError if stdout is closed: print() itself would ignore that."""
    if sys.stdout is None:
        raise PyGPTError(f"stdout is closed: there is nowhere to print {what}")


def one_line(text: str) -> str:
    """Return text as one readable line. Control characters are escaped: names and servers' answers may hold commands for the
    terminal."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 500]} [...] {line[-400:]}"


def for_terminal(text: str, stream: "TextIO | None") -> str:
    """Return a model's or a file's text for `stream`: as it is, or on a terminal with control characters escaped, except for
    newlines and tabs."""
    if stream is None or not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports every error in one line, also if stdout does not take the help."""

    def error(self, message: str) -> "NoReturn":
        """Exit with status 2 and one line, without the usage block."""
        raise InputError(f"{message[:200]}; see --help")  # a message may repeat the whole command line

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> "Any":
        """Refuse -- as a value, as in -t=--, which Python before 3.13 turns into an empty list."""
        values = super()._get_values(action, arg_strings)
        if action.nargs is None and values == []:
            self.error(f"argument {'/'.join(action.option_strings) or action.metavar}: -- is not a value")
        return values

    def _print_message(self, message: str, file: object = None) -> None:
        """Print the help or the version at once: argparse itself would ignore a failure."""
        check_stdout("the help")
        sys.stdout.write(message)
        sys.stdout.flush()


def whole(low: int, high: int) -> "Callable[[str], int]":
    """A type for argparse: a whole number in these limits, written in ASCII digits."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 21 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: it must be a whole number from {low} to {high}")
        return int(text)

    return read


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width on every terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)
