"""Trainer: run training steps with an engine, a loader and options; save and restore their whole state.

A step averages the gradients of `accumulate` batches in order, clips the global norm, and updates the weights with AdamW. A
step does not depend on time, threads or chance. So a run that is restored from a training state (state.py) continues with the
same bits.

Refuses to update weights if the loss or the gradient is not finite. Refuses to know about text, data files and terminals.
"""

import math
import os
import time
from typing import NamedTuple

from .._signals import see_through
from ..errors import InputError, NumericalError, PyGPTError, Uncopied, check_whole, shown
from ..pool import TRIES
from .options import TrainingOptions
from .state import Progress, TrainingState, open_state, write_state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    from ..reference import SerialTrainableGPT2
    from .data import DataLoader
    from .trainable import TrainableGPT2


class Record(NamedTuple):
    """The result of a step. step counts from 0. loss, and norm (of the gradient before clipping), are of the old weights."""

    step: int
    loss: float
    lr: float
    norm: float
    ms: float
    tokens_per_s: float


class Trainer(Uncopied):
    """Train `engine` on the batches of `loader` with `options` (default: TrainingOptions()).

    `done` counts the updates made. Raises InputError if the loader's T exceeds the model's maxT, or if `options` has another
    type.
    """

    _instead = "save() writes its state, and restore() reads it"

    def __init__(
        self, engine: "TrainableGPT2 | SerialTrainableGPT2", loader: "DataLoader", options: TrainingOptions | None = None
    ) -> None:
        if not isinstance(options, TrainingOptions | None):
            raise InputError(f"options are {shown(options)}: they must be TrainingOptions")
        longest = engine.config.maxT
        if longest < loader.T:
            raise InputError(f"T is {loader.T}: the model takes sequences of at most {longest} tokens; make T smaller")
        self.engine, self.loader = engine, loader
        self.options = options or TrainingOptions()
        self.done = 0
        self._file: str | None = None  # the file that this run last wrote or read: it is complete
        self._whole = True  # False while a state is restored

    def step(self) -> Record:
        """Make one update. If it raises, Ctrl-C included, the step is either undone, or complete and counted by `done`.

        In both cases training can continue or be saved. Raises NumericalError if the loss or the gradient's norm is not finite,
        PyGPTError after a restore() that failed.
        """
        self._check_whole()
        begin = time.perf_counter()
        options, place, made, step = self.options, self.loader.state(), self.engine.updates, self.done + 1

        def settle() -> bool:
            if self.engine.updates == made:
                self.loader.restore(place)
            else:
                self.done = step
            return True

        try:
            loss = self._gradients()
            norm = self.engine.gradient_norm()
            self._check_finite("gradient's norm", norm, place)
            lr = options.learning_rate(self.done)
            self.engine.update(lr=lr, step=step, gradient_scale=options.gradient_scale(norm), **options.adamw())
            self.done = step
        except BaseException:
            see_through(settle, TRIES)
            raise
        seconds = time.perf_counter() - begin
        tokens = self.loader.B * self.loader.T * options.accumulate
        return Record(self.done - 1, loss, lr, norm, 1000 * seconds, tokens / seconds)

    def _gradients(self) -> float:
        """Compute the step's gradients in the engine; return its mean loss."""
        parts, counts = [], self._counts(self.loader, self.options.accumulate)
        total = max(sum(counts), 1)
        for part, count in enumerate(counts):
            parts.append(self._loss(self.loader))
            self.engine.backward(accumulate=part > 0, scale=count / total)
        return _mean(parts, counts)

    def _counts(self, loader: "DataLoader", batches: int) -> list[int]:
        """Return how many targets each of the next batches trains on. Every target of a step has the same weight."""
        if not loader.masked:
            return [loader.B * loader.T] * batches
        start = loader.state()
        try:
            return [int((loader.next_batch()[1] >= 0).sum()) for _ in range(batches)]
        finally:
            loader.restore(start)

    def _loss(self, loader: "DataLoader", *, validation: bool = False) -> float:
        """Return the mean loss of the loader's next batch. fsum() rounds once, so the order of the terms does not matter."""
        place = loader.state()
        inputs, targets = loader.next_batch()
        losses = (self.engine.evaluate if validation else self.engine.forward)(inputs, targets)
        loss = math.fsum(losses.flat) / max(int((targets >= 0).sum()), 1)
        self._check_finite("validation loss" if validation else "loss", loss, place)
        return loss

    def _check_finite(self, what: str, value: float, place: "dict[str, int | str | None]") -> None:
        if not math.isfinite(value):
            where = ", ".join(f"{name} {place[name]}" for name in ("epoch", "shard", "batch"))
            raise NumericalError(
                f"step {self.done}: the {what} is {value} at the loader's {where}: this step has not changed the weights; a "
                "lower lr, a warm-up or clipping may help"
            )

    def evaluate(self, loader: "DataLoader", batches: int) -> float:
        """Return the mean loss over the next `batches` batches of a loader, then restore the loader's position.

        Raises InputError for a bad number of batches, NumericalError if a loss is not finite.
        """
        batches = check_whole("batches", batches, 1, 1 << 30)
        start, counts = loader.state(), self._counts(loader, batches)
        try:
            return _mean([self._loss(loader, validation=True) for _ in range(batches)], counts)
        finally:
            loader.restore(start)

    def save(self, path: str | os.PathLike[str], job: "dict[str, Any] | None" = None) -> None:
        """Write the whole training state to a file, and keep the previous one as PATH.1 (write_state).

        job: JSON data of the caller, saved with the state. Raises PyGPTError if the file cannot be written (an older state then
        stays intact), and after a restore() that failed halfway.
        """
        self._check_whole()
        progress = Progress(self.done, self.options, self.loader.state(), job or {})
        try:
            self._file = write_state(path, self.engine.config, progress, self._buffers(), after=self._file)
        except OSError as error:
            raise PyGPTError(f"{os.fspath(path)}: cannot write the training state: {error.strerror or error}") from error

    def restore(self, state: "TrainingState | str | os.PathLike[str]") -> str:
        """Restore weights, moments, step, options and the loader's position; return a notice for the user, possibly "".

        state: an open state, or the path of one. If that file is damaged or missing, the previous state is used, and the notice
        says so. Raises InputError if the model, the data, B, T or the seed differ; nothing has changed then.
        """
        if not isinstance(state, TrainingState):
            found, notice = open_state(state)
            with found:
                return self.restore(found) or notice
        if state.config != self.engine.config:
            raise InputError(f"{state.path}: the state has a model of {state.config}, expected {self.engine.config}")
        self.loader.restore(state.progress.loader)
        self._whole = False
        state.read_into(self._buffers())
        self.done, self.options, self._file = state.progress.step, state.progress.options, state.path
        self._whole = True
        return ""

    def _check_whole(self) -> None:
        if not self._whole:
            raise PyGPTError("restore() was interrupted and left a mixture of two states: call restore() again first")

    def _buffers(self) -> "list[npt.NDArray[np.float32]]":
        return [self.engine.parameters, self.engine.first_moments, self.engine.second_moments]


def _mean(parts: list[float], counts: list[int]) -> float:
    """Return the mean loss of batches with so many targets each. Equal counts give the bits of a plain mean."""
    weights = [count / max(*counts, 1) for count in counts]
    return math.fsum(part * weight for part, weight in zip(parts, weights, strict=True)) / (math.fsum(weights) or 1)
