"""With --speculate, measure decode with and without speculation: the same tokens in the same rounds.

Each test continues texts of the model's own: --depths tokens drawn at random after its last token id. Their prefill is not
timed. If speculation changes a token, the command ends with an error. A test has a name such as "tg64@d8 greedy". Its field by
is "pygpt" for plain decode, and "pygpt +q8_0 auto" for guesses of the draft q8_0. JSON has these fields in addition:

    sampler, speculation, draft
                        speculation is auto or a number; it and draft, which is what guesses, are null for plain decode
    drafted, accepted, acceptance
                        numbers of guesses and of right guesses in all rounds, and their ratio, null without guesses
    tokens_per_step     new tokens of a sequence in each of its steps
    speed_up_over_plain
                        over plain decode of the same test
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from ...errors import PyGPTError
from ...generation.request import Request
from ...model import GPT2


class Completions:
    """Complete texts again and again on one engine, because an engine learns when speculation pays.

    expected: the tokens that must come; an empty list takes those of the first run. facts: fields of the result."""

    def __init__(self, model: GPT2, texts: Sequence[list[int]], new: int, expected: list[Any], asked: dict[str, Any]) -> None:
        self._requests = [Request(model.config, text, max_new_tokens=new + 1, **asked) for text in texts]
        self._engine, self._new, self._expected, self._runs = model.engine(), new, expected, 0
        unknown = dict.fromkeys(("speculation", "draft", "acceptance"))
        self.facts: dict[str, Any] = {"sampler": asked["sampler"], **unknown, "drafted": 0, "accepted": 0}

    def run(self) -> float:
        """Return the seconds of `new` tokens of each text. A first token, which ends the prefill, does not count."""
        found = [self._engine.add(request).completions[0] for request in self._requests]
        while not all(completion.tokens for completion in found):
            self._step()
        early, began = sum(len(completion.tokens) - 1 for completion in found), perf_counter()
        while self._engine.busy:
            self._step()
        seconds, total = perf_counter() - began, self._new * len(found)
        tokens = [completion.tokens for completion in found]
        self._expected[:] = self._expected or tokens
        for number, (own, expected) in enumerate(zip(tokens, self._expected, strict=True)):
            if own != expected:
                raise PyGPTError(f"speculation changed tokens of text {number}: {own} instead of {expected}")
        if self._runs:  # the first one was a warm-up
            for name in "drafted", "accepted":
                self.facts[name] += sum(getattr(completion, name) for completion in found)
            drafted, accepted, new = self.facts["drafted"], self.facts["accepted"], total * self._runs
            self.facts |= {"acceptance": accepted / drafted if drafted else None, "tokens_per_step": new / (new - accepted)}
        self._runs += 1
        return seconds * total / (total - early)  # with many prompts, early texts go on before the last prompt is read

    def _step(self) -> None:
        for event in self._engine.step():
            if event.error is not None:
                raise event.error


def own_texts(model: GPT2, length: int, count: int) -> list[list[int]]:
    """Return texts that the model draws at random, each with its own seed."""
    start, seeds = [model.config.V - 1], range(1, count + 1)
    drawn = model.generate_batch([start] * count, max_new_tokens=length, sampler="sample", seed=list(seeds))
    return [completion.tokens for completion in drawn]
