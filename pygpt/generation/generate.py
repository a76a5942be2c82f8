"""generate() and generate_batch(): what people call to complete tokens. An engine does the work."""

from collections.abc import Iterable, Iterator, Sequence

from ..config import Config
from ..errors import InputError, is_whole, shown
from .completion import Completion
from .engine import LIVE, Engine
from .prefix import PrefixCache
from .request import UNBOUNDED, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, SupportsIndex, Unpack

    from .prefix import AnyNetwork
    from .request import Options

    class Streamer(Protocol):
        """Who listens to generate(): transformers' streamers, and whatever has these two methods."""

        def put(self, value: Any) -> object:
            """Take int64 ids: the prompt (1, T) first, then each new token (1,)."""

        def end(self) -> object:
            """Know that there are no more."""


class Generator:
    """A model that completes tokens with engines over its network: GPT2, and the serial reference."""

    def __init__(self, network: "AnyNetwork") -> None:
        self.network = network
        self.config: Config = network.config

    def new_prefix_cache(self, max_bytes: int | None = None) -> PrefixCache:
        """Return a cache for generate(): a later prompt is computed only from where it differs from earlier ones.

        max_bytes: how many bytes of keys and values it may keep (default: those of one full context).
        """
        return PrefixCache(self.network, max_bytes)

    def engine(
        self,
        *,
        prefix: PrefixCache | None = None,
        max_live: int = LIVE,
        cache_bytes: int | None = None,
        target_ms: float | None = None,
    ) -> Engine:
        """Return an engine over this model's network, for requests that join and leave; the arguments are Engine's."""
        if prefix is not None:
            self._check_cache(prefix)
        return Engine(self.network, prefix=prefix, max_live=max_live, cache_bytes=cache_bytes, target_ms=target_ms)

    def complete(self, request: Request, cache: PrefixCache | None = None) -> Iterator[int]:
        """Complete a checked request; yield each new id as soon as it is known."""
        engine = Engine(self.network, prefix=cache)
        engine.add(request)
        try:
            for event in engine.run():
                if event.error is not None:
                    raise event.error
                assert event.token is not None
                yield event.token
        finally:
            engine.close()

    def _check_cache(self, cache: PrefixCache) -> None:
        """Raise InputError unless this is a prefix cache of this model."""
        if not isinstance(cache, PrefixCache):
            raise InputError(f"cache is {shown(cache)}: generate() takes a PrefixCache")
        cache.check(self.network)

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
            self._check_cache(cache)
        request = Request(self.config, tokens, seed=seed, **options)
        if streamer is None:
            return self.complete(request, cache)
        return iter(self._stream(request, cache, streamer))

    def _stream(self, request: Request, cache: PrefixCache | None, streamer: "Streamer") -> list[int]:
        """Tell a streamer of every token; return the new ones."""
        import numpy as np

        streamer.put(np.array([request.tokens], np.int64))
        found = []
        for token in self.complete(request, cache):
            found.append(token)
            streamer.put(np.array([token], np.int64))
        streamer.end()
        return found

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
        engine = Engine(self.network)
        jobs = [engine.add(request, n=num_return_sequences) for request in requests]
        for event in engine.run():
            if event.error is not None:
                raise event.error
        return [completion for job in jobs for completion in job.completions]
