"""The network: the weights in the file, a pool of workers, and step(), the one forward pass.

A row is one token of one sequence. All rows of a prompt are prefill. One row is decode. One row from each of B sequences is
batched decode. One function computes all of these. The bits of a row's logits do not depend on other rows, on the division of
a prompt into steps, or on the number of workers.

Refuses to know about sampling, text and NumPy: logits are Floats, which NumPy can view."""

from collections.abc import Callable, Iterable

from . import cpus
from ._kernels import Floats, KeysValues, Step, Trace, Weights, copy_keys_values
from .config import Config
from .errors import TYPE_CHECKING, ClosedError, InputError, Uncopied, check_whole, sequence
from .pool import ThreadPool, nothing

if TYPE_CHECKING:
    from typing import SupportsIndex

    from .activations import Watch
    from .formats.dtypes import ModelFile
    from .formats.panels import StoredWeights

CHUNK = 512  # rows of a prompt in one step: so Ctrl-C takes effect soon, and the activations stay small

Row = tuple["SupportsIndex", "KVCache", bool]


class KVCache(KeysValues):
    """Keys and values of one sequence, made with GPT2.new_cache(). It holds `length` tokens of at most `capacity`.

    GPT2.step() appends to it. A position takes memory when it is first used: L * 2 * C float32 values, each head rounded up
    to 16 channels. Raises InputError for a capacity outside 1 to maxT, and MemoryError if the address space has no room."""

    def __init__(self, weights: Weights, config: Config, capacity: "SupportsIndex | None" = None) -> None:
        capacity = config.maxT if capacity is None else capacity
        super().__init__(weights, check_whole("capacity", capacity, 1, config.maxT, f" from 1 to maxT = {config.maxT}"))
        self._weights, self._config = weights, config

    def truncate(self, length: "SupportsIndex") -> None:
        """Keep only the first `length` tokens. Raises InputError unless 0 <= length <= self.length."""
        self._truncate(self._known("truncate to", length))

    def copy(self, length: "SupportsIndex | None" = None, *, capacity: "SupportsIndex | None" = None) -> "KVCache":
        """Return an independent cache with the first `length` tokens (default: all).

        capacity: of the new cache (default: the same). Raises InputError if `length` exceeds self.length or `capacity`."""
        length = self._known("copy", self.length if length is None else length)
        room = self.capacity if capacity is None else check_whole("capacity", capacity, max(length, 1), self._config.maxT)
        cache = KVCache(self._weights, self._config, room)
        copy_keys_values(cache, self, length)
        return cache

    def _known(self, verb: str, length: "SupportsIndex") -> int:
        return check_whole(f"the length to {verb}", length, 0, self.length, f" from 0 to {self.length}, the cache's length")

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, capacity={self.capacity})"


