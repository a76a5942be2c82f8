"""Sparse autoencoders of a residual stream: read their weights, encode, and edit by a feature. Training is not supported.

Source of the layout: SAELens, StandardSAE and JumpReLUSAE."""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..activations import Edit, add
from ..errors import CheckpointError, InputError, check_number, check_whole
from ..formats.safetensors import SafetensorsFile
from .lens import Float32


class SparseAutoencoder(NamedTuple):
    """F features of a residual stream of C channels: features = relu((x - b_dec) W_enc + b_enc), x ~ features W_dec + b_dec.

    threshold (F,): features that are not above it are zero (JumpReLU); None means 0. subtract: whether b_dec is subtracted
    first, which SAELens calls apply_b_dec_to_input."""

    W_enc: Float32  # (C, F)
    b_enc: Float32  # (F,)
    W_dec: Float32  # (F, C)
    b_dec: Float32  # (C,)
    threshold: Float32 | None = None
    subtract: bool = True

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, subtract: bool = True) -> "SparseAutoencoder":
        """Read the weights of a .safetensors file. Raises CheckpointError for other tensors, and for shapes that do not fit."""
        with SafetensorsFile(path) as file:
            found = {name: np.array(file.tensor(name)) for name in file.tensors}
        named = ", ".join(f"{name} {array.shape}" for name, array in found.items())
        encoder = found.get("W_enc")
        C, F = encoder.shape if encoder is not None and encoder.ndim == 2 else (0, 0)
        shapes = {"W_enc": (C, F), "b_enc": (F,), "W_dec": (F, C), "b_dec": (C,), "threshold": (F,)}
        fits = all(array.shape == shapes.get(name) for name, array in found.items())
        if not C or not fits or len(found.keys() | {"threshold"}) != len(shapes):
            raise CheckpointError(
                f"{os.fspath(path)}: {named[:300]}: expected the tensors W_enc (C, F), b_enc (F,), W_dec (F, C), b_dec (C,), "
                "and optionally threshold (F,)"
            )
        return cls(**found, subtract=subtract)

    def encode(self, residual: Float32) -> Float32:
        """Return the features of residuals, (..., C) -> (..., F). Raises InputError for other channels."""
        residual = np.asarray(residual, np.float32)
        if residual.shape[-1:] != self.b_dec.shape:
            raise InputError(f"residuals have shape {residual.shape}: the autoencoder needs {self.b_dec.size} channels")
        found = (residual - self.b_dec if self.subtract else residual) @ self.W_enc + self.b_enc  # [..., C] -> [..., F]
        kept: Float32 = np.where(found > (0 if self.threshold is None else self.threshold), found, np.float32(0))
        return kept

    def top(self, residual: Float32, k: int = 10) -> list[tuple[int, float]]:
        """Return the k strongest active features of one residual (C,) with their values, the strongest first."""
        features = self.encode(residual).reshape(-1)
        best = np.argsort(-features, kind="stable")[: check_whole("k", k, 1, features.size)]
        return [(int(feature), float(features[feature])) for feature in best if features[feature] > 0]

    def ablate(self, feature: int) -> Callable[[Float32], Float32]:
        """Return an edit value that removes a feature from a residual and keeps everything else, also the rest."""
        row = self._direction(feature)
        return lambda residual: residual - self.encode(residual)[..., feature, None] * row

    def steer(self, feature: int, strength: float) -> "Edit":
        """Return an edit value that adds `strength` times a feature's direction to a residual."""
        return add(np.float32(check_number("strength", strength, -1e30, 1e30)) * self._direction(feature))

    def _direction(self, feature: int) -> Float32:
        row: Float32 = self.W_dec[check_whole("feature", feature, 0, len(self.W_dec) - 1)]
        return row
