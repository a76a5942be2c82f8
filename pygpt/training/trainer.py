"""Trainer: the engine, the data and the options put together, one step after the other, and the whole of it saved and restored.

A step reads `accumulate` batches, adds up the gradients of their mean losses divided by that number, in order, clips the
global norm and updates the weights with AdamW. Nothing in it depends on time, threads or chance, so a run that is restored
from a training state (state.py) goes on with the very same bits.

Refuses to update weights by a loss or gradient that is not finite. Knows nothing of text, files of data, and terminals.
"""

import math
import os
import time
from typing import NamedTuple

from .._signals import see_through
from ..errors import InputError, NumericalError, PyGPTError, is_whole, shown
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
    """What a step did. step counts from 0; loss and norm (of the gradient, before clipping) are of the weights before it."""

    step: int
    loss: float
    lr: float
    norm: float
    ms: float
    tokens_per_s: float


class Trainer:
    """Trains `engine` on the batches of `loader` as `options` say (default: TrainingOptions()).

    `done` counts the updates made. Raises InputError for a loader whose T exceeds the model's maxT, and for other options.
    """

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
        self._file: str | None = None  # what this run last wrote or read, known to be whole
        self._whole = True  # but while a state is taken over

    def step(self) -> Record:
        """Make one update. If it raises, Ctrl-C included, either nothing has changed, or the whole step was made and `done`
        counts it: training goes on from there, or is saved.

        Raises NumericalError when the loss or the gradient's norm is not finite; PyGPTError after a restore() that failed.
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
        """Leave the step's gradients in the engine; return its mean loss."""
        parts = []
        for part in range(self.options.accumulate):
            parts.append(self._loss(self.loader))
            self.engine.backward(accumulate=part > 0, scale=1 / self.options.accumulate)
        return math.fsum(parts) / len(parts)

    def _loss(self, loader: "DataLoader", *, validation: bool = False) -> float:
        """The mean loss of the loader's next batch, rounded once: the order of its terms does not matter."""
        place = loader.state()
        losses = (self.engine.evaluate if validation else self.engine.forward)(*loader.next_batch())
        loss = math.fsum(losses.flat) / losses.size
        self._check_finite("validation loss" if validation else "loss", loss, place)
        return loss

    def _check_finite(self, what: str, value: float, place: "dict[str, int | str | None]") -> None:
        if not math.isfinite(value):
            where = ", ".join(f"{name} {place[name]}" for name in ("epoch", "shard", "batch"))
            raise NumericalError(
                f"step {self.done}: the {what} is {value} at the loader's {where}: the weights have not changed since the step "
                "before; a lower lr, a warm-up or clipping may help"
            )

    def evaluate(self, loader: "DataLoader", batches: int) -> float:
        """The mean loss over the next `batches` batches of a loader, which then goes back to where it was.

        Raises InputError for a bad number of batches, NumericalError when a loss is not finite.
        """
        if not is_whole(batches, 1, 1 << 30):
            raise InputError(f"batches is {shown(batches)}: it must be a whole number from 1 to {1 << 30}")
        start = loader.state()
        try:
            return math.fsum(self._loss(loader, validation=True) for _ in range(batches)) / batches
        finally:
            loader.restore(start)

    def save(self, path: str | os.PathLike[str], job: "dict[str, Any] | None" = None) -> None:
        """Write the whole training state to a file, and keep the one before it as PATH.1 (write_state).

        job: JSON that the caller wants to find again. Raises PyGPTError when the file cannot be written; the older state, if
        any, is intact then; and after a restore() that failed halfway.
        """
        self._check_whole()
        progress = Progress(self.done, self.options, self.loader.state(), job or {})
        try:
            self._file = write_state(path, self.engine.config, progress, self._buffers(), after=self._file)
        except OSError as error:
            raise PyGPTError(f"{os.fspath(path)}: cannot write the training state: {error.strerror or error}") from error

    def restore(self, state: "TrainingState | str | os.PathLike[str]") -> str:
        """Take over a training state: weights, moments, step, options and the loader's position. Returns what to say about it.

        state: an open one, or a file's path; where that is damaged or missing, the generation before it is taken, and said so.
        Raises InputError for the state of another model, of other data, or with other B, T or seed; nothing has changed then.
        """
        if not isinstance(state, TrainingState):
            found, notice = open_state(state)
            with found:
                return self.restore(found) or notice
        if state.config != self.engine.config:
            raise InputError(f"{state.path}: the state of a model of {state.config}; this one is {self.engine.config}")
        self.loader.restore(state.progress.loader)
        self._whole = False
        state.read_into(self._buffers())
        self.done, self.options, self._file = state.progress.step, state.progress.options, state.path
        self._whole = True
        return ""

    def _check_whole(self) -> None:
        if not self._whole:
            raise PyGPTError("restore() was interrupted and has left a mixture of two states: call it again first")

    def _buffers(self) -> "list[npt.NDArray[np.float32]]":
        return [self.engine.parameters, self.engine.first_moments, self.engine.second_moments]
