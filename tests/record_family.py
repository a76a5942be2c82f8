"""Record what transformers computes for GPT-2's relatives: tests/data/family.json, for test_family.py.

    python tests/record_family.py        needs torch and transformers

The weights are seeded numbers that the test makes again. For each model: the last row of logits, and greedy tokens."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FILE = Path(__file__).parent / "data" / "family.json"
SHAPE = {"vocab_size": 67, "n_positions": 24, "n_layer": 3, "n_head": 3, "n_embd": 24}
ACTIVATIONS = ("gelu", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu")
PROMPT = [5, 60, 17, 3, 33, 33, 8]
VARIED: dict[str, dict[str, Any]] = {
    "gpt2": {},
    **{name: {"activation_function": name} for name in ACTIVATIONS},
    "narrow": {"n_inner": 10, "layer_norm_epsilon": 1e-2},
    "unscaled": {"scale_attn_weights": False, "n_inner": 100},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "own head": {"tie_word_embeddings": False},
    "all": {
        "activation_function": "gelu",
        "n_inner": 40,
        "layer_norm_epsilon": 1e-6,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
    },
}


def tensors(**varied: Any) -> dict[str, npt.NDArray[np.float32]]:
    """Return random weights by transformers' names, large enough that every variation changes the logits."""
    V, T, L, C = (SHAPE[name] for name in ("vocab_size", "n_positions", "n_layer", "n_embd"))
    F = varied.get("n_inner", 4 * C)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (T, C)}
    for layer in range(L):
        inner = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, F), "mlp.c_proj": (F, C)}
        for name, shape in inner.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (C,), f"h.{layer}.{norm}.bias": (C,)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    shapes = {f"transformer.{name}": shape for name, shape in shapes.items()}
    if not varied.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (V, C)
    raw = np.random.PCG64(7).random_raw

    def numbers(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return (((raw(int(np.prod(shape))) >> 40) / 2**24 - 0.5) * 2).astype("<f4").reshape(shape)

    return {name: numbers(shape) for name, shape in shapes.items()}


def main() -> None:
    """Write the file."""
    torch, transformers = import_module("torch"), import_module("transformers")

    found = {}
    for name, varied in VARIED.items():
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**SHAPE, **varied, bos_token_id=None, eos_token_id=None)
        ).eval()
        weights = {key: torch.from_numpy(value) for key, value in tensors(**varied).items()}
        model.load_state_dict(weights, strict=False)
        if varied.get("tie_word_embeddings", True):
            model.tie_weights()
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT])).logits[0, -1]
            sequence = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        found[name] = {"logits": [float(f"{x:.7g}") for x in logits], "greedy": sequence[len(PROMPT) :].tolist()}
    FILE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
