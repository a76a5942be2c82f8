"""More workers than processors, and less than one processor for them: throughput must not collapse.

Each number of workers decodes in a separate process: on all processors, on one, and under a quota of half a processor. The
quota is a cgroup, or the process is stopped for half of every tenth of a second. The numbers of workers take turns, and medians
are compared, so other programs on the machine affect all equally. It should have little else to do."""

import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from budget import Budget
from known import make_model
from programs import PYTHON, finish, send, start

from pygpt import Config

FLOOR = 0.7  # of the best number of workers
WORKERS, CROWDS = (1, 2, 8, 16), (8, 16)
BUSY = Config(maxT=128, V=8000, L=3, NH=12, C=768)  # each kernel takes as long as GPT-2's
PERIOD_S = 0.1
CGROUPS = Path("/sys/fs/cgroup")
Governor = Callable[["subprocess.Popen[bytes]"], object]  # takes a process in hand

DECODE = """
import sys, time
from pygpt import GPT2
with GPT2.load(sys.argv[1], threads=int(sys.argv[2])) as model:
    cache, tokens = model.new_cache(), 0
    model.prefill(cache, list(range(64)))
    begin = time.monotonic()
    while time.monotonic() - begin < float(sys.argv[3]):
        model.decode(cache, tokens % 97)
        tokens += 1
        cache.truncate(64)
    print(tokens / (time.monotonic() - begin))
"""


@contextmanager
def all_processors() -> Iterator[Governor]:
    yield lambda process: None


@contextmanager
def one_processor() -> Iterator[Governor]:
    first = min(os.sched_getaffinity(0))
    yield lambda process: os.sched_setaffinity(process.pid, {first})


@contextmanager
def half_a_processor() -> Iterator[Governor]:
    """A cgroup's quota, or stopping and going on."""
    group = make_cgroup()
    if group is not None:
        try:
            yield lambda process: (group / "cgroup.procs").write_text(str(process.pid))
        finally:
            while (group / "cgroup.procs").read_text().strip():
                time.sleep(0.01)
            group.rmdir()
        return
    over, threads = threading.Event(), list[threading.Thread]()

    def duty(process: "subprocess.Popen[bytes]") -> None:
        while not over.wait(PERIOD_S / 2) and process.returncode is None:
            send(process, signal.SIGSTOP)
            time.sleep(PERIOD_S / 2)
            send(process, signal.SIGCONT)

    def govern(process: "subprocess.Popen[bytes]") -> None:
        threads.append(threading.Thread(target=duty, args=(process,), daemon=True))
        threads[-1].start()

    try:
        yield govern
    finally:
        over.set()
        for thread in threads:
            thread.join()


def make_cgroup() -> Path | None:
    """A group with half a processor, version 1 or 2; None where none may be made."""
    settings = (
        (CGROUPS / "cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        (CGROUPS, {"cpu.max": "50000 100000"}),
    )
    for base, values in settings:
        group = base / f"pygpt-crowd-{os.getpid()}"
        try:
            if not (base / "cgroup.procs").exists():
                continue
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in values.items():
                (group / name).write_text(value)
        except OSError:
            group.rmdir()
            continue
        return group
    return None


@pytest.mark.slow
@pytest.mark.parametrize("setting", [all_processors, one_processor, half_a_processor])
def test_many_workers_are_not_much_slower(
    setting: Callable[[], AbstractContextManager[Governor]], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if setting is one_processor and not hasattr(os, "sched_setaffinity"):
        pytest.skip("no affinity here")
    model = make_model(tmp_path / "model.bin", BUSY)
    budget = Budget(request.config.getoption("--seconds") / 6, request.config.getoption("--seed"))
    found: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for number in budget.rounds():
        for workers in WORKERS[number % len(WORKERS) :] + WORKERS[: number % len(WORKERS)]:
            with setting() as govern:
                process = start([PYTHON, "-c", DECODE, model, workers, 1.5])
                govern(process)
                outcome = finish(process)
            assert outcome.status == 0, outcome
            found[workers].append(float(outcome.out))
    medians = {workers: statistics.median(rates) for workers, rates in found.items()}
    print("\n".join(f"{workers:3} workers {rate:9.1f} tokens/s" for workers, rate in medians.items()))
    assert all(medians[workers] >= FLOOR * max(medians.values()) for workers in CROWDS), medians


@pytest.mark.parametrize("cgroups", [True, False])
def test_a_process_has_half_a_processor(monkeypatch: pytest.MonkeyPatch, cgroups: bool) -> None:
    """With cgroups and without: of a second of work it gets about half, however busy the machine is."""
    if not cgroups:
        monkeypatch.setattr(f"{__name__}.make_cgroup", lambda: None)
    program = "import time; begin = time.monotonic()\nwhile time.monotonic() < begin + 1: pass\nprint(time.process_time())"
    with half_a_processor() as govern:
        process = start([PYTHON, "-c", program])
        govern(process)
        assert float(finish(process).out) < 0.8
