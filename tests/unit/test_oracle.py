"""Test the oracle: each kernel with numbers computed by hand, the whole network with recorded continuations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from make_checkpoint import make, parse

from pygpt.config import Config
from pygpt.formats.checkpoint import Checkpoint
from pygpt.hub.find import EMBEDDED_MODEL

GOLDENS: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).parents[1].joinpath("data/goldens.json").read_text())[
    "cases"
]
GPT2_SHAPE = "make_checkpoint.py"  # without options: half a gigabyte, too large for float64 arrays here
TOP5_TOLERANCE = 6e-6  # the goldens have five decimals: half a unit of the last, and a little for the order of sums
CONTINUATION = 10  # tokens in all, as in the serial program

# ---------------------------------------------------------------------------------------------------------------------
# The whole network


@pytest.fixture(scope="module", params=[case for case in GOLDENS if case != GPT2_SHAPE])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the name of one case and the path of its checkpoint."""
    command, *options = request.param.split()
    if command != "make_checkpoint.py":
        assert Path(EMBEDDED_MODEL).as_posix().endswith(command)
        return request.param, EMBEDDED_MODEL
    path = tmp_path_factory.mktemp("golden") / "model.bin"
    make(**{**parse(options), "path": path})
    return request.param, str(path)


def load(path: str) -> tuple[oracle.Weights, Config]:
    with Checkpoint(path) as checkpoint:
        return oracle.weights(checkpoint), checkpoint.config


def test_last_logits(golden: tuple[str, str]) -> None:
    name, path = golden
    weights, config = load(path)
    for case in GOLDENS[name]:
        logits = oracle.forward(weights, config, case["prompt"])
        assert logits.shape == (len(case["prompt"]), config.V)
        assert logits.dtype == np.float64
        top5 = np.argsort(-logits[-1])[:5]
        assert top5.tolist() == case["top5_ids"]
        np.testing.assert_allclose(logits[-1, top5], case["top5_logits"], rtol=0, atol=TOP5_TOLERANCE)


@pytest.mark.parametrize("rule", ["median", "greedy"])
def test_continuations(golden: tuple[str, str], rule: str) -> None:
    name, path = golden
    weights, config = load(path)
    cases = [case for case in GOLDENS[name] if rule in case]
    assert cases
    for case in cases:
        new = oracle.complete(weights, config, case["prompt"], CONTINUATION, getattr(oracle, rule))
        assert new == case[rule], case["prompt"]


def test_activations_are_chained_by_the_kernels(tmp_path: Path) -> None:
    make(tmp_path / "model.bin", L=2, NH=2, C=8, V=20, maxT=6, seed=5)
    weights, config = load(str(tmp_path / "model.bin"))
    acts = oracle.forward_activations(weights, config, [3, 1, 4, 1, 5])
    shapes = {name: array.shape for name, array in acts.items()}
    per_layer = dict.fromkeys(("ln1", "atty", "attproj", "residual2", "ln2", "fcproj", "residual3"), (2, 5, 8))
    wide = {"qkv": (2, 5, 24), "fch": (2, 5, 32), "fch_gelu": (2, 5, 32)}
    assert shapes == {"encoded": (5, 8), **per_layer, **wide, "lnf": (5, 8), "logits": (5, 20)}
    np.testing.assert_array_equal(acts["encoded"], weights["wte"][[3, 1, 4, 1, 5]] + weights["wpe"][:5])
    for layer, stream in enumerate([acts["encoded"], acts["residual3"][0]]):
        np.testing.assert_array_equal(acts["residual2"][layer], stream + acts["attproj"][layer])
        np.testing.assert_array_equal(acts["residual3"][layer], acts["residual2"][layer] + acts["fcproj"][layer])
        np.testing.assert_array_equal(acts["fch_gelu"][layer], oracle.gelu(acts["fch"][layer]))
        np.testing.assert_array_equal(
            acts["ln1"][layer], oracle.layernorm(stream, weights["ln1w"][layer], weights["ln1b"][layer])
        )
    np.testing.assert_array_equal(acts["logits"], acts["lnf"] @ weights["wte"].T)


def test_later_tokens_do_not_reach_earlier_rows(tmp_path: Path) -> None:
    make(tmp_path / "model.bin", L=2, NH=2, C=8, V=20, maxT=6, seed=5)
    weights, config = load(str(tmp_path / "model.bin"))
    one, other = (oracle.forward(weights, config, tokens) for tokens in ([3, 1, 4], [3, 1, 19]))
    np.testing.assert_array_equal(one[:2], other[:2])
    assert not np.array_equal(one[2], other[2])


# ---------------------------------------------------------------------------------------------------------------------
# The kernels, by hand


def test_encoder() -> None:
    wte = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    wpe = np.array([[0.5, 0.0], [0.0, 0.25], [9.0, 9.0]])
    assert oracle.encoder([2, 0], wte, wpe).tolist() == [[5.5, 6.0], [1.0, 2.25]]


