"""Files of lines, compressed by their name: .gz with gzip, .zst with zstd (Python 3.14, or the extra `zstd`).

Compressed bytes depend on the lines alone: no time and no name is stored. Refuses lines longer than LONGEST.
"""

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from ..errors import DataError, PyGPTError
from .files import atomic_file, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

LONGEST = 1 << 24  # bytes of a line


def read_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a regular file, decompressed. Raises DataError if it is missing, damaged, or has a long line."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: {'not a regular' if os.path.exists(path) else 'no such'} file: name a file of JSON lines")
    try:
        with open(path, "rb") as raw, _reader(raw, path) as file:
            while line := file.readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise DataError(f"{path}: a line is longer than {LONGEST} bytes: write one object on a line")
                yield line
    except (OSError, EOFError, zlib.error) as error:  # gzip and zstd raise these for damaged data
        raise DataError(f"{path}: cannot read the lines: {reason(error)}") from error


def compress(source: str, path: str) -> None:
    """Write the bytes of the file `source` as `path`, compressed by its name. The file gets its name when it is complete."""
    with atomic_file(path) as target, open(source, "rb") as file, _writer(target, path) as packed:
        shutil.copyfileobj(file, packed, 1 << 20)


def is_compressed(path: str) -> bool:
    """Return whether the name is of a compressed file. Raises PyGPTError for .zst if this Python has no zstd."""
    if path.endswith(".zst"):
        _zstd()
    return path.endswith((".gz", ".zst"))


@contextmanager
def _reader(file: "IO[bytes]", path: str) -> "Iterator[Any]":
    if path.endswith(".zst"):
        zstd = _zstd()
        try:
            with zstd.open(file, "rb") as lines:
                yield lines
        except zstd.ZstdError as error:
            raise DataError(f"{path}: damaged: {error}") from None
    elif path.endswith(".gz"):
        with gzip.open(file, "rb") as lines:
            yield lines
    else:
        yield file


@contextmanager
def _writer(file: "IO[bytes]", path: str) -> "Iterator[Any]":
    with _zstd().open(file, "wb") if path.endswith(".zst") else gzip.GzipFile("", "wb", 6, file, 0) as packed:
        yield packed


def _zstd() -> "Any":
    """Return the module of zstd. Raises PyGPTError if there is none."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            pass
    raise PyGPTError("files of zstd (.zst) need Python 3.14 or the extra: pip install 'pygpt[zstd]'")
