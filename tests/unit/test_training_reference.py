"""Training against independent expectations: finite differences, a float64 oracle, PyTorch's recorded losses, plain formulas.

The oracle's gradients are compared with central differences of its losses. The serial kernels and the engines are compared with
the oracle, and AdamW with its formula. Every test with an `engine` runs for each class of ENGINES."""

import ctypes
import hashlib
import json
import math
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import oracle_training
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_checkpoint import make, parse
from oracle import Array
from running import gist

from pygpt import Checkpoint, CheckpointError, ClosedError, Config, InputError, SerialGPT2, SerialTrainableGPT2, TrainableGPT2
from pygpt._reference import KERNELS
from pygpt.training.parameters import MATRICES, AdamW, Parameters, aligned_zeros, normal, zeros_to_update

Float32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32] | npt.NDArray[np.int64]

ENGINES = [SerialTrainableGPT2, TrainableGPT2]
Trainee = SerialTrainableGPT2 | TrainableGPT2
Engine = type[SerialTrainableGPT2] | type[TrainableGPT2]

EPS = 2.0**-24  # half the distance of 1 to the next float32: the relative error of one operation
CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "goldens_training.json").read_text())["cases"]
SMALL = Config(maxT=9, V=37, L=2, NH=3, C=21)

fuzz = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.__name__)
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


engines = st.sampled_from(ENGINES)

# ---------------------------------------------------------------------------------------------------------------------
# Networks and batches to order


