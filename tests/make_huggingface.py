"""Write Hugging Face GPT-2 models by hand, and the .bin files of the same weights: a second opinion on both formats.

Needs only NumPy, and imports nothing from pygpt.
Sources: the description of the safetensors format; transformers, modeling_gpt2.py (Conv1D)."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from make_checkpoint import MAGIC, tensors, to_bfloat16

Array = npt.NDArray[Any]
Weights = dict[str, npt.NDArray[np.float32]]
Raw = tuple[str, tuple[int, ...], bytes]  # dtype, shape, data

SHAPE = {"L": 2, "NH": 2, "C": 6, "V": 130, "maxT": 5}
LAYER_NAMES = {
    "ln1w": "ln_1.weight",
    "ln1b": "ln_1.bias",
    "qkvw": "attn.c_attn.weight",
    "qkvb": "attn.c_attn.bias",
    "attprojw": "attn.c_proj.weight",
    "attprojb": "attn.c_proj.bias",
    "ln2w": "ln_2.weight",
    "ln2b": "ln_2.bias",
    "fcw": "mlp.c_fc.weight",
    "fcb": "mlp.c_fc.bias",
    "fcprojw": "mlp.c_proj.weight",
    "fcprojb": "mlp.c_proj.bias",
}


def weights(seed: int = 1, *, L: int, NH: int, C: int, V: int, maxT: int) -> Weights:
    """Return random weights by pygpt's names."""
    return dict(tensors(L, C, V, maxT, seed, 1.0))


def settings(*, L: int, NH: int, C: int, V: int, maxT: int) -> dict[str, Any]:
    """Return config.json as in OpenAI's models, without the keys that do not matter here."""
    return {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": maxT,
        "n_embd": C,
        "n_head": NH,
        "n_layer": L,
        "n_positions": maxT,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": V,
    }


def raw(array: npt.NDArray[np.float32], dtype: str) -> Raw:
    """Return float32 values as a file of this dtype stores them."""
    stored = to_bfloat16(array) if dtype == "BF16" else array.astype("<f2" if dtype == "F16" else "<f4")
    return dtype, array.shape, stored.tobytes()


def rounded(values: Weights, dtype: str) -> Weights:
    """Return the values after rounding to this dtype, as float32."""
    if dtype == "BF16":
        return {name: (to_bfloat16(array).astype("<u4") << 16).view("<f4") for name, array in values.items()}
    return {name: array.astype("<f2" if dtype == "F16" else "<f4").astype("<f4") for name, array in values.items()}


def named(values: Weights, dtype: str = "F32", *, prefix: str = "", masks: bool = True) -> dict[str, Raw]:
    """Return the tensors by Hugging Face's names, in the order of its files: by layer. Conv1D weights are (in, out)."""
    maxT = len(values["wpe"])
    found = {"wte.weight": raw(values["wte"], dtype), "wpe.weight": raw(values["wpe"], dtype)}
    for layer in range(len(values["ln1w"])):
        for ours, theirs in LAYER_NAMES.items():
            array = values[ours][layer]
            found[f"h.{layer}.{theirs}"] = raw(np.ascontiguousarray(array.T) if array.ndim == 2 else array, dtype)
        if masks:
            found[f"h.{layer}.attn.bias"] = "BOOL", (1, 1, maxT, maxT), np.tri(maxT, dtype=bool).tobytes()
            found[f"h.{layer}.attn.masked_bias"] = "F32", (), struct.pack("<f", -1e4)
    found |= {"ln_f.weight": raw(values["lnfw"], dtype), "ln_f.bias": raw(values["lnfb"], dtype)}
    return {prefix + name: tensor for name, tensor in found.items()}


def header_of(tensors: Mapping[str, Raw]) -> dict[str, Any]:
    """Return the header of a file with these tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    return header


def file_of(header: bytes, data: bytes) -> bytes:
    """Return the bytes of a safetensors file."""
    return struct.pack("<Q", len(header)) + header + data


def write(path: Path, tensors: Mapping[str, Raw]) -> None:
    """Write a safetensors file."""
    path.write_bytes(file_of(json.dumps(header_of(tensors)).encode(), b"".join(data for _, _, data in tensors.values())))


def make_model(folder: Path, tensors: Mapping[str, Raw], config: dict[str, Any] | None, *, shards: int = 0) -> None:
    """Write a model's folder: one file, or `shards` files with their index."""
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if not shards:
        write(folder / "model.safetensors", tensors)
        return
    places: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {tensor: tensors[tensor] for tensor in list(tensors)[shard::shards]}
        write(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def checkpoint_bytes(values: Weights, version: int, *, L: int, NH: int, C: int, V: int, maxT: int) -> bytes:
    """Return the bytes of the .bin file with these weights."""
    Vp = -(-V // 128) * 128
    parts = [struct.pack("<256i", MAGIC, version, maxT, V, L, NH, C, 0 if version == 1 else Vp, *[0] * 248)]
    for name, array in values.items():
        if name == "wte" and version != 1:
            array = np.concatenate([array, np.zeros((Vp - V, C), "<f4")])
        parts.append((to_bfloat16(array) if version == 5 else array).tobytes())
    return b"".join(parts)


def read(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, Array]]]:
    """Read a safetensors file; return its metadata and its tensors (dtype, array), bfloat16 as uint16 bits."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = {"F32": "<f4", "BF16": "<u2"}[entry["dtype"]]
        array = np.frombuffer(data[8 + length + begin : 8 + length + end], kind).reshape(entry["shape"])
        found[name] = entry["dtype"], array
    return metadata, found
