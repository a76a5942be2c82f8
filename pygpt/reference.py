"""The serial reference behind the interfaces of the fast path: SerialGPT2 of GPT2, SerialTrainableGPT2 of TrainableGPT2.

For comparison in commands, tests and benchmarks: what they compute, scalar and one thing after another, is what the fast path
is measured against.
"""

import os
from collections.abc import Sequence

from ._reference import Reference, Training
from .config import Config
from .errors import ClosedError, InputError
from .formats.checkpoint import Checkpoint
from .formats.dtypes import FORMATS
from .generation.generate import Generator
from .generation.request import check_tokens
from .hub.find import find_model
from .training.parameters import AdamW, Parameters, check_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .training.parameters import LiveWeights


class SerialCache:
    """What the serial program has instead of keys and values: the tokens themselves, for it computes them all again."""

    def __init__(self, capacity: int, tokens: Sequence[int] = ()) -> None:
        self.capacity = capacity
        self.tokens = list(tokens)

    @property
    def length(self) -> int:
        """How many tokens are in it."""
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.tokens[length:]

    def copy(self, length: int | None = None, *, capacity: int | None = None) -> "SerialCache":
        """Return an independent cache of the first `length` tokens."""
        return SerialCache(capacity or self.capacity, self.tokens[:length])


class SerialNetwork:
    """The network as the serial program runs it: scalar, on one thread, all of a sequence again at each step."""

    position_bytes = 8

    def __init__(self, checkpoint: "Checkpoint | LiveWeights") -> None:
        self.config = checkpoint.config
        self.chunk = self.config.maxT
        self._checkpoint = checkpoint
        arrays = {name: FORMATS[stored].values(data) for name, (stored, data) in checkpoint.stored().items()}
        self._reference: Reference | None = Reference(self.config, arrays)

    def new_cache(self, capacity: int | None = None) -> SerialCache:
        """Return an empty cache."""
        return SerialCache(capacity or self.config.maxT)

    def step(self, rows: "list[tuple[int, SerialCache, bool]]") -> "memoryview[float]":
        """Append rows (token, cache, want_logits); return the logits of the rows that want them, (wanted, V)."""
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
            raise ClosedError("the model is closed")
        return self._reference.forward(tokens)[0]

    def close(self) -> None:
        """Unmap the file. May be called twice."""
        self._reference = None
        self._checkpoint.close()


class SerialGPT2(Generator):
    """GPT-2 as the serial program runs it: one thread, scalar, no cache, the whole network again for every token."""

    network: SerialNetwork

    def __init__(self, checkpoint: "Checkpoint | LiveWeights") -> None:
        super().__init__(SerialNetwork(checkpoint))

    @classmethod
    def load(cls, path: "str | os.PathLike[str] | None" = None, *, mmap: bool = True) -> "SerialGPT2":
        """Open a checkpoint, found as GPT2.load() finds it."""
        return cls(Checkpoint(find_model(path)[0], mmap=mmap))

    def logits(self, tokens: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Return the logits of every position of a sequence, (T, V)."""
        import numpy as np

        return np.asarray(self.network.run(check_tokens(self.config, tokens)))

    def close(self) -> None:
        """Unmap the file. May be called twice."""
        self.network.close()

    def __enter__(self) -> "SerialGPT2":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SerialTrainableGPT2(Parameters):
    """GPT-2's training as the serial program runs it: one thread, scalar; `threads` and `all_workers` have no effect.

    Use it in a `with` block or close() it. Ctrl-C takes effect between layers; gradients that backward() was about are
    incomplete then, and weights and moments unchanged.
    """

    threads = 1

    def __init__(self, config: Config, *, threads: int | None = None, all_workers: bool = False) -> None:
        super().__init__(config, threads=threads, all_workers=all_workers)
        self._training: Training | None = Training(self.parameters, self.gradients, config)

    def forward(self, inputs: "npt.ArrayLike", targets: "npt.ArrayLike") -> "npt.NDArray[np.float32]":
        """The loss of predicting each target, (B, T), from token ids (B, T); the activations are kept for backward().

        Raises InputError for ids that are not the model's, shapes that differ, or more than maxT tokens in a sequence.
        """
        import numpy as np

        return np.asarray(self._open().forward(*self.check_batch(inputs, targets)))

    def evaluate(self, inputs: "npt.ArrayLike", targets: "npt.ArrayLike") -> "npt.NDArray[np.float32]":
        """The losses as forward() gives them, (B, T); nothing is kept, and what an earlier forward() kept stays."""
        import numpy as np

        return np.asarray(self._open().evaluate(*self.check_batch(inputs, targets)))

    def backward(self, *, accumulate: bool = False, scale: float = 1.0) -> None:
        """Set `gradients` to those of scale * mean loss of the last forward(), or add these to them; once a forward()."""
        training = self._open()
        check_number("scale", scale, -1e30, 1e30)
        if not training.ready:
            raise InputError("backward() was called without a forward() before it: call forward(), then backward() once")
        training.backward(accumulate=accumulate, scale=scale)

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients together, summed in float64 in ascending order."""
        return self._open().gradient_norm()

    @property
    def updates(self) -> int:
        """How many updates were made: one that Ctrl-C interrupts was made wholly, and counts, or not at all."""
        return self._open().updates

    def _update(self, numbers: AdamW) -> None:
        self._open().update(self.first_moments, self.second_moments, numbers)

    def model(self) -> SerialGPT2:
        """The model of the live weights, to complete sequences with."""
        self._open()
        return SerialGPT2(self.weights())

    def _open(self) -> Training:
        if self._training is None:
            raise ClosedError("the model is closed")
        return self._training

    def close(self) -> None:
        """Give back the activations. The arrays of parameters, gradients and moments stay. May be called twice."""
        self._training = None

    def __enter__(self) -> "SerialTrainableGPT2":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
