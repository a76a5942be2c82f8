"""Every target of tools/fuzz.py: its valid inputs, the former findings in tests/corpus/, and mutations of both."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mutate
import numpy as np
import parsers
import pytest
import targets
import targets_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_checkpoint import make

CORPUS = Path(__file__).parents[1] / "corpus"
# Examples of slow targets; 200 of the others
FEW = {
    "command": 40,
    "serve": 60,
    "text": 40,
    "state": 100,
    "batch": 30,
    "http": 30,
    "vocabulary": 40,
}  # examples of slow targets; 200 of the others
Sound = dict[str, tuple[targets.Target, list[bytes]]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[targets.Target, list[bytes]]]:
    """Each target, and the inputs to begin with."""
    made: Sound = {}

    def get(name: str) -> tuple[targets.Target, list[bytes]]:
        if name not in made:
            (folder := tmp_path_factory.mktemp(name) / "work").mkdir()
            target = targets_json.TARGETS[name](folder)
            made[name] = target, [*target.seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).iterdir()))]
        return made[name]

    return get


@pytest.mark.parametrize("name", targets_json.TARGETS)
def test_no_finding(sound: Any, name: str) -> None:
    target, inputs = sound(name)
    labels = {target.check(data) for data in inputs}
    if isinstance(target, targets.FileTarget):
        labels |= {target.check(one) for data in target.seeds()[:2] for one in target.neighbours(data)}
    assert len(labels) > 1  # some are taken, some refused


@pytest.mark.parametrize("name", targets_json.TARGETS)
def test_no_finding_among_mutations(sound: Any, name: str) -> None:
    target, inputs = sound(name)

    @settings(max_examples=FEW.get(name, 200), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True), st.integers(1, 3))
    def check(random: Random, times: int) -> None:
        data = random.choice(inputs)
        for _ in range(times):
            data = target.mutate(random, data, random.choice(inputs))
        target.check(data)

    check()


# ------------------------------------------------------------------------------------------------ defects are found


@pytest.mark.parametrize(
    ("name", "replaced", "by"),
    [
        ("checkpoint", "pygpt.formats.checkpoint.file_bytes", lambda config, version: 0),
        ("shard", "pygpt.formats.llmc.check_size", lambda *_: None),
        ("shard", "pygpt.training.data.DataLoader.restore", lambda *_: None),
        ("tokenizer", "pygpt.formats.llmc.check_size", lambda *_: None),
        ("debug-state", "pygpt.formats.llmc.check_ids", lambda *_: None),
        ("examples", "pygpt.formats.llmc.ENDINGS", 5),
        ("state", "pygpt.training.state.TrainingState._check_sum", lambda *_: None),
        ("text", "pygpt.tokenizer.Tokenizer.decode_bytes", lambda *_: b"x"),
        ("safetensors", "pygpt.formats.safetensors.is_whole", lambda *_: True),
        ("gguf", "pygpt.formats.gguf.aligned", lambda size, alignment: size),
        ("panels", "pygpt.formats.panels.ALIGNMENT", 32),
        ("serve", "pygpt.generation.prefix.PrefixCache.best", lambda *_: 1 // 0),
        ("http", "pygpt.generation.prefix.PrefixCache.best", lambda *_: 1 // 0),
        ("batch", "pygpt.commands.batch.keep_answers", lambda *_: 0),
        ("vocabulary", "pygpt.tokenizer._Encoding._merged", lambda *_: []),
    ],
)
def test_a_defect_is_found(sound: Any, monkeypatch: pytest.MonkeyPatch, name: str, replaced: str, by: Any) -> None:
    """With a planted mistake an input of the corpus, or one mutation in a thousand, is a finding."""
    target, inputs = sound(name)
    monkeypatch.setattr(replaced, by)
    random = Random(1)

    def search() -> None:
        for data in inputs:
            target.check(data)
        for _ in range(1000):
            target.check(target.mutate(random, random.choice(inputs), inputs[0]))

    with pytest.raises((AssertionError, ArithmeticError, LookupError, TypeError, ValueError)):
        search()


@pytest.mark.parametrize("version", [1, 3, 5])
def test_the_parser_reads_what_a_third_program_writes(version: int, tmp_path: Path) -> None:
    make(tmp_path / "x.bin", L=2, NH=2, C=4, V=130, maxT=3, version=version)
    data = (tmp_path / "x.bin").read_bytes()
    found = parsers.checkpoint(data)
    assert found is not None
    assert found[:2] == (version, {"maxT": 3, "V": 130, "L": 2, "NH": 2, "C": 4, "Vp": 256})
    assert b"".join(found[2].values()) == data[1024:]
    assert parsers.checkpoint(data[:-1]) is None
    assert parsers.checkpoint(data + b"x") is None


def test_mutations_reach_every_field_and_boundary() -> None:
    random, data = Random(1), bytes(1024)
    found = [mutate.mutate_bytes(random, data, data, fields=8) for _ in range(10_000)]
    numbers = np.array([np.frombuffer(one[:32], "<i4") for one in found if len(one) >= 32])
    for field in range(8):
        assert {-1, 1, 2**31 - 1, -(2**31), 46341} <= set(numbers[:, field].tolist())
    assert len({len(one) for one in found}) > 500
