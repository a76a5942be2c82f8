"""SerialGPT2: the serial reference behind the same interface as GPT2, for comparison in the command, tests and benchmarks."""

import os
from collections.abc import Sequence

from ._reference import Reference
from .checkpoint import Checkpoint, find_model
from .errors import ClosedError, InputError
from .generate import Completer, Completion, check_tokens

TYPE_CHECKING = False
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ._kernels import Logits
    from .prefix import PrefixCache


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

        return np.asarray(self._run(check_tokens(self.config, tokens)))

    def _forward(self, live: list[Completion]) -> "list[tuple[Logits, int]]":
        windows = [completion.window() for completion in live]
        return [(self._run(window), len(window) - 1) for window in windows]

    def new_prefix_cache(self) -> None:
        """None: the serial program runs everything again for every token."""
        return

    def _check_prefix(self, prefix: "PrefixCache") -> None:
        raise InputError("the serial reference runs everything again for every token: it takes no cache")

    def _run(self, tokens: Sequence[int]) -> "Logits":
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