def test_layernorm() -> None:
    # Row 1: mean 2, variance 1, so +-1 / sqrt(1 + 1e-5) = +-0.9999950000374997. Row 2: mean 0.001, variance 1e-6, so eps
    # dominates: +-0.001 / sqrt(1.1e-5) = +-0.3015113445777636. Row 3 is constant, so only the bias remains.
    inp = np.array([[1.0, 3.0], [0.0, 0.002], [7.0, 7.0]])
    out = oracle.layernorm(inp, np.array([2.0, 1.0]), np.array([0.0, 10.0]))
    expected = [[-1.9999900000749994, 10.9999950000374997], [-0.6030226891555272, 10.3015113445777636], [0.0, 10.0]]
    np.testing.assert_allclose(out, expected, rtol=1e-14, atol=1e-15)


def test_matmul() -> None:
    inp = np.array([[1.0, 2.0], [0.0, -1.0]])
    weight = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])  # (OC, C) = (3, 2)
    assert oracle.matmul(inp, weight).tolist() == [[21.0, 42.0, 63.0], [-10.0, -20.0, -30.0]]
    assert oracle.matmul(inp, weight, np.array([1.0, 2.0, 3.0])).tolist() == [[22.0, 44.0, 66.0], [-9.0, -18.0, -27.0]]


def test_attention_weighs_the_past_of_each_head() -> None:
    # Two heads of one channel. Row 0 sees only itself. Row 1: head 0 scores ln 3 and 0, so 3/4 and 1/4; head 1 scores 0 and 0.
    #                 q0           q1   k0   k1   v0   v1
    qkv = np.array([[9.0, 9.0, 1.0, 5.0, 4.0, 16.0], [math.log(3), 0.0, 0.0, 7.0, 8.0, 32.0]])
    np.testing.assert_allclose(oracle.attention(qkv, NH=2), [[4.0, 16.0], [5.0, 24.0]], rtol=1e-15)


def test_attention_scales_by_the_head_size() -> None:
    # One head of four channels: 2 ln 3 / sqrt(4) = ln 3, so the weights are 3/4 and 1/4 again.
    q, k, v = np.zeros((3, 2, 4))
    q[1, 0], k[0, 0] = 2 * math.log(3), 1.0
    v[:] = [[4.0, 0.0, 1.0, 0.0], [8.0, 4.0, 1.0, -4.0]]
    out = oracle.attention(np.concatenate([q, k, v], axis=1), NH=1)
    np.testing.assert_allclose(out, [[4.0, 0.0, 1.0, 0.0], [5.0, 1.0, 1.0, -1.0]], rtol=1e-15)


def test_gelu() -> None:
    # The tanh form gives 0.84119 at 1. The exact Gaussian would give 0.84134.
    out = oracle.gelu(np.array([0.0, 1.0, -1.0, 3.0, 10.0, -10.0]))
    expected = [0.0, 0.8411919906082768, -0.1588080093917232, 2.9963626079182267, 10.0, 0.0]
    np.testing.assert_allclose(out, expected, rtol=1e-14, atol=1e-15)


def test_softmax() -> None:
    rows = np.array([[0.0, math.log(3)], [1000.0, 1000.0], [-np.inf, -1000.0]])
    np.testing.assert_allclose(oracle.softmax(rows), [[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]], rtol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([1.0], 0),
        ([0.5, 0.5], 1),  # exactly one half does not exceed it
        ([0.25, 0.125, 0.625], 2),
        ([0.75, 0.25], 0),
        ([0.125, 0.5, 0.375], 1),  # neither the first id nor, in the next cases, the most probable one
        ([0.125, 0.4375, 0.0, 0.4375], 1),
        ([0.4375, 0.0, 0.125, 0.4375], 2),
    ],
)
def test_median_is_the_id_that_passes_one_half(probabilities: list[float], expected: int) -> None:
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(probabilities)).astype(np.float32)  # one half is a tie only if the logits are equal
    assert oracle.median(logits) == expected


def test_median_adds_one_after_another() -> None:
    logits = np.zeros(50257, np.float32)  # p = 1/50257 each: the float32 sum drifts away from the exact one
    p = np.float32(1) / np.float32(50257)
    running, expected = np.float32(0), 0
    while (running := running + p) <= 0.5:
        expected += 1
    assert oracle.median(logits) == expected
    assert expected != 50257 // 2  # what exact sums would choose


def test_median_wants_float32() -> None:
    with pytest.raises(TypeError, match="float64"):
        oracle.median(np.zeros(3))  # type: ignore[arg-type]


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert oracle.greedy(np.array([0.0, 2.0, 2.0], np.float32)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights


def test_weights_are_read_once_and_anew_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    make(path, L=1, NH=1, C=2, V=3, maxT=2, seed=1)
    first = oracle.weights(path)
    assert {array.dtype for array in first.values()} == {np.dtype(np.float64)}
    assert first["wte"].shape == (3, 2)
    assert oracle.weights(str(path))["wte"] is first["wte"]
    with pytest.raises(ValueError, match="read-only"):
        first["wte"][0, 0] = 1
    path.unlink()
    make(path, L=1, NH=1, C=2, V=3, maxT=2, seed=2)
    assert not np.array_equal(oracle.weights(path)["wte"], first["wte"])
