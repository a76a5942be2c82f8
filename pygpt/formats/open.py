"""Open a model file of any format that pygpt reads, and turn its tensors into the blocks of another format.

`.gguf` files are known by their first bytes, panel files by their name (.safetensors) and metadata, pickles by their first
bytes. A folder and any other .safetensors file is a Hugging Face model. Everything else is taken for an llm.c checkpoint,
whose reader says what is wrong with it."""

import os
from contextlib import suppress

from ..config import Config
from ..errors import TYPE_CHECKING, CheckpointError, InputError, shown
from .checkpoint import Checkpoint
from .dtypes import ModelFile, layout
from .files import GGUF_MAGIC, begins_with, is_pickle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import SupportsIndex

    from ..tokenizer import Tokenizer
    from .dtypes import Blocks, Format


def open_model(
    path: str | os.PathLike[str],
    *,
    mmap: bool = True,
    threads: "SupportsIndex | None" = None,
    tokenizer: str | os.PathLike[str] | None = None,
    heads: int | None = None,
) -> ModelFile:
    """Open a model. No more of it is mapped than is in use; with mmap=False it is read into memory, and the file may change.

    threads: workers that lay out a Hugging Face model. tokenizer: a file with the model's vocabulary, instead of its own.
    heads: of a Hugging Face file without a config.json. Raises CheckpointError for a file of no such format, and InputError if
    another model gets `heads`, or if `tokenizer` does not exist."""
    path = os.fspath(path)
    if tokenizer is not None and not os.path.exists(tokenizer):
        raise InputError(f"{shown(os.fspath(tokenizer))}: no such file or folder: give the model's tokenizer (--tokenizer)")
    model: ModelFile
    if _is_hugging_face(path):
        from .huggingface import HuggingFaceModel

        model = HuggingFaceModel(path, heads=heads, threads=threads, mmap=mmap)
    elif heads is not None:
        raise InputError(f"{path}: this file contains its number of heads: leave out --heads")
    elif path.endswith(".safetensors"):
        from .panels import PanelFile

        model = PanelFile(path, mmap=mmap)
    elif path.endswith(".gguf") or begins_with(path, GGUF_MAGIC):
        from .gguf import GGUFFile

        model = GGUFFile(path, mmap=mmap, threads=threads)
    elif path.endswith(".json") and begins_with(path, b"{"):
        raise CheckpointError(f"{path}: JSON, not a model file: give the model's folder, or the file of its tensors")
    else:
        model = Checkpoint(path, mmap=mmap)
    _find_tokenizer(model, tokenizer)
    return model


def vocabulary_beside(model: str) -> str:
    """Return the path of the vocabulary that belongs to a model file: NAME.tokenizer.json for NAME.bin or another ending."""
    return f"{os.path.splitext(model)[0]}.tokenizer.json"


def write_beside(model: str, config: Config) -> None:
    """Write a model's own vocabulary beside its file, unless pygpt cannot read the vocabulary. Raises OSError."""
    if config.tokenizer is not None:
        from .vocabulary import write_vocabulary

        with suppress(InputError):
            write_vocabulary(vocabulary_beside(model), config.tokenizer().vocabulary())


def set_tokenizer(config: Config, path: str) -> None:
    """Let a config load its tokenizer from a file, once, when a text needs it: formats/vocabulary.py says from which files."""
    config.tokenizer = Kept(path, config.V)


class Kept:
    """A function that loads a tokenizer from a file at its first call, and can be pickled."""

    def __init__(self, path: str, V: int, tokenizer: "Tokenizer | None" = None) -> None:
        self._path, self._V, self._tokenizer = path, V, tokenizer

    def __call__(self) -> "Tokenizer":
        """Return the tokenizer."""
        if self._tokenizer is None:
            from .vocabulary import load_tokenizer

            self._tokenizer = load_tokenizer(self._path, V=self._V)
        return self._tokenizer


