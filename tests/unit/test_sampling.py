"""Test random sampling and log-probabilities on rows of logits.

The generator must give its published answers. Each option is compared with float64 NumPy, and draws with exact probabilities.
Every instruction set must give the same bits. Bad options are refused. test_kernels.py tests the median and greedy samplers,
test_generate.py whole completions."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from known import instruction_set

from pygpt import InputError, NumericalError, TokenInfo, cpu_info
from pygpt._kernels import Floats, draw, log_probabilities, race, sample_weights
from pygpt.generation.logprobs import token_info
from pygpt.generation.sampling import Sampler

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
fuzz = settings(deadline=None, max_examples=300, derandomize=True, database=None)


def weights(logits: Any, **options: Any) -> Float64:
    """Return the kernel's weights of one row, as probabilities."""
    row = np.array([logits], np.float32)
    found = sample_weights(row.data, 0, **{**PLAIN, **options})
    assert found is not None
    e = np.asarray(found)[0].astype(np.float64)
    assert e.max() == 1  # the most probable id always remains
    probabilities: Float64 = e / e.sum()
    return probabilities


def expected(
    logits: Float32, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Float64, float]:
    """Return the probabilities after the filters, as transformers applies them one after another, in float64; and the margin.

    The margin is the distance of the closest id to a limit. If it is tiny, rounding decides whether the id is kept."""
    margin = 1.0
    x = logits.astype(np.float64)
    order = sorted(range(len(x)), key=lambda i: (-x[i], -i))
    kept = np.isfinite(x)
    if top_k:
        kept &= x >= x[order[min(top_k, len(x)) - 1]]
    p = oracle.softmax(np.where(kept, x / temperature, -np.inf))
    if top_p < 1:
        before = np.empty(len(x))
        before[order] = np.cumsum(p[order]) - p[order]
        kept &= before < top_p
        kept[order[0]] = True
        margin = min(margin, float(np.abs(before - top_p).min()) if top_p else 1.0)
    p = oracle.softmax(np.where(kept, x / temperature, -np.inf))
    share = p / p.max()
    if min_p > 0:
        margin = min(margin, float(np.abs(share[share < 1] - min_p).min(initial=1.0)))
    kept &= share >= min_p
    return oracle.softmax(np.where(kept, x / temperature, -np.inf)), margin


# ---------------------------------------------------------------------------------------------------------------------
# The generator


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute Philox4x32-10 as its paper writes it (Salmon et al. 2011)."""
    L0, R0, L1, R1 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * L0, 0xCD9E8D57 * L1
        L0, R0, L1, R1 = (product1 >> 32) ^ R0 ^ k0, product1 % 2**32, (product0 >> 32) ^ R1 ^ k1, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [L0, R0, L1, R1]


def test_philox_gives_its_published_answers() -> None:
    """Random123's kat_vectors, philox4x32 10: all zeros, all ones, digits of pi."""
    ones = 2**32 - 1
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, answer in (
        ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert philox(counter, key) == answer


def exponential(seed: int, stream: int, step: int, token: int) -> float:
    """Return the exponentially distributed number of an id, from 64 random bits."""
    block, place = divmod(token, 256)
    words = []
    for lower in (0, 1):
        counter = [step % 2**32, step >> 32 | lower << 31, stream, 64 * block + place % 64]
        words.append(philox(counter, [seed % 2**32, seed >> 32])[place // 64])
    return -math.log1p(-((words[0] << 32 | words[1]) + 0.5) / 2**64)


@settings(deadline=None, max_examples=60)
@given(
    V=st.sampled_from([1, 2, 63, 64, 65, 255, 256, 257, 700]),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**60 - 1),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    excluded=st.sampled_from([0.0, 0.5, 0.99]),
)
def test_the_least_time_wins(V: int, seed: int, stream: int, step: int, scale: float, excluded: float) -> None:
    """The choice is the id with the least exponential number / weight: the Gumbel-max rule."""
    rng = np.random.default_rng(seed % 2**32)
    found = Floats(1, V)
    values = np.asarray(found)[0]
    values[:] = np.exp(-scale * rng.random(V)) * (rng.random(V) >= excluded)
    values[rng.integers(V)] = 1
    times = [exponential(seed, stream, step, i) / float(values[i]) if values[i] else math.inf for i in range(V)]
    assert race(found, seed, stream, step) == min(range(V), key=lambda i: (times[i], i))


@settings(deadline=None, max_examples=200)
@given(
    V=st.sampled_from([1, 2, 255, 256, 257, 700, 5000]),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 0.1, 3.0, 50.0, 3e38]),
    temperature=st.sampled_from([1e-3, 0.1, 0.8, 1.0, 1.7, 1e3]),
    min_p=st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    half=st.sampled_from([None, 0.0, -np.inf]),
)
def test_weights_are_computed_only_where_an_id_can_win(
    V: int, seed: int, stream: int, scale: float, temperature: float, min_p: float, half: float | None
) -> None:
    """draw() gives the id that race() gives by all weights. The step decides which id wins, so many steps are tried."""
    rng = np.random.default_rng(seed % 2**32)
    logits = np.float32(scale) * rng.standard_normal((1, V), np.float32).clip(-1, 1)
    if half is not None:  # half of the logits equal the first one, or are excluded
        logits[:, 1:] = np.where(rng.random((1, V - 1)) < 0.5, logits[0, 0] + half, logits[:, 1:])
    row = np.ascontiguousarray(logits, np.float32).data
    weights = sample_weights(row, 0, temperature=temperature, top_k=0, top_p=1.0, min_p=min_p)
    assert weights is not None
    for step in range(20):
        token = draw(row, 0, temperature=temperature, min_p=min_p, seed=seed, stream=stream, step=step)
        assert token == race(weights, seed, stream, step)


