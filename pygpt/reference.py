"""The serial reference with the interface of the fast path: SerialGPT2 for GPT2. training/trainable.py has its training.

Commands, tests and benchmarks compare the fast path with it. It computes one number at a time, without vector instructions."""

import os
from collections.abc import Callable, Iterable, Sequence

from ._reference import Reference
from .errors import TYPE_CHECKING, ClosedError, InputError, Uncopied
from .formats.dtypes import FORMATS, Q4_0, Q8_0, ModelFile
from .formats.open import open_weights
from .generation.generate import Generator
from .generation.request import check_tokens
from .hub.find import find_model

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    import numpy as np
    import numpy.typing as npt


class SerialCache:
    """The serial program's cache. It holds tokens instead of keys and values, because each step computes all of them again."""

    def __init__(self, capacity: int, tokens: Sequence[int] = ()) -> None:
        self.capacity = capacity
        self.tokens = list(tokens)

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.tokens = self.tokens[:length]  # a new list: a shallow copy may share the old one

    def copy(self, length: int | None = None, *, capacity: int | None = None) -> "SerialCache":
        """Return an independent cache of the first `length` tokens."""
        return SerialCache(capacity or self.capacity, self.tokens[:length])


class SerialNetwork(Uncopied):
    """The serial program's network: scalar, on one thread. Each step runs the whole sequence again."""

    position_bytes = 8

    def __init__(self, checkpoint: ModelFile) -> None:
        self.config = checkpoint.config
        self.chunk = self.config.maxT
        self._checkpoint = checkpoint
        stored = checkpoint.stored()
        panels = {name: tensor for name, tensor in stored.items() if tensor[0] in (Q8_0.name, Q4_0.name)}
        arrays = {
            name: data.cast("f") if kind == "float32" else FORMATS[kind].values(data)  # float32 without NumPy
            for name, (kind, data) in stored.items()
            if name not in panels
        }
        self._reference: Reference | None = Reference(self.config, arrays, panels)

    def new_cache(self, capacity: int | None = None) -> SerialCache:
        """Return an empty cache."""
        return SerialCache(capacity or self.config.maxT)

    def each(self, function: "Callable[[int], object]", count: int) -> None:
        """Call function(i) for i = 0 .. count - 1."""
        for i in range(count):
            function(i)

    def step(self, rows: "list[tuple[int, SerialCache, bool]]", *, watch: object = None) -> "memoryview[float]":
        """Append rows (token, cache, want_logits); return the logits of the rows that want them, (wanted, V)."""
        if watch is not None:
            raise InputError("the serial program cannot change activations: leave out edits, or use GPT2")
        grown: dict[SerialCache, list[int]] = {cache: list(cache.tokens) for _, cache, _ in rows}
        wanted = []
        for token, cache, want in rows:
            grown[cache].append(token)
            if want:
                wanted.append((cache, len(grown[cache]) - 1))
        logits = {cache: self.run(grown[cache]).cast("B") for cache in dict(wanted)}
        row_bytes = 4 * self.config.V
        found = b"".join(logits[cache][row * row_bytes : (row + 1) * row_bytes] for cache, row in wanted)
        for cache, tokens in grown.items():
            cache.tokens = tokens
        return memoryview(found).cast("f", [len(wanted), self.config.V])

    def run(self, tokens: Sequence[int]) -> memoryview:
        """Return the logits of all positions, (T, V)."""
        if self._reference is None:
            raise ClosedError("the model is closed: open it again")
        return self._reference.forward(tokens)[0]

    def close(self) -> None:
        """Unmap the file. May be called twice."""
        self._reference = None
        self._checkpoint.close()


class SerialGPT2(Generator):
    """The serial program's GPT-2: scalar, on one thread. Each new token runs the whole sequence again."""

    network: SerialNetwork

    def __init__(self, checkpoint: ModelFile) -> None:
        super().__init__(SerialNetwork(checkpoint))

    @classmethod
    def load(cls, path: "str | os.PathLike[str] | None" = None, **options: "Any") -> "SerialGPT2":
        """Open the checkpoint that GPT2.load() would open. options: its mmap, weights, tokenizer and text_only."""
        return cls(open_weights(find_model(path)[0], **options))

    def logits(self, tokens: "Iterable[SupportsIndex]") -> "npt.NDArray[np.float32]":
        """Return the logits of every position of a sequence, (T, V)."""
        import numpy as np

        return np.asarray(self.network.run(check_tokens(self.config, tokens)))

    def close(self) -> None:
        """Unmap the file. May be called twice."""
        self.network.close()
