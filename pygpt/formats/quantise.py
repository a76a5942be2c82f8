"""Quantise the weights of an open model in memory to q8_0 or q4_0, tensor by tensor.

The matrices of the layers get one format, and wte (embedding and head) another. Positions, biases and gains keep their format,
because they are small. The result has the numbers of a converted file (dtypes.py).
"""

from math import prod

from .._kernels import Floats, matrix_bytes, quantise_panels
from ..config import Config
from ..cpus import resolve_threads
from ..errors import InputError, shown
from ..pool import ThreadPool
from .panels import StoredWeights

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, SupportsIndex

    class Model(Protocol):
        """A source of weights: an open file, or weights in memory."""

        @property
        def config(self) -> Config:
            """The dimensions."""

        def stored(self) -> dict[str, tuple[str, memoryview]]:
            """Map each tensor's name to its weight format and its bytes."""


QUANTISED = {"q8_0": "q8_0", "q4_0": "q8_0"}  # each format for layers, and the format that its head has by default
LARGEST = {"q8_0": 127 * 65504, "q4_0": 8 * 65504}  # the largest value that a float16 scale can represent


def quantised(
    checkpoint: "Model", format: str, head: str | None = None, threads: "SupportsIndex | None" = None
) -> StoredWeights:
    """Quantise the matrices of an open model. The result stays valid after the model is closed.

    format: q8_0 or q4_0, for the layers' matrices. head: the format of wte, by default q8_0. threads: workers, as in
    GPT2.load(). Raises InputError for an unknown format, and for weights that the format cannot represent."""
    for name in (format, head):
        if name is not None and name not in QUANTISED:
            raise InputError(f"weights cannot be quantised to {shown(name)}: choose one of {', '.join(QUANTISED)}")
    config, stored = checkpoint.config, checkpoint.stored()
    shapes = {name: shape for name, shape, _, _ in config.tensors(padded=False)}
    formats = {name: format for name in shapes if len(shapes[name]) == 3}
    formats |= {name: head or QUANTISED[format] for name in ("wte", "head") if name in shapes}
    sizes = {name: prod(shapes[name][:-2]) * matrix_bytes(kind, *shapes[name][-2:]) for name, kind in formats.items()}
    memory = memoryview(Floats(1, sum(sizes.values()) // 4, dense=True)).cast("B")  # every size is a multiple of 64
    tensors = {name: (kind, memoryview(bytes(data))) for name, (kind, data) in stored.items() if name not in formats}
    offset = 0
    for name, size in sizes.items():
        tensors[name] = formats[name], memory[offset : offset + size]
        offset += size
    _fill(tensors, formats, stored, shapes, resolve_threads(threads))
    return StoredWeights(config, {name: tensors[name] for name in shapes})


def _fill(
    tensors: dict[str, tuple[str, memoryview]],
    formats: dict[str, str],
    stored: dict[str, tuple[str, memoryview]],
    shapes: dict[str, tuple[int, ...]],
    threads: int,
) -> None:
    """Quantise each tensor of `formats` on all workers. Raises InputError for values that a format cannot represent."""
    refused = set()

    def job(ith: int, nth: int) -> None:
        for name in formats:
            (*layers, N, K), (kind, out), (source_kind, source) = shapes[name], tensors[name], stored[name]
            if not quantise_panels(out, kind, source, source_kind, prod(layers), N, K, ith, nth):
                refused.add(name)

    with ThreadPool(threads) as pool:
        pool.run(job)
    for name in formats:
        if name in refused:
            most = LARGEST[formats[name]]
            raise InputError(f"{name} cannot be {formats[name]}: it has a value that is not finite, or beyond {most}")
