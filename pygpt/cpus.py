"""Choose the number of workers for this machine, and for a step of a known amount of work. Results do not depend on it."""

import math
import os
from collections.abc import Iterator

from .errors import TYPE_CHECKING, InputError, check_whole

if TYPE_CHECKING:
    from typing import SupportsIndex

MAX_THREADS = 256

# Pauses that a worker spins at a native barrier before it sleeps. Spinning is faster if each worker has its own core. Workers
# that share cores must sleep soon.
SPINS, SPINS_CROWDED = 4000, 50

# Rough speed of one core, with data in its cache, to decide whether more workers make a step faster.
READ_BYTES_PER_US, FLOP_PER_US = 30_000, 100_000
ROUND_US, BARRIER_US = 15, 1.2  # cost of a round of the pool, and of a native barrier


def spins_for(threads: int) -> int:
    """Return how many pauses each of `threads` workers spins at a barrier."""
    return SPINS if threads <= default_threads() else SPINS_CROWDED


def workers_for(threads: int, alone_us: float, barriers: int = 0) -> int:
    """Return how many workers to use for work that takes one worker `alone_us` microseconds: all of them, or one. One worker is
    faster if the others save less time than the round and its barriers cost."""
    return threads if alone_us * (1 - 1 / threads) > ROUND_US + BARRIER_US * barriers else 1


def check_threads(threads: "SupportsIndex") -> int:
    """Return `threads` as an int. Raises InputError unless it is a whole number from 1 to MAX_THREADS."""
    return check_whole("threads", threads, 1, MAX_THREADS)


def resolve_threads(threads: "SupportsIndex | None" = None) -> int:
    """Return the number of workers: `threads`, else PYGPT_THREADS, else default_threads(). Raises InputError."""
    if threads is not None:
        return check_threads(threads)
    text = os.environ.get("PYGPT_THREADS")
    if not text:
        return default_threads()
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_THREADS):
        raise InputError(f"PYGPT_THREADS is {text[:40]!r}: it must be a whole number from 1 to {MAX_THREADS}")
    return int(text)


def default_threads(root: str = "/") -> int:
    """Return how many workers to use by default, at least 1: the least of the processors that this process may use, their
    physical cores, and the cgroup's CPU quota rounded down."""
    # A processor without topology files counts as a core.
    cores = {_read(f"{root}sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in _processors()}
    return max(1, min(len(cores), MAX_THREADS, *(int(quota) for quota in _cpu_quotas(root))))


def runnable() -> int:
    """Return how many of this thread's threads can run at the same time, at least 1: its processors, or the CPU quota rounded
    up if that is less. More workers would take turns at each barrier."""
    return max(1, min(len(_processors()), MAX_THREADS, *(math.ceil(quota) for quota in _cpu_quotas("/"))))


def _processors() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _cpu_quotas(root: str) -> Iterator[float]:
    """Yield every CPU quota of this process, in processors, from cgroup versions 2 (cpu.max) and 1 (cpu.cfs_quota_us)."""
    for line in _read(f"{root}proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for mount in {controllers, "cpu"} if controllers else {""}:  # version 1: if names differ, "cpu" is a link
            for depth in range(len(parts), -1, -1):
                folder = "/".join([f"{root}sys/fs/cgroup/{mount}".rstrip("/"), *parts[:depth]])
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
                words = " ".join(_read(f"{folder}/{name}") for name in names).split()
                if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):  # "max", -1: no quota
                    yield int(words[0]) / int(words[1])


def processors() -> list[str]:
    """Return the name of each processor, or [] if the system does not list them in /proc/cpuinfo."""
    return [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]


def _read(path: str) -> str:
    """Return the text of a small system file without its newline, or "" if it cannot be read."""
    try:
        with open(path, errors="surrogateescape") as file:  # a cgroup's name may contain any bytes
            return file.read().strip()
    except OSError:
        return ""
