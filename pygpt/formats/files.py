"""Files for every format: map them read-only after a check, view parts of them, and write them atomically.

Refuses anything that is not a regular file. A new file gets its name only when it is complete."""

import codecs
import errno
import fcntl
import mmap
import os
import stat
from _thread import allocate_lock
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from weakref import finalize

from ..errors import TYPE_CHECKING, ClosedError, Closing, InputError, PyGPTError

if TYPE_CHECKING:
    from typing import IO

MODEL_KIND = "model file"  # the name of such files in messages
HEADER_BYTES = 1024  # of llm.c's files: int32[256]
GGUF_MAGIC = b"GGUF"
ZIP = b"PK\x03\x04"  # the first bytes of PyTorch's files, and of those before version 1.6:
PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
Check = Callable[[bytes, int], None]
Path = str | os.PathLike[str]


class MappedFile(Closing):
    """An open regular file that is viewed through read-only maps. A map lives as long as its views.

    kind: the kind of file, for messages. check: called with the first 1,024 bytes and the size; it may raise. read: copy the
    file into memory at once, so that later changes have no effect. `size`: in bytes. Raises `refusal` if the file is not
    regular, cannot be opened or mapped, is of a foreign kind, or changes while it is read; view() does, too, if the file has
    become shorter. Raises MemoryError if the address space has no room."""

    def __init__(
        self, path: str, kind: str, refusal: type[PyGPTError], check: Check | None = None, *, read: bool = False
    ) -> None:
        self.path, self._kind, self._refusal = path, kind, refusal
        self._copy: memoryview | None = None
        self._open = allocate_lock()  # view() must not map another file that got the number of this closed one
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block
        except (OSError, ValueError) as error:
            raise refusal(f"{path!r}: cannot open the {kind}: {reason(error)}") from error
        self._release = finalize(self, os.close, self._fd)  # if close() is never called
        self._release.atexit = False  # until the process ends, view() may need the file
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise refusal(f"{path}: not a regular file; a {kind} is expected")
            self.size, header = status.st_size, os.pread(self._fd, HEADER_BYTES, 0)
            if foreign := foreign_file(header):
                raise refusal(f"{path}: not a {kind}, but {foreign}")
            if check is not None:
                check(header, self.size)
            if read:
                self._copy = self._read(header, status)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise self._failure(error) from error
            raise

    def view(self, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of the file. Raises ClosedError after close()."""
        with self._open:
            if self._fd < 0:
                raise ClosedError(f"{self.path}: the {self._kind} is closed; read its tensors before close()")
            if self._copy is not None:
                return self._copy[start:stop]
            if start == stop:
                return memoryview(b"")
            first = start - start % mmap.ALLOCATIONGRANULARITY
            try:
                mapped = mmap.mmap(self._fd, stop - first, access=mmap.ACCESS_READ, offset=first)
            except (OSError, ValueError) as error:  # ValueError: the file has become shorter
                raise self._failure(error) from error
            return memoryview(mapped)[start - first :]

    def _read(self, header: bytes, before: os.stat_result) -> memoryview:
        """Return a copy of the file, or raise if the file changed meanwhile."""
        memory = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE)
        done, count = 0, 1
        with memoryview(memory) as view, os.fdopen(self._fd, "rb", buffering=0, closefd=False) as file:
            while count:
                with view[done:] as rest:
                    count = file.readinto(rest) or 0
                done += count
        after = os.fstat(self._fd)
        same = (done, after.st_size, after.st_mtime_ns) == (self.size, self.size, before.st_mtime_ns)
        if not same or memory[: len(header)] != header:
            raise self._refusal(f"{self.path}: the {self._kind} changed while pygpt read it: try again when it is complete")
        return memoryview(memory).toreadonly()

    def _failure(self, error: Exception) -> Exception:
        """Return the exception for a file that cannot be mapped or read."""
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            way = "raise the limit (ulimit -v), or use a smaller one"
            return MemoryError(f"{self.path}: no room in memory for the {self._kind}: {way}")
        return self._refusal(f"{self.path}: cannot map the {self._kind}: {reason(error)}")

    def close(self) -> None:
        """Close the file; its views stay valid. May be called twice."""
        with self._open:
            if self._fd >= 0:
                self._release()
                self._fd, self._copy = -1, None


def map_file(path: str, kind: str, refusal: type[PyGPTError], check: Check) -> memoryview:
    """Return all bytes of a checked file. Arguments and errors are those of MappedFile."""
    with MappedFile(path, kind, refusal, check) as file:
        return file.view(0, file.size)


def small_file(path: str, kind: str, refusal: type[PyGPTError], limit: int) -> bytes:
    """Return the content of a text file of at most `limit` bytes, without a byte order mark. Raises `refusal`."""

    def check(_header: bytes, size: int) -> None:
        if size > limit:
            raise refusal(f"{path}: longer than {limit} bytes: too long for a {kind}")

    return bytes(map_file(path, kind, refusal, check)).removeprefix(codecs.BOM_UTF8)


def begins_with(path: str, start: bytes) -> bool:
    """Return whether this is a file with these first bytes."""
    if not os.path.isfile(path):  # opening a FIFO would block
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(start)) == start
    except OSError:  # the reader of the file says why
        return False


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
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, which only names the file: run `git lfs pull` in its repository, or download the file itself"
    if start.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd")):
        return "a compressed archive: unpack it, and give the file in it"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML page: download the file itself (on Hugging Face, its address has /resolve/ in it)"
    return ""


def check_writable(path: str, *, make_folder: bool = False) -> None:
    """Raise InputError, before any work, if a file of this name cannot be written."""
    import tempfile  # takes long to import

    if os.path.lexists(path) and not os.path.isfile(path):
        raise InputError(f"{path}: not a regular file, so it is not replaced: give another name")
    folder = os.path.dirname(os.path.realpath(path))
    try:
        if make_folder:
            os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        with suppress(FileNotFoundError):  # any other error means that the name is too long with atomic_file()'s suffix
            os.lstat(f"{os.path.realpath(path)}.{'0' * 8}.tmp")
    except OSError as error:
        raise InputError(f"{path}: cannot write into the folder {folder}: {error.strerror}") from None


@contextmanager
def only_writer(path: str) -> Iterator[None]:
    """Keep other processes that call this from writing `path` meanwhile. Raises PyGPTError if one does. A file system without
    locks cannot tell."""
    name = f"{os.path.realpath(path)}.lock"
    with open(name, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = is_still(name, file)
        except OSError as error:
            alone = error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)
        if not alone:
            raise PyGPTError(f"{path}: another process is writing it: wait for its end, or choose another name")
        try:
            yield
        finally:
            if is_still(name, file):
                os.unlink(name)


def is_still(name: str, file: "IO[bytes]") -> bool:
    """Return whether this open file still has the name: another process may have removed or replaced it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(name), os.fstat(file.fileno()))
    return False


@contextmanager
def atomic_file(path: Path) -> Iterator["IO[bytes]"]:
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
        if isinstance(error, FileNotFoundError) and (error.filename, error.filename2) == (temporary, None):
            error.filename = os.path.dirname(path)
        if not (isinstance(error, FileExistsError) and (error.filename, error.filename2) == (temporary, None)):  # not ours
            with suppress(OSError):
                os.unlink(temporary)
        raise


def reason(error: Exception) -> str:
    """Return the operating system's words for an error, without its number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
