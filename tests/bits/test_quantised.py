"""q8_0 and q4_0: products equal plain loops, bit for bit, and logits do not depend on threads, batches and caches.

The scalar twin (_reference.pyx) and NumPy make the expected numbers; the float64 oracle measures their accuracy."""

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from known import instruction_set
from quantisers import quantise, to_panels
from running import gist

from pygpt import GPT2, Config, InputError, SerialGPT2, cpu_info
from pygpt._kernels import Weights, blocks_to_panels, matrix_bytes, matrix_product, quantise_panels
from pygpt._reference import KERNELS
from pygpt.formats.dtypes import FLOAT32, FORMATS
from pygpt.formats.panels import QUANTISED, StoredWeights, from_panels, panel_sizes, quantised

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

ISAS = cpu_info()["available"]
NAMES = sorted(QUANTISED)
BITS = {"q8_0": 8, "q4_0": 4}

fuzz = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 2**32 - 1)


FUSED = [name for name in ISAS if name != "baseline"]


def same(a: Float32, b: Float32) -> bool:
    """Equal bits, except that a NaN equals every NaN."""
    return a.shape == b.shape and bool(((a.view("u4") == b.view("u4")) | (np.isnan(a) & np.isnan(b))).all())


# ---------------------------------------------------------------------------------------------------------------------
# Matrices and rows to order


