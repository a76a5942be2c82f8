"""What people really pass: texts from other systems, NumPy's numbers, arrays, unknown options, copies of everything."""

import copy
import json
import pickle
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known import SHAPE, make_model
from running import execute

import pygpt
from pygpt import GPT2, DataError, DataLoader, InputError, Tokenizer, TrainingOptions, read_text, split, tokens_of_text
from pygpt.errors import check_flag, check_number, check_whole, is_whole, real, sequence, whole
from pygpt.formats.open import open_model
from pygpt.formats.text import encode_file, given_text, read_documents, tokens_and_labels
from pygpt.generation.request import Request, request_from_json
from pygpt.generation.sampling import Sampler

EOT = 50256


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model") / "m.bin")


@pytest.fixture(scope="module")
def model(path: str) -> Any:
    with GPT2.load(path, threads=2) as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ texts

LINES = st.lists(st.text(st.sampled_from("ab \té中"), max_size=6), max_size=8)


@settings(max_examples=200, deadline=None)
@given(LINES, st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=8, max_size=8), st.booleans())
def test_newlines_of_every_sort_and_marks_are_read_as_one(lines: list[str], ends: list[str], mark: bool) -> None:
    """A lone CR before a LF would be one newline, so no line after a CR is empty."""
    lines = [line or "x" for line in lines]
    foreign = "\ufeff" * mark + "".join(line + end for line, end in zip(lines, ends, strict=False))
    native = "".join(line + "\n" for line in lines)
    assert given_text(foreign) == native
    assert tokens_of_text(foreign).tolist() == tokens_of_text(native).tolist()


def test_the_cases_of_texts() -> None:
    assert tokens_of_text("AAAA\r\n\r\nBBBB").tolist() == [EOT, 17922, 628, EOT, 15199, 15199]
    assert tokens_of_text("\ufeffa").tolist() == [EOT, 64]
    assert tokens_of_text("a<|endoftext|>b").tolist() == [EOT, 64, EOT, 65]
    assert len(tokens_of_text("a<|endoftext|>b", allow_special=False)) == 10
    assert EOT not in Tokenizer().encode("a<|endoftext|>b")
    assert Tokenizer().encode(given_text("caf\udcc3\udca9")) == [66, 1878, 2634]
    for bad in ("caf\udce9", "\ud800"):
        with pytest.raises(InputError, match="is not UTF-8"):
            given_text(bad)


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["Ladies and\r\n", "é", "ab" * 300])
def test_wide_encodings_are_refused_in_one_line(tmp_path: Path, coding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(coding))
    if text == "é" and coding == "utf-16-le":  # two bytes, which no rule can tell from other wrong bytes
        pytest.skip("too short")
    with pytest.raises(DataError, match=r"a.txt: .*iconv"):
        list(read_text(tmp_path / "a.txt"))


def test_other_encodings_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"0xe9.* 3 .*iconv"):
        list(read_text(tmp_path / "a.txt"))


def test_rows_of_json_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "a\r\n\r\nb"}, {"text": ""}, {"text": "\ufeffc<|endoftext|>d", "other": 1}]
    file = tmp_path / "a.JSONL"
    file.write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)))
    wanted = [EOT, 64, 198, 198, 65, EOT, EOT, 66, EOT, 67]
    assert tokens_and_labels(file)[0].tolist() == wanted
    pieces = list(encode_file(iter(read_text(file)), str(file)))
    assert np.concatenate(pieces).tolist() == wanted
    other = list(encode_file(['{"body": "a"}'], "-", field="body", eot="none"))
    assert np.concatenate(other).tolist() == [64]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("[1]", r"\[1\].*object"),
        ('{"body": "a", "id": 1}', "'text' .*'body', 'id'.* --field"),
        ('{"text": 5}', "'text' is 5, not a text"),
        ('{"prompt": "a"}', "'text' is missing"),
        ('{"prompt": "a", "completion": null}', "'completion' is None"),
    ],
)
def test_rows_without_a_text_are_refused(line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_documents(['{"text": "a"}\n', line], "x.jsonl"))


