"""Compute the least work of each kernel of a call: floating-point operations, and bytes that must move in each step.

Forward operations: a product has 2 for each weight and row. Attention has 4 for each channel of a visible key. layernorm has 8
and the encoder 1 for each value. GELU, exp and biases do not count. Bytes are compulsory traffic: each weight once per step,
each visible key and value once per step, activations in and out. If a kernel reads weights again for more rows, that does not
count. A weight takes the bytes of its format. The float32 scales of quantised weights do not count as operations.

Backward operations: a product has twice the operations of the forward pass, for the gradients of its inputs and its weights.
Attention has twice too; recomputed scores do not count. layernorm has 16 for each value, the loss 2 and its gradient 1 for each
logit. Weights are read once and their gradients are written once. The norm has 2 operations and 4 bytes for each parameter.
AdamW has 17 operations, including a root and a division, and 28 bytes: it reads parameter, gradient and two moments, and writes
all except the gradient.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from ...config import Config
from .job import Call

Work = dict[str, tuple[int, int]]  # phase -> (operations, bytes)
Stored = Mapping[str, tuple[str, int]]  # by tensor: weight format and bytes, as Network.stored
WEIGHTS = {"qkv": "qkvw", "attproj": "attprojw", "fc": "fcw", "fcproj": "fcprojw", "logits": "wte"}  # of forward products


def work(config: Config, stored: Stored, calls: Iterable[Call]) -> Work:
    """Return the work of all calls by kernel. stored: the weights of generation; training has float32."""
    total: Work = defaultdict(lambda: (0, 0))
    for call in calls:
        if call.stages:
            found = _iteration(config, call.sequences, call.rows // call.sequences)
        else:
            found = _call(config, stored, call.rows, call.position, max(1, len(call.steps)))
        for name, (flop, size) in found.items():
            total[name] = total[name][0] + flop, total[name][1] + size
    return total


def _call(config: Config, stored: Stored, T: int, position: int, steps: int) -> Work:
    """Return the work of one call: T rows after `position` others, in equal steps, with the logits of the last row."""
    L, C, F, V = config.L, config.C, config.F, config.V
    pairs = T * position + T * (T + 1) // 2  # number of (row, visible key)
    seen = sum(position + T * step // steps for step in range(1, steps + 1))  # number of keys that the steps read

    def product(phase: str, N: int, K: int, extra: int = 0) -> tuple[int, int]:
        return 2 * T * N * K, steps * stored[WEIGHTS[phase]][1] // L + 4 * T * (N + K + extra)

    norm = 8 * T * C, 8 * T * C
    layer = {
        "ln1": norm,
        "qkv": product("qkv", 3 * C, C, extra=2 * C),  # keys and values go to the cache as well
        "attention": (4 * C * pairs, 4 * (2 * C * seen + 2 * T * C)),
        "attproj": product("attproj", C, C, extra=2 * C),  # the residual stream is read and written
        "ln2": norm,
        "fc": product("fc", F, C),
        "fcproj": product("fcproj", C, F, extra=2 * C),
    }
    return {
        "encoder": (T * C, T * (stored["wte"][1] // V + stored["wpe"][1] // config.maxT + 4 * C)),
        **_in_layers(L, layer),
        "lnf": (8 * C, 8 * C),
        "logits": (2 * V * C, stored["wte"][1] + 4 * (V + C)),
    }


def _in_layers(L: int, layer: Work) -> Work:
    return {name: (L * flop, L * size) for name, (flop, size) in layer.items()}


def _iteration(config: Config, B: int, T: int) -> Work:
    """Return the work of one iteration of training on B x T tokens, in float32."""
    L, C, F, V, P = config.L, config.C, config.F, config.V, config.parameters(padded=True)
    R, pairs = B * T, B * T * (T + 1) // 2

    def product(N: int, K: int, extra: int = 0) -> tuple[int, int]:
        return 2 * R * N * K, 4 * (N * K + R * (N + K + extra))

    def dproduct(N: int, K: int, extra: int = 0) -> tuple[int, int]:  # dout (R, N) and inp (R, K) in, dinp out
        return 4 * R * N * K, 4 * (2 * N * K + R * (N + 2 * K + extra))

    norm, dnorm = (8 * R * C, 8 * R * C), (16 * R * C, 16 * R * C)  # dnorm: dout, x and dresidual in, dresidual out
    layer = {
        "ln1": norm,
        "qkv": product(3 * C, C, extra=2 * C),  # keys and values go to the cache as well
        "attention": (4 * C * pairs, 4 * 4 * R * C),
        "attproj": product(C, C, extra=2 * C),  # the residual stream is read and written
        "ln2": norm,
        "fc": product(F, C, extra=F),  # fch is stored as well as fch_gelu
        "fcproj": product(C, F, extra=2 * C),
        "dfcproj": dproduct(C, F, extra=F),  # the activation's derivative reads fch
        "dfc": dproduct(F, C),
        "dln2": dnorm,
        "dattproj": dproduct(C, C),
        "dattention": (8 * C * pairs, 4 * 7 * R * C),  # q, k, v and datty in, dq, dk, dv out
        "dqkv": dproduct(3 * C, C),
        "dln1": dnorm,
    }
    return {
        "encoder": (R * C, 12 * R * C),
        **_in_layers(L, layer),
        "lnf": norm,
        "logits": product(V, C),
        "loss": (2 * R * V, 8 * R * V),
        "dlogits": (R * V, 8 * R * V),
        "dhead": dproduct(V, C),
        "dlnf": dnorm,
        "dencoder": (2 * R * C, 4 * (3 * R * C + config.maxT * C)),  # rows of dwte in and out, all of dwpe out
        "norm": (2 * P, 4 * P),
        "update": (17 * P, 28 * P),
    }
