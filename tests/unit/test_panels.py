"""Quantised numbers and panels: each against a scalar twin, the layout by its formula, and one line for every other file."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import make, tensors
from quantisers import quantise as twin
from quantisers import to_panels
from running import gist

from pygpt.commands.quantize import main
from pygpt.config import TENSORS
from pygpt.errors import CheckpointError, ClosedError
from pygpt.formats.checkpoint import Checkpoint
from pygpt.formats.dtypes import BFLOAT16, FLOAT16, Q4_0, Q6_K, Q8_0, Format
from pygpt.formats.open import open_model
from pygpt.formats.panels import LAYERED, PanelFile, from_panels, panel_sizes, quantise, quantised

SHAPE = {"L": 2, "NH": 2, "C": 20, "V": 37, "maxT": 5}  # nothing is a multiple of a panel or a group
f4 = np.float32
FLOAT16S = np.arange(0x7C00, dtype="<u2").view("<f2")  # all that are positive, ascending
QUANTISED = pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=lambda kind: kind.name)
WEIGHTS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**18), max_value=2.0**18)
BLOCK = st.lists(WEIGHTS, min_size=32, max_size=32) | st.lists(st.floats(-0.125, 0.125, width=32), min_size=32, max_size=32)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def blocks_of(kind: Format, rows: npt.NDArray[f4]) -> npt.NDArray[Any]:
    found = quantise(kind, np.ascontiguousarray(rows, "f4"))
    assert found is not None
    return found


def fold(terms: list[f4]) -> f4:
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [f4(one + other) for one, other in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def twin_q8_0(block: list[f4]) -> tuple[np.float16, list[int]]:
    """The least float16 that is max|w| / 127 or more, and each w / d rounded to even."""
    wanted = f4(max(abs(value) for value in block) / f4(127))
    d = next(d for d in FLOAT16S[max(int(np.searchsorted(FLOAT16S, np.float16(wanted))) - 1, 0) :] if f4(d) >= wanted)
    return np.float16(d), [int(np.rint(value / f4(d))) if d else 0 for value in block]


def twin_q4_0(block: list[f4]) -> tuple[np.float16, list[int]]:
    """The search that dtypes.py describes, one scalar at a time."""
    extreme = next(value for value in block if abs(value) == max(map(abs, block)))
    best, best_score = np.float16(0), f4(0)
    with np.errstate(all="ignore"):
        for level in np.arange(-9, -6.75, 0.25):
            factor = f4(f4(level) / extreme)
            q = [min(max(f4(np.rint(f4(value * factor))), f4(-8)), f4(7)) for value in block]
            wq = fold([f4(f4(abs(value) * value) * number) for value, number in zip(block, q, strict=True)])
            qq = fold([f4(abs(value) * f4(number * number)) for value, number in zip(block, q, strict=True)])
            d = np.float16(f4(wq / qq))
            score = f4(f4(d) * f4(f4(2 * wq) - f4(f4(d) * qq)))
            if score > best_score:
                best, best_score = d, score
        levels = [f4(np.rint(value / f4(best))) for value in block]
    return best, [int(np.clip(level, -8, 7)) + 8 if np.isfinite(level) else 8 for level in levels]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(BLOCK)
def test_q8_0_is_its_twin_and_never_exceeds_127(values: list[float]) -> None:
    block = np.array(values, f4)
    [found] = twin(Q8_0, block)
    d, q = twin_q8_0(list(block))
    assert (found["d"], found["q"].tolist()) == (d, q)
    assert abs(found["q"].astype(int)).max() <= 127
    assert (abs(Q8_0.to_float32(np.array([found])) - block) <= f4(d) / 2).all()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(BLOCK)
def test_q4_0_equals_numpy_and_beats_the_plain_scale(values: list[float]) -> None:
    block = np.array(values, f4)
    blocks = twin(Q4_0, block)
    d, levels = twin_q4_0(list(block))
    packed = [low | high << 4 for low, high in zip(levels[:16], levels[16:], strict=True)]
    assert (blocks[0]["d"], blocks[0]["q"].tolist()) == (d, packed)
    extreme = block[abs(block).argmax()]
    plain = np.float16(extreme / f4(-8)).astype("f8")
    if abs(plain) > 1e-3:  # a normal float16
        error = (abs(block) * (Q4_0.to_float32(blocks) - block.astype("f8")) ** 2).sum()
        rounded = np.clip(np.rint(block / plain), -8, 7) * plain
        assert error <= (abs(block) * (rounded - block) ** 2).sum() * 1.01


@QUANTISED
def test_zeros_stay_zeros_and_nonfinite_values_give_nan(kind: Format) -> None:
    blocks = np.zeros((6, 32), f4)
    blocks[1, 3], blocks[2, 4], blocks[3, 5], blocks[4, 6] = np.nan, np.inf, 3e38, 1e-45
    blocks[5, 7] = 65504 * (127 if kind == Q8_0 else 8)
    found = kind.to_float32(twin(kind, blocks))
    assert (found[0] == 0).all()
    assert np.isnan(found[1:4]).all()
    assert abs(found[4]).max() < 1e-7
    assert found[5, 7] == blocks[5, 7]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([Q8_0, Q4_0]), st.lists(BLOCK, min_size=1, max_size=20))
def test_the_kernels_quantise_as_numpy_does(kind: Format, rows: list[list[float]]) -> None:
    values = np.array(rows, f4)
    expected, found = twin(kind, values), quantise(kind, values)
    if found is None:
        assert np.isnan(expected["d"]).any()
    else:
        assert found.tobytes() == expected.tobytes()


@QUANTISED
def test_the_kernels_refuse_values_out_of_range(kind: Format) -> None:
    rows = np.zeros((16, 32), f4)
    rows[1, 3] = 1e-45
    rows[2, 7] = 65504 * (127 if kind == Q8_0 else 6)
    found = kind.to_float32(blocks_of(kind, rows))
    assert not found[0].any()
    assert abs(found[1]).max() < 1e-7
    assert found[2, 7] == pytest.approx(rows[2, 7], rel=2**-11)
    for value in (np.nan, np.inf, -np.inf, 3e38, 65504 * 127.1):
        rows[3, 5] = value
        assert quantise(kind, rows) is None


@QUANTISED
def test_every_content_of_a_block_is_read_exactly(kind: Format) -> None:
    """A -128, which no quantiser of pygpt writes, subnormal, infinite and NaN scales: as exact numbers would say."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (500, kind.block_bytes), "u1").view(np.dtype(kind.dtype)).reshape(-1)
    blocks["q"][0] = -128 if kind == Q8_0 else 0x80
    numbers = blocks["q"].astype("f8")
    if kind == Q4_0:
        numbers = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=1).astype("f8") - 8
    with np.errstate(invalid="ignore"):
        expected = blocks["d"].astype("f8")[:, None] * numbers
    assert np.array_equal(kind.to_float32(blocks).reshape(-1, 32), expected, equal_nan=True)


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q6_K], ids=lambda kind: kind.name)
def test_blocks_read_as_the_gguf_package_reads_them(kind: Format) -> None:
    gguf: Any = pytest.importorskip("gguf")
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (50, 3 * kind.block_bytes), "u1").view(np.dtype(kind.dtype))
    blocks["d"] = rng.normal(size=blocks.shape)
    theirs = gguf.quants.dequantize(blocks.view("u1"), gguf.GGMLQuantizationType[kind.name.upper()])
    assert np.array_equal(kind.to_float32(blocks), theirs)