def test_prompts_are_not_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "ab ab", "completion": " c"}\n{"text": "d"}\n')
    tokens, labels = tokens_and_labels(file)
    assert tokens.tolist() == [EOT, *Tokenizer().encode("ab ab"), 269, EOT, 67]
    assert labels is not None
    assert labels.tolist() == [EOT, *[-100] * len(Tokenizer().encode("ab ab")), 269, EOT, 67]
    with pytest.raises(DataError, match="prompts and completions"):
        list(encode_file(read_text(file), str(file)))


# ------------------------------------------------------------------------------------------------ numbers

WHOLES = [int, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64, lambda n: np.array(n)]
FLOATS = [float, np.float16, np.float32, np.float64, Fraction, Decimal, lambda x: np.array(x, "f4")]
NOT_WHOLE: list[Any] = [True, np.True_, 1.0, np.float32(1), "1", None, [1], np.array([1]), np.array(True), Decimal(1), 1j]


@pytest.mark.parametrize("kind", WHOLES)
def test_every_whole_number_is_a_whole_number(model: GPT2, tmp_path: Path, kind: Callable[[int], Any]) -> None:
    assert [type(whole(kind(4))), whole(kind(4)), is_whole(kind(4), 4, 4), check_whole("x", kind(4), 0, 9)] == [int, 4, True, 4]
    wanted = list(model.generate([1, 2], max_new_tokens=4))
    assert list(model.generate([kind(1), kind(2)], max_new_tokens=kind(4), slide_to=kind(3), overflow="slide")) == wanted
    assert list(model.generate([1, 2], total=kind(6), stop_token_ids=kind(100))) == wanted
    [done] = model.generate_batch([[1, 2]], max_new_tokens=kind(4), top_logprobs=kind(2), num_return_sequences=kind(1))
    assert (done.tokens, len(done.infos[0].top)) == (wanted, 2)
    same = {tuple(model.generate([1], total=5, top_k=n(9), seed=n(7))) for n in (int, kind)}
    assert len(same) == 1
    cache = model.new_cache(kind(9))
    model.extend(cache, [1, 2, 3])
    assert (cache.copy(kind(2), capacity=kind(4)).length, cache.capacity) == (2, 9)
    cache.truncate(kind(1))
    assert cache.length == 1
    assert pygpt.Config(maxT=kind(8), V=kind(9), L=kind(1), NH=kind(2), C=kind(4)) == pygpt.Config(maxT=8, V=9, L=1, NH=2, C=4)
    loader = DataLoader(np.arange(40), kind(2), kind(3), shuffle_seed=kind(5), V=kind(100))
    json.dumps(loader.state())
    assert [len(part) for part in split(np.arange(40), val_tokens=kind(4))] == [36, 4]
    json.dumps(TrainingOptions(steps=kind(4), warmup=kind(2), accumulate=kind(2)).as_dict())
    with pygpt.ThreadPool(kind(2)) as pool:
        assert pool.nth == 2


@pytest.mark.parametrize("bad", NOT_WHOLE)
def test_nothing_else_is_a_whole_number(model: GPT2, bad: Any) -> None:
    assert whole(bad) is None
    for name in ("total", "max_new_tokens", "top_k", "seed") if bad is not None else ():
        with pytest.raises(InputError, match=f"{name}.*whole number"):
            model.generate([1], **{name: bad})
    with pytest.raises(InputError, match=r"B is .*from 1 to"):
        DataLoader([1, 2], bad, 1)
    with pytest.raises(InputError, match="token id"):
        model.generate([bad])


