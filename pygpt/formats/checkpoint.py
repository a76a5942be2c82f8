"""llm.c checkpoints (`.bin`, versions 1, 3 and 5): check, map and write them.

A file has an int32[256] little-endian header: magic, version, maxT, V, L, NH, C, Vp, zeros. The sixteen tensors of
config.TENSORS follow, each for all layers. Version 1 has float32 and V rows of wte, version 3 float32 and Vp rows, version 5
bfloat16 and Vp rows. Every number of the header and the file's size are checked, so every later offset is inside the map.
Source: llm.c, train_gpt2.py (write_model) and train_gpt2.c (gpt2_build_from_checkpoint)."""

import os
import struct
from collections.abc import Iterator, Mapping

from ..config import Config
from ..errors import TYPE_CHECKING, CheckpointError, InputError, shown, whole
from .dtypes import BFLOAT16, FLOAT32, Format, ModelFile, layout
from .files import HEADER_BYTES, MODEL_KIND, MappedFile, Path, atomic_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

MAGIC = 20240326
FORMATS = {1: FLOAT32, 3: FLOAT32, 5: BFLOAT16}  # by version


def file_bytes(config: Config, version: int) -> int:
    """Return the exact size in bytes of a checkpoint of this shape and version."""
    return HEADER_BYTES + FORMATS[version].size(config.parameters(padded=version != 1))


def check_plain(config: Config, path: Path) -> None:
    """Raise InputError for a model that a .bin file cannot describe: its header has only dimensions."""
    for name, value in config.variations.items():
        way = "`pygpt quantize` and `pygpt train` write .safetensors files, `pygpt convert` folders (a name that ends in /)"
        raise InputError(f"{os.fspath(path)}: a .bin file cannot describe a model with {name} = {shown(value)}: {way}")


def stored_tensors(config: Config, values: memoryview, kind: Format, *, padded: bool) -> "dict[str, tuple[str, memoryview]]":
    """Map each tensor's name to (format's name, bytes), wte without padding, in the layout of Weights."""
    found = {}
    for name, _, offset, size in config.tensors(padded=padded):
        count = config.V * config.C if name == "wte" else size
        found[name] = kind.name, values[kind.size(offset) : kind.size(offset + count)]
    return found


class Checkpoint(ModelFile):
    """An open checkpoint, whose values are viewed through read-only maps. Use it in a `with` block, or close() it.

    `config` and `version` are from the checked header. Raises CheckpointError, with the found and the expected numbers, for any
    file that is not exactly a checkpoint.

    If the file is deleted, or replaced by a rename, an open checkpoint does not change. If another process truncates the file
    in place, its mapped pages disappear and the process ends (SIGBUS). If another process overwrites it, the weights change.
    With mmap=False the file is copied into memory at once, and later changes have no effect."""

    _file: MappedFile

    def __init__(self, path: Path, *, mmap: bool = True) -> None:
        self.path = os.fspath(path)
        self._file = MappedFile(self.path, MODEL_KIND, CheckpointError, self._check, read=not mmap)
        self.formats = dict.fromkeys((name for name, _ in self.config.table), FORMATS[self.version])

    def _check(self, header: bytes, found: int) -> None:
        if len(header) < HEADER_BYTES:
            raise CheckpointError(f"{self.path}: {found} bytes, shorter than a checkpoint's header of {HEADER_BYTES} bytes")
        magic, version, maxT, V, L, NH, C, Vp, *reserved = struct.unpack("<256i", header)
        if magic != MAGIC:
            raise CheckpointError(f"{self.path}: magic number {magic}, expected {MAGIC}: not an llm.c checkpoint")
        if version not in FORMATS:
            raise CheckpointError(f"{self.path}: checkpoint version {version}, expected 1, 3 (float32) or 5 (bfloat16)")
        try:
            config = Config(maxT=maxT, V=V, L=L, NH=NH, C=C)
        except InputError as error:
            raise CheckpointError(f"{self.path}: bad header: {error}") from None
        if version != 1 and Vp != config.Vp:
            raise CheckpointError(f"{self.path}: bad header: Vp is {Vp}, expected {config.Vp} for V = {V}")
        for index, value in enumerate(reserved, start=8):
            if value:
                raise CheckpointError(f"{self.path}: bad header: reserved field {index} is {value}, expected 0")
        expected = file_bytes(config, version)
        if found != expected:
            kind = "truncated" if found < expected else "too long"
            rule = f"expected {expected} for version {version} with {config}; fetch it again"
            raise CheckpointError(f"{self.path}: {kind}: {found} bytes, {rule}")
        self.config, self.version = config, version

    @property
    def values(self) -> memoryview:
        """The mapped bytes after the header."""
        return self._file.view(HEADER_BYTES, self.size)

    def tensor(self, name: str) -> "Array":
        """Return one tensor as float32, wte without padding: a read-only view of the file, or a copy of bfloat16 values."""
        shape = next((shape for found, shape, _, _ in self.config.tensors(padded=False) if found == name), None)
        return self.format.values(self._stored(name)[1]).reshape(shape)

    def _stored(self, name: str) -> tuple[str, memoryview]:
        layers, N, K = layout(self.config, name)
        return self.format.name, self._bytes(name, 0, self.format.size(layers * N * K))

    def _bytes(self, name: str, first: int, last: int) -> memoryview:
        begin = next(at for found, _, at, _ in self.config.tensors(padded=self.version != 1) if found == name)
        start = HEADER_BYTES + self.format.size(begin)
        return self._file.view(start + first, start + last)


