"""kill -9 while each kind of file is written, and disks that fill up. A file is complete, absent, or the older file, and the
next run ignores remains."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from budget import Budget
from programs import TRAINING, Files, Outcome, Writer, command, environment, finish, run, send, start, wait_until, writers

STEPS = 30  # of a training run that is killed again and again


def test_kill_9_while_writing(budget: Budget, files: Files, tmp_path: Path) -> None:
    for number in budget.rounds():
        kind = budget.random.randrange(len(writers(files, tmp_path)))
        for older in (False, True):
            (place := tmp_path / f"{number}-{kind}-{older}").mkdir()
            killed(writers(files, place)[kind], files, place, budget.random.random(), older=older)
            shutil.rmtree(place)


def killed(writer: Writer, files: Files, place: Path, moment: float, *, older: bool) -> None:
    """Kill a writer at a moment of its writing, 0 to 1, and begin again."""
    if older:
        writer.put_older(files, place)
    process = start(writer.argv)
    wait_until(lambda: process.poll() is not None or writer.begun(place))
    time.sleep(moment * writer.over_s)
    send(process, signal.SIGKILL)
    outcome = finish(process)
    assert writer.whole(place), (writer.name, outcome)
    if older and not writer.fresh:
        assert all((place / target).exists() for target in writer.targets), (writer.name, "an older file is gone")
    left = writer.leftovers(place)
    assert all(map(writer.temporary, left)), (writer.name, left)
    if writer.argv == writer.again and writer.fresh:
        writer.clear(place)
    again = run(writer.again)
    assert again.status == 0, (writer.name, again)
    assert writer.whole(place), writer.name
    assert set(writer.leftovers(place)) <= set(left), (writer.name, writer.leftovers(place))
    assert all((place / target).exists() for target in writer.targets), writer.name


def test_killed_training_ends_with_the_same_bytes(budget: Budget, files: Files, tmp_path: Path) -> None:
    """As a run that nobody disturbed."""
    options = ["--data", files.tokens, "--init", files.small, "--shuffle", "--clip", 1, *TRAINING, "--steps", STEPS]
    (tmp_path / "whole").mkdir()
    outcome = run(command("train", *options, "--out", tmp_path / "whole" / "m.bin"))
    assert outcome.status == 0, outcome
    for number in budget.rounds():
        (place := tmp_path / str(number)).mkdir()
        state = place / "m.state"

        def words(place: Path = place, state: Path = state) -> list[str]:
            if state.exists() or Path(f"{state}.1").exists():
                return command("train", "--resume", state)
            return command("train", *options, "--out", place / "m.bin", "--force")

        for _ in range(8 if budget.long else 1):
            process = start(words())
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(budget.random.random() * 0.1)
            send(process, signal.SIGKILL)
            outcome = finish(process)
            assert outcome.status in (0, -signal.SIGKILL), outcome
        outcome = run(words())
        assert outcome.status == 0, outcome
        for name in ("m.bin", "m.state"):
            assert (place / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------ full disks


def test_disks_that_fill_up(budget: Budget, files: Files, tmp_path: Path) -> None:
    """By a limit of a file's size, and on a small file system where one can be had."""
    for number in budget.rounds():
        kind = budget.random.randrange(len(writers(files, tmp_path)))
        (place := tmp_path / f"{number}-{kind}").mkdir()
        writer = writers(files, place)[kind]
        writer.put_older(files, place)
        size = budget.random.randrange(1000, writer.least)
        uncached = environment(PYTHONDONTWRITEBYTECODE="1")  # Python 3.11 would keep bytecode that the limit cuts off
        outcome = run(writer.argv, preexec_fn=lambda size=size: limit(resource.RLIMIT_FSIZE, size), env=uncached)
        refused(outcome, writer, place)
        if not writer.fresh:
            older = Path(files.small).read_bytes()
            assert all((place / target).read_bytes() == older for target in writer.targets), writer.name
        shutil.rmtree(place)
        with small_disk(tmp_path / f"disk-{number}-{kind}", budget.random.randrange(2, 8) * 4096) as disk:
            if disk is not None:
                writer = writers(files, disk)[kind]
                refused(run(writer.argv), writer, disk)


def refused(outcome: Outcome, writer: Writer, place: Path) -> None:
    """Status 1, one line, nothing half-written, nothing left."""
    assert outcome.status == 1, (writer.name, outcome)
    assert outcome.one_line, (writer.name, outcome)
    assert writer.leftovers(place) == [], writer.name
    assert writer.whole(place), writer.name


def limit(which: int, value: int) -> None:
    """Set a limit of this process. SIGXFSZ is ignored, as Python does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(which, (value, value))


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path | None]:
    """A file system of `size` bytes, where this user may mount one; else None."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


# ------------------------------------------------------------------------------------------------ the other side


@pytest.mark.parametrize(
    "name",
    ["to bfloat16", "training", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llm.c's other files", "traces"))],
)
def test_a_half_written_file_is_found(name: str, files: Files, tmp_path: Path) -> None:
    """Complete files are accepted, and truncated files are reported."""
    [writer] = [writer for writer in writers(files, tmp_path) if writer.name == name]
    assert run(writer.argv).status == 0
    assert writer.whole(tmp_path)
    assert writer.leftovers(tmp_path) == []
    for target in writer.targets:
        content = (tmp_path / target).read_bytes()
        (tmp_path / target).write_bytes(content[: len(content) * 2 // 3])
        if target not in ("m.jsonl", "p.pcf", "p.row", "p.prv"):  # text without a mark at its end
            assert not writer.whole(tmp_path), target
        (tmp_path / target).write_bytes(content)
