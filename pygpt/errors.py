"""All exceptions that pygpt raises on purpose, and the checks of arguments that raise them.

Each message names the value, the limit and the way out in one line. The commands exit with status 2 for InputError and
CheckpointError, and with 1 for all others. docs/reference/errors.md lists the exceptions. whole() alone decides what is a whole
number, and real() what is a number."""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import index

TYPE_CHECKING = False  # for every module: typing takes long to import
if TYPE_CHECKING:
    from typing import Any, NoReturn, Self, SupportsIndex


class PyGPTError(Exception):
    """The base class of all exceptions of this package."""


class InputError(PyGPTError, ValueError):
    """An argument is out of its range. pygpt has not computed anything, and caches are unchanged."""


class DataError(InputError):
    """A file of tokens, text or examples is missing, truncated, too long, or of another format."""


class CheckpointError(PyGPTError, ValueError):
    """A model file or training state is missing, truncated, too long, damaged, or of another format."""


class ClosedError(PyGPTError, RuntimeError):
    """The object was closed before this call."""


class NumericalError(PyGPTError, ArithmeticError):
    """The network's output is not finite, because the weights are damaged or exceed the range of float32."""


def is_boolean(value: "Any") -> bool:
    """Return whether a value is a bool, NumPy's or a tensor's included."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))


def whole(value: "Any") -> int | None:
    """Return a whole number as an int, or None for anything else. operator.index() decides; booleans are not numbers."""
    if type(value) is int:
        return value
    try:
        return None if is_boolean(value) or getattr(value, "ndim", 0) != 0 else index(value)
    except TypeError:
        return None


def is_whole(value: object, low: int, high: int) -> bool:
    """Return whether a value is a whole number from low to high."""
    number = whole(value)
    return number is not None and low <= number <= high


def check_whole(name: str, value: object, low: int, high: float, rule: str = "") -> int:
    """Return a whole number as an int. Raises InputError, which states the rule, unless it lies from low to high."""
    number = whole(value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name} is {shown(value)}: it must be a whole number{rule or f' from {low} to {high}'}")
    return number


def real(value: "Any") -> float:
    """Return a number, Python's, NumPy's or a tensor's, as a float; NaN for anything else, booleans included."""
    if is_boolean(value) or getattr(value, "ndim", 0) != 0 or not hasattr(value, "__float__"):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return math.nan


def check_number(name: str, value: object, low: float, high: float) -> float:
    """Return a number as a float. Raises InputError unless it lies from low to high."""
    number = real(value)
    if not low <= number <= high:
        raise InputError(f"{name} is {shown(value)}: it must be a number from {low:.9g} to {high:.9g}")
    return number


def check_flag(name: str, value: "Any", meaning: str = "") -> bool:
    """Return a boolean, Python's or NumPy's, as a bool. Raises InputError for anything else."""
    if not is_boolean(value) or getattr(value, "ndim", 0) != 0:
        raise InputError(f"{name} is {shown(value)}: it must be True or False{meaning}")
    return bool(value)


def sequence(tokens: "Any") -> "list[SupportsIndex]":
    """Return token ids as a list, unchecked. An array or a tensor may be (T,) or (1, T). Raises InputError for others."""
    shape = tuple(getattr(tokens, "shape", ()))
    if len(shape) > 2 or (len(shape) == 2 and shape[0] != 1):
        rule = "one sequence has the shape (T,) or (1, T); generate_batch() takes several"
        raise InputError(f"tokens have shape {shape}: {rule}")
    tokens = tokens[0] if len(shape) == 2 else tokens
    if isinstance(tokens, Mapping):
        raise InputError(f"tokens are a mapping with the keys {shown([*tokens])}: give its input_ids")
    if isinstance(tokens, str):
        raise InputError(f"tokens are the text {shown(tokens)}: encode it first, as in Tokenizer().encode(text)")
    try:
        return list(tokens.tolist() if hasattr(tokens, "tolist") else tokens)
    except TypeError:
        raise InputError(f"tokens are {shown(tokens)}: give a list of token ids") from None


def listed(name: str, values: "Any") -> "list[Any]":
    """Return the values as a list. Raises InputError for text, a mapping, and anything that is not iterable."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {shown(values)}: it must be a list")
    return list(values)


def several(name: str, values: object, kind: type) -> "Iterable[Any]":
    """Return the given values, one value of a kind or an iterable of values, as an iterable. Raises InputError for others."""
    if values is None:
        return ()
    if isinstance(values, kind):
        return (values,)
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, dict)):
        with suppress(TypeError):  # an array without dimensions is Iterable, but iter() refuses it
            return iter(values)
    raise InputError(f"{name} is {shown(values)}: it must be a list of {kind.__name__}")


def stop_bytes(text: object) -> bytes:
    """Return a stop string's bytes. Bytes that the command line could not decode are restored. Raises InputError for others."""
    if not isinstance(text, str):
        raise InputError(f"stop string is {shown(text)}: it must be text")
    if not text:
        raise InputError("a stop string is empty, so every text would contain it: leave it out")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InputError(f"stop string {shown(text)} cannot be written in UTF-8: remove the half of a surrogate pair") from None


def near(name: object, known: "Iterable[str]") -> str:
    """Return a hint for an unknown name: the known names that are spelled alike, else all of them."""
    from difflib import get_close_matches

    known = sorted(known)
    alike = get_close_matches(str(name)[:40], known, cutoff=0.5)
    return f"did you mean {' or '.join(alike)}?" if alike else f"there are {', '.join(known)}"


class Uncopied:
    """The base of objects with threads, native memory or an open file. They can be neither copied nor pickled."""

    _instead = "make another one"

    def __reduce_ex__(self, protocol: object) -> "NoReturn":
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: {self._instead}")


class Closing(Uncopied):
    """The base of objects that a `with` block closes."""

    def close(self) -> None:
        """Release what the object holds. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plural(count: int, thing: str) -> str:
    """Return a count with its noun: 1 worker, 2 workers."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def shown(value: object) -> str:
    """Return a value for a message: the first 60 characters of its repr, in one line."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return " ".join(text.split())[:60]
