"""Ranks: the processes that share a training run. This class is for one process, and does not import MPI.

mpi.py has the class for several. Both have the same methods, so that a step has one program.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ...errors import CheckpointError, InputError, PyGPTError

Array = npt.NDArray[np.float32]
Messages = Sequence[tuple[Array, int]]  # flat arrays, each with the rank to send it to or to receive it from
T = TypeVar("T")
TIMEOUT_S = 600.0


class Ranks:
    """The ranks of a training run: `size` processes of which this one is number `rank`.

    `seconds`: the time that this rank has spent on messages. `timeout`: seconds without any message after which a rank ends.
    `agreed`: whether an exception that is raised now is raised by all ranks. `version`: of mpi4py, or "".
    Use it in a `with` block: if an exception of one rank ends the block, all ranks end."""

    size, rank = 1, 0
    seconds = 0.0
    timeout = TIMEOUT_S
    agreed, version = True, ""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in their order. Every rank must call it."""
        return [value]

    def begin(self, sends: Messages, receives: Messages) -> Any:
        """Begin to send and receive arrays; return what finish() takes. Between two ranks, messages keep their order."""
        assert not sends
        assert not receives

    def finish(self, begun: Any) -> None:
        """Wait until all these messages have arrived."""

    def common(self, error: Exception) -> Exception:
        """Return an exception that every rank raises here, so that a `with` block can end without a message to the others."""
        return error

    def together(self, job: Callable[[], T], *, first: bool = False) -> T | None:
        """Run a job on every rank, or on the first only; return its result. If it fails on any rank, all raise its error."""
        found: T | None = None
        own: Exception | None = None
        if not first or self.rank == 0:
            try:
                found = job()
            except (PyGPTError, OSError, MemoryError) as error:
                own = error
        wrong = None if own is None else (isinstance(own, InputError | CheckpointError), str(own) or "out of memory")
        errors = self.gather(wrong)
        for rank, failed in enumerate(errors):
            if failed is not None:
                if own is not None and (self.size == 1 or len(set(errors)) == 1):
                    raise self.common(own)
                kind = InputError if failed[0] else PyGPTError
                raise self.common(kind(failed[1] if first else f"{self.name(rank)}: {failed[1]}"))
        return found

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise InputError on all ranks unless all have equal facts; the error names the rank, the fact and both values."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    names = self.name(rank), self.name(0)
                    text = f"{names[0]} has {name} {other[name]!s:.80}, {names[1]} has {value!s:.80}: make them equal"
                    raise self.common(InputError(text))

    def name(self, rank: int) -> str:
        """Return a rank's number and host for messages."""
        return f"rank {rank}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass
