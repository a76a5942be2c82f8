"""generate() and generate_batch(): complete tokens with an engine."""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from collections.abc import Generator as Steps

from ..config import Config
from ..errors import TYPE_CHECKING, Closing, InputError, check_whole, shown, whole
from .completion import Completion
from .engine import LIVE, Engine
from .prefix import PrefixCache
from .request import Request
from .speculate import Draft

if TYPE_CHECKING:
    from typing import Any, Protocol, SupportsFloat, SupportsIndex, Unpack

    from .prefix import AnyNetwork
    from .request import Options

    class Streamer(Protocol):
        """A receiver of tokens from generate(): a streamer of transformers, or any object with these two methods."""

        def put(self, value: Any) -> object:
            """Take int64 ids: first the prompt (1, T), then each new token (1,)."""

        def end(self) -> object:
            """Take the end of the ids."""


class Generator(Closing):
    """A model that completes tokens with engines on its network: GPT2, and the serial reference."""

    _instead = "threads can share a model; in another process, load its file again"

    def __init__(self, network: "AnyNetwork") -> None:
        self.network = network
        self.config: Config = network.config

    def new_prefix_cache(self, max_bytes: "SupportsIndex | None" = None) -> PrefixCache:
        """Return a cache for generate(). If a prompt shares a prefix with an earlier one, only the other tokens are computed.

        max_bytes: the most bytes of keys and values to keep (default: those of one full context)."""
        return PrefixCache(self.network, max_bytes)

    def engine(
        self,
        *,
        prefix: PrefixCache | None = None,
        max_live: "SupportsIndex" = LIVE,
        cache_bytes: "SupportsIndex | None" = None,
        target_ms: "SupportsFloat | None" = None,
    ) -> Engine:
        """Return an engine on this model's network, for requests that join and leave. Engine describes the arguments."""
        self._check_cache(prefix)
        return Engine(
            self.network, prefix=prefix, max_live=max_live, cache_bytes=cache_bytes, target_ms=target_ms, draft=self.draft
        )

    def draft(self, make: bool) -> Draft | None:
        """Return the draft, which guesses tokens for speculation, or None. A missing draft is made only if `make` is True."""
        return None

    def complete(self, request: Request, cache: PrefixCache | None = None) -> "Steps[int]":
        """Complete a checked request; yield each new id as soon as it is known."""
        engine = Engine(self.network, prefix=cache, draft=self.draft)
        engine.add(request)
        try:
            for event in engine.run():
                if event.error is not None:
                    raise event.error
                assert event.token is not None
                yield event.token
        finally:
            engine.close()

    def _check_cache(self, cache: PrefixCache | None) -> None:
        """Raise InputError unless this is a prefix cache of this model, or None."""
        if cache is not None:
            if not isinstance(cache, PrefixCache):
                raise InputError(f"cache is {shown(cache)}: it must be a PrefixCache, from new_prefix_cache()")
            cache.check(self.network)

    def generate(
        self,
        tokens: "Iterable[SupportsIndex]",
        *,
        cache: "PrefixCache | None" = None,
        streamer: "Streamer | None" = None,
        seed: "SupportsIndex | None" = None,
        **options: "Unpack[Options]",
    ) -> Iterator[int]:
        """Complete a sequence of token ids; yield each new id as soon as it is known. Raises InputError before anything runs.

        Length: total, the number of tokens with the given ones (default 10); or max_new_tokens, the number of tokens to add.

        Choice: sampler "median" (default, the serial program's rule), "greedy" or "sample". do_sample=True means "sample", and
        False "greedy". temperature, top_k, top_p, min_p and seed imply "sample" (see Sampler); temperature=0 means "greedy".

        Control, with every sampler: logit_bias, repetition_penalty, frequency_penalty, presence_penalty, no_repeat_ngram_size,
        bad_words_ids, suppress_tokens and logits_processor change the logits before the choice, in this order. A processor
        is a function (tokens, row) of the ids so far and the float32 logits (V,), which returns a row or None; or several.

        Stop: stop_token_ids and stop_strings, one or several. The last token is a stop token or completes a stop string. With
        stop_at_eot, the id that ends a text in the model's vocabulary is a stop token.

        More than maxT tokens: by default they are refused. With overflow="stop", the completion ends at maxT. With
        overflow="slide", it continues with only the latest slide_to tokens (default: half of maxT) each time the window of maxT
        tokens is full. The network forgets the others, so the result depends on the kept tokens alone.

        speculation: a number of tokens to guess ahead, or True to choose the fastest. All guesses are checked, so the tokens
        stay the same and only come sooner. The first use quantises the model's weights, unless load() names a draft.

        edits: changes of activations, such as a steering vector, as in GPT2.activations(). A function gets the positions of one
        step. A completion with edits does not use the cache.

        cache: a PrefixCache, to reuse keys and values of earlier calls. streamer: its put(ids) gets the prompt (1, T), then
        each new token (1,), as int64 arrays; its end() is last. With a streamer, generate() returns after the last token.
        For several sequences, and for log-probabilities, see generate_batch()."""
        self._check_cache(cache)
        request = Request(self.config, tokens, seed=seed, **options)
        if streamer is None:
            return self.complete(request, cache)
        if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
            raise InputError(f"streamer is {shown(streamer)}: it must have the methods put(ids) and end()")
        return iter(self._stream(request, cache, streamer))

    def agenerate(
        self,
        tokens: "Iterable[SupportsIndex]",
        *,
        cache: "PrefixCache | None" = None,
        seed: "SupportsIndex | None" = None,
        **options: "Unpack[Options]",
    ) -> "AsyncGenerator[int]":
        """Complete a sequence as generate() does, for `async for`. Other threads run the network, so the event loop is free.

        Raises InputError at once, before anything runs. If the task is cancelled or the iterator is closed, the completion ends
        after the step that runs now. To close it at a `break`, use contextlib.aclosing()."""
        self._check_cache(cache)
        return _asynchronous(self.complete(Request(self.config, tokens, seed=seed, **options), cache))

    def _stream(self, request: Request, cache: PrefixCache | None, streamer: "Streamer") -> list[int]:
        """Complete a request, passing each token to the streamer; return the new tokens."""
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
        prompts: "Iterable[Iterable[SupportsIndex]]",
        *,
        num_return_sequences: "SupportsIndex" = 1,
        seed: "SupportsIndex | Sequence[SupportsIndex] | None" = None,
        top_logprobs: "SupportsIndex | None" = None,
        **options: "Unpack[Options]",
    ) -> list[Completion]:
        """Complete several prompts together, each num_return_sequences times; return the completions in order of the prompts.

        A step of the network serves up to LIVE completions. Every completion has the same bits as alone. The options are those
        of generate(). seed: one for all prompts, or one for each; None: a truly random seed for each. Completion i of a prompt
        uses stream i of its seed; generate(prompt, seed=seed) uses stream 0. top_logprobs: keep each new token's
        log-probability, and this number of most probable tokens, in Completion.infos."""
        n = check_whole("num_return_sequences", num_return_sequences, 1, 1 << 20)
        prompts = list(prompts)
        seeds = list(seed) if isinstance(seed, Iterable) and whole(seed) is None else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each, or one for all")
        engine = Engine(self.network, draft=self.draft)
        jobs = [
            engine.add(Request(self.config, prompt, seed=own, top_logprobs=top_logprobs, **options), n=n)
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        for event in engine.run():
            if event.error is not None:
                raise event.error
        return [completion for job in jobs for completion in job.completions]


async def _asynchronous(tokens: "Steps[int]") -> "AsyncGenerator[int]":
    """Yield the tokens of a completion, each computed by a call on another thread."""
    from asyncio import Future, get_running_loop, shield, wait

    def close(step: "Future[int | None]") -> None:
        step.exception()  # asyncio would report an exception that nobody has looked at
        tokens.close()

    step: Future[int | None] | None = None
    try:
        while True:
            step = get_running_loop().run_in_executor(None, next, tokens, None)
            if (token := await shield(step)) is None:
                return
            yield token
    finally:
        if step is None or step.done():
            tokens.close()  # gives the cache back
        else:  # after the step that still runs
            step.add_done_callback(close)
            await wait([step])
