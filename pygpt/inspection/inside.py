"""How a prediction forms, which parts make it, what changes when a part is touched, and activations by others' names.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, "A mathematical framework for transformer
circuits" (direct logit attribution); Olsson et al. 2022, "In-context learning and induction heads" (the induction score); Meng
et al. 2022, "Locating and editing factual associations in GPT" (patching); Nanda 2023, "Attribution patching"; SAELens,
StandardSAE and JumpReLUSAE (the layout of sparse autoencoders)."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..activations import Edit, add, zero
from ..errors import CheckpointError, InputError, check_number, check_whole, near, shown
from ..formats.files import atomic_file
from ..formats.safetensors import SafetensorsFile, write_safetensors
from ..generation.logprobs import score, token_info
from ..generation.request import check_tokens
from ..model import GPT2
from ..training.trainable import TrainableGPT2

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Tokens = Iterable[SupportsIndex]
Metric = Callable[[Float32], float]  # logits (T, V) -> a number, such as a Logit


@dataclass(frozen=True)
class Logit:
    """The logit of a token at a position, or its lead over the token `against`: a number to explain.

    position: from -T to T - 1. A Logit is a function of the logits (T, V)."""

    token: int
    against: int | None = None
    position: int = -1

    def __call__(self, logits: Float32) -> float:
        """Return the number for logits (T, V). Raises InputError for an id or a position that they do not have."""
        logits = np.atleast_2d(logits)
        row = logits[self.row(*logits.shape)].astype(np.float64)
        return float(row[self.token] - (0 if self.against is None else row[self.against]))

    def row(self, T: int, V: int) -> int:
        """Return the position among T, from 0. Raises what __call__() raises."""
        check_whole("token", self.token, 0, V - 1)
        if self.against is not None:
            check_whole("against", self.against, 0, V - 1)
        return check_whole("position", self.position, -T, T - 1) % T

    def gradient(self, T: int, V: int) -> Float32:
        """Return the gradient with respect to the logits, (T, V), for TrainableGPT2.residual_gradients()."""
        row, out = self.row(T, V), np.zeros((T, V), np.float32)
        out[row, self.token] = 1
        if self.against is not None:
            out[row, self.against] -= 1
        return out


def logit_lens(model: GPT2, tokens: Tokens, *, positions: Iterable[int] | None = None) -> Float32:
    """Return what each layer would predict: its residual through the last layernorm and the head, (L + 1, P, V) logits.

    Row 0 belongs to the embedding, row l + 1 to layer l. So the last row has the bits of the ordinary logits. positions: P of
    them (default: all T)."""
    found = model.activations(tokens, ["encoded", "residual3"], positions=positions)
    streams = np.concatenate([found["encoded"][None], found["residual3"]])  # [L + 1, P, C]
    return model.logits_of(streams.reshape(-1, model.config.C)).reshape(*streams.shape[:2], model.config.V)


def logit_attribution(model: GPT2, tokens: Tokens, logit: Logit) -> dict[str, Float64]:
    """Split a logit into what each part of the network adds to it, in float64.

    Returns embedding (), heads (L, NH), mlps (L,) and rest (). Their sum is the logit, within float32's rounding. The last
    layernorm divides by the standard deviation of this input, which is taken as a constant. rest: the biases of the attention's
    projections and of the last layernorm. Quantised products round their inputs, so there the sum is less exact."""
    config, weights = model.config, model.network.tensors()
    ids = check_tokens(config, tokens)
    at, parts = logit.row(len(ids), config.V), ["encoded", "atty", "attproj", "fcproj", "residual3"]
    kept = model.activations(ids, parts, positions=[at])
    acts = {name: array.astype(np.float64)[..., 0, :] for name, array in kept.items()}  # [L, 1, C] -> [L, C]
    head = "wte" if config.tied else "head"
    direction = weights.row(head, logit.token) - (0 if logit.against is None else weights.row(head, logit.against))  # [C]
    gain = direction * weights.row("lnfw", 0)
    gain = (gain - gain.mean()) / np.sqrt(acts["residual3"][-1].var() + config.epsilon)  # the gradient of lnf: [C]
    moved = np.stack([gain @ matrix[0] for matrix in weights.pieces("attprojw")])  # through each projection: [L, C]
    heads = (moved * acts["atty"]).reshape(config.L, config.NH, -1).sum(axis=2)  # [L, C] -> [L, NH]
    rest = direction @ weights.row("lnfb", 0) + (acts["attproj"] @ gain - heads.sum(axis=1)).sum()
    return {"embedding": acts["encoded"] @ gain, "heads": heads, "mlps": acts["fcproj"] @ gain, "rest": rest}


def loss_by_position(model: GPT2, tokens: Tokens) -> Float64:
    """Return the loss of each token of a text after the first, (T - 1,), in nats: minus the logarithm of its probability.

    Raises InputError for fewer than 2 tokens, NumericalError if the logits are not finite."""
    ids = check_tokens(model.config, tokens)
    if len(ids) < 2:
        raise InputError("1 token was given: at least 2 are needed, because the first has no prediction")
    return -np.array([info.logprob for info in next(score(model.network, model.new_cache(), [], ids[:1], [ids[1:]]))])


def induction_scores(patterns: Float32, period: int) -> Float64:
    """Return how much each head attends to the token after the last occurrence, from attention (L, NH, T, T) to (L, NH).

    The tokens repeat every `period`, so token t looks at t - period + 1. Raises InputError unless 1 <= period < T."""
    T = patterns.shape[-1]
    check_whole("period", period, 1, T - 1, f" from 1 to {T - 1}, less than the number of tokens")
    rows = np.arange(period, T)
    return np.asarray(patterns[..., rows, rows - period + 1].mean(axis=-1, dtype=np.float64))


def mean_loss(tokens: Iterable[int]) -> Metric:
    """Return the metric that is the mean loss of these tokens after the first, in nats. Raises InputError for fewer than 2."""
    if not (targets := list(tokens)[1:]):
        raise InputError("the mean loss needs at least 2 tokens, because the first has no prediction")
    places = [Logit(token, position=row) for row, token in enumerate(targets)]
    return lambda x: -fmean(token_info(x[[at.row(*x.shape)]].astype(np.float32).data, 0, at.token, 1).logprob for at in places)


def ablate_heads(model: GPT2, tokens: Tokens, metric: Metric | None = None) -> Float64:
    """Return how a metric of the logits (default: the mean loss) changes if a head's output is zero, for each head: (L, NH).

    Each head costs a pass of the network."""
    ids = check_tokens(model.config, tokens)
    metric = metric or mean_loss(ids)
    plain, out = metric(model.logits(ids)), np.empty((model.config.L, model.config.NH))
    for layer, head in np.ndindex(out.shape):
        edits = {("atty", layer, None): zero(heads=[head])}
        out[layer, head] = metric(model.activations(ids, "logits", edits=edits)["logits"]) - plain
    return out


def patch_activations(model: GPT2, clean: Tokens, corrupt: Tokens, metric: Metric, *, name: str = "residual3") -> Float64:
    """Run the corrupt tokens with one activation of the clean ones at a time; return the metric of each run, (L, T).

    name: an activation with layers and channels, such as residual3, attproj or fcproj. Each cell costs a pass of the network.
    Raises InputError for texts of different lengths."""
    ids, others = _pair(model, clean, corrupt)
    if (kept := model.activations(ids, name)[name]).ndim != 3:
        raise InputError(f"name is {name!r}: it must be an activation of shape (L, T, ...), such as residual3")
    out = np.empty(kept.shape[:2])
    for layer, position in np.ndindex(out.shape):
        edits = {(name, layer, position): kept[layer, position]}
        out[layer, position] = metric(model.activations(others, "logits", edits=edits)["logits"])
    return out


def attribution_patching(engine: TrainableGPT2, clean: Tokens, corrupt: Tokens, logit: Logit) -> Float64:
    """Approximate how patching each residual3 would change a logit of the corrupt tokens, (L, T), in three passes.

    This is first-order: (clean - corrupt) times the gradient at the corrupt tokens. Raises what patch_activations() raises."""
    with engine.model() as model:
        ids, others = _pair(model, clean, corrupt)
        there, here = (model.activations(some, "residual3")["residual3"].astype(np.float64) for some in (ids, others))
    gradients = engine.residual_gradients(others, logit.gradient(len(others), engine.config.V))["residual3"]
    return np.asarray(((there - here) * gradients).sum(axis=2))  # [L, T, C] -> [L, T]


def _pair(model: GPT2, clean: Tokens, corrupt: Tokens) -> tuple[list[int], list[int]]:
    ids, others = check_tokens(model.config, clean), check_tokens(model.config, corrupt)
    if len(ids) != len(others):
        raise InputError(f"the texts have {len(ids)} and {len(others)} tokens: patching needs texts of equal length")
    return ids, others


class SparseAutoencoder(NamedTuple):
    """F features of a residual stream of C channels: features = relu((x - b_dec) W_enc + b_enc), x ~ features W_dec + b_dec.

    threshold (F,): features that are not above it are zero (JumpReLU); None means 0. subtract: whether b_dec is subtracted
    first, which SAELens calls apply_b_dec_to_input. Training is not supported."""

    W_enc: Float32  # (C, F)
    b_enc: Float32  # (F,)
    W_dec: Float32  # (F, C)
    b_dec: Float32  # (C,)
    threshold: Float32 | None = None
    subtract: bool = True

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, subtract: bool = True) -> "SparseAutoencoder":
        """Read the weights of a .safetensors file. Raises CheckpointError for other tensors, and for shapes that do not fit."""
        with SafetensorsFile(path) as file:
            found = {name: np.array(file.tensor(name)) for name in file.tensors}
        shapes = {name: array.shape for name, array in found.items()}
        C, F = shape if len(shape := shapes.get("W_enc", ())) == 2 else (0, 0)
        wanted = {"W_enc": (C, F), "b_enc": (F,), "W_dec": (F, C), "b_dec": (C,), "threshold": (F,)}
        if not C or {"threshold": (F,), **shapes} != wanted:
            named = ", ".join(f"{name} {shape}" for name, shape in shapes.items())[:300]
            rule = "W_enc (C, F), b_enc (F,), W_dec (F, C), b_dec (C,), and optionally threshold (F,)"
            raise CheckpointError(f"{os.fspath(path)}: {named}: expected the tensors {rule}")
        return cls(**found, subtract=subtract)

    def encode(self, residual: Float32) -> Float32:
        """Return the features of residuals, (..., C) -> (..., F). Raises InputError for other channels."""
        residual = np.asarray(residual, np.float32)
        if residual.shape[-1:] != self.b_dec.shape:
            raise InputError(f"residuals have shape {residual.shape}: the autoencoder needs {self.b_dec.size} channels")
        found = (residual - self.b_dec if self.subtract else residual) @ self.W_enc + self.b_enc  # [..., C] -> [..., F]
        return np.where(found > (0 if self.threshold is None else self.threshold), found, np.float32(0))

    def top(self, residual: Float32, k: int = 10) -> list[tuple[int, float]]:
        """Return the k strongest active features of one residual (C,) with their values, the strongest first."""
        features = self.encode(residual).reshape(-1)
        if features.shape != self.b_enc.shape:
            raise InputError(f"residuals have shape {np.shape(residual)}: top() takes one of shape {self.b_dec.shape}")
        best = np.argsort(-features, kind="stable")[: check_whole("k", k, 1, features.size)]
        return [(int(feature), float(features[feature])) for feature in best if features[feature] > 0]

    def ablate(self, feature: int) -> Callable[[Float32], Float32]:
        """Return an edit value that removes a feature from a residual and keeps everything else, also the rest."""
        row = self._direction(feature)
        return lambda residual: residual - self.encode(residual)[..., feature, None] * row

    def steer(self, feature: int, strength: float) -> Edit:
        """Return an edit value that adds `strength` times a feature's direction to a residual."""
        return add(np.float32(check_number("strength", strength, -1e30, 1e30)) * self._direction(feature))

    def _direction(self, feature: int) -> Float32:
        return np.asarray(self.W_dec[check_whole("feature", feature, 0, len(self.W_dec) - 1)])


