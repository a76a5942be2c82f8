"""Test the look inside against the float64 oracle: lens, attribution, ablation, patching, gradients, autoencoders, names."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
from make_checkpoint import make
from safetensors.numpy import load_file, save_file

import pygpt
from pygpt import GPT2, InputError, Logit, SparseAutoencoder, TrainableGPT2, patch_activations, save_activations, text_table
from pygpt.config import VARIATIONS, Config

SHAPE = {"L": 3, "NH": 2, "C": 16, "V": 97, "maxT": 24}
IDS, OTHERS = [5, 17, 3, 96, 17, 40, 8], [5, 60, 3, 96, 17, 2, 8]
# The logits of this model are about 30, and float32 computes them with relative errors of 1e-6.
ROUNDING = 2e-4
Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("inspection") / "model.bin"
    make(path, seed=3, **SHAPE)
    return str(path)


@pytest.fixture(scope="module")
def model(path: str) -> Iterator[GPT2]:
    with GPT2.load(path, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def weights(path: str) -> dict[str, Array]:
    return oracle.weights(path)


def acts(weights: dict[str, Array], model: GPT2, ids: list[int] = IDS) -> dict[str, Array]:
    return oracle.forward_activations(weights, model.config, ids)


def with_stream(weights: dict[str, Array], config: Config, stream: Array, first: int) -> Array:
    """Return the oracle's logits if the layers from `first` on get this residual stream (T, C)."""
    for layer in range(first, config.L):
        stream = oracle.gpt2_numpy.block(weights, layer, config, stream)["residual3"]
    return oracle.matmul(oracle.layernorm(stream, weights["lnfw"], weights["lnfb"]), weights["wte"])


# ---------------------------------------------------------------------------------------------------------------------
# How a prediction forms


def test_the_lens_is_each_residual_through_the_last_layernorm_and_the_head(model: GPT2, weights: dict[str, Array]) -> None:
    found = pygpt.logit_lens(model, IDS)
    known = acts(weights, model)
    streams = np.concatenate([known["encoded"][None], known["residual3"]])
    np.testing.assert_allclose(found, [with_stream(weights, model.config, x, SHAPE["L"]) for x in streams], atol=ROUNDING)
    assert np.array_equal(found[-1], model.logits(IDS))
    assert np.array_equal(pygpt.logit_lens(model, iter(IDS), positions=iter([2, 6])), found[:, [2, 6]])


@pytest.mark.parametrize("logit", [Logit(11), Logit(11, against=40), Logit(0, 96, 3), Logit(7, 7, -7)])
def test_a_logit_is_the_sum_of_its_parts(model: GPT2, weights: dict[str, Array], logit: Logit) -> None:
    parts = pygpt.logit_attribution(model, IDS, logit)
    assert {name: part.shape for name, part in parts.items()} == {"embedding": (), "heads": (3, 2), "mlps": (3,), "rest": ()}
    assert sum(part.sum() for part in parts.values()) == pytest.approx(logit(model.logits(IDS)), abs=ROUNDING)

    known, w, at = acts(weights, model), weights, logit.position % len(IDS)
    direction = w["wte"][logit.token] - (0 if logit.against is None else w["wte"][logit.against])
    stream = known["residual3"][-1, at]

    def through(part: Array) -> float:
        """The last layernorm with the scale of this stream, and the head."""
        return float((part - part.mean()) / math.sqrt(stream.var() + 1e-5) * w["lnfw"] @ direction)

    assert parts["embedding"] == pytest.approx(through(known["encoded"][at]), abs=ROUNDING)
    for layer in range(3):
        assert parts["mlps"][layer] == pytest.approx(through(known["fcproj"][layer, at]), abs=ROUNDING)
        for head in range(2):
            mine = slice(8 * head, 8 * head + 8)
            added = w["attprojw"][layer][:, mine] @ known["atty"][layer, at, mine]
            assert parts["heads"][layer, head] == pytest.approx(through(added), abs=ROUNDING)
    biases = sum(through(bias) for bias in w["attprojb"]) + w["lnfb"] @ direction
    assert parts["rest"] == pytest.approx(biases, abs=ROUNDING)


