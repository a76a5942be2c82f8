"""Trainer: run training steps with an engine, a loader and options; save and restore their whole state.

A step averages the gradients of `parts` times `accumulate` batches, clips the global norm, and updates the weights with AdamW.
A step does not depend on time, threads, ranks or chance. So a run continues from a saved state (state.py) with the same bits.

Refuses to update weights if the loss or the gradient is not finite. Refuses to know about text, data files and terminals."""

import hashlib
import math
import os
import time
from itertools import chain
from typing import Any, NamedTuple

from .._signals import see_through
from ..errors import InputError, NumericalError, PyGPTError, Uncopied, check_whole, shown
from ..pool import TRIES
from .data import DataLoader
from .parallel import TIMEOUT_S, Ranks, SharedStep
from .parameters import TrainingOptions
from .state import Progress, TrainingState, open_state, write_state
from .trainable import SerialTrainableGPT2, TrainableGPT2

CHECK_EVERY = 100  # steps after which the ranks compare their weights


class Record(NamedTuple):
    """The result of a step. step counts from 0. loss, and norm (of the gradient before clipping), are of the old weights.

    ranks: the milliseconds that each rank has computed, and those that it has communicated or waited for others."""

    step: int
    loss: float
    lr: float
    norm: float
    ms: float
    tokens_per_s: float
    ranks: tuple[tuple[float, float], ...]


