"""Optimizer options, the trainer and training states: recorded results of PyTorch, the engine called by hand, and files read
and damaged without the package."""

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import re
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import make
from running import gist

import pygpt
from pygpt import CheckpointError, Config, DataLoader, InputError, TrainableGPT2, Trainer, TrainingOptions, TrainingState
from pygpt.training import state as state_module
from pygpt.training.parameters import cos_pi

CONFIG = Config(maxT=8, V=31, L=1, NH=2, C=4)
P = CONFIG.parameters(padded=True)
TOKENS = np.random.default_rng(3).integers(0, 31, 200)
ENGINES = [TrainableGPT2, pygpt.SerialTrainableGPT2]
Engine = TrainableGPT2 | pygpt.SerialTrainableGPT2
HEADER_BYTES, SUM_BYTES = 1024, 32
MB = 1 << 20


def trainer(
    kind: type[Engine] = TrainableGPT2, *, seed: int | None = 5, threads: int = 1, weights: int = 1, **options: Any
) -> Trainer:
    """A small one; `seed` shuffles."""
    engine = kind.random(CONFIG, seed=weights, threads=threads)
    return Trainer(engine, DataLoader(TOKENS, 2, 8, shuffle_seed=seed, V=31), TrainingOptions(**options))


def contents(found: Trainer) -> list[bytes]:
    engine = found.engine
    return [array.tobytes() for array in (engine.parameters, engine.first_moments, engine.second_moments)]


def steps(found: Trainer, count: int) -> list[tuple[float, ...]]:
    """Make steps. Return their records without the times."""
    return [found.step()[:4] for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Options and schedule


def test_defaults_are_those_of_llm_c() -> None:
    found = TrainingOptions()
    assert (found.steps, found.lr, found.beta1, found.beta2, found.eps, found.weight_decay) == (40, 1e-4, 0.9, 0.999, 1e-8, 0.0)
    assert (found.clip, found.accumulate, found.warmup, found.decay_matrices_only) == (0.0, 1, 0, False)
    assert {found.learning_rate(step) for step in range(100)} == {1e-4}


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("steps", 0, "1 to 2147483647"),
        ("steps", 1.0, "whole"),
        ("steps", True, "True"),
        ("lr", -1e-4, "-0.0001"),
        ("lr", 2, "0 to 1"),
        ("lr", math.nan, "nan"),
        ("lr", "1e-4", "'1e-4'"),
        ("lr", True, "True"),
        ("min_lr", 2e-4, "0 to 0.0001"),
        ("beta1", 1.0, "0.9999999"),
        ("beta2", 1.0, "0.9999999"),
        ("beta2", -0.1, "-0.1"),
        ("eps", 0, "1e-30"),
        ("weight_decay", math.inf, "inf"),
        ("weight_decay", -1, "-1"),
        ("clip", -1, "-1"),
        ("clip", None, "None"),
        ("accumulate", 0, "1 to 1000000"),
        ("warmup", 41, "0 to 40"),
        ("warmup", -1, "-1"),
        ("schedule", "step", "constant, cosine, linear"),
        ("decay_matrices_only", 1, "True or False"),
    ],
)
def test_options_out_of_range(name: str, value: Any, limit: str) -> None:
    with pytest.raises(InputError, match=rf"^{name} is .*{re.escape(limit)}"):
        TrainingOptions(**{name: value})


def test_numpy_scalars_become_floats() -> None:
    found = TrainingOptions(lr=np.float64(0.01), clip=1)
    assert [type(value) for value in (found.lr, found.clip)] == [float, float]
    assert TrainingOptions(**json.loads(json.dumps(found.as_dict()))) == found


@given(x=st.floats(0, 1))
def test_the_cosine(x: float) -> None:
    assert cos_pi(x) == pytest.approx(math.cos(math.pi * x), abs=2e-15)
    assert -1 <= cos_pi(x) <= 1


def test_the_cosine_where_it_is_known() -> None:
    assert (cos_pi(0.0), cos_pi(1.0)) == (1.0, -1.0)
    assert cos_pi(0.5) == pytest.approx(0, abs=1e-15)


