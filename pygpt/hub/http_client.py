"""Downloads by the standard library: a connection that breaks off is made again, and goes on where it stopped.

It refuses every scheme but http and https, a redirect from https to http, and to show HF_TOKEN to any host but that of
HF_ENDPOINT; proxies (HTTPS_PROXY, ...) and certificates are urllib's.
"""

import os
import re
import ssl
import sys
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException, HTTPResponse, IncompleteRead
from socket import gaierror
from time import monotonic, sleep
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from .. import __version__
from ..commands.console import one_line, say
from ..errors import InputError, PyGPTError
from ..formats.huggingface import JSON_LIMIT
from .part import Part, check_room
from .web import origin, refusal, retry_after, whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

TIMEOUT = 30.0  # seconds without a byte
TRIES = 6  # in a row that bring nothing new
MOST_TRIES = 1000  # in all: a server that gives a byte at a time ends too
BACKOFF_LIMIT = 30.0  # seconds
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # statuses after which trying again helps
READ_BYTES = 1 << 18
KEEP_FREE = 1 << 28  # bytes that a file of unknown length leaves on the disk
PROXY_PASSWORD = "Proxy-authorization"  # as urllib spells the header


class Dropped(OSError):
    """A connection ended before its answer did, or an answer does not go with what has arrived: try again."""


class Ask(Request):
    """A request that keeps what the redirects before it said: `trail`, (address, headers) of each."""

    def __init__(self, url: str, headers: dict[str, str], trail: "list[tuple[str, Message]]") -> None:
        super().__init__(url, headers=headers)
        self.trail = trail


class Redirects(HTTPRedirectHandler):
    """Follows redirects to http and https (urllib counts them), and shows the token to its own host only."""

    def __init__(self, client: "Client") -> None:
        self._client = client

    def redirect_request(
        self, req: Request, fp: "IO[bytes]", code: int, msg: str, headers: "Any", newurl: str
    ) -> "Request | None":
        """The request to make next."""
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before == "https" and after == "http"):
            raise PyGPTError(f"{req.full_url}: leads to {newurl[:200]}: it must be https, or http from http")
        fp.close()  # or urllib would read all of it, however much a server sends
        assert isinstance(req, Ask)
        req.trail.append((req.full_url, headers))
        kept = {name: value for name, value in req.headers.items() if name != PROXY_PASSWORD}  # its own proxy adds its own
        ask = Ask(newurl, kept, req.trail)
        self._client.authorise(ask)
        return ask


