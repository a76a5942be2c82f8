"""One arithmetic, bit for bit: threads, cache, chunks, batches, file versions and instruction sets change no bit of a logit.

The tests also measure accuracy: the fixed order of a dot product against exact arithmetic, and results against the float64
oracle and the serial reference. Further tests have recorded continuations, numbers at the edge of float32, and the samplers
alone."""

import copy
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from known import instruction_set
from make_checkpoint import make, parse
from running import gist

from pygpt import GPT2, Config, InputError, KVCache, NumericalError, SerialGPT2, _kernels, cpu_info, cpus, write_checkpoint
from pygpt._kernels import Step, Trace, Weights, copy_keys_values, greedy, matrix_product, median, select_isa, weight_formats
from pygpt.formats.checkpoint import Checkpoint
from pygpt.formats.dtypes import FLOAT32, FORMATS, Format
from pygpt.generation.sampling import sample
from pygpt.hub.find import EMBEDDED_MODEL
from pygpt.network import CHUNK

BEST = cpus.workers_for  # as it is outside of tests

Float32 = npt.NDArray[np.float32]
Tensors = dict[str, Float32]
Tweak = Callable[[Tensors], None]

VERSIONS = (1, 3, 5)
ISAS = cpu_info()["available"]
LANES = 16
EPS = 2.0**-24  # half the distance of 1 to the next float32: the relative error of one operation
GOLDENS: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).parents[1].joinpath("data/goldens.json").read_text())[
    "cases"
]
GPT2_SHAPE = "make_checkpoint.py"

fuzz = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

# ---------------------------------------------------------------------------------------------------------------------
# Models to order


def is_fused(name: str) -> bool:
    with instruction_set(name):
        return bool(cpu_info()["fused"])


FUSED = [name for name in ISAS if is_fused(name)]


def random_tensors(config: Config, seed: int) -> Tensors:
    """Lively weights: every kernel moves the result, attention prefers some keys, no activation overflows."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape, _, _ in config.tensors(padded=False):
        spread = 1 / math.sqrt(shape[-1]) if name.endswith("w") and len(shape) == 3 else 0.3
        tensors[name] = (spread * rng.standard_normal(shape)).astype(np.float32)
        if name in ("ln1w", "ln2w", "lnfw"):
            tensors[name] += np.float32(1)
    tensors["qkvw"] *= np.float32(2)
    return tensors


class Files:
    """Checkpoints made to order in one folder, each written once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[Config, int, int], Path] = {}

    def random(self, config: Config, seed: int, version: int = 3) -> Path:
        key = (config, seed, version)
        if key not in self.made:
            self.made[key] = self.write(config, random_tensors(config, seed), version)
        return self.made[key]

    def crafted(self, config: Config, seed: int, tweak: Tweak, version: int = 3) -> Path:
        tensors = random_tensors(config, seed)
        tweak(tensors)
        return self.write(config, tensors, version, name="crafted.bin")

    def write(self, config: Config, tensors: Tensors, version: int, *, name: str | None = None) -> Path:
        path = self.folder / (name or f"{len(self.made)}.bin")
        write_checkpoint(path, config, tensors, version=version)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def gpt2_shape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of GPT-2 124M's shape: half a gigabyte, made once, removed afterwards."""
    path = tmp_path_factory.mktemp("gpt2") / "model.bin"
    make(path)
    yield path
    path.unlink()


def whole(path: Path, tokens: Sequence[int], *, threads: int = 1) -> Float32:
    """The logits of every position, (T, V), in one step."""
    with GPT2.load(path, threads=threads) as model:
        cache = model.new_cache()
        return model.step([(token, cache, True) for token in tokens])


def same(a: Float32, b: Float32) -> bool:
    """Check equal bits. A NaN equals every NaN, because its sign and payload are not results."""
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and np.array_equal(a, b, equal_nan=True)


head_sizes = st.one_of(st.integers(1, 40), st.sampled_from([1, 15, 16, 17, 31, 32, 33, 48, 64]))


@st.composite
def configs(draw: st.DrawFn, *, shortest: int = 1) -> Config:
    """Small shapes with every kind of ragged edge."""
    HS = draw(head_sizes)
    NH = draw(st.integers(1, max(1, min(5, 100 // HS))))
    return Config(
        maxT=draw(st.integers(shortest, 40)), V=draw(st.integers(1, 300)), L=draw(st.integers(1, 3)), NH=NH, C=NH * HS
    )


def prompts(config: Config, *, at_least: int = 1) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, config.V - 1), min_size=at_least, max_size=config.maxT)


seeds = st.integers(0, 2**32 - 1)
versions = st.sampled_from(VERSIONS)
isas = st.sampled_from(ISAS)
threads = st.integers(1, 8)

# ---------------------------------------------------------------------------------------------------------------------
# Bit for bit


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, version=versions, isa=isas, nth=st.integers(2, 8))
def test_parallel_is_one_thread(
    files: Files, data: st.DataObject, config: Config, seed: int, version: int, isa: str, nth: int
) -> None:
    tokens, path = data.draw(prompts(config)), files.random(config, seed, version)
    with instruction_set(isa):
        one = whole(path, tokens)
        assert one.shape == (len(tokens), config.V)
        assert np.isfinite(one).all()
        assert same(whole(path, tokens, threads=nth), one)


def test_choice_of_workers_keeps_the_bits(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one sequence on one worker, on all workers, and with the model's choice."""
    config = Config(maxT=64, V=211, L=2, NH=3, C=93)
    path = files.random(config, 12)
    tokens = [(13 * i) % config.V for i in range(64)]
    expected = whole(path, tokens)
    for choose in (lambda threads, *_: threads, lambda threads, *_: 1, BEST):
        monkeypatch.setattr(cpus, "workers_for", choose)
        with GPT2.load(path, threads=3) as model:
            cache = model.new_cache()
            assert same(model.prefill(cache, tokens[:40]), expected[39])
            for i in range(40, 64):
                monkeypatch.setattr(cpus, "workers_for", choose if i % 3 else lambda threads, *_: threads)
                assert same(model.decode(cache, tokens[i]), expected[i])


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, version=versions, isa=isas, nth=threads)
def test_cached_is_recomputed(
    files: Files, data: st.DataObject, config: Config, seed: int, version: int, isa: str, nth: int
) -> None:
    tokens, path = data.draw(prompts(config)), files.random(config, seed, version)
    with instruction_set(isa), GPT2.load(path, threads=nth) as model:
        cache = model.new_cache()
        for count, token in enumerate(tokens, start=1):
            cached = model.decode(cache, token)
            assert same(cached, model.prefill(model.new_cache(count), tokens[:count]))
            assert cache.length == count
        assert same(model.logits(tokens)[-1], cached)


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, version=versions, isa=isas, nth=threads)
def test_chunked_is_whole(
    files: Files, data: st.DataObject, config: Config, seed: int, version: int, isa: str, nth: int
) -> None:
    tokens, path = data.draw(prompts(config)), files.random(config, seed, version)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)), max_size=6), label="cuts") | {len(tokens)})
    wants = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)), label="wants")
    with instruction_set(isa), GPT2.load(path, threads=nth) as model:
        expected = whole(path, tokens)
        cache, start = model.new_cache(), 0
        for stop in cuts:
            logits = model.step([(tokens[i], cache, wants[i]) for i in range(start, stop)])
            assert same(logits, expected[start:stop][wants[start:stop]])
            assert len(cache) == stop
            start = stop


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, version=versions, isa=isas, nth=threads)
def test_batched_is_alone(
    files: Files, data: st.DataObject, config: Config, seed: int, version: int, isa: str, nth: int
) -> None:
    """Sequences of different lengths in shared steps, their rows interleaved in any order."""
    path = files.random(config, seed, version)
    sequences = data.draw(st.lists(prompts(config), min_size=2, max_size=5), label="sequences")
    owners = data.draw(st.permutations([i for i, tokens in enumerate(sequences) for _ in tokens]), label="row order")
    step = data.draw(st.integers(1, len(owners)), label="rows of a step")
    with instruction_set(isa), GPT2.load(path, threads=nth) as model:
        alone = [whole(path, tokens) for tokens in sequences]
        caches = [model.new_cache(len(tokens)) for tokens in sequences]
        done = [0] * len(sequences)
        for start in range(0, len(owners), step):
            rows, expected = [], []
            for owner in owners[start : start + step]:
                rows.append((sequences[owner][done[owner]], caches[owner], True))
                expected.append(alone[owner][done[owner]])
                done[owner] += 1
            assert same(model.step(rows), np.stack(expected))
        assert [cache.length for cache in caches] == [len(tokens) for tokens in sequences]


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, isa=isas, nth=threads, company=st.integers(0, 40))
def test_place_of_a_row(files: Files, data: st.DataObject, config: Config, seed: int, isa: str, nth: int, company: int) -> None:
    """One row, anywhere among any number of others."""
    path, ids = files.random(config, seed), st.integers(0, config.V - 1)
    token, others = data.draw(ids), data.draw(st.lists(ids, min_size=company, max_size=company))
    place = data.draw(st.integers(0, company))
    with instruction_set(isa), GPT2.load(path, threads=nth) as model:
        rows = [(other, model.new_cache(1), True) for other in others]
        rows.insert(place, (token, model.new_cache(1), True))
        assert same(model.step(rows)[place], whole(path, [token])[0])


