"""The weight formats, one row each: how numbers are stored, and their conversion from and to float32.

Readers and writers of files use the rows of this table. The kernels have a table of their own (csrc/micro.h), whose rows have
the same names. A format without a row there can be read and converted, but a model cannot compute with it.
docs/add-a-weight-format.md says how to add a format.
"""

from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

    import numpy as np
    import numpy.typing as npt

PIECE = 1 << 18  # values: so many are widened or rounded at a time


class Format:
    """One weight format. A block of `block_values` neighbours in a row takes `block_bytes` bytes.

    dtype: NumPy's, of one block. to_float32: exact; float32 itself is not copied. from_float32: to the nearest; None if the
    format is only read.
    """

    __slots__ = ("block_bytes", "block_values", "dtype", "from_float32", "name", "to_float32")

    def __init__(
        self,
        name: str,
        dtype: str,
        block_values: int,
        block_bytes: int,
        to_float32: "Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]",
        from_float32: "Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]] | None",
    ) -> None:
        self.name, self.dtype = name, dtype
        self.block_values, self.block_bytes = block_values, block_bytes
        self.to_float32, self.from_float32 = to_float32, from_float32

    def __repr__(self) -> str:
        return f"Format({self.name})"

    def size(self, values: int) -> int:
        """Return the bytes of so many values, a multiple of block_values."""
        return values // self.block_values * self.block_bytes

    def values(self, data: memoryview) -> "npt.NDArray[np.float32]":
        """Return stored bytes as flat float32: a view of float32, a copy of anything else."""
        import numpy as np

        return self.to_float32(np.frombuffer(data, self.dtype))

    def write(self, file: "IO[bytes]", array: "npt.NDArray[np.float32]") -> None:
        """Write contiguous float32 values in this format, some at a time."""
        assert self.from_float32 is not None
        values = array.reshape(-1)
        for start in range(0, values.size, PIECE):
            file.write(self.from_float32(values[start : start + PIECE]).data)


def _as_it_is(array: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
    return array


def _from_bfloat16(bits: "npt.NDArray[np.uint16]") -> "npt.NDArray[np.float32]":
    """Widen the bits of bfloat16, the upper half of a float32: exact, a NaN's bits included."""
    wide = bits.astype("<u4")
    wide <<= 16
    return wide.view("<f4")


def _to_bfloat16(array: "npt.NDArray[np.float32]") -> "npt.NDArray[np.uint16]":
    """Round float32 to bfloat16, nearest even, as its bits; a NaN stays a NaN (rounding could carry it to infinity)."""
    import numpy as np

    bits = array.view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(array), (bits >> 16).astype("<u2") | np.uint16(0x40), rounded)


def _from_float16(array: "npt.NDArray[np.float16]") -> "npt.NDArray[np.float32]":
    return array.astype("<f4")


FLOAT32 = Format("float32", "<f4", 1, 4, _as_it_is, _as_it_is)
BFLOAT16 = Format("bfloat16", "<u2", 1, 2, _from_bfloat16, _to_bfloat16)
FLOAT16 = Format("float16", "<f2", 1, 2, _from_float16, None)
FORMATS = {row.name: row for row in (FLOAT32, BFLOAT16, FLOAT16)}
