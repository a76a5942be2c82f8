"""One completion of a request, as far as it has come: its tokens, and what the sampler and the stop conditions remember.

Refuses to know how logits are made.
"""

from typing import NamedTuple

from .request import Request
from .sampling import not_finite
from .stop import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from .._kernels import Logits


class TokenInfo(NamedTuple):
    """A token, its log-probability (natural logarithm of the softmax of the logits, before any option of a sampler), and the
    most probable tokens in its place with theirs, the most probable first, the lowest id first among equals."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_info(logits: "Logits", row: int, token: int, count: int) -> TokenInfo:
    """Return what row `row` of logits (rows, V) says about `token` and the `count` most probable tokens."""
    from .._kernels import log_probabilities

    found = log_probabilities(logits, row, token, count)
    if found is None:
        raise not_finite()
    return TokenInfo(token, *found)


class Completion:
    """One completion of a request, as far as it has come.

    prompt and tokens: the ids given and the new ones. finish_reason: None while it goes on; "stop" after a stop token or a
    stop string, else "length"; "cancelled" if it was ended early. seed: with it, and the same options, the tokens come again;
    None if nothing is random. infos: one TokenInfo for each new token if top_logprobs were asked for, else none.
    """

    __slots__ = ("_request", "_seen", "_sequence", "_start", "_stream", "_watch", "finish_reason", "infos", "seed")

    def __init__(self, request: Request, *, seed: int | None = None, stream: int = 0) -> None:
        """`seed`: instead of the request's, or of a random one. `stream`: which of the seed's independent streams of random
        numbers."""
        self._request = request
        self._sequence = list(request.tokens)
        self._start = 0  # where in the sequence the window begins that the network sees
        self._stream = stream
        self._watch = Watch(request.stop, request.tokens)
        self._seen: bytearray | None = None  # marks of the ids in the sequence, if the sampler needs them
        if request.sampler.looks_back:
            self._seen = bytearray(request.config.V)
            for token in request.tokens:
                self._seen[token] = 1
        self.seed = request.sampler.start() if seed is None else seed
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self.infos: list[TokenInfo] = []

    @property
    def prompt(self) -> list[int]:
        """The ids given."""
        return list(self._request.tokens)

    @property
    def tokens(self) -> list[int]:
        """The new ids."""
        return self._sequence[len(self._request.tokens) :]

    @property
    def new(self) -> int:
        """How many tokens are to be added, unless a stop comes before."""
        return self._request.new

    @property
    def longest(self) -> int:
        """How many tokens the network sees at once at most."""
        return min(self._request.total, self._request.config.maxT)

    def window(self) -> list[int]:
        """Return the tokens that the network is to see now: the whole sequence, or what is left of it after sliding."""
        if len(self._sequence) - self._start > self._request.config.maxT:
            self._start = len(self._sequence) - self._request.slide_to
        return self._sequence[self._start :]

    def take(self, logits: "Logits", row: int) -> int:
        """Add the token that row `row` of logits (rows, V) leads to; return it."""
        request, step = self._request, len(self._sequence) - len(self._request.tokens)
        token = request.sampler.choose(logits, row, self.seed, self._stream, step, self._seen)
        if request.top_logprobs is not None:
            self.infos.append(token_info(logits, row, token, request.top_logprobs))
        self._sequence.append(token)
        if self._seen is not None:
            self._seen[token] = 1
        if self._watch.ends(token):
            self.finish_reason = "stop"
        elif len(self._sequence) == request.total:
            self.finish_reason = "length"
        return token

    def __repr__(self) -> str:
        return f"Completion(prompt={self.prompt}, tokens={self.tokens}, finish_reason={self.finish_reason!r})"
