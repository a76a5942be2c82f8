"""The completions API: every field, streamed and whole, the same bytes alone and in company, and errors in one line."""

import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jobs import in_threads
from serving import MAXT, Live, bare, joined, live, tiny

from pygpt import GPT2, Request, Tokenizer
from pygpt.formats.open import vocabulary_beside
from pygpt.formats.vocabulary import characters_of, write_vocabulary
from pygpt.generation.completion import Completion
from pygpt.server.answering import Choice, token_text
from pygpt.server.call import Call, Served

HELLO = [15496]
FACE = "\N{GRINNING FACE}"  # four bytes in three tokens


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tiny(tmp_path_factory.mktemp("serve")), queue=100) as running:
        yield running


# ------------------------------------------------------------------------------------------------ answers


def test_the_shape_of_an_answer(at: Live) -> None:
    answer = at.complete("Hello world", max_tokens=3, temperature=0)
    wanted = list(at.model.generate([15496, 995], max_new_tokens=3, sampler="greedy"))
    assert answer["id"].startswith("cmpl-")
    assert abs(answer["created"] - time.time()) < 100
    assert bare(answer) == {
        "object": "text_completion",
        "model": "tiny",
        "system_fingerprint": None,
        "choices": [{"index": 0, "text": Tokenizer().decode(wanted), "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    }


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("Hello", [HELLO]),
        (["Hello", "Hello world"], [HELLO, [15496, 995]]),
        (HELLO, [HELLO]),
        ([HELLO, [1, 2, 3]], [HELLO, [1, 2, 3]]),
        (f"a{FACE}b", [[64, 47249, 222, 65]]),
        ("<|endoftext|>", [Tokenizer().encode("<|endoftext|>")]),
    ],
    ids=str,
)
def test_prompts(at: Live, prompt: Any, ids: list[list[int]]) -> None:
    """Each form of a prompt, with n choices of one seed: the streams of the seed, in order of prompts and choices."""
    answer = at.complete(prompt, max_tokens=4, seed=9, n=2, return_token_ids=True, ignore_eos=True)
    wanted = at.model.generate_batch(ids, max_new_tokens=4, num_return_sequences=2, temperature=1.0, seed=9)
    assert [choice["token_ids"] for choice in answer["choices"]] == [completion.tokens for completion in wanted]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [own for own in ids for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(ids)))
    assert answer["usage"] == {
        "prompt_tokens": sum(map(len, ids)),
        "completion_tokens": 8 * len(ids),
        "total_tokens": sum(map(len, ids)) + 8 * len(ids),
    }


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {"temperature": 1.0}),
        ({"temperature": 0}, {"sampler": "greedy"}),
        ({"temperature": 0, "top_p": 0.3, "top_k": 7}, {"sampler": "greedy"}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"top_k": 4, "min_p": 0.1}, {"top_k": 4, "min_p": 0.1}),
        ({"top_k": -1}, {"temperature": 1.0}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"temperature": 0, "repetition_penalty": 1.5}, {"sampler": "greedy", "repetition_penalty": 1.5}),
        (
            {"frequency_penalty": 0.5, "presence_penalty": -1},
            {"frequency_penalty": 0.5, "presence_penalty": -1, "temperature": 1},
        ),
        ({"temperature": 0, "logit_bias": {"11": 100}}, {"sampler": "greedy", "logit_bias": {11: 100}}),
        ({"sampler": "median"}, {"sampler": "median"}),
        ({"sampler": "median", "temperature": 1, "top_p": 1.0, "frequency_penalty": 0}, {"sampler": "median"}),
        ({"user": "u", "n": 1, "best_of": 1, "logit_bias": {}, "stop": [], "suffix": None}, {"temperature": 1.0}),
    ],
    ids=str,
)
def test_sampling(at: Live, fields: dict[str, Any], options: dict[str, Any]) -> None:
    seed: dict[str, Any] = {} if "sampler" in options else {"seed": 5}
    answer = at.complete(HELLO, max_tokens=6, seed=5, return_token_ids=True, ignore_eos=True, **fields)
    assert answer["choices"][0]["token_ids"] == list(at.model.generate(HELLO, max_new_tokens=6, **seed, **options))


def test_seeds(at: Live) -> None:
    """The same seed gives the same text; -1 is 2^64 - 1; without a seed, texts differ."""
    texts = [at.complete(seed=seed, max_tokens=20)["choices"][0]["text"] for seed in (1, 1, 2, -1, 2**64 - 1, None, None)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4]
    assert texts[5] != texts[6]


