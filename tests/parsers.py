"""Parsers of the file formats, apart from pygpt's and with struct and json alone. If a parser finds a file valid, pygpt must
read the same values. It must refuse every other file. A parser returns None for a file that is not valid.

Sources: llm.c, train_gpt2.py and dev/data/data_common.py; the description of safetensors."""

import hashlib
import json
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

HEADER = 1024
Shape = dict[str, int]
Tensors = dict[str, bytes]
Floats = npt.NDArray[np.float32]
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "U8": 1, "I8": 1, "BOOL": 1, "F8_E5M2": 1, "F8_E4M3": 1}
WIDTHS |= {"U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}


def shape_of(maxT: int, V: int, L: int, NH: int, C: int) -> Shape | None:
    """The dimensions of a sane model."""
    if not (0 < maxT <= 65536 and 0 < V <= 1 << 20 and 0 < L <= 256 and 0 < NH <= 1024 and 0 < C <= 16384) or C % NH:
        return None
    return {"maxT": maxT, "V": V, "L": L, "NH": NH, "C": C, "Vp": (V + 127) // 128 * 128}


def tensor_sizes(s: Shape, rows: int) -> dict[str, int]:
    """How many values each tensor has, in the order of a checkpoint, wte with so many rows."""
    L, C = s["L"], s["C"]
    return {
        "wte": rows * C, "wpe": s["maxT"] * C, "ln1w": L * C, "ln1b": L * C, "qkvw": 3 * L * C * C, "qkvb": 3 * L * C,
        "attprojw": L * C * C, "attprojb": L * C, "ln2w": L * C, "ln2b": L * C, "fcw": 4 * L * C * C, "fcb": 4 * L * C,
        "fcprojw": 4 * L * C * C, "fcprojb": L * C, "lnfw": C, "lnfb": C,
    }  # fmt: skip


def fields_of(data: bytes, count: int) -> list[int] | None:
    """Return the first fields of a header, if its other fields are 0."""
    if len(data) < HEADER:
        return None
    fields = list(struct.unpack("<256i", data[:HEADER]))
    return None if any(fields[count:]) else fields[:count]


def checkpoint(data: bytes) -> tuple[int, Shape, Tensors] | None:
    """A checkpoint's version, shape, and the bytes of its tensors, padding included."""
    fields = fields_of(data, 8)
    if fields is None or fields[0] != 20240326 or fields[1] not in (1, 3, 5):
        return None
    version, shape = fields[1], shape_of(*fields[2:7])
    if shape is None or (version != 1 and fields[7] != shape["Vp"]):
        return None
    width = 2 if version == 5 else 4
    sizes = tensor_sizes(shape, shape["V"] if version == 1 else shape["Vp"])
    if len(data) != HEADER + width * sum(sizes.values()):
        return None
    tensors, at = {}, HEADER
    for name, size in sizes.items():
        tensors[name] = data[at : at + width * size]
        at += width * size
    return version, shape, tensors


def shard(data: bytes) -> list[int] | None:
    """A token shard's ids."""
    fields = fields_of(data, 3)
    if fields is None or fields[:2] != [20240520, 1] or fields[2] < 1 or len(data) != HEADER + 2 * fields[2]:
        return None
    return [low + 256 * high for low, high in zip(data[HEADER::2], data[HEADER + 1 :: 2], strict=True)]


def tokenizer(data: bytes) -> tuple[list[bytes], int] | None:
    """A vocabulary: the bytes of each id, and the end of text."""
    fields = fields_of(data, 4)
    if fields is None or fields[0] != 20240328 or fields[1] not in (1, 2):
        return None
    _, version, V, eot = fields
    if version == 1:
        if (V, eot) != (50257, 0):
            return None
        eot = 50256
    if not 0 <= eot < V <= 1 << 20:
        return None
    tokens, rest = [], memoryview(data)[HEADER:]
    while len(rest):
        size = rest[0]
        if len(rest) < 1 + size:
            return None
        tokens.append(bytes(rest[1 : 1 + size]))
        rest = rest[1 + size :]
    return (tokens, eot) if len(tokens) == V else None


def debug_state(data: bytes, s: Shape) -> dict[str, Any] | None:
    """A debug state of a model of this shape: ids as lists, values as bytes."""
    fields = fields_of(data, 4)
    if fields is None or fields[:2] != [20240327, 2]:
        return None
    B, T = fields[2:]
    if B < 1 or not 1 <= T <= s["maxT"]:
        return None
    n, values = B * T, B * T * s["V"]
    gradients = sum(tensor_sizes(s, s["Vp"]).values())
    if len(data) != HEADER + 4 * (2 * n + values + 1 + gradients):
        return None
    ids = struct.unpack_from(f"<{2 * n}i", data, HEADER)
    if not all(0 <= token < s["V"] for token in ids):
        return None
    at = HEADER + 8 * n
    return {
        "inputs": list(ids[:n]),
        "targets": list(ids[n:]),
        "logits": data[at : at + 4 * values],
        "loss": data[at + 4 * values : at + 4 * values + 4],
        "gradients": data[at + 4 * values + 4 :],
    }


def examples(data: bytes, V: int) -> list[tuple[int, list[list[int]]]] | None:
    """A file of examples: the label, and context and four endings, of each."""
    fields = fields_of(data, 4)
    if fields is None or fields[:2] != [20240522, 1] or fields[2] < 1 or len(data) % 2:
        return None
    values = list(struct.unpack(f"<{(len(data) - HEADER) // 2}H", data[HEADER:]))
    found: list[tuple[int, list[list[int]]]] = []
    while values:
        if len(values) < 6 or values[0] != 65535 or values[1] % 2 or values[1] > fields[3] or values[2] != len(found):
            return None
        example, values = values[: values[1] // 2], values[values[1] // 2 :]
        if len(example) < 6 or example[1] != 2 * len(example) or example[3] > 3 or example[4] != 4:
            return None
        label, rest, lists = example[3], example[5:], []
        for _ in range(5):
            if not rest or not 0 < rest[0] < len(rest) or max(rest[1 : 1 + rest[0]]) >= V:
                return None
            lists.append(rest[1 : 1 + rest[0]])
            rest = rest[1 + rest[0] :]
        if rest:
            return None
        found.append((label, lists))
    return found if len(found) == fields[2] else None


def state(data: bytes) -> tuple[Shape, bytes, bytes] | None:
    """A training state's shape, JSON and buffers; the content of the JSON is not checked."""
    fields = fields_of(data, 9)
    if fields is None or fields[:2] != [20261122, 1]:
        return None
    shape, size = shape_of(*fields[2:7]), fields[8]
    if shape is None or fields[7] != shape["Vp"] or not 0 < size <= 1 << 24 or size % 64:
        return None
    if len(data) != HEADER + size + 12 * sum(tensor_sizes(shape, shape["Vp"]).values()) + 32:
        return None
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        return None
    return shape, data[HEADER : HEADER + size], data[HEADER + size : -32]


def state_bytes(shape: Shape, progress: object) -> bytes:
    """A training state of zeros that says this of its progress."""
    try:
        text = json.dumps(progress).encode()
    except (ValueError, RecursionError):
        text = b"null"
    text += b" " * (-len(text) % 64)
    fields = [20261122, 1, *(shape[name] for name in ("maxT", "V", "L", "NH", "C", "Vp")), len(text)]
    data = struct.pack("<256i", *fields, *[0] * (256 - len(fields))) + text
    data += bytes(12 * sum(tensor_sizes(shape, shape["Vp"]).values()))
    return data + hashlib.sha256(data).digest()


# ------------------------------------------------------------------------------------------------ safetensors


class _Twice(ValueError):
    """A name that comes twice."""


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise _Twice
    return dict(pairs)


def _constant(name: str) -> None:
    raise ValueError(name)


def strict_json(text: bytes) -> dict[str, Any] | None:
    """A JSON object, UTF-8, without NaN and without a name that comes twice."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_members, parse_constant=_constant)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """A safetensors file: dtype, shape and bytes of each tensor."""
    if len(data) < 8:
        return None
    size = int.from_bytes(data[:8], "little")
    if size > 4 << 20 or 8 + size > len(data) or data[8:9] != b"{":
        return None
    header, body = strict_json(data[8 : 8 + size]), data[8 + size :]
    if header is None:
        return None
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or any(type(value) is not str for value in metadata.values()):
        return None
    found, covered = {}, []
    for name, entry in header.items():
        if type(entry) is not dict or sorted(entry) != ["data_offsets", "dtype", "shape"]:
            return None
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(dtype) is not str or dtype not in WIDTHS or type(shape) is not list or type(offsets) is not list:
            return None
        if len(shape) > 8 or len(offsets) != 2 or not all(map(_natural, [*shape, *offsets])) or any(n > 1 << 48 for n in shape):
            return None
        if offsets[1] - offsets[0] != WIDTHS[dtype] * math.prod(shape):
            return None
        covered.append((offsets[0], offsets[1]))
        found[name] = dtype, tuple(shape), body[offsets[0] : offsets[1]]
    at = 0
    for begin, end in sorted(covered):
        if begin != at:
            return None
        at = end
    return found if at == len(body) else None


def safetensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A safetensors file of these tensors."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
GGUF_CODES = dict(zip(GGUF_WIDTHS, "BbHhIif?Qqd", strict=True))
GGUF_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 14: (256, 210), 30: (1, 2)}  # values and bytes of a block
GGUF_LAYER = {
    "attn_norm.weight": "ln1w", "attn_norm.bias": "ln1b", "attn_qkv.weight": "qkvw", "attn_qkv.bias": "qkvb",
    "attn_output.weight": "attprojw", "attn_output.bias": "attprojb", "ffn_norm.weight": "ln2w", "ffn_norm.bias": "ln2b",
    "ffn_up.weight": "fcw", "ffn_up.bias": "fcb", "ffn_down.weight": "fcprojw", "ffn_down.bias": "fcprojb",
}  # fmt: skip
GGUF_WHOLE = {
    "token_embd.weight": "wte",
    "position_embd.weight": "wpe",
    "output_norm.weight": "lnfw",
    "output_norm.bias": "lnfb",
}
GGUF_KEYS = {"maxT": "context_length", "C": "embedding_length", "L": "block_count", "NH": "attention.head_count"}


class _Bytes:
    """A reader of little-endian fields; struct.error or ValueError at the end or beyond a limit."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, code: str, limit: float = math.inf) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        if value > limit:
            raise ValueError
        return value

    def skip(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise ValueError
        return self.data[self.at - size : self.at]

    def text(self, limit: int) -> str:
        return self.skip(self.number("Q", limit)).decode()

    def value(self) -> Any:
        """A value; an array as the pair of its name and length."""
        kind = self.number("I")
        if kind == 8:
            return self.text(1 << 20)
        if kind != 9:
            return self.number(GGUF_CODES[kind])
        kind, length = self.number("I"), self.number("Q", 1 << 21)
        if kind != 8:
            self.skip(length * GGUF_WIDTHS[kind])
        else:
            for _ in range(length):
                self.skip(self.number("Q"))
        return ("array", length)


def gguf(data: bytes) -> tuple[Shape, dict[tuple[str, int], tuple[int, bytes]]] | None:
    """A gpt2 model's shape, and for each of our tensors and each layer the type and the bytes."""
    try:
        return _gguf(_Bytes(data))
    except (struct.error, ValueError, KeyError):
        return None


def _gguf(source: _Bytes) -> tuple[Shape, dict[tuple[str, int], tuple[int, bytes]]] | None:
    if source.skip(4) != b"GGUF" or source.number("I") != 3:
        return None
    count, pairs = source.number("Q", 8192), source.number("Q", 4096)
    keys: dict[str, Any] = {}
    for _ in range(pairs):
        key = source.text(1024)
        if key in keys:
            return None
        keys[key] = source.value()
    table = []
    for _ in range(count):
        name, dimensions = source.text(64), source.number("I", 4)
        extents = tuple(source.number("Q", 1 << 32) for _ in range(dimensions))
        table.append((name, extents, source.number("I"), source.number("Q", 1 << 62)))
        if not extents or 0 in extents or extents[0] % GGUF_BLOCKS[table[-1][2]][0]:
            return None
    alignment = 32 if type(keys.get("general.alignment")) is tuple else keys.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment % 8:
        return None
    start = end = source.at + -source.at % alignment
    found = {}
    for name, extents, kind, offset in table:
        begin = end + -end % alignment
        values, width = GGUF_BLOCKS[kind]
        end = begin + math.prod(extents) // values * width
        if offset != begin - start or name in found:
            return None
        found[name] = extents, kind, source.data[begin:end]
    if not end <= len(source.data) <= end + -end % alignment:
        return None
    return _gguf_model(keys, found)


def _gguf_model(keys: dict[str, Any], found: dict[str, Any]) -> tuple[Shape, dict[tuple[str, int], tuple[int, bytes]]] | None:
    dims = {ours: keys.get(f"gpt2.{theirs}") for ours, theirs in GGUF_KEYS.items()}
    if any(type(value) is not int for value in dims.values()) or len(found["token_embd.weight"][0]) != 2:
        return None
    s = shape_of(V=found["token_embd.weight"][0][1], **dims)  # type: ignore[arg-type]
    epsilon, scalars = keys.get("gpt2.attention.layer_norm_epsilon"), {k: v for k, v in keys.items() if type(v) is not tuple}
    if s is None or keys.get("general.architecture") != "gpt2" or type(epsilon) is not float:
        return None
    F = scalars.get("gpt2.feed_forward_length", 4 * s["C"])
    if not 1e-30 <= float(f"{epsilon:.7g}") <= 1 or type(F) is not int or not 1 <= F <= 65536:
        return None
    if scalars.get("split.count", 1) not in (0, 1):
        return None
    if scalars.get("gpt2.attention.head_count_kv", s["NH"]) != s["NH"]:
        return None
    tokens = keys.get("tokenizer.ggml.tokens")
    if type(tokens) is tuple and tokens[1] != s["V"]:
        return None
    C = s["C"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (C, s["V"]), "wpe": (C, s["maxT"]), "qkvw": (C, 3 * C), "attprojw": (C, C)}
    shapes |= {"head": (C, s["V"]), "fcw": (C, F), "fcprojw": (F, C), "qkvb": (3 * C,), "fcb": (F,)}
    wanted = {theirs: (ours, 0) for theirs, ours in GGUF_WHOLE.items()}
    if found.get("output.weight") == found["token_embd.weight"]:
        del found["output.weight"]
    elif "output.weight" in found:
        wanted["output.weight"] = "head", 0
    wanted |= {f"blk.{i}.{theirs}": (ours, i) for i in range(s["L"]) for theirs, ours in GGUF_LAYER.items()}
    if found.keys() != wanted.keys() or any(found[name][0] != shapes.get(wanted[name][0], (C,)) for name in wanted):
        return None
    return s, {place: found[name][1:] for name, place in wanted.items()}


def panels(data: bytes) -> tuple[Shape, dict[str, tuple[str, bytes]]] | None:
    """A panel file's shape, and the format and all bytes of each tensor."""
    tensors = safetensors(data)
    if tensors is None:
        return None
    size = int.from_bytes(data[:8], "little")
    header = strict_json(data[8 : 8 + size])
    metadata = (header or {}).get("__metadata__", {})
    dims = [metadata.get(name, "") for name in ("maxT", "V", "L", "NH", "C")]
    if size % 64 != 56 or not all(len(text) < 10 and text.isascii() and text.isdigit() for text in dims):
        return None
    fixed = {"format": "pygpt panels", "version": "1", "panel": "16", "group": "32"}
    s = shape_of(*map(int, dims))
    if (
        s is None
        or any(metadata.get(key) != value for key, value in fixed.items())
        or len(metadata.get("source_sha256", "")) != 64
    ):
        return None
    floats = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
    kinds = dict.fromkeys(("qkvw", "attprojw", "fcw", "fcprojw"), metadata.get("kind", "")) | {"wte": metadata.get("head", "")}
    kinds["wpe"] = metadata.get("positions", "")
    C, found, at = s["C"], {}, 0
    outputs = {"wte": (s["V"], C, 1), "qkvw": (3 * C, C, s["L"]), "attprojw": (C, C, s["L"]), "fcw": (4 * C, C, s["L"])}
    outputs["fcprojw"] = (C, 4 * C, s["L"])
    for name, values in tensor_sizes(s, s["V"]).items():
        kind = kinds.get(name, "float32")
        if kind in floats:
            dtype, width = floats[kind]
            wanted = values * width
        elif kind in ("q8_0", "q4_0") and name != "wpe":
            (N, K, layers), dtype, width = outputs[name], "U8", 1
            blocks = (N + 15) // 16 * 16 * ((K + 31) // 32)
            wanted = layers * (blocks * (32 if kind == "q8_0" else 16) + (2 * blocks + 63) // 64 * 64)
        else:
            return None
        wanted = (wanted + 63) // 64 * 64
        content = data[8 + size + at : 8 + size + at + wanted]
        if tensors.get(name) != (dtype, (wanted // width,), content):
            return None
        found[name], at = (kind, content), at + wanted
    offsets = [entry["data_offsets"][0] for name, entry in (header or {}).items() if name != "__metadata__"]
    return (s, found) if len(tensors) == len(found) == len(set(offsets)) else None


def as_floats(dtype: str, data: bytes) -> Floats:
    """The values of a tensor in float32."""
    if dtype == "BF16":
        return np.array(np.frombuffer(data, "<u2").astype("<u4") << 16, "<u4").view("<f4")
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype("<f4")
