"""What every open model file gives: its dimensions, and its tensors, each in its own weight format.

Refuses to know about any layout of a file: a reader says where a row of a tensor lies, and this module does the rest.
"""

from collections.abc import Iterable, Iterator

from ..config import Config
from ..errors import CheckpointError, Closing, InputError
from . import dtypes
from .dtypes import FLOAT32, FORMATS, Format

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    from .files import MappedFile
    from .safetensors import SafetensorsFile

    Shape = tuple[int, ...]
    Blocks = npt.NDArray[Any]  # (rows, blocks): a part of a matrix in its format, row-major

ROWS = 16  # parts of a tensor begin at multiples of it, because panels hold 16 rows
EMBEDDINGS = ("wte", "wpe", "head")  # matrices of one layer


def layout(config: Config, name: str) -> tuple[int, int, int]:
    """Return (layers, rows, columns) of one of the tensors. A vector is one row; wte, wpe and a head have one layer."""
    for (found, shape, _, _), (_, symbols) in zip(config.tensors(padded=False), config.table, strict=True):
        if found == name:
            layers, rest = (shape[0], shape[1:]) if symbols[0] == "L" else (1, shape)
            return layers, (rest[0] if len(rest) == 2 else 1), rest[-1]
    raise InputError(f"no tensor is named {name!r}")


def common_format(kinds: Iterable[Format]) -> Format:
    """Return the format that all layers of a tensor have, or float32 if they differ."""
    found = {kind.name for kind in kinds}
    return FORMATS[found.pop()] if len(found) == 1 else FLOAT32


class ModelFile(Closing):
    """An open model. Close it, or use `with`; arrays and views of it stay valid.

    `config` has the dimensions, and `formats` the format of each tensor. `path` names the file or folder."""

    path: str
    config: Config
    formats: dict[str, Format]
    _file: "MappedFile | SafetensorsFile"

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a GPT-2 model: {what}")

    def _check_tensors(
        self, wanted: "Mapping[str, Mapping[str, Shape]]", found: "Mapping[str, Shape]", what: str = "shape"
    ) -> None:
        """Compare the tensors of a file with those wanted, by our names and by theirs. Raises CheckpointError."""
        names = {name: shape for theirs in wanted.values() for name, shape in theirs.items()}
        for name, shape in names.items():
            if name not in found:
                raise self._bad(f"tensor {name} is missing")
            if found[name] != shape:
                raise self._bad(f"tensor {name} has {what} {found[name]}, expected {shape} for {self.config}")
        if unknown := sorted(found.keys() - names.keys()):
            raise self._bad(f"tensor {unknown[0][:80]!r} is unknown in a model with {self.config}")

    @property
    def format(self) -> Format:
        """The format of the layers' matrices."""
        return self.formats["qkvw"]

    @property
    def has_vocabulary(self) -> bool:
        """Whether the file itself has the model's vocabulary."""
        return False

    @property
    def size(self) -> int:
        """The size of all its files in bytes."""
        return self._file.size

    def part(self, name: str, layer: int, start: int, stop: int) -> "tuple[Format, Blocks]":
        """Return rows [start, stop) of one layer's part of a tensor, as stored. start is a multiple of 16.

        A vector is one row. Returns the format and the blocks (rows, blocks of a row). Raises ClosedError."""
        import numpy as np

        _, N, K = layout(self.config, name)
        kind, first = self.formats[name], layer * N
        rows = self._bytes(name, kind.size((first + start) * K), kind.size((first + stop) * K))
        return kind, np.frombuffer(rows, kind.dtype).reshape(-1, K)

    def parts(self, name: str) -> "Iterator[tuple[Format, Blocks]]":
        """Yield the parts of a tensor in order, some rows at a time, so that the model may be larger than memory."""
        layers, N, K = layout(self.config, name)
        step = max(1, dtypes.PIECE // (ROWS * K)) * ROWS
        for layer in range(layers):
            for start in range(0, N, step):
                yield self.part(name, layer, start, min(start + step, N))

    def pieces(self, name: str) -> "Iterator[npt.NDArray[np.float32]]":
        """Yield a tensor as float32 in order: some rows of an embedding at a time, else one layer (1, ...) at a time."""
        import numpy as np

        layers, N, K = layout(self.config, name)
        if name in EMBEDDINGS:
            for kind, blocks in self.parts(name):
                yield kind.to_float32(blocks)[:, :K]
            return
        shape = next(shape for found, shape, _, _ in self.config.tensors(padded=False) if found == name)
        for layer in range(layers):
            kind, blocks = self.part(name, layer, 0, N)
            values = np.ascontiguousarray(kind.to_float32(blocks)[:, :K])
            yield values.reshape(-1) if len(shape) == 1 else values.reshape(1, *shape[1:])

    def stored(self) -> "dict[str, tuple[str, memoryview]]":
        """Map each tensor to (name of its format, bytes in the layout of Weights).

        If the kernels do not read the format of a tensor, its values become float32."""
        from .._kernels import weight_formats

        known = weight_formats()
        return {
            name: self._stored(name) if self.formats[name].name in known else (FLOAT32.name, self._widened(name))
            for name, _ in self.config.table
        }

    def _stored(self, name: str) -> tuple[str, memoryview]:
        """Return one tensor in its own format, in the layout of Weights."""
        raise NotImplementedError

    def _bytes(self, name: str, first: int, last: int) -> memoryview:
        """Return bytes [first, last) of one tensor in its own format."""
        return self._stored(name)[1][first:last]

    def _widened(self, name: str) -> memoryview:
        """Return the bytes of one tensor as float32, in new memory."""
        import numpy as np

        from .._kernels import Floats

        layers, N, K = layout(self.config, name)
        out = memoryview(Floats(1, layers * N * K, dense=True)).cast("B")
        flat, done = np.frombuffer(out, "<f4"), 0
        for piece in self.pieces(name):
            flat[done : done + piece.size] = np.ravel(piece)
            done += piece.size
        return out

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()
