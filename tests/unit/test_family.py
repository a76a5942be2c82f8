"""GPT-2's relatives: the same numbers as transformers, in the fast path, the serial program, the oracle and training."""

import json
import sys
from pathlib import Path
from typing import Any

import make_huggingface as hf
import numpy as np
import oracle
import pytest
import record_family as family
from known import instruction_set
from make_checkpoint import make

from pygpt import GPT2, CheckpointError, Config, InputError, SerialGPT2, SerialTrainableGPT2
from pygpt._kernels import cpu_info
from pygpt.commands.convert import main as convert
from pygpt.commands.quantize import main as quantize
from pygpt.config import ACTIVATIONS
from pygpt.formats.huggingface import HuggingFaceModel, read_settings
from pygpt.formats.open import open_model
from pygpt.formats.text import read_text
from pygpt.formats.vocabulary import load_tokenizer
from pygpt.training.data import DataLoader
from pygpt.training.parameters import TrainingOptions
from pygpt.training.state import TrainingState
from pygpt.training.trainable import TrainableGPT2
from pygpt.training.trainer import Trainer

RECORDED = json.loads(family.FILE.read_text())
TOLERANCE = 3e-5  # of the greatest logit: the documented tolerance of float32 (tests/bits/test_kernels.py)
DTYPES = {"F32": "<f4", "F16": "<f2"}


def settings(**varied: Any) -> dict[str, Any]:
    return {"model_type": "gpt2", **family.SHAPE, **varied}


def raw(tensors: dict[str, Any], dtype: str = "F32") -> dict[str, hf.Raw]:
    return {name: (dtype, array.shape, array.astype(DTYPES[dtype]).tobytes()) for name, array in tensors.items()}


@pytest.fixture(params=family.VARIED)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a recorded model, which lies in the folder `model`."""
    monkeypatch.chdir(tmp_path)
    varied = family.VARIED[request.param]
    hf.make_model(Path("model"), raw(family.tensors(**varied)), settings(**varied))
    return str(request.param)


def weights_of(path: str) -> tuple[oracle.Weights, Config]:
    with open_model(path) as model:
        return {n: np.concatenate(list(model.pieces(n))).astype(np.float64) for n, _ in model.config.table}, model.config


def assert_equal_to_recorded(name: str, logits: Any) -> None:
    expected = np.array(RECORDED[name]["logits"])
    assert np.abs(logits[-1] - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_logits_and_tokens_are_those_of_transformers(name: str) -> None:
    weights, config = weights_of("model")
    exact = oracle.forward(weights, config, family.PROMPT)
    assert_equal_to_recorded(name, exact)
    greedy: dict[str, Any] = {"max_new_tokens": 12, "sampler": "greedy"}
    with GPT2.load("model", threads=2, all_workers=True) as model, SerialGPT2.load("model") as serial:
        for each in model, serial:
            assert_equal_to_recorded(name, each.logits(family.PROMPT))
            assert list(each.generate(family.PROMPT, **greedy)) == RECORDED[name]["greedy"]
        assert np.abs(model.logits(family.PROMPT) - exact).max() <= TOLERANCE * np.abs(exact).max()


def test_every_variation_changes_the_numbers() -> None:
    """The recorded logits differ by more than the tolerance, except for two names of one function."""
    same = {"gpt2", "gelu_fast", "gelu_pytorch_tanh"}
    kinds = {n: np.array(found["logits"]) for n, found in RECORDED.items() if n not in same - {"gpt2"}}
    for one in kinds:
        for other in kinds.keys() - {one}:
            assert np.abs(kinds[one] - kinds[other]).max() > 3 * TOLERANCE * np.abs(kinds[one]).max(), (one, other)


def test_gradients_are_those_of_the_network(name: str) -> None:
    """The loss changes along a random direction as the gradients say; the serial program's gradients are the same."""
    weights, config = weights_of("model")
    tokens, targets = family.PROMPT, [*family.PROMPT[1:], 40]

    def loss(step: float, direction: dict[str, oracle.Array]) -> float:
        moved = {n: array + step * direction.get(n, 0) for n, array in weights.items()}
        logits = oracle.forward(moved, config, tokens)
        logits = logits - logits.max(axis=-1, keepdims=True)
        return float((np.log(np.exp(logits).sum(axis=-1)) - logits[range(len(tokens)), targets]).mean())

    found = {}
    for kind in TrainableGPT2, SerialTrainableGPT2:
        with kind.load("model") as model:
            assert abs(model.forward([tokens], [targets]).mean() - loss(0.0, {})) <= 1e-5
            model.backward()
            found[kind] = {n: model.gradient(n).copy() for n in weights}
    scale = max(np.abs(gradient).max() for gradient in found[TrainableGPT2].values())
    for n, gradient in found[TrainableGPT2].items():
        assert np.abs(gradient - found[SerialTrainableGPT2][n]).max() <= 2e-5 * scale, n
    rng = np.random.default_rng(3)
    for n in weights:  # one tensor at a time: none hides behind the others
        direction = rng.standard_normal(weights[n].shape)
        slope = (loss(1e-5, {n: direction}) - loss(-1e-5, {n: direction})) / 2e-5
        size = np.linalg.norm(direction) * np.linalg.norm(found[TrainableGPT2][n])
        assert abs(slope - (direction * found[TrainableGPT2][n]).sum()) <= 2e-4 * size + 1e-7, n


