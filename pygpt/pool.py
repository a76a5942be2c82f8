"""A fixed pool of threads that run one job together.

`pool.run(job)` calls `job(ith, nth)` on every worker and returns when all have finished. The calling thread is worker 0. The
pool does not know what the job computes.

docs/course.md maps the primitives of thread.h and thread-sync.h to this module. In thread.h, a worker that still waits at exit
makes the process hang. Here, close() stops the workers first. There are two levels of synchronisation. The pool wakes the
workers once for each job and waits for them once (about 10 us). Inside a job, workers wait for each other at native barriers
without the GIL (about 1 us). A job with native barriers gives run() its `abort`, which releases the other workers if one worker
fails. If there are more workers than processors, a job that needs only as many as can run at once leaves the others asleep.

Refuses nested jobs, and more than MAX_THREADS workers. A thread count that is not a whole number is an error."""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from ._signals import holding, see_through
from .cpus import MAX_THREADS, check_threads, runnable
from .errors import TYPE_CHECKING, ClosedError, Closing, PyGPTError, check_whole

TRIES = 100  # attempts for a call that can fail by itself, and that signal handlers can interrupt at each attempt
OWN_POOL = "a job, or a handler that interrupts it, cannot use its own pool: it would wait for itself"

if TYPE_CHECKING:
    from typing import SupportsIndex, TypeVar

    T = TypeVar("T")

Job = Callable[[int, int], object]


class ThreadPool(Closing):
    """`nth` workers: the caller and nth - 1 threads. With nth = 1, the caller works alone.

    Safe to share: callers take turns. After fork() the child makes its own threads at its first run. Raises InputError for
    a bad count, and PyGPTError when the system refuses a thread."""

    def __init__(self, nth: "SupportsIndex") -> None:
        self.nth = check_threads(nth)
        self._turn = threading.RLock()  # its holder may use the fields below
        self._busy = self._closed = False
        self._workers: _Workers | None = None
        self._ready()
        _note(self)

    def run(
        self,
        job: Job,
        abort: Callable[[], None] | None = None,
        *,
        before: Callable[[], object] | None = None,
        again: Callable[[], bool] | None = None,
        after: "Callable[[], T] | None" = None,
        workers: int | None = None,
    ) -> "T | None":
        """Call job(ith, nth) once on every worker, ith = 0 .. nth-1, and return when all have finished.

        before() runs first and after() last, on the caller, in the same turn. run() returns what after() returns. As long as
        again() returns True after a round, the workers do another round. workers: how many are enough, if not all. With 1 the
        caller does the whole job, as job(0, 1). With more, the pool may call job(ith, n) on any n of at least so many.

        If the job raises on a worker, abort() is called at once, so that workers that wait inside the job can leave it. When
        all workers have stopped, run() raises the first exception, and does not call after(). If a signal handler raises
        meanwhile (Ctrl-C), run() raises that exception, in preference to others, also after all workers have stopped. If the
        handler interrupts the caller's own share, which may or may not have begun, abort() may do that share instead.

        Raises InputError for bad workers, ClosedError after close(), and PyGPTError inside a job of this pool."""
        enough = self.nth if workers is None else min(check_whole("workers", workers, 1, MAX_THREADS), self.nth)
        self._refuse_own_workers()

        def rounds() -> "T | None":
            self._refuse_nested()
            self._busy = True
            try:
                if self._closed:
                    raise ClosedError("the model or its thread pool is closed: make a new one")
                threads = self._ready()
                if before is not None:
                    before()
                while True:
                    if enough == 1:
                        job(0, 1)
                    else:
                        threads.run(job, abort or nothing, enough)
                    if again is None or not again():
                        break
                return after() if after is not None else None
            finally:
                self._busy = False

        return holding(self._turn, rounds)

    def close(self) -> None:
        """Stop the threads and wait for them in the order they were made. Waits for a running job; may be called twice."""
        self._refuse_own_workers()
        holding(self._turn, self._close)

    def _close(self) -> None:
        self._refuse_nested()
        self._closed = True
        if self._workers is not None:
            self._workers.stop()
            self._workers.join()
            self._finalizer.detach()
            self._workers.ends = []  # break the cycle: threads must not be left to the garbage collector (see _pools)
            self._workers = None

    def _refuse_nested(self) -> None:
        """Refuse a call inside a job, before() or after(), or in a signal handler that interrupts them."""
        if self._busy:
            raise PyGPTError(OWN_POOL)

    def _refuse_own_workers(self) -> None:
        """Refuse a worker of this pool: it would wait for its turn until its own job ends."""
        workers = self._workers  # read once: close() on another thread may reset it
        if workers is not None and threading.current_thread() in workers.threads:
            raise PyGPTError(OWN_POOL)

    def _ready(self) -> "_Workers":
        """Return the threads. Make them if there are none: at construction, and after fork."""
        if self._workers is None:
            self._workers = _Workers(self.nth)
            self._finalizer = weakref.finalize(self, self._workers.stop)  # the threads of a deleted pool end by themselves
            self._finalizer.atexit = False
        return self._workers

    def _after_fork(self) -> None:
        """Forget the threads in a forked child: they do not exist here, and their locks may be held for ever."""
        if self._workers is not None:
            self._finalizer.detach()
            self._workers = None
        self._busy = False
        self._turn = threading.RLock()


