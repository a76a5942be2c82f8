"""Every kind of program of this project that writes files, and how to see that what it wrote is whole.

A killed program cannot tidy up: it may leave files NAME.*.tmp and temporary folders beside its target, and a download its
NAME.part, with which the next one goes on. Nothing else may be left, and the target is whole, absent, or the older one.
"""

import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Self, TypeVar

from pygpt import (
    GPT2,
    Checkpoint,
    Config,
    PyGPTError,
    TrainingState,
    read_debug_state,
    read_examples,
    read_tokenizer,
    read_tokens,
    write_tokens,
)

from .common import BEGIN, ROOT, SHAPE, Outcome, make_model, run

T = TypeVar("T")
BIG = Config(maxT=256, V=5000, L=4, NH=4, C=128)  # large enough that writing it takes a while
LONG = Config(maxT=20000, V=211, L=2, NH=3, C=48)  # its cache takes 30 MB
PYTHON = sys.executable
TOOLS = ROOT / "tools"
TRAINING = ["-B", 1, "-T", 8, "--save-every", 1, "--sample-every", 0, "-t", 1]
PIECE_BYTES, PIECE_S = 1 << 16, 0.001  # how the server of downloads sends


class Files:
    """What all scenarios use, made once, and a server that has the model for downloads. Use it in a `with` block.

    few: try so many cases of each kind only, chosen at random (default: all).
    """

    def __init__(self, place: Path, *, few: int | None = None) -> None:
        self.few = few
        self.model = make_model(place / "model.bin", BIG)
        self.bf16 = make_model(place / "bf16.bin", BIG, version=5)
        self.long = make_model(place / "long.bin", LONG, sharp=9)
        self.small = make_model(place / "small.bin", sharp=9)
        self.text = str(place / "text.txt")
        Path(self.text).write_text("To be, or not to be.\n\n" * 9000)
        self.tokens = str(place / "tokens.bin")
        write_tokens(self.tokens, [i * i % SHAPE.V for i in range(500)])
        self.hf = str(place / "hf")
        outcome = run([PYTHON, "-m", "pygpt.commands.convert", self.model, self.hf + "/"])
        assert outcome.status == 0, outcome
        with GPT2.load(self.small, threads=1) as model:
            self.answer = list(model.generate([1, 2], total=10))
        self.site = Site(Path(self.model).read_bytes())

    def some(self, cases: Sequence[T], rng: random.Random) -> Sequence[T]:
        """The cases, or a few of them in their order."""
        if self.few is None or self.few >= len(cases):
            return cases
        return [cases[i] for i in sorted(rng.sample(range(len(cases)), self.few))]

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.site.close()


class Site(ThreadingHTTPServer):
    """A server on this machine that sends some bytes, not too fast, whatever is asked for; from the middle where asked."""

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.data = data
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address of the model."""
        return f"http://127.0.0.1:{self.server_port}/m.bin"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that is killed is no error here."""

    def close(self) -> None:
        """End it."""
        self.shutdown()
        self._thread.join()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Site

    def do_GET(self) -> None:
        """Send the data, or what follows "bytes=N-"."""
        span, data = self.headers.get("Range", "bytes=0-"), self.server.data
        start = min(int(span.removeprefix("bytes=").removesuffix("-")), len(data) - 1)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", '"one"')
        self.end_headers()
        for piece in range(start, len(data), PIECE_BYTES):
            self.wfile.write(data[piece : piece + PIECE_BYTES])
            time.sleep(PIECE_S)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class calls it so)
        """Stay quiet."""


class Writer:
    """A program that writes `targets` in an empty folder, where older ones may be; sound() raises for one that is not whole.

    fresh: it refuses to replace older files; `again` makes it. over_s: about how long it writes, once it has begun. least: no
    more bytes than its first target has.
    """

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
        """Whether every target is absent or whole."""
        for target in self.targets:
            if (place / target).exists():
                try:
                    self.sound(place / target)
                except (PyGPTError, OSError, ValueError, AssertionError):
                    return False
        return True

    def leftovers(self, place: Path) -> list[str]:
        """What is in a folder beside the targets."""
        return sorted({path.name for path in place.iterdir()} - {target.split("/")[0] for target in self.targets})

    def temporary(self, name: str) -> bool:
        """Whether a file or folder is what a killed writer may leave."""
        parts = {f"{target}{ending}" for target in self.targets for ending in (".part", ".part.json")}
        return name.endswith(".tmp") or name in parts or any(name.startswith(f".{target[:1]}") for target in self.targets)

    def begun(self, place: Path) -> bool:
        """Whether it has begun to write."""
        return any(place.iterdir()) if self.fresh else bool(self.leftovers(place))

    def clear(self, place: Path) -> None:
        """Remove the targets."""
        for target in self.targets:
            remove(place / target)


SAVES = """
import sys
from pygpt import TrainableGPT2
from pygpt.commands.console import status_of

def job():
    with TrainableGPT2.load(sys.argv[1], threads=1) as model:
        for version in (3, 5, 1, 3, 5, 1, 3):
            model.save(sys.argv[2], version=version)

sys.exit(status_of(job))
"""
OTHERS = """
import sys
import numpy as np
from pygpt import *
from pygpt.commands.console import status_of

def job():
    with TrainableGPT2.load(sys.argv[1], threads=1) as model:
        ids = np.arange(64).reshape(2, 32)
        losses = model.forward(ids, ids)
        model.backward()
        gradients = {name: model.gradient(name) for name, _, _, _ in model.config.tensors(padded=False)}
        logits = np.zeros((2, 32, model.config.V), np.float32)
        for number in range(3):
            state = DebugState(ids.astype(np.int32), ids.astype(np.int32), logits, float(losses.mean()), gradients)
            write_debug_state(sys.argv[2], model.config, state)
            write_examples(sys.argv[3], (Example(i, i % 4, [1] * 40, [[2] * 30] * 4) for i in range(3000)))
            write_tokenizer(sys.argv[4], [b"%d" % i for i in range(60000)], 7)

sys.exit(status_of(job))
"""


