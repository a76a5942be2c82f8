"""GPT-2 in float64 NumPy: the tests compare every number of pygpt with it.

Each kernel is one short function, named as in llm.c, and written to be read, not to be fast. It runs one sequence, without a
cache or blocks. Each statement has a shape comment `[in] -> [out]`. The oracle shares no code with the kernels that it tests.
Only the file is read through pygpt, and that reader has its own tests.

Dimensions: T tokens, C channels, OC output channels, NH heads, HS = C / NH, L layers, V vocabulary.
Sources: Radford et al. 2019 and openai/gpt-2 (the network), picoGPT (the style), llm.c train_gpt2.c (the names).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pygpt.config import TENSORS, Config
from pygpt.formats.checkpoint import Checkpoint

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
Sampler = Callable[[npt.NDArray[np.float32]], int]

# ---------------------------------------------------------------------------------------------------------------------
# Weights


def weights(source: str | os.PathLike[str] | Checkpoint) -> dict[str, Array]:
    """Read the sixteen tensors of a checkpoint as read-only float64 arrays, wte with V rows. Each file is read once."""
    path = os.path.abspath(source.path if isinstance(source, Checkpoint) else source)
    status = os.stat(path)
    return dict(_weights(path, status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _weights(path: str, inode: int, mtime_ns: int) -> Weights:
    """Read the weights of one file; inode and mtime_ns distinguish files that had the same name."""
    with Checkpoint(path) as checkpoint:
        arrays = {name: checkpoint.tensor(name).astype(np.float64) for name, _ in TENSORS}
    for array in arrays.values():
        array.setflags(write=False)  # because every caller gets the same arrays
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def encoder(tokens: Sequence[int], wte: Array, wpe: Array) -> Array:
    """Add the embedding of each token and the embedding of its position."""
    return wte[list(tokens)] + wpe[: len(tokens)]  # [T], [V, C], [maxT, C] -> [T, C]


def layernorm(inp: Array, weight: Array, bias: Array) -> Array:
    """Normalise each row to mean 0 and variance 1, then scale and shift. Ba et al. 2016; eps 1e-5 as GPT-2."""
    mean: Array = inp.mean(axis=-1, keepdims=True)  # [T, C] -> [T, 1]
    variance: Array = ((inp - mean) ** 2).mean(axis=-1, keepdims=True)  # [T, C] -> [T, 1]
    return (inp - mean) / np.sqrt(variance + 1e-5) * weight + bias  # [T, C], [T, 1], [C] -> [T, C]


def matmul(inp: Array, weight: Array, bias: Array | None = None) -> Array:
    """Apply a linear layer; weights are (out, in)."""
    out: Array = inp @ weight.T  # [T, C], [OC, C] -> [T, OC]
    return out if bias is None else out + bias  # [T, OC], [OC] -> [T, OC]


def attention(qkv: Array, NH: int) -> Array:
    """Compute causal multi-head attention. A row of qkv is q, k, v; head h is channels [h*HS, (h+1)*HS) of each."""
    T, C = qkv.shape[0], qkv.shape[1] // 3
    HS = C // NH
    q, k, v = qkv.reshape(T, 3, NH, HS).transpose(1, 2, 0, 3)  # [T, 3C] -> 3 of [NH, T, HS]
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(HS)  # [NH, T, HS], [NH, HS, T] -> [NH, T, T]
    future = np.triu(np.ones((T, T), dtype=bool), k=1)  # [T, T]: row t may not see columns beyond t
    att = softmax(np.where(future, -np.inf, scores))  # [NH, T, T] -> [NH, T, T]
    out = att @ v  # [NH, T, T], [NH, T, HS] -> [NH, T, HS]
    return out.transpose(1, 0, 2).reshape(T, C)  # [NH, T, HS] -> [T, C]


def gelu(inp: Array) -> Array:
    """Compute GELU in the tanh form, which GPT-2 was trained with. Hendrycks and Gimpel 2016."""
    gate: Array = 1 + np.tanh(np.sqrt(2 / np.pi) * (inp + 0.044715 * inp**3))  # [...] -> [...]
    return 0.5 * inp * gate  # [...] -> [...]


def residual(inp1: Array, inp2: Array) -> Array:
    """Add a layer's output to its input stream."""
    return inp1 + inp2  # [T, C], [T, C] -> [T, C]


def softmax(logits: Array) -> Array:
    """Return the probabilities of each row. The row's maximum is subtracted first, so that exp does not overflow."""
    e: Array = np.exp(logits - logits.max(axis=-1, keepdims=True))  # [..., V] -> [..., V]
    total: Array = e.sum(axis=-1, keepdims=True)  # [..., V] -> [..., 1]
    return e / total  # [..., V], [..., 1] -> [..., V]


