"""What a model computes: its dimensions, what its family varies, and the one table of its tensors.

Dimensions: L layers, NH heads, C channels, HS = C / NH head size, F channels inside the feed-forward, V vocabulary size,
Vp = V rounded up to a multiple of 128, maxT longest sequence. Refuses to know about files and threads.
Source of names and order: llm.c, train_gpt2.c. Source of the variations: transformers, models/gpt2/configuration_gpt2.py."""

from collections.abc import Callable, Iterator
from math import prod

from .errors import TYPE_CHECKING, InputError, check_whole, shown

if TYPE_CHECKING:
    from typing import Any

    Row = tuple[str, tuple[str, ...]]

# Upper limits: far above GPT-2 XL, but so low that products of dimensions fit in 64 bits.
LIMITS = {"maxT": 65536, "V": 1 << 20, "L": 256, "NH": 1024, "C": 16384}

# What GPT-2's relatives vary, and GPT-2's own values. F is 4C by default.
VARIATIONS: "dict[str, Any]" = {
    "F": None,
    "activation": "gelu_new",  # a name in ACTIVATIONS
    "epsilon": 1e-5,  # of layer norms
    "scaled": True,  # attention scores are divided by sqrt(HS)
    "scaled_by_layer": False,  # attention scores are divided by the layer's number, from 1
    "tied": True,  # wte is also the head; if False, the tensor `head` follows the sixteen
}

SWITCHES = ("scaled", "scaled_by_layer", "tied")

# The activations that the kernels compute, in the order of csrc/micro.h, and other names of the same functions.
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "quick_gelu")
ALIASES = {"gelu_fast": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_accurate": "gelu_new"}
ALIASES |= {"gelu_python": "gelu", "swish": "silu"}

# The sixteen tensors in file order, each with all its layers, and their dimensions; rows: Vp in padded files, V in version 1.
# Weights are (out, in), row-major. A head of its own follows.
_TENSORS = """wte rows C, wpe maxT C, ln1w L C, ln1b L C, qkvw L 3C C, qkvb L 3C, attprojw L C C, attprojb L C, ln2w L C,
ln2b L C, fcw L F C, fcb L F, fcprojw L C F, fcprojb L C, lnfw C, lnfb C"""
TENSORS: "tuple[Row, ...]" = tuple((name, tuple(dims)) for name, *dims in map(str.split, _TENSORS.split(",")))
HEAD: "Row" = ("head", ("V", "C"))

IGNORED = -100  # the label of a token that is left out of the loss, as in PyTorch


class Config:
    """A model's dimensions and variations. Do not change them after construction. Configs are equal if all of these are equal.

    variations: keywords in VARIATIONS; ALIASES of activations are accepted. Each number is a whole number from 1 to its limit
    in LIMITS. Raises InputError for another number, a C that is not a multiple of NH, and a bad variation."""

    __slots__ = ("C", "F", "L", "NH", "V", "activation", "epsilon", "maxT", "scaled", "scaled_by_layer", "tied", "tokenizer")

    def __init__(self, *, maxT: int, V: int, L: int, NH: int, C: int, **variations: "Any") -> None:
        self.maxT, self.V, self.L, self.NH, self.C = maxT, V, L, NH, C
        for name, limit in LIMITS.items():
            setattr(self, name, check_whole(name, getattr(self, name), 1, limit))
        if self.C % self.NH:
            raise InputError(f"C is {self.C}, which is not a multiple of NH = {self.NH}: every head needs the same size")
        if unknown := variations.keys() - VARIATIONS.keys():
            raise TypeError(f"Config() has no argument {min(unknown)!r}")
        given = {**VARIATIONS, **variations}
        self.F: int = check_whole("F", 4 * self.C if given["F"] is None else given["F"], 1, 4 * LIMITS["C"])
        if given["activation"] not in (names := [*ACTIVATIONS, *ALIASES]):
            raise InputError(f"activation is {shown(given['activation'])}: it must be one of {', '.join(names)}")
        self.activation: str = ALIASES.get(given["activation"], given["activation"])
        self.epsilon = given["epsilon"]
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, (int, float)) or not 1e-30 <= self.epsilon <= 1:
            raise InputError(f"epsilon is {shown(self.epsilon)}: it must be a number from 1e-30 to 1")
        for name in SWITCHES:
            if not isinstance(given[name], bool):
                raise InputError(f"{name} is {shown(given[name])}: it must be True or False")
        self.scaled, self.scaled_by_layer, self.tied = (given[name] for name in SWITCHES)
        self.tokenizer: Callable[[], Any] | None = None  # loads the model's own Tokenizer; equality does not regard it

    @property
    def variations(self) -> dict[str, object]:
        """The variations in which this model differs from GPT-2, by name: empty for GPT-2 itself."""
        usual = VARIATIONS | {"F": 4 * self.C}
        return {name: getattr(self, name) for name in VARIATIONS if getattr(self, name) != usual[name]}

    @property
    def table(self) -> "tuple[Row, ...]":
        """The rows of TENSORS, and of the head if it is not tied to wte."""
        return TENSORS if self.tied else (*TENSORS, HEAD)

    @property
    def HS(self) -> int:
        """The number of channels of one head."""
        return self.C // self.NH

    @property
    def Vp(self) -> int:
        """The vocabulary size padded to a multiple of 128: the rows of wte in files of versions 3 and 5."""
        return -(-self.V // 128) * 128

    def tensors(self, *, padded: bool) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Yield (name, shape, offset, size) of the tensors in `table`; offset and size are in values."""
        dims = {name: getattr(self, name) for name in ("maxT", "V", "L", "C", "F")}
        dims |= {"3C": 3 * self.C, "rows": self.Vp if padded else self.V}
        offset = 0
        for name, symbols in self.table:
            shape = tuple(dims[symbol] for symbol in symbols)
            yield name, shape, offset, prod(shape)
            offset += prod(shape)

    def parameters(self, *, padded: bool) -> int:
        """Return the total number of values in the tensors."""
        return sum(size for _, _, _, size in self.tensors(padded=padded))

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Config) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in (*LIMITS, *VARIATIONS))

    def __repr__(self) -> str:
        more = "".join(f", {name}={value!r}" for name, value in self.variations.items())
        return f"Config(maxT={self.maxT}, V={self.V}, L={self.L}, NH={self.NH}, C={self.C}{more})"
