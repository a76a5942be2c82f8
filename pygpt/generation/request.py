"""A checked request for a completion, from Python's keywords or from a JSON object.

Refuses to know about networks. Generator.generate() describes the options."""

from collections.abc import Iterable

from .._kernels import check_token
from ..config import Config
from ..errors import TYPE_CHECKING, InputError, check_whole, is_boolean, near, plural, sequence, shown
from .control import CONTROLS, Control
from .sampling import Sampler
from .stop import Stop

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, SupportsFloat, SupportsIndex, TypedDict

    from ..activations import Edits, Value
    from .control import Processor

    class Options(TypedDict, total=False):
        """The options of a completion, without the seed. Generator.generate() describes them."""

        total: SupportsIndex | None
        max_new_tokens: SupportsIndex | None
        sampler: str | None
        do_sample: bool | None
        temperature: SupportsFloat | None
        top_k: SupportsIndex | None
        top_p: SupportsFloat | None
        min_p: SupportsFloat | None
        logit_bias: Mapping[SupportsIndex, SupportsFloat] | None
        repetition_penalty: SupportsFloat | None
        frequency_penalty: SupportsFloat | None
        presence_penalty: SupportsFloat | None
        no_repeat_ngram_size: SupportsIndex | None
        bad_words_ids: Iterable[Iterable[SupportsIndex]] | None
        suppress_tokens: SupportsIndex | Iterable[SupportsIndex] | None
        logits_processor: Processor | Sequence[Processor] | None
        stop_token_ids: SupportsIndex | Iterable[SupportsIndex] | None
        stop_strings: str | Iterable[str] | None
        stop_at_eot: bool | None
        overflow: str | None
        slide_to: SupportsIndex | None
        speculation: bool | SupportsIndex | None
        edits: Mapping[Any, Value] | None


DEFAULT_TOTAL = 10  # the serial program's n: the number of tokens with the prompt
UNBOUNDED = 10**18  # more tokens than any user waits for
OVERFLOWS = ("stop", "slide")
MOST_GUESSES = 64  # in one step
SAMPLING = {"temperature", "top_k", "top_p", "min_p", "seed"}  # options of sampler "sample"
LENGTH = {"total", "max_new_tokens"}
STOPS = {"stop_token_ids", "stop_strings", "stop_at_eot"}
IN_JSON = {"sampler", "speculation", "overflow", *STOPS, *LENGTH, *SAMPLING, *CONTROLS[:-1]}
JSON_KEYS = {"tokens", *IN_JSON}
# Options of transformers: what to do instead.
THEIRS = {"max_length": "give total", "eos_token_id": "give stop_token_ids", "num_return_sequences": "use generate_batch()"}
THEIRS |= {"n": "give each prompt several times", "streamer": "generate() yields each token at once"}
THEIRS |= dict.fromkeys(("attention_mask", "pad_token_id", "use_cache"), "leave it out: pygpt never pads, and always caches")
OPTIONS = {*IN_JSON, "do_sample", "edits", "logits_processor", "slide_to"}


def check_ids(config: Config, tokens: "Iterable[SupportsIndex]") -> list[int]:
    """Return token ids as a list of at least one int below V. Raises InputError for anything else."""
    checked = [check_token(token, config.V) for token in sequence(tokens)]
    if not checked:
        raise InputError("the list of tokens is empty: give at least one token id to continue")
    return checked


def check_tokens(config: Config, tokens: "Iterable[SupportsIndex]") -> list[int]:
    """Return token ids as a list of 1 to maxT ints below V. Raises InputError for anything else."""
    checked = check_ids(config, tokens)
    if len(checked) > config.maxT:
        raise InputError(f"{len(checked)} tokens were given: the model takes at most {config.maxT}, so give fewer")
    return checked