def test_every_container_keeps_the_model_or_refuses_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with GPT2.load("model") as model, GPT2.load("model", weights="q8_0") as quantised:
        config, exact, coarse = model.config, model.logits(family.PROMPT), quantised.logits(family.PROMPT)
    with SerialGPT2.load("model", weights="q8_0") as serial:
        assert np.allclose(serial.logits(family.PROMPT), coarse, rtol=0, atol=TOLERANCE * np.abs(coarse).max())
    assert convert(["model", "again/"]) == 0
    assert quantize(["--format", "f32", "--head", "f32", "model", "f32.safetensors"]) == 0
    assert quantize(["model", "q8.safetensors"]) == 0
    with TrainableGPT2.load("model") as trained:
        trained.save("one.safetensors")
    for path in ("again", "again/model.safetensors", "f32.safetensors", "one.safetensors"):
        with GPT2.load(path) as model:
            assert model.config == config
            assert np.array_equal(model.logits(family.PROMPT), exact)
    with GPT2.load("q8.safetensors") as model:
        assert np.array_equal(model.logits(family.PROMPT), coarse)
    capsys.readouterr()
    said = config.variations.keys() <= {"F", "epsilon", "tied"}
    assert quantize(["--format", "f32", "--head", "f32", "model", "a.gguf"]) == (0 if said else 2)
    assert convert(["model", "a.bin"]) == (2 if config.variations else 0)
    output = capsys.readouterr().err
    if said:
        with GPT2.load("a.gguf") as model:
            assert model.config == config
            assert np.array_equal(model.logits(family.PROMPT), exact)
    else:
        assert "a.gguf: GGUF" in output
    assert ("a.bin: a .bin file" in output) == bool(config.variations)
    assert Path("a.bin").exists() == (not config.variations)


