"""GGUF: files of llama.cpp and of the `gguf` package are read, ours are read there, and everything else is one line."""

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from make_checkpoint import make, tensors
from running import gist

from pygpt import GPT2
from pygpt.commands.quantize import main
from pygpt.config import TENSORS
from pygpt.errors import CheckpointError, ClosedError, InputError
from pygpt.formats import gguf
from pygpt.formats.checkpoint import Checkpoint
from pygpt.formats.dtypes import FLOAT32, FORMATS, Q4_0, Q8_0
from pygpt.formats.gguf import HEAD, NAMES, GGUFFile
from pygpt.formats.open import open_model
from pygpt.formats.panels import PanelFile, quantise
from pygpt.tokenizer import Tokenizer, tokenizer_of

DATA = Path(__file__).resolve().parent.parent / "data"
SHAPE = {"L": 2, "NH": 2, "C": 32, "V": 65, "maxT": 8}
LLAMA = {"L": 1, "NH": 2, "C": 32, "V": 65, "maxT": 8}  # of the files in tests/data, which are of seed 7
MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
QUANTISED = ("qkvw", "attprojw", "fcw", "fcprojw")

Tensor = tuple[str, int, tuple[int, ...], bytes]  # name, type, extents, content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with source.bin."""
    monkeypatch.chdir(tmp_path)
    make("source.bin", seed=4, **SHAPE)
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# A writer of the tests' own


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return pair(key, 4, struct.pack("<I", value))


def text(key: str, value: str) -> bytes:
    return pair(key, 8, string(value))


def keys(shape: dict[str, int] = SHAPE) -> dict[str, bytes]:
    """The keys that a model needs."""
    return {
        "general.architecture": text("general.architecture", "gpt2"),
        "gpt2.context_length": u32("gpt2.context_length", shape["maxT"]),
        "gpt2.embedding_length": u32("gpt2.embedding_length", shape["C"]),
        "gpt2.block_count": u32("gpt2.block_count", shape["L"]),
        "gpt2.attention.head_count": u32("gpt2.attention.head_count", shape["NH"]),
        "gpt2.attention.layer_norm_epsilon": pair("gpt2.attention.layer_norm_epsilon", 6, struct.pack("<f", 1e-5)),
    }


def model(seed: int = 4) -> dict[str, Tensor]:
    """All tensors in float32, by layer, as llama.cpp's converter orders them."""
    found: list[Tensor] = []
    for name, array in tensors(SHAPE["L"], SHAPE["C"], SHAPE["V"], SHAPE["maxT"], seed, 12.0):
        layers = array if "{}" in NAMES[name] else [array]
        found += [(NAMES[name].format(i), 0, part.shape[::-1], part.tobytes()) for i, part in enumerate(layers)]
    return {tensor[0]: tensor for tensor in sorted(found)}


def build(pairs: list[bytes], table: list[Tensor], *, version: int = 3, alignment: int = 32, shift: int = 0) -> bytes:
    """A file of these keys and tensors; `shift` is added to every offset but the first."""
    rows, data = b"", b""
    for name, kind, extents, content in table:
        offset = len(data) + (shift if data else 0)
        rows += string(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, kind, offset)
        data += content + bytes(-len(content) % alignment)
    header = b"GGUF" + struct.pack("<IQQ", version, len(table), len(pairs)) + b"".join(pairs) + rows
    return header + bytes(-len(header) % alignment) + data


def sound() -> bytes:
    return build(list(keys().values()), list(model().values()))


