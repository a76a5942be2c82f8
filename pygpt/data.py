"""What goes into training: text on its way to tokens, llm.c's token shards, and the loader that makes batches of them.

A shard is an int32[256] little-endian header (magic, version, count, zeros), then `count` uint16 ids; a data set is one
shard or many. The reader trusts nothing: the size that follows from the count must be the file's size. Tokens stay in the
file, mapped, until a batch needs them, and text passes through in pieces, so that neither has to fit in memory.

Refuses: shards of another size, magic, version or vocabulary, shards too small for one batch, and text that is not UTF-8.
Sources: llm.c, dev/data/data_common.py (write_datafile), dev/data/tinyshakespeare.py, llmc/dataloader.h.
"""

import codecs
import glob
import hashlib
import mmap
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from .checkpoint import HEADER_BYTES, atomic_file, map_file
from .config import LIMITS
from .errors import DataError, InputError, is_whole, shown
from .tokenizer import Tokenizer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

    Tokens = npt.NDArray[np.integer[Any]]  # (tokens,)
    Shard = npt.NDArray[np.uint16]  # (tokens,)
    Batch = npt.NDArray[np.int32]  # (B, T)
    Path = str | os.PathLike[str]

MAGIC = 20240520
TOKEN = np.dtype("<u2")
MOST_TOKENS = 2**31 - 1  # the header's count is an int32
PIECE = 1 << 20  # bytes of text, or tokens to check, at a time
EOT_MODES = ("document", "paragraph", "none")

# What the fingerprint of a data set is made of: all tokens, or where there are more than WHOLE some of every shard, for
# reading a hundred gigabytes takes minutes.
WHOLE = 1 << 24
SAMPLES, SAMPLE = 16, 1 << 12  # places of a shard, evenly spaced from its first token to its last, and tokens of each


# ------------------------------------------------------------------------------------------------ llm.c's data files


def map_data(path: str, kind: str, magic: int, versions: Sequence[int], named: int) -> tuple[list[int], mmap.mmap]:
    """Map one of llm.c's data files; return its version and the `named` fields after it, and the map, header included.

    Raises DataError for another magic or version, a file shorter than a header, and values in the header's other fields.
    """
    fields: list[int] = []

    def check(header: bytes, found: int) -> None:
        if len(header) < HEADER_BYTES:
            raise DataError(f"{path}: {found} bytes, shorter than the header of a {kind}, {HEADER_BYTES} bytes")
        first, *others = struct.unpack("<256i", header)
        if first != magic:
            raise DataError(f"{path}: magic number {first}, expected {magic}: not a {kind} of llm.c")
        if others[0] not in versions:
            raise DataError(f"{path}: version {others[0]}, expected {' or '.join(map(str, versions))} for a {kind}")
        for index, value in enumerate(others[1 + named :], start=2 + named):
            if value:
                raise DataError(f"{path}: bad header: reserved field {index} is {value}, expected 0")
        fields.extend(others[: 1 + named])

    mapped = map_file(path, kind, DataError, check)
    return fields, mapped


def check_size(path: str, found: int, expected: int, what: str) -> None:
    """Refuse a file that has not exactly the bytes that its header promises."""
    if found != expected:
        raise DataError(
            f"{path}: {'truncated' if found < expected else 'too long'}: {found} bytes, expected {expected} for {what}"
        )


def header_bytes(magic: int, version: int, *fields: int) -> bytes:
    """The header of a data file."""
    return struct.pack("<256i", magic, version, *fields, *[0] * (254 - len(fields)))


def check_ids(tokens: "Tokens", V: int, where: str) -> None:
    """Refuse ids outside [0, V), the first of them by its position."""
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        if piece.max() >= V or piece.min() < 0:
            position = start + int(np.flatnonzero((piece < 0) | (piece >= V))[0])
            raise DataError(
                f"{where}: token id {tokens[position]} at position {position}: it must be below the vocabulary of {V} ids"
            )


# ------------------------------------------------------------------------------------------------ shards


def read_tokens(path: "Path", *, V: int | None = None) -> "Shard":
    """Open a token shard: a read-only uint16 array (tokens,) that views the mapped file.

    V: the vocabulary; every id is checked against it. Raises DataError, with the found and the expected figures, for any
    file that is not exactly a shard.
    """
    name = os.fspath(path)
    (_, count), mapped = map_data(name, "token file", MAGIC, (1,), 1)
    if count < 1:
        raise DataError(f"{name}: bad header: {count} tokens, expected 1 or more")
    check_size(name, len(mapped), HEADER_BYTES + 2 * count, f"{count} tokens")
    tokens = np.frombuffer(mapped, TOKEN, offset=HEADER_BYTES)
    if V is not None:
        check_ids(tokens, V, name)
    return tokens


