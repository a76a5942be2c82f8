"""Fetch a GPT-2 model. `python -m pygpt.download --help` says how.

A model goes by its name into the cache folder, where `-m NAME` finds it, or from an address into a file. Hugging Face's are
converted when they have arrived. What has arrived of a file is kept beside it (.part, and .part.json with what the server
said of it) until it is whole and checked.

Two can do the talking. `Hub` is huggingface_hub (the extra `hub`), where it is installed, for models on Hugging Face: it knows
its own cache, the token of `hf auth login`, HF_HUB_OFFLINE and Xet. What it fetches is not left in its cache: a second copy of
the model would stay there. It drops what has arrived when a run ends early. `Client` is the standard library, for every other
address (llm.c's files among them), with PYGPT_HUB=0, and for what an earlier run has begun: a download that broke off goes on
where it stopped, now or in a later run.

`Client` refuses every scheme but http and https, a redirect from https to http, and to show HF_TOKEN to any host but that of
HF_ENDPOINT; proxies (HTTPS_PROXY, ...) and certificates are urllib's. Redirects and proxies of `Hub` are huggingface_hub's.

stdout stays empty; a progress bar is for terminals. Exit status: 0, with one line on stderr; 1 for a failure at run time; 2
for bad input; 130 after Ctrl-C. Unless it is 0 there is no new model file.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; then it is main()'s

import argparse
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, IncompleteRead
from io import FileIO
from socket import gaierror
from tempfile import TemporaryDirectory
from time import monotonic, sleep, time
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
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

from . import __version__
from .checkpoint import MODELS, Checkpoint, _reason, atomic_file, cached_model, file_bytes
from .cli import HelpFormatter, Parser, one_line, say, status_of
from .convert import check_parent, convert, default_version, describe, parse_version, write_bin
from .errors import CheckpointError, InputError, PyGPTError
from .huggingface import CONFIG_FILE, JSON_LIMIT, HuggingFaceModel, parse_settings, pickle_error, read_settings
from .safetensors_file import SafetensorsFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

EXAMPLES = """\
examples:
  python -m pygpt.download gpt2                     OpenAI's GPT-2 124M, from Hugging Face; then: python -m pygpt -m gpt2
  python -m pygpt.download --version 5 gpt2-xl      the largest, as bfloat16
  python -m pygpt.download gpt2_124M -o gpt2.bin    llm.c's own file, into this folder

names: gpt2, gpt2-medium, gpt2-large, gpt2-xl; llm.c's gpt2_124M, gpt2_124M_bf16
environment: HF_ENDPOINT (a mirror), HF_TOKEN (for a model that needs one), HTTPS_PROXY, PYGPT_HOME (the cache folder),
PYGPT_HUB=0 (do without huggingface_hub)
"""

HUB = "https://huggingface.co"
HUB_VERSIONS = (1, 31), (3,)  # of huggingface_hub: from, and below; pyproject.toml has the same
LLMC = "datasets/karpathy/llmc-starter-pack/resolve/main"  # as llm.c, dev/download_starter_pack.sh, has it
SOURCES = {
    name: f"{LLMC}/{name}.bin" if "124M" in name else f"openai-community/{name}/resolve/main/model.safetensors"
    for name in MODELS
}
SHA256 = {f"{LLMC}/gpt2_124M.bin": "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162"}

TIMEOUT = 30.0  # seconds without a byte
TRIES = 6  # in a row that bring nothing new
MOST_TRIES = 1000  # in all: a server that gives a byte at a time ends too
BACKOFF_LIMIT, RETRY_AFTER_LIMIT = 30.0, 120.0  # seconds
TEMPORARY = {408, 425, 429, 500, 502, 503, 504}  # statuses after which trying again helps
READ_BYTES = 1 << 18
KEEP_FREE = 1 << 28  # bytes that a file of unknown length leaves on the disk
WITHOUT_HUB = ": PYGPT_HUB=0 downloads without huggingface_hub, and keeps what arrives"
PROXY_PASSWORD = "Proxy-authorization"  # as urllib spells the header


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt.download",
        usage="python -m pygpt.download [options] NAME | URL",
        description="Fetch a GPT-2 model by name into the cache folder, or from the address of a .bin or .safetensors file.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="NAME | URL", help="one of the names below, or an http(s) address")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the file to write (default: NAME in the cache; URL's name here)"
    )
    parser.add_argument("--version", metavar="N", help="1, 3 (float32) or 5 (bfloat16): convert to it (default: the exact one)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, fetch, say what was done."""
    say(download(options.model, options.output, parse_version(options.version)))


