"""SerialTrainableGPT2: the serial program's training with the interface of TrainableGPT2, for comparison.

It computes one number after another, without vector instructions.
"""

from typing import SupportsIndex

import numpy as np

from .._reference import Training
from ..config import Config
from ..errors import ClosedError, InputError
from ..reference import SerialGPT2
from .parameters import AdamW, Ids, Losses, Parameters


class SerialTrainableGPT2(Parameters):
    """The serial program's training: scalar, on one thread; `threads` and `all_workers` have no effect.

    Use it in a `with` block, or close() it. Ctrl-C takes effect between layers. If it interrupts backward(), the gradients are
    incomplete, but weights and moments do not change."""

    threads = 1

    def __init__(self, config: Config, *, threads: SupportsIndex | None = None, all_workers: bool = False) -> None:
        super().__init__(config, threads=threads, all_workers=all_workers)
        self._training: Training | None = Training(self.parameters, self.gradients, config)

    def _forward(self, inputs: Ids, targets: Ids) -> Losses:
        return np.asarray(self._open().forward(inputs, targets))

    def _evaluate(self, inputs: Ids, targets: Ids) -> Losses:
        return np.asarray(self._open().evaluate(inputs, targets))

    def _backward(self, accumulate: bool, scale: float) -> None:
        if not self._open().ready:
            raise InputError("backward() was called without a forward() before it: call forward(), then backward() once")
        self._open().backward(accumulate=accumulate, scale=scale)

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients together, summed in float64 in ascending order."""
        return self._open().gradient_norm()

    @property
    def updates(self) -> int:
        """The number of updates made. An update that Ctrl-C interrupts is complete and counts, or has not changed a weight."""
        return self._open().updates

    def _update(self, numbers: AdamW) -> None:
        self._open().update(self.first_moments, self.second_moments, numbers)

    def model(self) -> SerialGPT2:
        """Return a SerialGPT2 over the live weights, to complete sequences."""
        self._open()
        return SerialGPT2(self.weights())

    def _open(self) -> Training:
        if self._training is None:
            raise ClosedError("the model is closed: open it again")
        return self._training

    def close(self) -> None:
        """Free the activations. The arrays of parameters, gradients and moments remain. May be called twice."""
        self._training = None
