"""The contract for threads, line by line: shared objects, calls that take turns, and refusals. Also Ctrl-C at the worst moment,
and the workers of deleted pools.

Threads wait for each other at events and barriers. If a test provokes a race, it checks every outcome."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make
from running import execute

import pygpt
import pygpt.model
from pygpt import GPT2, Checkpoint, ClosedError, InputError, ThreadPool, TrainableGPT2, Trainer, TrainingOptions, TrainingState

ROOT = Path(pygpt.__file__).parent.parent
SHAPE: dict[str, int] = {"L": 2, "NH": 3, "C": 48, "V": 211, "maxT": 128, "seed": 5}
TOKENS = [(17 * i + 3) % 211 for i in range(128)]
DEADLINE = 60


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("concurrency") / "model.bin"
    make(file, **SHAPE)
    return str(file)


@pytest.fixture(params=[1, 3])
def model(path: str, request: pytest.FixtureRequest) -> Iterator[GPT2]:
    with GPT2.load(path, threads=request.param) as opened:
        yield opened


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run work(0) .. work(count - 1) in threads that start together. Return their results, or their exceptions."""
    start = threading.Barrier(count)
    found: list[Any] = [None] * count

    def one(i: int) -> None:
        start.wait(DEADLINE)
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Shared, and taking turns


def test_a_model_takes_turns(model: GPT2) -> None:
    """Each thread has separate caches."""
    wanted = model.logits(TOKENS)

    def work(i: int) -> bool:
        cache = model.new_cache()
        right = True
        for start in range(0, 40 + i, 8):
            right &= np.array_equal(model.prefill(cache, TOKENS[start : start + 8]), wanted[start + 7])
        return bool(right)

    assert together(6, work) == [True] * 6


def test_one_cache_in_two_threads_holds_every_row_once(model: GPT2) -> None:
    """Rows come in some order, and the rows of a step stay together. The logits match that order."""
    for _ in range(10):
        cache = model.new_cache()
        found = together(4, lambda i, cache=cache: [model.step([(10 * i + k, cache, True)] * 2) for k in range(4)])  # type: ignore[misc]
        assert cache.length == 32
        rows = {step.tobytes() for steps in found for step in steps}
        again = model.new_cache()
        seen: set[bytes] = set()
        todo = {i: list(range(4)) for i in range(4)}
        while any(todo.values()):  # find the order out: each next step must be one that continues some thread's
            for i, rest in todo.items():
                if rest:
                    step = model.step([(10 * i + rest[0], again, True)] * 2)
                    if step.tobytes() in rows - seen:
                        seen.add(step.tobytes())
                        rest.pop(0)
                        break
                    again.truncate(again.length - 2)
            else:
                pytest.fail("no order of the steps explains their logits")


def test_a_full_cache_is_never_exceeded(model: GPT2) -> None:
    cache = model.new_cache(16)
    found = together(5, lambda i: [model.decode(cache, i) for _ in range(8)])
    assert cache.length == 16
    done = [result for result in found if not isinstance(result, InputError)]
    assert len(done) <= 2
    assert all(len(result) == 8 for result in done)


