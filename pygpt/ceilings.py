"""What this machine can do at most, measured: the yardstick for how well the kernels use it.

read   bytes a second that `threads` workers read from memory together: the best of 1, 2, 4 and 8 streams a worker, with
       software prefetch, over a buffer that no cache below the last level holds
fma    float32 operations a second of fused multiply-add in registers, in the instruction set that the kernels use

Each is the median over rounds that take turns, so that a slow minute of a shared machine touches both alike. Repeat them
in the same run as whatever is held against them.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from ._kernels import Floats, probe_fma, probe_read, zero
from .pool import ThreadPool, resolve_threads

STREAMS = (1, 2, 4, 8)
FMA_TIMES = 2_000_000


class Ceilings:
    """The limits of `threads` workers: `read_gb_s` and `fma_gflop_s`, NaN until measure() ran. Each call adds rounds.

    Keep one object through a benchmark and call measure() between its parts: the figures are medians over all rounds.
    Needs `megabytes` of memory until close().
    """

    def __init__(self, threads: int | None = None, *, megabytes: int = 512) -> None:
        self._pool = ThreadPool(resolve_threads(threads))
        self._memory = Floats(megabytes, 1 << 18)
        zero(self._memory)
        self._read: dict[int, list[float]] = {streams: [] for streams in STREAMS}
        self._fma: list[float] = []

    def measure(self, rounds: int = 3) -> "Ceilings":
        """Measure `rounds` times more."""
        size = 4 * len(self._memory) << 18
        nth = self._pool.nth
        for _ in range(rounds):
            for streams, found in self._read.items():
                found.append(size / self._seconds(partial(probe_read, self._memory, streams)) / 1e9)
            self._fma.append(nth * probe_fma(1) * FMA_TIMES / self._seconds(lambda i, n: probe_fma(FMA_TIMES)) / 1e9)
        return self

    def _seconds(self, job: Callable[[int, int], object]) -> float:
        start = time.perf_counter()
        self._pool.run(job)
        return time.perf_counter() - start

    @property
    def threads(self) -> int:
        """Workers that measured."""
        return self._pool.nth

    @property
    def read_gb_s(self) -> float:
        """Read bandwidth in 10^9 bytes a second, of the best number of streams."""
        return max((median(found) for found in self._read.values() if found), default=float("nan"))

    @property
    def fma_gflop_s(self) -> float:
        """Peak of fused multiply-add in 10^9 operations a second."""
        return median(self._fma) if self._fma else float("nan")

    def close(self) -> None:
        """Stop the workers and give the memory back."""
        self._pool.close()
        self._memory = Floats(0, 0)

    def __enter__(self) -> "Ceilings":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
