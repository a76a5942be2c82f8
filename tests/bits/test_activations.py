"""Activations and edits: the numbers of a float64 network, and the bits of the ordinary step wherever nothing is edited.

This is true for any threads, chunks, batch, cache, weight format and variation of the network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Array, encoder, gpt2_numpy, layernorm, matmul, softmax

from pygpt import GPT2, Config, Engine, InputError, Request, SerialGPT2, TrainableGPT2, activations, add, scale, zero
from pygpt.activations import HEADS, NAMES, WHOLE

SHAPE = Config(maxT=40, V=61, L=3, NH=3, C=33)
FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "relative": {"activation": "relu", "F": 50, "scaled_by_layer": True, "epsilon": 1e-3, "tied": False},
}
T = 30
TOKENS = [(17 * i + 3) % SHAPE.V for i in range(T)]
TOLERANCE = 3e-5  # of the greatest number: the documented tolerance of float32 (tests/bits/test_kernels.py)
EVERY = [*NAMES]
SITES = [(name, None if name in WHOLE else 1) for name in EVERY]

Hook = Callable[[str, int, Array], Array]


def exact(w: dict[str, Array], config: Config, tokens: list[int], hook: Hook = lambda name, layer, x: x) -> dict[str, Array]:
    """Return all activations in float64. hook(name, layer, x) returns what the network goes on with."""
    found: dict[str, list[Array]] = {name: [] for name in EVERY}

    def note(name: str, layer: int, x: Array) -> Array:
        found[name].append(hook(name, layer, x))
        return found[name][-1]

    x = note("encoded", 0, encoder(tokens, w["wte"], w["wpe"]))
    for i in range(config.L):
        p = {name: w[name][i] for name in w if name not in ("wte", "wpe", "lnfw", "lnfb", "head")}
        ln1 = note("ln1", i, layernorm(x, p["ln1w"], p["ln1b"], config.epsilon))
        q, k, v = (note("qkv"[j], i, part) for j, part in enumerate(np.split(matmul(ln1, p["qkvw"], p["qkvb"]), 3, -1)))
        q, k, v = (a.reshape(len(tokens), config.NH, -1).swapaxes(0, 1) for a in (q, k, v))  # [T, C] -> [NH, T, HS]
        factor = (config.HS**-0.5 if config.scaled else 1) / (i + 1 if config.scaled_by_layer else 1)
        scores = q @ k.swapaxes(1, 2) * factor
        probs = note("probs", i, softmax(np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)))
        atty = note("atty", i, (probs @ v).swapaxes(0, 1).reshape(x.shape))
        x = note("residual2", i, x + note("attproj", i, matmul(atty, p["attprojw"], p["attprojb"])))
        fch = note("fch", i, matmul(note("ln2", i, layernorm(x, p["ln2w"], p["ln2b"], config.epsilon)), p["fcw"], p["fcb"]))
        fch_gelu = note("fch_gelu", i, gpt2_numpy.ACTIVATIONS[config.activation](fch))
        x = note("residual3", i, x + note("fcproj", i, matmul(fch_gelu, p["fcprojw"], p["fcprojb"])))
    lnf = note("lnf", 0, layernorm(x, w["lnfw"], w["lnfb"], config.epsilon))
    note("logits", 0, matmul(lnf, w["wte" if config.tied else "head"]))
    return {name: values[0] if name in WHOLE else np.stack(values) for name, values in found.items()}


def trained(seed: int = 1, **varied: Any) -> TrainableGPT2:
    """A network whose numbers are not tiny, so that every head attends to something else."""
    config = Config(**{n: getattr(SHAPE, n) for n in ("maxT", "V", "L", "NH", "C")}, **varied)
    network = TrainableGPT2.random(config, seed=seed, threads=1)
    rng = np.random.default_rng(seed)
    for name, _ in config.table:
        network.tensor(name)[:] += rng.normal(0, 0.2, network.tensor(name).shape)
    return network


class Opened:
    """A model, its weights in float64, and its plain activations."""

    def __init__(self, network: TrainableGPT2, model: GPT2) -> None:
        config = model.config
        self.weights = {name: network.tensor(name)[..., :].astype(np.float64) for name, _ in config.table}
        self.weights["wte"] = self.weights["wte"][: config.V]
        self.model, self.config = model, config
        self.plain = model.activations(TOKENS, EVERY)


@pytest.fixture(scope="module", params=FAMILY)
def opened(request: pytest.FixtureRequest) -> Iterator[Opened]:
    with trained(**FAMILY[request.param]) as network, network.model() as model:
        yield Opened(network, model)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("activations") / "model.bin"
    with trained() as network:
        network.save(place)
        network.save(place.with_suffix(".bf16.bin"), version=5)
    return place


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[GPT2]:
    with GPT2.load(path, threads=2) as found:
        yield found


def assert_close(found: dict[str, Any], expected: dict[str, Array]) -> None:
    for name, values in found.items():
        assert values.shape == expected[name].shape, name
        assert np.abs(values - expected[name]).max() <= TOLERANCE * max(np.abs(expected[name]).max(), 1e-3), name


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert np.array_equal(values, expected[name]), name


# ------------------------------------------------------------------------------------------------ what is there


def test_every_activation_is_that_of_the_float64_network(opened: Opened) -> None:
    assert_close(opened.plain, exact(opened.weights, opened.config, TOKENS))
    assert {values.dtype for values in opened.plain.values()} == {np.dtype(np.float32)}
    assert np.array_equal(opened.plain["logits"], opened.model.logits(TOKENS))


def test_sums_add_up(opened: Opened) -> None:
    a = opened.plain
    before = np.concatenate([a["encoded"][None], a["residual3"][:-1]])
    assert np.array_equal(a["residual2"], before + a["attproj"])
    assert np.array_equal(a["residual3"], a["residual2"] + a["fcproj"])
    assert np.array_equal(a["probs"], np.tril(a["probs"]))
    assert np.abs(a["probs"].sum(-1) - 1).max() < 1e-6
    values = a["v"].reshape(SHAPE.L, T, SHAPE.NH, -1).swapaxes(1, 2)
    mixed = (a["probs"].astype(np.float64) @ values).swapaxes(1, 2).reshape(a["atty"].shape)
    assert np.abs(mixed - a["atty"]).max() < 1e-6 * np.abs(values).max()


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_selection_has_the_same_bits(path: Path, data: st.DataObject) -> None:
    """For any names, layers, positions, threads, chunks and weight formats."""
    weights = data.draw(st.sampled_from([None, "q8_0", "q4_0", "bfloat16"]))
    file = path.with_suffix(".bf16.bin") if weights == "bfloat16" else path
    quantised = None if weights == "bfloat16" else weights
    tokens = data.draw(st.lists(st.integers(0, SHAPE.V - 1), min_size=1, max_size=SHAPE.maxT))
    names = data.draw(st.lists(st.sampled_from(EVERY), min_size=1, unique=True))
    layers = data.draw(st.none() | st.lists(st.integers(0, SHAPE.L - 1), min_size=1))
    positions = data.draw(st.none() | st.lists(st.integers(0, len(tokens) - 1), min_size=1))
    with GPT2.load(file, threads=1, weights=quantised) as one:
        whole = one.activations(tokens, EVERY)
        assert np.array_equal(whole["logits"], one.logits(tokens))
    with GPT2.load(file, threads=data.draw(st.integers(1, 3)), weights=quantised) as many:
        chunk = data.draw(st.integers(1, len(tokens)))
        found = many.activations(tokens, names, layers=layers, positions=positions, chunk=chunk)
    at = [*range(len(tokens))] if positions is None else positions
    for name in names:
        expected = whole[name] if name in WHOLE or layers is None else whole[name][layers]
        assert np.array_equal(found[name], expected[..., at, :]), name


def test_only_the_needed_phases_run(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step ends after the last phase that is asked for, with as few rounds as there are stops."""
    stops: list[int] = []
    more = activations.Watch.more

    def noted(self: activations.Watch) -> bool:
        found = more(self)
        stops.append(self._at)
        return found

    monkeypatch.setattr(activations.Watch, "more", noted)
    model.activations(TOKENS, ["residual3", "ln1"], layers=[1])
    assert stops == [9, 15, 15]  # the encoder and seven phases of layer 0, ln1; then to fcproj
    stops.clear()
    model.step([(1, model.new_cache(), True)], edits={("residual3", 0, None): add(1.0), ("ln1", 0, 5): add(1.0)})
    assert stops == [8, 24, 24]


