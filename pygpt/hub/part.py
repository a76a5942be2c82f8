"""A file on its way: what has arrived of it is kept beside it (.part, and .part.json with what the server said of it) until it
is whole and checked. Whatever the disk refuses is a PyGPTError of one line.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO

from ..errors import PyGPTError
from ..formats.files import atomic_file, reason


class Part:
    """What has arrived of a file: `path`, locked against other downloads, and in `path`.json what the server said of it.

    digest: its sha256, where that is known beforehand. have: bytes so far. size, validator (a strong ETag), sha256: of the
    whole file, None where the server did not say. Raises PyGPTError when it cannot be written, or another process fetches the
    same file. Use it in a `with` block, at whose end an empty one is removed.
    """

    def __init__(self, path: str, url: str, digest: str | None = None) -> None:
        self.path, self.url, self._digest = path, url, digest
        self.have = 0
        self.size: int | None = None
        self.validator: str | None = None
        self.sha256: str | None = None
        with disk_errors(path):
            self._file = _open_locked(path)
        try:
            self._remember()
        except BaseException:
            self._file.close()
            raise

    def _remember(self) -> None:
        """Go on with an earlier download of the same address; else begin anew."""
        with disk_errors(self.path):
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
        with disk_errors(self.path):
            self._file.truncate(0)
            self.have = 0
            self.say(size, validator, sha256)

    def say(self, size: int | None, validator: str | None, sha256: str | None) -> None:
        """Note what is known of the file, for a later run."""
        self.size, self.validator, self.sha256 = size, validator, sha256
        facts = {"url": self.url, "size": size, "validator": validator, "sha256": sha256}
        with disk_errors(self.path), atomic_file(f"{self.path}.json") as file:
            file.write(json.dumps(facts).encode())

    def write(self, data: bytes) -> None:
        """Append bytes. Raises PyGPTError when they are more than the file has, or cannot be written."""
        if self.size is not None and self.have + len(data) > self.size:
            size = self.size
            self.begin(None, None, None)
            raise PyGPTError(f"{self.url}: wrong length: more bytes arrive than the {size} that were announced")
        with disk_errors(self.path):
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        self.have += len(data)

    def take(self, path: str) -> None:
        """Make a whole file, which is what say() said, what has arrived. It is locked when it gets its new name."""
        with disk_errors(self.path):
            file = _open_locked(path)
            os.replace(path, self.path)
            self.have = os.fstat(file.fileno()).st_size
        self._file.close()
        self._file = file

    def check(self) -> None:
        """Compare the bytes with the sha256 that the server names, and with `digest`; drop them if they differ."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
        wanted = {digest for digest in (self.sha256, self._digest) if digest}
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
                with disk_errors(path):
                    os.unlink(path)
        self.have = 0

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.have:
            self.discard()
        self._file.close()


def check_room(path: str, needed: int) -> None:
    """Refuse to write what the disk of this file cannot hold."""
    folder = os.path.dirname(os.path.abspath(path))
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise PyGPTError(f"{folder}: {free} bytes are free and {needed} are needed: make room, or name another place with -o")


def sha256_of(path: str) -> str:
    """A file's digest."""
    with disk_errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Say in one line what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise PyGPTError(f"{path}: cannot write here: {reason(error)}") from error


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
