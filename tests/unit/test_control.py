"""Control of the next token: each option against plain NumPy and recorded values, alone and in batches; stop text; async."""

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known import SHAPE, make_model

from pygpt import GPT2, Config, InputError, NumericalError, SerialGPT2, StreamDecoder, Tokenizer
from pygpt.generation.control import CONTROLS, Control
from pygpt.generation.request import request_from_json
from pygpt.generation.sampling import Sampler

Row = npt.NDArray[np.float32]
V = SHAPE.V


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "m.bin")


@pytest.fixture(scope="module")
def model(path: str) -> Iterator[GPT2]:
    with GPT2.load(path, threads=2) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ against an oracle


def by_hand(row: Row, tokens: list[int], prompt: int, options: dict[str, Any]) -> list[float]:
    """Change a row as transformers and OpenAI document it, one logit after another."""
    made, words = tokens[prompt:], options.get("bad_words_ids", [])
    n = options.get("no_repeat_ngram_size", 0)
    found = []
    for token, logit in enumerate(row):
        x = np.float32(logit) + np.float32(options.get("logit_bias", {}).get(token, 0))
        if token in tokens and (penalty := options.get("repetition_penalty", 1.0)) != 1:
            x = np.float32(float(x) * penalty if x < 0 else float(x) / penalty)
        if token in made:
            x = x - np.float32(options.get("frequency_penalty", 0)) * np.float32(made.count(token))
            x = x - np.float32(options.get("presence_penalty", 0))
        after = [*tokens, token]
        grams = [tokens[i : i + n] for i in range(len(tokens) - n + 1)] if n else []
        banned = token in options.get("suppress_tokens", []) or any(after[-len(word) :] == word for word in words)
        found.append(-math.inf if banned or (n and after[-n:] in grams) else float(x))
    return found


ID = st.integers(0, 9)  # few ids, so that they repeat
PENALTY = st.floats(-2, 2, width=32)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "logit_bias": st.dictionaries(ID, st.floats(-9, 9, width=32), max_size=3),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.25, 2.0, 1.3]),
        "frequency_penalty": PENALTY,
        "presence_penalty": PENALTY,
        "no_repeat_ngram_size": st.integers(0, 4),
        "bad_words_ids": st.lists(st.lists(ID, min_size=1, max_size=3), max_size=4),
        "suppress_tokens": st.lists(ID, max_size=3),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ID, min_size=1, max_size=14), st.integers(0, 14), st.integers(0, 99), OPTIONS)
def test_every_option_by_hand(tokens: list[int], prompt: int, seed: int, options: dict[str, Any]) -> None:
    row = np.random.default_rng(seed).normal(0, 4, V).astype(np.float32)
    before, given_tokens = row.copy(), [*tokens]
    found = Control(SHAPE, **options).process(row, tokens, prompt)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array(by_hand(row, tokens, prompt, options), np.float32))
    assert np.array_equal(row, before)  # the result is a copy
    assert tokens == given_tokens
    with_default = Control(SHAPE, **options, logits_processor=lambda ids, x: None).process(row, tokens, prompt)
    assert np.array_equal(with_default, found)


# Recorded from transformers 5.24 on torch 2.13: the processors of generate(), in its order, on these rows.
RECORDED = json.loads((Path(__file__).resolve().parents[1] / "data" / "goldens_control.json").read_text())


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: "-".join(case["options"]))
def test_what_transformers_computed(case: dict[str, Any]) -> None:
    row = np.array(case["row"], np.float32)
    config = Config(maxT=64, V=len(row), L=1, NH=1, C=4)
    found = Control(config, **case["options"]).process(row, case["tokens"], len(case["tokens"]))
    wanted = np.array([-math.inf if x is None else x for x in case["wanted"]], np.float32)
    np.testing.assert_allclose(found, wanted, rtol=2e-7)  # torch multiplies float32 numbers, pygpt float64 numbers


def test_extreme_penalties_stay_finite() -> None:
    row = np.array([3e38, -3e38, 1, 0] + [0] * (V - 4), np.float32)
    most = np.finfo(np.float32).max
    assert Control(SHAPE, repetition_penalty=1e-300).process(row, [0, 1, 2], 0)[:4].tolist() == [most, 0, most, 0]
    assert Control(SHAPE, repetition_penalty=1e300).process(row, [0, 1, 2], 0)[:4].tolist() == [0, -most, 0, 0]
    assert np.isfinite(Control(SHAPE, logit_bias={0: 1e30, 1: -1e30}).process(row, [0], 0)).all()


# ------------------------------------------------------------------------------------------------ in completions

