"""The options of AdamW, gradient clipping, accumulation, and the learning-rate schedule.

Everything here is a pure function of the options and the step. It uses only float64 additions, multiplications and divisions.
The schedule's cosine is our own polynomial, because libm's cosine differs between machines. TrainableGPT2.update() changes
the weights, and the Trainer orders the operations of a step.

Defaults are those of llm.c's CPU program. Sources: Loshchilov & Hutter 2019 (AdamW) and 2017 (cosine); llm.c, train_gpt2.c
(gpt2_update) and llmc/schedulers.h.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError, check_flag, check_number, check_whole, real, shown

ADAMW = ("beta1", "beta2", "eps", "weight_decay", "decay_matrices_only")
SCHEDULES = ("constant", "cosine", "linear")
MOST_STEPS = 2**31 - 1
MOST_MICRO_BATCHES = 10**6
MOST_PARTS = 1 << 16


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
        left = 1 - done if self.schedule == "linear" else 0.5 * (1 + cos_pi(done))
        return self.min_lr + left * (self.lr - self.min_lr)

    def gradient_scale(self, norm: float) -> float:
        """Return the factor that reduces a gradient's global norm to at most `clip`."""
        return self.clip / norm if 0 < self.clip < norm else 1.0

    def adamw(self) -> dict[str, Any]:
        """Return the options that every AdamW step takes unchanged."""
        return {name: getattr(self, name) for name in ADAMW}

    def as_dict(self) -> dict[str, Any]:
        """Return the options as keyword arguments for TrainingOptions."""
        return asdict(self)


def cos_pi(x: float) -> float:
    """Return cos(pi x) for x in [0, 1] by a Taylor polynomial: the same bits on every machine, error below 1e-15."""
    if x > 0.5:
        return -cos_pi(1 - x)
    square = (math.pi * x) * (math.pi * x)  # ** would call libm's pow
    total = 0.0
    for k in range(11, -1, -1):  # the next term is below 1e-18
        total = total * square + (-1) ** k / math.factorial(2 * k)
    return total
