"""The Python interface, called with anything. A refused call raises one clear line and does not change anything. At the end,
every cache gives the same logits that its tokens give without a cache."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from targets import SMALL, weights

import pygpt
from pygpt import GPT2, DataLoader, TrainableGPT2, TrainingOptions, split, write_checkpoint, write_tokenizer, write_tokens

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 10**5000, -(10**400), 0.0, 0.5, -1.5, 1e308, float("nan"),
    float("inf"), "", "0", "x" * 5000, "\ud800", "\0", "sample", b"\1\2", [], [[]], [1, -1], [2**62] * 2, [0.5], ["a"], {}, {3},
    (1, 2), object(), np.int64(1), np.float32(0.5), np.array([1], "u1"), np.array([[1.5]]), np.array([], "i4"),
    np.array([None]), np.array("2026", "M8[s]"),
]  # fmt: skip


def an_odd_value(number: int) -> Any:
    return ODD[number]


odd = st.integers(0, len(ODD) - 1).map(an_odd_value)  # hypothesis cannot print some of them
tokens = st.one_of(st.integers(0, SMALL.V - 1), odd)
lists = st.one_of(st.lists(tokens, max_size=8), odd)


def refusal(call: Callable[[], object]) -> bool:
    """Whether a call is refused: by an exception of ours, in a clear line."""
    try:
        call()
    except pygpt.PyGPTError as error:
        text = str(error)
        assert text.strip()
        assert "\n" not in text
        assert len(text) < 600
        return True
    return False


class Caches(RuleBasedStateMachine):
    """Calls on two caches, and a second record of their tokens."""

    path: Path
    model: GPT2
    other: GPT2

    def __init__(self) -> None:
        super().__init__()
        self.caches = [self.model.new_cache(), self.model.new_cache()]
        self.held: list[list[int]] = [[], []]

    def note(self, number: int, *tokens: Any) -> None:
        """Record the tokens of a cache, and that they were token ids."""
        for token in tokens:
            assert not isinstance(token, bool)
            assert 0 <= token.__index__() < SMALL.V, f"token {token!r} is accepted"
        self.held[number] += [token.__index__() for token in tokens]

    @rule(rows=st.lists(st.tuples(tokens, st.integers(0, 1), st.booleans()), max_size=5))
    def step(self, rows: list[tuple[Any, int, bool]]) -> None:
        found: list[Any] = []
        if not refusal(lambda: found.append(self.model.step([(token, self.caches[i], want) for token, i, want in rows]))):
            assert found[0].shape == (sum(want for _, _, want in rows), SMALL.V)
            for token, number, _ in rows:
                self.note(number, token)

    @rule(number=st.integers(0, 1), given=lists)
    def prefill(self, number: int, given: Any) -> None:
        if isinstance(given, list) and not refusal(lambda: self.model.prefill(self.caches[number], given)):
            self.note(number, *given)

    @rule(number=st.integers(0, 1), token=tokens)
    def decode(self, number: int, token: Any) -> None:
        if not refusal(lambda: self.model.decode(self.caches[number], token)):
            self.note(number, token)

    @rule(number=st.integers(0, 1), length=st.integers(0, 6) | odd)
    def truncate(self, number: int, length: Any) -> None:
        if not refusal(lambda: self.caches[number].truncate(length)):
            del self.held[number][length:]

    @rule(token=tokens)
    def foreign(self, token: Any) -> None:
        assert refusal(lambda: self.model.step([(token, self.other.new_cache(), True)]))
        assert refusal(lambda: list(self.model.generate([1], cache=self.other.new_prefix_cache())))

    @invariant()
    def lengths(self) -> None:
        assert [cache.length for cache in self.caches] == [len(ids) for ids in self.held]

    def teardown(self) -> None:
        for cache, ids in zip(self.caches, self.held, strict=True):
            if ids:
                cache.truncate(len(ids) - 1)
                assert np.array_equal(self.model.decode(cache, ids[-1]), self.other.logits(ids)[-1])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calls") / "model.bin"
    write_checkpoint(path, SMALL, weights(SMALL))
    return path


def test_caches_hold_what_was_accepted(model_path: Path) -> None:
    with GPT2.load(model_path, threads=2) as Caches.model, GPT2.load(model_path, threads=1) as Caches.other:
        run_state_machine_as_test(Caches, settings=settings(max_examples=40, stateful_step_count=12, deadline=None))


def is_huge(value: object) -> bool:
    return isinstance(value, int) and value > 20


GENERATE = ("total", "max_new_tokens", "sampler", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
            "stop_token_ids", "stop_strings", "overflow", "slide_to", "do_sample")  # fmt: skip
UPDATE = ("beta1", "beta2", "eps", "weight_decay", "gradient_scale")


@pytest.fixture(scope="module")
def engines(model_path: Path) -> Iterator[tuple[GPT2, TrainableGPT2]]:
    with GPT2.load(model_path, threads=1) as model, TrainableGPT2(SMALL, threads=1) as trainable:
        yield model, trainable


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_argument_is_taken_or_refused(engines: tuple[GPT2, TrainableGPT2], data: st.DataObject) -> None:
    """Each call with one or two arguments out of place."""
    model, trainable = engines
    one, two, rest = data.draw(odd), data.draw(odd), data.draw(lists)
    name, updated = data.draw(st.sampled_from(GENERATE)), data.draw(st.sampled_from(UPDATE))
    dimension, option = data.draw(st.sampled_from("LVC")), data.draw(st.sampled_from(sorted(TrainingOptions().as_dict())))
    number = data.draw(st.integers(0, 23))
    prompt = rest if isinstance(rest, list) else [1]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "file.bin"

        def back() -> None:
            trainable.forward([[1, 2]], [[1, 2]])
            trainable.backward(scale=one)

        # A window may slide for ever: no option gives a number of tokens beyond a few.
        options = {"total": 5, name: one} if name != "max_new_tokens" else {name: one}
        calls: list[Callable[[], object]] = [
            lambda: list(model.generate(prompt, **options)),
            lambda: None if is_huge(one) else model.generate_batch([prompt], num_return_sequences=one, total=3),
            lambda: model.generate_batch([prompt], top_logprobs=one, total=3),
            lambda: model.new_cache(one),
            lambda: model.logits(prompt),
            lambda: pygpt.ThreadPool(one).close(),
            lambda: trainable.forward(one, two),
            back,
            lambda: trainable.update(lr=one, step=two),
            lambda: trainable.update(lr=0.1, step=1, **{updated: one}),
            lambda: DataLoader([1, 2, 3, 4, 5], one, two),
            lambda: DataLoader([1, 2, 3, 4, 5], 1, 2, V=one, shuffle_seed=two),
            lambda: DataLoader(rest, 1, 1) if not isinstance(rest, str | bytes) else None,
            lambda: DataLoader([1, 2, 3], 1, 1).restore({**DataLoader([1, 2, 3], 1, 1).state(), "batch": one, "B": two}),
            lambda: split(np.arange(4), val_tokens=one),
            lambda: split(np.arange(4), val_fraction=one),
            lambda: pygpt.Config(**{"maxT": 1, "V": 2, "L": 3, "NH": 2, "C": 4, dimension: one}),
            lambda: TrainingOptions(**{option: one}),
            lambda: pygpt.Tokenizer().decode(prompt),
            lambda: list(pygpt.encode_text(["a b"], eot=one)),
            lambda: write_tokens(place, rest),
            lambda: write_tokenizer(place, [b"a"], one),
            lambda: pygpt.write_examples(place, [pygpt.Example(0, one, rest, [[1], [2], [3], [4]])]),
            lambda: write_checkpoint(place, SMALL, weights(SMALL), version=one),
        ]
        assert len(calls) == 24
        refused = refusal(calls[number])
        assert not (refused and place.exists())
        assert [path.name for path in Path(folder).iterdir()] in ([], ["file.bin"])
