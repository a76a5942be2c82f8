"""SerialGPT2: the serial reference behind the same interface as GPT2, for comparison in the command, tests and benchmarks."""

import os
from collections.abc import Iterator, Sequence

from ._reference import Reference
from .checkpoint import Checkpoint, find_model
from .errors import ClosedError
from .generate import Completer, Request, check_tokens

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ._kernels import Logits


class SerialGPT2(Completer):
    """GPT-2 as the serial program runs it: one thread, scalar, no cache, the whole network again for every token."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
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
