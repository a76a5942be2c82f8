"""Activations by their names in TransformerLens and transformers, and files of activations."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..errors import InputError, near, shown
from ..formats.files import atomic_file
from ..formats.safetensors import write_safetensors
from ..generation.request import check_tokens
from ..model import GPT2
from .lens import Float32

BLOCK = {  # TransformerLens, inside blocks.0 and so on: ours
    "ln1.hook_normalized": "ln1",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_pattern": "probs",
    "attn.hook_z": "atty",
    "hook_attn_out": "attproj",
    "hook_resid_mid": "residual2",
    "ln2.hook_normalized": "ln2",
    "mlp.hook_pre": "fch",
    "mlp.hook_post": "fch_gelu",
    "hook_mlp_out": "fcproj",
    "hook_resid_post": "residual3",
}


def their_names(L: int) -> dict[str, tuple[str, int | None]]:
    """Map TransformerLens' and transformers' names in a model of L layers to our name and layer (None: without layers).

    hidden_states.0 and so on, and attentions.0, are the outputs of transformers; its last hidden state is lnf. The numbers of
    TransformerLens are those of from_pretrained_no_processing(): by default it changes the weights. These have no equal:
    hook_embed and hook_pos_embed (encoded is their sum), hook_scale, hook_attn_scores, hook_result, and our last residual3 in
    transformers."""
    streams = [("encoded", None), *(("residual3", layer) for layer in range(L))]
    names: dict[str, tuple[str, int | None]] = {"ln_final.hook_normalized": ("lnf", None), f"hidden_states.{L}": ("lnf", None)}
    for layer in range(L):
        names |= {f"blocks.{layer}.{theirs}": (ours, layer) for theirs, ours in BLOCK.items()}
        names |= {f"blocks.{layer}.hook_resid_pre": streams[layer], f"hidden_states.{layer}": streams[layer]}
        names[f"attentions.{layer}"] = ("probs", layer)
    return names


def named_activations(model: GPT2, tokens: Iterable[SupportsIndex], names: Iterable[str]) -> dict[str, Float32]:
    """Return activations by the names in their_names(), in the shapes of TransformerLens and transformers without the batch.

    hook_q, hook_k, hook_v and hook_z are (T, NH, HS). Raises InputError for a name without an equal."""
    ids, known = check_tokens(model.config, tokens), their_names(model.config.L)
    names = list(names)
    for name in names:
        if name not in known:
            raise InputError(f"activation {shown(name)} has no equal: {near(name, known)}")
    layers = sorted({layer for name in names if (layer := known[name][1]) is not None})
    kept = model.activations(ids, [known[name][0] for name in names], layers=layers or None)
    found: dict[str, Float32] = {}
    for name in names:
        ours, layer = known[name]
        array = kept[ours] if layer is None else kept[ours][layers.index(layer)]
        found[name] = array.reshape(len(ids), model.config.NH, -1) if ours in ("q", "k", "v", "atty") else array
    return found


def save_activations(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays by name as float32 to a .npz or .safetensors file, which gets its name only when it is complete.

    Raises InputError for another ending."""
    name = os.fspath(path)
    if not name.endswith((".npz", ".safetensors")):
        raise InputError(f"{name}: activations are written to a file that ends in .npz or .safetensors")
    floats = {key: np.asarray(array, np.float32) for key, array in arrays.items()}
    with atomic_file(path) as file:
        if name.endswith(".npz"):
            np.savez(file, allow_pickle=False, **floats)
        else:
            write_safetensors(file, "F32", [(key, array.shape) for key, array in floats.items()], floats.values())