def refused(content: bytes, *named: str) -> None:
    """A CheckpointError in one line that names these."""
    Path("other.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        GGUFFile("other.gguf")
    assert "\n" not in str(caught.value)
    for word in named:
        assert re.search(gist(word), str(caught.value))


def all_of(path: str | Path) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a file."""
    with open_model(path) as opened:
        return {name: np.concatenate(list(opened.pieces(name))) for name, _ in TENSORS}


def equal(one: dict[str, npt.NDArray[np.float32]], other: dict[str, npt.NDArray[np.float32]]) -> bool:
    return all(one[name].shape == other[name].shape and np.array_equal(one[name], other[name]) for name in other)


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def plain_q8_0(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """As llama.cpp rounds: d = max|w| / 127 to the nearest float16, halves away from zero."""
    blocks = matrix.reshape(-1, 32)
    d = abs(blocks).max(axis=1) / np.float32(127)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(d, 1 / d, 0)[:, None].astype("f4")
    q = np.trunc(scaled + np.copysign(0.5, scaled))
    return np.asarray((d.astype("<f2").astype("f4")[:, None] * q).reshape(matrix.shape), "f4")


def plain_q4_0(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """As llama.cpp rounds: the value of the largest magnitude becomes -8."""
    blocks = matrix.reshape(-1, 32)
    d = np.take_along_axis(blocks, abs(blocks).argmax(axis=1)[:, None], 1)[:, 0] / np.float32(-8)
    with np.errstate(divide="ignore"):
        scaled = blocks * np.where(d, 1 / d, 0)[:, None].astype("f4")
    q = np.minimum(15, (scaled + np.float32(8.5)).astype("i1")) - 8
    return np.asarray((d.astype("<f2").astype("f4")[:, None] * q).reshape(matrix.shape), "f4")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_file_that_llama_cpp_quantised_is_read_exactly(kind: str) -> None:
    """tests/data/llama_*.gguf are of llama.cpp's own llama_model_quantize() (llama-cpp-python 0.3.36), head q8_0 in both."""
    found = all_of(DATA / f"llama_{kind}.gguf")
    for name, array in tensors(LLAMA["L"], LLAMA["C"], LLAMA["V"], LLAMA["maxT"], 7, 12.0):
        if name == "wte":
            array = plain_q8_0(array)
        elif name in QUANTISED:
            array = plain_q8_0(array) if kind == "q8_0" else plain_q4_0(array)
        assert np.array_equal(found[name], array), name
    with GGUFFile(DATA / f"llama_{kind}.gguf") as opened:
        assert (opened.format.name, opened.formats["wte"].name, opened.formats["wpe"].name) == (kind, "q8_0", "float32")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("alignment", [32, 64])
def test_a_file_of_the_gguf_package_is_read_exactly(folder: Path, kind: str, alignment: int) -> None:
    package: Any = pytest.importorskip("gguf")
    number = package.GGMLQuantizationType[kind]
    writer = package.GGUFWriter("theirs.gguf", "gpt2")
    writer.add_custom_alignment(alignment)
    writer.add_context_length(SHAPE["maxT"])
    writer.add_embedding_length(SHAPE["C"])
    writer.add_block_count(SHAPE["L"])
    writer.add_feed_forward_length(4 * SHAPE["C"])
    writer.add_head_count(SHAPE["NH"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(SHAPE["V"])])
    writer.add_token_merges(["a b"])
    expected = {}
    for name, array in tensors(SHAPE["L"], SHAPE["C"], SHAPE["V"], SHAPE["maxT"], 4, 12.0):
        layers = []
        for i, part in enumerate(array if "{}" in NAMES[name] else [array]):
            if name in MATRICES and name != "wpe":
                content = package.quants.quantize(part, number)
                writer.add_tensor(NAMES[name].format(i), content, raw_dtype=number)
                layers.append(package.quants.dequantize(content, number))
            else:
                writer.add_tensor(NAMES[name].format(i), part)
                layers.append(part)
        expected[name] = np.array(layers).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert equal(all_of("theirs.gguf"), expected)


@pytest.mark.parametrize("form", ["q8_0", "q4_0", "f16", "bf16", "f32"])
def test_the_gguf_package_reads_our_file(folder: Path, form: str) -> None:
    package: Any = pytest.importorskip("gguf")
    assert main(["--format", form, "source.bin", "ours.gguf"]) == 0
    reader = package.GGUFReader("ours.gguf")
    found = {tensor.name: package.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    ours = all_of("ours.gguf")
    assert len(found) == 4 + 12 * SHAPE["L"]
    for name, array in ours.items():
        for i, part in enumerate(array if "{}" in NAMES[name] else [array]):
            assert np.array_equal(found[NAMES[name].format(i)], part)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.vocab_size"] == 65
    assert fields["general.file_type"] == package.LlamaFileType[{"f32": "ALL_F32"}.get(form, f"MOSTLY_{form.upper()}")]


def strings(content: bytes, key: str) -> list[str]:
    """An array of strings in the header of a file."""
    at = content.index(pair(key, 9, struct.pack("<I", 8))) + len(string(key)) + 8
    (count,) = struct.unpack_from("<Q", content, at)
    at += 8
    found = []
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", content, at)
        found.append(content[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return found


def test_the_vocabulary_is_gpt2s(folder: Path) -> None:
    make("words.bin", L=1, NH=1, C=32, V=50257, maxT=2)
    assert main(["words.bin", "words.gguf"]) == 0
    content = Path("words.gguf").read_bytes()
    tokenizer = Tokenizer()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens, merges = strings(content, "tokenizer.ggml.tokens"), strings(content, "tokenizer.ggml.merges")
    assert tokens[-1] == "<|endoftext|>"
    spelled = [bytes(byte_of[char] for char in token) for token in tokens[:-1]]
    assert spelled == [tokenizer.decode_bytes([i]) for i in range(50256)]
    assert merges[:2] == ["Ġ t", "Ġ a"]
    assert [merge.replace(" ", "") for merge in merges] == tokens[256:-1]
    types = pair("tokenizer.ggml.token_type", 9, struct.pack("<IQ50257i", 5, 50257, *[1] * 50256, 3))
    for expected in (
        types,
        u32("tokenizer.ggml.bos_token_id", 50256),
        u32("tokenizer.ggml.eos_token_id", 50256),
        text("tokenizer.ggml.model", "gpt2"),
        text("tokenizer.ggml.pre", "gpt-2"),
    ):
        assert expected in content
    unsigned = types.replace(struct.pack("<IQ", 5, 50257), struct.pack("<IQ", 4, 50257))
    Path("unsigned.gguf").write_bytes(content.replace(types, unsigned))
    with GGUFFile("words.gguf") as signed, GGUFFile("unsigned.gguf") as other:
        assert signed.vocabulary()["added_tokens"]
        assert signed.vocabulary() == other.vocabulary()


# ---------------------------------------------------------------------------------------------------------------------
# The model of a file


def test_a_file_of_the_tests_own_is_read(folder: Path) -> None:
    Path("own.gguf").write_bytes(sound())
    assert equal(all_of("own.gguf"), all_of("source.bin"))
    with GGUFFile("own.gguf") as found, Checkpoint("source.bin") as source:
        assert found.config == source.config
    with GPT2.load("own.gguf") as one, GPT2.load("source.bin") as other:
        assert np.array_equal(one.logits([1, 2, 3]), other.logits([1, 2, 3]))


def test_a_file_is_known_by_its_first_bytes(folder: Path) -> None:
    Path("own.bin").write_bytes(sound())
    with open_model("own.bin") as found:
        assert isinstance(found, GGUFFile)
    make("checkpoint.gguf", seed=4, **SHAPE)
    with pytest.raises(CheckpointError, match="it begins with"):
        open_model("checkpoint.gguf")


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_both_kinds_of_files_give_the_kernels_the_same_bytes(folder: Path, form: str) -> None:
    for target in ("one.gguf", "one.safetensors"):
        assert main(["--format", form, "--head", "q4_0", "source.bin", target]) == 0
    with GGUFFile("one.gguf") as one, PanelFile("one.safetensors") as other:
        stored = {name: (kind, bytes(content)) for name, (kind, content) in one.stored().items()}
        assert stored == {name: (kind, bytes(content)) for name, (kind, content) in other.stored().items()}
        assert all(np.frombuffer(content, "u1").ctypes.data % 64 == 0 for _, content in one.stored().values())


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("form", ["f32", "bf16", "q8_0"])
def test_plain_floats_are_used_in_place(folder: Path, form: str, mmap: bool) -> None:
    """If the layers follow each other, as in our files: not in the order of llama.cpp's converter, except for wte."""
    Path("by_layer.gguf").write_bytes(sound())
    assert main(["--format", form, "source.bin", "own.gguf"]) == 0
    for path, mapped in (("own.gguf", {*NAMES}), ("by_layer.gguf", {"wte", "wpe", "lnfw", "lnfb"})):
        with open_model(path, mmap=mmap, threads=3) as found:
            assert isinstance(found, GGUFFile)
            stored = found.stored()
            Path(path).unlink()
            plain = {name for name in mapped & stored.keys() if found.formats[name].block_values == 1}
            assert {name for name, (_, content) in stored.items() if content.readonly} == (plain if mmap else set())
            for name, (kind, content) in stored.items():
                if kind in ("float32", "bfloat16"):
                    values = FORMATS[kind].values(content).reshape(-1)
                    assert np.array_equal(values, np.concatenate([piece.reshape(-1) for piece in found.pieces(name)]))


def test_layers_of_different_types_are_widened(folder: Path) -> None:
    table = model()
    name = "blk.1.ffn_up.weight"
    matrix = np.frombuffer(table[name][3], "<f4").reshape(-1, 32)
    for kind, number in ((Q8_0, 8), (Q4_0, 2)):
        blocks = quantise(kind, matrix)
        assert blocks is not None
        table[name] = (name, number, (32, 128), blocks.tobytes())
        Path("mixed.gguf").write_bytes(build(list(keys().values()), list(table.values())))
        with GGUFFile("mixed.gguf") as found:
            assert found.formats["fcw"] == FLOAT32
            form, content = found.stored()["fcw"]
            assert form == "float32"
            layers = np.frombuffer(content, "<f4").reshape(2, 128, 32)
        assert np.array_equal(layers[1], kind.to_float32(blocks))
        assert layers[0].tobytes() == table["blk.0.ffn_up.weight"][3]


def test_a_head_that_is_the_embedding_is_left_out_and_another_one_is_used(folder: Path) -> None:
    table = model()
    _, kind, extents, content = table[NAMES["wte"]]
    Path("tied.gguf").write_bytes(build(list(keys().values()), [*table.values(), (HEAD, kind, extents, content)]))
    assert equal(all_of("tied.gguf"), all_of("source.bin"))
    changed = np.frombuffer(content, "<f4") * np.float32(2)
    half = changed.astype("<f2")
    for type_of_head, values in (kind, changed), (1, half):
        head = (HEAD, type_of_head, extents, values.tobytes())
        Path("own.gguf").write_bytes(build(list(keys().values()), [*table.values(), head]))
        with GPT2.load("own.gguf") as own, GPT2.load("source.bin") as tied:
            assert not own.config.tied
            found, exact = own.logits([1, 2, 3]), 2 * tied.logits([1, 2, 3])
            assert (
                np.array_equal(found, exact) if values is changed else np.allclose(found, exact, atol=1e-2 * abs(exact).max())
            )


def test_a_closed_file_says_so(folder: Path) -> None:
    Path("own.gguf").write_bytes(sound())
    found = GGUFFile("own.gguf")
    found.close()
    found.close()
    with pytest.raises(ClosedError, match="closed"):
        next(found.pieces("wte"))


# ---------------------------------------------------------------------------------------------------------------------
# Everything else


def changed(**pairs: bytes | None) -> bytes:
    """Return a valid file with other keys, which have _ for each dot."""
    found = keys()
    for name, value in pairs.items():
        key = next((key for key in found if key.replace(".", "_") == name), name)
        if value is None:
            del found[key]
        else:
            found[key] = value
    return build(list(found.values()), list(model().values()))


def tampered(name: str, change: Callable[[Tensor], Tensor | None]) -> bytes:
    """Return a valid file with another tensor."""
    table = [change(tensor) if tensor[0] == name else tensor for tensor in model().values()]
    return build(list(keys().values()), [tensor for tensor in table if tensor is not None])


KEYS: list[tuple[dict[str, bytes | None], tuple[str, ...]]] = [
    ({"general_architecture": None}, ("general.architecture is None", "'gpt2'")),
    ({"general_architecture": text("general.architecture", "llama")}, ("'llama'", "'gpt2'")),
    ({"gpt2_context_length": None}, ("maxT is None", "gpt2.context_length")),
    ({"gpt2_context_length": u32("gpt2.context_length", 0)}, ("maxT is 0",)),
    ({"gpt2_context_length": text("gpt2.context_length", "8")}, ("maxT is '8'",)),
    ({"gpt2_context_length": u32("gpt2.context_length", 9)}, ("position_embd.weight", "(32, 8)", "(32, 9)")),
    ({"gpt2_block_count": u32("gpt2.block_count", 3)}, ("blk.2.attn_norm.weight ... missing",)),
    ({"gpt2_block_count": u32("gpt2.block_count", 1)}, ("'blk.1.attn_norm.bias' ... unknown",)),
    ({"gpt2_attention_head_count": u32("gpt2.attention.head_count", 3)}, ("C is 32", "NH = 3")),
    ({"gpt2_attention_layer_norm_epsilon": None}, ("layer_norm_epsilon is None", "1e-05")),
    ({"gpt2_attention_layer_norm_epsilon": u32("gpt2.attention.layer_norm_epsilon", 1)}, ("layer_norm_epsilon is 1",)),
    ({"a": u32("gpt2.feed_forward_length", 100)}, ("blk.0.ffn_up.weight ... (32, 128) ... (32, 100)",)),
    ({"a": u32("gpt2.attention.head_count_kv", 1)}, ("head_count_kv is 1 ... 2",)),
    ({"a": pair("split.count", 2, struct.pack("<H", 2))}, ("one of 2 parts", "merge")),
    ({"a": pair("split.count", 2, struct.pack("<H", 2)), "general_architecture": None}, ("one of 2 parts", "merge")),
    ({"a": u32("general.alignment", 48)}, ("begins at",)),
    ({"a": u32("general.alignment", 12)}, ("general.alignment is 12",)),
    ({"a": u32("general.alignment", 0)}, ("general.alignment is 0",)),
    ({"a": text("general.alignment", "32")}, ("general.alignment is '32'",)),
    ({"a": u32("gpt2.block_count", 2)}, ("'gpt2.block_count' ... twice",)),
    ({"a": pair("x", 13, b"")}, ("'x' is 13",)),
    ({"a": pair("x", 8, struct.pack("<Q", 1 << 40))}, ("the length of 'x'", str(1 << 40))),
    ({"a": pair("x", 8, struct.pack("<Q", 1) + b"\xff")}, ("'x' is not UTF-8",)),
    ({"a": pair("x", 9, struct.pack("<IQ", 9, 1))}, ("'x' ... arrays",)),
    ({"a": pair("x", 9, struct.pack("<IQ", 0, 1 << 62))}, ("the length of 'x'",)),
    ({"a": pair("x", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 1 << 62))}, ("truncated: 'x'",)),
    ({"a": pair("x", 9, struct.pack("<IQ", 8, 2) + struct.pack("<Q", 1 << 63))}, ("truncated: 'x'",)),
    ({"a": pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 1) + string("a"))}, ("tokens has 1 token", "65 rows")),
    ({"a": pair("tokenizer.ggml.token_type", 9, struct.pack("<IQ7i", 5, 7, *[1] * 7))}, ("token_type has 7 types", "65 rows")),
]


@pytest.mark.parametrize(("pairs", "named"), KEYS)
def test_other_keys_are_refused(folder: Path, pairs: dict[str, bytes | None], named: tuple[str, ...]) -> None:
    refused(changed(**pairs), *named)


WORDS = [*Tokenizer().vocabulary()["model"]["vocab"]][:65]
TOKENS = pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 65) + b"".join(map(string, WORDS)))
MERGES = pair("tokenizer.ggml.merges", 9, struct.pack("<IQ", 8, 0))


