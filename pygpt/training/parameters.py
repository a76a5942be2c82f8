"""Parameters: the four flat arrays of a network in training, with loading, saving and checks; and the options of a run.

Parameters, gradients and AdamW's two moments are float32 arrays with the layout of a version 3 file. In it, wte is padded to
Vp rows, and the padding stays zero. Equal indices in the four arrays belong to the same parameter. TrainableGPT2 and its
serial twin derive from this class and share its checks. Refuses to know about activations, workers and kernels.

A run's numbers are pure functions of the options and the step. They use only float64 additions, multiplications and divisions,
because libm's cosine and power differ between machines. Defaults are those of llm.c's CPU program. Sources: Loshchilov & Hutter
2019 (AdamW) and 2017 (cosine); llm.c, train_gpt2.c (gpt2_update) and llmc/schedulers.h."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self, SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..config import HEAD, IGNORED, TENSORS, Config
from ..errors import CheckpointError, Closing, InputError, check_flag, check_number, check_whole, real, shown
from ..formats.checkpoint import stored_tensors, write_checkpoint
from ..formats.dtypes import BFLOAT16, FLOAT32, ModelFile
from ..formats.files import Path, atomic_file
from ..formats.open import open_floats
from ..formats.panels import StoredWeights
from ..hub.find import find_model

Ids = npt.NDArray[np.int32]  # (B, T)
Losses = npt.NDArray[np.float32]  # (B, T)
ALIGNMENT = 64  # bytes: a cache line, and a vector of the widest instruction set
PAGE = 4096  # bytes
APART = 576  # bytes: the offset in a page at which an array begins grows by this from one array to the next
STD = 0.02  # of GPT-2's initial weights
MATRICES = tuple(name for name, dims in (*TENSORS, HEAD) if sum(dim != "L" for dim in dims) == 2)  # the others are vectors
GAINS = ("ln1w", "ln2w", "lnfw")
RESIDUAL = ("attprojw", "fcprojw")  # the projections that write to the residual stream, 2L in total
PIECE = 1 << 16  # random numbers made at a time: few enough to stay in the cache
LARGEST_SEED = 2**64 - 1
ADAMW = ("beta1", "beta2", "eps", "weight_decay", "decay_matrices_only")
SCHEDULES = ("constant", "cosine", "linear")
MOST_STEPS = 2**31 - 1
MOST_MICRO_BATCHES = 10**6
MOST_PARTS = 1 << 16
NORM_BLOCK = 1 << 16  # gradients whose squares are summed together, as in _backward.pyx


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Hold the options of one training run; immutable. Raises InputError for an option out of its range.

    steps                   the number of updates; the schedule ends there
    lr                      the highest learning rate
    beta1, beta2, eps       AdamW's decay rates of the running means, and the number added to the square root
    weight_decay            pulls weights towards zero, independent of the gradient; on every tensor, as in llm.c
    decay_matrices_only     decay only matrices, not biases and LayerNorms
    clip                    the largest global norm; a larger gradient is scaled down to it; 0: no clipping
    accumulate              micro-batches in one step, whose gradients are averaged. With a power of two, all gradients but
                            wte's have the same bits as those of one large batch.
    parts                   groups of `accumulate` micro-batches in one step. Each group starts a sum of its own, and a fixed
                            binary tree adds the sums. Up to this number of ranks can share a step (pygpt.open_ranks).
    warmup                  steps in which the learning rate rises from lr / warmup to lr
    schedule                "constant" after the warm-up; "cosine": half a wave from lr down to min_lr; "linear": a line
    min_lr                  the learning rate at the end of the cosine or the line"""

    steps: int = 40
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_matrices_only: bool = False
    clip: float = 0.0
    accumulate: int = 1
    parts: int = 1
    warmup: int = 0
    schedule: str = "constant"
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"steps": check_whole("steps", self.steps, 1, MOST_STEPS)}
        for name, most in (("accumulate", MOST_MICRO_BATCHES), ("parts", MOST_PARTS)):
            checked[name] = check_whole(name, getattr(self, name), 1, most)
        checked["warmup"] = check_whole("warmup", self.warmup, 0, checked["steps"])
        checked["decay_matrices_only"] = check_flag("decay_matrices_only", self.decay_matrices_only)
        highest = {"lr": 1.0, "min_lr": real(self.lr), "beta1": 0.9999999, "beta2": 0.9999999}
        for name, high in (highest | {"eps": 1.0, "weight_decay": 1000.0, "clip": 1e30}).items():
            checked[name] = check_number(name, getattr(self, name), 1e-30 if name == "eps" else 0.0, high)
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # NumPy scalars round and serialize differently
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            raise InputError(f"schedule is {shown(self.schedule)}: it must be one of {', '.join(SCHEDULES)}")

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: warm-up, then constant, or falling to min_lr."""
        if step < self.warmup:
            return self.lr * ((step + 1) / self.warmup)
        if self.schedule == "constant":
            return self.lr
        if step >= self.steps:
            return self.min_lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.min_lr + (1 - done if self.schedule == "linear" else 0.5 * (1 + cos_pi(done))) * (self.lr - self.min_lr)

    def gradient_scale(self, norm: float) -> float:
        """Return the factor that reduces a gradient's global norm to at most `clip`."""
        return self.clip / norm if 0 < self.clip < norm else 1.0

    def adamw(self) -> dict[str, Any]:
        """Return the options that every AdamW step takes unchanged."""
        return {name: getattr(self, name) for name in ADAMW}

    def as_dict(self) -> dict[str, Any]:
        """Return the options as keyword arguments for TrainingOptions."""
        return asdict(self)


