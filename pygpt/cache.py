"""The key-value cache of one sequence: what earlier rows left behind, so that a new row costs one row.

Refuses: caches longer than the model's maxT, and use with another model than the one that made it.
"""

from ._kernels import KeysValues, Weights
from .config import Config
from .errors import InputError, is_whole, shown


class KVCache(KeysValues):
    """Keys and values of one sequence; make it with GPT2.new_cache(). `length` tokens are in it, `capacity` fit.

    GPT2.step() appends to it. Memory is taken as positions are first used: L * 2 * C float32 values a position, each head
    rounded up to 16 channels. Raises InputError for a capacity outside 1 .. maxT and MemoryError when the address space has
    no room.
    """

    def __init__(self, weights: Weights, config: Config, capacity: int | None = None) -> None:
        capacity = config.maxT if capacity is None else capacity
        if not is_whole(capacity, 1, config.maxT):
            raise InputError(f"capacity is {shown(capacity)}: it must be a whole number from 1 to maxT = {config.maxT}")
        super().__init__(weights, capacity)

    def truncate(self, length: int) -> None:
        """Take rows back: keep the first `length` tokens. Raises InputError unless 0 <= length <= self.length."""
        if not is_whole(length, 0, self.length):
            raise InputError(f"cannot truncate to {shown(length)}: the cache holds {self.length} tokens")
        self._truncate(length)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, capacity={self.capacity})"
