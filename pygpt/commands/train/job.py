"""The definition of a training run: its options, data, files and reports, and the part that a training state stores."""

import dataclasses
import glob
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...config import Config
from ...errors import Closing, DataError, InputError, PyGPTError, is_whole, real, shown
from ...formats.checkpoint import check_plain
from ...formats.files import atomic_file, check_writable
from ...formats.llmc import read_tokens
from ...formats.open import Kept, open_floats, vocabulary_beside
from ...formats.text import joined, read_text, tokens_and_labels
from ...hub.find import find_model
from ...inspection.show import matplotlib, save
from ...tokenizer import GPT2_V, Tokenizer, tokenizer_of
from ...training.data import DataLoader, matching, split
from ...training.parameters import MOST_MICRO_BATCHES, MOST_PARTS, MOST_STEPS, TrainingOptions
from ...training.state import TrainingState
from ...training.trainable import SerialTrainableGPT2, TrainableGPT2
from ...training.trainer import Record
from ..console import Progress, for_terminal, say

SHAPES = {
    "gpt2": {"L": 12, "NH": 12, "C": 768},
    "gpt2-medium": {"L": 24, "NH": 16, "C": 1024},
    "gpt2-large": {"L": 36, "NH": 20, "C": 1280},
    "gpt2-xl": {"L": 48, "NH": 25, "C": 1600},
}
GPT2_MAXT = 1024
MOST = 1 << 30
# Limits of whole numbers, on the command line and, for a job's, in a training state.
WHOLE = dict.fromkeys(("val_tokens", "B", "T", "val_every", "val_batches", "sample_tokens", "patience"), (1, MOST))
WHOLE |= dict.fromkeys(("sample_every", "save_every"), (0, MOST)) | {"version": (3, 5), "threads": (1, 256)}
WHOLE |= {"seed": (0, 2**64 - 1), "train_tokenizer": (257, 1 << 16), "timeout": (1, 10**6)}
WHOLE |= {"steps": (1, MOST_STEPS), "warmup": (0, MOST_STEPS), "accumulate": (1, MOST_MICRO_BATCHES)}
WHOLE |= dict.fromkeys(("parts", "ranks"), (1, MOST_PARTS))
RANDOM = "random"  # the value of --init for random weights
BEST = "best"  # the field of a training state with the best validation loss and its step
SHARD = ".bin"  # data files with another ending are text
FOLDERLESS = ".safetensors"  # the ending of model files that can describe every model
VALUE_BYTES = {3: 4, 5: 2}  # by the model file's version
BEGIN = b'{"step": '  # the first bytes of each line of the log
PICTURES = (".svg", ".png", ".pdf")
TRAINING = {"color": "#4292c6", "lw": 1.2}
VALIDATION = {"color": "#cb181d", "lw": 1.2, "marker": "o", "ms": 4}
Source = tuple["list[str] | npt.NDArray[Any]", "npt.NDArray[Any] | None"]  # shards, or tokens; labels or None
# The stored position in the data depends on these.
FIXED = ("val_tokens", "val_fraction", "B", "T", "seed", "shuffle", "field", "no_special")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The options that a training state stores besides TrainingOptions. Raises InputError for a value out of its range.
    A value of a wrong type, which only another program's state can contain, raises TypeError."""

    data: str
    val: str | None = None
    val_tokens: int | None = None
    val_fraction: float | None = None
    B: int = 4
    T: int = 64
    seed: int = 1
    shuffle: bool = False
    field: str | None = None
    no_special: bool = False
    reference: bool = False
    val_every: int = 10
    val_batches: int = 5
    sample_every: int = 20
    sample_tokens: int = 64
    save_every: int = 100
    keep_best: bool = False
    patience: int | None = None
    version: int = 3
    log: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if not isinstance(value, field.type):  # type: ignore[arg-type]  # the annotations are types, not strings
                raise TypeError(f"{name} is {shown(value)}")
            if isinstance(value, str) and not is_name(value):
                raise InputError(f"{flag(name)} is {shown(value)}: it must be the name of a file")
            low, high = WHOLE.get(name, (0, 0))
            if name in WHOLE and value is not None and not is_whole(value, low, high):
                raise InputError(f"{flag(name)} is {shown(value)}: it must be a whole number from {low} to {high}")
        if self.version not in VALUE_BYTES:
            raise InputError(f"--version is {self.version}: it must be 3 (float32) or 5 (bfloat16)")
        if (self.patience or self.keep_best) and not (self.val or self.val_tokens or self.val_fraction):
            raise InputError("--keep-best and --patience need validation data: give --val, --val-tokens or --val-fraction")


