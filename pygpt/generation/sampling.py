"""Choose the next token from the logits of a row.

median   the serial program's rule: the first id, in id order, at which the running sum of the softmax exceeds one half. The
         sum is float32, in ascending order (sampler.h). The choice is deterministic, but it is not the argmax.
greedy   the most probable id; the lowest of equals.
sample   a random id, after temperature, top_k, top_p and min_p. These have the names, the meaning and the order of
         Hugging Face's transformers. The choice is the Gumbel-max rule: each id has its own random number, which depends only
         on seed, stream, step and id (sampler.h), so a seed gives the same tokens on every machine. Slightly different logits
         nearly always give the same token. Temperature 0 means greedy.

The reference and the fast path call the same functions."""

import os

from .._kernels import draw, greedy, median, race, sample_weights
from ..errors import TYPE_CHECKING, InputError, NumericalError, check_flag, check_number, check_whole, real, shown

if TYPE_CHECKING:
    from typing import SupportsFloat, SupportsIndex

    from .._kernels import Logits

DETERMINISTIC = {"median": median, "greedy": greedy}
SAMPLERS = (*DETERMINISTIC, "sample")
DEFAULT_SAMPLER = "median"
SEEDS = 1 << 64  # the number of seeds
INFINITY = float("inf")


def sample(name: str, logits: "Logits", row: int) -> int:
    """Choose a token id from row `row` of logits (rows, V) by "median" or "greedy".

    Raises NumericalError if the row is not finite."""
    token = DETERMINISTIC[name](logits, row)
    if token < 0:
        raise not_finite()
    return token


def not_finite() -> NumericalError:
    """Return the error for logits that are not finite."""
    return NumericalError("the network's logits are not finite: the weights (or edits) are damaged or out of range")


class Sampler:
    """A checked sampler with the options of "sample". Do not change it after construction.

    name: "median", "greedy" or "sample" (default: "sample" if one of its options is given, else "median"). do_sample: True
    means "sample", False means "greedy".

    Options of "sample"; None has no effect. temperature divides the logits; 0 means "greedy". top_k keeps the k most probable
    ids, and ids as probable as the last of them; 0 keeps all. top_p, 0 to 1, keeps the most probable ids that together reach
    this share, at least one id. min_p, 0 to 1, keeps ids whose probability is at least min_p times the highest. seed, 0 to
    2^64 - 1, makes the result repeatable.

    Raises InputError for a value out of its range, and for an option of "sample" with another sampler."""

    __slots__ = ("min_p", "name", "seed", "temperature", "top_k", "top_p")

    def __init__(
        self,
        name: str | None = None,
        *,
        do_sample: bool | None = None,
        temperature: "SupportsFloat | None" = None,
        top_k: "SupportsIndex | None" = None,
        top_p: "SupportsFloat | None" = None,
        min_p: "SupportsFloat | None" = None,
        seed: "SupportsIndex | None" = None,
    ) -> None:
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        first_given = next((option for option, value in given.items() if value is not None), None)
        zero = temperature is not None and real(temperature) == 0
        self.name = _name(name, do_sample, first_given, zero=zero)
        self.temperature = 1.0 if temperature is None or zero else check_positive("temperature", temperature, "0 (greedy) or ")
        self.top_p = 1.0 if top_p is None else check_number("top_p", top_p, 0, 1)
        self.min_p = 0.0 if min_p is None else check_number("min_p", min_p, 0, 1)
        self.top_k = 0 if top_k is None else check_whole("top_k", top_k, 0, INFINITY, ", 0 (all ids) or more")
        rule = ", from 0 to 2^64 - 1; leave it out for a random one"
        self.seed = None if seed is None else check_whole("seed", seed, 0, SEEDS - 1, rule)

    def start(self) -> int | None:
        """Return the seed of a new sequence: the given one, else a truly random one; None if nothing is random."""
        if self.name != "sample":
            return None
        return int.from_bytes(os.urandom(8)) if self.seed is None else self.seed

    def choose(self, logits: "Logits", row: int, seed: int | None, stream: int, step: int) -> int:
        """Choose a token id from row `row` of logits (rows, V). "sample" uses the random numbers of a seed's stream and step.

        Raises NumericalError if the row is not finite."""
        if seed is None:
            return sample(self.name, logits, row)
        shape = {"temperature": self.temperature, "min_p": self.min_p}
        if self.top_k == 0 and self.top_p == 1 and 1e-3 <= self.temperature <= 1e3:  # bounds are in float32
            token = draw(logits, row, **shape, seed=seed, stream=stream, step=step)
        else:
            weights = sample_weights(logits, row, **shape, top_k=min(self.top_k, 1 << 62), top_p=self.top_p)
            token = -1 if weights is None else race(weights, seed, stream, step)
        if token < 0:
            raise not_finite()
        return token


def _name(name: str | None, do_sample: bool | None, option: str | None, *, zero: bool) -> str:
    """Return the sampler's name. option: a given option of "sample", or None. zero: whether the temperature is 0.

    Raises InputError for a contradiction."""
    if name is not None and not (isinstance(name, str) and name in SAMPLERS):
        raise InputError(f"sampler is {shown(name)}: it must be one of {', '.join(SAMPLERS)}")
    if do_sample is not None:
        do_sample = check_flag("do_sample", do_sample, " (sampler sample or sampler greedy)")
        meant = "sample" if do_sample else "greedy"
        if name not in (None, meant):
            what = f"do_sample is {do_sample}, which means sampler {meant}"
            raise InputError(f"{what}, and sampler is {name!r}: give one of them")
        name = meant
    if zero and name != "median":
        return "greedy"
    if name is None:
        return DEFAULT_SAMPLER if option is None else "sample"
    if option is not None and name != "sample":
        raise InputError(f"{option} is an option of sampler sample, and the sampler is {name}: leave one of them out")
    return name


def check_positive(name: str, value: "SupportsFloat", also: str = "") -> float:
    """Return a finite number above 0. Raises InputError for anything else."""
    number = real(value)
    if not 0 < number < INFINITY:
        raise InputError(f"{name} is {shown(value)}: it must be {also}a finite number above 0")
    return number
