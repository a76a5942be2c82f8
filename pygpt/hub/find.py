"""Which model file answers, and where downloaded models lie. Opens no file."""

import os
import sys

from ..errors import CheckpointError

GPT2_FILE = "gpt2_124M.bin"
EMBEDDED_MODEL = os.path.join(os.path.dirname(os.path.dirname(__file__)), "data", "shakespeare.bin")

# The names by which `pygpt download` fetches models. Where no file has such a name, they mean the downloaded models.
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2_124M", "gpt2_124M_bf16")


def find_model(path: str | os.PathLike[str] | None = None) -> tuple[str, str]:
    """Say which model answers: `path`, else PYGPT_MODEL, else ./gpt2_124M.bin, else the small embedded model.

    A path may also be one of MODELS. Returns (path, origin) with origin "given", "PYGPT_MODEL", "folder" or "embedded". The
    file is not opened. Raises CheckpointError when the named file does not exist.
    """
    if path is not None:
        name, origin, via = os.fspath(path), "given", ""
        if not name:
            raise CheckpointError(f"the model's name is empty: no such model file; give the path of one such as {GPT2_FILE}")
    elif os.environ.get("PYGPT_MODEL"):
        name, origin, via = os.environ["PYGPT_MODEL"], "PYGPT_MODEL", " (named by PYGPT_MODEL)"
    elif os.path.lexists(GPT2_FILE):
        name, origin, via = GPT2_FILE, "folder", ""
    else:
        return EMBEDDED_MODEL, "embedded"
    if name in MODELS and not os.path.isfile(name):
        fetched = cached_model(name)
        if not os.path.exists(fetched):
            raise CheckpointError(f"{name}{via}: not downloaded yet: run `pygpt download {name}` first")
        return fetched, origin
    if not os.path.exists(name):
        raise CheckpointError(f"{name}{via}: no such model file; give the path of an llm.c checkpoint such as {GPT2_FILE}")
    return name, origin


def cached_model(name: str) -> str:
    """Where a model of this name is once it was fetched."""
    return os.path.join(cache_folder(), f"{name}.bin")


def cache_folder() -> str:
    """Where fetched models are: PYGPT_HOME, else pygpt in the user's folder for caches on this system."""
    if home := os.environ.get("PYGPT_HOME"):
        return home
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Caches/pygpt")
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(caches if os.path.isabs(caches) else os.path.expanduser("~/.cache"), "pygpt")