def writers(files: Files, place: Path) -> list[Writer]:
    """Every kind of write."""
    convert = [PYTHON, "-m", "pygpt.commands.convert"]
    train = [PYTHON, TOOLS / "train.py", "--data", files.tokens, "--init", files.small, "--out", place / "m.bin", *TRAINING]
    download = [PYTHON, "-m", "pygpt.commands.download", files.site.url, "-o", place / "m.bin"]
    profile = [PYTHON, TOOLS / "profile.py", "-m", files.small, "--tokens", "1,2", "-n", 8, "-r", 1, "--skip", "all"]
    found = [
        Writer("to bfloat16", [*convert, files.model, place / "m.bin"], ["m.bin"], sound_model),
        Writer("to version 1", [*convert, files.model, place / "m.bin", "--version", 1], ["m.bin"], sound_model),
        Writer("to Hugging Face", [*convert, files.model, f"{place}/hf/"], ["hf"], sound_folder, fresh=True),
        Writer("from Hugging Face", [*convert, files.hf, place / "m.bin"], ["m.bin"], sound_model),
        Writer("download", download, ["m.bin"], sound_model, fresh=True, over_s=0.3),
        Writer("download, converted", [*download, "--version", 5], ["m.bin"], sound_model, fresh=True, over_s=0.3),
        Writer(
            "shards",
            [PYTHON, TOOLS / "shards.py", files.text, "-o", place / "s", "--val-fraction", ".1"],
            ["s_train.bin", "s_val.bin"],
            read_tokens,
            fresh=True,
        ),
        Writer("saved models", [PYTHON, "-c", BEGIN + SAVES, files.model, place / "m.bin"], ["m.bin"], sound_model, over_s=0.3),
        Writer(
            "llm.c's other files",
            [PYTHON, "-c", BEGIN + OTHERS, files.model, place / "d.bin", place / "e.bin", place / "t.bin"],
            ["d.bin", "e.bin", "t.bin"],
            sound_other,
            over_s=0.3,
        ),
        Writer(
            "training",
            [*train, "--steps", 12, "--log", place / "m.jsonl"],
            ["m.bin", "m.state", "m.state.1", "m.jsonl"],
            sound_training,
            again=["--force"],
        ),
        Writer("traces", [*profile, "--trace", place / "t.json", "--paraver", place / "p"], TRACES, sound_trace, least=9000),
    ]
    if find_spec("matplotlib") is not None:
        found.append(Writer("pictures", [*profile, "--plot", place], PICTURES, sound_picture, over_s=1.5, least=9000))
    return found


TRACES = ["t.json", "p.prv", "p.pcf", "p.row"]
PICTURES = [f"{name}.{kind}" for name in ("hotspots", "timeline", "speedup") for kind in ("svg", "png")]


def sound_model(path: Path) -> None:
    """Raise an exception unless a file is a model."""
    Checkpoint(path).close()


def sound_folder(path: Path) -> None:
    """Raise an exception unless a folder is a model that converts back."""
    outcome = run([PYTHON, "-m", "pygpt.commands.convert", path, f"{path}.back"])
    Path(f"{path}.back").unlink(missing_ok=True)
    assert outcome.status == 0, outcome


def sound_other(path: Path) -> None:
    """Raise an exception unless a file is llm.c's debug state, examples or vocabulary, as its name says; or an older model."""
    try:
        sound_model(path)
    except PyGPTError:
        if path.name == "d.bin":
            read_debug_state(path, BIG)
        elif path.name == "e.bin":
            assert sum(1 for _ in read_examples(path)) == 3000
        else:
            read_tokenizer(path)


def sound_training(path: Path) -> None:
    """Raise an exception unless a file is a model, a training state, or a log of which the last line may be cut off."""
    if path.suffix == ".bin":
        sound_model(path)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
            assert json.loads(line)["step"] == number
    else:
        TrainingState(path).close()


def sound_trace(path: Path) -> None:
    """Raise an exception unless a file is a whole trace; or an older model."""
    try:
        sound_model(path)
    except PyGPTError:
        content = path.read_bytes()
        if path.suffix == ".json":
            assert json.loads(content)["traceEvents"]
        assert len(content) > 10
        assert content.endswith((b"\n", b"}"))


def sound_picture(path: Path) -> None:
    """Raise an exception unless a file is a whole picture; or an older model."""
    try:
        sound_model(path)
    except PyGPTError:
        content = path.read_bytes()
        assert content.rstrip().endswith(b"</svg>") or content[-8:-4] == b"IEND"


def put_older(files: Files, place: Path, writer: Writer) -> None:
    """Put older files where a writer's targets go, unless it would refuse them."""
    for target in () if writer.fresh else writer.targets:
        shutil.copy(files.small, place / target)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def ids_of(outcome: Outcome) -> list[int]:
    """The ids that a command has printed."""
    return [int(word) for word in outcome.out.split()]