@given(warmup=st.integers(0, 30), more=st.integers(1, 100), low=st.floats(0, 1))
def test_the_schedule(warmup: int, more: int, low: float) -> None:
    found = TrainingOptions(steps=warmup + more, lr=0.5, warmup=warmup, schedule="cosine", min_lr=0.5 * low)
    rates = [found.learning_rate(step) for step in range(warmup + more + 3)]
    assert rates[:warmup] == pytest.approx([0.5 * (step + 1) / warmup for step in range(warmup)])
    assert rates[warmup] == 0.5
    assert rates[warmup + more :] == [found.min_lr] * 3
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    for step in range(warmup, warmup + more):
        wave = math.cos(math.pi * (step - warmup) / more)
        assert rates[step] == pytest.approx(found.min_lr + (0.5 - found.min_lr) * (1 + wave) / 2, abs=1e-14)


def test_the_schedule_has_the_same_bits_everywhere() -> None:
    found = TrainingOptions(steps=100, lr=6e-4, warmup=7, schedule="cosine", min_lr=6e-5)
    rates = struct.pack("<100d", *(found.learning_rate(step) for step in range(100)))
    assert hashlib.sha256(rates).hexdigest() == "c74ab3a2fa1dd60c66ccf6cf3c122c8203c4362087053686da38d5f643201fda"


@given(clip=st.floats(0, 1e10), norm=st.floats(0, 1e10))
def test_clipping(clip: float, norm: float) -> None:
    scale = TrainingOptions(clip=clip).gradient_scale(norm)
    assert 0 < scale <= 1 or (scale == 0 and clip / norm == 0)
    if clip == 0 or norm <= clip:
        assert scale == 1
    else:
        assert scale * norm == pytest.approx(clip)


# ---------------------------------------------------------------------------------------------------------------------
# Steps

# PyTorch in float64: mean loss before each AdamW step, lr 1e-3, on the same batch.
GOLDEN_SHAPE = {"L": 2, "NH": 4, "C": 64, "V": 211, "maxT": 48, "seed": 7}
GOLDEN_LOSSES = [
    7.467828085,
    5.034613201,
    3.638675573,
    2.57517958,
    1.752072109,
    1.154796761,
    0.758856892,
    0.501592883,
    0.327607052,
    0.209931149,
]


@pytest.mark.parametrize("kind", ENGINES)
def test_losses_of_pytorch(tmp_path: Path, kind: type[Engine]) -> None:
    make(tmp_path / "model.bin", **GOLDEN_SHAPE)
    tokens = np.random.default_rng(5).integers(0, 211, 3 * 17 + 1)  # one batch: every epoch has it again
    found = Trainer(kind.load(tmp_path / "model.bin"), DataLoader(tokens, 3, 17, V=211), TrainingOptions(lr=1e-3))
    assert [found.step().loss for _ in GOLDEN_LOSSES] == pytest.approx(GOLDEN_LOSSES, abs=2e-3)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_is_what_the_engine_does_by_hand(kind: type[Engine]) -> None:
    options: dict[str, Any] = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "decay_matrices_only": True}
    found = trainer(kind, seed=None, lr=0.01, accumulate=3, clip=0.1, warmup=2, **options)
    engine, loader = kind.random(CONFIG, seed=1), DataLoader(TOKENS, 2, 8)
    for step in range(4):
        record, losses = found.step(), []
        for part in range(3):
            losses.append(engine.forward(*loader.next_batch()).astype("f8").mean())
            engine.backward(accumulate=part > 0, scale=1 / 3)
        norm, lr = engine.gradient_norm(), 0.01 * min(1, (step + 1) / 2)
        assert norm > 0.1
        engine.update(lr=lr, step=step + 1, gradient_scale=0.1 / norm, **options)
        assert contents(found) == [a.tobytes() for a in (engine.parameters, engine.first_moments, engine.second_moments)]
        assert record[:4] == pytest.approx((step, np.mean(losses), lr, norm), rel=1e-12)
        assert record.ms > 0
        assert record.tokens_per_s == pytest.approx(1000 * 48 / record.ms)


