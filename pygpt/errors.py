"""Every exception that pygpt raises on purpose.

    PyGPTError
    ├── InputError (ValueError)             an argument is out of its range: token, length, thread count, sampler
    │   └── DataError                       a data file is missing, damaged or of another format
    ├── CheckpointError (ValueError)        a model file or training state is missing, damaged or something else
    ├── ClosedError (RuntimeError)          a model, cache or pool is used after close()
    └── NumericalError (ArithmeticError)    the network produced numbers that are not finite

Each message names the value found, the limit it broke and the way out, in one line. The command turns InputError and
CheckpointError into exit status 2 and everything else into 1.
"""


class PyGPTError(Exception):
    """Base of all exceptions of this package."""


class InputError(PyGPTError, ValueError):
    """An argument is out of its range. Nothing was computed and no cache has changed."""


class DataError(InputError):
    """A file of tokens, text or examples is missing, truncated, oversized, or not of its format."""


class CheckpointError(PyGPTError, ValueError):
    """A model file or training state is missing, truncated, oversized, damaged, or not of a format that is read."""


class ClosedError(PyGPTError, RuntimeError):
    """The object was closed before this call."""


class NumericalError(PyGPTError, ArithmeticError):
    """The network's output is not finite: the weights are damaged or out of float32's range."""


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether a value is an int (not a bool) from low to high: the check behind most InputErrors."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def shown(value: object) -> str:
    """A value for a message: the beginning of its repr, in one line."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return " ".join(text.split())[:60]