@pytest.mark.parametrize("logprobs", [0, 1, 5, 20])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(at: Live, logprobs: int, stream: bool) -> None:
    """The log-probabilities of a prompt and its continuation are those of the network's logits at each position."""
    prompt = Tokenizer().encode(f"One {FACE} two")
    fields = {"max_tokens": 3, "echo": True, "logprobs": logprobs, "seed": 1, "n": 2}
    choices = joined(at.stream(prompt, **fields)) if stream else at.complete(prompt, **fields)["choices"]
    for choice in choices:
        found = choice["logprobs"]
        tokens = found["token_ids"]
        assert tokens[: len(prompt)] == prompt
        assert len(tokens) == len(prompt) + 3
        assert b"".join(map(bytes, found["bytes"])).decode("utf-8", "replace") == choice["text"]
        logits = at.model.logits(tokens).astype(np.float64)
        wanted = (
            logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
        )
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is found["top"][0] is None
        for place, token in enumerate(tokens[1:]):
            row = wanted[place]
            value = found["token_logprobs"][place + 1]
            assert abs(value - row[token]) < 1e-6  # logits are float32; the sum of the exponentials is float64
            top = found["top"][place + 1]
            assert [other for other, _, _ in top] == np.lexsort((np.arange(50257), -row))[:logprobs].tolist()
            named = found["top_logprobs"][place + 1]
            assert named[found["tokens"][place + 1]] == value
            assert len(named) == logprobs + (token not in [other for other, _, _ in top])
            assert all(named[text] == logprob for _, text, logprob in top)


def test_only_the_prompt_is_scored(at: Live) -> None:
    """max_tokens 0 with echo: the values are those of a longer request, also for a prompt as long as the context."""
    prompt = [(7 * i) % 50257 for i in range(MAXT)]
    none = at.complete(prompt, max_tokens=0, echo=True, logprobs=2)
    assert none["usage"]["completion_tokens"] == 0
    one = at.complete(prompt[:-1], max_tokens=1, echo=True, logprobs=2)
    for name in ("token_ids", "token_logprobs", "top"):
        assert none["choices"][0]["logprobs"][name][: MAXT - 1] == one["choices"][0]["logprobs"][name][: MAXT - 1]
    assert at.complete("Hello", max_tokens=0, echo=True)["choices"][0]["text"] == "Hello"
    assert at.complete(HELLO, max_tokens=0, echo=True, logprobs=0, n=3)["choices"][2]["logprobs"]["token_logprobs"] == [None]


@settings(deadline=None, max_examples=40)
@given(
    prompt=st.text(max_size=20).filter(lambda text: 0 < len(Tokenizer().encode(text)) < 60),
    fields=st.fixed_dictionaries(
        {"max_tokens": st.integers(1, 30)},
        optional={
            "n": st.integers(1, 3),
            "echo": st.booleans(),
            "logprobs": st.integers(0, 3),
            "temperature": st.sampled_from([0, 0.5, 5.0]),
            "stop": st.lists(st.sampled_from(["e", "an", "\ufffd", " t", "in", "o"]), max_size=3),
            "return_token_ids": st.booleans(),
        },
    ),
)
@example(prompt="One two", fields={"max_tokens": 5, "echo": True, "return_token_ids": True})
def test_a_stream_is_the_whole_answer(at: Live, prompt: str, fields: dict[str, Any]) -> None:
    whole = at.complete(prompt, seed=3, **fields)
    events = at.stream(prompt, seed=3, stream_options={"include_usage": True}, **fields)
    last = events.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(event["usage"] is None for event in events)
    assert joined(events) == whole["choices"]
    for choice in whole["choices"]:
        for found in [choice["logprobs"]] if choice["logprobs"] else []:
            assert all(0 <= offset <= len(choice["text"]) for offset in found["text_offset"])
            assert found["text_offset"] == sorted(found["text_offset"])
        new = choice["text"][len(prompt) if fields.get("echo") else 0 :]
        stops = {*fields.get("stop", [])} - {"\ufffd"}  # half a character shows as this one, but has other bytes
        assert not any(stop in new for stop in stops)


def test_stream_options(at: Live) -> None:
    plain = at.stream(max_tokens=3)
    assert all("usage" not in event for event in plain)
    each = at.stream(
        max_tokens=3, seed=1, temperature=0.1, stream_options={"include_usage": True, "continuous_usage_stats": True}
    )
    assert [event["usage"]["completion_tokens"] for event in each][-1] == 3
    assert all(event["usage"]["prompt_tokens"] == 1 for event in each)
    assert len({event["id"] for event in each}) == 1