@fuzz
@given(data=st.data(), config=configs(shortest=2), seed=seeds, isa=isas, nth=threads)
def test_removed_rows_leave_no_trace(files: Files, data: st.DataObject, config: Config, seed: int, isa: str, nth: int) -> None:
    path = files.random(config, seed)
    kept = data.draw(st.integers(0, config.maxT - 1), label="kept")
    first = data.draw(prompts(config, at_least=max(kept, 1)), label="first")
    rest = data.draw(
        st.lists(st.integers(0, config.V - 1), min_size=1, max_size=config.maxT - kept), label="what follows instead"
    )
    with instruction_set(isa), GPT2.load(path, threads=nth) as model:
        cache = model.new_cache()
        model.prefill(cache, first)
        cache.truncate(kept)
        assert cache.length == kept
        logits = model.step([(token, cache, True) for token in rest])
        assert same(logits, whole(path, first[:kept] + rest)[kept:])


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, isa=isas, nth=threads)
def test_file_versions(files: Files, data: st.DataObject, config: Config, seed: int, isa: str, nth: int) -> None:
    """Version 3 is version 1 with padding; version 5 computes as the same values in float32 do."""
    tokens = data.draw(prompts(config))
    with Checkpoint(files.random(config, seed, 5)) as checkpoint:
        widened = {name: checkpoint.tensor(name) for name, _, _, _ in config.tensors(padded=False)}
    with instruction_set(isa):
        three = whole(files.random(config, seed, 3), tokens, threads=nth)
        assert same(whole(files.random(config, seed, 1), tokens, threads=nth), three)
        five = whole(files.random(config, seed, 5), tokens, threads=nth)
        for version in (1, 3):
            assert same(whole(files.write(config, widened, version, name="wide.bin"), tokens, threads=nth), five)


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, version=versions, nth=threads)
def test_instruction_sets(files: Files, data: st.DataObject, config: Config, seed: int, version: int, nth: int) -> None:
    """Every set with fused multiply-add gives the same bits; the baseline, which rounds apart, is close to them."""
    tokens, path = data.draw(prompts(config)), files.random(config, seed, version)
    results = {}
    for isa in ISAS:
        with instruction_set(isa):
            results[isa] = whole(path, tokens, threads=nth)
    for isa in FUSED:
        assert same(results[isa], results[FUSED[0]]), isa
    _, tolerance = exact_logits(path, config, tokens)
    assert_accurate(results["baseline"], results[ISAS[0]].astype(np.float64), tolerance)


def logits_of(config: Config, tensors: Tensors, stored: dict[str, Format], tokens: Sequence[int]) -> Float32:
    """The logits of every position, (T, V), with each tensor in its format, on one worker."""
    packed = {}
    for name, array in tensors.items():
        rounded = stored[name].from_float32
        assert rounded is not None
        packed[name] = stored[name].name, memoryview(rounded(array.reshape(-1)).tobytes())
    weights = Weights(config, packed)
    step, cache = Step(weights, 1, 0), _kernels.KeysValues(weights, len(tokens))
    step.prepare([(token, cache, True) for token in tokens], 1)
    step(0, 1)
    return np.asarray(step.finish())


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, isa=isas)
def test_each_tensor_has_its_own_format(data: st.DataObject, config: Config, seed: int, isa: str) -> None:
    """Any mixture of formats of single values computes as the same values in float32 do."""
    tokens, tensors = data.draw(prompts(config)), random_tensors(config, seed)
    known = [FORMATS[name] for name, block in weight_formats().items() if block[0] == 1 and FORMATS[name].from_float32]
    formats = {name: data.draw(st.sampled_from(known), label=name) for name in tensors}
    widened = {}
    for name, array in tensors.items():
        rounded = formats[name].from_float32
        assert rounded is not None
        widened[name] = formats[name].to_float32(rounded(array.reshape(-1))).reshape(array.shape)
    with instruction_set(isa):
        expected = logits_of(config, widened, dict.fromkeys(tensors, FLOAT32), tokens)
        assert np.isfinite(expected).all()
        assert same(logits_of(config, tensors, formats, tokens), expected)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_pattern_of_two_bytes(isa: str, kind: str) -> None:
    """Each of the 65,536 patterns as a weight whose input is 1. The other inputs and weights are 0."""
    patterns, rows = np.arange(1 << 16, dtype="<u2").reshape(-1, 16), np.ones((1, 16), np.float32)
    values = FORMATS[kind].to_float32(patterns.reshape(-1).view(FORMATS[kind].dtype)).reshape(patterns.shape)
    values[values == 0] = 0  # a sum that begins with 0 does not end with -0
    out = np.zeros((1, 16), np.float32)
    with instruction_set(isa):
        for at, expected in zip(patterns, values, strict=True):
            matrix = np.where(np.arange(16) == 0, at[:, None], 0).astype("<u2")  # (16 outputs, 16 inputs)
            matrix_product(out, rows, kind, matrix.view("u1").reshape(-1), 0, 16, packed=False)
            assert same(out[0], expected)


