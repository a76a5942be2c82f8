"""Every writer on a failing system: each call in turn fails, is interrupted, or finds no memory. The older file stays complete,
or the new file is complete, and no other file remains."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from limits import full_disk
from running import contents
from targets import ONE, weights

import pygpt
from pygpt import Trainer, TrainingOptions, write_checkpoint, write_debug_state, write_examples, write_tokenizer, write_tokens
from pygpt.formats.huggingface import write_model

CALLS = ("open", "fdopen", "fsync", "mkdir", "replace")  # of os
ERRORS: list[BaseException] = [OSError(number, os.strerror(number)) for number in (errno.EEXIST, errno.ENOSPC)]
ERRORS += [KeyboardInterrupt(), MemoryError()]
IDS = np.zeros((1, 2), np.int32)
TRIES = 12  # more than any writer makes of one call


def save_state(path: Path) -> None:
    with pygpt.TrainableGPT2.random(ONE, seed=1, threads=1) as engine:
        Trainer(engine, pygpt.DataLoader(np.arange(40) % 5, 1, 3), TrainingOptions()).save(path)


def save_folder(path: Path) -> None:
    source = path.with_name(path.name + ".source")
    write_checkpoint(source, ONE, weights(ONE))
    try:
        with pygpt.Checkpoint(source) as checkpoint:
            write_model(str(path), checkpoint, checkpoint.format)
    finally:
        source.unlink()


WRITERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": lambda path: write_checkpoint(path, ONE, weights(ONE)),
    "tokens": lambda path: write_tokens(path, [1, 2, 3]),
    "vocabulary": lambda path: write_tokenizer(path, [b"a", b"b"], 1),
    "examples": lambda path: write_examples(path, [pygpt.Example(0, 1, [1], [[2], [3], [4], [5]])]),
    "debug state": lambda path: write_debug_state(
        path, ONE, pygpt.DebugState(IDS, IDS, np.zeros((1, 2, 5), np.float32), 1.5, weights(ONE))
    ),
    "training state": save_state,
    "folder": save_folder,
}


@pytest.fixture(params=WRITERS, scope="module")
def writer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Callable[[Path], Any], dict[str, bytes]]:
    """A writer, and the files that it writes for the name "file"."""
    place = tmp_path_factory.mktemp("made")
    WRITERS[request.param](place / "file")
    return WRITERS[request.param], contents(place)


def check(place: Path, made: dict[str, bytes], *, older: bool) -> None:
    """Check that a file is complete, or the older file. A training state may also be the previous generation."""
    found = contents(place)
    if older:
        assert found.pop("file.1", b"older") == b"older"
        assert found.get("file", b"older") in (b"older", made["file"])
        assert found or (place / "file.1").exists()
    else:
        assert found in ({}, made)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python closes an open file, and says so
def test_a_call_that_fails(writer: tuple[Callable[[Path], Any], dict[str, bytes]], call: str, tmp_path: Path) -> None:
    write, made = writer
    place, real = tmp_path / "place", getattr(os, call)
    for error, older in product(ERRORS, (False, True) if "file" in made else (False,)):
        for number in range(TRIES):
            place.mkdir()
            if older:
                (place / "file").write_bytes(b"older")
            left = number

            def failing(*arguments: Any, error: BaseException = error, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == -1:
                    raise error
                return real(*arguments, **options)

            with pytest.MonkeyPatch.context() as patch, suppress(Exception, KeyboardInterrupt):
                patch.setattr(os, call, failing)
                write(place / "file")
            check(place, made, older=older)
            shutil.rmtree(place)
            if left >= 0:
                break
        else:
            pytest.fail(f"{call} is called more than {TRIES} times")


def test_a_disk_that_fills_up(writer: tuple[Callable[[Path], Any], dict[str, bytes]], tmp_path: Path) -> None:
    write, made = writer
    (tmp_path / "place").mkdir()
    for size in (0, 100, 1000, max(map(len, made.values())) - 1):
        with full_disk(size), pytest.raises((OSError, pygpt.PyGPTError)):
            write(tmp_path / "place" / "file")
        assert contents(tmp_path / "place") == {}