def panels(name: str, N: int, K: int, seed: int) -> Bytes:
    """Random panels: every byte, -128 more often, scales of both signs from 0 and subnormals to the largest."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, matrix_bytes(name, N, K), np.uint8)
    out[rng.random(out.size) < 0.05] = 0x80
    scales = out[panel_sizes(FORMATS[name], N, K)[0] :].view("<u2")
    scales[:] = rng.choice([0x0000, 0x8001, 0x03FF, 0x0400, 0x2E66, 0xAE66, 0x3C00, 0x7BFF], scales.size)
    return out


SPECIAL = np.array([0, -0.0, 1e-45, -1e-38, 3e-37, 3.8e-37, 1, -1, 3e38, -3.4e38, np.inf, -np.inf, np.nan], np.float32)


def rows_of(count: int, K: int, seed: int, specials: int) -> Float32:
    """Rows of activations: groups of any size, whole groups of zeros, and some special numbers."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-30, 30, (count, (K + 31) // 32))).repeat(32, axis=1)[:, :K]
    rows = (rng.standard_normal((count, K)) * sizes).astype(np.float32)
    rows[:, : K // 3][rng.random((count, K // 3)) < 0.3] = 0
    rows[rng.random((count, K)) < 0.02] = 0.5  # ties of the rounding
    for _ in range(specials):
        rows[rng.integers(count), rng.integers(K)] = rng.choice(SPECIAL)
    if seed % 3 == 0:
        rows[:, :32] = 0
    return rows


def twin(name: str, weights: Bytes, inp: Float32, N: int) -> Float32:
    """The product in plain loops."""
    K, groups = inp.shape[1], (inp.shape[1] + 31) // 32
    numbers, scales, out = np.empty((N, K), np.int8), np.empty((N, groups), np.float32), np.empty((len(inp), N), np.float32)
    call("unpack_panels", numbers, scales, weights, BITS[name], K, N)
    call("matmul_quantised_forward", out, inp, numbers, scales, None, len(inp), K, N)
    return out


def call(kernel: str, *arguments: "npt.NDArray[Any] | int | None") -> None:
    """Call one kernel of the serial program."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    types = [ctypes.c_ssize_t if isinstance(a, int) else ctypes.c_void_p for a in arguments]
    ctypes.CFUNCTYPE(None, *types)(KERNELS[kernel])(*values)


def product(name: str, weights: Bytes, inp: Float32, N: int, *, packed: bool, parts: int = 1) -> Float32:
    """The product by the microkernels, as so many workers compute it."""
    out = np.full((len(inp), N), 7, np.float32)
    cuts = sorted({min(N, 16 * ((N + 15) // 16 * i // parts)) for i in range(parts + 1)})
    for start, stop in itertools.pairwise(cuts):
        matrix_product(out, inp, name, weights, start, stop, packed=packed)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Products


@fuzz
@given(
    name=st.sampled_from(NAMES), rows=st.one_of(st.integers(1, 20), st.integers(21, 70)), N=st.integers(1, 100),
    K=st.one_of(st.integers(1, 200), st.sampled_from([32, 64, 768])), seed=seeds, specials=st.integers(0, 3),
    parts=st.integers(1, 3),
)  # fmt: skip
def test_products_are_the_scalar_twins(name: str, rows: int, N: int, K: int, seed: int, specials: int, parts: int) -> None:
    """In every instruction set, the baseline included, for a few rows and for many."""
    weights, inp = panels(name, N, K, seed), rows_of(rows, K, seed, specials)
    expected = twin(name, weights, inp, N)
    for isa in ISAS:
        with instruction_set(isa):
            for packed in (False, True):
                assert same(product(name, weights, inp, N, packed=packed, parts=parts), expected), (isa, packed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums(name: str, isa: str) -> None:
    """All numbers at their limits: nothing saturates, and a weight of -128 is exact."""
    K, N = 96, 16
    for byte, number in {"q8_0": [(0x7F, 127), (0x80, -128), (0x81, -127)], "q4_0": [(0xFF, 7), (0x00, -8)]}[name]:
        weights = np.full(matrix_bytes(name, N, K), byte, np.uint8)
        weights[panel_sizes(FORMATS[name], N, K)[0] :].view("<f2")[:] = 1
        for sign in (1, -1):
            with instruction_set(isa):
                out = product(name, weights, np.full((1, K), sign * 127, np.float32), N, packed=False)
            assert (out == K * number * sign * 127).all()


def test_the_twin_by_hand() -> None:
    """The serial program's product against NumPy's integers: each group's sum is exact, and one chain adds them."""
    rng = np.random.default_rng(5)
    blocks = np.empty((3, 2), FORMATS["q8_0"].dtype)
    blocks["d"], blocks["q"] = [[0.5, 2], [-1, 0.25], [0, 3]], rng.integers(-128, 128, (3, 2, 32))
    inp = rng.standard_normal((2, 64)).astype(np.float32)
    weights = np.concatenate(to_panels(FORMATS["q8_0"], blocks))
    groups = inp.reshape(2, 2, 32)
    most = np.abs(groups).max(axis=2)
    q = np.rint(groups * (np.float32(127) / most)[:, :, None]).astype(np.int64)
    sums = np.einsum("rgi,ngi->rng", q, blocks["q"].astype(np.int64))
    factors = blocks["d"].astype(np.float32) * (most / np.float32(127))[:, None]
    expected = np.zeros((2, 3))
    for g in range(2):  # a float64 holds a product of float32 and the sum is rounded once: as a fused multiply-add
        expected = (sums[:, :, g] * factors[:, :, g].astype(np.float64) + expected).astype(np.float32).astype(np.float64)
    assert same(twin("q8_0", np.concatenate([weights, np.zeros(64, np.uint8)]), inp, 3), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0, -0.0], 0),  # nothing to scale
        ([1e-38, 0.0], 0),  # 127 / max is infinite
        ([3.8e-37, 0.0], 127 * (np.float32(3.8e-37) / np.float32(127))),
        ([3e38, 0.0], 127 * (np.float32(3e38) / np.float32(127))),
        ([np.inf, 0.0], np.nan),
        ([0.0, np.nan], np.nan),
    ],
)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_at_the_edge_of_float32(row: list[float], expected: float, isa: str) -> None:
    weights = np.zeros(matrix_bytes("q8_0", 1, 64), np.uint8)
    weights[0], weights[panel_sizes(FORMATS["q8_0"], 1, 64)[0] + 1] = 1, 0x3C  # the weights 1, 0, 0, ...
    inp = np.zeros((1, 64), np.float32)
    inp[0, :2] = row
    with instruction_set(isa):
        for packed in (False, True):
            found = product("q8_0", weights, inp, 1, packed=packed)
            assert same(found, np.array([[expected]], np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Making panels


@fuzz
@given(name=st.sampled_from(NAMES), N=st.integers(1, 60), K=st.integers(1, 150), seed=seeds, nth=st.integers(1, 4))
def test_panels_are_a_files(name: str, N: int, K: int, seed: int, nth: int) -> None:
    """Numbers of every size, in every instruction set and for any number of workers, against NumPy's conversion."""
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal((N, K)) * np.exp2(rng.integers(-40, 14, (N, 1)))).astype(np.float32)
    array[rng.random((N, K)) < 0.1] = 0
    array[rng.integers(N), rng.integers(K)] = rng.choice([1e-41, -3e-6, 4e5, -5e4, 0])
    padded = np.pad(array, ((0, 0), (0, -K % 32)))
    values, scales = to_panels(FORMATS[name], quantise(FORMATS[name], padded))
    for isa in ISAS:
        out = np.zeros(matrix_bytes(name, N, K), np.uint8)
        with instruction_set(isa):
            for ith in range(nth):
                assert quantise_panels(out, name, array.view("u1").reshape(-1), "float32", 1, N, K, ith, nth)
        assert np.array_equal(out[: values.size], values), isa
        assert np.array_equal(out[values.size : values.size + scales.size], scales), isa


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_layers(name: str) -> None:
    """Panels of two layers of bfloat16 equal the panels of the same numbers in float32."""
    array = np.random.default_rng(3).standard_normal((2, 40, 70)).astype(np.float32)
    array = (array.view("u4") & 0xFFFF0000).view("f4")
    made = []
    for source, stored in (array, "float32"), ((array.view("u4") >> 16).astype("<u2"), "bfloat16"):
        out = np.zeros(2 * matrix_bytes(name, 40, 70), np.uint8)
        assert quantise_panels(out, name, np.ascontiguousarray(source).view("u1").reshape(-1), stored, 2, 40, 70, 0, 1)
        made.append(out)
    assert np.array_equal(made[0], made[1])
    one = np.zeros(matrix_bytes(name, 40, 70), np.uint8)
    assert quantise_panels(one, name, array[1].view("u1").reshape(-1), "float32", 1, 40, 70, 0, 1)
    assert np.array_equal(made[0][one.size :], one)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 3e38, 9e6])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_out_of_range(name: str, odd: float) -> None:
    array = np.ones((20, 64), np.float32)
    array[17, 40] = odd
    out = np.zeros(matrix_bytes(name, 20, 64), np.uint8)
    source = array.view("u1").reshape(-1)
    assert quantise_panels(out, name, source, "float32", 1, 20, 64, 0, 2)
    assert not quantise_panels(out, name, source, "float32", 1, 20, 64, 1, 2)
    scales = out[panel_sizes(FORMATS[name], 20, 64)[0] :].view("<f2")
    assert np.isnan(scales).sum() == 1  # it shows