@pytest.mark.parametrize("isa", ISAS)
def test_the_tables_of_formats_agree(isa: str) -> None:
    with instruction_set(isa):
        found = weight_formats()
    assert list(found)[:3] == ["float32", "bfloat16", "float16"]
    for name, block in found.items():
        if block[0] == 1 or name in FORMATS:
            assert (FORMATS[name].block_values, FORMATS[name].block_bytes) == block
    assert list(found.items())[3:] == [("q8_0", (32, 34)), ("q4_0", (32, 18))]
    for name, row in FORMATS.items():
        assert row.name == name
        assert np.dtype(row.dtype).itemsize == row.block_bytes


@pytest.mark.parametrize(
    ("name", "stored", "cut", "message"),
    [
        ("qkvw", "q5_1", 0, "'q5_1' ... float32, bfloat16, float16, q8_0, q4_0"),
        ("lnfb", "q6_k", 0, "'q6_k' ... float32, bfloat16, float16, q8_0, q4_0"),
        ("fcw", "float32", 1, "fcw ... 9215 ... 9216 ... float32"),
        ("lnfb", "bfloat16", 0, "lnfb ... 96 ... 48 ... bfloat16"),
    ],
)
def test_weights_that_do_not_fit(name: str, stored: str, cut: int, message: str) -> None:
    tensors = {key: ("float32", memoryview(array.tobytes())) for key, array in random_tensors(PLAIN, 0).items()}
    assert Weights(PLAIN, tensors)
    tensors[name] = stored, tensors[name][1][cut:]
    with pytest.raises(InputError, match=gist(message)):
        Weights(PLAIN, tensors)


def specials() -> st.SearchStrategy[Float32]:
    """Numbers that are handled apart somewhere: zeros of both signs, denormals, the largest, infinities, every NaN."""
    bits = st.one_of(
        st.sampled_from([0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF]),
        st.sampled_from([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800123]),
        st.integers(0, 2**32 - 1),
    )
    return bits.map(lambda pattern: np.array(pattern, np.uint32).view(np.float32))


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, nth=threads)
def test_bits_at_the_edge_of_float32(files: Files, data: st.DataObject, config: Config, seed: int, nth: int) -> None:
    """The bits are also the same if numbers overflow, become zero, or are NaN."""
    tokens = data.draw(prompts(config))

    def tweak(tensors: Tensors) -> None:
        for _ in range(data.draw(st.integers(1, 4), label="how many")):
            flat = tensors[data.draw(st.sampled_from(sorted(tensors)), label="tensor")].reshape(-1)
            flat[data.draw(st.integers(0, flat.size - 1), label="index")] = data.draw(specials(), label="value")

    path = files.crafted(config, seed, tweak)
    results = {}
    for isa in ISAS:
        with instruction_set(isa), GPT2.load(path, threads=nth) as model:
            results[isa] = whole(path, tokens)
            cache = model.new_cache()
            assert same(np.stack([model.decode(cache, token) for token in tokens]), results[isa])
            assert same(model.logits(tokens), results[isa])
    for isa in FUSED:
        assert same(results[isa], results[FUSED[0]]), isa


# ---------------------------------------------------------------------------------------------------------------------
# Bit for bit where blocks end: larger shapes, once each


def test_wide_and_long(files: Files) -> None:
    """GPT-2's width; more rows than a chunk and a tile of attention hold; positions beyond 512."""
    count = max(560, 2 * CHUNK + 40)
    config = Config(maxT=count, V=211, L=1, NH=12, C=768)
    path = files.random(config, 5)
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, config.V, count).tolist()
    cut = count - 30
    assert cut > max(512, 2 * CHUNK)
    expected = whole(path, tokens)
    with GPT2.load(path, threads=3) as model:
        cache = model.new_cache()
        assert same(model.prefill(cache, tokens[:cut]), expected[cut - 1])
        for i in range(cut, cut + 10):
            assert same(model.decode(cache, tokens[i]), expected[i])
        assert same(model.step([(tokens[i], cache, True) for i in range(cut + 10, count)]), expected[cut + 10 :])
    for isa in FUSED:
        with instruction_set(isa):
            assert same(whole(path, tokens[:130], threads=2), expected[:130])
    assert_accurate(expected[:540], *exact_logits(path, config, tokens[:540]))


def test_a_long_step_after_a_short_one(files: Files) -> None:
    """The memory of each worker grows with the sequence."""
    path, tokens = files.random(Config(maxT=900, V=97, L=1, NH=2, C=32), 3), [i * i % 97 for i in range(900)]
    with GPT2.load(path, threads=2) as model:
        model.logits(tokens[:1])
        assert same(model.logits(tokens), whole(path, tokens))


@pytest.mark.parametrize("version", [1, 3, 5])
def test_wide_ragged_head(files: Files, version: int) -> None:
    """GPT-2's vocabulary with an odd width."""
    config = Config(maxT=24, V=50257, L=1, NH=7, C=77)
    path = files.random(config, 8, version)
    tokens = [50256, 0, 3, 49999, 256, 1, 50255, *range(40000, 40014)]
    expected = whole(path, tokens)
    for nth in (2, 3, 7, 8):
        assert same(whole(path, tokens, threads=nth), expected)
    with GPT2.load(path, threads=4) as model:
        cache = model.new_cache()
        assert same(np.stack([model.decode(cache, token) for token in tokens]), expected)


@pytest.mark.parametrize("wanted", [0, 1, 7, 66, 70])  # in the last layer, 66 rows of 70 are still packed
def test_wide_mixed_batch(files: Files, wanted: int) -> None:
    """Prefill of one sequence, decode of others, in one step of a 768-channel model. Some rows of the prompt want logits."""
    config = Config(maxT=80, V=401, L=2, NH=12, C=768)
    path = files.random(config, 9, 5)
    rng = np.random.default_rng(10)
    sequences = [rng.integers(0, config.V, count).tolist() for count in (70, 1, 33, 17, 50)]
    alone = [whole(path, tokens) for tokens in sequences]
    with GPT2.load(path, threads=2) as model:
        caches = [model.new_cache() for _ in sequences]
        for cache, tokens in list(zip(caches, sequences, strict=True))[1:]:
            if len(tokens) > 1:
                model.prefill(cache, tokens[:-1])
        rows = [(tokens[-1], cache, True) for cache, tokens in list(zip(caches, sequences, strict=True))[1:]]
        wants = rng.permutation(70) < wanted
        rows[2:2] = [(token, caches[0], bool(want)) for token, want in zip(sequences[0], wants, strict=True)]
        logits = model.step(rows)
    assert same(logits[[0, 1, -2, -1]], np.stack([alone[i][-1] for i in (1, 2, 3, 4)]))
    assert same(logits[2:-2], alone[0][wants])


def test_gpt2_shape_bits(gpt2_shape: Path) -> None:
    tokens = [31373, 612, 50256, 0, 11, *range(1000, 1013)]
    expected = whole(gpt2_shape, tokens)
    assert expected.shape == (len(tokens), 50257)
    assert same(whole(gpt2_shape, tokens, threads=3), expected)
    with GPT2.load(gpt2_shape, threads=2) as model:
        cache = model.new_cache(len(tokens))
        for i, token in enumerate(tokens):
            assert same(model.decode(cache, token), expected[i])
    for isa in FUSED:
        with instruction_set(isa):
            assert same(whole(gpt2_shape, tokens[:3], threads=2), expected[:3])


# ---------------------------------------------------------------------------------------------------------------------
# Which bits: the fixed order of a dot product, and one recorded result


