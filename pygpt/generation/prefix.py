"""Cache computed prefixes: key-value caches with their tokens.

If a request shares a prefix with an earlier one, only the remaining tokens are computed. The result has the same bits."""

from collections.abc import Sequence

from ..errors import TYPE_CHECKING, InputError, Uncopied, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol, SupportsIndex

    from .._kernels import Logits
    from ..config import Config

    Cache = Any  # network.KVCache, or the serial reference's SerialCache: both have the members that Memory uses

    class AnyNetwork(Protocol):
        """The interface of a network: network.Network, or the serial reference's network."""

        config: Config
        chunk: int  # the most rows of prompts in one step

        @property
        def position_bytes(self) -> int:
            """The bytes that one token takes in a cache."""

        def new_cache(self, capacity: int | None = None) -> Cache:
            """Return an empty cache."""

        def each(self, function: Callable[[int], object], count: int) -> None:
            """Call function(i) for i = 0 .. count - 1, on any thread."""

        def step(self, rows: list[tuple[int, Any, bool]], *, watch: Any = None) -> Logits:
            """Append rows (token, cache, want_logits); return the logits of the rows that want them, (wanted, V)."""

        def close(self) -> None:
            """Release the memory and the workers."""


class Memory:
    """A cache and its tokens, for one completion at a time.

    `tokens` never has a token that the cache lacks, even after an interruption: it is added later, and removed earlier."""

    def __init__(self, cache: "Cache", tokens: Sequence[int] = ()) -> None:
        self.cache = cache
        self.tokens = list(tokens)
        self.draft: Memory | None = None  # for a draft with its own caches
        self.positions = len(self.tokens)  # positions of the cache that were ever used, so they take memory

    def shared(self, window: Sequence[int]) -> int:
        """Return the length of the common prefix with a window, less than the whole: the last token runs for its logits."""
        return common_prefix(self.tokens, window, len(window) - 1)

    def keep(self, shared: int) -> None:
        """Keep the first `shared` tokens."""
        del self.tokens[shared:]
        self.cache.truncate(shared)

    def note(self, tokens: Sequence[int]) -> None:
        """Note tokens that a step has appended to the cache."""
        self.tokens += tokens
        self.positions = max(self.positions, self.cache.length)

    def copy(self, shared: int, capacity: int) -> "Memory":
        """Return an independent memory of the first `shared` tokens, with room for `capacity`."""
        return Memory(self.cache.copy(shared, capacity=capacity), self.tokens[:shared])


def common_prefix(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Return the length of the common prefix of two sequences, at most `most`."""
    most = min(most, len(a))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


class PrefixCache(Uncopied):
    """Idle memories of completed requests, the least recently used first; made with GPT2.new_prefix_cache().

    `generate(tokens, cache=cache)` computes only the tokens after the longest common prefix. max_bytes: the most bytes of keys
    and values to keep (default: those of one full context, maxT tokens). Any number of completions may share a cache."""

    def __init__(self, network: "AnyNetwork", max_bytes: "SupportsIndex | None" = None) -> None:
        one = network.position_bytes * network.config.maxT
        self._network = network
        self.max_bytes = one if max_bytes is None else check_whole("max_bytes", max_bytes, 0, 1 << 62)
        self._idle: list[Memory] = []

    @property
    def tokens(self) -> list[int]:
        """The tokens of the latest memory. The list is empty while a completion uses the only memory."""
        return list(self._idle[-1].tokens) if self._idle else []

    @property
    def nbytes(self) -> int:
        """The bytes of all idle memories."""
        return sum(memory.positions for memory in self._idle) * self._network.position_bytes

    def clear(self) -> None:
        """Drop all memories."""
        self._idle = []

    def check(self, network: object) -> None:
        """Raise InputError unless this cache was made for `network`."""
        if network is not self._network:
            raise InputError("the prefix cache belongs to another model: make one with this model's new_prefix_cache()")

    def best(self, window: Sequence[int]) -> "tuple[Memory | None, int]":
        """Return the idle memory with the longest common prefix with a window, and the length of that prefix."""
        found, most = None, 0
        for memory in list(self._idle):
            if (shared := memory.shared(window)) >= max(most, 1):
                found, most = memory, shared
        return found, most

    def take(self, memory: Memory) -> bool:
        """Remove a memory for use by one completion; return False if another completion has taken it."""
        try:
            self._idle.remove(memory)
        except ValueError:
            return False
        return True

    def give(self, memory: Memory) -> None:
        """Keep a memory; then drop the least recently used ones until the rest fit in max_bytes."""
        memory.draft = None
        if memory.tokens:
            self._idle.append(memory)
        self.shrink(self.max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used memories until the rest fit in `max_bytes`."""
        while self._idle and self.nbytes > max_bytes:
            del self._idle[:1]

    def __repr__(self) -> str:
        return f"PrefixCache({len(self._idle)} sequences, {self.nbytes} bytes)"
