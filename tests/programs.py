"""Programs in processes of their own: how they are started and how they end, and every kind that writes files.

A killed program cannot tidy up: it may leave files NAME.*.tmp and temporary folders beside its target. No other file may
remain, and the target is complete, absent, or the older file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from known import SHAPE, make_model

import pygpt
from pygpt import Checkpoint, Config, PyGPTError, read_debug_state, read_examples, read_tokenizer, read_tokens, write_tokens
from pygpt.formats.gguf import GGUFFile
from pygpt.formats.panels import PanelFile
from pygpt.formats.vocabulary import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
DEADLINE_S = 120.0  # a limit for work of one or two seconds, also on a busy machine: only a hang reaches it
BIG = Config(maxT=256, V=5000, L=4, NH=4, C=128)  # large enough that writing it takes a while
LONG = Config(maxT=20000, V=211, L=2, NH=3, C=48)  # its cache takes 30 MB
TRAINING = ["-B", 1, "-T", 8, "--save-every", 1, "--sample-every", 0, "-t", 1]
# How a program given by its text begins, as each of our commands does (pygpt/__main__.py).
BEGIN = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
"""
# And a program of the API: every step uses all workers, although the models are small.
PREAMBLE = """
import os, sys, threading, time
import numpy as np
import pygpt.cpus
from pygpt import *
pygpt.cpus.workers_for = lambda threads, *_: threads
pygpt.cpus.runnable = lambda: 256
"""


def environment(**variables: str) -> dict[str, str]:
    """Return this process's variables without pygpt's, and with this checkout's pygpt."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYGPT_")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "", **variables}


def command(*words: object) -> list[str]:
    """The words of a pygpt command."""
    return [PYTHON, "-m", "pygpt", *map(str, words)]


def start(argv: Sequence[object], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a program, all its streams pipes unless `options` say otherwise."""
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([str(word) for word in argv], **{**streams, "env": environment(), "cwd": "/", **options})


class Outcome:
    """How a program ended: status (negative: the signal that ended it), out, err."""

    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out, err.decode("utf-8", "replace")

    @property
    def one_line(self) -> bool:
        """Whether it complained in one line."""
        return self.err.startswith(("pygpt: error: ", "chat.py: error: ")) and self.err.count("\n") == 1

    @property
    def ids(self) -> list[int]:
        """The ids that it printed."""
        return [int(word) for word in self.out.split()]

    def __repr__(self) -> str:
        return f"status {self.status}, stdout {self.out[-200:]!r}, stderr {self.err[-1200:]!r}"


def patience(pause_s: float) -> Iterator[None]:
    """Yield as often as there is time: each time the caller waits for `pause_s` at most. A count is not a clock: it does not
    advance while the machine is stopped."""
    yield from [None] * round(DEADLINE_S / pause_s)


