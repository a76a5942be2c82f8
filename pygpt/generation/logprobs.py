"""How probable a token was: the log-probabilities of the network, before any sampler changes them."""

from typing import NamedTuple

from .._kernels import log_probabilities
from .sampling import not_finite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._kernels import Logits


class TokenInfo(NamedTuple):
    """A token, its log-probability (natural logarithm of the softmax of the logits, before any option of a sampler), and the
    most probable tokens in its place with theirs, the most probable first, the lowest id first among equals."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_info(logits: "Logits", row: int, token: int, count: int) -> TokenInfo:
    """Return what row `row` of logits (rows, V) says about `token` and the `count` most probable tokens."""
    found = log_probabilities(logits, row, token, count)
    if found is None:
        raise not_finite()
    return TokenInfo(token, *found)
