"""Open a model file of any format that pygpt reads, and turn its tensors into the blocks of another format.

`.gguf` files are known by their first bytes, panel files by their name (.safetensors) and metadata, pickles by their first
bytes. A folder and any other .safetensors file is a Hugging Face model. Everything else is taken for an llm.c checkpoint,
whose reader says what is wrong with it.
"""

import os

from ..config import Config
from ..errors import CheckpointError, InputError
from .checkpoint import MODEL_KIND, Checkpoint, StreamedCheckpoint
from .files import Windows, is_pickle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import SupportsIndex, TypeVar

    import numpy as np
    import numpy.typing as npt

    from ..tokenizer import Tokenizer
    from .dtypes import Format
    from .huggingface import HuggingFaceModel
    from .panels import Blocks, ModelFile
    from .quantise import QuantisedWeights

    Model = Checkpoint | ModelFile | HuggingFaceModel  # config, format, stored(), pieces(), path, close()
    Source = Model
    M = TypeVar("M", bound=Model)

GGUF_MAGIC = b"GGUF"


def open_model(
    path: str | os.PathLike[str],
    *,
    mmap: bool = True,
    threads: "SupportsIndex | None" = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> "Model":
    """Open a model to compute with. With mmap=False the values are read into memory, and the file may change meanwhile.

    threads: workers that lay out a Hugging Face model. tokenizer: a file with the model's vocabulary, instead of its own.
    Raises CheckpointError for a file of no such format."""
    path = os.fspath(path)
    model: Model
    if _is_hugging_face(path):
        from .huggingface import HuggingFaceModel

        model = HuggingFaceModel.open(path, threads=threads, mmap=mmap)
    elif path.endswith(".safetensors"):
        from .panels import PanelFile

        model = PanelFile(path, mmap=mmap)
    elif _is_gguf(path):
        from .gguf import GGUFFile

        model = GGUFFile(path, mmap=mmap, threads=threads)
    else:
        model = Checkpoint(path, mmap=mmap)
    return _with_tokenizer(model, tokenizer)


def vocabulary_beside(model: str) -> str:
    """Return the path of the vocabulary that belongs to a model file: NAME.tokenizer.json for NAME.bin or another ending."""
    return f"{os.path.splitext(model)[0]}.tokenizer.json"


def set_tokenizer(config: Config, path: str) -> None:
    """Let a config load its tokenizer from a file when a text needs it: formats/vocabulary.py says from which files."""

    def load() -> "Tokenizer":
        from .vocabulary import cached_tokenizer

        return cached_tokenizer(path, config.V)

    config.tokenizer = load


def _with_tokenizer(model: "M", given: str | os.PathLike[str] | None = None) -> "M":
    """Find the vocabulary of an open model: as given, beside its file, inside it, or in its folder. Return the model."""
    if given is not None:
        set_tokenizer(model.config, os.fspath(given))
        return model
    folder = model.path if os.path.isdir(model.path) else os.path.dirname(model.path)
    inside = model.path if getattr(model, "has_vocabulary", False) else ""
    two = os.path.join(folder, "vocab.json")
    beside = vocabulary_beside(model.path) if folder != model.path else ""
    in_folder = (os.path.join(folder, "tokenizer.json"), two if os.path.isfile(os.path.join(folder, "merges.txt")) else "")
    if path := next((path for path in (beside, inside, *in_folder) if os.path.isfile(path)), ""):
        set_tokenizer(model.config, path)
    return model


def open_weights(
    path: str | os.PathLike[str],
    *,
    mmap: bool = True,
    weights: str | None = None,
    threads: "SupportsIndex | None" = None,
    tokenizer: str | os.PathLike[str] | None = None,
    text_only: bool = False,
) -> "Model | QuantisedWeights":
    """Open a model to compute with. If `weights` is q8_0 or q4_0, quantise its matrices in memory, on `threads` threads.

    text_only: leave out the ids that the tokenizer does not have. Raises what open_model() raises, and InputError for weights
    that cannot be quantised."""
    model = open_model(path, mmap=mmap, threads=threads, tokenizer=tokenizer)
    source = of_text_only(model) if text_only else model
    if weights is None:
        return source
    from .quantise import quantised

    try:
        return quantised(source, weights, threads=threads)
    finally:
        model.close()


def of_text_only(model: "Model") -> "Model | QuantisedWeights":
    """Return the weights of a model without the ids after the last one of its tokenizer; they outlive the model."""
    from copy import copy

    from ..tokenizer import tokenizer_of
    from .panels import first_rows
    from .quantise import QuantisedWeights

    config, V = copy(model.config), model.config.V
    config.V = tokenizer_of(model.config).known
    if config.V == V:
        return model
    tensors = {
        name: (kind, first_rows(kind, data, V, config.V, config.C) if name in ("wte", "head") else data)
        for name, (kind, data) in model.stored().items()
    }
    return QuantisedWeights(config, model.format, tensors)


def open_floats(path: str | os.PathLike[str]) -> "Model":
    """Open a model to train. Raises CheckpointError for quantised weights, and otherwise as open_model()."""
    model = open_model(path)
    for kind in getattr(model, "formats", {"": model.format}).values():
        if kind.block_values > 1:
            model.close()
            raise CheckpointError(
                f"{model.path}: {kind.name} weights cannot be trained: start from the model in float32 or bfloat16"
            )
    return model


def open_source(path: str | os.PathLike[str], *, heads: int | None = None) -> "Source":
    """Open a model to convert; no more of it is mapped than is being looked at.

    heads: of a Hugging Face file without a config.json. Raises InputError if another model gets `heads`."""
    path = os.fspath(path)
    if _is_hugging_face(path):
        from .huggingface import HuggingFaceModel

        return _with_tokenizer(HuggingFaceModel.open(path, heads=heads))
    if heads is not None:
        raise InputError(f"{path}: this file contains its number of heads: leave out --heads")
    if path.endswith(".safetensors") or _is_gguf(path):
        return open_model(path)
    return _with_tokenizer(StreamedCheckpoint(path))


def sha256_of(path: str) -> str:
    """Return the sha256 of a model's file in hexadecimal digits; of a folder, that of its settings and tensors, joined."""
    import hashlib

    from .huggingface import CONFIG_FILE, find_files

    digest = hashlib.sha256()
    names = [os.path.join(path, name) for name in (CONFIG_FILE, *find_files(path))] if os.path.isdir(path) else [path]
    for name in names:
        with open(name, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _is_hugging_face(path: str) -> bool:
    """Return whether this is a folder, a pickle, or a safetensors file other than a panel file."""
    if os.path.isdir(path) or is_pickle(path):
        return True
    if not path.endswith(".safetensors"):
        return False
    from .panels import FILE_FORMAT
    from .safetensors import SafetensorsFile

    with SafetensorsFile(path) as file:
        return file.metadata.get("format") != FILE_FORMAT


def _is_gguf(path: str) -> bool:
    file = Windows(path, MODEL_KIND, CheckpointError)
    try:
        return path.endswith(".gguf") or bytes(file.view(0, min(file.size, len(GGUF_MAGIC)))) == GGUF_MAGIC
    finally:
        file.close()


def blocks_of(model: "Source", name: str, kind: "Format") -> "Iterator[Blocks]":
    """Yield a tensor's rows in order as blocks (rows, blocks of a row) of a format. A piece has rows of one layer only.

    Zeros pad rows that do not fill whole blocks. Blocks that already have this format are passed on unchanged. Raises
    CheckpointError if a value is not finite, or exceeds the range of the format."""
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
    import numpy as np

    from .panels import QUANTISED, quantise

    if not (finite := np.isfinite(rows)).all():
        raise CheckpointError(f"{model.path}: {name} holds {rows[~finite][0]}: weights must be finite")
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
        raise CheckpointError(f"{model.path}: {name} holds {largest}: out of the range of {kind.name}")
    return blocks
