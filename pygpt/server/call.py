"""Served models, the thread that steps their engines, and a call: checked requests for an engine, and how to write the answer.

Refuses to know about HTTP."""

import os
import threading
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable, Iterable
from typing import Any

from .. import __version__
from .._kernels import Trace
from ..errors import InputError, plural
from ..formats.open import sha256_of
from ..generation.engine import Event, Job
from ..generation.request import Request
from ..model import GPT2
from ..tokenizer import GPT2_V, Tokenizer, tokenizer_of
from .schema import ApiError

Timeline = list[list[Any]]  # for each worker, its phases: (phase, layer, begin_us, end_us, left_us)
DEFAULT_NEW = 16  # tokens, as in OpenAI's API
LONGEST_TOKEN = 1024  # bytes: more than any vocabulary has
NEUTRAL: dict[str, tuple[Any, ...]] = {  # values without effect, which clients may send
    **dict.fromkeys(("temperature", "top_p", "repetition_penalty"), (1,)),
    **dict.fromkeys(("min_p", "frequency_penalty", "presence_penalty"), (0,)),
} | {"top_k": (0, -1), "logit_bias": ({},)}
FILTERS = ("temperature", "top_p", "top_k", "min_p")  # without effect on the most probable token


class Served:
    """A model under one or more names, with its engine. cache_bytes: the most bytes of keys and values."""

    def __init__(
        self, model: GPT2, names: list[str], path: str, *, cache_bytes: int, max_live: int, target_ms: float, fingerprint: bool
    ) -> None:
        self.model, self.names, self.path = model, names, path
        self.created = int(os.path.getmtime(path))
        known = model.config.tokenizer is not None or model.config.V >= GPT2_V
        self.tokenizer = tokenizer_of(model.config) if known else None
        self.eot = self.tokenizer.eot if self.tokenizer else None
        prefix = model.new_prefix_cache(cache_bytes)
        self.engine = model.engine(prefix=prefix, max_live=max_live, cache_bytes=cache_bytes, target_ms=target_ms)
        self.admitted = 0  # sequences between their admission and the end of their calls
        self.traced: list[Future[Timeline]] = []  # requests that wait for the timeline of the next step
        # Equal hashes of the weights, their format and the arithmetic mean equal answers.
        self.fingerprint = f"pygpt-{__version__}-{sha256_of(path)[:16]}" if fingerprint else None

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of ids; none if the vocabulary is unknown."""
        return b"" if self.tokenizer is None else self.tokenizer.decode_bytes(tokens)

    def vocabulary(self, param: str) -> Tokenizer:
        """Return the tokenizer, which the field `param` needs. Raises ApiError if the vocabulary is unknown."""
        if self.tokenizer is None:
            message = f"the vocabulary of this model is unknown, so {param} needs ids: send ids, or start with --tokenizer"
            raise ApiError(message, param)
        return self.tokenizer

    def check_ids(self, name: str, tokens: list[int]) -> None:
        """Raise ApiError if a token of the field `name` is outside the vocabulary."""
        if (worst := max(tokens, default=0)) >= self.model.config.V:
            raise ApiError(f"{name} has the token id {worst}: ids of this model are below {self.model.config.V}", name)


class Call:
    """A checked call: one engine request for each prompt, completed n times. fields: the call's fields that are not null."""

    def __init__(self, served: Served, fields: dict[str, Any], prompts: list[list[int]], *, chat: bool = False) -> None:
        self.served, self.fields, self.chat = served, fields, chat
        self.n: int = fields.get("n", 1)
        self.echo: bool = fields.get("echo", False)
        self.logprobs: int | None = fields.get("logprobs")
        self.stream: bool = fields.get("stream", False)
        self.token_ids: bool = fields.get("return_token_ids", False)
        options = fields.get("stream_options") or {}
        if options and not self.stream:
            raise ApiError("stream_options needs stream: set stream to true, or leave stream_options out", "stream_options")
        self.usage_in_stream = bool(options.get("include_usage"))
        self.usage_in_chunks = bool(options.get("continuous_usage_stats"))
        if fields.get("best_of", self.n) != self.n:
            raise ApiError(f"best_of is {fields['best_of']} and n is {self.n}: leave best_of out", "best_of")
        for name in ("stop_token_ids", "logit_bias"):  # its keys are ids
            served.check_ids(name, [int(token) for token in fields.get(name, ())])
        self.stop_ids = set(fields.get("stop_token_ids", ()))
        if served.eot is not None and not fields.get("ignore_eos"):
            self.stop_ids.add(served.eot)
        stop = fields.get("stop", [])
        self.stop = [stop] if isinstance(stop, str) else stop
        if self.stop:
            served.vocabulary("stop")
        self.requests = [self._request(prompt) for prompt in prompts]

    def _request(self, prompt: list[int]) -> Request:
        """Return the engine's request for one prompt."""
        config = self.served.model.config
        self.served.check_ids("prompt", prompt)
        scores = self.echo and (self.logprobs is not None or self.fields.get("max_tokens") == 0)
        options = {"top_logprobs": 0 if scores and self.logprobs is None else self.logprobs, **self._options()}
        new = self._new(len(prompt), config.maxT)
        try:
            return Request(config, prompt, max_new_tokens=new, stop_in_prompt=False, prompt_logprobs=scores, **options)
        except InputError as error:
            message = str(error)
            name = next((field for field in self.fields if message.startswith(field)), None)
            raise ApiError(message, "stop" if message.startswith("stop_strings") else name) from None

    def _new(self, given: int, maxT: int) -> int:
        """Return how many tokens to add to a prompt of `given` tokens."""
        new: int | None = self.fields.get("max_completion_tokens", self.fields.get("max_tokens"))
        if new == 0 and not self.echo:
            raise ApiError("max_tokens is 0: it must be at least 1, or echo must be true", "max_tokens")
        if given + (1 if new is None else new) > maxT:
            asked = plural(given, "token") + ("" if new is None else f", and max_tokens is {new}")
            message = f"the prompt has {asked}, but the context of this model is {maxT} tokens: send fewer tokens"
            raise ApiError(message, "prompt" if given >= maxT else "max_tokens", code="context_length_exceeded")
        return min(DEFAULT_NEW, maxT - given) if new is None else new

    def _options(self) -> dict[str, Any]:
        """Return the request's options that do not depend on the prompt. Temperature 0 means the most probable token."""
        given = {name: value for name, value in self.fields.items() if name in NEUTRAL and value not in NEUTRAL[name]}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        sampler = self.fields.get("sampler")
        if given.get("temperature") == 0 and sampler in (None, "sample"):
            sampler = "greedy"
            given = {name: value for name, value in given.items() if name not in FILTERS}
        if "seed" in self.fields and sampler in (None, "sample"):
            given["seed"] = self.fields["seed"] % (1 << 64)
        stops = {"stop_token_ids": self.stop_ids, "stop_strings": self.stop}
        return {"sampler": sampler or "sample", **given, **stops, "speculation": self.fields.get("speculation")}


