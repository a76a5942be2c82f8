"""Download a GPT-2 model. `pygpt download --help` says how.

huggingface_hub fetches the files and keeps them in its cache (hub/fetch.py). Safetensors are converted to a .bin file in
pygpt's cache folder, where `-m NAME` finds it. llm.c's .bin files are used in place: the cache folder gets a link.

stdout stays empty; a progress bar is for terminals. Exit status: 0, with one line on stderr; 1 for a failure at run time; 2
for bad input; 130 after Ctrl-C. Unless it is 0 there is no new model file, or a whole one if all but the last line was done.
"""

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..errors import CheckpointError, InputError, PyGPTError
from ..formats.checkpoint import Checkpoint
from ..formats.files import atomic_file, reason
from ..hub.fetch import fetch
from ..hub.find import MODELS, cached_model, is_downloadable
from .console import HelpFormatter, Parser, say, status_of
from .convert import check_parent, default_version, describe, open_model, parse_version, write_bin

EXAMPLES = """\
examples:
  pygpt download gpt2                     OpenAI's GPT-2 124M; then: pygpt -m gpt2 31373 612
  pygpt download --version 5 gpt2-xl      the largest, as bfloat16
  pygpt download distilbert/distilgpt2    a repository on Hugging Face; then: pygpt -m distilbert/distilgpt2 31373 612
  pygpt download gpt2_124M -o gpt2.bin    llm.c's own file, into this folder

names: gpt2, gpt2-medium, gpt2-large, gpt2-xl; llm.c's gpt2_124M, gpt2_124M_bf16
environment: PYGPT_HOME (the cache folder); huggingface_hub's HF_HOME (its own), HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, ...
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt download",
        usage="pygpt download [options] NAME",
        description="Download a GPT-2 model from Hugging Face, by a name below or by its repository.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="NAME", help="one of the names below, or a repository: OWNER/NAME")
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit; NAME@REV says the same (default: main)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: in the cache folder, for -m NAME)")
    parser.add_argument("--version", metavar="N", help="1, 3 (float32) or 5 (bfloat16): convert to it (default: the exact one)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, download, say what was done."""
    name = options.model if options.revision is None else f"{options.model}@{options.revision}"
    say(download(name, options.output, parse_version(options.version)))


def download(name: str, target: str | None = None, version: int | None = None) -> str:
    """Download the model of this name to file `target`; return a line that says so. A model that is there stays.

    Raises InputError for what cannot be asked for, CheckpointError for what is not a model, PyGPTError when downloading fails.
    """
    check_name(name)
    linked = target is None
    if target is None:
        target = cached_model(name)
        with disk_errors(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.islink(target) and not os.path.exists(target):
                os.unlink(target)  # its file was removed from huggingface_hub's cache
    if there := present(target, version):
        return there
    source = fetch(name, say)
    try:
        with open_model(source, None) as model:
            if not isinstance(model, Checkpoint) or version not in (None, model.version):
                write_bin(target, model, version or default_version(model))
            else:
                place(source, target, linked=linked)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if the file is damaged, delete it and download it again") from error
    with Checkpoint(target) as written:
        return f"{source} -> {describe(target, written)}"


def check_name(name: str) -> None:
    """Refuse what is not the name of a model that can be downloaded."""
    if "://" in name:
        raise InputError(f"{name[:200]}: an address is not downloaded: fetch the file with any tool, then use `pygpt convert`")
    if not is_downloadable(name):
        raise InputError(f"{name[:80]!r} is neither a name ({', '.join(MODELS)}) nor a repository OWNER/NAME; see --help")


def place(source: str, target: str, *, linked: bool) -> None:
    """Put a whole .bin file in place: as a link, or as a copy."""
    with disk_errors(target):
        if linked:
            with suppress(FileExistsError):  # another process has just done the same
                os.symlink(os.path.abspath(source), target)
        else:
            with open(source, "rb") as file, atomic_file(target) as copy:
                shutil.copyfileobj(file, copy, 1 << 20)


def present(target: str, version: int | None) -> str:
    """Say that a model is there already; "" if nothing is. Refuses a target that is something else, or cannot be."""
    if not os.path.basename(target):
        raise InputError(f"{target!r} is not the name of a file")
    check_parent(target)
    if not os.path.lexists(target):
        return ""
    try:
        with Checkpoint(target) as found:
            if version in (None, found.version):
                return f"{describe(target, found)} is there already: nothing to download"
            raise InputError(f"{target}: there already, of version {found.version}: remove it, or use pygpt convert")
    except CheckpointError:
        raise InputError(f"{target}: there already, and not a model file: remove it, or give another name with -o") from None


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Say in one line what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise PyGPTError(f"{path}: cannot write here: {reason(error)}: name another place with -o or PYGPT_HOME") from error
