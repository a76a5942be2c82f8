"""How a prediction forms: the logit lens, the parts of a logit, and attention patterns.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, "A mathematical framework for transformer
circuits" (direct logit attribution); Olsson et al. 2022, "In-context learning and induction heads" (the induction score).
"""

from collections.abc import Iterable
from typing import NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..errors import InputError, check_whole
from ..generation.request import check_tokens
from ..model import GPT2

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class Logit(NamedTuple):
    """The logit of a token at a position, or its lead over the token `against`: a number to explain.

    Called with logits (T, V), it returns that number. position: from -T to T - 1."""

    token: int
    against: int | None = None
    position: int = -1

    def __call__(self, logits: Float32) -> float:
        """Return the number for logits (T, V). Raises InputError if it is not among them."""
        return float((logits[self.row(*logits.shape)].astype(np.float64) * self.direction(logits.shape[1])).sum())

    def row(self, T: int, V: int) -> int:
        """Return the position, from 0. Raises InputError for a token or position that T tokens and V ids do not have."""
        for name, token in ("token", self.token), ("against", self.against):
            if token is not None:
                check_whole(name, token, 0, V - 1)
        return check_whole("position", self.position, -T, T - 1) % T

    def direction(self, V: int) -> Float32:
        """Return the gradient with respect to the logits of the position, (V,)."""
        out = np.zeros(V, np.float32)
        out[self.token] += 1
        if self.against is not None:
            out[self.against] -= 1
        return out

    def gradient(self, T: int, V: int) -> Float32:
        """Return the gradient with respect to the logits, (T, V), for TrainableGPT2.residual_gradients()."""
        out = np.zeros((T, V), np.float32)
        out[self.row(T, V)] = self.direction(V)
        return out


def logit_lens(model: GPT2, tokens: Iterable[SupportsIndex], *, positions: Iterable[int] | None = None) -> Float32:
    """Return what each layer would predict: its residual through the last layernorm and the head, (L + 1, P, V) logits.

    Row 0 belongs to the embedding, row l + 1 to layer l. So the last row has the bits of the ordinary logits. positions: P of
    them (default: all T). The network itself computes each row, in a pass of its own: the weights may have any format."""
    ids, last = check_tokens(model.config, tokens), model.config.L - 1
    streams = model.activations(ids, ["encoded", "residual3"])
    where = None if positions is None else list(positions)
    rows = [streams["encoded"], *streams["residual3"]]
    edits = [{("residual3", last, None): row} for row in rows]
    return np.stack([model.activations(ids, ["logits"], positions=where, edits=edit)["logits"] for edit in edits])


def logit_attribution(model: GPT2, tokens: Iterable[SupportsIndex], logit: Logit) -> dict[str, Float64]:
    """Split a logit into what each part of the network adds to it, in float64.

    Returns embedding (), heads (L, NH), mlps (L,) and rest (). Their sum is the logit, within float32's rounding. The last
    layernorm divides by the standard deviation of this input, which is taken as a constant. rest: the biases of the attention's
    projections and of the last layernorm. Quantised products round their inputs, so there the sum is less exact."""
    config, weights = model.config, model.network.tensors()
    ids = check_tokens(config, tokens)
    at = logit.row(len(ids), config.V)
    kept = model.activations(ids, ["encoded", "atty", "attproj", "fcproj", "residual3"], positions=[at])
    acts = {name: array.astype(np.float64)[..., 0, :] for name, array in kept.items()}  # [L, 1, C] -> [L, C]
    head = "wte" if config.tied else "head"
    direction = weights.row(head, logit.token) - (0 if logit.against is None else weights.row(head, logit.against))  # [C]
    gain = direction * weights.row("lnfw", 0)
    gain = (gain - gain.mean()) / np.sqrt(acts["residual3"][-1].var() + config.epsilon)  # the gradient of lnf: [C]
    moved = np.stack([gain @ matrix[0] for matrix in weights.pieces("attprojw")])  # through each projection: [L, C]
    heads = (moved * acts["atty"]).reshape(config.L, config.NH, -1).sum(axis=2)  # [L, C] -> [L, NH]
    rest = direction @ weights.row("lnfb", 0) + (acts["attproj"] @ gain - heads.sum(axis=1)).sum()
    return {"embedding": acts["encoded"] @ gain, "heads": heads, "mlps": acts["fcproj"] @ gain, "rest": rest}


def attention_patterns(model: GPT2, tokens: Iterable[SupportsIndex], *, layers: Iterable[int] | None = None) -> Float32:
    """Return the attention of each head, (layers, NH, T, T): row t says where token t looks, and adds up to 1."""
    where = None if layers is None else list(layers)
    return model.activations(tokens, ["probs"], layers=where)["probs"]


def induction_scores(patterns: Float32, period: int) -> Float64:
    """Return how much each head attends to the token after the last occurrence, from attention (L, NH, T, T) to (L, NH).

    The tokens repeat every `period`, so token t looks at t - period + 1. Raises InputError unless 1 <= period < T."""
    T = patterns.shape[-1]
    check_whole("period", period, 1, T - 1, f" from 1 to {T - 1}, less than the number of tokens")
    rows = np.arange(period, T)
    scores: Float64 = patterns[..., rows, rows - period + 1].mean(axis=-1, dtype=np.float64)
    return scores


def repeated_tokens(V: int, period: int, *, times: int = 2, seed: int = 0) -> list[int]:
    """Return `period` random ids below V, repeated: only a model that looks back can predict the second half."""
    if period * times < 2:
        raise InputError(f"period is {period}, repeated {times} times: at least 2 tokens are needed")
    ids: list[int] = np.random.default_rng(seed).integers(0, V, period).tolist()
    return ids * times
