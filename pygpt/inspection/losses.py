"""The losses of a text, token by token."""

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from ..errors import InputError, NumericalError
from ..generation.request import check_ids
from ..model import GPT2
from ..network import KVCache

ROWS = 128  # rows of a step: their logits take 26 MB with GPT-2's vocabulary
FLOAT64_ROWS = 16  # rows of logits that are float64 at a time: 6 MB
Losses = npt.NDArray[np.float64]


def loss_by_position(model: GPT2, tokens: Iterable[SupportsIndex]) -> Losses:
    """Return the loss of each token of a text after the first, (T - 1,), in nats: minus the logarithm of its probability.

    Raises InputError for fewer than 2 tokens, NumericalError if the logits are not finite."""
    ids = check_ids(model.config, tokens)
    if len(ids) < 2:
        raise InputError(f"{len(ids)} tokens were given: at least 2 are needed, because the first has no prediction")
    return score(model, model.new_cache(len(ids) - 1), ids[:-1], ids[1:])


def losses_of(logits: npt.NDArray[np.float32], targets: Sequence[int]) -> Losses:
    """Return minus the log-probability of each row's target, in nats: [rows, V], [rows] -> [rows], computed in float64."""
    out = np.empty(len(targets))
    for start in range(0, len(targets), FLOAT64_ROWS):
        rows = logits[start : start + FLOAT64_ROWS].astype(np.float64)  # [16, V]
        chosen = rows[np.arange(len(rows)), targets[start : start + FLOAT64_ROWS]]  # [16]
        out[start : start + FLOAT64_ROWS] = log_sums(rows) - chosen  # [16]
    return out


def log_sums(rows: Losses) -> Losses:
    """Return the logarithm of the sum of exponentials of each row's logits: [rows, V] -> [rows].

    Raises NumericalError if a result is not finite."""
    top = rows.max(axis=1)  # [rows]
    out: Losses = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))  # [rows]
    if not np.isfinite(out).all():
        raise NumericalError("the network's logits are not finite: the model file's weights are damaged or out of range")
    return out


def score(model: GPT2, cache: KVCache, tokens: Sequence[int], targets: Sequence[int]) -> Losses:
    """Append tokens to the cache; return the losses of `targets`, the successors of the last len(targets) tokens."""
    silent = len(tokens) - len(targets)  # number of rows that are only context
    found = [np.empty(0)]
    for start in range(0, len(tokens), ROWS):
        stop = min(start + ROWS, len(tokens))
        logits = model.step([(tokens[i], cache, i >= silent) for i in range(start, stop)])
        found.append(losses_of(logits, targets[max(0, start - silent) : max(0, stop - silent)]))
    return np.concatenate(found)