def write_checkpoint(
    path: Path, config: Config, tensors: "Mapping[str, npt.ArrayLike | Iterator[npt.ArrayLike]]", *, version: int = 3
) -> None:
    """Write a checkpoint of version 1, 3 or 5 to a temporary file in the same folder, then rename it.

    tensors: maps the sixteen names to arrays of config.tensors()' shapes, wte with V rows. An iterator over pieces of rows, as
    of ModelFile.pieces(), can replace an array: each piece is requested, written and dropped. Values are rounded to float32,
    then to bfloat16 (nearest even). Raises InputError for a wrong name or shape, and OSError if the file cannot be written. In
    both cases an older file stays intact."""
    if (number := whole(version)) not in FORMATS:
        raise InputError(f"version is {shown(version)}: it must be 1, 3 or 5")
    version = number
    check_plain(config, path)
    wanted = [(name, shape) for name, shape, _, _ in config.tensors(padded=False)]
    if set(tensors) != {name for name, _ in wanted}:
        odd = sorted(map(str, set(tensors) ^ {name for name, _ in wanted}))
        raise InputError(f"tensors: expected the sixteen names of a checkpoint, but {shown(odd)} are missing or unknown")
    header = [MAGIC, version, config.maxT, config.V, config.L, config.NH, config.C, config.Vp if version != 1 else 0]
    with atomic_file(path) as file:
        file.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
        for name, shape in wanted:
            for rows in _checked(name, shape, tensors[name]):
                FORMATS[version].write(file, rows)
            if name == "wte" and version != 1:
                file.write(bytes(FORMATS[version].size((config.Vp - config.V) * config.C)))


def _checked(name: str, shape: tuple[int, ...], tensor: "npt.ArrayLike | Iterator[npt.ArrayLike]") -> "Iterator[Array]":
    import numpy as np

    found = 0
    for piece in tensor if isinstance(tensor, Iterator) else [tensor]:
        array = np.ascontiguousarray(piece, dtype="<f4")
        found += len(array)
        if array.shape[1:] != shape[1:] or found > shape[0]:
            raise InputError(f"{name} has shape {(found, *array.shape[1:])}, expected {shape}")
        yield array
    if found < shape[0]:
        raise InputError(f"{name} has shape {(found, *shape[1:])}, expected {shape}")
