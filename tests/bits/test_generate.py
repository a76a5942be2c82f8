"""Test whole completions: they have the same tokens for every number of threads, batch, cache and network.

Stops, overflow, log-probabilities, streamers, and errors before anything runs are tested, too. Each expected token comes from
the logits of a fresh, whole sequence."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_checkpoint import make
from test_sampling import assert_fits

from pygpt import GPT2, ClosedError, InputError, KVCache, PrefixCache, SerialGPT2, Tokenizer
from pygpt.generation.control import Control
from pygpt.generation.request import Request
from pygpt.generation.sampling import Sampler
from pygpt.network import Network

MAXT = 24
SHAPE: dict[str, Any] = {"L": 2, "NH": 2, "C": 16, "V": 97, "maxT": MAXT, "seed": 3, "peak": 6.0}
PROMPTS = [[5], [1, 2, 3], [96, 0, 5, 5, 7, 60, 61], [1, 2, 3], list(range(20)), [1, 2, 4]]
WAYS: list[dict[str, Any]] = [
    {},
    {"sampler": "greedy"},
    {"seed": 7},
    {"seed": 2**64 - 1, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("generate") / "small.bin"
    make(file, **SHAPE)
    return str(file)


@pytest.fixture(scope="module")
def model(path: str) -> Iterator[GPT2]:
    with GPT2.load(path, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GPT2]:
    """Open a model with GPT-2's vocabulary."""
    file = tmp_path_factory.mktemp("generate") / "speller.bin"
    make(file, L=1, NH=1, C=8, V=50257, maxT=64, seed=2)
    with GPT2.load(file, threads=1) as opened:
        yield opened


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of rows of each step of any model."""
    counts: list[int] = []
    step = Network.step

    def counting(self: Network, rows: Any, *more: Any) -> Any:
        counts.append(len(rows))
        return step(self, rows, *more)

    monkeypatch.setattr(Network, "step", counting)
    return counts


def by_hand(model: GPT2, prompt: Sequence[int], new: int, *, slide_to: int = MAXT // 2, **options: Any) -> list[int]:
    """Complete with one whole sequence after another, without a cache; the window slides as documented."""
    control = Control(model.config, repetition_penalty=options.pop("repetition_penalty", None))
    sampler = Sampler(options.pop("sampler", None), **options)
    sequence, start = list(prompt), 0
    for step in range(new):
        if len(sequence) - start > model.config.maxT:
            start = len(sequence) - slide_to
        logits = model.logits(sequence[start:])
        row = control.process(logits[-1], sequence, len(prompt))[None].data
        sequence.append(sampler.choose(row, 0, sampler.seed, 0, step))
    return sequence[len(prompt) :]


# ---------------------------------------------------------------------------------------------------------------------
# The same tokens, whatever the threads, batch and cache


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_threads_batches_caches_and_the_reference(model: GPT2, path: str, options: dict[str, Any]) -> None:
    wanted = [by_hand(model, prompt, 4, **options) for prompt in PROMPTS]
    assert [list(model.generate(prompt, max_new_tokens=4, **options)) for prompt in PROMPTS] == wanted
    for threads in (1, 3):
        with GPT2.load(path, threads=threads) as other:
            assert [c.tokens for c in other.generate_batch(PROMPTS, max_new_tokens=4, **options)] == wanted
    cache = model.new_prefix_cache()
    assert [list(model.generate(prompt, max_new_tokens=4, cache=cache, **options)) for prompt in PROMPTS] == wanted
    with SerialGPT2.load(path) as serial:
        assert [list(serial.generate(prompt, max_new_tokens=4, **options)) for prompt in PROMPTS] == wanted
        assert [c.tokens for c in serial.generate_batch(PROMPTS, max_new_tokens=4, **options)] == wanted


def test_do_sample(model: GPT2) -> None:
    greedy = list(model.generate([1, 2], sampler="greedy"))
    assert list(model.generate([1, 2], do_sample=False)) == greedy
    assert list(model.generate([1, 2], do_sample=True, top_k=1)) == greedy
    assert list(model.generate([1, 2], do_sample=True, seed=3)) == list(model.generate([1, 2], sampler="sample", seed=3))


def test_unseeded_completions_differ_and_can_be_repeated(model: GPT2) -> None:
    completions = model.generate_batch([[1, 2]] * 3, do_sample=True, max_new_tokens=20)
    assert len({c.seed for c in completions}) == 3
    assert len({tuple(c.tokens) for c in completions}) == 3
    for c in completions:
        assert list(model.generate([1, 2], seed=c.seed, max_new_tokens=20)) == c.tokens
    assert len({tuple(model.generate([1, 2], do_sample=True, max_new_tokens=20)) for _ in range(3)}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_a_batch_is_one_step_a_round(model: GPT2, rows_run: list[int]) -> None:
    """Equal prompts are run once. Then each sequence has one row a step, until it ends."""
    completions = model.generate_batch([[1, 2, 3], [9], [1, 2, 3]], max_new_tokens=5, num_return_sequences=2, seed=1)
    assert rows_run == [3 + 1, 6, 6, 6, 6]
    assert [c.prompt for c in completions] == [[1, 2, 3]] * 2 + [[9]] * 2 + [[1, 2, 3]] * 2
    rows_run.clear()
    lengths = [len(c.tokens) for c in model.generate_batch([[1], [2, 3], [4, 5, 6]], total=6, sampler="greedy")]
    assert (lengths, rows_run) == ([5, 4, 3], [6, 3, 3, 2, 1])


def test_more_sequences_than_are_decoded_together(model: GPT2, rows_run: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [list(model.generate(prompt, total=22, seed=4)) for prompt in PROMPTS]
    rows_run.clear()
    engine = model.engine(max_live=2)
    jobs = [engine.add(Request(model.config, prompt, total=22, seed=4)) for prompt in PROMPTS]
    assert all(event.error is None for event in engine.run())
    assert [job.completions[0].tokens for job in jobs] == wanted
    assert all(job.done for job in jobs)


def test_long_prompts_are_run_in_chunks(model: GPT2, rows_run: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [list(model.generate(prompt, max_new_tokens=3)) for prompt in PROMPTS]
    rows_run.clear()
    monkeypatch.setattr(Network, "chunk", 4)
    assert [c.tokens for c in model.generate_batch(PROMPTS, max_new_tokens=3)] == wanted
    assert max(rows_run) <= 4 + len(PROMPTS)  # rows of prompts, and one row for each sequence that decodes


def test_return_sequences_are_streams_of_a_seed(model: GPT2) -> None:
    """The first stream is the stream of generate(). The others are further draws, as random as with other seeds."""
    logits = model.logits([1, 2])[-1].astype(np.float64)
    completions = model.generate_batch([[1, 2]], num_return_sequences=3000, max_new_tokens=1, seed=11)
    assert completions[0].tokens == list(model.generate([1, 2], max_new_tokens=1, seed=11))
    counts = np.bincount([c.tokens[0] for c in completions], minlength=97)
    assert_fits(counts, oracle.softmax(logits))
    many, few = (model.generate_batch([[1, 2], [5]], num_return_sequences=n, seed=11) for n in (4, 2))
    assert [c.tokens for c in few] == [many[i].tokens for i in (0, 1, 4, 5)]
    assert len({tuple(c.tokens) for c in many}) == 8


def test_seeds_of_a_batch(model: GPT2) -> None:
    alone = [list(model.generate(prompt, total=22, seed=seed)) for prompt, seed in zip(PROMPTS, range(6), strict=True)]
    assert [c.tokens for c in model.generate_batch(PROMPTS, total=22, seed=list(range(6)))] == alone
    assert alone[1] != alone[3]  # the same prompt, another seed
    same = model.generate_batch(PROMPTS, total=22, seed=1)
    assert same[1].tokens == same[3].tokens == alone[1]
    assert model.generate_batch([], seed=1) == []


def test_numpy_prompts(model: GPT2) -> None:
    prompts = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    assert [c.tokens for c in model.generate_batch(prompts)] == [list(model.generate(p)) for p in prompts.tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"num_return_sequences": 1.0}, "num_return_sequences is 1.0"),
        ({"seed": [1, 2]}, "2 seeds for 6 prompts"),
        ({"seed": [1, 2, 3, 4, 5, -6]}, "seed is -6"),
        ({"seed": -1}, "seed is -1"),
        ({"top_logprobs": -1}, "top_logprobs is -1.* 0 to 97"),
        ({"top_logprobs": 98}, "top_logprobs is 98"),
        ({"top_logprobs": True}, "top_logprobs is True"),
        ({"total": 20}, "the prompt has 20 tokens"),
        ({"temperature": -1}, "temperature is -1"),
    ],
    ids=str,
)
def test_bad_batches(model: GPT2, rows_run: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate_batch(PROMPTS, **{"total": 22, **options})
    with pytest.raises(InputError, match="token '97'"):
        model.generate_batch([[1], [97]])
    with pytest.raises(InputError, match=r"tokens.*1.*list"):
        model.generate_batch([1, 2])  # type: ignore[list-item]
    assert rows_run == []


# ---------------------------------------------------------------------------------------------------------------------
# Prefix caches


def test_only_new_tokens_are_run(model: GPT2, rows_run: list[int]) -> None:
    cache = model.new_prefix_cache()
    for prompt, new, rows in (
        ([1, 2, 3, 4], 3, 4 + 2),
        ([1, 2, 3, 4], 3, 1 + 2),  # the last token runs again, for its logits
        ([1, 2, 3, 9, 9], 2, 2 + 1),  # from the first token that differs
        ([1, 2], 2, 1 + 1),  # a shorter prompt
        ([7, 2], 1, 2),
        ([7], 1, 1),
    ):
        wanted = by_hand(model, prompt, new, seed=1)
        rows_run.clear()
        assert list(model.generate(prompt, max_new_tokens=new, seed=1, cache=cache)) == wanted
        assert sum(rows_run) == rows
        assert cache.tokens == [*prompt, *wanted[:-1]]  # the last token has not been run
    cache.clear()
    assert (cache.tokens, repr(cache)) == ([], "PrefixCache(0 sequences, 0 bytes)")


def test_a_conversation_runs_each_token_once(model: GPT2, rows_run: list[int]) -> None:
    cache = model.new_prefix_cache()
    talk = [1]
    for _ in range(4):
        talk += model.generate(talk, max_new_tokens=3, cache=cache)
        talk += [50, 51]
    assert sum(rows_run) == len(talk) - 3  # the last answer's last token and the two after it have not run yet


def test_an_interrupted_completion_leaves_a_valid_cache(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = model.new_prefix_cache()
    wanted = by_hand(model, [1, 2, 3], 6)
    list(model.generate([1, 2, 3], max_new_tokens=3, cache=cache))
    step = Network.step
    for before in (True, False):

        def interrupted(self: Network, rows: Any, before: bool = before) -> Any:
            if not before:
                step(self, rows)
            raise KeyboardInterrupt

        monkeypatch.setattr(Network, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(model.generate([1, 2, 3, *wanted[:4]], max_new_tokens=1, cache=cache))
        monkeypatch.setattr(Network, "step", step)
        assert len(cache.tokens) >= 5
        assert cache.tokens == [1, 2, 3, *wanted][: len(cache.tokens)]
        assert list(model.generate([1, 2, 3], max_new_tokens=6, cache=cache)) == wanted
        list(model.generate([1, 2, 3], max_new_tokens=3, cache=cache))


def test_caches_of_others(model: GPT2, path: str) -> None:
    with GPT2.load(path, threads=1) as other, SerialGPT2.load(path) as serial:
        with pytest.raises(InputError, match="another model"):
            model.generate([1], cache=other.new_prefix_cache())
        with pytest.raises(InputError, match="another model"):
            serial.generate([1], cache=model.new_prefix_cache())
        own = serial.new_prefix_cache()
        for _ in range(2):
            assert list(serial.generate([1, 2], cache=own)) == list(model.generate([1, 2]))
    with pytest.raises(InputError, match=r"KVCache.*PrefixCache"):
        model.generate([1], cache=model.new_cache())  # type: ignore[arg-type]
    assert isinstance(model.new_prefix_cache(), PrefixCache)


def test_a_copied_cache_must_fit(model: GPT2, path: str) -> None:
    from pygpt._kernels import copy_keys_values

    source, full = model.new_cache(), model.new_cache()
    model.prefill(source, [1, 2, 3])
    model.prefill(full, [1])
    with GPT2.load(path, threads=1) as other:
        for wrong in (full, model.new_cache(2), other.new_cache()):
            length = wrong.length
            with pytest.raises(InputError, match="empty"):
                copy_keys_values(wrong, source, 3)
            assert wrong.length == length
    for capacity in (3, 7, MAXT):
        copy: KVCache = source.copy(capacity=capacity)
        assert (copy.length, copy.capacity) == (3, capacity)
        if capacity > 3:
            assert np.array_equal(model.decode(copy, 4), model.logits([1, 2, 3, 4])[-1])


def test_a_closed_model(path: str) -> None:
    with GPT2.load(path, threads=1) as model:
        running = model.generate([1])
        next(running)
    with pytest.raises(ClosedError):
        next(running)
    with pytest.raises(ClosedError):
        model.generate_batch([[1]])
    with GPT2.load(path, threads=1) as half:
        half.network._weights.close()
        with pytest.raises(ClosedError):  # the workers still run, but must not read the memory
            half.logits([1])


def test_a_closed_serial_model(path: str) -> None:
    serial = SerialGPT2.load(path)
    running = serial.generate([1])
    next(running)
    serial.close()
    serial.close()
    with pytest.raises(ClosedError):
        next(running)
    with pytest.raises(ClosedError):
        serial.logits([1])


# ---------------------------------------------------------------------------------------------------------------------
# Past the context


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("slide_to", [None, 1, 5, MAXT])
def test_sliding_gives_the_logits_of_the_window_alone(
    model: GPT2, path: str, options: dict[str, Any], slide_to: int | None
) -> None:
    asked = {"overflow": "slide", "slide_to": slide_to, "max_new_tokens": 40, **options}
    prompts = [[3], list(range(MAXT - 1)), list(range(MAXT)), list(range(2 * MAXT))]
    wanted = [by_hand(model, prompt, 40, slide_to=slide_to or MAXT // 2, **options) for prompt in prompts]
    cache = model.new_prefix_cache()
    for _ in range(2):
        assert [list(model.generate(prompt, **asked, cache=cache)) for prompt in prompts] == wanted
    assert [c.tokens for c in model.generate_batch(prompts, **asked)] == wanted
    if slide_to is None:
        with SerialGPT2.load(path) as serial:
            assert list(serial.generate(prompts[0], **asked)) == wanted[0]


def test_a_context_of_one_token(tmp_path: Path) -> None:
    make(tmp_path / "one.bin", **{**SHAPE, "maxT": 1})
    with GPT2.load(tmp_path / "one.bin", threads=1) as model:
        assert list(model.generate([1, 2], overflow="slide", max_new_tokens=5)) == by_hand(model, [1, 2], 5, slide_to=1)


@pytest.mark.parametrize("given", [1, 20, MAXT - 1])
def test_stopping_at_the_context(model: GPT2, given: int) -> None:
    prompt = list(range(given))
    wanted = by_hand(model, prompt, MAXT - given)
    for asked in ({"total": 10**9}, {"max_new_tokens": 10**9}, {"total": MAXT}):
        assert list(model.generate(prompt, overflow="stop", **asked)) == wanted  # type: ignore[arg-type]
    [c] = model.generate_batch([prompt], overflow="stop", total=MAXT + 1)
    assert (c.tokens, c.finish_reason) == (wanted, "length")
    assert list(model.generate([1], overflow="stop", total=5)) == by_hand(model, [1], 4)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {"total": MAXT + 1}, f"total is {MAXT + 1}.*the model's {MAXT}"),
        (1, {"max_new_tokens": MAXT}, f"max_new_tokens is {MAXT}.*from 1 to {MAXT - 1}, .* {MAXT}"),
        (1, {"overflow": "wrap"}, "overflow is 'wrap'.*stop, slide"),
        (1, {"overflow": True}, "overflow is True"),
        (1, {"slide_to": 5}, "slide_to is 5.* overflow"),
        (1, {"slide_to": 5, "overflow": "stop"}, "slide_to is 5.* overflow"),
        (1, {"slide_to": 0, "overflow": "slide"}, f"slide_to is 0.*from 1 to .*{MAXT}"),
        (1, {"slide_to": MAXT + 1, "overflow": "slide"}, "slide_to is 25"),
        (1, {"slide_to": 2.0, "overflow": "slide"}, "slide_to is 2.0"),
        (1, {"total": 10**30, "overflow": "slide"}, "total is 1000"),
        (1, {"max_new_tokens": 0, "overflow": "slide"}, "max_new_tokens is 0"),
        (1, {"max_new_tokens": 10**18, "overflow": "stop"}, "max_new_tokens is 1000"),
        (MAXT, {"max_new_tokens": 5, "overflow": "stop"}, f"{MAXT} tokens.*{MAXT}: .* slide"),
        (MAXT + 1, {"max_new_tokens": 5, "overflow": "stop"}, f"{MAXT + 1} tokens.*{MAXT}"),
        (30, {"overflow": "slide"}, "30 tokens.* 10: .* 9"),
        (0, {"overflow": "slide"}, "at least one token id"),
    ],
    ids=str,
)
def test_bad_overflows(model: GPT2, count: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(list(range(count)), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Stops


def test_stop_tokens(model: GPT2) -> None:
    whole = by_hand(model, [1], 20)
    rare = next(token for token in range(97) if token not in whole)
    assert len(set(whole)) > 3
    for token in set(whole):
        end = whole.index(token) + 1
        ways: list[Any] = [token, [token], [rare, np.int64(token)], (token, token), {token}]
        for stops in ways:
            assert list(model.generate([1], max_new_tokens=20, stop_token_ids=stops)) == whole[:end]
        [c] = model.generate_batch([[1]], max_new_tokens=20, stop_token_ids=token)
        assert (c.tokens, c.finish_reason) == (whole[:end], "stop")
    [c] = model.generate_batch([[1]], max_new_tokens=20, stop_token_ids=[rare])
    assert (c.tokens, c.finish_reason) == (whole, "length")
    assert list(model.generate([1], max_new_tokens=20, stop_token_ids=[])) == whole
    last = by_hand(model, [1], 1)
    [c] = model.generate_batch([[1]], max_new_tokens=1, stop_token_ids=last)
    assert (c.tokens, c.finish_reason) == (last, "stop")
    prompted = by_hand(model, [rare, 1], 20)
    assert rare not in prompted
    assert list(model.generate([rare, 1], max_new_tokens=20, stop_token_ids=rare)) == prompted  # the prompt stops nothing


def stopped(prompt: list[int], tokens: list[int], strings: list[bytes]) -> list[int]:
    """Return the tokens up to the first one in which a stop string ends, by searching the whole text after each token."""
    tokenizer = Tokenizer()
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode_bytes(prompt + tokens[:end])
        before = len(tokenizer.decode_bytes(prompt + tokens[: end - 1]))
        for string in strings:
            found = [i + len(string) for i in range(len(text)) if text.startswith(string, i)]
            if any(stop > before for stop in found):
                return tokens[:end]
    return tokens


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(data=st.data())
def test_stop_strings(speller: GPT2, data: st.DataObject) -> None:
    """The stop strings are any pieces of the text, which may begin in the prompt."""
    prompt = data.draw(st.lists(st.integers(0, 50256), min_size=1, max_size=5))
    seed = data.draw(st.integers(0, 5))
    whole = list(speller.generate(prompt, max_new_tokens=12, seed=seed))
    text = Tokenizer().decode_bytes(prompt + whole)
    strings = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        strings.append(text[start : start + data.draw(st.integers(1, 12))].decode("utf-8", "ignore") or "unlikely")
    wanted = stopped(prompt, whole, [string.encode() for string in strings])
    asked = strings[0] if len(strings) == 1 and data.draw(st.booleans()) else strings
    assert list(speller.generate(prompt, max_new_tokens=12, seed=seed, stop_strings=asked)) == wanted
    [c] = speller.generate_batch([prompt], max_new_tokens=12, seed=seed, stop_strings=asked)
    assert c.tokens == wanted
    assert (c.finish_reason == "stop") == (stopped(prompt, [*whole, 0], [s.encode() for s in strings]) == wanted)


def scripted(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every sampler choose these tokens."""
    monkeypatch.setattr(Sampler, "choose", lambda _self, _logits, _row, _seed, _stream, step: tokens[step])


