"""Run one call: from its events to the bytes of its answer, until the client has it or leaves."""

import asyncio
import sys
import time
from collections import Counter, deque
from contextlib import suppress

from starlette.types import Message, Receive, Send

from ..errors import InputError
from ..generation.engine import Event, Job
from .answer import Choice, Piece, Writer, encoded, event
from .call import Call
from .metrics import Metrics
from .schema import ApiError
from .worker import Worker

PING_S = 15.0  # between comments in a stream without text, so that proxies keep it open
SLOW_S = 30.0  # for a client to send its body, or to take a part of an answer
STOPPED = "the server is shutting down: ask another one"


class Run:
    """A call on its way: takes the engine's events, and keeps pieces of the answer until they are sent."""

    def __init__(self, call: Call, metrics: Metrics) -> None:
        self.call, self._metrics, self._model = call, metrics, call.served.names[0]
        self.jobs: list[Job] = []
        self.choices = [
            Choice(call, request.tokens, number * call.n + i)
            for number, request in enumerate(call.requests)
            for i in range(call.n)
        ]
        self._pieces: deque[Piece] = deque()
        self._left = len(self.choices)
        self._error: Exception | None = None
        self._gone = False  # whether the client has left
        self._wake = asyncio.Event()
        self._arrival = time.monotonic()
        self._times: dict[int, float] = {}  # of each choice's latest token

    # ---------------------------------------------------------------- the engine's events

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
        now, observe = time.monotonic(), self._metrics.observe
        self._metrics.count("generation_tokens", self._model)
        if not self._times:
            self._first, began = now, job.began or now
            observe("time_to_first_token_seconds", self._model, now - self._arrival)
            observe("request_queue_time_seconds", self._model, began - self._arrival)
            observe("request_prefill_time_seconds", self._model, now - began)
        if choice.count:
            observe("inter_token_latency_seconds", self._model, now - self._times[choice.index])
        self._times[choice.index] = now

    def _finish(self) -> None:
        now, count, observe = time.monotonic(), self._metrics.count, self._metrics.observe
        observe("e2e_request_latency_seconds", self._model, now - self._arrival)
        if self._times:
            observe("request_decode_time_seconds", self._model, now - self._first)
        for reason, amount in Counter(choice.finish_reason for choice in self.choices).items():
            count("request_success", self._model, amount, finished_reason=reason)
        for name in ("prompt_tokens", "prefix_cache_queries"):
            count(name, self._model, sum(len(request.tokens) for request in self.call.requests))
        count("prefix_cache_hits", self._model, sum(job.shared for job in self.jobs))

    # ---------------------------------------------------------------- the answer

    async def answer(self, worker: Worker, limit_s: float | None, writer: Writer, receive: Receive, send: Send) -> None:
        """Add the jobs, and send the answer. Raises ApiError if nothing is sent yet. If the client leaves, the jobs end."""
        watching = asyncio.create_task(self._watch(receive))
        try:
            self.jobs = worker.add(self.call, None if limit_s is None else self._arrival + limit_s, self)
            await (self._stream(writer, send) if self.call.stream else self._whole(writer, send))
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
        self._metrics.count("http_requests_client_disconnected", self._model, int(self._left > 0))  # 0: it has its answer
        self._wake.set()

    async def _whole(self, writer: Writer, send: Send) -> None:
        await self._wake.wait()
        if self._error is not None:
            raise reported(self._error)
        if not self._gone:
            await take(send, start(b"application/json"))
            await take(send, {"type": "http.response.body", "body": writer.whole(self._pieces, self.choices)})

    async def _stream(self, writer: Writer, send: Send) -> None:
        """Send pieces as they come. An error after the first one is an event."""
        begun = False

        async def put(data: bytes, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                begun = True
                headers = (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")
                await take(send, start(b"text/event-stream; charset=utf-8", *headers))
            await take(send, {"type": "http.response.body", "body": data, "more_body": more})

        try:
            while not self._gone:
                with suppress(TimeoutError):
                    async with asyncio.timeout(PING_S):
                        await self._wake.wait()
                if self._error is not None:
                    error = reported(self._error)
                    if not begun:
                        raise error
                    await put(event(encoded(error.body)), more=False)
                    return
                data = b"".join([writer.chunk(self._pieces.popleft(), self.choices) for _ in range(len(self._pieces))])
                if self._left == 0:
                    usage = writer.chunk(None, self.choices) if self.call.usage_in_stream else b""
                    await put(data + usage + event(b"[DONE]"), more=False)
                    return
                self._wake.clear()
                await put(data or b": waiting\n\n")
        except asyncio.CancelledError:
            with suppress(Exception):
                await put(event(encoded(ApiError(STOPPED, status=503).body)), more=False)
            raise


def reported(error: Exception) -> ApiError:
    """Return the answer to an error in the engine. An unexpected one is told to the operator, but not to the client."""
    if isinstance(error, InputError):  # such as a bias that excludes every token
        return ApiError(str(error))
    if isinstance(error, TimeoutError):
        return ApiError(str(error), status=504, code="timeout")
    print(
        f"pygpt: error: a request failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True
    )
    return ApiError("the request failed on the server; its log says why", status=500, code="internal_error")


async def take(send: Send, message: Message) -> None:
    """Send a message. Raises TimeoutError if the client does not take it within SLOW_S seconds."""
    async with asyncio.timeout(SLOW_S):
        await send(message)


def start(kind: bytes, *headers: tuple[bytes, bytes]) -> Message:
    """Return the message that begins an answer."""
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind), *headers]}