def test_accumulated_batches_are_one_large_batch() -> None:
    many, one = trainer(seed=None, accumulate=4), trainer(seed=None)
    one.loader = DataLoader(TOKENS, 8, 8)
    assert many.step()[1:4] == pytest.approx(one.step()[1:4], rel=1e-5)
    assert many.engine.gradients == pytest.approx(one.engine.gradients, abs=1e-7)


def test_evaluation_changes_nothing() -> None:
    found, other = trainer(), DataLoader(TOKENS[::-1].copy(), 2, 8)
    other.next_batch()
    before = contents(found), other.state(), found.loader.state()
    loss = found.evaluate(other, 3)
    assert (contents(found), other.state(), found.loader.state()) == before
    assert found.evaluate(other, 3) == loss
    by_hand = [found.engine.evaluate(*other.next_batch()).astype("f8").mean() for _ in range(3)]
    assert loss == pytest.approx(np.mean(by_hand))
    with pytest.raises(InputError, match="batches is 0"):
        found.evaluate(other, 0)


def test_longer_sequences_than_the_model_takes() -> None:
    with pytest.raises(InputError, match=r"^T is 9: .* at most 8 tokens"):
        Trainer(TrainableGPT2(CONFIG), DataLoader(TOKENS, 2, 9))


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}, 0.1, TrainingOptions])
def test_options_of_another_type(options: Any) -> None:
    with pytest.raises(InputError, match=r"options.*TrainingOptions"):
        Trainer(TrainableGPT2(CONFIG), DataLoader(TOKENS, 2, 8), options)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(kind: type[Engine], value: float) -> None:
    found = trainer(kind, seed=None)
    steps(found, 3)
    found.engine.tensor("lnfb")[:] = value
    before = contents(found), found.loader.state()
    with pytest.raises(pygpt.NumericalError, match=r"^step 3: .*loss is (nan|inf) .*epoch 0, shard 0, batch 3: "):
        found.step()
    with pytest.raises(pygpt.NumericalError, match=r"^step 3: .*validation loss is (nan|inf) .*epoch 0, shard 0, batch 0: "):
        found.evaluate(DataLoader(TOKENS, 2, 8), 1)
    assert (contents(found), found.loader.state(), found.done) == (*before, 3)


def test_a_norm_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trainer(seed=None, accumulate=2)
    before = contents(found), found.loader.state()
    monkeypatch.setattr(found.engine, "gradient_norm", lambda: math.inf)
    with pytest.raises(pygpt.NumericalError, match=r"^step 0: .*norm is inf .*epoch 0, shard 0, batch 0: "):
        found.step()
    assert (contents(found), found.loader.state(), found.done) == (*before, 0)


def test_a_batch_that_is_refused_can_be_asked_for_again() -> None:
    found = trainer(seed=None)
    found.loader = DataLoader(np.r_[TOKENS[:40], 31, TOKENS[:40]], 2, 8)  # nobody checked its ids
    steps(found, 2)
    before = contents(found), found.loader.state()
    for _ in range(2):
        with pytest.raises(InputError, match="31"):
            found.step()
        assert (contents(found), found.loader.state(), found.done) == (*before, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    total=st.integers(1, 8),
    seed=st.sampled_from([None, 0, 7]),
    options=st.fixed_dictionaries(
        {
            "accumulate": st.integers(1, 3),
            "clip": st.sampled_from([0.0, 0.1, 100.0]),
            "warmup": st.integers(0, 1),
            "schedule": st.sampled_from(["constant", "cosine"]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "decay_matrices_only": st.booleans(),
        }
    ),
)
@pytest.mark.parametrize("kind", ENGINES)
def test_resumed_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    kind: type[Engine],
    data: Any,
    total: int,
    seed: int | None,
    options: dict[str, Any],
) -> None:
    """Two interruptions anywhere do not change records, weights, moments and position."""
    path = tmp_path_factory.mktemp("resume") / "run.state"
    options = {"steps": total, "lr": 0.01, **options}
    straight = trainer(kind, seed=seed, **options)
    expected = steps(straight, total)
    found, said = trainer(kind, seed=seed, **options), []
    for stop in sorted(data.draw(st.lists(st.integers(0, total), min_size=2, max_size=2))):
        said += steps(found, stop - found.done)
        found.save(path)
        found.engine.close()
        found = trainer(kind, seed=seed, weights=2, threads=data.draw(st.integers(1, 3)))  # other weights and options
        assert found.restore(path) == ""
    said += steps(found, total - found.done)
    assert said == expected
    assert (contents(found), found.loader.state()) == (contents(straight), straight.loader.state())
    assert found.options == straight.options
    for each in (found, straight):
        each.engine.close()


