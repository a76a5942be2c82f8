"""Short forms of tools/stress.py: each fault once, some dozen signals at random moments, some seconds of everything at once.
No outcome depends on how fast the machine is; what the long forms need an idle machine for (crowd) is only tried here.
"""

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pygpt

ROOT = Path(pygpt.__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

from stressing import crowd, faults, load, signals, writers  # noqa: E402
from stressing.common import Tally, folder, run  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def files() -> Iterator[writers.Files]:
    with folder() as place, writers.Files(place, few=2) as found:
        yield found


@pytest.fixture(scope="module")
def setting() -> Iterator[signals.Setting]:
    with folder() as place, signals.Setting(place) as found:
        yield found


@pytest.mark.parametrize("scenario", faults.SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_faults(files: writers.Files, scenario: "type[object]") -> None:
    tally = Tally(3)
    scenario(tally, files)  # type: ignore[call-arg]
    assert tally.counts
    assert not tally.failures


def test_signals(setting: signals.Setting) -> None:
    """Every program once under some kind of signal."""
    tally = Tally(4)
    rng = random.Random(4)
    for target in signals.targets(setting):
        signals.one(tally, target, rng.choice(sorted(signals.ALLOWED)), rng)
    for number, writer in enumerate(writers.writers(setting, Path())):
        if writer.name in ("saved models", "training", "download"):
            signals.written(tally, setting, number, "SIGTERM" if writer.name == "training" else "SIGINT", rng)
    assert len(tally.counts) > 6
    assert "training ends with the same bytes" in tally.counts
    assert not tally.failures


@pytest.mark.parametrize("scenario", [signals.forks, signals.ends, signals.clocks])
def test_forks_ends_and_clocks(setting: signals.Setting, scenario: "type[object]") -> None:
    tally = Tally(5)
    scenario(tally, setting)  # type: ignore[call-arg]
    assert tally.counts
    assert not tally.failures


def stress(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tools" / "stress.py"), *words], capture_output=True, text=True, timeout=110
    )


def test_load() -> None:
    """In a process of its own, whose descriptors, threads and memory are its alone."""
    result = stress("load", "--seconds", "3")
    assert (result.returncode, result.stderr) == (0, "")
    for job in ("completions on shared models", "batches", "training steps", "models opened and closed", "interrupted steps"):
        assert job in result.stdout
    assert re.search(r"^ *\d+  in all, 0 failed; 3 seconds, seed 1\n\Z", result.stdout, re.MULTILINE)


def test_load_finds_a_wrong_bit() -> None:
    """The other side of the checks: results that are not the known ones are told."""
    with folder() as place:
        known = load.Known(place)
        work = load.Load(tally := Tally(1), known)
        try:
            for version in (1, 3, 5):
                known.answers[version] = {key: [*ids[:-1], -1] for key, ids in known.answers[version].items()}
                known.logits[version] = known.logits[version] + 1
            for job in (work.generate, work.batch, work.with_prefix, work.grow):
                before = len(tally.failures)
                for seed in range(5):
                    job(random.Random(seed))
                assert len(tally.failures) > before, job
        finally:
            work.close()


def test_a_leak_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(1)
    load.judge(tally, [(1 << 30, 10, 5)] * 10 + [(1 << 31, 10, 5)] * 10)
    assert [failure.split(":")[0] for failure in tally.failures] == ["resident stays"]
    load.judge(tally, [(1 << 30, 10, 5)] * 10 + [(1 << 30, 100, 50)] * 10)
    assert len(tally.failures) == 3


def test_every_writer_is_whole_when_nothing_happens(tmp_path: Path, files: writers.Files) -> None:
    """The other side of the checks: what is whole is found to be, and what is cut off is told."""
    for number in (0, 8, 9, 10):  # a model, llm.c's other files, training, traces
        place = tmp_path / str(number)
        place.mkdir()
        writer = writers.writers(files, place)[number]
        assert run(writer.argv).status == 0
        assert writer.whole(place)
        assert writer.leftovers(place) == []
        for target in writer.targets:
            content = (place / target).read_bytes()
            (place / target).write_bytes(content[: len(content) * 2 // 3])
            if target not in ("m.jsonl", "p.pcf", "p.row", "p.prv"):  # text without a mark at its end
                assert not writer.whole(place), target
            (place / target).write_bytes(content)


def test_a_half_written_file_is_told(tmp_path: Path) -> None:
    writer = writers.Writer("half", ["sh", "-c", f"head -c 2000 /dev/zero > {tmp_path}/m.bin"], ["m.bin"], writers.sound_model)
    assert writer.whole(tmp_path)
    assert run(writer.argv).status == 0
    assert not writer.whole(tmp_path)


@pytest.mark.parametrize("cgroups", [True, False])
def test_crowd_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cgroups: bool) -> None:
    """The tool works, with cgroups and without; its verdict needs a machine that has nothing else to do."""
    if not cgroups:
        monkeypatch.setattr(crowd, "make_cgroup", lambda: None)
    monkeypatch.setattr(crowd, "WORKERS", (1, 8))
    monkeypatch.setattr(crowd, "BUSY", writers.BIG)
    tally = Tally(1)
    crowd.run_crowd(tally, 1, 2)
    assert sum(count for what, count in tally.counts.items() if what.endswith("runs")) == 4 * len(crowd.SETTINGS)
    assert all("of the best" in failure for failure in tally.failures)
    assert "half a processor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: KIND"),
        (["floods"], "KIND is 'floods': it must be one of faults, signals, load, crowd"),
        (["load", "--seconds", "soon"], "--seconds is 'soon': it must be a whole number from 1"),
        (["load", "--seed", "-1"], "--seed"),
        (["faults", "--count", "0"], "--count is '0': it must be a whole number from 1"),
        (["load", "--count", "3"], "--count has no meaning for load"),
    ],
)
def test_bad_arguments(words: list[str], said: str) -> None:
    result = stress(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# A mapped file that is cut short: the handler

SIGBUS_PROGRAM = """
import mmap, os, sys
from pygpt.commands.console import status_of
with open(sys.argv[1], "wb") as file:
    file.write(bytes(8192))
file = open(sys.argv[1], "r+b")
mapped = mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_READ)
def touch():
    os.truncate(sys.argv[1], 0)
    return mapped[5000]
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("status_of(touch)", 1),
        ("status_of(lambda: status_of(touch))", 1),
        ("status_of(lambda: None); touch()", 0),  # the library alone, and a command that is over, leave the signal alone
        ("touch()", 0),
        ("status_of(lambda: os.kill(os.getpid(), 7))", 0),  # not a fault: it has its usual effect, and no explanation
    ],
)
def test_what_sigbus_says(tmp_path: Path, end: str, said: int) -> None:
    end = end.replace("7", str(int(signal.SIGBUS)))
    result = subprocess.run(
        [sys.executable, "-c", f"{SIGBUS_PROGRAM}\n{end}", tmp_path / "file"],
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"} | {"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "")
    assert result.stderr.count("\n") == result.stderr.count("cut short by another process") == said
    assert result.stderr.startswith("pygpt: error: ") == bool(said)


def test_another_handler_comes_after_ours(tmp_path: Path) -> None:
    """What there was before gets the signal once the line is written: faulthandler's traceback, for one."""
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", f"{SIGBUS_PROGRAM}\nstatus_of(touch)", tmp_path / "file"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == -signal.SIGBUS
    assert result.stderr.startswith("pygpt: error: a file in use was cut short")
    assert "Fatal Python error: Bus error" in result.stderr
