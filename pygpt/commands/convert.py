"""Convert a model file to another format. `pygpt convert --help` says how.

llm.c's versions 1 and 3 hold float32 (version 3 with padded rows of wte), version 5 holds bfloat16. A Hugging Face model is a
folder with safetensors of float32, bfloat16 or float16. Conversion to bfloat16 rounds each value to the nearest, ties to even.
All other conversions are exact; padding becomes zeros. Conversion streams, so memory use stays low. A file is not converted in
place, nor to the format that it has.

stdout stays empty. Exit status: 0, with one line on stderr; 1 for a failure at run time; 2 for bad input; 130 after Ctrl-C.
After a failure, an older DST is unchanged, and no half-written file is left.
"""

import argparse
import os
import re
from collections.abc import Sequence

from ..config import LIMITS
from ..errors import InputError, PyGPTError, is_whole
from ..formats.checkpoint import FORMATS, Checkpoint, StreamedCheckpoint, file_bytes, write_checkpoint
from ..formats.huggingface import CONFIG_FILE, MODEL_FILE, HuggingFaceModel, pickle_error, write_model
from .console import HelpFormatter, Parser, say, status_of

EXAMPLES = """\
examples:
  pygpt convert gpt2_124M.bin gpt2_124M_bf16.bin              to bfloat16: half the size, and the faster one
  pygpt convert gpt2_124M_bf16.bin gpt2_float32.bin           and back, each value exactly as it is
  pygpt convert --version 1 gpt2_124M.bin gpt2_unpadded.bin   for programs that read version 1 only
  pygpt convert gpt2_124M.bin gpt2-hf/                        to a folder that transformers loads
  pygpt convert gpt2-hf/ gpt2.bin                             from one
"""

DEFAULTS = {1: 5, 3: 5, 5: 3}  # target by source; from Hugging Face: the one that keeps every value
FOLDER = "/"  # what a DST that is to be a folder ends with
PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))  # PyTorch's files begin so


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt convert",
        usage="pygpt convert [options] SRC DST",
        description="Convert an llm.c checkpoint (.bin) between versions 1, 3 (float32) and 5 (bfloat16, nearest even), "
        "from a\nHugging Face GPT-2 (safetensors), or to one.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help="a .bin file, a Hugging Face model's folder, or a .safetensors file")
    parser.add_argument(
        "target", metavar="DST", help="the file to write, replaced once the new one is whole; with a / at its end, a new folder"
    )
    parser.add_argument(
        "--version", metavar="N", help="1, 3 or 5 (default 5 for a file of version 1 or 3, 3 for one of 5; else the exact one)"
    )
    parser.add_argument("--heads", metavar="N", help="attention heads, for a .safetensors file without a config.json beside it")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, convert, say what was done."""
    version = parse_version(options.version)
    heads = options.heads
    if heads is not None and not (re.fullmatch("[0-9]{1,9}", heads) and is_whole(int(heads), 1, LIMITS["NH"])):
        raise InputError(f"heads (--heads) is {heads[:40]!r}: it must be a whole number from 1 to {LIMITS['NH']}")
    say(convert(options.source, options.target, version, heads=None if heads is None else int(heads)))


def parse_version(text: str | None) -> int | None:
    """The value of --version."""
    if text is None:
        return None
    if text not in map(str, FORMATS):
        raise InputError(f"version (--version) is {text[:40]!r}: it must be 1, 3 or 5")
    return int(text)


def convert(source: str, target: str, version: int | None = None, *, heads: int | None = None) -> str:
    """Write the model `source` to `target`, a file in `version` or, if it ends with /, a folder; return a line that says so.

    Raises InputError and CheckpointError for what cannot be converted, PyGPTError when writing fails.
    """
    with open_model(source, heads) as model:
        before = describe(source, model)
        if target.endswith(FOLDER):
            if not isinstance(model, Checkpoint) or version is not None:
                raise InputError(f"{target}: a Hugging Face folder is written from a .bin file, as it is: without --version")
            check_folder(target)
            write_model(os.path.realpath(target), model)
        else:
            version = default_version(model) if version is None else version
            if isinstance(model, Checkpoint) and version == model.version:
                raise InputError(f"{source}: of version {version} already: there is nothing to convert")
            check_target(source, target)
            write_bin(target, model, version)
        notice = model.notice if isinstance(model, HuggingFaceModel) else ""
    with open_model(target, None) as written:
        return f"{before} -> {describe(target, written)}{notice and f'; {notice}'}"


def open_model(source: str, heads: int | None) -> Checkpoint | HuggingFaceModel:
    """Open SRC as what it is."""
    if os.path.isdir(source) or source.endswith(".safetensors"):
        return HuggingFaceModel.open(source, heads=heads)
    if heads is not None:
        raise InputError(f"{source}: a .bin file says how many heads there are: leave out --heads")
    if os.path.isfile(source) and os.access(source, os.R_OK):
        with open(source, "rb") as file:
            if file.read(4).startswith(PICKLES):
                raise pickle_error(source)
    return StreamedCheckpoint(source)


def default_version(model: Checkpoint | HuggingFaceModel) -> int:
    """The version that is meant when none is named."""
    if isinstance(model, Checkpoint):
        return DEFAULTS[model.version]
    return 5 if model.dtype == "bfloat16" else 3


def write_bin(target: str, model: Checkpoint | HuggingFaceModel, version: int) -> None:
    """Write the model as a .bin file."""
    tensors = {name: model.pieces(name) for name, _, _, _ in model.config.tensors(padded=False)}
    try:
        write_checkpoint(target, model.config, tensors, version=version)
    except OSError as error:
        raise PyGPTError(f"{target}: cannot write the model file: {error.strerror or error}") from error


def check_target(source: str, target: str) -> None:
    """Refuse a target that is the source, is no file, or has no folder."""
    if not target:
        raise InputError("DST is empty: it must be the name of a file")
    if target.endswith(".safetensors"):
        raise InputError(f"{target}: a Hugging Face model is a folder ({CONFIG_FILE}, {MODEL_FILE}): end DST with a /")
    check_parent(target)
    if os.path.exists(target):
        if os.path.samefile(source, target):
            raise InputError(f"{target}: SRC and DST are the same file: give DST another name")
        if os.path.isdir(source) and os.path.samefile(source, os.path.dirname(os.path.realpath(target))):
            raise InputError(f"{target}: a file of SRC itself: give DST another name")
        if not os.path.isfile(target):
            raise InputError(f"{target}: not a regular file: it is not replaced")


def check_folder(target: str) -> None:
    """Refuse a target folder that is there and holds anything, or that cannot be."""
    check_parent(os.path.realpath(target))
    if os.path.lexists(target.rstrip(FOLDER) or FOLDER) and not (os.path.isdir(target) and not os.listdir(target)):
        raise InputError(f"{target}: there already, and not an empty folder: give DST another name")


def check_parent(target: str) -> None:
    """Refuse a target in a folder that is not there."""
    folder = os.path.dirname(os.path.realpath(target))
    if not os.path.isdir(folder):
        raise InputError(f"{target}: there is no folder {folder}")


def describe(path: str, model: Checkpoint | HuggingFaceModel) -> str:
    """A model in a few words."""
    if isinstance(model, HuggingFaceModel):
        return f"{path} (Hugging Face, {model.dtype}, {model.size} bytes)"
    size = file_bytes(model.config, model.version)
    return f"{path} (version {model.version}, {model.format.name}, {size} bytes)"
