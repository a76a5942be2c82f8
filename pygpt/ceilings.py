"""Measure the limits of this machine, as a reference for the kernels.

read   bytes per second that all workers read from memory: the best of 1, 2, 4 and 8 streams per worker, with software
       prefetch, from a buffer that is larger than the caches below the last level
fma    float32 operations per second of fused multiply-add in registers, in the kernels' instruction set
dots   integer operations per second of a quantised format's dot product in registers, as the kernels compute it
stream bytes per second of AdamW's memory traffic: four arrays read, three of them written, one addition per value written.
       This is the upper limit for an update of the parameters.

Each number is the median over rounds. The rounds of all measurements alternate, so a slow minute of a shared machine
affects all of them. Measure the limits in the same run as the kernels."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

from ._kernels import Floats, probe_dots, probe_fma, probe_read, zero
from .cpus import resolve_threads
from .errors import TYPE_CHECKING, Closing
from .pool import ThreadPool

if TYPE_CHECKING:
    from ._backward import TrainStep

STREAMS = (1, 2, 4, 8)
FMA_TIMES = 2_000_000
UPDATE_BYTES = 28  # AdamW's traffic per parameter: read parameter, gradient and two moments; write all but the gradient


class Ceilings(Closing):
    """Measure the limits of `threads` workers: `read_gb_s`, `fma_gflop_s` and, with `stream`, `stream_gb_s`.

    dots: names of quantised weight formats, such as "q8_0", whose integer operations are measured, too.

    Each limit is NaN before measure(), and then the median over the rounds of all calls. Keep one object through a benchmark,
    and call measure() between its parts. Needs `megabytes` of memory until close(), and twice as much with `stream`."""

    def __init__(
        self, threads: int | None = None, *, megabytes: int = 512, stream: bool = False, dots: Iterable[str] = ()
    ) -> None:
        self._pool = ThreadPool(resolve_threads(threads))
        self._memory = Floats(megabytes, 1 << 18)
        zero(self._memory)
        self._read: dict[int, list[float]] = {streams: [] for streams in STREAMS}
        self._fma: list[float] = []
        self._dots: dict[str, list[float]] = {kind: [] for kind in dots}
        self._stream: list[float] = []
        self._streamed = megabytes << 16 if stream else 0  # values in each of four arrays
        self._update = _stream_of(self._streamed, self._pool.nth) if stream else None

    def measure(self, rounds: int = 3) -> "Ceilings":
        """Measure `rounds` more rounds; return self."""
        size, nth = 4 * len(self._memory) << 18, self._pool.nth
        for _ in range(rounds):
            for streams, found in self._read.items():
                found.append(size / self._seconds(partial(probe_read, self._memory, streams)) / 1e9)
            self._fma.append(nth * probe_fma(1) * FMA_TIMES / self._seconds(lambda i, n: probe_fma(FMA_TIMES)) / 1e9)
            for kind, found in self._dots.items():
                seconds = self._seconds(partial(lambda kind, ith, nth: probe_dots(kind, FMA_TIMES), kind))
                found.append(nth * probe_dots(kind, 1) * FMA_TIMES / seconds / 1e9)
            if self._update is not None:
                seconds = self._seconds(self._update, before=self._update.begin_stream)
                self._stream.append(UPDATE_BYTES * self._streamed / seconds / 1e9)
        return self

    def _seconds(self, job: Callable[[int, int], object], before: Callable[[], None] | None = None) -> float:
        start = time.perf_counter()
        self._pool.run(job, before=before)
        return time.perf_counter() - start

    @property
    def threads(self) -> int:
        """The number of workers."""
        return self._pool.nth

    @property
    def read_gb_s(self) -> float:
        """The read bandwidth of the best number of streams, in 10^9 bytes per second."""
        return max(map(_median, self._read.values()))

    @property
    def fma_gflop_s(self) -> float:
        """The peak rate of fused multiply-add, in 10^9 operations per second."""
        return _median(self._fma)

    def operations_gop_s(self, format: str) -> float:
        """Return the peak rate of a weight format's products, in 10^9 operations per second.

        This is the rate of integer operations for a format of `dots`, else fma_gflop_s."""
        return _median(self._dots.get(format, self._fma))

    @property
    def stream_gb_s(self) -> float:
        """The memory bandwidth of an update, reads and writes together, in 10^9 bytes per second. NaN without `stream`."""
        return _median(self._stream)

    def close(self) -> None:
        """Stop the workers and free the memory."""
        self._pool.close()
        self._memory, self._update = Floats(0, 0), None


def _median(rates: list[float]) -> float:
    return median(rates) if rates else float("nan")


def _stream_of(values: int, nth: int) -> "TrainStep":
    """Return a step that streams through four arrays, aligned as in training. Its network is the smallest possible."""
    from ._backward import TrainStep
    from ._kernels import Weights
    from .config import Config
    from .formats.checkpoint import stored_tensors
    from .formats.dtypes import FLOAT32
    from .training.parameters import aligned_zeros, zeros_to_update

    arrays = zeros_to_update(values)
    for array in arrays:
        array.fill(0)  # makes the system allocate its pages
    config = Config(maxT=1, V=1, L=1, NH=1, C=1)
    least = aligned_zeros(config.parameters(padded=True)).data.cast("B")
    return TrainStep(Weights(config, stored_tensors(config, least, FLOAT32, padded=True)), nth, 0, config, *arrays, keep=False)
