"""What the package's commands share: one line for every error, exit statuses, help of one width.

Exit status: 0; 1 for a failure at run time; 2 for bad input; 130 after Ctrl-C; 141 when the reader of stdout has gone.
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
    """Do a command's job; return its exit status, an exception said in one line. So is a mapped file that is cut short,
    which ends the process by its signal."""
    try:
        with Interrupts():
            explained(job)
            if sys.stdout is not None:
                sys.stdout.flush()  # now, for the interpreter would fail in its own words
    except KeyboardInterrupt:
        return 130
    except (InputError, CheckpointError) as error:
        return complain(error, 2)
    except (PyGPTError, MemoryError) as error:
        return complain(str(error) or "out of memory", 1)
    except (ImportError, RuntimeError, SystemError) as error:
        if made_of_ctrl_c(error):
            return 130
        if isinstance(error, ImportError):  # no room to map a module, or it is not built
            return complain(str(error) or "out of memory", 1)
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain when it flushes stdout
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
    """Do a job in which a mapped file that is cut short does not end the process without a word."""
    from .. import _signals  # here, so that kernels that were not built are one line, too

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
    """Print one line on stderr. Where there is none, print() would take stdout; where it is full, the job still matters."""
    if text and sys.stderr is not None:
        try:
            print("pygpt:", one_line(text), file=sys.stderr, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # or the interpreter would fail when it flushes stderr


def check_stdout(what: str) -> None:
    """Refuse to begin what would be printed nowhere: print() says nothing where stdout is closed."""
    if sys.stdout is None:
        raise PyGPTError(f"stdout is closed: there is nowhere to print {what}")


def one_line(text: str) -> str:
    """Text in one line of a length that can be read, what cannot be printed escaped: names and servers' words come from
    outside, and a terminal would obey what is hidden in them."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 500]} [...] {line[-400:]}"


def for_terminal(text: str, stream: "TextIO | None") -> str:
    """Text of a model or a file as `stream` may have it: exact, but on a terminal without what commands it, which is escaped;
    newlines and tabs stay."""
    if stream is None or not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


class Parser(argparse.ArgumentParser):
    """An argument parser that complains in one line, also about a stdout that does not take the help."""

    def error(self, message: str) -> "NoReturn":
        """Exit with status 2 and one line, without the usage block."""
        raise InputError(f"{message[:200]}; see --help")  # it may repeat all of a long command line

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> "Any":
        """Refuse -- as a value, as in -t=--, which Python before 3.13 turns into an empty list."""
        values = super()._get_values(action, arg_strings)
        if action.nargs is None and values == []:
            self.error(f"argument {'/'.join(action.option_strings) or action.metavar}: -- is no value")
        return values

    def _print_message(self, message: str, file: object = None) -> None:
        """Print the help or the version at once: argparse itself would keep a failure to itself."""
        check_stdout("the help")
        sys.stdout.write(message)
        sys.stdout.flush()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of one width on every terminal, as README shows it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=100)
