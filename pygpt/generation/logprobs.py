"""How probable a token was: the network's own log-probabilities, before any sampler has its say."""

from typing import NamedTuple

from .._kernels import log_probabilities
from .sampling import not_finite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._kernels import Logits


class TokenInfo(NamedTuple):
    """A token, its log-probability (natural logarithm of the softmax of the logits, no sampler's option applied), and the most
    probable tokens in its place with theirs, the most probable first, the lowest id of equals first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_info(logits: "Logits", row: int, token: int, count: int) -> TokenInfo:
    """What row `row` of logits (rows, V) says about `token` and the `count` most probable ones."""
    found = log_probabilities(logits, row, token, count)
    if found is None:
        raise not_finite()
    return TokenInfo(token, *found)
