"""Mutations: of bytes, of the fields of binary headers, of JSON and of its text. All are functions of a Random alone."""

import copy
import json
import re
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

MOST_BYTES = 1 << 17
BOUNDARIES = (0, 1, -1, 2, 3, 4, 5, 127, 128, 255, 256, 1023, 1024, 65535, 65536, 1 << 20, (1 << 24) + 1, 1 << 30)
INT32 = (*BOUNDARIES, 46341, 2**31 - 1, 2**31 - 128, -(2**31), -128, -65536)
UINT64 = (0, 1, 7, 8, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 4 << 20, (4 << 20) + 1)

# Leaves for JSON. Python refuses to read integers of more than 4,300 digits, so JSON does not have them.
LEAVES: tuple[Any, ...] = (
    None, True, False, *BOUNDARIES, 2**31, 2**32, 2**48, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-5, 1e-45, 5e-324, 1e38, 3.5e38, 1e308, float("nan"), float("inf"), -float("inf"),
    "", "0", "12", "a", "é", "\ud800", "\udcff", "\x00", "\n", "x" * 300, "x" * 5000, "../x", "/", ".", "model.safetensors",
    "F32", "F16", "BF16", "F64", "BOOL", "gpt2", "median", "greedy", "sample", "stop", "slide", "<|endoftext|>",
    [], {}, [[]], [{}], {"": None}, [0], [0, 0], [1, -1], [2**62, 2**62], [2**48] * 8, [2**32, 2**32], [0] * 300,
)  # fmt: skip
TEXTS = (
    b"", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"1" * 5000, b"\xff",
    b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b" " * 70, b"\n", b"\r", b"\t",
    b"0", b"1", b"99999999999999999999", b"true", b"1.5", b"01", b"+1", b"1_0", b"\xd9\xa3", b"\xc2\xa0",
)  # fmt: skip


def mutate_bytes(random: Random, data: bytes, other: bytes, *, fields: int = 12) -> bytes:
    """Return bytes with a few changes. The first `fields` int32 are a header."""
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        data = _mutate_once(random, data, other, fields)
    return data[:MOST_BYTES]


def _mutate_once(random: Random, data: bytes, other: bytes, fields: int) -> bytes:
    kind = random.randrange(11)
    size = len(data)
    if kind <= 2 and fields:
        return put(data, 4 * random.randrange(fields), _int32(random, data))
    at = random.randrange(size + 1)
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data + random.choice((b"\x00", b"\xff", b"\x00" * 64, b"ab", data[:64], other[-64:]))
    if kind == 5 and size:
        return put(data, random.randrange(size), bytes([random.randrange(256)]))
    if kind == 6 and size:
        at = random.randrange(size)
        return put(data, at, bytes([data[at] ^ 1 << random.randrange(8)]))
    if kind == 7:
        return put(data, 4 * (at // 4), _int32(random, data))
    if kind == 8:
        return put(data, 2 * (at // 2), struct.pack("<H", random.choice((0, 1, 2, 255, 256, 50256, 50257, 65534, 65535))))
    if kind == 9:
        stop = min(size, at + random.choice((1, 2, 4, 16, 200)))
        return data[:at] + data[stop:]
    start = random.randrange(len(other) + 1)
    piece = other[start : start + random.choice((1, 2, 4, 16, 200, 2000))]
    return data[:at] + piece + data[at + random.choice((0, len(piece))) :]


def _int32(random: Random, data: bytes) -> bytes:
    """A number at a boundary, or one beside a number of the header."""
    if random.random() < 0.3 and len(data) >= 32:
        near = struct.unpack_from("<i", data, 4 * random.randrange(8))[0] + random.choice((-1, 1))
        return struct.pack("<q", near)[:4]
    return struct.pack("<i", random.choice(INT32))


def neighbours(data: bytes, fields: int) -> Iterator[bytes]:
    """Yield an input with one number changed: each of a header's fields and of the first values after it, to what is beside it
    or a boundary; each number in its JSON, to what is beside it; one byte of the last ones."""
    for at in range(0, 4 * min(fields, len(data) // 4), 4):
        [old] = struct.unpack_from("<i", data, at)
        for new in (old - 1, old + 1, 0, -1, 2**31 - 1):
            yield put(data, at, struct.pack("<q", new)[:4])
    for at in range(1024, min(len(data) - 1, 1088), 2):
        [old] = struct.unpack_from("<H", data, at)
        for new in (old - 1, old + 1):
            yield put(data, at, struct.pack("<i", new)[:2])
    for found in re.finditer(rb"(?<=[ \[:,])\d+(?=[,\]} ])", data[:4096]):
        for new in (int(found[0]) - 1, int(found[0]) + 1):
            if len(text := b"%d" % new) == len(found[0]):
                yield put(data, found.start(), text)
    if data:
        yield data[:-1] + bytes([data[-1] ^ 1])


def put(data: bytes, at: int, piece: bytes) -> bytes:
    """Overwrite bytes, past the end as well."""
    return data[:at] + piece + data[at + len(piece) :] if at <= len(data) else data


def mutate_json_text(random: Random, text: bytes, other: bytes) -> bytes:
    """Change JSON: mostly its values, sometimes its spelling."""
    if random.random() < 0.3:
        return _mutate_text(random, text, other)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _mutate_text(random, text, other)
    for _ in range(random.choice((1, 1, 2, 4))):
        value = mutate_json(random, value)
    return dump(value)


def dump(value: object) -> bytes:
    """JSON with Python's additions, ASCII."""
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return b"null"


def _mutate_text(random: Random, text: bytes, other: bytes) -> bytes:
    """Change JSON's spelling: a piece put in or taken out, a member given twice."""
    at = random.randrange(len(text) + 1)
    kind = random.randrange(4)
    if kind == 0:
        return (text[:at] + random.choice(TEXTS) + text[at:])[:MOST_BYTES]
    if kind == 1:
        return text[:at] + text[at + random.choice((1, 2, 8, 40)) :]
    if kind == 2 and text.count(b","):
        parts = text.split(b",")
        twice = random.randrange(len(parts))
        return b",".join([*parts[: twice + 1], *parts[twice:]])[:MOST_BYTES]
    return mutate_bytes(random, text, other, fields=0)


def mutate_json(random: Random, value: Any) -> Any:
    """A value with one node replaced, deleted, doubled, moved or renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return copy.deepcopy(random.choice(LEAVES))
    container, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1:
        source, name = random.choice(places)
        container[key] = copy.deepcopy(source[name])
    elif kind == 2 and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == 2:
        container[random.choice((f"{key}x", "", "x", "h.0.ln_1.bias", "h.999999.x", "__metadata__"))] = container[key]
    elif kind == 3 and isinstance(container[key], int):
        container[key] += random.choice((-1, 1, 2, -2, 8))
    elif kind == 4 and isinstance(container, list):
        random.shuffle(container)
    else:
        container[key] = copy.deepcopy(random.choice(LEAVES))
    return value


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from _places(inner)
