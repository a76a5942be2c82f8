"""--check: what the engine computes against what PyTorch computed, as llm.c's debug state holds it.

The tolerances are llm.c's (test_gpt2.c): absolute, 1e-2 on logits and loss, 2e-2 on gradients; and as there, ten steps of AdamW
follow on the same batch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ...formats.llmc import read_debug_state
from ...reference import SerialTrainableGPT2
from ...training.trainable import TrainableGPT2

FORWARD, GRADIENT = 1e-2, 2e-2
STEPS, LR, WEIGHT_DECAY = 10, 1e-4, 0.01


def check(engine: "TrainableGPT2 | SerialTrainableGPT2", path: str) -> bool:
    """Print the table of differences and the losses of ten steps; return whether all differences are within the tolerances."""
    state = read_debug_state(path, engine.config)
    loss = mean(engine.forward(state.inputs, state.targets))
    engine.backward()
    with engine.model() as model:
        logits = max(largest(model.logits(row.tolist()), state.logits[b]) for b, row in enumerate(state.inputs))
    rows = [("logits", logits, FORWARD), ("loss", largest(np.array(loss), np.array(state.loss)), FORWARD)]
    rows += [(f"d{name}", largest(engine.gradient(name), state.gradients[name]), GRADIENT) for name in state.gradients]
    print(f"{'tensor':<12} {'difference':>12} {'tolerance':>10}")
    for name, difference, tolerance in rows:
        print(f"{name:<12} {difference:>12.3e} {tolerance:>10.0e}  {'OK' if difference <= tolerance else 'NOT OK'}")
    for step in range(STEPS):
        loss = mean(engine.forward(state.inputs, state.targets))
        engine.backward()
        engine.update(lr=LR, step=step + 1, weight_decay=WEIGHT_DECAY)
        print(f"step {step}: loss {loss:.6f}", flush=True)
    return all(difference <= tolerance for _, difference, tolerance in rows)


def mean(losses: npt.NDArray[np.float32]) -> float:
    """The mean loss of a batch."""
    return float(losses.mean(dtype="f8"))


def largest(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """The largest absolute difference; NaN, which is within no tolerance, where either has one."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return float(np.abs(found.astype("f8") - expected).max())
