"""Files of training states, from which a run continues as if it had never stopped.

    header     int32[256], little-endian: magic, version, maxT, V, L, NH, C, Vp, bytes of JSON, zeros; in version 2, the
               bytes from 36 on hold F and the activation's number (int32), epsilon (float64), scaled, scaled_by_layer and tied
    JSON       an object with step, options, loader and job, padded with spaces to a multiple of 64 bytes
    buffers    parameters, first moments and second moments: float32, with the layout of a version 3 checkpoint
    SHA-256    of all these bytes

The reader checks every field, the exact size and the SHA-256 before it returns any value. A run keeps two generations: PATH,
and the previous state as PATH.1. One of them is complete at every moment, and open_state() falls back to the older one.
Files are written and read as streams, without a second copy in memory. Refuses pickles, and files of another version."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import ACTIVATIONS, SWITCHES, Config
from ..errors import CheckpointError, ClosedError, Closing, InputError, is_whole, shown
from ..formats.files import HEADER_BYTES, Path, atomic_file, map_file
from ..formats.safetensors import parse_object
from .parameters import TrainingOptions

Buffers = Iterable[npt.NDArray[np.float32]]

MAGIC, VERSION, VARIED_VERSION = 20261122, 1, 2
VARIATIONS = struct.Struct("<2id3?")  # at byte 36 of a file of version 2
SUM_BYTES = 32
JSON_LIMIT = 1 << 24
BUFFERS = 3  # parameters, first moments, second moments
PIECE = 1 << 22  # bytes written or hashed at a time


@dataclass
class Progress:
    """The JSON part of a training state. step: number of updates made. options: the run's options. loader: DataLoader.state().
    job: JSON data of the caller."""

    step: int
    options: TrainingOptions
    loader: "dict[str, Any]"
    job: "dict[str, Any]"

    def to_json(self) -> bytes:
        """Return one JSON object, padded to a multiple of 64 bytes to align the values after it."""
        text = json.dumps({**vars(self), "options": self.options.as_dict()}, allow_nan=False).encode()
        return text + b" " * (-len(text) % 64)

    @classmethod
    def from_json(cls, text: bytes) -> "Progress":
        """Read the text of to_json(). Raises ValueError for anything else."""
        found = parse_object(text, "bad JSON: the header", ValueError, parse_float=_finite)
        if set(found) != set(cls.__dataclass_fields__):
            raise ValueError("bad JSON: not the object of a training state")
        if not is_whole(found["step"], 0, 1 << 62):
            raise ValueError(f"bad JSON: step is {shown(found['step'])}")
        if not all(isinstance(found[name], dict) for name in ("options", "loader", "job")):
            raise ValueError("bad JSON: options, loader and job must be objects")
        if unknown := sorted(found["options"].keys() - TrainingOptions.__dataclass_fields__.keys()):
            raise ValueError(f"bad options: {shown(unknown[0])} is unknown")
        try:
            return cls(**{**found, "options": TrainingOptions(**found["options"])})
        except (TypeError, ValueError) as error:
            raise ValueError(f"bad options: {error}") from None


class TrainingState(Closing):
    """An open, checked training state whose values stay in the file. Use it in a `with` block, or close() it.

    `config` is the model's shape, `progress` the JSON part. Raises CheckpointError for a file that is not exactly a state."""

    def __init__(self, path: Path) -> None:
        self.path = os.path.realpath(path)
        self._view = map_file(os.fspath(path), "training state", CheckpointError, self._check)
        try:
            self._check_sum()
            self.progress = Progress.from_json(bytes(self._view[HEADER_BYTES : self._values]))
        except ValueError as error:
            self.close()
            raise CheckpointError(f"{os.fspath(path)}: {error}") from None

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def _check(self, header: bytes, found: int) -> None:
        """Take the shape and the JSON's size from the header of a file of `found` bytes."""
        if len(header) < HEADER_BYTES:
            raise self._bad(f"truncated: {found} bytes, shorter than the header of {HEADER_BYTES} bytes")
        magic, version, maxT, V, L, NH, C, Vp, json_bytes, *reserved = struct.unpack("<256i", header)
        if magic != MAGIC:
            raise self._bad(f"magic number {magic}, expected {MAGIC}: not a training state")
        if version not in (VERSION, VARIED_VERSION):
            raise self._bad(f"version {version} of the format, expected {VERSION} or {VARIED_VERSION}")
        variations = {}
        if version == VARIED_VERSION:
            F, activation, epsilon, *switches = VARIATIONS.unpack_from(header, 36)
            reserved = [*header[36 + VARIATIONS.size :]]
            if not 0 <= activation < len(ACTIVATIONS):
                raise self._bad(f"bad header: activation {activation} is unknown")
            variations = {"F": F, "activation": ACTIVATIONS[activation], "epsilon": epsilon}
            variations |= dict(zip(SWITCHES, switches, strict=True))
        try:
            config = Config(maxT=maxT, V=V, L=L, NH=NH, C=C, **variations)
        except InputError as error:
            raise self._bad(f"bad header: {error}") from None
        if Vp != config.Vp:
            raise self._bad(f"bad header: Vp is {Vp}, expected {config.Vp} for V = {V}")
        if not 0 < json_bytes <= JSON_LIMIT or json_bytes % 64:
            raise self._bad(f"bad header: {json_bytes} bytes of JSON, expected a multiple of 64 up to {JSON_LIMIT}")
        if any(reserved):
            raise self._bad("bad header: a reserved field is not 0")
        expected = HEADER_BYTES + json_bytes + BUFFERS * 4 * config.parameters(padded=True) + SUM_BYTES
        if found != expected:
            flaw = "truncated" if found < expected else "too long"
            raise self._bad(f"{flaw}: {found} bytes, expected {expected} with {config}")
        self.config, self._values = config, HEADER_BYTES + json_bytes  # the offset of the first buffer

    def _check_sum(self) -> None:
        """Compare the SHA-256 at the end with that of the bytes before it. Raises ValueError if they differ."""
        digest, end = hashlib.sha256(), len(self._view) - SUM_BYTES
        for start in range(0, end, PIECE):
            digest.update(self._view[start : min(start + PIECE, end)])
        if digest.digest() != self._view[end:]:
            raise ValueError(f"damaged: its SHA-256 is {digest.hexdigest()}, expected {self._view[end:].hex()}")

    def read_into(self, buffers: "Sequence[npt.NDArray[np.float32]]", own: slice | None = None) -> None:
        """Copy the file's values to three buffers (P,): parameters, and the slice `own` of the moments (default: all).

        Raises InputError for other buffers, ClosedError after close()."""
        P, view = self.config.parameters(padded=True), self.view()
        if (sizes := [buffer.size for buffer in buffers]) != [P] * BUFFERS:
            raise InputError(f"buffers of {sizes} values, expected {BUFFERS} of {P} for {self.config}")
        for i, buffer in enumerate(buffers):
            first, last, _ = (own if own and i else slice(None)).indices(P)
            start = self._values + 4 * i * P
            buffer.data.cast("B")[4 * first : 4 * last] = view[start + 4 * first : start + 4 * last]

    def view(self) -> memoryview:
        """Return the file's bytes, which stay mapped as long as the view. Raises ClosedError after close()."""
        try:
            return self._view[:]
        except ValueError:
            raise ClosedError(f"{self.path}: the training state is closed") from None

    def close(self) -> None:
        """Unmap the file. May be called twice."""
        self._view.release()