@pytest.mark.parametrize(
    ("prompt", "new", "stop", "count"),
    [
        ("a", ["st", "op", " at"], "stop", 2),
        ("a", ["st", "opera"], "stop", 2),
        ("a", ["stop", " at"], "stop", 1),
        ("a", ["las", "topper"], "stop", 2),
        ("a", ["s", "to", "pped"], "stop", 3),
        ("st", ["op", " at"], "stop", 1),  # begun in the prompt
        ("stop", [" at", " it"], "stop", 2),  # complete in the prompt, so it stops nothing
        ("stop", ["s", "top", "s"], "stop", 2),
        ("a", ["aa", "a", "b"], "aab", 3),
        ("a", ["\n", "\n", "x"], "\n\n", 2),
        ("a", ["\n\n", "x"], "\n", 1),
        ("a", [" caf", "é", "!"], "é", 2),
        ("a", [" caf", "é", "!"], "fé!", 3),
        ("a", ["<|endoftext|>", "b"], "text|>", 1),
        ("a", ["b", "c"], "bcd", 2),
    ],
)
def test_stop_strings_by_hand(
    speller: GPT2, monkeypatch: pytest.MonkeyPatch, prompt: str, new: list[str], stop: str, count: int
) -> None:
    tokenizer = Tokenizer()
    tokens = [token for piece in new for token in tokenizer.encode(piece, allow_special=True)]
    if len(tokens) != len(new):  # a piece has several tokens, so count tokens by the text
        count = len(stopped(tokenizer.encode(prompt), tokens, [stop.encode()]))
    scripted(tokens, monkeypatch)
    for stops in (stop, [stop, "a longer one"]):  # a longer one lets more of the prompt be searched
        found = list(speller.generate(tokenizer.encode(prompt), max_new_tokens=len(tokens), stop_strings=stops))
        assert found == tokens[:count]


