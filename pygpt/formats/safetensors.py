"""safetensors files: read them strictly and in place, write them as a stream.

A file has the length of a header (uint64, little-endian), the header, and the tensors' bytes without gaps up to the file's end.
The header is a JSON object: name -> dtype, shape, data_offsets. The reader checks that every name is unique, that every range
has the size of its shape, and that the ranges fill the file. So every view is inside the map.

We do not use the `safetensors` package: its NumPy interface does not support bfloat16, and it needs all tensors in memory to
write them. If two tensors have one name, it silently uses the last. Source: the description of the format in its repository."""

import json
import os
from collections.abc import Iterable, Sequence
from math import prod

from ..errors import TYPE_CHECKING, CheckpointError, InputError, is_whole
from .dtypes import BFLOAT16, FLOAT16, FLOAT32
from .files import MODEL_KIND, MappedFile

if TYPE_CHECKING:
    from typing import IO, Any

    import numpy as np
    import numpy.typing as npt

LENGTH_BYTES = 8
HEADER_LIMIT = 1 << 22  # bytes, ten times the largest GPT-2's; with the format's limit of 10^8, parsing can take gigabytes
MEMBERS = {"dtype", "shape", "data_offsets"}
DTYPES = {1: "BOOL U8 I8 F8_E5M2 F8_E4M3", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64"}
DTYPE_BYTES = {dtype: width for width, dtypes in DTYPES.items() for dtype in dtypes.split()}
FORMATS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}  # the dtypes that can be read

Stored = tuple[str, tuple[int, ...], int]  # dtype, shape, offset in the file


class SafetensorsFile(MappedFile):
    """An open file that maps only the tensors in use. Use it in a `with` block, or close() it.

    `tensors` maps each name to (dtype, shape, offset), in ascending order of offsets. `metadata` is the header's __metadata__.
    read: copy the file into memory. Raises CheckpointError for any file that is not exactly in the format."""

    def __init__(self, path: str | os.PathLike[str], *, read: bool = False) -> None:
        super().__init__(os.fspath(path), MODEL_KIND, CheckpointError, self._check, read=read)

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid safetensors file: {what}")

    def _check(self, _header: bytes, _size: int) -> None:
        if self.size < LENGTH_BYTES:
            raise self._bad(f"{self.size} bytes, shorter than the length of a header")
        length = int.from_bytes(self.view(0, LENGTH_BYTES), "little")
        if length > HEADER_LIMIT:
            raise self._bad(f"its header has {length} bytes, at most {HEADER_LIMIT} are allowed")
        start = LENGTH_BYTES + length
        if start > self.size:
            raise self._bad(f"truncated: {self.size} bytes, but its header alone has {length}")
        text = bytes(self.view(LENGTH_BYTES, start))
        if not text.startswith(b"{"):
            raise self._bad("its header does not begin with {")
        header = parse_object(text, f"{self.path}: not a valid safetensors file: its header")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(value, str) for value in self.metadata.values()):
            raise self._bad("__metadata__ is not an object of strings")
        ranges = sorted(self._range(name, entry) for name, entry in header.items())
        end = 0
        for begin, stop, name in ranges:
            if begin != end:
                flaw = "a hole" if begin > end else "an overlap"
                raise self._bad(f"tensor {name[:80]!r} begins at {begin}, expected {end}: there is {flaw}")
            end = stop
        if start + end != self.size:
            kind = "truncated" if self.size < start + end else "too long"
            raise self._bad(f"{kind}: {self.size} bytes, expected {start + end}; fetch it again")
        self.tensors: dict[str, Stored] = {
            name: (header[name]["dtype"], tuple(header[name]["shape"]), start + begin) for begin, _, name in ranges
        }

    def _range(self, name: str, entry: "Any") -> tuple[int, int, str]:
        if not isinstance(entry, dict) or set(entry) != MEMBERS:
            raise self._bad(f"tensor {name[:80]!r} must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise self._bad(f"tensor {name[:80]!r} has the unknown dtype {str(dtype)[:40]!r}")
        if not isinstance(shape, list) or len(shape) > 8 or not all(is_whole(extent, 0, 1 << 48) for extent in shape):
            raise self._bad(f"tensor {name[:80]!r} has a shape that is not a short list of whole numbers")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_whole(at, 0, 1 << 62) for at in offsets):
            raise self._bad(f"tensor {name[:80]!r} has data_offsets that are not two whole numbers")
        size = DTYPE_BYTES[dtype] * prod(shape)
        if offsets[1] - offsets[0] != size:
            raise self._bad(f"tensor {name[:80]!r} takes {offsets[1] - offsets[0]} bytes, expected {size} for {dtype} {shape}")
        return offsets[0], offsets[1], name

    def bytes_of(self, name: str) -> memoryview:
        """Return a tensor's bytes, as a view of the file."""
        dtype, shape, offset = self.tensors[name]
        return self.view(offset, offset + prod(shape) * DTYPE_BYTES[dtype])

    def stored(self, name: str, rows: slice = slice(None)) -> "npt.NDArray[Any]":
        """Return a tensor, or some of its rows, as a read-only view of the file: float32, float16, or the bits of bfloat16.

        Raises CheckpointError for a tensor of another dtype."""
        import numpy as np

        dtype, shape, _ = self.tensors[name]
        if dtype not in FORMATS:
            raise CheckpointError(f"{self.path}: tensor {name[:80]!r} is of dtype {dtype}, expected F32, F16 or BF16")
        array: npt.NDArray[Any] = np.frombuffer(self.bytes_of(name), FORMATS[dtype].dtype).reshape(shape)
        return array[rows] if shape else array

    def tensor(self, name: str, rows: slice = slice(None)) -> "npt.NDArray[np.float32]":
        """Return one tensor, or some of its rows, as exact float32. Raises the errors of stored()."""
        return FORMATS[self.tensors[name][0]].to_float32(self.stored(name, rows))


