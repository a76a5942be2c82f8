"""llm.c's data files: token shards, the debug state, multiple-choice examples, and the vocabulary.

    shard         uint16 ids, which stay in the mapped file until they are used
    debug state   one batch as PyTorch computed it: tokens, logits, loss and every gradient
    examples      multiple choice such as HellaSwag: a context and four endings; one is right
    vocabulary    the bytes of every id, for programs that only decode

Each file begins with an int32[256] little-endian header. The readers check every field and length against the file's end before
they use it, and refuse bytes after the last value.
Sources: llm.c, train_gpt2.py (write_state, write_tokenizer), dev/data/data_common.py, llmc/dataloader.h."""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import LIMITS, Config
from ..errors import DataError, InputError, is_whole, shown
from ..tokenizer import GPT2_V
from .files import HEADER_BYTES, Path, atomic_file, map_file

Tokens = npt.NDArray[np.integer[Any]]  # (tokens,)
Shard = npt.NDArray[np.uint16]  # (tokens,)

MAGIC, STATE_MAGIC, EXAMPLES_MAGIC, VOCABULARY_MAGIC = 20240520, 20240327, 20240522, 20240328
TOKEN = np.dtype("<u2")
MOST_TOKENS = 2**31 - 1  # the header's count is an int32
PIECE = 1 << 20  # tokens checked or written at a time
STATE_VERSION = 2  # version 1 did not pad wte
START = 65535  # the first value of an example
ENDINGS = 4
VOCABULARY_VERSIONS = (1, 2)  # version 1 does not contain the end of text: it is GPT-2's


def map_data(path: str, kind: str, magic: int, versions: Sequence[int], named: int) -> tuple[list[int], memoryview]:
    """Map one of llm.c's data files; return ([version, next `named` fields], the map with the header).

    Raises DataError for another magic or version, a file shorter than a header, and a header whose other fields are not 0."""
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

    return fields, map_file(path, kind, DataError, check)


def check_size(path: str, found: int, expected: int, what: str) -> None:
    """Raise DataError unless the file has exactly the size that its header promises."""
    if found != expected:
        flaw = "truncated" if found < expected else "too long"
        raise DataError(f"{path}: {flaw}: {found} bytes, expected {expected} for {what}")


def header_bytes(magic: int, version: int, *fields: int) -> bytes:
    """Return the header of a data file."""
    return struct.pack("<256i", magic, version, *fields, *[0] * (254 - len(fields)))


def check_ids(tokens: Tokens, V: int, where: str) -> None:
    """Raise DataError, with the position of the first wrong id, unless all ids are in [0, V)."""
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        if piece.max() >= V or piece.min() < 0:
            position = start + int(np.flatnonzero((piece < 0) | (piece >= V))[0])
            found = f"token id {tokens[position]} at position {position}"
            raise DataError(f"{where}: {found}: it must be below the vocabulary of {V} ids")


def read_tokens(path: Path, *, V: int | None = None) -> Shard:
    """Open a token shard as a read-only uint16 array (tokens,), a view of the mapped file.

    V: the vocabulary size, to check every id. Raises DataError, with found and expected numbers, for any other file."""
    name = os.fspath(path)
    (_, count), mapped = map_data(name, "token file", MAGIC, (1,), 1)
    if count < 1:
        raise DataError(f"{name}: bad header: {count} tokens, expected 1 or more")
    check_size(name, len(mapped), HEADER_BYTES + 2 * count, f"{count} tokens")
    tokens = np.frombuffer(mapped, TOKEN, offset=HEADER_BYTES)
    if V is not None:
        check_ids(tokens, V, name)
    return tokens


