"""One training step on several ranks, with bits that do not depend on their number.

A rank is a process with a whole model and its own workers. A step has S parts, groups of micro-batches whose gradients are
summed from zero. A fixed binary tree over the parts' numbers adds them: the left half of [a, b) has the largest power of two of
parts below b - a. MPI only moves data, because the order of a library's own reductions depends on the number of ranks.

The ranks share the optimizer as in ZeRO-1 (Rajbhandari et al. 2020): each rank owns a slice of whole norm blocks. It receives
the sums of all ranks for its slice, adds them by the tree, and updates its weights and moments. Then it sends the weights to
all. One rank is the same program without messages. Refuses to know about data, files and options."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, InputError, PyGPTError
from .parameters import NORM_BLOCK, norm_of
from .trainable import SerialTrainableGPT2, TrainableGPT2

Array = npt.NDArray[np.float32]
Messages = Sequence[tuple[Array, int]]  # flat arrays, each with the rank to send it to or to receive it from
T = TypeVar("T")
TIMEOUT_S = 600.0
PIECE = 1 << 20  # the most values in a message: 4 MB
INBOX = 1 << 24  # values of all messages that a rank receives at a time
Node = tuple[int, int]  # a subtree: the parts [start, stop)


class Ranks:
    """The ranks of a training run: `size` processes of which this one is number `rank`.

    `seconds`: the time that this rank has spent on messages. `agreed`: whether an exception that is raised now is raised by all
    ranks. `version`: of mpi4py, or "". Use it in a `with` block: if an exception of one rank ends the block, all ranks end."""

    size, rank = 1, 0
    seconds = 0.0
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
        self.agreed = True
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
        errors = self.gather(
            None if own is None else (isinstance(own, InputError | CheckpointError), str(own) or "out of memory")
        )
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
                    both = f"{self.name(rank)} has {name} {other[name]!s:.80}, {self.name(0)} has {value!s:.80}"
                    raise self.common(InputError(f"{both}: make them equal"))

    def name(self, rank: int) -> str:
        """Return a rank's number and host for messages."""
        return f"rank {rank}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass


def middle(start: int, stop: int) -> int:
    """Return where the tree divides the parts [start, stop): after the largest power of two of parts below their number."""
    return start + (1 << (stop - start - 1).bit_length() - 1)


def subtrees(first: int, last: int, parts: int) -> list[Node]:
    """Return the largest whole subtrees of the tree over `parts` parts that make up [first, last), in order."""

    def walk(start: int, stop: int) -> list[Node]:
        if first <= start and stop <= last:
            return [(start, stop)]
        if stop <= first or last <= start:
            return []
        half = middle(start, stop)
        return walk(start, half) + walk(half, stop)

    return walk(0, parts)