def download(model: str, target: str | None = None, version: int | None = None) -> str:
    """Fetch the model of this name or address to file `target`; return a line that says so. A model that is there stays.

    Raises InputError for what cannot be asked for, CheckpointError when something else than a model arrives, PyGPTError when
    nothing whole does.
    """
    endpoint = check_url(os.environ.get("HF_ENDPOINT") or HUB, "HF_ENDPOINT").rstrip("/")
    if model in MODELS:
        url, default, digest = f"{endpoint}/{SOURCES[model]}", cached_model(model), SHA256.get(SOURCES[model])
    elif "://" in model:
        url, default, digest = check_url(model, "URL"), file_name(model), None
    else:
        raise InputError(f"{model[:80]!r} is neither an http(s) address nor a name: names are {', '.join(MODELS)}")
    if target is None:
        target = default
        make_folder(os.path.dirname(target))
    if there := present(target, version):
        return there
    client = Client(endpoint)  # here, since it looks at HF_TOKEN, which is the other's too
    with Part(f"{target}.part", url) as part:
        return fetch_model(part, hub_for(part, endpoint) or client, target, version, digest)


def hub_for(part: "Part", endpoint: str) -> "Hub | None":
    """huggingface_hub, where it is installed, wanted, and can fetch this file."""
    wanted = os.environ.get("PYGPT_HUB") or "1"
    if wanted not in ("0", "1"):
        raise InputError(f"PYGPT_HUB is {wanted[:40]!r}: it must be 0 (do without huggingface_hub) or 1")
    place = re.fullmatch(r"/((?!datasets/|spaces/)[\w.-]+(?:/[\w.-]+)?)/resolve/([^/]+)/.+", within(part.url, endpoint))
    if wanted == "0" or place is None or not is_safetensors(part.url) or (part.have and not part.whole):
        return None
    try:
        from huggingface_hub import __version__ as found
    except ImportError:
        return None
    least, below = HUB_VERSIONS
    if least <= tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < below:
        return Hub(part, endpoint, place[1], unquote(place[2]))
    from_, to = (".".join(map(str, version)) for version in HUB_VERSIONS)
    say(f"huggingface_hub {found} is not of those that are used, from {from_} and below {to}: the standard library downloads")
    return None


def fetch_model(part: "Part", client: "Client | Hub", target: str, version: int | None, digest: str | None) -> str:
    """Fetch, check, convert if need be, and give the file its name."""
    settings = config = None
    if is_safetensors(part.url):
        address = beside(part.url, CONFIG_FILE)
        settings = parse_settings(client.small(address), address)
        config = read_settings(settings, part.url)
    path = client.fetch(part, room=0 if config is None else file_bytes(config, version or 3))
    source = part.url if path == part.path else path
    try:
        if path == part.path:
            part.check(digest)
        if settings is not None:
            with SafetensorsFile(path) as file, HuggingFaceModel({target: file}, settings, place=source) as model:
                write_bin(target, model, version or default_version(model))
        else:
            with Checkpoint(part.path) as checkpoint:
                found = checkpoint.version
            if version in (None, found):
                with _disk(target):
                    os.replace(part.path, target)
            else:
                convert(part.path, target, version)
    except CheckpointError as error:
        if path != part.path:
            raise
        part.discard()  # whole, and no model: it never will be
        raise CheckpointError(f"{part.url}: what came is no model that is read, and deleted: {error}") from None
    part.discard()
    with Checkpoint(target) as written:
        return f"{source} -> {describe(target, written)}"


