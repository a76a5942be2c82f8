"""GPT-2's family in Hugging Face's transformers, and in nanoGPT's layout: use a folder or a file as it is, write a folder.

The files have other names than ours, and separate tensors for each layer. The four weights of transformers' Conv1D have shape
(in, out); ours and nanoGPT's have (out, in). The causal mask of older files is ignored. A model without any bias has zero
biases. Refuses models that the kernels would compute differently, and tensors that are missing, unknown or of another shape.
Source: transformers, models/gpt2/modeling_gpt2.py and configuration_gpt2.py; nanoGPT, model.py."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..config import Config
from ..cpus import resolve_threads
from ..errors import CheckpointError, Closing, InputError, PyGPTError, shown
from ..pool import ThreadPool
from .dtypes import Format, ModelFile, common_format, layout
from .files import is_pickle, reason, small_file
from .safetensors import FORMATS, SafetensorsFile, parse_object, write_safetensors

CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX, ADAPTER_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json"
JSON_LIMIT = 1 << 22  # bytes of config.json or an index: far more than any GPT-2 needs
PREFIX, PREFIXES, HEAD = "transformer.", r"^(_orig_mod\.|module\.|transformer\.)+", "lm_head.weight"

# By our tensor name: the name in the files, {} standing for the layer, and whether transformers' files have shape (in, out).
PARTS = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc", "fcproj": "mlp.c_proj"}
NAMES = {"wte": ("wte.weight", False), "wpe": ("wpe.weight", False), "head": (HEAD, False)}
NAMES |= {"lnfw": ("ln_f.weight", False), "lnfb": ("ln_f.bias", False)}
NAMES |= {f"{ours}w": (f"h.{{}}.{theirs}.weight", "c_" in theirs) for ours, theirs in PARTS.items()}
NAMES |= {f"{ours}b": (f"h.{{}}.{theirs}.bias", False) for ours, theirs in PARTS.items()}
MASKS = ("h.{}.attn.bias", "h.{}.attn.masked_bias")

# All that a config.json may say: our name in Config, and its names there. The first is written, the others are read as well.
SETTINGS: dict[str, tuple[str, ...]] = {
    "maxT": ("n_positions", "max_position_embeddings", "block_size"),
    "V": ("vocab_size",),
    "L": ("n_layer", "num_hidden_layers"),
    "NH": ("n_head", "num_attention_heads"),
    "C": ("n_embd", "hidden_size"),
    "F": ("n_inner",),
    "activation": ("activation_function",),
    "epsilon": ("layer_norm_epsilon",),
    "scaled": ("scale_attn_weights",),
    "scaled_by_layer": ("scale_attn_by_inverse_layer_idx",),
    "tied": ("tie_word_embeddings",),
}
NANOGPT = "block_size"  # nanoGPT's settings have this name, and no model_type
DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
MERGE = "belongs to an adapter: merge it into its model (merge_and_unload of PEFT), then save_pretrained"
WAY_OUT = "use the same model's model.safetensors, or let transformers write it (save_pretrained)"
PICKLE = "a PyTorch pickle: loading it can run any code, so only torch reads it (weights_only=True), which is not installed: "
PICKLE += f"{WAY_OUT}, or install torch"
KNOWN_HEADS = {(6, 768): 12, (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}  # by (L, C): OpenAI's, distilgpt2


class PickleFile(Closing):
    """The tensors of a PyTorch file, with SafetensorsFile's interface. Raises CheckpointError if torch refuses the file.

    Loading a pickle can run any code. torch's unpickler for weights accepts only tensors and plain values, so pygpt never uses
    another one. nanoGPT's checkpoints hold the weights as `model` and the settings as `model_args`."""

    def __init__(self, path: str) -> None:
        try:
            import torch
        except ImportError:
            raise CheckpointError(f"{path}: {PICKLE}") from None
        self.path, self.size = path, os.path.getsize(path)
        try:
            found = self._load(torch)
        except Exception as error:  # torch raises errors of many kinds for other files
            words = re.split(r"\n|\. ", reason(error).strip())[0].rstrip(".:")[:200]
            raise CheckpointError(f"{path}: torch cannot read this file with weights_only=True ({words}): {WAY_OUT}") from error
        self.metadata: dict[str, str] = {}
        if isinstance(found, dict) and isinstance(found.get("model"), dict):  # nanoGPT's checkpoint
            if isinstance(found.get("model_args"), dict):
                self.metadata["config.json"] = json.dumps(found["model_args"])
            found = found["model"]
        values = found if isinstance(found, dict) else {}
        self._values = {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}
        self.tensors = {
            name: (DTYPES.get(kind := str(value.dtype), kind), tuple(value.shape), 0) for name, value in self._values.items()
        }

    def _load(self, torch: Any) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before zip files cannot be mapped
            return torch.load(self.path, map_location="cpu", weights_only=True)

    def stored(self, name: str, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Return a tensor, or some of its rows, as SafetensorsFile.stored() does."""
        import torch

        value = self._values[name].detach()[rows].contiguous()
        if value.dtype == torch.bfloat16:
            value = value.view(torch.int16)
        array: npt.NDArray[Any] = value.numpy()
        return array.view(FORMATS[self.tensors[name][0]].dtype).reshape(-1, *self.tensors[name][1][1:])

    def close(self) -> None:
        """Release the tensors; arrays of them stay valid."""
        self._values = {}


Tensors = SafetensorsFile | PickleFile


class HuggingFaceModel(ModelFile):
    """An open model of transformers or nanoGPT: a folder with config.json and tensors, or one file of tensors.

    A file's folder may have a config.json, and a safetensors file's own metadata may hold its text, as Parameters.save() writes
    it. heads: the number of heads, needed only without settings, and only if the model does not have a known size. threads:
    workers that lay out the layers. mmap: use embeddings in place. Raises CheckpointError for a model that the kernels do not
    compute, InputError for a bad `heads`."""

    def __init__(self, path: str, *, heads: int | None = None, threads: SupportsIndex | None = None, mmap: bool = True) -> None:
        self.path, self.notice = path, ""
        self._files: dict[str, Tensors] = {}
        self._threads, self._mmap = threads, mmap
        try:
            self._open(heads)
        except BaseException:
            self.close()
            raise

    def _open(self, heads: int | None) -> None:
        is_folder = os.path.isdir(self.path)
        folder = self.path if is_folder else os.path.dirname(self.path)
        place = os.path.join(folder, CONFIG_FILE)
        if is_folder and os.path.exists(os.path.join(folder, ADAPTER_FILE)):
            raise self._bad(f"{ADAPTER_FILE} {MERGE}")
        if is_folder and not os.path.exists(place):
            raise CheckpointError(f"{folder}: {CONFIG_FILE} is missing: give the folder or file of a model")
        for name in find_files(folder) if is_folder else [os.path.basename(self.path)]:
            file = os.path.join(folder, name)
            self._files[name] = PickleFile(file) if is_pickle(file) else SafetensorsFile(file)
        if is_folder:
            _check_index(folder, self._files)
        self._tensors: dict[str, tuple[Tensors, str]] = {}  # by name without prefixes: the file and the full name
        for tensors in self._files.values():
            for name in tensors.tensors:
                short = re.sub(PREFIXES, "", name)
                if ".lora_" in name:
                    raise self._bad(f"tensor {name[:80]!r} {MERGE}")
                if short in self._tensors:
                    raise self._bad(f"tensor {short} occurs twice")
                self._tensors[short] = tensors, name
        if "wte.weight" not in self._tensors and HEAD in self._tensors:  # safetensors.torch.save_model keeps one of two names
            self._tensors["wte.weight"] = self._tensors.pop(HEAD)
        shape = self._shape("h.0.attn.c_attn.weight")
        self._linear = len(shape) == 2 and shape[0] == 3 * shape[1]  # nanoGPT's matrices are (out, in); qkv's is not square
        self._unbiased = not any(name.endswith(".bias") and not name.endswith(".attn.bias") for name in self._tensors)
        inside = next(iter(self._files.values())).metadata.get(CONFIG_FILE)
        if not inside and not os.path.exists(place):
            self.config = self._guess(heads)
        elif heads is not None:
            raise InputError(f"{self.path}: {CONFIG_FILE} contains the number of heads: leave out --heads")
        else:
            settings = parse_object(inside.encode(), self.path) if inside else read_json(place)
            self.config = read_settings(settings, self.path, tied=self._tied())
        self.formats = self._check()

    def _shape(self, name: str) -> tuple[int, ...]:
        file, full = self._tensors.get(name, (None, ""))
        return () if file is None else file.tensors[full][1]

    def _tied(self) -> bool:
        """Return whether the head is wte: the files have no head, or one of the same bits."""
        if HEAD not in self._tensors:
            return True
        (file, full), (own, wte) = self._tensors[HEAD], self._tensors["wte.weight"]
        same = file.tensors[full][:2] == own.tensors[wte][:2]
        return same and _bytes(file.stored(full)) == _bytes(own.stored(wte))

    def _guess(self, heads: int | None) -> Config:
        """Return the dimensions, from the tensors' shapes. The number of heads cannot be read from the shapes."""
        for name in ("wte.weight", "wpe.weight"):
            if len(self._shape(name)) != 2:
                raise self._bad(f"tensor {name} is missing or does not have two dimensions")
        (V, C), (maxT, _) = self._shape("wte.weight"), self._shape("wpe.weight")
        L = 1 + max((int(match[1]) for name in self._tensors if (match := re.match(r"h\.(\d{1,6})\.", name))), default=-1)
        F = self._shape("h.0.mlp.c_fc.weight")[0 if self._linear else -1 :][:1]
        assumed = []
        if heads is None:
            if (L, C) not in KNOWN_HEADS:
                way = f"add {CONFIG_FILE}, or give `pygpt convert` --heads N"
                raise InputError(f"{self.path}: the number of heads is unknown: {way}")
            heads = KNOWN_HEADS[L, C]
            assumed.append(f"{heads} heads, as in GPT-2 with {L} layers and {C} channels")
        activation = "gelu" if self._linear else "gelu_new"
        if self._linear:
            assumed.append("the activation gelu, as in nanoGPT")
        if assumed:
            self.notice = f"without {CONFIG_FILE}, assuming {' and '.join(assumed)}"
        try:
            return Config(maxT=maxT, V=V, L=L, NH=heads, C=C, F=next(iter(F), None), activation=activation, tied=self._tied())
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from None

    def _check(self) -> dict[str, Format]:
        """Check names, shapes and dtypes of all tensors against the dimensions. Return the format of each of ours."""
        wanted = {name: _theirs(name, shape, linear=self._linear) for name, shape, _, _ in self.config.tensors(padded=False)}
        if self._unbiased:
            wanted |= {name: {} for name in wanted if name.endswith("b")}
        dropped = {mask.format(layer) for mask in MASKS for layer in range(self.config.L)}
        dropped |= {HEAD} if self.config.tied else set()
        found = {name: file.tensors[full][:2] for name, (file, full) in self._tensors.items() if name not in dropped}
        self._check_tensors(wanted, {name: shape for name, (_, shape) in found.items()})
        if wrong := sorted((dtype, name) for name, (dtype, _) in found.items() if dtype not in FORMATS):
            raise self._bad(f"tensor {wrong[0][1]} is of dtype {wrong[0][0]}, expected {', '.join(FORMATS)}")
        formats = {name: common_format(FORMATS[found[one][0]] for one in theirs) for name, theirs in wanted.items()}
        return {name: formats[name if theirs else "qkvw"] for name, theirs in wanted.items()}

    @property
    def size(self) -> int:
        """The size of all its files in bytes."""
        return sum(file.size for file in self._files.values())

    @property
    def has_vocabulary(self) -> bool:
        """Whether the first file has a tokenizer.json in its metadata."""
        return "tokenizer.json" in next(iter(self._files.values())).metadata

    def _parts(self, name: str) -> list[tuple[Tensors, str]]:
        """The files and full names of a tensor's layers; [] for biases that the model does not have."""
        if self._unbiased and name.endswith("b"):
            return []
        layers, _, _ = layout(self.config, name)
        return [self._tensors[NAMES[name][0].format(layer)] for layer in range(layers)]

    def part(self, name: str, layer: int, start: int, stop: int) -> tuple[Format, npt.NDArray[Any]]:
        """Return rows [start, stop) of one layer's part of a tensor: ModelFile.part()."""
        _, _, K = layout(self.config, name)
        if not (parts := self._parts(name)):
            return self.formats[name], np.zeros((1, K), self.formats[name].dtype)
        file, full = parts[layer]
        if NAMES[name][1] and not self._linear:
            array = np.ascontiguousarray(file.stored(full).T[start:stop])  # [K, N] -> [rows, K]
        elif len(file.tensors[full][1]) == 1:
            array = file.stored(full)[None]
        else:
            array = file.stored(full, slice(start, stop))
        return FORMATS[file.tensors[full][0]], array

    def stored(self) -> dict[str, tuple[str, memoryview]]:
        """Map each tensor to its format's name and its bytes, as Weights takes them.

        wte, wpe and a head are the bytes of the file. The layers' matrices are laid out in memory, on all workers at once."""
        from .._kernels import Floats, transpose

        found: dict[str, tuple[str, memoryview]] = {}
        moves: list[tuple[tuple[Tensors, str], Format, memoryview]] = []  # a layer's matrix, its format and its new place
        for name, shape, _, size in self.config.tensors(padded=False):
            parts, kind = self._parts(name), self.formats[name]
            if NAMES[name][1]:
                memory = memoryview(Floats(1, -(-kind.size(size) // 4), dense=True)).cast("B")[: kind.size(size)]
                step = len(memory) // len(parts)
                moves += [(part, kind, memory[i * step : (i + 1) * step]) for i, part in enumerate(parts)]
            else:
                arrays = [self._values(part, kind) for part in parts] or [np.zeros(shape, kind.dtype)]
                whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
                memory = _bytes(_aligned(whole) if self._mmap else whole.copy())
            found[name] = kind.name, memory

        def job(ith: int, nth: int) -> None:
            for part, kind, to in moves:
                count = part[0].tensors[part[1]][1][0]
                start, stop = count * ith // nth, count * (ith + 1) // nth
                rows = _aligned(self._values(part, kind, slice(start, stop)))
                if self._linear:
                    to[start * rows.strides[0] : stop * rows.strides[0]] = _bytes(rows)
                elif start < stop:
                    transpose(to, rows.view("u1"), rows.itemsize, count, start)

        with ThreadPool(resolve_threads(self._threads)) as pool:
            pool.run(job)
        return found

    def _values(self, part: tuple[Tensors, str], kind: Format, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Some rows of one tensor of the files in a format: a view if they have it."""
        file, full = part
        found, array = FORMATS[file.tensors[full][0]], file.stored(full, rows)
        return array if found == kind else found.to_float32(array)

    def close(self) -> None:
        """Close the files. May be called twice."""
        for file in self._files.values():
            file.close()


def write_model(folder: str, model: ModelFile, kind: Format) -> None:
    """Write a model as a folder that transformers loads: its config, its tokenizer, and its tensors in a weight format.

    A tokenizer that pygpt does not know is left out. The folder gets its name only when it is complete. Raises PyGPTError if it
    cannot be written, and then deletes it."""
    temporary = f"{folder}.{os.urandom(4).hex()}.tmp"
    try:
        os.mkdir(temporary)
        for name, content in _texts(model.config, kind.name).items():
            with open(os.path.join(temporary, name), "xb") as text:
                text.write(content)
        with open(os.path.join(temporary, MODEL_FILE), "xb") as file:
            write_tensors(file, model, kind)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder)
    except OSError as error:
        raise PyGPTError(f"{folder}: cannot write the model: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _texts(config: Config, dtype: str) -> dict[str, bytes]:
    from ..tokenizer import GPT2_V, tokenizer_of
    from .vocabulary import tokenizer_files

    tokenizer = tokenizer_of(config) if config.tokenizer is not None or config.V >= GPT2_V else None
    settings = settings_of(config, dtype, None if tokenizer is None else tokenizer.eot)
    ends = {name: settings[name] for name in ("bos_token_id", "eos_token_id")}
    files = {CONFIG_FILE: settings, "generation_config.json": {"_from_model_config": True, **ends}}
    texts = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in files.items()}
    return texts | ({} if tokenizer is None else tokenizer_files(tokenizer, config.maxT))


def write_tensors(file: IO[bytes], model: ModelFile, kind: Format, metadata: dict[str, str] | None = None) -> None:
    """Write the tensors of a model to an open file as safetensors with transformers' names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape, _, _ in model.config.tensors(padded=False):
        prefix = "" if name == "head" else PREFIX
        shapes.update({prefix + theirs: found for theirs, found in _theirs(name, shape).items()})

    def values() -> Iterator[npt.NDArray[np.float32]]:
        for name, _ in model.config.table:
            for piece in model.pieces(name):
                yield piece.transpose(0, 2, 1) if NAMES[name][1] else piece

    dtype = next(dtype for dtype, row in FORMATS.items() if row == kind)
    write_safetensors(file, dtype, list(shapes.items()), values(), metadata)


def _theirs(name: str, shape: tuple[int, ...], *, linear: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that one of our tensors has in the files."""
    theirs, transposed = NAMES[name]
    if "{}" not in theirs:
        return {theirs: shape}
    layers, *rest = shape
    return {theirs.format(layer): tuple(reversed(rest) if transposed and not linear else rest) for layer in range(layers)}


def _aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a contiguous array whose values have aligned addresses: a file may place them anywhere."""
    return array.copy() if array.ctypes.data % array.itemsize else np.ascontiguousarray(array)


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view("u1").data


def read_settings(settings: dict[str, Any], place: str, *, tied: bool = True) -> Config:
    """Return the config in config.json. Raises CheckpointError for settings that the kernels do not compute.

    tied: whether the files have no head, or one that equals wte. A head that differs is used even if the settings tie it."""
    where = f"{place}: {CONFIG_FILE}"
    if settings.get("model_type", "gpt2" if NANOGPT in settings else None) != "gpt2":
        raise CheckpointError(f"{where}: model_type is {shown(settings.get('model_type'))}, expected 'gpt2'")
    if settings.get("add_cross_attention", False) is not False:
        found = shown(settings["add_cross_attention"])
        raise CheckpointError(f"{where}: add_cross_attention is {found}, expected False: only that is supported")
    given: dict[str, Any] = dict.fromkeys(("maxT", "V", "L", "NH", "C"))
    given |= {"activation": "gelu"} if NANOGPT in settings else {}
    for ours, names in SETTINGS.items():
        given.update((ours, settings[name]) for name in reversed(names) if name in settings)
    if given.get("tied") is True and not tied:
        given["tied"] = False
    try:
        return Config(**{"tied": tied, **given})
    except InputError as error:
        meaning = ", ".join(f"{ours} is {SETTINGS[ours][0]} there" for ours in SETTINGS if str(error).startswith(f"{ours} "))
        raise CheckpointError(f"{where}: {error} ({meaning})") from None


def settings_of(config: Config, dtype: str, end: int | None = None) -> dict[str, object]:
    """Return config.json for a model of this config and this weight format. end: the id that ends a text."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": dtype,
        **{names[0]: getattr(config, ours) for ours, names in SETTINGS.items()},
        "n_inner": None if config.F == 4 * config.C else config.F,
        **dict.fromkeys(("add_cross_attention", "reorder_and_upcast_attn"), False),
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1),
        "initializer_range": 0.02,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        "use_cache": True,
    }


def find_files(folder: str) -> list[str]:
    """Return the names of a folder's safetensors files: model.safetensors, else the shards in its index."""
    for file, index in (MODEL_FILE, INDEX_FILE), (PICKLE_FILE, PICKLE_INDEX):
        if os.path.exists(os.path.join(folder, file)):
            return [file]
        if os.path.exists(os.path.join(folder, index)):
            return sorted(set(_read_index(folder, index).values()))
    raise CheckpointError(f"{folder}: expected {MODEL_FILE} or {INDEX_FILE} in it: let transformers write it (save_pretrained)")


def _read_index(folder: str, index: str) -> dict[str, str]:
    """Read the index: map each tensor to its shard. An index can only name files in its own folder."""
    path = os.path.join(folder, index)
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path}: it has no weight_map from tensors to files")
    for name in places.values():
        if not re.fullmatch(rf"[\w.-]+\.{index.split('.')[1]}", name, re.ASCII):
            raise CheckpointError(f"{path}: {name[:80]!r} is not the name of a {index.split('.')[1]} file in this folder")
    return places


def _check_index(folder: str, files: Mapping[str, Tensors]) -> None:
    """Raise CheckpointError unless the shards contain exactly the tensors that their index lists."""
    if MODEL_FILE in files or PICKLE_FILE in files:
        return
    index = INDEX_FILE if os.path.exists(os.path.join(folder, INDEX_FILE)) else PICKLE_INDEX
    places = _read_index(folder, index)
    path = os.path.join(folder, index)
    found = {(tensor, name) for name, file in files.items() for tensor in file.tensors}
    for tensor, name in sorted(places.items() ^ found):
        words = "in {}, but the index does not list" if (tensor, name) in found else "not in {}, but the index lists"
        raise CheckpointError(f"{path}: tensor {tensor[:80]!r} is {words.format(name)} it there")


def read_json(path: str) -> dict[str, Any]:
    """Read a config.json or an index. Raises CheckpointError."""
    return parse_object(small_file(path, "model's settings", CheckpointError, JSON_LIMIT), path)
