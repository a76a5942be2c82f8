"""The names of activations in TransformerLens and in transformers, and files of activations."""

import os
import re
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

THEIR_NAMES = {  # {} is a layer. Compare with from_pretrained_no_processing(): the default of TransformerLens changes weights.
    "blocks.{}.hook_resid_pre": "residual3 of the layer before, or encoded",
    "blocks.{}.ln1.hook_normalized": "ln1",
    "blocks.{}.attn.hook_q": "q",
    "blocks.{}.attn.hook_k": "k",
    "blocks.{}.attn.hook_v": "v",
    "blocks.{}.attn.hook_pattern": "probs",
    "blocks.{}.attn.hook_z": "atty",
    "blocks.{}.hook_attn_out": "attproj",
    "blocks.{}.hook_resid_mid": "residual2",
    "blocks.{}.ln2.hook_normalized": "ln2",
    "blocks.{}.mlp.hook_pre": "fch",
    "blocks.{}.mlp.hook_post": "fch_gelu",
    "blocks.{}.hook_mlp_out": "fcproj",
    "blocks.{}.hook_resid_post": "residual3",
    "ln_final.hook_normalized": "lnf",
    "hidden_states.{}": "residual3 of the layer before, or encoded",  # of L + 1; the last is lnf
    "attentions.{}": "probs",
}
# Without an equal: hook_embed and hook_pos_embed (encoded is their sum), hook_scale, attn.hook_attn_scores, attn.hook_result.


def activation_name(theirs: str, L: int) -> tuple[str, int | None]:
    """Return our name and the layer, None for an activation without layers, for a name in THEIR_NAMES.

    hidden_states.0 to hidden_states.L and attentions.0 are transformers' outputs. Raises InputError for a name that has no
    equal here, and for a layer that a model of L layers does not have."""
    number = re.search(r"(?<=\.)\d+(?=\.|$)", theirs)
    pattern = theirs if number is None else f"{theirs[: number.start()]}{{}}{theirs[number.end() :]}"
    if pattern not in THEIR_NAMES:
        raise InputError(f"activation {shown(theirs)} has no equal: {near(pattern, THEIR_NAMES)}")
    if number is None:
        return THEIR_NAMES[pattern], None
    layer, ours = int(number[0][:9]), THEIR_NAMES[pattern].split()[0]
    most = L - (pattern != "hidden_states.{}")
    if layer > most:
        raise InputError(f"activation {shown(theirs)}: the model has {L} layers, so the number must be from 0 to {most}")
    if pattern == "hidden_states.{}" and layer == L:
        return "lnf", None
    if THEIR_NAMES[pattern] == ours:
        return ours, layer
    return ("encoded", None) if layer == 0 else (ours, layer - 1)


def named_activations(model: GPT2, tokens: Iterable[SupportsIndex], names: Iterable[str]) -> dict[str, Float32]:
    """Return activations by their names in TransformerLens or transformers, in those shapes, without the axis of batches.

    hook_q, hook_k, hook_v and hook_z are (T, NH, HS). Raises InputError for a name without an equal."""
    ids = check_tokens(model.config, tokens)
    places = {name: activation_name(name, model.config.L) for name in names}
    found: dict[str, Float32] = {}
    for name, (ours, layer) in places.items():
        array = model.activations(ids, [ours], layers=None if layer is None else [layer])[ours]
        array = array if layer is None else array[0]
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