def finish(process: "subprocess.Popen[bytes]", given: bytes | None = None) -> Outcome:
    """Wait for a program's end. A program that hangs is killed; its status is -SIGKILL."""
    for _ in patience(0.5):
        try:
            out, err = process.communicate(given, timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            given = None  # it is on its way
    else:
        process.kill()
        out, err = process.communicate()
        err = b"HANGS\n" + (err or b"")
    return Outcome(process.returncode, out or b"", err or b"")


def run(argv: Sequence[object], given: bytes = b"", **options: Any) -> Outcome:
    """Run a program to its end."""
    return finish(start(argv, **options), given)


def run_program(code: str, *arguments: object) -> Outcome:
    """Run a program of the API, warnings as errors."""
    return run([PYTHON, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", PREAMBLE + code, *arguments])


def wait_until(condition: Callable[[], object]) -> bool:
    """Wait until a condition is true. Returns False if it does not."""
    for _ in patience(0.002):
        if condition():
            return True
        time.sleep(0.002)
    return False


def send(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """Send a signal, if the process is still there."""
    with suppress(ProcessLookupError):
        process.send_signal(number)


class Files:
    """Files for programs, made once in a folder."""

    def __init__(self, place: Path) -> None:
        self.model = make_model(place / "model.bin", BIG)
        self.bf16 = make_model(place / "bf16.bin", BIG, version=5)
        self.long = make_model(place / "long.bin", LONG, sharp=9)
        self.small = make_model(place / "small.bin", sharp=9)
        self.text = str(place / "text.txt")
        Path(self.text).write_text("To be, or not to be.\n\n" * 9000)
        self.tokens = str(place / "tokens.bin")
        write_tokens(self.tokens, [i * i % SHAPE.V for i in range(500)])
        self.hf = str(place / "hf")
        outcome = run(command("convert", self.model, self.hf + "/"))
        assert outcome.status == 0, outcome
        with pygpt.GPT2.load(self.small, threads=1) as model:
            self.answer = list(model.generate([1, 2], total=10))
        self.rows, answers = str(place / "rows.jsonl"), place / "answers.jsonl"
        lines = [json.dumps({"tokens": [i % SHAPE.V], "max_new_tokens": 60}) for i in range(300)]
        Path(self.rows).write_text("\n".join(lines))
        outcome = run(command("batch", self.rows, "-o", answers, "-m", self.small))
        assert outcome.status == 0, outcome
        self.answers = answers.read_bytes()


class Writer:
    """A program that writes `targets` into an empty folder, where older ones may be; sound() raises for one that is not whole.

    fresh: it refuses to replace older files; `again` makes it. over_s: about how long it writes, once it has begun. least: no
    more bytes than its first target has."""

    def __init__(
        self,
        name: str,
        argv: Sequence[object],
        targets: Sequence[str],
        sound: Callable[[Path], object],
        *,
        fresh: bool = False,
        again: Sequence[object] = (),
        over_s: float = 0.1,
        least: int = 100_000,
    ) -> None:
        self.name, self.argv, self.targets, self.sound = name, [*argv], targets, sound
        self.fresh = fresh or bool(again)
        self.again = [*argv, *again]
        self.over_s, self.least = over_s, least

    def whole(self, place: Path) -> bool:
        """Return whether every target is absent or complete: an older model, or a file that sound() accepts."""
        for path in (place / target for target in self.targets if (place / target).exists()):
            try:
                Checkpoint(path).close()
            except PyGPTError:
                try:
                    self.sound(path)
                except (PyGPTError, OSError, ValueError, AssertionError):
                    return False
        return True

    def leftovers(self, place: Path) -> list[str]:
        """Return the other files of a folder beside the targets."""
        parts = {f"{target}.part" for target in self.targets}  # the answers of a job that continues later
        return sorted({path.name for path in place.iterdir()} - {target.split("/")[0] for target in self.targets} - parts)

    def temporary(self, name: str) -> bool:
        """Return whether a killed writer may leave this file or folder."""
        return name.endswith(".tmp") or any(name.startswith(f".{target[:1]}") for target in self.targets)

    def begun(self, place: Path) -> bool:
        """Whether it has begun to write."""
        return any(place.iterdir()) if self.fresh else bool(self.leftovers(place))

    def put_older(self, files: Files, place: Path) -> None:
        """Put older files where its targets go, unless it would refuse them."""
        for target in () if self.fresh else self.targets:
            shutil.copy(files.small, place / target)

    def clear(self, place: Path) -> None:
        """Remove the targets."""
        for path in (place / target for target in self.targets):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


SAVES = f"""{BEGIN}{PREAMBLE}
from pygpt.commands.console import status_of

def job():
    with TrainableGPT2.load(sys.argv[1], threads=1) as model:
        for version in (3, 5, 1, 3, 5, 1, 3):
            model.save(sys.argv[2], version=version)

sys.exit(status_of(job))
"""
OTHERS = f"""{BEGIN}{PREAMBLE}
from pygpt.commands.console import status_of

def job():
    with TrainableGPT2.load(sys.argv[1], threads=1) as model:
        ids = np.arange(64).reshape(2, 32)
        losses = model.forward(ids, ids)
        model.backward()
        gradients = {{name: model.gradient(name) for name, _, _, _ in model.config.tensors(padded=False)}}
        logits = np.zeros((2, 32, model.config.V), np.float32)
        for number in range(3):
            state = DebugState(ids.astype(np.int32), ids.astype(np.int32), logits, float(losses.mean()), gradients)
            write_debug_state(sys.argv[2], model.config, state)
            write_examples(sys.argv[3], (Example(i, i % 4, [1] * 40, [[2] * 30] * 4) for i in range(3000)))
            write_tokenizer(sys.argv[4], [b"%d" % i for i in range(60000)], 7)

sys.exit(status_of(job))
"""
TRACES = ["t.json", "p.prv", "p.pcf", "p.row"]
PICTURES = [f"{name}.{kind}" for name in ("hotspots", "timeline", "speedup") for kind in ("svg", "png")]


def writers(files: Files, place: Path) -> list[Writer]:
    """Every kind of write."""
    train = command("train", "--data", files.tokens, "--init", files.small, "--out", place / "m.bin", *TRAINING)
    profile = command("profile", "-m", files.small, "--tokens", "1,2", "-n", 8, "-r", 1, "--skip", "all")
    shards = command("shards", files.text, "-o", place / "s", "--val-fraction", ".1")
    others = [PYTHON, "-c", OTHERS, files.model, place / "d.bin", place / "e.bin", place / "t.bin"]
    traces = [*profile, "--trace", place / "t.json", "--paraver", place / "p"]
    models, log = ["m.bin"], [*train, "--steps", 12, "--log", place / "m.jsonl"]
    own = command(
        "train", "--data", files.text, "--chars", "--shape", "L=1,NH=1,C=16,maxT=64", "--out", place / "m.bin", *TRAINING
    )
    vocabulary = ["m.bin", "m.state", "m.state.1", "m.tokenizer.json"]
    batch, answers = command("batch", files.rows, "-o", place / "a.jsonl", "-m", files.small), ["a.jsonl", "a.jsonl.job.json"]

    def sound_answers(path: Path) -> None:
        assert path.read_bytes() == files.answers if path.name == "a.jsonl" else json.loads(path.read_bytes())

    found = [
        Writer("to bfloat16", command("convert", files.model, place / "m.bin"), models, Checkpoint),
        Writer("to version 1", command("convert", files.model, place / "m.bin", "--version", 1), models, Checkpoint),
        Writer("to Hugging Face", command("convert", files.model, f"{place}/hf/"), ["hf"], sound_folder, fresh=True),
        Writer("from Hugging Face", command("convert", files.hf, place / "m.bin"), models, Checkpoint),
        Writer("shards", shards, ["s_train.bin", "s_val.bin"], read_tokens, fresh=True),
        Writer("saved models", [PYTHON, "-c", SAVES, files.model, place / "m.bin"], models, Checkpoint, over_s=0.3),
        Writer("llm.c's other files", others, ["d.bin", "e.bin", "t.bin"], sound_other, over_s=0.3),
        Writer("training", log, ["m.bin", "m.state", "m.state.1", "m.jsonl"], sound_training, again=["--force"]),
        Writer("a vocabulary", own, vocabulary, sound_training, again=["--force"], least=9000),
        Writer("to GGUF", command("quantize", files.model, place / "q.gguf"), ["q.gguf"], lambda path: GGUFFile(path).close()),
        Writer("to panels", command("quantize", files.model, place / "q.safetensors"), ["q.safetensors"], sound_panels),
        Writer("answers", batch, answers, sound_answers, again=["--batch-size", 9], over_s=0.5, least=60_000),
        Writer("traces", traces, TRACES, sound_trace, least=9000),
    ]
    if find_spec("matplotlib") is not None:
        found.append(Writer("pictures", [*profile, "--plot", place], PICTURES, sound_picture, over_s=1.5, least=9000))
    return found


def sound_folder(path: Path) -> None:
    """Raise an exception unless a folder is a model that converts back."""
    outcome = run(command("convert", path, f"{path}.back"))
    Path(f"{path}.back").unlink(missing_ok=True)
    assert outcome.status == 0, outcome


def sound_other(path: Path) -> None:
    """Raise an exception unless a file is llm.c's debug state, examples or vocabulary, as its name says."""
    if path.name == "d.bin":
        read_debug_state(path, BIG)
    elif path.name == "e.bin":
        assert sum(1 for _ in read_examples(path)) == 3000
    else:
        read_tokenizer(path)


def sound_training(path: Path) -> None:
    """Raise an exception unless a file is a model, a training state, a vocabulary, or a log, whose last line may be partial."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
            assert json.loads(line)["step"] == number
    elif path.suffix == ".bin":
        Checkpoint(path).close()
    elif path.suffix == ".json":
        load_tokenizer(path)
    else:
        pygpt.TrainingState(path).close()


def sound_panels(path: Path) -> None:
    """Raise an exception unless a file is a panel file."""
    PanelFile(path).close()


def sound_trace(path: Path) -> None:
    """Raise an exception unless a file is a whole trace."""
    content = path.read_bytes()
    assert path.suffix != ".json" or json.loads(content)["traceEvents"]
    assert len(content) > 10
    assert content.endswith((b"\n", b"}"))


def sound_picture(path: Path) -> None:
    """Raise an exception unless a file is a whole picture."""
    content = path.read_bytes()
    assert content.rstrip().endswith(b"</svg>") or content[-8:-4] == b"IEND"
