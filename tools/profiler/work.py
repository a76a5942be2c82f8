"""How much work each kernel of a call has at least: floating-point operations, and bytes that must move once a step.

Products count 2 operations for each weight and row, attention 4 for each channel of a visible key; layernorm 8, encoder 1 a
value. GELU, exp and biases are left out. Bytes are compulsory traffic: every weight once a step, keys and values that a step
sees once, activations in and out; a kernel that reads weights again for more rows is not credited for it.
"""

from collections.abc import Iterable

from pygpt import Config

from .job import Call

Work = dict[str, tuple[int, int]]  # phase -> (operations, bytes)


def work(config: Config, value_bytes: int, calls: Iterable[Call]) -> Work:
    """The work of all calls by kernel."""
    total: Work = {}
    for call in calls:
        for name, (flop, size) in _call(config, value_bytes, call.rows, call.position, max(1, len(call.steps))).items():
            before = total.get(name, (0, 0))
            total[name] = before[0] + flop, before[1] + size
    return total


def _call(config: Config, value_bytes: int, T: int, position: int, steps: int) -> Work:
    """The work of one call: T rows behind `position` others, in equal steps; the last row's logits are wanted."""
    L, C, V = config.L, config.C, config.V
    pairs = T * position + T * (T + 1) // 2  # (row, key) with the key visible to the row
    seen = sum(position + T * step // steps for step in range(1, steps + 1))  # keys that the steps read

    def product(N: int, K: int, rows: int, steps: int, extra: int = 0) -> tuple[int, int]:
        return 2 * rows * N * K, steps * N * K * value_bytes + 4 * rows * (N + K + extra)

    def layers(one: tuple[int, int]) -> tuple[int, int]:
        return L * one[0], L * one[1]

    return {
        "encoder": (T * C, T * C * (2 * value_bytes + 4)),
        "ln1": layers((8 * T * C, 8 * T * C)),
        "qkv": layers(product(3 * C, C, T, steps, extra=2 * C)),  # keys and values go to the cache as well
        "attention": layers((4 * C * pairs, 4 * (2 * C * seen + 2 * T * C))),
        "attproj": layers(product(C, C, T, steps, extra=2 * C)),  # the residual stream is read and written
        "ln2": layers((8 * T * C, 8 * T * C)),
        "fc": layers(product(4 * C, C, T, steps)),
        "fcproj": layers(product(C, 4 * C, T, steps, extra=2 * C)),
        "lnf": (8 * C, 8 * C),
        "logits": product(V, C, 1, 1),
    }
