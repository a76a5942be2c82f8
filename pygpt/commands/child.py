"""Child processes of commands: their environment, and the `pygpt` command as a child that answers the chat's requests."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import PathFinder
from select import select
from subprocess import PIPE
from types import FrameType
from typing import Any, Self

from ..errors import CheckpointError, PyGPTError

NOTICE, ERROR = "pygpt: ", "pygpt: error: "  # prefixes of the child's lines on stderr
LONGEST_ID = 7  # digits: a vocabulary has at most 2^20 ids
INTERRUPTED = (130, -signal.SIGINT)  # exit statuses after Ctrl-C: from the running command, and from its imports


class ChildError(PyGPTError):
    """The child process failed. The message is the child's error line, if it wrote one."""


class RefusedError(ChildError, CheckpointError):
    """The child refused an option, a model or a request."""


class Command:
    """The `pygpt` command as a long-lived child process. Use it in a `with` block.

    This process writes one JSON object per line. For each, the child writes a line of new ids separated by spaces, each id as
    soon as it is computed. SIGINT ends a reply early, or ends an idle child. The child has its own process group, so the chat
    alone passes the terminal's Ctrl-C on. If the chat is killed, the child reaches the end of its input and ends."""

    def __init__(self, options: Sequence[str]) -> None:
        self.stopped = False  # True if Ctrl-C stopped the latest reply
        self._argv = [sys.executable, "-m", "pygpt", *options, "-"]
        self._shown: set[str] = set()  # notices already shown: a restarted child repeats them
        self._start()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            self._argv, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=child_environment(), start_new_session=True
        )
        pipes = [pipe for pipe in (self._child.stdin, self._child.stdout, self._child.stderr) if pipe]  # `if` is for mypy
        for pipe in pipes:
            os.set_blocking(pipe.fileno(), False)
        self._stdin, self._stdout, self._stderr = pipes
        self._unseen = b""  # the child's stderr output that is not shown yet
        self._signalled = False  # True once Ctrl-C was passed on to this child

    def ask(self, tokens: Sequence[int], options: Mapping[str, Any]) -> Iterator[int]:
        """Yield the ids that continue `tokens`, each as soon as it arrives, until Ctrl-C. Raises ChildError."""
        if self.stopped:
            return
        self._stdout.read(1 << 20)  # drop what the child wrote after the end of a reply that Ctrl-C stopped
        request = json.dumps({"tokens": tokens, **options}).encode() + b"\n"
        silent = True
        try:
            for token in read_ids(self._exchange(request)):
                if silent:
                    self.show_notices()  # before the reply, in the child's order
                silent = False
                if not self.stopped:
                    yield token
        except EOFError:
            if not self._ended_by_ctrl_c():
                raise self._failure() from None
            if silent and not self.stopped:  # an earlier Ctrl-C reached the idle child and ended it
                self._end()
                self._start()
                yield from self.ask(tokens, options)

    def _exchange(self, request: bytes) -> Iterator[bytes]:
        """Send the request and yield the child's output in pieces, until the child closes its stdout.

        One loop serves all three pipes. So a full pipe cannot make both processes wait for each other."""
        readable = [self._stdout, self._stderr]
        while True:
            ready, free, _ = select(readable, [self._stdin] if request else [], [])
            if free:
                try:
                    request = request[self._stdin.write(request) or 0 :]
                except BrokenPipeError:  # the child has ended, which its stdout shows
                    request = b""
            if self._stderr in ready and not self._listen():
                readable.remove(self._stderr)
            if self._stdout in ready:
                data = self._stdout.read(65536)
                self._listen()  # a notice that the child wrote before this data must appear before it
                if not data:
                    return
                yield data

    def _listen(self) -> bool:
        """Read and keep the child's stderr output. Return False at the end of that stream."""
        data = self._stderr.read(1 << 20)  # None if there is no data yet
        self._unseen += data or b""
        return data != b""

    def show_notices(self, *, others: bool = False) -> str:
        """Print each of the child's notices once. Return, unprinted, what the child says of its speed with --stats, or "".

        others: print all its complete lines except errors. A line may begin a traceback, so print others only after a reply."""
        kept, stats = b"", ""
        for raw in self._unseen.splitlines(keepends=True):
            line = raw.decode("utf-8", "replace").rstrip()
            speed = line.startswith(NOTICE) and " tokens/s" in line  # may come with the first token: keep it for the end
            if line.startswith(ERROR) or not raw.endswith(b"\n") or not (others or (line.startswith(NOTICE) and not speed)):
                kept += raw
            elif speed:
                stats = line
            elif line not in self._shown:
                self._shown.add(line)
                print(line, file=sys.stderr)
        self._unseen = kept
        return stats

    def check(self) -> None:
        """Raise ChildError if the child has ended by itself, for example because of a bad option."""
        if self._child.poll() is not None and not self._ended_by_ctrl_c():
            raise self._failure()

    def _ended_by_ctrl_c(self) -> bool:
        """Wait for the child to end; return whether the Ctrl-C that was passed on ended it."""
        return self._child.wait() in INTERRUPTED and self._signalled

    def _failure(self) -> ChildError:
        """Return an error that explains in one line why the child ended."""
        status = self._child.wait()
        self._listen()
        heard, _, last = self._unseen.decode("utf-8", "replace").rstrip().rpartition("\n")
        if status in (1, 2, -signal.SIGBUS) and last.startswith(NOTICE):
            self._unseen = heard.encode() + b"\n"
            reason = last.removeprefix(ERROR).removeprefix(NOTICE)
        else:
            reason = "the pygpt command " + (f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}")
            if last and not last.startswith(NOTICE):
                reason += f": {last.strip()}"
        self.show_notices()
        return (RefusedError if status == 2 else ChildError)(reason)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In this block, the first Ctrl-C stops the reply without an exception; the second raises KeyboardInterrupt."""

        def on_ctrl_c(_signal: int, _frame: FrameType | None) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = self._signalled = True
            self._child.send_signal(signal.SIGINT)  # the child stops the reply and ends its line

        self.stopped = False
        before = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _end(self) -> None:
        """Close the child's input, so that it ends. Kill it after 5 seconds, or at a Ctrl-C."""
        self._stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
        finally:
            self._child.kill()  # has no effect if the child has ended
            self._child.wait()
            self._stdout.close()
            self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is not None:  # do not wait for the result of a long computation
            self._child.kill()
        self._end()


def child_environment() -> dict[str, str]:
    """Return an environment in which a child process imports this package, even one that lies in this script's folder.

    PYTHONSAFEPATH keeps files in the current folder from replacing modules."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if os.path.basename(here) in ("site-packages", "dist-packages"):
        return environment
    spec = PathFinder.find_spec("pygpt", [entry for entry in sys.path if os.path.realpath(entry) != here])
    if spec is None or spec.origin is None:  # without an origin, it is a folder of that name but not a package
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    return environment


def read_ids(chunks: Iterable[bytes]) -> Iterator[int]:
    """Yield the ids of one line, each after the space or newline behind it. Raises EOFError and ChildError."""
    rest = b""
    for chunk in chunks:
        line, newline, _ = (rest + chunk).partition(b"\n")
        *words, rest = line.split(b" ")
        if newline or len(rest) > LONGEST_ID:
            words.append(rest)
        for word in filter(None, words):
            if not word.isdigit() or len(word) > LONGEST_ID:
                raise ChildError(f"the pygpt command answered {word[:40].decode('utf-8', 'replace')!r} instead of a token id")
            yield int(word)
        if newline:
            return
    raise EOFError