class Part:
    """What has arrived of a file: `path`, locked against other downloads, and in `path`.json what the server said of it.

    have: bytes so far. size, validator (a strong ETag), sha256: of the whole file, None where the server did not say. Raises
    PyGPTError when it cannot be written, or another process fetches the same file. Use it in a `with` block, at whose end an
    empty one is removed.
    """

    def __init__(self, path: str, url: str) -> None:
        self.path, self.url = path, url
        self.have = 0
        self.size: int | None = None
        self.validator: str | None = None
        self.sha256: str | None = None
        with _disk(path):
            self._file = _open_locked(path)
        try:
            self._remember()
        except BaseException:
            self._file.close()
            raise

    def _remember(self) -> None:
        """Go on with an earlier download of the same address; else begin anew."""
        with _disk(self.path):
            found = os.fstat(self._file.fileno()).st_size
        try:
            with open(f"{self.path}.json", "rb") as file:
                facts = json.loads(file.read(1 << 16))
            size, validator, sha256 = facts["size"], facts["validator"], facts["sha256"]
            known = facts["url"] == self.url and (size is None or (isinstance(size, int) and found <= size))
            known = known and all(text is None or isinstance(text, str) for text in (validator, sha256))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            known = False
        if known:
            self.have, self.size, self.validator, self.sha256 = found, size, validator, sha256
        elif found:
            self.begin(None, None, None)

    @property
    def whole(self) -> bool:
        """Whether all of it has arrived."""
        return self.size == self.have

    def begin(self, size: int | None, validator: str | None, sha256: str | None) -> None:
        """Drop what there is: a file of which the server says this follows."""
        with _disk(self.path):
            self._file.truncate(0)
            self.have = 0
            self.say(size, validator, sha256)

    def say(self, size: int | None, validator: str | None, sha256: str | None) -> None:
        """Note what is known of the file, for a later run."""
        self.size, self.validator, self.sha256 = size, validator, sha256
        facts = {"url": self.url, "size": size, "validator": validator, "sha256": sha256}
        with _disk(self.path), atomic_file(f"{self.path}.json") as file:
            file.write(json.dumps(facts).encode())

    def write(self, data: bytes) -> None:
        """Append bytes. Raises PyGPTError when they are more than the file has, or cannot be written."""
        if self.size is not None and self.have + len(data) > self.size:
            size = self.size
            self.begin(None, None, None)
            raise PyGPTError(f"{self.url}: wrong length: more bytes arrive than the {size} that were announced")
        with _disk(self.path):
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        self.have += len(data)

    def take(self, path: str) -> None:
        """Make a whole file, which is what say() said, what has arrived. It is locked when it gets its new name."""
        with _disk(self.path):
            file = _open_locked(path)
            os.replace(path, self.path)
            self.have = os.fstat(file.fileno()).st_size
        self._file.close()
        self._file = file

    def check(self, *digests: str | None) -> None:
        """Compare the bytes with the sha256 that the server and `digests` name; drop them if they differ."""
        with _disk(self.path):
            os.fsync(self._file.fileno())
        wanted = {digest for digest in (self.sha256, *digests) if digest}
        if not wanted:
            return
        found = sha256_of(self.path)
        if wanted != {found}:
            self.discard()
            expected = " and ".join(sorted(wanted))
            raise PyGPTError(f"{self.url}: wrong bytes: sha256 {found}, expected {expected}; they are deleted: fetch it again")

    def discard(self) -> None:
        """Remove what is left of the two files."""
        for path in self.path, f"{self.path}.json":
            if os.path.lexists(path):
                with _disk(path):
                    os.unlink(path)
        self.have = 0

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.have:
            self.discard()
        self._file.close()


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
        """Fetch what is missing of a file; return where it is. room: bytes that will be needed on the disk besides."""
        progress = Progress(os.path.basename(part.path).removesuffix(".part"))
        try:
            if not part.whole:
                self._persist(part.url, lambda: self._receive(part, room, progress), lambda: part.have, progress)
        finally:
            progress.end()
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
            linked = _whole(headers.get("X-Linked-Size")) or linked
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
                reason = _reason(cause) or type(cause).__name__
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