def write_tokens(path: "Path", tokens: "npt.ArrayLike | Iterator[npt.ArrayLike]") -> int:
    """Write a token shard, all or nothing; return how many tokens it holds.

    `tokens` is one array of ids or an iterator of arrays, dropped one by one once written. Raises InputError for ids that
    are no whole numbers from 0 to 65535, and for no tokens or more than 2**31 - 1; OSError when the file cannot be written.
    """
    count = 0
    with atomic_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for piece in tokens if isinstance(tokens, Iterator) else [tokens]:
            ids = as_tokens(piece)
            count += len(ids)
            if count > MOST_TOKENS:
                raise InputError(f"{os.fspath(path)}: more than {MOST_TOKENS} tokens: write several shards")
            check_ids(ids, 1 << 16, os.fspath(path))
            for start in range(0, len(ids), PIECE):  # they may be a view of a file larger than memory
                file.write(ids[start : start + PIECE].astype(TOKEN).data)
        if not count:
            raise InputError(f"{os.fspath(path)}: there are no tokens to write: a shard holds 1 or more")
        file.seek(0)
        file.write(header_bytes(MAGIC, 1, count))
    return count


def as_tokens(tokens: npt.ArrayLike) -> "Tokens":
    """Tokens as a one-dimensional array of integers, or InputError."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError(f"tokens are no array: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"tokens are an array of shape {array.shape} and type {array.dtype}: (tokens,) of integers is expected"
        )
    return array if array.size else array.astype(TOKEN)


def split(tokens: "Tokens", *, val_tokens: int | None = None, val_fraction: float | None = None) -> "tuple[Tokens, Tokens]":
    """Split tokens into (train, val), views of them.

    val_tokens: the first so many validate, as llm.c splits tinyshakespeare. val_fraction: the last part validates. Raises
    InputError unless one of the two is given and leaves tokens on both sides.
    """
    count = len(tokens)
    if (val_tokens is None) == (val_fraction is None):
        raise InputError("give either val_tokens, the first so many, or val_fraction, the last part")
    if val_tokens is not None:
        if not is_whole(val_tokens, 1, count - 1):
            raise InputError(
                f"val_tokens is {shown(val_tokens)}: of {count} tokens it must be a whole number from 1 to {count - 1}"
            )
        return tokens[val_tokens:], tokens[:val_tokens]
    if not isinstance(val_fraction, float) or not 0 < val_fraction < 1 or not 0 < round(count * val_fraction) < count:
        raise InputError(
            f"val_fraction is {shown(val_fraction)}: it must be between 0 and 1, and leave some of {count} tokens on both sides"
        )
    train = count - round(count * val_fraction)
    return tokens[:train], tokens[train:]


# ------------------------------------------------------------------------------------------------ batches


class DataLoader:
    """Endless batches of B sequences of T tokens, in llm.c's order: B*T + 1 tokens are read, and the next batch begins B*T on.

    source: a path or a pattern of shards (sorted), a list of paths, or tokens in memory. A shard gives
    floor((tokens - 1) / (B*T)) batches, then comes the next; after the last one a new epoch begins. With `shuffle_seed`,
    every epoch has an order of its own of the shards and of the batches in each, a function of seed and epoch alone: the
    same on every machine. V: the vocabulary; every id is checked against it as its shard is opened.

    `batches` is their number in an epoch, `tokens` that in all shards, `fingerprint` a hash by which state() tells other data
    from these. Raises InputError for a bad B, T or seed, DataError for a shard that is none or is too small for one batch.
    """

    def __init__(
        self,
        source: "Path | Sequence[Path] | npt.ArrayLike",
        B: int,
        T: int,
        *,
        shuffle_seed: int | None = None,
        V: int | None = None,
    ) -> None:
        for name, value in (("B", B), ("T", T)):
            if not is_whole(value, 1, 1 << 30):
                raise InputError(f"{name} is {shown(value)}: it must be a whole number from 1 to {1 << 30}")
        if V is not None and not is_whole(V, 1, LIMITS["V"]):
            raise InputError(f"V is {V!r}: it must be None or a whole number from 1 to {LIMITS['V']}")
        if shuffle_seed is not None and not is_whole(shuffle_seed, 0, 2**64 - 1):
            raise InputError(f"shuffle_seed is {shown(shuffle_seed)}: it must be None or a whole number from 0 to 2**64 - 1")
        self.B, self.T, self.shuffle_seed, self._V = B, T, shuffle_seed, V
        self._files, tokens = _find(source)
        if tokens is not None:
            check_ids(tokens, V or LIMITS["V"], "tokens")
        self._tokens = tokens  # of the open shard
        self._counts = [len(read_tokens(path)) for path in self._files] if tokens is None else [len(tokens)]
        self._batches = [(count - 1) // (B * T) for count in self._counts]
        for name, count in zip(self._files or ["tokens"], self._counts, strict=True):
            if count < B * T + 1:
                raise DataError(
                    f"{name}: {count} tokens are too few for one batch: B*T + 1 = {B}*{T} + 1 = {B * T + 1} are needed; "
                    f"make B or T smaller{', or leave this file out' if len(self._counts) > 1 else ''}"
                )
        self.batches, self.tokens = sum(self._batches), sum(self._counts)
        self.fingerprint = _fingerprint(map(read_tokens, self._files) if tokens is None else [tokens], self.tokens)
        self.reset()

    def next_batch(self) -> "tuple[Batch, Batch]":
        """Return the next (inputs, targets), fresh int32 arrays (B, T); targets are the inputs' successors."""
        if self._batch == len(self._order):
            last = self._shard == len(self._counts) - 1
            self._move(*((self._epoch + 1, 0, 0) if last else (self._epoch, self._shard + 1, 0)))
        assert self._tokens is not None
        B, T = self.B, self.T
        start = int(self._order[self._batch]) * B * T
        tokens = self._tokens[start : start + B * T + 1]
        self._batch += 1
        return tokens[:-1].astype(np.int32).reshape(B, T), tokens[1:].astype(np.int32).reshape(B, T)

    def reset(self) -> None:
        """Go to the first batch of the first epoch, as validation does before each evaluation."""
        self._move(0, 0, 0)

    @property
    def epoch(self) -> int:
        """The epoch of the batch that came last, from 0."""
        return self._epoch

    def state(self) -> dict[str, int | str | None]:
        """The position, and what it is a position in, for JSON: restore() continues there, with the very same batches."""
        return {"epoch": self._epoch, "shard": self._shard, "batch": self._batch, **self._identity()}

    def restore(self, state: Mapping[str, int | str | None]) -> None:
        """Go to the position of a state(). Raises InputError for the state of a loader with other data, B, T or seed."""
        identity = self._identity()
        state = {"fingerprint": self.fingerprint, **state}  # the first states had none
        if set(state) != {"epoch", "shard", "batch", *identity}:
            raise InputError(f"the loader's state has the fields {shown(sorted(state))}, expected {sorted(self.state())}")
        for name, value in identity.items():
            if state[name] != value:
                raise InputError(
                    f"the loader's state is for {name} = {shown(state[name])}, this loader has {value!r}: give it the same "
                    "data, B, T and seed, or begin anew"
                )
        place = []
        for name, most in (("epoch", 2**63), ("shard", len(self._counts) - 1), ("batch", self.batches)):
            number = state[name]
            if not isinstance(number, int) or not is_whole(number, 0, most):
                raise InputError(f"the loader's state has {name} = {shown(number)}: it must be a whole number from 0 to {most}")
            place.append(number)
        self._move(*place)

    def _identity(self) -> dict[str, int | str | None]:
        """What a position means something for."""
        return {
            "B": self.B,
            "T": self.T,
            "shards": len(self._counts),
            "tokens": self.tokens,
            "fingerprint": self.fingerprint,
            "shuffle_seed": self.shuffle_seed,
        }

    def _move(self, epoch: int, shard: int, batch: int) -> None:
        """Go to a batch of the epoch's shard number `shard`, and open that. If it fails, the loader stays where it is."""
        index = int(self._permutation(epoch, 0, len(self._counts))[shard])
        if batch > self._batches[index]:
            raise InputError(f"the loader's state has batch = {batch}: its shard has {self._batches[index]} batches")
        tokens = self._tokens
        if self._files:
            tokens = read_tokens(self._files[index], V=self._V)
            if len(tokens) != self._counts[index]:
                raise DataError(
                    f"{self._files[index]}: {len(tokens)} tokens, expected {self._counts[index]}: the file has changed"
                )
        self._order = self._permutation(epoch, 1 + index, self._batches[index])
        self._tokens, self._epoch, self._shard, self._batch = tokens, epoch, shard, batch

    def _permutation(self, epoch: int, stream: int, count: int) -> "Sequence[int] | npt.NDArray[np.intp]":
        """The order of `count` things: stream 0 is the epoch's shards, stream 1 + i the batches of shard i.

        Sorted by 64 random bits each. Philox with a given key and counter, its raw output and a stable sort are the same in
        every NumPy and on every machine; what NumPy's Generator makes of them is not.
        """
        if self.shuffle_seed is None:
            return range(count)
        key, counter = np.array([self.shuffle_seed, epoch], np.uint64), np.array([0, stream, 0, 0], np.uint64)
        return np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")


