"""The weight formats, one row for each, and what every open model file gives: its tensors, each in its own format.

The kernels have another table (csrc/micro.h), with the same names. If a format is missing there, a model computes with its
values as float32. docs/add-a-weight-format.md explains how to add a format.

Quantised rows are blocks of neighbours in one row of a matrix, as GGUF stores them. The kernels read the same numbers in
panels (panels.py), and they alone quantise (csrc/quantise.h). Source of the blocks: ggml, ggml-common.h and ggml-quants.c."""

from collections.abc import Iterable

from ..config import Config
from ..errors import TYPE_CHECKING, CheckpointError, Closing, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import IO, Any

    import numpy as np
    import numpy.typing as npt

    from .files import MappedFile

    DType = str | list[Any]
    Map = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    Shapes = Mapping[str, tuple[int, ...]]
    Blocks = npt.NDArray[Any]  # (rows, blocks): a part of a matrix in its format, row-major

PIECE = 1 << 18  # values that are converted at a time
ROWS = 16  # parts of a tensor begin at multiples of it, because panels hold 16 rows
EMBEDDINGS = ("wte", "wpe", "head")  # matrices of one layer


class Format:
    """One weight format. A block of `block_values` neighbours in a row takes `block_bytes` bytes.

    dtype: NumPy's dtype of one block. to_float32: (..., blocks) -> (..., values), exact; float32 itself is not copied.
    from_float32: the inverse, rounded; None for blocks, which the kernels make or pygpt only reads."""

    def __init__(
        self, name: str, dtype: "DType", block_values: int, block_bytes: int, to_float32: "Map", from_float32: "Map | None"
    ) -> None:
        self.name, self.dtype = name, dtype
        self.block_values, self.block_bytes = block_values, block_bytes
        self.to_float32, self.from_float32 = to_float32, from_float32

    def size(self, values: int) -> int:
        """Return the bytes of a row with this number of values, in whole blocks."""
        return self.blocks(values) * self.block_bytes

    def blocks(self, values: int) -> int:
        """Return the blocks of a row with this number of values. The last block may be partly used."""
        return -(-values // self.block_values)

    def values(self, data: memoryview) -> "npt.NDArray[np.float32]":
        """Return stored bytes as flat float32: a view of float32, a copy of other formats."""
        import numpy as np

        return self.to_float32(np.frombuffer(data, self.dtype))

    def write(self, file: "IO[bytes]", array: "npt.NDArray[np.float32]") -> None:
        """Write contiguous float32 values in this format, some at a time."""
        assert self.from_float32 is not None
        values = array.reshape(-1)
        for start in range(0, values.size, PIECE):
            file.write(self.from_float32(values[start : start + PIECE]).data)


def _from_bfloat16(bits: "npt.NDArray[np.uint16]") -> "npt.NDArray[np.float32]":
    """Map bits of bfloat16, the upper half of a float32, to float32. This is exact, and keeps the bits of a NaN."""
    return (bits.astype("<u4") << 16).view("<f4")


def _to_bfloat16(array: "npt.NDArray[np.float32]") -> "npt.NDArray[np.uint16]":
    """Round float32 to the bits of bfloat16, nearest even. A NaN stays a NaN; rounding could make it infinity."""
    import numpy as np

    bits = array.view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(array), (bits >> 16).astype("<u2") | np.uint16(0x40), rounded)


def _to_float16(array: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float16]":
    """Round float32 to float16, nearest even. Values beyond 65504 become infinity."""
    import numpy as np

    with np.errstate(over="ignore"):
        return array.astype("<f2")


def _from_blocks(scale: "npt.NDArray[Any]", numbers: "npt.NDArray[np.int8]") -> "npt.NDArray[np.float32]":
    """Return scale * number: (..., blocks), (..., blocks, n) -> (..., blocks * n). Exact if the scale is a float16."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # an infinite scale gives NaNs
        values: npt.NDArray[np.float32] = scale.astype("<f4")[..., None] * numbers.astype("<f4")
    return values.reshape(*numbers.shape[:-2], numbers.shape[-2] * numbers.shape[-1])


def nibbles(packed: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.int8]":
    """Unpack half-bytes: all low halves of the last axis, then all high halves, (..., n) -> (..., 2n)."""
    import numpy as np

    return np.concatenate([packed & 15, packed >> 4], axis=-1).view("i1")


def _from_q6_k(blocks: "npt.NDArray[Any]") -> "npt.NDArray[np.float32]":
    """Map ggml's Q6_K to float32: 16 groups of 16 six-bit numbers q, an int8 scale a group. (d * scale) * q, as in ggml."""
    import numpy as np

    shape = blocks.shape
    blocks = blocks.reshape(-1)
    low = blocks["ql"].reshape(-1, 2, 2, 32)  # [block][half][pair][l]
    high = blocks["qh"].reshape(-1, 2, 32)
    quarters = [low[:, :, 0] & 15, low[:, :, 1] & 15, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
    q = np.stack(quarters, axis=2)  # [block][half][quarter][l]
    for quarter in range(4):
        q[:, :, quarter] |= (high >> (2 * quarter) & 3) << 4
    with np.errstate(invalid="ignore"):
        scales = blocks["d"].astype("<f4")[:, None] * blocks["scales"].astype("<f4")
    return _from_blocks(scales, q.reshape(-1, 16, 16).view("i1") - 32).reshape(*shape[:-1], -1)


FLOAT32 = Format("float32", "<f4", 1, 4, lambda array: array, lambda array: array)
BFLOAT16 = Format("bfloat16", "<u2", 1, 2, _from_bfloat16, _to_bfloat16)
FLOAT16 = Format("float16", "<f2", 1, 2, lambda array: array.astype("<f4"), _to_float16)
Q8_0 = Format("q8_0", [("d", "<f2"), ("q", "i1", 32)], 32, 34, lambda b: _from_blocks(b["d"], b["q"]), None)
Q4_0 = Format("q4_0", [("d", "<f2"), ("q", "u1", 16)], 32, 18, lambda b: _from_blocks(b["d"], nibbles(b["q"]) - 8), None)
Q6_K = Format("q6_k", [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")], 256, 210, _from_q6_k, None)
FORMATS = {row.name: row for row in (FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0, Q6_K)}


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
    _file: "MappedFile"

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a GPT-2 model: {what}")

    def _check_tensors(self, wanted: "Mapping[str, Shapes]", found: "Shapes", what: str = "shape") -> None:
        """Compare the tensors of a file with those wanted, by our names and by theirs. Raises CheckpointError."""
        names = {name: shape for theirs in wanted.values() for name, shape in theirs.items()}
        for name, shape in names.items():
            if name not in found:
                raise self._bad(f"tensor {name} is missing")
            if found[name] != shape:
                raise self._bad(f"tensor {name} has {what} {found[name]}, expected {shape} for {self.config}")
        if unknown := sorted(found.keys() - names.keys()):
            raise self._bad(f"tensor {unknown[0][:80]!r} is unknown in a model with {self.config}: save a GPT2LMHeadModel")

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
        step = max(1, PIECE // (ROWS * K)) * ROWS
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