def test_a_training_state_keeps_the_model(name: str) -> None:
    data = np.arange(60, dtype=np.uint16)

    def trainer() -> Trainer:
        return Trainer(TrainableGPT2.load("model"), DataLoader(data, 1, 8), TrainingOptions(steps=4))

    first = trainer()
    first.step()
    first.save("a.state", {})
    first.step()
    with TrainingState("a.state") as state:
        assert state.config == first.engine.config
        second = Trainer(TrainableGPT2(state.config), DataLoader(data, 1, 8), TrainingOptions(steps=4))
        second.restore(state)
    second.step()
    assert np.array_equal(first.engine.parameters, second.engine.parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Names, layouts and formats


def logits_of(path: str, **options: Any) -> Any:
    with GPT2.load(path, **options) as model:
        return model.logits(family.PROMPT)


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.transformer.", "_orig_mod.module.transformer."])
@pytest.mark.parametrize("head", ["none", "both", "alone"])
def test_the_tied_head_and_prefixes(tmp_path: Path, prefix: str, head: str) -> None:
    tensors = {n.removeprefix("transformer."): array for n, array in family.tensors().items()}
    if head != "none":
        tensors["lm_head.weight"] = tensors["wte.weight"]
    if head == "alone":
        del tensors["wte.weight"]
    outer = prefix.removesuffix("transformer.")
    named = {(outer if n.startswith("lm_head") else prefix) + n: array for n, array in tensors.items()}
    hf.make_model(tmp_path / "model", raw(named), settings())
    with HuggingFaceModel(str(tmp_path / "model")) as model:
        assert model.config.tied
    assert_equal_to_recorded("gpt2", logits_of(str(tmp_path / "model")))


def linear(tensors: dict[str, Any], *, biases: bool) -> dict[str, Any]:
    """nanoGPT's layout: matrices (out, in), and perhaps no biases."""
    wide = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    turned = {n: array.T if n.endswith(wide) else array for n, array in tensors.items()}
    return {n: np.ascontiguousarray(array) for n, array in turned.items() if biases or not n.endswith(".bias")}


@pytest.mark.parametrize("biases", [True, False])
def test_nanogpt(tmp_path: Path, biases: bool) -> None:
    """Without biases the numbers are those of zero biases. The activation is nn.GELU, unless config.json says otherwise."""
    tensors = family.tensors()
    args = {"n_layer": 3, "n_head": 3, "n_embd": 24, "block_size": 24, "bias": biases, "vocab_size": 67, "dropout": 0.1}
    hf.make_model(tmp_path / "nano", raw(linear(tensors, biases=biases)), args)
    zeroed = {n: array if biases or not n.endswith(".bias") else 0 * array for n, array in tensors.items()}
    for activation in "gelu", "gelu_new":
        same = tmp_path / activation
        hf.make_model(same, raw(zeroed), settings(activation_function=activation))
        if activation == "gelu_new":
            hf.make_model(tmp_path / "stated", raw(linear(tensors, biases=biases)), settings())
        path = tmp_path / ("nano" if activation == "gelu" else "stated")
        for options in {}, {"threads": 1, "mmap": False}:
            assert np.array_equal(logits_of(str(path), **options), logits_of(str(same)))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_formats_are_exact_at_any_offset(tmp_path: Path, dtype: str, shift: int, threads: int) -> None:
    tensors = family.tensors()
    if dtype == "BF16":
        rounded = {n: (array.view("<u4") >> 16).astype("<u2") for n, array in tensors.items()}
        stored = {n: (dtype, array.shape, rounded[n].tobytes()) for n, array in tensors.items()}
        exact = {n: (array.astype("<u4") << 16).view("<f4") for n, array in rounded.items()}
    else:
        stored, exact = raw(tensors, dtype), {n: array.astype(DTYPES[dtype]).astype("<f4") for n, array in tensors.items()}
    hf.make_model(tmp_path / "exact", raw(exact), settings())
    hf.make_model(tmp_path / "model", stored, settings())
    header = json.dumps(hf.header_of(stored)).encode()
    data = b"".join(content for _, _, content in stored.values())
    (tmp_path / "model" / "model.safetensors").write_bytes(hf.file_of(header + b" " * (-len(header) % 8 + shift), data))
    expected = logits_of(str(tmp_path / "exact"))
    for mmap in True, False:
        assert np.array_equal(logits_of(str(tmp_path / "model"), threads=threads, mmap=mmap), expected)


def test_pickles_are_read_by_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = {n: torch.from_numpy(array) for n, array in family.tensors().items()}
    (tmp_path / "config.json").write_text(json.dumps(settings()))
    for zipped in True, False:
        torch.save(values, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        for path in (tmp_path, tmp_path / "pytorch_model.bin"):
            assert_equal_to_recorded("gpt2", logits_of(str(path)))
    args = {"n_layer": 3, "n_head": 3, "n_embd": 24, "block_size": 24, "bias": True, "vocab_size": 67}
    nano = {f"_orig_mod.{n}": torch.from_numpy(array) for n, array in linear(family.tensors(), biases=True).items()}
    torch.save({"model": nano, "model_args": args, "iter_num": 3}, tmp_path / "ckpt.pt")
    assert_equal_to_recorded("gelu", logits_of(str(tmp_path / "ckpt.pt")))
    torch.save({"weights": Path("x")}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"ckpt\.pt.*weights_only"):
        GPT2.load(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a Git LFS pointer"),
        (b"\n <!DOCTYPE html><html>", "an HTML page"),
        (b"<html lang=en>", "an HTML page"),
        (b"\x1f\x8b\x08", "a compressed archive"),
    ],
)
@pytest.mark.parametrize("file", ["m.bin", "m.safetensors", "m.gguf"])
def test_a_foreign_file_is_named(tmp_path: Path, file: str, content: bytes, named: str) -> None:
    (tmp_path / file).write_bytes(content + bytes(3000))
    with pytest.raises(CheckpointError, match=f"{file}: .*{named}") as caught:
        GPT2.load(tmp_path / file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"\x1f\x8b\x08", b"PK\x03\x04"])
