"""Test pygpt quantize: every source and format, numbers that stay unchanged, atomic files, one line for each failure."""

import hashlib
import json
import os
import tracemalloc
from functools import partial
from pathlib import Path

import make_huggingface as hf
import numpy as np
import numpy.typing as npt
import pytest
from limits import full_disk
from make_checkpoint import make
from running import assert_refuses_and_keeps

from pygpt import GPT2, TrainableGPT2
from pygpt.commands.complete import main as complete
from pygpt.commands.quantize import FORMATS, main
from pygpt.config import TENSORS, Config
from pygpt.errors import CheckpointError
from pygpt.formats.gguf import GGUFFile
from pygpt.formats.open import open_model
from pygpt.formats.panels import PanelFile, quantise

SHAPE = {"L": 2, "NH": 2, "C": 32, "V": 130, "maxT": 8}
QUANTISED = ("qkvw", "attprojw", "fcw", "fcprojw")
MB = 1 << 20
Tensors = dict[str, npt.NDArray[np.float32]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with source.bin."""
    monkeypatch.chdir(tmp_path)
    make("source.bin", seed=4, **SHAPE)
    return tmp_path


refused = partial(assert_refuses_and_keeps, main)


def all_of(path: str) -> Tensors:
    with open_model(path) as model:
        return {name: np.concatenate(list(model.pieces(name))) for name, _ in TENSORS}


def rounded(array: npt.NDArray[np.float32], form: str) -> npt.NDArray[np.float32]:
    """Return a matrix rounded to a format."""
    kind = FORMATS[form]
    if kind.from_float32 is not None:
        return kind.to_float32(kind.from_float32(array))
    blocks = quantise(kind, np.ascontiguousarray(array.reshape(-1, array.shape[-1])))
    assert blocks is not None
    return kind.to_float32(blocks).reshape(array.shape)


def expected(source: Tensors, form: str, head: str) -> Tensors:
    found = {name: rounded(array, form) if name in QUANTISED else array for name, array in source.items()}
    return found | {"wte": rounded(source["wte"], head)}


def equal(one: Tensors, other: Tensors) -> bool:
    return all(one[name].shape == other[name].shape and np.array_equal(one[name], other[name]) for name in other)


# ---------------------------------------------------------------------------------------------------------------------
# The written files


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("ending", [".gguf", ".safetensors"])
def test_every_format_holds_the_rounded_source(folder: Path, form: str, ending: str) -> None:
    assert main(["--format", form, "source.bin", f"target{ending}"]) == 0
    head = {"q4_0": "q8_0"}.get(form, form)
    assert equal(all_of(f"target{ending}"), expected(all_of("source.bin"), form, head))
    with open_model(f"target{ending}") as model:
        assert (model.format, model.config) == (FORMATS[form], Config(**SHAPE))


@pytest.mark.parametrize("ending", [".gguf", ".safetensors"])
def test_the_default_is_q8_0_and_the_head_may_differ(folder: Path, ending: str) -> None:
    source = all_of("source.bin")
    assert main(["source.bin", f"a{ending}"]) == 0
    assert equal(all_of(f"a{ending}"), expected(source, "q8_0", "q8_0"))
    assert main(["--format", "bf16", "--head", "q4_0", "source.bin", f"b{ending}"]) == 0
    assert equal(all_of(f"b{ending}"), expected(source, "bf16", "q4_0"))


def test_a_model_of_any_format_is_a_source(folder: Path) -> None:
    hf.make_model(folder / "hf", hf.named(hf.weights(4, **SHAPE)), hf.settings(**SHAPE))
    make("five.bin", seed=4, version=5, **SHAPE)
    assert main(["--format", "F32", "source.bin", "source.gguf"]) == 0
    assert main(["--format", "f32", "source.bin", "source.safetensors"]) == 0
    for source in ("hf", "hf/model.safetensors", "five.bin", "source.gguf", "source.safetensors"):
        assert main(["--format", "q4_0", source, "target.safetensors"]) == 0
        assert equal(all_of("target.safetensors"), expected(all_of(source), "q4_0", "q8_0")), source
    for target, positions in (("target.gguf", "float32"), ("target.safetensors", "bfloat16")):
        assert main(["five.bin", target]) == 0
        with open_model(target) as model:
            assert model.formats["wpe"].name == positions


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_numbers_of_the_format_pass_unchanged_from_file_to_file(folder: Path, form: str) -> None:
    """Quantising twice would change them, because the largest rounded number of a block can be below 127."""
    options = ["--format", form, "--head", form]
    assert main([*options, "source.bin", "one.gguf"]) == 0
    content = bytearray(Path("one.gguf").read_bytes())
    with GGUFFile("one.gguf") as model:
        start = model._tensors["blk.1.ffn_up.weight"].start
    content[start : start + 10] = b"\x01\x00" + b"\x80\x7f" * 4  # a subnormal scale, and -128 or both ends of four bits
    Path("one.gguf").write_bytes(content)
    for source, target in (("one.gguf", "two.safetensors"), ("two.safetensors", "three.safetensors")):
        assert main([*options, source, target]) == 0
    assert main([*options, "three.safetensors", "four.gguf"]) == 0
    assert Path("four.gguf").read_bytes() == content


def test_ragged_rows_are_padded_in_panels_and_refused_for_gguf(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("odd.bin", L=1, NH=1, C=20, V=9, maxT=3)
    refused(capsys, ["odd.bin", "odd.gguf"], "odd.gguf", "wte has rows of 20 values", "q8_0", "multiple of 32", ".safetensors")
    assert main(["odd.bin", "odd.safetensors"]) == 0
    source, found = all_of("odd.bin"), all_of("odd.safetensors")
    for name in (*QUANTISED, "wte"):
        padded = np.pad(source[name], [(0, 0)] * (source[name].ndim - 1) + [(0, -source[name].shape[-1] % 32)])
        assert np.array_equal(found[name], rounded(padded, "q8_0")[..., : source[name].shape[-1]])
    assert main(["--format", "f16", "odd.bin", "odd.gguf"]) == 0


def test_the_panel_file_names_its_source_by_its_sha256(folder: Path) -> None:
    assert main(["source.bin", "target.safetensors"]) == 0
    with PanelFile("target.safetensors") as model:
        assert model.sha256 == hashlib.sha256(Path("source.bin").read_bytes()).hexdigest()


def test_the_same_source_gives_the_same_file(folder: Path) -> None:
    for ending in (".gguf", ".safetensors"):
        for name in ("a", "b"):
            assert main(["--format", "q4_0", "source.bin", name + ending]) == 0
        assert Path("a" + ending).read_bytes() == Path("b" + ending).read_bytes()


@pytest.mark.parametrize("ending", [".gguf", ".safetensors"])
def test_memory_does_not_grow_with_the_model(folder: Path, ending: str) -> None:
    make("large.bin", L=12, NH=4, C=256, V=20000, maxT=1024)
    size = Path("large.bin").stat().st_size
    main([])  # modules imported here do not count below
    tracemalloc.start()
    try:
        assert main(["large.bin", f"large{ending}"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MB < size / 3


# ---------------------------------------------------------------------------------------------------------------------
# Running the files


@pytest.mark.parametrize("target", ["target.gguf", "target.safetensors"])
def test_the_commands_answer_from_it(folder: Path, capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert main(["source.bin", target]) == 0
    capsys.readouterr()
    assert complete(["-m", target, "-n", "6", "-t", "2", "1", "2"]) == 0
    ids = capsys.readouterr().out.split()
    with GPT2.load(target, mmap=False) as model:
        assert ids[-4:] == [str(token) for token in model.generate([1, 2], total=6)]


@pytest.mark.parametrize("target", ["target.gguf", "target.safetensors"])
@pytest.mark.parametrize(("form", "named"), [("q8_0", "q8_0"), ("f32", "q4_0")])
def test_training_refuses_quantised_weights_and_takes_floats(folder: Path, target: str, form: str, named: str) -> None:
    assert main(["--format", form, "--head", named, "source.bin", target]) == 0
    with pytest.raises(CheckpointError, match=f"{target}: {named}") as caught:
        TrainableGPT2.load(target)
    assert "\n" not in str(caught.value)
    assert main(["--format", "f32", "source.bin", target]) == 0
    with TrainableGPT2.load(target) as model:
        assert np.array_equal(model.tensor("fcw"), all_of("source.bin")["fcw"])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_it_reports_its_work(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--format", "q4_0", "source.bin", "target.gguf"]) == 0
    output = capfd.readouterr()
    assert output.out == ""
    sizes = [Path(name).stat().st_size for name in ("source.bin", "target.gguf")]
    line = f"pygpt: source.bin (version 3, float32, {sizes[0]} bytes) -> target.gguf (q4_0, head q8_0, {sizes[1]} bytes)\n"
    assert output.err == line


def test_wrong_arguments_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("folder.gguf")
    hf.make_model(folder / "hf", hf.named(hf.weights(4, **SHAPE)), hf.settings(**SHAPE))
    refused(capsys, ["source.bin"], "DST")
    refused(capsys, ["source.bin", "target.bin"], "target.bin", ".gguf", ".safetensors", "pygpt convert")
    refused(capsys, ["--format", "q5_0", "source.bin", "a.gguf"], "--format", "'q5_0'", "q8_0", "f32")
    refused(capsys, ["--head", "float32", "source.bin", "a.gguf"], "--head", "'float32'")
    refused(capsys, ["source.bin", "no/a.gguf"], "no/a.gguf", "does not exist")
    refused(capsys, ["source.bin", "folder.gguf"], "regular")
    refused(capsys, ["missing.bin", "a.gguf"], "missing.bin", "No such file")
    refused(capsys, ["missing.gguf", "a.gguf"], "missing.gguf", "No such file")
    refused(capsys, ["hf", "hf/model.safetensors"], "belongs to SRC")
    assert main(["source.bin", "a.gguf"]) == 0
    refused(capsys, ["a.gguf", "./a.gguf"], "belongs to SRC")


@pytest.mark.parametrize(
    ("form", "value", "named"),
    [
        ("q8_0", np.nan, "nan"),
        ("f32", np.inf, "inf"),
        ("f16", 1e5, "100000"),
        ("q8_0", 9e6, "9000000"),
        ("q4_0", 6e5, "600000"),
    ],
)
def test_values_out_of_range_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], form: str, value: float, named: str
) -> None:
    offset = next(offset for name, _, offset, _ in Config(**SHAPE).tensors(padded=True) if name == "fcw")
    with open("source.bin", "r+b") as file:
        file.seek(1024 + 4 * (offset + 77))
        file.write(np.array([value], "<f4").tobytes())
    refused(capsys, ["--format", form, "source.bin", "target.gguf"], "source.bin", "fcw", named)


def test_a_full_disk_leaves_the_older_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("target.gguf", "target.safetensors"):
        assert main(["source.bin", target]) == 0
        with full_disk(20_000):
            refused(capsys, ["--format", "f32", "source.bin", target], target, "File too large", status=1)


def test_a_hugging_face_model_is_computed_with_in_place(folder: Path) -> None:
    values = hf.weights(4, **SHAPE)
    hf.make_model(folder / "hf", hf.named(values), hf.settings(**SHAPE))
    Path("same.bin").write_bytes(hf.checkpoint_bytes(values, 3, **SHAPE))
    for weights in (None, "q8_0"):
        with GPT2.load("same.bin", weights=weights) as model:
            expected = model.logits([1, 2, 3])
        for path in ("hf", "hf/model.safetensors"):
            with GPT2.load(path, weights=weights) as model:
                assert np.array_equal(model.logits([1, 2, 3]), expected)


def test_a_damaged_source_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["source.bin", "a.gguf"]) == 0
    Path("b.gguf").write_bytes(Path("a.gguf").read_bytes()[:-100])
    refused(capsys, ["b.gguf", "c.gguf"], "b.gguf", "truncated")
    header = json.dumps({"x": 1}).encode()
    Path("b.safetensors").write_bytes(hf.file_of(header, b""))
    refused(capsys, ["b.safetensors", "c.gguf"], "b.safetensors")
