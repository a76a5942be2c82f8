"""A web server on this machine that serves bytes, and misbehaves as told: for tests of downloads."""

import hashlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "5e" * 20
Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Answers one request: the first answer of the site's plan, else as a good server does."""

    protocol_version = "HTTP/1.1"
    server: "Site"

    def do_GET(self) -> None:
        """Answer it, as the plan of its path has it."""
        self._answer("", self.server.requests, good)

    def do_HEAD(self) -> None:
        """Answer it, as the plan of "HEAD " and its path has it, or as Hugging Face does."""
        self._answer("HEAD ", self.server.heads, announced())

    def _answer(self, kind: str, log: list[tuple[str, dict[str, str]]], usual: Answer) -> None:
        """Note the request, then answer it."""
        self.close_connection = True
        path = urlsplit(self.path).path
        with self.server.lock:
            log.append((path, dict(self.headers)))
            if plan := self.server.plans.get(kind + path):
                usual = plan.pop(0)
            elif path not in self.server.files:
                usual = status(404)
        usual(self, self.server.files.get(path, b""))

    def head(self, code: int, headers: dict[str, Any]) -> None:
        """Send status and headers; None leaves one out."""
        self.send_response(code)
        for name, value in ({"ETag": self.server.etag, "Connection": "close"} | self.server.extra | headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
        """Stay quiet."""


class Site(ThreadingHTTPServer):
    """The server: `files` by path, `plans` of answers by path, GET's `requests` and HEAD's `heads` (path, headers) as they
    came. Use it with `with`."""

    daemon_threads = False  # server_close() waits for them

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.plans: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.etag: str | None = '"one"'
        self.extra: dict[str, Any] = {}
        self.released = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.005})
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of the requests for a path."""
        return [headers for found, headers in self.requests if found == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, once every answer has ended. May be called twice."""
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


def good(handler: Handler, data: bytes) -> None:
    """The file, or the part that is asked for if it is still the same file."""
    span = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    condition = handler.headers.get("If-Range")
    if span is None or condition not in (None, handler.server.etag):
        handler.head(200, {"Content-Length": len(data)})
        handler.wfile.write(data)
        return
    start = int(span[1])
    if start >= len(data):
        handler.head(416, {"Content-Length": 0, "Content-Range": f"bytes */{len(data)}"})
        return
    headers = {"Content-Length": len(data) - start, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
    handler.head(206, headers)
    handler.wfile.write(data[start:])


def announced(**headers: Any) -> Answer:
    """What Hugging Face says of a file that is asked for by HEAD, or other headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(handler: Handler, data: bytes) -> None:
        facts = {"Content-Length": len(data), "X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        handler.head(200, facts | named)

    return answer


def dropped(at: int) -> Answer:
    """As good() does, but the connection ends at byte `at` of the file."""

    def answer(handler: Handler, data: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        headers: dict[str, Any] = {"Content-Length": len(data) - start}
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.head(206 if span else 200, headers)
        handler.wfile.write(data[start:at])

    return answer


def status(code: int, **headers: Any) -> Answer:
    """Nothing but a status. Underscores in the headers' names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, data: handler.head(code, {"Content-Length": 0, "ETag": None} | named)


def moved(url: str, **headers: Any) -> Answer:
    """A redirect."""
    return status(302, Location=url, **headers)


def whole(data: bytes | None = None, **headers: Any) -> Answer:
    """The whole file whatever was asked for, or other bytes, with other headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(handler: Handler, own: bytes) -> None:
        sent = own if data is None else data
        handler.head(200, {"Content-Length": len(sent)} | named)
        handler.wfile.write(sent)

    return answer


def partial(content_range: str | None, data: bytes, **headers: Any) -> Answer:
    """Some bytes as 206."""

    def answer(handler: Handler, own: bytes) -> None:
        handler.head(206, {"Content-Length": len(data), "Content-Range": content_range} | headers)
        handler.wfile.write(data)

    return answer


def chunked(handler: Handler, data: bytes) -> None:
    """The file in chunks, its length unsaid."""
    handler.head(200, {"Transfer-Encoding": "chunked"})
    for start in range(0, len(data), 1000):
        piece = data[start : start + 1000]
        handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    handler.wfile.write(b"0\r\n\r\n")


def cut_chunk(handler: Handler, data: bytes) -> None:
    """Chunks that break off."""
    handler.head(200, {"Transfer-Encoding": "chunked"})
    handler.wfile.write(b"%x\r\n%b" % (len(data), data[:1500]))


def dribble(handler: Handler, data: bytes) -> None:
    """The file, a few bytes at a time."""
    handler.head(200, {"Content-Length": len(data)})
    for start in range(0, len(data), 97):
        handler.wfile.write(data[start : start + 97])
        handler.wfile.flush()


def silence(handler: Handler, data: bytes) -> None:
    """Half of the file, then nothing until the server ends."""
    handler.head(200, {"Content-Length": len(data)})
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.server.released.wait(60)


def nonsense(handler: Handler, data: bytes) -> None:
    """No HTTP at all."""
    handler.wfile.write(b"\x16\x03\x01 this is no answer\r\n\r\n")
