"""Change a row of logits before a sampler chooses: biases, penalties, bans, and the caller's own functions.

Control.process() is a pure function of the row and of the tokens before it. So its result does not depend on other rows of a
batch, and rows that are checked later get the same result. A Request without these options skips this module and its copy.

Refuses to leave a row without any token. Sources: Hugging Face's transformers (logits_process.py), for names, meaning and
order; OpenAI's API reference, for the bias and for the frequency and presence penalties."""

from collections.abc import Callable, Mapping, Sequence

from .._kernels import check_token
from ..config import Config
from ..errors import TYPE_CHECKING, InputError, check_number, check_whole, listed, plural, sequence, shown, whole
from .sampling import check_positive, not_finite

if TYPE_CHECKING:
    from typing import Any

    import numpy as np
    import numpy.typing as npt

    Row = npt.NDArray[np.float32]  # (V,)
    Processor = Callable[[list[int], Row], "npt.ArrayLike | None"]

CONTROLS: tuple[str, ...] = ("logit_bias", "repetition_penalty", "frequency_penalty", "presence_penalty")
CONTROLS += ("no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "logits_processor")
MOST_PENALTY, MOST_BIAS = 1e6, 1e30  # far beyond any use, and their sums with logits stay in the range of float32


class Control:
    """Checked options that change logits, in the order of CONTROLS. None has no effect.

    logit_bias: maps ids to numbers that are added to their logits. repetition_penalty, above 0: divides positive logits of ids
    in the sequence, and multiplies negative ones. frequency_penalty: is subtracted once for each time that an id was generated.
    presence_penalty: is subtracted if an id was generated. no_repeat_ngram_size: bans ids that would repeat so many tokens in a
    row; 0 bans none. bad_words_ids: sequences of ids that are never completed. suppress_tokens: ids that are never chosen.
    logits_processor: one function or several, called as function(tokens, row) with the ids so far and the float32 logits (V,);
    it returns a row, or changes the given one and returns None.

    Raises InputError for a value out of its range and for an id outside the vocabulary."""

    def __init__(self, config: Config, **options: "Any") -> None:
        given = {name: value for name, value in options.items() if value is not None}
        self._bias = _bias(config, given.get("logit_bias", {}))
        self._repetition = check_positive("repetition_penalty", given.get("repetition_penalty", 1))
        self._frequency, self._presence = (
            check_number(name, given.get(name, 0), -MOST_PENALTY, MOST_PENALTY)
            for name in ("frequency_penalty", "presence_penalty")
        )
        self._ngram = check_whole("no_repeat_ngram_size", given.get("no_repeat_ngram_size", 0), 0, 1 << 62, ", 0 (off) or more")
        self._bad = [_ids(config, "bad_words_ids", ids) for ids in listed("bad_words_ids", given.get("bad_words_ids", ()))]
        if [] in self._bad:
            raise InputError("bad_words_ids holds an empty sequence, which would ban every token: leave it out")
        suppressed = given.get("suppress_tokens", ())
        self._suppressed = _ids(config, "suppress_tokens", suppressed if whole(suppressed) is None else [suppressed])
        functions = given.get("logits_processor", ())
        self._processors = [functions] if callable(functions) else listed("logits_processor", functions)
        for function in self._processors:
            if not callable(function):
                raise InputError(f"logits_processor is {shown(function)}: it must be a function of (tokens, row), or several")
        self.calls_out = bool(self._processors)  # the user's functions: they run on the thread of step(), one after the other
        numbers = self._repetition != 1, self._frequency, self._presence, self._ngram
        self.idle = not any((*numbers, self._bias, self._bad, self._suppressed, self._processors))

    def process(self, logits: "npt.ArrayLike", tokens: Sequence[int], prompt: int) -> "Row":
        """Return a changed copy of the logits (V,) that follow `tokens`. Its first `prompt` tokens were given.

        Raises NumericalError for logits that are not finite, InputError if every token is excluded or a result is bad."""
        import numpy as np

        row, ids = np.array(logits, np.float32), np.array(tokens, np.int64)
        if not np.isfinite(row.max()):
            raise not_finite()
        for token, bias in self._bias.items():
            row[token] += np.float32(bias)
        if self._repetition != 1:
            _repeat(row, np.unique(ids), self._repetition)
        if self._frequency or self._presence:
            made, counts = np.unique(ids[prompt:], return_counts=True)
            row[made] -= np.float32(self._frequency) * counts.astype(np.float32)
            row[made] -= np.float32(self._presence)
        if self._ngram and len(ids) >= self._ngram:
            starts = np.ones(len(ids) - self._ngram + 1, bool)  # places at which the last n - 1 tokens occur
            for i, token in enumerate(ids[len(starts) :]):
                starts &= ids[i : i + len(starts)] == token
            row[ids[self._ngram - 1 :][starts]] = -np.inf
        for *before, last in self._bad:
            if [*tokens[len(tokens) - len(before) :]] == before:
                row[last] = -np.inf
        row[self._suppressed] = -np.inf
        for function in self._processors:
            row = _returned(function, [*tokens], row)
        if not np.isfinite(top := row.max()):
            which = "every token is excluded" if top == -np.inf else f"the highest logit is {top}"
            raise InputError(f"{which} after {plural(len(tokens), 'token')}: {', '.join(CONTROLS[4:])} must leave a finite one")
        return row


def _repeat(row: "Row", seen: "npt.NDArray[np.int64]", penalty: float) -> None:
    """Apply the repetition penalty. A result beyond the range of float32 becomes its largest number.

    Source: Keskar et al. 2019 (CTRL), with Hugging Face's treatment of signs."""
    import numpy as np

    seen = seen[np.isfinite(row[seen])]
    x, most = row[seen].astype(np.float64), np.finfo(np.float32).max
    with np.errstate(over="ignore", under="ignore"):
        row[seen] = np.clip(np.where(x < 0, x * penalty, x / penalty), -most, most).astype(np.float32)


def _returned(function: "Processor", tokens: list[int], row: "Row") -> "Row":
    """Call a function of the user; return its row. Raises InputError if it returns anything else."""
    import numpy as np

    result = function(tokens, row)
    array = row if result is None else np.asarray(result)
    if array.size != row.size or array.dtype.kind not in "fiu":
        raise InputError(f"logits_processor returned {shown(result)}: it must return logits ({row.size},), or None")
    return np.ascontiguousarray(array.reshape(row.shape), np.float32)


def _bias(config: Config, given: "Any") -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise InputError(f"logit_bias is {shown(given)}: it must map token ids to numbers, such as {{50256: -5.0}}")
    return {
        check_token(token, config.V): check_number(f"logit_bias of token {shown(token)}", value, -MOST_BIAS, MOST_BIAS)
        for token, value in given.items()
    }


def _ids(config: Config, name: str, ids: "Any") -> list[int]:
    if isinstance(ids, (str, bytes)):
        raise InputError(f"{name} is {shown(ids)}: it must be a list of token ids")
    return [check_token(token, config.V) for token in sequence(ids)]