def _find(source: "Path | Sequence[Path] | npt.ArrayLike") -> "tuple[list[str], Tokens | None]":
    """A loader's source as the names of files, or as tokens."""
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        files = [name] if os.path.lexists(name) else sorted(glob.glob(name))
        if not files:
            raise DataError(f"{name!r}: no such file, and as a pattern it matches none; tools/shards.py makes token files")
        return files, None
    if isinstance(source, list | tuple) and all(isinstance(item, str | os.PathLike) for item in source):
        if not source:
            raise DataError("the list of token files is empty: name at least one")
        return [os.fspath(item) for item in source], None
    return [], as_tokens(source)  # type: ignore[arg-type]


def _fingerprint(shards: "Iterable[Tokens]", total: int) -> str:
    """32 hexadecimal digits that tell a data set of `total` tokens from another of as many, wherever its files are."""
    digest = hashlib.sha256()
    for tokens in shards:
        count = len(tokens)
        digest.update(struct.pack("<q", count))
        if total <= WHOLE:
            pieces = [(start, PIECE) for start in range(0, count, PIECE)]
        else:
            pieces = [(max(0, count - SAMPLE) * i // (SAMPLES - 1), SAMPLE) for i in range(SAMPLES)]
        for start, size in pieces:
            digest.update(tokens[start : start + size].astype("<u4").data)
    return digest.hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ text


def read_text(path: "Path") -> Iterator[str]:
    """Yield the text of a UTF-8 file, or of stdin for "-", some at a time, exactly as it is.

    Raises DataError for what cannot be read, and for bytes that are not UTF-8, with their offset.
    """
    if path == "-":
        if sys.stdin is None:
            raise DataError("-: stdin is closed: there is no text to read")
        yield from _decoded(sys.stdin.buffer, "stdin")
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 (its errors are not those of reading)
    except (OSError, ValueError) as error:
        raise DataError(f"{os.fspath(path)!r}: cannot open the text: {getattr(error, 'strerror', None) or error}") from error
    with file:
        yield from _decoded(file, os.fspath(path))


def _decoded(file: "IO[bytes]", name: str) -> Iterator[str]:
    """Decode a binary file piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    taken, piece = 0, b" "
    while piece:
        try:
            piece = file.read(PIECE)
            taken += len(piece)
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = taken - len(error.object) + error.start
            raise DataError(
                f"{name}: byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8 ({error.reason}): "
                f"convert the text to UTF-8"
            ) from None
        except OSError as error:
            raise DataError(f"{name}: cannot read the text: {error.strerror}") from error
        yield text


def tokens_of_text(text: str | Iterable[str], *, eot: str = "paragraph") -> "Shard":
    """GPT-2's tokens of a text, given whole or in pieces: a uint16 array (tokens,). `eot` is as for encode_text."""
    pieces = list(encode_text([text] if isinstance(text, str) else text, eot=eot))
    return np.concatenate(pieces) if pieces else np.empty(0, TOKEN)


def encode_text(text: Iterable[str], *, eot: str = "paragraph") -> "Iterator[Shard]":
    """Yield GPT-2's tokens of one text that comes in pieces, uint16 arrays; wherever it is cut, the tokens are the same.

    eot: where `<|endoftext|>` is put in: "paragraph", before the text and after every blank line (each "\\n\\n"), as llm.c
    prepares tinyshakespeare; "document", before the text; "none". In the text itself it is ordinary text. White space that
    follows other text is where pieces are encoded apart: a longer run of either has to fit in memory. Raises InputError
    for another `eot`.
    """
    if not isinstance(eot, str) or eot not in EOT_MODES:
        raise InputError(f"eot is {shown(eot)}: it must be one of {', '.join(EOT_MODES)}")
    return _encoded(text, Tokenizer(), eot)


def _encoded(text: Iterable[str], tokenizer: Tokenizer, eot: str) -> "Iterator[Shard]":
    ids = [] if eot == "none" else [tokenizer.eot]
    for piece in _independent(text):
        *paragraphs, last = piece.split("\n\n") if eot == "paragraph" else [piece]
        for paragraph in paragraphs:
            ids += tokenizer.encode(paragraph + "\n\n")
            ids.append(tokenizer.eot)
        ids += tokenizer.encode(last)
        if ids:
            yield np.array(ids, TOKEN)
        ids = []


# No token of GPT-2 reaches from other text into white space after it, nor do blank lines.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _independent(text: Iterable[str]) -> Iterator[str]:
    """Cut text anew, where tokens end whatever follows."""
    kept: list[str] = []
    for piece in text:
        cut = _LAST_CUT.match(piece)
        if cut:
            yield "".join([*kept, cut[0]])
            kept = []
        kept.append(piece[cut.end() :] if cut else piece)
    yield "".join(kept)
