"""What this machine can do at most, measured: the yardstick for how well the kernels use it.

read   bytes a second that `threads` workers read from memory together: the best of 1, 2, 4 and 8 streams a worker, with
       software prefetch, over a buffer that no cache below the last level holds
fma    float32 operations a second of fused multiply-add in registers, in the instruction set that the kernels use
stream bytes a second of AdamW's traffic, four arrays read and three of them written, with one addition for each value
       written: the most that an update of the parameters can reach

Each is the median over rounds that take turns, so that a slow minute of a shared machine touches all alike. Repeat them
in the same run as whatever is held against them.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from ._kernels import Floats, probe_fma, probe_read, zero
from .cpus import resolve_threads
from .pool import ThreadPool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._backward import TrainStep

STREAMS = (1, 2, 4, 8)
FMA_TIMES = 2_000_000
UPDATE_BYTES = 28  # that AdamW moves for each parameter: parameter, gradient, two moments in; all but the gradient out


class Ceilings:
    """The limits of `threads` workers: `read_gb_s`, `fma_gflop_s` and, if it was asked for, `stream_gb_s`; NaN until
    measure() ran. Each call adds rounds.

    Keep one object through a benchmark and call measure() between its parts: the figures are medians over all rounds.
    Needs `megabytes` of memory until close(), and as much again for `stream`.
    """

    def __init__(self, threads: int | None = None, *, megabytes: int = 512, stream: bool = False) -> None:
        self._pool = ThreadPool(resolve_threads(threads))
        self._memory = Floats(megabytes, 1 << 18)
        zero(self._memory)
        self._read: dict[int, list[float]] = {streams: [] for streams in STREAMS}
        self._fma: list[float] = []
        self._stream: list[float] = []
        self._streamed = megabytes << 16 if stream else 0  # values of each of four arrays
        self._update = _stream_of(self._streamed, self._pool.nth) if stream else None

    def measure(self, rounds: int = 3) -> "Ceilings":
        """Measure `rounds` times more."""
        size = 4 * len(self._memory) << 18
        nth = self._pool.nth
        for _ in range(rounds):
            for streams, found in self._read.items():
                found.append(size / self._seconds(partial(probe_read, self._memory, streams)) / 1e9)
            self._fma.append(nth * probe_fma(1) * FMA_TIMES / self._seconds(lambda i, n: probe_fma(FMA_TIMES)) / 1e9)
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

    @property
    def stream_gb_s(self) -> float:
        """What the memory gives to an update, in 10^9 bytes a second, read and written; NaN unless it was asked for."""
        return median(self._stream) if self._stream else float("nan")

    def close(self) -> None:
        """Stop the workers and give the memory back."""
        self._pool.close()
        self._memory, self._update = Floats(0, 0), None

    def __enter__(self) -> "Ceilings":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _stream_of(values: int, nth: int) -> "TrainStep":
    """A step that streams through four arrays of its own, which lie as a network's in training do. The network that it wants
    beside them is the smallest there is."""
    from ._backward import TrainStep
    from ._kernels import Weights
    from .config import Config
    from .training.parameters import LiveWeights, aligned_zeros, zeros_to_update

    arrays = zeros_to_update(values)
    for array in arrays:
        array.fill(0)  # or its pages would not be there
    config = Config(maxT=1, V=1, L=1, NH=1, C=1)
    least = LiveWeights(config, aligned_zeros(config.parameters(padded=True)).data.cast("B"))
    return TrainStep(Weights(config, least.stored()), nth, 0, config, *arrays, keep=False)
