"""Ctrl-C at every moment of a step, a training step, a save and a write. It is never lost, and the work is complete or
undone."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known import state_of
from make_checkpoint import make
from moments import moments, raise_ctrl_c, send_together

from pygpt import GPT2, Config, DataLoader, SerialTrainableGPT2, TrainableGPT2, Trainer, TrainingOptions, TrainingState
from pygpt.formats.files import atomic_file

TINY = Config(maxT=16, V=50, L=1, NH=1, C=16)
WANTED = [1, 2, 3, 4]
UNRAISABLE = "ignore::pytest.PytestUnraisableExceptionWarning"  # Python closes an open file, and says so


@pytest.fixture(params=[1, 3])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[GPT2]:
    path = tmp_path_factory.mktemp("moments") / "model.bin"
    make(path, L=2, NH=3, C=48, V=211, maxT=128, seed=5)
    with GPT2.load(path, threads=request.param) as opened:
        yield opened


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_that_raises_keeps_all_caches(model: GPT2, count: int) -> None:
    wanted, seen = model.logits(WANTED)[-1], 0
    cache = model.new_cache()
    model.prefill(cache, WANTED[:1])
    for came in moments(lambda: model.prefill(cache, WANTED[1 : 1 + count])):
        seen += 1
        assert cache.length == 1 or not came
        cache.truncate(1)
        assert np.array_equal(model.prefill(cache, WANTED[1:]), wanted)
        cache.truncate(1)
    assert seen > (20 if sys.version_info < (3, 13) else 10)  # newer Pythons look for signals at fewer places


class Other(Exception):
    """The exception of another signal's handler."""


STRIKES = {"alone": None, "before": signal.SIGHUP, "after": signal.SIGUSR1}  # Python handles signals by their numbers


@pytest.fixture
def strike(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Ctrl-C alone, or together with another signal whose handler runs before Ctrl-C's or after it."""

    def other(*_: object) -> None:
        raise Other

    number = STRIKES[request.param]
    if request.param == "after" and sys.version_info >= (3, 12) and "filelock" in sys.modules:
        pytest.skip("handlers run in filelock's audit hook, and Python drops what the first one raises there")
    if number is None:
        yield raise_ctrl_c
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(number, other)
    yield partial(send_together, signal.SIGINT, number)
    signal.signal(signal.SIGINT, before[0])
    signal.signal(number, before[1])


@pytest.mark.parametrize("strike", ["before", "after"], indirect=True)
def test_ctrl_c_beside_another_signal_is_not_lost(model: GPT2, strike: Callable[[], None]) -> None:
    """It comes out of the step, or as the context of the other exception; either way no cache has changed."""
    wanted, seen = model.logits(WANTED[:3])[-1], 0
    cache = model.new_cache()
    model.prefill(cache, WANTED[:1])
    for came in moments(lambda: model.prefill(cache, WANTED[1:3]), strike):
        seen += 1
        assert came
        assert cache.length == 1
        assert np.array_equal(model.prefill(cache, WANTED[1:3]), wanted)
        cache.truncate(1)
    assert seen > 10


@pytest.mark.parametrize(
    ("engine", "threads", "strike"),
    [
        (TrainableGPT2, 3, "alone"),
        *((engine, 1, strike) for engine in (TrainableGPT2, SerialTrainableGPT2) for strike in STRIKES),
    ],
    indirect=["strike"],
)
def test_a_training_step_is_complete_or_undone(
    engine: "type[TrainableGPT2 | SerialTrainableGPT2]", threads: int, strike: Callable[[], None], tmp_path: Path
) -> None:
    """And it is counted, and the next one makes the right bits."""
    path, count = tmp_path / "run.state", 0
    seen: set[Any] = set()
    with engine.random(TINY, seed=1, threads=threads) as model:
        loader = DataLoader(np.arange(3000) * 31 % 50, 1, 8, shuffle_seed=1)
        trainer = Trainer(model, loader, TrainingOptions(lr=1e-2, clip=1.0, accumulate=2))
        trainer.step()
        before = state_of(trainer)
        trainer.save(path)
        trainer.step()
        after = state_of(trainer)
        trainer.restore(path)
        for came in moments(trainer.step, strike):
            assert came
            count += 1
            found = state_of(trainer)
            seen.add(found)
            if found == before:
                trainer.step()
                assert state_of(trainer) == after
            trainer.restore(path)
    assert seen == {before, after}
    assert count > 30


@pytest.mark.filterwarnings(UNRAISABLE)
def test_a_save_leaves_the_older_state_or_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # which takes the longest
    path = tmp_path / "run.state"
    with TrainableGPT2.random(TINY, seed=1, threads=1) as model:
        trainer = Trainer(model, DataLoader(np.arange(3000) % 50, 1, 8), TrainingOptions())
        trainer.save(path)
        saved, seen = trainer.done, set()
        for _ in moments(lambda: trainer.save(path)):
            with TrainingState(path) as state:
                assert state.progress.step in (saved, trainer.done)
                seen.add(state.progress.step == trainer.done)
                saved = state.progress.step
            trainer.step()
    assert seen == {False, True}


@pytest.mark.filterwarnings(UNRAISABLE)
def test_a_write_removes_its_temporary_file(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"new")

    (tmp_path / "file").write_text("old")
    count = 0
    for _ in moments(write):
        count += 1
        assert os.listdir(tmp_path) == ["file"]
        assert (tmp_path / "file").read_text() in ("old", "new")
    assert count > 10
