"""Test pygpt eval against the float64 oracle: losses, the windows of Hugging Face's guide, the accuracies of llm.c."""

import io
import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from make_checkpoint import make
from running import ROOT, assert_refused, assert_refuses, run
from test_data import shard_bytes

from pygpt import GPT2, Example, Tokenizer, read_examples, write_examples
from pygpt.commands import eval as evaluate
from pygpt.commands.console import table
from pygpt.commands.quantize import main as quantize
from pygpt.formats.checkpoint import Checkpoint
from pygpt.generation.logprobs import score
from pygpt.hub.find import EMBEDDED_MODEL

SHAPE = {"L": 2, "NH": 2, "C": 16, "V": 211, "maxT": 24}
TOLERANCE = 2e-6  # for a loss near 5 that a float32 network computes
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, 100 tokens, and 12 examples."""
    folder = tmp_path_factory.mktemp("eval")
    make(folder / "model.bin", seed=5, **SHAPE)
    rng = np.random.default_rng(2)
    (folder / "tokens.bin").write_bytes(shard_bytes(rng.integers(0, 211, 100).tolist()))
    examples = []
    for number in range(12):
        endings = [rng.integers(0, 211, rng.integers(1, 8)).tolist() for _ in range(4)]
        examples.append(Example(number, int(rng.integers(4)), rng.integers(0, 211, rng.integers(1, 16)).tolist(), endings))
    write_examples(folder / "examples.bin", examples)
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYGPT_MODEL", "model.bin")


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert evaluate.main([*arguments, "-t", "2", "-o", "json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return json.loads(output.out)


def losses(path: str, tokens: list[int]) -> Floats:
    """Return the oracle's losses of tokens[1:], in nats."""
    with Checkpoint(path) as checkpoint:
        logits = oracle.forward(oracle.weights(checkpoint), checkpoint.config, tokens[:-1])
    found: Floats = -np.log(oracle.softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]])
    return found


def ids_of(name: str) -> list[int]:
    content = Path(name).read_bytes()[1024:]
    return list(struct.unpack(f"<{len(content) // 2}H", content))


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity


def guide(path: str, tokens: list[int], window: int, stride: int) -> tuple[float, int]:
    """Return the mean loss and the number of scored tokens, computed as in Hugging Face's guide.

    Targets before the last trg_len are masked, and the first token of a window has no prediction."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        trg_len = end - previous_end
        found = losses(path, tokens[begin:end])[-trg_len:]
        total, count, previous_end = total + found.sum(), count + len(found), end
        if end >= len(tokens) - (stride == window):  # a window of one token has no prediction
            break
    return total / count, count


@pytest.mark.parametrize(
    ("options", "window", "stride"),
    [
        *[([], 24, 12), (["--stride", "1"], 24, 1), (["--window", "7", "--stride", "5"], 7, 5), (["--window", "2"], 2, 1)],
        *[(["--stride", "24"], 24, 24), (["--window", "9", "--stride", "9"], 9, 9), (["--window", "25"], 25, 12)],
    ],
)
@pytest.mark.parametrize("rows", [3, 128])
def test_perplexity(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], window: int, stride: int, rows: int
) -> None:
    monkeypatch.setattr(evaluate, "ROWS", rows)
    monkeypatch.setattr(evaluate, "FLOAT64_ROWS", 2)
    found = result_of(capsys, "perplexity", "tokens.bin", *options)
    loss, count = guide("model.bin", ids_of("tokens.bin"), window, stride)
    assert (found["tokens"], found["scored"], found["window"], found["stride"]) == (100, count, window, stride)
    assert count == (99 if stride < window else {24: 95, 9: 88}[window])
    assert found["loss"] == pytest.approx(loss, abs=TOLERANCE)
    assert found["perplexity"] == math.exp(found["loss"])


def test_the_validation_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of T inputs and their successors are the batches of a trainer."""
    tokens = ids_of("tokens.bin")
    found = result_of(capsys, "perplexity", "tokens.bin", "--window", "25", "--stride", "24", "-n", "97")
    blocks = [losses("model.bin", tokens[start : start + 25]).mean() for start in range(0, 96, 24)]
    assert found["scored"] == 96
    assert found["loss"] == pytest.approx(np.mean(blocks), abs=TOLERANCE)


