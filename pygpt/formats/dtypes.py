"""The weight formats, one row for each: how numbers are stored, and how they are converted from and to float32.

The kernels have another table (csrc/micro.h), with the same names. If a format is missing there, a model computes with its
values as float32. docs/add-a-weight-format.md explains how to add a format.

Quantised rows are blocks of neighbours in one row of a matrix, as GGUF stores them. The kernels read the same numbers in
panels (panels.py). Each step of quantising is one rounded float32 operation in a fixed order, so the bits are the same on
every machine. Source of the blocks: ggml, ggml-common.h and ggml-quants.c.
"""

from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

    import numpy as np
    import numpy.typing as npt

PIECE = 1 << 18  # values that are converted at a time


class Format:
    """One weight format. A block of `block_values` neighbours in a row takes `block_bytes` bytes.

    dtype: NumPy's dtype of one block. to_float32: (..., blocks) -> (..., values), exact; float32 itself is not copied.
    from_float32: the inverse, rounded; None if pygpt only reads the format."""

    def __init__(
        self,
        name: str,
        dtype: "str | list[Any]",
        block_values: int,
        block_bytes: int,
        to_float32: "Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]",
        from_float32: "Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]] | None",
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
    """Convert bits of bfloat16, the upper half of a float32, to float32. This is exact, and keeps the bits of a NaN."""
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


def _to_q8_0(array: "npt.NDArray[np.float32]") -> "npt.NDArray[Any]":
    """Quantise to q8_0: d = max|w| / 127, rounded up to a float16, and q = w / d, rounded to the nearest even.

    Rounding up keeps |q| <= 127. A block with a NaN or infinity, or with d beyond float16, is read as NaNs."""
    import numpy as np

    values = array.reshape(-1, 32)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        wanted = np.abs(values).max(axis=1) / np.float32(127)
        d = wanted.astype("<f2")
        d = np.where(d.astype("<f4") < wanted, np.nextafter(d, np.float16(np.inf)), d)
        d[np.isinf(d)] = np.nan
        q = np.rint(values / d.astype("<f4")[:, None])
    q[~np.isfinite(q)] = 0
    blocks = np.empty(len(values), Q8_0.dtype)
    blocks["d"], blocks["q"] = d, q
    return blocks.reshape(*array.shape[:-1], -1)


def _from_q4_0(blocks: "npt.NDArray[Any]") -> "npt.NDArray[np.float32]":
    return _from_blocks(blocks["d"].astype("<f4"), nibbles(blocks["q"]).view("i1") - 8)


def nibbles(packed: "npt.NDArray[np.uint8]") -> "npt.NDArray[np.uint8]":
    """Unpack half-bytes: all low halves of the last axis, then all high halves, (..., n) -> (..., 2n)."""
    import numpy as np

    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _to_q4_0(array: "npt.NDArray[np.float32]") -> "npt.NDArray[Any]":
    """Quantise to q4_0. Of the scales that Q4_0_EXTREMES give, use the one with the least error.

    The error is the sum of |w| (w - d q)^2. Large weights count more, which lowers the divergence of the model's predictions.
    Let e be the first value of the largest magnitude. A candidate x maps e to x: q = w (x / e), rounded to the nearest even and
    clipped to -8..7. Then d = a / b, with a = sum(|w| w q) and b = sum(|w| (q q)), rounded to a float16. The score is the error
    that d saves, d (2a - d b). The first candidate with the best score above 0 wins. Then q = w / d, rounded and clipped, plus
    8. Sums fold 16+16, 8+8, 4+4, 2+2, 1+1. A block with a NaN or infinity, or with d beyond float16, is read as NaNs."""
    import numpy as np

    blocks = np.empty(array.size // 32, Q4_0.dtype)
    for start in range(0, len(blocks), SEARCHED):
        values = np.ascontiguousarray(array.reshape(-1, 32)[start : start + SEARCHED].T)  # (32, n): whole vectors of blocks
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            d = _best_scale(values)
            q = np.rint(values / d.astype("<f4"))
        q[~np.isfinite(q)] = 0
        levels = (np.clip(q, -8, 7) + 8).astype("u1")
        part = blocks[start : start + SEARCHED]
        part["d"], part["q"] = d, (levels[:16] | levels[16:] << 4).T
    return blocks.reshape(*array.shape[:-1], -1)


def _best_scale(values: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float16]":
    """Search the scales of blocks (32, n), as _to_q4_0() explains. Return them, (n,)."""
    import numpy as np

    extreme = np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
    weight = np.abs(values)
    weighted = weight * values
    best, best_score = np.zeros(values.shape[1], "<f2"), np.zeros(values.shape[1], "<f4")
    for level in Q4_0_EXTREMES:
        q = np.clip(np.rint(values * (np.float32(level) / extreme)), -8, 7)
        wq, qq = _fold(weighted * q), _fold(weight * (q * q))
        d = (wq / qq).astype("<f2")
        wide = d.astype("<f4")
        score = wide * (2 * wq - wide * qq)
        better = score > best_score
        best, best_score = np.where(better, d, best), np.where(better, score, best_score)
    best[~np.isfinite(extreme) | ((best == 0) & (np.abs(extreme) > 1))] = np.nan  # all candidates are infinite or NaN
    return best


def _fold(terms: "npt.NDArray[np.float32]") -> "npt.NDArray[np.float32]":
    """Sum 32 terms, (32, n) -> (n,), in the order 16+16, 8+8, 4+4, 2+2, 1+1."""
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    total: npt.NDArray[np.float32] = terms[0]
    return total


def _from_q6_k(blocks: "npt.NDArray[Any]") -> "npt.NDArray[np.float32]":
    """Convert ggml's Q6_K to float32: 16 groups of 16 six-bit numbers q, an int8 scale a group. (d * scale) * q, as in ggml."""
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


Q4_0_EXTREMES = tuple(-9 + i / 4 for i in range(9))  # candidates for the number of the extreme value
SEARCHED = 1 << 11  # blocks searched at a time, to fit the second-level cache

FLOAT32 = Format("float32", "<f4", 1, 4, lambda array: array, lambda array: array)
BFLOAT16 = Format("bfloat16", "<u2", 1, 2, _from_bfloat16, _to_bfloat16)
FLOAT16 = Format("float16", "<f2", 1, 2, lambda array: array.astype("<f4"), _to_float16)
Q8_0 = Format("q8_0", [("d", "<f2"), ("q", "i1", 32)], 32, 34, lambda b: _from_blocks(b["d"].astype("<f4"), b["q"]), _to_q8_0)
Q4_0 = Format("q4_0", [("d", "<f2"), ("q", "u1", 16)], 32, 18, _from_q4_0, _to_q4_0)  # low nibbles: inputs 0..15
Q6_K = Format("q6_k", [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")], 256, 210, _from_q6_k, None)
FORMATS = {row.name: row for row in (FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0, Q6_K)}
