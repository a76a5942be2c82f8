"""GPT2: weights in the file, a pool of workers, and step(), the one way through the network.

A row is one token of one sequence. All rows of a prompt are prefill; one row is decode; one row from each of B sequences is
batched decode. The same forward pass serves them all, and every row's logits have the same bits whatever rows it runs with,
however the prompt is cut, and however many workers there are.
"""

import os
from collections.abc import Iterable, Sequence

from ._kernels import Floats, Step, Weights
from ._signals import see_through
from .cache import KVCache
from .errors import InputError, shown
from .formats.checkpoint import Checkpoint
from .generation.prefix import Memory, PrefixCache
from .generation.request import Completer, Completion, check_tokens
from .hub.find import find_model
from .pool import TRIES, ThreadPool, default_threads, resolve_threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ._kernels import Logits, Trace
    from .training.parameters import LiveWeights

CHUNK = 512  # rows of a prompt run in one step: Ctrl-C waits for one step, and the activations stay small

# Pauses that a worker spins at a native barrier before it sleeps. A worker with a core of its own wins by spinning; workers
# that share cores must give way at once.
SPINS, SPINS_CROWDED = 4000, 50

# What decides whether a step is worth more than one worker: rough figures of one core, in cache, and of the meeting points.
READ_BYTES_PER_US, FLOP_PER_US = 30_000, 100_000
ROUND_US, BARRIER_US = 15, 1.2
MEETING_WEIGHT = 1  # 0 makes every step use all workers, as tests of the bits do

Row = tuple[int, KVCache, bool]


def spins_for(threads: int) -> int:
    """How many pauses so many workers spin at a barrier."""
    return SPINS if threads <= default_threads() else SPINS_CROWDED


def workers_for(threads: int, alone_us: float, meetings: int = 0) -> int:
    """How many workers are worth what takes one of them `alone_us`: all, or one where meeting, that often within the round
    and once at its end, would cost more than it saves. No result depends on it."""
    meeting_us = ROUND_US + BARRIER_US * meetings
    return threads if alone_us * (1 - 1 / threads) > meeting_us * MEETING_WEIGHT else 1


