"""One completion of a request: its tokens so far, and the state of its sampler and stop conditions.

Refuses to know how logits are computed."""

from collections.abc import Sequence

from .request import Request
from .stop import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from .._kernels import Logits
    from .logprobs import TokenInfo


class Completion:
    """A running or finished completion of a request.

    prompt and tokens: the given ids and the new ids. finish_reason: None while it runs, "stop" after a stop token or stop
    string, "length" at the full length, or "cancelled". seed: the same seed and options give the same tokens; None if nothing
    is random. infos: a TokenInfo for each new token if top_logprobs is set, else empty. prompt_infos: a TokenInfo for each
    token of the prompt but the first, if prompt_logprobs is set; only the first of n completions has them. drafted and
    accepted: how many tokens speculation guessed, and how many of them were right. For engines: speculation is the request's.
    longest is the most tokens in the network's window. sequence has the given and the new ids; do not change the list."""

    def __init__(self, request: Request, *, seed: int | None = None, stream: int = 0) -> None:
        """Start a completion. seed: replaces the request's. stream: which stream of the seed's random numbers to use."""
        self._request, self.speculation = request, request.speculation
        self.sequence = list(request.tokens)
        self.longest = min(request.total, request.config.maxT)
        self._start = 0  # the position at which the network's window begins
        self._stream = stream
        self._watch = Watch(request.stop, request.tokens if request.stop_in_prompt else [])
        self.seed = request.sampler.start() if seed is None else seed
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None
        self.infos: list[TokenInfo] = []
        self.prompt_infos: list[TokenInfo] = []
        self.drafted = self.accepted = 0

    @property
    def prompt(self) -> list[int]:
        """The given ids."""
        return list(self._request.tokens)

    @property
    def tokens(self) -> list[int]:
        """The new ids."""
        return self.sequence[len(self._request.tokens) :]

    @property
    def new(self) -> int:
        """The number of tokens to add, unless a stop ends the completion earlier."""
        return self._request.new

    @property
    def unscored(self) -> bool:
        """Whether the network must still compute log-probabilities of tokens of the prompt."""
        request = self._request
        return request.prompt_logprobs and self._stream == 0 and len(self.prompt_infos) < len(request.tokens) - 1

    @property
    def guesses(self) -> int:
        """The most guesses that a step can use: each gives a token, and the step gives one more."""
        return self._request.total - len(self.sequence) - 1

    def window(self) -> list[int]:
        """Return the tokens in the network's window: the whole sequence, or its last tokens after a slide."""
        if len(self.sequence) - self._start > self._request.config.maxT:
            self._start = len(self.sequence) - self._request.slide_to
        return self.sequence[self._start :]

    def score(self, logits: "Logits", row: int) -> None:
        """Note the log-probability of the next unscored token of the prompt, from row `row` of logits (rows, V)."""
        from .logprobs import token_info

        token = self._request.tokens[len(self.prompt_infos) + 1]
        assert self._request.top_logprobs is not None
        self.prompt_infos.append(token_info(logits, row, token, self._request.top_logprobs))

    def take(self, logits: "Logits", row: int) -> int:
        """Choose a token from row `row` of logits (rows, V), add it to the sequence and return it."""
        request, token = self._request, self.choose(logits, row)
        if request.top_logprobs is not None:
            from .logprobs import token_info

            self.infos.append(token_info(logits, row, token, request.top_logprobs))
        self.sequence.append(token)
        if self._watch.ends(token):
            self.finish_reason = "stop"
        elif len(self.sequence) == request.total:
            self.finish_reason = "length"
        return token

    def choose(self, logits: "Logits", row: int, ahead: Sequence[int] = ()) -> int:
        """Return the token that row `row` of logits (rows, V) gives if the sequence goes on with the tokens `ahead`."""
        request, sequence = self._request, [*self.sequence, *ahead] if ahead else self.sequence
        if request.control is not None:
            import numpy as np

            logits, row = request.control.process(np.asarray(logits)[row], sequence, len(request.tokens))[None].data, 0
        return request.sampler.choose(logits, row, self.seed, self._stream, len(sequence) - len(request.tokens))

    def __repr__(self) -> str:
        return f"Completion(prompt={self.prompt}, tokens={self.tokens}, finish_reason={self.finish_reason!r})"
