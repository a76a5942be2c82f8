"""The loop: tokens in, tokens streamed out, one for each pass through the network. Knows nothing about text but to stop at it.

The loop sees the network as one function: given sequences, it returns the logits that follow the last token of each. The
cached network, which runs only what is new, and the serial reference, which runs everything again, are two such functions.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from .._kernels import check_token
from ..config import Config
from ..errors import InputError, is_whole, shown
from .sampling import Sampler
from .stop import Stop, Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypedDict, Unpack

    from .._kernels import Logits
    from .logprobs import TokenInfo
    from .prefix import Memory, PrefixCache

    class Options(TypedDict, total=False):
        """What a completion may be asked for beside a seed, as Completer.generate() describes it."""

        total: int | None
        max_new_tokens: int | None
        sampler: str | None
        do_sample: bool | None
        temperature: SupportsFloat | None
        top_k: SupportsIndex | None
        top_p: SupportsFloat | None
        min_p: SupportsFloat | None
        repetition_penalty: SupportsFloat | None
        stop_token_ids: int | Iterable[int] | None
        stop_strings: str | Iterable[str] | None
        overflow: str | None
        slide_to: int | None

    class Streamer(Protocol):
        """Who listens to generate(): transformers' streamers, and whatever has these two methods."""

        def put(self, value: Any) -> object:
            """Take int64 ids: the prompt (1, T) first, then each new token (1,)."""

        def end(self) -> object:
            """Know that there are no more."""


DEFAULT_TOTAL = 10  # the serial program's n: tokens in all, the prompt included
UNBOUNDED = 10**18  # more tokens than anybody waits for
OVERFLOWS = ("stop", "slide")
LIVE = 64  # sequences decoded together: more of them gain little, and each takes memory for its keys and values


def check_ids(config: Config, tokens: Iterable[int]) -> list[int]:
    """Return token ids as a list of at least one int below V; raises InputError for anything else."""
    try:
        tokens = iter(tokens)
    except TypeError:
        raise InputError(f"tokens are {shown(tokens)}: give a list of token ids") from None
    checked = [check_token(token, config.V) for token in tokens]
    if not checked:
        raise InputError("no token was given: at least one token id is needed to continue from")
    return checked


def check_tokens(config: Config, tokens: Iterable[int]) -> list[int]:
    """Return token ids as a list of 1 to maxT ints below V; raises InputError for anything else."""
    checked = check_ids(config, tokens)
    if len(checked) > config.maxT:
        raise InputError(f"{len(checked)} tokens were given: the model takes at most {config.maxT}")
    return checked