class _Workers:
    """The threads of one pool in one process, and their shared state. It does not refer to the pool, which may be deleted. The
    caller may be the main thread, where a signal handler can raise between any two steps. So the caller's side of a round is a
    sequence of stages. Each stage can be entered again safely, and see_through() repeats them until the round is over. The
    caller waits at a plain lock, because an interrupted acquire() either has the lock or does not. The other workers are never
    interrupted: they wait at the Condition and the Barrier."""

    POST, WORK, ABANDONED, GATHER = range(4)  # stages of a round, for the caller
    CALLS = 30  # nested calls that a round needs at most, without those of the job

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.lock = threading.RLock()  # guards the fields below; re-entrant: stop() may run in the garbage collector
        self.few = nth if nth < 3 else min(nth, max(2, runnable()))  # workers of a narrow round; a wide one has all
        self.wakes = [threading.Condition(self.lock) for _ in range(2)]  # a new round or the end; a new wide round or the end
        self.rounds = [0, 0]  # the last round, and the last wide one
        self.stopping = False
        self.failure: BaseException | None = None  # the first of a round
        self.job: Job = nothing
        self.abort: Callable[[], None] = nothing
        self.stage = self.GATHER
        self.active = nth  # workers of this round
        self.aborts = 0  # how often the caller has tried abort() in this round
        self.round = 0  # the caller's current round
        self.finished = 0  # the last round that all other workers have finished
        self.done = threading.Lock()  # released when they have finished
        self.done.acquire()
        self.ends = [threading.Barrier(max(n - 1, 1), self.report) for n in (self.few, nth)]  # of narrow and wide rounds
        self.threads: list[threading.Thread] = []
        try:
            for ith in range(1, nth):
                self.threads.append(threading.Thread(target=self.serve, args=(ith,), name=f"pygpt-{ith}", daemon=True))
                self.threads[-1].start()
        except BaseException as error:
            self.stop()
            self.join()
            if isinstance(error, RuntimeError):
                ith = len(self.threads) + 1
                raise PyGPTError(f"the system refused thread {ith} of {nth} ({error}): use fewer threads") from error
            raise

    # ---- the caller

    def run(self, job: Job, abort: Callable[[], None], enough: int) -> None:
        """Run one round of at least `enough` workers, which all call the job; the caller is worker 0."""
        _descend(self.CALLS)
        self.job, self.abort, self.aborts, self.failure = job, abort, 0, None
        self.active = self.few if enough <= self.few else self.nth
        try:
            # Up to see_through(), calls and backward jumps would let a signal handler raise. This code avoids both.
            self.round, self.stage = self.round + 1, self.POST
            try:
                see_through(self.proceed)
            except Exception as error:
                if self.failure is None:
                    self.failure = error
            if self.failure is not None:
                raise self.failure
        finally:
            self.job, self.abort, self.failure = nothing, nothing, None

    def proceed(self) -> bool:
        """Do the caller's side of a round, from the stage that it has reached. Return True: the round is over."""
        if self.stage == self.POST:
            holding(self.lock, self.announce)
            self.stage = self.WORK
        if self.stage == self.WORK:
            self.stage = self.ABANDONED  # until the share is done
            try:
                self.job(0, self.active)
            except Exception as error:
                if self.failure is None:  # without a call or a lock, in which a handler could raise
                    self.failure = error
            else:
                self.stage = self.GATHER
        if self.stage == self.ABANDONED:
            self.aborts += 1
            if self.aborts <= TRIES:
                self.abort()
            self.stage = self.GATHER
        while self.finished != self.round:
            self.done.acquire()
        return True

    def announce(self) -> None:
        """Wake the workers of a new round."""
        for kind in range(1 + (self.active > self.few)):
            self.rounds[kind] = self.round
            self.wakes[kind].notify_all()

    # ---- the other workers

    def serve(self, ith: int) -> None:
        """Live as a worker: wait for a round, work, wait for the others, again."""
        seen, kind = 0, int(ith >= self.few)
        while True:
            with self.lock:
                while self.rounds[kind] == seen and not self.stopping:
                    self.wakes[kind].wait()
                if self.rounds[kind] == seen:
                    return
                seen = self.rounds[kind]
            self.work(ith)
            self.ends[self.active > self.few].wait()

    def report(self) -> None:
        """Let the caller continue. This is the barrier's action; the last worker to finish runs it."""
        self.finished = self.rounds[0]
        if self.done.locked():  # it is unlocked if the caller saw `finished` before it had to wait
            self.done.release()

    # ---- both

    def work(self, ith: int) -> None:
        """Do worker ith's share of the job; keep the first failure for the caller."""
        try:
            self.job(ith, self.active)
        except BaseException as error:  # also SystemExit: it must reach the caller instead of ending a thread
            if self.failure is None:  # the GIL keeps other threads out between this test and the assignment
                self.failure = error
            with suppress(BaseException):  # report the failure of the job
                self.abort()

    def stop(self) -> None:
        """Ask the workers to stop as soon as they are idle."""
        self.stopping = True
        self.notify()
        if threading.current_thread() in self.threads:
            # The garbage collector runs this in a worker that may have read `stopping` and be about to wait. The worker holds
            # the lock until it can be notified, so only another thread can notify it in time.
            with suppress(RuntimeError):  # if there are no more threads, the worker sleeps until the process ends
                threading.Thread(target=self.notify, daemon=True).start()

    def notify(self) -> None:
        """Wake all workers that wait."""
        holding(self.lock, lambda: list(map(threading.Condition.notify_all, self.wakes)))

    def join(self, deadline: float | None = None) -> None:
        """Wait for the workers in the order they were made, until time.monotonic() passes the deadline (None: without end)."""
        for thread in self.threads:
            if thread.ident is not None:  # else it was never started
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))