class Request:
    """A checked request: complete `tokens` to `total` tokens. Generator.generate() describes the options.

    Raises InputError for an empty prompt, an id outside the vocabulary, an option out of its range, and both total and
    max_new_tokens. Also if `total` leaves no room for a new token, or exceeds maxT without an `overflow`.

    For servers: stop_in_prompt=False searches stop strings only in new text. prompt_logprobs=True fills
    Completion.prompt_infos with a TokenInfo for each token of the prompt but the first; max_new_tokens may then be 0."""

    def __init__(
        self,
        config: Config,
        tokens: "Iterable[SupportsIndex]",
        *,
        total: "SupportsIndex | None" = None,
        max_new_tokens: "SupportsIndex | None" = None,
        overflow: str | None = None,
        slide_to: "SupportsIndex | None" = None,
        stop_token_ids: "SupportsIndex | Iterable[SupportsIndex] | None" = None,
        stop_strings: "str | Iterable[str] | None" = None,
        stop_at_eot: bool | None = None,
        stop_in_prompt: bool = True,
        top_logprobs: "SupportsIndex | None" = None,
        prompt_logprobs: bool = False,
        speculation: "bool | SupportsIndex | None" = None,
        edits: "Mapping[Any, Value] | None" = None,
        **options: "Any",
    ) -> None:
        if unknown := sorted(options.keys() - OPTIONS):
            raise InputError(f"{shown(unknown[0])} is not an option: {THEIRS.get(unknown[0]) or near(unknown[0], OPTIONS)}")
        if overflow is not None and not (isinstance(overflow, str) and overflow in OVERFLOWS):
            raise InputError(f"overflow is {shown(overflow)}: it must be one of {', '.join(OVERFLOWS)}")
        self.config, self.overflow = config, overflow
        self.tokens = check_ids(config, tokens) if overflow == "slide" else check_tokens(config, tokens)
        given = {name: options.pop(name) for name in CONTROLS if name in options}
        self.control = Control(config, **given) if given else None
        if self.control is not None and self.control.idle:
            self.control = None
        self.sampler = Sampler(options.pop("sampler", None), **options)
        self.stop = Stop(config, stop_token_ids, stop_strings, stop_at_eot)
        self.stop_in_prompt, self.prompt_logprobs = stop_in_prompt, prompt_logprobs
        self.slide_to = self._check_slide_to(slide_to)
        self.top_logprobs = None if top_logprobs is None else check_whole("top_logprobs", top_logprobs, 0, config.V)
        if prompt_logprobs and (top_logprobs is None or overflow == "slide"):
            raise InputError('prompt_logprobs needs top_logprobs, and overflow must not be "slide": change one of them')
        self.total = self._check_total(total, max_new_tokens)
        self.speculation = check_speculation(speculation)
        self.edits: Edits | None = None
        if edits is not None:
            from .. import activations

            self.edits = activations.Edits(config, edits)

    def _check_slide_to(self, slide_to: "SupportsIndex | None") -> int:
        """Return how many tokens remain after a full window slides."""
        maxT = self.config.maxT
        if slide_to is None:
            return max(maxT // 2, 1)
        if self.overflow != "slide":
            raise InputError(f'slide_to is {shown(slide_to)}, but overflow is not "slide": set both or neither')
        return check_whole("slide_to", slide_to, 1, maxT, f" from 1 to the model's {maxT}")

    def _check_total(self, total: "SupportsIndex | None", max_new_tokens: "SupportsIndex | None") -> int:
        """Return the total number of tokens, unless a stop ends the completion earlier."""
        count, maxT = len(self.tokens), self.config.maxT
        longest = maxT if self.overflow is None else UNBOUNDED
        most = f"the model's {maxT} tokens (more with overflow slide)" if longest == maxT else f"{longest} tokens"
        full = f"the prompt has {plural(count, 'token')}, so a new one does not fit in"
        if total is not None and max_new_tokens is not None:
            raise InputError("total and max_new_tokens were both given: they set the same length, so give one")
        if self.prompt_logprobs and max_new_tokens == 0:
            return count
        if self.overflow != "slide" and count == maxT:
            raise InputError(f"{full} the model's {maxT}: give fewer, or let the window slide (overflow slide)")
        if max_new_tokens is not None:
            rule = f" from 1 to {longest - count}, because the prompt takes {count} of {most}"
            total = count + check_whole("max_new_tokens", max_new_tokens, 1, longest - count, rule)
        rule = f" from 2 to {most}; it counts the given tokens, too"
        total = check_whole("total", min(DEFAULT_TOTAL, longest) if total is None else total, 2, longest, rule)
        if count >= total:
            raise InputError(f"{full} the total of {total}: give at most {total - 1}, or raise the total (-n)")
        return min(total, maxT) if self.overflow == "stop" else total

    @property
    def new(self) -> int:
        """The number of tokens to add, unless a stop ends the completion earlier."""
        return self.total - len(self.tokens)


def check_speculation(value: "Any") -> int | None:
    """Return how many tokens to guess in a step: 0 means the fastest number, None no guesses."""
    if value is None or is_boolean(value):
        return 0 if value else None
    return check_whole("speculation", value, 1, MOST_GUESSES, f" from 1 to {MOST_GUESSES}, or True (auto) or False (off)")


def request_from_json(config: Config, text: bytes, defaults: "dict[str, Any]") -> Request:
    """Read a request from a JSON object such as {"tokens": [31373, 612], "max_new_tokens": 5}.

    The object's keys override the defaults, and remove defaults that contradict them. Raises InputError for text that is not
    JSON, an unknown key, a null value, and everything that Request refuses."""
    import json

    try:
        order = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"request {text[:60].decode('utf-8', 'replace')!r} is not JSON: {error}") from None
    check_keys(order, JSON_KEYS, "request: ")
    if "tokens" not in order:
        raise InputError('request: the key "tokens" is missing: add it, as in {"tokens": [31373, 612]}')
    if not isinstance(tokens := order.pop("tokens"), list):
        raise InputError('request: "tokens" must be a list of token ids, as in {"tokens": [31373, 612]}')
    return Request(config, tokens, **complete_order(order, defaults))


def check_keys(order: "Mapping[str, Any]", keys: set[str], where: str = "") -> None:
    """Raise InputError for the first key of a JSON object that is not one of `keys`, or whose value is null."""
    for key, value in order.items():
        if key not in keys:
            raise InputError(f"{where}unknown key {shown(key)}: {near(key, keys)}")
        if value is None:
            raise InputError(f"{where}{key!r} is null (None): give it a value, or leave it out")


def complete_order(order: "dict[str, Any]", defaults: "dict[str, Any]") -> "dict[str, Any]":
    """Return a request's own options, and the defaults that do not contradict them. logit_bias gets whole numbers as keys."""
    ruled_out: set[str] = set()
    if not LENGTH.isdisjoint(order):
        ruled_out |= LENGTH
    if "sampler" in order:
        if order["sampler"] != "sample":
            ruled_out |= SAMPLING
    elif not SAMPLING.isdisjoint(order):
        ruled_out.add("sampler")
    found = {**{name: value for name, value in defaults.items() if name not in ruled_out}, **order}
    if isinstance(bias := found.get("logit_bias"), dict):
        found["logit_bias"] = {
            int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key: bias[key]
            for key in bias
        }
    return found
