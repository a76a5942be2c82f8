"""Quantise in NumPy, and lay blocks out in panels: a second opinion on what the kernels do.

Each step of quantising is one rounded float32 operation in a fixed order, so the bits are the same on every machine.
Source of the blocks: ggml, ggml-common.h and ggml-quants.c."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pygpt.formats.dtypes import Q4_0, Q8_0, Format, nibbles
from pygpt.formats.panels import PANEL

Q4_0_EXTREMES = tuple(-9 + i / 4 for i in range(9))  # candidates for the number of the extreme value
SEARCHED = 1 << 11  # blocks searched at a time, to fit the second-level cache


def quantise(kind: Format, array: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Quantise to q8_0 or q4_0."""
    return (to_q8_0 if kind == Q8_0 else to_q4_0)(array)


def to_q8_0(array: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Quantise to q8_0: d = max|w| / 127, rounded up to a float16, and q = w / d, rounded to the nearest even.

    Rounding up keeps |q| <= 127. A block with a NaN or infinity, or with d beyond float16, is read as NaNs."""
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


def to_q4_0(array: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Quantise to q4_0. Of the scales that Q4_0_EXTREMES give, use the one with the least error.

    The error is the sum of |w| (w - d q)^2. Large weights count more, which lowers the divergence of the model's predictions.
    Let e be the first value of the largest magnitude. A candidate x maps e to x: q = w (x / e), rounded to the nearest even and
    clipped to -8..7. Then d = a / b, with a = sum(|w| w q) and b = sum(|w| (q q)), rounded to a float16. The score is the error
    that d saves, d (2a - d b). The first candidate with the best score above 0 wins. Then q = w / d, rounded and clipped, plus
    8. Sums fold 16+16, 8+8, 4+4, 2+2, 1+1. A block with a NaN or infinity, or with d beyond float16, is read as NaNs."""
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


def _best_scale(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Search the scales of blocks (32, n), as to_q4_0() explains. Return them, (n,)."""
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


def _fold(terms: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sum 32 terms, (32, n) -> (n,), in the order 16+16, 8+8, 4+4, 2+2, 1+1."""
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    total: npt.NDArray[np.float32] = terms[0]
    return total


def to_panels(kind: Format, blocks: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Convert blocks (N, K/32) to panels. Return the bytes of the values, and of the scales without padding."""
    N, groups = blocks.shape
    if N % PANEL:
        padding = np.zeros((PANEL - N % PANEL, groups), kind.dtype)
        padding["q"] = 0 if kind == Q8_0 else 0x88
        blocks = np.concatenate([blocks, padding])
    scales = np.ascontiguousarray(blocks["d"].reshape(-1, PANEL, groups).swapaxes(1, 2))
    if kind == Q8_0:
        words = blocks["q"].reshape(-1, PANEL, groups * 8, 4)  # [panel][output][four inputs][input]
    else:
        halves = nibbles(blocks["q"]).reshape(-1, PANEL, groups * 4, 2, 4)  # [panel][output][eight inputs][half][input]
        words = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    values = np.ascontiguousarray(words.swapaxes(1, 2))
    return values.reshape(-1).view("u1"), scales.reshape(-1).view("u1")
