"""llm.c's debug state, examples and vocabulary: bytes made by hand, every refusal, and the files of the writers."""

import hashlib
import os
import re
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import gist

from pygpt.config import Config
from pygpt.errors import DataError, InputError
from pygpt.formats import llmc
from pygpt.formats.llmc import DebugState, Example, read_debug_state, read_examples, read_tokenizer, write_tokenizer
from pygpt.tokenizer import Tokenizer


def header(*fields: int) -> bytes:
    return struct.pack("<256i", *fields, *[0] * (256 - len(fields)))


def refused(path: Path, message: str, read: Any) -> None:
    with pytest.raises(DataError) as caught:
        read(path)
    found = str(caught.value)
    assert found.startswith(f"{path}: ")
    assert "\n" not in found
    assert re.search(gist(message), found.removeprefix(f"{path}: "))


# ---------------------------------------------------------------------------------------------------------------------
# Debug state

CONFIG = Config(maxT=3, V=5, L=2, NH=2, C=4)
SHAPES = [
    *[("wte", (5, 4)), ("wpe", (3, 4)), ("ln1w", (2, 4)), ("ln1b", (2, 4)), ("qkvw", (2, 12, 4)), ("qkvb", (2, 12))],
    *[("attprojw", (2, 4, 4)), ("attprojb", (2, 4)), ("ln2w", (2, 4)), ("ln2b", (2, 4)), ("fcw", (2, 16, 4)), ("fcb", (2, 16))],
    *[("fcprojw", (2, 4, 16)), ("fcprojb", (2, 4)), ("lnfw", (4,)), ("lnfb", (4,))],
]


def a_state(B: int = 2, T: int = 3) -> DebugState:
    rng = np.random.default_rng(1)
    return DebugState(
        rng.integers(0, 5, (B, T), np.int32),
        rng.integers(0, 5, (B, T), np.int32),
        rng.standard_normal((B, T, 5), np.float32),
        1.25,
        {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES},
    )


def state_bytes(state: DebugState) -> bytes:
    """The file, written a second time; wte's 123 further rows are zeros."""
    parts = [
        header(20240327, 2, *state.inputs.shape),
        state.inputs.astype("<i4").tobytes(),
        state.targets.astype("<i4").tobytes(),
    ]
    parts += [state.logits.astype("<f4").tobytes(), struct.pack("<f", state.loss)]
    parts += [state.gradients[name].astype("<f4").tobytes() + bytes(123 * 16 * (name == "wte")) for name, _ in SHAPES]
    return b"".join(parts)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 3), (7, 2)])
def test_debug_state(tmp_path: Path, B: int, T: int) -> None:
    path, state = tmp_path / "state.bin", a_state(B, T)
    llmc.write_debug_state(path, CONFIG, state)
    assert path.read_bytes() == state_bytes(state)
    found = read_debug_state(path, CONFIG)
    os.unlink(path)
    for array, expected in zip(found[:3], state[:3], strict=True):
        np.testing.assert_array_equal(array, expected)
        assert not array.flags.writeable
    assert found.loss == 1.25
    assert list(found.gradients) == [name for name, _ in SHAPES]
    for name, shape in SHAPES:
        assert found.gradients[name].shape == shape
        np.testing.assert_array_equal(found.gradients[name], state.gradients[name])


def test_the_size_of_gpt2s_debug_state(tmp_path: Path) -> None:
    """The published file's size, 549,369,860 bytes, is the only one that the reader takes for 124M."""
    config = Config(maxT=1024, V=50257, L=12, NH=12, C=768)
    with open(tmp_path / "state.bin", "wb") as file:
        file.write(header(20240327, 2, 4, 64))
        file.truncate(549_369_860)
        assert read_debug_state(tmp_path / "state.bin", config).logits.shape == (4, 64, 50257)
        file.truncate(549_369_861)
    with pytest.raises(DataError, match=r"549369861 bytes.* 549369860\b.*B = 4, T = 64"):
        read_debug_state(tmp_path / "state.bin", config)


