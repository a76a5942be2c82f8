"""Read and write Hugging Face models: the bytes of the tests' own writers, and one line for every other file."""

import json
import os
import re
import struct
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import make_huggingface as hf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import full_disk
from make_checkpoint import make
from make_huggingface import SHAPE, Raw
from running import assert_refuses_and_keeps, execute, gist

from pygpt.commands.convert import main
from pygpt.config import Config
from pygpt.errors import CheckpointError, ClosedError, InputError
from pygpt.formats import dtypes
from pygpt.formats.checkpoint import Checkpoint
from pygpt.formats.files import is_pickle
from pygpt.formats.huggingface import KNOWN_HEADS, HuggingFaceModel, settings_of
from pygpt.formats.safetensors import HEADER_LIMIT, SafetensorsFile, write_safetensors

Tensors = dict[str, Raw]
ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20


def tensors(dtype: str = "F32", **changes: Any) -> Tensors:
    return hf.named(hf.weights(**SHAPE), dtype, **changes)


refused = partial(assert_refuses_and_keeps, main)


# ---------------------------------------------------------------------------------------------------------------------
# From Hugging Face


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize(("prefix", "shards", "masks"), [("", 0, True), ("transformer.", 3, False), ("transformer.", 0, True)])
def test_a_folder_becomes_a_file(folder: Path, dtype: str, version: int, prefix: str, shards: int, masks: bool) -> None:
    values = hf.weights(**SHAPE)
    hf.make_model(Path("model"), hf.named(values, dtype, prefix=prefix, masks=masks), hf.settings(**SHAPE), shards=shards)
    assert main(["model", "a.bin", "--version", str(version)]) == 0
    assert Path("a.bin").read_bytes() == hf.checkpoint_bytes(hf.rounded(values, dtype), version, **SHAPE)


@settings(deadline=None, max_examples=25)
@given(
    L=st.integers(1, 3),
    NH=st.integers(1, 3),
    HS=st.integers(1, 5),
    V=st.integers(1, 300),
    maxT=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(tmp_path_factory: pytest.TempPathFactory, L: int, NH: int, HS: int, V: int, maxT: int, seed: int) -> None:
    shape = {"L": L, "NH": NH, "C": NH * HS, "V": V, "maxT": maxT}
    place = tmp_path_factory.mktemp("hf")
    values = hf.weights(seed, **shape)
    hf.make_model(place / "model", hf.named(values), hf.settings(**shape), shards=seed % 3)
    assert main([str(place / "model"), str(place / "a.bin")]) == 0
    assert (place / "a.bin").read_bytes() == hf.checkpoint_bytes(values, 3, **shape)
    assert main([str(place / "a.bin"), str(place / "back/") + "/"]) == 0
    assert main([str(place / "back"), str(place / "b.bin")]) == 0
    assert (place / "b.bin").read_bytes() == (place / "a.bin").read_bytes()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x10580])
