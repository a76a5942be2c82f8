"""Find the model file to use, and the folder of downloaded models. Neither opens a file nor imports code that downloads."""

import os
import re
import sys

from ..errors import CheckpointError, InputError

GPT2_FILE = "gpt2_124M.bin"
EMBEDDED_MODEL = os.path.join(os.path.dirname(os.path.dirname(__file__)), "data", "shakespeare.bin")

# `pygpt download` fetches a name, or a repository OWNER/NAME. @REVISION (a branch, tag or commit) may follow.
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "gpt2_124M", "gpt2_124M_bf16")
PART = r"\w(?:[\w.+-]{0,94}\w)?"
OPENAI = "openai-community"  # the owner of the models that have a name without an owner, and the exception:
OWNERS = {"distilgpt2": "distilbert"}
DOWNLOADABLE = rf"(?:{'|'.join(MODELS)}|{PART}/{PART})(?:@{PART}(?:/{PART}){{0,2}})?"


def find_model(path: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Return (path, origin) of the model to use: `path`, else PYGPT_MODEL, else ./gpt2_124M.bin, else the embedded model.

    A path that does not exist can be the name of a downloaded model, one of MODELS or a repository. pygpt looks for it in its
    own cache folder and in huggingface_hub's. origin is "given", "PYGPT_MODEL", "folder" or "embedded". The file is not opened.
    Raises CheckpointError for a file or model that does not exist, and InputError for a name if there is no cache folder."""
    via = ""
    if path is not None:
        name, origin = os.fspath(path), "given"
        if not name:
            raise CheckpointError(f"the model's name is empty: give the path of a file such as {GPT2_FILE}")
    elif name := os.environ.get("PYGPT_MODEL", ""):
        origin, via = "PYGPT_MODEL", " (named by PYGPT_MODEL)"
    elif os.path.lexists(GPT2_FILE):
        name, origin = GPT2_FILE, "folder"
    else:
        return EMBEDDED_MODEL, "embedded"
    if not os.path.isfile(name) and not os.path.isfile(os.path.join(name, "config.json")) and is_downloadable(name):
        if fetched := next((path for path in (cached_model(name), snapshot(name)) if path and os.path.exists(path)), ""):
            return fetched, origin
        if not os.path.exists(name):
            raise CheckpointError(f"{name}{via}: not a file and not a downloaded model: run `pygpt download {name}` first")
    if not os.path.exists(name):
        raise CheckpointError(f"{name}{via}: no such model file; give a file such as {GPT2_FILE}, or a folder")
    return name, origin


def is_downloadable(name: str) -> bool:
    """Return whether `pygpt download` accepts this name. A name with the extension of a model file is a path instead."""
    path = name.endswith((".bin", ".safetensors", ".git")) or "--" in name
    return not path and re.fullmatch(DOWNLOADABLE, name, re.ASCII) is not None


def cached_model(name: str) -> str:
    """Return the path of a downloaded model, for a name that is_downloadable() accepts."""
    return os.path.join(cache_folder(), f"{name.replace('/', '--')}.bin")


def repository_of(model: str) -> str:
    """Return the repository OWNER/NAME on Hugging Face of a name without a revision."""
    return model if "/" in model else f"{OWNERS.get(model, OPENAI)}/{model}"


def snapshot(name: str) -> str:
    """Return the folder of a model in huggingface_hub's cache, for a name that is_downloadable() accepts, or "" without one."""
    model, _, revision = name.partition("@")
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    for repository in (repository_of(model), model):
        folder = os.path.join(cache, f"models--{repository.replace('/', '--')}")
        try:
            with open(os.path.join(folder, "refs", *(revision or "main").split("/")), encoding="ascii") as file:
                commit = file.read().strip()
        except (OSError, ValueError):
            commit = revision  # a commit has no reference
        found = os.path.join(folder, "snapshots", commit)
        if re.fullmatch("[0-9a-f]{40}", commit) and os.path.isfile(os.path.join(found, "config.json")):
            return found
    return ""


def cache_folder() -> str:
    """Return the folder of downloaded models: PYGPT_HOME, else pygpt in the user's cache folder on this system.

    Raises InputError if that folder begins with ~ and the user has no home folder."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    caches = "~/Library/Caches" if sys.platform == "darwin" else caches if os.path.isabs(caches) else "~/.cache"
    folder = os.environ.get("PYGPT_HOME") or os.path.join(caches, "pygpt")
    if (found := os.path.expanduser(folder)).startswith("~"):
        raise InputError(f"{folder}: the user does not have a home folder: set PYGPT_HOME to the folder for downloaded models")
    return found
