"""Training on the pool: the same bits for every number of workers, instruction set, batch and cut, and calm under interruption.

That the numbers are right is tested with the serial engine in test_training_reference.py."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle_training
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import execute

import pygpt
from pygpt import GPT2, Config, InputError, SerialTrainableGPT2, Trace, TrainableGPT2, Trainer, TrainingOptions, cpu_info, cpus
from pygpt._kernels import PHASES

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60
BEST = cpus.workers_for  # as it is outside of tests
# Heads of an odd size, more rows than the packed products begin with, a ragged last panel in every matrix.
SHAPE = Config(maxT=80, V=301, L=2, NH=3, C=57)
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "beta2": 0.95, "decay_matrices_only": True}

Array = npt.NDArray[Any]


def batch(config: Config, B: int, T: int, seed: int = 0) -> tuple[Array, Array]:
    inputs, targets = np.random.default_rng(seed).integers(0, config.V, (2, B, T))
    return inputs, targets


def run(config: Config, threads: int, *, steps: int, B: int, T: int, seed: int = 1) -> tuple[list[bytes], bytes, list[float]]:
    """Train: the losses of every step, the weights, gradients and moments at the end, the norms."""
    losses, norms = [], []
    with TrainableGPT2.random(config, seed=seed, threads=threads) as model:
        for step in range(1, steps + 1):
            inputs, targets = batch(config, B, T, seed=step)
            losses.append(model.forward(inputs, targets).tobytes())
            model.backward()
            norms.append(model.gradient_norm())
            model.update(step=step, gradient_scale=min(1.0, 0.5 / max(norms[-1], 1e-9)), **OPTIONS)
        arrays = model.parameters, model.gradients, model.first_moments, model.second_moments
        return losses, b"".join(array.tobytes() for array in arrays), norms


@pytest.fixture(scope="module")
def alone() -> tuple[list[bytes], bytes, list[float]]:
    """Twenty steps on one worker."""
    return run(SHAPE, 1, steps=20, B=3, T=31)


@pytest.mark.parametrize("threads", [2, 3, 4, 8])
def test_twenty_steps_on_any_number_of_workers(threads: int, alone: tuple[list[bytes], bytes, list[float]]) -> None:
    assert run(SHAPE, threads, steps=20, B=3, T=31) == alone


@settings(deadline=None, max_examples=25)
@given(
    HS=st.integers(1, 20),
    NH=st.integers(1, 4),
    L=st.integers(1, 2),
    V=st.integers(1, 200),
    B=st.integers(1, 4),
    T=st.integers(1, 40),
    threads=st.integers(2, 8),
    seed=st.integers(0, 1000),
)
def test_any_shape(HS: int, NH: int, L: int, V: int, B: int, T: int, threads: int, seed: int) -> None:
    config = Config(maxT=T, V=V, L=L, NH=NH, C=NH * HS)
    one = run(config, 1, steps=2, B=B, T=T, seed=seed)
    assert run(config, threads, steps=2, B=B, T=T, seed=seed) == one


def test_choice_of_workers_keeps_the_bits(
    alone: tuple[list[bytes], bytes, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All workers for one call, one for the next, and as the engine finds best."""
    wanted = iter([3, 1, 2, 1, 3] * 100)
    monkeypatch.setattr(cpus, "workers_for", lambda *_: next(wanted))
    assert run(SHAPE, 3, steps=20, B=3, T=31) == alone


def test_a_tiny_network_takes_one_worker_and_a_larger_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "workers_for", BEST)
    monkeypatch.setattr(cpus, "runnable", lambda: 4)
    for config, B, T, working in (
        (Config(maxT=8, V=50, L=1, NH=1, C=8), 1, 4, 1),
        (Config(maxT=64, V=5000, L=2, NH=4, C=64), 2, 64, 3),
    ):
        with TrainableGPT2.random(config, seed=1, threads=3) as model:
            trace = Trace(3, 1000)
            model.record(trace)
            model.forward(*batch(config, B, T))
            model.backward()
            model.gradient_norm()
            model.update(lr=0.1, step=1)
        phases = [{name for name, *_ in trace.events(ith)} for ith in range(3)]
        assert phases[0] >= {"qkv", "loss", "dlogits", "dqkv", "dencoder", "norm", "update"}
        assert phases == [phases[0] if ith < working else set() for ith in range(3)]


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import hashlib
import pygpt.cpus
pygpt.cpus.workers_for = lambda threads, *_: threads
pygpt.cpus.runnable = lambda: 256
from test_training import SHAPE, run