def test_the_length_of_a_header_does_not_make_a_file_a_pickle(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}".ljust(length))
    assert not is_pickle(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(("dtype", "version"), [("F32", 3), ("F16", 3), ("BF16", 5)])
def test_by_default_every_value_is_kept(folder: Path, capfd: pytest.CaptureFixture[str], dtype: str, version: int) -> None:
    hf.make_model(Path("model"), tensors(dtype), hf.settings(**SHAPE))
    assert main(["model/", "a.bin"]) == 0
    kind = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    size, written = os.path.getsize("model/model.safetensors"), os.path.getsize("a.bin")
    assert capfd.readouterr() == (
        "",
        f"pygpt: model/ (Hugging Face, {kind}, {size} bytes) -> "
        f"a.bin (version {version}, {'bfloat16' if version == 5 else 'float32'}, {written} bytes)\n",
    )


def test_dtypes_may_be_mixed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = hf.weights(**SHAPE)
    exact = hf.named(values, "F32")
    mixed = hf.named(values, "BF16") | {name: exact[name] for name in ("wpe.weight", "h.1.mlp.c_fc.bias")}
    hf.make_model(Path("model"), mixed, hf.settings(**SHAPE))
    assert main(["model", "a.bin"]) == 0
    assert "(Hugging Face, mixed," in capsys.readouterr().err
    expected = {**hf.rounded(values, "BF16"), "wpe": values["wpe"]}
    expected["fcb"][1] = values["fcb"][1]
    with HuggingFaceModel("model") as model:
        assert model.formats["fcb"].name == "float32"  # of layers in different formats
    assert Path("a.bin").read_bytes() == hf.checkpoint_bytes(expected, 3, **SHAPE)


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_the_size_of_the_pieces_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    values = hf.weights(**SHAPE)
    hf.make_model(Path("model"), hf.named(values), hf.settings(**SHAPE))
    monkeypatch.setattr(dtypes, "PIECE", piece)
    assert main(["model", "a.bin"]) == 0
    assert Path("a.bin").read_bytes() == hf.checkpoint_bytes(values, 3, **SHAPE)


def test_a_head_that_is_wte(folder: Path) -> None:
    values = hf.weights(**SHAPE)
    model = {**tensors(prefix="transformer."), "lm_head.weight": hf.raw(values["wte"], "F32")}
    hf.make_model(Path("model"), model, hf.settings(**SHAPE))
    assert main(["model", "a.bin"]) == 0
    assert Path("a.bin").read_bytes() == hf.checkpoint_bytes(values, 3, **SHAPE)


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "gelu_pytorch_tanh", "n_inner": 24, "scale_attn_weights": True, "tie_word_embeddings": True},
        {
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": True,
            "add_cross_attention": False,
            "n_inner": None,
        },
    ],
)
def test_settings_that_change_nothing(folder: Path, settings: dict[str, Any]) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE) | settings)
    assert main(["model", "a.bin"]) == 0


def test_symbolic_links_of_a_cache_are_followed(folder: Path) -> None:
    hf.make_model(Path("blobs"), tensors(), hf.settings(**SHAPE))
    Path("snapshot").mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(f"../blobs/{name}", f"snapshot/{name}")
    assert main(["snapshot", "a.bin"]) == 0
    assert main(["snapshot/model.safetensors", "b.bin"]) == 0
    assert Path("a.bin").read_bytes() == Path("b.bin").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# One file, and how many heads


def test_one_file_with_its_settings_beside_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE))
    assert main(["model/model.safetensors", "a.bin"]) == 0
    with Checkpoint("a.bin") as found:
        assert found.config == Config(**SHAPE)
    refused(capsys, ["--heads", "2", "model/model.safetensors", "b.bin"], "config.json", "leave out --heads")


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_one_file_needs_the_number_of_heads(folder: Path, capsys: pytest.CaptureFixture[str], heads: int) -> None:
    values = hf.weights(**SHAPE)
    hf.write(Path("m.safetensors"), hf.named(values))
    refused(capsys, ["m.safetensors", "a.bin"], "m.safetensors", "--heads")
    refused(capsys, ["m.safetensors", "a.bin", "--heads", "4"], "C is 6", "NH = 4")
    assert main(["m.safetensors", "a.bin", "--heads", str(heads)]) == 0
    assert Path("a.bin").read_bytes() == hf.checkpoint_bytes(values, 3, **SHAPE | {"NH": heads})


@pytest.mark.parametrize("heads", ["0", "-1", "two", "", "1025", "9" * 5000, "0" * 8 + "1" * 5000, "²"])
def test_heads_that_are_not_numbers(folder: Path, capsys: pytest.CaptureFixture[str], heads: str) -> None:
    hf.write(Path("m.safetensors"), tensors())
    refused(capsys, ["m.safetensors", "a.bin", f"--heads={heads}"], "--heads", "from 1 to 1024")