def test_the_files_of_a_resumed_run_are_the_same(tmp_path: Path) -> None:
    straight, found = trainer(), trainer()
    steps(straight, 5)
    straight.save(tmp_path / "straight.state", {"note": "ü"})
    steps(found, 2)
    found.save(tmp_path / "found.state")
    other = trainer(weights=3)
    other.restore(tmp_path / "found.state")
    steps(other, 3)
    other.save(tmp_path / "found.state", {"note": "ü"})
    assert (tmp_path / "found.state").read_bytes() == (tmp_path / "straight.state").read_bytes()


@pytest.mark.parametrize(
    ("config", "loader", "named"),
    [
        ({"V": 32}, {}, "V=31"),
        ({"L": 2}, {}, "L=1"),
        ({"maxT": 16}, {}, "maxT=8"),
        ({}, {"B": 4}, "B = 2"),
        ({}, {"T": 4}, "T = 8"),
        ({}, {"shuffle_seed": 6}, "shuffle_seed = 5"),
        ({}, {"source": TOKENS[1:]}, "tokens = 200"),
        ({}, {"source": TOKENS[::-1]}, "fingerprint = "),
    ],
)
def test_states_of_other_runs(tmp_path: Path, config: dict[str, int], loader: dict[str, Any], named: str) -> None:
    trainer().save(tmp_path / "run.state")
    shape = {"maxT": 8, "V": 31, "L": 1, "NH": 2, "C": 4, **config}
    engine = TrainableGPT2.random(Config(**shape), seed=1)
    found = Trainer(engine, DataLoader(**{"source": TOKENS, "B": 2, "T": 8, "shuffle_seed": 5, **loader}))
    found.step()
    before = contents(found), found.loader.state(), found.done
    with pytest.raises(InputError, match=re.escape(named)):
        found.restore(tmp_path / "run.state")
    assert (contents(found), found.loader.state(), found.done) == before


# ---------------------------------------------------------------------------------------------------------------------
# The file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Trainer]:
    """A state's bytes, and the trainer that it was saved from."""
    path = tmp_path_factory.mktemp("saved") / "run.state"
    found = trainer(lr=0.01)
    steps(found, 3)
    found.save(path, {"note": [1, None]})
    return path.read_bytes(), found


def test_the_layout(saved: tuple[bytes, Trainer]) -> None:
    content, found = saved
    header = struct.unpack_from("<256i", content)
    size = header[8]
    assert header == (20261122, 1, 8, 31, 1, 2, 4, 128, size, *[0] * 247)
    text = content[HEADER_BYTES : HEADER_BYTES + size]
    assert json.loads(text) == {
        "step": 3,
        "options": dataclasses.asdict(TrainingOptions(lr=0.01)),
        "loader": found.loader.state(),
        "job": {"note": [1, None]},
    }
    assert size % 64 == 0
    start = HEADER_BYTES + size
    assert [content[start + 4 * i * P : start + 4 * (i + 1) * P] for i in range(3)] == contents(found)
    assert content[start + 12 * P :] == hashlib.sha256(content[:-SUM_BYTES]).digest()
    assert len(content) == start + 12 * P + SUM_BYTES


