"""The loop: tokens in, tokens streamed out, one for each pass through the network. Knows nothing about text.

The loop sees the network as one function: given the tokens that are new since the last call, it returns logits whose last
row belongs to the last token. The cached network and the serial reference are two such functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from ._kernels import check_token
from .config import Config
from .errors import InputError, is_whole
from .sampling import check_sampler, sample

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._kernels import Logits

DEFAULT_TOTAL = 10  # the serial program's n: tokens in all, the prompt included


def check_tokens(config: Config, tokens: Iterable[int]) -> list[int]:
    """Return token ids as a list of 1 to maxT ints below V; raises InputError for anything else."""
    checked = [check_token(token, config.V) for token in tokens]
    if not checked:
        raise InputError("no token was given: at least one token id is needed to continue from")
    if len(checked) > config.maxT:
        raise InputError(f"{len(checked)} tokens were given: the model takes at most {config.maxT}")
    return checked


class Request:
    """A checked order for a completion: `tokens` in, up to `total` tokens in all, chosen by `sampler`.

    Raises InputError for an empty prompt, an id outside the vocabulary, a total that leaves no room for a new token or
    exceeds maxT, both total and max_new_tokens, or an unknown sampler.
    """

    def __init__(
        self,
        config: Config,
        tokens: Iterable[int],
        *,
        total: int | None = None,
        max_new_tokens: int | None = None,
        sampler: str = "median",
    ) -> None:
        self.tokens = check_tokens(config, tokens)
        self.sampler = check_sampler(sampler)
        count = len(self.tokens)
        if total is not None and max_new_tokens is not None:
            raise InputError("total and max_new_tokens were both given: they say the same thing, give one")
        if max_new_tokens is not None:
            room = config.maxT - count
            if not is_whole(max_new_tokens, 1, room):
                raise InputError(
                    f"max_new_tokens is {max_new_tokens!r}: with {count} tokens given it must be a whole number "
                    f"from 1 to {room}, for the model takes {config.maxT} tokens"
                )
            self.total = count + max_new_tokens
            return
        self.total = DEFAULT_TOTAL if total is None else total
        if not is_whole(self.total, 2, config.maxT):
            raise InputError(
                f"total is {self.total!r}: it counts all tokens, those given included, and must be a whole number "
                f"from 2 to the model's {config.maxT}"
            )
        if count >= self.total:
            raise InputError(
                f"{count} tokens were given, and {self.total} in all leave no room for a new one: "
                f"give at most {self.total - 1}, or raise the total (-n)"
            )

    @property
    def new(self) -> int:
        """How many tokens this request adds."""
        return self.total - len(self.tokens)

    def run(self, append: "Callable[[list[int]], Logits]") -> Iterator[int]:
        """Yield the new tokens one by one. `append(tokens)` runs the network over tokens new to it and returns logits."""
        new = self.tokens
        for _ in range(self.new):
            logits = append(new)
            token = sample(self.sampler, logits, len(logits) - 1)
            yield token
            new = [token]


class Completer(ABC):
    """What can answer a request: the cached network and the serial reference."""

    config: Config

    @abstractmethod
    def complete(self, request: Request) -> Iterator[int]:
        """Answer a checked request; yields each new id as soon as it is known."""

    def generate(
        self,
        tokens: Iterable[int],
        *,
        total: int | None = None,
        max_new_tokens: int | None = None,
        sampler: str = "median",
    ) -> Iterator[int]:
        """Complete a sequence of token ids; yields each new id as soon as it is known.

        total: tokens in all, the given ones included (default 10); or max_new_tokens: how many to add. sampler: "median",
        the serial program's rule, or "greedy". Raises InputError before anything runs.
        """
        return self.complete(Request(self.config, tokens, total=total, max_new_tokens=max_new_tokens, sampler=sampler))