def test_a_file_of_the_source_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE))
    for target in ("model/config.json", "model/../model/config.json"):
        refused(capsys, ["model", target], "config.json", "belongs to SRC")
    assert main(["model", "model/new.bin"]) == 0


def test_heads_of_a_bin_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("a.bin", **SHAPE)
    refused(capsys, ["--heads", "2", "a.bin", "b.bin"], "a.bin", "leave out --heads")


def sparse(path: Path, dtype: str, *, L: int, NH: int, C: int, V: int, maxT: int) -> None:
    """A model of zeros, as a sparse file."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (maxT, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    outs: dict[str, tuple[int, ...]] = {
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }
    for layer in range(L):
        for name, shape in outs.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (C,), f"h.{layer}.{name}.bias": (C,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    with path.open("wb") as file:
        file.write(hf.file_of(json.dumps(header).encode(), b""))
        file.truncate(file.tell() + end)


@pytest.mark.parametrize(("L", "C", "NH"), [(12, 768, 12), (24, 1024, 16), (36, 1280, 20), (48, 1600, 25)])
def test_the_four_sizes_are_known(folder: Path, L: int, C: int, NH: int) -> None:
    sparse(Path("m.safetensors"), "BF16", L=L, NH=NH, C=C, V=50257, maxT=1024)
    with HuggingFaceModel("m.safetensors") as model:
        assert model.config == Config(L=L, NH=NH, C=C, V=50257, maxT=1024)
        assert re.search(gist(f"config.json ... {NH} heads ... {L} layers ... {C} channels"), model.notice)
    with HuggingFaceModel("m.safetensors", heads=1) as model:
        assert (model.config.NH, model.notice) == (1, "")


def test_a_guess_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(KNOWN_HEADS, (SHAPE["L"], SHAPE["C"]), 3)
    hf.write(Path("m.safetensors"), tensors())
    assert main(["m.safetensors", "a.bin"]) == 0
    output = capsys.readouterr().err
    assert output.endswith("\n")
    assert re.search(gist("config.json ... 3 heads ... 2 layers ... 6 channels"), output)
    assert output.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not models


def without(name: str) -> Callable[[Tensors], object]:
    return lambda model: model.pop(name)


def without_biases_but(name: str) -> Callable[[Tensors], object]:
    def change(model: Tensors) -> None:
        for bias in [bias for bias in model if bias.endswith(".bias") and not bias.endswith(".attn.bias") and bias != name]:
            del model[bias]

    return change


def with_tensor(name: str, dtype: str, *shape: int) -> Callable[[Tensors], object]:
    size = int(np.prod(shape)) * {"F64": 8, "F32": 4, "BF16": 2, "I8": 1}[dtype]
    return lambda model: model.update({name: (dtype, shape, bytes(size))})


@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("wte.weight"), "wte.weight ... missing"),
        (without("ln_f.bias"), "ln_f.bias ... missing"),
        (without("h.1.mlp.c_proj.weight"), "h.1.mlp.c_proj.weight ... missing"),
        (with_tensor("h.2.ln_1.weight", "F32", 6), "'h.2.ln_1.weight' ... unknown"),
        (with_tensor("h.2.attn.bias", "F32", 6), "'h.2.attn.bias' ... unknown"),
        (with_tensor("h.0.crossattention.c_attn.weight", "F32", 6, 12), "'h.0.crossattention.c_attn.weight' ... unknown"),
        (with_tensor("score.weight", "F32", 2, 6), "'score.weight' ... unknown ... GPT2LMHeadModel"),
        (with_tensor("base_model.model.h.0.attn.c_attn.lora_A.weight", "F32", 4, 6), "lora_A ... merge_and_unload"),
        (with_tensor("h.1.attn.c_attn.weight", "F32", 18, 6), "h.1.attn.c_attn.weight ... (18, 6) ... (6, 18)"),
        (with_tensor("wpe.weight", "F32", 6, 6), "wpe.weight ... (6, 6) ... (5, 6)"),
        (with_tensor("h.0.ln_2.bias", "F32", 6, 1), "h.0.ln_2.bias ... (6, 1) ... (6,)"),
        (with_tensor("h.0.ln_2.bias", "F64", 6), "h.0.ln_2.bias ... F64 ... F32, F16, BF16"),
        (with_tensor("h.1.attn.c_attn.weight", "I8", 6, 18), "h.1.attn.c_attn.weight ... I8"),
        (with_tensor("lm_head.weight", "F32", 131, 6), "(131, 6)"),
        (with_tensor("module.lm_head.weight", "I8", 130, 6), "lm_head.weight ... I8"),
        (without_biases_but("h.1.ln_2.bias"), "h.0.ln_1.bias ... missing"),
        (with_tensor("transformer.wpe.weight", "F32", 5, 6), "wpe.weight ... twice"),
    ],
)
def test_tensors_that_are_not_gpt2s(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Tensors], object], named: str, shards: int
) -> None:
    model = tensors()
    change(model)
    hf.make_model(Path("model"), model, hf.settings(**SHAPE), shards=shards)
    refused(capsys, ["model", "a.bin"], "model: not a GPT-2 model: ", named)
    Path("model/adapter_config.json").write_text("{}")  # transformers would add the adapter
    refused(capsys, ["model", "a.bin"], "adapter_config.json ... merge_and_unload")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "gpt_neo"}, "model_type ... 'gpt_neo' ... 'gpt2'"),
        ({"model_type": None}, "model_type is None"),
        ({"layer_norm_epsilon": 0}, "epsilon is 0: ... 1e-30 to 1 ... layer_norm_epsilon"),
        ({"activation_function": "mish"}, "'mish' ... gelu_new, gelu, relu, silu, quick_gelu"),
        ({"activation_function": ["gelu_new"]}, "activation is ['gelu_new']"),
        ({"n_inner": 25}, "h.0.mlp.c_fc.weight ... (6, 24) ... (6, 25)"),
        ({"n_inner": 0}, "F is 0"),
        ({"scale_attn_weights": None}, "scaled is None: ... True or False ... scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "lm_head.weight ... missing"),
        ({"n_head": None}, "NH is None"),
        ({"n_head": 4}, "C is 6"),
        ({"n_head": True}, "NH is True"),
        ({"n_layer": 1}, "'h.1.attn.bias' ... unknown"),
        ({"n_layer": 3}, "h.2.ln_1.weight ... missing"),
        ({"n_layer": 10**9}, "L is 1000000000: ... 1 to 256"),
        ({"n_positions": 6}, "wpe.weight ... (5, 6) ... (6, 6)"),
        ({"vocab_size": 131}, "wte.weight ... (130, 6) ... (131, 6)"),
        ({"n_embd": "6"}, "C is '6'"),
    ],
)
def test_settings_that_are_not_ours(
    folder: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], named: str
) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE) | settings)
    refused(capsys, ["model", "a.bin"], "model: ", named)


@pytest.mark.parametrize("missing", ["model_type", "n_positions", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_settings_that_are_missing(folder: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    config = hf.settings(**SHAPE)
    del config[missing]
    hf.make_model(Path("model"), tensors(), config)
    refused(capsys, ["model", "a.bin"], "config.json", missing)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"\xff{}", "is not JSON"),
        (b'{"n_head": 2, "n_head": 3}', "'n_head' is given twice"),
        (b'{"n_head": NaN}', "NaN is not a number"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": "' + b"x" * (1 << 22) + b'"}', "longer than 4194304 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_text_that_is_not_json(folder: Path, capsys: pytest.CaptureFixture[str], name: str, text: bytes, named: str) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE), shards=2)
    Path("model", name).write_bytes(text)
    refused(capsys, ["model", "a.bin"], f"model/{name}", named)


def test_files_that_are_missing_or_not_models(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("empty").mkdir()
    refused(capsys, ["empty", "a.bin"], "empty: ", "config.json")
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE))
    Path("model/model.safetensors").rename("model/other.safetensors")
    refused(capsys, ["model", "a.bin"], "model.safetensors or model.safetensors.index.json")
    Path("model/pytorch_model.bin").write_bytes(b"\x80\x02")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(capsys, ["model", "a.bin"], "model/pytorch_model.bin: ", "pickle", "model.safetensors", "save_pretrained")
    os.mkfifo("model/model.safetensors")
    refused(capsys, ["model", "a.bin"], "model/model.safetensors: ", "regular")
    Path("model/config.json").unlink()
    os.mkfifo("model/config.json")
    refused(capsys, ["model/other.safetensors", "a.bin"], "model/config.json: ", "regular")
    refused(capsys, ["absent.safetensors", "a.bin"], "absent.safetensors", "No such file")


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"])
def test_a_pickle_is_not_opened_without_torch(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    Path("pytorch_model.bin").write_bytes(start + bytes(2000))
    refused(capsys, ["pytorch_model.bin", "a.bin"], "pytorch_model.bin: ", "pickle")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "x.bin",
        "a\\b.safetensors",
        "x.safetensors\n",
    ],
)
def test_an_index_cannot_point_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE), shards=2)
    hf.write(Path("model.safetensors"), tensors())
    index = Path("model/model.safetensors.index.json")
    places = json.loads(index.read_text())
    places["weight_map"]["wte.weight"] = name
    index.write_text(json.dumps(places))
    refused(capsys, ["model", "a.bin"], str(index), "safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda places: places.pop("wpe.weight"), "'wpe.weight' ... model-00002-of-00002.safetensors"),
        (lambda places: places.update({"h.9.x": "model-00001-of-00002.safetensors"}), "'h.9.x' ... model-00001-of"),
        (lambda places: places.update({"wpe.weight": "model-00001-of-00002.safetensors"}), "'wpe.weight' ... model-00001-of"),
        (lambda places: places.update({"wpe.weight": "model-00003-of-00003.safetensors"}), "model-00003-of-00003.safetensors"),
        (lambda places: places.update({"wpe.weight": 3}), "weight_map"),
        (lambda places: places.clear(), "weight_map"),
    ],
)
def test_an_index_that_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], named: str
) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE), shards=2)
    index = Path("model/model.safetensors.index.json")
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    refused(capsys, ["model", "a.bin"], named)


# ---------------------------------------------------------------------------------------------------------------------
# The safetensors format

GOOD = {
    "a": ("F32", (2, 3), bytes(range(24))),
    "b": ("BOOL", (5,), bytes(5)),
    "c": ("BF16", (), b"\x80\x3f"),
    "d": ("F16", (0, 4), b""),
}
GOOD_DATA = b"".join(data for _, _, data in GOOD.values())


def test_a_valid_file(tmp_path: Path) -> None:
    hf.write(tmp_path / "x.safetensors", GOOD)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert {name: (dtype, shape) for name, (dtype, shape, _) in file.tensors.items()} == {
            name: (dtype, shape) for name, (dtype, shape, _) in GOOD.items()
        }
        np.testing.assert_array_equal(file.stored("a"), np.frombuffer(bytes(range(24)), "<f4").reshape(2, 3))
        assert file.stored("c") == 0x3F80
        assert file.stored("d").shape == (0, 4)
        assert not file.stored("a").flags.writeable
        with pytest.raises(CheckpointError, match=r"'b'.*BOOL.*F32, F16 or BF16"):
            file.stored("b")


def changed(**changes: Any) -> bytes:
    """The good file, tensor b's entry changed."""
    header = hf.header_of(GOOD)
    header["b"] |= changes
    return hf.file_of(json.dumps(header).encode(), GOOD_DATA)


