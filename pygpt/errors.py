"""All exceptions that pygpt raises on purpose.

    PyGPTError
    ├── InputError (ValueError)             an argument is out of its range: token, length, thread count, sampler
    │   └── DataError                       a data file is missing, damaged or of another format
    ├── CheckpointError (ValueError)        a model file or training state is missing, damaged or of another format
    ├── ClosedError (RuntimeError)          a model, cache or pool is used after close()
    └── NumericalError (ArithmeticError)    the network's numbers are not finite

Each message names the value, the limit and the way out in one line. The commands exit with status 2 for InputError and
CheckpointError, and with 1 for all others.
"""


class PyGPTError(Exception):
    """The base class of all exceptions of this package."""


class InputError(PyGPTError, ValueError):
    """An argument is out of its range. pygpt has computed nothing and changed no cache."""


class DataError(InputError):
    """A file of tokens, text or examples is missing, truncated, too long, or of another format."""


class CheckpointError(PyGPTError, ValueError):
    """A model file or training state is missing, truncated, too long, damaged, or of another format."""


class ClosedError(PyGPTError, RuntimeError):
    """The object was closed before this call."""


class NumericalError(PyGPTError, ArithmeticError):
    """The network's output is not finite, because the weights are damaged or exceed the range of float32."""


def is_whole(value: object, low: int, high: int) -> bool:
    """Return whether a value is an int (not a bool) from low to high."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def shown(value: object) -> str:
    """Return a value for a message: the first 60 characters of its repr, in one line."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return " ".join(text.split())[:60]
