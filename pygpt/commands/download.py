"""Fetch a GPT-2 model. `pygpt download --help` says how.

A model goes by its name into the cache folder, where `-m NAME` finds it, or from an address into a file. Hugging Face's are
converted when they have arrived. What has arrived of a file is kept beside it (part.py) until it is whole and checked.

Two can do the talking. `Hub` is huggingface_hub, where it is installed, for models on Hugging Face. `Client` is the standard
library, for every other address (llm.c's files among them), with PYGPT_HUB=0, and for what an earlier run has begun: a download
that broke off goes on where it stopped, now or in a later run.

stdout stays empty; a progress bar is for terminals. Exit status: 0, with one line on stderr; 1 for a failure at run time; 2
for bad input; 130 after Ctrl-C. Unless it is 0 there is no new model file, or a whole one if all but the last line was done.
"""

import argparse
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..errors import CheckpointError, InputError
from ..formats.checkpoint import Checkpoint, file_bytes
from ..formats.huggingface import CONFIG_FILE, HuggingFaceModel, parse_settings, pickle_error, read_settings
from ..formats.safetensors import SafetensorsFile
from ..hub.fetch import Hub, hub_for
from ..hub.find import MODELS, cached_model
from ..hub.http_client import Client
from ..hub.part import Part, disk_errors
from ..hub.web import HUB, beside, check_url, is_safetensors
from .console import HelpFormatter, Parser, say, status_of
from .convert import check_parent, convert, default_version, describe, parse_version, write_bin

EXAMPLES = """\
examples:
  pygpt download gpt2                     OpenAI's GPT-2 124M, from Hugging Face; then: python -m pygpt -m gpt2
  pygpt download --version 5 gpt2-xl      the largest, as bfloat16
  pygpt download gpt2_124M -o gpt2.bin    llm.c's own file, into this folder

names: gpt2, gpt2-medium, gpt2-large, gpt2-xl; llm.c's gpt2_124M, gpt2_124M_bf16
environment: HF_ENDPOINT (a mirror), HF_TOKEN (for a model that needs one), HTTPS_PROXY, PYGPT_HOME (the cache folder),
PYGPT_HUB=0 (do without huggingface_hub)
"""

LLMC = "datasets/karpathy/llmc-starter-pack/resolve/main"  # as llm.c, dev/download_starter_pack.sh, has it
SOURCES = {
    name: f"{LLMC}/{name}.bin" if "124M" in name else f"openai-community/{name}/resolve/main/model.safetensors"
    for name in MODELS
}
SHA256 = {f"{LLMC}/gpt2_124M.bin": "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="pygpt.commands.download",
        usage="pygpt download [options] NAME | URL",
        description="Fetch a GPT-2 model by name into the cache folder, or from the address of a .bin or .safetensors file.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="NAME | URL", help="one of the names below, or an http(s) address")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="the file to write (default: NAME in the cache; URL's name here)"
    )
    parser.add_argument("--version", metavar="N", help="1, 3 (float32) or 5 (bfloat16): convert to it (default: the exact one)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, fetch, say what was done."""
    say(download(options.model, options.output, parse_version(options.version)))


def download(model: str, target: str | None = None, version: int | None = None) -> str:
    """Fetch the model of this name or address to file `target`; return a line that says so. A model that is there stays.

    Raises InputError for what cannot be asked for, CheckpointError when something else than a model arrives, PyGPTError when
    nothing whole does.
    """
    endpoint = check_url(os.environ.get("HF_ENDPOINT") or HUB, "HF_ENDPOINT").rstrip("/")
    if model in MODELS:
        url, default, digest = f"{endpoint}/{SOURCES[model]}", cached_model(model), SHA256.get(SOURCES[model])
    elif "://" in model:
        url, default, digest = check_url(model, "URL"), file_name(model), None
    else:
        raise InputError(f"{model[:80]!r} is neither an http(s) address nor a name: names are {', '.join(MODELS)}")
    if target is None:
        target = default
        make_folder(os.path.dirname(target))
    if there := present(target, version):
        return there
    client = Client(endpoint)  # here, since it looks at HF_TOKEN, which is the other's too
    with Part(f"{target}.part", url, digest) as part:
        return fetch_model(part, hub_for(part, endpoint) or client, target, version)


def fetch_model(part: Part, client: Client | Hub, target: str, version: int | None) -> str:
    """Fetch, check, convert if need be, and give the file its name."""
    settings = config = None
    if is_safetensors(part.url):
        address = beside(part.url, CONFIG_FILE)
        settings = parse_settings(client.small(address), address)
        config = read_settings(settings, part.url)
    path = client.fetch(part, room=0 if config is None else file_bytes(config, version or 3))
    source = part.url if path == part.path else path
    try:
        if settings is not None:
            with SafetensorsFile(path) as file, HuggingFaceModel({target: file}, settings, place=source) as model:
                write_bin(target, model, version or default_version(model))
        else:
            with Checkpoint(part.path) as checkpoint:
                found = checkpoint.version
            if version in (None, found):
                with disk_errors(target):
                    os.replace(part.path, target)
            else:
                convert(part.path, target, version)
    except CheckpointError as error:
        if path != part.path:
            raise
        part.discard()  # whole, and no model: it never will be
        raise CheckpointError(f"{part.url}: what came is no model that is read, and deleted: {error}") from None
    part.discard()
    with Checkpoint(target) as written:
        return f"{source} -> {describe(target, written)}"


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
                return f"{describe(target, found)} is there already: nothing to fetch"
            raise InputError(f"{target}: there already, of version {found.version}: remove it, or use pygpt convert")
    except CheckpointError:
        raise InputError(f"{target}: there already, and not a model file: remove it, or give another name with -o") from None


def make_folder(folder: str) -> None:
    """Make the cache folder; "" is the current one."""
    with disk_errors(folder):
        os.makedirs(folder or os.curdir, exist_ok=True)


def file_name(url: str) -> str:
    """The file to write for an address: its last part, of a kind that can be read, ending in .bin."""
    name = urlsplit(url).path.rpartition("/")[2]
    if name.startswith("pytorch_model"):
        raise pickle_error(url)
    if not re.fullmatch(r".+\.(bin|safetensors)", name):
        raise InputError(f"{url[:200]}: it must end in .bin (llm.c) or .safetensors (Hugging Face)")
    return name.removesuffix(".safetensors").removesuffix(".bin") + ".bin"