def write_tokens(path: Path, tokens: npt.ArrayLike | Iterator[npt.ArrayLike]) -> int:
    """Write a token shard atomically; return how many tokens it has.

    tokens: one array of ids, or an iterator of arrays, each dropped after it is written. Raises InputError for zero tokens or
    more than 2**31 - 1, and for ids that are not whole numbers from 0 to 65535. Raises OSError if it cannot write the file."""
    count = 0
    with atomic_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for piece in tokens if isinstance(tokens, Iterator) else [tokens]:
            ids = as_tokens(piece)
            count += len(ids)
            if count > MOST_TOKENS:
                raise InputError(f"{os.fspath(path)}: more than {MOST_TOKENS} tokens: write several shards")
            check_ids(ids, 1 << 16, os.fspath(path))
            for start in range(0, len(ids), PIECE):  # ids may view a file larger than memory
                file.write(ids[start : start + PIECE].astype(TOKEN).data)
        if not count:
            raise InputError(f"{os.fspath(path)}: there are no tokens to write: a shard holds 1 or more")
        file.seek(0)
        file.write(header_bytes(MAGIC, 1, count))
    return count


def as_tokens(tokens: npt.ArrayLike) -> Tokens:
    """Return tokens as a one-dimensional array of integers. Raises InputError for anything else."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InputError(f"tokens must be an array (tokens,) of integers: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"tokens have shape {array.shape} and type {array.dtype}: they must be an array (tokens,) of integers")
    return array if array.size else array.astype(TOKEN)


class DebugState(NamedTuple):
    """One batch and PyTorch's results for it. All fields but `loss` are read-only views of the file."""

    inputs: npt.NDArray[np.int32]  # (B, T)
    targets: npt.NDArray[np.int32]  # (B, T)
    logits: npt.NDArray[np.float32]  # (B, T, V)
    loss: float  # the mean over B*T
    gradients: dict[str, npt.NDArray[np.float32]]  # by tensor, of config.tensors()' shapes, wte (V, C)


def read_debug_state(path: Path, config: Config) -> DebugState:
    """Read llm.c's debug state (`gpt2_124M_debug_state.bin`) of a model of this shape.

    Raises DataError, with the found and the expected numbers, for any file that is not exactly a debug state."""
    name = os.fspath(path)
    (_, B, T), mapped = map_data(name, "debug state", STATE_MAGIC, (STATE_VERSION,), 2)
    if B < 1 or not 1 <= T <= config.maxT:
        raise DataError(f"{name}: bad header: B is {B} and T is {T}: B must be at least 1 and T from 1 to maxT = {config.maxT}")
    sizes = [B * T, B * T, B * T * config.V, 1, config.parameters(padded=True)]
    check_size(name, len(mapped), HEADER_BYTES + 4 * sum(sizes), f"B = {B}, T = {T} and {config}")
    starts = [HEADER_BYTES + 4 * sum(sizes[:i]) for i in range(len(sizes))]
    inputs, targets = (np.frombuffer(mapped, "<i4", B * T, start).reshape(B, T) for start in starts[:2])
    for what, ids in (("inputs", inputs), ("targets", targets)):
        check_ids(ids.reshape(-1), config.V, f"{name}: {what}")
    logits, loss, values = (np.frombuffer(mapped, "<f4", n, start) for n, start in zip(sizes[2:], starts[2:], strict=True))
    gradients = {
        tensor: values[offset : offset + size].reshape(shape)[: config.V if tensor == "wte" else None]
        for tensor, shape, offset, size in config.tensors(padded=True)
    }
    return DebugState(inputs, targets, logits.reshape(B, T, config.V), float(loss[0]), gradients)


