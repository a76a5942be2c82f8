"""Requests that join and leave an engine get the same tokens and log-probabilities as alone.

This is true for every order, every set of other requests, all limits, and every draft that guesses tokens ahead."""

import math
import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jobs import in_threads
from make_checkpoint import make

from pygpt import GPT2, Config, InputError, NumericalError, SerialGPT2
from pygpt.formats.open import open_weights
from pygpt.generation.completion import Completion
from pygpt.generation.engine import FEWEST_ROWS, Engine, _Clock
from pygpt.generation.prefix import Memory
from pygpt.generation.request import Request
from pygpt.generation.speculate import FEW, FIXED_ROWS, FRESH, MOST, ROWS, SOON, WORTH, Draft, Share, Speculation, Speculator
from pygpt.network import KVCache, Network

MAXT = 24
SHAPE = {"L": 2, "NH": 2, "C": 16, "V": 97, "maxT": MAXT}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"sampler": "greedy"},
    {"temperature": 0.8, "seed": 5},
    {"seed": 3, "top_k": 9, "repetition_penalty": 1.3},
    {"seed": 7, "overflow": "slide", "max_new_tokens": 30},
    {"sampler": "greedy", "stop_token_ids": list(range(0, 97, 5))},
    {"seed": 1, "overflow": "slide", "slide_to": 3, "max_new_tokens": 26},
    {"seed": 2, "prompt_logprobs": True},
    {"prompt_logprobs": True, "max_new_tokens": 0},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GPT2]:
    path = tmp_path_factory.mktemp("engine") / "model.bin"
    make(path, **SHAPE, seed=4)
    with GPT2.load(path, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def drafts(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Draft | None]:
    """What can guess for the model: nothing, itself quantised, models of other weights and of other shapes."""
    folder = tmp_path_factory.mktemp("drafts")
    made = {"other weights": {"seed": 5}, "larger": {"L": 3, "C": 24, "seed": 6}, "short": {"maxT": 9}, "NaN": {"seed": 7}}
    found: dict[str, Draft | None] = {"none": None, "itself": model.draft(True)}
    for name, shape in made.items():
        path = folder / f"{name}.bin"
        make(path, **{**SHAPE, "seed": 4, **shape})
        if name == "NaN":
            values = np.memmap(path, "<f4", "r+", offset=1024)
            values[-SHAPE["C"] :] = np.nan  # the last bias
        found[name] = model._draft_from(open_weights(path))
    return found


def request(model: GPT2, prompt: list[int], options: dict[str, Any], speculation: int | bool | None = None) -> Request:
    asked = {"max_new_tokens": min(8, MAXT - len(prompt)), **options}
    return Request(model.config, prompt, top_logprobs=2, speculation=speculation, **asked)


Bits = list[tuple[list[int], str | None, list[Any]]]


def bits(completions: list[Completion]) -> Bits:
    return [(c.tokens, c.finish_reason, c.prompt_infos + c.infos) for c in completions]


class Alone:
    """Compute once the result of each request alone."""

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.known: dict[Any, Bits] = {}

    def __call__(self, prompt: list[int], number: int, n: int) -> Bits:
        key = (tuple(prompt), number, n)
        if key not in self.known:
            engine = Engine(self.model.network)
            job = engine.add(request(self.model, prompt, OPTIONS[number]), n=n)
            list(engine.run())
            self.known[key] = bits(job.completions)
        return self.known[key]


@pytest.fixture(scope="module")
def alone(model: GPT2) -> Alone:
    return Alone(model)


@pytest.mark.parametrize("name", ["none", "itself", "other weights", "larger", "short", "NaN"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_guesses_leave_no_trace(
    model: GPT2, drafts: dict[str, Draft | None], alone: Alone, name: str, options: dict[str, Any]
) -> None:
    """After speculation, the cache holds what plain decoding leaves in it: the next logits have the same bits."""
    caches = []
    for speculation in (None, 3):
        prefix = model.new_prefix_cache()
        engine = Engine(model.network, prefix=prefix, draft=lambda make: drafts[name])
        engine.add(request(model, [5, 6, 5, 6, 5, 6], options, speculation))
        list(engine.run())
        (memory,) = prefix._idle
        assert memory.cache.length == len(memory.tokens)
        assert memory.draft is None
        caches.append((memory.tokens, memory.cache))
        guesses = speculation is not None and options.get("max_new_tokens") != 0
        assert name in ("none", "NaN") or guesses == (engine.speculator.drafted > 0)
    (tokens, plain), (its_tokens, cache) = caches
    assert tokens == its_tokens
    assert isinstance(plain, KVCache)
    assert isinstance(cache, KVCache)
    if len(tokens) < MAXT:
        assert np.array_equal(model.extend(cache, [7]), model.extend(plain, [7]))


def test_a_draft_that_is_right_saves_steps(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft with the model's own weights is always right: four guesses give five tokens a step."""
    counts = rows_of(monkeypatch)
    right = Draft(model.network, shared=True)
    engine = Engine(model.network, draft=lambda make: right)
    job = engine.add(Request(model.config, [1, 2], max_new_tokens=11, seed=1, speculation=4))
    list(engine.run())
    assert (engine.speculator.drafted, engine.speculator.accepted) == (8, 8)
    assert counts == [2, 1, 1, 1, 1, 5, 1, 1, 1, 1, 5]
    assert job.completions[0].tokens == list(model.generate([1, 2], max_new_tokens=11, seed=1))


def test_a_stop_ends_guesses(model: GPT2) -> None:
    """The draft is the model itself, so all its guesses are right, also those after the stop."""
    plain = list(model.generate([1, 2], max_new_tokens=12, sampler="greedy"))
    stop = next(token for token in plain[1:] if token != plain[0])
    engine = Engine(model.network, draft=lambda make: Draft(model.network, shared=True))
    asked: dict[str, Any] = {"max_new_tokens": 12, "sampler": "greedy", "speculation": 8, "stop_token_ids": [stop]}
    job = engine.add(Request(model.config, [1, 2], **asked))
    events = [event.token for event in engine.run()]
    assert events == job.completions[0].tokens == plain[: plain.index(stop) + 1]


def test_an_interrupted_draft_loses_nothing(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some steps of both networks are interrupted after they ran, while guesses are made and while they are checked."""
    options: list[dict[str, Any]] = [{"seed": 1}, {"sampler": "greedy"}]
    wanted = [list(model.generate([3, 1, 4], max_new_tokens=9, **option)) for option in options]
    draft = model.draft(True)
    step, chance = Network.step, random.Random(1)

    def interrupted(self: Network, rows: Any, lengths: Any = None) -> Any:
        logits = step(self, rows, lengths)
        if chance.random() < 0.3:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(Network, "step", interrupted)
    engine = Engine(model.network, draft=lambda make: draft)
    jobs = [engine.add(Request(model.config, [3, 1, 4], max_new_tokens=9, speculation=2, **option)) for option in options]
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            pass
    assert [job.completions[0].tokens for job in jobs] == wanted


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("name", ["itself", "larger"])
def test_a_cancelled_job_guesses_no_more(
    model: GPT2, drafts: dict[str, Draft | None], monkeypatch: pytest.MonkeyPatch, name: str, others: int
) -> None:
    """It is cancelled after the third of nine guesses. The step checks only the guesses of another job, if there is one."""
    plain = list(model.generate([7, 8], max_new_tokens=14, seed=1))
    draft, checks, guessed = drafts[name], list[int](), 0
    assert draft is not None
    prefix = model.new_prefix_cache()
    engine = Engine(model.network, prefix=prefix, draft=lambda make: draft)
    options: dict[str, Any] = {"max_new_tokens": 14, "seed": 1, "speculation": 9}
    cancelled = engine.add(Request(model.config, [1, 2], **options))
    jobs = [engine.add(Request(model.config, [7, 8], **options)) for _ in range(others)]
    engine.step()
    step, check = draft.network.step, model.network.step

    def checking(rows: list[Any]) -> Any:
        checks.append(len(rows))
        return check(rows)

    def counting(rows: list[Any]) -> Any:
        nonlocal guessed
        guessed += any(want for *_, want in rows)
        if guessed == 3:
            engine.cancel(cancelled)
        return step(rows)

    monkeypatch.setattr(draft.network, "step", counting)
    monkeypatch.setattr(model.network, "step", checking)
    before = [event.token for event in engine.step() if event.job in jobs]
    assert (guessed, checks) == (3, [4] * others)
    assert engine.busy == bool(others)
    assert cancelled.completions[0].finish_reason == "cancelled"
    assert len(cancelled.completions[0].tokens) == 1
    [memory] = [memory for memory in prefix._idle if memory.tokens == [1, 2]]
    assert (memory.cache.length, memory.positions) == (2, 5 if name == "itself" else 2)  # guesses take memory, too
    assert len(before) >= others
    list(engine.run())
    assert [job.completions[0].tokens for job in jobs] == [plain] * others


def test_a_cancelled_job_does_not_fill_the_drafts_cache(
    model: GPT2, drafts: dict[str, Draft | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompt has five chunks, and the draft computes one of them."""
    draft, steps = drafts["larger"], list[int]()
    assert draft is not None
    engine = Engine(model.network, draft=lambda make: draft)
    job = engine.add(Request(model.config, list(range(20)), max_new_tokens=4, sampler="greedy", speculation=2))
    engine.step()
    step = draft.network.step

    def cancelling(rows: list[Any]) -> Any:
        steps.append(len(rows))
        engine.cancel(job)
        return step(rows)

    monkeypatch.setattr(draft.network, "chunk", 4)
    monkeypatch.setattr(draft.network, "step", cancelling)
    engine.step()
    assert steps == [4]
    assert not engine.busy


def test_speculation_stops_where_it_does_not_pay() -> None:
    """A draft that is never right is tried rarely, and more rarely each time; a text that repeats itself is looked up."""
    speculator, state = Speculator(lambda make: None), Speculation()
    assert state.look_up([1, 2, 3, 4, 1, 2, 3], 3) == [4, 1, 2]
    assert state.look_up([1, 2, 3, 4, 1, 2, 3, 1, 2, 3], 4) == [1, 2, 3, 1]  # the latest place, whose end repeats
    assert state.look_up([7, 8, 9], 4) == []
    share = Share(0.8)
    assert share.best(8, 0.1)[1] >= 4
    for _ in range(6):
        share.note([1], [2])
    assert share.best(8, 0.3)[0] < WORTH
    compared = share.count
    share.note([1, 2, 3], [1, 9, 3])
    assert share.count == compared + 2  # what follows a wrong guess could not be right
    completion: Any = SimpleNamespace(drafted=0, accepted=0)
    speculator.note(1, 0, 0.010)
    for right, vain in ((0, 0.0), (2, -0.020)):  # right guesses give credit for vain looks
        speculator.check(completion, state, [1, 2], right, 3)
        assert state.vain == pytest.approx(vain)
    speculator.note(1, 4, 0.014)
    assert speculator._row == pytest.approx(0.001)


@pytest.mark.parametrize("model_is", ["quick", "slow"])
def test_what_does_not_pay_is_tried_rarely(model: GPT2, monkeypatch: pytest.MonkeyPatch, model_is: str) -> None:
    """The draft is always wrong, and the text does not repeat itself. Vain looks and guesses take about 1% of the time."""
    plain = {"quick": 0.0002, "slow": 0.010}[model_is]
    speculator = Speculator(lambda make: wrong)
    wrong = Draft(model.network, shared=True)
    wrong.seconds = 0.3 * plain
    monkeypatch.setattr(Draft, "guess", lambda self, wanted, over: [[-2] * count for *_, count in wanted])
    completion = Completion(Request(model.config, [1], overflow="slide", max_new_tokens=10**6, speculation=True))
    state, memory = Speculation(), Memory(model.new_cache())
    looks, guessed = [], []
    for step in range(5000):
        if len(completion.sequence) >= state.rest:
            looks.append(step)
            [guesses] = speculator.guess([(completion, memory, state)], 1)
            speculator.note(1, 0, plain)
            if guesses:
                guessed.append(step)
                speculator.check(completion, state, guesses, 0, step)
        completion.sequence.append(step)
    looked = set(looks)
    assert looked.issuperset(guessed)
    assert (len(looks) < 1500) == (model_is == "quick")  # where a look costs a part of a step
    assert 10 < len(guessed) < 90
    assert max(guessed) > 4000  # it never gives up
    assert not looked.isdisjoint(range(4000, 5000))
    again = completion.sequence[-300:]
    for token in again:  # now the text repeats itself
        if len(completion.sequence) >= state.rest:
            [guesses] = speculator.guess([(completion, memory, state)], 1)
            if guesses and not state.drafted:
                break
        completion.sequence.append(token)
    else:
        pytest.fail("the repetition was not seen")


def test_many_sequences_guess_fewer_tokens_each() -> None:
    """More rows in one step would be bound by arithmetic, and more than FEW sequences get no guesses."""
    speculator = Speculator(lambda make: None)
    memory: Any = SimpleNamespace(cache=SimpleNamespace(capacity=99, length=11))
    for sequences, guesses in ((1, MOST), (3, ROWS // 3 - 1), (FEW, ROWS // FEW - 1), (FEW + 1, 0)):
        speculator.note(sequences, 0, 1.0)
        speculator.note(sequences, 9, 1.0)  # rows of guesses cost nothing
        for fixed, expected in ((0, guesses), (40, min(40, FIXED_ROWS // sequences - 1)), (3, 3)):
            completion: Any = SimpleNamespace(speculation=fixed, guesses=40, sequence=[1, 2, 3] * 4)
            found = speculator.guess([(completion, memory, Speculation()) for _ in range(sequences)], sequences)
            assert [len(one) for one in found] == [expected] * sequences


def test_small_gains_need_fresh_times() -> None:
    """Plain steps have other times later, so a step is plain from time to time, unless the gain is large. Each number of
    sequences has its own time."""
    for row_s, fresh in ((0.2, True), (0.0, False)):
        speculator = Speculator(lambda make: None)
        memory: Any = SimpleNamespace(cache=SimpleNamespace(capacity=99, length=11))
        completion: Any = SimpleNamespace(speculation=0, guesses=40, sequence=[1, 2, 3] * 4)
        counts = []
        for _ in range(2 * FRESH + 4):
            [guesses] = speculator.guess([(completion, memory, Speculation())], 1)
            speculator.note(1, len(guesses), 1.0 + row_s * len(guesses))
            counts.append(len(guesses))
        plain = [step for step, count in enumerate(counts) if not count]
        assert plain == ([0, FRESH + 1, 2 * FRESH + 2] if fresh else [0])
    fixed: Any = SimpleNamespace(speculation=2, guesses=40, sequence=[1, 2, 3] * 4)
    speculator, both = Speculator(lambda make: None), [(one, memory, Speculation()) for one in (fixed, completion)]
    for step in range(FRESH + 2):  # a fixed number never leaves a step plain by itself, so one step is plain on purpose
        found = [len(guesses) for guesses in speculator.guess(both, 2)]
        assert found == ([2, 0] if step < FRESH else [0, 0] if step == FRESH else [2, 1])
        speculator.note(2, sum(found), 1.0)


def test_a_slow_first_step_is_forgotten() -> None:
    """It reads the model from the disk. Compared with it, guesses seem free, but here each takes half of a plain step."""
    speculator, state = Speculator(lambda make: None), Speculation()
    memory: Any = SimpleNamespace(cache=SimpleNamespace(capacity=99, length=11))
    completion: Any = SimpleNamespace(speculation=0, guesses=40, sequence=[1, 2, 3] * 4)
    counts = []
    for step in range(60):
        [guesses] = speculator.guess([(completion, memory, state)], 1)
        speculator.note(1, len(guesses), 0.01 * (1 + 0.5 * len(guesses)) if step else 1.0)
        counts.append(len(guesses))
    assert max(counts) > 4
    assert counts[-1] == 0


@pytest.mark.parametrize("speculation", [0, 5])
def test_a_draft_that_cannot_be_made_does_not_replace_lookups(speculation: int) -> None:
    """Lookups are rarely right here. A draft would be better, but the engine has none."""
    speculator, state = Speculator(lambda make: None), Speculation()
    state.lookups.mean = 0.3
    memory: Any = SimpleNamespace(cache=SimpleNamespace(capacity=99, length=11))
    completion: Any = SimpleNamespace(speculation=speculation, guesses=SOON, sequence=[1, 2, 3] * 4)
    speculator.note(1, 0, 1.0)
    assert [len(speculator.guess([(completion, memory, state)], 1)[0]) for _ in range(3)] == [0, *[speculation or 1] * 2]


def test_guesses_are_checked_one_after_the_other(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of all sequences add to the same counts, so workers must not share them."""
    check, threads = Speculator.check, set()

    def noting(self: Speculator, *given: Any) -> None:
        threads.add(threading.current_thread())
        check(self, *given)

    monkeypatch.setattr(Speculator, "check", noting)
    engine = Engine(model.network, draft=lambda make: Draft(model.network, shared=True))
    for token in range(4):
        engine.add(Request(model.config, [token], max_new_tokens=9, speculation=2))
    list(engine.run())
    assert threads == {threading.current_thread()}


def test_drafts_by_name(tmp_path: Path) -> None:
    make(tmp_path / "model.bin", **SHAPE)
    make(tmp_path / "other.bin", **{**SHAPE, "V": 98})
    for name in ("q8_0", "q4_0", "lookup", str(tmp_path / "model.bin")):
        with GPT2.load(tmp_path / "model.bin", draft=name) as loaded:
            tokens = list(loaded.generate([1, 2, 3], total=MAXT, speculation=3))
            assert (loaded.draft(False) is None) == (name == "lookup")
            assert tokens == list(loaded.generate([1, 2, 3], total=MAXT))
    with pytest.raises(InputError, match=r"98 token ids.*97"):
        GPT2.load(tmp_path / "model.bin", draft=tmp_path / "other.bin")
    np.memmap(tmp_path / "other.bin", "<f4", "r+", offset=1024)[7] = 1e8  # no quantised format has it
    with GPT2.load(tmp_path / "other.bin") as loaded:
        assert list(loaded.generate([1], total=MAXT)) == list(loaded.generate([1], total=MAXT, speculation=3))
        assert loaded.draft(True) is None
    with pytest.raises(InputError, match="wte cannot be q8_0"):
        GPT2.load(tmp_path / "other.bin", draft="q8_0")
    for bad in (0, 65, -1, 1.5, "auto"):
        with GPT2.load(tmp_path / "model.bin") as loaded, pytest.raises(InputError, match="speculation is"):
            loaded.generate([1], speculation=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_any_budget(model: GPT2, alone: Alone, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(Network, "chunk", chunk)
    engine = model.engine(prefix=model.new_prefix_cache())
    asked = [([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], 0), ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], 2), ([2, 7], 1), ([3, 1, 4], 3)]
    jobs = [engine.add(request(model, prompt, OPTIONS[number]), n=2) for prompt, number in asked]
    list(engine.run())
    for job, (prompt, number) in zip(jobs, asked, strict=True):
        assert bits(job.completions) == alone(prompt, number, 2)


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    step = Network.step

    def counting(self: Network, rows: Any, lengths: Any = None) -> Any:
        counts.append(len(rows))
        return step(self, rows, lengths)

    monkeypatch.setattr(Network, "step", counting)
    return counts


def test_a_shared_prefix_is_computed_once(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts share ten tokens, and each adds one. One sequence computes the ten, the others copy them."""
    counts = rows_of(monkeypatch)
    engine = model.engine()
    common = list(range(20, 30))
    for last in range(5):
        engine.add(Request(model.config, [*common, last], max_new_tokens=2))
    list(engine.run())
    assert counts == [11, 1 + 4, 4]
    for last in range(2):
        engine.add(Request(model.config, [50, 51, 52, last], max_new_tokens=1))
    list(engine.run())
    assert counts[3:] == [4 + 4]  # three tokens are not worth a wait


def test_a_request_goes_on_from_an_idle_and_from_a_live_cache(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = model.engine(prefix=model.new_prefix_cache())
    first = engine.add(Request(model.config, list(range(10)), max_new_tokens=3))
    list(engine.run())
    counts = rows_of(monkeypatch)
    engine.add(Request(model.config, [*range(10), *first.completions[0].tokens], max_new_tokens=8))
    engine.step()
    assert counts == [1]  # the last token, which was drawn but not computed
    engine.add(Request(model.config, [*range(10), 50, 51], max_new_tokens=1))
    engine.step()
    assert counts == [1, 1 + 2]


def test_few_rows_of_a_step_have_logits_for_prompts(model: GPT2, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a long prompt would not fit in memory at once."""
    wanted, step = [], Network.step

    def counting(self: Network, rows: list[tuple[int, Any, bool]]) -> Any:
        wanted.append(sum(want for _, _, want in rows))
        return step(self, rows)

    prompts, number = ([*range(20)], [5, *range(14)]), len(OPTIONS) - 1
    expected = [alone(prompt, number, 1) for prompt in prompts]
    monkeypatch.setattr("pygpt.generation.engine.SCORED_ROWS", 6)
    monkeypatch.setattr(Network, "step", counting)
    engine = Engine(model.network)
    jobs = [engine.add(request(model, prompt, OPTIONS[number])) for prompt in prompts]
    list(engine.run())
    assert [bits(job.completions) for job in jobs] == expected
    assert max(wanted) == 6


def test_choices_begin_when_the_prompt_is_scored(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request may have the same logits earlier."""
    monkeypatch.setattr("pygpt.generation.engine.SCORED_ROWS", 6)
    engine, prompt = Engine(model.network), [*range(20)]
    engine.add(request(model, prompt, {}))
    job = engine.add(request(model, prompt, {"prompt_logprobs": True}), n=2)
    found = [(event.choice, len(job.completions[0].prompt_infos)) for event in engine.run() if event.job is job]
    assert {*found} == {(0, 19), (1, 19)}


def test_a_cancelled_job_is_not_late(model: GPT2) -> None:
    engine = Engine(model.network)
    engine.cancel(engine.add(request(model, [1, 2], {}), deadline=0.0))
    assert engine.step() == []
    late = engine.add(request(model, [1, 2], {}), deadline=0.0)
    assert [(event.job, type(event.error)) for event in engine.step()] == [(late, TimeoutError)]


def test_a_reused_cache_counts_with_all_the_memory_that_it_takes(model: GPT2) -> None:
    most = 9 * MAXT * model.network.position_bytes
    engine = Engine(model.network, prefix=model.new_prefix_cache(most), cache_bytes=most)
    first = engine.add(Request(model.config, [*range(10)], max_new_tokens=10))
    list(engine.run())
    assert engine.load == (0, 0, 19 * model.network.position_bytes)
    engine.add(Request(model.config, [*range(10), *first.completions[0].tokens[:2]], max_new_tokens=2))
    engine.step()
    assert engine.load == (1, 0, 19 * model.network.position_bytes)


def test_requests_wait_for_room(model: GPT2) -> None:
    """Two sequences of twelve positions fit. The third begins when another one is done."""
    one = model.network.position_bytes
    engine = model.engine(cache_bytes=30 * one)
    jobs = [engine.add(Request(model.config, [token], total=12)) for token in range(3)]
    running = {id(event.job) for event in engine.step()}
    assert running == {id(jobs[0]), id(jobs[1])}
    list(engine.run())
    assert all(job.done and job.completions[0].finish_reason == "length" for job in jobs)
    with pytest.raises(InputError, match=f"{20 * one}.*{10 * one}"):
        model.engine(cache_bytes=10 * one).add(Request(model.config, [1], total=20))


def test_an_error_ends_one_job_alone(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Completion.take
    poor = Request(model.config, [1, 2], total=6)

    def failing(self: Completion, logits: Any, row: int) -> int:
        if self._request is poor and len(self.tokens) == 1:
            raise NumericalError("planted")
        return take(self, logits, row)

    monkeypatch.setattr(Completion, "take", failing)
    engine = model.engine()
    bad, good = engine.add(poor, n=2), engine.add(Request(model.config, [1, 2], total=6))
    errors = [event for event in engine.run() if event.error is not None]
    assert {id(event.job) for event in errors} == {id(bad)}
    assert isinstance(bad.error, NumericalError)
    assert bad.done
    assert not engine.busy
    assert good.completions[0].tokens == list(model.generate([1, 2], total=6))


@pytest.mark.parametrize("before", [True, False])
def test_a_failed_step_keeps_all(model: GPT2, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """Every second step is interrupted, before or after it runs. The same engine continues."""
    wanted = [list(model.generate([1, 2, 3], max_new_tokens=6)), list(model.generate([4], max_new_tokens=5))]
    step, calls = Network.step, iter(range(1000))

    def interrupted(self: Network, rows: Any, lengths: Any = None) -> Any:
        fail = next(calls) % 2 == 0
        if before and fail:
            raise KeyboardInterrupt
        logits = step(self, rows, lengths)
        if fail:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(Network, "step", interrupted)
    engine = model.engine()
    jobs = [
        engine.add(Request(model.config, [1, 2, 3], max_new_tokens=6)),
        engine.add(Request(model.config, [4], max_new_tokens=5)),
    ]
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            pass
    assert [job.completions[0].tokens for job in jobs] == wanted


def test_scores_of_an_interrupted_step_are_computed_again(model: GPT2, alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are in the cache, but some have no log-probability yet."""
    number, score, calls = len(OPTIONS) - 1, Completion.score, iter(range(1000))
    expected = alone([*range(9)], number, 1)

    def interrupted(self: Completion, logits: Any, row: int) -> None:
        if next(calls) % 4 == 2:
            raise KeyboardInterrupt
        score(self, logits, row)

    monkeypatch.setattr(Completion, "score", interrupted)
    engine = model.engine()
    job = engine.add(request(model, [*range(9)], OPTIONS[number]))
    while engine.busy:
        with suppress(KeyboardInterrupt):
            engine.step()
    assert bits(job.completions) == expected


def test_the_serial_reference_runs_in_the_same_engine(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("serial") / "model.bin"
    make(path, **SHAPE, seed=4)
    with SerialGPT2.load(path) as serial:
        engines = [model.engine(), serial.engine()]
        for engine in engines:
            jobs = [engine.add(Request(model.config, [token, 5, 6], total=8, seed=token), n=2) for token in range(3)]
            list(engine.run())
            found = [c.tokens for job in jobs for c in job.completions]
            assert found == [
                c.tokens
                for c in model.generate_batch(
                    [[token, 5, 6] for token in range(3)], total=8, seed=[0, 1, 2], num_return_sequences=2
                )
            ]


def test_close_gives_the_work_to_the_prefix_cache(model: GPT2) -> None:
    prefix = model.new_prefix_cache()
    engine = model.engine(prefix=prefix, max_live=1)
    running, waiting = (engine.add(Request(model.config, [7, 8, token], max_new_tokens=9)) for token in (1, 2))
    engine.step()
    engine.close()
    assert prefix.tokens == [7, 8, 1]
    assert [job.completions[0].finish_reason for job in (running, waiting)] == ["cancelled", "cancelled"]
    assert not engine.busy


def test_the_clock_keeps_steps_near_their_target() -> None:
    """It follows a machine that gets faster and slower, and an outlier costs few steps. A short prompt changes nothing."""
    clock = _Clock(60)
    assert clock.rows(512) == FEWEST_ROWS

    def run(count: int, decode_s: float, row_s: float) -> list[float]:
        times = []
        for _ in range(count):
            rows = clock.rows(512)
            times.append(decode_s + max(rows - 16, 0) * row_s)  # the first rows are free: the step reads all weights anyway
            clock.note(rows, times[-1])
        return times

    assert max(run(10, 0.018, 0.0006)) < 0.063
    assert run(1, 0.018, 0.0006)[0] > 0.055
    clock.note(5, 0.020)
    assert run(1, 0.018, 0.0006)[0] > 0.055
    clock.note(clock.rows(512), 0.500)
    assert run(8, 0.018, 0.0006)[-1] > 0.055
    run(10, 0.200, 0.002)
    assert clock.rows(512) == FEWEST_ROWS
    assert max(run(20, 0.005, 0.00001)) < 0.060
    assert clock.rows(512) == 512
    assert clock.rows(20) == 20
    assert 0.055 < run(20, 0.030, 0.0004)[-1] < 0.065


def test_quick_steps_do_not_make_the_clock_forget_its_target() -> None:
    """With many short prompts, and with a small model, all steps are quick. The next slow one still counts."""
    clock = _Clock(60)
    for _ in range(3000):
        clock.note(3, 0.001)
    assert clock.rows(512) == FEWEST_ROWS
    for _ in range(3000):
        clock.note(clock.rows(512), 0.001)
    assert clock.rows(512) == 512
    for _ in range(2):
        clock.note(512, 0.5)
    assert clock.rows(512) < 256


@pytest.mark.parametrize("limits", [{"max_live": 0}, {"max_live": True}, {"cache_bytes": 0}, {"cache_bytes": 1.5}], ids=str)
def test_bad_limits(model: GPT2, limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(limits))):
        model.engine(**limits)


def test_a_bad_job_is_refused_before_it_can_stop_the_others(model: GPT2) -> None:
    engine, other = model.engine(), Config(maxT=2 * MAXT, V=model.config.V, L=1, NH=1, C=16)
    good = engine.add(Request(model.config, [1, 2], total=4))
    bad: list[dict[str, Any]] = [{"deadline": "soon"}, {"deadline": math.nan}, {"seed": 2.5}, {"seed": -1}, {"seed": 1 << 64}]
    for given in [*bad, {"request": Request(other, [1, 2])}, {"request": 3}]:
        with pytest.raises(InputError, match=next(iter(given))):
            engine.add(**{"request": Request(model.config, [1, 2]), **given})
    list(engine.run())
    assert len(good.completions[0].tokens) == 2


def test_engines_on_threads_share_a_prefix_cache(model: GPT2) -> None:
    """Four threads continue from one cache at once. Two threads never compute in the same keys and values."""
    prefix = model.new_prefix_cache(9 * MAXT * model.network.position_bytes)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9, *tail] for tail in ([1], [2], [1, 1], [2, 2], [1, 2], [2, 1])]
    wanted = [list(model.generate(prompt, max_new_tokens=6)) for prompt in prompts]
    wrong: list[list[int]] = []

    def ask(first: int) -> None:
        for i in range(60):
            number = (first + 5 * i) % len(prompts)
            if list(model.generate(prompts[number], max_new_tokens=6, cache=prefix)) != wanted[number]:
                wrong.append(prompts[number])

    in_threads(ask, range(4))
    assert wrong == []
    assert prefix.nbytes <= prefix.max_bytes
