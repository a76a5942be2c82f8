"""Log-probabilities of tokens from the network's logits, before any sampler changes them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .._kernels import log_probabilities
from ..network import CHUNK, KVCache, Network
from .prefix import common_prefix
from .sampling import not_finite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._kernels import Logits

SCORED = 128  # rows of logits at a time: 26 MB with GPT-2's vocabulary


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


def score(
    network: Network, cache: KVCache, held: list[int], prompt: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Iterator[list[TokenInfo]]:
    """Yield for each continuation of a prompt the TokenInfo of its tokens, with the most probable one. cache: holds the tokens
    `held`; afterwards, both hold the prompt without its last token. What they share with the prompt is not computed again, and
    for each continuation only its own tokens run, after a copy of the cache."""
    del held[common_prefix(held, prompt, len(prompt) - 1) :]
    cache.truncate(len(held))
    while piece := prompt[len(held) : -1][:CHUNK]:
        network.extend(cache, piece)
        held += piece
    for one in continuations:
        inputs, infos = [prompt[-1], *one[:-1]], []
        branch = cache.copy(capacity=len(held) + len(inputs))
        for start in range(0, len(one), SCORED):
            logits = network.step([(token, branch, True) for token in inputs[start : start + SCORED]])
            infos += [token_info(logits, i, token, 1) for i, token in enumerate(one[start : start + SCORED])]
        yield infos