def test_a_perplexity_beyond_floats(capsys: pytest.CaptureFixture[str]) -> None:
    make("sure.bin", peak=1e5, **SHAPE)  # predicts wrong tokens with probability 1
    result = result_of(capsys, "perplexity", "tokens.bin", "-m", "sure.bin")
    assert result["loss"] > 709
    assert result["perplexity"] is None
    assert evaluate.main(["perplexity", "tokens.bin", "-m", "sure.bin"]) == 0
    assert capsys.readouterr().out.startswith("perplexity infinite, loss ")


@pytest.mark.parametrize(
    ("options", "window", "stride"), [([], 24, 12), (["--window", "9", "--stride", "9", "-n", "50"], 9, 9)]
)
@pytest.mark.parametrize("rows", [3, 128])
def test_compare(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], window: int, stride: int, rows: int
) -> None:
    monkeypatch.setattr(evaluate, "ROWS", rows)
    monkeypatch.setattr(evaluate, "FLOAT64_ROWS", 2)
    make("other.bin", seed=6, **SHAPE)
    found = result_of(capsys, "compare", "model.bin", "other.bin", "tokens.bin", *options)
    tokens = ids_of("tokens.bin")[: 50 if options else None]
    columns: list[Floats] = []
    for begin, first, end in evaluate.windows(len(tokens), window, stride):
        pair = []
        for path in ("model.bin", "other.bin"):
            with Checkpoint(path) as checkpoint:
                logits = oracle.forward(oracle.weights(checkpoint), checkpoint.config, tokens[begin : end - 1])
            pair.append(oracle.softmax(logits)[first - begin - 1 :])
        p, q = pair
        chosen = np.arange(len(p)), tokens[first:end]
        kl = (p * np.log(p / q)).sum(axis=1)
        columns.append(np.stack([-np.log(p[chosen]), -np.log(q[chosen]), kl, p.argmax(axis=1) == q.argmax(axis=1)]))
    expected = np.concatenate(columns, axis=1).mean(axis=1)
    assert found["model"] == ["model.bin", "other.bin"]
    assert (found["tokens"], found["window"], found["stride"]) == (len(tokens), window, stride)
    assert found["scored"] == sum(column.shape[1] for column in columns)
    assert [*found["loss"], found["kl_divergence"]] == pytest.approx(expected[:3].tolist(), abs=TOLERANCE)
    assert found["top1_agreement"] == pytest.approx(expected[3])
    assert found["perplexity"] == [math.exp(loss) for loss in found["loss"]]
    assert expected[2] > 0.1  # the models differ


def test_a_model_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    found = result_of(capsys, "compare", "model.bin", "model.bin", "tokens.bin")
    assert (found["kl_divergence"], found["top1_agreement"]) == (0, 1)
    assert found["loss"][0] == found["loss"][1] == result_of(capsys, "perplexity", "tokens.bin")["loss"]