def refused(path: Path, content: bytes, *named: str) -> None:
    """A file of this content is refused in one line that names it and these."""
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        TrainingState(path)
    for word in (str(path), *named):
        assert re.search(gist(word), str(caught.value))
    assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_anywhere(saved: tuple[bytes, Trainer], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content = bytearray(saved[0])
    place = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, 64), st.integers(1024, 1500)))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    refused(tmp_path_factory.getbasetemp() / "flipped.state", bytes(content))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_another_size(saved: tuple[bytes, Trainer], tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content, path = saved[0], tmp_path_factory.getbasetemp() / "size.state"
    size = data.draw(st.integers(0, len(content) - 1))
    refused(path, content[:size], "truncated", f"{size} bytes")
    refused(path, content + bytes(data.draw(st.integers(1, 100))), f"too long ... {len(content)}")


def summed(content: bytes) -> bytes:
    """The content with the sum that belongs to it."""
    return content[:-SUM_BYTES] + hashlib.sha256(content[:-SUM_BYTES]).digest()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        (0, 20240326, "magic ... 20240326 ... 20261122"),
        (1, 3, "version 3"),
        (1, 2, "F is 0"),
        (2, 0, "maxT is 0"),
        (3, -1, "V is -1"),
        (4, 1000, "L is 1000"),
        (5, 3, "NH = 3"),
        (7, 31, "Vp is 31 ... 128"),
        (4, 2, "truncated"),
        (8, 0, "0 bytes of JSON"),
        (8, -64, "-64 bytes of JSON"),
        (8, 63, "63 bytes of JSON"),
        (8, 1 << 25, "33554432 bytes of JSON"),
        (8, 64, "too long"),
        (9, 1, "reserved"),
        (255, -1, "reserved"),
    ],
)
def test_bad_headers(saved: tuple[bytes, Trainer], tmp_path: Path, field: int, value: int, named: str) -> None:
    content = bytearray(saved[0])
    struct.pack_into("<i", content, 4 * field, value)
    refused(tmp_path / "x.state", summed(bytes(content)), named)


def changed(content: bytes, change: Callable[[dict[str, Any]], object] | bytes) -> bytes:
    """The content with other JSON."""
    size = struct.unpack_from("<i", content, 32)[0]
    if isinstance(change, bytes):
        text = change
    else:
        found = json.loads(content[HEADER_BYTES : HEADER_BYTES + size])
        change(found)
        text = json.dumps(found).encode()
    text += b" " * (-len(text) % 64)
    header = bytearray(content[:HEADER_BYTES])
    struct.pack_into("<i", header, 32, len(text))
    return summed(bytes(header) + text + content[HEADER_BYTES + size :])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (b"{", "bad JSON"),
        (b"\xff", "bad JSON"),
        (b"[]", "bad JSON"),
        (b"[" * 20000, "bad JSON"),
        (b'{"step": 0, "step": 1, "options": {}, "loader": {}, "job": {}}', "JSON ... 'step' ... twice"),
        (b'{"step": 1e999}', "1e999 ... float64"),
        (b'{"step": 0, "options": {}, "loader": {"batch": -1e400}, "job": {}}', "-1e400 ... float64"),
        (lambda found: found.pop("job"), "not the object"),
        (lambda found: found.update(code="import os"), "not the object"),
        (lambda found: found.update(step=-1), "step is -1"),
        (lambda found: found.update(step=True), "step is True"),
        (lambda found: found.update(step=1.5), "step is 1.5"),
        (lambda found: found.update(loader=[]), "objects"),
        (lambda found: found.update(options=None), "objects"),
        (lambda found: found["options"].update(lr=math.nan), "NaN"),
        (lambda found: found["options"].update(lr=-1), "lr is -1"),
        (lambda found: found["options"].update(speed=9), "speed"),
    ],
)
def test_bad_json(saved: tuple[bytes, Trainer], tmp_path: Path, change: Any, named: str) -> None:
    refused(tmp_path / "x.state", changed(saved[0], change), named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda found: found.update(loader={}), "fields"),
        (lambda found: found["loader"].update(batch=10**6), "batch"),
        (lambda found: found["loader"].update(epoch="x"), "epoch"),
    ],
)
def test_bad_positions(saved: tuple[bytes, Trainer], tmp_path: Path, change: Any, named: str) -> None:
    (tmp_path / "x.state").write_bytes(changed(saved[0], change))
    found = trainer()
    before = contents(found)
    with pytest.raises(InputError, match=named):
        found.restore(tmp_path / "x.state")
    assert contents(found) == before