# TransformerLens' names inside blocks.0 and so on, each followed by ours.
BLOCK = """ln1.hook_normalized ln1, attn.hook_q q, attn.hook_k k, attn.hook_v v, attn.hook_pattern probs, attn.hook_z atty,
hook_attn_out attproj, hook_resid_mid residual2, ln2.hook_normalized ln2, mlp.hook_pre fch, mlp.hook_post fch_gelu,
hook_mlp_out fcproj, hook_resid_post residual3"""


def their_names(L: int) -> dict[str, tuple[str, int | None]]:
    """Map TransformerLens' and transformers' names in a model of L layers to our name and layer (None: without layers).

    hidden_states.0 and so on, and attentions.0, are the outputs of transformers; its last hidden state is lnf. The numbers of
    TransformerLens are those of from_pretrained_no_processing(): by default it changes the weights. These have no equal:
    hook_embed and hook_pos_embed (encoded is their sum), hook_scale, hook_attn_scores, hook_result, and our last residual3 in
    transformers."""
    streams = [("encoded", None), *(("residual3", layer) for layer in range(L))]
    names: dict[str, tuple[str, int | None]] = {"ln_final.hook_normalized": ("lnf", None), f"hidden_states.{L}": ("lnf", None)}
    for layer in range(L):
        names |= {f"blocks.{layer}.{theirs}": (ours, layer) for theirs, ours in map(str.split, BLOCK.split(","))}
        names |= {f"blocks.{layer}.hook_resid_pre": streams[layer], f"hidden_states.{layer}": streams[layer]}
        names[f"attentions.{layer}"] = ("probs", layer)
    return names