def test_quantised_models_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """A coarser format gives a larger divergence. The text names both models and all numbers."""
    divergences = []
    for form in ("f32", "q8_0", "q4_0"):
        assert quantize(["--format", form, "--head", form, "model.bin", f"{form}.safetensors"]) == 0
        capsys.readouterr()
        divergences.append(result_of(capsys, "compare", "model.bin", f"{form}.safetensors", "tokens.bin")["kl_divergence"])
    assert divergences[0] == 0 < 5 * divergences[1] < divergences[2]
    assert evaluate.main(["compare", "model.bin", "q4_0.safetensors", "tokens.bin"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"A: perplexity \d+\.\d{4}, loss \d\.\d{6} nats per token", lines[0])
    assert re.fullmatch(r"B: perplexity \d+\.\d{4}, loss \d\.\d{6} \([+-]\d\.\d{6}\)", lines[1])
    assert re.fullmatch(r"KL divergence \d\.\d{6} nats, top-1 agreement \d+\.\d\d %", lines[2])
    assert lines[3] == "99 tokens, window 24, stride 12"
    assert lines[4].endswith("model.bin, q4_0.safetensors")


@pytest.mark.parametrize("subject", ["text.txt", "-"])
def test_perplexity_of_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, subject: str) -> None:
    text = "To be, or not to be:\n\nthat is the question."
    Path("text.txt").write_text(text)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    ids = Tokenizer().encode(text)
    found = result_of(capsys, "perplexity", subject, "-m", EMBEDDED_MODEL)
    assert (found["scored"], found["model"], found["file"]) == (len(ids) - 1, EMBEDDED_MODEL, subject)
    assert found["loss"] == pytest.approx(losses(EMBEDDED_MODEL, ids).mean(), abs=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag


@pytest.mark.parametrize("limit", [1, 5, 12, 99])
def test_hellaswag(capsys: pytest.CaptureFixture[str], limit: int) -> None:
    right = right_norm = 0
    examples = list(read_examples("examples.bin"))[:limit]
    for example in examples:
        found = [losses("model.bin", [*example.context, *ending])[-len(ending) :] for ending in example.endings]
        sums, means = [loss.sum() for loss in found], [loss.mean() for loss in found]
        right += sums.index(min(sums)) == example.label
        right_norm += means.index(min(means)) == example.label
    result = result_of(capsys, "hellaswag", "examples.bin", "-n", str(limit))
    assert (result["examples"], result["right"], result["right_norm"]) == (len(examples), right, right_norm)
    assert (result["acc"], result["acc_norm"]) == (right / len(examples), right_norm / len(examples))


def test_the_losses_of_endings() -> None:
    """The context runs once for all endings. Each loss equals the loss in the whole sequence."""
    with GPT2.load("model.bin", threads=2) as model:
        cache, held = model.new_cache(), list[int]()
        for example in read_examples("examples.bin"):
            found = score(model.network, cache, held, example.context, example.endings)
            for ending, infos in zip(example.endings, found, strict=True):
                whole = losses("model.bin", [*example.context, *ending])
                np.testing.assert_allclose([-info.logprob for info in infos], whole[-len(ending) :], rtol=0, atol=1e-5)


def test_acc_and_acc_norm_differ_where_lengths_do(capsys: pytest.CaptureFixture[str]) -> None:
    """The label is a long ending with the lowest mean loss, but not the lowest sum."""
    weak, context = losses("model.bin", [1, 2])[0], [1]
    best = min(range(211), key=lambda token: float(losses("model.bin", [1, token])[0]))
    loop = [best]
    while sum(losses("model.bin", [*context, *loop])) < weak:
        loop.append(min(range(211), key=lambda token: float(losses("model.bin", [*context, *loop, token])[-1])))
    assert losses("model.bin", [*context, *loop]).mean() < weak
    write_examples("lengths.bin", [Example(0, 3, context, [[2], [2], [2], loop])])
    result = result_of(capsys, "hellaswag", "lengths.bin")
    assert (result["acc"], result["acc_norm"]) == (0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Next tokens


def test_next(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Ladies and"
    found = result_of(capsys, "next", prompt, "-m", EMBEDDED_MODEL, "-k", "20")
    ids = Tokenizer().encode(prompt)
    with Checkpoint(EMBEDDED_MODEL) as checkpoint:
        p = oracle.softmax(oracle.forward(oracle.weights(checkpoint), checkpoint.config, ids))[-1]
    assert found["prompt"] == ids
    assert [choice["id"] for choice in found["next"]] == np.argsort(-p)[:20].tolist()
    for choice in found["next"]:
        assert choice["probability"] == pytest.approx(p[choice["id"]], rel=1e-5)
        assert math.exp(choice["logprob"]) == pytest.approx(choice["probability"], rel=1e-12)
        assert bytes.fromhex(choice["bytes"]) == Tokenizer().decode_bytes([choice["id"]])
        assert choice["text"] == Tokenizer().decode([choice["id"]])


def test_too_long_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refuses(evaluate.main, capsys, ["next", "a " * 300, "-m", EMBEDDED_MODEL], "the model takes at most 256")


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(11, b",", 0.5), (50256, "\n\u4e2d".encode(), 0.25), (447, b"\xe2\x80", 0.001)]
    lines = table(rows, sys.stdout).splitlines()
    assert [line.split()[0] for line in lines] == ["id", "11", "50256", "447"]
    assert lines[1].endswith("50.000  " + "\u2588" * 30)
    assert lines[2].endswith("25.000  " + "\u2588" * 15)
    assert lines[3].endswith("0.100")
    assert "'\\n\u4e2d'" in lines[2]
    assert "b'\\xe2\\x80'" in lines[3]
    for columns, longest in ((40, 40), (10, 1 + lines[1].index("\u2588"))):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, table(rows, sys.stdout).splitlines())) == longest


def test_a_terminal_that_knows_ascii_only() -> None:
    done = run("eval", "next", "\u4e2d", "-m", EMBEDDED_MODEL, "-k", "300", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].endswith("#" * 30)
    assert done.stdout.isascii()
    assert len(done.stdout.splitlines()) == 301


# ---------------------------------------------------------------------------------------------------------------------
# Output and refusals


