"""What a run tells: lines on stdout, a progress bar on a terminal, a log of JSON lines, a picture of the loss."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ...errors import InputError, PyGPTError
from ...formats.files import atomic_file
from ...model import GPT2
from ...reference import SerialGPT2
from ...tokenizer import Tokenizer
from ...training.trainer import Record
from ..console import for_terminal
from ..profile.plots import matplotlib, save
from ..progress import Progress

BEGIN = b'{"step": '  # of a line of the log
PICTURES = (".svg", ".png", ".pdf")
TRAINING = {"color": "#4292c6", "lw": 1.2}
VALIDATION = {"color": "#cb181d", "lw": 1.2, "marker": "o", "ms": 4}


class Report:
    """Prints what happens, and notes it for log and picture."""

    def __init__(self, progress: Progress, log: "Log") -> None:
        self._progress, self._log = progress, log
        self._val_loss: float | None = None

    def step(self, record: Record) -> None:
        """A step was made."""
        self._progress.line(f"step {record.step}: train loss {record.loss:.6f} (took {record.ms:.1f} ms)")
        self._progress.update(record.step + 1, f", loss {record.loss:.4f}, {record.tokens_per_s:.0f} tokens/s")
        self._note(record._asdict())

    def validated(self, step: int, loss: float) -> None:
        """The weights before this step were evaluated: the step's line of the log says so."""
        self._progress.line(f"step {step}: val loss {loss:.6f}")
        self._val_loss = loss

    def sampled(self, step: int, text: str) -> None:
        """The weights before this step made some text."""
        self._progress.line(f"step {step}: sample:\n---\n{for_terminal(text, sys.stdout)}\n---")

    def finished(self, step: int) -> None:
        """All steps were made: what was measured after the last one gets a line of its own in the log."""
        if self._val_loss is not None:
            self._note({"step": step})

    def _note(self, entry: dict[str, Any]) -> None:
        if self._val_loss is not None:
            entry["val_loss"] = self._val_loss
        self._val_loss = None
        self._log.add(entry)


class Log:
    """The entries of a run, one a step: with a path as lines of JSON in a file, with `keep` in `entries` too, for a picture.

    A run that is resumed with `done` steps goes on behind the entries of those: later ones will be made again. Raises
    InputError for an older file that is no such log. A new run, with None, has a new file.
    """

    def __init__(self, path: str | None, done: int | None, *, keep: bool) -> None:
        self._path, self._keep, self._file = path, keep, None
        self.entries: list[dict[str, Any]] = []
        if path is not None:
            with atomic_file(path) as file:
                for entry in earlier(path, done):
                    file.write(encoded(entry))
                    self._kept(entry)
            self._file = open(path, "ab")  # noqa: SIM115 (close() does)

    def _kept(self, entry: dict[str, Any]) -> None:
        if self._keep:
            self.entries.append(entry)

    def add(self, entry: dict[str, Any]) -> None:
        """Note an entry, which is in the file when this returns."""
        self._kept(entry)
        if self._file is not None:
            try:
                self._file.write(encoded(entry))
                self._file.flush()
            except OSError as error:
                raise PyGPTError(f"{self._path}: cannot write the log: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file. What is left to write then is what add() has failed to write, and said so."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def earlier(path: str, done: int | None) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log's first `done` steps. What a kill has left of a last line is left out."""
    if done is None or not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and BEGIN.startswith(line[: len(BEGIN)]):
                return
            try:
                entry = json.loads(line)
                if entry["step"] < done and "loss" in entry:
                    yield entry
            except (ValueError, TypeError, KeyError):
                raise InputError(f"{path}: line {number} is not of a training log: give --log another name") from None


def encoded(entry: dict[str, Any]) -> bytes:
    """An entry as a line."""
    return json.dumps(entry).encode() + b"\n"


def sample(model: "GPT2 | SerialGPT2", tokens: int, seed: int) -> str:
    """Some text of the model's own, drawn by its probabilities after the end of another text; ids where its vocabulary is not
    GPT-2's. The same seed gives the same text."""
    tokenizer = Tokenizer()
    text = model.config.V == tokenizer.V
    begin = [tokenizer.eot if text else 0]
    made = model.generate(begin, max_new_tokens=min(tokens, model.config.maxT - 1), seed=seed)
    return tokenizer.decode(made) if text else " ".join(map(str, made))


def pictures(path: str) -> list[str]:
    """What --plot PATH writes: a picture of this name, or loss.svg and loss.png in this folder."""
    return [path] if path.endswith(PICTURES) else [os.path.join(path, f"loss{suffix}") for suffix in PICTURES[:2]]


def draw(names: list[str], entries: list[dict[str, Any]]) -> None:
    """Draw the loss by step, as pictures of these names."""
    plt = matplotlib()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, style, label in (("loss", TRAINING, "training"), ("val_loss", VALIDATION, "validation")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    axis.set_xlabel("step")
    axis.set_ylabel("mean loss, nats a token")
    axis.legend(frameon=False)
    for name in names:
        save(figure, name)
    plt.close(figure)