class GPT2(Completer):
    """A GPT-2 model on `threads` workers. Use it in a `with` block, or close() it.

    Threads may share a model: their steps take turns. Arrays that it returns are fresh float32 arrays of the caller's.
    """

    def __init__(self, checkpoint: "Checkpoint | LiveWeights", *, threads: int | None = None) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._weights = Weights(checkpoint.values, self.config, padded=checkpoint.version != 1, bf16=checkpoint.bf16)
        self._pool = ThreadPool(resolve_threads(threads))
        self._values = self.config.parameters(padded=False) - self.config.maxT * self.config.C  # weights that a row meets
        self._value_bytes = 2 if checkpoint.bf16 else 4
        self._work = Step(self._weights, self.threads, spins_for(self.threads))

    @classmethod
    def load(cls, path: "str | os.PathLike[str] | None" = None, *, threads: int | None = None, mmap: bool = True) -> "GPT2":
        """Open a checkpoint: `path`, else as find_model() finds one. The file is mapped, not read, unless mmap is False.

        threads: workers, 1 to 256; else PYGPT_THREADS, else as many as can run side by side here. Raises CheckpointError
        for a file that is not a checkpoint, InputError for a bad thread count.
        """
        checkpoint = Checkpoint(find_model(path)[0], mmap=mmap)
        try:
            return cls(checkpoint, threads=threads)
        except BaseException:
            checkpoint.close()
            raise

    @property
    def threads(self) -> int:
        """The number of workers, the caller included."""
        return self._pool.nth

    def new_cache(self, capacity: int | None = None) -> KVCache:
        """An empty key-value cache for one sequence of up to `capacity` tokens (default maxT)."""
        return KVCache(self._weights, self.config, capacity)

    def new_prefix_cache(self) -> PrefixCache:
        """A cache for generate() that remembers what was run: a later prompt is run from where it parts from it."""
        return PrefixCache(self)

    def step(self, rows: Iterable[Row]) -> "npt.NDArray[np.float32]":
        """Run the network over rows (token, cache, want_logits); return the logits of the rows that want them, (wanted, V).

        A row's position is its cache's length plus the earlier rows of that cache in the list. If anything fails, no cache
        has changed. Raises InputError for a bad token, a full cache or another model's cache, ClosedError after close().
        """
        lengths = Lengths()
        try:
            return _array(self._step(list(rows), lengths))
        except BaseException:
            see_through(lengths.take_back, TRIES)
            raise

    def _step(self, rows: list[Row], lengths: dict[KVCache, int]) -> Floats:
        """One step; notes in `lengths` how long each cache was, unless an earlier step has."""
        workers = self._workers(len(rows))

        def prepare() -> None:
            self._work.prepare(rows, workers)
            for _, cache, _ in rows:
                lengths.setdefault(cache, cache.length)

        logits = self._pool.run(
            self._work,
            abort=self._work.abort,
            before=prepare,
            again=self._work.more,
            after=self._work.finish,
            alone=workers == 1,
        )
        assert logits is not None
        return logits

    def _workers(self, rows: int) -> int:
        """How many workers a step of so many rows is worth."""
        alone_us = self._values * (self._value_bytes / READ_BYTES_PER_US + 2 * rows / FLOP_PER_US)
        return workers_for(self.threads, alone_us, 5 * self.config.L + 3)

    def prefill(self, cache: KVCache, tokens: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Append tokens to the cache; return the last one's logits (V,). Runs in chunks; all or nothing is appended."""
        return self._append(cache, list(tokens))

    def decode(self, cache: KVCache, token: int) -> "npt.NDArray[np.float32]":
        """Append one token to the cache; return its logits (V,)."""
        return self._append(cache, [token])

    def logits(self, tokens: Sequence[int]) -> "npt.NDArray[np.float32]":
        """The logits of every position of a sequence, (T, V)."""
        import numpy as np

        tokens = check_tokens(self.config, tokens)
        out = np.empty((len(tokens), self.config.V), np.float32)
        cache = self.new_cache(len(tokens))
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            out[start : start + CHUNK] = self.step([(token, cache, True) for token in chunk])
        return out

    def _forward(self, live: list[Completion]) -> "list[tuple[Logits, int]]":
        """Run what is new in each completion's window. Of those that begin with the same tokens one is run, the others copy."""
        windows = [completion.window() for completion in live]
        first: dict[tuple[int, ...], int] = {}
        leader = [i if live[i].memory else first.setdefault(tuple(window), i) for i, window in enumerate(windows)]
        memories = [self._memory(completion) for completion in live]
        runs = [i for i in range(len(live)) if leader[i] == i]
        new = [(memories[i].cache, memories[i].recall(windows[i])) for i in runs]
        found = dict(zip(runs, self._append_all(new, {}), strict=True))  # what fails counts for nothing: no tokens are noted
        for i, (_, tokens) in zip(runs, new, strict=True):
            memories[i].tokens += tokens
        for i in range(len(live)):
            if leader[i] != i:
                memories[i].become(memories[leader[i]])
        return [found[i] for i in leader]

    def _memory(self, completion: Completion) -> Memory:
        """What the network has run of a completion; at first what its prefix cache remembers, or nothing."""
        if completion.memory is None:
            prefix = completion.prefix
            completion.memory = prefix.lend() if prefix else Memory(self.new_cache(completion.longest))
        return completion.memory

    def _check_prefix(self, prefix: PrefixCache) -> None:
        if not isinstance(prefix, PrefixCache):
            raise InputError(f"cache is {shown(prefix)}: generate() takes a PrefixCache")
        prefix.check(self)

    def _append(self, cache: KVCache, tokens: list[int]) -> "npt.NDArray[np.float32]":
        """Append tokens in chunks; return the last one's logits (V,). On failure the cache keeps its length."""
        if not 1 <= len(tokens) <= cache.capacity - cache.length:
            room = cache.capacity - cache.length
            raise InputError(f"{len(tokens)} tokens were given: at least 1 is needed, and the cache has room for {room}")
        lengths = Lengths()
        try:
            [(logits, _)] = self._append_all([(cache, tokens)], lengths)
            return _array(logits).reshape(-1)
        except BaseException:
            see_through(lengths.take_back, TRIES)
            raise

    def _append_all(self, new: list[tuple[KVCache, list[int]]], lengths: dict[KVCache, int]) -> list[tuple[Floats, int]]:
        """Append tokens to caches, in chunks of rows; return the logits of each cache's last token, as logits and a row. Some
        chunks may be in when one fails: `lengths` says how long the caches were."""
        rows = [(token, cache, i == len(tokens)) for cache, tokens in new for i, token in enumerate(tokens, 1)]
        found = []
        for start in range(0, len(rows), CHUNK):
            logits = self._step(rows[start : start + CHUNK], lengths)
            found += [(logits, row) for row in range(len(logits))]
        return found

    def record(self, trace: "Trace | None") -> None:
        """Let the workers of later steps note their phases in `trace`; None ends it. Costs about 0.1 us a phase."""
        if trace is not None and trace.nth < self.threads:
            raise InputError(f"the trace is for {trace.nth} workers, and this model has {self.threads}")
        self._pool.run(_nothing, before=lambda: setattr(self._work, "trace", trace), alone=True)

    def fork_join(self, on: bool) -> None:
        """Let the pool run later steps as one round for each kernel, and not one for the step: the same kernels and bits, and
        the price of that many rounds. For comparison; False ends it."""
        self._pool.run(_nothing, before=lambda: setattr(self._work, "forked", on), alone=True)

    def close(self) -> None:
        """Stop the workers and unmap the file. May be called twice; a running step is finished first."""
        self._pool.close()  # from here on no step runs
        self._weights.close()
        self._checkpoint.close()

    def __enter__(self) -> "GPT2":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Lengths(dict[KVCache, int]):
    """How long caches were before a step."""

    def take_back(self) -> bool:
        """Give them these lengths. A step is undone so even after it was committed: Ctrl-C may come as late as on the way back
        to the caller."""
        for cache, length in self.items():
            cache._truncate(length)
        return True


def _nothing(ith: int, nth: int) -> None:
    """A job that only takes its turn."""


def _array(logits: Floats) -> "npt.NDArray[np.float32]":
    import numpy as np

    return np.asarray(logits)
