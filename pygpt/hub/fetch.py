"""Fetch models from Hugging Face with huggingface_hub (the extra `hub`).

Only this module imports huggingface_hub, and only to fetch a model. Fetched files stay in huggingface_hub's cache.
Refuses pickles, a config.json that is not GPT-2's (before any tensor is fetched), and a file whose sha256 is wrong.
Source: llm.c, dev/download_starter_pack.sh (the places of its files, and the sha256).
"""

import hashlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .. import __version__
from ..errors import CheckpointError, InputError, PyGPTError
from ..formats.huggingface import (
    CONFIG_FILE,
    INDEX_FILE,
    MODEL_FILE,
    PICKLE_FILE,
    PICKLE_INDEX,
    find_files,
    pickle_error,
    read_json,
    read_settings,
)
from ..tokenizer import GPT2_V
from .find import cache_folder, repository_of

LLMC = "karpathy/llmc-starter-pack"  # a data set
LLMC_SHA256 = {  # the sha256 of its files by the model's name; None if it is unknown
    "gpt2_124M": "3da8b207584030bcdcd207cf7a99952e3421dce92da218b351071857511bf162",
    "gpt2_124M_bf16": None,
}


def fetch(name: str, note: Callable[[str], None]) -> str:
    """Fetch a model; return the path of its .bin file, or of its folder with config.json and safetensors.

    name: a name that is_downloadable() accepts. note: called with each warning of huggingface_hub. Raises InputError for a
    repository or revision that does not exist, and CheckpointError for a repository without a GPT-2 model. Raises PyGPTError if
    fetching fails, and ImportError without huggingface_hub."""
    _import_hub()
    model, _, revision = name.partition("@")
    with _warnings_to(note):
        if model in LLMC_SHA256:
            return Repository(LLMC, revision, "dataset").need(f"{model}.bin", None if revision else LLMC_SHA256[model])
        return _fetch_folder(Repository(repository_of(model), revision))


class Repository:
    """One revision of a repository on Hugging Face ("": its main branch). All files are from the commit of the first file.

    kind: "model" or "dataset". Paths are in huggingface_hub's cache. The methods raise the errors of fetch()."""

    def __init__(self, name: str, revision: str, kind: str = "model") -> None:
        self.name, self.revision, self.kind = name, revision or "main", kind

    def need(self, file: str, sha256: str | None = None) -> str:
        """Fetch a file that the repository must have, and check its sha256; return its path."""
        if (path := self.get(file, sha256)) is None:
            raise CheckpointError(f"{self.name}: {file} is missing in this repository (revision {self.revision})")
        return path

    def get(self, file: str, sha256: str | None = None) -> str | None:
        """Fetch a file, and check its sha256; return its path, or None if the repository has no such file."""
        if (path := self._ask(file)) is not None:
            check_sha256(path, sha256)
            self.revision = os.path.basename(os.path.dirname(path))  # snapshots/COMMIT/FILE
        return path

    def has(self, file: str) -> bool:
        """Return whether the repository has a file, without fetching it."""
        return self._ask(file, dry_run=True) is not None

    def _ask(self, file: str, *, dry_run: bool = False) -> str | None:
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


def _fetch_folder(repository: Repository) -> str:
    """Fetch config.json and the safetensors; return their folder."""
    settings = repository.need(CONFIG_FILE)
    config = read_settings(read_json(settings), repository.name)
    if config.V != GPT2_V:  # GPT-2's vocabulary is part of this package
        with suppress(PyGPTError):  # offline, a file that is not in the cache may not exist at all
            if repository.get("tokenizer.json") is None:
                repository.get("vocab.json")
                repository.get("merges.txt")
    folder = os.path.dirname(settings)
    if repository.get(MODEL_FILE) is None:
        if repository.get(INDEX_FILE) is None:
            if any(map(repository.has, (PICKLE_FILE, PICKLE_INDEX))):
                raise pickle_error(repository.name)
            raise CheckpointError(f"{repository.name}: expected {MODEL_FILE} or {INDEX_FILE} in this repository")
        for name in find_files(folder):
            repository.need(name)
    return folder


def check_sha256(path: str, known: str | None = None) -> None:
    """Compare a file's sha256 with `known`, and with the file's name: huggingface_hub's cache names large files by sha256.

    If the cache has no links, its files have other names, and only `known` is compared. Raises PyGPTError for a difference."""
    named = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    expected = {digest for digest in (named, known) if digest and re.fullmatch("[0-9a-f]{64}", digest)}
    if not expected:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if expected != {found}:
        wanted = " and ".join(sorted(expected))
        way_out = f"delete {os.path.realpath(path)} and download it again"
        raise PyGPTError(f"{path}: wrong bytes: sha256 {found}, expected {wanted}: {way_out}")


def _import_hub() -> None:
    """Import huggingface_hub. Without a home folder, set HF_HOME, because huggingface_hub would make a folder named ~."""
    if os.path.expanduser(os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~").startswith("~"):
        os.environ["HF_HOME"] = os.path.join(cache_folder(), "huggingface")
    try:
        import huggingface_hub.file_download  # noqa: F401
        from huggingface_hub.errors import RemoteEntryNotFoundError  # noqa: F401 - versions before 1.0 do not have it
    except ImportError as error:
        install = "python -m pip install 'pygpt[hub]'"
        raise ImportError(f"downloads need huggingface_hub, which cannot be imported ({error}): {install}") from error
    except ValueError as error:  # HF_HUB_ETAG_TIMEOUT=soon
        raise InputError(f"huggingface_hub does not accept a variable HF_...: {error}") from error


@contextmanager
def _warnings_to(note: Callable[[str], None]) -> Iterator[None]:
    """Pass huggingface_hub's log messages and warnings to note() while the block runs, above the progress bar."""
    from huggingface_hub.utils.tqdm import tqdm

    def emit(record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(sys.stderr):
            note(record.getMessage())

    logger, handler = logging.getLogger("huggingface_hub"), logging.Handler()
    handler.emit = emit  # type: ignore[method-assign]
    before, logger.handlers = logger.handlers, [handler]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
            yield
    finally:
        logger.handlers = before
