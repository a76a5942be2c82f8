"""Shared by all commands: one-line errors, exit statuses, argument parsing, bars, and Ctrl-C without a traceback.

Exit status: 0 for success; 1 for a failure at run time; 2 for bad input; 130 after Ctrl-C; 141 if the reader closed stdout."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module

from ..errors import TYPE_CHECKING, CheckpointError, InputError, PyGPTError

if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn, TextIO

CUT_SHORT = b"""pygpt: error: another process truncated a file in use, or its disk failed (SIGBUS): to replace a file, \
rename a new one over it; to run a model that another process rewrites in place, use --no-mmap
"""
LONGEST_LINE = 5000  # characters of a message: a path alone may have 4,096


def status_of(job: "Callable[[], int | None]") -> int:
    """Run a command's job; report an exception in one line; return the exit status, which is the job's result if it has one.

    If a mapped file is truncated meanwhile, print CUT_SHORT before the process ends."""
    try:
        with Interrupts():
            from .. import _signals  # import here: if the module is not built, one line says so

            begun = _signals.begin(CUT_SHORT)
            try:
                status = job() or 0
            finally:
                if begun:
                    _signals.end()
            if sys.stdout is not None:
                sys.stdout.flush()  # flush here: a failure at exit would print a traceback
    except KeyboardInterrupt:
        return 130
    except (PyGPTError, MemoryError) as error:
        return complain(str(error) or "out of memory", 2 if isinstance(error, (InputError, CheckpointError)) else 1)
    except (ImportError, RuntimeError, SystemError) as error:
        if made_of_ctrl_c(error):
            return 130
        if not isinstance(error, ImportError):
            raise
        return complain(str(error) or "out of memory", 1)  # the module is not built, or there is no memory to map it
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter's last flush succeeds
        return 141 if isinstance(error, BrokenPipeError) else complain(error, 1)
    return status


def command(build_parser: "Callable[[], Any]", run: "Callable[[argparse.Namespace], int | None]") -> "Callable[..., int]":
    """Return a command's main(arguments=None), which runs it and returns its exit status."""
    return lambda arguments=None: status_of(lambda: run(build_parser().parse_args(arguments)))


def import_command(name: str) -> "Callable[[Sequence[str]], int]":
    """Import a command's module and return its main(). If the import fails, report it in one line and exit."""
    found: list[Callable[[Sequence[str]], int]] = []
    if status := status_of(lambda: found.append(import_module(f".{name}", __package__).main)):
        sys.exit(status)
    return found[0]


def complain(error: object, status: int) -> int:
    """Print an error in one line on stderr; return the status."""
    say(f"error: {error}")
    return status


