"""Convert an llm.c checkpoint (.bin) to another version, or to or from a Hugging Face GPT-2 (safetensors), or from a GGUF file.

Versions 1 and 3 hold float32. Version 5 holds bfloat16, rounded to the nearest, ties to even. After a failure, an older DST is
unchanged, and an incomplete new file is removed."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..config import LIMITS
from ..errors import InputError, PyGPTError
from ..formats.checkpoint import FORMATS, Checkpoint, write_checkpoint
from ..formats.dtypes import BFLOAT16, FLOAT32, Format, ModelFile
from ..formats.files import reason
from ..formats.huggingface import HuggingFaceModel, write_model
from ..formats.open import open_model, write_beside
from .console import Parser, command, say, whole

EXAMPLES = """\
examples:
  pygpt convert gpt2_124M.bin gpt2_124M_bf16.bin              to bfloat16: half the size, and faster
  pygpt convert gpt2_124M_bf16.bin gpt2_float32.bin           to float32: every value stays the same
  pygpt convert --version 1 gpt2_124M.bin gpt2_unpadded.bin   for programs that read only version 1
  pygpt convert gpt2_124M.bin gpt2-hf/                        to a folder for Hugging Face transformers
  pygpt convert gpt2-hf/ gpt2.bin                             from such a folder
  pygpt convert gpt2_q8.gguf gpt2_from_q8.bin                 from a GGUF file: the same values as float32
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt convert", usage="pygpt convert [options] SRC DST", description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("source", metavar="SRC", help="a .bin, .gguf or .safetensors file, or a folder of a Hugging Face model")
    add("target", metavar="DST", help="the file to write, or a new folder if DST ends in /; an old file is replaced at the end")
    version = "version of DST: 1, 3 or 5 (default: 1 and 3 become 5, 5 becomes 3; others keep all values exact)"
    add("--version", metavar="N", type=int, choices=[*FORMATS], help=version)
    heads = "number of attention heads, for a .safetensors file without a config.json in its folder"
    add("--heads", metavar="N", type=whole(1, LIMITS["NH"]), help=heads)
    return parser


def convert(source: str, target: str, version: int | None = None, *, heads: int | None = None) -> str:
    """Write the model `source` to `target`, a file of this version or, if it ends with /, a folder. Return a one-line summary.

    Raises InputError or CheckpointError if the conversion is impossible, PyGPTError if writing fails."""
    with open_model(source, heads=heads) as model:
        before = describe(source, model)
        if target.endswith("/"):  # a folder
            if version is not None:
                raise InputError(f"{target}: a Hugging Face folder has no version: leave out --version")
            check_parent(os.path.realpath(target))
            if os.path.lexists(target.rstrip("/") or "/") and not (os.path.isdir(target) and not os.listdir(target)):
                raise InputError(f"{target}: exists and is not an empty folder: give DST another name")
            write_model(os.path.realpath(target), model, plain_format(model))
        else:
            version = default_version(model) if version is None else version
            if isinstance(model, Checkpoint) and version == model.version:
                raise InputError(f"{source}: is of version {version} already: choose another --version, or copy the file")
            if not target:
                raise InputError("DST is empty: it must be the name of a file")
            if target.endswith((".safetensors", ".gguf")):
                raise InputError(f"{target}: give a .bin file or a folder/; `pygpt quantize --format f32` writes other files")
            check_target(source, target)
            write_bin(target, model, version)
            with writing(target, "the vocabulary"):
                write_beside(target, model.config)
        notice = model.notice if isinstance(model, HuggingFaceModel) else ""
    with open_model(target) as written:
        return f"{before} -> {describe(target, written)}{notice and f'; {notice}'}"


def default_version(model: ModelFile) -> int:
    """Return the target version if --version is not given: the other precision of a .bin file, else what keeps every value."""
    return 5 if (model.version != 5 if isinstance(model, Checkpoint) else plain_format(model) == BFLOAT16) else 3


def plain_format(model: ModelFile) -> Format:
    """Return the format of all tensors if it is one of single values, else float32, which holds all values exactly."""
    formats = [*model.formats.values()]
    return formats[0] if all(kind == formats[0] and kind.block_values == 1 for kind in formats) else FLOAT32


def write_bin(target: str, model: ModelFile, version: int) -> None:
    """Write the model as a .bin file. Raises PyGPTError if writing fails."""
    tensors = {name: model.pieces(name) for name, _, _, _ in model.config.tensors(padded=False)}
    with writing(target):
        write_checkpoint(target, model.config, tensors, version=version)


@contextmanager
def writing(path: str, what: str = "the model file", way: str = "") -> Iterator[None]:
    """Turn an OSError into a PyGPTError with a one-line message. what: is written. way: out of the error."""
    try:
        yield
    except OSError as error:
        raise PyGPTError(f"{path}: cannot write {what}: {reason(error)}{way}") from error


def check_target(source: str, target: str) -> None:
    """Raise InputError if the target belongs to the source, is not a regular file, or lies in a folder that does not exist."""
    check_parent(target)
    if not os.path.exists(target):
        return
    inside = os.path.isdir(source) and os.path.samefile(source, os.path.dirname(os.path.realpath(target)))
    if inside or (os.path.exists(source) and os.path.samefile(source, target)):
        what = "" if inside else ", because SRC and DST are the same file"
        raise InputError(f"{target}: this file belongs to SRC{what}: give DST another name")
    if not os.path.isfile(target):
        raise InputError(f"{target}: not a regular file, so it is not replaced: give DST another name")


def check_parent(target: str) -> None:
    """Raise InputError if the target's folder does not exist."""
    folder = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(folder):
        raise InputError(f"{target}: the folder {folder} does not exist: make it first")


def describe(path: str, model: ModelFile) -> str:
    """Return a short description of a model: path, version, format, size."""
    kind = "Hugging Face, " if isinstance(model, HuggingFaceModel) else ""
    kind = f"version {model.version}, " if isinstance(model, Checkpoint) else kind
    mixed = isinstance(model, HuggingFaceModel) and len({kind.name for kind in model.formats.values()}) > 1
    return f"{path} ({kind}{'mixed' if mixed else model.format.name}, {model.size} bytes)"


main = command(build_parser, lambda options: say(convert(**vars(options))))