def is_name(text: str) -> bool:
    """Return whether a file can have this name."""
    try:
        return text != "" and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


JOB = {field.name for field in dataclasses.fields(Job)}
OPTIMIZER = {field.name for field in dataclasses.fields(TrainingOptions)}
PATHS = ("data", "val", "log", "plot")  # stored as absolute paths, so that a run can be resumed from another folder


def new(given: dict[str, Any]) -> tuple[Job, TrainingOptions]:
    """Return the job and the optimizer's options of a new run. Raises InputError for missing or bad options."""
    if "data" not in given:
        raise InputError("--data is missing: name a text file, or llm.c's token shards (.bin)")
    if sum(name in given for name in ("val", "val_tokens", "val_fraction")) > 1:
        raise InputError("--val, --val-tokens and --val-fraction exclude each other: give at most one of them")
    return Job(**_job_part(given)), TrainingOptions(**{name: given[name] for name in OPTIMIZER & set(given)})


def resumed(given: dict[str, Any], state: TrainingState) -> tuple[Job, TrainingOptions, list[str]]:
    """Return a resumed run's job, its TrainingOptions, and a notice for each given option that differs from the state's."""
    for name in ("init", "shape", "chars", "train_tokenizer"):
        if name in given:
            kept = "the weights" if name in ("init", "shape") else "weights for its vocabulary"
            raise InputError(
                f"{flag(name)} and --resume were both given, but the state contains {kept}: leave out {flag(name)}"
            )
    try:
        job = Job(**{name: value for name, value in state.progress.job.items() if name != BEST})
    except (TypeError, InputError):
        raise InputError(f"{state.path}: pygpt train did not write this state: read it with Trainer.restore()") from None
    for path in pictures(job.plot) if job.plot is not None and "plot" not in given else ():
        if os.path.lexists(path) and os.path.dirname(os.path.realpath(path)) != os.path.dirname(state.path):
            # A state from an unknown author could otherwise overwrite any file.
            raise InputError(f"{path}: exists already outside the state's folder: to replace it, give --plot again")
    part, old = _job_part(given), vars(job)
    for name in FIXED:
        if name in part and part[name] != old[name]:
            raise InputError(f"{flag(name)} is {part[name]}, but the state has {old[name]}: leave it out, or start a new run")
    if part.get("val") and (job.val_tokens or job.val_fraction):
        raise InputError("--val was given, but this run validates on a part of --data: leave it out, or start a new run")
    settings = {name: given[name] for name in OPTIMIZER & set(given)}
    before, done = state.progress.options, state.progress.step
    if settings.get("steps", done) < done:
        raise InputError(f"--steps is {settings['steps']}, but the state has {done}: give a larger total, or leave --steps out")
    changes = [(name, old[name], value) for name, value in part.items()]
    changes += [(name, getattr(before, name), value) for name, value in settings.items()]
    notices = [f"{flag(name)} changes from {was} to {value}" for name, was, value in changes if value != was]
    return dataclasses.replace(job, **part), dataclasses.replace(before, **settings), notices


def _job_part(given: dict[str, Any]) -> dict[str, Any]:
    part, here = {name: given[name] for name in JOB & set(given)}, os.getcwd()
    for name in PATHS:  # files or patterns
        if name in part:
            part[name] = os.path.join(here if os.path.lexists(part[name]) else glob.escape(here), part[name])
    return part


def flag(name: str) -> str:
    """Return an option as it is written on the command line."""
    return f"-{name}" if name in ("B", "T") else f"--{name.replace('_', '-')}"


