"""GPT-2 in float64 NumPy: the oracle for every number of pygpt.

The network itself is examples/gpt2_numpy.py: one sequence, no cache, no blocks. It shares no code with the kernels that it
judges. It uses only pygpt's reader of files, which has separate tests. This module reads weights in float64, names
the activations and completes sequences."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pygpt.config import TENSORS, Config
from pygpt.formats.checkpoint import Checkpoint

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import gpt2_numpy
from gpt2_numpy import Array, attention, encoder, layernorm, matmul, softmax

__all__ = ["Array", "attention", "encoder", "gelu", "gpt2_numpy", "layernorm", "matmul", "softmax"]

gelu = gpt2_numpy.ACTIVATIONS["gelu_new"]

Weights = Mapping[str, Array]
Sampler = Callable[[npt.NDArray[np.float32]], int]

# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weights(source: str | os.PathLike[str] | Checkpoint) -> dict[str, Array]:
    """Read the sixteen tensors of a checkpoint as read-only float64 arrays, wte with V rows. A path is read once."""
    path = os.path.abspath(source.path if isinstance(source, Checkpoint) else source)
    status = os.stat(path)
    return dict(_weights(path, status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _weights(path: str, inode: int, mtime_ns: int) -> Weights:
    """Read the weights of one file; inode and mtime_ns distinguish two files that had the same name."""
    with Checkpoint(path) as checkpoint:
        arrays = {name: checkpoint.tensor(name).astype(np.float64) for name, _ in TENSORS}
    for array in arrays.values():
        array.setflags(write=False)  # every caller gets the same arrays
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# The network


def forward(weights: Weights, config: Config, tokens: Sequence[int]) -> Array:
    """Return the logits of every position, float64 (T, V)."""
    return gpt2_numpy.forward(weights, config, tokens)[0]


def forward_activations(weights: Weights, config: Config, tokens: Sequence[int]) -> dict[str, Array]:
    """Run the network; return its activations by llm.c's names.

    encoded (T, C); ln1, atty, attproj, residual2, ln2, fcproj, residual3 (L, T, C); qkv (L, T, 3C); fch, fch_gelu (L, T, F);
    lnf (T, C); logits (T, V)."""
    logits, (encoded, *layers) = gpt2_numpy.forward(weights, config, tokens)
    stacked = {name: np.stack([acts[name] for acts in layers]) for name in layers[0]}  # L of [T, ...] -> [L, T, ...]
    lnf = layernorm(stacked["residual3"][-1], weights["lnfw"], weights["lnfb"])  # [T, C] -> [T, C]
    return {"encoded": encoded["residual3"], **stacked, "lnf": lnf, "logits": logits}


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and completion


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """Choose the likeliest token, the lowest id of equals."""
    return int(np.argmax(logits))  # [V] -> id


def median(logits: npt.NDArray[np.float32]) -> int:
    """Choose the token at which the running probability, in id order, first exceeds one half: the serial program's rule.

    All in float32, one after another in ascending id. NumPy's cumsum adds in that order (its sum does not); its float32 exp
    differs between machines, so the exponential is computed in float64, and rounded."""
    if logits.dtype != np.float32:
        raise TypeError(f"logits are {logits.dtype}: the rule is defined on float32")
    shifted = logits - logits.max()  # [V] -> [V]
    e = np.exp(shifted.astype(np.float64)).astype(np.float32)  # [V] -> [V]
    p = e / np.cumsum(e)[-1]  # [V] -> [V]
    running = np.cumsum(p)  # [V] -> [V]
    above = np.flatnonzero(running > np.float32(0.5))  # [V] -> ids, ascending
    return int(above[0]) if len(above) else len(logits) - 1


def complete(weights: Weights, config: Config, tokens: Sequence[int], total: int, sampler: Sampler) -> list[int]:
    """Return the new tokens that make a sequence of `total`, the prompt included; each step is a whole forward pass."""
    sequence = list(tokens)
    while len(sequence) < total:
        logits = forward(weights, config, sequence)[-1]  # [t] -> [V]
        sequence.append(sampler(logits.astype(np.float32)))  # [V] -> id
    return sequence[len(tokens) :]
