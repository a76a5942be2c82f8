"""Downloads by huggingface_hub (the extra `hub`), for models on Hugging Face: it knows its own cache, the token of
`hf auth login`, HF_HUB_OFFLINE and Xet. It is imported where a file is fetched by it, and nowhere else.

What it fetches is not left in its cache: a second copy of the model would stay there. It drops what has arrived when a run ends
early. Redirects and proxies are its own.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from .. import __version__
from ..commands.console import say
from ..errors import InputError, PyGPTError
from ..formats.files import reason
from ..formats.huggingface import CONFIG_FILE, JSON_LIMIT
from .part import Part, check_room, disk_errors, sha256_of
from .web import beside, is_safetensors, refusal, retry_after, within

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HUB_VERSIONS = (1, 31), (3,)  # of huggingface_hub: from, and below; pyproject.toml has the same
WITHOUT_HUB = ": PYGPT_HUB=0 downloads without huggingface_hub, and keeps what arrives"


def hub_for(part: Part, endpoint: str) -> "Hub | None":
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
    if usable(found):
        return Hub(part, endpoint, place[1], unquote(place[2]))
    from_, to = (".".join(map(str, version)) for version in HUB_VERSIONS)
    say(f"huggingface_hub {found} is not of those that are used, from {from_} and below {to}: the standard library downloads")
    return None


def usable(version: str) -> bool:
    """Whether this version of huggingface_hub is one of those that are used."""
    least, below = HUB_VERSIONS
    return least <= tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < below


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
            with disk_errors(self._cached[name]), open(self._cached[name], "rb") as file:
                return file.read(JSON_LIMIT + 1)
        size, _ = self._ask(url)
        if size > JSON_LIMIT:
            raise PyGPTError(f"{url}: {size} bytes are announced, of a file that has up to {JSON_LIMIT}")
        with self._download(url) as path, disk_errors(path), open(path, "rb") as file:
            return file.read(JSON_LIMIT + 1)

    def fetch(self, part: Part, *, room: int) -> str:
        """Fetch the file if need be, and check it; return where it is. room: bytes that the disk will need besides."""
        if not part.whole:
            if path := self._cached.get(self._name(part.url)):
                check_room(part.path, room)
                check_cached(path)
                return path
            self._receive(part, room)
        part.check()
        return part.path

    def _receive(self, part: Part, room: int) -> None:
        """Fetch the file."""
        size, sha256 = self._ask(part.url)
        check_room(part.path, size + room)
        with self._download(part.url) as path:
            with disk_errors(path):
                found = os.path.getsize(path)
            if found != size:
                raise PyGPTError(f"{part.url}: wrong length: {found} bytes came of {size} that were announced; fetch it again")
            part.say(size, None, sha256)
            part.take(path)

    def _name(self, url: str) -> str:
        """A file's path in the repository."""
        return unquote(within(url, self._endpoint).partition("/resolve/")[2].partition("/")[2])

    def _ask(self, url: str) -> tuple[int, str | None]:
        """What the server says of a file: its length, and its sha256 if it is a large one. All are of one commit."""
        with self._clearly(url):
            from huggingface_hub import get_session
            from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_url

            session = get_session()
            session.event_hooks = {**session.event_hooks, "response": [curb]}
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
        with disk_errors(self._target):
            place, name = os.path.split(os.path.abspath(self._target))
            folder = TemporaryDirectory(prefix=f"{name}.", suffix=".tmp", dir=place, ignore_cleanup_errors=True)
        with folder:
            with self._clearly(url):
                from huggingface_hub.file_download import hf_hub_download

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
        many kinds, also for the same thing. What they warn of is a line, too."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = note_warning
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
            raise PyGPTError(f"{url}: {reason(error) or type(error).__name__}{WITHOUT_HUB}") from error


class Notes(logging.Handler):
    """What huggingface_hub has to say meanwhile, as lines of this command."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, above its progress bar."""
        from huggingface_hub.utils.tqdm import tqdm

        with tqdm.external_write_mode(sys.stderr):
            say(record.getMessage())


def note_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Have `Notes` say a warning."""
    logging.getLogger("huggingface_hub").warning("%s", message)


def curb(response: "Any") -> None:
    """Take out of an answer what huggingface_hub would do without limit: wait for as long as a server says, and draw the name
    that it gives the file, escape sequences included."""
    response.headers.pop("Content-Disposition", None)
    wait = retry_after(response.headers.pop("Retry-After", None))
    response.headers.pop("RateLimit", None)  # another way to say it
    if wait is not None:
        response.headers["Retry-After"] = f"{wait:.0f}"


def check_cached(path: str) -> None:
    """Compare a file of huggingface_hub's cache with its sha256: where it is a large one, a link to a file of that name."""
    with disk_errors(path):
        wanted = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    if re.fullmatch(r"[0-9a-f]{64}", wanted) and (found := sha256_of(path)) != wanted:
        raise PyGPTError(f"{path}: wrong bytes: sha256 {found}, expected {wanted}; remove it from huggingface_hub's cache")