def test_files_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        pygpt.open_state(tmp_path / "missing.state")
    with pytest.raises(CheckpointError, match="regular file"):
        TrainingState(tmp_path)
    os.mkfifo(tmp_path / "fifo.state")
    with pytest.raises(CheckpointError, match="regular file"):
        TrainingState(tmp_path / "fifo.state")


def test_a_closed_state(saved: tuple[bytes, Trainer], tmp_path: Path) -> None:
    (tmp_path / "x.state").write_bytes(saved[0])
    with TrainingState(tmp_path / "x.state") as found:
        assert found.progress.step == 3
        with pytest.raises(InputError, match="buffers of"):
            found.read_into([np.zeros(3, np.float32)] * 3)
    found.close()
    healthy, other = trainer(), trainer()
    place = healthy.loader.state()
    with pytest.raises(pygpt.ClosedError, match="closed"):
        healthy.restore(found)
    assert healthy.loader.state() == place
    assert steps(healthy, 1) == steps(other, 1)


def test_too_much_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="16777216"):
        trainer().save(tmp_path / "x.state", {"note": "x" * (1 << 24)})
    assert os.listdir(tmp_path) == []


def test_it_needs_little_memory(tmp_path: Path) -> None:
    config = Config(maxT=64, V=20000, L=1, NH=1, C=128)
    found = Trainer(TrainableGPT2(config), DataLoader(TOKENS, 2, 8))
    trainer().save(tmp_path / "x.state")  # what is imported once does not count
    tracemalloc.start()
    try:
        found.save(tmp_path / "x.state")
        found.restore(tmp_path / "x.state")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MB < (tmp_path / "x.state").stat().st_size / 20


# ---------------------------------------------------------------------------------------------------------------------
# Two generations


def step_of(path: Path) -> int:
    with TrainingState(path) as found:
        return found.progress.step


def test_the_state_before_is_kept(tmp_path: Path) -> None:
    path, found = tmp_path / "run.state", trainer()
    for expected in (["run.state"], *[["run.state", "run.state.1"]] * 3):
        found.step()
        found.save(path)
        assert sorted(os.listdir(tmp_path)) == expected
        assert step_of(path) == found.done
        if len(expected) > 1:
            assert step_of(tmp_path / "run.state.1") == found.done - 1


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_it_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    path, found = tmp_path / "run.state", trainer()
    for _ in range(2):
        found.step()
        found.save(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-40] + bytes(40) if damage == "flipped" else content[:-1])
    other = trainer(weights=2)
    said = other.restore(path)
    assert re.search(rf"{re.escape(str(path))}'?: .*run\.state\.1 \(step 1\)$", said)
    assert other.done == 1
    steps(other, 1)
    other.save(path)  # the damaged one is replaced, and the good one stays
    assert (step_of(path), step_of(tmp_path / "run.state.1")) == (2, 1)
    assert path.read_bytes() == content
    steps(other, 1)
    other.save(path)
    assert (step_of(path), step_of(tmp_path / "run.state.1")) == (3, 2)


def test_both_are_damaged(tmp_path: Path) -> None:
    for name in ("run.state", "run.state.1"):
        (tmp_path / name).write_bytes(b"x" * 2000)
    with pytest.raises(CheckpointError, match=r"run\.state: magic .*; .*run\.state\.1: magic "):
        pygpt.open_state(tmp_path / "run.state")


def test_another_run_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    """A run never falls back to the state of another one."""
    path, found = tmp_path / "run.state", trainer()
    for _ in range(2):
        found.step()
        found.save(path)
    trainer().save(path)
    assert os.listdir(tmp_path) == ["run.state"]


