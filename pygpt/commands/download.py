"""Download a GPT-2 model.

huggingface_hub fetches the files and keeps them in its cache (hub/fetch.py). This command converts safetensors to a .bin file
in pygpt's cache folder, and links llm.c's .bin files there. A model that a .bin file cannot hold whole stays in the cache of
huggingface_hub. A failed download leaves no incomplete model file. stdout stays empty.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..errors import CheckpointError, InputError, PyGPTError
from ..formats.checkpoint import Checkpoint
from ..formats.files import atomic_file, reason
from ..formats.open import open_model
from ..hub.fetch import fetch
from ..hub.find import MODELS, cached_model, is_downloadable
from ..tokenizer import GPT2_V
from .console import Parser, say, status_of
from .convert import check_parent, default_version, describe, parse_version, write_bin

EXAMPLES = """\
examples:
  pygpt download gpt2                     OpenAI's GPT-2 124M; use it with pygpt -m gpt2 31373 612
  pygpt download --version 5 gpt2-xl      the largest model, as bfloat16
  pygpt download distilbert/distilgpt2    a repository; use it with pygpt -m distilbert/distilgpt2 31373 612
  pygpt download gpt2_124M -o gpt2.bin    llm.c's own file, into this folder

names: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2; llm.c's gpt2_124M, gpt2_124M_bf16
environment: PYGPT_HOME is pygpt's cache folder. huggingface_hub reads HF_HOME (its cache folder), HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE and others.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="pygpt download",
        usage="pygpt download [options] NAME",
        description="Download a GPT-2 model from Hugging Face. Afterwards, -m NAME finds it in every command.",
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="NAME", help="one of the names below, or a repository OWNER/NAME")
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit, as in NAME@REV (default: main)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: a file in pygpt's cache folder)")
    version = "convert to version 1, 3 (float32) or 5 (bfloat16) (default: keep all values exact)"
    parser.add_argument("--version", metavar="N", help=version)
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, download, and print a summary."""
    name = options.model if options.revision is None else f"{options.model}@{options.revision}"
    say(download(name, options.output, parse_version(options.version)))


def download(name: str, target: str | None = None, version: int | None = None) -> str:
    """Download the model of this name to the file `target` (default: in the cache folder). Return a one-line summary.

    An existing model of the same version stays as it is. Raises InputError for a bad name or target, CheckpointError if the
    download is not a model, PyGPTError if downloading or writing fails."""
    check_name(name)
    linked = target is None
    if target is None:
        target = cached_model(name)
        with disk_errors(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.islink(target) and not os.path.exists(target):
                os.unlink(target)  # a link to a file that was removed from huggingface_hub's cache
    if there := present(target, version):
        return there
    source = fetch(name, say)
    try:
        with open_model(source) as model:
            own_vocabulary = model.config.V != GPT2_V and model.config.tokenizer is not None
            if linked and version is None and (model.config.variations or own_vocabulary):
                return f"{describe(source, model)}: used in place, because a .bin file cannot hold all of it"
            if not isinstance(model, Checkpoint) or version not in (None, model.version):
                write_bin(target, model, version or default_version(model))
            else:
                place(source, target, linked=linked)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if the file is damaged, delete it and download it again") from error
    with Checkpoint(target) as written:
        return f"{source} -> {describe(target, written)}"


def check_name(name: str) -> None:
    """Raise InputError if this is not the name of a model that can be downloaded."""
    if "://" in name:
        way = "fetch the file with any tool, then use `pygpt convert`"
        raise InputError(f"{name[:200]}: pygpt does not download from an address: {way}")
    if not is_downloadable(name):
        raise InputError(f"{name[:80]!r} is neither a name ({', '.join(MODELS)}) nor a repository OWNER/NAME; see --help")


def place(source: str, target: str, *, linked: bool) -> None:
    """Put a complete .bin file in place, as a link or as a copy."""
    with disk_errors(target):
        if linked:
            with suppress(FileExistsError):  # another process made the link just now
                os.symlink(os.path.abspath(source), target)
        else:
            with open(source, "rb") as file, atomic_file(target) as copy:
                shutil.copyfileobj(file, copy, 1 << 20)


def present(target: str, version: int | None) -> str:
    """Return a line about an existing model at `target`, or "" if there is no file.

    Raises InputError if the target is another kind of file, a model of another version, or cannot be a file name."""
    if not os.path.basename(target):
        raise InputError(f"-o is {target!r}: it must be the name of a file")
    check_parent(target)
    if not os.path.lexists(target):
        return ""
    try:
        with Checkpoint(target) as found:
            if version in (None, found.version):
                return f"{describe(target, found)} exists already, so it was not downloaded again"
            raise InputError(f"{target}: exists already, with version {found.version}: remove it, or use pygpt convert")
    except CheckpointError:
        raise InputError(f"{target}: exists already and is not a model file: remove it, or give another name with -o") from None


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn an OSError into a PyGPTError with a one-line message."""
    try:
        yield
    except OSError as error:
        raise PyGPTError(f"{path}: cannot write here: {reason(error)}: choose another place with -o or PYGPT_HOME") from error