CHOICES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5, "sampler": "greedy"},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5, "temperature": 0},
    {"no_repeat_ngram_size": 1, "sampler": "greedy"},
    {"no_repeat_ngram_size": 2, "seed": 5},
    {"suppress_tokens": list(range(0, V, 2)), "seed": 6, "temperature": 3.0},
    {"bad_words_ids": [[7], [3, 5], list(range(40))], "logit_bias": {9: 2.0}, "seed": 7},
    {"logits_processor": lambda ids, row: -row, "sampler": "greedy"},
    {"logits_processor": [lambda ids, row: row * 2, lambda ids, row: row.__setitem__(len(ids), 50)], "sampler": "greedy"},
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(options))
def test_a_batch_gives_what_each_gives_alone(model: GPT2, path: str, options: dict[str, Any]) -> None:
    prompts = [[1, 2, 3], [5], [1, 2, 3, 4, 3, 4, 3], [9] * 30]
    alone = [list(model.generate(prompt, max_new_tokens=20, **options)) for prompt in prompts]
    together = model.generate_batch(prompts, max_new_tokens=20, **options)
    assert [completion.tokens for completion in together] == alone
    with SerialGPT2.load(path) as slow:
        assert list(slow.generate(prompts[0], max_new_tokens=20, **options)) == alone[0]
    given_options = {name: value for name, value in options.items() if name in CONTROLS}
    rest = {name: value for name, value in options.items() if name not in CONTROLS}
    control, sampler, tokens = Control(SHAPE, **given_options), Sampler(rest.pop("sampler", None), **rest), [*prompts[2]]
    for step in range(20):  # row after row, as a later check of several rows would do it
        logits = model.logits(tokens)
        tokens.append(sampler.choose(control.process(logits[-1], tokens, 7)[None].data, 0, sampler.seed, 0, step))
    assert tokens[7:] == alone[2]


def test_what_the_options_promise(model: GPT2) -> None:
    greedy = list(model.generate([1, 2], max_new_tokens=30, sampler="greedy"))
    assert list(model.generate([1, 2], max_new_tokens=30, temperature=0)) == greedy
    assert list(model.generate([1, 2], max_new_tokens=30, do_sample=True, temperature=0.0, top_p=0.5, seed=3)) == greedy
    once = list(model.generate([1, 2], max_new_tokens=100, no_repeat_ngram_size=1, seed=3))
    assert len({1, 2, *once}) == 102
    assert set(model.generate([1], max_new_tokens=30, suppress_tokens=[*range(1, V)], temperature=5.0)) == {0}
    assert list(model.generate([1], max_new_tokens=3, logit_bias={7: 1e6})) == [7, 7, 7]
    idle = {"repetition_penalty": 1, "presence_penalty": 0, "logit_bias": {}, "bad_words_ids": [], "logits_processor": []}
    assert list(model.generate([1, 2], max_new_tokens=30, sampler="greedy", **idle)) == greedy  # type: ignore[arg-type]
    [with_infos] = model.generate_batch([[1, 2]], max_new_tokens=3, logit_bias={7: 1e6}, top_logprobs=1)
    assert with_infos.infos[0].top[0][0] != 7  # log-probabilities are those of the network


