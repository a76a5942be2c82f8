"""crowd: more workers than processors, and less than one processor for them: throughput must not collapse.

Each number of workers decodes for a while in a process of its own, on all processors, on one, and under a quota of half a
processor (a cgroup where one may be made, else the process is stopped for half of every tenth of a second). A crowd must
reach FLOOR of the best in its setting. The numbers of workers take turns, round after round, and medians are compared, so that
what else the machine does, or that it stands still for a while, touches all alike; it should have little else to do.
"""

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pygpt import Config

from .common import Tally, finish, folder, make_model, send, start

FLOOR = 0.7
SECONDS, ROUNDS = 90.0, 5  # in all
WORKERS, CROWDS = (1, 2, 8, 16), (8, 16)
BUSY = Config(maxT=128, V=8000, L=3, NH=12, C=768)  # each kernel takes as long as GPT-2's
PERIOD_S = 0.1
CGROUPS = Path("/sys/fs/cgroup")

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

Governor = Callable[["subprocess.Popen[bytes]"], object]  # takes a process in hand


@contextmanager
def at_will() -> Iterator[Governor]:
    """All processors."""
    yield lambda process: None


@contextmanager
def one_processor() -> Iterator[Governor]:
    """One processor."""
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
    over = threading.Event()

    def duty(process: "subprocess.Popen[bytes]") -> None:
        while not over.wait(PERIOD_S / 2) and process.returncode is None:
            send(process, signal.SIGSTOP)
            time.sleep(PERIOD_S / 2)
            send(process, signal.SIGCONT)

    threads: list[threading.Thread] = []

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
    name = f"pygpt-stress-{os.getpid()}"
    for base, settings in (
        (CGROUPS / "cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        (CGROUPS, {"cpu.max": "50000 100000"}),
    ):
        group = base / name
        try:
            if not (base / "cgroup.procs").exists():
                continue
            group.mkdir()
        except OSError:
            continue
        try:
            for setting, value in settings.items():
                (group / setting).write_text(value)
        except OSError:
            group.rmdir()
            continue
        return group
    return None


SETTINGS = {"all processors": at_will, "one processor": one_processor, "half a processor": half_a_processor}


def measure(model: str, workers: int, seconds: float, govern: Governor) -> float:
    """Tokens a second of so many workers; 0 where the program fails."""
    process = start([sys.executable, "-c", DECODE, model, workers, seconds])
    govern(process)
    outcome = finish(process)
    return float(outcome.out) if outcome.status == 0 else 0.0


def run_crowd(tally: Tally, seconds: float | None, count: int | None) -> None:
    """Measure every number of workers in every setting, in `count` rounds; print the table."""
    rounds = ROUNDS if count is None else count
    each = (SECONDS if seconds is None else seconds) / len(SETTINGS) / len(WORKERS) / rounds
    with folder() as place:
        model = make_model(place / "model.bin", BUSY)
        for name, setting in SETTINGS.items():
            if name == "one processor" and not hasattr(os, "sched_setaffinity"):
                tally.note(f"{name}: cannot be had here")
                continue
            found: dict[int, list[float]] = {workers: [] for workers in WORKERS}
            for number in range(rounds):
                for workers in WORKERS[number % len(WORKERS) :] + WORKERS[: number % len(WORKERS)]:
                    with setting() as govern:
                        found[workers].append(measure(model, workers, each, govern))
                    tally.check(f"{name}: runs", found[workers][-1] > 0, f"{workers} workers")
            medians = {workers: statistics.median(rates) for workers, rates in found.items()}
            best = max(medians.values())
            for workers, rate in medians.items():
                share = rate / best if best else 0
                spread = f"{min(found[workers]):.1f} to {max(found[workers]):.1f}"
                print(f"{name:20} {workers:3} workers {rate:9.1f} tokens/s ({spread})  {share:5.2f} of the best")
                if workers in CROWDS:
                    tally.check(f"{name}: at least {FLOOR} of the best", share >= FLOOR, f"{workers}: {rate:.1f}, {best:.1f}")
    tally.runs = rounds
