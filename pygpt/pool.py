"""A fixed pool of threads that run one job together: `pool.run(job)` calls `job(ith, nth)` on every worker and returns when
all have finished. The calling thread is worker 0. The pool knows nothing of GPT.

What stands here for each primitive of thread.h and thread-sync.h:

    create(fn)          ThreadPool(nth): threads 1 .. nth-1 are made once, each with its id; the caller is 0
    join()              ThreadPool.close(): waits for all in creation order; idempotent; runs at exit by itself
    mutex               threading.RLock: one round's state; callers take turns
    spinlock            none in Python, where a spinning thread would hold the GIL; natively sync.h's bounded spin
    condition variable  threading.Condition: workers wait in a loop for a new round; broadcast wakes them all
    semaphore P / V     threading.Barrier: a round's end is nth-1 arrivals, and its action one V for the caller, whose P is
                        a threading.Lock

A worker that waits at exit would hang thread.h's process; here it is told to stop first. Two levels of meeting: this pool
wakes and gathers the workers once for each job (about 10 us), and a job that has phases synchronises them natively,
without the GIL (about 1 us). Such a job gives run() its `abort`, which frees the others when one worker fails.

Refuses: nested jobs, more than MAX_THREADS workers, and guessing (a thread count that is not a whole number is an error).
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

from ._signals import see_through
from .errors import ClosedError, InputError, PyGPTError, is_whole, shown

MAX_THREADS = 256
TRIES = 100  # at what signals' handlers may end whenever they raise, and what may also raise for good reasons of its own
OWN_POOL = "a job, or what interrupts it, cannot use its own pool: it would wait for itself"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

Job = Callable[[int, int], object]


class ThreadPool:
    """`nth` workers: the caller and nth - 1 threads. nth = 1 starts no thread at all.

    Safe to share: callers take turns. After fork() the child makes its own threads at the next run. Raises InputError for
    a bad count and PyGPTError when the system refuses a thread.
    """

    def __init__(self, nth: int) -> None:
        self.nth = check_threads(nth)
        self._turn = threading.RLock()  # who holds it may use the fields below
        self._busy = False
        self._closed = False
        self._crew: _Crew | None = None
        self._hire()
        _note(self)

    def run(
        self,
        job: Job,
        abort: Callable[[], None] | None = None,
        *,
        before: Callable[[], object] | None = None,
        again: Callable[[], bool] | None = None,
        after: "Callable[[], T] | None" = None,
        alone: bool = False,
    ) -> "T | None":
        """Call job(ith, nth) once on every worker, ith = 0 .. nth-1, and return when all of them have finished.

        before() is called first and after() last, by the caller, in the same turn; run() returns what after() returns. With
        `alone` the caller does the whole job, as job(0, 1). As long as again() says so after a round, the workers do one
        more. If anything raises, after() is not called. If the job raises on a worker, abort() is called at once, so that
        workers which wait for the failed one inside the job can leave; every worker comes to rest; then the first exception
        is raised here. So is what a signal handler raises in between, Ctrl-C before any other: it never leaves a worker
        behind, and is never lost beside a failure. If it takes the place of the caller's own share, which nobody knows to
        have begun, abort() may do that share instead. Raises ClosedError after close(), PyGPTError inside a job of this pool.
        """
        self._refuse_own_workers()
        with self._turn:
            self._refuse_nesting()
            self._busy = True
            try:
                if self._closed:
                    raise ClosedError("the model or its thread pool is closed")
                crew = self._hire()
                if before is not None:
                    before()
                if alone or self.nth == 1:
                    job(0, 1)
                else:
                    crew.run(job, abort or _nothing)
                    while again is not None and again():
                        crew.run(job, abort or _nothing)
                return after() if after is not None else None
            finally:
                self._busy = False

    def close(self) -> None:
        """Stop the threads and wait for them in the order they were made. Waits for a running job; may be called twice."""
        self._refuse_own_workers()
        with self._turn:
            self._refuse_nesting()
            self._closed = True
            if self._crew is not None:
                self._crew.stop()
                self._crew.join()
                self._goodbye.detach()
                self._crew.rest = None  # break the cycle: the threads go now, and not in the garbage collector (see _pools)
                self._crew = None

    def _refuse_own_workers(self) -> None:
        """A worker that waited for its turn would wait for its own job's end."""
        crew = self._crew  # once: close() on another thread may take it away between two looks
        if crew is not None and threading.current_thread() in crew.threads:
            raise PyGPTError(OWN_POOL)

    def _refuse_nesting(self) -> None:
        """The same for the caller: in a job, in before() and after(), in a signal handler that interrupts them."""
        if self._busy:
            raise PyGPTError(OWN_POOL)

    def _hire(self) -> "_Crew":
        """The threads, made now if there are none: at construction, and after fork."""
        if self._crew is None:
            self._crew = _Crew(self.nth)
            self._goodbye = weakref.finalize(self, self._crew.stop)  # a forgotten pool's threads end by themselves
            self._goodbye.atexit = False
        return self._crew

    def _after_fork(self) -> None:
        """In a forked child: the threads do not exist here, and the locks may be held by threads that do not."""
        if self._crew is not None:
            self._goodbye.detach()
            self._crew = None
        self._busy = False
        self._turn = threading.RLock()

    def __enter__(self) -> "ThreadPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Crew:
    """The threads of one pool in one process, and what they share. Does not refer to the pool, which may be forgotten.

    The caller may be the main thread, where a signal handler can raise between any two steps. So its side of a round is a
    sequence of stages, each safe to enter again, which see_through() walks to the end; and it waits at a plain lock, which is
    acquired or not, never half. The other workers are never interrupted: they wait at the Condition and the Barrier.
    """

    POST, WORK, ABANDONED, GATHER = range(4)  # stages of a round, for the caller
    CALLS = 30  # within each other that a round needs at most, beside the job's own

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.lock = threading.RLock()  # guards the fields below; re-entrant: stop() may run in the garbage collector
        self.wake = threading.Condition(self.lock)  # a new round, or the end
        self.rounds = 0
        self.stopping = False
        self.failure: BaseException | None = None  # the first of a round
        self.job: Job = _nothing
        self.abort: Callable[[], None] = _nothing
        self.stage = self.GATHER
        self.aborts = 0  # that the caller has tried in this round
        self.round = 0  # the caller's current round
        self.gathered = 0  # the last round that all other workers have finished
        self.news = threading.Lock()  # released when they have
        self.news.acquire()
        self.rest = threading.Barrier(nth - 1, self.tell) if nth > 1 else None
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

    def run(self, job: Job, abort: Callable[[], None]) -> None:
        """One round: every worker calls the job; the caller is worker 0."""
        _descend(self.CALLS)
        self.job, self.abort, self.aborts, self.failure = job, abort, 0, None
        try:
            # From here to see_through() no call and no jump back are completed: no handler raises between them.
            self.round, self.stage = self.round + 1, self.POST
            try:
                see_through(self.proceed)
            except Exception as error:
                if self.failure is None:
                    self.failure = error
            if self.failure is not None:
                raise self.failure
        finally:
            self.job, self.abort, self.failure = _nothing, _nothing, None

    def proceed(self) -> bool:
        """The caller's side of a round, from the stage that it has reached. Returns True: the round is over."""
        if self.stage == self.POST:
            with self.lock:
                self.rounds = self.round
                self.wake.notify_all()
            self.stage = self.WORK
        if self.stage == self.WORK:
            self.stage = self.ABANDONED  # until the share is done
            try:
                self.job(0, self.nth)
            except Exception as error:
                if self.failure is None:  # without a call or a lock: a handler could raise in them
                    self.failure = error
            else:
                self.stage = self.GATHER
        if self.stage == self.ABANDONED:
            self.aborts += 1
            if self.aborts <= TRIES:
                self.abort()
            self.stage = self.GATHER
        while self.gathered != self.round:
            self.news.acquire()
        return True

    # ---- the other workers

    def serve(self, ith: int) -> None:
        """A worker's life: wait for a round, work, meet the others, again."""
        assert self.rest is not None
        done = 0
        while True:
            with self.lock:
                while self.rounds == done and not self.stopping:
                    self.wake.wait()
                if self.rounds == done:
                    return
                done = self.rounds
            self.work(ith)
            self.rest.wait()

    def tell(self) -> None:
        """The barrier's action: the last worker to finish lets the caller go on."""
        self.gathered = self.rounds
        if self.news.locked():  # it is not where the caller saw `gathered` before it had to wait
            self.news.release()

    # ---- both

    def work(self, ith: int) -> None:
        """Do worker ith's share of the job; keep the first failure for the caller."""
        try:
            self.job(ith, self.nth)
        except BaseException as error:  # including SystemExit: it must reach the caller, not end a thread
            if self.failure is None:  # nothing comes between these two: no other thread either, under Python's global lock
                self.failure = error
            with suppress(BaseException):  # the job's failure is the one to report
                self.abort()

    def stop(self) -> None:
        """Tell the workers to stop once they are idle."""
        with self.lock:
            self.stopping = True
            self.wake.notify_all()
        if threading.current_thread() in self.threads:
            # The garbage collector runs this in a worker, which may have looked at `stopping` and be about to wait: it holds
            # the lock then until it can be notified, and only another thread can tell when that is.
            with suppress(RuntimeError):  # no more threads: it stays asleep, and dies with the process
                threading.Thread(target=self.notify, daemon=True).start()

    def notify(self) -> None:
        """Wake all workers that wait."""
        with self.lock:
            self.wake.notify_all()

    def join(self, deadline: float | None = None) -> None:
        """Wait for the workers in the order they were made, until time.monotonic() passes the deadline (None: for good)."""
        for thread in self.threads:
            if thread.ident is not None:  # else it was never started
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))


