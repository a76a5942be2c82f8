"""A checked request for a completion, from Python's keywords or from a JSON object.

Refuses to know about networks. Generator.generate() describes the options.
"""

from collections.abc import Iterable

from .._kernels import check_token
from ..config import Config
from ..errors import InputError, is_whole, shown
from .sampling import Sampler
from .stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, SupportsFloat, SupportsIndex, TypedDict

    class Options(TypedDict, total=False):
        """The options of a completion, without the seed. Generator.generate() describes them."""

        total: int | None
        max_new_tokens: int | None
        sampler: str | None
        do_sample: bool | None
        temperature: SupportsFloat | None
        top_k: SupportsIndex | None
        top_p: SupportsFloat | None
        min_p: SupportsFloat | None
        repetition_penalty: SupportsFloat | None
        stop_token_ids: int | Iterable[int] | None
        stop_strings: str | Iterable[str] | None
        overflow: str | None
        slide_to: int | None


DEFAULT_TOTAL = 10  # the serial program's n: the number of tokens with the prompt
UNBOUNDED = 10**18  # more tokens than any user waits for
OVERFLOWS = ("stop", "slide")
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}  # options of sampler "sample"
LENGTH = {"total", "max_new_tokens"}
JSON_KEYS = {"tokens", "sampler", "stop_token_ids", "stop_strings", "overflow", *LENGTH, *SAMPLING}


def check_ids(config: Config, tokens: Iterable[int]) -> list[int]:
    """Return token ids as a list of at least one int below V. Raises InputError for anything else."""
    try:
        tokens = iter(tokens)
    except TypeError:
        raise InputError(f"tokens are {shown(tokens)}: give a list of token ids") from None
    checked = [check_token(token, config.V) for token in tokens]
    if not checked:
        raise InputError("the list of tokens is empty: give at least one token id to continue")
    return checked


def check_tokens(config: Config, tokens: Iterable[int]) -> list[int]:
    """Return token ids as a list of 1 to maxT ints below V. Raises InputError for anything else."""
    checked = check_ids(config, tokens)
    if len(checked) > config.maxT:
        raise InputError(f"{len(checked)} tokens were given: the model takes at most {config.maxT}, so give fewer")
    return checked