def fma32(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c, rounded once. The product is exact in float64; the sum is rounded there to odd, so that rounding it again
    to float32 cannot err (Boldo and Melquiond 2008)."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)  # Knuth's two-sum: total + error is exact
    bits = total.view(np.int64)
    away = np.where((error > 0) == (total > 0), 1, -1)  # towards larger magnitude, or smaller
    odd = np.where((error != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(np.float64).astype(np.float32)


def fold(lanes: Float32) -> Float32:
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def dot16(a: Float32, w: Float32) -> Float32:
    """The dots of a (K,) with the rows of w (N, K) in the project's order: 16 lanes, ragged tail as zeros, then the fold."""
    K = -(-len(a) // LANES) * LANES
    a, w = np.pad(a, (0, K - len(a))), np.pad(w, ((0, 0), (0, K - w.shape[1])))
    lanes = np.zeros((len(w), LANES), np.float32)
    for k in range(0, K, LANES):
        lanes = fma32(np.broadcast_to(a[k : k + LANES], lanes.shape), w[:, k : k + LANES], lanes)
    return fold(lanes)


def test_fma32_rounds_once() -> None:
    one, tiny = np.ones(1, np.float32), np.full(1, 2.0**-60, np.float32)
    step = np.full(1, 1 + 2.0**-12, np.float32)
    half = step * one + np.float32(0)
    assert fma32(step, step, tiny)[0] == np.float32(1 + 2.0**-11 + 2.0**-23)  # above the half way: up
    assert fma32(step, step, -tiny)[0] == np.float32(1 + 2.0**-11)  # below it: down
    assert fma32(step, step, 0 * tiny)[0] == half[0] * half[0]  # on it: to even


@settings(fuzz, max_examples=30)
@given(K=st.integers(1, 150), V=st.integers(1, 70), rows=st.sampled_from([1, 2, 3, 4, 5, 6, 11]), seed=seeds, nth=threads)
@example(K=768, V=50, rows=1, seed=0, nth=3)
@example(K=768, V=50, rows=7, seed=0, nth=2)
@example(K=1023, V=33, rows=11, seed=0, nth=2)
@example(K=1025, V=35, rows=23, seed=0, nth=1)
@example(K=2048, V=34, rows=2, seed=0, nth=3)
@example(K=3081, V=19, rows=13, seed=0, nth=1)
def test_order_of_a_dot(files: Files, K: int, V: int, rows: int, seed: int, nth: int) -> None:
    """With a gain of 0 the final LayerNorm gives its bias, and the logits are its dots with the rows of wte."""
    config = Config(maxT=rows, V=V, L=1, NH=1, C=K)
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.integers(-12, 12, K)).astype(np.float32)  # cancellation: another order gives other bits

    tensors = {name: np.zeros(shape, np.float32) for name, shape, _, _ in config.tensors(padded=False)}
    tensors["lnfb"] = rng.standard_normal(K, dtype=np.float32) * scale
    tensors["wte"] = rng.standard_normal((V, K), dtype=np.float32)
    path = files.write(config, tensors, 3, name="crafted.bin")
    expected = dot16(tensors["lnfb"], tensors["wte"])
    for isa in FUSED:
        with instruction_set(isa):
            logits = whole(path, [0] * rows, threads=nth)
            assert same(logits, np.tile(expected, (rows, 1))), isa


@pytest.mark.parametrize("isa", FUSED)
def test_recorded_bits(tmp_path: Path, isa: str) -> None:
    """Work on speed, new instruction sets and new compilers must not change a bit of these logits. Only a deliberate change
    of the arithmetic (an order of summation, a polynomial) may replace this digest."""
    make(tmp_path / "model.bin", L=2, NH=3, C=87, V=211, maxT=48, seed=21)
    tokens = [(7 * i * i + 3) % 211 for i in range(48)]
    with instruction_set(isa):
        logits = whole(tmp_path / "model.bin", tokens, threads=2)
    assert hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest() == RECORDED


RECORDED = "3cfbf75d3720eb6be2efe59943a848fb41d00e2df647551cc55f752a6679c638"

# ---------------------------------------------------------------------------------------------------------------------
# Accuracy

# How far float32 may be off depends on the network: LayerNorm over two nearly equal channels magnifies any rounding a hundred
# times. So the tolerance is measured: the change of the exact logits if every weight changes by half a unit of its last place.
# A forward pass also rounds each product and sum, so its error has the same size. In thousands of random models the ratio is
# 0.9 in the median, below 3 for 99 of 100, and 10 at most. The tolerance is about 3e-5 of the greatest logit. A wrong epsilon,
# scale, mask or GELU formula, or a lost lane, causes a far greater error.
SAFETY = 40
TOLERANCE = 3e-5  # the same for well-conditioned networks, as a part of the row's greatest logit


def exact_logits(path: Path, config: Config, tokens: Sequence[int]) -> tuple[oracle.Array, oracle.Array]:
    """Return the logits (T, V) in float64, and the tolerance of a correct float32 result, (T, 1)."""
    weights = oracle.weights(path)
    exact = oracle.forward(weights, config, tokens)
    moved = np.zeros((len(tokens), 1))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        nudged = {name: array * (1 + EPS * rng.choice([-1.0, 1.0], array.shape)) for name, array in weights.items()}
        moved = np.maximum(moved, np.abs(oracle.forward(nudged, config, tokens) - exact).max(axis=-1, keepdims=True))
    few = 4 if config.C < 8 else 1  # a layernorm of few values may amplify roundings that nudged weights do not show
    return exact, few * SAFETY * (moved + 4 * EPS * np.abs(exact).max(axis=-1, keepdims=True))


def relative(exact: oracle.Array, part: float) -> oracle.Array:
    """A tolerance (T, 1): this part of each row's greatest logit."""
    scale: oracle.Array = np.abs(exact).max(axis=-1, keepdims=True)
    return part * scale


def assert_accurate(logits: Float32, exact: oracle.Array, tolerance: oracle.Array) -> None:
    assert logits.shape == exact.shape
    error = np.abs(logits - exact)
    assert (error <= tolerance).all(), f"error is {(error / tolerance).max():.3g} times the tolerance"


def test_the_tolerance_is_tight(files: Files) -> None:
    """Slightly wrong networks do not pass for right ones."""
    config = Config(maxT=20, V=97, L=2, NH=3, C=66)
    path, tokens = files.random(config, 2), [(5 * i) % 97 for i in range(20)]
    logits = whole(path, tokens)
    exact, tolerance = exact_logits(path, config, tokens)
    assert_accurate(logits, exact, tolerance)
    assert (tolerance < relative(exact, 2 * TOLERANCE)).all()
    for name in ("wpe", "qkvb", "ln2w", "fcprojw"):
        tensors = random_tensors(config, 2)
        tensors[name].reshape(-1)[7] += np.float32(0.02)
        wrong = whole(files.write(config, tensors, 3, name="wrong.bin"), tokens)
        with pytest.raises(AssertionError, match="times the tolerance"):
            assert_accurate(wrong, exact, tolerance)


@fuzz
@given(data=st.data(), config=configs(), seed=seeds, version=versions, isa=isas)
def test_against_float64(files: Files, data: st.DataObject, config: Config, seed: int, version: int, isa: str) -> None:
    tokens, path = data.draw(prompts(config)), files.random(config, seed, version)
    exact, tolerance = exact_logits(path, config, tokens)
    with instruction_set(isa):
        assert_accurate(whole(path, tokens), exact, tolerance)
    with SerialGPT2.load(path) as serial:
        assert_accurate(serial.logits(tokens), exact, tolerance)


def test_against_float64_on_trained_weights() -> None:
    tokens = [31373, 612, 338, 50256, 198, 40, 716, 407, 262, 5822, 11, 198, 2514, 307, 11, 393, 407]
    with GPT2.load(EMBEDDED_MODEL, threads=2) as model, SerialGPT2.load(EMBEDDED_MODEL) as serial:
        exact, tolerance = exact_logits(Path(EMBEDDED_MODEL), model.config, tokens)
        assert_accurate(model.logits(tokens), exact, tolerance)
        assert_accurate(serial.logits(tokens), exact, tolerance)


def test_serial_agrees_on_gpt2_shape(gpt2_shape: Path) -> None:
    tokens = [15496, 11, 616]
    with GPT2.load(gpt2_shape) as model, SerialGPT2.load(gpt2_shape) as serial:
        fast, slow = model.logits(tokens), serial.logits(tokens)
    assert_accurate(fast, slow.astype(np.float64), relative(slow.astype(np.float64), TOLERANCE))
    assert np.array_equal(fast.argmax(axis=-1), slow.argmax(axis=-1))


# ---------------------------------------------------------------------------------------------------------------------
# Recorded continuations


@pytest.fixture(scope="module", params=list(GOLDENS))
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One case's name and the path of its checkpoint."""
    name: str = request.param
    command, *options = name.split()
    if command != GPT2_SHAPE:
        assert Path(EMBEDDED_MODEL).as_posix().endswith(command)
        return name, Path(EMBEDDED_MODEL)
    if not options:
        shape: Path = request.getfixturevalue("gpt2_shape")
        return name, shape
    path = tmp_path_factory.mktemp("golden") / "model.bin"
    make(**{**parse(options), "path": path})
    return name, path


def test_golden_continuations(golden: tuple[str, Path]) -> None:
    name, path = golden
    for isa in ISAS if name != GPT2_SHAPE else (ISAS[0], ISAS[-1]):  # 124M weights: test_gpt2_shape_bits has the other sets
        with instruction_set(isa), GPT2.load(path, threads=2 if isa == ISAS[0] else 1) as model:
            for case in GOLDENS[name]:
                for sampler in {"median", "greedy"} & set(case):
                    assert list(model.generate(case["prompt"], sampler=sampler)) == case[sampler], (case["prompt"], isa)


def test_golden_logits(golden: tuple[str, Path]) -> None:
    name, path = golden
    with GPT2.load(path) as model:
        for case in GOLDENS[name]:
            last = model.logits(case["prompt"])[-1]
            assert np.argsort(-last, kind="stable")[:5].tolist() == case["top5_ids"]
            tolerance = 5e-6 + TOLERANCE * max(case["top5_logits"])  # five decimals were recorded
            np.testing.assert_allclose(last[case["top5_ids"]], case["top5_logits"], rtol=0, atol=tolerance)


def test_golden_continuations_of_the_serial_reference(golden: tuple[str, Path]) -> None:
    name, path = golden
    with SerialGPT2.load(path) as serial:
        cases = GOLDENS[name] if name != GPT2_SHAPE else GOLDENS[name][-1:]  # scalar code takes a while for 124M weights
        for case in cases:
            for sampler in {"median", "greedy"} & set(case):
                if name == GPT2_SHAPE and sampler == "greedy":
                    continue
                assert list(serial.generate(case["prompt"], sampler=sampler)) == case[sampler], case["prompt"]


@fuzz
@given(data=st.data(), config=configs(shortest=3), seed=seeds, nth=threads)
def test_serial_and_fast_sample_alike(files: Files, data: st.DataObject, config: Config, seed: int, nth: int) -> None:
    """The same tokens, unless the two logits' difference, within tolerance, decides: then the choice was a near tie."""
    tokens, path = data.draw(prompts(config))[: config.maxT - 1], files.random(config, seed)
    with GPT2.load(path, threads=nth) as model, SerialGPT2.load(path) as serial:
        for sampler in ("median", "greedy"):
            fast = list(model.generate(tokens, total=config.maxT, sampler=sampler))
            slow = list(serial.generate(tokens, total=config.maxT, sampler=sampler))
            assert len(fast) == len(slow) == config.maxT - len(tokens)
            agreed = next((i for i, pair in enumerate(zip(fast, slow, strict=True)) if pair[0] != pair[1]), len(fast))
            if agreed < len(fast):
                exact, tolerance = exact_logits(path, config, tokens + fast[:agreed])
                assert_near_tie(exact[-1], tolerance[-1, 0], sampler, fast[agreed], slow[agreed])


def assert_near_tie(exact: oracle.Array, tolerance: float, sampler: str, a: int, b: int) -> None:
    if sampler == "greedy":
        assert abs(exact[a] - exact[b]) <= 2 * tolerance
    else:
        running = np.cumsum(oracle.softmax(exact))[min(a, b) : max(a, b)]  # where one stopped and the other continued
        assert (np.abs(running - 0.5) <= 2 * tolerance + len(exact) * EPS).all()


# ---------------------------------------------------------------------------------------------------------------------
# Extremes

PLAIN = Config(maxT=40, V=53, L=1, NH=2, C=24)


def silence_attention(tensors: Tensors) -> None:
    tensors["attprojw"][:] = 0
    tensors["attprojb"][:] = 0


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_over_its_range(files: Files, isa: str) -> None:
    """GELU's input is its bias, its outputs are the residual stream: a grid from far below 0 to far above."""
    config = Config(maxT=4, V=200, L=1, NH=1, C=200)
    grid = np.concatenate([np.linspace(-12, 12, 150), np.linspace(-1, 1, 50)]).astype(np.float32)

    def tweak(tensors: Tensors) -> None:
        silence_attention(tensors)
        tensors["fcw"][:] = 0
        tensors["fcb"][:] = 0
        tensors["fcb"][0, :200] = grid
        tensors["fcprojw"][:] = 0
        tensors["fcprojw"][0, range(200), range(200)] = 1
        tensors["fcprojb"][:] = 0
        tensors["wpe"][:] = 0
        tensors["wte"][:] = 2 * np.eye(200)

    path = files.crafted(config, 3, tweak)
    with instruction_set(isa):
        logits = whole(path, [7, 3])
    exact = oracle.forward(oracle.weights(path), config, [7, 3])
    # A logit is one channel, so its error is GELU's error: a few EPS of the largest channel.
    assert_accurate(logits, exact, relative(exact, 16 * EPS))


@pytest.mark.parametrize("value", [-3e38, -1e30, -1e18, -1e4, -90.0, -80.0, -20.0, 20.0, 90.0, 1e4, 1e18, 1e30])
def test_huge_gelu_inputs(files: Files, value: float) -> None:
    """GELU of a number far below 0 is 0; far above 0 it is the number itself."""

    def tweak(tensors: Tensors) -> None:
        tensors["fcw"][:] = 0
        tensors["fcb"][:] = value
        if value > 0:
            tensors["fcprojw"] /= np.float32(value)

    path = files.crafted(PLAIN, 4, tweak)
    tokens = [1, 2, 3]
    exact, tolerance = exact_logits(path, PLAIN, tokens)
    assert np.isfinite(exact).all()
    assert (tolerance < relative(exact, 4 * TOLERANCE)).all()
    for isa in ISAS:
        with instruction_set(isa):
            assert_accurate(whole(path, tokens), exact, tolerance)


@pytest.mark.parametrize("gain", [30.0, 1e3, 1e6])
def test_saturated_attention(files: Files, gain: float) -> None:
    """Scores in the thousands and millions: softmax chooses one key, without an overflow."""

    def tweak(tensors: Tensors) -> None:
        tensors["qkvw"][0, : 2 * PLAIN.C] *= np.float32(math.sqrt(gain))
        tensors["qkvb"][0, : 2 * PLAIN.C] *= np.float32(math.sqrt(gain))

    path = files.crafted(PLAIN, 5, tweak)
    tokens = [(11 * i) % PLAIN.V for i in range(40)]
    weights = oracle.weights(path)
    activations = oracle.forward_activations(weights, PLAIN, tokens)
    # Scores of size s have errors of a few s * EPS, and exp turns an absolute error into a relative error. If the two best keys
    # are closer than that, both choices are right. Rows in which the best key leads by more are compared.
    q, k, _ = activations["qkv"][0].reshape(len(tokens), 3, PLAIN.NH, PLAIN.HS).transpose(1, 2, 0, 3)
    scores = np.where(np.tri(len(tokens), dtype=bool), q @ k.transpose(0, 2, 1) / math.sqrt(PLAIN.HS), -np.inf)
    doubt = 16 * EPS * np.abs(np.where(np.isfinite(scores), scores, 0)).max()
    ordered = np.sort(scores, axis=-1)
    clear = (ordered[..., -1] - ordered[..., -2] > 30 + doubt).all(axis=0)
    mild = doubt < TOLERANCE
    rows = np.ones(len(tokens), dtype=bool) if mild else clear
    rows[0] = True  # one key: nothing to choose
    assert rows.sum() >= 5
    for isa in ISAS:
        with instruction_set(isa):
            logits = whole(path, tokens, threads=2)
        assert np.isfinite(logits).all()
        exact = activations["logits"][rows]
        assert_accurate(logits[rows], exact, relative(exact, 4 * TOLERANCE))


def test_attention_ignores_later_keys(files: Files) -> None:
    """A later row that is anything at all, even NaN, leaves the earlier rows' bits alone."""
    config = Config(maxT=40, V=4, L=2, NH=3, C=33)

    def poison(tensors: Tensors) -> None:
        tensors["wpe"][20:] = np.nan

    tokens = [i % 4 for i in range(40)]
    clean = whole(files.random(config, 6), tokens[:20])
    for nth in (1, 3):
        poisoned = whole(files.crafted(config, 6, poison), tokens, threads=nth)
        assert same(poisoned[:20], clean)
        assert np.isnan(poisoned[20:]).all()


@pytest.mark.parametrize("sampler", ["median", "greedy"])
@pytest.mark.parametrize("peak", [1e3, 1e10, 1e30])
def test_large_logits(files: Files, peak: float, sampler: str) -> None:
    """One logit towers over the rest, as far as float32 goes: the sampler takes it."""

    def tweak(tensors: Tensors) -> None:
        tensors["lnfw"] *= np.float32(peak)
        tensors["lnfb"] *= np.float32(peak)

    path = files.crafted(PLAIN, 7, tweak)
    logits = whole(path, [4, 5])
    assert_accurate(logits, *exact_logits(path, PLAIN, [4, 5]))
    with GPT2.load(path, threads=2) as model:
        assert list(model.generate([4, 5], max_new_tokens=1, sampler=sampler)) == [int(logits[-1].argmax())]


def test_logits_beyond_float32(files: Files) -> None:
    def tweak(tensors: Tensors) -> None:
        tensors["lnfw"][:] = 3e38
        tensors["wte"][:] = 1

    path = files.crafted(PLAIN, 7, tweak)
    with GPT2.load(path, threads=2) as model, SerialGPT2.load(path) as serial:
        for network in (model, serial):
            with pytest.raises(NumericalError, match="not finite"):
                list(network.generate([4, 5], max_new_tokens=3))


@pytest.mark.parametrize("isa", ISAS)
def test_denormals_are_numbers(files: Files, isa: str) -> None:
    """They stay: compiler flags and libraries that switch the processor's mode do not flush them to zero."""
    tiny = np.float32(2.0**-140)
    config = Config(maxT=2, V=3, L=1, NH=1, C=16)

    def tweak(tensors: Tensors) -> None:
        tensors["lnfw"][:] = 0
        tensors["lnfb"][:] = [1, 2] + [0] * 14
        tensors["wte"][:] = 0
        tensors["wte"][1, :2] = tiny, 4 * tiny
        tensors["wte"][2, :2] = -tiny, 0

    path = files.crafted(config, 8, tweak)
    with instruction_set(isa):
        for nth in (1, 2):
            for tokens in ([0], [0, 1]):
                assert whole(path, tokens, threads=nth)[-1].tolist() == [0, 9 * tiny, -tiny]


def test_signs_of_zero(files: Files) -> None:
    """Weights of -0 are weights of 0: no result changes."""

    def plus(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.reshape(-1)[::3] = 0.0

    def minus(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor.reshape(-1)[::3] = -0.0

    tokens = [(5 * i) % PLAIN.V for i in range(20)]
    expected = whole(files.crafted(PLAIN, 9, plus), tokens)
    for isa in FUSED:
        with instruction_set(isa):
            assert same(whole(files.crafted(PLAIN, 9, minus), tokens, threads=2), expected)


def test_all_zero_weights(files: Files) -> None:
    def tweak(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor[:] = 0

    path = files.crafted(PLAIN, 0, tweak)
    assert not whole(path, [1, 2, 3]).any()
    with GPT2.load(path) as model:
        assert list(model.generate([1], max_new_tokens=2, sampler="greedy")) == [0, 0]
        assert list(model.generate([1], max_new_tokens=2)) == [26, 26]  # the middle of 53 equals: 27 of them exceed one half


nans = st.one_of(
    st.sampled_from([0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800001]),
    st.builds(lambda sign, payload: sign << 31 | 0x7F800000 | payload, st.integers(0, 1), st.integers(1, 0x7FFFFF)),
)


@settings(fuzz, max_examples=150)
@given(data=st.data(), name=st.sampled_from(sorted(random_tensors(PLAIN, 0))), bits=nans, isa=isas, nth=st.integers(1, 3))
def test_nan_weight_is_an_error(files: Files, data: st.DataObject, name: str, bits: int, isa: str, nth: int) -> None:
    """One NaN, of any payload, in any tensor, is reported for prompts of every length, and does not give an id."""
    count = data.draw(st.one_of(st.integers(1, 39), st.sampled_from([15, 16, 17, 31, 32, 33])), label="tokens")
    size = count * PLAIN.C if name == "wpe" else random_tensors(PLAIN, 0)[name].size
    place = data.draw(st.integers(0, size - 1), label="index")

    def tweak(tensors: Tensors) -> None:
        tensors[name].reshape(-1).view(np.uint32)[place] = bits

    path = files.crafted(PLAIN, 1, tweak)
    with instruction_set(isa), GPT2.load(path, threads=nth) as model:
        for sampler in ("median", "greedy"):
            with pytest.raises(NumericalError, match="not finite"):
                list(model.generate(list(range(count)), max_new_tokens=1, sampler=sampler))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7F812345])
@pytest.mark.parametrize("channel", [0, PLAIN.C, 2 * PLAIN.C])
def test_nan_in_attention_is_an_error(files: Files, channel: int, bits: int, count: int) -> None:
    """A NaN among queries or keys reaches the scores only: the softmax must carry it on, whatever bits it has."""

    def tweak(tensors: Tensors) -> None:
        tensors["qkvb"].view(np.uint32)[0, channel] = bits

    path = files.crafted(PLAIN, 1, tweak)
    for isa in ISAS:
        with instruction_set(isa):
            assert np.isnan(whole(path, list(range(count)))).all(), isa


@fuzz
@given(data=st.data(), seed=seeds, nth=st.integers(1, 3))
def test_any_bits_at_all(files: Files, data: st.DataObject, seed: int, nth: int) -> None:
    """A file of random bits in the tensors gives ids of the vocabulary or NumericalError."""
    rng = np.random.default_rng(seed)

    def tweak(tensors: Tensors) -> None:
        for name in data.draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1), label="tensors"):
            tensors[name][:] = rng.integers(0, 2**32, tensors[name].shape, np.uint32).view(np.float32)

    path = files.crafted(PLAIN, 1, tweak)
    with GPT2.load(path, threads=nth) as model:
        try:
            ids = list(model.generate([0, 52], max_new_tokens=5))
        except NumericalError:
            return
        assert len(ids) == 5
        assert all(0 <= token < PLAIN.V for token in ids)


# ---------------------------------------------------------------------------------------------------------------------
# step(): refusals, which do not change anything


@pytest.fixture
def plain(files: Files) -> Iterator[GPT2]:
    with GPT2.load(files.random(PLAIN, 1), threads=2) as model:
        yield model


def test_steps_without_rows_and_without_wants(plain: GPT2) -> None:
    cache = plain.new_cache()
    assert plain.step([]).shape == (0, PLAIN.V)
    assert plain.step([(1, cache, False), (2, cache, False)]).shape == (0, PLAIN.V)
    assert cache.length == 2
    assert same(plain.decode(cache, 3), plain.logits([1, 2, 3])[-1])


@pytest.mark.parametrize("bad", [-1, PLAIN.V, 2**63, -(2**70), True, False, 1.0, "1", None, np.float32(1)])
def test_bad_token_changes_nothing(plain: GPT2, bad: Any) -> None:
    cache, other = plain.new_cache(), plain.new_cache()
    plain.prefill(cache, [1, 2])
    with pytest.raises(InputError, match="token"):
        plain.step([(3, cache, True), (3, other, True), (bad, cache, True)])
    with pytest.raises(InputError, match="token"):
        plain.prefill(cache, [3, bad])
    with pytest.raises(InputError, match="token"):
        plain.decode(cache, bad)
    assert (cache.length, other.length) == (2, 0)
    assert same(plain.decode(cache, 3), plain.logits([1, 2, 3])[-1])


def test_bad_token_in_a_later_chunk_changes_nothing(files: Files) -> None:
    config = Config(maxT=3 * CHUNK, V=9, L=1, NH=1, C=8)
    with GPT2.load(files.random(config, 1), threads=2) as model:
        cache = model.new_cache()
        model.prefill(cache, [1])
        with pytest.raises(InputError, match="token '9'"):
            model.prefill(cache, [2] * (2 * CHUNK) + [9])
        assert cache.length == 1
        assert same(model.decode(cache, 5), model.logits([1, 5])[-1])


def test_full_cache_changes_nothing(plain: GPT2) -> None:
    small, other = plain.new_cache(3), plain.new_cache()
    plain.prefill(small, [1, 2])
    with pytest.raises(InputError, match="full"):
        plain.step([(1, other, True), (3, small, True), (4, small, True)])
    with pytest.raises(InputError, match="room for 1"):
        plain.prefill(small, [3, 4])
    assert (small.length, other.length) == (2, 0)
    assert same(plain.decode(small, 3), plain.logits([1, 2, 3])[-1])
    with pytest.raises(InputError, match="room for 0"):
        plain.decode(small, 4)


def test_cache_of_another_model(files: Files, plain: GPT2) -> None:
    with GPT2.load(files.random(PLAIN, 1)) as twin:
        mine, theirs = plain.new_cache(), twin.new_cache()
        with pytest.raises(InputError, match="another model"):
            plain.step([(1, mine, True), (1, theirs, True)])
        assert (mine.length, theirs.length) == (0, 0)


@pytest.mark.parametrize("swapped", ["theirs", "no cache"])
def test_rows_that_change_while_they_are_checked(files: Files, plain: GPT2, swapped: str) -> None:
    """A token's __index__ may run any code. If it changes a later row, that row is checked, too."""
    with GPT2.load(files.random(PLAIN, 1)) as twin:
        mine, theirs = plain.new_cache(), twin.new_cache()
        later: list[Any] = [1, mine, True]

        class Swapping:
            def __index__(self) -> int:
                later[1] = theirs if swapped == "theirs" else "cache"
                return 1

        rows: Any = [(Swapping(), mine, True), later]
        with pytest.raises((InputError, TypeError), match=r"another model|KeysValues"):
            plain.step(rows)
        assert (mine.length, theirs.length) == (0, 0)
        assert same(plain.decode(mine, 3), plain.logits([3])[-1])


@pytest.mark.parametrize("row", [(1,), (1, None, True), (1, "cache", True), 5])
def test_row_of_another_shape(plain: GPT2, row: Any) -> None:
    cache = plain.new_cache()
    with pytest.raises((TypeError, ValueError)):
        plain.step([(1, cache, True), row])
    assert cache.length == 0
    assert same(plain.decode(cache, 3), plain.logits([3])[-1])


@pytest.mark.parametrize("length", [-1, 3, True, 1.0, None])
def test_bad_truncation(plain: GPT2, length: Any) -> None:
    cache = plain.new_cache()
    plain.prefill(cache, [1, 2])
    with pytest.raises(InputError, match="truncate"):
        cache.truncate(length)
    assert cache.length == 2


@pytest.mark.parametrize("capacity", [0, -1, 41, True, 2.0, "3"])
def test_bad_capacity(plain: GPT2, capacity: Any) -> None:
    with pytest.raises(InputError, match="capacity"):
        plain.new_cache(capacity)


def test_results_are_the_callers_own(plain: GPT2) -> None:
    cache = plain.new_cache()
    first = plain.decode(cache, 1)
    copy = first.copy()
    assert first.flags.writeable
    plain.decode(cache, 2)
    assert same(first, copy)
    first[:] = 7  # and writing to it changes nothing inside
    cache.truncate(0)
    assert same(plain.decode(cache, 1), copy)


def test_numpy_tokens(plain: GPT2) -> None:
    ids = np.array([1, 2, 3])
    expected = plain.logits([1, 2, 3])
    assert same(plain.logits(ids.tolist()), expected)
    assert same(plain.prefill(plain.new_cache(), [np.int64(1), np.uint16(2), np.int8(3)]), expected[-1])


def test_unknown_instruction_set() -> None:
    before = cpu_info()["isa"]
    with pytest.raises(InputError, match="'sse9' is not available"):
        select_isa("sse9")
    assert cpu_info()["isa"] == before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_cache_is_independent(plain: GPT2, copied: Callable[[KVCache], KVCache]) -> None:
    cache = plain.new_cache(9)
    plain.prefill(cache, [1, 2, 3])
    twin = copied(cache)
    assert (type(twin), twin.capacity, twin.length) == (KVCache, 9, 3)
    assert same(plain.decode(twin, 4), plain.logits([1, 2, 3, 4])[-1])
    cache.truncate(0)
    plain.prefill(cache, [5, 6, 7, 8])
    assert same(plain.decode(twin, 9), plain.logits([1, 2, 3, 4, 9])[-1])
    assert (cache.length, twin.length) == (4, 5)


@pytest.mark.parametrize("length", [0, 1, 3, None])
def test_the_beginning_of_a_cache_is_copied(plain: GPT2, length: int | None) -> None:
    source, target = plain.new_cache(), plain.new_cache(4)
    plain.prefill(source, [1, 2, 3])
    copy_keys_values(target, source, length)
    kept = [1, 2, 3][:length]
    assert target.length == len(kept)
    assert same(plain.decode(target, 9), plain.logits([*kept, 9])[-1])
    assert source.length == 3


@pytest.mark.parametrize("length", [-1, 4, 2**62])
def test_more_rows_than_a_cache_has_are_not_copied(plain: GPT2, length: int) -> None:
    source, target = plain.new_cache(), plain.new_cache()
    plain.prefill(source, [1, 2, 3])
    with pytest.raises(InputError, match=rf"{length}\b.*\b3$"):
        copy_keys_values(target, source, length)
    assert target.length == 0


def test_parts_of_a_model_are_not_copied_or_pickled(plain: GPT2) -> None:
    tensors = {name: ("float32", memoryview(array.tobytes())) for name, array in random_tensors(PLAIN, 0).items()}
    weights = Weights(PLAIN, tensors)
    for thing in weights, Step(weights, 1, 0), Trace(1, 1), _kernels.Floats(1, 1):
        for act in copy.copy, copy.deepcopy, pickle.dumps:
            with pytest.raises(TypeError, match="pickled"):
                act(thing)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(plain.new_cache())


def test_cache_counts_its_bytes(plain: GPT2) -> None:
    cache = plain.new_cache(10)
    assert isinstance(cache, KVCache)
    assert cache.nbytes == 2 * PLAIN.L * PLAIN.NH * 10 * LANES * 4  # a head of 12 channels is stored as 16


# ---------------------------------------------------------------------------------------------------------------------
# The samplers alone

finite = st.floats(-200, 200, width=32)
rows_of_logits = st.lists(st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0])), min_size=1, max_size=80).map(
    lambda values: np.array(values, np.float32)
)