@pytest.mark.parametrize("kind", FLOATS)
def test_every_number_is_a_number(model: GPT2, kind: Callable[[float], Any]) -> None:
    options = {"temperature": 0.5, "top_p": 0.75, "min_p": 0.125, "repetition_penalty": 1.5}
    wanted = list(model.generate([1, 2], seed=3, **options))  # type: ignore[arg-type]
    assert list(model.generate([1, 2], seed=3, **{name: kind(value) for name, value in options.items()})) == wanted
    assert [len(part) for part in split(np.arange(40), val_fraction=kind(0.25))] == [30, 10]
    assert TrainingOptions(lr=kind(0.5), clip=kind(0.5)).as_dict() == TrainingOptions(lr=0.5, clip=0.5).as_dict()
    assert check_number("x", kind(0.5), 0, 1) == 0.5


@pytest.mark.parametrize("bad", [True, np.True_, np.array([0.5]), np.array(True), "0.5", 1j, [0.5], float("nan")])
def test_nothing_else_is_a_number(bad: Any) -> None:
    assert real(bad) != real(bad)
    with pytest.raises(InputError, match="temperature"):
        Sampler(temperature=bad)
    with pytest.raises(InputError, match=r"lr is .*from 0 to 1"):
        TrainingOptions(lr=bad)


def test_booleans_are_booleans() -> None:
    assert [Sampler(do_sample=yes).name for yes in (np.True_, np.False_)] == ["sample", "greedy"]  # type: ignore[arg-type]
    assert TrainingOptions(decay_matrices_only=np.True_).decay_matrices_only is True  # type: ignore[arg-type]
    for bad in (1, 0, "yes", None, np.int64(1), np.array([True])):
        with pytest.raises(InputError, match=r"x is .*True or False"):
            check_flag("x", bad)


# ------------------------------------------------------------------------------------------------ sequences


@pytest.mark.parametrize("form", [list, tuple, iter, np.array, lambda ids: np.array([ids]), lambda ids: np.array(ids, "u2")])
def test_one_prompt_in_every_form(model: GPT2, form: Callable[[list[int]], Any]) -> None:
    ids = [1, 2, 3]
    assert list(model.generate(form(ids))) == list(model.generate(ids))
    assert np.array_equal(model.logits(form(ids)), model.logits(ids))
    assert np.array_equal(model.extend(model.new_cache(), form(ids)), model.logits(ids)[-1])
    assert sequence(form(ids)) == ids


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (1, 1, 3), (3, 1)])
def test_several_prompts_are_not_one(model: GPT2, shape: tuple[int, ...]) -> None:
    for call in (model.generate, model.logits, lambda ids: model.extend(model.new_cache(), ids)):
        with pytest.raises(InputError, match=r"shape \(.*generate_batch\(\)"):
            call(np.zeros(shape, int))
    assert len(model.generate_batch(np.ones((2, 3), int))) == 2


def test_a_full_context_has_no_room(model: GPT2) -> None:
    for options in ({}, {"max_new_tokens": 1}, {"overflow": "stop"}, {"total": SHAPE.maxT + 1}):
        with pytest.raises(InputError, match=rf"{SHAPE.maxT} tokens.* {SHAPE.maxT}\b"):
            model.generate([1] * SHAPE.maxT, **options)
    with pytest.raises(InputError, match="1 token "):
        split(np.arange(1), val_tokens=1)


# ------------------------------------------------------------------------------------------------ options


