"""Open a model file of any format that pygpt reads, and turn its tensors into the blocks of another format.

GGUF files are recognised by their first bytes, panel files by their name (.safetensors) and metadata. Every other file is read
as an llm.c checkpoint; if it is not one, that reader explains why. Hugging Face models are only converted, because their
tensors have another layout.
"""

import os

from ..errors import CheckpointError
from .checkpoint import MODEL_KIND, Checkpoint, StreamedCheckpoint
from .files import Windows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import SupportsIndex

    import numpy as np
    import numpy.typing as npt

    from .dtypes import Format
    from .huggingface import HuggingFaceModel
    from .panels import Blocks, ModelFile
    from .quantise import QuantisedWeights

    Model = Checkpoint | ModelFile  # to compute with: config, format, stored(), pieces(), path, close()
    Source = Model | HuggingFaceModel  # to convert: config, pieces(), close()

GGUF_MAGIC = b"GGUF"


def open_model(path: str | os.PathLike[str], *, mmap: bool = True, threads: "SupportsIndex | None" = None) -> "Model":
    """Open a model to compute with. With mmap=False the values are read into memory, and the file may change meanwhile.

    threads: workers for a file whose values must be laid out in memory, as for GPT2.load().

    Raises CheckpointError for a file in another format, and for a Hugging Face model, which must be converted first.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(
            f"{path} is a folder: first convert a Hugging Face model to a file with `pygpt convert {path} NAME.bin`"
        )
    if path.endswith(".safetensors"):
        from .panels import PanelFile

        return PanelFile(path, mmap=mmap)
    if _is_gguf(path):
        from .gguf import GGUFFile

        return GGUFFile(path, mmap=mmap, threads=threads)
    return Checkpoint(path, mmap=mmap)


def open_weights(
    path: str | os.PathLike[str], *, mmap: bool = True, weights: str | None = None, threads: "SupportsIndex | None" = None
) -> "Model | QuantisedWeights":
    """Open a model to compute with. If `weights` is q8_0 or q4_0, quantise its matrices in memory, on `threads` threads.

    Raises what open_model() raises, and InputError for weights that cannot be quantised.
    """
    model = open_model(path, mmap=mmap, threads=threads)
    if weights is None:
        return model
    from .quantise import quantised

    try:
        return quantised(model, weights, threads=threads)
    finally:
        model.close()


def open_floats(path: str | os.PathLike[str]) -> "Model":
    """Open a model to train. Raises CheckpointError for quantised weights, and otherwise as open_model()."""
    model = open_model(path)
    for kind in [model.format] if isinstance(model, Checkpoint) else model.formats.values():
        if kind.block_values > 1:
            model.close()
            raise CheckpointError(
                f"{model.path}: {kind.name} weights cannot be trained: start from the model in float32 or bfloat16"
            )
    return model


def open_source(path: str | os.PathLike[str]) -> "Source":
    """Open a model to convert, also a Hugging Face folder or file. Only the part in use is mapped."""
    path = os.fspath(path)
    if os.path.isdir(path) or (path.endswith(".safetensors") and not _is_panel_file(path)):
        from .huggingface import HuggingFaceModel

        return HuggingFaceModel.open(path)
    if path.endswith(".safetensors") or _is_gguf(path):
        return open_model(path)
    return StreamedCheckpoint(path)


def _is_gguf(path: str) -> bool:
    file = Windows(path, MODEL_KIND, CheckpointError)
    try:
        return path.endswith(".gguf") or bytes(file.view(0, min(file.size, len(GGUF_MAGIC)))) == GGUF_MAGIC
    finally:
        file.close()


def _is_panel_file(path: str) -> bool:
    from .panels import FILE_FORMAT
    from .safetensors import SafetensorsFile

    with SafetensorsFile(path) as file:
        return file.metadata.get("format") == FILE_FORMAT


def blocks_of(model: "Source", name: str, kind: "Format") -> "Iterator[Blocks]":
    """Yield a tensor's rows in order as blocks (rows, blocks of a row) of a format. A piece has rows of one layer only.

    Zeros pad rows that do not fill whole blocks. Blocks that already have this format are passed on unchanged. Raises
    CheckpointError if a value is not finite, or exceeds the range of the format.
    """
    from .panels import ModelFile, layout

    layers, N, K = layout(model.config, name)
    if isinstance(model, ModelFile):
        for found, blocks in model.parts(name):
            yield blocks if found == kind else _encode(model, name, kind, found.to_float32(blocks)[:, :K])
        return
    for piece in model.pieces(name):
        rows = piece.reshape(-1, K)
        step = N if layers > 1 else len(rows)
        for start in range(0, len(rows), step):
            yield _encode(model, name, kind, rows[start : start + step])


def _encode(model: "Source", name: str, kind: "Format", rows: "npt.NDArray[np.float32]") -> "Blocks":
    """Turn float32 rows (rows, K) into blocks."""
    import numpy as np

    from .panels import QUANTISED, quantise

    if not (finite := np.isfinite(rows)).all():
        raise CheckpointError(f"{_place(model)}: {name} has {rows[~finite][0]}: weights must be finite")
    if padding := -rows.shape[1] % kind.block_values:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    rows = np.ascontiguousarray(rows, "<f4")
    if kind.name in QUANTISED:
        blocks = quantise(kind, rows)
    else:
        assert kind.from_float32 is not None
        rounded = kind.from_float32(rows)
        blocks = rounded if np.isfinite(kind.to_float32(rounded)).all() else None
    if blocks is None:
        largest = rows.flat[np.abs(rows).argmax()]
        raise CheckpointError(f"{_place(model)}: {name} has {largest}, which is out of the range of {kind.name}")
    return blocks


def _place(model: "Source") -> str:
    """Return the name of a model for messages."""
    from .huggingface import HuggingFaceModel

    return model.place if isinstance(model, HuggingFaceModel) else model.path
