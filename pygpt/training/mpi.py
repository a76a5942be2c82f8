"""Ranks over MPI, with mpi4py (the extra `mpi`). Only this module imports mpi4py.

Every wait polls, so that signals take effect, and ends the rank if a message does not come in time. Objects travel as pickles
between ranks of one run, which trust each other: MPI neither encrypts nor authenticates."""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import mpi4py

mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # _begin() initializes MPI
from mpi4py import MPI  # noqa: E402

from ..errors import InputError, PyGPTError  # noqa: E402
from .parallel import TIMEOUT_S, Messages, Ranks, T  # noqa: E402

STUCK = 75  # the exit status if a message does not come in time: EX_TEMPFAIL, "try again later"
FORWARD_S = 0.3  # for the launcher to read a last message: it may drop the rest when a rank aborts
PATIENT_S, NAP_S = 0.5, 0.001  # after so long a wait, sleep between two looks


class MPIRanks(Ranks):
    """The ranks of MPI_COMM_WORLD. If this process ends without close(), or by an exception, it ends all ranks."""

    def __init__(self, timeout: float = TIMEOUT_S) -> None:
        self._open, self.agreed, self.version = True, False, mpi4py.__version__
        atexit.register(self._abort)
        self._arrays, self._objects = _begin(timeout)
        self.size, self.rank = self._arrays.size, self._arrays.rank
        if self.size == 1:  # open_ranks() saw a launcher of several
            self._open = False
            way = "use its launcher, or set MPI4PY_LIBMPI to the file libmpi.so of the launcher's MPI"
            raise InputError(f"several ranks were started, but {MPI.get_vendor()[0]} finds only this one: {way}")
        self.timeout, self.seconds = timeout, 0.0
        self._hosts = [f"rank {self.rank} on {MPI.Get_processor_name()}"] * self.size  # until gather() collects all names
        self._waiting: tuple[float, list[int]] | None = None  # since when, and for which ranks
        threading.Thread(target=self._watch, daemon=True).start()
        self._hosts = self.gather(self._hosts[0])

    def name(self, rank: int) -> str:
        """Return a rank's number and host for messages."""
        return self._hosts[rank]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in their order. Every rank must call it."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        sends = [(self._objects.isend(value, rank), rank) for rank in others]
        found: dict[int, Any] = {self.rank: value}

        def look() -> list[int]:
            for rank in others:
                if rank not in found and (message := self._objects.improbe(rank)) is not None:
                    found[rank] = message.recv()
            return [rank for rank in others if rank not in found] + [rank for request, rank in sends if not request.Test()]

        self._wait(look)
        return [found[rank] for rank in range(self.size)]

    def begin(self, sends: Messages, receives: Messages) -> list[tuple[MPI.Request, int]]:
        """Begin to send and receive arrays; return what finish() takes. Between two ranks, messages keep their order."""
        begun = [(self._arrays.Irecv(array, rank), rank) for array, rank in receives]
        return begun + [(self._arrays.Isend(array, rank), rank) for array, rank in sends]

    def finish(self, begun: list[tuple[MPI.Request, int]]) -> None:
        """Wait until all these messages have arrived."""

        def look() -> list[int]:
            begun[:] = [(request, rank) for request, rank in begun if not request.Test()]
            return [rank for _, rank in begun]

        self._wait(look)

    def _wait(self, look: Callable[[], list[int]]) -> None:
        """Call look() until it returns an empty list: the ranks that this one still waits for."""
        start = time.perf_counter()
        try:
            while missing := look():
                waited = time.perf_counter() - start
                self._waiting = (start, missing)
                if waited > self.timeout:
                    self._stuck(missing)
                time.sleep(NAP_S if waited > PATIENT_S else 0)  # 0: let another process run on a shared core
        finally:
            self._waiting = None
            self.seconds += time.perf_counter() - start

    def _watch(self) -> None:
        """End the process if even a look takes too long: MPI itself hangs."""
        while self._open:
            time.sleep(min(1.0, self.timeout))
            if (waiting := self._waiting) and time.perf_counter() - waiting[0] > self.timeout + 5:
                self._stuck(waiting[1])

    def _stuck(self, missing: list[int]) -> None:
        """Name the ranks that do not answer, and end the process; the launcher then ends the others."""
        names = ", ".join(self.name(rank) for rank in sorted(set(missing))[:8])
        text = f"pygpt: error: {self.name(self.rank)}: no message from {names} for {self.timeout:g} s: restart with --resume\n"
        with suppress(OSError):
            os.write(2, text.encode())
        os._exit(STUCK)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None or self.agreed:
            self.gather(None)  # no rank finalizes MPI while another may still fail
            self._open = False
        elif isinstance(error, MPI.Exception):  # as from a rank that was killed in the middle of a message
            way = f"MPI lost a rank ({str(error).splitlines()[-1]}): start the ranks again with --resume"
            raise PyGPTError(f"{self.name(self.rank)}: {way}") from error

    def _abort(self) -> None:
        """End all ranks, unless this one has left its `with` block in order. Python calls this at the end of the process."""
        if self._open and MPI.Is_initialized() and not MPI.Is_finalized():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C now ends this process, and the launcher then ends the others
            for stream in (sys.stdout, sys.stderr):
                with suppress(Exception):
                    stream.flush()
            time.sleep(FORWARD_S)
            MPI.COMM_WORLD.Abort(1)


def _begin(timeout: float) -> tuple[MPI.Intracomm, MPI.Intracomm]:
    """Initialize MPI, and return two communicators of all ranks. If others do not do so in time, as after a failed import, end
    this process. MPI may hold Python's global lock while it waits, so a child process looks at the clock. Nor could Python
    handle Ctrl-C: its default ends this process, and the launcher then ends the others."""
    handler = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread() and handler not in (signal.SIG_IGN, None)
    if main:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    left, done = os.pipe()
    if not (child := os.fork()):
        os.close(done)
        if not select.select([left], [], [], timeout)[0]:
            os.write(2, b"pygpt: error: MPI did not start within %g s: a rank ended before, or cannot be reached\n" % timeout)
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    os.close(left)
    try:
        if not MPI.Is_initialized():
            MPI.Init_thread()
        return MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()
    finally:
        os.close(done)
        os.waitpid(child, 0)
        if main:
            signal.signal(signal.SIGINT, handler)