@fuzz
@given(name=st.sampled_from(NAMES), N=st.integers(1, 60), groups=st.integers(1, 5), seed=seeds, nth=st.integers(1, 3))
def test_blocks_of_gguf_in_panels(name: str, N: int, groups: int, seed: int, nth: int) -> None:
    blocks = np.random.default_rng(seed).integers(0, 256, (2, N, groups, FORMATS[name].block_bytes), np.uint8)
    out = np.full(2 * matrix_bytes(name, N, 32 * groups), 9, np.uint8)
    for ith in range(nth):
        blocks_to_panels(out, name, blocks.reshape(-1), 2, N, 32 * groups, ith, nth)
    for layer, found in zip(blocks, out.reshape(2, -1), strict=True):
        values, scales = panel_sizes(FORMATS[name], N, 32 * groups)
        read = from_panels(FORMATS[name], found.data[:values], found.data[values : values + scales], N, 32 * groups)
        assert read.tobytes() == layer.tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def config_of(data: st.DataObject) -> Config:
    HS, NH = data.draw(st.integers(1, 40), label="HS"), data.draw(st.integers(1, 3), label="NH")
    return Config(
        maxT=data.draw(st.integers(1, 40), label="maxT"), V=data.draw(st.integers(1, 300), label="V"), L=2, NH=NH, C=NH * HS
    )


