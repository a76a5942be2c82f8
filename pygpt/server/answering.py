"""Run one call, from its events to the bytes of its answer, until the client has it or leaves.

A streamed answer and a whole one come from the same pieces. A piece has the new text of one choice, with its tokens."""

import asyncio
import codecs
import json
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Send

from ..errors import InputError
from ..generation.engine import Event, Job
from ..generation.logprobs import TokenInfo
from .call import Call, Served, Worker
from .metrics import Metrics
from .schema import ApiError

PING_S = 15.0  # between comments in a stream without text, so that proxies keep it open
SLOW_S = 30.0  # the longest time in which a client sends its body, or takes a part of an answer
STOPPED = "the server is shutting down: send the request to another server, or later"
LEAST = -9999.0  # JSON has no infinity
JSON = [(b"content-type", b"application/json")]
SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
Note = tuple[int, TokenInfo | None, int]  # a token, its info, and its offset


@dataclass(slots=True)
class Piece:
    """New text of one choice with its tokens, or a whole choice."""

    index: int
    text: str
    tokens: list[Note]
    finish_reason: str | None


class Choice:
    """One completion of a call. It takes tokens one by one, and returns pieces of text.

    It holds text back while the text may become a stop string, or while the last character is incomplete. text_offset counts
    characters of the choice's whole text. If a token's bytes do not complete a character, it has the next token's offset."""

    def __init__(self, call: Call, prompt: list[int], index: int) -> None:
        self.call, self.index = call, index
        self.count = 0  # new tokens
        self.finish_reason: str | None = None
        self._prompt = prompt
        self._held = b""  # bytes that may be the beginning of a stop string
        self._sent = 0  # characters in the pieces so far
        self._seen = 0  # characters of all tokens so far
        self._out = codecs.getincrementaldecoder("utf-8")("replace")
        self._all = codecs.getincrementaldecoder("utf-8")("replace")
        self._waiting: list[Note] = []  # tokens that are not in a piece yet
        self._stops = [text.encode() for text in call.stop]

    def push(
        self, token: int | None, info: TokenInfo | None, reason: str | None, prompt: list[TokenInfo] | None
    ) -> Piece | None:
        """Take the next token, and the reason if it is the last one; return a piece, or None if no text is complete.

        prompt: for the first token, the infos of all tokens of the prompt but the first; else None."""
        text, served = "", self.call.served
        if prompt is not None and self.call.echo:
            for given, its in zip(self._prompt, [None, *prompt] if prompt else [None] * len(self._prompt), strict=True):
                self._note(given, its)
            text = self._out.decode(served.bytes_of(self._prompt))
        self.finish_reason = reason
        if token is not None:
            self.count += 1
            self._note(token, info)
            self._held += b"" if token in self.call.stop_ids else served.bytes_of([token])
        ready, self._held = self._split(reason is not None)
        text += self._out.decode(ready, final=reason is not None)
        if not text and reason is None:
            return None
        self._sent += len(text)  # the last piece has all tokens, the others have those that begin in the text so far
        tokens = [(t, its, min(at, self._sent)) for t, its, at in self._waiting if reason is not None or at < self._sent]
        self._waiting = self._waiting[len(tokens) :]
        return Piece(self.index, text, tokens, reason)

    def _note(self, token: int, info: TokenInfo | None) -> None:
        self._waiting.append((token, info, self._seen))
        self._seen += len(self._all.decode(self.call.served.bytes_of([token])))

    def _split(self, last: bool) -> tuple[bytes, bytes]:
        """Return the bytes that are certain to belong to the text, and those that may begin a stop string."""
        held = self._held
        if found := [at for stop in self._stops if (at := held.find(stop)) >= 0]:
            return held[: min(found)], b""
        begun = (n for stop in self._stops for n in range(min(len(stop) - 1, len(held)), 0, -1) if held.endswith(stop[:n]))
        cut = len(held) - (0 if last else max(begun, default=0))
        return held[:cut], held[cut:]