def _nothing(*_: object) -> None:
    """The job and the abort of a crew at rest."""


def _descend(calls: int) -> None:
    """Raise RecursionError if there is no room for so many calls within each other: here, where nothing has begun. In a round
    it would be raised each time that the round is entered again."""
    if calls:
        _descend(calls - 1)


# ------------------------------------------------------------------------------------------------ fork and exit

# Not a WeakSet: the garbage collector would run its callback, which is Python code, and Python drops a Ctrl-C raised in there.
_pools: "list[weakref.ref[ThreadPool]]" = []


def _note(pool: ThreadPool) -> None:
    """Add a pool to the list, and remove those that are gone."""
    for gone in [reference for reference in _pools if reference() is None]:
        with suppress(ValueError):  # another thread has removed it
            _pools.remove(gone)
    _pools.append(weakref.ref(pool))


def _living() -> list[ThreadPool]:
    return [pool for reference in list(_pools) if (pool := reference()) is not None]


def _after_fork_in_child() -> None:
    for pool in _living():
        pool._after_fork()


def _at_exit() -> None:
    """Stop idle workers in good order; a worker that is still busy after a second dies with the process (daemon). A pool
    that is used even later makes new threads, where Python still allows it."""
    deadline = time.monotonic() + 1.0
    crews = []
    for pool in _living():
        if pool._crew is not None:
            pool._crew.stop()
            crews.append(pool._crew)
            if not pool._busy:
                pool._goodbye.detach()
                pool._crew = None
    for crew in crews:
        crew.join(deadline)


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)

