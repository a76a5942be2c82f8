"""--estimate: the time of a step on several ranks, from a measurement on this machine and the network's speed.

Each of N ranks sends and receives 4 P (N - 1) / N bytes twice a step: gradients, then weights. Over TCP, both took 1.0 to
1.15 times the bytes' time on the wire at 1 and at 10 Gbit/s; the estimate takes 1.1. It assumes ranks of equal speed.
"""

import time

import numpy as np

from ...config import Config
from ...training.options import TrainingOptions
from ...training.trainable import TrainableGPT2

OVERHEAD = 1.1
LINES = 8  # of the table


def measure(config: Config, B: int, T: int, threads: int | None) -> tuple[float, float, int]:
    """Return the seconds of one micro-batch and of one update on this machine, the best of three, and the threads."""
    ids = np.arange(B * T, dtype=np.int32).reshape(B, T) % config.V
    batches, updates = [], []
    with TrainableGPT2(config, threads=threads) as engine:
        for step in range(1, 4):
            start = time.perf_counter()
            engine.forward(ids, ids)
            engine.backward()
            middle = time.perf_counter()
            engine.gradient_norm()
            engine.update(lr=0.0, step=step)
            batches.append(middle - start)
            updates.append(time.perf_counter() - middle)
        return min(batches), min(updates), engine.threads


def estimate(config: Config, B: int, T: int, options: TrainingOptions, threads: int | None, ranks: int, gbit: float) -> str:
    """Return the estimate as text, with a line for each of some numbers of ranks up to `ranks` that divide the parts."""
    batch, update, threads = measure(config, B, T, threads)
    P, parts = config.parameters(padded=True), options.parts
    lines = [
        f"model: {P} parameters; step: {parts} parts of {options.accumulate} x {B} x {T} tokens",
        f"measured here with {threads} threads: {batch:.3f} s for {B} x {T} tokens, {update:.3f} s for an update",
        f"network: {gbit:g} Gbit/s; memory of a rank: weights, gradients and moments, without activations",
        "",
        "ranks  compute s  messages s   step s  tokens/s  speed-up  efficiency      MB",
    ]
    counts = [count for count in range(1, ranks + 1) if parts % count == 0]
    alone = 0.0
    for count in [*counts[: LINES - 1], *counts[LINES - 1 :][-1:]]:
        per = parts // count
        add = update * 5 / 7  # a copy and a sum pass over 5 arrays, an update over 7
        compute = per * options.accumulate * batch + (per - 1) * add + update / count
        messages = OVERHEAD * 2 * 4 * P * (count - 1) / count * 8 / (gbit * 1e9)
        step = compute + messages
        alone = alone or step
        rate = parts * options.accumulate * B * T / step
        lines.append(
            f"{count:>5} {compute:>10.2f} {messages:>11.2f} {step:>8.2f} {rate:>9.0f} {alone / step:>9.2f} "
            f"{alone / step / count:>11.2f} {(8 + 8 / count) * P / 1e6:>7.0f}"
        )
    return "\n".join(lines)