class Trainer(Uncopied):
    """Train `engine` on the batches of `loader` with `options` (default: TrainingOptions()).

    `done` counts the updates made. ranks: the processes that share the steps (default: this one alone). Each has an engine with
    the same weights and a loader of the same data, and calls the same methods. Raises InputError if the loader's T exceeds the
    model's maxT, if `options` has another type, or if the number of ranks does not divide `parts`."""

    _instead = "save() writes its state, and restore() reads it"

    def __init__(
        self,
        engine: TrainableGPT2 | SerialTrainableGPT2,
        loader: DataLoader,
        options: TrainingOptions | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if not isinstance(options, TrainingOptions | None):
            raise InputError(f"options are {shown(options)}: they must be TrainingOptions")
        if (longest := engine.config.maxT) < loader.T:
            raise InputError(f"T is {loader.T}: the model takes sequences of at most {longest} tokens; make T smaller")
        self.engine, self.loader = engine, loader
        self.options, self.ranks = options or TrainingOptions(), ranks or Ranks()
        self._shared = SharedStep(engine, self.ranks, self.options.parts)
        self.done = 0
        self._file: str | None = None  # the file that this run last wrote or read: it is complete
        self._whole = True  # False while a state is restored

    def step(self) -> Record:
        """Make one update. If it raises, Ctrl-C included, the step is either undone, or complete and counted by `done`.

        In both cases training can continue or be saved. Raises NumericalError if the loss or the gradient's norm is not finite,
        PyGPTError after a restore() that failed."""
        self._check_whole()
        begin, waited = time.perf_counter(), self.ranks.seconds
        options, place, made, step = self.options, self.loader.state(), self.engine.updates, self.done + 1
        if self._shared.parts != options.parts:
            self._shared = SharedStep(self.engine, self.ranks, options.parts)
        shared = self._shared

        def settle() -> bool:
            if self.engine.updates == made:
                self.loader.restore(place)
            else:
                self.done = step
            return True

        try:
            loss = self._gradients(shared)
            norm = shared.norm()
            self._check_finite("gradient's norm", norm, place)
            lr, scale = options.learning_rate(self.done), options.gradient_scale(norm)
            self.engine.update(lr=lr, step=step, gradient_scale=scale, own=shared.own, **options.adamw())
            self.done = step
        except BaseException:
            see_through(settle, TRIES)
            raise
        shared.share()
        if self.ranks.size > 1 and self.done % CHECK_EVERY == 0:
            self.check_equal()
        seconds, waited = time.perf_counter() - begin, self.ranks.seconds - waited
        times = self.ranks.gather((1000 * (seconds - waited), 1000 * waited))
        tokens = self.loader.B * self.loader.T * options.accumulate * options.parts
        return Record(self.done - 1, loss, lr, norm, 1000 * seconds, tokens / seconds, tuple(times))

    def _gradients(self, shared: SharedStep) -> float:
        """Compute the step's gradients of this rank's slice in the engine; return the step's mean loss."""
        each, parts, found = self.options.accumulate, self.options.parts, []
        counts = self._counts(self.loader, each * parts)
        total = max(sum(counts), 1)
        self.loader.skip(shared.mine.start * each)
        for part in shared.mine:
            for i in range(each):
                found.append(self._loss(self.loader))
                self.engine.backward(accumulate=i > 0, scale=counts[part * each + i] / total)
            shared.add(part)
        self.loader.skip((parts - shared.mine.stop) * each)
        shared.reduce()
        return self._mean("loss", found, counts)

    def _counts(self, loader: DataLoader, batches: int) -> list[int]:
        """Return how many targets each of the next batches trains on. Every target of a step has the same weight."""
        if not loader.masked:
            return [loader.B * loader.T] * batches
        start = loader.state()
        try:
            return [int((loader.next_batch()[1] >= 0).sum()) for _ in range(batches)]
        finally:
            loader.restore(start)

    def _loss(self, loader: DataLoader, *, validation: bool = False) -> tuple[float, dict[str, int | str | None]]:
        """Return the mean loss of the loader's next batch, and the batch's place. fsum() rounds once, whatever the order."""
        place = loader.state()
        inputs, targets = loader.next_batch()
        losses = (self.engine.evaluate if validation else self.engine.forward)(inputs, targets)
        return math.fsum(losses.flat) / max(int((targets >= 0).sum()), 1), place

    def _mean(self, what: str, found: list[tuple[float, dict[str, int | str | None]]], counts: list[int]) -> float:
        """Return the mean of all ranks' losses, weighted by their batches' numbers of targets; equal numbers give the bits of
        a plain mean. Raises NumericalError on all ranks for the first loss that is not finite."""
        everyone = list(chain.from_iterable(self.ranks.gather(found)))
        for loss, place in everyone:
            self._check_finite(what, loss, place)
        weights = [count / max(*counts, 1) for count in counts]
        total = math.fsum(loss * weight for (loss, _), weight in zip(everyone, weights, strict=True))
        return total / (math.fsum(weights) or 1)

    def _check_finite(self, what: str, value: float, place: dict[str, int | str | None]) -> None:
        if not math.isfinite(value):
            where = ", ".join(f"{name} {place[name]}" for name in ("epoch", "shard", "batch"))
            text = f"step {self.done}: the {what} is {value} at the loader's {where}: this step has not changed the weights; "
            raise self.ranks.common(NumericalError(text + "a lower lr, a warm-up or clipping may help"))

    def evaluate(self, loader: DataLoader, batches: int) -> float:
        """Return the mean loss over the next `batches` batches of a loader, then restore the loader's position.

        The ranks share the batches. Raises InputError for a bad number of batches, NumericalError if a loss is not finite."""
        batches = check_whole("batches", batches, 1, 1 << 30)
        start, counts = loader.state(), self._counts(loader, batches)
        rank, size = self.ranks.rank, self.ranks.size
        try:
            loader.skip(batches * rank // size)
            mine = range(batches * rank // size, batches * (rank + 1) // size)
            return self._mean("validation loss", [self._loss(loader, validation=True) for _ in mine], counts)
        finally:
            loader.restore(start)

    def check_equal(self) -> None:
        """Compare the weights of all ranks by their SHA-256. Raises PyGPTError on all ranks, naming one that differs."""
        digests = self.ranks.gather(hashlib.sha256(self.engine.parameters.data).hexdigest())
        most = max(digests, key=digests.count)
        for rank, digest in enumerate(digests):
            if digest != most:
                text = f"after step {self.done}, the weights of {self.ranks.name(rank)} differ from those of most ranks: its "
                text += "memory or its network may be faulty; continue from the last saved state without that host"
                raise self.ranks.common(PyGPTError(text))

    def save(self, path: str | os.PathLike[str], job: dict[str, Any] | None = None) -> None:
        """Write the whole training state to a file, and keep the previous one as PATH.1 (write_state).

        job: JSON data of the caller, saved with the state. Only the first rank writes. Raises PyGPTError if the file cannot be
        written (an older state then stays intact), and after a restore() that failed halfway."""
        self._check_whole()
        if self.ranks.size > 1:
            self.check_equal()
        progress = Progress(self.done, self.options, self.loader.state(), job or {})
        engine = self.engine
        moments = chain.from_iterable(map(self._shared.pieces, (engine.first_moments, engine.second_moments)))

        def write() -> None:
            try:
                self._file = write_state(path, engine.config, progress, chain([engine.parameters], moments), after=self._file)
            except OSError as error:
                raise PyGPTError(f"{os.fspath(path)}: cannot write the training state: {error.strerror or error}") from error
            finally:
                receive()

        def receive() -> None:
            for _ in moments:  # the other ranks send all that they have, even if the disk is full
                pass

        if self.ranks.rank:
            receive()
        self.ranks.together(write, first=True)

    def restore(self, state: TrainingState | str | os.PathLike[str]) -> str:
        """Restore weights, moments, step, options and the loader's position; return a notice for the user, possibly "".

        state: an open state, or the path of one. If that file is damaged or missing, the previous state is used, and the notice
        says so. Raises InputError if the model, the data, B, T or the seed differ; nothing has changed then."""
        if not isinstance(state, TrainingState):
            found, notice = open_state(state)
            with found:
                return self.restore(found) or notice
        if state.config != self.engine.config:
            raise InputError(f"{state.path}: the state has a model of {state.config}, expected {self.engine.config}")
        state.view()  # a closed state changes nothing
        self.loader.restore(state.progress.loader)
        engine, self._whole = self.engine, False
        state.read_into([engine.parameters, engine.first_moments, engine.second_moments], self._shared.own)
        self.done, self.options, self._file = state.progress.step, state.progress.options, state.path
        self._whole = True
        return ""

    def _check_whole(self) -> None:
        if not self._whole:
            raise PyGPTError("restore() was interrupted and left a mixture of two states: call restore() again first")


def open_ranks(timeout: float = TIMEOUT_S) -> Ranks:
    """Return the ranks that mpiexec or srun started; without them, this process alone. Use them in a `with` block.

    timeout: seconds without a message from another rank, after which a rank ends with status 75. Raises InputError if
    there are several, but mpi4py is missing."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *(["SLURM_STEP_NUM_TASKS"] if "PMIX_RANK" in os.environ else []))
    if all(os.environ.get(name, "1") == "1" for name in names):
        return Ranks()
    try:
        from .mpi import MPIRanks
    except (ImportError, RuntimeError) as error:  # mpi4py, or the MPI library that it loads
        raise InputError(f"several ranks were started, but MPI is missing ({error}): pip install mpi4py mpich") from None
    return MPIRanks(timeout)
