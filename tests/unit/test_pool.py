"""The pool and the model under stress: failures, interrupts, forks, threads, exits, leaks. Whatever happens, nothing hangs,
nothing crashes, and what is computed afterwards has the right bits.

What may take a process down runs in a process of its own, with a deadline. The tests do not depend on the machine's speed.
Threads wait for each other at events. If a test provokes a race, it checks every outcome."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from make_checkpoint import make
from running import execute

import pygpt.model
from pygpt import GPT2, ClosedError, InputError, PyGPTError, ThreadPool, cpus, default_threads
from pygpt import pool as pool_module
from pygpt._kernels import Trace
from pygpt._signals import holding, see_through
from pygpt.cpus import MAX_THREADS, resolve_threads

ROOT = Path(pygpt.__file__).parent.parent
SHAPE: dict[str, int] = {"L": 2, "NH": 3, "C": 48, "V": 211, "maxT": 128, "seed": 5}
TOKENS = [(17 * i + 3) % 211 for i in range(64)]
BEST, RUNNABLE = cpus.workers_for, cpus.runnable  # as they are outside of tests
DEADLINE = 60  # seconds for work of one or two seconds: only a hang reaches it

# ---------------------------------------------------------------------------------------------------------------------
# Tools


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    file = tmp_path_factory.mktemp("pool") / "model.bin"
    make(file, **SHAPE)
    return file


@pytest.fixture(scope="module")
def expected(path: Path) -> npt.NDArray[np.float32]:
    """The logits of TOKENS, from one thread."""
    with GPT2.load(path, threads=1) as model:
        return model.logits(TOKENS)


def pool_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pygpt-")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.001)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Start a thread; join it with finish()."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def finish(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a thread hangs"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Every test leaves as many pool threads as it found: none."""
    yield
    if pool_threads():
        gc.collect()
        wait_until(lambda: not pool_threads())


PREAMBLE = """
import atexit, gc, os, random, signal, sys, threading, time
import numpy as np
import pygpt.model
from pygpt import GPT2, ClosedError, PyGPTError, ThreadPool
pygpt.cpus.workers_for = lambda threads, *_: threads
pygpt.cpus.runnable = lambda: 256
PATH = sys.argv[1]
TOKENS = [(17 * i + 3) % 211 for i in range(64)]
with GPT2.load(PATH, threads=1) as model:
    EXPECTED = model.logits(TOKENS)

def right(model):
    cache = model.new_cache()
    first = model.prefill(cache, TOKENS[:40])
    rows = [model.decode(cache, token) for token in TOKENS[40:44]]
    return np.array_equal(np.stack([first, *rows]), EXPECTED[39:44]) and np.array_equal(model.logits(TOKENS), EXPECTED)
"""


