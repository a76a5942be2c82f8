"""As much of Hugging Face's web site as downloads need, on this machine, and as faulty as a test wants it."""

import hashlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "5e" * 20
Answer = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Answer one request by the next plan for its method and path, or else as a normal server."""

    protocol_version = "HTTP/1.1"
    server: "Site"

    def do_GET(self) -> None:
        """Answer with the file, or with the part after "Range: bytes=N-"."""
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
        data = self.server.files.get(path, b"")
        if plan := self.server.plans.get((self.command, path)):
            plan.pop(0)(self, data)
        elif path in self.server.files:
            self.send_file(data)
        else:
            self.send_answer(404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def send_file(self, data: bytes, stop: int | None = None, **headers: str | int) -> None:
        """Send a file as Hugging Face does, or only the bytes before `stop`. In names of headers, _ is -."""
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        facts: dict[str, str | int] = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        facts |= {"Content-Length": len(data) - start, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        facts |= {name.replace("_", "-"): value for name, value in headers.items()}
        self.send_answer(206 if span else 200, facts, data[start:stop])

    def send_answer(self, status: int, headers: dict[str, str | int], body: bytes = b"") -> None:
        """Send an answer and close the connection; "" leaves a header out."""
        self.close_connection = True
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "Connection": "close"} | headers).items():
            if value != "" and not (name == "Content-Range" and status == 200):
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


class Site(ThreadingHTTPServer):
    """The server: `files` by path; `plans`, the next answers by (method, path); `requests` as they came. Use it in `with`."""

    daemon_threads = False  # server_close() waits for the answers

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.plans: dict[tuple[str, str], list[Answer]] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.005})
        self._thread.start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that goes away."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


def status(code: int, **headers: str | int) -> Answer:
    """An answer without a file. In names of headers, _ means -."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, data: handler.send_answer(code, named)