class Hub:
    """Asks huggingface_hub for the files of one revision of a repository, and makes its words those of this command.

    They come from its cache, both the settings and the tensors or neither, else into a folder beside the part. Retries are
    huggingface_hub's, and end: after six tries without an answer, and after six breaks in a row that brought nothing.
    """

    def __init__(self, part: Part, endpoint: str, repository: str, revision: str) -> None:
        self._endpoint, self._repository, self._revision = endpoint, repository, revision
        self._target = part.path.removesuffix(".part")
        with self._clearly(part.url):
            self._cached = self._find([self._name(url) for url in (part.url, beside(part.url, CONFIG_FILE))])
        logging.getLogger("huggingface_hub").handlers = [Notes()]

    def _find(self, names: list[str]) -> dict[str, str]:
        """Where all of these files lie in huggingface_hub's cache; nothing if one of them does not."""
        from huggingface_hub.file_download import try_to_load_from_cache  # a lazy import would print what fails to stdout

        for repository in self._repository, self._repository.removeprefix("openai-community/"):  # gpt2: GPT-2's first name
            found = {name: try_to_load_from_cache(repository, name, revision=self._revision) for name in names}
            paths = {name: path for name, path in found.items() if isinstance(path, str)}
            if len(paths) == len(names):
                return paths
        return {}

    def small(self, url: str) -> bytes:
        """A file of up to JSON_LIMIT bytes."""
        name = self._name(url)
        if name in self._cached:
            with _disk(self._cached[name]), open(self._cached[name], "rb") as file:
                return file.read(JSON_LIMIT + 1)
        size, _ = self._ask(url)
        if size > JSON_LIMIT:
            raise PyGPTError(f"{url}: {size} bytes are announced, of a file that has up to {JSON_LIMIT}")
        with self._download(url) as path, _disk(path), open(path, "rb") as file:
            return file.read(JSON_LIMIT + 1)

    def fetch(self, part: Part, *, room: int) -> str:
        """Fetch the file if need be; return where it is. room: bytes that will be needed on the disk besides."""
        if part.whole:
            return part.path
        if path := self._cached.get(self._name(part.url)):
            check_room(part.path, room)
            check_cached(path)
            return path
        size, sha256 = self._ask(part.url)
        check_room(part.path, size + room)
        with self._download(part.url) as path:
            with _disk(path):
                found = os.path.getsize(path)
            if found != size:
                raise PyGPTError(f"{part.url}: wrong length: {found} bytes came of {size} that were announced; fetch it again")
            part.say(size, None, sha256)
            part.take(path)
        return part.path

    def _name(self, url: str) -> str:
        """A file's path in the repository."""
        return unquote(within(url, self._endpoint).partition("/resolve/")[2].partition("/")[2])

    def _ask(self, url: str) -> tuple[int, str | None]:
        """What the server says of a file: its length, and its sha256 if it is a large one. All are of one commit."""
        from huggingface_hub import get_session
        from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url

        with self._clearly(url):
            session = get_session()
            session.event_hooks = {**session.event_hooks, "response": [limit_wait]}
            address = hf_hub_url(self._repository, self._name(url), revision=self._revision, endpoint=self._endpoint)
            facts = get_hf_file_metadata(
                address, endpoint=self._endpoint, library_name="pygpt", library_version=__version__, retry_on_errors=True
            )
        if facts.size is None:
            raise PyGPTError(f"{url}: the server does not say how long this file is{WITHOUT_HUB}")
        self._revision = facts.commit_hash or self._revision
        return facts.size, facts.etag if facts.etag and re.fullmatch(r"[0-9a-f]{64}", facts.etag) else None

    @contextmanager
    def _download(self, url: str) -> Iterator[str]:
        """Fetch a file into a folder that goes when the block ends."""
        from huggingface_hub.file_download import hf_hub_download

        with _disk(self._target):
            place, name = os.path.split(os.path.abspath(self._target))
            folder = TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=place, ignore_cleanup_errors=True)
        with folder:
            with self._clearly(url):
                path = hf_hub_download(
                    self._repository,
                    self._name(url),
                    revision=self._revision,
                    endpoint=self._endpoint,
                    local_dir=folder.name,
                    library_name="pygpt",
                    library_version=__version__,
                )
            yield str(path)

    @contextmanager
    def _clearly(self, url: str) -> Iterator[None]:
        """Say in one line what went wrong, by the first of its causes: huggingface_hub and its own libraries raise errors of
        many kinds, also for the same thing."""
        try:
            yield
        except Exception as error:
            causes: list[BaseException] = [error]
            while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
                causes.append(cause)
            if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes):
                raise PyGPTError(f"{url}: HF_HUB_OFFLINE is set, and huggingface_hub's cache has no such file") from error
            for cause in causes:
                if (answer := getattr(cause, "response", None)) is not None:
                    raise refusal(url, answer.status_code, answer.reason_phrase) from error
            raise PyGPTError(f"{url}: {_reason(error) or type(error).__name__}{WITHOUT_HUB}") from error


class Notes(logging.Handler):
    """What huggingface_hub has to say meanwhile, as lines of this command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, above its progress bar."""
        from huggingface_hub.utils.tqdm import tqdm

        with tqdm.external_write_mode(sys.stderr):
            say(record.getMessage())


def limit_wait(response: "Any") -> None:
    """Let huggingface_hub wait for a server as long as it asks for within reason; there is no limit of its own."""
    wait = retry_after(response.headers.pop("Retry-After", None))
    response.headers.pop("RateLimit", None)  # another way to say it
    if wait is not None:
        response.headers["Retry-After"] = f"{wait:.0f}"


def check_cached(path: str) -> None:
    """Compare a file of huggingface_hub's cache with its sha256: where it is a large one, a link to a file of that name."""
    with _disk(path):
        wanted = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    if re.fullmatch(r"[0-9a-f]{64}", wanted) and (found := sha256_of(path)) != wanted:
        raise PyGPTError(f"{path}: wrong bytes: sha256 {found}, expected {wanted}; remove it from huggingface_hub's cache")