def test_offsets_are_positions_in_the_text(at: Live) -> None:
    prompt = f"a {FACE} \u00e9 b"
    choice = at.complete(prompt, max_tokens=1, echo=True, logprobs=0)["choices"][0]
    starts, text = choice["logprobs"]["text_offset"], choice["text"]
    ends = [*starts[1:], len(text)]
    pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    assert "".join(pieces) == text
    assert (pieces[0], pieces[-3:-1]) == ("a", [" \u00e9", " b"])


# ------------------------------------------------------------------------------------------------ text


class Told:
    """A served model, as far as Choice uses one."""

    eot = 50256
    tokenizer = Tokenizer()

    def bytes_of(self, tokens: Any) -> bytes:
        return self.tokenizer.decode_bytes(tokens)


@settings(deadline=None, max_examples=400)
@given(
    text=st.text(st.sampled_from("ab\u00e9\u20ac" + FACE), min_size=1, max_size=12),
    stops=st.lists(st.text(st.sampled_from("ab\u00e9" + FACE), min_size=1, max_size=4), max_size=3),
    whole=st.booleans(),
)
def test_text_without_stop_strings(text: str, stops: list[str], whole: bool) -> None:
    """Token by token, of one byte each or as the tokenizer has them: pieces join to the text before the first stop string."""
    tokenizer = Tokenizer()
    if whole:
        ids = tokenizer.encode(text)
    else:
        by_byte = {tokenizer.decode_bytes([token]): token for token in range(256)}
        ids = [by_byte[bytes([byte])] for byte in text.encode()]
    call = Call.__new__(Call)
    call.served, call.echo, call.stop, call.stop_ids = Told(), False, stops, set()  # type: ignore[assignment]
    choice, found, so_far = Choice(call, [], 0), "", b""
    for place, token in enumerate(ids):
        so_far = tokenizer.decode_bytes(ids[: place + 1])
        reason = "stop" if any(s.encode() in so_far for s in stops) else "length" if place == len(ids) - 1 else None
        piece = choice.push(token, None, reason, None)
        found += piece.text if piece else ""
        assert not any(stop in found for stop in stops)
        assert reason or "\ufffd" not in found
        if reason:
            break
    seen = so_far.decode("utf-8", "replace")
    assert found == seen[: min((at for stop in stops if (at := seen.find(stop)) >= 0), default=len(seen))]


