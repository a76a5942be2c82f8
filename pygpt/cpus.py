"""How many workers: for this machine, and for a step of a known amount of work. No result depends on it."""

import os
from collections.abc import Iterator

from .errors import InputError, is_whole, shown

MAX_THREADS = 256

# Pauses that a worker spins at a native barrier before it sleeps. A worker with a core of its own wins by spinning. Workers
# that share cores must give way at once.
SPINS, SPINS_CROWDED = 4000, 50

# What decides whether a step is worth more than one worker: rough figures of one core, with data in its cache.
READ_BYTES_PER_US, FLOP_PER_US = 30_000, 100_000
ROUND_US, BARRIER_US = 15, 1.2  # a round of the pool, a native barrier


def spins_for(threads: int) -> int:
    """Return how many pauses each of so many workers spins at a barrier."""
    return SPINS if threads <= default_threads() else SPINS_CROWDED


def workers_for(threads: int, alone_us: float, barriers: int = 0) -> int:
    """Return how many workers to use for work that takes one of them `alone_us`: all, or one if waiting for each other, at
    the end of the round and at so many barriers in it, would cost more time than it saves."""
    return threads if alone_us * (1 - 1 / threads) > ROUND_US + BARRIER_US * barriers else 1


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