def shape_of(text: str, V: int = GPT2_V) -> Config:
    """Read the value of --shape: a name, or L=4,NH=4,C=128,maxT=256[,V=50257]. V: the default of its V."""
    if text in SHAPES:
        return Config(V=V, maxT=GPT2_MAXT, **SHAPES[text])
    parts = [re.fullmatch(r"(L|NH|C|maxT|V)=([0-9]{1,9})", part.strip()) for part in text.split(",")]
    found = {part[1]: int(part[2]) for part in parts if part}
    if None in parts or len(found) < len(parts) or {"L", "NH", "C", "maxT"} - set(found):
        raise InputError(f"--shape is {text[:60]!r}: it must be one of {', '.join(SHAPES)}, or like L=4,NH=4,C=128,maxT=256")
    return Config(**{"V": V, **found})


def beginning(given: dict[str, Any]) -> tuple[Config, str | None]:
    """Return the dimensions of a new run's model, and the path of its first checkpoint; None for random weights."""
    init, shape = given.get("init"), given.get("shape")
    if init == RANDOM or (init is None and shape is not None):
        if shape is None:
            raise InputError("--init random needs --shape: give gpt2, or a shape such as L=4,NH=4,C=128,maxT=256")
        tokenizer = new_vocabulary(given)
        return with_tokenizer(shape_of(shape, GPT2_V if tokenizer is None else tokenizer.V), tokenizer), None
    if shape is not None:
        raise InputError(f"--shape and --init {init} were both given, but the checkpoint has a shape already: give one of them")
    path, origin = find_model(init)
    if origin == "embedded":
        say("training the small embedded Shakespeare model; for another model use --init, for random weights --shape")
    if made := {"train_tokenizer", "chars"} & {*given}:
        raise InputError(f"{flag(*made)} makes a vocabulary, which a trained model cannot know: begin with --shape")
    with open_floats(path) as checkpoint:
        return with_tokenizer(checkpoint.config, new_vocabulary(given)), path


def with_tokenizer(config: Config, tokenizer: Tokenizer | None) -> Config:
    """Let a config have this tokenizer, if there is one; return the config. Raises InputError if the model has fewer ids."""
    if tokenizer is not None:
        config.tokenizer = Kept("", config.V, Tokenizer(tokenizer.vocabulary(), V=config.V))
    return config


def open_data(job: Job, config: Config) -> tuple[DataLoader, DataLoader | None]:
    """Return the loaders of training and validation data (None without validation). Every id is checked against V."""
    seed, V = job.seed if job.shuffle else None, config.V
    if job.val_tokens is None and job.val_fraction is None:
        train = _loader(job, job.data, _source(job, job.data, config), V, seed=seed)
        return train, None if job.val is None else _loader(job, job.val, _source(job, job.val, config), V, use="validation: ")
    tokens, labels = _source(job, job.data, config)
    if isinstance(tokens, list):
        if len(tokens) > 1:
            raise InputError(f"{job.data}: {len(tokens)} shards cannot be split: name a shard for validation with --val")
        tokens = read_tokens(tokens[0], V=V)
    sizes: dict[str, Any] = {"val_tokens": job.val_tokens, "val_fraction": job.val_fraction}
    left, right = split(tokens, **sizes)
    left_labels, right_labels = (None, None) if labels is None else split(labels, **sizes)
    train = _loader(job, job.data, (left, left_labels), V, seed=seed)
    return train, _loader(job, job.data, (right, right_labels), V, use="validation: ")


def _loader(job: Job, name: str, source: Source, V: int, *, seed: int | None = None, use: str = "") -> DataLoader:
    """Return a loader. Validation is not shuffled: every evaluation uses the same batches."""
    tokens, labels = source
    try:
        return DataLoader(tokens, job.B, job.T, shuffle_seed=seed, V=V, labels=labels)
    except DataError as error:
        where = f"{name}: " if isinstance(tokens, np.ndarray) else ""  # an error of shards names one already
        raise DataError(f"{use}{where}{error}") from None