def test_half_a_character_does_not_match(speller: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is compared by bytes: a character of two tokens matches after its second token."""
    tokenizer = Tokenizer()
    tokens = tokenizer.encode("\U0001f9ff")
    assert len(tokens) > 1
    scripted([*tokens, 0], monkeypatch)
    assert list(speller.generate([0], max_new_tokens=len(tokens) + 1, stop_strings="\U0001f9ff")) == tokens
    assert list(speller.generate([0], max_new_tokens=len(tokens) + 1, stop_strings="�")) == [*tokens, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_strings": ""}, "stop string is empty"),
        ({"stop_strings": ["a", ""]}, "stop string is empty"),
        ({"stop_strings": 5}, "stop_strings is 5.*list of str"),
        ({"stop_strings": [5]}, "stop string is 5.*text"),
        ({"stop_strings": b"a"}, "stop_strings is b'a'"),
        ({"stop_strings": ["\ud800"]}, "cannot be written in UTF-8"),
        ({"stop_token_ids": 50257}, "token '50257'"),
        ({"stop_token_ids": [-1]}, "token '-1'"),
        ({"stop_token_ids": "5"}, "stop_token_ids is '5'.*list of int"),
        ({"stop_token_ids": ["5"]}, "token '5'"),
        ({"stop_token_ids": True}, "token 'True'"),
        ({"stop_token_ids": 1.5}, "stop_token_ids is 1.5"),
        ({"stop_token_ids": np.array(1.5)}, r"stop_token_ids is array\(1.5\).*list of int"),  # without dimensions
    ],
    ids=str,
)
def test_bad_stops(speller: GPT2, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        speller.generate([1], **options)


def test_stop_strings_need_the_vocabulary(model: GPT2, speller: GPT2) -> None:
    with pytest.raises(InputError, match=r"97.*50257"):
        model.generate([1], stop_strings="a")
    assert list(model.generate([1], stop_strings=[])) == list(model.generate([1]))
    undecodable = b"\xff".decode("utf-8", "surrogateescape")  # as a command line gives it
    assert len(list(speller.generate([1], stop_strings=undecodable))) == 9


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities, streamers, results


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_infos(model: GPT2, path: str, options: dict[str, Any]) -> None:
    """Log-probabilities come from the network, for every sampler."""
    completions = model.generate_batch(PROMPTS[:3], top_logprobs=4, max_new_tokens=6, **options)
    for c in completions:
        assert [info.token for info in c.infos] == c.tokens
        logits = model.logits(c.prompt + c.tokens)[len(c.prompt) - 1 : -1].astype(np.float64)
        exact = np.log(oracle.softmax(logits))
        np.testing.assert_allclose([info.logprob for info in c.infos], exact[range(6), c.tokens], rtol=0, atol=1e-6)
        for row, info in zip(exact, c.infos, strict=True):
            assert [token for token, _ in info.top] == np.argsort(-row, kind="stable")[:4].tolist()
            np.testing.assert_allclose([p for _, p in info.top], np.sort(row)[::-1][:4], rtol=0, atol=1e-6)
    with GPT2.load(path, threads=1) as other:
        for c in completions:
            [alone] = other.generate_batch([c.prompt], top_logprobs=4, max_new_tokens=6, **options)
            assert alone.infos == c.infos  # the same bits
    [c] = model.generate_batch([[1]], top_logprobs=0)
    assert all(info.top == [] and info.logprob <= 0 for info in c.infos)
    [c] = model.generate_batch([[1]])
    assert c.infos == []


class Listener:
    """A streamer that keeps the values that it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Any) -> None:
        self.got.append(value)

    def end(self) -> None:
        self.got.append("end")