class Request:
    """A checked request: complete `tokens` to `total` tokens. Generator.generate() describes the options.

    Raises InputError for an empty prompt, an id outside the vocabulary, an option out of its range, and both total and
    max_new_tokens. Raises it also if `total` leaves no room for a new token, or exceeds maxT without an `overflow`.

    For servers: stop_in_prompt=False searches stop strings only in new text. prompt_logprobs=True fills
    Completion.prompt_infos with a TokenInfo for each token of the prompt but the first; max_new_tokens may then be 0.
    """

    def __init__(
        self,
        config: Config,
        tokens: Iterable[int],
        *,
        total: int | None = None,
        max_new_tokens: int | None = None,
        overflow: str | None = None,
        slide_to: int | None = None,
        stop_token_ids: "int | Iterable[int] | None" = None,
        stop_strings: "str | Iterable[str] | None" = None,
        stop_in_prompt: bool = True,
        top_logprobs: int | None = None,
        prompt_logprobs: bool = False,
        **sampling: "Any",
    ) -> None:
        if overflow is not None and not (isinstance(overflow, str) and overflow in OVERFLOWS):
            raise InputError(f"overflow is {shown(overflow)}: it must be one of {', '.join(OVERFLOWS)}")
        self.config, self.overflow = config, overflow
        self.tokens = check_ids(config, tokens) if overflow == "slide" else check_tokens(config, tokens)
        self.sampler = Sampler(sampling.pop("sampler", None), **sampling)
        self.stop = Stop(config, stop_token_ids, stop_strings)
        self.stop_in_prompt, self.prompt_logprobs = stop_in_prompt, prompt_logprobs
        self.slide_to = self._check_slide_to(slide_to)
        self.top_logprobs = top_logprobs
        if top_logprobs is not None and not is_whole(top_logprobs, 0, config.V):
            raise InputError(f"top_logprobs is {shown(top_logprobs)}: it must be a whole number from 0 to {config.V}")
        if prompt_logprobs and (top_logprobs is None or overflow == "slide"):
            raise InputError('prompt_logprobs needs top_logprobs, and overflow must not be "slide": change one of them')
        self.total = self._check_total(total, max_new_tokens)

    def _check_slide_to(self, slide_to: int | None) -> int:
        """Return how many tokens remain after a full window slides."""
        maxT = self.config.maxT
        if slide_to is None:
            return max(maxT // 2, 1)
        if self.overflow != "slide":
            raise InputError(f'slide_to is {shown(slide_to)}, but overflow is not "slide": set both or neither')
        if not is_whole(slide_to, 1, maxT):
            raise InputError(f"slide_to is {shown(slide_to)}: it must be a whole number from 1 to the model's {maxT}")
        return slide_to

    def _check_total(self, total: int | None, max_new_tokens: int | None) -> int:
        """Return the total number of tokens, unless a stop ends the completion earlier."""
        count, maxT = len(self.tokens), self.config.maxT
        longest = maxT if self.overflow is None else UNBOUNDED
        if total is not None and max_new_tokens is not None:
            raise InputError("total and max_new_tokens were both given: they set the same length, so give one")
        if max_new_tokens is not None:
            least = 0 if self.prompt_logprobs else 1
            if not is_whole(max_new_tokens, least, longest - count):
                raise InputError(
                    f"max_new_tokens is {shown(max_new_tokens)}: with {count} tokens given it must be a whole number "
                    f"from {least} to {longest - count}"
                    + (f", because the model takes {maxT} tokens" if longest == maxT else "")
                )
            total = count + max_new_tokens
            if total == count:
                return total
        elif total is None:
            total = DEFAULT_TOTAL
        if not is_whole(total, 2, longest):
            raise InputError(
                f"total is {shown(total)}: it counts all tokens, with the given ones, and must be a whole number "
                f"from 2 to " + (f"the model's {maxT}" if longest == maxT else str(longest))
            )
        if count >= total:
            raise InputError(
                f"{count} tokens were given, but the total is {total}, so a new one does not fit: "
                f"give at most {total - 1}, or raise the total (-n)"
            )
        if self.overflow == "stop" and count == maxT:
            raise InputError(
                f"{count} tokens were given, but the model takes {maxT}, so a new one does not fit: "
                "give fewer, or let the window slide (overflow slide)"
            )
        return min(total, maxT) if self.overflow == "stop" else total

    @property
    def new(self) -> int:
        """The number of tokens to add, unless a stop ends the completion earlier."""
        return self.total - len(self.tokens)


def request_from_json(config: Config, text: bytes, defaults: "dict[str, Any]") -> Request:
    """Read a request from a JSON object such as {"tokens": [31373, 612], "max_new_tokens": 5}.

    The object's keys override the defaults, and remove defaults that contradict them. Raises InputError for text that is not
    JSON, an unknown key, a null value, and everything that Request refuses.
    """
    order = parse_json(text)
    tokens = order.pop("tokens")
    if not isinstance(tokens, list):
        raise InputError('request: "tokens" must be a list of token ids, as in {"tokens": [31373, 612]}')
    return Request(config, tokens, **complete_order(order, defaults))


def complete_order(order: "dict[str, Any]", defaults: "dict[str, Any]") -> "dict[str, Any]":
    """Return a request's own options, and the defaults that do not contradict them."""
    ruled_out: set[str] = set()
    if not LENGTH.isdisjoint(order):
        ruled_out |= LENGTH
    if "sampler" in order:
        if order["sampler"] != "sample":
            ruled_out |= SAMPLING
    elif not SAMPLING.isdisjoint(order):
        ruled_out.add("sampler")
    return {**{name: value for name, value in defaults.items() if name not in ruled_out}, **order}


def parse_json(text: bytes) -> "dict[str, Any]":
    """Parse a request's JSON object and check its keys."""
    import json

    try:
        request = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"request {text[:60].decode('utf-8', 'replace')!r} is not JSON: {error}") from None
    if unknown := sorted(set(request) - JSON_KEYS):
        raise InputError(f"request: unknown key {shown(unknown[0])}: keys are {', '.join(sorted(JSON_KEYS))}")
    if "tokens" not in request:
        raise InputError('request: the key "tokens" is missing: add it, as in {"tokens": [31373, 612]}')
    for key, value in request.items():
        if value is None:
            raise InputError(f"request: {key!r} is null (None): give it a value, or leave it out")
    return dict(request)