def test_requests_of_json_take_the_options() -> None:
    order = {"tokens": [1], "logit_bias": {"7": 2, "8": -1.5}, "suppress_tokens": [3], "presence_penalty": 1, "temperature": 0}
    request = request_from_json(SHAPE, json.dumps(order).encode(), {"sampler": "median", "no_repeat_ngram_size": 3})
    row = np.arange(V, dtype=np.float32)
    assert request.control is not None
    found = request.control.process(row, [5, 6, 5, 6], 2)
    assert found[[3, 5, 6, 7, 8]].tolist() == [-math.inf, -math.inf, 5, 9, 6.5]
    assert request.sampler.name == "greedy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": [1]}, r"logit_bias is \[1\]: .*token ids"),
        ({"logit_bias": {V: 1}}, f"{V}. is not a token id"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1 is inf"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: .*above 0"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1: .*whole number"),
        ({"no_repeat_ngram_size": 1.0}, "no_repeat_ngram_size is 1.0"),
        ({"bad_words_ids": 5}, "bad_words_ids is 5: .*list"),
        ({"bad_words_ids": [5]}, "tokens are 5"),
        ({"bad_words_ids": [[]]}, "empty sequence"),
        ({"bad_words_ids": ["ab"]}, "list of token ids"),
        ({"suppress_tokens": [-1]}, "-1. is not a token id"),
        ({"suppress_tokens": "ab"}, "suppress_tokens is 'ab'"),
        ({"logits_processor": 5}, "logits_processor is 5: .*list"),
        ({"logits_processor": [5]}, "logits_processor is 5: .*function"),
    ],
    ids=str,
)
def test_bad_options_are_refused(model: GPT2, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate([1], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": range(V)}, "every token .* 1 token:"),
        ({"logits_processor": lambda ids, row: row[:3]}, "logits_processor returned .*logits"),
        ({"logits_processor": lambda ids, row: "x"}, "logits_processor returned 'x'"),
        ({"logits_processor": lambda ids, row: row * math.nan}, "logit is nan"),
    ],
    ids=["all", "short", "text", "nan"],
)
def test_a_row_without_tokens_ends_only_its_job(model: GPT2, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(model.generate([1], **options))
    with pytest.raises(NumericalError):
        Control(SHAPE, presence_penalty=1).process(np.full(V, math.nan, np.float32), [1], 0)


# ------------------------------------------------------------------------------------------------ stop text

TOKENIZER = Tokenizer()
PIECES = st.lists(st.sampled_from(["a", "\n", "\n\n", "é", "中", "ab", "b"]), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(PIECES, st.lists(st.sampled_from(["\n\n", "ab", "aab", "中b", "é", "b\n"]), max_size=3), PIECES, st.booleans())
def test_text_ends_before_the_first_stop(text: str, stops: list[str], before: str, eot: bool) -> None:
    ids = [*TOKENIZER.encode(text), *([50256] if eot else [])]
    decoder = StreamDecoder(TOKENIZER, stop_strings=stops, stop_token_ids=[50256])
    decoder.begin(TOKENIZER.encode(before))
    pieces = []
    for token in ids:
        pieces.append(decoder.push(token))
        if decoder.stopped:
            break
    stopped = decoder.stopped
    found = "".join(pieces) + decoder.finish()
    whole = before + text
    ends = [at for stop in stops for at in range(len(whole)) if whole.startswith(stop, at) and at + len(stop) > len(before)]
    assert found == whole[len(before) : max(min(ends, default=len(whole)), len(before))]
    assert stopped == (bool(ends) or eot)
    assert decoder.push(64) + decoder.finish() == "a"  # a new text


# ------------------------------------------------------------------------------------------------ asynchronous


def test_the_event_loop_never_waits(model: GPT2) -> None:
    wanted = list(model.generate([1] * 60, max_new_tokens=40, seed=3))
    slow = threading.Event()

    def processor(ids: list[int], row: Row) -> None:
        time.sleep(0.02)  # a slow step: the loop must go on meanwhile
        slow.set()

    async def main() -> tuple[list[int], list[int], int, float]:
        ticks, longest, running = 0, 0.0, True

        async def tick() -> None:
            nonlocal ticks, longest
            while running:
                before = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - before)
                ticks += 1

        async def tokens(**options: Any) -> list[int]:
            return [token async for token in model.agenerate([1] * 60, max_new_tokens=40, seed=3, **options)]

        ticking = asyncio.ensure_future(tick())
        first, second = await asyncio.gather(tokens(logits_processor=processor), tokens())
        running = False
        await ticking
        return first, second, ticks, longest

    first, second, ticks, _ = asyncio.run(main())
    assert first == second == wanted
    assert slow.is_set()
    assert ticks > 400  # forty slow steps take 0.8 s


@pytest.mark.parametrize("how", ["cancel", "close", "break", "timeout"])
def test_the_end_of_a_task_frees_the_sequence(model: GPT2, how: str) -> None:
    cache = model.new_prefix_cache()
    steps = 0

    def processor(ids: list[int], row: Row) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.01)

    async def run() -> None:
        async with aclosing(model.agenerate([1, 2, 3], max_new_tokens=100, cache=cache, logits_processor=processor)) as tokens:
            async for _ in tokens:
                if how == "break" and steps >= 3:
                    break
                if how == "close" and steps >= 3:
                    await tokens.aclose()

    async def main() -> None:
        task = asyncio.ensure_future(run())
        if how == "cancel":
            while steps < 3:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.2)
        else:
            await task

    asyncio.run(main())
    done = steps
    assert cache.tokens[:3] == [1, 2, 3]  # the sequence was given back
    time.sleep(0.05)
    assert steps == done < 100
    assert list(model.generate([1, 2], max_new_tokens=3)) == list(model.generate([1, 2], max_new_tokens=3, cache=cache))


def test_bad_arguments_are_refused_at_once(model: GPT2) -> None:
    calls: list[Callable[[], object]] = [
        lambda: model.agenerate([]),
        lambda: model.agenerate([1], temprature=1),  # type: ignore[call-arg]
        lambda: model.agenerate([1], cache=5),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(InputError):
            call()

    async def main() -> None:
        with pytest.raises(InputError, match="every token"):
            _ = [token async for token in model.agenerate([1], suppress_tokens=range(V))]

    asyncio.run(main())