def median_by_hand(logits: Float32) -> int:
    """The serial program's rule, one float32 operation after another."""
    highest = max(logits)
    e = [np.float32(math.exp(np.float64(logit - highest))) for logit in logits]
    total = np.float32(0)
    for value in e:
        total += value
    running = np.float32(0)
    for token, value in enumerate(e):
        running += value / total
        if running > np.float32(0.5):
            return token
    return len(logits) - 1


@settings(fuzz, max_examples=400)
@given(logits=rows_of_logits)
def test_median_one_after_another(logits: Float32) -> None:
    assert median(logits[None].data, 0) == median_by_hand(logits) == oracle.median(logits)


@settings(fuzz, max_examples=400)
@given(logits=rows_of_logits)
def test_greedy_is_the_first_of_the_highest(logits: Float32) -> None:
    assert greedy(logits[None].data, 0) == int(np.argmax(logits)) == logits.tolist().index(max(logits.tolist()))


@settings(fuzz, max_examples=20)
@given(seed=seeds, spread=st.sampled_from([0.0, 0.01, 1.0, 3.0]))
def test_median_of_a_vocabulary(seed: int, spread: float) -> None:
    """Fifty thousand tiny probabilities: the order of the sums decides."""
    logits = (spread * np.random.default_rng(seed).standard_normal(50257)).astype(np.float32)
    assert median(logits[None].data, 0) == oracle.median(logits)


