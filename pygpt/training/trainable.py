"""TrainableGPT2: train GPT-2 with forward, backward and AdamW on the pool of workers.

The forward pass of a batch is the network's step over B sequences x T rows, and keeps the activations. Losses, gradients and
updated weights have the same bits for every number of workers and every instruction set with fused multiply-add."""

from collections.abc import Iterable
from functools import partial
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from .. import cpus
from .._backward import TrainStep
from .._kernels import Trace, Weights
from .._reference import Training
from ..config import Config
from ..errors import ClosedError, InputError, sequence
from ..model import GPT2
from ..network import CHUNK
from ..pool import ThreadPool, nothing
from ..reference import SerialGPT2
from .parameters import NORM_BLOCK, AdamW, Ids, Losses, Parameters, norm_of


class TrainableGPT2(Parameters):
    """A GPT-2 in training on `threads` workers, the caller included. Use it in a `with` block, or close() it.

    It needs memory for four float32 values per parameter, and for the activations of a batch. Threads may share it: their
    calls take turns. all_workers: use all workers even if fewer would be as fast."""

    def __init__(self, config: Config, *, threads: SupportsIndex | None = None, all_workers: bool = False) -> None:
        self._all_workers = all_workers
        self._pool = ThreadPool(cpus.resolve_threads(threads))
        self.threads = count = self._pool.nth
        self._most = count if all_workers else min(count, cpus.runnable())  # workers of a step
        super().__init__(config, threads=count, all_workers=all_workers)
        self._weights = Weights(config, self.weights().stored())
        self._step, self._evaluation = self._new_step(count, keep=True), self._new_step(count, keep=False)
        self._values = config.parameters(padded=False) - config.maxT * config.C  # weights that each row uses

    def _new_step(self, count: int, *, keep: bool) -> TrainStep:
        flat = self.parameters, self.gradients, self.first_moments, self.second_moments
        return TrainStep(self._weights, count, cpus.spins_for(self._most), self.config, *flat, keep=keep)

    @property
    def updates(self) -> int:
        """The number of updates made. An update that Ctrl-C interrupts is complete and counts, or has not changed a weight."""
        return self._step.updates

    def _forward(self, inputs: Ids, targets: Ids) -> Losses:
        return self._losses(self._step, inputs, targets)

    def _evaluate(self, inputs: Ids, targets: Ids) -> Losses:
        B, T = inputs.shape
        together = max(1, CHUNK // T)  # sequences at a time: few enough that the activations stay small
        some = [slice(b, b + together) for b in range(0, B, together)]
        return np.concatenate([self._losses(self._evaluation, inputs[part], targets[part]) for part in some])

    def _backward(self, accumulate: bool, scale: float, *seed: npt.NDArray[np.float32]) -> None:
        step = self._step
        workers = self._workers(2 * step.rows)  # two matrix products for each one of the forward pass
        begin = partial(step.begin_backward, accumulate, scale, workers, *seed)
        self._pool.run(step, step.abort, before=begin, workers=workers)

    def residual_gradients(self, tokens: Iterable[SupportsIndex], dlogits: npt.ArrayLike) -> dict[str, npt.NDArray[np.float32]]:
        """Return the gradients of a function of the logits with respect to the residual streams of one sequence.

        tokens: T ids. dlogits: the function's gradients with respect to the logits, (T, V). Returns encoded (T, C), residual2
        and residual3 (L, T, C), as GPT2.activations() names them. `gradients` then has the gradients of the parameters.
        Raises InputError as forward() does, and for dlogits of another shape or that are not finite."""
        ids: npt.ArrayLike = [sequence(tokens)]  # type: ignore[assignment]  # check_batch() refuses what is not an id
        inputs, targets = self.check_batch(ids, ids)
        T, config = inputs.size, self.config
        seed = np.ascontiguousarray(dlogits, np.float32)
        if seed.shape != (T, config.V) or not np.isfinite(seed).all():
            raise InputError(f"dlogits has shape {seed.shape}: it must be (T, V) = {(T, config.V)}, of finite numbers")
        self.forward(inputs, targets)
        out = np.empty((2 * config.L + 1, T, config.C), np.float32)  # of the input of each layernorm
        self._backward(False, 1.0, seed, out)
        return {"encoded": out[0], "residual2": out[1::2], "residual3": out[2::2]}

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients together, summed in float64 in a fixed order."""
        return norm_of(self.gradient_squares(0, self.gradients.size))

    def gradient_squares(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Return the sum of squares of each block of NORM_BLOCK gradients in [start, stop); norm_of() joins them to the norm.

        Raises InputError unless start is a multiple of NORM_BLOCK, and stop too or the number of parameters."""
        size = self.gradients.size
        if not 0 <= start <= stop <= size or start % NORM_BLOCK or (stop % NORM_BLOCK and stop != size):
            raise InputError(f"slice [{start}, {stop}) of {size} gradients: it must consist of blocks of {NORM_BLOCK}")
        step, workers = self._step, self._workers_for_arrays(1)
        blocks = slice(start // NORM_BLOCK, -(-stop // NORM_BLOCK))
        copy = lambda: np.frombuffer(step.squares, "f8")[blocks].copy()  # noqa: E731
        found = self._pool.run(step, before=partial(step.begin_norm, start, stop, workers), after=copy, workers=workers)
        assert found is not None
        return found

    def add_to(self, out: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> None:
        """out += other, two flat arrays of equal size, on several workers."""

        def add(ith: int, nth: int) -> None:
            mine = slice(out.size * ith // nth, out.size * (ith + 1) // nth)
            np.add(out[mine], other[mine], out=out[mine])

        self._pool.run(add, workers=self._workers_for_arrays(3))

    def _update(self, numbers: AdamW) -> None:
        step, spans = self._step, np.array(numbers.spans, np.float64).reshape(-1, 3)
        workers = self._workers_for_arrays(7)  # AdamW reads four arrays and writes three
        rest = lambda: step(0, workers)  # noqa: E731 (completes the caller's share after an interruption)
        self._pool.run(step, abort=rest, before=lambda: step.begin_update(numbers, spans, workers), workers=workers)

    def _workers(self, rows: int) -> int:
        alone_us = self._values * (4 / cpus.READ_BYTES_PER_US + 2 * rows / cpus.FLOP_PER_US)
        return self._most if self._all_workers else cpus.workers_for(self._most, alone_us, 7 * self.config.L + 3)

    def _workers_for_arrays(self, count: int) -> int:
        alone_us = count * self.parameters.nbytes / cpus.READ_BYTES_PER_US
        return self._most if self._all_workers else cpus.workers_for(self._most, alone_us)

    def record(self, trace: Trace | None) -> None:
        """Record the workers' phases in `trace`, as GPT2.record() does; None stops the recording."""
        self._pool.run(nothing, before=lambda: setattr(self._step, "trace", trace), workers=1)

    def model(self) -> GPT2:
        """Return a GPT2 over the live weights with its own workers, for samples. Close it before this object."""
        self._pool.run(nothing, workers=1)  # raises ClosedError after close()
        return GPT2(self.weights(), threads=self.threads)

    def _losses(self, step: TrainStep, inputs: Ids, targets: Ids) -> Losses:
        workers = self._workers(inputs.size)
        begin = partial(step.begin_forward, inputs, targets, workers)
        return np.asarray(self._pool.run(step, step.abort, before=begin, after=step.finish_forward, workers=workers))

    def close(self) -> None:
        """Stop the workers. The arrays of parameters, gradients and moments remain. May be called twice."""
        self._pool.close()


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
