"""Child processes of commands: how they find this package, and the `pygpt` command as a child that answers requests.

The chat's child opens the model and owns the threads. As a process of its own, it is not disturbed by the terminal's Ctrl-C and
by the interface's work. The child judges the model file and the thread count, and its one-line error is passed on.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder

from ..errors import PyGPTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

NOTICE, ERROR = "pygpt: ", "pygpt: error: "  # how the child's own lines on its standard error begin
LONGEST_ID = 7  # digits: no vocabulary has more than 2^20 ids
GRACE_SECONDS = 5.0  # for the child to end once its input has ended
INTERRUPTED = (130, -signal.SIGINT)  # exit statuses after Ctrl-C: the command's own, and during its imports


class ChildError(PyGPTError):
    """The child has failed; the message is the child's own if it left an error line."""


class Command:
    """The `pygpt` command as a long-lived child process. Use it in a `with` block.

    The protocol: a JSON object a line on its input; on its output the new ids, each written when it is known, separated by
    spaces and ended by a newline. SIGINT ends a reply early, and ends the child if it is idle.

    The child has a process group of its own, so that the terminal's Ctrl-C reaches only the chat, which passes it on. If the
    chat is killed, the child's input ends, and so does the child.
    """

    def __init__(self, options: Sequence[str]) -> None:
        self.stopped = False  # whether Ctrl-C stopped the latest reply
        self._argv = [sys.executable, "-m", "pygpt", *options, "-"]
        self._shown: set[str] = set()  # notices: a restarted child repeats them
        self._start()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=child_environment(),
            start_new_session=True,
        )
        pipes = self._child.stdin, self._child.stdout, self._child.stderr
        self._stdin, self._stdout, self._stderr = [pipe for pipe in pipes if pipe]  # there are three, as asked
        for pipe in self._stdin, self._stdout, self._stderr:
            os.set_blocking(pipe.fileno(), False)
        self._unseen = b""  # what it wrote to its standard error, not shown yet
        self._signalled = False  # whether this child ever got a Ctrl-C

    def ask(self, tokens: Sequence[int], options: "Mapping[str, Any]") -> Iterator[int]:
        """Yield the ids that continue `tokens`, each as soon as it arrives, and none after stop(). `options`: a request's.

        Raises ChildError when the child ends in between or says anything but ids.
        """
        if self.stopped:
            return
        self._stdout.read(1 << 20)  # after a Ctrl-C, the child may have written beyond the end of its reply
        request = json.dumps({"tokens": tokens, **options}).encode() + b"\n"
        silent = True
        try:
            for token in read_ids(self._exchange(request)):
                if silent:
                    self.show_notices()  # before the reply, as the child wrote them
                silent = False
                if not self.stopped:
                    yield token
        except EOFError:
            if not self._ended_by_ctrl_c():
                raise self._failure() from None
            if silent and not self.stopped:  # an earlier Ctrl-C reached the child after that reply, and ended it
                self._end()
                self._start()
                yield from self.ask(tokens, options)

    def _exchange(self, request: bytes) -> Iterator[bytes]:
        """Send the request and yield what the child answers, until it closes its output.

        One loop serves all three pipes, so that neither process waits for the other to empty a full pipe.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            selector.register(self._stderr, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._stdin in ready and not (request := self._send(request)):
                    selector.unregister(self._stdin)
                if self._stderr in ready and not self._listen():
                    selector.unregister(self._stderr)
                if self._stdout in ready:
                    data = self._stdout.read(65536)
                    self._listen()  # a notice written before this data must not be seen after it
                    if not data:
                        return
                    yield data

    def _send(self, request: bytes) -> bytes:
        """Write what the pipe takes and return the rest. If the child has ended, return nothing: its output tells."""
        try:
            return request[self._stdin.write(request) or 0 :]
        except BrokenPipeError:
            return b""

    def _listen(self) -> bool:
        """Keep what the child has written to its standard error. Return False at the end of that stream."""
        data = self._stderr.read(1 << 20)  # None: nothing now
        self._unseen += data or b""
        return data != b""

    def show_notices(self, *, others: bool = False) -> None:
        """Show the child's notices, each once; with `others`, all of its whole lines except errors.

        Other lines may begin a traceback, so they wait until it is clear that the child goes on.
        """
        kept = b""
        for raw in self._unseen.splitlines(keepends=True):
            line = raw.decode("utf-8", "replace").rstrip()
            if line.startswith(ERROR) or not raw.endswith(b"\n") or not (others or line.startswith(NOTICE)):
                kept += raw
            elif line not in self._shown:
                self._shown.add(line)
                print(line, file=sys.stderr)
        self._unseen = kept

    def check(self) -> None:
        """Raise ChildError if the child has ended by itself, as it does for a bad option."""
        if self._child.poll() is not None and not self._ended_by_ctrl_c():
            raise self._failure()

    def _ended_by_ctrl_c(self) -> bool:
        """Whether the child, whose output has ended, was ended by a Ctrl-C that was passed on to it."""
        return self._child.wait() in INTERRUPTED and self._signalled

    def _failure(self) -> ChildError:
        """Return an error that says in one line why the child has ended."""
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
        return ChildError(reason)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """In this block Ctrl-C stops the reply without an exception; a second one raises KeyboardInterrupt."""

        def on_ctrl_c(_signal: int, _frame: "FrameType | None") -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stop()

        self.stopped = False
        before = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def stop(self) -> None:
        """Stop the reply: pass Ctrl-C on to the child, which ends its line."""
        self.stopped = self._signalled = True
        self._child.send_signal(signal.SIGINT)

    def _end(self) -> None:
        """End the child by closing its input; kill it after GRACE_SECONDS or at a Ctrl-C."""
        self._stdin.close()
        try:
            self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._child.kill()  # does nothing to a child that has ended
            self._child.wait()
            self._stdout.close()
            self._stderr.close()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        if exception is not None:  # it may be in a long computation whose result is not wanted any more
            self._child.kill()
        self._end()


def child_environment() -> dict[str, str]:
    """The environment in which a child process finds this package.

    A script's folder is on this process's path, but not on the child's: if the child would find no pygpt, PYTHONPATH names
    this one. Because of PYTHONSAFEPATH, files in the current folder cannot take the place of modules.
    """
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if os.path.basename(here) in ("site-packages", "dist-packages"):
        return environment
    spec = PathFinder.find_spec("pygpt", [entry for entry in sys.path if os.path.realpath(entry) != here])
    if spec is None or spec.origin is None:  # without an origin, it is a mere folder of that name
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    return environment


def read_ids(chunks: Iterable[bytes]) -> Iterator[int]:
    """Yield the ids of one line, each once the space or newline after it has arrived. Raises EOFError if no newline comes."""
    rest = b""
    for chunk in chunks:
        line, newline, _ = (rest + chunk).partition(b"\n")
        *words, rest = line.split(b" ")
        if newline or len(rest) > LONGEST_ID:
            words.append(rest)
        for word in filter(None, words):
            yield read_id(word)
        if newline:
            return
    raise EOFError


def read_id(word: bytes) -> int:
    """Read one id, or raise ChildError."""
    if not word.isdigit() or len(word) > LONGEST_ID:
        found = word[:40].decode("utf-8", "replace")
        raise ChildError(f"the pygpt command answered {found!r} where a token id was expected")
    return int(word)