def _source(job: Job, pattern: str, config: Config) -> Source:
    """Return the shards that a file name or pattern matches, as a list of names; or, for text files, tokens and labels."""
    names, text = files_of_data(pattern)
    if not text:
        return names, None
    reading: dict[str, Any] = {"allow_special": not job.no_special, "tokenizer": tokenizer_of(config)}
    parts = [tokens_and_labels(name, job.field, **reading) for name in names]
    tokens = joined([part for part, _ in parts])
    if all(labels is None for _, labels in parts):
        return tokens, None
    return tokens, np.concatenate([part.astype(np.int32) if labels is None else labels for part, labels in parts])


def files_of_data(pattern: str) -> tuple[list[str], bool]:
    """Return the files that a name or pattern matches, and whether they are text. Raises DataError for none, or both kinds."""
    names = matching(pattern, "check the name")
    shards = [name for name in names if name.endswith(SHARD)]
    if len(shards) == len(names):
        return shards, False
    for name in names:
        if os.path.isdir(name):
            raise DataError(f"{name}: a folder: name its files by a pattern in quotes, such as {os.path.join(name, '*.bin')!r}")
        if os.path.exists(name) and not os.path.isfile(name):
            raise DataError(f"{name}: not a regular file: save it as a file first, so that --resume can read the text again")
    if shards:
        raise DataError(f"{pattern!r}: {shards[0]} has tokens, but {min({*names} - {*shards})} is text: train on one kind")
    return names, True