def named_activations(model: GPT2, tokens: Tokens, names: str | Iterable[str]) -> dict[str, Float32]:
    """Return activations by the names in their_names(), in the shapes of TransformerLens and transformers without the batch.

    hook_q, hook_k, hook_v and hook_z are (T, NH, HS). Raises InputError for a name without an equal."""
    ids, known = check_tokens(model.config, tokens), their_names(model.config.L)
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"activation {shown(unknown[0])} has no equal in their_names(): {near(unknown[0], known)[:200]}")
    layers = sorted({layer for name in names if (layer := known[name][1]) is not None})
    kept = model.activations(ids, [known[name][0] for name in names], layers=layers or None)
    found: dict[str, Float32] = {}
    for name in names:
        ours, layer = known[name]
        array = kept[ours] if layer is None else kept[ours][layers.index(layer)]
        found[name] = array.reshape(len(ids), model.config.NH, -1) if ours in ("q", "k", "v", "atty") else array
    return found


def save_activations(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays by name as float32 to a .npz or .safetensors file, which gets its name only when it is complete.

    Raises InputError for another ending, and for a name that the formats cannot hold."""
    name = os.fspath(path)
    if not name.endswith((".npz", ".safetensors")):
        raise InputError(f"{name}: activations are written to a file that ends in .npz or .safetensors")
    if bad := [key for key in arrays if not isinstance(key, str) or key in ("file", "allow_pickle", "__metadata__")]:
        raise InputError(f"an array's name is {shown(bad[0])}: give a text other than file, allow_pickle and __metadata__")
    floats = {key: np.asarray(array, np.float32) for key, array in arrays.items()}
    with atomic_file(path) as file:
        if name.endswith(".npz"):
            np.savez(file, allow_pickle=False, **floats)
        else:
            write_safetensors(file, "F32", [(key, array.shape) for key, array in floats.items()], floats.values())