def write_safetensors(
    file: "IO[bytes]",
    dtype: str,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    values: "Iterable[npt.NDArray[np.float32]]",
    metadata: "dict[str, str] | None" = None,
) -> None:
    """Write tensors (name, shape) of one dtype, F32 or BF16 (nearest even), to an open file.

    values: their float32 values in the same order, in pieces of any shape. Each piece is dropped after it is written. Raises
    InputError if the number of values does not match the shapes."""
    import numpy as np

    stored = [(name, dtype, shape, prod(shape) * DTYPE_BYTES[dtype]) for name, shape in tensors]
    file.write(header_of({"format": "pt"} | (metadata or {}), stored, LENGTH_BYTES))  # transformers requires the format
    expected = sum(prod(shape) for _, shape in tensors)
    found = 0
    for piece in values:
        FORMATS[dtype].write(file, np.ascontiguousarray(piece, "<f4"))
        found += piece.size
    if found != expected:
        raise InputError(f"{found} values were given, but the shapes have {expected}")


def header_of(metadata: dict[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], int]], alignment: int) -> bytes:
    """Return the beginning of a file, up to the values, of tensors (name, dtype, shape, bytes) in the order of the values."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape, size in tensors:
        begin, end = end, end + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_object(text: bytes, what: str, refusal: type[Exception] = CheckpointError, **options: "Any") -> "dict[str, Any]":
    """Parse an untrusted JSON object with unique names. Raises `refusal`, which begins with `what`, for other text."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=unique, **options)
    except (ValueError, RecursionError) as error:
        raise refusal(f"{what} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise refusal(f"{what} is not a JSON object")
    return found


def unique(pairs: "list[tuple[str, Any]] | str") -> "dict[str, Any]":
    """Return a JSON object's members. Raises ValueError for a repeated name, and for NaN and Infinity."""
    if isinstance(pairs, str):
        raise ValueError(f"{pairs} is not a number in JSON")
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is given twice")
        found[name] = value
    return found
