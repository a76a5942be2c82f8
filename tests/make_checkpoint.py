#!/usr/bin/env python3
"""Write a GPT-2 checkpoint of any shape with seeded random weights, in llm.c's .bin format.

The weights are a pure function of (shape, seed, peak). So the same arguments give the same bytes on every machine. `peak`
multiplies the final LayerNorm's gain. This gives the next-token distribution peaks, as in a trained model, so one rounding
error does not decide the sampled token.

    python make_checkpoint.py --out gpt2_124M.bin                       # 124M shape, version 3
    python make_checkpoint.py --out tiny.bin -L 2 --NH 4 -C 64 -V 211 --maxT 48 --seed 7

Needs only NumPy. It imports nothing from pygpt, because it is a second opinion on the format.
Source: llm.c, train_gpt2.py (write_model)."""

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = 20240326
VERSIONS = (1, 3, 5)  # float32; float32 with padded rows; bfloat16 with padded rows
FLOAT32, BFLOAT16 = np.dtype("<f4"), np.dtype("<u2")

Float32 = npt.NDArray[np.float32]


def make(
    path: str | os.PathLike[str],
    *,
    L: int = 12,
    NH: int = 12,
    C: int = 768,
    V: int = 50257,
    maxT: int = 1024,
    version: int = 3,
    seed: int = 1,
    peak: float = 12.0,
) -> None:
    """Write one checkpoint to `path`. The defaults are GPT-2 124M. Raises ValueError if a shape or version is impossible."""
    if C % NH:
        raise ValueError(f"C is {C}: it must be a multiple of NH = {NH}")
    if version not in VERSIONS:
        raise ValueError(f"version is {version}: it must be one of {VERSIONS}")
    Vp = -(-V // 128) * 128
    header = np.zeros(256, "<i4")
    header[:7] = [MAGIC, version, maxT, V, L, NH, C]
    if version != 1:
        header[7] = Vp
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for name, tensor in tensors(L, C, V, maxT, seed, peak):
            if name == "wte" and version != 1:
                tensor = np.concatenate([tensor, np.zeros((Vp - V, C), FLOAT32)])  # [V, C] -> [Vp, C]
            file.write((to_bfloat16(tensor) if version == 5 else tensor).tobytes())


def tensors(L: int, C: int, V: int, maxT: int, seed: int, peak: float) -> Iterator[tuple[str, Float32]]:
    """Yield (name, float32 array) in file order, wte unpadded (V, C). The order matters: all draw from one random stream."""
    rng = np.random.default_rng(seed)

    def normal(std: float, *shape: int) -> Float32:
        return (std * rng.standard_normal(shape, dtype=np.float32)).astype(FLOAT32)

    def gain(*shape: int) -> Float32:
        return (1.0 + 0.1 * rng.standard_normal(shape, dtype=np.float32)).astype(FLOAT32)

    residual = 0.02 / (2 * L) ** 0.5  # a Python float, so that every NumPy computes in float32
    yield "wte", normal(0.02, V, C)
    yield "wpe", normal(0.02, maxT, C)
    yield "ln1w", gain(L, C)
    yield "ln1b", normal(0.02, L, C)
    yield "qkvw", normal(0.06, L, 3 * C, C)
    yield "qkvb", normal(0.02, L, 3 * C)
    yield "attprojw", normal(8 * residual, L, C, C)
    yield "attprojb", normal(0.02, L, C)
    yield "ln2w", gain(L, C)
    yield "ln2b", normal(0.02, L, C)
    yield "fcw", normal(0.06, L, 4 * C, C)
    yield "fcb", normal(0.02, L, 4 * C)
    yield "fcprojw", normal(8 * residual, L, C, 4 * C)
    yield "fcprojb", normal(0.02, L, C)
    yield "lnfw", (float(peak) * gain(C)).astype(FLOAT32)
    yield "lnfb", normal(0.02, C)


def to_bfloat16(array: Float32) -> npt.NDArray[np.uint16]:
    """Round finite float32 to bfloat16 (nearest even); return its uint16 bits."""
    bits = np.ascontiguousarray(array, FLOAT32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(BFLOAT16)


def parse(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return make()'s keywords for command-line words; `path` is None without --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", dest="path", metavar="FILE")
    parser.add_argument("--version", type=int, default=3, choices=VERSIONS)
    parser.add_argument("-L", type=int, default=12)
    parser.add_argument("--NH", type=int, default=12)
    parser.add_argument("-C", type=int, default=768)
    parser.add_argument("-V", type=int, default=50257)
    parser.add_argument("--maxT", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peak", type=float, default=12.0)
    return vars(parser.parse_args(arguments))


def main() -> None:
    """Run as a command."""
    arguments = parse()
    if arguments["path"] is None:
        raise SystemExit("make_checkpoint.py: --out FILE is required")
    try:
        make(**arguments)
    except ValueError as error:
        raise SystemExit(f"make_checkpoint.py: {error}") from None


if __name__ == "__main__":
    main()