@pytest.mark.parametrize("weights_format", ["q8_0", "q4_0"])
def test_the_parts_of_quantised_models(path: str, weights_format: str) -> None:
    with GPT2.load(path, weights=weights_format) as model:
        parts, logits = pygpt.logit_attribution(model, IDS, Logit(11, 40)), model.logits(IDS)
    assert sum(part.sum() for part in parts.values()) == pytest.approx(
        Logit(11, 40)(logits), abs=0.02 * float(np.abs(logits).max())
    )


def test_the_parts_of_a_relative_with_its_own_head() -> None:
    config = Config(L=2, NH=2, C=16, V=50, maxT=8, tied=False, epsilon=0.1, activation="relu")
    assert config.variations.keys() <= VARIATIONS.keys()
    with TrainableGPT2.random(config, seed=1) as engine, engine.model() as model:
        engine.tensor("lnfw")[:] = np.linspace(-3, 3, 16)
        parts = pygpt.logit_attribution(model, [1, 2, 3], Logit(4))
        assert sum(part.sum() for part in parts.values()) == pytest.approx(Logit(4)(model.logits([1, 2, 3])), abs=1e-6)


def test_the_loss_by_position(model: GPT2, weights: dict[str, Array]) -> None:
    probs = oracle.softmax(acts(weights, model)["logits"])
    expected = -np.log(probs[np.arange(len(IDS) - 1), IDS[1:]])
    found = pygpt.loss_by_position(model, IDS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert pygpt.mean_loss(IDS)(model.logits(IDS)) == pytest.approx(found.mean())
    for metric in pygpt.loss_by_position, pygpt.ablate_heads:
        with pytest.raises(InputError, match="at least 2"):
            metric(model, [1])
    logits: Any = model.logits(IDS)
    for other in (np.asfortranarray(logits), logits.astype(float).repeat(2, axis=0)[::2], logits[:-1]):
        assert pygpt.mean_loss(IDS)(other) == pygpt.mean_loss(IDS)(logits)
    for few, named in ((logits[:3], "position is 3: .*2"), (logits[:, :40], "token is 96: .*39")):
        with pytest.raises(InputError, match=named):
            pygpt.mean_loss(IDS)(few)
    last = model.activations(IDS, "residual3")["residual3"][-1, -1]
    assert np.array_equal(model.logits_of(last), model.logits(IDS)[-1:])
    assert Logit(11)(model.logits_of(last)[0]) == Logit(11)(model.logits(IDS))
    with pytest.raises(InputError, match=r"streams have shape \(2, 3\): .*\(N, 16\)"):
        model.logits_of(np.zeros((2, 3), np.float32))


def test_induction_scores_of_patterns_made_by_hand() -> None:
    """One head looks at the token after the last occurrence, one at the token before, one everywhere."""
    T, period = 9, 3
    patterns = np.zeros((1, 3, T, T), np.float32)
    for t in range(T):
        patterns[0, 0, t, max(t - period + 1, 0)] = 1
        patterns[0, 1, t, max(t - 1, 0)] = 1
        patterns[0, 2, t, : t + 1] = 1 / (t + 1)
    uniform = sum(1 / (t + 1) for t in range(period, T)) / (T - period)
    np.testing.assert_allclose(pygpt.induction_scores(patterns, period), [[1.0, 0.0, uniform]], rtol=1e-6)
    for wrong in (0, T, 2.5):
        with pytest.raises(InputError, match=f"period is {wrong}.*from 1 to 8"):
            pygpt.induction_scores(patterns, wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# What changes when a part is touched


def test_ablation_of_a_head_is_a_network_without_its_output(model: GPT2, weights: dict[str, Array]) -> None:
    found = pygpt.ablate_heads(model, IDS, Logit(11, 40))
    plain = acts(weights, model)["logits"]
    for layer in range(3):
        for head in range(2):
            without = {name: array.copy() for name, array in weights.items()}
            without["attprojw"][layer, :, 8 * head : 8 * head + 8] = 0
            changed = acts(without, model)["logits"]
            expected = (changed[-1, 11] - changed[-1, 40]) - (plain[-1, 11] - plain[-1, 40])
            assert found[layer, head] == pytest.approx(expected, abs=ROUNDING)
    losses = pygpt.ablate_heads(model, IDS)
    assert losses.shape == (3, 2)
    assert np.isfinite(losses).all()
    assert np.any(losses != 0)


def test_patching_puts_one_activation_into_the_other_text(model: GPT2, weights: dict[str, Array]) -> None:
    logit = Logit(11, 40)
    found = patch_activations(model, IDS, OTHERS, logit)
    clean, corrupt = acts(weights, model), acts(weights, model, OTHERS)
    for layer in range(3):
        for at in range(len(IDS)):
            stream = corrupt["residual3"][layer].copy()
            stream[at] = clean["residual3"][layer, at]
            row = with_stream(weights, model.config, stream, layer + 1)[-1]
            assert found[layer, at] == pytest.approx(row[11] - row[40], abs=ROUNDING)
    assert found[-1, -1] == logit(model.logits(IDS))  # the last residual of the last token decides alone
    assert patch_activations(model, IDS, OTHERS, logit, name="fcproj").shape == (3, 7)


@pytest.mark.parametrize("name", ["residual2", "residual3", "attproj", "fcproj", "atty", "fch"])
def test_patching_a_text_with_itself_changes_no_bit(model: GPT2, name: str) -> None:
    logit = Logit(11, 40, -2)
    found = patch_activations(model, IDS, IDS, logit, name=name)
    assert np.array_equal(found, np.full_like(found, logit(model.logits(IDS))))


def test_refused_patches(model: GPT2) -> None:
    with pytest.raises(InputError, match=r"7 and 6 tokens.*equal"):
        patch_activations(model, IDS, OTHERS[1:], Logit(1))
    for name in ("encoded", "probs"):
        with pytest.raises(InputError, match=f"name is '{name}'"):
            patch_activations(model, IDS, OTHERS, Logit(1), name=name)
    for logit, words in [
        (Logit(97), "token is 97.*96"),
        (Logit(1, -1), "against is -1"),
        (Logit(1, 2, 7), "position is 7.*-7 to 6"),
    ]:
        with pytest.raises(InputError, match=words):
            pygpt.logit_attribution(model, IDS, logit)
        with pytest.raises(InputError, match=words):
            logit(model.logits(IDS))


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_of_residuals_are_those_of_finite_differences(path: str, weights: dict[str, Array], threads: int) -> None:
    """In float64 by the oracle: 1e-5 to each side, along a random direction of each stream at each position."""
    logit, rng = Logit(11, 40, 5), np.random.default_rng(4)
    with TrainableGPT2.load(path, threads=threads, all_workers=True) as engine:
        config = engine.config
        found = engine.residual_gradients(IDS, logit.gradient(len(IDS), config.V))
        assert {name: array.shape for name, array in found.items()} == {
            "encoded": (7, 16),
            "residual2": (3, 7, 16),
            "residual3": (3, 7, 16),
        }
        again = engine.residual_gradients(np.array(IDS), logit.gradient(7, config.V))
        assert all(np.array_equal(array, again[name]) for name, array in found.items())
    assert not Logit(11, 11).gradient(7, 97).any()  # the lead over itself
    known = oracle.forward_activations(weights, config, IDS)

    def number(stream: Array, layer: int) -> float:
        row = with_stream(weights, config, stream, layer)[5]
        return float(row[11] - row[40])

    streams = [(found["encoded"], known["encoded"], 0)]
    streams += [(found["residual3"][layer], known["residual3"][layer], layer + 1) for layer in range(3)]
    for gradient, stream, layer in streams:
        for at in range(len(IDS)):
            step = np.zeros_like(stream)
            step[at] = 1e-5 * rng.standard_normal(16)
            expected = (number(stream + step, layer) - number(stream - step, layer)) / 2
            assert float((gradient * step).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-8)
        assert np.array_equal(gradient[6], np.zeros(16))  # a later token does not change an earlier logit


def test_gradients_of_a_loss_are_those_of_backward(path: str) -> None:
    """With the loss's own gradient of the logits, the parameters' gradients are those of backward()."""
    with TrainableGPT2.load(path, threads=2) as engine:
        inputs, targets = np.array([IDS]), np.array([OTHERS])
        engine.forward(inputs, targets)
        engine.backward()
        expected = engine.gradients.copy()
        with engine.model() as model:
            probs = oracle.softmax(model.logits(IDS).astype(np.float64))
        probs[np.arange(7), OTHERS] -= 1
        engine.residual_gradients(IDS, probs / 7)
        np.testing.assert_allclose(engine.gradients, expected, atol=1e-5 * np.abs(expected).max())
        engine.forward(inputs, targets)
        engine.backward()  # is not changed by the gradients before it
        assert np.array_equal(engine.gradients, expected)


def test_refused_gradients(path: str) -> None:
    with TrainableGPT2.load(path) as engine:
        for dlogits in (np.zeros((6, 97)), np.zeros(97), np.full((7, 97), np.nan)):
            with pytest.raises(InputError, match=r"dlogits has shape .*\(T, V\) = \(7, 97\)"):
                engine.residual_gradients(IDS, dlogits)
        with pytest.raises(InputError, match="97"):
            engine.residual_gradients([97], np.zeros((1, 97)))


def test_attribution_patching_is_the_first_order_of_patching(path: str, weights: dict[str, Array], model: GPT2) -> None:
    logit = Logit(11, 40)
    with TrainableGPT2.load(path) as engine:
        found = pygpt.attribution_patching(engine, IDS, OTHERS, logit)
    clean, corrupt = (acts(weights, model, ids)["residual3"] for ids in (IDS, OTHERS))
    for layer in range(3):
        for at in range(7):
            step = np.zeros_like(corrupt[layer])
            step[at] = 1e-6 * (clean[layer, at] - corrupt[layer, at])
            up, down = (with_stream(weights, model.config, corrupt[layer] + sign * step, layer + 1)[-1] for sign in (1, -1))
            expected = ((up[11] - up[40]) - (down[11] - down[40])) / 2e-6
            assert found[layer, at] == pytest.approx(expected, rel=1e-3, abs=ROUNDING)


# ---------------------------------------------------------------------------------------------------------------------
# Sparse autoencoders


def tensors_of(rng: np.random.Generator, F: int = 40) -> dict[str, Any]:
    shapes = {"W_enc": (16, F), "b_enc": (F,), "W_dec": (F, 16), "b_dec": (16,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("jump", [True, False])
def test_features_are_those_of_numpy(tmp_path: Path, model: GPT2, subtract: bool, jump: bool) -> None:
    rng = np.random.default_rng(6)
    tensors = tensors_of(rng) | ({"threshold": np.abs(rng.standard_normal(40)).astype(np.float32)} if jump else {})
    save_file(tensors, tmp_path / "sae.safetensors")
    sae = SparseAutoencoder.load(tmp_path / "sae.safetensors", subtract=subtract)
    stream = model.activations(IDS, "residual3")["residual3"][1]
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    before = (stream - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    expected = np.where(before > w.get("threshold", 0), before, 0)
    found = sae.encode(stream)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    eye, zero = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    exact = SparseAutoencoder(eye, zero, eye, zero, np.array([1, 2], np.float32))
    assert exact.encode(np.array([1, 3], np.float32)).tolist() == [0, 3]  # a feature must be above its threshold
    best = sae.top(stream[2], 4)
    assert [feature for feature, _ in best] == np.argsort(-expected[2])[:4].tolist()
    np.testing.assert_allclose([value for _, value in best], np.sort(found[2])[:-5:-1], rtol=1e-5)  # NumPy's sums vary

    feature, strength = best[0][0], -2.5
    for value, change in (
        (sae.ablate(feature), -found[:, feature, None] * tensors["W_dec"][feature]),
        (sae.steer(feature, strength), np.float32(strength) * tensors["W_dec"][feature]),
    ):
        edited = model.activations(IDS, ["residual3", "logits"], edits={("residual3", 1, None): value})
        np.testing.assert_allclose(edited["residual3"][1], stream + change, atol=1e-5)
        assert not np.array_equal(edited["logits"], model.logits(IDS))
    one = model.activations(IDS, "residual3", edits={("residual3", 1, 2): sae.ablate(feature)})["residual3"][1]
    assert np.array_equal(one[[0, 1, 3]], stream[[0, 1, 3]])
    np.testing.assert_allclose(one[2], stream[2] - found[2, feature] * tensors["W_dec"][feature], atol=1e-5)


def test_refused_autoencoders(tmp_path: Path) -> None:
    tensors, file = tensors_of(np.random.default_rng(1)), tmp_path / "sae.safetensors"
    for wrong in (
        {"W_enc": tensors["W_enc"].T.copy()},
        {"b_enc": np.zeros(3, np.float32)},
        {"W_gate": np.zeros((16, 40), np.float32)},
        {"W_enc": np.zeros(40, np.float32)},
        {"W_enc": np.zeros((0, 0), np.float32)},
    ):
        save_file(tensors | wrong, file)
        with pytest.raises(pygpt.CheckpointError, match=r"W_enc \(C, F\)"):
            SparseAutoencoder.load(file)
    save_file({name: array for name, array in tensors.items() if name != "b_dec"}, file)
    with pytest.raises(pygpt.CheckpointError, match="b_dec"):
        SparseAutoencoder.load(file)
    file.write_bytes(b"no")
    with pytest.raises(pygpt.CheckpointError, match="safetensors"):
        SparseAutoencoder.load(file)
    sae = SparseAutoencoder(**tensors)
    with pytest.raises(InputError, match=r"shape \(2, 15\).* 16 channels"):
        sae.encode(np.zeros((2, 15), np.float32))
    for feature in (-1, 40):
        with pytest.raises(InputError, match=f"feature is {feature}.*39"):
            sae.ablate(feature)
    with pytest.raises(InputError, match="strength"):
        sae.steer(0, math.inf)
    with pytest.raises(InputError, match="k is 0"):
        sae.top(np.zeros(16, np.float32), 0)
    with pytest.raises(InputError, match=r"shape \(3, 16\): .*\(16,\)"):
        sae.top(np.ones((3, 16), np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Names, files, tables and pictures


def test_their_names(model: GPT2, weights: dict[str, Array]) -> None:
    known, names = acts(weights, model), pygpt.their_names(3)
    found = pygpt.named_activations(model, IDS, names)
    assert found.keys() == names.keys()
    streams = [known["encoded"], *known["residual3"]]
    for layer in range(3):
        expected = {
            "hook_resid_pre": streams[layer],
            "hook_resid_mid": known["residual2"][layer],
            "hook_resid_post": streams[layer + 1],
            "hook_attn_out": known["attproj"][layer],
            "hook_mlp_out": known["fcproj"][layer],
            "mlp.hook_pre": known["fch"][layer],
            "mlp.hook_post": known["fch_gelu"][layer],
            "ln1.hook_normalized": known["ln1"][layer],
            "ln2.hook_normalized": known["ln2"][layer],
            "attn.hook_z": known["atty"][layer].reshape(7, 2, 8),
        }
        expected |= {f"attn.hook_{'qkv'[i]}": known["qkv"][layer].reshape(7, 3, 2, 8)[:, i] for i in range(3)}
        for name, array in expected.items():
            np.testing.assert_allclose(found[f"blocks.{layer}.{name}"], array, atol=ROUNDING, err_msg=name)
        pattern = found[f"blocks.{layer}.attn.hook_pattern"]
        mixed = np.einsum("hts,shd->thd", pattern, found[f"blocks.{layer}.attn.hook_v"])
        np.testing.assert_allclose(mixed, found[f"blocks.{layer}.attn.hook_z"], atol=1e-4)
        assert np.array_equal(found[f"attentions.{layer}"], pattern)
        np.testing.assert_allclose(found[f"hidden_states.{layer}"], streams[layer], atol=ROUNDING)
    for name in ("ln_final.hook_normalized", "hidden_states.3"):
        np.testing.assert_allclose(found[name], known["lnf"], atol=ROUNDING)
    assert list(pygpt.named_activations(model, IDS, "ln_final.hook_normalized")) == ["ln_final.hook_normalized"]
    for name in ("hook_embed", "blocks.0.ln1.hook_scale", "blocks.3.hook_resid_post", "hidden_states.4"):
        with pytest.raises(InputError, match=f"activation '{name}' has no equal"):
            pygpt.named_activations(model, IDS, [name])


def test_activations_are_saved(tmp_path: Path, model: GPT2) -> None:
    found: dict[str, Any] = model.activations(IDS, ["residual3", "probs", "logits"])
    save_activations(tmp_path / "a.npz", found)
    save_activations(tmp_path / "a.safetensors", found)
    for read in (np.load(tmp_path / "a.npz"), load_file(tmp_path / "a.safetensors")):
        assert {*read} == found.keys()
        assert all(np.array_equal(read[name], array) for name, array in found.items())
    with pytest.raises(InputError, match=r"a\.txt.*\.npz or \.safetensors"):
        save_activations(tmp_path / "a.txt", found)
    with pytest.raises(TypeError):
        save_activations(tmp_path / "b.npz", {"a": object()})  # type: ignore[dict-item]
    for ending in ("npz", "safetensors"):
        for name in ("file", "allow_pickle", 3, "__metadata__"):
            with pytest.raises(InputError, match=f"name is {name!r}"):
                save_activations(tmp_path / f"b.{ending}", {name: np.zeros(2)})  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError, match=r"/none'$"):
        save_activations(tmp_path / "none" / "a.npz", found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.safetensors"]


def test_weights_are_read_until_the_model_is_closed(path: str, weights: dict[str, Array]) -> None:
    with GPT2.load(path) as model:
        tensors = model.network.tensors()
        for row in (0, 15, 16, 96):
            assert np.array_equal(tensors.row("wte", row), weights["wte"][row])
        assert np.array_equal(tensors.row("lnfb", 0), weights["lnfb"])
    with pytest.raises(pygpt.ClosedError, match="closed"):
        model.network.tensors()


def test_tables_fit_100_columns() -> None:
    text = text_table(np.arange(60.0).reshape(2, 30), ["first", "second row"], [f"column {i}" for i in range(30)], digits=1)
    assert max(map(len, text.splitlines())) <= 100
    assert text.split()[-1] == "59.0"
    assert sum(line.count("column") for line in text.splitlines()) == 30
    assert text_table([["a"]], ["r"], [0]) == "   0\nr  a"
    with pytest.raises(InputError, match=r"shape \(2, 2\).*\(1, 2\)"):
        text_table(np.zeros((2, 2)), ["a"], ["b", "c"])


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_heat_maps(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    rows, columns = [f"layer {i}" for i in range(3)], [f"'\\n{i}'" for i in range(120)]
    pygpt.heat_map(np.arange(-180.0, 180).reshape(3, 120), tmp_path / f"p.{ending}", rows=rows, columns=columns, title="a < b")
    head = (tmp_path / f"p.{ending}").read_bytes()[:200]
    assert head.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    pygpt.heat_map([[0.0]], tmp_path / f"q.{ending}", rows=["r"], columns=["c"], cells=[["$x"]])
    with pytest.raises(InputError, match=r"p\.gif.*\.svg or \.png"):
        pygpt.heat_map([[0.0]], tmp_path / "p.gif", rows=["r"], columns=["c"])
    assert len([*tmp_path.iterdir()]) == 2