def token_text(data: bytes) -> str:
    """Return a token's text. Bytes that are not whole characters become `bytes:` and their values, as in OpenAI's API."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def logprobs_of(served: Served, tokens: list[Note]) -> dict[str, Any]:
    """Return the log-probabilities of tokens: OpenAI's fields, token_ids, bytes, and top, a list that keeps all entries."""
    rows = []
    for token, info, offset in tokens:
        data = served.bytes_of([token])
        top, logprob, named = None, None, dict[str, float]()
        if info is not None:
            top = [(other, token_text(served.bytes_of([other])), max(value, LEAST)) for other, value in info.top]
            logprob = max(info.logprob, LEAST)
            for _, text, value in [*top, (token, token_text(data), logprob)]:
                named.setdefault(text, value)
        rows.append((token_text(data), logprob, named or None, offset, token, list(data), top))
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "bytes", "top")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def encoded(body: Any) -> bytes:
    """Return a JSON object as bytes."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def event(data: bytes) -> bytes:
    """Return data as one server-sent event."""
    return b"data: " + data + b"\n\n"


class Run:
    """A running call. It takes the engine's events, and keeps pieces of the answer until they are sent. id: the answer's."""

    def __init__(self, call: Call, metrics: Metrics, id: str) -> None:
        self.call, self._metrics, self._model = call, metrics, call.served.names[0]
        self.jobs: list[Job] = []
        prompts = [request.tokens for request in call.requests for _ in range(call.n)]
        self.choices = [Choice(call, prompt, index) for index, prompt in enumerate(prompts)]
        kind = ("chat.completion.chunk" if call.stream else "chat.completion") if call.chat else "text_completion"
        self._head = {"id": ("chatcmpl-" if call.chat else "cmpl-") + id, "object": kind, "created": int(time.time())}
        self._head |= {"model": call.fields.get("model", self._model), "system_fingerprint": call.served.fingerprint}
        self._named: set[int] = set()  # choices that have a piece in the answer
        self._pieces: deque[Piece] = deque()
        self._left = len(self.choices)
        self._error: Exception | None = None
        self._gone = False  # whether the client has left
        self._begun = False  # whether the client has a part of the answer
        self._wake = asyncio.Event()
        self._arrival = time.monotonic()
        self._times: dict[int, float] = {}  # when each choice's latest token came

    def take(self, happened: Event) -> None:
        """Take an event of one of the jobs."""
        if happened.error is not None:
            self._error = self._error or happened.error
            self._wake.set()
        if self._error is not None or self._gone:
            return
        job = happened.job
        choice = self.choices[self.jobs.index(job) * self.call.n + happened.choice]
        infos = job.completions[happened.choice].infos
        prompt = job.completions[0].prompt_infos if choice.count == 0 else None
        if happened.token is not None:
            self._time(job, choice)
        info = infos[choice.count] if happened.token is not None and infos else None
        piece = choice.push(happened.token, info, happened.finish_reason, prompt)
        if piece is not None:
            self._pieces.append(piece)
        if happened.finish_reason is not None:
            self._left -= 1
            if not self._left:
                self._finish()
        if self._left == 0 or (self.call.stream and self._pieces):
            self._wake.set()

    def _time(self, job: Job, choice: Choice) -> None:
        now, add = time.monotonic(), self._metrics.add
        add("generation_tokens", self._model)
        if not self._times:
            self._first, began = now, job.began or now
            add("time_to_first_token_seconds", self._model, now - self._arrival)
            add("request_queue_time_seconds", self._model, began - self._arrival)
            add("request_prefill_time_seconds", self._model, now - began)
        if choice.count:
            add("inter_token_latency_seconds", self._model, now - self._times[choice.index])
        self._times[choice.index] = now

    def _finish(self) -> None:
        now, add = time.monotonic(), self._metrics.add
        add("e2e_request_latency_seconds", self._model, now - self._arrival)
        if self._times:
            add("request_decode_time_seconds", self._model, now - self._first)
        for reason, amount in Counter(choice.finish_reason for choice in self.choices).items():
            add("request_success", self._model, amount, finished_reason=reason)
        for name in ("prompt_tokens", "prefix_cache_queries"):
            add(name, self._model, sum(len(request.tokens) for request in self.call.requests))
        add("prefix_cache_hits", self._model, sum(job.shared for job in self.jobs))

    def _choice(self, piece: Piece) -> dict[str, Any]:
        """Return the object of a piece, or of a whole choice, in `choices`."""
        call, index, first = self.call, piece.index, piece.index not in self._named
        self._named.add(index)
        found: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason, "logprobs": None}
        if call.chat:
            role = {"role": "assistant"} if first else {}
            return {**found, "delta" if call.stream else "message": {**role, "content": piece.text}}
        found["text"] = piece.text
        if call.logprobs is not None:
            found["logprobs"] = logprobs_of(call.served, piece.tokens)
        if call.token_ids:
            prompt = call.requests[index // call.n].tokens
            found["token_ids"] = [token for token, _, _ in piece.tokens[len(prompt) if call.echo and first else 0 :]]
            if first:
                found["prompt_token_ids"] = prompt
        return found

    def _joined(self) -> bytes:
        """Return the whole answer."""
        joined = [Piece(choice.index, "", [], choice.finish_reason) for choice in self.choices]
        for piece in self._pieces:
            joined[piece.index].text += piece.text
            joined[piece.index].tokens += piece.tokens
        return encoded({**self._head, "choices": [self._choice(piece) for piece in joined], "usage": self._usage()})

    def _chunk(self, piece: Piece | None) -> bytes:
        """Return one event of a stream: a piece, or the usage at the end."""
        body = {**self._head, "choices": [] if piece is None else [self._choice(piece)]}
        if piece is None or self.call.usage_in_chunks:
            body["usage"] = self._usage()
        elif self.call.usage_in_stream:
            body["usage"] = None
        return event(encoded(body))

    def _usage(self) -> dict[str, int]:
        """Return the numbers of tokens. Each prompt counts once, and each of its n completions."""
        given, new = sum(len(request.tokens) for request in self.call.requests), sum(choice.count for choice in self.choices)
        return {"prompt_tokens": given, "completion_tokens": new, "total_tokens": given + new}

    async def answer(self, worker: Worker, limit_s: float | None, receive: Receive, send: Send) -> None:
        """Add the jobs, and send the answer. Raises ApiError before the first byte only. If the client leaves, the jobs end."""
        watching = asyncio.create_task(self._watch(receive))
        try:
            worker.add(self.call, self.jobs, None if limit_s is None else self._arrival + limit_s, self)
            await (self._stream(send) if self.call.stream else self._whole(send))
        except InputError as error:
            raise ApiError(str(error), "max_tokens", code="context_length_exceeded") from None
        finally:
            watching.cancel()
            worker.cancel(self.call.served, [job for job in self.jobs if not job.done])

    async def _watch(self, receive: Receive) -> None:
        """Wait until the client has left."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._metrics.add("http_requests_client_disconnected", self._model, int(self._left > 0))  # 0: it has the whole answer
        self._wake.set()

    async def _whole(self, send: Send) -> None:
        await self._wake.wait()
        if self._error is not None:
            raise reported(self._error)
        if not self._gone:
            await self._put(send, self._joined())

    async def _stream(self, send: Send) -> None:
        """Send pieces as they come. An error after the first piece is sent as an event."""
        try:
            while not self._gone:
                with suppress(TimeoutError):
                    async with asyncio.timeout(PING_S):  # wait_for() would make a task for each token
                        await self._wake.wait()
                if self._error is not None:
                    error = reported(self._error)
                    if not self._begun:
                        raise error
                    return await self._put(send, event(encoded(error.body)))
                data = b"".join([self._chunk(self._pieces.popleft()) for _ in range(len(self._pieces))])
                if self._left == 0:
                    usage = self._chunk(None) if self.call.usage_in_stream else b""
                    return await self._put(send, data + usage + event(b"[DONE]"))
                self._wake.clear()
                await self._put(send, data or b": waiting\n\n", more=True)
        except asyncio.CancelledError:
            with suppress(Exception):
                await self._put(send, event(encoded(ApiError(STOPPED, status=503).body)))
            raise

    async def _put(self, send: Send, data: bytes, *, more: bool = False) -> None:
        """Send a part of the answer. Raises TimeoutError if the client does not take it within SLOW_S seconds."""
        async with asyncio.timeout(SLOW_S):
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": SSE if self.call.stream else JSON})
            await send({"type": "http.response.body", "body": data, "more_body": more})


def reported(error: Exception) -> ApiError:
    """Return the answer to an error in the engine. Only the server's log shows the text of an unexpected error."""
    if isinstance(error, InputError):  # such as a bias that excludes every token
        return ApiError(str(error))
    if isinstance(error, TimeoutError):
        return ApiError(str(error), status=504, code="timeout")
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(f"pygpt: error: a request failed: {text}", file=sys.stderr, flush=True)
    return ApiError("the request failed on the server; its log says why", status=500, code="internal_error")