class Random:
    """A model of random weights, as an open one."""

    def __init__(self, config: Config, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.config, self.format, self.path, self.arrays = config, FLOAT32, "random", {}
        for name, shape, _, _ in config.tensors(padded=False):
            spread = shape[-1] ** -0.5 if len(shape) == 3 else 0.3
            self.arrays[name] = (spread * rng.standard_normal(shape) + (name in ("ln1w", "ln2w", "lnfw"))).astype(np.float32)

    def stored(self) -> dict[str, tuple[str, memoryview]]:
        return {name: ("float32", memoryview(array.tobytes())) for name, array in self.arrays.items()}

    def close(self) -> None:
        """Nothing is open."""


def values_of(model: StoredWeights) -> dict[str, oracle.Array]:
    """Return the numbers of a quantised model as float64."""
    arrays = {}
    for name, shape, _, _ in model.config.tensors(padded=False):
        kind, data = model.tensors[name]
        if kind not in QUANTISED:
            arrays[name] = np.frombuffer(data, "<f4").reshape(shape).astype(np.float64)
            continue
        N, K = shape[-2:]
        matrices = []
        for part in np.frombuffer(data, np.uint8).reshape(-1, matrix_bytes(kind, N, K)):
            values, scales = panel_sizes(FORMATS[kind], N, K)
            read = from_panels(FORMATS[kind], part.data[:values], part.data[values : values + scales], N, K)
            matrices.append(FORMATS[kind].to_float32(read)[:, :K])
        arrays[name] = np.stack(matrices).reshape(shape).astype(np.float64)
    return arrays


def logits(model: StoredWeights, tokens: list[int], threads: int = 1) -> Float32:
    with GPT2(model, threads=threads) as gpt2:
        return gpt2.logits(tokens)


@fuzz
@given(data=st.data(), name=st.sampled_from(NAMES), head=st.sampled_from([None, *NAMES]), seed=seeds, nth=st.integers(2, 4))
def test_one_arithmetic(data: st.DataObject, name: str, head: str | None, seed: int, nth: int) -> None:
    """Instruction sets, threads, cache, chunks and batch change no bit of a logit."""
    config = config_of(data)
    model = quantised(Random(config, seed), name, head, threads=nth)
    tokens = data.draw(st.lists(st.integers(0, config.V - 1), min_size=1, max_size=config.maxT), label="tokens")
    cut = data.draw(st.integers(0, len(tokens)), label="cut")
    expected = None
    for isa in FUSED:
        with instruction_set(isa), GPT2(model, threads=nth) as gpt2:
            found = gpt2.logits(tokens)
            expected = found if expected is None else expected
            assert same(found, expected), isa
            first, second = gpt2.new_cache(), gpt2.new_cache()
            rows = [gpt2.step([(token, first, True) for token in part]) for part in (tokens[:cut], tokens[cut:]) if part]
            assert same(np.concatenate(rows), expected)
            first.truncate(0)
            both = np.stack([gpt2.step([(token, first, True), (token, second, True)]) for token in tokens], axis=1)
            assert same(both[0], expected)
            assert same(both[1], expected)
        with instruction_set(isa):
            assert same(logits(model, tokens), expected)


# The tolerance. An activation is rounded to a multiple of 1/127 of its group's largest: an error of standard deviation 1/440 of
# that, about 1/150 of the group's root mean square. A product keeps the ratio. The squares of the errors of 9 products one
# after another (4 a layer, and the head) add up: 1/50 of the logits' root mean square. 5 standard deviations are allowed.
SPREAD = 5 / 50


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_against_float64(name: str, seed: int) -> None:
    """With the same quantised weights, the logits differ from the oracle's only by the rounding of activations."""
    config = Config(maxT=30, V=211, L=2, NH=3, C=96)
    model = quantised(Random(config, seed), name)
    tokens = [(37 * i + seed) % config.V for i in range(30)]
    exact = oracle.forward(values_of(model), config, tokens)
    error = logits(model, tokens) - exact
    assert np.abs(error).max() <= SPREAD * np.sqrt((exact**2).mean())
    assert np.abs(error).max() >= SPREAD / 100 * np.sqrt((exact**2).mean())  # the bound is of the right size


@pytest.mark.parametrize("name", NAMES)
def test_the_serial_reference(name: str) -> None:
    """The serial program computes with the same integers: only its float32 sums are in another order."""
    config = Config(maxT=12, V=97, L=2, NH=3, C=69)
    model = quantised(Random(config, 3), name)
    tokens = [(5 * i) % 97 for i in range(12)]
    with SerialGPT2(model) as serial:
        expected = serial.logits(tokens)
    exact = oracle.forward(values_of(model), config, tokens)
    found = logits(model, tokens)
    # An activation next to a tie may round to the other side and then moves by 1/127 of its group's largest: few do.
    assert np.median(np.abs(found - expected)) <= 1e-5
    assert np.abs(found - expected).max() <= 0.3 * np.abs(found - exact).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_quantised_matrix(name: str, isa: str) -> None:
    """widen() gives every number exactly: positions, which are only widened, have the bits of the same float32 values."""
    config = Config(maxT=19, V=50, L=1, NH=1, C=43)
    source = Random(config, 1)
    quantised_wpe = np.zeros(matrix_bytes(name, 19, 43), np.uint8)
    assert quantise_panels(quantised_wpe, name, source.arrays["wpe"].view("u1").reshape(-1), "float32", 1, 19, 43, 0, 1)
    panels = StoredWeights(config, source.stored() | {"wpe": (name, quantised_wpe.data)})
    source.arrays["wpe"] = values_of(panels)["wpe"].astype(np.float32)
    plain = StoredWeights(config, source.stored())
    with instruction_set(isa):
        assert same(logits(panels, [7] * 19), logits(plain, [7] * 19))


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: quantised(s, "q5_1"), "'q5_1' ... q8_0, q4_0"),
        (lambda s: quantised(s, "q8_0", "int3"), "'int3' ... q8_0, q4_0"),
    ],
)
def test_unknown_formats(change: Callable[[Any], object], message: str) -> None:
    with pytest.raises(InputError, match=gist(message)):
        change(Random(Config(maxT=2, V=3, L=1, NH=1, C=2), 0))


