"""Files for every format: map them read-only after a check, view parts of them, and write them atomically.

Refuses anything that is not a regular file. A new file gets its name only when it is complete.
"""

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import ClosedError, PyGPTError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

HEADER_BYTES = 1024  # of llm.c's files: int32[256]
ZIP = b"PK\x03\x04"  # the first bytes of PyTorch's files, and of those before version 1.6:
PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))


class Windows:
    """An open file that is viewed through small read-only maps. A map lives as long as its views.

    `size`: the file's size in bytes. Raises the errors of map_file(), also in view() if the file has become shorter."""

    def __init__(
        self, path: str, kind: str, refusal: type[PyGPTError], check: Callable[[bytes, int], None] | None = None
    ) -> None:
        self._path, self._kind, self._refusal = path, kind, refusal
        self._fd, status = _open_regular(path, kind, refusal)
        self.size = status.st_size
        try:
            if check is not None:
                check(bytes(self.view(0, min(HEADER_BYTES, self.size))), self.size)
        except BaseException:
            self.close()
            raise

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of the file. Raises ClosedError after close()."""
        if self._fd < 0:
            raise ClosedError(f"{self._path}: the {self._kind} is closed; read its tensors before close()")
        if start == stop:
            return memoryview(b"")
        first = start - start % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(self._fd, stop - first, access=mmap.ACCESS_READ, offset=first)
        except (OSError, ValueError) as error:  # ValueError: the file has become shorter
            raise map_failure(error, self._path, self._kind, self._refusal) from error
        return memoryview(mapped)[start - first :]

    def close(self) -> None:
        """Close the file; its views stay valid. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_regular(path: str, kind: str, refusal: type[PyGPTError]) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; return its descriptor and status. Raises `refusal` for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block
    except (OSError, ValueError) as error:
        raise refusal(f"{path!r}: cannot open the {kind}: {reason(error)}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise refusal(f"{path}: not a regular file; a {kind} is expected")
        if foreign := foreign_file(os.pread(fd, 512, 0)):
            raise refusal(f"{path}: not a {kind}, but {foreign}")
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def is_pickle(path: str) -> bool:
    """Return whether a file is one of PyTorch's. A damaged zip file is taken for one, because only model files are given."""
    try:
        if not os.path.isfile(path):  # opening a FIFO would block
            return False
        with open(path, "rb") as file:
            if not (start := file.read(9)).startswith(ZIP):
                # The length of a safetensors header may begin like a pickle, too. The header itself begins with {.
                headed = start[8:] == b"{" and int.from_bytes(start[:8], "little") < os.path.getsize(path)
                return start.startswith(PICKLES) and not headed
        import zipfile

        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
        except zipfile.BadZipFile:
            return True
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return False


def foreign_file(start: bytes) -> str:
    """Return what a file is that people give by mistake, with the way out, or "". start: its first bytes."""
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, which only names the file: run `git lfs pull` in its repository, or download the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page: download the file itself (on Hugging Face, its address has /resolve/ in it)"
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf")):
        return "a compressed archive: unpack it, and give the file in it"
    return ""


def map_file(
    path: str, kind: str, refusal: type[PyGPTError], check: Callable[[bytes, int], None], *, read: bool = False
) -> mmap.mmap:
    """Call check(first 1,024 bytes, size), which may raise, then map the file read-only, or `read` it into memory.

    kind: the kind of file, for messages. Raises `refusal` if the file is not regular, cannot be opened or mapped, or changes
    while it is read. Raises MemoryError if the address space has no room."""
    fd, status = _open_regular(path, kind, refusal)
    try:
        header = os.read(fd, HEADER_BYTES)
        check(header, status.st_size)
        if not read:
            return mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
        memory = mmap.mmap(-1, status.st_size, flags=mmap.MAP_PRIVATE)
        if not _read_into(memory, fd, status) or memory[:HEADER_BYTES] != header:
            memory.close()
            raise refusal(f"{path}: the {kind} changed while pygpt read it: try again when it is complete")
        return memory
    except refusal:
        raise
    except (OSError, ValueError) as error:  # ValueError: the file has become shorter
        raise map_failure(error, path, kind, refusal) from error
    finally:
        os.close(fd)


def _read_into(memory: mmap.mmap, fd: int, status: os.stat_result) -> bool:
    """Read an open file into memory; return False if it changed, or has more or fewer bytes than `status` says."""
    done, count = 0, 1
    with memoryview(memory) as view, os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        while count:
            with view[done:] as rest:
                count = file.readinto(rest) or 0
            done += count
        after = os.fstat(fd)
    return done == after.st_size == status.st_size and after.st_mtime_ns == status.st_mtime_ns


def map_failure(error: Exception, path: str, kind: str, refusal: type[PyGPTError]) -> Exception:
    """Return the exception for a file that cannot be mapped or read."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return MemoryError(f"{path}: no room in memory for the {kind}: raise the limit (ulimit -v), or use a smaller one")
    return refusal(f"{path}: cannot map the {kind}: {reason(error)}")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator["IO[bytes]"]:
    """Open a temporary file in the folder of `path`, and rename it to `path` if the block ends without an exception."""
    path = os.path.realpath(path)  # replace the file that a symbolic link names, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "not a regular file: it is not replaced", path)  # never replace /dev/null
    temporary = f"{path}.{os.urandom(4).hex()}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if not (isinstance(error, FileExistsError) and (error.filename, error.filename2) == (temporary, None)):  # not ours
            with suppress(OSError):
                os.unlink(temporary)
        raise


def reason(error: Exception) -> str:
    """Return the operating system's words for an error, without its number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