class Network(Uncopied):
    """GPT-2's forward pass over the weights of a checkpoint, on `threads` workers.

    Threads may share a network: their steps take turns. all_workers: use all workers even if fewer would be as fast. target:
    another network. This one then uses its workers, and extends its caches if the dimensions are equal.
    `stored`: by tensor, its weight format and its bytes, as the kernels read them."""

    chunk = CHUNK

    def __init__(
        self,
        checkpoint: "ModelFile",
        *,
        threads: "SupportsIndex | None" = None,
        all_workers: bool = False,
        target: "Network | None" = None,
    ) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._tensors = stored = checkpoint.stored()
        self.stored = {name: (kind, data.nbytes) for name, (kind, data) in stored.items()}
        kin = target._weights if target is not None and target.config == self.config else None
        self._weights: Weights = Weights(self.config, stored, kin)
        self._pool: ThreadPool = ThreadPool(cpus.resolve_threads(threads)) if target is None else target._pool
        self._all_workers: bool = all_workers if target is None else target._all_workers
        self._values = self.config.parameters(padded=False) - self.config.maxT * self.config.C  # weights that each row uses
        self._value_bytes = sum(size for _, size in self.stored.values()) / self.config.parameters(padded=False)
        self._most = self.threads if self._all_workers else min(self.threads, cpus.runnable())  # workers of a step
        self._work = Step(self._weights, self.threads, cpus.spins_for(self._most))

    @property
    def threads(self) -> int:
        """The number of workers, the caller included."""
        return self._pool.nth

    def quantised(self, weights: str) -> "StoredWeights":
        """Return this network's weights, quantised to q8_0 or q4_0 in memory."""
        from .formats.panels import quantised

        return quantised(self._checkpoint, weights, threads=self.threads)

    def tensors(self) -> "StoredWeights":
        """Return the weights for reading: pieces(name) yields a tensor as float32. Raises ClosedError after close()."""
        from .formats.panels import StoredWeights

        if not self._tensors:
            raise ClosedError("the model is closed: open it again")
        return StoredWeights(self.config, self._tensors)

    @property
    def position_bytes(self) -> int:
        """The bytes of keys and values that one token takes in a cache."""
        return 2 * self.config.L * self.config.NH * -(-self.config.HS // 16) * 16 * 4

    def new_cache(self, capacity: "SupportsIndex | None" = None) -> KVCache:
        """Return an empty key-value cache for one sequence of up to `capacity` tokens (default maxT)."""
        return KVCache(self._weights, self.config, capacity)

    def step(self, rows: Iterable[Row], lengths: "dict[KVCache, int] | None" = None, watch: "Watch | None" = None) -> Floats:
        """Run the network over rows and raise errors as GPT2.step() does; return the logits, (wanted, V), as Floats.

        lengths: receives the length of each cache before the step, unless it already has one, so that a caller can undo even a
        committed step. watch: reads and changes activations between the phases."""
        rows, work, workers = list(rows), self._work, self._most
        if not self._all_workers:
            alone_us = self._values * (self._value_bytes / cpus.READ_BYTES_PER_US + 2 * len(rows) / cpus.FLOP_PER_US)
            workers = cpus.workers_for(workers, alone_us, 5 * self.config.L + 3)

        def prepare() -> None:
            work.prepare(rows, workers)
            if watch is not None:
                watch.begin(work, self.config, rows)
            if lengths is not None:
                for _, cache, _ in rows:
                    lengths.setdefault(cache, cache.length)

        again = work.more if watch is None else watch.more
        logits = self._pool.run(work, work.abort, before=prepare, again=again, after=work.finish, workers=workers)
        assert logits is not None
        return logits

    def extend(self, cache: KVCache, tokens: "Iterable[SupportsIndex]", lengths: "dict[KVCache, int] | None" = None) -> Floats:
        """Append tokens as GPT2.extend() does; return the logits, (1, V), as Floats. lengths: as for step().

        If a later chunk fails, the earlier chunks stay in the cache."""
        tokens = sequence(tokens)
        room = cache.capacity - cache.length
        if not 1 <= len(tokens) <= room:
            raise InputError(f"{len(tokens)} tokens were given: at least 1 is needed, and the cache has room for {room}")
        rows = [(token, cache, i == len(tokens)) for i, token in enumerate(tokens, 1)]
        for start in range(0, len(rows) - CHUNK, CHUNK):
            self.step(rows[start : start + CHUNK], lengths)
        return self.step(rows[(len(rows) - 1) // CHUNK * CHUNK :], lengths)

    def each(self, function: Callable[[int], object], count: int) -> None:
        """Call function(i) for i = 0 .. count - 1, shared among the workers if there are several."""
        if count == 1:
            function(0)
        elif count:
            self._pool.run(lambda ith, nth: [function(i) for i in range(ith, count, nth)], workers=self._most)

    def record(self, trace: Trace | None) -> None:
        """Record phases as GPT2.record() does. Raises InputError for a trace of fewer workers."""
        if trace is not None and trace.nth < self.threads:
            raise InputError(f"trace is for {trace.nth} workers: this model needs a trace for {self.threads}")
        self._pool.run(nothing, before=lambda: setattr(self._work, "trace", trace), workers=1)

    def fork_join(self, on: bool) -> None:
        """Run later steps as GPT2.fork_join() does. The bits are the same, but the additional rounds take time."""
        self._pool.run(nothing, before=lambda: setattr(self._work, "forked", on), workers=1)

    def close(self) -> None:
        """Stop the workers and unmap the file, after a running step has ended. May be called twice."""
        self._pool.close()  # after this, no step can run
        self._weights.close()
        self._tensors = {}  # views of the file: without them, it can be unmapped
        self._checkpoint.close()