def slices_of(size: int, ranks: int) -> list[slice]:
    """Return each rank's slice of `size` values: whole norm blocks, as equal as possible, possibly empty."""
    blocks = -(-size // NORM_BLOCK)
    edges = [min(size, blocks * rank // ranks * NORM_BLOCK) for rank in range(ranks + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


class SharedStep:
    """Sum an engine's gradients over the parts of a step and over the ranks, and share the updated weights. `mine`: this rank's
    parts. `own`: its slice of the flat arrays. Raises InputError if the number of ranks does not divide `parts`."""

    def __init__(self, engine: TrainableGPT2 | SerialTrainableGPT2, ranks: Ranks, parts: int) -> None:
        if parts % ranks.size:
            text = f"parts (--parts) is {parts}: {ranks.size} ranks must divide it; give a multiple, or start fewer"
            raise ranks.common(InputError(text))
        if ranks.size > 1 and not isinstance(engine, TrainableGPT2):
            raise ranks.common(InputError("the serial reference trains on one rank: leave out --reference, or start one rank"))
        self.engine, self.ranks, self.parts = engine, ranks, parts
        per = parts // ranks.size
        self.mine = range(per * ranks.rank, per * (ranks.rank + 1))
        self.slices = slices_of(engine.gradients.size, ranks.size)
        self.own = self.slices[ranks.rank]
        self._theirs = [subtrees(per * i, per * (i + 1), parts) for i in range(ranks.size)]
        self._step = min(PIECE, max(1 << 14, INBOX // sum(map(len, self._theirs))))  # values in a message
        self._messages: int = -(-max(part.stop - part.start for part in self.slices) // self._step)  # of the longest slice
        self._sums: list[tuple[Node, Array]] = []  # of the latest parts, the largest whole subtrees
        self._spare: list[Array] = []
        # The memory for piece k of a subtree, by k % 2 and the subtree: two pieces are under way at a time.
        self._inbox: dict[tuple[int, Node], Array] = defaultdict(lambda: np.empty(self._step, np.float32))

    def add(self, part: int) -> None:
        """Take the gradients of one of this rank's parts, in order, and add whole subtrees. The engine holds the last sum."""
        if part == self.mine.start:
            self._sums = []  # an interrupted step may have left some
        whole = subtrees(self.mine.start, part + 1, self.parts)
        gradients = self.engine.gradients
        while len(self._sums) >= len(whole):
            _, left = self._sums.pop()
            self.engine.add_to(gradients, left)  # the sum of two floats has the same bits in both orders
            self._spare.append(left)
        if part + 1 < self.mine.stop:
            kept = self._spare.pop() if self._spare else gradients.copy()
            kept[:] = gradients
            gradients = kept
        self._sums.append((whole[-1], gradients))

    def reduce(self) -> None:
        """Sum all ranks' gradients of this rank's slice in the engine. All its other gradients become undefined."""
        sums, self._sums = self._sums, []
        size, rank = self.ranks.size, self.ranks.rank
        self._spare += [array for _, array in sums[:-1]]
        count = self._messages if size > 1 else 0
        begun = self._begin(0, sums) if count else None
        for k in range(count):
            self.ranks.finish(begun)
            if k + 1 < count:
                begun = self._begin(k + 1, sums)
            mine = self._piece(rank, k)
            if mine.start < mine.stop:
                have = {node: array[mine] for node, array in sums}
                for node in chain(*self._theirs[:rank], *self._theirs[rank + 1 :]):
                    have[node] = self._inbox[k % 2, node][: mine.stop - mine.start]
                tree_sum(have, 0, self.parts, out=self.engine.gradients[mine])

    def _piece(self, rank: int, k: int) -> slice:
        first, last = self.slices[rank].start, self.slices[rank].stop
        return slice(min(first + k * self._step, last), min(first + (k + 1) * self._step, last))

    def _begin(self, k: int, sums: list[tuple[Node, Array]]) -> object:
        """Begin to exchange piece k of every slice. The nearest ranks come first, so that the ranks begin apart."""
        sends, receives, ranks = [], [], self.ranks
        mine = self._piece(ranks.rank, k)
        for distance in range(1, ranks.size):
            source, target = (ranks.rank - distance) % ranks.size, (ranks.rank + distance) % ranks.size
            if mine.start < mine.stop:
                receives += [(self._inbox[k % 2, node][: mine.stop - mine.start], source) for node in self._theirs[source]]
            piece = self._piece(target, k)
            if piece.start < piece.stop:
                sends += [(array[piece], target) for _, array in sums]
        return ranks.begin(sends, receives)

    def norm(self) -> float:
        """Return the 2-norm of the summed gradients: the squares of blocks are gathered, and added in the blocks' order."""
        if self.ranks.size == 1 or not isinstance(self.engine, TrainableGPT2):
            return self.engine.gradient_norm()
        return norm_of(np.concatenate(self.ranks.gather(self.engine.gradient_squares(self.own.start, self.own.stop))))

    def share(self) -> None:
        """Send this rank's slice of the weights to all ranks, and receive theirs, in pieces."""
        weights, ranks = self.engine.parameters, self.ranks
        others = [(ranks.rank + distance) % ranks.size for distance in range(1, ranks.size)]
        for k in range(self._messages if others else 0):
            pieces = [weights[self._piece(rank, k)] for rank in range(ranks.size)]
            sends = [(pieces[ranks.rank], rank) for rank in others if pieces[ranks.rank].size]
            ranks.finish(ranks.begin(sends, [(pieces[rank], rank) for rank in reversed(others) if pieces[rank].size]))

    def pieces(self, array: Array) -> Iterator[Array]:
        """On the first rank, yield an array whose slices lie on their owners, in pieces. The other ranks only send theirs."""
        rank = self.ranks.rank
        for owner, part in enumerate(self.slices):
            for start in range(part.start, part.stop, PIECE):
                piece = array[start : min(start + PIECE, part.stop)]
                if rank == 0 and owner:
                    piece = np.empty(piece.size, np.float32)
                    self.ranks.finish(self.ranks.begin([], [(piece, owner)]))
                elif rank == owner and owner:
                    self.ranks.finish(self.ranks.begin([(piece, 0)], []))
                if rank == 0:
                    yield piece


def tree_sum(have: dict[Node, Array], start: int, stop: int, out: Array | None = None) -> Array:
    """Return the tree's sum of the parts [start, stop), in `out` if given. The arrays of subtrees are overwritten."""
    if (start, stop) in have:
        return have[start, stop]
    half = middle(start, stop)
    left, right = tree_sum(have, start, half), tree_sum(have, half, stop)
    return np.add(left, right, out=left if out is None else out)
