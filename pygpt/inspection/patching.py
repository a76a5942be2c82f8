"""What changes when a part is touched: ablation of heads, activation patching, and its approximation by gradients.

Sources: Meng et al. 2022, "Locating and editing factual associations in GPT" (patching); Nanda 2023, "Attribution patching".
"""

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import SupportsIndex

import numpy as np

from ..activations import zero
from ..errors import InputError
from ..generation.logprobs import token_info
from ..generation.request import check_tokens
from ..model import GPT2
from ..training.trainable import TrainableGPT2
from .lens import Float32, Float64, Logit

Metric = Callable[[Float32], float]  # logits (T, V) -> a number, such as a Logit


def mean_loss(tokens: Iterable[int]) -> Metric:
    """Return the metric that is the mean loss of these tokens after the first, in nats."""
    targets = list(tokens)[1:]
    return lambda logits: -fmean(token_info(logits.data, row, token, 1).logprob for row, token in enumerate(targets))


def ablate_heads(model: GPT2, tokens: Iterable[SupportsIndex], metric: Metric | None = None) -> Float64:
    """Return how a metric of the logits (default: the mean loss) changes if a head's output is zero, for each head: (L, NH).

    Each head costs a pass of the network."""
    ids = check_tokens(model.config, tokens)
    metric = mean_loss(ids) if metric is None else metric
    plain, out = metric(model.logits(ids)), np.empty((model.config.L, model.config.NH))
    for layer, head in np.ndindex(out.shape):
        edits = {("atty", layer, None): zero(heads=[head])}
        out[layer, head] = metric(model.activations(ids, ["logits"], edits=edits)["logits"]) - plain
    return out


def patch_activations(
    model: GPT2, clean: Iterable[SupportsIndex], corrupt: Iterable[SupportsIndex], metric: Metric, *, name: str = "residual3"
) -> Float64:
    """Run the corrupt tokens with one activation of the clean ones at a time; return the metric of each run, (L, T).

    name: an activation with layers and channels, such as residual3, attproj or fcproj. Each cell costs a pass of the network.
    Raises InputError for texts of different lengths."""
    ids, others = _pair(model, clean, corrupt)
    kept = model.activations(ids, [name])[name]
    if kept.ndim != 3:
        raise InputError(f"name is {name!r}: it must be an activation of shape (L, T, ...), such as residual3")
    out = np.empty(kept.shape[:2])
    for layer, position in np.ndindex(out.shape):
        edits = {(name, layer, position): kept[layer, position]}
        out[layer, position] = metric(model.activations(others, ["logits"], edits=edits)["logits"])
    return out


def attribution_patching(
    engine: TrainableGPT2, clean: Iterable[SupportsIndex], corrupt: Iterable[SupportsIndex], logit: Logit
) -> Float64:
    """Approximate how patching each residual3 would change a logit of the corrupt tokens, (L, T), in three passes.

    It is the first-order term: (clean - corrupt) times the gradient at the corrupt tokens. Raises what patch_activations()
    raises."""
    with engine.model() as model:
        ids, others = _pair(model, clean, corrupt)
        there, here = (model.activations(some, ["residual3"])["residual3"].astype(np.float64) for some in (ids, others))
    gradients = engine.residual_gradients(others, logit.gradient(len(others), engine.config.V))["residual3"]
    effect: Float64 = ((there - here) * gradients).sum(axis=2)  # [L, T, C] -> [L, T]
    return effect


def _pair(model: GPT2, clean: Iterable[SupportsIndex], corrupt: Iterable[SupportsIndex]) -> tuple[list[int], list[int]]:
    ids, others = check_tokens(model.config, clean), check_tokens(model.config, corrupt)
    if len(ids) != len(others):
        raise InputError(f"the texts have {len(ids)} and {len(others)} tokens: patching needs texts of equal length")
    return ids, others