def nothing(*_: object) -> None:
    """Do nothing: the job and the abort() of idle workers."""


def _descend(calls: int) -> None:
    """Raise RecursionError before a round, if the stack has too little room for its nested calls. Inside a round the
    error would occur again each time that a stage is entered again."""
    if calls:
        _descend(calls - 1)


# Plain weak references: the garbage collector would run a WeakSet's callback, and Python drops a Ctrl-C raised in it.
_pools: "list[weakref.ref[ThreadPool]]" = []


def _note(pool: ThreadPool) -> None:
    for gone in [reference for reference in _pools if reference() is None]:
        with suppress(ValueError):  # another thread has removed it
            _pools.remove(gone)
    _pools.append(weakref.ref(pool))


def _living() -> list[ThreadPool]:
    return [pool for reference in list(_pools) if (pool := reference()) is not None]


def _at_exit() -> None:
    """Stop idle workers. A worker that is still busy after a second ends with the process (daemon). A pool that
    is used later makes new threads, if Python still allows it."""
    deadline = time.monotonic() + 1.0
    stopped = []
    for pool in _living():
        if pool._workers is not None:
            pool._workers.stop()
            stopped.append(pool._workers)
            if not pool._busy:
                pool._finalizer.detach()
                pool._workers = None
    for workers in stopped:
        workers.join(deadline)


os.register_at_fork(after_in_child=lambda: list(map(ThreadPool._after_fork, _living())))
atexit.register(_at_exit)
