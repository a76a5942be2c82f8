"""Run a command's main() in this process with separate streams, and check the promises of every command."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

STATUSES = (0, 1, 2, 130, 141, 143)
MOST_OUTPUT = 4000  # bytes: then the reader of stdout goes away
LONGEST_LINE = 5100  # characters on stderr: a path may have 4,096
PREFIXES = ("pygpt: ", "chat.py: ")  # of every line on stderr


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    out: bytes
    err: str


class Pipe(io.RawIOBase):
    """Stdout whose reader goes away after some bytes."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if len(self.content) > MOST_OUTPUT:
            raise BrokenPipeError
        self.content += bytes(data)
        return len(data)


class Piped(io.TextIOWrapper):
    """A text stream over a Pipe, written through."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(io.BufferedWriter(pipe, 1), "utf-8", "strict", write_through=True)


def run_main(
    command: Callable[[Sequence[str]], int], argv: Sequence[str], stdin: bytes = b"", closed: Sequence[str] = ()
) -> Outcome:
    """Run a command. `closed` names the streams, "stdin" or "stdout", that are closed."""
    before = sys.stdin, sys.stdout, sys.stderr
    pipe, err = Pipe(), io.BytesIO()
    out = Piped(pipe)
    sys.stdin, sys.stdout = io.TextIOWrapper(io.BytesIO(stdin), "utf-8"), out
    sys.stderr = io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True)
    for name in closed:
        setattr(sys, name, None)
    kept = os.dup(1), os.dup(2)  # a command that cannot write redirects them to /dev/null
    try:
        status = command(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 99
    finally:
        errors = err.getvalue().decode()
        sys.stdin, sys.stdout, sys.stderr = before
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
        with suppress(BrokenPipeError, ValueError):
            out.detach()  # or the garbage collector would write it later
    return Outcome(status, pipe.content, errors)


def judge(outcome: Outcome, argv: Sequence[str], *, lines: int = 1) -> None:
    """Check a command's status and stderr: a documented status, few lines of ours, an error line for 1 and 2, no traceback."""
    status, _, err = outcome
    found = err.splitlines()
    where = f"status {status} of {argv!r:.300}, stderr {err[-2000:]!r}"
    assert status in STATUSES, where
    assert len(found) <= lines, where
    assert "Traceback" not in err, where
    assert all(line.startswith(PREFIXES) and line.isprintable() and len(line) <= LONGEST_LINE for line in found), where
    if status in (1, 2):
        assert found, where
        assert "error: " in found[-1], where


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """In this block Ctrl-C comes after so long: a command that computes for ever ends with status 130."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