def say(text: str) -> None:
    """Print a notice in one line on stderr. If stderr is closed or full, drop the notice."""
    if text and sys.stderr is not None:
        try:
            print("pygpt:", one_line(text), file=sys.stderr, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # so that the interpreter's last flush succeeds


def check_stdout(what: str) -> None:
    """Raise PyGPTError if stdout is closed. print() itself would ignore this."""
    if sys.stdout is None:
        raise PyGPTError(f"stdout is closed, so {what} cannot be printed: run the command with stdout open")


def one_line(text: str) -> str:
    """Return text as one line, shortened to LONGEST_LINE. Control characters, such as those of file names, are escaped."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 500]} [...] {line[-400:]}"


def for_terminal(text: str, stream: "TextIO | None") -> str:
    """Return a model's or a file's text for `stream`. For a terminal, escape control characters except newlines and tabs."""
    if stream is None or not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports every error in one line, even an error in writing the help."""

    def __init__(self, **options: "Any") -> None:
        form = partial(argparse.RawDescriptionHelpFormatter, width=100)  # on every terminal
        super().__init__(**{"formatter_class": form, "allow_abbrev": False, **options})

    def error(self, message: str) -> "NoReturn":
        """Raise InputError with a one-line message. status_of() turns it into exit status 2."""
        from difflib import get_close_matches

        word = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        alike = " or ".join(get_close_matches(word, self._option_string_actions))
        way = f"did you mean {alike}?" if alike else "see --help"
        raise InputError(f"{message[:200]}; {way}")  # argparse's message may repeat the whole command line

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> "Any":
        """Return an option's values. Refuse the value --, as in -t=--, which Python before 3.13 turns into an empty list, and
        letters for a number: argparse reads llama.cpp's -ngl 99 as -n gl."""
        values = super()._get_values(action, arg_strings)
        letters = action.metavar == "N" and isinstance(values, str) and values[:1].isalpha()
        if action.nargs is None and (letters or values == []):
            flaw = f"{values!r} is not a number" if letters else "-- is not a value"
            self.error(f"argument {'/'.join(action.option_strings) or action.metavar}: {flaw}")
        return values

    def _print_message(self, message: str, file: object = None) -> None:
        """Print the help or the version and flush. argparse itself would ignore a write error."""
        check_stdout("the help")
        sys.stdout.write(message)
        sys.stdout.flush()


def whole(low: int, high: int) -> "Callable[[str], int]":
    """Return an argparse type that reads a whole number from `low` to `high` in ASCII digits."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 21 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: it must be a whole number from {low} to {high}")
        return int(text)

    return read


def listed(names: Sequence[str]) -> "Callable[[str], list[str]]":
    """Return a type for argparse that reads a list of these names."""

    def read(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        if unknown := [word for word in words if word not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0][:40]!r} is not one of {', '.join(names)}")
        return words

    return read


def made_of_ctrl_c(error: BaseException | None) -> bool:
    """Return whether an exception is a KeyboardInterrupt or was caused by one.

    Compiled code can turn it into an ImportError or a SystemError; before Python 3.12, a class body into a RuntimeError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class Interrupts:
    """Raise KeyboardInterrupt for Ctrl-C in a `with` block of a command's main thread. A library must not do this.

    Two cases delay it:

    - During an import, raise it after the outermost import. Compiled modules would swallow the exception or replace it, and a
      half-imported module cannot be imported again. A second Ctrl-C raises it immediately.
    - In a finalizer (__del__, a callback of a weak reference), raise it after the finalizer. There, Python would only print it.

    The delay uses Python's profiler hook, which costs nothing until Ctrl-C is pressed. If SIGINT is ignored, or has a handler
    other than Python's, nothing changes. Before and after the block, Ctrl-C ends the process by the signal."""

    def __enter__(self) -> None:
        self._base, self._hook, self._before = sys._getframe(1), sys.unraisablehook, signal.getsignal(signal.SIGINT)
        self._ours = self._before == signal.SIG_DFL or self._before is signal.default_int_handler
        if self._ours:
            try:
                signal.signal(signal.SIGINT, self._on_ctrl_c)
                sys.unraisablehook = self._on_lost
            except ValueError:  # not the main thread: signals interrupt only the main thread
                self._ours = False

    def __exit__(self, *_: object) -> None:
        if self._ours:
            sys.unraisablehook = self._hook
            signal.signal(signal.SIGINT, self._before)
        del self._base

    def _on_ctrl_c(self, _: int, frame: "FrameType | None") -> None:
        """Handle SIGINT: raise KeyboardInterrupt now, or after the current import."""
        outermost = None  # the outermost frame of the current import, if there is one
        while frame is not None and frame is not self._base:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                outermost = frame
            frame = frame.f_back
        if outermost is None or sys.getprofile() is not None:
            raise KeyboardInterrupt
        raise_later(lambda frame, event: frame is outermost and event == "return")

    def _on_lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """Handle an exception that Python cannot propagate (sys.unraisablehook)."""
        if issubclass(lost.exc_type, KeyboardInterrupt) and sys.getprofile() is None:
            raise_later(lambda frame, event: True)
        else:
            self._hook(lost)


def raise_later(now: "Callable[[FrameType, str], bool]") -> None:
    """Raise KeyboardInterrupt at the first profiler event (a call or return) that now() accepts after the caller returned."""
    here = sys._getframe()
    before = here, here.f_back

    def look(frame: "FrameType", event: str, _: object) -> None:
        if frame not in before and now(frame, event):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)


class Progress:
    """Show how many of `total` items are done. Use it in a `with` block; the end of the block removes the bar.

    what: the name of the items, in the plural. done: the number of items done at the beginning."""

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self._bar: Any = None
        self._done = done
        self._options = {"total": total, "initial": done, "unit": f" {what}"}

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` items are done, and a note such as ", loss 4.1". tqdm redraws at most ten times a second."""
        if self._bar is not None:
            self._bar.set_postfix_str(note.removeprefix(", "), refresh=False)
            self._bar.update(done - self._bar.n)

    def watch(self, items: "Iterable[Any]", size: "Callable[[Any], int]") -> "Iterator[Any]":
        """Yield the items, and after each show size(item) more as done."""
        for item in items:
            yield item
            self._done += size(item)
            self.update(self._done)

    def line(self, text: str) -> None:
        """Print a line to stdout, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def __enter__(self) -> "Progress":
        if sys.stderr is not None and sys.stderr.isatty():
            with suppress(ImportError):
                self._bar = import_module("tqdm").tqdm(**self._options, leave=False, dynamic_ncols=True, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def text_of(content: bytes) -> str | None:
    """Return the text of a token's bytes, or None for a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def piece(content: bytes) -> str:
    """Return the text of a token in quotes, or its bytes if it is a part of a character."""
    return repr(content if (text := text_of(content)) is None else text)


def table(rows: Sequence[tuple[int, bytes, float]], stream: "TextIO") -> str:
    """Return a line for each token (id, bytes, probability), with a bar that compares it with the first one."""
    from shutil import get_terminal_size

    encoding = getattr(stream, "encoding", None) or "ascii"
    names = [piece(content).encode(encoding, "backslashreplace").decode(encoding) for _, content, _ in rows]
    width = max(map(len, names))
    longest = max(1, min(30, get_terminal_size((1000, 1)).columns - width - 19))
    block = "█" if "█".encode(encoding, "ignore") else "#"
    lines = [f"{'id':>6}  {'token':<{width}}  {'%':>7}"]
    for (token, _, probability), name in zip(rows, names, strict=True):
        bar = block * round(longest * probability / rows[0][2])
        lines.append(f"{token:>6}  {name:<{width}}  {100 * probability:7.3f}  {bar}".rstrip())
    return "\n".join(lines)