def new_vocabulary(given: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that the options ask for: a file's, or one made from the text of --data. None without an option."""
    asked = [name for name in ("tokenizer", "train_tokenizer", "chars") if name in given]
    if not asked:
        return None
    if len(asked) > 1:
        raise InputError(f"{flag(asked[0])} and {flag(asked[1])} were both given: give one of them")
    from ...formats.vocabulary import characters_of, load_tokenizer, trained_on

    if "tokenizer" in given:
        return load_tokenizer(given["tokenizer"])
    names, text = files_of_data(given["data"])
    if not text:
        raise InputError(f"{flag(asked[0])} makes a vocabulary from text, but {names[0]} holds tokens: give text as --data")
    pieces = (piece for name in names for piece in read_text(name))
    made = Tokenizer(characters_of(pieces) if "chars" in given else trained_on(pieces, given["train_tokenizer"]))
    if given.get("train_tokenizer", 0) > made.V:
        say(f"--train-tokenizer is {given['train_tokenizer']}, but the text gives only {made.V} ids")
    return made


class Output(NamedTuple):
    """The files in which a run saves the model and the training state."""

    model: str
    state: str
    best: str  # the model with the best validation loss

    @classmethod
    def named(cls, name: str, config: Config) -> "Output":
        """Return the files of --out STEM, STEM.bin or STEM.safetensors. Raises InputError for a name that cannot be a file.
        Without an ending, a model that a .bin file cannot describe is written as STEM.safetensors."""
        ending = next((ending for ending in (SHARD, FOLDERLESS) if name.endswith(ending)), "")
        stem = name.removesuffix(ending)
        if not os.path.basename(stem) or os.path.isdir(name):
            raise InputError(f"--out is {name!r}: it must be the name of a file, such as run.bin")
        ending = ending or (FOLDERLESS if config.variations else SHARD)
        if ending == SHARD:
            check_plain(config, f"{stem}{SHARD}")
        return cls(f"{stem}{ending}", f"{stem}.state", f"{stem}.best{ending}")

    @classmethod
    def of_state(cls, state: str, config: Config) -> "Output":
        """Return the files in which the run of a training state saved before. Raises InputError for an unusual name."""
        stem = re.fullmatch(r"(.*[^/])\.state(\.1)?", state, re.DOTALL)
        if not stem:
            raise InputError(f"--resume is {state!r}, which does not end in .state: name the new files with --out")
        return cls.named(stem[1], config)


def best_of(state: TrainingState | None) -> tuple[float, int] | None:
    """Return the best validation loss of a state's run, and its step; None if there is none."""
    found = None if state is None else state.progress.job.get(BEST)
    if not isinstance(found, list) or len(found) != 2 or not is_whole(found[1], 0, MOST) or not math.isfinite(real(found[0])):
        return None
    return float(found[0]), int(found[1])


def files_of(state: TrainingState) -> set[str]:
    """Return the files that the run of a state wrote, with links resolved. A resumed run may replace them."""
    path = state.path.removesuffix(".1")  # .1 is the previous generation
    endings = SHARD, FOLDERLESS, f".best{SHARD}", f".best{FOLDERLESS}"
    models = [path.removesuffix(".state") + ending for ending in endings]
    log, plot = state.progress.job.get("log"), state.progress.job.get("plot")
    names = [*models, *map(vocabulary_beside, models[:2]), path, f"{path}.1", log, *(pictures(plot) if plot else ())]
    return {os.path.realpath(name) for name in names if name}


def prepare(job: Job, config: Config, output: Output | None, state: TrainingState | None, *, force: bool) -> None:
    """Raise an error before training if its results cannot be saved; remove files of killed runs. `state` may be replaced."""
    mine = set() if state is None else files_of(state)
    written = [*([] if output is None else output[: 2 + job.keep_best]), *filter(None, [job.log])]
    if output is not None and config.tokenizer is not None:
        written.append(vocabulary_beside(output.model))
    older = [] if output is None else [f"{output.state}.1"]
    drawings = [] if job.plot is None else pictures(job.plot)
    drawn = {*drawings, *filter(None, [job.plot])}  # include the name of a folder of pictures
    used = [*written, *older, *sorted(drawn), *filter(None, [job.data, job.val])]
    names = [os.path.realpath(path) for path in used]
    for path, name in zip(used, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path}: was given for two uses: data, --out, --log and --plot must be different files")
    for path in () if force else (*written, *older, *drawings):
        if os.path.realpath(path) not in mine and os.path.lexists(path):
            raise InputError(f"{path}: exists already: give another name, --force to replace it, or --resume to continue it")
    for path in drawings:
        check_writable(path, make_folder=True)
    if drawings:
        matplotlib()  # if it is missing, report that now
    for path in written:
        check_writable(path)
        stem = os.path.realpath(path)
        for left in glob.glob(f"{glob.escape(stem)}.*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{8}\.tmp", left[len(stem) :]):  # the names that atomic_file() chooses
                os.unlink(left)
                say(f"removed {left}, a temporary file of a killed run")
    if output is not None:  # room for one state and one model, or two models with --keep-best
        needed = (3 * 4 + VALUE_BYTES[job.version] * (1 + job.keep_best)) * config.parameters(padded=True)
        folder = os.path.dirname(os.path.realpath(output.state))
        if (free := shutil.disk_usage(folder).free) < needed:
            raise PyGPTError(f"{folder}: {free} bytes are free, but state and model take {needed}: make room or save elsewhere")


class Report(Closing):
    """Print the events of a run, and log them as lines of JSON in the file `path` (None: no file).

    keep: keep the log's entries in `entries`, for a picture. done: the number of steps of a resumed run, whose log keeps the
    entries of only these steps; None for a new run and log. Raises InputError if an older file is not a training log."""

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
        """Report a step, to the log first: if stdout is closed, the run is saved with this step, and so is its log."""
        self._add(record._asdict())
        self.progress.line(f"step {record.step}: train loss {record.loss:.6f} (took {record.ms:.1f} ms)")
        self.progress.update(record.step + 1, f", loss {record.loss:.4f}, {record.tokens_per_s:.0f} tokens/s")

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

    def draw(self, plot: str | None) -> None:
        """Draw the loss by step into the files of --plot, if it was given."""
        if plot is None:
            return
        names = pictures(plot)
        if not any("loss" in entry for entry in self.entries):
            say(f"did not write {' and '.join(names)}: this run did not make steps, and does not have a --log")
            return
        plt = matplotlib()
        figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
        for key, style, label in (("loss", TRAINING, "training"), ("val_loss", VALIDATION, "validation")):
            points = [(entry["step"], entry[key]) for entry in self.entries if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_xlabel("step")
        axis.set_ylabel("mean loss, nats per token")
        axis.legend(frameon=False)
        for name in names:
            save(figure, name)
        plt.close(figure)
        say(f"wrote {' and '.join(names)}")

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