@pytest.mark.parametrize(
    ("model", "others", "result"),
    [
        ("llama", {"a": TOKENS, "b": MERGES}, "'llama' and pre None; .*'gpt2' with 'gpt-2'.*--tokenizer"),
        ("gpt2", {"a": TOKENS, "b": MERGES, "c": text("tokenizer.ggml.pre", "llama-bpe")}, "'gpt2' and pre 'llama-bpe'"),
        ("gpt2", {"a": TOKENS}, "without tokenizer.ggml.merges"),
        ("none", {"a": TOKENS, "b": MERGES}, "no tokenizer lies beside it"),
        ("gpt2", {"a": TOKENS, "b": MERGES, "c": u32("tokenizer.ggml.eos_token_id", 64)}, 64),
        ("gpt2", {"a": TOKENS, "b": MERGES, "c": u32("tokenizer.ggml.eos_token_id", 65)}, None),
    ],
)
def test_a_vocabulary_is_read_or_refused(folder: Path, model: str, others: dict[str, bytes], result: str | int | None) -> None:
    """GPT-2's does not replace one of another kind: the ids would be others. The token that ends a text is read."""
    Path("own.gguf").write_bytes(changed(model=text("tokenizer.ggml.model", model), **others))
    with open_model("own.gguf") as found:
        assert found.has_vocabulary == (model != "none")
        if isinstance(result, str):
            with pytest.raises(InputError, match=result):
                tokenizer_of(found.config)
        else:
            assert tokenizer_of(found.config).eot == result
            assert result is None or tokenizer_of(found.config).encode(WORDS[64], allow_special=True) == [result]