def test_no_weight_gives_no_token() -> None:
    none = Floats(1, 300)
    np.asarray(none)[:] = 0
    assert race(none, 1, 0, 0) == -1


def test_similar_logits_give_the_same_token() -> None:
    """A small change of the logits, as by quantised weights, seldom changes the choice. Each stream and step differs."""
    rng = np.random.default_rng(3)
    logits = (2 * rng.standard_normal((1, 5000))).astype(np.float32)
    near = (logits + 0.02 * rng.standard_normal(logits.shape)).astype(np.float32)
    sampler = Sampler("sample")
    chosen = [[sampler.choose(row.data, 0, 9, n % 7, n) for n in range(2000)] for row in (logits, near)]
    same = [one == other for one, other in zip(*chosen, strict=True)]
    assert np.mean(same) > 0.97
    assert len(set(chosen[0])) > 500


def assert_fits(counts: npt.NDArray[Any], probabilities: Float64) -> None:
    """Do Pearson's test. A million correct runs would not show such a deviation (Wilson and Hilferty 1931)."""
    assert chi_square_score(counts, probabilities) < 4.75


def chi_square_score(counts: npt.NDArray[Any], probabilities: Float64) -> float:
    """Return Pearson's statistic as a standard normal one. Rare ids share a bin. Impossible ids must not occur."""
    assert not counts[probabilities == 0].any()
    wanted = probabilities * counts.sum()
    common = wanted >= 5
    observed, means = np.append(counts[common], counts[~common].sum()), np.append(wanted[common], wanted[~common].sum())
    if means[-1] < 5:
        observed, means = observed[:-1], means[:-1]
    k = len(means) - 1
    assert k > 0
    statistic = float(((observed - means) ** 2 / means).sum())
    return (math.cbrt(statistic / k) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


# ---------------------------------------------------------------------------------------------------------------------
# The options

shares = st.sampled_from([0.0, 0.03, 0.1, 0.37, 0.5, 0.9, 0.95, 1.0])
option_sets = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.05, 0.5, 1.0, 1.3, 20.0]),
        "top_k": st.sampled_from([0, 1, 2, 3, 10, 10**9]),
        "top_p": shares,
        "min_p": shares,
    }
)
rows = st.lists(
    st.one_of(st.floats(-20, 20, width=32), st.integers(-3, 3).map(float), st.just(-math.inf)), min_size=1, max_size=60
).filter(lambda values: max(values) > -math.inf)


def test_top_p_keeps_no_id_beyond_the_share() -> None:
    """The weights are exact: the first two of four reach the half exactly."""
    assert weights([0, 0, 0, 0], top_p=0.5).tolist() == [0, 0, 0.5, 0.5]
    assert weights([0, 0, 0, 0], top_p=0.501).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


@fuzz
@given(values=rows, options=option_sets)
def test_options_against_float64(values: list[float], options: dict[str, Any]) -> None:
    logits = np.array(values, np.float32)
    wanted, margin = expected(logits, **options)
    assume(margin > 1e-6)
    found = weights(logits, **options)
    visible = wanted > 1e-30  # float32 exponentials end at 1e-45
    assert (found[visible] > 0).all()
    assert not found[wanted == 0].any()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 500, "top_p": 0.8, "min_p": 0.01}]
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_options_on_a_vocabulary(options: dict[str, Any], spread: float) -> None:
    """Fifty thousand ids: the filters keep the right ids, with the right probabilities."""
    logits = (spread * np.random.default_rng(3).standard_normal(50257)).astype(np.float32)
    wanted, found = expected(logits, **options)[0], weights(logits, **options)
    differing = np.flatnonzero((wanted > 0) != (found > 0))
    assert len(differing) <= 1  # the id that completes the share of top_p
    both = (wanted > 0) & (found > 0)
    np.testing.assert_allclose(found[both], wanted[both], rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [2, 4]),  # ids equal to the k-th stay
        ({"top_k": 2}, [2, 4]),
        ({"top_k": 3}, [0, 2, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2**62}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.0}, [4]),  # at least one id stays; among equals the higher id comes first
        ({"top_p": 0.4}, [2, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 1.0}, [2, 4]),
        ({"min_p": 0.3}, [0, 2, 3, 4]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.75, "min_p": 0.9}, [2, 4]),
        ({"temperature": 1e-300}, [2, 4]),
        ({"temperature": 5e-324}, [2, 4]),
        ({"temperature": 1e308, "min_p": 1.0}, [0, 1, 2, 3, 4]),
    ],
)
def test_ties_and_edges(options: dict[str, Any], kept: list[int]) -> None:
    assert np.flatnonzero(weights([1.0, -1.0, 2.0, 1.0, 2.0], **options)).tolist() == kept