def test_a_foreign_file_in_place_of_a_text_or_vocabulary_is_named(tmp_path: Path, content: bytes) -> None:
    what = "Git LFS pointer" if content[0] == ord("v") else "compressed archive"
    (tmp_path / "t.txt").write_bytes(content + b"\n" * 100)
    with pytest.raises(InputError, match=f"t.txt: .*{what}"):
        "".join(read_text(tmp_path / "t.txt"))
    for name in "vocab.json", "own.json", "tokenizer.bin":
        (tmp_path / name).write_bytes(content + b"\n" * 2000)
        with pytest.raises(InputError, match=f"{name}: .*{what}"):
            load_tokenizer(tmp_path / name)


def test_a_page_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"<html>\r\n")
    assert "".join(read_text(tmp_path / "t.txt")) == "<html>\n"


def test_settings_in_place_of_a_model_are_named(tmp_path: Path) -> None:
    hf.make_model(tmp_path / "model", raw(family.tensors()), settings())
    with pytest.raises(CheckpointError, match=r"config\.json: .*folder"):
        GPT2.load(tmp_path / "model" / "config.json")


def test_a_short_context_needs_no_total(tmp_path: Path) -> None:
    """The default length is ten tokens, or the context if that is shorter."""
    make(tmp_path / "m.bin", L=1, NH=1, C=4, V=9, maxT=6)
    with GPT2.load(tmp_path / "m.bin") as model:
        assert len(list(model.generate([1, 2]))) == 4


def test_a_float16_model_stays_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a folder, and in memory: the kernels use its numbers as they are."""
    hf.make_model(tmp_path / "model", raw(family.tensors(), "F16"), settings())
    assert convert([str(tmp_path / "model"), f"{tmp_path}/again/"]) == 0
    assert capsys.readouterr().err.count("(Hugging Face, float16, ") == 2
    for path in ("model", "again"):
        with HuggingFaceModel(str(tmp_path / path)) as model:
            assert {kind for kind, _ in model.stored().values()} == {"float16"}
    assert np.array_equal(logits_of(str(tmp_path / "model")), logits_of(str(tmp_path / "again")))


def test_missing_biases_have_the_format_of_the_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So a model without biases keeps its bfloat16 numbers in a .bin file."""
    rounded = {n: (array.view("<u4") >> 16).astype("<u2") for n, array in linear(family.tensors(), biases=False).items()}
    stored: dict[str, hf.Raw] = {n: ("BF16", array.shape, array.tobytes()) for n, array in rounded.items()}
    hf.make_model(tmp_path / "nano", stored, settings())
    assert convert([str(tmp_path / "nano"), str(tmp_path / "nano.bin")]) == 0
    assert "nano.bin (version 5, bfloat16, " in capsys.readouterr().err
    assert np.array_equal(logits_of(str(tmp_path / "nano")), logits_of(str(tmp_path / "nano.bin")))


def test_a_zip_file_is_not_taken_for_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    np.savez(tmp_path / "m.bin", a=np.zeros(3))
    (tmp_path / "m.bin.npz").rename(tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="a compressed archive"):
        GPT2.load(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("varied", "named"),
    [
        ({"F": 0}, "F is 0"),
        ({"F": True}, "F is True"),
        ({"activation": "GELU"}, "activation is 'GELU'"),
        ({"activation": None}, "activation is None"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": True}, "epsilon is True"),
        ({"scaled": 1}, "scaled is 1"),
    ],
)
def test_bad_variations(varied: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Config(maxT=4, V=4, L=1, NH=1, C=4, **varied)
    with pytest.raises(TypeError, match="no argument 'bias'"):
        Config(maxT=4, V=4, L=1, NH=1, C=4, bias=False)


def test_other_names_of_dimensions() -> None:
    given = {
        "model_type": "gpt2",
        "max_position_embeddings": 9,
        "vocab_size": 7,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    assert read_settings({**given, "hidden_size": 6}, "x") == Config(maxT=9, V=7, L=2, NH=3, C=6)


def test_the_bits_do_not_depend_on_the_instruction_set(tmp_path: Path) -> None:
    """Every instruction set with fused multiply-add gives one set of bits, for each activation, forward and backward."""
    assert cpu_info()["fused"]
    for activation in ACTIVATIONS:
        varied = {"activation_function": activation, "n_inner": 50}
        hf.make_model(tmp_path / activation, raw(family.tensors(**varied)), settings(**varied))
        found = set()
        for isa in cpu_info()["available"]:
            with instruction_set(isa):
                if cpu_info()["fused"]:
                    with TrainableGPT2.load(tmp_path / activation) as trained:
                        trained.forward([family.PROMPT], [family.PROMPT])
                        trained.backward()
                        found.add((logits_of(str(tmp_path / activation)).tobytes(), trained.gradients.tobytes()))
        assert len(found) == 1, activation