def replaced(old: str, new: str) -> bytes:
    """The good file, something in its header replaced."""
    text = json.dumps(hf.header_of(GOOD))
    assert old in text
    return hf.file_of(text.replace(old, new).encode(), GOOD_DATA)


SOUND = hf.file_of(json.dumps(hf.header_of(GOOD)).encode(), GOOD_DATA)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "0 bytes"),
        (bytes(7), "7 bytes"),
        (bytes(8), "begin ... {"),
        (struct.pack("<Q", HEADER_LIMIT + 1) + bytes(100), "4194305 bytes ... 4194304"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "18446744073709551615 bytes"),
        (struct.pack("<Q", 3) + b"{}", "truncated ... 10 bytes ... 3"),
        (hf.file_of(b"[]", b""), "begin ... {"),
        (hf.file_of(b" {}", b""), "begin ... {"),
        (hf.file_of(b"{}x", b""), "header is not JSON"),
        (hf.file_of(b'{"\xff": 1}', b""), "header is not JSON"),
        (hf.file_of(b'{"a":' * 100_000, b""), "header is not JSON"),
        (hf.file_of(b"{}", b"x"), "too long ... 11 bytes ... 10"),
        (SOUND[:-1], "truncated: "),
        (SOUND + b"x", "too long: "),
        (replaced('"b"', '"a"'), "'a' is given twice"),
        (replaced('"format"', '"format": "np", "format"'), "'format' is given twice"),
        (replaced('"shape": [5]', '"shape": [5], "shape": [5]'), "'shape' is given twice"),
        (replaced('{"format": "pt"}', '{"format": 1}'), "__metadata__ ... strings"),
        (replaced('{"format": "pt"}', '["format"]'), "__metadata__ ... strings"),
        (replaced('"shape": [5], ', ""), "'b' ... dtype, shape and data_offsets"),
        (replaced('"shape": [5]', '"shape": [5], "scale": 2'), "'b' ... dtype, shape and data_offsets"),
        (hf.file_of(b'{"a": 1}', b""), "'a' ... dtype"),
        (changed(dtype="F4"), "unknown dtype 'F4'"),
        (changed(dtype=["BOOL"]), "unknown dtype"),
        (changed(shape=[-5]), "'b' ... shape"),
        (changed(shape=[5.0]), "'b' ... shape"),
        (changed(shape=[True, 5]), "'b' ... shape"),
        (changed(shape=5), "'b' ... shape"),
        (changed(shape=[5] + [1] * 8), "'b' ... shape"),
        (changed(shape=[2**62, 2**62]), "'b' ... shape"),
        (changed(shape=[2**32, 2**32]), "'b' ... 5 bytes ... 18446744073709551616 ... BOOL"),
        (changed(shape=[4]), "'b' ... 5 bytes ... 4"),
        (changed(dtype="F16"), "'b' ... 5 bytes ... 10"),
        (changed(data_offsets=[24]), "'b' ... data_offsets"),
        (changed(data_offsets=[24, 29, 30]), "'b' ... data_offsets"),
        (changed(data_offsets=[-5, 0]), "'b' ... data_offsets"),
        (changed(data_offsets=["24", "29"]), "'b' ... data_offsets"),
        (changed(data_offsets=[29, 24]), "'b' ... -5 bytes"),
        (changed(data_offsets=[23, 28]), "23 ... 24 ... overlap"),
        (changed(data_offsets=[25, 30]), "25 ... 24 ... hole"),
        (changed(data_offsets=[2**61, 2**61 + 5]), "a hole"),
        (changed(data_offsets=[0, 5]), "an overlap"),
    ],
)
def test_a_damaged_file(folder: Path, capsys: pytest.CaptureFixture[str], data: bytes, named: str) -> None:
    Path("x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=gist(named)):
        SafetensorsFile("x.safetensors")
    refused(capsys, ["x.safetensors", "a.bin"], "x.safetensors: ", named)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_every_damage_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Change any bytes. The result is a CheckpointError, or a file in which every tensor can be read."""
    damaged = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"0", b"9", b"]", b'"'])
        )
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    path.write_bytes(damaged)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    with file:
        covered = 0
        for name, (dtype, shape, offset) in file.tensors.items():
            size = int(np.prod(shape)) * {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}.get(dtype, 1)
            assert 0 <= offset <= len(damaged)
            covered += size
            if dtype in ("F32", "F16", "BF16"):
                file.stored(name).sum()
        assert covered <= len(damaged) - 10


def test_values_that_do_not_fill_their_shapes(tmp_path: Path) -> None:
    for count in (5, 7):
        with (tmp_path / "x").open("wb") as file, pytest.raises(InputError, match=f"{count} values.* 6$"):
            write_safetensors(file, "F32", [("a", (2, 3))], iter([np.zeros(count, np.float32)]))


# ---------------------------------------------------------------------------------------------------------------------
# To Hugging Face


@pytest.mark.parametrize("version", [1, 3, 5])
def test_a_file_becomes_a_folder(folder: Path, capfd: pytest.CaptureFixture[str], version: int) -> None:
    values = hf.weights(**SHAPE)
    Path("a.bin").write_bytes(hf.checkpoint_bytes(values, version, **SHAPE))
    assert main(["a.bin", "model/"]) == 0
    dtype, kind = ("BF16", "bfloat16") if version == 5 else ("F32", "float32")
    size = os.path.getsize("model/model.safetensors")
    assert capfd.readouterr().err.endswith(f"-> model/ (Hugging Face, {kind}, {size} bytes)\n")
    assert sorted(os.listdir()) == ["a.bin", "model"]
    assert sorted(os.listdir("model")) == ["config.json", "generation_config.json", "model.safetensors"]
    metadata, found = hf.read(Path("model/model.safetensors"))
    assert metadata == {"format": "pt"}
    expected = hf.named(values, dtype, prefix="transformer.", masks=False)
    assert found.keys() == expected.keys()
    for name, (kind_found, array) in found.items():
        assert (kind_found, array.shape, array.tobytes()) == expected[name], name
    (length,) = struct.unpack("<Q", Path("model/model.safetensors").read_bytes()[:8])
    assert length % 8 == 0
    config = json.loads(Path("model/config.json").read_text())
    assert config["dtype"] == kind
    for key, value in hf.settings(**SHAPE).items():
        if key not in ("n_ctx", "summary_type", "task_specific_params"):
            assert config[key] == value, key
    assert main(["model", "b.bin", "--version", str(version)]) == 0
    assert Path("b.bin").read_bytes() == Path("a.bin").read_bytes()


def test_the_end_of_text_is_named_where_the_vocabulary_has_it() -> None:
    assert settings_of(Config(L=1, NH=1, C=1, V=50257, maxT=1), "float32", 50256)["eos_token_id"] == 50256
    assert settings_of(Config(L=1, NH=1, C=1, V=50256, maxT=1), "float32")["eos_token_id"] is None


def test_the_safetensors_package_reads_the_same(folder: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    values = hf.weights(**SHAPE)
    Path("a.bin").write_bytes(hf.checkpoint_bytes(values, 3, **SHAPE))
    assert main(["a.bin", "model/"]) == 0
    found = package.load_file("model/model.safetensors")
    for name, (_, shape, data) in hf.named(values, prefix="transformer.", masks=False).items():
        assert (found[name].shape, found[name].tobytes()) == (shape, data)


def test_an_empty_folder_is_filled(folder: Path) -> None:
    make("a.bin", **SHAPE)
    Path("model").mkdir()
    assert main(["a.bin", "model/"]) == 0
    assert sorted(os.listdir("model")) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["a.bin", "full/"], ["full/", "not an empty folder"]),
        (["a.bin", "b.bin/"], ["b.bin/", "not an empty folder"]),
        (["a.bin", "dangling/"], ["dangling/", "not an empty folder"]),
        (["a.bin", "absent/model/"], ["absent", "does not exist"]),
        (["a.bin", "/"], ["/", "not an empty folder"]),
        (["a.bin", "new.safetensors"], ["new.safetensors", "folder/"]),
        (["a.bin", "new/", "--version", "5"], ["new/", "leave out --version"]),
        (["model", "full"], ["full", "not a regular file"]),
        (["model", "model/model.safetensors"], ["folder/"]),
    ],
)
def test_targets_that_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]
) -> None:
    make("a.bin", **SHAPE)
    make("b.bin", **SHAPE)
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE))
    Path("full").mkdir()
    Path("full/file").touch()
    os.symlink("nowhere", "dangling")
    refused(capsys, arguments, *named)


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("a.bin", **SHAPE)
    with full_disk(3000):
        refused(capsys, ["a.bin", "model/"], "model: ", "File too large", status=1)
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 1)])
def test_a_failure_midway_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], status: int
) -> None:
    def fail(*_: Any) -> Any:
        assert len(os.listdir()) == 2  # a temporary folder beside the file
        raise error

    make("a.bin", version=5, **SHAPE)
    monkeypatch.setattr(dtypes.Format, "write", fail)
    assert main(["a.bin", "model/"]) == status
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_it_needs_little_memory(folder: Path, dtype: str) -> None:
    shape = {"maxT": 64, "V": 20000, "L": 40, "NH": 1, "C": 128}
    sparse(Path("m.safetensors"), dtype, **shape)
    size = os.path.getsize("m.safetensors")
    main([])  # what is imported once does not count
    tracemalloc.start()
    try:
        assert main(["m.safetensors", "a.bin", "--heads", "1"]) == 0
        assert main(["a.bin", "model/"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert os.path.getsize("model/model.safetensors") > size - 100_000
    assert peak < 8 * MB < size / 2


@pytest.mark.parametrize("source", ["a.bin", "model/model.safetensors"])
def test_a_source_that_is_cut_short_meanwhile(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    make("a.bin", **SHAPE)
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE))
    write = dtypes.Format.write

    def write_and_cut(*arguments: Any) -> None:
        write(*arguments)
        os.truncate(source, 100)

    monkeypatch.setattr(dtypes.Format, "write", write_and_cut)
    assert main([source, "new/" if source == "a.bin" else "b.bin"]) == 2
    assert re.fullmatch(rf"pygpt: error: {source}: [^\n]+\n", capsys.readouterr().err)
    assert sorted(os.listdir()) == ["a.bin", "model"]


def test_a_closed_file(folder: Path) -> None:
    hf.make_model(Path("model"), tensors(), hf.settings(**SHAPE))
    with SafetensorsFile("model/model.safetensors") as file:
        kept = file.stored("wpe.weight")
        copy = kept.copy()
    file.close()
    np.testing.assert_array_equal(kept, copy)
    with pytest.raises(ClosedError, match=r"model\.safetensors: .*closed"):
        file.stored("wpe.weight")


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the address space")
def test_it_needs_less_room_than_the_file(folder: Path) -> None:
    """Only some rows or one layer are mapped at a time, so `ulimit -v` and a container's limit may be low."""
    shape = {"maxT": 64, "V": 20000, "L": 60, "NH": 1, "C": 128}
    sparse(Path("m.safetensors"), "F32", **shape)
    assert os.path.getsize("m.safetensors") > 54 * MB
    limited = """
import os, resource
from pygpt.commands.convert import main
import numpy
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (24 << 20),) * 2)
assert main(["m.safetensors", "a.bin", "--heads", "1"]) == 0
assert main(["a.bin", "model/"]) == 0
assert main(["a.bin", "b.bin"]) == 0
"""
    done = execute([sys.executable, "-c", limited], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