def _finite(text: str) -> float:
    """Return a JSON number. Raises ValueError beyond the range of float64, because to_json() could not write the number."""
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is beyond float64")
    return number


def open_state(path: Path) -> tuple[TrainingState, str]:
    """Open a training state, or the previous one if it is missing or damaged; return the state and a notice for the user.

    Raises CheckpointError about both files if neither can be used."""
    try:
        return TrainingState(path), ""
    except CheckpointError as error:
        older = previous(path)
        try:
            state = TrainingState(older)
        except CheckpointError as second:
            raise CheckpointError(f"{error}; {second}" if os.path.lexists(older) else str(error)) from error
        return state, f"{error}: using the previous state, {older} (step {state.progress.step})"


def write_state(path: Path, config: Config, progress: Progress, values: Buffers, *, after: str | None = None) -> str:
    """Write a training state to a temporary file in the same folder, then rename it. Return its path, links resolved. values:
    the parameters and moments in order, in arrays of any sizes. after: the file that this run last wrote or read, known to be
    complete. If that is PATH, it is kept as PATH.1. If that is PATH.1, PATH.1 stays. Otherwise an existing PATH.1 belongs to
    another run, and is deleted. Raises OSError if the file cannot be written; then the old files are intact."""
    path = os.path.realpath(path)
    text = progress.to_json()
    if len(text) > JSON_LIMIT:
        raise InputError(f"{path}: the state's JSON would have {len(text)} bytes: at most {JSON_LIMIT} are allowed")
    shape = [config.maxT, config.V, config.L, config.NH, config.C, config.Vp]
    varied = config.F, ACTIVATIONS.index(config.activation), config.epsilon, *(getattr(config, name) for name in SWITCHES)
    header = struct.pack("<9i", MAGIC, VARIED_VERSION if config.variations else VERSION, *shape, len(text))
    header = (header + (VARIATIONS.pack(*varied) if config.variations else b"")).ljust(HEADER_BYTES, b"\0")
    with atomic_file(path) as file:
        digest = hashlib.sha256()
        for data in chain([memoryview(header), memoryview(text)], (array.data.cast("B") for array in values)):
            for start in range(0, len(data), PIECE):
                piece = data[start : start + PIECE]
                digest.update(piece)
                file.write(piece)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())  # the new file is complete on the disk before any older file changes
        older = previous(path)
        if after != older and (after != path or os.path.exists(path)):  # otherwise only PATH.1 can be complete: keep it
            with suppress(FileNotFoundError):
                os.unlink(older)
            if after == path:
                try:
                    os.link(path, older)  # the old state has both names until the new file takes one of them
                except OSError:  # a file system without links
                    os.replace(path, older)
    return path


def previous(path: Path) -> str:
    """Return the path of the previous state."""
    return os.path.realpath(path) + ".1"
