"""A fixed pool of threads that run one job together: `pool.run(job)` calls `job(ith, nth)` on every worker and returns when
all have finished. The calling thread is worker 0. The pool knows nothing of GPT.

What stands here for each primitive of thread.h and thread-sync.h:

    create(fn)          ThreadPool(nth): threads 1 .. nth-1 are made once, each with its id; the caller is 0
    join()              ThreadPool.close(): waits for all in creation order; idempotent; runs at exit by itself
    mutex               threading.RLock: one round's state; callers take turns
    spinlock            none in Python, where a spinning thread would hold the GIL; natively sync.h's bounded spin
    condition variable  threading.Condition: workers wait in a loop for a new round; broadcast wakes them all
    semaphore P / V     threading.Barrier: a round's end is nth arrivals, which is P nth-1 times, in one object

A worker that waits at exit would hang thread.h's process; here it is told to stop first. Two levels of meeting: this pool
wakes and gathers the workers once for each job (about 10 us), and a job that has phases synchronises them natively,
without the GIL (about 1 us). Such a job gives run() its `abort`, which frees the others when one worker fails.

Refuses: nested jobs, more than MAX_THREADS workers, and guessing (a thread count that is not a whole number is an error).
"""

import atexit
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from .errors import ClosedError, InputError, PyGPTError

MAX_THREADS = 256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

Job = Callable[[int, int], object]


class ThreadPool:
    """`nth` workers: the caller and nth - 1 threads. nth = 1 starts no thread at all.

    Safe to share: callers take turns. After fork() the child makes its own threads at the next run. Raises InputError for
    a bad count and PyGPTError when the system refuses a thread.
    """

    def __init__(self, nth: int) -> None:
        if not isinstance(nth, int) or not 1 <= nth <= MAX_THREADS:
            raise InputError(f"threads is {nth!r}: it must be a whole number from 1 to {MAX_THREADS}")
        self.nth = nth
        self._closed = False
        self._turn = threading.RLock()
        self._crew: _Crew | None = None
        self._running = False
        self._hire()
        _pools.add(self)

    def run(self, job: Job, abort: Callable[[], None] | None = None) -> None:
        """Call job(ith, nth) once on every worker, ith = 0 .. nth-1, and return when all of them have finished.

        If the job raises on any worker, every worker comes to rest, then the first exception is raised here; `abort` is
        called at once, so that workers which wait for the failed one inside the job can leave. Ctrl-C in the main thread
        takes effect when the round is over.
        """
        with self._turn:
            if self._closed:
                raise ClosedError("the thread pool is closed")
            if self._running:
                raise PyGPTError("a job cannot run another job on its own pool")
            self._running = True
            try:
                if self.nth == 1:
                    job(0, 1)
                else:
                    _defer_interrupt(lambda: self._round(job, abort or _nothing))
            finally:
                self._running = False

    def _round(self, job: Job, abort: Callable[[], None]) -> None:
        crew = self._hire()
        try:
            crew.post(job, abort)
            crew.work(0)
            crew.rest.wait()
        except BaseException:  # only a signal handler that raises gets here: this crew's state is unknown, so replace it
            abort()
            self._dismiss()
            raise
        crew.settle()

    def turn(self) -> "threading.RLock":
        """The lock that callers take turns by: hold it (`with`) to make several calls one turn."""
        return self._turn

    def close(self) -> None:
        """Stop the threads and wait for them in the order they were made. Waits for a running job; may be called twice."""
        with self._turn:
            self._closed = True
            if self._crew is not None:
                self._crew.stop()
                self._crew.join()
            self._dismiss()

    def _hire(self) -> "_Crew":
        """The threads, made now if there are none: at construction, after fork, after a dismissal."""
        if self._crew is None:
            self._crew = _Crew(self.nth)
            self._goodbye = weakref.finalize(self, self._crew.stop)  # a forgotten pool's threads end by themselves
            self._goodbye.atexit = False
        return self._crew

    def _dismiss(self) -> None:
        """Let the threads go without waiting; the next run makes new ones."""
        if self._crew is not None:
            self._goodbye.detach()
            self._crew.stop()
            self._crew.rest.abort()
            self._crew = None

    def _after_fork(self) -> None:
        """In a forked child: the threads do not exist here, and the locks may be held by threads that do not."""
        if self._crew is not None:
            self._goodbye.detach()
            self._crew = None
        self._running = False
        self._turn = threading.RLock()

    def __enter__(self) -> "ThreadPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Crew:
    """The threads of one pool in one process, and what they share. Does not refer to the pool, which may be forgotten."""

    def __init__(self, nth: int) -> None:
        self.nth = nth
        self.lock = threading.RLock()  # guards the fields below; re-entrant: stop() may run in the garbage collector
        self.wake = threading.Condition(self.lock)
        self.job: Job = _nothing
        self.abort: Callable[[], None] = _nothing
        self.rounds = 0
        self.stopping = False
        self.failure: BaseException | None = None
        self.rest = threading.Barrier(nth)
        self.threads: list[threading.Thread] = []
        for ith in range(1, nth):
            thread = threading.Thread(target=self.serve, args=(ith,), name=f"pygpt-{ith}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self.stop()
                self.join()
                raise PyGPTError(f"the system refused thread {ith + 1} of {nth} ({error}): use fewer threads") from error
            self.threads.append(thread)

    def post(self, job: Job, abort: Callable[[], None]) -> None:
        """Wake the workers for a new round."""
        with self.lock:
            self.job, self.abort = job, abort
            self.rounds += 1
            self.wake.notify_all()

    def serve(self, ith: int) -> None:
        """A worker's life: wait for a round, work, meet the others, again."""
        done = 0
        while True:
            with self.lock:
                while self.rounds == done and not self.stopping:
                    self.wake.wait()
                if self.stopping:
                    return
                done = self.rounds
            self.work(ith)
            try:
                self.rest.wait()
            except threading.BrokenBarrierError:  # dismissed
                return

    def work(self, ith: int) -> None:
        """Do worker ith's share of the job; keep the first failure for the caller."""
        try:
            self.job(ith, self.nth)
        except BaseException as error:  # including SystemExit: it must reach the caller, not end a thread
            with self.lock:
                if self.failure is None:
                    self.failure = error
            self.abort()

    def settle(self) -> None:
        """After a round: forget the job, raise its first failure."""
        failure, self.failure, self.job, self.abort = self.failure, None, _nothing, _nothing
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # or its traceback would keep this frame alive in a cycle

    def stop(self) -> None:
        """Tell the workers to stop once they are idle."""
        with self.lock:
            self.stopping = True
            self.wake.notify_all()

    def join(self, deadline: float | None = None) -> None:
        """Wait for the workers in the order they were made, until time.monotonic() passes the deadline (None: for good)."""
        for thread in self.threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))