def script(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a separate program after PREAMBLE. Fail if it hangs."""
    program = PREAMBLE + textwrap.dedent(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    environment.pop("PYGPT_THREADS", None)
    ignore = "-Wignore:This process:DeprecationWarning"  # Python 3.12 warns about every fork with threads
    words = [sys.executable, ignore, "-c", program, str(path)]
    return execute(words, stdin=subprocess.DEVNULL, timeout=DEADLINE, env=environment)


def succeed(code: str, path: Path, output: str = "fine\n") -> None:
    """The program ends by itself with status 0, prints this, and complains about nothing."""
    result = script(code, path)
    assert (result.returncode, result.stdout, result.stderr) == (0, output, "")


# ---------------------------------------------------------------------------------------------------------------------
# A round


@pytest.mark.parametrize("nth", [1, 2, 3, 8, 16])
def test_every_worker_once(nth: int) -> None:
    before = len(pool_threads())  # of models that other tests have not closed
    with ThreadPool(nth) as pool:
        assert len(pool_threads()) == before + nth - 1
        calls: list[tuple[int, int, threading.Thread]] = []
        for _ in range(50):
            calls.clear()
            pool.run(lambda ith, n: calls.append((ith, n, threading.current_thread())))
            assert sorted(call[:2] for call in calls) == [(ith, nth) for ith in range(nth)]
            by_id = [call[2] for call in sorted(calls, key=lambda call: call[0])]
            assert by_id[0] is threading.current_thread()
            assert [thread.name for thread in by_id[1:]] == [f"pygpt-{ith}" for ith in range(1, nth)]  # the same each time
            assert all(thread.daemon for thread in by_id[1:])


@pytest.mark.parametrize("failing", [None, 0, 2])
def test_a_narrow_round_leaves_the_other_workers_asleep(monkeypatch: pytest.MonkeyPatch, failing: int | None) -> None:
    """On three processors, a job for which two or three workers are enough has three; wide and narrow rounds may take turns."""
    monkeypatch.setattr(pool_module, "runnable", lambda: 3)
    with ThreadPool(6) as pool:
        for enough, nth in [(2, 3), (3, 3), (None, 6), (6, 6), (1, 1), (4, 6), (2, 3), (9, 6), (3, 3)] * 20:
            calls: list[tuple[int, int, str]] = []

            def job(ith: int, nth: int, calls: list[tuple[int, int, str]] = calls) -> None:
                calls.append((ith, nth, threading.current_thread().name))
                if ith == failing:
                    raise Failure

            if failing is None or failing >= nth:
                pool.run(job, workers=enough)
            else:
                with pytest.raises(Failure):
                    pool.run(job, workers=enough)
            names = [threading.current_thread().name] + [f"pygpt-{ith}" for ith in range(1, nth)]
            assert sorted(calls) == [(ith, nth, names[ith]) for ith in range(nth)]
        threads = pool._workers.threads if pool._workers is not None else []
    assert len(threads) == 5
    assert not any(thread.is_alive() for thread in threads)  # also those that slept


@pytest.mark.parametrize("nth", [0, -1, MAX_THREADS + 1, True, False, 2.0, "2", None])
def test_bad_count(nth: Any) -> None:
    with pytest.raises(InputError, match=f"threads is {nth!r}"):
        ThreadPool(nth)


@pytest.mark.parametrize("workers", [0, -1, 1.5, 2.0, "2", MAX_THREADS + 1])
@pytest.mark.parametrize("nth", [1, 4])
def test_bad_workers(nth: int, workers: Any) -> None:
    ran: list[int] = []
    with ThreadPool(nth) as pool:
        with pytest.raises(InputError, match=f"workers is {workers!r}"):
            pool.run(lambda ith, nth: ran.append(ith), workers=workers)
        assert not ran
        pool.run(lambda ith, nth: ran.append(ith), workers=MAX_THREADS)
    assert sorted(ran) == list(range(nth))


def test_a_finished_job_is_forgotten() -> None:
    class Job:
        def __call__(self, ith: int, nth: int) -> None:
            pass

    with ThreadPool(2) as pool:
        job = Job()
        alive = weakref.ref(job)
        pool.run(job)
        del job
        wait_until(lambda: alive() is None)


# ---------------------------------------------------------------------------------------------------------------------
# Failures


class Failure(Exception):
    """The exception of a job."""


@pytest.mark.parametrize(("nth", "failing"), [(nth, ith) for nth in (1, 2, 3, 8) for ith in range(nth)])
def test_failure_in_any_worker(nth: int, failing: int) -> None:
    with ThreadPool(nth) as pool:
        threads = pool_threads()
        for _ in range(20):
            error, inside, done = Failure(), [0] * nth, [0] * nth

            def job(ith: int, _: int, error: Failure = error, inside: list[int] = inside, done: list[int] = done) -> None:
                inside[ith] = 1
                try:
                    if ith == failing:
                        raise error
                finally:
                    inside[ith] = 0
                done[ith] = 1

            with pytest.raises(Failure) as caught:
                pool.run(job)
            assert caught.value is error
            assert inside == [0] * nth  # all at rest
            assert done == [ith != failing for ith in range(nth)]
            ran: list[int] = []
            pool.run(lambda ith, _, ran=ran: ran.append(ith))  # type: ignore[misc]
            assert sorted(ran) == list(range(nth))
        assert pool_threads() == threads  # none was replaced


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_the_first_failure_is_raised(first: int) -> None:
    """abort() is called after the first failure is recorded. Later failures come second."""
    with ThreadPool(4) as pool:
        for _ in range(20):
            errors = [Failure(ith) for ith in range(4)]
            recorded = threading.Event()

            def job(ith: int, _: int, errors: list[Failure] = errors, recorded: threading.Event = recorded) -> None:
                if ith != first:
                    assert recorded.wait(DEADLINE)
                raise errors[ith]

            with pytest.raises(Failure) as caught:
                pool.run(job, abort=recorded.set)
            assert caught.value is errors[first]
        pool.run(lambda ith, nth: None)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_exceptions_that_end_programs(error: BaseException, failing: int) -> None:
    """They reach the caller; they end no worker."""

    def job(ith: int, _: int) -> None:
        if ith == failing:
            raise error

    with ThreadPool(2) as pool:
        for _ in range(3):
            with pytest.raises(type(error)) as caught:
                pool.run(job)
            assert caught.value is error
        pool.run(lambda ith, nth: None)


@pytest.mark.parametrize("failing", [0, 1])
def test_abort_frees_waiting_workers(failing: int) -> None:
    with ThreadPool(3) as pool:
        free = threading.Event()

        def job(ith: int, _: int) -> None:
            if ith == failing:
                raise Failure
            assert free.wait(DEADLINE)

        with pytest.raises(Failure):
            pool.run(job, abort=free.set)


@pytest.mark.parametrize("failing", [0, 1])
def test_abort_that_fails(failing: int) -> None:
    """A broken abort() does not hide a failure, hold a worker, or break a later round."""

    def job(ith: int, _: int) -> None:
        if ith == failing:
            raise Failure("the first")

    def abort() -> None:
        raise RuntimeError("abort itself fails")

    outcomes: list[object] = []

    def rounds() -> None:
        with ThreadPool(2) as pool:
            for _ in range(3):
                try:
                    pool.run(job, abort=abort)
                except BaseException as error:
                    outcomes.append(str(error))
                pool.run(lambda ith, nth: outcomes.append(nth))

    finish(in_thread(rounds))
    assert outcomes == ["the first", 2, 2] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Nested use


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_nested_jobs_are_refused(nth: int) -> None:
    """On every worker, and at once: a worker that waited for its turn would wait for itself."""
    refused: list[int] = []

    def rounds() -> None:
        with ThreadPool(nth) as pool:

            def job(ith: int, _: int) -> None:
                uses: list[Callable[[], None]] = [lambda: pool.run(lambda ith, nth: None), pool.close]
                for again in uses:
                    with pytest.raises(PyGPTError, match="own pool"):
                        again()
                    refused.append(ith)

            for _ in range(3):
                pool.run(job)

    finish(in_thread(rounds))
    assert sorted(refused) == sorted(6 * list(range(nth)))


def test_a_job_may_run_another_pool() -> None:
    with ThreadPool(2) as outer, ThreadPool(3) as inner:
        calls: list[int] = []
        outer.run(lambda ith, _: inner.run(lambda i, _: calls.append(10 * ith + i)))
        assert sorted(calls) == [0, 1, 2, 10, 11, 12]


def test_step_inside_a_step(path: Path) -> None:
    """An id whose index() runs the model. Both calls are complete, and memory stays valid."""
    succeed(
        """
        class Sly:
            def __init__(self, model, rows):
                self.model, self.rows = model, rows
            def __index__(self):
                self.model.step([(1, self.model.new_cache(), True) for _ in range(self.rows)])
                return TOKENS[0]
            __bool__ = lambda self: bool(self.__index__() + 1)

        for threads in (1, 2):
            with GPT2.load(PATH, threads=threads) as model:
                for rows in (1, 50, 3000):
                    cache = model.new_cache()
                    try:
                        logits = model.step([(Sly(model, rows), cache, Sly(model, rows))]
                                            + [(token, cache, True) for token in TOKENS[1:]])
                        assert np.array_equal(logits, EXPECTED)
                    except PyGPTError:
                        assert cache.length == 0
                    assert right(model)
        print("fine")
        """,
        path,
    )


def test_step_inside_a_signal_handler(path: Path) -> None:
    """A handler that uses the model while it computes is refused; the step that it interrupted is not disturbed."""
    succeed(
        """
        model = GPT2.load(PATH, threads=2)
        outcomes, busy = set(), []
        def handler(number, frame):
            if busy:
                return              # the next signal, and this one is not done yet
            busy.append(1)
            try:
                model.step([(1, model.new_cache(), True) for _ in range(200)])
                outcomes.add("ran")     # between two steps
            except PyGPTError:
                outcomes.add("refused")
            busy.clear()
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        for _ in range(60):
            assert np.array_equal(model.logits(TOKENS), EXPECTED)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert outcomes
        model.close()
        print("fine")
        """,
        path,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.fixture
def sigint_handler() -> Iterator[None]:
    """Put back the handler of SIGINT that the test replaces."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(inside: list[int]) -> Callable[[int, int], None]:
    """A job in which worker 1 sends SIGINT. It ends when the signal has arrived."""
    sent = threading.Event()

    def job(ith: int, _: int) -> None:
        inside[ith] = 1
        try:
            if ith == 1:
                os.kill(os.getpid(), signal.SIGINT)
                sent.set()
            else:
                assert sent.wait(DEADLINE)
        finally:
            inside[ith] = 0

    return job


def run_until_interrupted(pool: ThreadPool, inside: list[int]) -> None:
    pool.run(interrupting(inside))
    while True:  # the signal may reach the main thread a little later
        time.sleep(0.001)


@pytest.mark.usefixtures("sigint_handler")
@pytest.mark.parametrize("nth", [2, 3])
def test_the_users_handler_is_kept_and_called(nth: int) -> None:
    calls: list[int] = []
    inside = [0] * nth

    def handler(number: int, _: object) -> None:
        calls.append(number)

    signal.signal(signal.SIGINT, handler)
    with ThreadPool(nth) as pool:
        for count in (1, 2, 3):
            pool.run(interrupting(inside))
            wait_until(lambda count=count: len(calls) == count)  # type: ignore[misc]
            assert signal.getsignal(signal.SIGINT) is handler
            assert inside == [0] * nth
    assert calls == [signal.SIGINT] * 3


@pytest.mark.usefixtures("sigint_handler")
def test_interrupt_is_raised_after_the_round() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with ThreadPool(3) as pool:
        for _ in range(5):
            inside = [0, 0, 0]
            with pytest.raises(KeyboardInterrupt):
                run_until_interrupted(pool, inside)
            assert inside == [0, 0, 0]
            pool.run(lambda ith, nth: None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("sigint_handler")
@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL])
def test_other_dispositions_are_kept(disposition: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, disposition)
    with ThreadPool(2) as pool:
        pool.run(interrupting([0, 0]) if disposition == signal.SIG_IGN else lambda ith, nth: None)
    assert signal.getsignal(signal.SIGINT) is disposition