def test_arrays_of_the_caller_are_filled(model: GPT2, tmp_path: Path) -> None:
    whole = model.activations(TOKENS, EVERY)
    out = {n: np.memmap(tmp_path / n, "<f4", "w+", shape=whole[n].shape) for n in ("probs", "logits", "k")}
    for array in out.values():
        array[:] = np.nan
    found = model.activations(TOKENS, EVERY, out=out, chunk=4)  # the rows of a chunk lack the keys of later chunks
    assert all(found[name] is out[name] for name in out)
    assert_same(found, whole)


def test_memory_is_checked_before_it_is_taken(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * SHAPE.L * SHAPE.NH * T * T
    monkeypatch.setattr(activations, "MOST_BYTES", size)
    whole = model.activations(TOKENS, ["probs"])["probs"]
    monkeypatch.setattr(activations, "MOST_BYTES", size - 1)
    with pytest.raises(InputError, match=rf"\b{size} bytes.* {size - 1}: .*out.*numpy.memmap"):
        model.activations(TOKENS, ["probs"])
    assert np.array_equal(model.activations(TOKENS, ["probs"], layers=[0])["probs"], whole[:1])
    out = {"probs": np.empty_like(whole)}
    assert np.array_equal(model.activations(TOKENS, ["probs"], out=out)["probs"], whole)
    monkeypatch.undo()
    config = Config(maxT=1 << 13, V=9, L=20, NH=40, C=40)
    with pytest.raises(InputError, match=r" 2147483648\b"):
        activations.Capture(config, config.maxT, "probs", None, None, None)


# ------------------------------------------------------------------------------------------------ edits


def values_of(name: str, positions: int | None, seed: int = 5) -> Array:
    """Random numbers with the shape of an activation at one position (None), or at several."""
    lead, width = ((SHAPE.NH,), T) if name == "probs" else ((), {"fch": 50, "fch_gelu": 50, "logits": 61}.get(name, 33))
    return np.random.default_rng(seed).uniform(0, 1, (*lead, *(() if positions is None else (positions,)), width))


def cases(name: str, F: int, position: int | None) -> dict[str, tuple[Any, Callable[[Array], Array]]]:
    """Edits of a name: what is given, and what it means for the values (width,), or (n, width)."""
    one, several = values_of(name, None), values_of(name, T)
    if name in ("fch", "fch_gelu"):
        one, several = (np.resize(values, (*values.shape[:-1], F)) for values in (one, several))
    spread = one[..., None, :] if position is None else one
    found: dict[str, tuple[Any, Callable[[Array], Array]]] = {
        "array": (one, lambda x: np.broadcast_to(spread, x.shape)),
        "number": (0.25, lambda x: np.full(x.shape, 0.25)),
        "add": (add(one), lambda x: x + spread),
        "scale": (scale(-0.5), lambda x: x * -0.5),
        "zero": (zero(), lambda x: x * 0),
        "function": (lambda x: x * 2 + 1, lambda x: x * 2 + 1),
        "in place": (lambda x: x.__imul__(3), lambda x: x * 3),
    }
    if position is None:
        found["several"] = several, lambda x: several
        found["add several"] = add(several.tolist()), lambda x: x + several
    if name != "probs":
        kept = np.arange(one.shape[-1]) % 4 != 1
        found["neurons"] = zero(neurons=np.flatnonzero(~kept)), lambda x: x * kept
    if name in HEADS:
        if name == "probs":
            found["heads"] = zero(heads=[0, 2]), lambda x: x * np.array([0, 1, 0]).reshape(3, *[1] * (x.ndim - 1))
        else:
            found["heads"] = zero(heads=[1]), lambda x: x * (np.arange(33) // 11 != 1)
    return found


@pytest.mark.parametrize("position", [None, 0, 17, T - 1])
@pytest.mark.parametrize(("name", "layer"), SITES)
def test_every_edit_is_that_of_the_float64_network(opened: Opened, name: str, layer: int | None, position: int | None) -> None:
    """Before an edit, in positions or phases, all bits are the same."""
    where = (..., slice(None) if position is None else position, slice(None))
    for kind, (value, change) in cases(name, opened.config.F, position).items():

        def hook(its: str, its_layer: int, x: Array, change: Callable[[Array], Array] = change) -> Array:
            if (its, its_layer) != (name, layer or 0):
                return x
            x = x.copy()
            x[where] = change(x[where])
            return np.tril(x) if its == "probs" else x

        found = opened.model.activations(TOKENS, EVERY, edits={(name, layer, position): value})
        assert_close(found, exact(opened.weights, opened.config, TOKENS, hook))
        assert not np.array_equal(found[name], opened.plain[name]), kind
        for each, plain in opened.plain.items():
            assert np.array_equal(found[each][..., : position or 0, :], plain[..., : position or 0, :]), (kind, each)
            if each not in WHOLE:
                assert np.array_equal(found[each][: layer or 0], plain[: layer or 0])
            earlier = EVERY.index(each) < EVERY.index(name) and not {each, name} <= {"q", "k", "v"}
            if earlier and (each == "encoded" or name in ("lnf", "logits")):
                assert np.array_equal(found[each], plain), (kind, each)
            elif earlier and each not in WHOLE and layer is not None:
                assert np.array_equal(found[each][layer], plain[layer]), (kind, each)


def test_edits_that_change_nothing_change_no_bits(opened: Opened) -> None:
    same: dict[Any, Any] = {(name, layer, None): lambda x: None for name, layer in SITES}
    same |= {
        (name, layer, 3): opened.plain[name][(() if layer is None else layer, ..., 3, slice(None))[layer is None :]]
        for name, layer in SITES
    }
    same |= {(name, 2, None): opened.plain[name][2] for name in EVERY if name not in WHOLE}
    assert_same(opened.model.activations(TOKENS, EVERY, edits=same), opened.plain)


def test_edits_of_one_place_are_made_in_order(model: GPT2) -> None:
    edits: dict[Any, Any] = {("ln1", 0, None): scale(2), ("ln1", 0, 4): add(1), ("ln1", 0, np.int64(5)): 7}
    plain, found = (model.activations(TOKENS, "ln1", edits=each)["ln1"][0] for each in ({}, edits))
    assert np.array_equal(found[4], plain[4] * 2 + 1)
    assert np.array_equal(found[6], plain[6] * 2)
    assert (found[5] == 7).all()


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_edits_have_the_same_bits_for_any_threads_and_chunks(path: Path, model: GPT2, data: st.DataObject) -> None:
    """A function gets the whole array, also of a prompt that is longer than a chunk."""
    edits: dict[Any, Any] = {}
    for _ in range(data.draw(st.integers(1, 4))):
        name, layer = data.draw(st.sampled_from(SITES))
        position = data.draw(st.none() | st.integers(0, T - 1))
        choices = [kind for kind in cases(name, 132, position) if kind != "function"]
        edits[name, layer, position] = cases(name, 132, position)[data.draw(st.sampled_from(choices))][0]
    if data.draw(st.booleans()):
        edits["residual3", 0, None] = lambda x: x - x.mean(0)
    expected = model.activations(TOKENS, EVERY, edits=edits)
    with GPT2.load(path, threads=data.draw(st.integers(1, 3))) as other:
        assert_same(other.activations(TOKENS, EVERY, edits=edits, chunk=data.draw(st.integers(1, T))), expected)


STEER: dict[Any, Any] = {
    ("residual3", 1, None): add(np.linspace(-2, 2, SHAPE.C)),
    ("v", 0, 2): scale(0.5),
    ("probs", 2, None): zero(heads=[1]),
    ("fch", 0, None): lambda x: np.maximum(x, 0.1),
    ("attproj", 2, None): scale(0.5),
    ("ln2", 1, None): scale(1.5),
    ("logits", None, 7): lambda x: -x,
}


@pytest.mark.parametrize("sampler", ["greedy", "median", "sample"])
def test_steering_is_a_loop_of_steps(model: GPT2, sampler: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, "max_new_tokens": 12, **({"seed": 3} if sampler == "sample" else {})}
    prompt, tokens = TOKENS[:6], TOKENS[:6]
    found = [*model.generate(prompt, edits=STEER, **options)]
    assert found != [*model.generate(prompt, **options)]
    assert found == [*model.generate(prompt, edits=STEER, speculation=3, **options)]
    cache = model.new_cache()
    logits = model.step([(token, cache, i == 5) for i, token in enumerate(prompt)], edits=STEER)
    whole = model.activations([*prompt, *found], ["logits"], edits=STEER)["logits"]
    for i, token in enumerate(found):
        assert np.array_equal(logits[0], whole[5 + i])
        if sampler == "greedy":
            assert token == logits.argmax()
        logits = model.step([(token, cache, True)], edits=STEER)
        tokens.append(token)


# ------------------------------------------------------------------------------------------------ the engine


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_requests_with_edits_and_without_keep_their_bits_together(model: GPT2, data: st.DataObject) -> None:
    """Caches computed with edits are not reused without them, and the other way round."""
    prefix = model.new_prefix_cache()
    asked = []
    for i in range(data.draw(st.integers(2, 6))):
        edits = data.draw(st.sampled_from([None, STEER, {("ln2", 0, 1): add(1.0)}]))
        prompt = TOKENS[: data.draw(st.integers(1, 12))]
        asked.append(
            (prompt, {"edits": edits, "seed": i, "speculation": data.draw(st.sampled_from([None, 2])), "top_logprobs": 2})
        )
    engine = Engine(model.network, prefix=prefix, max_live=data.draw(st.integers(1, 6)), draft=model.draft)
    jobs = [engine.add(Request(model.config, p, max_new_tokens=6, **options), n=2) for p, options in asked]
    for event in engine.run():
        assert event.error is None
    for (prompt, options), job in zip(asked, jobs, strict=True):
        seed, others = options["seed"], {name: value for name, value in options.items() if name != "seed"}
        alone = model.generate_batch([prompt], num_return_sequences=2, seed=seed, max_new_tokens=6, **others)
        assert [(c.tokens, c.infos) for c in job.completions] == [(c.tokens, c.infos) for c in alone]
    for prompt, options in asked:  # what is left in the prefix cache is plain
        again = [*model.generate(prompt, cache=prefix, max_new_tokens=6, seed=options["seed"])]
        assert again == [*model.generate(prompt, max_new_tokens=6, seed=options["seed"])]


def test_equal_prompts_with_edits_and_without_share_nothing(model: GPT2) -> None:
    engine = Engine(model.network, prefix=model.new_prefix_cache())
    options: dict[str, Any] = {"sampler": "greedy", "max_new_tokens": 3, "top_logprobs": 2}
    for together in ([None, STEER], [None]):  # the last one goes on from the caches of the others
        jobs = [engine.add(Request(model.config, TOKENS[:10], edits=edits, **options), n=2) for edits in together]
        list(engine.run())
        for edits, job in zip(together, jobs, strict=True):
            [alone] = model.generate_batch([TOKENS[:10]], edits=edits, **options)
            assert [c.infos for c in job.completions] == [alone.infos] * 2


def test_several_completions_of_one_request_share_its_prompt(model: GPT2) -> None:
    rows: list[int] = []
    engine, step = Engine(model.network), model.network.step

    def noted(given: Any, **more: Any) -> Any:
        rows.append(len(given))
        return step(given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.network, "step", noted)
        engine.add(Request(model.config, TOKENS[:20], max_new_tokens=2, edits=STEER), n=3)
        list(engine.run())
    assert rows == [20, 3]


@pytest.mark.parametrize("fault", [ZeroDivisionError, InputError, None])
def test_an_error_of_an_edit_ends_only_its_job(model: GPT2, fault: type[Exception] | None) -> None:
    def broken(x: Any) -> Any:
        if fault is not None:
            raise fault("no")
        return np.zeros(5)

    engine = Engine(model.network)
    bad = engine.add(Request(model.config, TOKENS[:4], max_new_tokens=3, edits={("lnf", None, 5): broken}), n=2)
    good = engine.add(Request(model.config, TOKENS[:4], max_new_tokens=5, edits=STEER))
    plain = engine.add(Request(model.config, TOKENS[:4], max_new_tokens=5))
    events = list(engine.run())
    assert [event.job for event in events if event.error is not None] == [bad]
    assert isinstance(bad.error, fault or InputError)
    assert good.completions[0].tokens == [*model.generate(TOKENS[:4], max_new_tokens=5, edits=STEER)]
    assert plain.completions[0].tokens == [*model.generate(TOKENS[:4], max_new_tokens=5)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_step_changes_no_cache(model: GPT2, error: type[BaseException]) -> None:
    def broken(x: Any) -> None:
        raise error

    cache = model.new_cache()
    plain = model.step([(1, cache, True)])
    with pytest.raises(error):
        model.step([(2, cache, True), (3, cache, True)], edits={("k", 1, None): broken})
    assert cache.length == 1
    assert np.array_equal(model.extend(cache, [4]), model.logits([1, 4])[1])
    assert np.array_equal(plain, model.logits([1]))


# ------------------------------------------------------------------------------------------------ what is refused

BAD: list[tuple[dict[str, Any], str]] = [
    ({"names": ["residual"]}, "'residual' .*residual3 or residual2"),
    ({"names": "blocks.0.hook_mlp_out"}, "named_activations"),
    ({"names": []}, "names .*encoded"),
    ({"names": 3}, "names is 3: .*list"),
    ({"layers": [3]}, "layer is 3: .*0 to 2"),
    ({"layers": 1}, "layers is 1: .*list"),
    ({"positions": [T]}, "position is 30: .*0 to 29"),
    ({"positions": [-1]}, "a position is -1"),
    ({"tokens": []}, "empty"),
    ({"tokens": [61]}, "0 to 60"),
    ({"tokens": [1] * 41}, "at most 40"),
    ({"out": {"ln1": np.zeros((3, T, 33), np.float32)}}, "'ln1' .*float32 .*ln2"),
    ({"out": {"ln2": np.zeros((3, T, 33))}}, r"'ln2' .*\(3, 30, 33\).*float64.*float32"),
    ({"out": {"ln2": np.zeros((3, T, 32), np.float32)}}, r"\(3, 30, 32\).*float32.*'ln2': \(3, 30, 33\)"),
    ({"out": {"ln2": [1]}}, "'ln2' .*'list'.*float32"),
    ({"out": {"ln2": np.broadcast_to(np.float32(0), (3, T, 33))}}, "'ln2' .*writable"),
    ({"chunk": 0}, "chunk is 0: .*1 to 512"),
    ({"edits": [1]}, r"edits are \[1\]"),
    ({"edits": {"ln1": 1}}, "'ln1': .*key"),
    ({"edits": {("ln3", 0, 0): 1}}, "'ln3'"),
    ({"edits": {("ln1", 3, 0): 1}}, "layer is 3: .*0 to 2"),
    ({"edits": {("ln1", None, 0): 1}}, "layer is None: .*0 to 2"),
    ({"edits": {("lnf", 2, 0): 1}}, "lnf .*None"),
    ({"edits": {("ln1", 0, T): 1}}, "position is 30: .*0 to 29"),
    ({"edits": {("ln1", 0, 0): "a"}}, "give numbers, a function, add"),
    ({"edits": {("ln1", 0, 0): None}}, "is None: give numbers, a function, add"),
    ({"edits": {("ln1", 0, 0): [None] * 33}}, "give numbers, a function, add"),
    ({"edits": {("ln1", 0, 0): "1.5"}}, "is '1.5': give numbers, a function, add"),
    ({"edits": {("ln1", 0, 0): 10**400}}, "give numbers, a function, add"),
    ({"edits": {("ln1", 0, 0): add(1e39)}}, r"is 1e\+39: give numbers, a function, add"),
    ({"edits": {("ln1", 0, 0): np.zeros(32)}}, r"\(32,\).*\(\) or \(33,\)$"),
    ({"edits": {("ln1", 0, 0): np.zeros((1, 33))}}, r"\(1, 33\): .*\(33,\)"),
    ({"edits": {("ln1", 0, None): np.zeros((29, 33))}}, r"\(\) or \(33,\) or \(30, 33\)"),
    ({"edits": {("probs", 0, 1): add(np.zeros((3, 29)))}}, r"\(\) or \(3, 30\)$"),
    ({"edits": {("probs", 0, None): np.zeros((3, 29, 30))}}, r"\(\) or \(3, 30\) or \(3, 30, 30\)$"),
    ({"edits": {("fch", 0, 0): zero(heads=[0])}}, "q, k, v, probs, atty .*heads"),
    ({"edits": {("probs", 0, 0): zero(neurons=[0])}}, "probs .*neurons"),
    ({"edits": {("q", 0, 0): zero(heads=[3])}}, "head is 3: .*0 to 2"),
    ({"edits": {("fch", 0, 0): zero(neurons=[132])}}, "neuron is 132: .*0 to 131"),
    ({"edits": {("ln1", 0, None): lambda x: x[:, :3]}}, r"function .*\(30, 3\): .*\(30, 33\)"),
    ({"edits": {("ln1", 0, 3): lambda x: "no"}}, r"function .*'no': .*\(33,\)"),
    ({"edits": {("ln1", 0, 3): lambda x: [None] * 33}}, r"function .*None, .*\(33,\)"),
    ({"edits": {("ln1", 0, 3): lambda x: 1e39}}, r"function .*1e\+39: .*\(33,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_refusals_are_one_clear_line(model: GPT2, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model.activations(**{"tokens": TOKENS, "names": ["ln2"], **arguments})
    assert "\n" not in str(caught.value)


def test_requests_are_checked_before_anything_runs(model: GPT2, path: Path) -> None:
    with pytest.raises(InputError, match=r"position is 40: .*0 to 39"):
        model.generate([1], edits={("ln1", 0, 40): 1})
    with pytest.raises(InputError, match=r"\(2, 33\): .*\(\) or \(33,\)$"):
        model.generate([1], edits={("ln1", 0, None): np.zeros((2, 33))})
    with pytest.raises(InputError, match=r"\(3, 1\): .*\(\)$"):
        model.generate([1], edits={("probs", 0, 0): np.zeros((3, 1))})
    with SerialGPT2.load(path) as serial, pytest.raises(InputError, match=r"edits.* GPT2"):
        list(serial.generate([1], edits={}))