def test_stop_strings_and_tokens(at: Live) -> None:
    """A stop ends the work at once. The stop string is not in the text, and a stop in the prompt does not count."""
    free = at.complete(seed=2, max_tokens=30, return_token_ids=True)["choices"][0]
    ids, text = free["token_ids"], free["text"]
    stop = text[len(text) // 2 :][:3]
    found = at.complete(seed=2, max_tokens=30, stop=stop, return_token_ids=True)
    assert found["choices"][0]["text"] == text[: text.index(stop)]
    assert found["choices"][0]["finish_reason"] == "stop"
    used = found["usage"]["completion_tokens"]
    assert found["choices"][0]["token_ids"] == ids[:used]
    assert stop in Tokenizer().decode(ids[:used])
    assert stop not in Tokenizer().decode(ids[: used - 1])
    assert at.complete("Hello", seed=2, max_tokens=30, stop="Hell")["choices"][0]["text"] == text
    cut = at.complete(seed=2, max_tokens=30, stop_token_ids=[ids[4]], return_token_ids=True)["choices"][0]
    place = ids.index(ids[4])
    assert (cut["token_ids"], cut["text"]) == (ids[: place + 1], Tokenizer().decode(ids[:place]))


def test_end_of_text_ends_an_answer(at: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """<|endoftext|> is not part of the text; with ignore_eos the answer goes on."""
    monkeypatch.setattr(Completion, "take", planted([15496, 50256, 11, 11]))
    answer = at.complete(max_tokens=4, return_token_ids=True)["choices"][0]
    assert (answer["text"], answer["finish_reason"], answer["token_ids"]) == ("Hello", "stop", [15496, 50256])
    assert at.complete(max_tokens=4, ignore_eos=True)["choices"][0]["text"] == "Hello<|endoftext|>,,"


def planted(tokens: list[int]) -> Any:
    """A Completion.take() that chooses these tokens."""
    take = Completion.take

    def planting(self: Completion, logits: Any, row: int) -> int:
        from pygpt.generation import sampling

        wanted = tokens[len(self.tokens)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling.Sampler, "choose", lambda *_: wanted)
            return take(self, logits, row)

    return planting


# ------------------------------------------------------------------------------------------------ sameness


@pytest.mark.parametrize(("live_sequences", "requests"), [(1, 3), (2, 2), (2, 4), (4, 2), (4, 6), (8, 24)])
def test_together_is_as_alone(tmp_path_factory: pytest.TempPathFactory, live_sequences: int, requests: int) -> None:
    """The same bytes alone, among others, from a warm cache, and with one thread or two."""
    path = tiny(tmp_path_factory.mktemp("same"))
    asked = [
        {"prompt": ["Hello", "Hello world", [1, 2, 3, 4], "Hello there"][i % 4], "seed": i % 3, "max_tokens": 5 + i % 9}
        | [{}, {"logprobs": 3}, {"n": 2}, {"echo": True, "logprobs": 1}, {"temperature": 0}][i % 5]
        for i in range(requests)
    ]
    with live(path, threads=1, cache_bytes=1 << 20, max_live=1) as alone:
        wanted = [bare(alone.complete(**fields)) for fields in asked]
    with live(path, max_live=live_sequences, fingerprint=True) as together:
        for _ in range(2):  # the second time the cache is warm
            with ThreadPoolExecutor(requests) as pool:
                found = list(pool.map(lambda fields: bare(together.complete(**fields)), asked))
            for answer in found:
                assert answer.pop("system_fingerprint").startswith("pygpt-")
            assert [{**answer, "system_fingerprint": None} for answer in found] == wanted
        assert together.metrics()["prefix_cache_hits_total"] > 0


# ------------------------------------------------------------------------------------------------ errors


def refusals(name: str, *values: Any) -> list[tuple[dict[str, Any], str | None]]:
    return [({"prompt": "a", name: value}, name) for value in values]


BAD: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    *refusals("prompt", "", [], [""], [[]], {}, 5, True, ["a", [1]], [1, "a"], [1.5], [True], [-1]),
    ({"prompt": [50257]}, "prompt"),
    ({"prompt": [[3], [1 << 40]]}, "prompt"),
    ({"prompt": [1] * MAXT}, "prompt"),
    ({"prompt": "word " * 5000}, "prompt"),
    ({"prompt": "a", "max_tokens": MAXT}, "max_tokens"),
    *refusals("max_tokens", 0, -1, 1.5, "3", True, 10**400),
    *refusals("speculation", 0, -1, 65, 1.5, "auto", []),
    *refusals("logprobs", -1, 21, True, "1"),
    *refusals("temperature", -0.1, 1001, "1", [], True),
    *refusals("n", 0, -1, 1.5, 1 << 16, 1 << 20),
    *refusals("stop", "", [""], 5, ["a"] * 65, "\ud800"),
    *refusals("logit_bias", {"a": 1}, {"1": 101}, []),
    ({"prompt": "a", "seed": 1 << 64}, "seed"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "top_p": 1.1}, "top_p"),
    ({"prompt": "a", "sampler": "mirostat"}, "sampler"),
    ({"prompt": "a", "sampler": "greedy", "temperature": 0.5}, "temperature"),
    ({"prompt": "a", "stop_token_ids": [50257]}, "stop_token_ids"),
    ({"prompt": "a", "logit_bias": {"50257": 1}}, "logit_bias"),
    ({"prompt": "a", "stream": True, "stream_options": {"foo": 1}}, "stream_options"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"prompt": "a", "colour": "red"}, "colour"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: repr(value)[:40])
def test_bad_fields(at: Live, fields: Any, param: str | None) -> None:
    error = at.refused(400, fields)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert len(error["message"]) < 600


def test_too_long_a_prompt_has_openai_s_code(at: Live) -> None:
    for fields in ({"prompt": [1] * (MAXT + 1)}, {"prompt": [1] * 90, "max_tokens": 50}, {"prompt": "word " * 5000}):
        assert at.refused(400, fields)["code"] == "context_length_exceeded"
    assert at.complete([1] * 90)["usage"]["completion_tokens"] == 6  # the default of 16 takes what there is


def test_whole_numbers_may_have_a_point(at: Live) -> None:
    found = at.complete([1.0, 2], max_tokens=3.0, return_token_ids=True)
    assert (found["choices"][0]["prompt_token_ids"], found["usage"]["completion_tokens"]) == ([1, 2], 3)


