"""GGUF files of GPT-2 models (version 3, llama.cpp's architecture `gpt2`): read strictly, written as a stream.

A file is a header (magic, version, counts), key-value pairs, a table of tensors (name, extents, type, offset), padding, and the
tensors. Each tensor begins at a multiple of general.alignment. The reader bounds every field, refuses a key or name that occurs
twice, and requires that the tensors follow each other in order and fill the file. Quantised values are read exactly.
Sources: ggml, docs/gguf.md and gguf.cpp; llama.cpp, llama-arch.cpp (names), llama-model.cpp (what a gpt2 model has)."""

import os
import struct
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, SupportsIndex

from ..config import LIMITS, TENSORS, Config
from ..cpus import resolve_threads
from ..errors import TYPE_CHECKING, CheckpointError, InputError, is_whole, plural, shown
from ..pool import ThreadPool
from ..tokenizer import GPT2_V, tokenizer_of, vocabulary_of
from .dtypes import BFLOAT16, FLOAT16, FLOAT32, Q4_0, Q6_K, Q8_0, Format, ModelFile, common_format, layout
from .files import MODEL_KIND, MappedFile, Path, atomic_file
from .panels import ALIGNMENT as ALIGNED
from .panels import MATRICES, QUANTISED, aligned, stored_size

if TYPE_CHECKING:
    from .dtypes import Blocks

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
TYPES = {0: FLOAT32, 1: FLOAT16, 2: Q4_0, 8: Q8_0, 14: Q6_K, 30: BFLOAT16}
TYPE_OF = {row.name: number for number, row in TYPES.items()}
OTHER_TYPES = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K"}
OTHER_TYPES |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"}
OTHER_TYPES |= {24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
FILE_TYPE = {"float32": 0, "float16": 1, "q4_0": 2, "q8_0": 7, "bfloat16": 32}  # general.file_type, by the layers' format

# These limits are far above every GPT-2, so a damaged count costs little memory and time.
HEADER_LIMIT = 1 << 26  # bytes before the tensors
KEYS_LIMIT, KEY_LIMIT, STRING_LIMIT, ARRAY_LIMIT = 4096, 1024, 1 << 20, 1 << 21
NAME_LIMIT, EXTENTS_LIMIT = 64, 4  # the limits of ggml
TENSORS_LIMIT = 2 * len(TENSORS) * LIMITS["L"]

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by value type
BOOL, STRING, ARRAY = 7, 8, 9
UINT32, INT32, FLOAT = 4, 5, 6
TOKENS, MERGES, TOKEN_TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
END_KEYS = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens

DIMENSIONS = {"maxT": "context_length", "C": "embedding_length", "L": "block_count", "NH": "attention.head_count"}
PARTS = {
    "ln1": "attn_norm", "qkv": "attn_qkv", "attproj": "attn_output", "ln2": "ffn_norm", "fc": "ffn_up", "fcproj": "ffn_down"
}  # fmt: skip
NAMES = {"wte": "token_embd.weight", "wpe": "position_embd.weight", "head": "output.weight"}
NAMES |= {"lnfw": "output_norm.weight", "lnfb": "output_norm.bias"}
NAMES |= {ours + end[0]: f"blk.{{}}.{theirs}.{end}" for ours, theirs in PARTS.items() for end in ("weight", "bias")}
HEAD = NAMES["head"]
SAID = {"F", "epsilon", "tied"}  # the variations that a file can describe
Value = int | float | bool | str


class Tensor(NamedTuple):
    """The place of a tensor in the file. `extents` are in GGUF's order: the length of a row first."""

    kind: Format
    extents: tuple[int, ...]
    start: int  # bytes [start, stop) of the file
    stop: int


class _Cursor:
    """Read the fields of a header in order. Each must fit into the bytes that the file has."""

    def __init__(self, path: str, data: memoryview) -> None:
        self._path, self.data, self.at = path, data, 0

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: not a valid GGUF file: {what}")

    def skip(self, size: int, what: str) -> int:
        """Skip `size` bytes. Return the position of the first."""
        begin = self.at
        if size > len(self.data) - begin:
            limit = f"; pygpt reads headers of at most {HEADER_LIMIT} bytes" if len(self.data) == HEADER_LIMIT else ""
            raise self.bad(f"truncated: {what} of {size} bytes at byte {begin} of {len(self.data)}{limit}")
        self.at += size
        return begin

    def scalar(self, code: str, what: str) -> int | float | bool:
        """Read one number of struct's type `code`."""
        value: int | float | bool = struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), what))[0]
        return value

    def count(self, code: str, low: int, high: int, what: str) -> int:
        """Read a whole number from low to high."""
        value = self.scalar(code, what)
        if not is_whole(value, low, high):
            raise self.bad(f"{what} is {value}, expected {low} to {high}")
        return int(value)

    def string(self, limit: int, what: str) -> str:
        """Read a string of UTF-8."""
        size = self.count("Q", 0, limit, f"the length of {what}")
        begin = self.skip(size, what)
        try:
            return bytes(self.data[begin : begin + size]).decode()
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8: {error.reason}") from None

    def array(self, what: str) -> tuple[int, int, int]:
        """Step over an array; return the type of its elements, where they begin, and how many there are."""
        kind = self.count("I", 0, max(SCALARS), f"the type of {what}")
        number = self.count("Q", 0, ARRAY_LIMIT, f"the length of {what}")
        begin = self.at
        if kind in SCALARS:
            self.skip(number * struct.calcsize("<" + SCALARS[kind]), what)
        elif kind == STRING:
            self.skip(self._strings(number), what)
        else:
            raise self.bad(f"{what} is an array of arrays")
        return kind, begin, number

    def _strings(self, number: int) -> int:
        """Return the bytes of `number` strings, or too many if the file ends first. The loop runs 100,000 times."""
        at, unpack = self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(number):
                at += 8 + unpack(self.data, at)[0]
        except (struct.error, OverflowError):
            at = self.at + len(self.data) + 1
        return at - self.at