# ------------------------------------------------------------------------------------------------ how many threads


def check_threads(threads: int) -> int:
    """Return a number of workers; raises InputError unless it is a whole number from 1 to MAX_THREADS."""
    if not is_whole(threads, 1, MAX_THREADS):
        raise InputError(f"threads is {shown(threads)}: it must be a whole number from 1 to {MAX_THREADS}")
    return threads


def resolve_threads(threads: int | None = None) -> int:
    """The number of workers to use: `threads`, else PYGPT_THREADS, else default_threads(). Raises InputError."""
    if threads is not None:
        return check_threads(threads)
    text = os.environ.get("PYGPT_THREADS")
    if not text:
        return default_threads()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_THREADS):
        raise InputError(f"PYGPT_THREADS is {text[:40]!r}: it must be a whole number from 1 to {MAX_THREADS}")
    return int(text)


def default_threads(root: str = "/") -> int:
    """As many workers as can really run side by side: the least of the processors this process may use, its cgroup's CPU
    quota rounded down, and the physical cores among them; at least 1. More would take turns at every barrier."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    limits = [len(cpus), _physical_cores(root, cpus), MAX_THREADS, *(int(quota) for quota in _cpu_quotas(root))]
    return max(1, min(limits))


def _physical_cores(root: str, cpus: set[int]) -> int:
    """How many cores the given processors share; all of them where the system does not say."""
    cores = {_read(f"{root}sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in cpus}
    return len(cores)


def _cpu_quotas(root: str) -> Iterator[float]:
    """Every CPU quota above this process, in processors: cgroup version 2 (cpu.max) and 1 (cpu.cfs_quota_us)."""
    for line in _read(f"{root}proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for mount in {controllers, "cpu"} if controllers else {""}:  # version 1: "cpu" is a link where names differ
            for depth in range(len(parts), -1, -1):
                folder = "/".join([f"{root}sys/fs/cgroup/{mount}".rstrip("/"), *parts[:depth]])
                yield from _quota(folder, version=1 if controllers else 2)


def _quota(folder: str, *, version: int) -> Iterator[float]:
    """The CPU quota of one cgroup, if it has one."""
    if version == 1:
        words = [_read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us")]
    else:
        words = _read(f"{folder}/cpu.max").split()
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # "max" and -1: none
        yield int(words[0]) / int(words[1])


def _read(path: str) -> str:
    """A small text file of the system without its newline; empty where there is none."""
    try:
        with open(path, errors="surrogateescape") as file:  # a cgroup's name may be any bytes
            return file.read().strip()
    except OSError:
        return ""
