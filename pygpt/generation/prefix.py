"""What the network has already run of a sequence is not run again: a key-value cache with its tokens beside it.

A request that begins as an earlier one did goes on from where they part. Cached or not, the bits are the same.
"""

from collections.abc import Sequence

from .._kernels import copy_keys_values
from ..cache import KVCache
from ..errors import InputError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..model import GPT2


class Memory:
    """A cache and the tokens that it holds. Serves one completion at a time.

    The tokens are noted after the cache has them and forgotten before, so that they never promise too much, whatever is
    interrupted."""

    __slots__ = ("cache", "tokens")

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.tokens: list[int] = []

    def recall(self, tokens: Sequence[int]) -> list[int]:
        """Keep what the cache and a sequence share at their beginning; return the tokens that are still to be run: the last
        one at least, for its logits."""
        known = self.tokens
        shared = len(known)
        if known != tokens[:shared]:
            shared = next(i for i, token in enumerate(known) if i == len(tokens) or token != tokens[i])
        shared = min(shared, len(tokens) - 1)
        del known[shared:]
        self.cache.truncate(shared)
        return list(tokens[shared:])

    def become(self, other: "Memory") -> None:
        """Copy another memory into this empty one."""
        copy_keys_values(self.cache, other.cache)
        self.tokens = other.tokens.copy()


class PrefixCache:
    """Remembers the latest completion that was given it; make it with GPT2.new_prefix_cache(). `generate(tokens, cache=cache)`
    runs only what follows the longest common beginning, with the same bits. Costs L * 2 * C float32 values a token.

    Any number of completions may be given one cache: the first that runs has it, the others run without.
    """

    def __init__(self, model: "GPT2") -> None:
        self._model = model
        self._idle = [Memory(model.new_cache())]  # one, or none while a completion has it: popping is atomic

    @property
    def tokens(self) -> list[int]:
        """The tokens that need not be run again; none while a completion runs."""
        return [token for memory in self._idle for token in memory.tokens]

    def clear(self) -> None:
        """Forget the tokens and give their memory back."""
        self._idle = [Memory(self._model.new_cache())]

    def check(self, model: object) -> None:
        """Raise InputError unless this cache was made for `model`."""
        if model is not self._model:
            raise InputError("the prefix cache belongs to another model: make one with this model's new_prefix_cache()")

    def lend(self) -> Memory:
        """What is remembered, or a memory of nothing while another completion has it."""
        try:
            return self._idle.pop()
        except IndexError:
            return Memory(self._model.new_cache())

    def take_back(self, memory: Memory) -> None:
        """Remember this from now on."""
        self._idle = [memory]

    def __repr__(self) -> str:
        return f"PrefixCache({len(self.tokens)} tokens)"
