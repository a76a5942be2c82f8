"""SerialGPT2: the serial reference behind the same interface as GPT2, for comparison in the command, tests and benchmarks."""

import os
from collections.abc import Iterable, Iterator, Sequence

from ._reference import Reference
from .checkpoint import Checkpoint, find_model
from .config import Config
from .errors import ClosedError
from .generate import Request, check_tokens

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ._kernels import Logits


class SerialGPT2:
    """GPT-2 as the serial program runs it: one thread, scalar, no cache, the whole network again for every token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config: Config = checkpoint.config
        self._checkpoint = checkpoint
        self._reference: Reference | None = Reference(
            checkpoint.values, self.config, padded=checkpoint.version != 1, bf16=checkpoint.bf16
        )

    @classmethod
    def load(cls, path: "str | os.PathLike[str] | None" = None) -> "SerialGPT2":
        """Open a checkpoint, found as GPT2.load() finds it."""
        return cls(Checkpoint(find_model(path)[0]))

    def logits(self, tokens: Sequence[int]) -> "npt.NDArray[np.float32]":
        """The logits of every position of a sequence, (T, V)."""
        import numpy as np

        return np.asarray(self._forward(check_tokens(self.config, tokens)))

    def generate(
        self,
        tokens: Iterable[int],
        *,
        total: int | None = None,
        max_new_tokens: int | None = None,
        sampler: str = "median",
    ) -> Iterator[int]:
        """Complete a sequence of token ids, as GPT2.generate() does."""
        return self.complete(Request(self.config, tokens, total=total, max_new_tokens=max_new_tokens, sampler=sampler))

    def complete(self, request: Request) -> Iterator[int]:
        """Answer a checked request, as GPT2.complete() does."""
        sequence: list[int] = []

        def append(new: list[int]) -> "Logits":
            sequence.extend(new)
            return self._forward(sequence)

        return request.run(append)

    def _forward(self, tokens: Sequence[int]) -> "Logits":
        if self._reference is None:
            raise ClosedError("the model is closed")
        return self._reference.forward(tokens)[0]

    def close(self) -> None:
        """Unmap the file. May be called twice."""
        self._reference = None
        self._checkpoint.close()

    def __enter__(self) -> "SerialGPT2":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