@pytest.mark.parametrize("task", [["perplexity", "tokens.bin"], ["hellaswag", "examples.bin"]])
def test_the_result_in_words(capsys: pytest.CaptureFixture[str], task: list[str]) -> None:
    result = result_of(capsys, *task)
    assert evaluate.main([*task, "-t", "1"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 2
    for name in ("perplexity", "loss", "acc", "acc_norm"):
        assert name not in result or f"{name} {result[name]:.4f}" in output.out  # one worker gives the same bits


@pytest.mark.parametrize(
    "task", [["perplexity", "tokens.bin"], ["hellaswag", "examples.bin"], ["next", "a", "-m", EMBEDDED_MODEL]]
)
def test_every_field_is_documented(capsys: pytest.CaptureFixture[str], task: list[str]) -> None:
    result = result_of(capsys, *task)
    documented = (ROOT / "docs/reference/eval.md").read_text("utf-8").split("## The JSON")[1]
    for name in [*result, *(result["next"][0] if "next" in result else [])]:
        assert f"`{name}`" in documented, name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["required: TASK"]),
        (["train"], ["train"]),
        (["perplexity"], ["TEXT"]),
        (["perplexity", "absent.txt", "-m", EMBEDDED_MODEL], ["absent.txt", "absent.txt"]),
        (["perplexity", "absent.bin"], ["absent.bin", "absent.bin"]),
        (["perplexity", "tokens.bin", "-o", "yaml"], ["invalid choice: 'yaml'", "json"]),
        (["perplexity", "tokens.bin", "-t", "0"], ["--threads", "'0'", "256"]),
        (["perplexity", "tokens.bin", "-t", "1000"], ["1000"]),
        (["perplexity", "tokens.bin", "-m", "absent"], ["absent"]),
        (["perplexity", "tokens.bin", "--window", "1"], ["--window is 1 ... 25"]),
        (["perplexity", "tokens.bin", "--window", "26"], ["--window is 26"]),
        (["perplexity", "tokens.bin", "--stride", "25"], ["--stride is 25 ... 24"]),
        (["perplexity", "tokens.bin", "-n", "1"], ["1 token: ... 2"]),
        (["perplexity", "high.bin"], ["high.bin: ... 211 ... position 1", "211 ids"]),
        (["perplexity", "high.txt"], ["this model has 211 ids", "50257", "--tokenizer"]),
        (["hellaswag", "tokens.bin"], ["tokens.bin: ... 20240520 ... 20240522"]),
        (["hellaswag", "high_examples.bin"], ["high_examples.bin: example 0", "token id 211"]),
        (["hellaswag", "long.bin"], ["example 0 ... 25 ... 24"]),
        (["hellaswag", "examples.bin", "-n", "x"], ["--limit", "'x'"]),
        (["compare", "model.bin", "tokens.bin"], ["TEXT"]),
        (["compare", "model.bin", "absent", "tokens.bin"], ["absent"]),
        (["compare", "model.bin", "tokens.bin", "tokens.bin"], ["tokens.bin: magic number"]),
        (["compare", "model.bin", EMBEDDED_MODEL, "tokens.bin"], ["211 ids ... 50257"]),
        (["compare", "model.bin", "short.bin", "tokens.bin", "--window", "10"], ["--window is 10", "maxT + 1 = 9"]),
        (["compare", "model.bin", "model.bin", "tokens.bin", "-n", "1"], ["1 token: ... 2"]),
        (["compare", "model.bin", "model.bin", "tokens.bin", "-m", "model.bin"], ["-m"]),
        (["next", "a"], ["this model has 211 ids", "50257", "--tokenizer"]),
        (["next", "", "-m", EMBEDDED_MODEL], ["the prompt is empty"]),
        (["next", "a " * 300, "-m", EMBEDDED_MODEL], ["tokens were given", "256"]),
        (["next", "a", "-m", EMBEDDED_MODEL, "-k", "50258"], ["--top is 50258", "50257"]),
        (["next", "a", "-m", EMBEDDED_MODEL, "-k", "0"], ["--top", "'0'"]),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]) -> None:
    Path("high.bin").write_bytes(shard_bytes([1, 211]))
    Path("high.txt").write_text("hello there")
    make("short.bin", **SHAPE | {"maxT": 8})
    write_examples("high_examples.bin", [Example(0, 0, [1, 211], [[1]] * 4)])
    write_examples("long.bin", [Example(0, 0, [1] * 20, [[1]] * 3 + [[1] * 6])])
    assert_refuses(evaluate.main, capsys, arguments, *named)


def test_the_longest_example_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    write_examples("fits.bin", [Example(0, 0, [1] * 20, [[1]] * 3 + [[1] * 5])])
    assert result_of(capsys, "hellaswag", "fits.bin")["examples"] == 1