WHOLE = state_bytes(a_state())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:1000], "1000 bytes ... 1024 bytes"),
        (header(20240326, 2, 2, 3), "magic ... 20240326 ... 20240327 ... llm.c"),
        (header(20240327, 1, 2, 3), "version 1 ... 2"),
        (header(20240327, 2, 2, 3, 9), "field 4 is 9 ... 0"),
        (header(20240327, 2, 0, 3), "B is 0 ... T is 3 ... 1 to maxT = 3"),
        (header(20240327, 2, 2, 4), "B is 2 ... T is 4 ... 1 to maxT = 3"),
        (header(20240327, 2, 2, -1), "B is 2 ... T is -1 ... 1 to maxT = 3"),
        (WHOLE[:-4], f"truncated: {len(WHOLE) - 4} bytes ... {len(WHOLE)} ... B = 2, T = 3 ... {CONFIG}"),
        (WHOLE + b"\0", f"too long: {len(WHOLE) + 1} bytes ... {len(WHOLE)} ... B = 2, T = 3 ... {CONFIG}"),
        (WHOLE[:1028] + struct.pack("<i", 5) + WHOLE[1032:], "inputs ... token id 5 ... position 1 ... 5 ids"),
        (WHOLE[:1048] + struct.pack("<i", -1) + WHOLE[1052:], "targets ... token id -1 ... position 0 ... 5 ids"),
    ],
)
def test_other_files_than_debug_states_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(content)
    refused(path, message, lambda path: read_debug_state(path, CONFIG))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.zeros(3, int)}, r"inputs.*\(3,\)"),
        ({"inputs": np.zeros((0, 3), int)}, r"inputs.*\(0, 3\)"),
        ({"inputs": np.zeros((2, 4), int)}, r"inputs.*\(2, 4\).*\(B, T\).*1 to maxT = 3"),
        ({"targets": np.zeros((3, 2), int)}, r"targets.*\(3, 2\).*\(2, 3\)"),
        ({"targets": np.full((2, 3), 5)}, "targets.*token id 5.*position 0"),
        ({"inputs": np.zeros((2, 3))}, "float64"),
        ({"logits": np.zeros((2, 3, 4))}, r"logits.*\(2, 3, 4\).*\(2, 3, 5\)"),
        ({"gradients": {}}, r"gradients.*\['attprojb', "),
        ({"gradients": {1: 0, "x" * 9999: 0}}, r"gradients.*\['1', "),
        ({"gradients": {**a_state().gradients, "wpe": np.zeros((4, 4))}}, r"wpe.*\(4, 4\).*\(3, 4\)"),
    ],
)
def test_writing_refuses_other_shapes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llmc.write_debug_state(tmp_path / "state.bin", CONFIG, a_state()._replace(**change))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def example_values(number: int, label: int, context: Sequence[int], endings: Sequence[Sequence[int]]) -> list[int]:
    """One example, written a second time."""
    values = [number, label, len(endings), len(context), *context]
    for ending in endings:
        values += [len(ending), *ending]
    return [65535, 2 * (len(values) + 2), *values]


def file_of(*examples: list[int], count: int | None = None, longest: int | None = None, magic: int = 20240522) -> bytes:
    values = [value for example in examples for value in example]
    longest = max(2 * len(example) for example in examples) if longest is None else longest
    return header(magic, 1, len(examples) if count is None else count, longest) + struct.pack(f"<{len(values)}H", *values)


ENDINGS = [[5], [6, 7], [8], [9, 10, 11]]
ONE = example_values(0, 2, [1, 2, 3], ENDINGS)  # 20 values, 40 bytes
TWO = example_values(1, 0, [4], ENDINGS)


def test_examples(tmp_path: Path) -> None:
    path = tmp_path / "examples.bin"
    path.write_bytes(file_of(ONE, TWO))
    assert list(read_examples(path)) == [Example(0, 2, [1, 2, 3], ENDINGS), Example(1, 0, [4], ENDINGS)]
    assert len(list(read_examples(path, V=12))) == 2