@pytest.mark.parametrize(("name", "odd"), [("fcw", np.nan), ("wte", np.inf), ("attprojw", -2e7)])
def test_weights_out_of_range(name: str, odd: float) -> None:
    source = Random(Config(maxT=2, V=3, L=2, NH=1, C=2), 0)
    source.arrays[name].reshape(-1)[-1] = odd
    with pytest.raises(InputError, match=gist(f"{name} ... q8_0 ... 8319008")):
        quantised(source, "q8_0", threads=2)


def test_vectors_stay_float32() -> None:
    config = Config(maxT=2, V=3, L=1, NH=1, C=2)
    model = quantised(Random(config, 0), "q8_0")
    model.tensors["lnfb"] = "q8_0", memoryview(bytes(matrix_bytes("q8_0", 1, 2)))
    with pytest.raises(InputError, match=r"lnfb.*q8_0"):
        GPT2(model)


def test_weights_that_share_caches_have_the_same_dimensions() -> None:
    shape = {"maxT": 2, "V": 3, "L": 1, "NH": 1, "C": 2}
    kin, other = (Random(Config(**shape), seed) for seed in (0, 1))
    Weights(kin.config, other.stored(), Weights(kin.config, kin.stored()))
    for name, size in shape.items():
        other = Random(Config(**{**shape, name: 2 * size}), 0)
        with pytest.raises(InputError, match="other dimensions"):
            Weights(other.config, other.stored(), Weights(kin.config, kin.stored()))


def test_buffers_of_another_size() -> None:
    out, rows = np.zeros(matrix_bytes("q8_0", 16, 32), np.uint8), np.zeros(16 * 34, np.uint8)
    with pytest.raises(InputError, match=r"blocks.*543.*544"):
        blocks_to_panels(out, "q8_0", rows[1:], 1, 16, 32, 0, 1)
    with pytest.raises(InputError, match=r"out.*575.*576"):
        blocks_to_panels(out[1:], "q8_0", rows, 1, 16, 32, 0, 1)
    with pytest.raises(InputError, match=r"K.*33.*32"):
        blocks_to_panels(out, "q8_0", rows, 1, 16, 33, 0, 1)
    with pytest.raises(InputError, match=r"float32.*q8_0.*q4_0"):
        quantise_panels(out, "float32", rows, "float32", 1, 16, 32, 0, 1)