losses, arrays, norms = run(SHAPE, 2, steps=20, B=3, T=31)
print(hashlib.sha256(b"".join(losses) + arrays + repr(norms).encode()).hexdigest())
"""


@pytest.mark.parametrize("isa", [isa for isa in cpu_info()["available"] if isa != "baseline"])
def test_every_instruction_set_with_fma(isa: str, alone: tuple[list[bytes], bytes, list[float]]) -> None:
    if not cpu_info()["fused"]:
        pytest.skip("this run is of the baseline set, which rounds products apart")
    words = [sys.executable, "-c", PROGRAM, *map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "bits"])]
    result = execute(words, env={**os.environ, "PYGPT_ISA": isa}, timeout=DEADLINE)
    losses, arrays, norms = alone
    expected = hashlib.sha256(b"".join(losses) + arrays + repr(norms).encode()).hexdigest()
    assert (result.stdout.strip(), result.stderr) == (expected, "")


def test_the_loss_is_that_of_the_generating_network() -> None:
    """The forward pass of training is the step that generates: loss = -log softmax(logits)[target], of the same logits."""
    with TrainableGPT2.random(SHAPE, seed=4, threads=2) as model:
        inputs, targets = batch(SHAPE, 3, 70)
        losses = model.forward(inputs, targets)
        assert np.array_equal(model.evaluate(inputs, targets), losses)
        with model.model() as network:
            assert isinstance(network, GPT2)
            logits = np.stack([network.logits(row.tolist()) for row in inputs]).astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, targets[..., None], -1)[..., 0]
    # The sum of V exponentials is in float32, each with a relative error below 1e-7; the loss is rounded to float32 once.
    assert np.abs(losses - expected).max() < 4e-7 * max(1.0, float(expected.max()))


def test_a_sequence_has_its_losses_in_any_batch() -> None:
    with TrainableGPT2.random(SHAPE, seed=5, threads=3) as model:
        inputs, targets = batch(SHAPE, 4, 33)
        together = model.forward(inputs, targets)
        for b in range(4):
            assert np.array_equal(model.forward(inputs[b : b + 1], targets[b : b + 1])[0], together[b])
        assert np.array_equal(model.forward(inputs[:, :9], targets[:, :9]), together[:, :9])


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_have_the_bits_of_the_whole_except_wte(parts: int) -> None:
    """Rows are added in the same order either way. Only wte has two parts, the head's and the encoder's, batch by batch."""
    inputs, targets = batch(SHAPE, 4, 20)
    with TrainableGPT2.random(SHAPE, seed=6, threads=2) as model:
        model.forward(inputs, targets)
        model.backward()
        whole = {name: model.gradient(name).copy() for name, _, _, _ in SHAPE.tensors(padded=True)}
        for some in np.split(np.arange(4), parts):
            model.forward(inputs[some], targets[some])
            model.backward(accumulate=some[0] > 0, scale=1 / parts)
        for name, gradient in whole.items():
            if name != "wte":
                assert np.array_equal(model.gradient(name), gradient), name
        scale = float(np.abs(whole["wte"]).max())
        assert np.abs(model.gradient("wte") - whole["wte"]).max() < 1e-6 * scale  # a few roundings of float32


def test_a_new_batch_of_another_shape_replaces_the_old_one() -> None:
    with TrainableGPT2.random(SHAPE, seed=7, threads=2) as model:
        first = batch(SHAPE, 2, 80)
        losses = model.forward(*first)
        model.backward()
        gradients = model.gradients.copy()
        for B, T in ((2, 5), (1, 1), (5, 3), (3, 30)):
            assert model.forward(*batch(SHAPE, B, T)).shape == (B, T)
            model.backward()
        assert np.array_equal(model.forward(*first), losses)
        model.backward()
        assert np.array_equal(model.gradients, gradients)


def test_padding_stays_zero() -> None:
    with TrainableGPT2.random(SHAPE, seed=8, threads=2) as model:
        for step in range(1, 4):
            model.forward(*batch(SHAPE, 2, 20, seed=step))
            model.backward(accumulate=step == 2)
            model.update(lr=0.1, step=step, weight_decay=0.5)
        padding = slice(SHAPE.V * SHAPE.C, SHAPE.Vp * SHAPE.C)
        for array in (model.parameters, model.gradients, model.first_moments, model.second_moments):
            assert not array[padding].any()


def test_a_loss_that_is_not_finite_is_reported_as_it_is() -> None:
    with TrainableGPT2.random(SHAPE, seed=9, threads=2) as model:
        model.tensor("lnfb")[0] = np.nan
        assert np.isnan(model.forward(*batch(SHAPE, 1, 3))).all()
        model.backward()
        assert np.isnan(model.gradient_norm())


def test_the_trace_names_every_phase() -> None:
    with TrainableGPT2.random(SHAPE, seed=1, threads=2) as model:
        trace = Trace(2, 1000)
        model.record(trace)
        model.forward(*batch(SHAPE, 2, 40))  # rows enough to be packed
        model.backward()
        model.gradient_norm()
        model.update(lr=0.1, step=1)
        model.record(None)
        model.forward(*batch(SHAPE, 1, 5))
    for ith in range(2):
        events = trace.events(ith)
        assert {name for name, *_ in events} == set(PHASES)
        assert [name for name, layer, *_ in events if name == "dattention"] == ["dattention"] * SHAPE.L
        assert [layer for name, layer, *_ in events if name == "dattention"] == [1, 0]  # from the last layer to the first
        assert all(begin <= end <= left for _, _, begin, end, left in events)
        assert trace.dropped(ith) == 0


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_bad_thread_counts(threads: Any) -> None:
    with pytest.raises(InputError, match="threads is"):
        TrainableGPT2(SHAPE, threads=threads)


# ---------------------------------------------------------------------------------------------------------------------
# Labels of -100


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_labels_of_minus_100_are_left_out(threads: int, share: float) -> None:
    """Losses, gradients and the serial engine's agree with the float64 oracle; other targets have the losses that they had."""
    config = Config(maxT=12, V=67, L=2, NH=2, C=12)
    inputs, targets = batch(config, 3, 7)
    masked = np.where(np.random.default_rng(1).random(targets.shape) < share, -100, targets)
    with TrainableGPT2.random(config, seed=3, threads=threads) as model, SerialTrainableGPT2.random(config, seed=3) as serial:
        whole = model.forward(inputs, targets)
        weights = {name: model.tensor(name).astype(np.float64) for name, *_ in config.tensors(padded=False)}
        wanted = oracle_training.gradients(weights, config, inputs, masked)
        for engine in (model, serial):
            losses = engine.forward(inputs, masked)
            assert np.array_equal(engine.evaluate(inputs, masked), losses)
            np.testing.assert_allclose(losses, oracle_training.losses(weights, config, inputs, masked), atol=1e-5)
            engine.backward()
            for name, gradient in wanted.items():
                np.testing.assert_allclose(engine.gradient(name), gradient, rtol=1e-3, atol=2e-6)  # float32 sums of 21 rows
        assert np.array_equal(model.forward(inputs, masked), np.where(masked < 0, 0, whole))
        for bad in (-1, -99, -101, config.V):
            with pytest.raises(InputError, match=rf"targets\[0, 0\].*{bad}.*-100"):
                model.forward(inputs, np.where(targets == targets[0, 0], bad, targets))
        with pytest.raises(InputError, match=r"inputs\[0, 0\] is -100"):
            model.forward(inputs * 0 - 100, targets)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_target_of_a_step_has_the_same_weight(accumulate: int) -> None:
    """Parts of a batch with unequal numbers of targets give the loss and the gradient of the whole batch."""
    config = Config(maxT=8, V=67, L=1, NH=2, C=8)
    tokens = np.random.default_rng(2).integers(0, 67, 33)
    labels = np.where(np.arange(33) % 16 < 11, -100, tokens)
    found = []
    for B, parts in ((4 // accumulate, accumulate), (4, 1)):
        with TrainableGPT2.random(config, seed=3, threads=1) as engine:
            loader = pygpt.DataLoader(tokens, B, 8, labels=labels)
            trainer = Trainer(engine, loader, TrainingOptions(accumulate=parts))
            found.append((trainer.step(), engine.gradients.copy(), trainer.evaluate(loader, 4 // B)))
    assert found[0][0].loss == pytest.approx(found[1][0].loss, rel=1e-7)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-7)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)
