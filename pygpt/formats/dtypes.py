"""The weight formats, one row for each: how numbers are stored, and how they are converted from and to float32.

The kernels have another table (csrc/micro.h), with the same names. If a format is missing there, a model computes with its
values as float32. docs/add-a-weight-format.md explains how to add a format.

Quantised rows are blocks of neighbours in one row of a matrix, as GGUF stores them. The kernels read the same numbers in
panels (panels.py), and they alone quantise (csrc/quantise.h). Source of the blocks: ggml, ggml-common.h and ggml-quants.c.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, Any

    import numpy as np
    import numpy.typing as npt

    DType = str | list[Any]
    Map = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

PIECE = 1 << 18  # values that are converted at a time


class Format:
    """One weight format. A block of `block_values` neighbours in a row takes `block_bytes` bytes.

    dtype: NumPy's dtype of one block. to_float32: (..., blocks) -> (..., values), exact; float32 itself is not copied.
    from_float32: the inverse, rounded; None for blocks, which the kernels make or pygpt only reads."""

    def __init__(
        self,
        name: str,
        dtype: "DType",
        block_values: int,
        block_bytes: int,
        to_float32: "Map",
        from_float32: "Map | None",
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
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


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


def _from_blocks(scale: "npt.NDArray[np.float32]", numbers: "npt.NDArray[np.int8]") -> "npt.NDArray[np.float32]":
    """Return scale * number: (..., blocks), (..., blocks, n) -> (..., blocks * n). Exact if the scale is a float16."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # an infinite scale gives NaNs
        values: npt.NDArray[np.float32] = scale[..., None] * numbers.astype("<f4")
    return values.reshape(*numbers.shape[:-2], numbers.shape[-2] * numbers.shape[-1])


def _from_q4_0(blocks: "npt.NDArray[Any]") -> "npt.NDArray[np.float32]":
    return _from_blocks(blocks["d"].astype("<f4"), nibbles(blocks["q"]).view("i1") - 8)


def nibbles(packed: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.uint8]":
    """Unpack half-bytes: all low halves of the last axis, then all high halves, (..., n) -> (..., 2n)."""
    import numpy as np

    return np.concatenate([packed & 15, packed >> 4], axis=-1)


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
    values = _from_blocks(scales, q.reshape(-1, 16, 16).view("i1") - 32)
    return values.reshape(*shape[:-1], -1)


FLOAT32 = Format("float32", "<f4", 1, 4, lambda array: array, lambda array: array)
BFLOAT16 = Format("bfloat16", "<u2", 1, 2, _from_bfloat16, _to_bfloat16)
FLOAT16 = Format("float16", "<f2", 1, 2, lambda array: array.astype("<f4"), _to_float16)
Q8_0 = Format("q8_0", [("d", "<f2"), ("q", "i1", 32)], 32, 34, lambda b: _from_blocks(b["d"].astype("<f4"), b["q"]), None)
Q4_0 = Format("q4_0", [("d", "<f2"), ("q", "u1", 16)], 32, 18, _from_q4_0, None)  # low nibbles: inputs 0..15
Q6_K = Format("q6_k", [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")], 256, 210, _from_q6_k, None)
FORMATS = {row.name: row for row in (FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0, Q6_K)}