class Client:
    """Talks to servers, patiently. Proxies are the environment's; HF_TOKEN goes to the endpoint's host only."""

    def __init__(self, endpoint: str) -> None:
        self._origin = origin(endpoint)
        self._token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"[!-~]*", self._token):
            raise InputError("HF_TOKEN has a space or another character that no token has")
        self._answered = False  # whether any server ever did
        self._opener = OpenerDirector()  # not build_opener(), which would know file: and ftp:
        handlers = (
            ProxyHandler(),
            HTTPHandler(),
            HTTPSHandler(),
            HTTPDefaultErrorHandler(),
            HTTPErrorProcessor(),
            Redirects(self),
        )
        for handler in handlers:
            self._opener.add_handler(handler)

    def authorise(self, ask: Ask) -> None:
        """Add the token if the request goes where it belongs."""
        if self._token and origin(ask.full_url) == self._origin:
            ask.add_unredirected_header("Authorization", f"Bearer {self._token}")

    def _open(self, url: str, headers: dict[str, str]) -> "tuple[HTTPResponse, list[tuple[str, Message]]]":
        """Ask for a file; return the answer, its body unread, and (address, headers) of every answer on the way to it."""
        ask = Ask(url, {"User-Agent": f"pygpt/{__version__}", "Accept-Encoding": "identity", **headers}, [])
        self.authorise(ask)
        response = self._opener.open(ask, timeout=TIMEOUT)
        self._answered = True
        assert isinstance(response, HTTPResponse)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise PyGPTError(f"{url}: arrives encoded ({response.headers['Content-Encoding'][:40]}), which nobody asked for")
        return response, [*ask.trail, (response.url, response.headers)]

    def small(self, url: str) -> bytes:
        """A file of up to JSON_LIMIT bytes."""
        found = b""

        def attempt() -> None:
            nonlocal found
            response, _ = self._open(url, {})
            with response:
                announced = response.length
                found = response.read(JSON_LIMIT + 1)
            if announced is not None and len(found) < min(announced, JSON_LIMIT + 1):
                raise Dropped(f"the connection broke off after {len(found)} of {announced} bytes")

        self._persist(url, attempt, lambda: 0)
        return found

    def fetch(self, part: Part, *, room: int) -> str:
        """Fetch what is missing of a file, and check it; return where it is. room: bytes that the disk will need besides."""
        progress = Progress(os.path.basename(part.path).removesuffix(".part"))
        try:
            if not part.whole:
                self._persist(part.url, lambda: self._receive(part, room, progress), lambda: part.have, progress)
        finally:
            progress.end()
        part.check()
        return part.path

    def _receive(self, part: Part, room: int, progress: "Progress") -> None:
        """Ask once for what is missing, and take what comes. Raises Dropped if it ends early."""
        if part.have and part.validator is None:
            part.begin(None, None, None)  # nobody could say whether the rest is of the same file
        headers = {"Range": f"bytes={part.have}-", "If-Range": part.validator} if part.have and part.validator else {}
        try:
            response, trail = self._open(part.url, headers)
        except HTTPError as error:
            if error.code != 416:
                raise
            error.close()
            part.begin(None, None, None)
            raise Dropped("the server has fewer bytes than have arrived") from None
        with response:
            self._begin(part, response, trail)
            if part.size is not None:
                check_room(part.path, part.size - part.have + room)
            while data := response.read1(READ_BYTES):
                if part.size is None:
                    check_room(part.path, len(data) + room + KEEP_FREE)
                part.write(data)
                progress.show(part.have, part.size)
        if part.size is None:
            part.say(part.have, part.validator, part.sha256)  # it ended where the server ended it
        elif not part.whole:
            raise Dropped(f"the connection broke off after {part.have} of {part.size} bytes")

    def _begin(self, part: Part, response: HTTPResponse, trail: "list[tuple[str, Message]]") -> None:
        """Hold an answer's headers against what has arrived; begin anew where it does not continue that."""
        size, linked, sha256 = response.length, None, None
        for address, headers in trail:
            linked = whole_number(headers.get("X-Linked-Size")) or linked
            tags = [headers.get("X-Linked-Etag", "")]
            if origin(address) == self._origin:  # Hugging Face's own; elsewhere such a tag may be the digest of anything
                tags.append(headers.get("ETag", ""))
            for tag in tags:
                if found := re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', tag):
                    sha256 = sha256 or found[1]
        tag = response.headers.get("ETag", "")
        validator = tag if tag and not tag.startswith("W/") else None
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", response.headers.get("Content-Range", ""))
            total = int(span[3]) if span is not None and span[3] != "*" else part.size
            same = span is not None and int(span[1]) == part.have and part.size in (None, total)
            if not same or (validator or part.validator) != part.validator:
                part.begin(None, None, None)
                raise Dropped("the server continues another file than the one that has arrived in part")
            part.say(total, part.validator, part.sha256)
        elif response.status != 200:
            raise PyGPTError(f"{part.url}: the server answers {response.status} ({response.reason}), expected 200 or 206")
        elif size is not None and linked is not None and size != linked:
            raise PyGPTError(f"{part.url}: wrong length: {size} bytes are announced for a file of {linked}")
        else:
            part.begin(linked if size is None else size, validator, sha256)

    def _persist(
        self, url: str, attempt: Callable[[], None], reached: Callable[[], int], progress: "Progress | None" = None
    ) -> None:
        """Call attempt() until it succeeds. Waits in between, longer and longer, or as long as the server asks for.

        reached: how far it has come; TRIES attempts in a row that come no further are the last. Raises PyGPTError.
        """
        tries, failures, best = 0, 0, -1
        while True:
            tries, wait = tries + 1, None
            try:
                return attempt()
            except PyGPTError:
                raise
            except HTTPError as error:
                error.close()
                self._answered = True
                if error.code not in TEMPORARY:
                    raise refusal(url, error.code, str(error.reason)) from None
                reason = f"the server answers {error.code} ({error.reason})"
                wait = retry_after(error.headers.get("Retry-After"))
            except (OSError, HTTPException) as error:
                cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
                reason = reason(cause) or type(cause).__name__
                if isinstance(cause, IncompleteRead):
                    reason = "the connection broke off"
                never = isinstance(cause, gaierror | ConnectionRefusedError) and not self._answered
                if isinstance(cause, ssl.SSLCertVerificationError):
                    reason += "; SSL_CERT_FILE names certificates to trust"
                    never = True
                if never:
                    raise PyGPTError(f"{url}: cannot connect: {reason}") from error
            except ValueError as error:
                raise PyGPTError(f"{url}: leads to an address that is none: {error}") from error
            failures = failures + 1 if reached() <= best else 1
            best = max(best, reached())
            if failures == TRIES or tries == MOST_TRIES:
                break
            wait = min(2.0 ** (failures - 1), BACKOFF_LIMIT) if wait is None else wait
            if progress is not None:
                progress.end()
            say(f"{url}: {reason}: trying again in {wait:.0f} s")
            sleep(wait)
        raise PyGPTError(f"{url}: {reason}: given up after {tries} tries; what has arrived is kept: run it again to go on")


class Progress:
    """A line on a terminal: how much of a file is there, how fast it comes, how long it takes yet. Nothing elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._began: tuple[float, int] | None = None  # when, and with how many bytes
        self._last = 0.0
        self._open = False

    def show(self, have: int, size: int | None) -> None:
        """Draw it, ten times a second at most."""
        now = monotonic()
        if self._began is None:
            self._began = now, have
        if not self._shown or (now - self._last < 0.1 and have != size):
            return
        self._last, self._open = now, True
        start, before = self._began
        rate = (have - before) / (now - start) if now > start else 0.0
        text = f"{self._name}: {have / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        if size:
            left = (size - have) / rate if rate else 0.0
            text = f"{self._name}: {100 * have // size} % of {size / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {clock(left)} left"
        print(f"\r{one_line(text)[:78]:<78}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line, so that another can follow."""
        if self._open:
            self._open = False
            print(file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(int(min(seconds, 359999)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