def _find_tokenizer(model: ModelFile, given: str | os.PathLike[str] | None) -> None:
    """Find the vocabulary of an open model: as given, beside its file, inside it, or in its folder."""
    folder = model.path if os.path.isdir(model.path) else os.path.dirname(model.path)
    inside = model.path if model.has_vocabulary else ""
    two = os.path.join(folder, "vocab.json")
    beside = vocabulary_beside(model.path) if folder != model.path else ""
    in_folder = (os.path.join(folder, "tokenizer.json"), two if os.path.isfile(os.path.join(folder, "merges.txt")) else "")
    if path := os.fspath(given or "") or next((path for path in (beside, inside, *in_folder) if os.path.isfile(path)), ""):
        set_tokenizer(model.config, path)


def open_weights(
    path: str | os.PathLike[str],
    *,
    mmap: bool = True,
    weights: str | None = None,
    threads: "SupportsIndex | None" = None,
    tokenizer: str | os.PathLike[str] | None = None,
    text_only: bool = False,
) -> ModelFile:
    """Open a model to compute with. If `weights` is q8_0 or q4_0, quantise its matrices in memory, on `threads` threads.

    text_only: leave out the ids that the tokenizer does not have. Raises what open_model() raises, and InputError for weights
    that cannot be quantised."""
    model = open_model(path, mmap=mmap, threads=threads, tokenizer=tokenizer)
    source = of_text_only(model) if text_only else model
    if weights is None:
        return source
    from .panels import quantised

    try:
        return quantised(source, weights, threads=threads)
    finally:
        model.close()


def of_text_only(model: ModelFile) -> ModelFile:
    """Return the weights of a model without the ids after the last one of its tokenizer; they outlive the model."""
    from copy import copy

    from ..tokenizer import tokenizer_of
    from .panels import StoredWeights, first_rows

    config, V = copy(model.config), model.config.V
    config.V = tokenizer_of(model.config).known
    if config.V == V:
        return model
    tensors = {
        name: (kind, first_rows(kind, data, V, config.V, config.C) if name in ("wte", "head") else data)
        for name, (kind, data) in model.stored().items()
    }
    return StoredWeights(config, tensors)


def open_floats(path: str | os.PathLike[str]) -> ModelFile:
    """Open a model to train. Raises CheckpointError for quantised weights, and otherwise as open_model()."""
    model = open_model(path)
    for kind in model.formats.values():
        if kind.block_values > 1:
            model.close()
            raise CheckpointError(f"{model.path}: {kind.name} weights cannot be trained: start from float32 or bfloat16")
    return model


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


def blocks_of(model: ModelFile, name: str, kind: "Format") -> "Iterator[Blocks]":
    """Yield a tensor's rows in order as blocks (rows, blocks of a row) of a format. A piece has rows of one layer only.

    Zeros pad rows that do not fill whole blocks. Quantised blocks that already have this format are passed on unchanged. Raises
    CheckpointError if a value is not finite, or exceeds the range of the format."""
    import numpy as np

    from .panels import QUANTISED, quantise

    _, _, K = layout(model.config, name)
    for found, blocks in model.parts(name):
        if found == kind and kind.block_values > 1:
            yield blocks
            continue
        rows = found.to_float32(blocks)[:, :K]
        if not (finite := np.isfinite(rows)).all():
            raise CheckpointError(f"{model.path}: {name} holds {rows[~finite][0]}: weights must be finite")
        rows = np.ascontiguousarray(np.pad(rows, ((0, 0), (0, -K % kind.block_values))), "<f4")
        if kind.name in QUANTISED:
            encoded = quantise(kind, rows)
        else:
            assert kind.from_float32 is not None
            rounded = kind.from_float32(rows)
            encoded = rounded if np.isfinite(kind.to_float32(rounded)).all() else None
        if encoded is None:
            largest = rows.flat[np.abs(rows).argmax()]
            raise CheckpointError(f"{model.path}: {name} holds {largest}: out of the range of {kind.name}")
        yield encoded
