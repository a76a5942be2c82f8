"""PyTorch's files (`pytorch_model.bin`, nanoGPT's `ckpt.pt`): read by torch with weights_only=True, or refused.

Loading a pickle can run any code. torch's unpickler for weights accepts only tensors and plain values, so this module never
uses another one. Without torch, it refuses. nanoGPT's checkpoints hold the weights as `model` and the settings as `model_args`.
"""

import json
import os

from ..errors import CheckpointError, Closing
from .files import reason
from .safetensors import FORMATS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import numpy.typing as npt

DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
WAY_OUT = "use the same model's model.safetensors, or let transformers write it (save_pretrained)"


def pickle_error(place: str) -> CheckpointError:
    """Return the error for a pickle without torch, with the reason and the way out."""
    return CheckpointError(
        f"{place}: a PyTorch pickle: loading it can run any code, so only torch reads it (weights_only=True), which is not "
        f"installed: {WAY_OUT}, or install torch"
    )


class PickleFile(Closing):
    """The tensors of a PyTorch file, with SafetensorsFile's interface. Raises CheckpointError if torch refuses the file."""

    def __init__(self, path: str) -> None:
        try:
            import torch
        except ImportError:
            raise pickle_error(path) from None
        self.path, self.size = path, os.path.getsize(path)
        try:
            found = self._load(torch)
        except Exception as error:  # torch raises errors of many kinds for other files
            words = reason(error).strip().partition("\n")[0].rstrip(".:")[:200]
            raise CheckpointError(f"{path}: torch cannot read this file with weights_only=True ({words}): {WAY_OUT}") from error
        self.metadata: dict[str, str] = {}
        if isinstance(found, dict) and isinstance(found.get("model"), dict):  # nanoGPT's checkpoint
            if isinstance(found.get("model_args"), dict):
                self.metadata["config.json"] = json.dumps(found["model_args"])
            found = found["model"]
        values = found if isinstance(found, dict) else {}
        self._values = {str(name): value for name, value in values.items() if isinstance(value, torch.Tensor)}
        self.tensors = {
            name: (DTYPES.get(str(value.dtype), str(value.dtype)), tuple(value.shape), 0)
            for name, value in self._values.items()
        }

    def _load(self, torch: "Any") -> "Any":
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before zip files cannot be mapped
            return torch.load(self.path, map_location="cpu", weights_only=True)

    def stored(self, name: str, rows: slice = slice(None)) -> "npt.NDArray[Any]":
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