class AdamW(NamedTuple):
    """Hold the numbers of one checked AdamW step, the same for every engine. g is the gradient times gradient_scale; m = beta1
    * m + rest1 * g; v = beta2 * v + rest2 * g * g. Then the parameter decreases by lr * (m / correction1 / (sqrt(v /
    correction2) + eps) + decay * parameter). The rests and corrections are computed once, in double precision. Source:
    Loshchilov and Hutter 2019, as llm.c and PyTorch compute it."""

    lr: float
    beta1: float
    beta2: float
    rest1: float  # 1 - beta1
    rest2: float  # 1 - beta2
    correction1: float  # 1 - beta1 ** step
    correction2: float  # 1 - beta2 ** step
    eps: float
    gradient_scale: float
    spans: list[tuple[int, int, float]]  # (start, stop, decay) over all parameters in order; equal neighbours are merged


class Parameters(Closing):
    """Hold a network's weights, gradients and moments, all zeros at first.

    `threads` and `all_workers` are for the engines that derive from this class.

    `parameters`, `gradients`, `first_moments` and `second_moments` are live, writable arrays of shape (P,) with
    P = config.parameters(padded=True), each aligned to 64 bytes."""

    _instead = "save() writes a file, and load() reads it"
    # The engines that derive from this class define these methods, whose arguments are checked.
    _forward: Callable[[Ids, Ids], Losses]
    _evaluate: Callable[[Ids, Ids], Losses]
    _backward: Callable[..., None]
    _update: Callable[[AdamW], None]

    def __init__(self, config: Config, *, threads: SupportsIndex | None = None, all_workers: bool = False) -> None:
        self.config = config
        self._places = {name: (shape, offset, size) for name, shape, offset, size in config.tensors(padded=True)}
        P = config.parameters(padded=True)
        self.parameters, self.gradients, self.first_moments, self.second_moments = zeros_to_update(P)

    @classmethod
    def load(cls, path: Path | None = None, *, threads: SupportsIndex | None = None, all_workers: bool = False) -> Self:
        """Start from a model file of plain floats, widened to float32: `path`, else the one that find_model() finds.

        Raises CheckpointError for no model, and quantised or not finite weights; InputError for a bad thread count."""
        with open_floats(find_model(path)[0]) as checkpoint:
            model = cls(checkpoint.config, threads=threads, all_workers=all_workers)
            model.take(checkpoint)
        return model

    def take(self, checkpoint: ModelFile) -> None:
        """Copy the weights of an open model of the same dimensions. Raises CheckpointError for one that is not finite."""
        for name in self._places:
            start = 0
            for rows in checkpoint.pieces(name):
                if not np.isfinite(rows).all():
                    value = rows[~np.isfinite(rows)][0]
                    raise CheckpointError(f"{checkpoint.path}: {name} has {value}: weights to train must be finite")
                self.tensor(name)[start : start + len(rows)] = rows
                start += len(rows)

    @classmethod
    def random(cls, config: Config, *, seed: SupportsIndex, threads: SupportsIndex | None = None) -> Self:
        """Start from GPT-2's random weights. Equal seeds give equal bits on every machine.

        Matrices have mean 0 and standard deviation 0.02, and 0.02 / sqrt(2L) for residual projections. Biases are 0, and gains
        of layer norms 1. seed: 0 to 2**64 - 1. Source: Radford et al. 2019; details from nanoGPT and llm.c."""
        source = np.random.PCG64(check_whole("seed", seed, 0, LARGEST_SEED))
        model = cls(config, threads=threads)
        for name in model._places:
            values = model.tensor(name).reshape(-1)  # a view: tensors are contiguous
            if name in GAINS:
                values.fill(1)
            elif name in MATRICES:
                std = STD / math.sqrt(2 * config.L) if name in RESIDUAL else STD
                for start in range(0, values.size, PIECE):
                    piece = values[start : start + PIECE]
                    piece[:] = std * normal(source, piece.size)
        return model

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return a live view of one tensor of the parameters by its name in config.table, wte with V rows."""
        return self._view(self.parameters, name)

    def gradient(self, name: str) -> npt.NDArray[np.float32]:
        """Return a live view of the gradient of one tensor, with the tensor's shape."""
        return self._view(self.gradients, name)

    def _view(self, flat: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.float32]:
        if name not in self._places:
            raise InputError(f"tensor {name!r} is unknown: the names are {', '.join(self._places)}")
        shape, offset, size = self._places[name]
        array = flat[offset : offset + size].reshape(shape)
        return array[: self.config.V] if name == "wte" else array

    def save(self, path: Path, *, version: int = 3) -> None:
        """Write the parameters: as a .safetensors file if the name ends so, else as a checkpoint of version 1, 3 or 5.

        A .safetensors file holds transformers' tensors, and config.json in its metadata: it describes every model. Version 5
        means bfloat16 there. It gets its name when it is complete. Raises InputError for a model that .bin cannot hold."""
        if not os.fspath(path).endswith(".safetensors"):
            write_checkpoint(path, self.config, {name: self.tensor(name) for name in self._places}, version=version)
            return
        import json

        from ..formats.huggingface import CONFIG_FILE, settings_of, write_tensors

        kind = BFLOAT16 if version == 5 else FLOAT32
        with atomic_file(path) as file:
            write_tensors(file, self.weights(), kind, {CONFIG_FILE: json.dumps(settings_of(self.config, kind.name))})

    def pieces(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """Yield a tensor in one piece for each layer, as ModelFile.pieces() does."""
        array = self.tensor(name)
        yield from (array[i : i + 1] for i in range(len(array))) if array.ndim == 3 else [array]

    def weights(self) -> StoredWeights:
        """Return the parameters with a checkpoint's interface, for a model that uses them while they change."""
        return StoredWeights(self.config, stored_tensors(self.config, self.parameters.data.cast("B"), FLOAT32, padded=True))

    def check_batch(self, inputs: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[Ids, Ids]:
        """Return inputs and targets as fresh contiguous int32 arrays (B, T), with B >= 1, 1 <= T <= maxT and ids below V.

        A target may be -100. Raises InputError for anything else; the error names the first wrong value."""
        checked = self._check_ids("inputs", inputs), self._check_ids("targets", targets, IGNORED)
        if checked[0].shape != checked[1].shape:
            raise InputError(f"targets has shape {checked[1].shape}, inputs {checked[0].shape}: each input needs one target")
        return checked

    def _check_ids(self, name: str, ids: npt.ArrayLike, also: int = 0) -> Ids:
        """Check one of the batch's two arrays of token ids, which may hold `also`; return it as contiguous int32."""
        try:
            array: npt.NDArray[Any] = np.array(ids)  # a copy: the caller cannot change it after the check
        except (ValueError, TypeError, OverflowError) as error:  # for example rows of unequal length
            raise InputError(f"{name} is not an array (B, T) of token ids: {error}") from None
        if array.ndim != 2 or not array.size:
            raise InputError(f"{name} has shape {array.shape}: it must be (B, T), at least one sequence of at least one token")
        if array.dtype.kind not in "iu":
            raise InputError(f"{name} has dtype {array.dtype}: token ids must be integers")
        if array.shape[1] > self.config.maxT:
            raise InputError(f"{name} has sequences of {array.shape[1]} tokens: the model takes at most {self.config.maxT}")
        wrong = ((array < 0) | (array >= self.config.V)) & (array != also)
        if wrong.any():
            b, t = (int(i) for i in np.unravel_index(int(wrong.argmax()), wrong.shape))
            rule = f"from 0 to {self.config.V - 1}" + (f", or {also} for none" if also else "")
            raise InputError(f"{name}[{b}, {t}] is {array[b, t]}: it must be a token id of this model, {rule}")
        return np.ascontiguousarray(array, np.int32)

    def forward(self, inputs: npt.ArrayLike, targets: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the loss of predicting each target, (B, T), and keep the activations for backward().

        inputs, targets: token ids (B, T). A target of -100 has loss 0, and counts neither in the mean nor in gradients.
        Raises InputError for an id outside the vocabulary, different shapes, or T > maxT."""
        return self._forward(*self.check_batch(inputs, targets))

    def evaluate(self, inputs: npt.ArrayLike, targets: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the losses that forward() would return, (B, T). The activations of the last forward() stay."""
        return self._evaluate(*self.check_batch(inputs, targets))

    def backward(self, *, accumulate: bool = False, scale: SupportsFloat = 1.0) -> None:
        """Compute the gradients of scale * mean loss of the last forward(). Call it once after each forward().

        accumulate: add them to `gradients` instead of replacing these. Raises InputError without a forward() before."""
        self._backward(accumulate, check_number("scale", scale, -1e30, 1e30))

    def update(
        self,
        *,
        lr: SupportsFloat,
        step: SupportsIndex,
        beta1: SupportsFloat = 0.9,
        beta2: SupportsFloat = 0.999,
        eps: SupportsFloat = 1e-8,
        weight_decay: SupportsFloat = 0.0,
        decay_matrices_only: bool = False,
        gradient_scale: SupportsFloat = 1.0,
        own: slice | None = None,
    ) -> None:
        """Update the parameters by one step of AdamW. Raises InputError for a value out of its range.

        step counts from 1. With decay_matrices_only, biases and layer norms do not decay, as in GPT-2's training. Otherwise
        every parameter decays, as in llm.c's CPU program. own: update only this slice of the flat arrays."""
        step = check_whole("step", step, 1, 2**31 - 1, " from 1, the count of updates")
        lr, eps = check_number("lr", lr, 0.0, 1e6), check_number("eps", eps, 1e-30, 1e6)
        beta1, beta2 = check_number("beta1", beta1, 0.0, 0.9999999), check_number("beta2", beta2, 0.0, 0.9999999)
        weight_decay = check_number("weight_decay", weight_decay, 0.0, 1e6)
        gradient_scale = check_number("gradient_scale", gradient_scale, 0.0, 1e30)
        decay_matrices_only = check_flag("decay_matrices_only", decay_matrices_only)
        first, last, _ = (own or slice(None)).indices(self.parameters.size)
        every = self._spans(weight_decay, decay_matrices_only)
        own_spans = ((max(start, first), min(stop, last), decay) for start, stop, decay in every)
        spans = [span for span in own_spans if span[0] < span[1]]
        rests, corrections = (1 - beta1, 1 - beta2), (1 - power(beta1, step), 1 - power(beta2, step))
        self._update(AdamW(lr, beta1, beta2, *rests, *corrections, eps, gradient_scale, spans))

    def add_to(self, out: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> None:
        """out += other, two flat arrays of equal size."""
        out += other

    def _spans(self, weight_decay: float, decay_matrices_only: bool) -> Iterator[tuple[int, int, float]]:
        """Yield (start, stop, decay); neighbouring tensors of equal decay share one span."""
        begin, end, current = 0, 0, weight_decay  # wte, the first tensor, is a matrix
        for name, (_, offset, size) in self._places.items():
            decay = weight_decay if name in MATRICES or not decay_matrices_only else 0.0
            if decay != current:
                yield begin, end, current
                begin, current = offset, decay
            end = offset + size
        yield begin, end, current


def norm_of(squares: npt.NDArray[np.float64]) -> float:
    """Return the root of the sum of blocks' squares, (blocks,), added in ascending order."""
    total = 0.0
    for square in squares.tolist():  # sum() would compensate rounding errors in some versions of Python
        total += square
    return math.sqrt(total)


def power(base: float, exponent: int) -> float:
    """Return base ** exponent by repeated squaring: the last bit of pow() can differ between systems."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def cos_pi(x: float) -> float:
    """Return cos(pi x) for x in [0, 1] by a Taylor polynomial: the same bits on every machine, error below 1e-15."""
    if x > 0.5:
        return -cos_pi(1 - x)
    square = (math.pi * x) * (math.pi * x)  # ** would call libm's pow
    total = 0.0
    for k in range(11, -1, -1):  # the next term is below 1e-18
        total = total * square + (-1) ** k / math.factorial(2 * k)
    return total


def aligned_zeros(size: int, alignment: int = ALIGNMENT, shift: int = 0) -> npt.NDArray[np.float32]:
    """Return zeros (size,) whose first element has an address of `shift` bytes beyond a multiple of `alignment`. The system
    reserves memory for a page only when the page is first written."""
    room = np.zeros(size + (alignment + shift) // 4, np.float32)
    skip = (-room.ctypes.data % alignment + shift) // 4
    return room[skip : skip + size]


def zeros_to_update(size: int) -> list[npt.NDArray[np.float32]]:
    """Return four arrays (size,) of zeros at different offsets in their pages. At equal offsets, as the allocator gives them,
    equal indices share one set of the first-level cache, and AdamW's pass takes 1.06 times as long."""
    return [aligned_zeros(size, PAGE, i * APART) for i in range(4)]


def normal(source: np.random.PCG64, size: int) -> npt.NDArray[np.float64]:
    """Return `size` nearly normal random numbers, each the sum of twelve uniform ones minus its mean: variance 1, kurtosis 2.9,
    largest magnitude 6. Integers and two exact operations give the same bits on every system, unlike a library's logarithm.
    NumPy guarantees the stream of PCG64.random_raw(). A number takes three 64-bit words, a word has four uniform numbers.
    Source: Irwin 1927 and Hall 1927 for the sum; O'Neill 2014 for PCG64."""
    words = source.random_raw(3 * size).reshape(size, 3)
    pairs = (words & 0x0000FFFF0000FFFF) + (words >> 16 & 0x0000FFFF0000FFFF)  # each word has two sums of two numbers
    sixes = pairs[:, 0] + pairs[:, 1] + pairs[:, 2]  # each word has two sums of six numbers
    total = (sixes & 0xFFFFFFFF) + (sixes >> 32)
    return (total.astype("f8") - 6 * 0xFFFF) / 0x10000