# ---------------------------------------------------------------------------------------------------------------------
# The network


def forward(weights: Weights, config: Config, tokens: Sequence[int]) -> Array:
    """Return the logits of every position, float64 (T, V)."""
    return forward_activations(weights, config, tokens)["logits"]


def forward_activations(weights: Weights, config: Config, tokens: Sequence[int]) -> dict[str, Array]:
    """Run the network; return its activations by llm.c's names.

    encoded (T, C); ln1, atty, attproj, residual2, ln2, fcproj, residual3 (L, T, C); qkv (L, T, 3C); fch, fch_gelu (L, T, 4C);
    lnf (T, C); logits (T, V).
    """
    encoded = encoder(tokens, weights["wte"], weights["wpe"])  # [T] -> [T, C]
    layers: list[dict[str, Array]] = []
    for layer in range(config.L):
        layers.append(block(weights, layer, config.NH, layers[-1]["residual3"] if layers else encoded))  # [T, C] -> [T, C]
    lnf = layernorm(layers[-1]["residual3"], weights["lnfw"], weights["lnfb"])  # [T, C] -> [T, C]
    logits = matmul(lnf, weights["wte"])  # [T, C], [V, C] -> [T, V]: the head is tied to the embeddings
    stacked = {name: np.stack([acts[name] for acts in layers]) for name in layers[0]}  # L of [T, ...] -> [L, T, ...]
    return {"encoded": encoded, **stacked, "lnf": lnf, "logits": logits}


def block(weights: Weights, layer: int, NH: int, stream: Array) -> dict[str, Array]:
    """Run one layer on the residual stream (T, C); return its activations. residual3 (T, C) is the next layer's stream."""
    w = {name: weights[name][layer] for name, dims in TENSORS if dims[0] == "L"}  # [L, ...] -> [...]
    ln1 = layernorm(stream, w["ln1w"], w["ln1b"])  # [T, C] -> [T, C]
    qkv = matmul(ln1, w["qkvw"], w["qkvb"])  # [T, C] -> [T, 3C]
    atty = attention(qkv, NH)  # [T, 3C] -> [T, C]
    attproj = matmul(atty, w["attprojw"], w["attprojb"])  # [T, C] -> [T, C]
    residual2 = residual(stream, attproj)  # [T, C] -> [T, C]
    ln2 = layernorm(residual2, w["ln2w"], w["ln2b"])  # [T, C] -> [T, C]
    fch = matmul(ln2, w["fcw"], w["fcb"])  # [T, C] -> [T, 4C]
    fch_gelu = gelu(fch)  # [T, 4C] -> [T, 4C]
    fcproj = matmul(fch_gelu, w["fcprojw"], w["fcprojb"])  # [T, 4C] -> [T, C]
    residual3 = residual(residual2, fcproj)  # [T, C] -> [T, C]
    return {
        "ln1": ln1,
        "qkv": qkv,
        "atty": atty,
        "attproj": attproj,
        "residual2": residual2,
        "ln2": ln2,
        "fch": fch,
        "fch_gelu": fch_gelu,
        "fcproj": fcproj,
        "residual3": residual3,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and completion


def greedy(logits: npt.NDArray[np.float32]) -> int:
    """Return the most probable token; among equals, the lowest id."""
    return int(np.argmax(logits))  # [V] -> id


def median(logits: npt.NDArray[np.float32]) -> int:
    """Return the token at which the running probability, in id order, first exceeds one half: the serial program's rule.

    All sums are float32, in ascending id. NumPy's cumsum adds in this order, but its sum does not. NumPy's float32 exp differs
    between machines, so this function rounds the float64 exp. Raises TypeError unless the logits (V,) are float32.
    """
    if logits.dtype != np.float32:
        raise TypeError(f"logits are {logits.dtype}: the rule is defined on float32")
    shifted = logits - logits.max()  # [V] -> [V]
    e = np.exp(shifted.astype(np.float64)).astype(np.float32)  # [V] -> [V]
    p = e / np.cumsum(e)[-1]  # [V] -> [V]
    running = np.cumsum(p)  # [V] -> [V]
    above = np.flatnonzero(running > np.float32(0.5))  # [V] -> ids, ascending
    return int(above[0]) if len(above) else len(logits) - 1


def complete(weights: Weights, config: Config, tokens: Sequence[int], total: int, sampler: Sampler) -> list[int]:
    """Return the new tokens of a sequence of `total` tokens, the prompt included. Each step is a whole forward pass."""
    sequence = list(tokens)
    while len(sequence) < total:
        logits = forward(weights, config, sequence)[-1]  # [t] -> [V]
        sequence.append(sampler(logits.astype(np.float32)))  # [V] -> id
    return sequence[len(tokens) :]