IDS = st.lists(st.integers(0, 65534), min_size=1, max_size=20)
EXAMPLES = st.lists(st.tuples(st.integers(0, 3), IDS, st.lists(IDS, min_size=4, max_size=4)), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(EXAMPLES)
def test_writing_examples(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, list[int], list[list[int]]]]
) -> None:
    path = tmp_path_factory.mktemp("examples") / "a.bin"
    examples = [Example(number, *fields) for number, fields in enumerate(drawn)]
    assert llmc.write_examples(path, iter(examples)) == len(examples)
    assert path.read_bytes() == file_of(*(example_values(*example) for example in examples))
    assert list(read_examples(path)) == examples


def changed(position: int, value: int) -> list[int]:
    return [*ONE[:position], value, *ONE[position + 1 :]]


AT = "example 0 ... byte 1024: ... "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_of(ONE, magic=20240520), "magic ... 20240520 ... 20240522 ... llm.c"),
        (file_of(ONE, count=0), "0 examples ... 1"),
        (file_of(ONE, count=-1), "-1 examples ... 1"),
        (file_of(ONE) + b"\0", "truncated ... 1065 bytes ... 2 bytes"),
        (file_of(ONE, [1]), "example 1 ... byte 1064 ... truncated ... 2 examples"),
        (file_of(ONE, count=2), "example 1 ... byte 1064 ... truncated ... 2 examples"),
        (file_of(ONE, [7], count=1), "too long ... 2 bytes ... 1 examples"),
        (file_of(changed(0, 65534)), AT + "65534 ... 65535"),
        (file_of(changed(1, 35)), AT + "35 bytes ... even ... 40"),
        (file_of(changed(1, 42)), AT + "42 bytes ... even ... 40"),
        (file_of(changed(1, 42), longest=42), AT + "truncated ... 42 bytes ... 40"),
        (file_of(changed(1, 0)), AT + "index ... 3 values ... 0"),
        (file_of(changed(1, 10)), AT + "context ... 1 values ... 0"),
        (file_of(changed(2, 1)), AT + "index is 1 ... 0"),
        (file_of(changed(3, 4)), AT + "label is 4 ... 0 to 3"),
        (file_of(changed(4, 5)), AT + "5 endings ... 4"),
        (file_of(changed(5, 0)), AT + "context ... no tokens"),
        (file_of(changed(5, 15)), AT + "context ... 15 values ... 14"),
        (file_of(changed(6, 65535)), AT + "context ... token id 65535 ... position 0 ... 65535 ids"),
        (file_of(changed(9, 0)), AT + "ending 0 ... no tokens"),
        (file_of(changed(16, 9)), AT + "ending 3 ... 9 values ... 3"),
        (file_of(changed(16, 2)), AT + "1 values ... ending"),
    ],
)
def test_other_files_than_examples_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "examples.bin"
    path.write_bytes(content)
    refused(path, message, lambda path: list(read_examples(path)))