class Request:
    """A checked order for a completion: `tokens` in, up to `total` tokens in all. Generate() describes the options.

    Raises InputError for an empty prompt, an id outside the vocabulary, a total that leaves no room for a new token or
    exceeds maxT where no overflow is asked for, both total and max_new_tokens, or an option out of its range.
    """

    def __init__(
        self,
        config: Config,
        tokens: Iterable[int],
        *,
        total: int | None = None,
        max_new_tokens: int | None = None,
        overflow: str | None = None,
        slide_to: int | None = None,
        stop_token_ids: "int | Iterable[int] | None" = None,
        stop_strings: "str | Iterable[str] | None" = None,
        top_logprobs: int | None = None,
        **sampling: "Any",
    ) -> None:
        if overflow is not None and not (isinstance(overflow, str) and overflow in OVERFLOWS):
            raise InputError(f"overflow is {shown(overflow)}: it must be one of {', '.join(OVERFLOWS)}")
        self.config, self.overflow = config, overflow
        self.tokens = check_ids(config, tokens) if overflow == "slide" else check_tokens(config, tokens)
        self.sampler = Sampler(sampling.pop("sampler", None), **sampling)
        self.stop = Stop(config, stop_token_ids, stop_strings)
        self.slide_to = self._check_slide_to(slide_to)
        self.top_logprobs = top_logprobs
        if top_logprobs is not None and not is_whole(top_logprobs, 0, config.V):
            raise InputError(f"top_logprobs is {shown(top_logprobs)}: it must be a whole number from 0 to {config.V}")
        self.total = self._check_total(total, max_new_tokens)

    def _check_slide_to(self, slide_to: int | None) -> int:
        """How many tokens are left when a full window slides."""
        maxT = self.config.maxT
        if slide_to is None:
            return max(maxT // 2, 1)
        if self.overflow != "slide":
            raise InputError(f'slide_to is {shown(slide_to)}, and nothing slides: it goes with overflow="slide"')
        if not is_whole(slide_to, 1, maxT):
            raise InputError(f"slide_to is {shown(slide_to)}: it must be a whole number from 1 to the model's {maxT}")
        return slide_to

    def _check_total(self, total: int | None, max_new_tokens: int | None) -> int:
        """How many tokens there are in the end, unless a stop comes before."""
        count, maxT = len(self.tokens), self.config.maxT
        longest = maxT if self.overflow is None else UNBOUNDED
        if total is not None and max_new_tokens is not None:
            raise InputError("total and max_new_tokens were both given: they say the same thing, give one")
        if max_new_tokens is not None:
            if not is_whole(max_new_tokens, 1, longest - count):
                raise InputError(
                    f"max_new_tokens is {shown(max_new_tokens)}: with {count} tokens given it must be a whole number "
                    f"from 1 to {longest - count}" + (f", for the model takes {maxT} tokens" if longest == maxT else "")
                )
            total = count + max_new_tokens
        elif total is None:
            total = DEFAULT_TOTAL
        if not is_whole(total, 2, longest):
            raise InputError(
                f"total is {shown(total)}: it counts all tokens, those given included, and must be a whole number "
                f"from 2 to " + (f"the model's {maxT}" if longest == maxT else str(longest))
            )
        if count >= total:
            raise InputError(
                f"{count} tokens were given, and {total} in all leave no room for a new one: "
                f"give at most {total - 1}, or raise the total (-n)"
            )
        if self.overflow == "stop" and count == maxT:
            raise InputError(
                f"{count} tokens were given, and the model takes {maxT}: no room for a new one; "
                "give fewer, or let the window slide (overflow slide)"
            )
        return min(total, maxT) if self.overflow == "stop" else total

    @property
    def new(self) -> int:
        """How many tokens this request adds, unless a stop comes before."""
        return self.total - len(self.tokens)


class Completion:
    """One completion of a request, as far as it has come.

    prompt and tokens: the ids given and the new ones. finish_reason: None while it goes on; "stop" after a stop token or a
    stop string, else "length". seed: with it, and the same options, the tokens come again; None where nothing is random.
    infos: one TokenInfo for each new token where top_logprobs were asked for, else none.
    """

    __slots__ = (
        "_request",
        "_seen",
        "_sequence",
        "_start",
        "_stream",
        "_watch",
        "finish_reason",
        "infos",
        "memory",
        "prefix",
        "seed",
    )

    def __init__(
        self, request: Request, *, prefix: "PrefixCache | None" = None, seed: int | None = None, stream: int = 0
    ) -> None:
        """`prefix`: where to find, and to leave, what the network has run. `seed`: instead of the request's, or of a random
        one. `stream`: which of the seed's independent streams of random numbers."""
        self._request = request
        self._sequence = list(request.tokens)
        self._start = 0  # where in the sequence the window begins that the network sees
        self._stream = stream
        self._watch = Watch(request.stop, request.tokens)
        self._seen: bytearray | None = None  # marks of the ids in the sequence, where the sampler looks back
        if request.sampler.looks_back:
            self._seen = bytearray(request.config.V)
            for token in request.tokens:
                self._seen[token] = 1
        self.seed = request.sampler.start() if seed is None else seed
        self.finish_reason: Literal["stop", "length"] | None = None
        self.infos: list[TokenInfo] = []
        self.prefix = prefix
        self.memory: Memory | None = None  # what the network has run of it: the network's own

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
        """The tokens that the network is to see now: the whole sequence, or what is left of it after sliding."""
        if len(self._sequence) - self._start > self._request.config.maxT:
            self._start = len(self._sequence) - self._request.slide_to
        return self._sequence[self._start :]

    def take(self, logits: "Logits", row: int) -> int:
        """Add the token that row `row` of logits (rows, V) leads to; return it."""
        request, step = self._request, len(self._sequence) - len(self._request.tokens)
        token = request.sampler.choose(logits, row, self.seed, self._stream, step, self._seen)
        if request.top_logprobs is not None:
            from .logprobs import token_info

            self.infos.append(token_info(logits, row, token, request.top_logprobs))
        self._sequence.append(token)
        if self._seen is not None:
            self._seen[token] = 1
        if self._watch.ends(token):
            self.finish_reason = "stop"
        elif len(self._sequence) == request.total:
            self.finish_reason = "length"
        return token

    def let_go(self) -> None:
        """Leave what the network has run to the next completion, or to nobody."""
        if self.memory is not None and self.prefix is not None:
            self.prefix.take_back(self.memory)
        self.memory = None

    def __repr__(self) -> str:
        return f"Completion(prompt={self.prompt}, tokens={self.tokens}, finish_reason={self.finish_reason!r})"


class Completer(ABC):
    """What can answer a request: the cached network and the serial reference."""

    config: Config

    @abstractmethod
    def _forward(self, live: list[Completion]) -> "list[tuple[Logits, int]]":
        """Run the network over each completion's window; return the logits after its last token, as logits and a row."""

    @abstractmethod
    def new_prefix_cache(self) -> "PrefixCache | None":
        """What lets a completion go on from where an earlier one parts from it; None where nothing is remembered."""

    @abstractmethod
    def _check_prefix(self, prefix: "PrefixCache") -> None:
        """Raise InputError for a prefix cache that is not of this network."""

    def complete(self, completion: Completion) -> Iterator[int]:
        """Carry a completion to its end; yields each new id as soon as it is known."""
        try:
            while completion.finish_reason is None:
                [(logits, row)] = self._forward([completion])
                yield completion.take(logits, row)
        finally:
            completion.let_go()

    def generate(
        self,
        tokens: Iterable[int],
        *,
        cache: "PrefixCache | None" = None,
        streamer: "Streamer | None" = None,
        seed: "SupportsIndex | None" = None,
        **options: "Unpack[Options]",
    ) -> Iterator[int]:
        """Complete a sequence of token ids; yields each new id as soon as it is known. Raises InputError before anything runs.
        For several sequences, and for log-probabilities, see generate_batch().

        How much: total, tokens in all, the given ones included (default 10); or max_new_tokens, how many to add.

        Which: sampler "median" (default, the serial program's rule), "greedy" or "sample"; do_sample True stands for "sample",
        False for "greedy"; temperature, top_k, top_p, min_p, repetition_penalty and seed imply "sample" (see Sampler).

        When to stop before: stop_token_ids and stop_strings, one or several; the token that is one, or completes one, is the
        last.

        Past maxT tokens: refused, unless overflow is "stop", which ends there, or "slide", which goes on with the latest
        slide_to tokens (default: half of maxT) each time that the window of maxT tokens is full. A slide forgets: the network
        then sees those tokens as if they were all, and the result is what it says about them alone.

        cache: a PrefixCache, from which what the network ran before is taken, and to which it is left. streamer: its
        put(ids) gets the prompt (1, T) and then each new token (1,), as int64 arrays, its end() comes last; everything is run
        before generate() returns then.
        """
        if cache is not None:
            self._check_prefix(cache)
        completion = Completion(Request(self.config, tokens, seed=seed, **options), prefix=cache)
        if streamer is None:
            return self.complete(completion)
        return iter(self._stream(completion, streamer))

    def _stream(self, completion: Completion, streamer: "Streamer") -> list[int]:
        """Tell a streamer of every token; return them."""
        import numpy as np

        streamer.put(np.array([completion.prompt], np.int64))
        for token in self.complete(completion):
            streamer.put(np.array([token], np.int64))
        streamer.end()
        return completion.tokens

    def generate_batch(
        self,
        prompts: "Iterable[Iterable[int]]",
        *,
        num_return_sequences: int = 1,
        seed: "SupportsIndex | Sequence[SupportsIndex] | None" = None,
        top_logprobs: int | None = None,
        **options: "Unpack[Options]",
    ) -> list[Completion]:
        """Complete many prompts, and each num_return_sequences times, together: a step of the network serves them all, LIVE at
        most at a time. Every completion has the same bits as alone; those of one prompt come one after another.

        Options are generate()'s. seed: one for all prompts, or one for each; completion i of a prompt has stream i of its
        seed, of which generate(prompt, seed=seed) gives the first; None: each prompt has a truly random seed of its own.
        top_logprobs: keep each new token's log-probability and so many most probable tokens, in Completion.infos.
        """
        if not is_whole(num_return_sequences, 1, UNBOUNDED):
            raise InputError(f"num_return_sequences is {shown(num_return_sequences)}: it must be a whole number of at least 1")
        prompts = list(prompts)
        seeds = list(seed) if isinstance(seed, Iterable) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each, or one for all")
        requests = [
            Request(self.config, prompt, seed=own, top_logprobs=top_logprobs, **options)
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        completions = []
        for request in requests:
            drawn = request.sampler.start()
            completions += [Completion(request, seed=drawn, stream=stream) for stream in range(num_return_sequences)]
        self._complete_all(completions)
        return completions

    def _complete_all(self, completions: list[Completion]) -> None:
        """Carry completions to their ends, LIVE at a time: as some end, others begin."""
        waiting = deque(completions)
        live: list[Completion] = []
        while waiting or live:
            while waiting and len(live) < LIVE:
                live.append(waiting.popleft())
            for completion, (logits, row) in zip(live, self._forward(live), strict=True):
                completion.take(logits, row)
                if completion.finish_reason is not None:
                    completion.let_go()
            live = [completion for completion in live if completion.finish_reason is None]
