"""Stop conditions: end a completion before its length at a stop token, or if its text contains a stop string.

The text is that of the whole sequence with the prompt. A stop string may begin and end inside tokens. The token that completes
it is the last one, and may add text after the stop string. Source: the rule of Hugging Face's StopStringCriteria. Stop strings
load the vocabulary, and so does the end of text if the vocabulary is not GPT-2's.

Refuses both for a model of unknown vocabulary."""

from collections.abc import Iterable

from .._kernels import check_token
from ..config import Config
from ..errors import TYPE_CHECKING, InputError, check_flag, several, stop_bytes, whole

if TYPE_CHECKING:
    from typing import SupportsIndex

    from ..tokenizer import Tokenizer


class Stop:
    """Checked stop tokens and stop strings.

    at_eot: whether the id that ends a text is a stop token. Raises InputError for an id outside the vocabulary and for
    an empty stop string. Stop strings need a known vocabulary; at_eot needs one with such an id."""

    def __init__(
        self,
        config: Config,
        token_ids: "SupportsIndex | Iterable[SupportsIndex] | None" = None,
        strings: "str | Iterable[str] | None" = None,
        at_eot: bool | None = None,
    ) -> None:
        ids = several("stop_token_ids", token_ids if whole(token_ids) is None else [token_ids], int)
        self.tokens = frozenset(check_token(token, config.V) for token in ids)
        if at_eot is not None and check_flag("stop_at_eot", at_eot):
            from ..tokenizer import end_of_text

            if (end := end_of_text(config)) is None:
                what = "the model's vocabulary has no token that ends a text"
                raise InputError(f"stop_at_eot is True, but {what}: give an id in stop_token_ids (--stop-token)")
            self.tokens |= {end}
        self.strings = [stop_bytes(text) for text in several("stop_strings", strings, str)]
        self.longest = max(map(len, self.strings), default=0)
        self.tokenizer: Tokenizer | None = None
        if self.strings:
            from ..tokenizer import tokenizer_of

            self.tokenizer = tokenizer_of(config)


class Watch:
    """Watch the new tokens of one sequence for stop conditions."""

    def __init__(self, stop: Stop, prompt: list[int]) -> None:
        self._stop = stop
        self._tail = b""  # the end of the text, where a stop string may begin
        if stop.tokenizer is not None:
            self._tail = self._end_of(stop.tokenizer.decode_bytes(prompt[-stop.longest :]))  # enough: each has a byte

    def ends(self, token: int) -> bool:
        """Take the next token; return whether it is a stop token or completes a stop string."""
        found = token in self._stop.tokens
        if self._stop.tokenizer is not None:
            known = len(self._tail)
            text = self._tail + self._stop.tokenizer.decode_bytes((token,))
            found = found or any(text.find(string, max(known + 1 - len(string), 0)) >= 0 for string in self._stop.strings)
            self._tail = self._end_of(text)
        return found

    def _end_of(self, text: bytes) -> bytes:
        """Return the end of the text, in which an incomplete stop string may begin."""
        return text[max(len(text) - self._stop.longest + 1, 0) :]
