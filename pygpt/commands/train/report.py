"""The reports of a training run: lines on stdout, a progress bar on a terminal, a log of JSON lines, a picture of the loss."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ...errors import Closing, InputError, PyGPTError
from ...formats.files import atomic_file
from ...inspection.show import matplotlib, save
from ...tokenizer import tokenizer_of
from ...training.serial import SerialTrainableGPT2
from ...training.trainable import TrainableGPT2
from ...training.trainer import Record
from ..console import Progress, for_terminal

BEGIN = b'{"step": '  # the first bytes of each line of the log
PICTURES = (".svg", ".png", ".pdf")
TRAINING = {"color": "#4292c6", "lw": 1.2}
VALIDATION = {"color": "#cb181d", "lw": 1.2, "marker": "o", "ms": 4}


class Report(Closing):
    """Print the events of a run, and log them: one entry per step, lines of JSON in the file `path` (None: no file).

    keep: keep the entries in `entries`, for a picture. done: the number of steps of a resumed run, or None for a new run. A new
    run begins a new file. A resumed run keeps the entries of its first `done` steps and drops later ones, because it repeats
    those steps. Raises InputError if an older file is not a training log."""

    def __init__(self, progress: Progress, path: str | None, done: int | None, *, keep: bool) -> None:
        self.progress, self._path, self._keep, self._file = progress, path, keep, None
        self.entries: list[dict[str, Any]] = []
        self._val_loss: float | None = None
        if path is not None:
            with atomic_file(path) as file:
                for entry in earlier(path, done):
                    file.write(json.dumps(entry).encode() + b"\n")
                    if keep:
                        self.entries.append(entry)
            self._file = open(path, "ab")  # noqa: SIM115 (close() closes it)

    def step(self, record: Record) -> None:
        """Report a step."""
        self.progress.line(f"step {record.step}: train loss {record.loss:.6f} (took {record.ms:.1f} ms)")
        self.progress.update(record.step + 1, f", loss {record.loss:.4f}, {record.tokens_per_s:.0f} tokens/s")
        self._add(record._asdict())

    def validated(self, step: int, loss: float) -> None:
        """Report the validation loss of the weights before this step. The log's line of this step will contain it."""
        self.progress.line(f"step {step}: val loss {loss:.6f}")
        self._val_loss = loss

    def sampled(self, step: int, text: str) -> None:
        """Report a text that the weights before this step generated."""
        self.progress.line(f"step {step}: sample:\n---\n{for_terminal(text, sys.stdout)}\n---")

    def finished(self, step: int) -> None:
        """Log the validation loss after the last step, if there is one, on a line of its own."""
        if self._val_loss is not None:
            self._add({"step": step})

    def _add(self, entry: dict[str, Any]) -> None:
        """Add an entry and flush the file. Raises PyGPTError if writing fails."""
        if self._val_loss is not None:
            entry["val_loss"], self._val_loss = self._val_loss, None
        if self._keep:
            self.entries.append(entry)
        if self._file is not None:
            try:
                self._file.write(json.dumps(entry).encode() + b"\n")
                self._file.flush()
            except OSError as error:
                raise PyGPTError(f"{self._path}: cannot write the log: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file. An error here repeats one that an event has reported, so ignore it."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()


def earlier(path: str, done: int | None) -> Iterator[dict[str, Any]]:
    """Yield the entries of a log's first `done` steps. Skip an incomplete last line, which a killed run can leave."""
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
                raise InputError(f"{path}: line {number} is not an entry of a training log: give --log another name") from None


def sample(engine: TrainableGPT2 | SerialTrainableGPT2, tokens: int, seed: int) -> str:
    """Return a text that the model generates at random after <|endoftext|>. The same seed gives the same text. If the
    vocabulary has no such token, start with id 0; if it is unknown, return ids."""
    tokenizer = None
    with suppress(InputError):
        tokenizer = tokenizer_of(engine.config)
    begin = [(tokenizer and tokenizer.eot) or 0]
    with engine.model() as model:
        made = model.generate(begin, max_new_tokens=min(tokens, engine.config.maxT - 1), seed=seed)
        return " ".join(map(str, made)) if tokenizer is None else tokenizer.decode(made)


def pictures(path: str) -> list[str]:
    """Return the files that --plot PATH writes: the picture PATH, or loss.svg and loss.png in the folder PATH."""
    return [path] if path.endswith(PICTURES) else [os.path.join(path, f"loss{suffix}") for suffix in PICTURES[:2]]


def draw(names: list[str], entries: list[dict[str, Any]]) -> None:
    """Draw the loss by step into files of these names."""
    plt = matplotlib()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, style, label in (("loss", TRAINING, "training"), ("val_loss", VALIDATION, "validation")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)
    axis.set_xlabel("step")
    axis.set_ylabel("mean loss, nats per token")
    axis.legend(frameon=False)
    for name in names:
        save(figure, name)
    plt.close(figure)