def test_streamer(model: GPT2) -> None:
    """As in transformers, a streamer gets the prompt as a batch of one, then token after token, then the end."""
    listener = Listener()
    found = list(model.generate([1, 2, 3], max_new_tokens=4, streamer=listener))
    assert found == by_hand(model, [1, 2, 3], 4)
    prompt, *tokens, end = listener.got
    assert (prompt.tolist(), prompt.dtype, end) == ([[1, 2, 3]], np.int64, "end")
    assert [(token.tolist(), token.dtype) for token in tokens] == [([token], np.int64) for token in found]
    model.generate([1, 2, 3], max_new_tokens=4, streamer=listener)  # runs even if the result is not used
    assert len(listener.got) == 12
    for wrong in (3, "x", SimpleNamespace(put=print)):
        with pytest.raises(InputError, match="streamer is"):
            model.generate([1, 2, 3], max_new_tokens=4, streamer=wrong)  # type: ignore[arg-type]


def test_generation_starts_with_the_first_requested_token(model: GPT2, rows_run: list[int]) -> None:
    running = model.generate([1, 2, 3], max_new_tokens=4)
    assert rows_run == []
    next(running)
    assert rows_run == [3]


def test_a_completion_has_its_prompt_tokens_and_reason(model: GPT2) -> None:
    engine = model.engine()
    job = engine.add(Request(model.config, [1, 2], total=4))
    [completion] = job.completions
    assert (completion.prompt, completion.tokens, completion.finish_reason, completion.seed) == ([1, 2], [], None, None)
    tokens = []
    for event in engine.run():
        assert (event.job, event.choice, event.error) == (job, 0, None)
        tokens.append(event.token)
        assert completion.tokens == tokens
    assert completion.finish_reason == "length"
    assert repr(completion) == f"Completion(prompt=[1, 2], tokens={tokens}, finish_reason='length')"


def test_sequences_are_sampled_with_their_exact_probabilities(model: GPT2) -> None:
    """Pairs of tokens follow the product of two exact distributions; the second depends on the first token."""
    options: dict[str, Any] = {"top_k": 4, "temperature": 1.5}
    completions = model.generate_batch([[7]], num_return_sequences=4000, max_new_tokens=2, seed=5, **options)
    pairs = np.zeros((97, 97))
    for c in completions:
        pairs[tuple(c.tokens)] += 1
    exact = np.zeros((97, 97))
    first = left([7], model)
    for token in np.flatnonzero(first):
        exact[token] = first[token] * left([7, int(token)], model)
    assert math.isclose(exact.sum(), 1)
    assert_fits(pairs.reshape(-1), exact.reshape(-1))


def left(tokens: list[int], model: GPT2) -> oracle.Array:
    """Return the probabilities of the four best ids at temperature 1.5, in float64."""
    x = model.logits(tokens)[-1].astype(np.float64)
    return oracle.softmax(np.where(x >= np.sort(x)[-4], x / 1.5, -np.inf))
