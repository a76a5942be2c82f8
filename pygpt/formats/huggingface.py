"""GPT-2 models of Hugging Face's transformers: read and write a folder with config.json and safetensors.

The files have other names than ours, and separate tensors for each layer. The four weights of transformers' Conv1D have shape
(in, out); ours have (out, in). The code reads one layer at a time, or some rows of an embedding, so any model fits in memory.
The prefix `transformer.` of names is optional. The causal mask of older files is ignored.

Refuses models that the kernels would compute differently, for example with another activation or epsilon, a separate head, or
cross-attention. Refuses tensors that are missing, unknown or of another shape, and pickles, because loading a pickle can run
any code. Source: transformers, models/gpt2/modeling_gpt2.py and configuration_gpt2.py.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from math import prod

from ..config import Config
from ..errors import CheckpointError, InputError, PyGPTError, Uncopied
from . import dtypes
from .files import reason
from .safetensors import FORMATS, SafetensorsFile, parse_object, write_safetensors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    from .checkpoint import Checkpoint
    from .dtypes import Format
    from .panels import ModelFile

CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
JSON_LIMIT = 1 << 22  # bytes of config.json or an index: far more than any GPT-2 needs
PREFIX, HEAD = "transformer.", "lm_head.weight"

# By our tensor name: the name in the files, with {} for the layer, and whether the files have shape (in, out).
NAMES: dict[str, tuple[str, bool]] = {
    "wte": ("wte.weight", False),
    "wpe": ("wpe.weight", False),
    "ln1w": ("h.{}.ln_1.weight", False),
    "ln1b": ("h.{}.ln_1.bias", False),
    "qkvw": ("h.{}.attn.c_attn.weight", True),
    "qkvb": ("h.{}.attn.c_attn.bias", False),
    "attprojw": ("h.{}.attn.c_proj.weight", True),
    "attprojb": ("h.{}.attn.c_proj.bias", False),
    "ln2w": ("h.{}.ln_2.weight", False),
    "ln2b": ("h.{}.ln_2.bias", False),
    "fcw": ("h.{}.mlp.c_fc.weight", True),
    "fcb": ("h.{}.mlp.c_fc.bias", False),
    "fcprojw": ("h.{}.mlp.c_proj.weight", True),
    "fcprojb": ("h.{}.mlp.c_proj.bias", False),
    "lnfw": ("ln_f.weight", False),
    "lnfb": ("ln_f.bias", False),
}
MASKS = ("h.{}.attn.bias", "h.{}.attn.masked_bias")

# The names of our dimensions in config.json; and the settings that change the computation, with their allowed values.
DIMENSIONS = {"maxT": "n_positions", "V": "vocab_size", "L": "n_layer", "NH": "n_head", "C": "n_embd"}
SETTINGS: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
KNOWN_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # by (L, C): OpenAI's four sizes


class HuggingFaceModel(Uncopied):
    """An open model with `config`, and with pieces() of its tensors by our names. Use it in a `with` block, or close() it.

    files: the safetensors files by path. settings: the contents of config.json, or None without that file. heads: the number
    of heads, needed only without settings, and only if the model does not have one of OpenAI's sizes. place: the model's
    name in messages. Raises CheckpointError for a model that the kernels do not compute, InputError for a bad `heads`.
    """

    def __init__(
        self, files: "Mapping[str, SafetensorsFile]", settings: "dict[str, Any] | None", *, place: str, heads: int | None = None
    ) -> None:
        self.place, self.notice = place, ""
        self._files = files
        self._tensors: dict[str, tuple[SafetensorsFile, str]] = {}  # by name without prefix: the file and the full name
        for file in files.values():
            for name in file.tensors:
                short = name.removeprefix(PREFIX)
                if short in self._tensors:
                    raise self._bad(f"tensor {short} occurs twice")
                self._tensors[short] = file, name
        if settings is None:
            self.config = self._guess(heads)
        elif heads is not None:
            raise InputError(f"{place}: {CONFIG_FILE} contains the number of heads: leave out --heads")
        else:
            self.config = read_settings(settings, place)
        found = self._check()
        self.dtype = "mixed" if len(found) > 1 else FORMATS[found.pop()].name

    @classmethod
    def open(cls, path: str, *, heads: int | None = None) -> "HuggingFaceModel":
        """Open a folder with config.json and safetensors, or one safetensors file, whose folder may have a config.json."""
        with ExitStack() as opened:
            if os.path.isdir(path):
                folder = path
                if not os.path.exists(os.path.join(folder, CONFIG_FILE)):
                    raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing: give the folder or file of a model")
                files = {name: opened.enter_context(SafetensorsFile(os.path.join(folder, name))) for name in find_files(folder)}
                _check_index(folder, files)
            else:
                folder = os.path.dirname(path)
                files = {path: opened.enter_context(SafetensorsFile(path))}
            settings = os.path.join(folder, CONFIG_FILE)
            found = _read_json(settings) if os.path.exists(settings) else None
            model = cls(files, found, place=path, heads=heads)
            opened.pop_all()
        return model

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.place}: not a GPT-2 model: {what}")

    def _guess(self, heads: int | None) -> Config:
        """Return the dimensions, from the tensors' shapes. The number of heads cannot be read from the shapes."""
        shapes = {name: file.tensors[full][1] for name, (file, full) in self._tensors.items()}
        for name in ("wte.weight", "wpe.weight"):
            if len(shapes.get(name, ())) != 2:
                raise self._bad(f"tensor {name} is missing or does not have two dimensions")
        (V, C), (maxT, _) = shapes["wte.weight"], shapes["wpe.weight"]
        L = 1 + max((int(match[1]) for name in shapes if (match := re.match(r"h\.(\d{1,6})\.", name))), default=-1)
        if heads is None:
            if (L, C) not in KNOWN_HEADS:
                raise InputError(f"{self.place}: the number of heads is unknown without {CONFIG_FILE}: give --heads N")
            heads = KNOWN_HEADS[L, C]
            self.notice = f"without {CONFIG_FILE}, assuming {heads} heads, as in GPT-2 with {L} layers and {C} channels"
        try:
            return Config(maxT=maxT, V=V, L=L, NH=heads, C=C)
        except InputError as error:
            raise InputError(f"{self.place}: {error}") from None

    def _check(self) -> set[str]:
        """Check names, shapes and dtypes of all tensors against the dimensions; return the dtypes."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, shape, _, _ in self.config.tensors(padded=False):
            wanted.update(_theirs(name, shape))
        for name, shape in wanted.items():
            if name not in self._tensors:
                raise self._bad(f"tensor {name} is missing")
            file, full = self._tensors[name]
            if file.tensors[full][1] != shape:
                raise self._bad(f"tensor {name} has shape {file.tensors[full][1]}, expected {shape} for {self.config}")
        dropped = {mask.format(layer) for mask in MASKS for layer in range(self.config.L)}
        if unknown := sorted(self._tensors.keys() - wanted.keys() - dropped - {HEAD}):
            raise self._bad(f"tensor {unknown[0][:80]!r} is unknown in a model with {self.config}")
        found = {file.tensors[full][0] for file, full in map(self._tensors.__getitem__, wanted)}
        if wrong := sorted(found - FORMATS.keys()):
            name = next(name for name in wanted if self._tensors[name][0].tensors[self._tensors[name][1]][0] == wrong[0])
            raise self._bad(f"tensor {name} is of dtype {wrong[0]}, expected {', '.join(FORMATS)}")
        self._check_head()
        return found

    def _check_head(self) -> None:
        """Raise CheckpointError if the head differs from wte, because the kernels use wte as the head."""
        import numpy as np

        if HEAD not in self._tensors:
            return
        (file, full), (own, wte) = self._tensors[HEAD], self._tensors["wte.weight"]
        if file.tensors[full][:2] != own.tensors[wte][:2]:
            raise self._bad(f"{HEAD} is {file.tensors[full][:2]}, but wte.weight is {own.tensors[wte][:2]}: they must be equal")
        pairs = zip(_rows(file, full), _rows(own, wte), strict=True)
        if not all(np.array_equal(one.view("<u4"), other.view("<u4")) for one, other in pairs):
            raise self._bad(f"{HEAD} differs from wte.weight: a separate head is not supported")

    @property
    def paths(self) -> list[str]:
        """The paths of the safetensors files."""
        return [file.path for file in self._files.values()]

    @property
    def size(self) -> int:
        """The size of all its files in bytes."""
        return sum(file.size for file in self._files.values())

    def pieces(self, name: str) -> "Iterator[npt.NDArray[np.float32]]":
        """Yield our tensor `name` as float32 in order: some rows of an embedding at a time, else one layer at a time."""
        theirs, transposed = NAMES[name]
        if "{}" not in theirs:
            yield from _rows(*self._tensors[theirs])
            return
        for layer in range(self.config.L):
            file, full = self._tensors[theirs.format(layer)]
            array = file.tensor(full)
            yield (array.T if transposed else array)[None]

    def close(self) -> None:
        """Close the files. May be called twice."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "HuggingFaceModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_model(folder: str, checkpoint: "Checkpoint | ModelFile", kind: "Format") -> None:
    """Write an open model as a folder that transformers loads: config.json, and model.safetensors in a format of single values.

    The folder gets its name only when it is complete. Raises PyGPTError if it cannot be written, and then deletes it.
    """
    temporary = f"{folder}.{os.urandom(4).hex()}.tmp"
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape, _, _ in checkpoint.config.tensors(padded=False):
        shapes.update(_theirs(name, shape))
    try:
        os.mkdir(temporary)
        with open(os.path.join(temporary, CONFIG_FILE), "x", encoding="ascii") as text:
            text.write(json.dumps(settings_of(checkpoint.config, kind.name), indent=2) + "\n")
        with open(os.path.join(temporary, MODEL_FILE), "xb") as file:
            dtype = next(dtype for dtype, row in FORMATS.items() if row == kind)
            write_safetensors(file, dtype, [(PREFIX + name, shape) for name, shape in shapes.items()], _values(checkpoint))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder)
    except OSError as error:
        raise PyGPTError(f"{folder}: cannot write the model: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _values(checkpoint: "Checkpoint | ModelFile") -> "Iterator[npt.NDArray[np.float32]]":
    """Yield all values in the order of write_model()'s tensors."""
    for name, (_, transposed) in NAMES.items():
        for piece in checkpoint.pieces(name):
            yield piece.transpose(0, 2, 1) if transposed else piece


def _theirs(name: str, shape: tuple[int, ...]) -> "dict[str, tuple[int, ...]]":
    """Return the names and shapes that one of our tensors has in the files."""
    theirs, transposed = NAMES[name]
    if "{}" not in theirs:
        return {theirs: shape}
    layers, *rest = shape
    return {theirs.format(layer): tuple(reversed(rest) if transposed else rest) for layer in range(layers)}


def _rows(file: SafetensorsFile, name: str) -> "Iterator[npt.NDArray[np.float32]]":
    """Yield a tensor's rows as float32, some at a time."""
    _, shape, _ = file.tensors[name]
    step = max(1, dtypes.PIECE // prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield file.tensor(name, slice(start, start + step))


def read_settings(settings: "dict[str, Any]", place: str) -> Config:
    """Return the dimensions in config.json. Raises CheckpointError for settings that the kernels do not compute."""
    where = f"{place}: {CONFIG_FILE}"
    if settings.get("model_type") != "gpt2":
        raise CheckpointError(f"{where}: model_type is {_short(settings.get('model_type'))}, expected 'gpt2'")
    for key, allowed in SETTINGS.items():
        if key in settings and settings[key] not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise CheckpointError(f"{where}: {key} is {_short(settings[key])}, expected {expected}: only that is supported")
    try:
        config = Config(**{ours: settings.get(theirs) for ours, theirs in DIMENSIONS.items()})  # type: ignore[arg-type]
    except InputError as error:
        meaning = ", ".join(f"{ours} is {theirs} there" for ours, theirs in DIMENSIONS.items())
        raise CheckpointError(f"{where}: {error} ({meaning})") from None
    if settings.get("n_inner") not in (None, 4 * config.C):
        raise CheckpointError(f"{where}: n_inner is {_short(settings['n_inner'])}, expected null or {4 * config.C}")
    return config


def settings_of(config: Config, dtype: str) -> dict[str, object]:
    """Return config.json for a model of these dimensions and this weight format."""
    end = 50256 if config.V > 50256 else None  # <|endoftext|> of GPT-2's vocabulary
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        **{theirs: getattr(config, ours) for ours, theirs in DIMENSIONS.items()},
        "n_inner": None,
        **{key: allowed[0] for key, allowed in SETTINGS.items()},
        "reorder_and_upcast_attn": False,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
    }


def find_files(folder: str) -> list[str]:
    """Return the names of a folder's safetensors files: model.safetensors, else the shards in its index."""
    if os.path.exists(os.path.join(folder, MODEL_FILE)):
        return [MODEL_FILE]
    if os.path.exists(os.path.join(folder, INDEX_FILE)):
        return sorted(set(_read_index(folder).values()))
    if any(name.startswith("pytorch_model") for name in os.listdir(folder)):
        raise pickle_error(folder)
    raise CheckpointError(f"{folder}: expected {MODEL_FILE} or {INDEX_FILE} in it")


def _read_index(folder: str) -> dict[str, str]:
    """Read the index: map each tensor to its shard. An index can only name files in its own folder."""
    path = os.path.join(folder, INDEX_FILE)
    places = _read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path}: it has no weight_map from tensors to files")
    for name in places.values():
        if not re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{path}: {name[:80]!r} is not the name of a safetensors file in this folder")
    return places


