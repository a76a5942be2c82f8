"""llm.c's data files: their common header, and token shards.

A shard has an int32[256] little-endian header (magic, version, count, zeros), then `count` uint16 ids. Tokens stay in the
mapped file until they are used. Source: llm.c, dev/data/data_common.py (write_datafile).
"""

import os
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..errors import DataError, InputError
from .files import HEADER_BYTES, atomic_file, map_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Tokens = npt.NDArray[np.integer[Any]]  # (tokens,)
    Shard = npt.NDArray[np.uint16]  # (tokens,)
    Path = str | os.PathLike[str]

MAGIC = 20240520
TOKEN = np.dtype("<u2")
MOST_TOKENS = 2**31 - 1  # the header's count is an int32
PIECE = 1 << 20  # tokens checked or written at a time


def map_data(path: str, kind: str, magic: int, versions: Sequence[int], named: int) -> tuple[list[int], memoryview]:
    """Map one of llm.c's data files; return ([version, next `named` fields], the map with the header).

    Raises DataError for another magic or version, a file shorter than a header, and a header whose other fields are not 0."""
    fields: list[int] = []

    def check(header: bytes, found: int) -> None:
        if len(header) < HEADER_BYTES:
            raise DataError(f"{path}: {found} bytes, shorter than the header of a {kind}, {HEADER_BYTES} bytes")
        first, *others = struct.unpack("<256i", header)
        if first != magic:
            raise DataError(f"{path}: magic number {first}, expected {magic}: not a {kind} of llm.c")
        if others[0] not in versions:
            raise DataError(f"{path}: version {others[0]}, expected {' or '.join(map(str, versions))} for a {kind}")
        for index, value in enumerate(others[1 + named :], start=2 + named):
            if value:
                raise DataError(f"{path}: bad header: reserved field {index} is {value}, expected 0")
        fields.extend(others[: 1 + named])

    mapped = map_file(path, kind, DataError, check)
    return fields, mapped


def check_size(path: str, found: int, expected: int, what: str) -> None:
    """Raise DataError unless the file has exactly the size that its header promises."""
    if found != expected:
        raise DataError(
            f"{path}: {'truncated' if found < expected else 'too long'}: {found} bytes, expected {expected} for {what}"
        )


def header_bytes(magic: int, version: int, *fields: int) -> bytes:
    """Return the header of a data file."""
    return struct.pack("<256i", magic, version, *fields, *[0] * (254 - len(fields)))


def check_ids(tokens: "Tokens", V: int, where: str) -> None:
    """Raise DataError, with the position of the first wrong id, unless all ids are in [0, V)."""
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        if piece.max() >= V or piece.min() < 0:
            position = start + int(np.flatnonzero((piece < 0) | (piece >= V))[0])
            raise DataError(
                f"{where}: token id {tokens[position]} at position {position}: it must be below the vocabulary of {V} ids"
            )


# ------------------------------------------------------------------------------------------------ shards


def read_tokens(path: "Path", *, V: int | None = None) -> "Shard":
    """Open a token shard as a read-only uint16 array (tokens,), a view of the mapped file.

    V: the vocabulary size, to check every id. Raises DataError, with the found and the expected numbers, for any file that is
    not exactly a shard."""
    name = os.fspath(path)
    (_, count), mapped = map_data(name, "token file", MAGIC, (1,), 1)
    if count < 1:
        raise DataError(f"{name}: bad header: {count} tokens, expected 1 or more")
    check_size(name, len(mapped), HEADER_BYTES + 2 * count, f"{count} tokens")
    tokens = np.frombuffer(mapped, TOKEN, offset=HEADER_BYTES)
    if V is not None:
        check_ids(tokens, V, name)
    return tokens


def write_tokens(path: "Path", tokens: "npt.ArrayLike | Iterator[npt.ArrayLike]") -> int:
    """Write a token shard atomically; return how many tokens it has.

    tokens: one array of ids, or an iterator of arrays, each dropped after it is written. Raises InputError for zero tokens or
    more than 2**31 - 1, and for ids that are not whole numbers from 0 to 65535. Raises OSError if the file cannot be written.
    """
    count = 0
    with atomic_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for piece in tokens if isinstance(tokens, Iterator) else [tokens]:
            ids = as_tokens(piece)
            count += len(ids)
            if count > MOST_TOKENS:
                raise InputError(f"{os.fspath(path)}: more than {MOST_TOKENS} tokens: write several shards")
            check_ids(ids, 1 << 16, os.fspath(path))
            for start in range(0, len(ids), PIECE):  # ids may view a file larger than memory
                file.write(ids[start : start + PIECE].astype(TOKEN).data)
        if not count:
            raise InputError(f"{os.fspath(path)}: there are no tokens to write: a shard holds 1 or more")
        file.seek(0)
        file.write(header_bytes(MAGIC, 1, count))
    return count


def as_tokens(tokens: npt.ArrayLike) -> "Tokens":
    """Return tokens as a one-dimensional array of integers. Raises InputError for anything else."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError(f"tokens must be an array (tokens,) of integers: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"tokens have shape {array.shape} and type {array.dtype}: they must be an array (tokens,) of integers")
    return array if array.size else array.astype(TOKEN)
