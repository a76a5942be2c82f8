"""The HTTP application: routes, handlers, keys, limits, errors in OpenAI's form; and uvicorn, which runs it until a signal."""

import asyncio
import errno
import hmac
import os
import resource
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h11
import numpy
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import __version__
from .._kernels import log_probabilities
from ..errors import InputError, check_whole, near, shown
from ..generation.engine import Event
from ..model import GPT2
from . import schema
from .answering import SLOW_S, STOPPED, Run, encoded, reported, token_text
from .call import Call, Served, Worker, encode
from .metrics import Metrics
from .schema import ROLES, ApiError, Endpoint, Fields, document, read_object

PAGE = os.path.join(os.path.dirname(__file__), "page")
LENS = 3  # the most probable tokens of a layer
LOOKED = 64  # tokens of a step that looks inside: completions go on between such steps
SHORT = 2000  # characters: longer texts are encoded outside the event loop
OWN = "; ".join(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect"))
POLICY = f"{OWN}; default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADER_S = 20.0  # for a client to send a request's headers
UNREAD = 64 << 20  # bytes beyond the limit of a body that are read, because many clients send all of it before they listen
KEEP_S = 75  # for the next request of a connection: longer than proxies keep theirs
CONNECTIONS = 4096  # at once, if the system allows twice as many open files
BACKLOG = 2048  # connections that wait in the system
FULL = encoded(ApiError("the server has too many connections", status=503, code="connections").body)
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"


@dataclass(kw_only=True)
class Options:
    """The server's settings, by the names of the command's options. keys: if there are any, a request needs one of them."""

    keys: list[str] = field(default_factory=list)
    queue: int = 256  # the most sequences that wait for a step
    body_limit: int = 2 << 20  # bytes
    request_timeout: float | None = None  # seconds
    root_path: str = ""
    origins: list[str] = field(default_factory=list)
    chat: bool = False
    page: bool = True
    speculation: bool | int = False  # of requests without this field


class Server:
    """The ASGI application, with its models, its worker, and its settings. A method below `handlers` answers one path."""

    def __init__(self, models: list[Served], options: Options) -> None:
        self.models, self.options = models, options
        self.by_name = {name: served for served in models for name in served.names}
        self.metrics = Metrics([served.names[0] for served in models])
        self.draining = False
        self.worker = Worker(models, self.deliver)
        others: dict[str, Any] = {"allow_headers": ["*"], "expose_headers": ["X-Request-Id", "Retry-After"]}
        cors = Middleware(CORSMiddleware, allow_origins=options.origins, allow_methods=["GET", "POST"], **others)
        routes, errors = [*map(self._route, ENDPOINTS)], dict.fromkeys((HTTPException, ApiError, Exception), _error)
        layers = [cors] if options.origins else []
        self._app = Starlette(routes=routes, middleware=layers, exception_handlers=errors, lifespan=self._lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a request an id, count its answer, and accept paths with the prefix, and with a slash at the end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, prefix = scope["path"], self.options.root_path.rstrip("/")
        if prefix and path == prefix:  # the page's relative addresses need the slash at the end
            await RedirectResponse(f"{prefix.rpartition('/')[2]}/")(scope, receive, send)
            return
        if prefix and f"{path}/".startswith(f"{prefix}/"):
            path = path[len(prefix) :]
        path = "/" + path.strip("/")
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex
        scope = {**scope, "path": path, "raw_path": path.encode(), "root_path": "", "state": {"id": name}}

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
                scope["state"]["begun"] = True
                self.metrics.add("http_requests", None, status=message["status"])
            await send(message)

        with suppress(TimeoutError):  # the client does not take its answer
            try:
                await self._app(scope, receive, send_counted)
            except asyncio.CancelledError:  # at the end of the grace period
                if "begun" in scope["state"]:
                    raise
                stopped = ApiError(STOPPED, status=503, code="shutting_down")
                await JSONResponse(stopped.body, stopped.status)(scope, receive, send_counted)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start(asyncio.get_running_loop())
        yield
        await asyncio.to_thread(self.worker.stop)

    def _route(self, endpoint: Endpoint) -> Route:
        async def handle(request: Request) -> ASGIApp:
            if endpoint.key and self.options.keys:
                self._check_key(request)
            fields = None if endpoint.fields is None else await self.read(request, endpoint.fields, endpoint.required)
            found = await endpoint.handler(self, request, fields or {})
            return found if callable(found) else JSONResponse(found)

        return Route(endpoint.path, handle, methods=["GET" if endpoint.fields is None else "POST"])

    def _check_key(self, request: Request) -> None:
        """Raise ApiError without one of the keys, in a time that does not depend on how much of a key is right."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        right = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self.options.keys]
        if not any(right):
            message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
            raise ApiError(message, status=401, code="invalid_api_key", WWW_Authenticate="Bearer")

    def deliver(self, events: list[Event]) -> None:
        """Pass a step's events to their runs."""
        for happened in events:
            run = happened.job.owner
            assert isinstance(run, Run)
            run.take(happened)
            if happened is events[-1]:
                self.metrics.add("iteration_tokens_total", run.call.served.names[0], len(events))

    @property
    def ready(self) -> bool:
        """Whether the server accepts requests."""
        return not self.draining and self.worker.thread.is_alive()

    def served(self, name: str | None) -> Served:
        """Return the model of this name, or the first if there is none. Raises ApiError for an unknown name."""
        if name is None:
            return self.models[0]
        if name not in self.by_name:
            message = f"the model {shown(name)} is not served: the models are {', '.join(self.by_name)}"
            raise ApiError(message, "model", status=404, code="model_not_found")
        return self.by_name[name]

    @asynccontextmanager
    async def admitted(self, served: Served, count: int) -> AsyncIterator[None]:
        """Hold places for `count` sequences of a model in a block. Raises ApiError if there are not enough."""
        if not self.ready:
            raise ApiError(STOPPED, status=503, code="shutting_down")
        most = self.options.queue + served.engine.max_live
        if count > most:
            raise ApiError(f"the request has {count} choices, but the server takes {most} at once: ask for fewer", "n")
        others = sum(max(0, one.admitted - one.engine.max_live) for one in self.models if one is not served)  # in the queue
        if others + served.admitted + count > most:
            message = f"the queue is full with {others + served.admitted} sequences: try again later"
            raise ApiError(message, status=429, code="queue_full", Retry_After="1")
        served.admitted += count
        try:
            yield
        finally:
            served.admitted -= count

    async def read(self, request: Request, fields: Fields, required: tuple[str, ...]) -> dict[str, Any]:
        """Read a request's JSON object and check its fields. Raises ApiError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(f"the Content-Type is {shown(kind)}: send the header Content-Type: application/json", status=415)
        most, length, body = self.options.body_limit, 0, bytearray()
        try:
            async with asyncio.timeout(SLOW_S):
                async for part in request.stream():
                    length += len(part)
                    if length > most + UNREAD:
                        break
                    body += part if length <= most else b""
        except TimeoutError:
            raise ApiError(f"the body did not arrive within {SLOW_S:g} seconds", status=408, Connection="close") from None
        except ClientDisconnect:  # nobody reads this answer
            raise ApiError("the body is not complete", Connection="close") from None
        if length > most:
            raise ApiError(f"the body is longer than {most} bytes", status=413, code="body_too_long", Connection="close")
        return read_object(bytes(body), fields, required)

    # ---------------- handlers

    async def completions(self, request: Request, fields: dict[str, Any]) -> ASGIApp:
        """Complete prompts."""
        prompt = fields["prompt"]
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return self._answer(request, fields, [prompt] if one else prompt, chat=False)

    async def chat(self, request: Request, fields: dict[str, Any]) -> ASGIApp:
        """Answer a conversation, if the server was started with a chat template."""
        if not self.options.chat:
            message = "this server has no chat template: use /v1/completions, or start it with --chat-template plain"
            raise ApiError(message, code="no_chat_template")
        stop = fields.get("stop", [])
        fields["stop"] = ([stop] if isinstance(stop, str) else stop) + [f"\n{role}:" for role in ROLES]
        lines = [f"{message['role']}: {message['content']}\n" for message in fields["messages"]]
        return self._answer(request, fields, ["".join(lines) + "assistant:"], chat=True)

    def _answer(self, request: Request, fields: dict[str, Any], prompts: list[str | list[int]], chat: bool) -> ASGIApp:
        """Return the answer of a call. The call runs when the answer is sent, so that it can watch the connection meanwhile."""
        served = self.served(fields.get("model"))
        fields.setdefault("speculation", self.options.speculation)

        def checked() -> Call:
            ids = [encode(served, given, served.model.config.maxT) if isinstance(given, str) else given for given in prompts]
            return Call(served, fields, ids, chat=chat)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            async with self.admitted(served, len(prompts) * fields.get("n", 1)):
                size = sum(len(prompt) + 50 for prompt in prompts)  # many short prompts take time, too
                run = Run(await _unhurried(size, checked), self.metrics, request.state.id)
                await run.answer(self.worker, self.options.request_timeout, receive, send)

        return answer

    async def list_models(self, request: Request, fields: dict[str, Any]) -> Any:
        """List the models."""
        return {"object": "list", "data": [self._about(name) for name in self.by_name]}

    async def one_model(self, request: Request, fields: dict[str, Any]) -> Any:
        """Describe a model."""
        return self._about(request.path_params["id"])

    def _about(self, name: str) -> dict[str, Any]:
        served, config = self.served(name), self.served(name).model.config
        family = {"owned_by": "pygpt", "root": served.names[0], "parent": None}
        sizes = {"max_model_len": config.maxT, "vocabulary": config.V}
        return {"id": name, "object": "model", "created": served.created, **family, **sizes}

    async def health(self, request: Request, fields: dict[str, Any]) -> Response:
        """Report whether the server accepts requests."""
        return JSONResponse({"status": "ok" if self.ready else "draining"}, 200 if self.ready else 503)

    async def report_metrics(self, request: Request, fields: dict[str, Any]) -> Response:
        """Return the metrics in Prometheus's format."""
        for served in self.models:
            running, waiting, used = served.engine.load
            share, speculator = used / (served.engine.cache_bytes or 1), served.engine.speculator
            numbers = {"num_requests_running": running, "num_requests_waiting": waiting, "kv_cache_usage_perc": share}
            guesses = {"draft": speculator.drafted, "accepted": speculator.accepted}
            for name, value in (numbers | {f"spec_decode_num_{kind}_tokens": n for kind, n in guesses.items()}).items():
                self.metrics.set(name, served.names[0], value)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request, fields: dict[str, Any]) -> Any:
        """Return the version of pygpt."""
        return {"version": __version__}

    async def tokenize(self, request: Request, fields: dict[str, Any]) -> Any:
        """Encode text: `prompt` as vLLM does, or `content` as llama.cpp does."""
        served = self.served(fields.get("model"))
        if ("prompt" in fields) == ("content" in fields):
            raise ApiError("give prompt or content: exactly one of them", "prompt")
        text = fields.get("prompt", fields.get("content", ""))
        ids = await _unhurried(len(text), partial(encode, served, text, len(text), special=fields.get("parse_special", False)))
        if "content" in fields:
            if not fields.get("with_pieces"):
                return {"tokens": ids}
            named = [(token, token_text(data), data) for token in ids for data in [served.bytes_of([token])]]
            # as in llama.cpp, a piece that is not whole characters is a list of its bytes
            return {"tokens": [{"id": t, "piece": text if text.encode() == data else list(data)} for t, text, data in named]}
        strings = {"token_strs": [token_text(served.bytes_of([t])) for t in ids]} if fields.get("return_token_strs") else {}
        return {"tokens": ids, "count": len(ids), "max_model_len": served.model.config.maxT, **strings}

    async def detokenize(self, request: Request, fields: dict[str, Any]) -> Any:
        """Decode ids. The text is `prompt` for clients of vLLM, and `content` for those of llama.cpp."""
        served = self.served(fields.get("model"))
        served.check_ids("tokens", fields["tokens"])
        return dict.fromkeys(("prompt", "content"), served.vocabulary("tokens").decode(fields["tokens"]))

    async def tokenizer_info(self, request: Request, fields: dict[str, Any]) -> Any:
        """Describe the tokenizer, so that evaluation harnesses do not need a copy of it."""
        served = self.models[0]
        end = None if served.eot is None else token_text(served.bytes_of([served.eot]))
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
        own = {"tokenizer_class": "GPT2Tokenizer", "chat_template": None, "add_bos_token": False}
        return {**own, **special, "model_max_length": served.model.config.maxT, "vocab_size": served.model.config.V}

    async def trace(self, request: Request, fields: dict[str, Any]) -> Any:
        """Record the next step: for each worker, its phases [name, layer, begin, end, left] with times in microseconds."""
        try:
            async with asyncio.timeout(SLOW_S):
                return {"workers": await self.worker.trace(self.served(fields.get("model")))}
        except TimeoutError:
            raise ApiError(f"the model ran 0 steps in {SLOW_S:g} seconds: send a completion meanwhile", status=408) from None

    async def inspect(self, request: Request, fields: dict[str, Any]) -> Any:
        """Return a token's attention in one layer, for one head or each, and what each layer would predict (the logit lens)."""
        served, tokens = self.served(fields.get("model")), fields["tokens"]
        served.check_ids("tokens", tokens)
        async with self.admitted(served, 1):
            try:
                attention, tops = await asyncio.to_thread(_inside, served.model, tokens, fields)
            except InputError as error:
                message = str(error)
                raise ApiError(message, next((name for name in fields if message.startswith(name)), "tokens")) from None
        named = [[{"id": i, "bytes": list(served.bytes_of([i])), "logprob": logprob} for i, logprob in top] for top in tops]
        return {"attention": attention, "lens": named}

    async def openapi(self, request: Request, fields: dict[str, Any]) -> Any:
        """Return this document."""
        return document([one for one in ENDPOINTS if one.handler is not Server.page], self.options.root_path.rstrip("/"))

    async def page(self, request: Request, fields: dict[str, Any]) -> Response:
        """Return the page, or one of its files."""
        name = request.path_params.get("file", "index.html")
        if not self.options.page or name not in os.listdir(PAGE):
            raise HTTPException(404)
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
        return FileResponse(os.path.join(PAGE, name), headers=headers)


def _inside(model: GPT2, tokens: list[int], fields: dict[str, Any]) -> tuple[list[list[float]], list[Any]]:
    """Return the attention of one token, (heads, T), and the most probable (id, log-probability) after each stream."""
    layer = check_whole("layer", fields.get("layer", 0), 0, model.config.L - 1)
    position = check_whole("position", fields.get("position", len(tokens) - 1), 0, len(tokens) - 1)
    head = check_whole("head", fields.get("head", 0), 0, model.config.NH - 1)
    found = model.activations(tokens[: position + 1], ["probs", "encoded", "residual3"], positions=[position], chunk=LOOKED)
    logits = model.logits_of(numpy.concatenate([found["encoded"], found["residual3"][:, 0]]))  # [L + 1, V]
    tops = [log_probabilities(logits.data, row, 0, LENS) for row in range(len(logits))]
    probs = found["probs"][layer, head : head + 1 if "head" in fields else None, 0]
    return probs.tolist(), [[] if top is None else top[1] for top in tops]


ENDPOINTS = [
    Endpoint("/v1/completions", Server.completions, schema.COMPLETION, ("prompt",)),
    Endpoint("/v1/chat/completions", Server.chat, schema.CHAT, ("messages",)),
    Endpoint("/v1/models", Server.list_models),
    Endpoint("/v1/models/{id:path}", Server.one_model),
    Endpoint("/tokenize", Server.tokenize, schema.TOKENIZE),
    Endpoint("/detokenize", Server.detokenize, schema.DETOKENIZE, ("tokens",)),
    Endpoint("/tokenizer_info", Server.tokenizer_info),
    Endpoint("/inspect", Server.inspect, schema.INSPECT, ("tokens",)),
    Endpoint("/trace", Server.trace, schema.MODEL),
    Endpoint("/metrics", Server.report_metrics),
    Endpoint("/version", Server.version),
    Endpoint("/openapi.json", Server.openapi),
    Endpoint("/health", Server.health, key=False),
    Endpoint("/ready", Server.health, key=False),
    Endpoint("/", Server.page, key=False),
    Endpoint("/page/{file}", Server.page, key=False),
]


async def _error(request: Request, error: Exception) -> Response:
    """Answer an error of a handler, or an unknown path or method."""
    if isinstance(error, HTTPException):
        paths = [row.path for row in ENDPOINTS if "{" not in row.path and row.path != request.url.path]  # "/" without a page
        unknown = f"no such path: {shown(request.url.path)}: {near(request.url.path, paths)}"
        message = unknown if error.status_code == 404 else f"{request.method} is not allowed here"
        return JSONResponse(ApiError(message, status=error.status_code).body, error.status_code, error.headers)
    found = error if isinstance(error, ApiError) else reported(error)
    return Response(encoded(found.body), found.status, found.headers, "application/json")  # a name may hold half a character


async def _unhurried(size: int, function: Callable[[], Any]) -> Any:
    """Return function(), which works on `size` characters. If they are many, run it outside the event loop."""
    return function() if size <= SHORT else await asyncio.to_thread(function)


class Protocol(H11Protocol):
    """HTTP/1.1 with two limits: too many connections get status 503, and those whose headers do not arrive are closed."""

    most = CONNECTIONS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection, or refuse it."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.write(REFUSAL + b"content-length: %d\r\n\r\n%b" % (len(FULL), FULL))
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take data, and wait at most HEADER_S seconds for the rest of a request's headers."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def _watch(self) -> None:
        waits = self.timeout_keep_alive_task is None and (self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE)
        if waits and self._late is None:
            self._late = self.loop.call_later(HEADER_S, self.transport.close)
        elif not waits and self._late is not None:
            self._late.cancel()
            self._late = None


class _Uvicorn(uvicorn.Server):
    """A server whose signals the event loop handles."""

    def capture_signals(self) -> Any:
        return nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(BACKLOG)  # asyncio has set the number that it accepts at once, which is smaller


def listen(host: str, port: int, uds: str | None) -> socket.socket:
    """Return a listening socket: a Unix socket at the path `uds`, else TCP. Raises InputError if the system refuses."""
    try:
        if uds is not None:
            with socket.socket(socket.AF_UNIX) as probe:  # a dead server left its socket; connecting to a file fails alike
                if Path(uds).is_socket() and probe.connect_ex(uds) == errno.ECONNREFUSED:
                    os.unlink(uds)
            return socket.create_server(uds, family=socket.AF_UNIX, backlog=BACKLOG)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it only on a socket that names its protocol
        return made
    except (OSError, OverflowError) as error:
        where = uds if uds is not None else f"{host} port {port}"
        reason = error.__context__ or error  # create_server() adds the address to the system's words
        raise InputError(f"cannot listen at {where}: {getattr(reason, 'strerror', None) or reason}; choose another") from None


def run(server: Server, listening: socket.socket, *, grace_s: float, started: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status, 0 or 130. started() is called once it serves.

    After the signal, running requests have grace_s seconds to end. A second signal ends them at once."""
    serving, status = embedded(server, grace_s), [0]

    def stop(number: int) -> None:
        serving.force_exit = server.draining
        for connection in [*serving.server_state.connections] if server.draining else ():
            connection.transport.abort()  # since Python 3.12, the end waits for connections
        server.draining = serving.should_exit = True
        status[0] = 130 if number == signal.SIGINT else status[0]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        started()
        await serving.serve(sockets=[listening])
        signal.set_wakeup_fd(-1)  # the loop closes it before it removes the handlers, and a signal in between would complain

    asyncio.run(main())
    return status[0]


def embedded(server: Server, grace_s: float) -> uvicorn.Server:
    """Return a uvicorn server for the application, without signal handlers."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 4 * CONNECTIONS if files == resource.RLIM_INFINITY else files
    used = len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0
    Protocol.most = max(1, min(CONNECTIONS, (files - used) // 2))
    limits = dict[str, Any](timeout_graceful_shutdown=grace_s, h11_max_incomplete_event_size=32768, timeout_keep_alive=KEEP_S)
    limits["backlog"] = max(1, min(BACKLOG, files // 16))  # accepted at once: several times as many are open meanwhile
    quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False, "server_header": False}
    return _Uvicorn(uvicorn.Config(server, http=Protocol, ws="none", lifespan="on", **quiet, **limits))