def sha256_of(path: str) -> str:
    """A file's digest."""
    with _disk(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refusal(url: str, code: int, reason: str) -> PyGPTError:
    """What a status that stays means for the user."""
    meaning = {
        401: "it wants a token: set HF_TOKEN to one that may read this model, and look whether the address is right",
        403: "HF_TOKEN is not allowed to read this: ask for access on the model's page",
        404: "there is no such file: look at the address",
    }
    text = meaning.get(code, reason)
    if 300 <= code < 400:
        text = f"redirected without end, or not to an http(s) address: {reason}"
    return PyGPTError(f"{url}: the server answers {code}: {text}")


def retry_after(text: str | None) -> float | None:
    """The seconds that a server asks to wait, within reason: given as a number or a date; None for anything else."""
    if text is None:
        return None
    seconds: float | None = _whole(text.strip())
    if seconds is None:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time()
        except (ValueError, OverflowError, OSError):
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT)


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


def check_room(path: str, needed: int) -> None:
    """Refuse to write what the disk of this file cannot hold."""
    folder = os.path.dirname(os.path.abspath(path))
    with _disk(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise PyGPTError(f"{folder}: {free} bytes are free and {needed} are needed: make room, or name another place with -o")


def present(target: str, version: int | None) -> str:
    """Say that a model is there already; "" if nothing is. Refuses a target that is something else, or cannot be."""
    if not os.path.basename(target):
        raise InputError(f"{target!r} is not the name of a file")
    check_parent(target)
    if not os.path.lexists(target):
        return ""
    try:
        with Checkpoint(target) as found:
            if version in (None, found.version):
                return f"{describe(target, found)} is there already: nothing to fetch"
            raise InputError(f"{target}: there already, of version {found.version}: remove it, or use python -m pygpt.convert")
    except CheckpointError:
        raise InputError(f"{target}: there already, and not a model file: remove it, or give another name with -o") from None


def make_folder(folder: str) -> None:
    """Make the cache folder; "" is the current one."""
    with _disk(folder):
        os.makedirs(folder or os.curdir, exist_ok=True)


def check_url(url: str, what: str) -> str:
    """An http(s) address, checked."""
    try:
        parts = urlsplit(url)
        sound = bool(re.fullmatch(r"[!-~]+", url) and parts.scheme in ("http", "https") and parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"{what} is {url[:200]!r}: it must be an address such as {HUB}/NAME/resolve/main/model.safetensors")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{what} has a user name or password in it: set HF_TOKEN instead")
    return urlunsplit(parts._replace(fragment=""))


def file_name(url: str) -> str:
    """The file to write for an address: its last part, of a kind that can be read, ending in .bin."""
    name = urlsplit(url).path.rpartition("/")[2]
    if name.startswith("pytorch_model"):
        raise pickle_error(url)
    if not re.fullmatch(r".+\.(bin|safetensors)", name):
        raise InputError(f"{url[:200]}: it must end in .bin (llm.c) or .safetensors (Hugging Face)")
    return name.removesuffix(".safetensors").removesuffix(".bin") + ".bin"


def is_safetensors(url: str) -> bool:
    """Whether an address is of a Hugging Face model."""
    return urlsplit(url).path.endswith(".safetensors")


def within(url: str, endpoint: str) -> str:
    """The path of an address within an endpoint's; "" where it is another's."""
    parts, own = urlsplit(url), urlsplit(endpoint)
    return parts.path.removeprefix(own.path) if origin(url) == origin(endpoint) and parts.path.startswith(own.path) else ""


def beside(url: str, name: str) -> str:
    """The address of another file in the same folder."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def origin(url: str) -> tuple[str, str | None, int | None]:
    """The scheme, host and port of an address: where a token may go."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _whole(text: str | None) -> int | None:
    """A number in ASCII digits; None for anything else."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,18}", text) else None


@contextmanager
def _disk(path: str) -> Iterator[None]:
    """Say in one line what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise PyGPTError(f"{path}: cannot write here: {_reason(error)}") from error


def _open_locked(path: str) -> FileIO:
    """Open a file for one process at a time, made if it is not there."""
    while True:
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - it stays open, as the lock does
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            raise PyGPTError(
                f"{path}: another process is fetching this file: wait for it, or give another name with -o"
            ) from None
        file.close()  # its holder has just renamed or removed it


if __name__ == "__main__":
    sys.exit(main())
