"""tools/fuzz.py by a planted mistake: the input is saved, and tried again by --input."""

import importlib.util
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import targets_json as targets
from running import execute

FILE = Path(__file__).parents[2] / "tools" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", FILE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_finding_is_saved(
    fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pygpt.formats.llmc.check_size", lambda *_: None)
        with pytest.raises((AssertionError, ValueError)):
            fuzz.try_at_random(fuzz.new_target("shard", tmp_path), Random(1), 100, tmp_path)
    [saved] = tmp_path.glob("shard.*")
    assert fuzz.main(["shard", "--input", str(saved)]) == 0  # the real reader refuses it
    assert capsys.readouterr().out.startswith("refused: ")


def test_without_a_finding(fuzz: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz.try_at_random(fuzz.new_target("examples", tmp_path), Random(1), 0, tmp_path)
    (tmp_path / "other").mkdir()
    fuzz.try_at_random(fuzz.new_target("shard", tmp_path / "other"), Random(1), 1, tmp_path)
    assert "kinds of answers, no finding" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.*"))


def test_every_target_has_a_corpus(fuzz: Any) -> None:
    assert fuzz.names() == sorted(targets.TARGETS)


def test_bad_arguments() -> None:
    for words, text in ((["nothing"], "target 'nothing' is unknown"), (["--input", "x"], "--input needs exactly one TARGET")):
        done = execute([sys.executable, str(FILE), *words], timeout=60)
        assert (done.returncode, text in done.stderr) == (2, True)
