"""Quantise the weights of an open model in memory: q8_0 and q4_0, by tensor.

Matrices of the layers take one format, the head and embedding (wte) another. Positions, biases and gains stay as they are: they
are few. The numbers are those of a converted file (dtypes.py), whatever the number of workers and the instruction set.
Refuses weights that are not finite, and those too large for a float16 scale.
"""

from math import prod
from typing import NamedTuple

from .._kernels import Floats, matrix_bytes, quantise_panels
from ..config import Config
from ..cpus import resolve_threads
from ..errors import InputError, shown
from ..pool import ThreadPool
from .dtypes import FORMATS, Format

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Model(Protocol):
        """What is quantised: an open file, or weights in memory."""

        @property
        def config(self) -> Config:
            """The dimensions."""

        def stored(self) -> dict[str, tuple[str, memoryview]]:
            """Map each tensor's name to its weight format and its bytes."""


QUANTISED = {"q8_0": "q8_0", "q4_0": "q8_0"}  # each format for layers, and the format that its head has by default
LARGEST = {"q8_0": 127 * 65504, "q4_0": 8 * 65504}  # what a float16 scale reaches


class QuantisedWeights(NamedTuple):
    """Weights in memory, with what a network asks of an open model."""

    config: Config
    format: Format  # of the layers' matrices
    tensors: dict[str, tuple[str, memoryview]]

    def stored(self) -> dict[str, tuple[str, memoryview]]:
        """Map each tensor to its format's name and its bytes, as Weights takes them."""
        return self.tensors

    def close(self) -> None:
        """Do nothing: the memory is given back with the last who uses it."""


def quantised(checkpoint: "Model", format: str, head: str | None = None, threads: int | None = None) -> QuantisedWeights:
    """Quantise the matrices of an open model; the result outlives the model.

    format: of the layers' matrices, q8_0 or q4_0. head: of wte, by default q8_0. threads: workers, as for GPT2.load().
    Raises InputError for an unknown format, and for weights that it cannot hold.
    """
    for name in (format, head):
        if name is not None and name not in QUANTISED:
            raise InputError(f"weights cannot be quantised to {shown(name)}: the formats are {', '.join(QUANTISED)}")
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
    return QuantisedWeights(config, FORMATS[format], {name: tensors[name] for name in shapes})


def _fill(
    tensors: dict[str, tuple[str, memoryview]],
    formats: dict[str, str],
    stored: dict[str, tuple[str, memoryview]],
    shapes: dict[str, tuple[int, ...]],
    threads: int,
) -> None:
    """Quantise each tensor of `formats`, all workers at once. Raises InputError for one that cannot be held."""
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
            raise InputError(f"{name} cannot be {formats[name]}: it holds a value that is not finite, or beyond {most}")