def _check_index(folder: str, files: "Mapping[str, SafetensorsFile]") -> None:
    """Raise CheckpointError unless the shards contain exactly the tensors that their index lists."""
    if MODEL_FILE in files:
        return
    places = _read_index(folder)
    path = os.path.join(folder, INDEX_FILE)
    found = {(tensor, name) for name, file in files.items() for tensor in file.tensors}
    for tensor, name in sorted(places.items() - found):
        raise CheckpointError(f"{path}: tensor {tensor[:80]!r} is not in {name}, but the index lists it there")
    for tensor, name in sorted(found - places.items()):
        raise CheckpointError(f"{path}: tensor {tensor[:80]!r} is in {name}, but the index does not list it there")


def _read_json(path: str) -> "dict[str, Any]":
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a regular file")
    try:
        with open(path, "rb") as file:
            text = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {reason(error)}") from error
    return parse_settings(text, path)


def parse_settings(text: bytes, path: str) -> "dict[str, Any]":
    """Parse an untrusted config.json or index. Raises CheckpointError."""
    if len(text) > JSON_LIMIT:
        raise CheckpointError(f"{path}: longer than {JSON_LIMIT} bytes: too long for the settings of a model")
    return parse_object(text, path)


def pickle_error(place: str) -> CheckpointError:
    """Return the error for a pickle, with the reason and the way out."""
    return CheckpointError(
        f"{place}: a PyTorch pickle: loading it can run any code, so pygpt never does; use the same model's {MODEL_FILE}, or "
        "let transformers write it (save_pretrained)"
    )


def _short(value: object) -> str:
    return repr(value)[:60]
