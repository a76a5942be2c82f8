"""Test pygpt train: its output, logs and saved files, interrupts, kills, --resume, and refused options.

No test depends on the machine's speed: a process is stopped after a line that it printed."""

import io
import json
import math
import os
import pty
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make
from running import PYGPT, assert_one_line_error, assert_refused, assert_refuses, environment, gist, run

import pygpt
from pygpt import Checkpoint, DataLoader, TrainableGPT2, Trainer, TrainingOptions, TrainingState, write_debug_state
from pygpt.commands.console import Progress
from pygpt.commands.train import job
from pygpt.commands.train import main as train
from pygpt.formats.text import tokens_and_labels

V = 61
SHAPE = "L=1,NH=2,C=8,maxT=16,V=61"
TEXT_SHAPE = "L=1,NH=2,C=8,maxT=16"
CONFIG = pygpt.Config(maxT=16, V=V, L=1, NH=2, C=8)
BATCH = ("-B", "2", "-T", "8")
RUN = ("--data", "train.bin", "--shape", SHAPE, *BATCH, "-t", "1", "--lr", "0.01", "--sample-every", "0")


def shard(path: Path, tokens: Any) -> None:
    """Write llm.c's token file with the test's own code."""
    values = np.asarray(tokens, "<u2")
    path.write_bytes(struct.pack("<256i", 20240520, 1, len(values), *[0] * 253) + values.tobytes())


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with data for training and validation."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("PYGPT"):
            monkeypatch.delenv(name)
    rng = np.random.default_rng(1)
    shard(tmp_path / "train.bin", rng.integers(0, V, 400))
    shard(tmp_path / "val.bin", rng.integers(0, V, 100))
    return tmp_path


def command(*arguments: str, shell: str = 'exec "$@"', **variables: str) -> "subprocess.CompletedProcess[str]":
    return run("train", *arguments, shell=shell, **variables)


