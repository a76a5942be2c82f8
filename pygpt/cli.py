"""What the package's commands share: one line for every error, exit statuses, help of one width.

Exit status: 0; 1 for a failure at run time; 2 for bad input; 130 after Ctrl-C; 141 when the reader of stdout has gone.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable

from .errors import CheckpointError, InputError, PyGPTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
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


def made_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether an exception is, or came of, a KeyboardInterrupt: compiled code makes an ImportError or a SystemError of it, the
    body of a class a RuntimeError (before Python 3.12), another handler that raises its own exception."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class Interrupts:
    """In a `with` block of a command's main thread Ctrl-C raises KeyboardInterrupt, but where Python would lose it, or it would
    break what it meets, a little later:

    - when the import is over in which it came: compiled modules swallow it or make another error of it, weak references that
      imports use print and forget it, and what is left half-imported cannot be imported again. A second one does not wait.
    - after the finalizer (__del__, a callback of a weak reference) that it ended, where Python would print and forget it.

    It waits for that as a profiler does, which costs nothing while no Ctrl-C comes. One that is ignored stays so, and a
    handler that is not Python's own stays, too. Before the block, while a command is imported, and after it, while the
    interpreter ends, Ctrl-C ends the process as the system does: each script begins with that, and the block puts it back.
    """

    def __enter__(self) -> None:
        self._base, self._hook, self._before = sys._getframe(1), sys.unraisablehook, signal.getsignal(signal.SIGINT)
        self._ours = self._before == signal.SIG_DFL or self._before is signal.default_int_handler
        if self._ours:
            try:
                signal.signal(signal.SIGINT, self._on_ctrl_c)
                sys.unraisablehook = self._on_lost
            except ValueError:  # not the main thread, the only one that signals interrupt
                self._ours = False

    def __exit__(self, *_: object) -> None:
        if self._ours:
            sys.unraisablehook = self._hook
            signal.signal(signal.SIGINT, self._before)
        del self._base

    def _on_ctrl_c(self, _: int, frame: "FrameType | None") -> None:
        """The signal's handler."""
        outermost = None  # of the import's frames, if there is an import
        while frame is not None and frame is not self._base:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                outermost = frame
            frame = frame.f_back
        if outermost is None or sys.getprofile() is not None:
            raise KeyboardInterrupt
        raise_later(lambda frame, event: frame is outermost and event == "return")

    def _on_lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """Python's hook for exceptions that nobody can catch."""
        if issubclass(lost.exc_type, KeyboardInterrupt) and sys.getprofile() is None:
            raise_later(lambda frame, event: True)
        else:
            self._hook(lost)


def raise_later(now: "Callable[[FrameType, str], bool]") -> None:
    """Raise KeyboardInterrupt at the first event of Python's profiler (a call, a return) after the caller's end for which now()
    says so."""
    here = sys._getframe()
    before = here, here.f_back

    def look(frame: "FrameType", event: str, _: object) -> None:
        if frame not in before and now(frame, event):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)


def explained(job: Callable[[], object]) -> None:
    """Do a job in which a mapped file that is cut short does not end the process without a word."""
    from . import _signals  # here, so that kernels that were not built are one line, too

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