def test_examples_outside_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "examples.bin"
    path.write_bytes(file_of(ONE, TWO))
    message = AT + "ending 3 ... token id 11 ... position 2 ... 11 ids"
    refused(path, message, lambda path: list(read_examples(path, V=11)))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no examples"),
        ([Example(0, 4, [1], ENDINGS)], "its label is 4"),
        ([Example(0, 0.5, [1], ENDINGS)], "its label is 0.5"),  # type: ignore[arg-type]
        ([Example(0, "0", [1], ENDINGS)], "its label is '0'"),  # type: ignore[arg-type]
        ([Example(0, 0, False, ENDINGS)], r"shape \(\)"),  # type: ignore[arg-type]
        ([Example(0, 0, [1.5], ENDINGS)], "of integers"),  # type: ignore[list-item]
        ([Example(0, 0, [1], [*ENDINGS[:3], [[1], [2, 3]]])], "must be an array"),  # type: ignore[list-item]
        ([Example(0, 0, [], ENDINGS)], "context.*no tokens"),
        ([Example(0, 0, [1], ENDINGS[:3])], "it has 3 endings"),
        ([Example(0, 0, [65535], ENDINGS)], "token id 65535"),
        ([Example(0, 0, [1], [*ENDINGS[:3], [-1]])], "token id -1"),
        ([Example(0, 0, [1] * 32768, ENDINGS)], r"example 0.*\b65570 bytes.* 65535"),
    ],
)
def test_writing_refuses_bad_examples(tmp_path: Path, examples: list[Example], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llmc.write_examples(tmp_path / "a.bin", examples)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary


def test_gpt2s_vocabulary_is_llm_cs_file(tmp_path: Path) -> None:
    tokenizer, path = Tokenizer(), tmp_path / "gpt2_tokenizer.bin"
    tokens = [tokenizer.decode_bytes([token]) for token in range(tokenizer.V)]
    write_tokenizer(path, tokens, 50256)
    content = path.read_bytes()
    assert len(content) == 372_108
    assert hashlib.sha256(content).hexdigest().startswith("6f3abc21")
    assert read_tokenizer(path) == (tokens, 50256)
    path.write_bytes(header(20240328, 1, 50257) + content[1024:])
    assert read_tokenizer(path) == (tokens, 50256)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.binary(max_size=255), min_size=1, max_size=20), st.data())
def test_vocabularies(tmp_path_factory: pytest.TempPathFactory, tokens: list[bytes], drawn: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("vocabulary") / "a.bin"
    eot = drawn.draw(st.integers(0, len(tokens) - 1))
    write_tokenizer(path, tokens, eot)
    assert path.stat().st_size == 1024 + len(tokens) + sum(map(len, tokens))
    assert read_tokenizer(path) == (tokens, eot)


def test_a_large_file_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.bin"
    path.write_bytes(header(20240328, 2, 1) + b"\1a")
    os.truncate(path, 1 << 28)  # a hole
    tracemalloc.start()
    try:
        refused(path, "too long ... 268435456 bytes ... 1026 ... 1 tokens", read_tokenizer)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(20240328, 3, 1), "version 3 ... 1 or 2"),
        (header(20240327, 2, 1), "magic ... 20240327 ... 20240328 ... llm.c"),
        (header(20240328, 2, 0), "end of text is 0 ... V is 0 ... 1048576"),
        (header(20240328, 2, 2, 2), "end of text is 2 ... V is 2 ... 1048576"),
        (header(20240328, 2, 2, -1), "end of text is -1 ... V is 2 ... 1048576"),
        (header(20240328, 1, 256), "V is 256 ... field 3 is 0 ... 50257 and 0"),
        (header(20240328, 2, 1 << 20) + b"\1a", "truncated ... token 1 of 1048576 ... 1027 of 1026"),
        (header(20240328, 2, (1 << 20) + 1), "end of text is 0 ... V is 1048577 ... 1048576"),
        (header(20240328, 2, 2) + b"\1a\2b", "truncated ... token 1 of 2 ... 1029 of 1028"),
        (header(20240328, 2, 1) + b"\1ab", "too long ... 1027 bytes ... 1026 ... 1 tokens"),
    ],
)
def test_other_files_than_vocabularies_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocabulary.bin"
    path.write_bytes(content)
    refused(path, message, read_tokenizer)


@pytest.mark.parametrize(
    ("tokens", "eot", "message"),
    [
        ([b"a" * 256], 0, "token 0 has 256 bytes"),
        ([b"a"], 1, "eot is 1: with 1 tokens"),
        ([], 0, "eot is 0"),
        ([b"a"], True, "eot is True"),
    ],
)
def test_writing_refuses_values_out_of_range(tmp_path: Path, tokens: list[bytes], eot: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_tokenizer(tmp_path / "a.bin", tokens, eot)
    assert os.listdir(tmp_path) == []