def _nothing(*_: object) -> None:
    """The job and the abort of a crew at rest."""


def _defer_interrupt(action: Callable[[], None]) -> None:
    """Run `action` so that Ctrl-C takes effect after it, not inside: an exception between two steps of the protocol would
    leave workers waiting for a caller that has gone. Only the main thread is ever interrupted."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        action()
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        action()
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])


# ------------------------------------------------------------------------------------------------ fork and exit

_pools: "weakref.WeakSet[ThreadPool]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._after_fork()


def _at_exit() -> None:
    """Stop idle workers in good order; a worker that is still busy after a second dies with the process (daemon)."""
    crews = [pool._crew for pool in list(_pools) if pool._crew is not None]
    for crew in crews:
        crew.stop()
    deadline = time.monotonic() + 1.0
    for crew in crews:
        crew.join(deadline)


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)

# ------------------------------------------------------------------------------------------------ how many threads


def resolve_threads(threads: int | None = None) -> int:
    """The number of workers to use: `threads`, else PYGPT_THREADS, else default_threads(). Raises InputError."""
    if threads is not None:
        return threads
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
        base = f"{root}sys/fs/cgroup/{controllers}".rstrip("/")
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            folder = "/".join([base, *parts[:depth]])
            if controllers:
                words = [_read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us")]
            else:
                words = _read(f"{folder}/cpu.max").split()
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # "max" and -1: no quota
                yield int(words[0]) / int(words[1])


def _read(path: str) -> str:
    """A small text file of the system without its newline; empty where there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
