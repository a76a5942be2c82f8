"""How a prediction forms: the logit lens, the parts of a logit, and heads that look for repetitions.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, "A mathematical framework for transformer
circuits" (direct logit attribution); Olsson et al. 2022, "In-context learning and induction heads" (the induction score).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from ..errors import InputError, check_whole
from ..generation.logprobs import score
from ..generation.request import check_tokens
from ..model import GPT2

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Logit:
    """The logit of a token at a position, or its lead over the token `against`: a number to explain.

    position: from -T to T - 1. A Logit is a function of the logits (T, V)."""

    token: int
    against: int | None = None
    position: int = -1

    def __call__(self, logits: Float32) -> float:
        """Return the number for logits (T, V). Raises InputError for an id or a position that they do not have."""
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


def logit_lens(model: GPT2, tokens: Iterable[SupportsIndex], *, positions: Iterable[int] | None = None) -> Float32:
    """Return what each layer would predict: its residual through the last layernorm and the head, (L + 1, P, V) logits.

    Row 0 belongs to the embedding, row l + 1 to layer l. So the last row has the bits of the ordinary logits. positions: P of
    them (default: all T). The network itself computes each row, in a pass of its own: the weights may have any format."""
    ids, last = check_tokens(model.config, tokens), model.config.L - 1
    streams = model.activations(ids, ["encoded", "residual3"])
    where = None if positions is None else list(positions)
    edits = [{("residual3", last, None): row} for row in (streams["encoded"], *streams["residual3"])]
    return np.stack([model.activations(ids, "logits", positions=where, edits=edit)["logits"] for edit in edits])


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


def loss_by_position(model: GPT2, tokens: Iterable[SupportsIndex]) -> Float64:
    """Return the loss of each token of a text after the first, (T - 1,), in nats: minus the logarithm of its probability.

    Raises InputError for fewer than 2 tokens, NumericalError if the logits are not finite."""
    ids = check_tokens(model.config, tokens)
    if len(ids) < 2:
        raise InputError(f"{len(ids)} tokens were given: at least 2 are needed, because the first has no prediction")
    return -np.array([info.logprob for info in next(score(model.network, model.new_cache(), [], ids[:1], [ids[1:]]))])


def induction_scores(patterns: Float32, period: int) -> Float64:
    """Return how much each head attends to the token after the last occurrence, from attention (L, NH, T, T) to (L, NH).

    The tokens repeat every `period`, so token t looks at t - period + 1. Raises InputError unless 1 <= period < T."""
    T = patterns.shape[-1]
    check_whole("period", period, 1, T - 1, f" from 1 to {T - 1}, less than the number of tokens")
    rows = np.arange(period, T)
    scores: Float64 = patterns[..., rows, rows - period + 1].mean(axis=-1, dtype=np.float64)
    return scores
