"""Quantised matrices in panels of 16 outputs, as the kernels read them, and the `.safetensors` files with panels.

Zeros pad the N outputs of a layer's matrix to a multiple of 16, and its K inputs to a multiple of 32. The matrix is stored as
    q8_0    int8 [N/16][K/4][16][4], then the scales, float16 [N/16][K/32][16]
    q4_0    uint8 [N/16][K/8][16][4], low nibbles inputs 8i..8i+3, high nibbles 8i+4..8i+7, then the same scales
then zeros up to a multiple of 64 bytes. Layers follow one another. Other formats are row-major, as in llm.c's files.

docs/reference/file-formats.md describes panel files. Their header is padded so that the values begin at a multiple of 64,
because they are mapped and used in place. Source: the layout of the kernels' products (micro.h)."""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod

from ..config import LIMITS, Config
from ..cpus import resolve_threads
from ..errors import TYPE_CHECKING, CheckpointError, InputError, shown
from ..pool import ThreadPool
from .dtypes import EMBEDDINGS, FLOAT32, FORMATS, Q4_0, Q8_0, Format, ModelFile, layout
from .files import Path, atomic_file
from .safetensors import FORMATS as STORED
from .safetensors import SafetensorsFile, header_of, parse_object

if TYPE_CHECKING:
    from typing import IO, Any, SupportsIndex

    import numpy as np
    import numpy.typing as npt

    from .dtypes import Blocks

PANEL, GROUP, ALIGNMENT = 16, 32, 64  # outputs; inputs that share a scale; bytes
QUANTISED = {"q8_0": Q8_0, "q4_0": Q4_0}  # the formats that are stored in panels
LARGEST = {"q8_0": 127 * 65504, "q4_0": 8 * 65504}  # the largest value that a float16 scale can represent
LAYERED = ("qkvw", "attprojw", "fcw", "fcprojw")  # the matrices of a layer, which have the format `kind`
MATRICES = (*EMBEDDINGS, *LAYERED)
FILE_FORMAT, FILE_VERSION, VARIED_VERSION = "pygpt panels", "1", "2"
DTYPE = {row.name: dtype for dtype, row in STORED.items()} | dict.fromkeys(QUANTISED, "U8")