def test_top_p_counts_the_ids_that_top_k_keeps() -> None:
    """After top_k=2, one of two ids has half of the weight. Half of the weight of all ids would need more."""
    logits = np.log([0.3, 0.2, 0.2, 0.15, 0.15]).astype(np.float32)
    assert np.flatnonzero(weights(logits, top_p=0.55)).tolist() == [0, 1, 2]
    assert np.flatnonzero(weights(logits, top_p=0.55, top_k=2)).tolist() == [0, 2]  # two equal the second
    assert np.flatnonzero(weights(logits[[0, 1, 3, 4]], top_p=0.55, top_k=2)).tolist() == [0]


@pytest.mark.parametrize("bad", [[math.nan], [0.0, math.nan], [math.inf, 0.0], [-math.inf], []])
def test_not_finite(bad: list[float]) -> None:
    row = np.array([bad], np.float32)
    with pytest.raises(NumericalError, match="not finite"):
        Sampler("sample").choose(row.data, 0, 1, 0, 0)
    if bad:
        with pytest.raises(NumericalError, match="not finite"):
            token_info(row.data, 0, 0, 1)


def test_kernels_refuse_wrong_sizes() -> None:
    row = np.zeros((1, 3), np.float32)
    for number in (-1, 1):
        with pytest.raises(IndexError):
            sample_weights(row.data, number, **PLAIN)
        with pytest.raises(IndexError):
            log_probabilities(row.data, number, 0, 0)
    for token in (-1, 3):
        with pytest.raises(IndexError):
            log_probabilities(row.data, 0, token, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The draw


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_draws_follow_the_exact_probabilities(options: dict[str, Any]) -> None:
    """Draw along the steps of one stream, and along streams at one step. Another distribution would fail."""
    logits = (2 * np.random.default_rng(8).standard_normal((1, 90))).astype(np.float32)
    sampler = Sampler("sample", **options)
    exact, _ = expected(logits[0], **options)
    for stream, step in ((0, 1), (1, 0)):
        drawn = [sampler.choose(logits.data, 0, 5, n * stream, n * step) for n in range(20_000)]
        counts = np.bincount(drawn, minlength=90)
        assert_fits(counts, exact)
        other, _ = expected(logits[0]) if options else expected(logits[0], temperature=1.1)
        assert (counts[other == 0].any()) or chi_square_score(counts, other) > 4.75


RECORDED = [641, 1, 53, 521, 66, 831, 363, 53, 521, 66, 831, 594, 53, 521, 66, 641, 95, 535, 68, 66]


def test_recorded_draws() -> None:
    """The same seed gives the same tokens on every machine."""
    logits = (np.arange(1000) * 7919 % 1009 / 128 - 4).astype(np.float32)[None]  # exact in float32
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_k": 50}, {"top_p": 0.5}, {"min_p": 0.2, "temperature": 3}]
    found = [Sampler("sample", **options).choose(logits.data, 0, 2**64 - 1, 3, step) for options in ways for step in range(5)]
    assert found == RECORDED


def test_instruction_sets_agree() -> None:
    """All instruction sets agree, the baseline included."""
    logits = (5 * np.random.default_rng(4).standard_normal((1, 5003))).astype(np.float32)
    found = set()
    for isa in cpu_info()["available"]:
        with instruction_set(isa):
            weighed = sample_weights(logits.data, 0, **{**PLAIN, "temperature": 0.77, "top_p": 0.93})
            found.add((np.asarray(weighed).tobytes(), repr(log_probabilities(logits.data, 0, 17, 9))))
    assert len(found) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities


@fuzz
@given(values=rows, data=st.data())
def test_log_probabilities(values: list[float], data: st.DataObject) -> None:
    logits = np.array([values], np.float32)
    token = data.draw(st.integers(0, len(values) - 1))
    count = data.draw(st.integers(0, len(values) + 2))
    info = token_info(logits.data, 0, token, count)
    with np.errstate(divide="ignore"):
        exact = np.log(oracle.softmax(logits[0].astype(np.float64)))
    assert isinstance(info, TokenInfo)
    assert info.token == token
    np.testing.assert_allclose(info.logprob, exact[token], rtol=1e-12, atol=1e-7)
    order = sorted(range(len(values)), key=lambda i: (-logits[0, i], i))[:count]
    assert [other for other, _ in info.top] == order
    np.testing.assert_allclose([logprob for _, logprob in info.top], exact[order], rtol=1e-12, atol=1e-7)


def test_log_probabilities_far_apart() -> None:
    """If logits are so far apart that exp underflows, the logarithm is still exact."""
    info = token_info(np.array([[0.0, -1e30, 3.4e38, -3.4e38]], np.float32).data, 0, 3, 0)
    assert info.logprob == 2 * float(np.float32(-3.4e38))
    assert info.top == []
    assert token_info(np.zeros((1, 4), np.float32).data, 0, 1, 2) == (1, -math.log(4), [(0, -math.log(4)), (1, -math.log(4))])
    assert token_info(np.array([[3.0]], np.float32).data, 0, 0, 1) == (0, 0.0, [(0, 0.0)])


@pytest.mark.parametrize("V", [2, 3, 10, 308, 1000, 50257, 1 << 20])
def test_logarithm(V: int) -> None:
    """Equal logits: log V must be exact, though the kernel uses no library's logarithm."""
    assert token_info(np.zeros((1, V), np.float32).data, 0, 0, 0).logprob == pytest.approx(-math.log(V), rel=3e-16, abs=0)


# ---------------------------------------------------------------------------------------------------------------------
# Which sampler the options select, and which options are refused


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "median"),
        ({"name": "greedy"}, "greedy"),
        ({"name": "sample"}, "sample"),
        ({"do_sample": True}, "sample"),
        ({"do_sample": False}, "greedy"),
        ({"do_sample": True, "name": "sample", "top_k": 5}, "sample"),
        ({"do_sample": False, "name": "greedy"}, "greedy"),
        ({"temperature": 1}, "sample"),
        ({"top_k": 0}, "sample"),
        ({"top_p": 1}, "sample"),
        ({"min_p": 0}, "sample"),
        ({"temperature": 0}, "greedy"),
        ({"temperature": -0.0, "name": "sample", "top_p": 0.5, "seed": 3}, "greedy"),
        ({"temperature": np.float32(0), "do_sample": True}, "greedy"),
        ({"temperature": 0.0, "name": "greedy"}, "greedy"),
        ({"seed": 0}, "sample"),
        ({"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint64(2**64 - 1)}, "sample"),
    ],
)
def test_options_select_the_sampler(options: dict[str, Any], name: str) -> None:
    assert Sampler(**options).name == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "best"}, "sampler is 'best': .*median, greedy, sample"),
        ({"name": 3}, "sampler is 3"),
        ({"name": ["greedy"]}, "sampler is"),
        ({"do_sample": 1}, "do_sample is 1"),
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": True, "name": "greedy"}, "do_sample is True.* sample.*'greedy'"),
        ({"do_sample": False, "name": "median"}, "sampler is 'median'"),
        ({"do_sample": False, "temperature": 0.5}, "temperature .* sample.* greedy"),
        ({"name": "median", "seed": 1}, "seed .* sample.* median"),
        ({"name": "greedy", "top_k": 0}, "top_k is an option"),
        ({"name": "greedy", "top_p": 1.0}, "top_p is an option"),
        ({"name": "greedy", "min_p": 0}, "min_p is an option"),
        ({"name": "median", "temperature": 0}, "temperature .* sample.* median"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": [1.0]}, "temperature is"),
        ({"temperature": np.zeros(2)}, "temperature is array"),
        ({"temperature": 1j}, "temperature is 1j"),
        ({"top_k": -1}, r"top_k is -1: .*whole number.* 0 "),
        ({"top_k": 1.0}, "top_k is 1.0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": "5"}, "top_k is '5'"),
        ({"top_p": -0.1}, "top_p is -0.1: .*from 0 to 1"),
        ({"top_p": 1.0000001}, "top_p is 1.0000001"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -1e-9}, "min_p is -1e-09"),
        ({"min_p": 2}, "min_p is 2"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"seed": -1}, r"seed is -1: .*0 to 2\^64 - 1.*leave it out"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"seed": "7"}, "seed is '7'"),
        ({"seed": False}, "seed is False"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Sampler(**options)
    assert "\n" not in str(caught.value)


def test_seeds_are_random_unless_given() -> None:
    assert len({Sampler("sample").start() for _ in range(100)}) == 100
    assert Sampler(seed=9).start() == 9
    assert Sampler("median").start() is Sampler("greedy").start() is None
