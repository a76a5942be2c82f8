"""GPT-2's training in float64 NumPy: the tests compare gradients, losses and updates of pygpt with it.

The backward pass mirrors the oracle's forward pass line for line, in reverse. `d` before a name means the gradient of the mean
loss with respect to it. Each kernel is one short function, named as in llm.c, which returns the gradients of its inputs. The
sequences of a batch run one after another. This module shares no code with the kernels that it tests.

Dimensions: B sequences, T tokens, C channels, OC output channels, NH heads, HS = C / NH, L layers, V vocabulary.
Sources: llm.c train_gpt2.c (names, order), Loshchilov and Hutter 2019 (AdamW)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
from oracle import Array, Weights

from pygpt.config import TENSORS, Config

Ids = npt.NDArray[np.integer[Any]]

# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def layernorm_statistics(inp: Array) -> tuple[Array, Array]:
    """Return the mean and the reciprocal standard deviation of each row, as oracle.layernorm computes them."""
    mean: Array = inp.mean(axis=-1)  # [T, C] -> [T]
    rstd: Array = 1 / np.sqrt(inp.var(axis=-1) + 1e-5)  # [T, C] -> [T]
    return mean, rstd


def crossentropy(logits: Array, targets: Sequence[int]) -> Array:
    """Return -log of each target's probability. The probabilities themselves, which could underflow, are not computed."""
    top = logits.max(axis=-1)  # [T, V] -> [T]
    total = np.log(np.exp(logits - top[:, None]).sum(axis=-1))  # [T, V], [T, 1] -> [T]
    loss: Array = top + total - logits[np.arange(len(targets)), np.maximum(targets, 0)]  # [T], [T], [T] -> [T]
    return np.where(np.array(targets) < 0, 0.0, loss)  # -100: no target


def crossentropy_softmax_backward(dlosses: Array, probs: Array, targets: Sequence[int]) -> Array:
    """Return the gradient through loss and softmax together: the probabilities, minus one at the target."""
    indicator = np.zeros_like(probs)  # [T, V]
    indicator[np.arange(len(targets)), np.maximum(targets, 0)] = 1
    dlosses = np.where(np.array(targets) < 0, 0.0, dlosses)  # -100: no target
    return (probs - indicator) * dlosses[:, None]  # [T, V], [T, V], [T, 1] -> [T, V]


def residual_backward(dout: Array) -> tuple[Array, Array]:
    """Return the gradients of both terms of a sum: each is the gradient of the sum."""
    return dout, dout  # [T, C] -> [T, C], [T, C]


def gelu_backward(dout: Array, inp: Array) -> Array:
    """Multiply by the derivative of 0.5 x (1 + tanh u), with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    tanh = np.tanh(np.sqrt(2 / np.pi) * (inp + 0.044715 * inp**3))  # [...] -> [...]
    du = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * inp**2)  # [...] -> [...]
    slope: Array = 0.5 * (1 + tanh) + 0.5 * inp * (1 - tanh**2) * du  # [...] -> [...]
    return dout * slope  # [...], [...] -> [...]


def attention_backward(dout: Array, qkv: Array, NH: int) -> Array:
    """Return the gradient through the weighted sum of values, the softmax, the scale, and the dots of queries and keys."""
    T, C = dout.shape
    HS = C // NH
    q, k, v = qkv.reshape(T, 3, NH, HS).transpose(1, 2, 0, 3)  # [T, 3C] -> 3 of [NH, T, HS]
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(HS)  # [NH, T, HS], [NH, HS, T] -> [NH, T, T]
    att = oracle.softmax(np.where(np.triu(np.ones((T, T), dtype=bool), k=1), -np.inf, scores))  # [NH, T, T] -> [NH, T, T]
    dheads = dout.reshape(T, NH, HS).transpose(1, 0, 2)  # [T, C] -> [NH, T, HS]
    dv = att.transpose(0, 2, 1) @ dheads  # [NH, T, T], [NH, T, HS] -> [NH, T, HS]
    datt = dheads @ v.transpose(0, 2, 1)  # [NH, T, HS], [NH, HS, T] -> [NH, T, T]
    dscores = att * (datt - (att * datt).sum(axis=-1, keepdims=True))  # [NH, T, T], [NH, T, 1] -> [NH, T, T]
    dq = dscores @ k / np.sqrt(HS)  # [NH, T, T], [NH, T, HS] -> [NH, T, HS]
    dk = dscores.transpose(0, 2, 1) @ q / np.sqrt(HS)  # [NH, T, T], [NH, T, HS] -> [NH, T, HS]
    return np.stack([dq, dk, dv]).transpose(2, 0, 1, 3).reshape(T, 3 * C)  # 3 of [NH, T, HS] -> [T, 3C]


def matmul_backward(dout: Array, inp: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of a linear layer's input, weight (out, in) and bias."""
    return dout @ weight, dout.T @ inp, dout.sum(axis=0)  # [T, OC], [T, C], [OC, C] -> [T, C], [OC, C], [OC]