def test_unknown_options_name_the_near_ones(model: GPT2) -> None:
    calls: list[Callable[..., Any]] = [
        model.generate,
        lambda ids, **o: model.generate_batch([ids], **o),
        lambda ids, **o: Request(SHAPE, ids, **o),
    ]
    for wrong, right in (("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("topk", "top_k"), ("stop", "stop_")):
        for call in calls:
            with pytest.raises(InputError, match=f"'{wrong}'.*{right}"):
                call([1], **{wrong: 1})
        with pytest.raises(InputError, match=f"'{wrong}'.*{right}"):
            request_from_json(SHAPE, json.dumps({"tokens": [1], wrong: 1}).encode(), {})
    for wrong, right in (("xyzzy", "temperature"), ("max_length", "give total"), ("pad_token_id", "leave"), ("n", "times")):
        with pytest.raises(InputError, match=f"'{wrong}'.*{right}"):
            model.generate([1], **{wrong: 1})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'input_ids'.*: give its input_ids"):
        model.generate({"input_ids": [[1]]})  # type: ignore[dict-item]
    with pytest.raises(InputError, match=r"'model.bin': GPT2.load\(path\)"):
        GPT2("model.bin")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ copies


def test_what_cannot_be_copied_says_what_to_do(path: str, model: GPT2, tmp_path: Path) -> None:
    with (
        pygpt.TrainableGPT2.load(path, threads=1) as engine,
        pygpt.SerialTrainableGPT2.load(path) as serial,
        pygpt.SerialGPT2.load(path) as slow,
    ):
        trainer = pygpt.Trainer(engine, DataLoader(np.arange(50), 1, 4), TrainingOptions(steps=1))
        trainer.save(tmp_path / "s.state")
        state, _ = pygpt.open_state(tmp_path / "s.state")
        with state, open_model(path) as file, pygpt.ThreadPool(1) as pool:
            things = [model, model.network, model.engine(), model.new_prefix_cache(), slow, slow.network, engine, serial]
            for thing in [*things, trainer, state, file, pool]:
                for act in (copy.copy, copy.deepcopy, pickle.dumps):
                    with pytest.raises(TypeError, match=f"{type(thing).__name__}.*pickled: .+"):
                        act(thing)


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_what_can_be_copied_is_independent(tmp_path: Path, act: Callable[[Any], Any]) -> None:
    pygpt.write_tokens(tmp_path / "a.bin", np.arange(50))
    for source in (np.arange(50), str(tmp_path / "a.bin")):
        loader = DataLoader(source, 2, 3, shuffle_seed=1)
        loader.next_batch()
        twin = act(loader)
        loader.next_batch()
        loader.next_batch()
        place = twin.state()
        loader.restore(place)
        assert np.array_equal(twin.next_batch(), loader.next_batch())
    sampler = act(Sampler(temperature=0.5, seed=3))
    assert (sampler.temperature, sampler.seed) == (0.5, 3)
    assert act(Tokenizer()).encode("hello there") == [31373, 612]
    assert act(SHAPE) == SHAPE
    assert act(TrainingOptions(steps=3)) == TrainingOptions(steps=3)


def test_the_serial_cache_is_copied(path: str) -> None:
    with pygpt.SerialGPT2.load(path) as slow:
        cache = slow.network.new_cache()
        slow.network.step([(1, cache, False), (2, cache, True)])
        twin = copy.copy(cache)
        cache.truncate(0)
        assert twin.tokens == [1, 2]


# ------------------------------------------------------------------------------------------------ types

TYPED = """
import numpy as np
from pygpt import GPT2, DataLoader, KVCache, Tokenizer, TrainingOptions, split
def use(model: GPT2, cache: KVCache, ids: "np.typing.NDArray[np.int64]") -> None:
    model.logits(ids); model.prefill(cache, ids); model.extend(cache, ids); model.generate(ids, max_new_tokens=np.int64(4))
    model.generate_batch([ids, [1, 2]], temperature=np.float32(0.5), top_k=np.int32(3), stop_token_ids=np.uint16(4))
    model.step([(ids[0], cache, True)]); cache.truncate(ids[0]); model.new_cache(np.int8(4)); Tokenizer().decode(ids)
    DataLoader(ids, np.int64(1), np.int64(2), V=np.int64(9)); split(ids, val_fraction=np.float32(0.5))
"""


def test_types_accept_arrays(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "c"), "use.py"]
    done = execute(command, cwd=tmp_path, timeout=110)
    assert done.returncode == 0, done.stdout