def test_every_target_of_a_step_has_the_same_weight() -> None:
    """Two batches, of which one has fewer targets, give the loss and the norm of one batch of both."""
    tokens = np.arange(40) % 7
    labels = np.where(np.arange(40) < 7, -100, tokens).astype(np.int32)
    found = []
    for B, accumulate in ((2, 1), (1, 2)):
        with TrainableGPT2.random(Config(maxT=8, V=7, L=1, NH=1, C=8), seed=1, threads=1) as engine:
            record = Trainer(engine, DataLoader(tokens, B, 8, labels=labels), TrainingOptions(accumulate=accumulate)).step()
            found.append((record.loss, record.norm))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_state_is_on_the_disk_before_an_older_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found, calls = tmp_path / "run.state", trainer(), list[str]()
    for _ in range(2):
        found.save(path)

    def noted(name: str, job: Callable[..., object], *given: Any) -> object:
        calls.append(name)
        return job(*given)

    for name in ("fsync", "unlink", "link", "replace"):
        monkeypatch.setattr(os, name, partial(noted, name, getattr(os, name)))
    found.save(path)
    assert calls[0] == "fsync"
    assert {"unlink", "link", "replace"} <= {*calls}


def test_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "run.state").symlink_to(tmp_path / "there" / "real.state")
    found = trainer()
    for _ in range(2):
        found.step()
        found.save(tmp_path / "run.state")
    assert sorted(os.listdir(tmp_path / "there")) == ["real.state", "real.state.1"]
    (tmp_path / "there" / "real.state").write_bytes(b"")
    assert "step 1" in trainer().restore(tmp_path / "run.state")


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path, found = tmp_path / "run.state", trainer()
    for _ in range(3):
        found.step()
        found.save(path)
    assert (step_of(path), step_of(tmp_path / "run.state.1")) == (3, 2)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_moment_leaves_one_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Before each call that touches the disk, the save is cut off; whatever is there then can be resumed."""
    countdown = itertools.count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(countdown) == moment:
                raise Killed
            if function is link and not links:
                raise PermissionError(errno.EPERM, "no links here")
            return function(*arguments, **options)

        return call

    link = os.link
    path, found = tmp_path / "run.state", trainer()
    for _ in range(2):
        found.step()
        found.save(path)
    moment, seen = -1, []
    for name in ("open", "fsync", "unlink", "link", "replace"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    for moment in range(12):  # noqa: B007 (call() looks at it)
        countdown = itertools.count()
        found.step()
        try:
            found.save(path)
            seen.append("saved")
        except Killed:
            seen.append("killed")
        countdown = itertools.count(1000)
        state, said = pygpt.open_state(path)
        with state:
            assert state.progress.step in (found.done - 1, found.done)
            assert said == "" or not links
        found.save(path)
    assert seen.count("killed") >= 5
    assert seen[-1] == "saved"
    assert set(os.listdir(tmp_path)) == {"run.state", "run.state.1"}


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A function that sets the largest size of a file that may be written: the disk is full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_full_disk(tmp_path: Path, small_files: Callable[[int], None], share: float) -> None:
    path, found = tmp_path / "run.state", trainer()
    for _ in range(2):
        found.step()
        found.save(path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    found.step()
    small_files(int(share * len(before["run.state"])))
    with pytest.raises(pygpt.PyGPTError, match=r"run\.state: .*File too large"):
        found.save(path)
    small_files(resource.RLIM_INFINITY)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    found.save(path)
    assert (step_of(path), step_of(tmp_path / "run.state.1")) == (3, 2)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(pygpt.PyGPTError, match="No such file"):
        trainer().save(tmp_path / "missing" / "run.state")


def test_pieces_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trainer()
    found.save(tmp_path / "a.state")
    monkeypatch.setattr(state_module, "PIECE", 37)
    found.save(tmp_path / "b.state")
    assert (tmp_path / "a.state").read_bytes() == (tmp_path / "b.state").read_bytes()
    assert trainer().restore(tmp_path / "a.state") == ""
