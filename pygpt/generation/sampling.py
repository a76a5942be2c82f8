"""How the next token is chosen from the logits of a row.

median   the serial program's rule: the first id, in id order, at which the running sum of the softmax exceeds one half; all
         in float32, one after another (sampler.h). Deterministic, and not argmax.
greedy   the most probable id, the lowest of equals.
sample   at random, by the probabilities that are left when these have had their turn: repetition penalty, temperature, top_k,
         top_p, min_p, in the order and with the meaning of Hugging Face's transformers. Random numbers are counted, not drawn
         from a state: number n of stream s of a seed (sampler.h), so that a seed gives the same tokens on any machine.

The reference and the fast path call these same functions.
"""

import os
from operator import index

from .._kernels import greedy, median, pick, sample_weights, uniform
from ..errors import InputError, NumericalError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsFloat, SupportsIndex

    from .._kernels import Logits

DETERMINISTIC = {"median": median, "greedy": greedy}
SAMPLERS = (*DETERMINISTIC, "sample")
DEFAULT_SAMPLER = "median"
SEEDS = 1 << 64  # how many there are
INFINITY = float("inf")


def sample(name: str, logits: "Logits", row: int) -> int:
    """Choose a token id by row `row` of logits (rows, V), by "median" or "greedy". Raises NumericalError when that row is not
    finite."""
    token = DETERMINISTIC[name](logits, row)
    if token < 0:
        raise not_finite()
    return token


def not_finite() -> NumericalError:
    """What to raise about logits that are not finite."""
    return NumericalError("the network's logits are not finite: the model file's weights are damaged or out of range")


class Sampler:
    """A checked choice of sampler, and the options of "sample", which any of them implies. Immutable by convention.

    name: "median", "greedy" or "sample" (default: "sample" where one of its options is given, else "median"). do_sample:
    True stands for "sample", False for "greedy".

    Options of "sample", None for what changes nothing: temperature divides the logits, above 0; top_k keeps the k most
    probable ids and the equals of the last, 0 for all; top_p, 0 to 1, keeps the most probable ids that hold this share
    together, one at least; min_p, 0 to 1, keeps ids at least so many times as probable as the most probable one;
    repetition_penalty, above 0, divides positive logits of ids already in the sequence by this, and multiplies negative
    ones; seed, 0 to 2^64 - 1, makes it repeatable.

    Raises InputError for a value out of its range, and for options of "sample" beside another sampler.
    """

    __slots__ = ("min_p", "name", "repetition_penalty", "seed", "temperature", "top_k", "top_p")

    def __init__(
        self,
        name: str | None = None,
        *,
        do_sample: bool | None = None,
        temperature: "SupportsFloat | None" = None,
        top_k: "SupportsIndex | None" = None,
        top_p: "SupportsFloat | None" = None,
        min_p: "SupportsFloat | None" = None,
        repetition_penalty: "SupportsFloat | None" = None,
        seed: "SupportsIndex | None" = None,
    ) -> None:
        given = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        first_given = next((option for option, value in given.items() if value is not None), None)
        self.name = _name(name, do_sample, first_given)
        self.temperature = 1.0 if temperature is None else _temperature(temperature)
        self.repetition_penalty = 1.0 if repetition_penalty is None else _positive("repetition_penalty", repetition_penalty)
        self.top_p = 1.0 if top_p is None else _share("top_p", top_p)
        self.min_p = 0.0 if min_p is None else _share("min_p", min_p)
        self.top_k = 0 if top_k is None else _whole("top_k", top_k, INFINITY, "0 (all ids) or more")
        self.seed = (
            None if seed is None else _whole("seed", seed, SEEDS - 1, "from 0 to 2^64 - 1; leave it out for a random one")
        )

    def start(self) -> int | None:
        """The seed of a new sequence: the given one, else a truly random one; None where nothing is random."""
        if self.name != "sample":
            return None
        return int.from_bytes(os.urandom(8)) if self.seed is None else self.seed

    @property
    def looks_back(self) -> bool:
        """Whether choose() needs the marks of the ids already in the sequence."""
        return self.repetition_penalty != 1.0

    def choose(self, logits: "Logits", row: int, seed: int | None, stream: int, step: int, seen: bytearray | None) -> int:
        """Choose a token id by row `row` of logits (rows, V): for "sample" by number `step` of a stream of the seed, where it
        looks back by `seen` (V,), marks of the ids in the sequence. Raises NumericalError when that row is not finite."""
        if seed is None:
            return sample(self.name, logits, row)
        weights = sample_weights(
            logits,
            row,
            temperature=self.temperature,
            top_k=min(self.top_k, 1 << 62),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seen=seen,
        )
        if weights is None:
            raise not_finite()
        return pick(weights, uniform(seed, stream, step))


def _name(name: str | None, do_sample: bool | None, option: str | None) -> str:
    """The sampler that is meant; `option` is one of "sample" that was given, if any."""
    if name is not None and not (isinstance(name, str) and name in SAMPLERS):
        raise InputError(f"sampler is {shown(name)}: it must be one of {', '.join(SAMPLERS)}")
    if do_sample is not None:
        if not isinstance(do_sample, bool):
            raise InputError(f"do_sample is {shown(do_sample)}: it must be True (sampler sample) or False (sampler greedy)")
        meant = "sample" if do_sample else "greedy"
        if name not in (None, meant):
            raise InputError(
                f"do_sample is {do_sample}, which means sampler {meant}, and sampler is {name!r}: give one of them"
            )
        name = meant
    if name is None:
        return DEFAULT_SAMPLER if option is None else "sample"
    if option is not None and name != "sample":
        raise InputError(f"{option} is an option of sampler sample, and the sampler is {name}: leave one of them out")
    return name


def _number(value: "SupportsFloat") -> float:
    """A number as a float, NaN for what is none."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return INFINITY
    except (TypeError, ValueError):  # an array
        return float("nan")


def _positive(name: str, value: "SupportsFloat", way_out: str = "") -> float:
    """A finite number above 0."""
    number = _number(value)
    if not 0 < number < INFINITY:
        raise InputError(f"{name} is {shown(value)}: it must be a finite number above 0{way_out}")
    return number


def _temperature(value: "SupportsFloat") -> float:
    """A temperature; 0 is answered with what is meant by it elsewhere."""
    way_out = "; for the most probable token each time take sampler greedy" if _number(value) == 0 else ""
    return _positive("temperature", value, way_out)


def _share(name: str, value: "SupportsFloat") -> float:
    """A number from 0 to 1."""
    number = _number(value)
    if not 0 <= number <= 1:
        raise InputError(f"{name} is {shown(value)}: it must be a number from 0 to 1")
    return number


def _whole(name: str, value: "SupportsIndex", high: float, rule: str) -> int:
    """A whole number from 0 to `high`."""
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= high:
        raise InputError(f"{name} is {shown(value)}: it must be a whole number, {rule}")
    return number