@st.composite
def configs(draw: st.DrawFn, *, largest: int = 40) -> Config:
    """Small shapes with every kind of ragged edge: heads of odd size, one channel, one position, one token id."""
    HS = draw(st.integers(1, max(1, largest // 2)))
    NH = draw(st.integers(1, max(1, min(4, largest // HS))))
    maxT, V, L = draw(st.integers(1, 12)), draw(st.integers(1, 150)), draw(st.integers(1, 3))
    return Config(maxT=maxT, V=V, L=L, NH=NH, C=NH * HS)


@st.composite
def networks(draw: st.DrawFn, *, largest: int = 40) -> tuple[Config, dict[str, Array], Ids, Ids]:
    """A shape, lively weights that float32 holds exactly, inputs and targets (B, T)."""
    config = draw(configs(largest=largest))
    rng = np.random.default_rng(draw(seeds))
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, config.maxT))
    inputs, targets = rng.integers(0, config.V, (2, B, T))
    return config, lively(config, rng), inputs, targets


def lively(config: Config, rng: np.random.Generator) -> dict[str, Array]:
    """Weights for which every kernel changes the result, attention prefers some keys, and numbers do not overflow."""
    weights = {}
    for name, shape, _, _ in config.tensors(padded=False):
        spread = 1 / math.sqrt(shape[-1]) if name.endswith("w") and len(shape) == 3 else 0.3
        weights[name] = (spread * rng.standard_normal(shape)).astype(np.float32).astype(np.float64)
        if name in ("ln1w", "ln2w", "lnfw"):
            weights[name] += 1
    weights["qkvw"] *= 2
    return {name: array.astype(np.float32).astype(np.float64) for name, array in weights.items()}


def filled(engine: Engine, config: Config, weights: Mapping[str, Array]) -> Trainee:
    """An engine with these weights."""
    model = engine(config, threads=2)
    for name, array in weights.items():
        model.tensor(name)[...] = array
    return model


def batch(config: Config, B: int, T: int, seed: int = 0) -> tuple[Ids, Ids]:
    inputs, targets = np.random.default_rng(seed).integers(0, config.V, (2, B, T))
    return inputs, targets


# ---------------------------------------------------------------------------------------------------------------------
# The oracle itself


def slope(loss: Callable[[float], float], h: float) -> float:
    """The derivative of a function at 0 by the central difference of fourth order: its error is h**4 / 30 of the fifth
    derivative, and 2**-52 / h of rounding."""
    return (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)


@settings(fuzz, max_examples=15)
@given(network=networks(largest=20), seed=seeds)
def test_oracle_against_finite_differences(network: tuple[Config, dict[str, Array], Ids, Ids], seed: int) -> None:
    """Along a random direction of each tensor, which includes every gradient, and along one element."""
    config, weights, inputs, targets = network
    grads = oracle_training.gradients(weights, config, inputs, targets)
    rng = np.random.default_rng(seed)
    rstd = steepness(weights, config, inputs)  # each derivative of a LayerNorm is greater by this factor than the one before
    for name, array in weights.items():
        assert grads[name].shape == array.shape
        one = np.zeros(array.shape)
        one.reshape(-1)[rng.integers(array.size)] = 1
        direction = rng.standard_normal(array.shape)
        for step in (direction / np.linalg.norm(direction), one):

            def loss(h: float, name: str = name, step: Array = step) -> float:
                moved = {**weights, name: weights[name] + h * step}
                return float(oracle_training.losses(moved, config, inputs, targets).mean())

            expected = float((grads[name] * step).sum())
            assert slope(loss, 3e-5 / rstd) == pytest.approx(expected, rel=1e-7, abs=1e-8 * rstd), name


def steepness(weights: Mapping[str, Array], config: Config, inputs: Ids) -> float:
    """Return the greatest reciprocal standard deviation in the LayerNorms of this network."""
    found = []
    for tokens in inputs.tolist():
        acts = oracle.forward_activations(weights, config, tokens)
        streams = [acts["encoded"], *acts["residual2"], *acts["residual3"]]
        found += [oracle_training.layernorm_statistics(stream)[1].max() for stream in streams]
    return float(max(found))


def test_oracle_losses_are_those_of_its_probabilities() -> None:
    weights = lively(SMALL, np.random.default_rng(1))
    inputs, targets = batch(SMALL, 2, 5)
    for tokens, wanted, found in zip(
        inputs.tolist(), targets.tolist(), oracle_training.losses(weights, SMALL, inputs, targets), strict=True
    ):
        probs = oracle.softmax(oracle.forward(weights, SMALL, tokens))
        np.testing.assert_allclose(found, [-math.log(row[target]) for row, target in zip(probs, wanted, strict=True)])


def test_oracle_adamw_by_hand() -> None:
    # First step: m = 0.1 g and v = 0.001 g g, unbiased g and g g: the parameter moves by lr against g, and decays by lr * wd.
    one, zero = np.array([2.0]), np.array([0.0])
    parameters, first, second = oracle_training.adamw(one, np.array([-3.0]), zero, zero, lr=0.1, step=1, weight_decay=0.5)
    assert parameters[0] == pytest.approx(2 + 0.1 - 0.1 * 0.5 * 2, rel=1e-8)
    assert (first[0], second[0]) == (pytest.approx(-0.3), pytest.approx(0.009))


# ---------------------------------------------------------------------------------------------------------------------
# Tolerances

# How far float32 may be off depends on the numbers: LayerNorm over two nearly equal channels magnifies any rounding a hundred
# times. So the tolerance is measured. Every array that a kernel reads is changed by half a unit of its last place, separately
# for each array of each call. The tolerance is the change of the exact result. Sums of float32 also round at each term, so
# their error has the same size. In random networks the ratio is 0.4 in the median and 2.3 at most. The tolerance is about 1e-5
# of a tensor's greatest gradient. A wrong formula or a lost term causes a far greater error.
SAFETY = 10
FORWARD = ("encoder", "layernorm", "matmul", "attention", "gelu", "softmax")
NOISY = {
    oracle: FORWARD,
    oracle.gpt2_numpy: tuple(name for name in FORWARD if name != "gelu"),  # which calls its own
    oracle_training: (
        "crossentropy",
        "crossentropy_softmax_backward",
        "residual_backward",
        "gelu_backward",
        "attention_backward",
        "matmul_backward",
        "layernorm_backward",
        "encoder_backward",
    ),
}


def nudged(value: Any, rng: np.random.Generator) -> Any:
    """An array moved by half a unit of its last place; anything else as it is."""
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value * (1 + EPS * rng.choice([-1.0, 1.0], value.shape))
    return value


@contextmanager
def noise(seed: int) -> Iterator[None]:
    """Let every kernel of the oracle read nudged arrays."""
    rng = np.random.default_rng(seed)

    def noisy(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: kernel(*(nudged(argument, rng) for argument in arguments))

    with pytest.MonkeyPatch.context() as patch:
        for module, names in NOISY.items():
            for name in names:
                patch.setattr(module, name, noisy(getattr(module, name)))
        yield


def bounds(compute: Callable[[], Mapping[str, Array]]) -> dict[str, tuple[Array, float]]:
    """By name: an exact array, and the tolerance of a correct float32 result."""
    exact = compute()
    moved = dict.fromkeys(exact, 0.0)
    for seed in range(4):
        with noise(seed):
            for name, array in compute().items():
                moved[name] = max(moved[name], float(np.abs(array - exact[name]).max()))
    return {name: (array, SAFETY * (moved[name] + 4 * EPS * np.abs(array).max())) for name, array in exact.items()}


def assert_close(name: str, found: npt.NDArray[Any], exact: Array, tolerance: float) -> None:
    assert found.dtype == np.float32
    assert found.shape == exact.shape
    error = float(np.abs(found - exact).max())
    assert error <= tolerance, f"{name}: error is {error:.3g}, tolerance {tolerance:.3g}, greatest {np.abs(exact).max():.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# The serial kernels, one by one


def call(kernel: str, *arguments: Any) -> None:
    """Call a kernel with arrays (or None) for its pointers, ints for its sizes and floats for its numbers."""
    types: dict[type, Any] = {
        int: ctypes.c_ssize_t,
        float: ctypes.c_float,
        np.ndarray: ctypes.c_void_p,
        type(None): ctypes.c_void_p,
    }
    values = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            assert argument.flags.c_contiguous
            assert argument.dtype in (np.float32, np.int32)
        values.append(argument.ctypes.data if isinstance(argument, np.ndarray) else argument)
    ctypes.CFUNCTYPE(None, *(types[type(argument)] for argument in arguments))(KERNELS[kernel])(*values)


def floats(rng: np.random.Generator, *shape: int) -> Float32:
    return rng.standard_normal(shape).astype(np.float32)


def wide(array: Float32) -> Array:
    return array.astype(np.float64)


def assert_kernel(found: Mapping[str, Float32], compute: Callable[[], Mapping[str, Array]], floor: float = 0.0) -> None:
    """Compare a kernel's outputs; `floor` is the size of numbers inside it that cancel each other."""
    for name, (exact, tolerance) in bounds(compute).items():
        assert_close(name, found[name], exact, tolerance + SAFETY * EPS * floor)


shapes = {"B": st.integers(1, 3), "T": st.integers(1, 11), "seed": seeds}
channels = st.integers(1, 50)


@fuzz
@given(**shapes, C=channels)
def test_encoder_kernels(B: int, T: int, C: int, seed: int) -> None:
    rng, V, maxT = np.random.default_rng(seed), 5, T + 2
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    wte, wpe, dout, dwte, dwpe = (floats(rng, *shape) for shape in ((V, C), (maxT, C), (B, T, C), (V, C), (maxT, C)))
    out = np.zeros((B, T, C), np.float32)
    call("encoder_forward", out, tokens, wte, wpe, B, T, C)
    assert_kernel(
        {"out": out}, lambda: {"out": np.stack([oracle.encoder(row.tolist(), wide(wte), wide(wpe)) for row in tokens])}
    )
    found = dwte.copy(), dwpe.copy()
    call("encoder_backward", *found, dout, tokens, B, T, C)

    def expected() -> dict[str, Array]:
        pairs = [oracle_training.encoder_backward(wide(dout[b]), tokens[b].tolist(), V, maxT) for b in range(B)]
        return {"dwte": wide(dwte) + sum(pair[0] for pair in pairs), "dwpe": wide(dwpe) + sum(pair[1] for pair in pairs)}

    assert_kernel(dict(zip(("dwte", "dwpe"), found, strict=True)), expected, floor=B * T)


@fuzz
@given(**shapes, C=channels)
def test_layernorm_kernels(B: int, T: int, C: int, seed: int) -> None:
    rng, N = np.random.default_rng(seed), B * T
    inp, weight, bias, dout, dinp, dweight, dbias = (
        floats(rng, *shape) for shape in ((N, C), (C,), (C,), (N, C), (N, C), (C,), (C,))
    )
    out, mean, rstd = np.zeros((N, C), np.float32), np.zeros(N, np.float32), np.zeros(N, np.float32)
    call("layernorm_forward", out, mean, rstd, inp, weight, bias, N, C, 1e-5)

    def forward() -> dict[str, Array]:
        statistics = dict(zip(("mean", "rstd"), oracle_training.layernorm_statistics(wide(inp)), strict=True))
        return {"out": oracle.layernorm(wide(inp), wide(weight), wide(bias)), **statistics}

    steep = float(forward()["rstd"].max())  # the mean's rounding error is magnified so much, that of rstd by its square
    assert_kernel({"out": out, "mean": mean, "rstd": rstd}, forward, floor=10 * (1 + steep**2))
    found = dinp.copy(), dweight.copy(), dbias.copy()
    call("layernorm_backward", *found, dout, inp, weight, mean, rstd, N, C)

    def backward() -> dict[str, Array]:
        grads = oracle_training.layernorm_backward(wide(dout), wide(inp), wide(weight), wide(mean), wide(rstd))
        added = (wide(before) + gradient for before, gradient in zip((dinp, dweight, dbias), grads, strict=True))
        return dict(zip(("dinp", "dweight", "dbias"), added, strict=True))

    assert_kernel(dict(zip(("dinp", "dweight", "dbias"), found, strict=True)), backward, floor=10 * steep)


@fuzz
@given(**shapes, C=channels, OC=channels, biased=st.booleans())
def test_matmul_kernels(B: int, T: int, C: int, OC: int, seed: int, biased: bool) -> None:
    rng, N = np.random.default_rng(seed), B * T
    inp, weight, bias, dout, dinp, dweight, dbias = (
        floats(rng, *shape) for shape in ((N, C), (OC, C), (OC,), (N, OC), (N, C), (OC, C), (OC,))
    )
    out = np.zeros((N, OC), np.float32)
    call("matmul_forward", out, inp, weight, bias if biased else None, N, C, OC)
    assert_kernel({"out": out}, lambda: {"out": oracle.matmul(wide(inp), wide(weight), wide(bias) if biased else 0.0)}, floor=C)
    found = dinp.copy(), dweight.copy(), dbias.copy()
    call("matmul_backward", *found[:2], found[2] if biased else None, dout, inp, weight, N, C, OC)
    if not biased:
        assert np.array_equal(found[2], dbias)

    def backward() -> dict[str, Array]:
        grads = oracle_training.matmul_backward(wide(dout), wide(inp), wide(weight))
        added = (wide(before) + gradient for before, gradient in zip((dinp, dweight, dbias), grads, strict=True))
        return dict(list(zip(("dinp", "dweight", "dbias"), added, strict=True))[: 3 if biased else 2])

    assert_kernel(dict(zip(("dinp", "dweight", "dbias"), found, strict=True)), backward, floor=max(N, OC))


@fuzz
@given(**shapes, NH=st.integers(1, 4), HS=st.integers(1, 20))
def test_attention_kernels(B: int, T: int, NH: int, HS: int, seed: int) -> None:
    rng, C = np.random.default_rng(seed), NH * HS
    qkv, dout, dqkv = (floats(rng, B, T, width) for width in (3 * C, C, 3 * C))
    out, att = np.zeros((B, T, C), np.float32), np.full((B, NH, T, T), np.nan, np.float32)
    call("attention_forward", out, att, qkv, B, T, C, NH, HS**-0.5)
    assert_kernel({"out": out}, lambda: {"out": np.stack([oracle.attention(wide(rows), NH) for rows in qkv])}, floor=1)
    lower = np.tril(np.ones((T, T), dtype=bool))
    assert np.isfinite(att[..., lower]).all()
    np.testing.assert_allclose(np.where(lower, att, 0).sum(axis=-1), 1, rtol=0, atol=2 * T * EPS)
    found, scratch = dqkv.copy(), [np.full(T, np.nan, np.float32) for _ in range(2)]
    call("attention_backward", found, *scratch, dout, qkv, att, B, T, C, NH, HS**-0.5)

    def backward() -> dict[str, Array]:
        pairs = zip(wide(dout), wide(qkv), strict=True)
        return {"dqkv": wide(dqkv) + np.stack([oracle_training.attention_backward(d, rows, NH) for d, rows in pairs])}

    assert_kernel({"dqkv": found}, backward, floor=HS)  # datt, a sum over HS, cancels its own weighted mean


@fuzz
@given(size=st.integers(1, 60), spread=st.sampled_from([0.1, 1.0, 5.0, 50.0]), seed=seeds)
def test_gelu_kernels(size: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inp, dout, dinp = floats(rng, size) * np.float32(spread), floats(rng, size), floats(rng, size)
    out, found = np.zeros(size, np.float32), dinp.copy()
    call("gelu_forward", out, inp, size)
    assert_kernel({"out": out}, lambda: {"out": oracle.gelu(wide(inp))}, floor=float(np.abs(inp).max()))  # of 1 + tanh
    call("gelu_backward", found, inp, dout, size)
    assert_kernel(
        {"dinp": found}, lambda: {"dinp": wide(dinp) + oracle_training.gelu_backward(wide(dout), wide(inp))}, floor=spread
    )


def test_gelu_kernels_far_out() -> None:
    """If cosh overflows, the derivative is 1 or 0, as for the identity or zero, and not NaN."""
    inp = np.array([-1e4, -100, -20, 20, 100, 1e4], np.float32)
    out, dinp = np.zeros(6, np.float32), np.zeros(6, np.float32)
    call("gelu_forward", out, inp, 6)
    call("gelu_backward", dinp, inp, np.ones(6, np.float32), 6)
    assert out.tolist() == [0, 0, 0, 20, 100, 1e4]
    assert dinp.tolist() == [0, 0, 0, 1, 1, 1]


@fuzz
@given(size=st.integers(1, 60), seed=seeds)
def test_residual_kernels(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inp1, inp2, dout, dinp1, dinp2 = (floats(rng, size) for _ in range(5))
    out, found = np.zeros(size, np.float32), (dinp1.copy(), dinp2.copy())
    call("residual_forward", out, inp1, inp2, size)
    call("residual_backward", *found, dout, size)
    assert np.array_equal(out, inp1 + inp2)  # one rounding each: the same in NumPy
    assert np.array_equal(found[0], dinp1 + dout)
    assert np.array_equal(found[1], dinp2 + dout)


@fuzz
@given(N=st.integers(1, 12), V=st.integers(1, 60), spread=st.sampled_from([0.1, 1.0, 8.0]), seed=seeds)
def test_loss_kernels(N: int, V: int, spread: float, seed: int) -> None:
    """Probabilities overwrite the logits, and gradients overwrite the probabilities, as in the network."""
    rng = np.random.default_rng(seed)
    logits, targets = floats(rng, N, V) * np.float32(spread), rng.integers(0, V, N).astype(np.int32)
    largest = float(np.abs(logits).max())
    probs, apart, losses = logits.copy(), np.zeros((N, V), np.float32), np.zeros(N, np.float32)
    call("softmax_forward", probs, probs, N, V)
    call("softmax_forward", apart, logits, N, V)
    call("crossentropy_forward", losses, probs, targets, N, V)
    assert np.array_equal(probs, apart)
    assert_kernel({"probs": probs}, lambda: {"probs": oracle.softmax(wide(logits))}, floor=V)
    assert_kernel(
        {"losses": losses}, lambda: {"losses": oracle_training.crossentropy(wide(logits), targets.tolist())}, largest + V
    )
    dlogits, dloss = probs.copy(), float(np.float32(1 / N))
    call("crossentropy_softmax_backward", dlogits, dloss, dlogits, targets, N, V)

    def backward() -> dict[str, Array]:
        dlosses = np.full(N, dloss)
        return {
            "dlogits": oracle_training.crossentropy_softmax_backward(dlosses, oracle.softmax(wide(logits)), targets.tolist())
        }

    assert_kernel({"dlogits": dlogits}, backward, floor=V * dloss)


def test_every_kernel_is_tested() -> None:
    tests = Path(__file__).read_text() + Path(__file__).parents[1].joinpath("bits/test_quantised.py").read_text()
    called = set(re.findall(r'call\("(\w+)"', tests))
    assert called == set(KERNELS)


# ---------------------------------------------------------------------------------------------------------------------
# The whole network


def trained(model: Trainee, inputs: Ids, targets: Ids) -> tuple[Float32, dict[str, Float32]]:
    """The losses, and a copy of every gradient."""
    losses = model.forward(inputs, targets)
    model.backward()
    return losses, {name: model.gradient(name).copy() for name, _, _, _ in model.config.tensors(padded=True)}


@fuzz
@given(engine=engines, network=networks())
def test_losses_and_gradients(engine: Engine, network: tuple[Config, dict[str, Array], Ids, Ids]) -> None:
    config, weights, inputs, targets = network
    with filled(engine, config, weights) as model:
        losses, gradients = trained(model, inputs, targets)
        assert_padding_is_zero(model)
        norm = model.gradient_norm()

    def compute() -> dict[str, Array]:
        grads = oracle_training.gradients(weights, config, inputs, targets)
        return {"losses": oracle_training.losses(weights, config, inputs, targets), **grads}

    for name, (exact, tolerance) in bounds(compute).items():
        floor = SAFETY * EPS * config.V if name == "losses" else 1e-12  # the logarithm of a probability near 1
        assert_close(name, losses if name == "losses" else gradients[name], exact, tolerance + floor)
    exact_norm = oracle_training.gradient_norm({name: wide(gradient) for name, gradient in gradients.items()})
    assert norm == pytest.approx(exact_norm, rel=1e-12)


def test_gradients_of_sharp_attention(engine: Engine) -> None:
    """Queries that attend to one key and hardly to others: their gradients are small differences of large numbers."""
    config = Config(maxT=9, V=37, L=1, NH=1, C=16)
    inputs, targets = batch(config, 1, 9)
    for seed in range(12):
        weights = lively(config, np.random.default_rng(seed))
        weights["qkvw"] *= 16
        with filled(engine, config, weights) as model:
            _, gradients = trained(model, inputs, targets)
        compute = bounds(lambda weights=weights: oracle_training.gradients(weights, config, inputs, targets))  # type: ignore[misc]
        for name, (exact, tolerance) in compute.items():
            assert_close(name, gradients[name], exact, tolerance)


def assert_padding_is_zero(model: Parameters) -> None:
    padding = slice(model.config.V * model.config.C, model.config.Vp * model.config.C)
    for flat in (model.parameters, model.gradients, model.first_moments, model.second_moments):
        assert not flat[padding].any()


def test_backward_sets_all_gradients(engine: Engine) -> None:
    """Whatever was in the flat array, wte's padding included, is gone: that is part of the norm and of the update, too."""
    inputs, targets = batch(SMALL, 2, 5)
    with filled(engine, SMALL, lively(SMALL, np.random.default_rng(14))) as model:
        trained(model, inputs, targets)
        gradients, norm = model.gradients.copy(), model.gradient_norm()
        model.gradients[:] = np.nan
        trained(model, inputs, targets)
        assert np.array_equal(model.gradients, gradients)
        assert model.gradient_norm() == norm


def test_the_tolerance_is_tight(engine: Engine) -> None:
    """Gradients of a slightly different network are refused."""
    weights = lively(SMALL, np.random.default_rng(3))
    inputs, targets = batch(SMALL, 2, 9)
    compute = bounds(lambda: oracle_training.gradients(weights, SMALL, inputs, targets))
    for name, (exact, tolerance) in compute.items():
        assert tolerance < 2e-4 * np.abs(exact).max(), name
    wrong = {**weights, "fcprojw": weights["fcprojw"].copy()}
    wrong["fcprojw"][0, 3, 5] += 0.02
    with filled(engine, SMALL, wrong) as model:
        _, gradients = trained(model, inputs, targets)
    with pytest.raises(AssertionError, match="tolerance"):
        assert_close("wpe", gradients["wpe"], *compute["wpe"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["checkpoint"])
def test_recorded_losses(engine: Engine, case: dict[str, Any], tmp_path: Path) -> None:
    make(**{**parse(case["checkpoint"].split()[1:]), "path": tmp_path / "model.bin"})
    B, T, ids = case["B"], case["T"], np.array(case["ids"])
    inputs, targets = ids[:-1].reshape(B, T), ids[1:].reshape(B, T)
    with engine.load(tmp_path / "model.bin") as model:
        for step, expected in enumerate(case["losses"], start=1):
            losses = model.forward(inputs, targets)
            # float32 losses are off by about 1e-7 each; ten steps of AdamW, which divides gradients by their size, add to it.
            assert math.fsum(losses.flat) / losses.size == pytest.approx(expected, rel=2e-6, abs=2e-6)
            model.backward()
            if step == 1:
                for name, norm in case["first_gradient_norms"].items():
                    assert np.linalg.norm(model.gradient(name).astype(np.float64)) == pytest.approx(norm, rel=2e-5), name
                whole = math.hypot(*case["first_gradient_norms"].values())
                assert model.gradient_norm() == pytest.approx(whole, rel=2e-6)
            model.update(lr=case["lr"], step=step, weight_decay=case["weight_decay"])
        assert_padding_is_zero(model)


def test_evaluate_is_forward_and_keeps_nothing(engine: Engine) -> None:
    weights = lively(SMALL, np.random.default_rng(4))
    inputs, targets = batch(SMALL, 3, 7)
    with filled(engine, SMALL, weights) as model:
        losses, expected = trained(model, inputs, targets)
        model.forward(inputs, targets)
        other = model.evaluate(*batch(SMALL, 1, 9, seed=1))
        assert other.shape == (1, 9)
        assert np.array_equal(model.evaluate(inputs, targets), losses)
        model.backward()  # of the forward() before the evaluations
        for name, gradient in expected.items():
            assert np.array_equal(model.gradient(name), gradient), name


def test_losses_are_fresh_and_batches_are_copied(engine: Engine) -> None:
    weights = lively(SMALL, np.random.default_rng(5))
    inputs, targets = (ids.astype(np.int32) for ids in batch(SMALL, 2, 6))
    with filled(engine, SMALL, weights) as model:
        losses, expected = trained(model, inputs, targets)
        kept = losses.copy()
        model.forward(inputs, targets)
        inputs[:] = targets[:] = 0
        model.backward()
        assert np.array_equal(model.gradient("qkvw"), expected["qkvw"])
        model.forward(inputs, targets)
        assert np.array_equal(losses, kept)


def test_gradients_replace_add_and_scale(engine: Engine) -> None:
    weights = lively(SMALL, np.random.default_rng(6))
    one, other = batch(SMALL, 2, 9), batch(SMALL, 3, 4, seed=1)
    with filled(engine, SMALL, weights) as model:
        first, second = trained(model, *one)[1], trained(model, *other)[1]
        model.forward(*one)
        model.backward(scale=0.25)
        for name, gradient in first.items():
            assert np.array_equal(model.gradient(name), np.float32(0.25) * gradient), name  # a power of two changes no digit
        model.forward(*other)
        model.backward(scale=0.25, accumulate=True)
        for name, gradient in first.items():
            exact = 0.25 * (wide(gradient) + wide(second[name]))
            assert_close(name, model.gradient(name), exact, SAFETY * EPS * float(np.abs(exact).max()))


def test_padded_rows_are_not_tokens(engine: Engine) -> None:
    """V = 129 is padded to 256 rows: the loss must not depend on the padding."""
    config = Config(maxT=4, V=129, L=1, NH=1, C=4)
    with engine(config) as model:
        inputs, targets = batch(config, 2, 4)
        np.testing.assert_allclose(model.forward(inputs, targets), math.log(129), rtol=4 * EPS)  # zeros: all ids alike
        model.tensor("lnfb")[:] = 1
        model.tensor("wte")[128] = 1
        losses = model.forward(inputs, np.full((2, 4), 128))
        np.testing.assert_allclose(losses, math.log(128 + math.exp(4)) - 4, rtol=100 * EPS)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@fuzz
@given(
    engine=engines,
    config=configs(),
    seed=seeds,
    lr=st.sampled_from([0.0, 1e-4, 0.03]),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.95, 0.999]),
    weight_decay=st.sampled_from([0.0, 0.01, 0.5]),
    matrices=st.booleans(),
    scale=st.sampled_from([1.0, 0.37]),
    first_step=st.sampled_from([1, 1000]),
)
def test_adamw(
    engine: Engine,
    config: Config,
    seed: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    matrices: bool,
    scale: float,
    first_step: int,
) -> None:
    """Against the formula in float64, tensor by tensor, over three steps of gradients of very different sizes."""
    rng = np.random.default_rng(seed)
    names = [name for name, _, _, _ in config.tensors(padded=True)]
    with filled(engine, config, lively(config, rng)) as model:
        exact = {
            name: (wide(model.tensor(name)), 0.0 * wide(model.tensor(name)), 0.0 * wide(model.tensor(name))) for name in names
        }
        largest = 0.0
        for step in range(first_step, first_step + 3):
            for name in names:
                shape = model.gradient(name).shape
                model.gradient(name)[:] = floats(rng, *shape) * np.exp2(rng.integers(-20, 5, shape)).astype(np.float32)
                decay = weight_decay if name in MATRICES or not matrices else 0.0
                gradient = scale * wide(model.gradient(name))
                largest = max(largest, float(np.abs(gradient).max()))
                exact[name] = oracle_training.adamw(
                    exact[name][0], gradient, *exact[name][1:],
                    lr=lr, step=step, beta1=beta1, beta2=beta2, weight_decay=decay,
                )  # fmt: skip
            before = model.gradients.copy()
            model.update(
                lr=lr, step=step, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
                decay_matrices_only=matrices, gradient_scale=scale,
            )  # fmt: skip
            assert np.array_equal(model.gradients, before)
        assert_padding_is_zero(model)
        for name in names:
            parameters, first, second = exact[name]
            # About ten roundings a step, of numbers no larger than these. From step 1000 on the moments, which begin at zero,
            # are hardly corrected, and m / sqrt(v) is up to 1 / sqrt(1 - beta2) for one large gradient.
            ratio = 1 / math.sqrt(1 - beta2)
            assert_close(name, model.tensor(name), parameters, 30 * EPS * (float(np.abs(parameters).max()) + lr * ratio))
            moments = (flat_view(model, flat, name) for flat in (model.first_moments, model.second_moments))
            assert_close(name, next(moments), first, 30 * EPS * largest)
            assert_close(name, next(moments), second, 30 * EPS * largest**2)


def flat_view(model: Parameters, flat: Float32, name: str) -> Float32:
    """One tensor of a flat buffer, found through the table of tensors."""
    place = {found: (shape, offset, size) for found, shape, offset, size in model.config.tensors(padded=True)}
    shape, offset, size = place[name]
    return flat[offset : offset + size].reshape(shape)[: model.config.V if name == "wte" else None]


def test_decay_is_decoupled(engine: Engine) -> None:
    """Without a gradient a parameter shrinks by lr * weight_decay of itself, and its moments stay zero."""
    with filled(engine, SMALL, lively(SMALL, np.random.default_rng(7))) as model:
        before = wide(model.parameters)
        for step in (1, 2):
            model.update(lr=0.5, step=step, weight_decay=0.25)
        np.testing.assert_allclose(model.parameters, before * (1 - 0.125) ** 2, rtol=8 * EPS)
        assert not model.first_moments.any()
        assert not model.second_moments.any()


class Noted(Parameters):
    """An engine that keeps the numbers of the last update."""

    def _update(self, numbers: AdamW) -> None:
        self.numbers = numbers


def numbers_of(**arguments: Any) -> AdamW:
    """Return the numbers for these arguments of update()."""
    model = Noted(SMALL)
    model.update(**arguments)
    return model.numbers


def test_spans_cover_every_parameter_once() -> None:
    model = Parameters(SMALL)
    assert numbers_of(lr=1, step=1, weight_decay=0.1).spans == [(0, model.parameters.size, 0.1)]
    spans = numbers_of(lr=1, step=1, weight_decay=0.1, decay_matrices_only=True).spans
    assert [start for start, _, _ in spans[1:]] == [stop for _, stop, _ in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, model.parameters.size)
    assert MATRICES == ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw", "head")
    for name, _, offset, size in SMALL.tensors(padded=True):
        (decay,) = [decay for start, stop, decay in spans if start <= offset and offset + size <= stop]
        assert decay == (0.1 if name in MATRICES else 0), name


def test_adamw_numbers() -> None:
    numbers = numbers_of(lr=0.1, step=3, beta1=0.5, beta2=0.75, eps=1e-6, gradient_scale=2)
    expected = AdamW(0.1, 0.5, 0.75, 0.5, 0.25, 0.875, 1 - 0.75**3, 1e-6, 2, [(0, Parameters(SMALL).parameters.size, 0.0)])
    assert numbers == expected


# ---------------------------------------------------------------------------------------------------------------------
# Parameters: memory, files, random weights


@pytest.mark.parametrize("version", [1, 3, 5])
def test_load_and_save(engine: Engine, version: int, tmp_path: Path) -> None:
    make(tmp_path / "model.bin", L=2, NH=3, C=21, V=130, maxT=9, version=version, seed=5)
    with engine.load(tmp_path / "model.bin") as model, Checkpoint(tmp_path / "model.bin") as checkpoint:
        assert model.config == checkpoint.config
        for name, shape, _, _ in model.config.tensors(padded=False):
            assert model.tensor(name).shape == model.gradient(name).shape == shape
            assert np.array_equal(model.tensor(name), checkpoint.tensor(name)), name
        assert_padding_is_zero(model)
        assert not model.gradients.any()
        model.save(tmp_path / "saved.bin", version=version)
    assert (tmp_path / "saved.bin").read_bytes() == (tmp_path / "model.bin").read_bytes()


def test_parameters_are_a_file_of_version_3(engine: Engine, tmp_path: Path) -> None:
    with filled(engine, SMALL, lively(SMALL, np.random.default_rng(8))) as model:
        model.save(tmp_path / "model.bin")
        assert (tmp_path / "model.bin").read_bytes()[1024:] == model.parameters.astype("<f4").tobytes()


def test_load_refuses_other_files(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such"):
        engine.load(tmp_path / "none.bin")
    (tmp_path / "short.bin").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match="1024 bytes"):
        engine.load(tmp_path / "short.bin")


def test_buffers_are_live_and_aligned(engine: Engine) -> None:
    with engine(SMALL) as model:
        for flat in (model.parameters, model.gradients, model.first_moments, model.second_moments):
            assert flat.shape == (SMALL.parameters(padded=True),)
            assert flat.dtype == np.float32
            assert flat.flags.writeable
            assert flat.ctypes.data % 64 == 0
            assert not flat.any()
        for _, _, offset, _ in SMALL.tensors(padded=True):
            model.parameters[offset], model.gradients[offset] = 7, 8
        for name, _, _, _ in SMALL.tensors(padded=True):
            assert model.tensor(name).flat[0] == 7
            assert model.gradient(name).flat[0] == 8
        with pytest.raises(InputError, match=r"'head'.*wte, wpe"):
            model.tensor("head")


@given(size=st.integers(1, 300), shift=st.integers(0, 40))
def test_aligned_zeros(size: int, shift: int) -> None:
    array = aligned_zeros(size, shift=64 * shift)
    assert array.shape == (size,)
    assert array.ctypes.data % 64 == 0
    assert not array.any()


@pytest.mark.parametrize("size", [1, 1000, 9_000_000])
def test_arrays_of_an_update_begin_at_different_places_of_a_page(size: int) -> None:
    arrays = zeros_to_update(size)
    assert [array.shape for array in arrays] == [(size,)] * 4
    assert not any(np.shares_memory(one, other) for one, other in combinations(arrays, 2))
    places = [array.ctypes.data % 4096 for array in arrays]
    assert len(set(places)) == 4
    assert not any(place % 64 for place in places)


def test_random_weights(engine: Engine) -> None:
    config = Config(maxT=64, V=500, L=3, NH=4, C=64)
    with (
        engine.random(config, seed=42) as model,
        engine.random(config, seed=42) as again,
        engine.random(config, seed=43) as other,
    ):
        assert np.array_equal(model.parameters, again.parameters)
        assert not np.array_equal(model.parameters, other.parameters)
        assert_padding_is_zero(model)
        for name, shape, _, size in config.tensors(padded=False):
            array = wide(model.tensor(name))
            if name not in MATRICES:
                assert (array == (1 if name in ("ln1w", "ln2w", "lnfw") else 0)).all(), name
                continue
            std = 0.02 / math.sqrt(6) if name in ("attprojw", "fcprojw") else 0.02
            assert array.shape == shape
            assert abs(array.mean()) < 5 * std / math.sqrt(size), name  # five standard errors; the seed is fixed
            assert array.std() == pytest.approx(std, rel=5 / math.sqrt(2 * size)), name


def test_random_bits_are_recorded() -> None:
    """Equal seeds give equal weights for good: on every machine, with every NumPy."""
    model = Parameters.random(Config(maxT=40, V=2000, L=2, NH=2, C=48), seed=2024)
    digest = hashlib.sha256(model.parameters.astype("<f4").tobytes()).hexdigest()
    assert digest == "0417657ca75298e0d6df2ede94a2dde77a8acbd7e0891d78d333ae0f79ac4915"


def test_random_numbers_are_nearly_normal() -> None:
    """Quantiles of the normal distribution; 250,000 numbers know them to about 0.003."""
    numbers = np.sort(normal(np.random.PCG64(7), 250_000))
    for below, quantile in ((0.0228, -2), (0.1587, -1), (0.25, -0.6745), (0.5, 0), (0.75, 0.6745), (0.8413, 1), (0.9772, 2)):
        assert numbers[int(below * numbers.size)] == pytest.approx(quantile, abs=0.02)
    assert np.abs(numbers).max() < 6


def test_random_numbers_by_definition() -> None:
    """The same numbers from the words one by one, in whole numbers."""
    words = np.random.PCG64(3).random_raw(3 * 50).tolist()
    sums = [sum(word >> shift & 0xFFFF for word in words[i : i + 3] for shift in (0, 16, 32, 48)) for i in range(0, 150, 3)]
    assert normal(np.random.PCG64(3), 50).tolist() == [(total - 393210) / 65536 for total in sums]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, None, True])
def test_bad_seeds(engine: Engine, seed: Any) -> None:
    with pytest.raises(InputError, match=rf"seed is {seed!r}: .*from 0 to 18446744073709551615"):
        engine.random(SMALL, seed=seed)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "inputs ... (B, T)"),
        ([1, 2], "inputs ... (2,) ... (B, T)"),
        (5, "inputs ... () ... (B, T)"),
        ([[]], "inputs ... (1, 0) ... (B, T)"),
        (np.zeros((0, 3), np.int64), "inputs ... (0, 3) ... (B, T)"),
        ([[[1]]], "inputs ... (1, 1, 1) ... (B, T)"),
        ([[1.0]], "inputs ... float64 ... integers"),
        ([[True]], "inputs ... bool ... integers"),
        ([["a"]], "inputs ... <U1 ... integers"),
        ([[2**70]], "inputs ... object ... integers"),
        ([[0] * 10], "inputs ... 10 tokens ... 9"),
        ([[0, 1], [2, 37]], "inputs[1, 1] is 37 ... 0 to 36"),
        ([[0, -1]], "inputs[0, 1] is -1 ... 0 to 36"),
        (np.array([[2**32]]), "inputs[0, 0] is 4294967296 ... 0 to 36"),
        (np.array([[2**64 - 1]], np.uint64), "inputs[0, 0] is 18446744073709551615 ... 0 to 36"),
    ],
)
def test_bad_batches(engine: Engine, ids: Any, message: str) -> None:
    with engine(SMALL) as model:
        for run in (model.forward, model.evaluate):
            with pytest.raises(InputError, match=gist(message)):
                run(ids, [[0]])
            with pytest.raises(InputError, match=gist(message.replace("inputs", "targets"))):
                run([[0]], ids)
        with pytest.raises(InputError, match=r"\(2, 1\).*\(1, 2\)"):
            model.forward([[0, 1]], [[0], [1]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integers_are_token_ids(engine: Engine, dtype: Any) -> None:
    weights = lively(SMALL, np.random.default_rng(9))
    inputs, targets = batch(SMALL, 2, 5)
    with filled(engine, SMALL, weights) as model:
        expected = model.evaluate(inputs.tolist(), targets.tolist())
        assert np.array_equal(model.evaluate(inputs.astype(dtype), targets.astype(dtype)), expected)
        assert np.array_equal(model.evaluate(np.asfortranarray(inputs), targets[:, ::-1][:, ::-1]), expected)


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("lr", -1e-9, "from 0 to 1000000"),
        ("lr", math.nan, "from 0 to 1000000"),
        ("lr", math.inf, "from 0 to 1000000"),
        ("lr", "1", "from 0 to 1000000"),
        ("lr", True, "from 0 to 1000000"),
        ("beta1", 1.0, "from 0 to 0.9999999"),
        ("beta2", -0.1, "from 0 to 0.9999999"),
        ("eps", 0.0, "from 1e-30 to 1000000"),
        ("weight_decay", -0.1, "from 0 to 1000000"),
        ("gradient_scale", math.inf, "from 0 to 1e+30"),
        ("step", 0, "whole number from 1"),
        ("step", 1.0, "whole number from 1"),
    ],
)
def test_bad_updates(engine: Engine, name: str, value: Any, limits: str) -> None:
    with filled(engine, SMALL, lively(SMALL, np.random.default_rng(10))) as model:
        model.gradients[:] = 1
        before = model.parameters.copy()
        with pytest.raises(InputError, match=gist(f"{name} is {value!r}: ... {limits}")):
            model.update(**{"lr": 0.1, "step": 1, name: value})
        assert np.array_equal(model.parameters, before)


def test_backward_needs_a_forward(engine: Engine) -> None:
    inputs, targets = batch(SMALL, 1, 3)
    with filled(engine, SMALL, lively(SMALL, np.random.default_rng(11))) as model:
        with pytest.raises(InputError, match=r"backward\(\).*forward\(\)"):
            model.backward()
        model.evaluate(inputs, targets)
        with pytest.raises(InputError, match="without a forward"):
            model.backward()
        model.forward(inputs, targets)
        with pytest.raises(InputError, match="scale is nan"):
            model.backward(scale=math.nan)
        model.backward()
        with pytest.raises(InputError, match="without a forward"):
            model.backward()


def test_a_closed_model_refuses(engine: Engine, tmp_path: Path) -> None:
    inputs, targets = batch(SMALL, 1, 3)
    with engine.random(SMALL, seed=1) as model:
        model.forward(inputs, targets)
    model.close()
    for run in (
        lambda: model.forward(inputs, targets),
        lambda: model.evaluate(inputs, targets),
        model.backward,
        model.gradient_norm,
        lambda: model.update(lr=0.1, step=1),
        model.model,
    ):
        with pytest.raises(ClosedError, match="is closed"):
            run()


# ---------------------------------------------------------------------------------------------------------------------
# Samples from the live weights


def test_model_follows_the_weights(engine: Engine, tmp_path: Path) -> None:
    inputs, targets = batch(SMALL, 2, 9)
    tokens = inputs[0].tolist()
    with filled(engine, SMALL, lively(SMALL, np.random.default_rng(12))) as model, model.model() as sampler:
        before = sampler.logits(tokens)
        for step in (1, 2):
            model.forward(inputs, targets)
            model.backward()
            model.update(lr=0.01, step=step)
        model.save(tmp_path / "model.bin")
        with type(sampler).load(tmp_path / "model.bin") as saved:
            assert np.array_equal(sampler.logits(tokens), saved.logits(tokens))
            assert list(sampler.generate(tokens[:2], total=9)) == list(saved.generate(tokens[:2], total=9))
        assert not np.array_equal(sampler.logits(tokens), before)


# ---------------------------------------------------------------------------------------------------------------------
# The serial engine alone


def test_serial_losses_are_those_of_serial_inference() -> None:
    """One forward pass gives both. The loss agrees with the logits, except for the rounding of one logarithm."""
    inputs, targets = batch(SMALL, 1, 9)
    with filled(SerialTrainableGPT2, SMALL, lively(SMALL, np.random.default_rng(13))) as model:
        assert model.threads == 1
        losses = model.forward(inputs, targets)
        with model.model() as sampler:
            assert isinstance(sampler, SerialGPT2)
            logits = wide(sampler.logits(inputs[0].tolist()))
    np.testing.assert_allclose(losses[0], oracle_training.crossentropy(logits, targets[0].tolist()), rtol=50 * EPS)


def interrupted(run: Callable[[threading.Event], object]) -> str:
    """Repeat `run` until SIGINT raises. SIGINT is sent after `run` has set its event. Return the name of the serial program's
    function that raised, if any."""
    ready = threading.Event()

    def interrupt() -> None:
        ready.wait()
        signal.raise_signal(signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    try:
        while True:
            run(ready)
    except KeyboardInterrupt as error:
        frames = traceback.extract_tb(error.__traceback__)
    helper.join()
    return next((frame.name.split(".")[-1] for frame in frames if frame.filename.endswith("_reference.pyx")), "")


@pytest.mark.parametrize("what", ["forward", "evaluate", "backward"])
def test_ctrl_c_between_layers(what: str) -> None:
    """SIGINT raises inside the serial program, not after it; the model works again afterwards."""
    config = Config(maxT=32, V=50, L=200, NH=1, C=16)
    inputs, targets = batch(config, 2, 32)
    with SerialTrainableGPT2.random(config, seed=1) as model:
        losses, gradients = trained(model, inputs, targets)

        def run(ready: threading.Event) -> None:
            if what == "backward":
                model.forward(inputs, targets)
            ready.set()
            if what == "backward":
                model.backward()
            else:
                getattr(model, what)(inputs, targets)

        for _ in range(200):  # the signal may come before the call, or between two: then once more
            if interrupted(run) == what:
                break
        else:
            pytest.fail(f"200 interrupts, none of them inside {what}()")
        again = trained(model, inputs, targets)
    assert np.array_equal(again[0], losses)
    for name, gradient in gradients.items():
        assert np.array_equal(again[1][name], gradient), name