def layernorm_backward(dout: Array, inp: Array, weight: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return the gradients of the input, the gain and the bias, given the mean and rstd of the rows."""
    norm = (inp - mean[:, None]) * rstd[:, None]  # [T, C], [T, 1], [T, 1] -> [T, C]
    dnorm = weight * dout  # [C], [T, C] -> [T, C]
    dnorm_mean = dnorm.mean(axis=-1, keepdims=True)  # [T, C] -> [T, 1]
    dnorm_norm_mean = (dnorm * norm).mean(axis=-1, keepdims=True)  # [T, C] -> [T, 1]
    dinp = (dnorm - dnorm_mean - norm * dnorm_norm_mean) * rstd[:, None]  # [T, C], [T, 1] -> [T, C]
    return dinp, (norm * dout).sum(axis=0), dout.sum(axis=0)  # [T, C] -> [T, C], [C], [C]


def encoder_backward(dout: Array, tokens: Sequence[int], V: int, maxT: int) -> tuple[Array, Array]:
    """Return the gradients of both embeddings: each row is added to the gradients of its token and of its position."""
    dwte, dwpe = np.zeros((V, dout.shape[1])), np.zeros((maxT, dout.shape[1]))  # [V, C], [maxT, C]
    np.add.at(dwte, np.asarray(tokens), dout)  # not +=: a token may occur more than once
    dwpe[: len(dout)] += dout  # [T, C] -> [maxT, C]
    return dwte, dwpe


# ---------------------------------------------------------------------------------------------------------------------
# The network


def losses(weights: Weights, config: Config, inputs: Ids, targets: Ids) -> Array:
    """Return the loss of every position, (B, T)."""
    pairs = zip(inputs.tolist(), targets.tolist(), strict=True)
    return np.stack([crossentropy(oracle.forward(weights, config, tokens), wanted) for tokens, wanted in pairs])


def gradients(weights: Weights, config: Config, inputs: Ids, targets: Ids) -> dict[str, Array]:
    """Return the gradient of the mean loss with respect to each of the sixteen tensors, by name, in the tensors' shapes."""
    grads = {name: np.zeros(shape) for name, shape, _, _ in config.tensors(padded=False)}
    for tokens, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        backward(grads, weights, config, tokens, wanted, np.full(len(tokens), 1 / max((targets >= 0).sum(), 1)))
    return grads


def backward(
    grads: dict[str, Array], weights: Weights, config: Config, tokens: Sequence[int], targets: Sequence[int], dlosses: Array
) -> None:
    """Add the gradients of one sequence to `grads`. dlosses (T,) are the gradients of its losses."""
    acts = oracle.forward_activations(weights, config, tokens)
    probs = oracle.softmax(acts["logits"])  # [T, V] -> [T, V]
    dlogits = crossentropy_softmax_backward(dlosses, probs, targets)  # [T] -> [T, V]
    dlnf, dwte, _ = matmul_backward(dlogits, acts["lnf"], weights["wte"])  # [T, V] -> [T, C], [V, C]: the head is tied
    last = acts["residual3"][-1]  # [T, C]
    dresidual3, dlnfw, dlnfb = layernorm_backward(dlnf, last, weights["lnfw"], *layernorm_statistics(last))  # [T, C]
    for layer in reversed(range(config.L)):
        stream = acts["residual3"][layer - 1] if layer else acts["encoded"]  # [T, C]
        dresidual3 = block_backward(grads, weights, layer, config.NH, acts, stream, dresidual3)  # [T, C] -> [T, C]
    dwte_encoder, dwpe = encoder_backward(dresidual3, tokens, config.V, config.maxT)  # [T, C] -> [V, C], [maxT, C]
    for name, gradient in {"wte": dwte + dwte_encoder, "wpe": dwpe, "lnfw": dlnfw, "lnfb": dlnfb}.items():
        grads[name] += gradient


def block_backward(
    grads: dict[str, Array], weights: Weights, layer: int, NH: int, acts: Mapping[str, Array], stream: Array, dresidual3: Array
) -> Array:
    """Add the gradients of one layer to `grads`; return the gradient of its input stream (T, C)."""
    w = {name: weights[name][layer] for name, dims in TENSORS if dims[0] == "L"}  # [L, ...] -> [...]
    a = {name: acts[name][layer] for name in ("ln1", "qkv", "atty", "residual2", "ln2", "fch", "fch_gelu")}  # the same
    g: dict[str, Array] = {}
    dresidual2, dfcproj = residual_backward(dresidual3)  # [T, C] -> [T, C], [T, C]
    dfch_gelu, g["fcprojw"], g["fcprojb"] = matmul_backward(dfcproj, a["fch_gelu"], w["fcprojw"])  # [T, C] -> [T, 4C]
    dfch = gelu_backward(dfch_gelu, a["fch"])  # [T, 4C] -> [T, 4C]
    dln2, g["fcw"], g["fcb"] = matmul_backward(dfch, a["ln2"], w["fcw"])  # [T, 4C] -> [T, C]
    dnormed, g["ln2w"], g["ln2b"] = layernorm_backward(
        dln2, a["residual2"], w["ln2w"], *layernorm_statistics(a["residual2"])
    )  # [T, C] -> [T, C]
    dstream, dattproj = residual_backward(dresidual2 + dnormed)  # [T, C] -> [T, C], [T, C]
    datty, g["attprojw"], g["attprojb"] = matmul_backward(dattproj, a["atty"], w["attprojw"])  # [T, C] -> [T, C]
    dqkv = attention_backward(datty, a["qkv"], NH)  # [T, C] -> [T, 3C]
    dln1, g["qkvw"], g["qkvb"] = matmul_backward(dqkv, a["ln1"], w["qkvw"])  # [T, 3C] -> [T, C]
    dnormed, g["ln1w"], g["ln1b"] = layernorm_backward(dln1, stream, w["ln1w"], *layernorm_statistics(stream))  # [T, C]
    for name, gradient in g.items():
        grads[name][layer] += gradient
    return dstream + dnormed


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser


def gradient_norm(grads: Mapping[str, Array]) -> float:
    """Return the 2-norm of all gradients together."""
    return float(np.sqrt(sum((gradient**2).sum() for gradient in grads.values())))


def adamw(
    parameters: Array,
    gradients: Array,
    first: Array,
    second: Array,
    *,
    lr: float,
    step: int,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Array = 0.0,
) -> tuple[Array, Array, Array]:
    """Do one step with decoupled weight decay; return the new parameters, first and second moments.

    weight_decay: one number, or one for each parameter."""
    first = beta1 * first + (1 - beta1) * gradients  # [P], [P] -> [P]
    second = beta2 * second + (1 - beta2) * gradients**2  # [P], [P] -> [P]
    unbiased = first / (1 - beta1**step)  # [P] -> [P]
    spread = np.sqrt(second / (1 - beta2**step))  # [P] -> [P]
    parameters = parameters - lr * unbiased / (spread + eps) - lr * weight_decay * parameters  # [P] -> [P]
    return parameters, first, second
