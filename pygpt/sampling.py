"""How the next token is chosen from the logits of a row.

median   the serial program's rule: the first id, in id order, at which the running sum of the softmax exceeds one half; all
         in float32, one after another (sampler.h). Deterministic, and not argmax.
greedy   the most probable id, the lowest of equals.

The reference and the fast path call these same functions.
"""

from ._kernels import greedy, median
from .errors import InputError, NumericalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._kernels import Logits

SAMPLERS = {"median": median, "greedy": greedy}
DEFAULT_SAMPLER = "median"


def check_sampler(name: object) -> str:
    """Return a sampler's name; raises InputError for any other."""
    if not isinstance(name, str) or name not in SAMPLERS:
        raise InputError(f"sampler is {name!r}: it must be one of {', '.join(SAMPLERS)}")
    return name


def sample(name: str, logits: "Logits", row: int) -> int:
    """Choose a token id by row `row` of logits (rows, V). Raises NumericalError when that row is not finite."""
    token = SAMPLERS[name](logits, row)
    if token < 0:
        raise NumericalError("the network's logits are not finite: the model file's weights are damaged or out of range")
    return token