def write_debug_state(path: Path, config: Config, state: DebugState) -> None:
    """Write a debug state atomically. Raises InputError for arrays whose shapes are not DebugState's, and OSError."""
    inputs, targets = (np.asarray(ids) for ids in (state.inputs, state.targets))
    if inputs.ndim != 2 or not inputs.size or not 1 <= inputs.shape[1] <= config.maxT:
        raise InputError(f"inputs have shape {inputs.shape}, expected (B, T) with T from 1 to maxT = {config.maxT}")
    shape = inputs.shape
    wanted = [(tensor, extents) for tensor, extents, _, _ in config.tensors(padded=False)]
    if set(state.gradients) != {tensor for tensor, _ in wanted}:
        odd = sorted(map(str, set(state.gradients) ^ {tensor for tensor, _ in wanted}))
        raise InputError(f"gradients: expected the sixteen tensors, but {shown(odd)} are missing or unknown")
    arrays = [("inputs", inputs, shape), ("targets", targets, shape), ("logits", state.logits, (*shape, config.V))]
    for what, array, expected in arrays + [(f"gradient {name}", state.gradients[name], extents) for name, extents in wanted]:
        if np.shape(array) != expected:
            raise InputError(f"{what} has shape {np.shape(array)}, expected {expected}")
    for what, ids in (("inputs", inputs), ("targets", targets)):
        check_ids(as_tokens(ids.reshape(-1)), config.V, what)
    with atomic_file(path) as file:
        file.write(header_bytes(STATE_MAGIC, STATE_VERSION, *shape))
        for ids in (inputs, targets):
            file.write(ids.astype("<i4").tobytes())
        wte, *others = (state.gradients[tensor] for tensor, _ in wanted)
        for values in (state.logits, state.loss, wte, np.zeros((config.Vp - config.V, config.C)), *others):
            file.write(np.asarray(values, "<f4").tobytes())


class Example(NamedTuple):
    """A context and its endings, as token ids. Ending `label` is right. `number` is the index in the file, from 0."""

    number: int
    label: int
    context: Sequence[int]
    endings: Sequence[Sequence[int]]


def read_examples(path: Path, *, V: int | None = None) -> Iterator[Example]:
    """Yield the examples of a multiple-choice file (`hellaswag_val.bin`) in order.

    V: the vocabulary size, to check every id. Raises DataError for any file that is not exactly such a file. The header is
    checked at once, and each example before it is yielded; the error gives the example's offset in the file."""
    name = os.fspath(path)
    (_, count, longest), mapped = map_data(name, "file of examples", EXAMPLES_MAGIC, (1,), 2)
    if count < 1:
        raise DataError(f"{name}: bad header: {count} examples, expected 1 or more")
    if len(mapped) % 2:
        raise DataError(f"{name}: truncated: {len(mapped)} bytes is an odd number, but all values have 2 bytes")
    return _examples(name, np.frombuffer(mapped, TOKEN, offset=HEADER_BYTES), count, longest, V)


