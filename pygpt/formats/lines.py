"""Files of lines, compressed by their name: .gz with gzip, .zst with zstd (Python 3.14, or the extra `zstd`).

Compressed bytes depend on the lines alone: time and name are left out. Refuses lines longer than LONGEST.
"""

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
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
    damage = (OSError, EOFError, zlib.error, *([_zstd().ZstdError] if path.endswith(".zst") else []))
    try:
        with open(path, "rb") as raw, _opened(raw, path, "rb") as file:
            while line := file.readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise DataError(f"{path}: a line is longer than {LONGEST} bytes: write one object on a line")
                yield line
    except damage as error:
        raise DataError(f"{path}: cannot read the lines: {reason(error)}") from error


def compress(source: str, path: str) -> None:
    """Write the bytes of the file `source` as `path`, compressed by its name. The file gets its name when it is complete."""
    with atomic_file(path) as target, open(source, "rb") as file, _opened(target, path, "wb") as packed:
        shutil.copyfileobj(file, packed, 1 << 20)


def is_compressed(path: str) -> bool:
    """Return whether the name is of a compressed file. Raises PyGPTError for .zst if this Python has no zstd."""
    return path.endswith(".gz") or (path.endswith(".zst") and bool(_zstd()))


def _opened(file: "IO[bytes]", path: str, mode: str) -> "Any":
    if path.endswith(".zst"):
        return _zstd().open(file, mode)
    return gzip.GzipFile("", mode, 6, file, 0) if path.endswith(".gz") else file


def _zstd() -> "Any":
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            pass
    raise PyGPTError("files of zstd (.zst) need Python 3.14 or the extra: pip install 'pygpt[zstd]'")