def test_damaged_weights(capsys: pytest.CaptureFixture[str]) -> None:
    content = Path("model.bin").read_bytes()
    Path("nan.bin").write_bytes(content[:-4] + struct.pack("<f", math.nan))
    assert_refuses(evaluate.main, capsys, ["perplexity", "tokens.bin", "-m", "nan.bin"], "not finite", status=1)


@pytest.mark.parametrize("words", ["1", "eval next x", "train x", "bench --help", "profile --help", "chat x"])
def test_an_instruction_set_that_is_not_there(words: str) -> None:
    """A command that needs the kernels reports in one line that it cannot import them."""
    assert_refused(run(*words.split(), PYGPT_ISA="sse9"), "'sse9'", "baseline")


def test_the_commands_of_the_help() -> None:
    done, tasks = run("eval", "--help"), {"perplexity", "hellaswag", "next", "compare"}
    assert done.returncode == 0
    assert set(re.findall(r"^    pygpt eval (\w+)", done.stdout, re.MULTILINE)) == tasks
    assert tasks <= set(re.findall(r"^    (\w+)\s+\w", done.stdout.partition("TASK")[2], re.MULTILINE))


# ---------------------------------------------------------------------------------------------------------------------
# Texts of every kind


def test_a_text_of_another_system_and_bits_per_byte(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "First Citizen:\nBefore we proceed, café.\n\nAll:\nSpeak.\n"
    (tmp_path / "lf.txt").write_bytes(text.encode())
    (tmp_path / "crlf.txt").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": text}) + "\r\n" + json.dumps({"text": text}))
    (tmp_path / "two.txt").write_text(f"<|endoftext|>{text}<|endoftext|>{text}")
    found = [result_of(capsys, "perplexity", str(tmp_path / name), "-m", EMBEDDED_MODEL) for name in ("lf.txt", "crlf.txt")]
    assert found[0]["loss"] == found[1]["loss"]
    scored = len(text.encode()) - len(b"First")
    assert found[0]["bits_per_byte"] == pytest.approx(found[0]["loss"] * found[0]["scored"] / math.log(2) / scored)
    rows, whole = (
        result_of(capsys, "perplexity", str(tmp_path / f"two.{kind}"), "-m", EMBEDDED_MODEL) for kind in ("jsonl", "txt")
    )
    assert (rows["loss"], rows["tokens"]) == (whole["loss"], whole["tokens"])
    assert rows["bits_per_byte"] == pytest.approx(rows["loss"] * rows["scored"] / math.log(2) / len((text * 2).encode()))
    plain = result_of(capsys, "perplexity", str(tmp_path / "two.txt"), "-m", EMBEDDED_MODEL, "--no-special")
    assert plain["tokens"] == whole["tokens"] + 12
    assert result_of(capsys, "perplexity", "tokens.bin")["bits_per_byte"] is None  # the vocabulary is unknown


def test_rows_of_hellaswag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"ind": 24, "ctx": "A man", "endings": ["runs.", "sat down on it.", "is", "and"], "label": 1, "activity_label": "x"},
        {"ctx": "The cat", "endings": ["mat.", "is here."], "label": "0"},
    ]
    file = tmp_path / "hellaswag_val.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    encode = Tokenizer().encode
    with GPT2.load(EMBEDDED_MODEL, threads=1) as model:
        found = list(evaluate.examples_in(str(file), model))
    assert found[0] == Example(
        0, 1, encode("A man"), [encode(f" {text}") for text in ("runs.", "sat down on it.", "is", "and")]
    )
    assert (found[1].number, found[1].label) == (1, 0)
    assert result_of(capsys, "hellaswag", str(file), "-m", EMBEDDED_MODEL)["examples"] == 2
    for bad, part in (
        ({"ctx": "a", "endings": ["b", "c"]}, "'label' is None"),
        ({"ctx": "a", "endings": ["b", "c"], "label": 2}, "'label' is 2"),
        ({"ctx": "a", "endings": "bc", "label": 0}, "'endings' is 'bc'"),
        ({"ctx": "", "endings": ["b", "c"], "label": 0}, "'ctx' is empty"),
        ({"endings": ["b", "c"], "label": 0}, "'ctx' is missing"),
    ):
        file.write_text(json.dumps(bad))
        assert evaluate.main(["hellaswag", str(file), "-m", EMBEDDED_MODEL]) == 2
        assert part in capsys.readouterr().err
