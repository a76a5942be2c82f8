"""The model's dimensions, and the table of tensors that defines every offset, view, size and gradient.

Dimensions: L layers, NH heads, C channels, HS = C / NH head size, V vocabulary size, Vp = V rounded up to a multiple of 128,
maxT longest sequence. Refuses to know about files and threads. Source of names and order: llm.c, train_gpt2.c.
"""

from collections.abc import Iterator

from .errors import InputError, check_whole

# Upper limits: far above GPT-2 XL, but so low that products of dimensions fit in 64 bits.
LIMITS = {"maxT": 65536, "V": 1 << 20, "L": 256, "NH": 1024, "C": 16384}

# The sixteen tensors in file order, each with all its layers. Weights are (out, in), row-major.
TENSORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("wte", ("rows", "C")),  # rows: Vp in padded files, V in version 1
    ("wpe", ("maxT", "C")),
    ("ln1w", ("L", "C")),
    ("ln1b", ("L", "C")),
    ("qkvw", ("L", "3C", "C")),
    ("qkvb", ("L", "3C")),
    ("attprojw", ("L", "C", "C")),
    ("attprojb", ("L", "C")),
    ("ln2w", ("L", "C")),
    ("ln2b", ("L", "C")),
    ("fcw", ("L", "4C", "C")),
    ("fcb", ("L", "4C")),
    ("fcprojw", ("L", "C", "4C")),
    ("fcprojb", ("L", "C")),
    ("lnfw", ("C",)),
    ("lnfb", ("C",)),
)

IGNORED = -100  # the label of a token that is left out of the loss, as in PyTorch


class Config:
    """A model's dimensions. Do not change them after construction. Configs are equal if all five numbers are equal.

    Raises InputError if a number is not a whole number from 1 to its limit in LIMITS, or if C is not a multiple of NH.
    """

    __slots__ = ("C", "L", "NH", "V", "maxT")

    def __init__(self, *, maxT: int, V: int, L: int, NH: int, C: int) -> None:
        self.maxT, self.V, self.L, self.NH, self.C = maxT, V, L, NH, C
        for name, limit in LIMITS.items():
            setattr(self, name, check_whole(name, getattr(self, name), 1, limit))
        if self.C % self.NH:
            raise InputError(f"C is {self.C}, which is not a multiple of NH = {self.NH}: every head needs the same size")

    @property
    def HS(self) -> int:
        """The number of channels of one head."""
        return self.C // self.NH

    @property
    def Vp(self) -> int:
        """The vocabulary size padded to a multiple of 128: the rows of wte in files of versions 3 and 5."""
        return -(-self.V // 128) * 128

    def tensors(self, *, padded: bool) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Yield (name, shape, offset, size) of the sixteen tensors in file order; offset and size are in values."""
        C = self.C
        dims = {"rows": self.Vp if padded else self.V, "maxT": self.maxT, "L": self.L, "C": C, "3C": 3 * C, "4C": 4 * C}
        offset = 0
        for name, symbols in TENSORS:
            shape = tuple(dims[symbol] for symbol in symbols)
            size = 1
            for extent in shape:
                size *= extent
            yield name, shape, offset, size
            offset += size

    def parameters(self, *, padded: bool) -> int:
        """Return the total number of values in the tensors."""
        return sum(size for _, _, _, size in self.tensors(padded=padded))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Config):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.__slots__))

    def __repr__(self) -> str:
        return f"Config(maxT={self.maxT}, V={self.V}, L={self.L}, NH={self.NH}, C={self.C})"
