"""--check: compare the engine's results with PyTorch's, which llm.c's debug state file contains.

The absolute tolerances are llm.c's (test_gpt2.c): 1e-2 for logits and loss, 2e-2 for gradients. As in test_gpt2.c, ten steps of
AdamW on the same batch follow.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ...formats.llmc import read_debug_state
from ...training.serial import SerialTrainableGPT2
from ...training.trainable import TrainableGPT2

FORWARD, GRADIENT = 1e-2, 2e-2
STEPS, LR, WEIGHT_DECAY = 10, 1e-4, 0.01


def check(engine: "TrainableGPT2 | SerialTrainableGPT2", path: str) -> bool:
    """Print the table of differences and the losses of ten steps. Return whether all differences are within tolerance. path:
    llm.c's debug state. Raises DataError if the file does not fit the model."""
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
    """Return the mean loss of a batch."""
    return float(losses.mean(dtype="f8"))


def largest(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest absolute difference. If an array holds NaN, return NaN, which is outside every tolerance."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return float(np.abs(found.astype("f8") - expected).max())
