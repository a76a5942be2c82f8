"""Download a GPT-2 model from Hugging Face. Afterwards, -m NAME finds it in every command.

Safetensors become a .bin file in pygpt's cache folder, and llm.c's .bin files are linked there. A model that a .bin file cannot
hold whole is used in the cache of huggingface_hub. A failed download leaves no incomplete model file."""

import argparse
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .. import __version__
from ..errors import CheckpointError, InputError, PyGPTError
from ..formats import huggingface
from ..formats.checkpoint import FORMATS, Checkpoint
from ..formats.files import atomic_file
from ..formats.open import open_model, sha256_of
from ..hub.find import MODELS, cache_folder, cached_model, is_downloadable, repository_of
from ..tokenizer import GPT2_V
from .console import Parser, command, say
from .convert import check_parent, default_version, describe, write_bin, writing

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
HERE = "here", ": choose another place with -o or PYGPT_HOME"
LLMC = "karpathy/llmc-starter-pack"  # a data set. Source: llm.c, dev/download_starter_pack.sh
LLMC_SHA256 = {  # the sha256 of its files by the model's name; None if it is unknown
    "gpt2_124M": "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162",
    "gpt2_124M_bf16": None,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(prog="pygpt download", usage="pygpt download [options] NAME", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("model", metavar="NAME", help="one of the names below, or a repository OWNER/NAME")
    parser.add_argument("--revision", metavar="REV", help="a branch, tag or commit, as in NAME@REV (default: main)")
    parser.add_argument("-o", "--output", metavar="FILE", help="the file to write (default: a file in pygpt's cache folder)")
    version = "convert to version 1, 3 (float32) or 5 (bfloat16) (default: keep all values exact)"
    parser.add_argument("--version", metavar="N", type=int, choices=[*FORMATS], help=version)
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, download, and print a summary."""
    name = options.model if options.revision is None else f"{options.model}@{options.revision}"
    say(download(name, options.output, options.version))


def download(name: str, target: str | None = None, version: int | None = None) -> str:
    """Download the model of this name to the file `target` (default: in the cache folder), unless it is there already."""
    if "://" in name:
        way = "fetch the file with any tool, then use `pygpt convert`"
        raise InputError(f"{name[:200]}: pygpt does not download from an address: {way}")
    if not is_downloadable(name):
        raise InputError(f"{name[:80]!r} is neither a name ({', '.join(MODELS)}) nor a repository OWNER/NAME; see --help")
    linked = target is None
    if target is None:
        target = cached_model(name)
        with writing(target, *HERE):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if os.path.islink(target) and not os.path.exists(target):
                os.unlink(target)  # a link to a file that was removed from huggingface_hub's cache
    if there := present(target, version):
        return there
    source = fetch(name)
    try:
        with open_model(source) as model:
            own_vocabulary = model.config.V != GPT2_V and model.config.tokenizer is not None
            if linked and version is None and (model.config.variations or own_vocabulary):
                return f"{describe(source, model)}: used in place, because a .bin file cannot hold all of it"
            if not isinstance(model, Checkpoint) or version not in (None, model.version):
                write_bin(target, model, version or default_version(model))
            else:
                with writing(target, *HERE), suppress(FileExistsError):  # another process made the link just now
                    if linked:
                        os.symlink(os.path.abspath(source), target)
                    else:
                        with open(source, "rb") as file, atomic_file(target) as copy:
                            shutil.copyfileobj(file, copy, 1 << 20)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if the file is damaged, delete it and download it again") from error
    with Checkpoint(target) as written:
        return f"{source} -> {describe(target, written)}"


def present(target: str, version: int | None) -> str:
    """Return a line about an existing model at `target`, or "" if there is no file. Raises InputError for any other file."""
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


def fetch(name: str) -> str:
    """Fetch a model; return the path of its .bin file, or of its folder with config.json and safetensors."""
    _import_hub()
    model, _, revision = name.partition("@")
    with _warnings_shown():
        if model in LLMC_SHA256:
            return Repository(LLMC, revision, "dataset").need(f"{model}.bin", None if revision else LLMC_SHA256[model])
        repository = Repository(repository_of(model), revision)
        settings = repository.need(huggingface.CONFIG_FILE)
        config = huggingface.read_settings(huggingface.read_json(settings), repository.name)
        if config.V != GPT2_V:  # GPT-2's vocabulary is part of this package
            with suppress(PyGPTError):  # offline, a file that is not in the cache may not exist at all
                files = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
                for file in files if repository.get("tokenizer.json") else ["vocab.json", "merges.txt", *files]:
                    repository.get(file)
        folder = os.path.dirname(settings)
        if repository.get(huggingface.MODEL_FILE) is None:
            if repository.get(huggingface.INDEX_FILE) is None:
                if any(repository.ask(name, dry_run=True) for name in (huggingface.PICKLE_FILE, huggingface.PICKLE_INDEX)):
                    raise CheckpointError(f"{repository.name}: {huggingface.PICKLE}")
                what = f"expected {huggingface.MODEL_FILE} or {huggingface.INDEX_FILE}"
                raise CheckpointError(f"{repository.name}: {what} in this repository")
            for name in huggingface.find_files(folder):
                repository.need(name)
        return folder


class Repository:
    """One revision of a repository on Hugging Face ("": its main branch). All files are from the commit of the first file."""

    def __init__(self, name: str, revision: str, kind: str = "model") -> None:
        self.name, self.revision, self.kind = name, revision or "main", kind

    def need(self, file: str, sha256: str | None = None) -> str:
        """Fetch a file that the repository must have, and check its sha256; return its path."""
        if path := self.get(file, sha256):
            return path
        raise CheckpointError(f"{self.name}: {file} is missing in this repository (revision {self.revision})")

    def get(self, file: str, sha256: str | None = None) -> str | None:
        """Fetch a file, and check its sha256; return its path, or None if the repository has no such file."""
        if (path := self.ask(file)) is not None:
            check_sha256(path, sha256)
            self.revision = os.path.basename(os.path.dirname(path))  # snapshots/COMMIT/FILE
        return path

    def ask(self, file: str, *, dry_run: bool = False) -> str | None:
        """Fetch a file, unless dry_run; return its path, or None if the repository has no such file."""
        from huggingface_hub.errors import RemoteEntryNotFoundError
        from huggingface_hub.file_download import hf_hub_download

        try:
            place = {"repo_type": self.kind, "revision": self.revision}
            us = {"library_name": "pygpt", "library_version": __version__}
            found = hf_hub_download(self.name, file, dry_run=dry_run, **place, **us)  # type: ignore[call-overload]
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:
            raise self._explain(error) from error
        return found if isinstance(found, str) else found.local_path

    def _explain(self, error: Exception) -> PyGPTError:
        """Return the one-line error for an exception. The reason of a LocalEntryNotFoundError is its cause."""
        from huggingface_hub import constants, errors

        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, errors.GatedRepoError):
            return PyGPTError(f"{self.name}: gated: ask for access on its page, then log in (hf auth login) or set HF_TOKEN")
        if isinstance(error, errors.RepositoryNotFoundError):
            return InputError(f"{self.name}: no such repository, or a private one: check the name, or log in (hf auth login)")
        if isinstance(error, errors.RevisionNotFoundError):
            return InputError(f"{self.name}: no revision {self.revision!r}: give a branch, tag or commit of this repository")
        if isinstance(error, errors.HFValidationError):
            return InputError(str(error))
        if isinstance(error, errors.OfflineModeIsEnabled):
            return PyGPTError(f"{self.name}: not in huggingface_hub's cache, and HF_HUB_OFFLINE is set: unset it to download")
        if isinstance(error, OSError) and error.errno is not None:
            place = error.filename or constants.HF_HUB_CACHE
            return PyGPTError(f"{place}: {error.strerror}: make room, or set HF_HOME to another folder for downloads")
        if isinstance(error, errors.HfHubHTTPError):
            answer = error.response
            words = f"the server answers {answer.status_code} ({error.server_message or answer.reason_phrase})"
            if answer.status_code in (401, 403):
                return PyGPTError(f"{self.name}: {words}: log in (hf auth login), or check HF_TOKEN")
        else:
            words = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return PyGPTError(f"{self.name}: cannot download from {constants.ENDPOINT}: {words}: check the network, then try again")


def check_sha256(path: str, known: str | None = None) -> None:
    """Compare a file's sha256 with `known`, and with the name of its link's target, a sha256 in huggingface_hub's cache."""
    named = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    expected = {digest for digest in (named, known) if digest and re.fullmatch("[0-9a-f]{64}", digest)}
    if expected and expected != {found := sha256_of(path)}:
        what = f"sha256 {found}, expected {' and '.join(sorted(expected))}"
        raise PyGPTError(f"{path}: wrong bytes: {what}: delete {os.path.realpath(path)} and download it again")


def _import_hub() -> None:
    """Import huggingface_hub. Without a home folder, set HF_HOME, because huggingface_hub would make a folder named ~."""
    if os.path.expanduser(os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~").startswith("~"):
        os.environ["HF_HOME"] = os.path.join(cache_folder(), "huggingface")
    try:
        import huggingface_hub.file_download  # noqa: F401
        from huggingface_hub.errors import RemoteEntryNotFoundError  # noqa: F401 - versions before 1.0 do not have it
    except ImportError as error:
        what = f"downloads need huggingface_hub from version 1.31 on, which cannot be imported ({error})"
        raise ImportError(f"{what}: python -m pip install huggingface_hub") from error
    except ValueError as error:  # HF_HUB_ETAG_TIMEOUT=soon
        raise InputError(f"huggingface_hub does not accept a variable HF_...: {error}") from error


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show huggingface_hub's log messages and warnings as notices while the block runs, above the progress bar."""
    from huggingface_hub.utils.tqdm import tqdm

    def emit(record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(sys.stderr):
            say(record.getMessage())

    logger, handler = logging.getLogger("huggingface_hub"), logging.Handler()
    handler.emit = emit  # type: ignore[method-assign]
    before, logger.handlers = logger.handlers, [handler]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
            yield
    finally:
        logger.handlers = before


main = command(build_parser, run)