def test_the_first_exception_that_ends_the_program_is_raised() -> None:
    left = [ValueError(), KeyboardInterrupt(), SystemExit()]

    def proceed() -> bool:
        if left:
            raise left.pop(0)
        return True

    with pytest.raises(KeyboardInterrupt):
        see_through(proceed)
    assert not left


@pytest.mark.parametrize("nth", [2, 4])
def test_another_signals_handler_that_raises(nth: int) -> None:
    """It cannot be put off, so run() waits until every worker has left the job: its memory is the caller's again."""
    handled, entered, inside = threading.Event(), threading.Event(), [0] * nth

    class Alarm(Exception):
        """What the handler raises."""

    def handler(*_: object) -> None:
        if not handled.is_set():
            handled.set()
            raise Alarm

    def job(ith: int, _: int) -> None:
        inside[ith] = 1
        if ith:
            entered.set()
            assert handled.wait(DEADLINE)
            time.sleep(0.1)  # run() must wait this long; the test passes however long it takes
        inside[ith] = 0

    def interrupt() -> None:
        assert entered.wait(DEADLINE)
        main = threading.main_thread().ident
        assert main is not None
        while not handled.is_set():  # a signal that comes just before the main thread falls asleep is noticed with the next
            signal.pthread_kill(main, signal.SIGUSR1)
            handled.wait(0.01)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with ThreadPool(nth) as pool:
            helper = in_thread(interrupt)
            with pytest.raises(Alarm):
                pool.run(job)
            assert inside == [0] * nth
            finish(helper)
            ran: list[int] = []
            pool.run(lambda ith, _: ran.append(ith))
            assert sorted(ran) == list(range(nth))
            assert len(pool_threads()) == nth - 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_interrupt_of_a_long_prefill(tmp_path: Path) -> None:
    """Ctrl-C takes effect before the prompt is through, the cache is as it was, and the model works on."""
    make(tmp_path / "long.bin", L=2, NH=2, C=128, V=211, maxT=6000, seed=1)
    succeed(
        """
        model = GPT2.load(PATH, threads=2)
        prompt = [i % 211 for i in range(5000)]
        with GPT2.load(PATH, threads=1) as single:
            clean = single.new_cache()
            expected = [single.prefill(clean, TOKENS[:10]), single.decode(clean, 7)]
        interrupted = 0
        for attempt in range(30):
            cache = model.new_cache()
            first = model.prefill(cache, TOKENS[:10])
            gone = False
            def interrupt():
                while cache.length == 10 and not gone:   # until the first chunk of the prompt is in
                    time.sleep(0)
                os.kill(os.getpid(), signal.SIGINT)
            thread = threading.Thread(target=interrupt)
            thread.start()
            try:
                model.prefill(cache, prompt)
                gone = True
                while True:
                    time.sleep(0.001)
            except KeyboardInterrupt:
                interrupted += not gone
            thread.join()
            if not gone:
                assert cache.length == 10, cache.length
                assert np.array_equal(first, expected[0]) and np.array_equal(model.decode(cache, 7), expected[1])
            if interrupted == 3:
                break
        assert interrupted == 3, interrupted
        model.close()
        print("fine")
        """,
        tmp_path / "long.bin",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Fork


def test_fork_after_use(path: Path) -> None:
    """Parent, child and grandchild compute the right bits, with caches from before the fork and new ones."""
    succeed(
        """
        model, pool = GPT2.load(PATH, threads=3), ThreadPool(2)
        assert right(model)
        cache = model.new_cache()
        model.prefill(cache, TOKENS[:20])
        def check():
            ran = []
            pool.run(lambda ith, nth: ran.append(ith))
            return right(model) and np.array_equal(model.decode(cache, TOKENS[20]), EXPECTED[20]) and sorted(ran) == [0, 1]
        child = os.fork()
        if not child:
            grandchild = os.fork()
            if not grandchild:
                assert check()
                sys.exit(0)         # the ordinary way out, exit handlers and all
            assert os.waitpid(grandchild, 0)[1] == 0
            assert check()
            model.close()
            pool.close()
            sys.exit(0)
        assert check()
        assert os.waitpid(child, 0)[1] == 0
        print("fine")
        """,
        path,
    )


def test_fork_without_use_in_the_child(path: Path) -> None:
    succeed(
        """
        model = GPT2.load(PATH, threads=4)
        assert right(model)
        child = os.fork()
        if not child:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        child = os.fork()
        if not child:
            model.close()
            try:
                model.logits([1])
            except ClosedError:
                sys.exit(0)
            sys.exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert right(model)
        print("fine")
        """,
        path,
    )


def test_fork_while_another_thread_is_inside(path: Path) -> None:
    """The child has the model without the thread that held it."""
    succeed(
        """
        model, other = GPT2.load(PATH, threads=3), GPT2.load(PATH, threads=2)
        steps, stop, wrong = [0], [], []
        def work():
            while not stop:
                if not right(model):
                    wrong.append(1)
                steps[0] += 1
        thread = threading.Thread(target=work)
        thread.start()
        for i in range(25):
            seen = steps[0]
            while steps[0] < seen + 1:
                time.sleep(0.0003)
            child = os.fork()
            if not child:
                ok = right(model) and right(other)
                if i % 2:
                    os._exit(not ok)
                stop.append(1)
                sys.exit(not ok)
            assert os.waitpid(child, 0)[1] == 0
        stop.append(1)
        thread.join()
        assert not wrong and right(model) and right(other)
        print("fine")
        """,
        path,
    )


def test_multiprocessing_fork(path: Path) -> None:
    succeed(
        """
        import multiprocessing
        model = GPT2.load(PATH, threads=2)
        assert right(model)
        def work(count):
            return model.logits(TOKENS[:count])
        if __name__ == "__main__":
            with multiprocessing.get_context("fork").Pool(3) as processes:
                for count, logits in enumerate(processes.map(work, range(1, 13)), start=1):
                    assert np.array_equal(logits, EXPECTED[:count])
            assert right(model)
            print("fine")
        """,
        path,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Several threads


def test_threads_share_a_pool() -> None:
    """Rounds of several callers never overlap."""
    with ThreadPool(3) as pool:
        inside, overlaps, lock = [0], [], threading.Lock()

        def caller(name: int) -> None:
            owner: list[int] = []

            def job(ith: int, _: int) -> None:
                with lock:
                    inside[0] += 1
                    if inside[0] > 3:
                        overlaps.append(name)
                    owner.append(ith)
                with lock:
                    inside[0] -= 1

            for count in range(1, 101):
                pool.run(job)
                assert len(owner) == 3 * count

        threads = [in_thread(lambda name=name: caller(name)) for name in range(4)]  # type: ignore[misc]
        finish(*threads)
        assert overlaps == []


def test_two_models_side_by_side(path: Path, expected: npt.NDArray[np.float32]) -> None:
    """In the same moment: each one's job waits inside for the other's."""
    with GPT2.load(path, threads=2) as one, GPT2.load(path, threads=3) as two:
        wrong: list[int] = []

        def caller(model: GPT2) -> None:
            for _ in range(50):
                if not np.array_equal(model.logits(TOKENS), expected):
                    wrong.append(1)

        finish(in_thread(lambda: caller(one)), in_thread(lambda: caller(two)))
        assert wrong == []
    with ThreadPool(2) as first, ThreadPool(2) as second:
        meeting = threading.Barrier(4, timeout=DEADLINE)
        finish(*[in_thread(lambda pool=pool: pool.run(lambda ith, nth: meeting.wait())) for pool in (first, second)])  # type: ignore[misc]
        assert not meeting.broken


def test_interleaved_generators(path: Path) -> None:
    with GPT2.load(path, threads=3) as model:
        prompts = [TOKENS[i : i + n] for i, n in ((0, 1), (3, 9), (7, 30), (2, 2))]
        alone = [list(model.generate(prompt, max_new_tokens=20)) for prompt in prompts]
        running = [model.generate(prompt, max_new_tokens=20) for prompt in prompts]
        assert [list(column) for column in zip(*zip(*running, strict=True), strict=True)] == alone
        abandoned = model.generate(prompts[0], max_new_tokens=20)
        assert next(abandoned) == alone[0][0]
        del abandoned
        assert list(model.generate(prompts[1], max_new_tokens=20)) == alone[1]


def test_a_cache_shared_wrongly(path: Path, expected: npt.NDArray[np.float32]) -> None:
    """Two threads append to one cache, and a third removes rows. The result has no meaning, but memory stays valid."""
    with GPT2.load(path, threads=2) as model:
        cache, stop = model.new_cache(), threading.Event()
        unexpected: list[BaseException] = []

        def caller(work: Callable[[], object]) -> None:
            while not stop.is_set():
                try:
                    work()
                except InputError:
                    pass  # full, or shorter than just now
                except BaseException as error:
                    unexpected.append(error)
                    return

        threads = [
            in_thread(lambda work=work: caller(work))  # type: ignore[misc]
            for work in (
                lambda: model.decode(cache, 1),
                lambda: model.prefill(cache, TOKENS[:30]),
                lambda: cache.truncate(cache.length // 2),
            )
        ]
        for _ in range(100):
            assert np.array_equal(model.logits(TOKENS[:10]), expected[:10])
            assert 0 <= cache.length <= cache.capacity
        stop.set()
        finish(*threads)
        assert unexpected == []


@pytest.mark.parametrize("workers", [8, 16, 64])
def test_more_threads_than_cores(path: Path, expected: npt.NDArray[np.float32], workers: int) -> None:
    with GPT2.load(path, threads=workers) as model:
        assert model.threads == workers
        assert len(pool_threads()) == workers - 1
        assert np.array_equal(model.logits(TOKENS), expected)
        cache = model.new_cache()
        for token, row in zip(TOKENS[:10], expected[:10], strict=True):
            assert np.array_equal(model.decode(cache, token), row)


# ---------------------------------------------------------------------------------------------------------------------
# Beginning and end


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_models_leave_nothing(path: Path) -> None:
    def cycles(count: int) -> None:
        for i in range(count):
            with GPT2.load(path, threads=1 + i % 3) as model:
                assert len(model.prefill(model.new_cache(), [1, 2, 3])) == 211
            with ThreadPool(2):
                pass

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    cycles(100)
    gc.collect()
    files, memory = open_files(), resident_bytes()
    cycles(1000)
    gc.collect()
    assert pool_threads() == []
    assert open_files() == files
    assert resident_bytes() - memory < 8 << 20  # 8 KiB a cycle: less than one thread, map or workspace kept


def test_the_collector_skips_a_closed_model(path: Path) -> None:
    """Python drops a Ctrl-C that is raised in such code: a thread's or a weak reference's callback."""
    gc.collect()
    gc.disable()
    try:
        model = GPT2.load(path, threads=3)
        model.logits([1])
        threads = [weakref.ref(thread) for thread in pool_threads()]
        model.close()
        assert len(threads) == 2
        assert all(thread() is None for thread in threads)
        assert all(reference.__callback__ is None for reference in weakref.getweakrefs(model.network._pool))
    finally:
        gc.enable()


def test_the_list_of_pools_does_not_grow(path: Path) -> None:
    """Closed ones leave it, and forgotten ones."""
    ThreadPool(1).close()
    before = len(pool_module._pools)
    for _ in range(20):
        ThreadPool(1).close()
        ThreadPool(1)
    assert len(pool_module._pools) <= before + 2


def test_another_thread_may_drop_a_forgotten_pool_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Contested(list[Any]):
        def remove(self, found: Any) -> None:
            super().remove(found)
            super().remove(found)  # the other thread removes it first

    monkeypatch.setattr(pool_module, "_pools", Contested([lambda: None]))
    with ThreadPool(1):
        assert len(pool_module._pools) == 1


def test_the_garbage_collector_may_stop_a_worker_that_is_about_to_wait() -> None:
    """The worker has the lock and has seen no stop. It would sleep for ever if only its own notification came."""
    workers = pool_module._Workers(2)
    wait = workers.wakes[0].wait

    def collected(timeout: float | None = None) -> bool:
        workers.stop()
        return wait(timeout)

    workers.wakes[0].wait = collected  # type: ignore[method-assign]
    workers.notify()  # the worker looks for a round, finds none and waits again
    finish(*workers.threads)


@pytest.mark.parametrize("workers", [2, 5])
def test_forgotten_pools_and_models_end(path: Path, workers: int) -> None:
    pool = ThreadPool(workers)
    pool.run(lambda ith, nth: None)
    never_run = ThreadPool(workers)
    model = GPT2.load(path, threads=workers)
    list(model.generate([1], max_new_tokens=3))
    abandoned = GPT2.load(path, threads=workers).generate([1], max_new_tokens=3)
    next(abandoned)
    in_a_cycle: list[object] = [ThreadPool(workers)]
    in_a_cycle.append(in_a_cycle)
    assert len(pool_threads()) == 5 * (workers - 1)
    del pool, never_run, model, abandoned, in_a_cycle
    gc.collect()
    wait_until(lambda: pool_threads() == [])


def test_a_forgotten_pool_after_a_failure_ends() -> None:
    pool = ThreadPool(3)

    def fail(ith: int, nth: int) -> None:
        raise Failure

    with pytest.raises(Failure):
        pool.run(fail)
    del pool
    gc.collect()
    wait_until(lambda: pool_threads() == [])


def test_close_joins_and_may_be_repeated(path: Path) -> None:
    pool = ThreadPool(4)
    threads = pool_threads()
    for _ in range(2):
        pool.close()
        assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(ClosedError, match="closed"):
        pool.run(lambda ith, nth: None)
    model = GPT2.load(path, threads=2)
    model.close()
    model.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_use_after_close(path: Path, workers: int) -> None:
    with GPT2.load(path, threads=workers) as model:
        cache = model.new_cache()
        running, fresh = model.generate([1], max_new_tokens=5), model.generate([1], max_new_tokens=5)
        next(running)
        logits = model.prefill(cache, TOKENS[:5])
        copy = logits.copy()
    uses: list[Callable[[], object]] = [
        lambda: model.step([(1, cache, True)]),
        lambda: model.step([]),
        lambda: model.prefill(cache, [1]),
        lambda: model.decode(cache, 1),
        lambda: model.logits([1]),
        lambda: next(running),
        lambda: next(fresh),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match="closed"):
            use()
    assert cache.length == 5
    assert np.array_equal(logits, copy)  # what was handed out lives on
    cache.truncate(0)


def test_close_while_another_thread_computes(path: Path) -> None:
    for _ in range(20):
        model = GPT2.load(path, threads=3)
        started = threading.Event()
        outcomes: list[str] = []

        def work(model: GPT2 = model, started: threading.Event = started, outcomes: list[str] = outcomes) -> None:
            try:
                while True:
                    model.logits(TOKENS)
                    started.set()
            except ClosedError as error:
                outcomes.append(str(error))

        threads = [in_thread(work), in_thread(work)]
        assert started.wait(DEADLINE)
        model.close()
        finish(*threads)
        assert len(outcomes) == 2
        assert all("closed" in outcome for outcome in outcomes)
        assert pool_threads() == []


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("refused", [1, 2, 4])
def test_a_thread_that_does_not_start(path: Path, monkeypatch: pytest.MonkeyPatch, refused: int, error: BaseException) -> None:
    """The threads before it are stopped, and the error names the way out."""
    start, started = threading.Thread.start, [0]

    def refuse(thread: threading.Thread) -> None:
        started[0] += 1
        if started[0] == refused:
            raise error
        start(thread)

    builders: list[Callable[[], object]] = [lambda: ThreadPool(5), lambda: GPT2.load(path, threads=5)]
    for build in builders:
        started[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            if isinstance(error, RuntimeError):
                with pytest.raises(PyGPTError, match=rf"refused thread {refused + 1} of 5.*fewer threads") as caught:
                    build()
                assert not isinstance(caught.value, InputError)  # the system failed, not the caller
            else:
                with pytest.raises(type(error)):
                    build()
        assert pool_threads() == []


def test_threads_refused_after_fork(path: Path) -> None:
    """The child's first run fails with a clear error, and a later one works."""
    succeed(
        """
        model = GPT2.load(PATH, threads=3)
        child = os.fork()
        if not child:
            start = threading.Thread.start
            def refuse(thread):
                raise RuntimeError("can't start new thread")
            threading.Thread.start = refuse
            cache = model.new_cache()
            try:
                model.prefill(cache, TOKENS[:3])
                os._exit(1)
            except PyGPTError as error:
                assert "refused thread 2 of 3" in str(error)
            assert cache.length == 0
            threading.Thread.start = start
            sys.exit(not right(model))
        assert os.waitpid(child, 0)[1] == 0
        print("fine")
        """,
        path,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The end of the process

ENDS = {
    "right after creation": "model, pool = GPT2.load(PATH, threads=8), ThreadPool(8)",
    "idle after use": """
        model = GPT2.load(PATH, threads=8)
        assert right(model)
        """,
    "a generator half way": """
        running = GPT2.load(PATH, threads=3).generate([1], max_new_tokens=50)
        next(running)
        """,
    "many models": "models = [GPT2.load(PATH, threads=4) for _ in range(20)]",
    "in a reference cycle": """
        class Owner: pass
        owner = Owner()
        owner.model, owner.self = GPT2.load(PATH, threads=4), owner
        assert right(owner.model)
        del owner
        """,
    "a failed job": """
        pool = ThreadPool(3)
        def fail(ith, nth):
            raise ValueError(ith)
        try:
            pool.run(fail)
        except ValueError:
            pass
        """,
    "sys.exit in a job": """
        pool = ThreadPool(3)
        pool.run(lambda ith, nth: sys.exit(0) if ith == 1 else None)
        """,
    "a daemon thread computes": """
        model, started = GPT2.load(PATH, threads=2), threading.Event()
        def work():
            while True:
                model.logits(TOKENS)
                started.set()
        threading.Thread(target=work, daemon=True).start()
        started.wait()
        """,
    "daemon threads compute on 8 workers each": """
        started = threading.Semaphore(0)
        def work():
            model = GPT2.load(PATH, threads=8)
            while True:
                model.logits(TOKENS)
                started.release()
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        for _ in range(10):
            started.acquire()
        """,
    "a daemon thread makes and closes pools": """
        started = threading.Event()
        def work():
            while True:
                with ThreadPool(3) as pool:
                    pool.run(lambda ith, nth: None)
                started.set()
        threading.Thread(target=work, daemon=True).start()
        started.wait()
        """,
    "a worker is stuck in its job": """
        pool, inside = ThreadPool(3), threading.Semaphore(0)
        def job(ith, nth):
            inside.release()
            threading.Event().wait()
        threading.Thread(target=lambda: pool.run(job), daemon=True).start()
        for _ in range(3):
            inside.acquire()
        """,
    "an ordinary thread still computes": """
        model, results = GPT2.load(PATH, threads=3), []
        def work():
            for _ in range(20):
                results.append(right(model))
            os.write(2, b"" if all(results) else b"wrong")
        threading.Thread(target=work).start()
        """,
}


@pytest.mark.parametrize("end", ENDS)
def test_exit(path: Path, end: str) -> None:
    """With whatever is open or under way: status 0, at once, without a word."""
    result = script(ENDS[end], path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_idle_workers_stop_at_exit(path: Path) -> None:
    """A handler that was registered before pygpt's runs after it, and finds them gone."""
    program = f"""
import atexit, sys, threading
atexit.register(lambda: print(threading.active_count()))
sys.path.insert(0, {str(ROOT)!r})
from pygpt import GPT2
model = GPT2.load(sys.argv[1], threads=3)
print(threading.active_count())
"""
    result = execute([sys.executable, "-c", program, str(path)], timeout=DEADLINE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "3\n1\n", "")


def test_exit_handlers_may_use_models(path: Path) -> None:
    """A handler that was registered before pygpt's handler runs after it, when the workers stop. It must not hang. Newer
    Pythons refuse to start a thread so late, and the error reports it."""
    program = f"""
import atexit, sys
def last_words():
    from pygpt import PyGPTError
    try:
        assert list(model.generate([1, 2], total=5)) == before
    except PyGPTError as error:
        assert "refused thread" in str(error), error
    model.close()
    print("fine")
atexit.register(last_words)
sys.path.insert(0, {str(ROOT)!r})
import pygpt.cpus
pygpt.cpus.workers_for = lambda threads, *_: threads
pygpt.cpus.runnable = lambda: 256
from pygpt import GPT2
model = GPT2.load(sys.argv[1], threads=3)
before = list(model.generate([1, 2], total=5))
"""
    result = execute([sys.executable, "-c", program, str(path)], timeout=DEADLINE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")


# ---------------------------------------------------------------------------------------------------------------------
# How many threads


V1 = {"proc/self/cgroup": "12:cpuset:/x\n4:cpu,cpuacct:/d/1\n1:name=systemd:/x\n0::/x"}
V1 |= {f"sys/fs/cgroup/cpuset/x/cpu.cfs_{name}_us": "100000" for name in ("quota", "period")}  # not the controller of time
V2 = {"proc/self/cgroup": "0::/a/b/c", "sys/fs/cgroup/a/b/c/cpu.max": "max 100000"}


def version_1(quota: str, period: str, folder: str = "cpu,cpuacct/d/1") -> dict[str, str]:
    return {f"sys/fs/cgroup/{folder}/cpu.cfs_{name}_us": text for name, text in (("quota", quota), ("period", period))}


def version_2(quota: str) -> dict[str, str]:
    return {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": quota}


def cores(*groups: str) -> dict[str, str]:
    """Which processors share a core."""
    found = {}
    for group in groups:
        first, _, last = group.partition("-")
        for cpu in range(int(first), int(last) + 1) if last else map(int, group.split(",")):
            found[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = group
    return found


PAIRS = cores("0-1", "2-3", "4-5", "6-7")
MACHINES: list[tuple[dict[str, str], set[int], int]] = [  # files below the root, allowed processors, threads
    ({}, set(range(8)), 8),
    ({}, set(range(1000)), MAX_THREADS),
    (cores("0,4", "1,5", "2,6", "3,7"), set(range(8)), 4),
    *(
        (PAIRS, allowed, count)
        for allowed, count in ((set(range(8)), 4), ({0, 1}, 1), ({1, 2}, 2), ({0, 2, 3, 7}, 3), ({5}, 1))
    ),
    *(
        (version_2(quota), set(range(8)), count)
        for quota, count in (
            *(("max 100000", 8), ("400000 100000", 4), ("399999 100000", 3), ("150000 100000", 1), ("1600000 100000", 8)),
            *(("50000 100000", 1), ("25000 5000", 5), ("", 8), ("nonsense", 8), ("100000 0", 8)),  # less than 1: still a thread
        )
    ),
    # The least of nested quotas, without the quotas of other groups.
    ({**V2, "sys/fs/cgroup/a/b/cpu.max": "700000 100000"}, set(range(8)), 7),
    ({**V2, "sys/fs/cgroup/a/b/cpu.max": "700000 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, set(range(8)), 3),
    ({**V2, "sys/fs/cgroup/a/b/other/cpu.max": "100000 100000"}, set(range(8)), 8),
    # In a container, /proc names the host's path, and the quota is at the root of the container's file system.
    ({"proc/self/cgroup": "0::/../../docker/1234", "sys/fs/cgroup/cpu.max": "200000 100000"}, set(range(8)), 2),
    *(
        ({**V1, **version_1(quota, period)}, set(range(8)), count)
        for quota, period, count in (("-1", "100000", 8), ("250000", "100000", 2), ("99999", "100000", 1), ("", "", 8))
    ),
    *(
        ({"proc/self/cgroup": f"4:{name}:/d/1", **version_1("600000", "100000", f"{name}/d/1")}, set(range(8)), 6)
        for name in ("cpu", "cpuacct,cpu")
    ),
    ({**PAIRS, **version_2("600000 100000")}, set(range(8)), 4),
    ({**PAIRS, **version_2("300000 100000")}, set(range(8)), 3),
]


def made(root: Path, files: dict[str, str]) -> str:
    """A root directory that looks like a machine's, for default_threads()."""
    for name, text in files.items():
        (file := root / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(text) + b"\n")
    return f"{root}/"


@pytest.mark.parametrize(("files", "allowed", "threads"), MACHINES)
def test_default(
    files: dict[str, str], allowed: set[int], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least of three numbers: the processors that this process may use, their cores, and the cgroup's quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert default_threads(made(tmp_path, files)) == threads


def test_default_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, threads in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert default_threads(f"{tmp_path}/") == threads


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_default_in_a_cgroup_of_any_name(tmp_path: Path) -> None:
    name = b"\xff\xc3".decode("utf-8", "surrogateescape")
    files = {"proc/self/cgroup": f"0::/{name}", f"sys/fs/cgroup/{name}/cpu.max": "100000 100000"}
    assert default_threads(made(tmp_path, files)) == 1


def test_default_finds_a_version_1_mount_of_another_name(tmp_path: Path) -> None:
    """/proc says cpuacct,cpu where systemd has mounted cpu,cpuacct; the link cpu leads there."""
    root = made(tmp_path, {"proc/self/cgroup": "4:cpuacct,cpu:/job", **version_1("100000", "100000", "cpu,cpuacct/job")})
    (tmp_path / "sys/fs/cgroup/cpu").symlink_to("cpu,cpuacct")
    assert default_threads(root) == 1


def test_default_on_this_machine() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("quotas", "threads"), [([], 3), ([0.5], 1), ([1.5], 2), ([2.0, 0.1], 1), ([8.0], 3), ([0], 1)])
def test_threads_that_can_run_at_once(monkeypatch: pytest.MonkeyPatch, quotas: list[float], threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 9}, raising=False)
    monkeypatch.setattr(cpus, "_cpu_quotas", lambda root: quotas)
    assert RUNNABLE() == threads


@pytest.mark.parametrize(("all_workers", "used"), [(False, [0, 1, 2]), (True, [0, 1, 2, 3, 4])])
def test_a_step_has_no_more_workers_than_processors(
    path: Path, expected: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, all_workers: bool, used: list[int]
) -> None:
    monkeypatch.setattr(cpus, "runnable", lambda: 3)
    monkeypatch.setattr(pool_module, "runnable", lambda: 3)
    with GPT2.load(path, threads=5, all_workers=all_workers) as model:
        model.record(trace := Trace(5, 1000))
        assert np.array_equal(model.logits(TOKENS), expected)
    assert [ith for ith in range(5) if trace.events(ith)] == used


def test_small_work_takes_one_worker() -> None:
    """Where the others would save less time than they cost."""
    cost = cpus.ROUND_US + 10 * cpus.BARRIER_US
    assert [BEST(3, alone_us, 10) for alone_us in (cost, 1.4 * cost, 1.6 * cost)] == [1, 1, 3]  # two thirds are saved
    assert BEST(1, 1e9) == 1


@pytest.mark.parametrize("text", ["1", "2", "007", str(MAX_THREADS)])
def test_variable(path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PYGPT_THREADS", text)
    assert resolve_threads() == int(text)
    assert resolve_threads(3) == 3  # an argument goes first
    if int(text) < 10:
        with GPT2.load(path) as model:
            assert model.threads == int(text)


def test_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGPT_THREADS", "")
    assert resolve_threads() == default_threads()
    monkeypatch.delenv("PYGPT_THREADS")
    assert resolve_threads() == default_threads()


@pytest.mark.parametrize("text", ["0", "-1", "257", "x", "2.0", " 2", "1_0", "٣", "9" * 5000, "²"])
def test_bad_variable(path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PYGPT_THREADS", text)
    with pytest.raises(InputError, match=r"PYGPT_THREADS is .* from 1 to 256"):
        GPT2.load(path)
    assert pool_threads() == []


def test_holding_a_lock_ends_with_the_call() -> None:
    """On Python 3.14 and newer, `with` can lose a lock: tests/slow/test_load.py meets that."""
    lock = threading.Lock()
    assert holding(lock, lock.locked)
    with pytest.raises(IndexError):
        holding(lock, lambda: [0][1])
    assert not lock.locked()