def test_float16_rounds_to_the_nearest_even() -> None:
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 2**-25, np.nan], f4)
    assert FLOAT16.from_float32 is not None
    found = FLOAT16.to_float32(FLOAT16.from_float32(values))
    assert np.array_equal(found, np.array([1, 1 + 2**-9, 65504, np.inf, 0, np.nan], f4), equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# The layout


def naive(kind: Format, blocks: npt.NDArray[Any]) -> tuple[bytes, bytes]:
    """Values and scales of whole panels, number by number, by the formula."""
    N, groups = blocks.shape
    K = 32 * groups
    if kind == Q8_0:
        number = {(n, k): int(blocks["q"][n, k // 32, k % 32]) & 255 for n in range(N) for k in range(K)}
        order = [(16 * p + n, 4 * i + j) for p in range(N // 16) for i in range(K // 4) for n in range(16) for j in range(4)]
        values = bytes(number[place] for place in order)
    else:

        def nibble(n: int, k: int) -> int:
            byte = int(blocks["q"][n, k // 32, k % 16])
            return byte >> 4 if k % 32 >= 16 else byte & 15

        order = [(16 * p + n, 8 * i + j) for p in range(N // 16) for i in range(K // 8) for n in range(16) for j in range(4)]
        values = bytes(nibble(n, k) | nibble(n, k + 4) << 4 for n, k in order)
    scales = b"".join(blocks["d"][16 * p + n, g].tobytes() for p in range(N // 16) for g in range(groups) for n in range(16))
    return values, scales


@QUANTISED
def test_panels_are_laid_out_by_the_formula(kind: Format) -> None:
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (32, 3 * kind.block_bytes), "u1").view(np.dtype(kind.dtype))
    values, scales = to_panels(kind, blocks)
    assert (bytes(values), bytes(scales)) == naive(kind, blocks)
    assert panel_sizes(kind, 32, 96) == (len(values), len(scales))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([Q8_0, Q4_0]), st.integers(1, 40), st.integers(1, 100), st.randoms(use_true_random=False))
def test_panels_and_blocks_are_inverse(kind: Format, N: int, K: int, random: Any) -> None:
    data = random.randbytes(N * kind.size(K))
    blocks = np.frombuffer(data, kind.dtype).reshape(N, -1)
    values, scales = to_panels(kind, blocks)
    sizes = panel_sizes(kind, N, K)
    assert len(values) == sizes[0]
    assert 0 <= sizes[1] - len(scales) < 64
    assert all(size % 64 == 0 for size in sizes)
    assert from_panels(kind, values.data, scales.data, N, K).tobytes() == data
    padding = from_panels(kind, values.data, scales.data, -(-N // 16) * 16, K)[N:]
    assert not kind.to_float32(padding).any()


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with source.bin, and model.safetensors in q4_0 with a head in q8_0."""
    monkeypatch.chdir(tmp_path)
    make("source.bin", seed=4, **SHAPE)
    assert main(["--format", "q4_0", "source.bin", "model.safetensors"]) == 0
    return tmp_path


def parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def built(header: Mapping[str, Any], data: bytes, alignment: int = 64) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text + data


def expected_blocks(kind: Format, matrix: npt.NDArray[f4]) -> npt.NDArray[Any]:
    """A matrix padded to whole panels and groups, quantised."""
    N, K = matrix.shape
    return blocks_of(kind, np.pad(matrix, ((0, -N % 16), (0, -K % 32))))


def test_the_file_holds_the_numbers_of_its_source(folder: Path) -> None:
    header, data = parsed((folder / "model.safetensors").read_bytes())
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["version"]) == ("pygpt panels", "1")
    assert [metadata[key] for key in ("kind", "head", "positions", "panel", "group")] == ["q4_0", "q8_0", "float32", "16", "32"]
    assert list(header) == [name for name, _ in TENSORS]
    source = dict(tensors(2, 20, 37, 5, 4, 12.0))
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert begin % 64 == end % 64 == 0
        content = data[begin:end]
        if name in ("wte", "qkvw", "attprojw", "fcw", "fcprojw"):
            kind = Q8_0 if name == "wte" else Q4_0
            for layer in [source[name]] if name == "wte" else source[name]:
                values, scales = naive(kind, expected_blocks(kind, layer))
                assert content.startswith(values + scales)
                content = content[len(values) + len(scales) :]
                content = content[-len(scales) % 64 :]
        else:
            assert content.startswith(source[name].tobytes())
            content = content[source[name].nbytes :]
        assert not any(content)


@pytest.mark.parametrize("mmap", [True, False])
def test_tensors_are_used_in_place(folder: Path, *, mmap: bool) -> None:
    data = (folder / "model.safetensors").read_bytes()
    header, values = parsed(data)
    with PanelFile("model.safetensors", mmap=mmap) as model:
        for name, (kind, content) in model.stored().items():
            begin, end = header[name]["data_offsets"]
            assert kind == {"wte": "q8_0", "qkvw": "q4_0"}.get(name, kind)
            assert content == values[begin : begin + len(content)]
            assert end - begin - len(content) < 64
            assert np.frombuffer(content, "u1").ctypes.data % 64 == 0


def test_float16_is_used_in_place(folder: Path) -> None:
    assert main(["--format", "f16", "source.bin", "half.safetensors"]) == 0
    with PanelFile("half.safetensors") as model, Checkpoint("source.bin") as source:
        assert model.format == FLOAT16
        for name, (kind, content) in model.stored().items():
            halved = name == "wte" or name in LAYERED  # positions and vectors keep their format
            assert kind == ("float16" if halved else "float32")
            assert bytes(content) == source.tensor(name).astype("<f2" if halved else "<f4").tobytes()


def test_pieces_have_the_shapes_of_a_checkpoint(folder: Path) -> None:
    with Checkpoint("source.bin") as source, open_model("model.safetensors") as model:
        assert model.config == source.config
        for name, _ in TENSORS:
            expected, found = source.tensor(name), np.concatenate(list(model.pieces(name)))
            assert found.shape == expected.shape
            if name not in ("wte", "qkvw", "attprojw", "fcw", "fcprojw"):
                assert np.array_equal(found, expected)
            else:
                assert 0 < abs(found - expected).max() < abs(expected).max() / 7


@QUANTISED
def test_a_file_has_the_numbers_of_quantising_in_memory(folder: Path, kind: Format) -> None:
    make("wide.bin", L=2, NH=2, C=32, V=64, maxT=5)  # without padding at the end of scales
    assert main(["--format", kind.name, "--head", "q4_0", "wide.bin", "wide.safetensors"]) == 0
    assert main(["--format", kind.name, "--head", "q4_0", "wide.bin", "wide.gguf"]) == 0
    with Checkpoint("wide.bin") as source:
        memory = quantised(source, kind.name, "q4_0", threads=2).stored()
    for path in ("wide.safetensors", "wide.gguf"):
        with open_model(path) as model:
            assert {name: (form, bytes(data)) for name, (form, data) in model.stored().items()} == {
                name: (form, bytes(data)) for name, (form, data) in memory.items()
            }


def test_bfloat16_positions_stay_bfloat16(folder: Path) -> None:
    make("five.bin", seed=4, version=5, **SHAPE)
    assert main(["--format", "bf16", "five.bin", "five.safetensors"]) == 0
    with Checkpoint("five.bin") as source, PanelFile("five.safetensors") as model:
        assert {model.formats[name].name for name in ("wte", "wpe", "qkvw")} == {BFLOAT16.name}
        assert all(np.array_equal(source.tensor(n), np.concatenate(list(model.pieces(n)))) for n, _ in TENSORS)


def test_a_closed_file_says_so(folder: Path) -> None:
    model = PanelFile("model.safetensors")
    model.close()
    model.close()
    with pytest.raises(ClosedError, match="closed"):
        next(model.pieces("wte"))


METADATA = [
    ({"format": "pt"}, "`pygpt quantize`"),
    ({"format": None}, "`pygpt quantize`"),
    ({"version": "3"}, "'3' ... '1'"),
    ({"version": "2"}, "variations is not JSON"),
    ({"version": "2", "variations": '{"F": 0}'}, "F is 0"),
    ({"version": "2", "variations": '{"G": 0}'}, "no argument 'G'"),
    ({"kind": "q6_k"}, "kind is 'q6_k'"),
    ({"kind": "q8_0"}, "tensor qkvw is"),
    ({"head": None}, "head is ''"),
    ({"positions": "q8_0"}, "positions is 'q8_0'"),
    ({"panel": "8"}, "panel is '8' ... '16'"),
    ({"group": "64"}, "group is '64' ... '32'"),
    ({"C": "-1"}, "C is '-1'"),
    ({"C": "1e2"}, "C is '1e2'"),
    ({"C": "999999999999"}, "C is '999999999999'"),
    ({"C": "21"}, "C is 21 ... NH"),
    ({"C": "2000"}, "tensor wte is"),
    ({"V": "0"}, "V is 0"),
    ({"L": "3"}, "tensor ln1w is"),
    ({"maxT": None}, "maxT is ''"),
    ({"source_sha256": "abc"}, "source_sha256"),
]


@pytest.mark.parametrize(("changes", "named"), METADATA)
def test_other_metadata_is_refused(folder: Path, changes: dict[str, str | None], named: str) -> None:
    header, data = parsed((folder / "model.safetensors").read_bytes())
    for key, value in changes.items():
        header["__metadata__"].pop(key, None)
        if value is not None:
            header["__metadata__"][key] = value
    (folder / "other.safetensors").write_bytes(built(header, data))
    with pytest.raises(CheckpointError, match=gist(named)) as caught:
        PanelFile("other.safetensors")
    assert "\n" not in str(caught.value)


def test_tensors_of_another_dtype_name_order_or_place_are_refused(folder: Path) -> None:
    header, data = parsed((folder / "model.safetensors").read_bytes())
    metadata = header.pop("__metadata__")

    def refused(entries: dict[str, Any], named: str, alignment: int = 64) -> None:
        (folder / "other.safetensors").write_bytes(built({"__metadata__": metadata} | entries, data, alignment))
        with pytest.raises(CheckpointError, match=named):
            PanelFile("other.safetensors")

    refused({("other" if name == "wpe" else name): entry for name, entry in header.items()}, "tensor wpe is missing")
    refused(header | {"wte": header["wte"] | {"dtype": "I8"}}, "tensor wte is")
    refused(header | {"wte": header["wte"] | {"shape": [1, *header["wte"]["shape"]]}}, "tensor wte is")
    refused(header | {"zero": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, "'zero' is unknown")
    swap = {"ln1w": header["ln1b"], "ln1b": header["ln1w"]}
    refused(header | swap, "the order of llm.c")
    odd = built({"__metadata__": metadata} | header, data, 64)
    length = struct.unpack_from("<Q", odd)[0] + 8
    (folder / "other.safetensors").write_bytes(struct.pack("<Q", length) + odd[8:length] + b" " * 8 + odd[length:])
    with pytest.raises(CheckpointError, match="multiple of 64"):
        PanelFile("other.safetensors")
