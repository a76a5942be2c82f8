"""What the four kinds of stress share: the tally of what was checked, small models, programs in processes of their own."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from pygpt import Config, TrainableGPT2

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 120.0  # of our own life, for what takes one or two seconds, also on a busy machine: reached only by a hang
SHAPE = Config(maxT=128, V=211, L=2, NH=3, C=48)
OTHER = Config(maxT=64, V=97, L=1, NH=2, C=32)
SHOWN = 20  # failures that are told in full
# How each program begins that is given by its text, as each script does (pygpt/interrupts.py).
BEGIN = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
"""


class Tally:
    """Counts what was checked, by name, and keeps what failed. Threads may share it."""

    def __init__(self, seed: int, unit: str = "runs") -> None:
        self.seed, self.unit = seed, unit
        self.random = random.Random(seed)  # of the main thread
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.runs = 0  # of the stress's `unit`: rounds, seconds, ...
        self._lock = Lock()

    def check(self, what: str, right: object, detail: object = "") -> bool:
        """Count one check; note it as failed unless it is right."""
        with self._lock:
            self.counts[what] += 1
            if not right:
                self.failures.append(f"{what}: {detail}"[:2000])
                if len(self.failures) <= SHOWN:
                    print(f"FAILED {self.failures[-1]}", file=sys.stderr, flush=True)
        return bool(right)

    def note(self, what: str) -> None:
        """Count something that is neither right nor wrong."""
        with self._lock:
            self.counts[what] += 1

    @contextmanager
    def expect(self, what: str, error: type[BaseException], words: str = "") -> Iterator[None]:
        """Check that the block raises this error, whose message has these words."""
        try:
            yield
        except error as found:
            self.check(what, words in str(found), f"{found!r} does not say {words!r}")
        except BaseException as found:
            self.check(what, False, f"{found!r} where {error.__name__} was expected")
            if isinstance(found, KeyboardInterrupt):
                raise
        else:
            self.check(what, False, f"no {error.__name__}")

    def report(self) -> int:
        """Print the counts; return the exit status."""
        for what, count in sorted(self.counts.items()):
            print(f"{count:8}  {what}")
        total = sum(self.counts.values())
        print(f"{total:8}  in all, {len(self.failures)} failed; {self.runs} {self.unit}, seed {self.seed}", flush=True)
        return 1 if self.failures else 0


@contextmanager
def folder() -> Iterator[Path]:
    """A folder for this run, which vanishes at its end."""
    with tempfile.TemporaryDirectory(prefix="pygpt-stress-") as name:
        yield Path(name)


def make_model(path: Path, config: Config = SHAPE, *, version: int = 3, seed: int = 1, sharp: float = 1.0) -> str:
    """Write a small model of random weights; `sharp` multiplies the logits, as training does."""
    with TrainableGPT2.random(config, seed=seed, threads=1) as model:
        model.tensor("wpe")[:] *= 10
        model.tensor("lnfw")[:] *= sharp
        model.save(path, version=version)
    return str(path)


def environment(**variables: str) -> dict[str, str]:
    """This one without our variables, and with this checkout's pygpt."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYGPT_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "", **variables}


def command(*words: object) -> list[str]:
    """The pygpt command."""
    return [sys.executable, "-m", "pygpt", *map(str, words)]


def start(argv: Sequence[object], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a program, all its streams pipes unless `options` say otherwise."""
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([str(word) for word in argv], **{**streams, "env": environment(), "cwd": "/", **options})


class Outcome:
    """How a program ended: status (negative: the signal that ended it), out, err."""

    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out, err.decode("utf-8", "replace")

    @property
    def quiet(self) -> bool:
        """Whether it said nothing."""
        return not self.err

    @property
    def one_line(self) -> bool:
        """Whether it complained in one line."""
        return self.err.startswith(("pygpt: error: ", "chat.py: error: ")) and self.err.count("\n") == 1

    def __repr__(self) -> str:
        return f"status {self.status}, stdout {self.out[-200:]!r}, stderr {self.err[-1200:]!r}"


def patience(pause_s: float) -> Iterator[None]:
    """Yield as often as there is time for what cannot take so long: each time the caller waits for `pause_s` at most. Counting
    is no clock: a machine that stands still for minutes, and we with it, is no hang."""
    yield from [None] * round(DEADLINE_S / pause_s)


def finish(process: "subprocess.Popen[bytes]", given: bytes | None = None) -> Outcome:
    """Wait for a program's end; one that hangs is ended, and has status -SIGKILL."""
    for _ in patience(0.5):
        try:
            out, err = process.communicate(given, timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            given = None  # it is on its way
    else:
        process.kill()
        out, err = process.communicate()
        err = b"HANGS\n" + (err or b"")
    return Outcome(process.returncode, out or b"", err or b"")


def run(argv: Sequence[object], given: bytes = b"", **options: Any) -> Outcome:
    """Run a program to its end."""
    return finish(start(argv, **options), given)


def wait_until(condition: Callable[[], object]) -> bool:
    """Wait for something that is about to happen; False when it does not."""
    for _ in patience(0.002):
        if condition():
            return True
        time.sleep(0.002)
    return False


def alive(pid: int) -> bool:
    """Whether a process is there (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """The processes that a process has started; none where the system does not say."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in task.read_text().split()]
    return found


def send(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal, if the process is still there."""
    with suppress(ProcessLookupError):
        process.send_signal(number)
