"""Cache computed prefixes: key-value caches with the tokens that they hold.

If a request shares a prefix with an earlier one, only the remaining tokens are computed. The bits are the same either way.
"""

from collections.abc import Sequence

from ..errors import InputError, is_whole, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from .._kernels import Logits
    from ..config import Config

    class Cache(Protocol):
        """What completing needs of a cache: network.KVCache, and the serial reference's."""

        @property
        def length(self) -> int:
            """How many tokens are in it."""

        @property
        def capacity(self) -> int:
            """How many fit."""

        def truncate(self, length: int) -> None:
            """Keep the first `length` tokens."""

        def copy(self, length: int | None = None, *, capacity: int | None = None) -> "Cache":
            """Return an independent cache of the first `length` tokens."""

    class AnyNetwork(Protocol):
        """What completing needs of a network: network.Network, and the serial reference's."""

        config: Config
        chunk: int  # rows of a prompt that one step may have

        @property
        def position_bytes(self) -> int:
            """Bytes that one token takes in a cache."""

        def new_cache(self, capacity: int | None = None) -> Cache:
            """Return an empty cache."""

        def step(self, rows: list[tuple[int, Any, bool]]) -> Logits:
            """Append rows (token, cache, want_logits); return the logits of the rows that want them, (wanted, V)."""


class Memory:
    """A cache and the tokens that it holds. Serves one completion at a time.

    The tokens are noted after the cache has them, and forgotten before it loses them. So the tokens never promise too much,
    even if something is interrupted in between.
    """

    __slots__ = ("cache", "positions", "tokens")

    def __init__(self, cache: "Cache", tokens: Sequence[int] = ()) -> None:
        self.cache = cache
        self.tokens = list(tokens)
        self.positions = len(self.tokens)  # of the cache that were ever used: their memory is taken

    def shared(self, window: Sequence[int]) -> int:
        """Return how many tokens this memory and a window share at their beginning; one less than all of the window at most,
        for the last token is run for its logits."""
        return common_prefix(self.tokens, window, len(window) - 1)

    def keep(self, shared: int) -> None:
        """Keep the first `shared` tokens."""
        del self.tokens[shared:]
        self.cache.truncate(shared)

    def note(self, tokens: Sequence[int]) -> None:
        """Note tokens that a step has appended to the cache."""
        self.tokens += tokens
        self.positions = max(self.positions, len(self.tokens))

    def copy(self, shared: int, capacity: int) -> "Memory":
        """Return an independent memory of the first `shared` tokens, with room for `capacity`."""
        return Memory(self.cache.copy(shared, capacity=capacity), self.tokens[:shared])


def common_prefix(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Return how many of the first `most` tokens of two sequences are equal from the beginning on."""
    most = min(most, len(a))
    if a[:most] == b[:most]:
        return most
    return next(i for i in range(most) if a[i] != b[i])


class PrefixCache:
    """Idle memories of completed requests, the least recently used first; make it with GPT2.new_prefix_cache().

    `generate(tokens, cache=cache)` computes only what follows the longest common prefix. max_bytes: how many bytes of keys and
    values it may keep; by default those of one full context (maxT tokens). Any number of completions may share a cache.
    """

    def __init__(self, network: "AnyNetwork", max_bytes: int | None = None) -> None:
        one = network.position_bytes * network.config.maxT
        if max_bytes is not None and not is_whole(max_bytes, 0, 1 << 62):
            raise InputError(f"max_bytes is {shown(max_bytes)}: it must be a whole number from 0 to 2^62")
        self._network = network
        self.max_bytes = one if max_bytes is None else max_bytes
        self._idle: list[Memory] = []

    @property
    def tokens(self) -> list[int]:
        """The tokens of the latest memory; none if there is none, or while a completion uses it."""
        return list(self._idle[-1].tokens) if self._idle else []

    @property
    def nbytes(self) -> int:
        """The bytes that the idle memories take."""
        return sum(memory.positions for memory in self._idle) * self._network.position_bytes

    def clear(self) -> None:
        """Forget all tokens and give their memory back."""
        self._idle = []

    def check(self, network: object) -> None:
        """Raise InputError unless this cache was made for `network`."""
        if network is not self._network:
            raise InputError("the prefix cache belongs to another model: make one with this model's new_prefix_cache()")

    def best(self, window: Sequence[int]) -> "tuple[Memory | None, int]":
        """Return the idle memory that shares the longest prefix with a window, and the length of that prefix."""
        found, most = None, 0
        for memory in list(self._idle):
            if (shared := memory.shared(window)) >= max(most, 1):
                found, most = memory, shared
        return found, most

    def take(self, memory: Memory) -> bool:
        """Take a memory out, for one completion to use; False if another completion was faster."""
        try:
            self._idle.remove(memory)
        except ValueError:
            return False
        return True

    def give(self, memory: Memory) -> None:
        """Keep a memory from now on; drop the least recently used ones until the bytes fit."""
        if memory.tokens:
            self._idle.append(memory)
        self.shrink(self.max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used memories until at most so many bytes are kept."""
        while self._idle and self.nbytes > max_bytes:
            del self._idle[:1]

    def __repr__(self) -> str:
        return f"PrefixCache({len(self._idle)} sequences, {self.nbytes} bytes)"