def test_null_and_defaults(at: Live) -> None:
    """Clients send null for what they do not set, and unknown fields that are null."""
    names = ("model", "max_tokens", "temperature", "n", "seed", "stop", "stream", "logprobs", "best_of", "suffix", "unknown")
    assert at.complete("a", **dict.fromkeys(names))["usage"]["completion_tokens"] <= 16


def test_a_failing_step_is_an_error_of_its_requests(at: Live, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The client gets one line without details, the operator the reason, and the server goes on."""
    wanted = bare(at.complete(seed=1, max_tokens=5))

    def fail(self: Completion, logits: Any, row: int) -> int:
        if len(self.tokens) == 2:
            raise MemoryError("planted\nsecret")
        return take(self, logits, row)

    take = Completion.take
    monkeypatch.setattr(Completion, "take", fail)
    error = at.refused(500, {"prompt": "Hello", "seed": 1})
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "secret" not in error["message"]
    answer = at.ask("POST", "/v1/completions", {"prompt": "Hello", "stream": True, "seed": 1})
    last = answer.events()[-1] if answer.status == 200 else answer.json()  # before the stream has begun, it is a whole answer
    assert last["error"]["code"] == "internal_error"
    assert b"[DONE]" not in answer.body
    monkeypatch.undo()
    monkeypatch.setattr(type(at.model.network), "step", lambda *_: 1 / 0)
    for stream in (False, True):
        assert at.refused(500, {"prompt": "Hello", "stream": stream})["code"] == "internal_error"
    monkeypatch.undo()
    assert bare(at.complete(seed=1, max_tokens=5)) == wanted
    assert "planted secret" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the engine's part


def test_scores_beside_the_same_prompt_without_scores(at: Live) -> None:
    """A plain request computes the same prompt at the same time: the scored one still has all its values."""
    prompt = [(11 * i) % 50257 for i in range(80)]
    wanted = at.complete(prompt, max_tokens=2, echo=True, logprobs=1, seed=1, n=3)["choices"]
    engine = at.model.engine()
    plain = engine.add(Request(at.model.config, prompt, max_new_tokens=2, seed=1), n=2)
    scored = engine.add(Request(at.model.config, prompt, max_new_tokens=2, seed=1, top_logprobs=1, prompt_logprobs=True), n=3)
    list(engine.run())
    found = [info.logprob for info in scored.completions[0].prompt_infos]
    assert found == wanted[0]["logprobs"]["token_logprobs"][1:80]
    assert [c.tokens for c in plain.completions] == [c.tokens for c in scored.completions[:2]]
    assert math.isfinite(sum(found))


def test_deadlines(at: Live) -> None:
    engine = at.model.engine()
    late = engine.add(Request(at.model.config, HELLO, max_new_tokens=9), deadline=time.monotonic() - 1)
    good = engine.add(Request(at.model.config, HELLO, max_new_tokens=9), deadline=time.monotonic() + 60)
    events = list(engine.run())
    assert isinstance(late.error, TimeoutError)
    assert [event.error for event in events if event.job is late] == [late.error]
    assert len(good.completions[0].tokens) == 9


def test_several_threads_may_add_while_the_server_works(at: Live) -> None:
    """Two hundred requests of twenty clients: each answer is right."""
    wanted = {seed: at.complete(seed=seed, max_tokens=8)["choices"] for seed in range(5)}
    wrong: list[int] = []

    def client(number: int) -> None:
        for i in range(10):
            seed = (number + i) % 5
            if at.complete(seed=seed, max_tokens=8)["choices"] != wanted[seed]:
                wrong.append(seed)

    in_threads(client, range(20))
    assert wrong == []
    while at.server.models[0].admitted:  # the test's time limit ends this
        time.sleep(0.01)


def test_a_model_with_another_vocabulary_takes_ids(tmp_path_factory: pytest.TempPathFactory) -> None:
    with live(tiny(tmp_path_factory.mktemp("ids"), V=97)) as running:
        answer = running.complete([5, 6], max_tokens=4, sampler="median", return_token_ids=True, logprobs=1)
        choice = answer["choices"][0]
        assert choice["token_ids"] == list(running.model.generate([5, 6], max_new_tokens=4))
        assert choice["text"] == ""
        assert [top[0][0] for top in choice["logprobs"]["top"]]
        assert running.refused(400, {"prompt": "text"})["param"] == "prompt"
        assert running.refused(400, {"prompt": [5], "stop": "a"})["param"] == "stop"
        for route, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            assert "--tokenizer" in running.refused(400, fields, route)["message"]
        assert running.ask("GET", "/tokenizer_info").json()["eos_token"] is None


@pytest.mark.parametrize("ending", [False, True])
def test_a_model_with_its_own_tokenizer(tmp_path: Path, ending: bool) -> None:
    """The tokenizer beside the model reads prompts and stop strings. An id beyond it has a placeholder as its text."""
    vocabulary = characters_of([f"Once upon a time {FACE}\n"])
    if ending:
        vocabulary["added_tokens"].append({"id": len(vocabulary["model"]["vocab"]), "content": "</s>", "special": True})
    known = Tokenizer(vocabulary).known
    own = Tokenizer(vocabulary, V=known + 40)
    path = tiny(tmp_path, V=own.V)
    write_vocabulary(vocabulary_beside(str(path)), vocabulary)
    with live(path) as running:
        fields: dict[str, Any] = {"max_tokens": 30, "seed": 3, "return_token_ids": True, "ignore_eos": True, "echo": True}
        free = running.complete(f"a {FACE}", logprobs=2, **fields)["choices"][0]
        assert free["prompt_token_ids"] == own.encode(f"a {FACE}")
        wanted = list(running.model.generate(own.encode(f"a {FACE}"), max_new_tokens=30, temperature=1.0, seed=3))
        assert max(wanted) >= known
        assert (free["token_ids"], free["text"]) == (wanted, own.decode(own.encode(f"a {FACE}") + wanted))
        assert free["logprobs"]["tokens"][-30:] == [token_text(own.decode_bytes([token])) for token in wanted]
        assert joined(running.stream(f"a {FACE}", logprobs=2, **fields)) == [free]
        place = next(i for i, token in enumerate(wanted) if token >= known)
        stop = f"<|{wanted[place]}|>"
        cut = running.complete(f"a {FACE}", stop=[stop], **fields)["choices"][0]
        assert (cut["finish_reason"], cut["token_ids"]) == ("stop", wanted[: place + 1])
        assert cut["text"] == free["text"][: free["text"].index(stop)]
        found = running.ask("POST", "/tokenize", {"prompt": "a time", "return_token_strs": True}).json()
        assert (found["tokens"], found["token_strs"]) == (own.encode("a time"), list("a time"))
        assert running.ask("POST", "/detokenize", {"tokens": [0, known]}).json()["prompt"] == own.decode([0, known])
        for route in ("/v1/completions", "/tokenize"):
            error = running.refused(400, {"prompt": "Zoo"}, route)
            assert (error["param"], "'Z'" in error["message"]) == ("prompt", True)
        assert running.ask("GET", "/tokenizer_info").json()["eos_token"] == ("</s>" if ending else None)


def test_two_models_by_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("two")
    with live(tiny(folder, "one"), tiny(folder, "two", seed=5, maxT=40)) as running:
        for number, name in enumerate(("one", "two")):
            model: GPT2 = running.server.models[number].model
            found = running.complete(HELLO, model=name, max_tokens=5, temperature=0, return_token_ids=True)
            assert found["model"] == name
            assert found["choices"][0]["token_ids"] == list(model.generate(HELLO, max_new_tokens=5, sampler="greedy"))
        with ThreadPoolExecutor(8) as pool:
            names = [("one", "two")[i % 2] for i in range(16)]
            both = list(pool.map(lambda name: running.complete(model=name, seed=1)["choices"][0]["text"], names))
        assert len(set(both[::2])) == len(set(both[1::2])) == 1
        error = running.refused(404, {"prompt": "a", "model": "three"})
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "one, two" in error["message"]
        assert [m["id"] for m in running.ask("GET", "/v1/models").json()["data"]] == ["one", "two"]
        assert running.ask("GET", "/v1/models/two").json()["max_model_len"] == 40
        assert running.ask("GET", "/v1/models/no").status == 404
        assert json.loads(running.ask("GET", "/v1/models").body)["object"] == "list"


def test_the_names_of_tokens(at: Live) -> None:
    assert isinstance(at.server.models[0], Served)
    choice = at.complete(Tokenizer().encode(f"{FACE}"), max_tokens=1, echo=True, logprobs=0)["choices"][0]
    assert choice["logprobs"]["tokens"][:2] == ["bytes:\\xf0\\x9f\\x98", "bytes:\\x80"]