def test_harmless_settings_are_accepted(folder: Path) -> None:
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    extra = {f"x{kind}": pair(f"x{kind}", kind, struct.pack("<" + code, 1)) for kind, code in scalars.items()}
    extra |= {f"y{kind}": pair(f"y{kind}", 9, struct.pack(f"<IQ3{code}", kind, 3, 1, 0, 1)) for kind, code in scalars.items()}
    extra["z"] = pair("z", 9, struct.pack("<IQ", 8, 2) + string("") + string("é"))
    Path("own.gguf").write_bytes(changed(**extra))
    assert equal(all_of("own.gguf"), all_of("source.bin"))


TAMPERED: list[tuple[str, Callable[[Tensor], Tensor | None], tuple[str, ...]]] = [
    ("token_embd.weight", lambda t: None, ("token_embd.weight ... missing",)),
    ("token_embd.weight", lambda t: (t[0], 0, (32 * 65,), t[3]), ("token_embd.weight", "two extents")),
    ("output_norm.bias", lambda t: None, ("output_norm.bias ... missing",)),
    ("output_norm.bias", lambda t: ("output_norm.gain", *t[1:]), ("output_norm.bias ... missing",)),
    ("output_norm.bias", lambda t: (t[0], 0, (32, 1), t[3]), ("output_norm.bias", "(32, 1)", "(32,)")),
    ("output_norm.bias", lambda t: ("output_norm.weight", *t[1:]), ("'output_norm.weight' ... twice",)),
    ("output_norm.bias", lambda t: (t[0], 0, (), t[3]), ("extents of 'output_norm.bias' is 0",)),
    ("output_norm.bias", lambda t: (t[0], 0, (32, 1, 1, 1, 1), t[3]), ("extents of 'output_norm.bias' is 5",)),
    ("output_norm.bias", lambda t: (t[0], 0, (0,), t[3]), ("extent of 'output_norm.bias' is 0",)),
    ("output_norm.bias", lambda t: (t[0], 0, (1 << 60,), t[3]), ("'output_norm.bias'", str(1 << 60))),
    ("output_norm.bias", lambda t: (t[0], 12, (256,), t[3]), ("Q4_K", "output_norm.bias", "pygpt quantize")),
    ("output_norm.bias", lambda t: (t[0], 99, (256,), t[3]), ("number 99", "output_norm.bias")),
    ("output_norm.bias", lambda t: (t[0], 8, (31,), t[3]), ("rows of 31 values", "multiple of 32 for q8_0")),
    ("output_norm.bias", lambda t: ("x" * 65, *t[1:]), ("name ... 65",)),
    ("output_norm.bias", lambda t: (t[0], 0, (1 << 32, 1 << 32, 1 << 32, 1 << 32), t[3]), ("begins at",)),
]


@pytest.mark.parametrize(("name", "change", "named"), TAMPERED)
def test_other_tensors_are_refused(
    folder: Path, name: str, change: Callable[[Tensor], Tensor | None], named: tuple[str, ...]
) -> None:
    refused(tampered(name, change), *named)


def test_other_files_are_refused(folder: Path) -> None:
    refused(b"", "truncated")
    refused(b"GGU", "truncated")
    refused(b"GGML" + bytes(100), "b'GGML'")
    refused(build([], [], version=2), "version 2 ... 3")
    refused(b"GGUF" + struct.pack(">I", 3) + bytes(100), "byte order")
    refused(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(100), "tensors", str(1 << 60))
    refused(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(100), "keys", str(1 << 60))
    refused(build(list(keys().values()), list(model().values()), shift=32), "begins at")
    refused(sound() + b"x", "too long")
    whole = sound()
    for size in range(0, len(whole) - 40, 999):
        refused(whole[:size])
    with pytest.raises(CheckpointError, match="regular"):
        GGUFFile("/dev/null")


def test_a_header_beyond_the_limit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "HEADER_LIMIT", 200)
    refused(sound(), "200 bytes")