def succeed(*arguments: str, **variables: str) -> str:
    """Run the command and assert that it succeeds; return its output."""
    result = command(*arguments, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return (status, stdout, stderr)."""
    status = train.main(arguments)
    output = capsys.readouterr()
    return status, output.out, output.err


def numbers(output: str, kind: str = "train") -> list[tuple[int, float]]:
    """Return (step, loss) of each line of a kind."""
    return [(int(step), float(loss)) for step, loss in re.findall(rf"^step (\d+): {kind} loss (\S+)", output, re.MULTILINE)]


def log_of(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def state_of(path: Path | str) -> TrainingState:
    with TrainingState(path) as found:
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run() -> None:
    """Lines, log and files are equal to those of a Trainer in this process."""
    options = ("--steps", "7", "--val", "val.bin", "--val-every", "3", "--val-batches", "2", "--accumulate", "2", "--clip", "1")
    result = command(*RUN, *options, "--seed", "4", "--shuffle", "--out", "run.bin", "--log", "run.jsonl", "--save-every", "5")
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    for word in ("7 steps", "run.bin", "run.state"):
        assert word in result.stderr
    found = Trainer(
        TrainableGPT2.random(CONFIG, seed=4),
        DataLoader("train.bin", 2, 8, shuffle_seed=4),
        TrainingOptions(steps=7, lr=0.01, accumulate=2, clip=1.0),
    )
    validation, expected, log = DataLoader("val.bin", 2, 8), [], []
    for step in range(8):
        loss = found.evaluate(validation, 2)
        if step in (0, 3, 6, 7):
            expected.append(f"step {step}: val loss {loss:.6f}")
        if step < 7:
            record = found.step()
            expected.append(f"step {step}: train loss {record.loss:.6f} (took * ms)")
            log.append({**record._asdict(), **({"val_loss": loss} if step in (0, 3, 6) else {})})
    log.append({"step": 7, "val_loss": loss})
    assert re.sub(r"took \d+\.\d ms", "took * ms", result.stdout).splitlines() == expected
    lines = log_of("run.jsonl")
    assert [line.keys() for line in lines] == [entry.keys() for entry in log]
    for line, entry in zip(lines, log, strict=True):
        for name in ("ms", "tokens_per_s"):
            assert line.pop(name, 1) > 0
            entry.pop(name, None)
        assert len(line.pop("ranks", [0])) == 1
        entry.pop("ranks", None)
    assert lines == log
    with Checkpoint("run.bin") as checkpoint:
        assert (checkpoint.version, checkpoint.config) == (3, CONFIG)
        assert all(np.array_equal(checkpoint.tensor(name), found.engine.tensor(name)) for name in found.engine._places)
    assert state_of("run.state").progress.step == 7
    assert state_of("run.state.1").progress.step == 5
    assert sorted(os.listdir()) == ["run.bin", "run.jsonl", "run.state", "run.state.1", "train.bin", "val.bin"]


def test_threads_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for threads in ("1", "3"):
        assert here(capsys, *RUN, "--steps", "3", "-t", threads, "--out", threads)[0] == 0
    assert Path("1.state").read_bytes() == Path("3.state").read_bytes()
    assert Path("1.bin").read_bytes() == Path("3.bin").read_bytes()


def test_the_reference_trains_alike() -> None:
    fast, slow = (numbers(succeed(*RUN, "--steps", "5", *way)) for way in ([], ["--reference"]))
    assert [step for step, _ in fast] == [0, 1, 2, 3, 4]
    assert [loss for _, loss in fast] == pytest.approx([loss for _, loss in slow], abs=1e-4)


def test_bfloat16() -> None:
    succeed(*RUN, "--steps", "2", "--out", "run", "--version", "5")
    with Checkpoint("run.bin") as checkpoint:
        assert checkpoint.version == 5


def test_from_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    make("tiny.bin", L=1, NH=2, C=8, V=V, maxT=16)
    begin = [word for word in RUN if word not in ("--shape", SHAPE)]
    status, output, error = here(capsys, *begin, "--init", "tiny.bin", "--steps", "1")
    assert (status, error.count("\n")) == (0, 2)
    assert re.match(r"pygpt: .*--out", error)
    assert "1 step;" in error
    with TrainableGPT2.load("tiny.bin") as engine:
        losses = engine.forward(*DataLoader("train.bin", 2, 8).next_batch())
    assert numbers(output)[0] == pytest.approx((0, float(losses.mean())), abs=1e-6)


def test_samples_of_another_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = here(capsys, *RUN, "--steps", "4", "--sample-every", "2", "--sample-tokens", "99", "--out", "run.bin")
    samples = re.findall(r"^step (\d): sample:\n---\n([\d ]+)\n---$", output, re.MULTILINE)
    assert [step for step, _ in samples] == ["2", "4"]
    with pygpt.GPT2.load("run.bin") as model:
        assert [int(word) for word in samples[1][1].split()] == list(model.generate([0], total=16, sampler="sample", seed=4))


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Screen, io.StringIO])
def test_a_sample_does_not_command_the_terminal(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    """On a terminal, control characters in the text are escaped: the model's author could choose them."""
    output = stream()
    monkeypatch.setattr(sys, "stdout", output)
    job.Report(Progress("steps"), None, None, keep=False).sampled(3, "a\x1b[2J\tb\n\x9bc")
    text = "a\\x1b[2J\tb\n\\x9bc" if stream is Screen else "a\x1b[2J\tb\n\x9bc"
    assert output.getvalue() == f"step 3: sample:\n---\n{text}\n---\n"


TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n"


def test_a_text_is_learned_and_completed() -> None:
    """Training from random weights learns a text by heart, and the model completes it."""
    Path("my.txt").write_text(TEXT * 4)
    shape = ("--shape", "L=1,NH=2,C=32,maxT=32", "-B", "2", "-T", "16")
    options = ("--steps", "100", "--lr", "0.01", "--schedule", "cosine", "--warmup", "5", "--beta2", "0.95")
    output = succeed("--data", "my.txt", *shape, *options, "--sample-every", "50", "--sample-tokens", "12", "--out", "mine.bin")
    losses = [loss for _, loss in numbers(output)]
    assert losses[0] == pytest.approx(math.log(50257), rel=0.02)
    assert losses[-1] < 0.1
    assert output.count("sample:\n---\n") == 2
    ids = [50256, *pygpt.Tokenizer().encode(TEXT)]
    result = run("-m", "mine.bin", "--sampler", "greedy", "-n", "14", *map(str, ids[:4]))
    assert (result.returncode, result.stderr) == (0, "")
    assert [int(line) for line in result.stdout.splitlines()] == ids[4:14]


def test_several_texts_and_a_part_that_validates(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b.txt", "a.txt"):
        Path(name).write_text(name * 40)
    shape = ("--shape", "L=1,NH=1,C=4,maxT=8", *BATCH)
    status, output, _ = here(capsys, "--data", "*.txt", *shape, "--steps", "1", "--val-tokens", "20", "--out", "run")
    assert status == 0
    assert [step for step, _ in numbers(output, "val")] == [0, 1]
    encode = pygpt.Tokenizer().encode
    tokens = 2 + len(encode("a.txt" * 40)) + len(encode("b.txt" * 40))  # each begins with <|endoftext|>
    assert state_of("run.state").progress.loader["tokens"] == tokens - 20


def test_parts_of_a_shard(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = here(capsys, *RUN, "--steps", "1", "--val-fraction", "0.25", "--out", "run")
    assert (status, len(numbers(output, "val"))) == (0, 2)
    assert state_of("run.state").progress.loader["tokens"] == 300


# ---------------------------------------------------------------------------------------------------------------------
# Stopped, killed, resumed

LONG = (
    *RUN,
    "--steps",
    "1000000000",
    "--shuffle",
    "--val",
    "val.bin",
    "--val-every",
    "4",
    "--log",
    "run.jsonl",
    "--out",
    "run.bin",
)


def start(*arguments: str) -> subprocess.Popen[str]:
    words = [*PYGPT, "train", *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return iter(process.stdout.readline, "")


@pytest.mark.parametrize(("which", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_finish_the_step_and_save(which: signal.Signals, status: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup of these tests would let the process ignore it
    process = start(*LONG)
    signal.signal(signal.SIGHUP, before)
    with process:
        for line in lines_of(process):
            if line.startswith("step 2: train"):
                assert_refused(command(*LONG, "--force"), "run.state: another process is writing it", status=1)
                for _ in range(5 if which == signal.SIGHUP else 1):  # a terminal that closes sends several
                    process.send_signal(which)
                break
        output = "".join(lines_of(process))  # communicate() would lose the buffered lines
        error = process.communicate(timeout=60)[1]
    done = numbers(output)[-1][0] + 1 if numbers(output) else 3
    assert f"stopped by {which.name} after {done} steps" in error
    assert error.endswith("pygpt train --resume run.state\n")
    assert process.returncode == status
    assert state_of("run.state").progress.step == done
    assert [entry["step"] for entry in log_of("run.jsonl")] == list(range(done))
    straight = Trainer(
        TrainableGPT2.random(CONFIG, seed=1), DataLoader("train.bin", 2, 8, shuffle_seed=1), TrainingOptions(lr=0.01)
    )
    for _ in range(done + 2):
        record = straight.step()
    output = succeed("--resume", "run.state", "--steps", str(done + 2))
    assert numbers(output)[-1] == pytest.approx((done + 1, record.loss), abs=1e-6)
    assert [entry["step"] for entry in log_of("run.jsonl")] == list(range(done + 3))  # the last one is the validation
    with Checkpoint("run.bin") as checkpoint:
        assert np.array_equal(checkpoint.tensor("wte"), straight.engine.tensor("wte"))


def test_ctrl_c_before_the_first_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setattr(train, "open_data", interrupted)
    assert here(capsys, *LONG) == (130, "", "")
    assert not Path("run.state").exists()


def test_a_signal_in_the_first_validation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return 4.0

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    status, output, error = here(capsys, *LONG)
    assert (status, [line[:8] for line in output.splitlines()]) == (143, ["step 0: ", "step 0: "])
    assert "stopped by SIGTERM after 1 step;" in error
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_it_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it goes on")

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    assert here(capsys, *LONG) == (130, "", "")
    assert not Path("run.state").exists()


KILLS = int(os.environ.get("TRAIN_KILLS", "5"))


def test_kill_9_at_any_moment() -> None:
    """A run that is killed many times at any moment ends with the same bytes as a run without kills."""
    options = (*LONG[: LONG.index("--steps")], *LONG[LONG.index("--steps") + 2 :], "--save-every", "1", "--accumulate", "2")
    options += ("--schedule", "cosine", "--warmup", "3", "--clip", "1")
    chance, kills = random.Random(KILLS), 0
    total = 25 * KILLS
    begin = (*options, "--steps", str(total))
    while True:
        resumable = Path("run.state").exists() or Path("run.state.1").exists()
        with start(*(("--resume", "run.state") if resumable else (*begin, "--force"))) as process:
            after = chance.randrange(1, 7)
            for _, _line in zip(range(after), lines_of(process), strict=False):
                pass
            if kills < KILLS:
                time.sleep(chance.uniform(0, 0.02))  # a random moment in the next steps and saves
                process.kill()
                kills += 1
                process.communicate(timeout=60)
                continue
            error = process.communicate(timeout=60)[1]
            assert process.returncode == 0, error
            break
    found = {name: Path(name).read_bytes() for name in ("run.bin", "run.state")}
    steps = [entry["step"] for entry in log_of("run.jsonl")]
    assert steps == list(range(total + 1))
    for name in (*found, "run.state.1", "run.jsonl"):
        Path(name).unlink()
    assert sorted(os.listdir()) == ["train.bin", "val.bin"]  # no temporary file remains
    succeed(*begin)
    assert {name: Path(name).read_bytes() for name in found} == found


def test_a_damaged_state_and_the_one_before() -> None:
    succeed(*RUN, "--steps", "6", "--save-every", "4", "--out", "run")
    good = Path("run.state").read_bytes()
    Path("run.state").write_bytes(good[:-100] + bytes(100))
    result = command("--resume", "run.state")
    assert result.returncode == 0
    assert re.match(r"pygpt: run\.state: damaged: .*run\.state\.1 \(step 4\)\n", result.stderr)
    assert [step for step, _ in numbers(result.stdout)] == [4, 5]
    assert Path("run.state").read_bytes() == good


def test_a_finished_run_is_finished() -> None:
    succeed(*RUN, "--steps", "2", "--val", "val.bin", "--out", "run", "--log", "log")
    before, log = Path("run.state").read_bytes(), log_of("log")
    output = succeed("--resume", "run.state")
    assert (numbers(output), len(numbers(output, "val"))) == ([], 1)
    assert Path("run.state").read_bytes() == before
    assert log_of("log") == log


def test_resumed_from_another_folder_with_other_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here(capsys, *RUN, "--steps", "2", "--out", "run", "--log", "log")
    (folder / "other").mkdir()
    os.chdir("other")
    status, output, error = here(capsys, "--resume", "../run.state", "--steps", "3", "--lr", "0.02", "--save-every", "7")
    assert status == 0
    assert [step for step, _ in numbers(output)] == [2]
    changes = {tuple(re.findall(r"--[a-z-]+|\d[\d.]*", line)) for line in error.splitlines()[:-1]}
    assert changes == {("--steps", "2", "3"), ("--lr", "0.01", "0.02"), ("--save-every", "100", "7")}
    assert os.listdir() == []
    assert [entry["lr"] for entry in log_of("../log")] == [0.01, 0.01, 0.02]
    shutil.move("../train.bin", "moved.bin")
    status, _, error = here(capsys, "--resume", "../run.state", "--steps", "4", "--data", "moved.bin", "--out", "new")
    assert (status, sorted(os.listdir())) == (0, ["moved.bin", "new.bin", "new.state"])
    assert f"--data changes from {folder}/train.bin to {folder}/other/moved.bin" in error


def test_a_log_with_half_a_line() -> None:
    succeed(*RUN, "--steps", "3", "--out", "run", "--log", "log")
    with Path("log").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    succeed("--resume", "run.state", "--steps", "5")
    assert [entry["step"] for entry in log_of("log")] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def test_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run = (*RUN, "--steps", "3", "--val", "val.bin", "--plot")
    assert here(capsys, *run, "pictures")[2].endswith("/pictures/loss.png\n")
    assert Path("pictures/loss.png").read_bytes().startswith(b"\x89PNG")
    assert here(capsys, *run, "one.svg")[0] == 0
    assert here(capsys, *run, "one.svg", "--force")[0] == 0
    for name in ("pictures/loss.svg", "one.svg"):
        assert ElementTree.parse(name).getroot().tag.endswith("svg")


def test_the_picture_of_a_resumed_run_is_drawn_anew(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert here(capsys, *RUN, "--steps", "2", "--out", "run", "--plot", "run.png")[0] == 0
    Path("other.png").write_bytes(b"me")
    for again in (["--steps", "3"], ["--steps", "4", "--plot", "run.png"]):
        Path("run.png").write_bytes(b"")
        assert here(capsys, "--resume", "run.state", *again)[0] == 0
        assert Path("run.png").read_bytes().startswith(b"\x89PNG")
    before = Path("run.png").read_bytes()
    status, _, error = here(capsys, "--resume", "run.state")  # without a log, the losses of earlier steps are lost
    assert (status, Path("run.png").read_bytes()) == (0, before)
    assert f"pygpt: did not write {os.getcwd()}/run.png: " in error
    status, _, error = here(capsys, "--resume", "run.state", "--plot", "other.png")
    assert (status, Path("other.png").read_bytes()) == (2, b"me")
    assert "other.png: exists already" in error


def test_without_matplotlib(folder: Path) -> None:
    (folder / "matplotlib.py").write_text("raise ImportError('not here')\n")
    result = command(*RUN, "--plot", "pictures", PYTHONPATH=str(folder))
    assert_refused(result, "matplotlib", "pip install", status=1)


def on_a_terminal(*arguments: str, **variables: str) -> tuple[str, str]:
    """Run the command with stderr on a terminal; return (stdout, output of the terminal)."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    words, pipe = [*PYGPT, "train", *arguments], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=follower, text=True, env=environment(**variables)) as process:
        os.close(follower)
        seen = b""
        try:
            while piece := os.read(leader, 4096):
                seen += piece
        except OSError:  # on Linux, the other end was closed
            pass
        output = process.communicate(timeout=60)[0]
    os.close(leader)
    assert process.returncode == 0
    return output, seen.decode()


def test_a_progress_bar_on_a_terminal(folder: Path) -> None:
    pytest.importorskip("tqdm")
    output, seen = on_a_terminal(*RUN, "--steps", "3")
    assert [step for step, _ in numbers(output)] == [0, 1, 2]
    assert "2/3" in seen
    assert re.search(r"loss \d\.\d+, \d+ tokens/s", seen)


def test_a_terminal_without_tqdm(folder: Path) -> None:
    (folder / "tqdm.py").write_text("raise ImportError('not here')\n")
    output, seen = on_a_terminal(*RUN, "--steps", "3", PYTHONPATH=str(folder))
    assert [step for step, _ in numbers(output)] == [0, 1, 2]
    assert [line[:7] for line in seen.splitlines()] == ["pygpt: "] * 2  # without a bar


# ---------------------------------------------------------------------------------------------------------------------
# --check


@pytest.fixture
def debug_state(folder: Path) -> Path:
    """A small model, and the results of the serial reference for a batch, as llm.c's debug state."""
    make("tiny.bin", L=2, NH=2, C=8, V=V, maxT=16)
    inputs, targets = (np.random.default_rng(i).integers(0, V, (2, 6), dtype="i4") for i in range(2))
    with pygpt.SerialTrainableGPT2.load("tiny.bin") as engine:
        loss = float(engine.forward(inputs, targets).mean())
        engine.backward()
        gradients = {name: engine.gradient(name).copy() for name in engine._places}
        with engine.model() as model:
            logits = np.stack([model.logits(row.tolist()) for row in inputs])
        write_debug_state("debug.bin", engine.config, pygpt.DebugState(inputs, targets, logits, loss, gradients))
    return folder / "debug.bin"


@pytest.mark.parametrize("way", [[], ["--reference"]])
def test_check(debug_state: Path, capsys: pytest.CaptureFixture[str], way: list[str]) -> None:
    status, output, error = here(capsys, "--check", "debug.bin", "--init", "tiny.bin", "-t", "2", *way)
    assert (status, error) == (0, "")
    rows = [line.split() for line in output.splitlines()[1:19]]
    assert [row[0] for row in rows][:4] == ["logits", "loss", "dwte", "dwpe"]
    assert len(rows) == 18
    assert all(row[3] == "OK" for row in rows)
    with pygpt.SerialTrainableGPT2.load("tiny.bin") as engine:
        state = pygpt.read_debug_state("debug.bin", engine.config)
        expected = []
        for step in range(10):
            expected.append(float(engine.forward(state.inputs, state.targets).mean()))
            engine.backward()
            engine.update(lr=1e-4, step=step + 1, weight_decay=0.01)
    found = re.findall(r"^step (\d): loss (\S+)$", output, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(10))
    assert [float(loss) for _, loss in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("field", "by"),
    [("logits", 0.011), ("loss", 0.011), ("fcb", 0.021), ("wte", -0.021), ("lnfb", math.nan), ("fcw", math.inf)],
)
def test_check_finds_a_difference(debug_state: Path, capsys: pytest.CaptureFixture[str], field: str, by: float) -> None:
    with Checkpoint("tiny.bin") as checkpoint:
        state = pygpt.read_debug_state("debug.bin", checkpoint.config)
        if field == "loss":
            state = state._replace(loss=state.loss + by)
        else:
            array = (state.logits if field == "logits" else state.gradients[field]).copy()
            array.reshape(-1)[-1] += by
            changed = {"logits": array} if field == "logits" else {"gradients": {**state.gradients, field: array}}
            state = state._replace(**changed)
        write_debug_state("debug.bin", checkpoint.config, state)
    status, output, error = here(capsys, "--check", "debug.bin", "--init", "tiny.bin")
    assert status == 1
    assert_one_line_error(error, "debug.bin", "tiny.bin")
    wrong = re.findall(r"^(\w+) .* NOT OK$", output, re.MULTILINE)
    assert wrong == [field if field in ("logits", "loss") else f"d{field}"]


def test_check_of_another_shape(debug_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("other.bin", L=1, NH=2, C=8, V=V, maxT=16)
    assert_refuses(train.main, capsys, ["--check", "debug.bin", "--init", "other.bin"], "debug.bin: too long")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", ""], "--data is empty"),
        (["--data", "missing.bin"], "missing.bin"),
        (["--data", "missing*.txt"], "missing*.txt"),
        (["--data", "*.*"], "train on one kind"),
        (["--data", "latin.txt", "--shape", TEXT_SHAPE], "latin.txt: byte 0xe4"),
        (["--data", "empty.txt", "--shape", TEXT_SHAPE], "empty.txt: tokens: 1 token"),
        (["--data", "few.txt", "--shape", TEXT_SHAPE], "few.txt: tokens: 9 tokens"),
        (["--data", "few.txt"], "this model has 61 ids"),
        (["--val", "few.txt"], "this model has 61 ids"),
        (["--val-tokens", "9"], "validation: {folder}/train.bin: tokens: 9 tokens"),
        (["--data", "folder"], "folder: ... pattern"),
        (["--data", "fifo", "--shape", TEXT_SHAPE], "fifo: ... regular"),
        (["--val", "/dev/zero"], "/dev/zero: ... regular"),
        (["--data", "short.bin"], "short.bin: truncated"),
        (["--data", "large.bin"], "token id 61 ... position 1 ... 61 ids"),
        (["--data", "few.bin"], "few.bin: 10 tokens"),
        (["--val", "few.bin"], "validation: "),
        (["--val", "missing.bin"], "missing.bin"),
        (["--val", "val.bin", "--val-tokens", "50"], "one of them"),
        (["--val-tokens", "0"], "--val-tokens: '0'"),
        (["--val-tokens", "400"], "val_tokens is 400"),
        (["--val-fraction", "1.5"], "1.5"),
        (["--val-fraction", "nan"], "nan"),
        (["--data", "[tv]*.bin", "--val-tokens", "50"], "2 shards cannot be split"),
        (["-B", "0"], "-B: '0' ... from 1"),
        (["-B", "x"], "'x'"),
        (["-T", "-1"], "-T"),
        (["-T", "17"], "T is 17 ... 16 tokens ... T smaller"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], str(2**64)),
        (["--init", "missing.bin", "--shape", ""], "--shape"),
        (["--init", "tiny.bin"], "--shape and --init tiny.bin"),
        (["--shape", "gpt3"], "gpt2-medium"),
        (["--shape", "L=1,NH=2,C=8"], "'L=1,NH=2,C=8'"),
        (["--shape", "L=1,L=1,NH=2,C=8,maxT=8"], "L=1,L=1"),
        (["--shape", "L=1,NH=2,C=8,maxT=8,X=1"], "X=1"),
        (["--shape", "L=1,NH=3,C=8,maxT=8"], "C is 8"),
        (["--shape", "L=0,NH=3,C=9,maxT=8"], "L is 0"),
        (["-t", "0"], "--threads: '0'"),
        (["-t", "257"], "257"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1e3"], "'1e3'"),
        (["--lr", "2"], "lr is 2.0"),
        (["--lr", "fast"], "--lr: 'fast'"),
        (["--lr", "1_0"], "--lr: '1_0'"),
        (["--lr", "\u0661"], "--lr: '\u0661'"),
        (["--lr", "nan"], "nan"),
        (["--schedule", "step"], "schedule is 'step'"),
        (["--warmup", "41"], "warmup is 41"),
        (["--min-lr", "0.5"], "min_lr is 0.5"),
        (["--beta1", "1"], "beta1 is 1.0"),
        (["--beta2", "-1"], "beta2 is -1.0"),
        (["--eps", "0"], "eps is 0.0"),
        (["--weight-decay", "-1"], "weight_decay is -1.0"),
        (["--clip", "-1"], "clip is -1.0"),
        (["--accumulate", "0"], "--accumulate"),
        (["--out", ""], "--out is empty"),
        (["--log", ""], "--log is empty"),
        (["--plot", ""], "--plot is empty"),
        (["--resume", ""], "--resume is empty"),
        (["--out", "folder"], "--out is 'folder'"),
        (["--out", ".bin"], "--out is '.bin'"),
        (["--out", "val.bin"], "val.bin: exists already"),
        (["--out", "train.bin"], "train.bin: ... two uses"),
        (["--out", "folder/"], "folder/"),
        (["--out", "old"], "old.state.1: exists already"),
        (["--out", "x" * 240], "File name too long"),
        (["--out", "missing/run"], "missing/run.bin: ... folder"),
        (["--out", "val.bin/run"], "Not a directory"),
        (["--version", "1"], "--version"),
        (["--version", "4"], "3 (float32) or 5 (bfloat16)"),
        (["--save-every", "-1"], "--save-every"),
        (["--resume", "missing.state"], "missing.state"),
        (["--resume", "val.bin"], "magic number 20240520"),
        (["--val-every", "0"], "--val-every"),
        (["--val-batches", "0"], "--val-batches"),
        (["--sample-every", "x"], "--sample-every"),
        (["--sample-tokens", "0"], "--sample-tokens"),
        (["--log", "val.bin"], "val.bin: exists already"),
        (["--log", "missing/log"], "missing/log: ... folder"),
        (["--log", "same.bin", "--out", "same"], "two uses"),
        (["--log", "folder"], "folder: exists already"),
        (["--plot", "val.bin"], "val.bin/loss.svg: ... folder"),
        (["--plot", "folder/x.svg"], "x.svg: exists already"),
        (["--plot", "folder/x.svg", "--force"], "x.svg: ... regular"),
        (["--plot", "photo.png"], "photo.png: exists already"),
        (["--plot", "new.svg", "--log", "new.svg"], "two uses"),
        (["--plot", "new.bin", "--out", "new"], "two uses"),
        (["--log", "new.state.1", "--out", "new"], "two uses"),
        (["--data", "few.state.1", "--out", "few", "--force"], "two uses"),
        (["--check", "missing.bin"], "--check ... -B"),
        (["--speed", "9"], "--speed"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    (folder / "latin.txt").write_bytes("ä".encode("latin-1"))
    (folder / "empty.txt").touch()
    (folder / "few.txt").write_text(" a" * 8)
    (folder / "short.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])
    (folder / "old.state.1").touch()
    (folder / "few.state.1").write_text(" a" * 8)
    (folder / "photo.png").write_bytes(b"me")
    os.mkfifo(folder / "fifo")
    (folder / "folder" / "x.svg").mkdir(parents=True)
    shard(folder / "large.bin", [60, 61] * 100)
    shard(folder / "few.bin", range(10))
    before = files()
    assert_refuses(train.main, capsys, [*RUN, *arguments], named.replace("{folder}", str(folder)))
    assert files() == before


def test_options_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (
        (["--shape", SHAPE], "--data is missing"),
        (["--data", "train.bin", "--init", "random"], "--init random needs --shape"),
        (["--data", "train.bin", "--init", "missing.bin"], "missing.bin: "),
    ):
        assert_refuses(train.main, capsys, arguments, named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--init", "tiny.bin"], "--init and --resume"),
        (["--shape", SHAPE], "--shape and --resume"),
        (["--chars"], "--chars and --resume"),
        (["--train-tokenizer", "300"], "--train-tokenizer and --resume"),
        (["--tokenizer", "absent.json"], "absent.json ... No such file"),
        (["-B", "3"], "-B is 3 ... 2"),
        (["-T", "4"], "-T is 4"),
        (["--seed", "2"], "--seed is 2"),
        (["--shuffle"], "--shuffle is True"),
        (["--val-tokens", "30"], "--val-tokens is 30 ... None"),
        (["--data", "val.bin"], "tokens = 400"),
        (["--data", "other.bin"], "fingerprint = "),
        (["--out", "taken"], "taken.bin: exists already"),
        (["--log", "taken.bin"], "taken.bin: exists already"),
        (["--warmup", "3"], "warmup is 3 ... 0 to 2"),
        (["--steps", "1"], "--steps is 1 ... 2"),
        (["--patience", "1"], "--patience need validation data"),
    ],
)
def test_refusals_of_a_resumed_run(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    here(capsys, *RUN, "--steps", "2", "--out", "run")
    Path("taken.bin").touch()
    shard(Path("other.bin"), np.arange(400) % V)
    before = files()
    assert_refuses(train.main, capsys, ["--resume", "run.state", *arguments], named)
    assert files() == before


def test_states_with_other_names(capsys: pytest.CaptureFixture[str]) -> None:
    here(capsys, *RUN, "--steps", "2", "--out", "run")
    here(capsys, "--resume", "run.state", "--steps", "3", "--out", "run.bin")  # its own files
    assert state_of("run.state").progress.step == 3
    assert here(capsys, "--resume", "run.state.1", "--steps", "5")[0] == 0
    assert (state_of("run.state").progress.step, state_of("run.state.1").progress.step) == (5, 2)
    Path("run.state").rename("odd")
    assert_refuses(train.main, capsys, ["--resume", "odd"], "'odd'", ".state", "--out")
    assert here(capsys, "--resume", "odd", "--out", "even", "--steps", "6")[0] == 0
    assert state_of("even.state").progress.step == 6


def test_a_state_of_another_program(capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(TrainableGPT2(CONFIG), DataLoader("train.bin", 2, 8)).save("x.state", {"mine": 1})
    assert_refuses(train.main, capsys, ["--resume", "x.state"], "x.state: ", "pygpt train")


@pytest.mark.parametrize(
    "change",
    [
        {"data": 5},
        {"val": ""},
        {"val": "\0"},
        {"val": "\ud800"},
        {"B": "2"},
        {"B": 0},
        {"val_every": 0},
        {"save_every": -1},
        {"version": 4},
        {"seed": True},
        {"more": 1},
    ],
)
def test_a_state_with_nonsense_for_options(capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    here(capsys, *RUN, "--steps", "2", "--out", "run")
    with TrainingState("run.state") as state:
        found = Trainer(TrainableGPT2(CONFIG), DataLoader("train.bin", 2, 8))
        found.restore(state)
        found.save("x.state", {**state.progress.job, **change})
    assert_refuses(train.main, capsys, ["--resume", "x.state", "--steps", "3"], "x.state: ", "pygpt train")


def test_a_state_without_steps_replaces_only_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    here(capsys, *RUN, "--steps", "2", "--out", "run", "--log", "log")
    Path("log").write_text("dear diary\n")
    with TrainingState("run.state") as state:
        job = state.progress.job
    Trainer(TrainableGPT2(CONFIG), DataLoader("train.bin", 2, 8)).save("x.state", job)
    status, _, error = here(capsys, "--resume", "x.state")
    assert status == 2
    assert "log: line 1 " in error
    assert Path("log").read_text() == "dear diary\n"


def test_a_state_does_not_replace_a_picture_elsewhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos").mkdir()
    photo = folder / "photos" / "me.png"
    photo.write_bytes(b"me")
    trainer = Trainer(TrainableGPT2(CONFIG), DataLoader("train.bin", 2, 8))
    trainer.save("x.state", vars(job.Job(data=f"{folder}/train.bin", B=2, T=8, plot=str(photo))))
    status, _, error = here(capsys, "--resume", "x.state", "--steps", "1")
    assert (status, photo.read_bytes()) == (2, b"me")
    assert re.search(rf"{photo}: .*--plot again\n$", error)


def test_a_state_keeps_a_file_without_an_end_of_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("diary").write_text("dear diary")
    trainer = Trainer(TrainableGPT2(CONFIG), DataLoader("train.bin", 2, 8))
    trainer.save("x.state", vars(job.Job(data=f"{os.getcwd()}/train.bin", B=2, T=8, log=f"{os.getcwd()}/diary")))
    assert here(capsys, "--resume", "x.state", "--steps", "1")[0] == 2
    assert Path("diary").read_text() == "dear diary"


def test_a_file_that_is_not_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    here(capsys, *RUN, "--steps", "2", "--out", "run", "--log", "log")
    Path("log").write_text("dear diary\n")
    status, _, error = here(capsys, "--resume", "run.state", "--steps", "3")
    assert status == 2
    assert f"pygpt: error: {os.getcwd()}/log: line 1 " in error
    assert Path("log").read_text() == "dear diary\n"


def test_force(capsys: pytest.CaptureFixture[str]) -> None:
    here(capsys, *RUN, "--steps", "4", "--save-every", "1", "--out", "run", "--log", "log")
    assert here(capsys, *RUN, "--steps", "1", "--out", "run", "--log", "log")[0] == 2
    Path("run.state.0123abcd.tmp").touch()
    status, _, error = here(capsys, *RUN, "--steps", "1", "--out", "run", "--log", "log", "--force")
    assert status == 0
    assert "removed " in error
    assert sorted(os.listdir()) == ["log", "run.bin", "run.state", "train.bin", "val.bin"]
    assert (state_of("run.state").progress.step, len(log_of("log"))) == (1, 1)


def test_special_files_are_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo("run.state")
    assert_refuses(train.main, capsys, [*RUN, "--out", "run", "--force"], "run.state: ", "regular")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(mode=0o500)
    assert_refuses(train.main, capsys, [*RUN, "--out", "locked/run"], "Permission denied")


def test_too_little_disk_for_one_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 0, 1000))
    assert_refuses(train.main, capsys, [*RUN, "--out", "run"], "1000 bytes are free", status=1)


def test_a_disk_that_fills_up() -> None:
    """If a new state does not fit on the disk, the status is 1, and the previous save stays intact."""
    succeed(*RUN, "--steps", "2", "--out", "run")
    before = files()
    result = command("--resume", "run.state", "--steps", "5", shell='ulimit -f 8; exec "$@"')
    assert result.returncode == 1
    assert re.search(r"^pygpt: run\.state [^\n]* 2 steps", result.stderr, re.MULTILINE)
    assert re.search(r"\npygpt: error: run\.state: .*File too large\n$", result.stderr)
    assert files() == before
    succeed("--resume", "run.state", "--steps", "5")


def test_a_log_on_a_full_disk() -> None:
    result = command(*RUN, "--log", "log", shell='ulimit -f 0; exec "$@"')
    assert result.returncode == 1
    assert re.search(rf"\npygpt: error: {os.getcwd()}/log: .*File too large\n$", result.stderr)


def test_weights_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    for value in (np.nan, np.inf):
        tensors = {name: np.full(shape, value) for name, shape, _, _ in CONFIG.tensors(padded=False)}
        pygpt.write_checkpoint("nan.bin", CONFIG, tensors)
        status, output, error = here(capsys, "--data", "train.bin", "--init", "nan.bin", *BATCH, "--out", "run")
        assert (status, output) == (2, "")
        assert_one_line_error(error, f"nan.bin: wte has {value}")
        assert not Path("run.state").exists()


def test_a_loss_that_is_not_finite_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    pygpt.write_checkpoint(
        "large.bin", CONFIG, {name: np.full(shape, 1e30) for name, shape, _, _ in CONFIG.tensors(padded=False)}
    )
    status, output, error = here(capsys, "--data", "train.bin", "--init", "large.bin", *BATCH, "--out", "run")
    assert (status, output) == (1, "")
    assert_one_line_error(error, "step 0: the loss is nan", "epoch 0, shard 0, batch 0")
    assert not Path("run.state").exists()


DIVERGING = ("--lr", "1", "--weight-decay", "1000", "--out", "run", "--steps")  # each step multiplies the weights by -999


def test_a_run_that_diverges_before_the_first_save(capsys: pytest.CaptureFixture[str]) -> None:
    """The weights are saved, because there is no earlier save."""
    status, output, error = here(capsys, *RUN, *DIVERGING, "40")
    done = len(numbers(output))
    assert (status, done > 0) == (1, True)
    assert re.fullmatch(
        rf"pygpt: run\.state [^\n]* {done} steps[^\n]*\n"
        rf"pygpt: error: step {done}: [^\n]*nan [^\n]* epoch 0, shard 0, batch {done}[^\n]+\n",
        error,
    )
    assert state_of("run.state").progress.step == done
    here(capsys, *RUN, *DIVERGING, str(done), "--force")
    assert state_of("run.state").progress.step == done


def test_a_run_that_diverges_leaves_the_last_save(capsys: pytest.CaptureFixture[str]) -> None:
    done = len(numbers(here(capsys, *RUN, *DIVERGING, "40")[1]))
    status, _, error = here(capsys, *RUN, *DIVERGING, "40", "--force", "--save-every", str(done - 1))
    assert status == 1
    assert re.search(gist(f"pygpt: run.state ... {done - 1} steps"), error)
    assert state_of("run.state").progress.step == done - 1
    status, _, error = here(capsys, *RUN, *DIVERGING, "40", "--force", "--save-every", "1")
    assert status == 1
    assert re.search(gist(f"pygpt: run.state ... {done} steps ... run.state.1"), error)
    assert state_of("run.state.1").progress.step == done - 1


def test_a_resumed_run_that_diverges_keeps_the_state(capsys: pytest.CaptureFixture[str]) -> None:
    here(capsys, *RUN, "--steps", "4", "--save-every", "2", "--out", "run")
    before = files()
    for state in ("run.state", "run.state.1"):
        assert here(capsys, "--resume", state, *DIVERGING[:-3], "--steps", "40", "--save-every", "0")[0] == 1
        assert files() == before


def test_a_signal_before_a_resumed_run_made_a_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here(capsys, *RUN, "--steps", "4", "--save-every", "2", "--val", "val.bin", "--out", "run")
    before = files()

    def interrupted(*_: Any) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return True

    monkeypatch.setattr(train.Run, "look", interrupted)
    for arguments, said in (
        (["run.state"], "pygpt train --resume run.state\n"),
        (["run.state.1"], "nothing was saved\n"),
        (["run.state", "--out", "new"], "nothing was saved\n"),
    ):
        status, _, error = here(capsys, "--resume", *arguments)
        assert (status, error.endswith(said)) == (130, True), error
        assert files() == before


def test_weights_that_went_bad(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are not finite are not saved. The last state stays, and a line on stderr names it."""
    here(capsys, *RUN, "--steps", "3", "--out", "run")
    with TrainingState("run.state") as state:
        engine = TrainableGPT2(CONFIG)
        found = Trainer(engine, DataLoader("train.bin", 2, 8))
        found.restore(state)
        engine.parameters[:] = np.nan
        found.save("nan.state", state.progress.job)
    before = files()
    status, _, error = here(capsys, "--resume", "nan.state", "--steps", "9")
    assert status == 1
    assert re.search(gist("pygpt: nan.state ... 3 steps"), error)
    assert re.search("step 3: .*nan .*epoch 0, shard 0, batch 3", error)
    assert files() == before
    status, _, error = here(capsys, "--resume", "nan.state", "--steps", "9", "--out", "new")
    assert (status, "new.state" in error) == (1, False)  # it does not exist
    assert files() == before


def test_a_shard_that_goes_bad_within_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard(folder / "train_2.bin", [60] * 40 + [61] * 8)
    status, output, error = here(capsys, *RUN, "--data", "train*.bin", "--steps", "40", "--save-every", "10", "--out", "run")
    assert status == 2
    assert len(numbers(output)) == 24  # floor(399 / 16)
    assert re.search(gist("pygpt: run.state ... 24 steps"), error)
    assert "train_2.bin: token id 61 at position 40" in error
    assert (state_of("run.state").progress.step, state_of("run.state.1").progress.step) == (24, 20)


def test_a_reader_that_goes_away() -> None:
    result = command(*RUN, "--steps", "1000000000", shell='"$@" | head -n 2; exit 0')
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 2)
    assert re.match(r"pygpt: .*--out", result.stderr)
    assert result.stderr.count("\n") == 1
    result = command(*RUN, "--steps", "1000000000", "--out", "run", shell='("$@"; echo $? >&2) | head -n 2; exit 0')
    assert (len(result.stdout.splitlines()), result.stderr) == (2, "141\n")
    assert state_of("run.state").progress.step >= 2  # its steps were saved


def test_commands_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The parser accepts the commands of the help. All options named in the text exist."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text, _, options = capsys.readouterr().out.partition("\noptions:")
    assert set(re.findall(r"--[a-z][a-z0-9-]*", text)) <= set(re.findall(r"--[a-z][a-z0-9-]*", options))
    commands = re.findall(r"^    pygpt train (--.*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for line in commands:
        given = vars(train.build_parser().parse_args(shlex.split(line)))
        if given["shape"] is not None:
            job.shape_of(given["shape"])
        if given["data"] is not None:
            job.new({name: value for name, value in given.items() if value is not None})


# ---------------------------------------------------------------------------------------------------------------------
# Texts of every kind, prompts, the best model


def losses_of(done: "subprocess.CompletedProcess[str]") -> list[str]:
    assert done.returncode == 0, done.stderr
    return re.findall(r"^step \d+: (?:train|val) loss (\S+)", done.stdout, re.MULTILINE)


def test_a_text_of_another_system_gives_the_same_losses(folder: Path) -> None:
    text = "To be, or not to be.\n\nThat is\nthe question.\n\n" * 20
    (folder / "lf.txt").write_bytes(text.encode())
    (folder / "crlf.txt").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    (folder / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\r\n" for _ in range(2)))
    options = ("--shape", TEXT_SHAPE, *BATCH, "-t", "1", "--steps", "3", "--val-fraction", "0.2", "--sample-every", "0")
    assert losses_of(command("--data", "lf.txt", *options)) == losses_of(command("--data", "crlf.txt", *options))
    refused = command("--data", "rows.jsonl", *options)
    assert_refused(refused, "line 1", "'text' is missing", "'body'", "--field")
    rows = ("--data", "rows.jsonl", "--field", "body", *options)
    losses_of(command(*rows, "--out", "run.bin"))
    more = losses_of(command("--resume", "run.state", "--steps", "4"))  # the field is stored
    assert more == losses_of(command(*rows, "--steps", "4"))[-len(more) :]
    assert_refused(command("--resume", "run.state", "--field", "text"), "--field is text", "body")


def test_prompts_are_masked(folder: Path) -> None:
    rows = [{"prompt": f"{number} plus one is", "completion": f" {number + 1}"} for number in range(60)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--shape", TEXT_SHAPE, *BATCH, "-t", "1", "--steps", "30", "--lr", "0.02", "--sample-every", "0")
    found = losses_of(command("--data", "pairs.jsonl", *options, "--val-fraction", "0.2", "--accumulate", "2"))
    assert float(found[-1]) < float(found[0]) - 1
    tokens, labels = tokens_and_labels(folder / "pairs.jsonl")
    with TrainableGPT2.random(pygpt.Config(maxT=16, V=50257, L=1, NH=2, C=8), seed=1, threads=1) as engine:
        loader = DataLoader(tokens, 2, 8, labels=labels)
        wanted = Trainer(engine, loader, TrainingOptions(steps=1, lr=0.02)).step().loss
    assert losses_of(command("--data", "pairs.jsonl", *options, "--steps", "1")) == [f"{wanted:.6f}"]
    assert_refused(run("shards", "pairs.jsonl", "-o", "x"), "prompts and completions", "pygpt train --data")


def test_the_best_model_is_kept_and_training_stops_early(folder: Path) -> None:
    """A few tokens of a skewed distribution: the model learns the distribution, then the tokens, and validation gets worse."""
    rng, chances = np.random.default_rng(3), 1 / np.arange(1, V + 1)
    for name, count in ("train.bin", 65), ("val.bin", 200):
        shard(folder / name, rng.choice(V, count, p=chances / chances.sum()))
    options = (*RUN, "--val", "val.bin", "--val-every", "2", "--lr", "0.05", "--save-every", "3")
    done = command(*options, "--steps", "60", "--patience", "3", "--keep-best", "--out", "run.bin")
    validated = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): val loss (\S+)", done.stdout, re.MULTILINE)}
    best = min(validated, key=lambda step: validated[step])
    assert max(validated) == best + 6 < 60
    assert f"that of step {best}" in done.stderr
    assert f"run.best.bin is the model of step {best}" in done.stderr
    assert best > 0
    assert command(*options, "--steps", str(best), "--out", "short.bin").returncode == 0
    assert (folder / "run.best.bin").read_bytes() == (folder / "short.bin").read_bytes()
    with open(folder / "run.state", "rb") as file:
        assert b'"best": [' in file.read()
    assert command(*options, "--steps", "60", "--patience", "3", "--keep-best", "--out", "two.bin").returncode == 0
    again = command("--resume", "two.state")  # it is over: nothing changes
    assert "stopped early" in again.stderr
    assert TrainingState("two.state").progress.job["best"] == TrainingState("run.state").progress.job["best"]
    for words in (["--patience", "3"], ["--keep-best"]):
        assert_refused(command(*RUN, *words), "need validation data")
    assert_refused(command(*options, "--keep-best", "--out", "run2.bin", "--patience", "0"), "--patience", "'0'")
    assert_refused(command(*options, "--steps", "2", "--keep-best"), "--keep-best", "give --out")
    shutil.copy(folder / "run.best.bin", folder / "new.best.bin")
    assert_refused(command(*options, "--keep-best", "--out", "new.bin"), "new.best.bin", "exists already")


def test_a_linear_schedule() -> None:
    options = TrainingOptions(steps=10, lr=1.0, warmup=2, schedule="linear", min_lr=0.2)
    assert [options.learning_rate(step) for step in (0, 1, 2, 6, 10, 11)] == pytest.approx([0.5, 1, 1, 0.6, 0.2, 0.2])
