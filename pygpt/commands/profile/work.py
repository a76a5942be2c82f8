"""The model of work of `pygpt bench` and `pygpt profile`: the least operations and bytes of each kernel.

docs/reference/reports.md says what counts."""

from collections import Counter
from collections.abc import Mapping

from ...config import Config

Work = dict[str, tuple[int, int]]  # phase -> (operations, bytes)
Stored = Mapping[str, tuple[str, int]]  # by tensor: weight format and bytes, as Network.stored
WEIGHTS = {"qkv": "qkvw", "attproj": "attprojw", "fc": "fcw", "fcproj": "fcprojw", "logits": "wte"}  # of forward products


def forward(
    config: Config, stored: Stored, rows: int, position: int = 0, *, steps: int = 1, wanted: int = 1, sequences: int = 0
) -> Work:
    """Return the work of `rows` rows after `position` others, in equal steps, with the logits of `wanted` rows.

    sequences: in training, how many sequences share the rows; 0 for generation."""
    L, C, F, V, T = config.L, config.C, config.F, config.V, rows // (sequences or 1)
    pairs = (sequences or 1) * (T * position + T * (T + 1) // 2)  # number of (row, visible key)
    seen = sum(position + rows * step // steps for step in range(1, steps + 1))  # number of keys that the steps read

    def product(phase: str, rows: int, steps: int, N: int, K: int, extra: int = 0) -> tuple[int, int]:
        return 2 * rows * N * K, steps * stored[WEIGHTS[phase]][1] // L + 4 * rows * (N + K + extra)

    def after_qkv(rows: int, steps: int, pairs: int, seen: int) -> Work:
        return {
            "attention": (4 * C * pairs, 4 * (2 * C * seen + 2 * rows * C)),
            "attproj": product("attproj", rows, steps, C, C, extra=2 * C),  # the residual stream is read and written
            "ln2": (8 * rows * C, 8 * rows * C),
            "fc": product("fc", rows, steps, F, C, extra=F if sequences else 0),  # training stores fch as well as fch_gelu
            "fcproj": product("fcproj", rows, steps, C, F, extra=2 * C),
        }

    def all_layers(each: tuple[int, int], last: tuple[int, int]) -> tuple[int, int]:
        return (L - 1) * each[0] + last[0], (L - 1) * each[1] + last[1]

    ln1, qkv = (8 * rows * C, 8 * rows * C), product("qkv", rows, steps, 3 * C, C, extra=2 * C)  # keys, values: to the cache
    each = last = after_qkv(rows, steps, pairs, seen)
    if wanted < rows:  # the last `wanted` rows: the last layer needs only the keys and values of the others
        keys = position + T if wanted else 0
        last = after_qkv(wanted, min(steps, wanted), wanted * keys - wanted * (wanted - 1) // 2, keys)
    return {
        "encoder": (rows * C, rows * (stored["wte"][1] // V + stored["wpe"][1] // config.maxT + 4 * C)),
        "ln1": all_layers(ln1, ln1),
        "qkv": all_layers(qkv, qkv),
        **{name: all_layers(work, last[name]) for name, work in each.items()},
        "lnf": (8 * wanted * C, 8 * wanted * C),
        "logits": (2 * wanted * V * C, stored["wte"][1] + 4 * wanted * (V + C)),
    }


def training(config: Config, B: int, T: int) -> Work:
    """Return the work of one iteration of training on B x T tokens, in float32."""
    L, C, F, V, P = config.L, config.C, config.F, config.V, config.parameters(padded=True)
    R, pairs = B * T, B * T * (T + 1) // 2

    def dproduct(N: int, K: int, extra: int = 0) -> tuple[int, int]:  # dout (R, N) and inp (R, K) in, dinp out
        return 4 * R * N * K, 4 * (2 * N * K + R * (N + 2 * K + extra))

    dnorm = 16 * R * C, 16 * R * C  # dout, x and dresidual in, dresidual out
    layer = {
        "dfcproj": dproduct(C, F, extra=F),  # the activation's derivative reads fch
        "dfc": dproduct(F, C),
        "dln2": dnorm,
        "dattproj": dproduct(C, C),
        "dattention": (8 * C * pairs, 4 * 7 * R * C),  # q, k, v and datty in, dq, dk, dv out
        "dqkv": dproduct(3 * C, C),
        "dln1": dnorm,
    }
    return {
        **forward(config, floats(config), R, wanted=R, sequences=B),
        **{name: (L * flop, L * size) for name, (flop, size) in layer.items()},
        "loss": (2 * R * V, 8 * R * V),
        "dlogits": (R * V, 8 * R * V),
        "dhead": dproduct(V, C),
        "dlnf": dnorm,
        "dencoder": (2 * R * C, 4 * (3 * R * C + config.maxT * C)),  # rows of dwte in and out, all of dwpe out
        "norm": (2 * P, 4 * P),
        "update": (17 * P, 28 * P),
    }


def floats(config: Config) -> Stored:
    """Return the weights of training, in the form of Network.stored."""
    return {name: ("float32", 4 * size) for name, _, _, size in config.tensors(padded=False)}


def operations(stored: Stored, found: Work) -> Mapping[str, int]:
    """Return the operations of a forward pass by weight format: of its products, and in float32 those of attention."""
    sums = Counter(float32=found["attention"][0])
    for phase, name in WEIGHTS.items():
        sums[stored[name][0]] += found[phase][0]
    return sums


def weight_bytes(stored: Stored) -> int:
    """Return the bytes of all weights that each token reads: those of wpe are hardly any."""
    return sum(size for name, (_, size) in stored.items() if name != "wpe")


def decode_bytes(config: Config, stored: Stored, depth: int, new: int, batch: int) -> int:
    """Return the bytes that `new` decode steps of a batch read: each time the weights, and all keys and values so far."""
    return new * weight_bytes(stored) + batch * sum(2 * 4 * config.L * config.C * (depth + i + 1) for i in range(new))
