"""GPT-2 in NumPy, written for reading. The tests compare pygpt with it, in float64. Comments give the shapes, `[in] -> [out]`.

    python examples/gpt2_numpy.py 31373 612

T tokens, C channels, OC output channels, NH heads, HS = C / NH, F = 4C in GPT-2, L layers, V ids. Weights are (out, in)."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pygpt import Checkpoint, Config, find_model

Array = np.typing.NDArray[np.float64]  # the names are those of llm.c, train_gpt2.c; the style is picoGPT's


def encoder(tokens: Sequence[int], wte: Array, wpe: Array) -> Array:
    return wte[list(tokens)] + wpe[: len(tokens)]  # [T], [V, C], [maxT, C] -> [T, C]


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {  # [T, F] -> [T, F]
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def softmax(x: Array) -> Array:
    e: Array = np.exp(x - x.max(axis=-1, keepdims=True))  # [..., V] -> [..., V]: at most 1, so nothing overflows
    total: Array = e.sum(axis=-1, keepdims=True)  # [..., V] -> [..., 1]
    return e / total  # [..., V], [..., 1] -> [..., V]


def layernorm(x: Array, weight: Array, bias: Array, epsilon: float = 1e-5) -> Array:
    normal: Array = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)  # [T, C] -> [T, C]
    return normal * weight + bias  # [T, C], [C], [C] -> [T, C]


def matmul(x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
    return x @ weight.T + bias  # [T, C], [OC, C], [OC] -> [T, OC]


def attention(qkv: Array, NH: int, scale: float | None = None) -> Array:
    q, k, v = qkv.reshape(len(qkv), 3, NH, -1).transpose(1, 2, 0, 3)  # [T, 3C] -> 3 of [NH, T, HS]
    scores = q @ k.transpose(0, 2, 1) * (scale or 1 / math.sqrt(q.shape[-1]))  # 2 of [NH, T, HS] -> [NH, T, T]
    att = softmax(np.where(np.tri(len(qkv), dtype=bool), scores, -np.inf))  # [NH, T, T]: row t sees tokens 0 to t
    return (att @ v).transpose(1, 0, 2).reshape(len(qkv), -1)  # [NH, T, T], [NH, T, HS] -> [T, C]


def block(w: Mapping[str, Array], layer: int, config: Config, stream: Array) -> dict[str, Array]:
    p = {name: w[name][layer] for name in w if name not in ("wte", "wpe", "lnfw", "lnfb", "head")}  # [L, ...] -> [...]
    scale = (1 / np.sqrt(config.HS) if config.scaled else 1) / (layer + 1 if config.scaled_by_layer else 1)
    a = {"ln1": layernorm(stream, p["ln1w"], p["ln1b"], config.epsilon)}  # [T, C] -> [T, C]
    a["qkv"] = matmul(a["ln1"], p["qkvw"], p["qkvb"])  # [T, C] -> [T, 3C]
    a["atty"] = attention(a["qkv"], config.NH, scale)  # [T, 3C] -> [T, C]
    a["attproj"] = matmul(a["atty"], p["attprojw"], p["attprojb"])  # [T, C] -> [T, C]
    a["residual2"] = stream + a["attproj"]  # [T, C], [T, C] -> [T, C]
    a["ln2"] = layernorm(a["residual2"], p["ln2w"], p["ln2b"], config.epsilon)  # [T, C] -> [T, C]
    a["fch"] = matmul(a["ln2"], p["fcw"], p["fcb"])  # [T, C] -> [T, F]
    a["fch_gelu"] = ACTIVATIONS[config.activation](a["fch"])  # [T, F] -> [T, F]
    a["fcproj"] = matmul(a["fch_gelu"], p["fcprojw"], p["fcprojb"])  # [T, F] -> [T, C]
    return {**a, "residual3": a["residual2"] + a["fcproj"]}  # [T, C], [T, C] -> [T, C]


def forward(w: Mapping[str, Array], config: Config, tokens: Sequence[int]) -> tuple[Array, list[dict[str, Array]]]:
    layers = [{"residual3": encoder(tokens, w["wte"], w["wpe"])}]  # [T] -> [T, C]
    for layer in range(len(w["ln1w"])):
        layers.append(block(w, layer, config, layers[-1]["residual3"]))  # [T, C] -> [T, C]
    lnf = layernorm(layers[-1]["residual3"], w["lnfw"], w["lnfb"], config.epsilon)  # [T, C] -> [T, C]
    return matmul(lnf, w["wte" if config.tied else "head"]), layers  # [T, C], [V, C] -> [T, V], and the activations


if __name__ == "__main__":
    with Checkpoint(find_model()[0]) as model:
        weights = {name: model.tensor(name).astype(np.float64) for name, *_ in model.config.tensors(padded=False)}
    tokens = [int(word) for word in sys.argv[1:]] or [31373, 612]
    for _ in range(8):
        tokens.append(int(forward(weights, model.config, tokens)[0][-1].argmax()))  # [T, V] -> [V] -> id
        print(tokens[-1], flush=True)