class GGUFFile(ModelFile):
    """An open GGUF file of a gpt2 model. Only the part in use is mapped. Close it, or use `with`.

    stored() uses plain floats in place if their layers follow each other in the file; with mmap=False it copies them. It lays
    quantised tensors out in panels, on as many threads as GPT2.load() would use. Raises CheckpointError for any other file."""

    _file: MappedFile

    def __init__(self, path: Path, *, mmap: bool = True, threads: SupportsIndex | None = None) -> None:
        self.path, self._mmap, self._threads = os.fspath(path), mmap, threads
        self._waiting: list[tuple[memoryview, str, memoryview, int, int]] = []  # (panels, format, blocks, N, K)
        self._file = MappedFile(self.path, MODEL_KIND, CheckpointError)
        try:
            self._tensors = self._read_header()
            self.config = self._read_config()
            self.formats = self._read_formats()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> dict[str, Tensor]:
        """Read key-value pairs into self._values, and the places of arrays into self._arrays. Return the tensors."""
        cursor = self._cursor = _Cursor(self.path, self._file.view(0, min(self.size, HEADER_LIMIT)))
        magic = bytes(self._file.view(0, min(self.size, len(MAGIC))))
        cursor.skip(len(MAGIC), "the magic")
        if magic != MAGIC:
            raise cursor.bad(f"it begins with {magic!r}, expected {MAGIC!r}")
        version = int(cursor.scalar("I", "the version"))
        if version != VERSION:
            hint = "; the file has the other byte order" if version == VERSION << 24 else ""
            raise cursor.bad(f"version {version}, expected {VERSION}: convert the model again with a current llama.cpp{hint}")
        tensors = cursor.count("Q", 0, TENSORS_LIMIT, "the number of tensors")
        pairs = cursor.count("Q", 0, KEYS_LIMIT, "the number of keys")
        self._values: dict[str, Value] = {}
        self._arrays: dict[str, tuple[int, int, int]] = {}  # by key: type, offset, length
        for _ in range(pairs):
            self._read_pair(cursor)
        return self._place(cursor, [self._read_tensor(cursor) for _ in range(tensors)])

    def _read_pair(self, cursor: _Cursor) -> None:
        key = cursor.string(KEY_LIMIT, "a key")
        if key in self._values or key in self._arrays:
            raise cursor.bad(f"key {key[:80]!r} occurs twice")
        kind = cursor.count("I", 0, max(SCALARS), f"the type of {key[:80]!r}")
        if kind == ARRAY:
            self._arrays[key] = cursor.array(repr(key[:80]))
        elif kind == STRING:
            self._values[key] = cursor.string(STRING_LIMIT, repr(key[:80]))
        else:
            self._values[key] = cursor.scalar(SCALARS[kind], repr(key[:80]))

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, Format, tuple[int, ...], int]:
        name = cursor.string(NAME_LIMIT, "the name of a tensor")
        dimensions = cursor.count("I", 1, EXTENTS_LIMIT, f"the number of extents of {name!r}")
        extents = tuple(cursor.count("Q", 1, 1 << 32, f"an extent of {name!r}") for _ in range(dimensions))
        number = int(cursor.scalar("I", f"the type of {name!r}"))
        if number not in TYPES:
            found = OTHER_TYPES.get(number, f"number {number}")
            known = "pygpt reads only F32, F16, BF16, Q8_0, Q4_0 and Q6_K"
            way = "use the model's F16 or F32 file, and quantise it with `pygpt quantize`"
            raise CheckpointError(f"{self.path}: tensor {name!r} is of type {found}, but {known}: {way}")
        kind = TYPES[number]
        if extents[0] % kind.block_values:
            rule = f"expected a multiple of {kind.block_values} for {kind.name}"
            raise cursor.bad(f"tensor {name!r} has rows of {extents[0]} values, {rule}")
        return name, kind, extents, cursor.count("Q", 0, 1 << 62, f"the offset of {name!r}")

    def _place(self, cursor: _Cursor, table: list[tuple[str, Format, tuple[int, ...], int]]) -> dict[str, Tensor]:
        """Check that the aligned tensors follow each other and fill the file. Return the place of each."""
        alignment = self._values.get("general.alignment", ALIGNMENT)
        if not is_whole(alignment, 8, 1 << 16) or alignment % 8:
            raise cursor.bad(f"general.alignment is {shown(alignment)}, expected a multiple of 8 up to {1 << 16}")
        step = int(alignment)
        begin = end = aligned(cursor.at, step)
        found: dict[str, Tensor] = {}
        for name, kind, extents, offset in table:
            if name in found:
                raise cursor.bad(f"tensor {name!r} occurs twice")
            start = aligned(end, step)
            if begin + offset != start:
                raise cursor.bad(f"tensor {name!r} begins at {offset}, expected {start - begin}")
            end = start + kind.size(prod(extents))
            found[name] = Tensor(kind, extents, start, end)
        if not end <= self.size <= aligned(end, step):
            flaw = "truncated" if self.size < end else "too long"
            raise cursor.bad(f"{flaw}: {self.size} bytes, expected {end}; fetch it again")
        return found

    def _read_config(self) -> Config:
        """Return the dimensions, from the keys and the token embedding. Refuse settings that pygpt does not compute."""
        values = self._values
        if values.get("split.count", 1) not in (0, 1):  # first: only the first part names its architecture
            raise self._bad(f"it is one of {shown(values['split.count'])} parts of a model: merge them with llama-gguf-split")
        architecture = values.get("general.architecture")
        if architecture != "gpt2":
            raise self._bad(f"general.architecture is {shown(architecture)}, expected 'gpt2'")
        epsilon = values.get("gpt2.attention.layer_norm_epsilon")
        if not isinstance(epsilon, float):
            raise self._bad(f"gpt2.attention.layer_norm_epsilon is {shown(epsilon)}, expected a number such as 1e-05")
        embedding = self._tensors.get(NAMES["wte"])
        if embedding is None or len(embedding.extents) != 2:
            raise self._bad(f"tensor {NAMES['wte']} is missing or does not have two extents")
        found: dict[str, Any] = {ours: values.get(f"gpt2.{theirs}") for ours, theirs in DIMENSIONS.items()}
        found |= {"V": embedding.extents[1], "F": values.get("gpt2.feed_forward_length"), "tied": self._tied()}
        try:
            config = Config(**found, epsilon=float(f"{epsilon:.7g}"))  # the number that was rounded to float32
        except InputError as error:
            meaning = ", ".join(f"{ours} is its gpt2.{theirs}" for ours, theirs in DIMENSIONS.items())
            raise self._bad(f"{error} ({meaning})") from None
        if (heads := values.get("gpt2.attention.head_count_kv", config.NH)) != config.NH:
            raise self._bad(f"gpt2.attention.head_count_kv is {shown(heads)}, expected {config.NH} for {config}")
        for key, noun in (TOKENS, "token"), (TOKEN_TYPES, "type"):
            if (number := self._arrays.get(key, (0, 0, config.V))[2]) != config.V:
                raise self._bad(f"{key} has {plural(number, noun)}, but {NAMES['wte']} has {config.V} rows")
        return config

    def _read_formats(self) -> dict[str, Format]:
        """Check names and extents of all tensors against the dimensions. Return the format of each of ours."""
        wanted = {}
        for name, _ in self.config.table:
            layers, N, K = layout(self.config, name)
            wanted[name] = dict.fromkeys(_theirs(name, layers), (K, N) if name in MATRICES else (K,))
        tied = {HEAD} if self.config.tied else set()
        found = {name: tensor.extents for name, tensor in self._tensors.items() if name not in tied}
        self._check_tensors(wanted, found, "extents")
        return {name: common_format(self._tensors[one].kind for one in theirs) for name, theirs in wanted.items()}

    def _tied(self) -> bool:
        """Return whether the head is the token embedding: the file has no head, or one of the same bytes."""
        if HEAD not in self._tensors:
            return True
        head, wte = self._tensors[HEAD], self._tensors[NAMES["wte"]]
        same = (head.kind, head.extents) == (wte.kind, wte.extents)
        return same and self._file.view(head.start, head.stop) == self._file.view(wte.start, wte.stop)

    @property
    def has_vocabulary(self) -> bool:
        """Whether the file has a vocabulary, of any kind."""
        return self._values.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")

    def vocabulary(self) -> dict[str, Any]:
        """Return the vocabulary in the form of tokenizer.json. Raises InputError if it is not GPT-2's kind."""
        model, split = (self._values.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        missing = "".join(f", without {key}" for key in (TOKENS, MERGES) if key not in self._arrays)
        if model != "gpt2" or split not in (None, "gpt-2", "default") or missing:
            what = f"its vocabulary has model {shown(model)} and pre {shown(split)}{missing}"
            raise InputError(f"{self.path}: {what}; pygpt reads only 'gpt2' with 'gpt-2': give a tokenizer.json (--tokenizer)")
        tokens = self._strings(TOKENS)
        kind, at, _ = self._arrays.get(TOKEN_TYPES, (0, 0, 0))
        types = struct.unpack_from(f"<{len(tokens)}i", self._cursor.data, at) if kind in (UINT32, INT32) else (1,) * len(tokens)
        typed = zip(tokens, types, strict=True)
        added = {token: number == CONTROL for token, number in typed if number in (CONTROL, USER_DEFINED)}
        end = next((token for i, token in enumerate(tokens) if i == self._values.get(END_KEYS[1])), None)
        return vocabulary_of(tokens, self._strings(MERGES), added, end=end)

    def _strings(self, key: str) -> list[str]:
        """Return the strings of an array."""
        kind, at, number = self._arrays[key]
        if kind != STRING:
            raise self._cursor.bad(f"{key} is not an array of strings")
        cursor = _Cursor(self.path, self._cursor.data)
        cursor.at = at
        return [cursor.string(STRING_LIMIT, key) for _ in range(number)]

    def part(self, name: str, layer: int, start: int, stop: int) -> "tuple[Format, Blocks]":
        """Return rows [start, stop) of one layer's part of a tensor: ModelFile.part(), as a view of the file."""
        import numpy as np

        tensor = self._tensors[NAMES[name].format(layer)]
        row = tensor.kind.size(tensor.extents[0])
        data = self._file.view(tensor.start + start * row, tensor.start + stop * row)
        return tensor.kind, np.frombuffer(data, tensor.kind.dtype).reshape(stop - start, -1)

    def stored(self) -> dict[str, tuple[str, memoryview]]:
        """Map each tensor to (format's name, bytes), as ModelFile.stored() says."""
        from .._kernels import blocks_to_panels

        waiting = self._waiting = []
        found = super().stored()

        def job(ith: int, nth: int) -> None:
            for into, kind, blocks, N, K in waiting:
                blocks_to_panels(into, kind, blocks, 1, N, K, ith, nth)

        if waiting:
            with ThreadPool(resolve_threads(self._threads)) as pool:
                pool.run(job)
        return found

    def _stored(self, name: str) -> tuple[str, memoryview]:
        """Return all layers of a tensor, one after the other. stored() fills the panels of quantised tensors."""
        from .._kernels import Floats

        layers, N, K = layout(self.config, name)
        kind, parts = self.formats[name], [self._tensors[theirs] for theirs in _theirs(name, layers)]
        if any(part.kind != kind for part in parts):
            return FLOAT32.name, self._widened(name)
        apart = any(one.stop != two.start for one, two in pairwise(parts))
        if self._mmap and not apart and kind.name not in QUANTISED:
            return kind.name, self._file.view(parts[0].start, parts[-1].stop)
        size = stored_size(self.config, name, kind)
        out = memoryview(Floats(1, -(-size // 4), dense=True)).cast("B")[:size]
        step = size // layers
        for layer, part in enumerate(parts):
            into, content = out[layer * step : (layer + 1) * step], self._file.view(part.start, part.stop)
            if kind.name in QUANTISED:
                into[-ALIGNED:] = bytes(ALIGNED)  # the padding of the scales
                self._waiting.append((into, kind.name, content, N, K))
            else:
                into[:] = content
        return kind.name, out


def _theirs(name: str, layers: int) -> list[str]:
    """Return the names in GGUF of the layers of one of our tensors."""
    return [NAMES[name].format(layer) for layer in range(layers)]


def write_gguf(path: Path, config: Config, formats: Mapping[str, Format], tensors: "Mapping[str, Iterator[Blocks]]") -> None:
    """Write a GGUF file for llama.cpp, all or nothing. Arguments and errors are those of panels.write_panels().

    The file contains the model's vocabulary if that splits text as GPT-2's does. Raises InputError for rows that do not fill
    whole blocks."""
    if unsaid := sorted(config.variations.keys() - SAID):
        value = shown(getattr(config, unsaid[0]))
        raise InputError(f"{os.fspath(path)}: GGUF's gpt2 cannot describe {unsaid[0]} = {value}: write a .safetensors file")
    for name, kind in formats.items():
        _, _, K = layout(config, name)
        if K % kind.block_values:
            rule = f"{kind.name} in GGUF needs a multiple of {kind.block_values}"
            way = "write a .safetensors file, which pads rows, or use --format f16"
            raise InputError(f"{os.fspath(path)}: {name} has rows of {K} values, but {rule}: {way}")
    table, end = [], 0
    for name, _ in config.table:
        layers, N, K = layout(config, name)
        for theirs in _theirs(name, layers):
            extents = (K, N) if name in MATRICES else (K,)
            place = struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, TYPE_OF[formats[name].name], end)
            table.append(_string(theirs) + place)
            end = aligned(end + formats[name].size(N * K), ALIGNMENT)
    pairs = _pairs(config, formats)
    header = MAGIC + struct.pack("<IQQ", VERSION, len(table), len(pairs)) + b"".join(pairs) + b"".join(table)
    with atomic_file(path) as file:
        file.write(header + bytes(-len(header) % ALIGNMENT))
        for name, _ in config.table:
            layers, N, K = layout(config, name)
            rows = 0
            for piece in tensors[name]:
                file.write(piece.data)
                rows += len(piece)
                if rows % N == 0:  # the end of a layer
                    file.write(bytes(-formats[name].size(N * K) % ALIGNMENT))


def _pairs(config: Config, formats: Mapping[str, Format]) -> list[bytes]:
    pairs: dict[str, Any] = {"general.architecture": "gpt2"}
    pairs |= {f"gpt2.{theirs}": getattr(config, ours) for ours, theirs in DIMENSIONS.items()}
    pairs |= {"gpt2.feed_forward_length": config.F, "general.file_type": FILE_TYPE[formats["qkvw"].name]}
    if {formats["qkvw"].name, formats["wte"].name} & QUANTISED.keys():
        pairs["general.quantization_version"] = 2
    pairs |= {"gpt2.attention.layer_norm_epsilon": config.epsilon, **_vocabulary(config)}
    return [_string(key) + _value(value) for key, value in pairs.items()]


def _vocabulary(config: Config) -> dict[str, Any]:
    """Return the keys of the vocabulary, filled with placeholders, or only its size if GGUF cannot describe it."""
    tokenizer = tokenizer_of(config) if config.tokenizer or config.V >= GPT2_V else None
    if tokenizer is None or not tokenizer.splits_before_space:
        return {"tokenizer.ggml.model": "none", "gpt2.vocab_size": config.V}
    found = tokenizer.vocabulary()
    tokens = {i: token for token, i in found["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in found["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    ends = {} if tokenizer.eot is None else dict.fromkeys(END_KEYS, tokenizer.eot)
    kind = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    texts = [tokens.get(i, f"<|{i}|>") for i in range(config.V)]
    numbers = [types.get(i, UNUSED) for i in range(config.V)]
    return {**kind, TOKENS: texts, TOKEN_TYPES: numbers, MERGES: merges, **ends}


def _value(value: Any) -> bytes:
    """Return the type and the bytes of a text, a whole number, a number, or a list of texts or whole numbers."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if not isinstance(value, list):
        return struct.pack("<If", FLOAT, value) if isinstance(value, float) else struct.pack("<II", UINT32, value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