def encode(served: Served, text: str, maxT: int, *, special: bool = False) -> list[int]:
    """Encode a prompt as ids. A text that has more than maxT tokens for certain is refused before it is encoded.

    special: whether special tokens in the text become their ids."""
    if (least := len(text) // LONGEST_TOKEN) > maxT:
        message = f"the text has at least {least} tokens, but the context of this model is {maxT} tokens"
        raise ApiError(message, "prompt", code="context_length_exceeded")
    try:
        return served.vocabulary("prompt").encode(text, allow_special=special)
    except InputError as error:  # a character that the vocabulary does not have
        raise ApiError(str(error), "prompt") from None


class Worker:
    """The thread that steps the engines. deliver(events) runs in the event loop, once for each step.

    The thread is worker 0 of each model's pool. Models take turns, so their workers do not compete for cores."""

    def __init__(self, models: list[Served], deliver: Callable[[list[Event]], object]) -> None:
        self._models, self._deliver = models, deliver
        self._wake = threading.Event()
        self._stopping = False
        self.thread = threading.Thread(target=self._serve, name="pygpt-0", daemon=True)

    def start(self, loop: AbstractEventLoop) -> None:
        """Start the thread."""
        self._loop = loop
        self.thread.start()

    def add(self, call: Call, jobs: list[Job], deadline: float | None, owner: object) -> None:
        """Add the jobs of a call, to `jobs`, too. Raises InputError if one of them can never fit."""
        for request in call.requests:
            jobs.append(call.served.engine.add(request, n=call.n, deadline=deadline, owner=owner))
        self._wake.set()

    def cancel(self, served: Served, jobs: list[Job]) -> None:
        """End jobs, at the latest after the step that runs now."""
        for job in jobs:
            served.engine.cancel(job)
        self._wake.set()

    def trace(self, served: Served) -> Future[Timeline]:
        """Record the model's next step."""
        future: Future[Timeline] = self._loop.create_future()
        served.traced.append(future)
        return future

    def stop(self) -> None:
        """End the thread after the step that runs now, and wait for it."""
        self._stopping = True
        self._wake.set()
        self.thread.join()

    def _serve(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while not self._stopping and (busy := [served for served in self._models if served.engine.busy]):
                for served in busy:
                    self._step(served)

    def _step(self, served: Served) -> None:
        """Run one step of a model, and deliver its events. An error of the step ends the model's jobs."""
        traced, served.traced = served.traced, []
        trace = Trace(served.model.threads, 64 * served.model.config.L) if traced else None
        if trace is not None:
            served.model.record(trace)
        try:
            events = served.engine.step()
        except Exception as error:
            events = served.engine.fail(error)
        if trace is not None:
            served.model.record(None)
        try:
            self._loop.call_soon_threadsafe(self._finish, events, trace, traced)
        except RuntimeError:  # a second signal has closed the loop: nobody waits for the events
            self._stopping = True

    def _finish(self, events: list[Event], trace: Trace | None, traced: list[Future[Timeline]]) -> None:
        """Deliver a step's events, and its trace to those who asked for it. Runs in the event loop."""
        self._deliver(events)
        for future in traced:
            if trace is not None and not future.done():
                future.set_result(_timeline(trace))


def _timeline(trace: Trace) -> Timeline:
    """Return a trace with times in microseconds since the step began."""
    workers = [trace.events(ith) for ith in range(trace.nth)]
    zero = min((begin for events in workers for _, _, begin, _, _ in events), default=0)
    return [[(phase, layer, *((at - zero) / 1000 for at in times)) for phase, layer, *times in events] for events in workers]