def test_median_order_matters() -> None:
    """The case above can fail: summed in float64 some of these choose another id."""
    differing = 0
    for seed in range(40):
        logits = np.random.default_rng(seed).standard_normal(50257).astype(np.float32)
        chosen = median(logits[None].data, 0)
        assert chosen == oracle.median(logits)
        p = oracle.softmax(logits.astype(np.float64))
        differing += chosen != int(np.flatnonzero(np.cumsum(p) > 0.5)[0])
    assert differing > 0


INF = math.inf


@pytest.mark.parametrize(
    ("logits", "expected_median", "expected_greedy"),
    [
        ([0.0], 0, 0),
        ([-1e38], 0, 0),
        ([3.4e38], 0, 0),
        ([0.0, 0.0], 1, 0),  # the running sum is 0.5, which does not exceed it
        ([0.0, 0.0, 0.0, 0.0], 2, 0),
        ([0.0, 0.0, 0.0], 1, 0),
        ([-INF, 0.0], 1, 1),
        ([0.0, -INF], 0, 0),
        ([-INF, -INF, 5.0, -INF], 2, 2),
        ([0.0, -INF, 0.0], 2, 0),
        ([-104.0, 0.0], 1, 1),
        ([0.0, -105.0], 0, 0),
        ([3e38, -3e38], 0, 0),  # their difference overflows to -inf
        ([-3e38, 3e38], 1, 1),
        ([1e-45, 0.0], 1, 0),  # a denormal is greater than 0, and exp does not see it
        ([-0.0, 0.0], 1, 0),
        ([2.0, 1.0, 2.0], 1, 0),  # 0.42, 0.16: together above one half
    ],
)
def test_samplers_at_the_edges(logits: list[float], expected_median: int, expected_greedy: int) -> None:
    row = np.array([logits], np.float32)
    assert median(row.data, 0) == expected_median
    assert greedy(row.data, 0) == expected_greedy
    assert sample("median", row.data, 0) == expected_median
    assert sample("greedy", row.data, 0) == expected_greedy


@pytest.mark.parametrize(
    "logits",
    [[math.nan], [0.0, math.nan], [math.nan, 0.0], [INF], [0.0, INF], [INF, INF], [-INF], [-INF, -INF], [INF, math.nan], []],
)
@pytest.mark.parametrize("sampler", ["median", "greedy"])
def test_samplers_refuse_logits_that_are_not_finite(sampler: str, logits: list[float]) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        sample(sampler, np.array([logits], np.float32).data, 0)


def test_samplers_read_one_row() -> None:
    logits = np.array([[np.nan, 0], [3, 2], [0, 50], [np.inf, 0]], np.float32)
    logits.setflags(write=False)
    for choose in (median, greedy):
        assert [choose(logits.data, row) for row in range(4)] == [-1, 0, 1, -1]
        for row in (-1, 4):
            with pytest.raises(IndexError):
                choose(logits.data, row)


@pytest.mark.parametrize("wrong", [np.zeros((1, 3)), np.zeros((1, 3), np.int32), np.zeros(3, np.float32), None])
def test_samplers_take_float32_rows(wrong: Any) -> None:
    for choose in (median, greedy):
        with pytest.raises((TypeError, ValueError)):
            choose(wrong, 0)
