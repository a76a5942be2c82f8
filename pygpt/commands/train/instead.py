"""Run --check or --estimate, with which `pygpt train` does not train.

--check compares the engine's results with PyTorch's, which llm.c's debug state file contains. The absolute tolerances are
llm.c's (test_gpt2.c): 1e-2 for logits and loss, 2e-2 for gradients. As in test_gpt2.c, ten steps of AdamW on the same batch
follow.

--estimate gives the time of a step on several ranks, from a measurement on this machine and the network's speed. Each of N
ranks sends and receives 4 P (N - 1) / N bytes twice a step: gradients, then weights. Over TCP, both took 1.0 to 1.15 times the
bytes' time on the wire at 1 and at 10 Gbit/s; the estimate takes 1.1. It assumes ranks of equal speed.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import Config
from ...errors import InputError, PyGPTError
from ...formats.llmc import read_debug_state
from ...hub.find import find_model
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ..console import check_stdout
from .job import beginning, flag, new

ENGINES: dict[bool, type[TrainableGPT2 | SerialTrainableGPT2]]
ENGINES = {False: TrainableGPT2, True: SerialTrainableGPT2}  # by --reference
FORWARD, GRADIENT = 1e-2, 2e-2  # tolerances
STEPS, LR, WEIGHT_DECAY = 10, 1e-4, 0.01
OVERHEAD = 1.1  # of messages over the bytes' own time
LINES = 8  # of the estimate's table


def run_check(given: dict[str, Any]) -> None:
    """Run --check. Raises PyGPTError if a difference is too large, InputError for options that do not go with --check."""
    if surplus := sorted({*given} - {"check", "init", "threads", "reference"}):
        raise InputError(f"--check does not train, so leave out {flag(surplus[0])}; it takes --init, -t and --reference")
    path, _ = find_model(given.get("init"))
    with ENGINES["reference" in given].load(path, threads=given.get("threads")) as engine:
        if not check(engine, given["check"]):
            text = "the engine's results differ by more than the tolerance: check that"
            raise PyGPTError(f"{given['check']}: {text} {path} is the same model")


def check(engine: TrainableGPT2 | SerialTrainableGPT2, path: str) -> bool:
    """Print the table of differences and the losses of ten steps. Return whether all differences are within tolerance. path:
    llm.c's debug state. Raises DataError if the file does not fit the model."""
    state = read_debug_state(path, engine.config)

    def mean_loss() -> float:
        loss = float(engine.forward(state.inputs, state.targets).mean(dtype="f8"))
        engine.backward()
        return loss

    loss = mean_loss()
    with engine.model() as model:
        logits = max(largest(model.logits(row.tolist()), state.logits[b]) for b, row in enumerate(state.inputs))
    rows = [("logits", logits, FORWARD), ("loss", largest(np.array(loss), np.array(state.loss)), FORWARD)]
    rows += [(f"d{name}", largest(engine.gradient(name), state.gradients[name]), GRADIENT) for name in state.gradients]
    print(f"{'tensor':<12} {'difference':>12} {'tolerance':>10}")
    for name, difference, tolerance in rows:
        print(f"{name:<12} {difference:>12.3e} {tolerance:>10.0e}  {'OK' if difference <= tolerance else 'NOT OK'}")
    for step in range(STEPS):
        loss = mean_loss()
        engine.update(lr=LR, step=step + 1, weight_decay=WEIGHT_DECAY)
        print(f"step {step}: loss {loss:.6f}", flush=True)
    return all(difference <= tolerance for _, difference, tolerance in rows)


def largest(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest absolute difference. If an array holds NaN, return NaN, which is outside every tolerance."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return float(np.abs(found.astype("f8") - expected).max())


def run_estimate(given: dict[str, Any]) -> None:
    """Run --estimate: print a line for each of some numbers of ranks that divide the parts. Raises InputError for a bad number
    of ranks or speed."""
    parts = given.get("parts") or given.get("ranks", 8)
    job, options = new({"data": "none", **given, "parts": parts})
    ranks, gbit, tokens = given.get("ranks", parts), given.get("gbit", 10.0), options.accumulate * job.B * job.T
    if parts % ranks:
        raise InputError(f"--ranks is {ranks}: it must divide --parts, which is {parts}")
    if not 0.001 <= gbit <= 1e6:
        raise InputError(f"--gbit is {gbit}: it must be from 0.001 to 1000000")
    config, _ = beginning(given)
    if config.maxT < job.T:
        raise InputError(f"-T is {job.T}: the model takes sequences of at most {config.maxT} tokens")
    check_stdout("the estimate")
    batch, update, threads = measure(config, job.B, job.T, given.get("threads"))
    P = config.parameters(padded=True)
    print(f"model: {P} parameters; step: {parts} parts of {options.accumulate} x {job.B} x {job.T} tokens")
    print(f"measured here with {threads} threads: {batch:.3f} s for {job.B} x {job.T} tokens, {update:.3f} s for an update")
    print(f"network: {gbit:g} Gbit/s; memory of a rank: weights, gradients and moments, without activations\n")
    print("ranks  compute s  messages s   step s  tokens/s  speed-up  efficiency      MB")
    counts = [count for count in range(1, ranks + 1) if parts % count == 0]
    alone = 0.0
    for count in [*counts[: LINES - 1], *counts[LINES - 1 :][-1:]]:
        per = parts // count
        add = update * 5 / 7  # a copy and a sum pass over 5 arrays, an update over 7
        compute = per * options.accumulate * batch + (per - 1) * add + update / count
        messages = OVERHEAD * 2 * 4 * P * (count - 1) / count * 8 / (gbit * 1e9)
        step = compute + messages
        alone = alone or step
        print(
            f"{count:>5} {compute:>10.2f} {messages:>11.2f} {step:>8.2f} {parts * tokens / step:>9.0f} {alone / step:>9.2f} "
            f"{alone / step / count:>11.2f} {(8 + 8 / count) * P / 1e6:>7.0f}"
        )


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