def test_rows_of_another_thread_survive_a_refusal(path: str) -> None:
    """A refused step removes only its own rows."""
    with GPT2.load(path, threads=1) as model:
        cache = model.new_cache(4)
        inside, go = threading.Event(), threading.Event()
        run = model.network._pool.run

        def delayed(*words: Any, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert go.wait(DEADLINE)
            return run(*words, **more)

        model.network._pool.run = delayed  # type: ignore[method-assign]
        failed: list[BaseException] = []

        def late() -> None:
            try:
                model.step([(1, cache, True)] * 4)
            except InputError as error:
                failed.append(error)

        thread = threading.Thread(target=late, daemon=True)
        thread.start()
        assert inside.wait(DEADLINE)
        model.prefill(cache, [1, 2])
        go.set()
        thread.join(DEADLINE)
        assert len(failed) == 1
        assert cache.length == 2


def test_a_prefix_cache_serves_one_and_the_others_go_without(model: GPT2) -> None:
    prefix = model.new_prefix_cache()
    wanted = [list(model.generate(TOKENS[: 20 + i], total=40)) for i in range(6)]
    for _ in range(5):
        assert together(6, lambda i: list(model.generate(TOKENS[: 20 + i], total=40, cache=prefix))) == wanted
        assert prefix.tokens  # the last that ended has left its tokens
    known = prefix.tokens
    assert known[:20] == TOKENS[:20]


def test_an_iterator_is_one_threads_at_a_time(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself refuses a second thread inside it; no token is lost or given twice."""
    wanted = list(model.generate(TOKENS[:5], total=100))
    iterator = model.generate(TOKENS[:5], total=100)
    lock = threading.Lock()
    order: list[int] = []

    def work(i: int) -> None:
        with suppress(StopIteration):
            while True:
                with lock:
                    order.append(next(iterator))

    assert together(3, work) == [None] * 3
    assert order == wanted
    step = model.network.step

    def intruding(*words: Any) -> Any:
        [found] = together(1, lambda _: next(busy))
        assert isinstance(found, ValueError)
        assert "already executing" in str(found)
        return step(*words)

    monkeypatch.setattr(model.network, "step", intruding)
    busy = model.generate(TOKENS[:5], total=8)
    assert list(busy) == wanted[:3]


def test_a_checkpoint_is_read_by_all_and_closed_by_one(path: str) -> None:
    """Arrays stay valid after close(); later calls raise ClosedError."""
    for mmap in (True, False):
        checkpoint = Checkpoint(path, mmap=mmap)
        wanted = checkpoint.tensor("wte").copy()

        def work(i: int, checkpoint: Checkpoint = checkpoint, wanted: Any = wanted) -> bool:
            if i == 3:
                checkpoint.close()
                return True
            try:
                tensors = [checkpoint.tensor("wte") for _ in range(50)]
            except ClosedError:
                return True
            return all(np.array_equal(tensor, wanted) for tensor in tensors)

        assert together(6, work) == [True] * 6
        with pytest.raises(ClosedError):
            checkpoint.tensor("wte")


def test_trainings_calls_take_turns(path: str) -> None:
    """Evaluations beside a training thread: each call sees the weights before an update or after it, never half of both."""
    ids = np.arange(64).reshape(2, 32) % 211
    with TrainableGPT2.load(path, threads=2) as training:
        states = [training.evaluate(ids, ids).tobytes()]
        for step in (1, 2, 3):
            training.forward(ids, ids)
            training.backward()
            training.update(lr=1e-2, step=step)
            states.append(training.evaluate(ids, ids).tobytes())
    with TrainableGPT2.load(path, threads=2) as training:

        def work(i: int) -> Any:
            if i:
                return {training.evaluate(ids, ids).tobytes() for _ in range(10)}
            for step in (1, 2, 3):
                training.forward(ids, ids)
                training.backward()
                training.update(lr=1e-2, step=step)
            return set()

        found = together(3, work)
        assert set().union(*found) <= set(states)
        assert training.evaluate(ids, ids).tobytes() == states[3]


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C at the worst moment


@pytest.mark.parametrize("call", ["step", "prefill", "decode"])
def test_an_interrupt_after_the_commit_takes_the_rows_back(path: str, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The rows are in the cache and the logits on the way to the caller, who will never see them."""
    with GPT2.load(path, threads=2) as model:
        cache, other = model.new_cache(), model.new_cache()
        model.prefill(cache, TOKENS[:7])
        calls: dict[str, Callable[[], Any]] = {
            "step": lambda: model.step([(1, cache, True), (2, other, False), (3, cache, True)]),
            "prefill": lambda: model.prefill(cache, TOKENS[7:20]),
            "decode": lambda: model.decode(cache, 1),
        }
        reached = []

        def interrupted(logits: object) -> Any:
            reached.append(cache.length)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(np, "asarray", interrupted)
            with pytest.raises(KeyboardInterrupt):
                calls[call]()
        assert reached[0] > 7
        assert (cache.length, other.length) == (7, 0)
        assert np.array_equal(model.prefill(cache, TOKENS[7:9]), model.logits(TOKENS[:9])[-1])


def test_a_failed_chunk_removes_the_whole_prompt(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pygpt.model, "CHUNK", 8)
    with GPT2.load(path, threads=2) as model:
        cache = model.new_cache()
        model.prefill(cache, TOKENS[:7])
        with pytest.raises(InputError, match="not a token id"):
            model.prefill(cache, [*TOKENS[7:40], 211])
        assert cache.length == 7
        assert np.array_equal(model.prefill(cache, TOKENS[7:20]), model.logits(TOKENS[:20])[-1])


def test_updates_are_counted(path: str) -> None:
    with TrainableGPT2.load(path, threads=2) as model, pygpt.SerialTrainableGPT2.load(path) as serial:
        for step in (1, 2):
            for engine in (model, serial):
                engine.update(lr=1e-3, step=step)
                assert engine.updates == step
        with pytest.raises(InputError):
            model.update(lr=1e-3, step=0)
        assert model.updates == 2


def test_a_restore_that_was_interrupted_is_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are a mixture of two states. So it refuses steps and saves until restore() has succeeded."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with TrainableGPT2.random(pygpt.Config(maxT=16, V=50, L=1, NH=1, C=16), seed=1, threads=1) as model:
        trainer = Trainer(model, pygpt.DataLoader(np.arange(300) % 50, 1, 8), TrainingOptions())
        trainer.save(tmp_path / "run.state")
        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "read_into", interrupted)
            with pytest.raises(KeyboardInterrupt):
                trainer.restore(tmp_path / "run.state")
        for use in (trainer.step, lambda: trainer.save(tmp_path / "other.state")):
            with pytest.raises(pygpt.PyGPTError, match=r"restore\(\) was interrupted .* call restore\(\) again"):
                use()
        assert not (tmp_path / "other.state").exists()
        trainer.restore(tmp_path / "run.state")
        trainer.step()
        assert trainer.done == 1


def test_a_round_at_the_end_of_the_stack() -> None:
    """At every depth, from the deepest on, a round is refused before it begins, or made; and then there is room again."""
    result = script(
        """
        from pygpt import ThreadPool
        made, refused = [], []

        def descend():
            try:
                descend()
            except RecursionError:
                pass
            if len(made) < 20:
                ran = []
                try:
                    pool.run(lambda ith, nth: ran.append(ith))
                    made.append(sorted(ran))
                except RecursionError:
                    refused.append(ran)

        with ThreadPool(3) as pool:
            descend()
        assert made == [[0, 1, 2]] * 20, made
        assert len(refused) > 10
        assert not any(refused)"""
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---------------------------------------------------------------------------------------------------------------------
# Deleted pools


def test_a_stop_in_a_worker_about_to_wait() -> None:
    """The garbage collector may stop a deleted pool in one of its workers, between the worker's test of the flag and its
    wait."""
    pool = ThreadPool(2)
    workers = pool._workers
    assert workers is not None
    wait = workers.wakes[0].wait
    stopped: list[threading.Thread] = []

    def stop_then_wait(timeout: float | None = None) -> bool:
        if not stopped:
            stopped.append(threading.current_thread())
            workers.stop()
        return wait(timeout)

    workers.wakes[0].wait = stop_then_wait  # type: ignore[method-assign]
    ran: list[int] = []
    pool.run(lambda ith, _: ran.append(ith))
    [worker] = workers.threads
    worker.join(DEADLINE)
    assert not worker.is_alive()
    assert stopped == [worker]
    assert sorted(ran) == [0, 1]
    pool.close()


# ---------------------------------------------------------------------------------------------------------------------
# Other processes, other interpreters


def script(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return execute(words, timeout=DEADLINE, env=environment)


def test_after_a_fork_everything_works_on_both_sides(path: str) -> None:
    """Caches, prefix caches, half-used iterators, training and memory that was read (not mapped) are each side's own."""
    result = script(
        """
        import os, sys
        import numpy as np
        import pygpt.model
        from pygpt import GPT2, TrainableGPT2
        pygpt.cpus.workers_for = lambda threads, *_: threads
        pygpt.cpus.runnable = lambda: 256
        model = GPT2.load(sys.argv[1], threads=3, mmap=False)
        training = TrainableGPT2.load(sys.argv[1], threads=2)
        ids = np.arange(64).reshape(2, 32) % 211
        losses = training.forward(ids, ids).tobytes()
        prompt = [(17 * i + 3) % 211 for i in range(20)]
        wanted = list(model.generate(prompt, total=60))
        prefix, cache = model.new_prefix_cache(), model.new_cache()
        list(model.generate(prompt, total=30, cache=prefix))
        last = model.prefill(cache, prompt)
        iterator = model.generate(prompt, total=60)
        first = [next(iterator) for _ in range(5)]
        child = os.fork()
        status = 1
        try:
            assert first + list(iterator) == wanted
            assert list(model.generate(prompt, total=60, cache=prefix)) == wanted
            cache.truncate(19)
            assert np.array_equal(model.decode(cache, prompt[19]), last)
            training.backward()
            assert training.forward(ids, ids).tobytes() == losses
            model.close()
            training.close()
            status = 0
        finally:
            if not child:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        print("fine")
        """,
        path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")


def test_a_second_interpreter_is_refused_clearly(path: str) -> None:
    """Only one interpreter of a process can use the kernels. Another interpreter's import fails with the reason, and the first
    one still works."""
    result = script(
        """
        import sys
        try:
            import _interpreters as interpreters
        except ImportError:
            try:
                import _xxsubinterpreters as interpreters
            except ImportError:
                print("none")
                raise SystemExit from None
        from pygpt import GPT2
        code = '''if True:
            import os
            said = ""
            try:
                from pygpt import GPT2
            except ImportError as error:
                said = str(error)
            os.write(%d, said.encode() + bytes([10]))
        '''
        import os
        read, write = os.pipe()
        other = interpreters.create()
        run = getattr(interpreters, "exec", None) or interpreters.run_string
        with GPT2.load(sys.argv[1], threads=2) as model:
            before = list(model.generate([1, 2]))
            assert not run(other, code % write)
            assert list(model.generate([1, 2])) == before
        interpreters.destroy(other)
        said = os.read(read, 1000).decode()
        assert "interpreter" in said, said
        print("fine")
        """,
        path,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout in ("fine\n", "none\n")


def test_importing_keeps_signal_handlers(path: str) -> None:
    """The library leaves every signal as it was, used or not."""
    result = script(
        """
        import signal, sys
        known = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
        before = [signal.getsignal(which) for which in known]

        def handled():
            with open("/proc/self/status") as file:
                masks = [line.split()[1] for line in file if line.startswith(("SigCgt", "SigIgn"))]
            return [int(mask, 16) & 0x7FFFFFFF for mask in masks]   # above these are the C library's own

        caught = handled()
        from pygpt import *
        import pygpt.__main__, pygpt.commands.convert
        with GPT2.load(sys.argv[1], threads=2) as model:
            list(model.generate([1, 2]))
        assert [signal.getsignal(which) for which in known] == before
        assert handled() == caught
        print("fine")
        """,
        path,
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")
