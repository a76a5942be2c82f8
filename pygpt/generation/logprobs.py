"""Log-probabilities of tokens from the network's logits, before any sampler changes them."""

from typing import NamedTuple

from .._kernels import log_probabilities
from .sampling import not_finite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._kernels import Logits


class TokenInfo(NamedTuple):
    """A token, its log-probability, and the most probable tokens (id, log-probability) at the same position.

    A log-probability is the natural logarithm of the softmax of the logits, before any option of a sampler. `top` has the most
    probable token first, and the lowest id first among equals."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_info(logits: "Logits", row: int, token: int, count: int) -> TokenInfo:
    """Return the TokenInfo of `token` with the `count` most probable tokens, from row `row` of logits (rows, V)."""
    found = log_probabilities(logits, row, token, count)
    if found is None:
        raise not_finite()
    return TokenInfo(token, *found)