def _examples(name: str, stream: npt.NDArray[np.uint16], count: int, longest: int, V: int | None) -> Iterator[Example]:
    start = 0
    for index in range(count):
        where = f"{name}: example {index} at byte {HEADER_BYTES + 2 * start}"
        head = stream[start : start + 2].tolist()
        if len(head) < 2:
            raise DataError(f"{where}: truncated: the file ends, but its header promises {count} examples")
        if head[0] != START:
            raise DataError(f"{where}: it begins with {head[0]}, expected {START}")
        if head[1] % 2 or head[1] > longest:
            raise DataError(f"{where}: it has {head[1]} bytes, expected an even number up to the header's {longest}")
        values = stream[start : start + head[1] // 2]
        if 2 * len(values) != head[1]:
            raise DataError(f"{where}: truncated: it has {head[1]} bytes, but the file has only {2 * len(values)} more")
        yield _example(where, index, values[2:].tolist(), V)
        start += len(values)
    if start != len(stream):
        raise DataError(f"{name}: too long: {2 * (len(stream) - start)} bytes after the last of {count} examples")


def _example(where: str, index: int, values: list[int], V: int | None) -> Example:
    def take(number: int, what: str) -> list[int]:
        if len(values) < number:
            raise DataError(f"{where}: its {what} needs {number} values, but {len(values)} are left")
        taken = values[:number]
        del values[:number]
        return taken

    def tokens(what: str) -> list[int]:
        ids = take(take(1, f"{what}'s length")[0], what)
        if not ids:
            raise DataError(f"{where}: its {what} has no tokens")
        check_ids(np.array(ids), START if V is None else V, f"{where}: its {what}")
        return ids

    found, label, endings = take(3, "index, label and number of endings")
    if found != index:
        raise DataError(f"{where}: its index is {found}, expected {index}")
    if label >= ENDINGS:
        raise DataError(f"{where}: its label is {label}, expected 0 to {ENDINGS - 1}")
    if endings != ENDINGS:
        raise DataError(f"{where}: it has {endings} endings, expected {ENDINGS}")
    example = Example(index, label, tokens("context"), [tokens(f"ending {i}") for i in range(ENDINGS)])
    if values:
        raise DataError(f"{where}: {len(values)} values are left after its last ending")
    return example


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Write a multiple-choice file atomically; return how many examples it has.

    Examples are numbered from 0. Raises InputError for an example that does not fit in the format, and OSError."""
    count = longest = 0
    with atomic_file(path) as file:
        file.write(bytes(HEADER_BYTES))
        for example in examples:
            if not is_whole(example.label, 0, ENDINGS - 1):
                raise InputError(f"example {count}: its label is {shown(example.label)}, expected 0 to {ENDINGS - 1}")
            values = [count, example.label, len(example.endings)]
            for ids in (example.context, *example.endings):
                tokens = as_tokens(ids).tolist()
                values += [len(tokens), *tokens]
            size = 2 * (2 + len(values))
            if count >= START or size > START:
                raise InputError(f"example {count} has {size} bytes: at most {START} examples of at most {START} bytes fit")
            _example(f"example {count}", count, list(values), None)
            file.write(np.array([START, size, *values], TOKEN).tobytes())
            count, longest = count + 1, max(longest, size)
        if not count:
            raise InputError(f"{os.fspath(path)}: there are no examples to write")
        file.seek(0)
        file.write(header_bytes(EXAMPLES_MAGIC, 1, count, longest))
    return count


def read_tokenizer(path: Path) -> tuple[list[bytes], int]:
    """Read llm.c's vocabulary (`gpt2_tokenizer.bin`); return the bytes of every id, and the id that ends a text.

    Raises DataError for any file that is not exactly a vocabulary."""
    name = os.fspath(path)
    (version, V, eot), mapped = map_data(name, "vocabulary", VOCABULARY_MAGIC, VOCABULARY_VERSIONS, 2)
    if version == 1:
        if V != GPT2_V or eot:
            raise DataError(f"{name}: bad header: V is {V} and field 3 is {eot}, expected {GPT2_V} and 0 in version 1")
        eot = GPT2_V - 1
    if not 0 <= eot < V <= LIMITS["V"]:
        rule = f"it must be an id below V, and V at most {LIMITS['V']}"
        raise DataError(f"{name}: bad header: the end of text is {eot}, and V is {V}: {rule}")
    tokens: list[bytes] = []
    start = HEADER_BYTES
    for token in range(V):
        end = start + 1 + mapped[start] if start < len(mapped) else start + 1
        if end > len(mapped):
            raise DataError(f"{name}: truncated: token {token} of {V} would end at byte {end} of {len(mapped)}")
        tokens.append(bytes(mapped[start + 1 : end]))
        start = end
    check_size(name, len(mapped), start, f"{V} tokens")
    return tokens, eot


def write_tokenizer(path: Path, tokens: Sequence[bytes], eot: int) -> None:
    """Write a vocabulary (version 2) atomically. Raises InputError for values that do not fit in the format, and OSError."""
    if not is_whole(eot, 0, len(tokens) - 1):
        raise InputError(f"eot is {shown(eot)}: with {len(tokens)} tokens it must be a whole number, 0 to {len(tokens) - 1}")
    for token, content in enumerate(tokens):
        if len(content) > 255:
            raise InputError(f"token {token} has {len(content)} bytes: at most 255 fit in the format")
    with atomic_file(path) as file:
        file.write(header_bytes(VOCABULARY_MAGIC, 2, len(tokens), eot))
        file.write(b"".join(bytes([len(content)]) + content for content in tokens))