def aligned(size: int, alignment: int | None = None) -> int:
    """Round a size up to a multiple of `alignment` bytes, by default 64."""
    step = ALIGNMENT if alignment is None else alignment
    return -(-size // step) * step


def panel_sizes(kind: Format, N: int, K: int) -> tuple[int, int]:
    """Return the bytes of values, and of scales with padding, of one layer's matrix in panels."""
    panels, groups = -(-N // PANEL), kind.blocks(K)
    return panels * groups * PANEL * (kind.block_bytes - 2), aligned(panels * groups * PANEL * 2)


def from_panels(kind: Format, values: memoryview, scales: memoryview, N: int, K: int) -> "Blocks":
    """Convert whole panels to blocks (N, K/32), the inverse of blocks_to_panels(). `scales` may end in padding."""
    import numpy as np

    panels, groups = -(-N // PANEL), kind.blocks(K)
    blocks = np.empty((panels * PANEL, groups), kind.dtype)
    d = np.frombuffer(scales, "<f2", panels * groups * PANEL).reshape(panels, groups, PANEL)
    blocks["d"] = d.swapaxes(1, 2).reshape(-1, groups)
    if kind == Q8_0:
        words = np.frombuffer(values, "i1").reshape(panels, groups * 8, PANEL, 4)
        blocks["q"] = words.swapaxes(1, 2).reshape(-1, groups, GROUP)
    else:
        words = np.frombuffer(values, "u1").reshape(panels, groups * 4, PANEL, 4).swapaxes(1, 2)
        levels = np.stack([words & 15, words >> 4], axis=3).reshape(-1, groups, GROUP)
        blocks["q"] = levels[:, :, :16] | levels[:, :, 16:] << 4
    return blocks[:N]


def quantise(kind: Format, rows: "npt.NDArray[np.float32]") -> "Blocks | None":
    """Quantise contiguous rows (N, K), K % 32 = 0, to blocks (N, K/32). None if a value is not finite or is too large."""
    from .._kernels import quantise_panels

    N, K = rows.shape
    values, scales = panel_sizes(kind, N, K)
    out = aligned_bytes(values + scales)
    held = quantise_panels(out.data, kind.name, rows.reshape(-1).view("u1").data, FLOAT32.name, 1, N, K, 0, 1)
    return from_panels(kind, out[:values].data, out[values:].data, N, K) if held else None


def stored_size(config: Config, name: str, kind: Format) -> int:
    """Return the bytes of all layers of one of the tensors, in the layout of Weights."""
    layers, N, K = layout(config, name)
    return layers * (sum(panel_sizes(kind, N, K)) if kind.name in QUANTISED else kind.size(N * K))


def first_rows(kind: str, data: memoryview, N: int, rows: int, K: int) -> memoryview:
    """The first rows of a matrix (N, K) in the form that Weights takes."""
    import numpy as np

    if kind not in QUANTISED:
        return data[: FORMATS[kind].size(rows * K)]
    begin, _ = panel_sizes(QUANTISED[kind], N, K)
    values, scales = panel_sizes(QUANTISED[kind], rows, K)
    out = aligned_bytes(values + scales)
    out[:values], out[values:] = np.frombuffer(data[:values], "u1"), np.frombuffer(data[begin : begin + scales], "u1")
    return out.data


def aligned_bytes(size: int) -> "npt.NDArray[np.uint8]":
    """Return `size` zero bytes that begin at a multiple of 64."""
    import numpy as np

    room = np.zeros(size + ALIGNMENT, "u1")
    skip = -room.ctypes.data % ALIGNMENT
    return room[skip : skip + size]


class InPanels(ModelFile):
    """Weights whose tensors are stored in the layout of Weights."""

    def part(self, name: str, layer: int, start: int, stop: int) -> "tuple[Format, Blocks]":
        """Return rows [start, stop): ModelFile.part(), with panels converted to blocks."""
        _, N, K = layout(self.config, name)
        kind, data = self.formats[name], self._stored(name)[1]
        if kind.name not in QUANTISED:
            return super().part(name, layer, start, stop)
        values, scales = panel_sizes(kind, N, K)
        base, row, groups = layer * (values + scales), values // (-(-N // PANEL) * PANEL), kind.blocks(K)
        ends = (start, -(-stop // PANEL) * PANEL)
        of_values, of_scales = ([base + end * row for end in ends], [base + values + end * groups * 2 for end in ends])
        return kind, from_panels(kind, data[slice(*of_values)], data[slice(*of_scales)], stop - start, K)


class StoredWeights(InPanels):
    """Weights in memory: quantised ones, those of a model in training, or an open model's. close() does not change them.

    tensors: maps each tensor to the name of its format and its bytes, in the layout of Weights."""

    path = "weights in memory"

    def __init__(self, config: Config, tensors: "dict[str, tuple[str, memoryview]]") -> None:
        self.config, self.tensors = config, tensors
        self.formats = {name: FORMATS[kind] for name, (kind, _) in tensors.items()}

    def _stored(self, name: str) -> tuple[str, memoryview]:
        return self.tensors[name]

    def row(self, name: str, row: int) -> "npt.NDArray[np.float32]":
        """Return one row of a tensor without layers, or the whole of a vector, as float32 (K,)."""
        kind, blocks = self.part(name, 0, row // PANEL * PANEL, row + 1)
        return kind.to_float32(blocks)[-1, : layout(self.config, name)[2]]

    def close(self) -> None:
        """Do nothing: the memory is freed with its last user."""


def quantised(model: "Any", format: str, head: str | None = None, threads: "SupportsIndex | None" = None) -> StoredWeights:
    """Quantise the matrices of an open model in memory, to the numbers of a converted file.

    The result stays valid after the model is closed. Positions, biases and gains keep their format, because they are small.

    format: q8_0 or q4_0, for the layers' matrices. head: the format of wte, by default q8_0. threads: workers, as in
    GPT2.load(). Raises InputError for an unknown format, and for weights that the format cannot represent."""
    for name in (format, head):
        if name is not None and name not in QUANTISED:
            raise InputError(f"weights cannot be quantised to {shown(name)}: choose one of {', '.join(QUANTISED)}")
    from .._kernels import Floats, matrix_bytes, quantise_panels

    config, stored = model.config, model.stored()
    shapes = {name: shape for name, shape, _, _ in config.tensors(padded=False)}
    formats = {name: format for name in shapes if len(shapes[name]) == 3}
    formats |= {name: head or "q8_0" for name in ("wte", "head") if name in shapes}
    sizes = {name: prod(shapes[name][:-2]) * matrix_bytes(kind, *shapes[name][-2:]) for name, kind in formats.items()}
    memory = memoryview(Floats(1, sum(sizes.values()) // 4, dense=True)).cast("B")  # every size is a multiple of 64
    tensors = {name: (kind, memoryview(bytes(data))) for name, (kind, data) in stored.items() if name not in formats}
    offset = 0
    for name, size in sizes.items():
        tensors[name] = formats[name], memory[offset : offset + size]
        offset += size

    refused = set()

    def job(ith: int, nth: int) -> None:
        for name in formats:
            (*layers, N, K), (kind, out), (source_kind, source) = shapes[name], tensors[name], stored[name]
            if not quantise_panels(out, kind, source, source_kind, prod(layers), N, K, ith, nth):
                refused.add(name)

    with ThreadPool(resolve_threads(threads)) as pool:
        pool.run(job)
    for name in formats:
        if name in refused:
            most = LARGEST[formats[name]]
            raise InputError(f"{name} cannot be {formats[name]}: it has a value that is not finite, or beyond {most}")
    return StoredWeights(config, {name: tensors[name] for name in shapes})


def entries(config: Config, formats: Mapping[str, Format]) -> dict[str, tuple[str, int, int]]:
    """Return the header that such a model must have: name -> dtype, length of the flat array, bytes."""
    found = {}
    for name, _ in config.table:
        dtype = DTYPE[formats[name].name]
        size = aligned(stored_size(config, name, formats[name]))
        found[name] = dtype, size // (1 if dtype == "U8" else formats[name].block_bytes), size
    return found


def formats_of(config: Config, kind: Format, head: Format, positions: Format) -> "dict[str, Format]":
    """Return the format of each tensor. Vectors are float32, and a head of its own has wte's format."""
    formats = dict.fromkeys(LAYERED, kind) | {"wte": head, "wpe": positions, "head": head}
    return {name: formats.get(name, FLOAT32) for name, _ in config.table}


class PanelFile(InPanels):
    """An open panel file. Its values are mapped read-only and used in place, or with mmap=False read into memory.

    Raises CheckpointError if the file is not exactly a panel file. The header is checked before values are mapped."""

    _file: SafetensorsFile

    def __init__(self, path: Path, *, mmap: bool = True) -> None:
        self.path = os.fspath(path)
        self._file = file = SafetensorsFile(self.path, read=not mmap)
        try:
            self._check(file.metadata, {name: (dtype, shape) for name, (dtype, shape, _) in file.tensors.items()})
            begin = file.tensors["wte"][2]
            if begin % ALIGNMENT or list(file.tensors) != [name for name, _ in self.config.table]:
                raise self._bad(f"its values begin at byte {begin}, expected a multiple of {ALIGNMENT} and the order of llm.c")
        except BaseException:
            self.close()
            raise
        self.sha256 = file.metadata["source_sha256"]

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid panel file: {what}")

    def _check(self, metadata: dict[str, str], found: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        if metadata.get("format") != FILE_FORMAT:
            rule = f"its format is {metadata.get('format', '')[:40]!r}, expected {FILE_FORMAT!r}"
            way = "use `pygpt convert` or `pygpt quantize` for a Hugging Face model"
            raise CheckpointError(f"{self.path}: not made by `pygpt quantize`: {rule}; {way}")
        if metadata.get("version") not in (FILE_VERSION, VARIED_VERSION):
            version = metadata.get("version", "")[:40]
            raise self._bad(f"version {version!r}, expected {FILE_VERSION!r}: quantise the model again, or update pygpt")
        for key, size in (("panel", PANEL), ("group", GROUP)):
            if metadata.get(key) != str(size):
                raise self._bad(f"{key} is {metadata.get(key, '')[:40]!r}, expected '{size}'")
        if len(metadata.get("source_sha256", "")) != 64:
            raise self._bad("source_sha256 does not have 64 characters")
        kind, head, positions = (self._format(metadata, key) for key in ("kind", "head", "positions"))
        if positions.name in QUANTISED:
            raise self._bad(f"positions is {positions.name!r}, expected float32, float16 or bfloat16")
        what, text = f"{self.path}: not a valid panel file: variations", metadata.get("variations", "").encode()
        variations = {} if metadata["version"] == FILE_VERSION else parse_object(text, what)
        try:
            self.config = Config(**{key: self._whole(metadata, key) for key in LIMITS}, **variations)
        except (InputError, TypeError) as error:
            raise self._bad(str(error)) from None
        self.formats = formats_of(self.config, kind, head, positions)
        expected = {name: (dtype, (length,)) for name, (dtype, length, _) in entries(self.config, self.formats).items()}
        if found != expected:
            name = next((name for name in expected if found.get(name) != expected[name]), None)
            if name is None:
                raise self._bad(f"tensor {min(found.keys() - expected.keys())[:40]!r} is unknown")
            raise self._bad(f"tensor {name} is {found.get(name, 'missing')}, expected {expected[name]} for {self.config}")

    def _format(self, metadata: dict[str, str], key: str) -> Format:
        name = metadata.get(key, "")
        if name not in DTYPE:
            raise self._bad(f"{key} is {name[:40]!r}, expected {', '.join(DTYPE)}")
        return FORMATS[name]

    def _whole(self, metadata: dict[str, str], key: str) -> int:
        text = metadata.get(key, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise self._bad(f"{key} is {text[:40]!r}, expected a whole number")
        return int(text)

    def _stored(self, name: str) -> tuple[str, memoryview]:
        return self.formats[name].name, self._file.bytes_of(name)[: stored_size(self.config, name, self.formats[name])]


def write_panels(
    path: Path, config: Config, formats: Mapping[str, Format], tensors: "Mapping[str, Iterator[Blocks]]", sha256: str
) -> None:
    """Write a panel file, all or nothing. `tensors` yield the blocks of each tensor in its format, rows in order.

    A piece contains whole panels, or the last rows of a layer. `formats` are the result of formats_of(). `sha256` of the source
    has 64 characters. Raises OSError if the file cannot be written; an older file then stays unchanged."""
    metadata = {
        "format": FILE_FORMAT,
        "version": VARIED_VERSION if config.variations else FILE_VERSION,
        "kind": formats["qkvw"].name,
        "head": formats["wte"].name,
        "positions": formats["wpe"].name,
        "panel": str(PANEL),
        "group": str(GROUP),
        **{key: str(getattr(config, key)) for key in LIMITS},
        **({"variations": json.dumps(config.variations)} if config.variations else {}),
        "source_sha256": sha256,
    }
    tensors_in_file = [(name, dtype, (length,), size) for name, (dtype, length, size) in entries(config, formats).items()]
    with atomic_file(path) as file:
        file.write(header_of(metadata, tensors_in_file, ALIGNMENT))
        for name, _ in config.table:
            layers, N, _ = layout(config, name)
            begin = file.tell()
            if formats[name].name in QUANTISED:
                for _ in range(layers):
                    _write_layer(file, formats[name], N, tensors[name])
            else:
                for piece in tensors[name]:
                    file.write(piece.data)
            file.write(bytes(aligned(file.tell() - begin) - (file.tell() - begin)))


def _write_layer(file: "IO[bytes]", kind: Format, N: int, pieces: "Iterator[Blocks]") -> None:
    """Write one layer's matrix of N rows in panels: all values, then all scales."""
    from .._kernels import blocks_to_panels

    scales = b""
    while N:
        rows = next(pieces)
        N -= len(rows)
        K = rows.shape[1] * kind.block_values
        values, padded = panel_sizes(kind, len(rows), K)
        out = aligned_bytes(values + padded)
        blocks_to_panels(out.data, kind.name, rows.reshape(-1).view("u1").data, 1, len(rows), K, 0, 1)
        file.write(out[:values].data)
        scales += out[values : values + -(-len(rows) // PANEL) * PANEL * rows.shape[1] * 2].tobytes()
    file.write(scales.ljust(aligned(len(scales)), b"\0"))
