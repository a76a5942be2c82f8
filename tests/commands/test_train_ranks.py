"""pygpt train on ranks over MPI: the same files on any number of ranks; failures end all ranks, and name one."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from budget import Budget
from programs import PYTHON, ROOT, Outcome, command, environment, finish, run, sound_training, start, wait_until

from pygpt import Ranks, write_tokens
from pygpt.commands.train.main import Run, Stop, main

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") or ""
pytestmark = pytest.mark.skipif(not MPIEXEC, reason="needs mpiexec and mpi4py: pip install mpi4py mpich")
pytest.importorskip("mpi4py")
# Each MPI's launcher, with the variable that lets mpi4py load that MPI's library. As root, Open MPI asks for a confirmation.
LAUNCHERS = {
    "mpich": [MPIEXEC],
    "openmpi": ["mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-x", "MPI4PY_LIBMPI=libmpi.so.40"],
}

OPTIONS = ["--val-fraction", "0.2", "--shape", "L=2,NH=2,C=64,maxT=16,V=999", "-B", "1", "-T", "16", "--parts", "12"]
OPTIONS += ["--lr", "1e-2", "--clip", "1", "--shuffle"]
REPORTS = ["--steps", "6", "--save-every", "2", "--sample-every", "3", "--sample-tokens", "5", "--val-every", "2"]
REPORTS += ["--val-batches", "5", "-t", "1", "--out", "run"]
# One rank fails at step 3, in the way and on the rank that the first arguments name.
FAULTY = """
import os, sys, time
from pygpt.training.trainer import Trainer
how, rank = sys.argv[1], int(sys.argv[2])
step = Trainer.step
def faulty(self):
    if self.done == 3 and self.ranks.rank == rank:
        exec(how)
    return step(self)
Trainer.step = faulty
from pygpt.__main__ import main
sys.exit(main(sys.argv[3:]))
"""
# Ctrl-C on one rank, as soon as MPI has started and Python handles signals again; the other ranks may still wait in MPI.
EARLY = """
import os, signal, sys
handle = signal.signal
def interrupted(number, handler):
    before = handle(number, handler)
    if before is signal.SIG_DFL and MPI.Is_initialized() and MPI.COMM_WORLD.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGINT)
    return before
from pygpt.training.mpi import MPI
signal.signal = interrupted
from pygpt.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_tokens("data.bin", np.random.default_rng(1).integers(0, 999, 3000))
    return tmp_path


def ranks(count: int, words: Sequence[object], *more: object, mpi: str = "mpich") -> Outcome:
    """Run a command on ranks. more: after a colon, the command of further ranks."""
    return finish(start([*LAUNCHERS[mpi], "-n", count, *words, *more], cwd=os.getcwd(), env=environment()))


def train(*words: object) -> list[str]:
    return command("train", "--data", "data.bin", *OPTIONS, *REPORTS, *words)


def files() -> dict[str, bytes]:
    return {name: Path(name).read_bytes() for name in ("run.bin", "run.state", "run.state.1")}


def lines(outcome: Outcome) -> list[str]:
    return re.sub(r"\(took .*", "", outcome.out.decode()).splitlines()


def logged() -> list[dict[str, float]]:
    """The numbers of the log that every run must have."""
    entries = map(json.loads, Path("run.jsonl").read_text().splitlines())
    return [{name: entry[name] for name in ("step", "loss", "norm", "val_loss") if name in entry} for entry in entries]


def faulty(how: str, rank: int, count: int = 2, *words: object, mpi: str = "mpich") -> Outcome:
    return ranks(count, [PYTHON, "-c", FAULTY, how, rank, *train(*words)[3:]], mpi=mpi)


def test_any_number_of_ranks_writes_the_same_files(folder: Path) -> None:
    alone = run(train("--log", "run.jsonl"), cwd=folder)
    assert alone.status == 0, alone
    expected = files()
    for count, more in ((2, ["-t", 2]), (3, [])):
        found = ranks(count, train("--force", "--log", "run.jsonl", *more))
        assert (found.status, lines(found), files() == expected) == (0, lines(alone), True), found
        assert Path("run.jsonl").read_text().count('"ranks": [[') == 6
        assert found.err.count("saved run.bin") == 1
        assert "processors" in found.err


def test_a_signal_stops_all_ranks_after_one_step_and_any_number_continues(folder: Path) -> None:
    assert run(train(), cwd=folder).status == 0
    expected = files()
    found = faulty("os.kill(os.getpid(), 15)", 1, 3, "--force")
    assert found.status == 143, found
    assert "stopped by SIGTERM after 4 steps; saved" in found.err
    found = ranks(2, command("train", "--resume", "run.state", "-t", 1))
    assert (found.status, Path("run.state").read_bytes() == expected["run.state"]) == (0, True), found


def test_a_signal_while_the_ranks_agree_counts_at_the_next_step() -> None:
    stop = Stop()

    class Late(Ranks):
        def gather(self, value: Any) -> list[Any]:
            stop.signal = stop.signal or signal.SIGTERM  # the others have this rank's value already
            return [value, None]

    run = SimpleNamespace(trainer=SimpleNamespace(ranks=Late()))
    assert [Run.stopped(run, stop) for _ in range(2)] == [False, True]  # type: ignore[arg-type]
    assert stop.signal == signal.SIGTERM


def test_a_vocabulary_of_its_own(folder: Path) -> None:
    Path("my.txt").write_text("to be or not to be\n" * 40)
    words = ["--data", "my.txt", "--chars", "--shape", "L=1,NH=1,C=16,maxT=16", "-B", "1", "-T", "8", "--parts", "2", "-t", "1"]
    for out, count in (("one", 1), ("two", 2)):
        found = ranks(count, command("train", *words, "--steps", "3", "--sample-every", "2", "--out", out))
        assert found.status == 0, found
    for ending in (".bin", ".state", ".tokenizer.json"):
        assert Path(f"one{ending}").read_bytes() == Path(f"two{ending}").read_bytes()


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_right_after_the_start_of_mpi_ends_all_ranks(folder: Path, rank: int) -> None:
    found = ranks(3, [PYTHON, "-c", EARLY, rank, *train("--force")[3:]])
    assert found.status not in (0, -signal.SIGKILL), found
    assert "HANGS" not in found.err, found


@pytest.mark.slow
@pytest.mark.parametrize("mpi", LAUNCHERS)
@pytest.mark.parametrize(("parts", "counts"), [(4, (4, 2)), (6, (3, 6, 2)), (12, (4, 6))])
def test_runs_that_stop_and_continue_on_other_ranks_end_alike(
    folder: Path, mpi: str, parts: int, counts: tuple[int, ...]
) -> None:
    """Also with more ranks than processors. The state holds weights and moments, and the log the losses and norms."""
    if shutil.which(LAUNCHERS[mpi][0]) is None:
        pytest.skip(f"{LAUNCHERS[mpi][0]} is not installed")
    words = ["--parts", parts, "--log", "run.jsonl"]
    assert run(train(*words), cwd=folder).status == 0
    expected = files(), logged()
    for count, other in zip(counts, [*counts[1:], 1], strict=True):
        found = ranks(count, train(*words, "--force"), mpi=mpi)
        assert (found.status, (files(), logged()) == expected) == (0, True), found
        found = faulty("os.kill(os.getpid(), 15)", count - 1, count, *words, "--force", mpi=mpi)
        assert "stopped by SIGTERM after 4 steps; saved" in found.err, found
        more = command("train", "--resume", "run.state", "-t", 1)
        found = ranks(other, more, mpi=mpi) if other > 1 else run(more, cwd=folder)
        assert (found.status, files()["run.state"] == expected[0]["run.state"], logged()) == (0, True, expected[1]), found


def marked(mark: str) -> dict[int, bytes]:
    """The processes with this word in their variables, each with its command."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if mark.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes()
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_signals_at_random_moments(budget: Budget, folder: Path) -> None:
    """To one rank, all ranks, the launcher, or its process group. Then no process is left, every file is complete, and the run
    continues on any number of ranks to the bytes and losses of one that nobody disturbed. Only with MPICH: mpirun of Open MPI
    4.1 sometimes waits forever after ranks of any program were killed."""
    rng, late = budget.random, ["-t", 1, "--timeout", 20]
    first = train("--steps", 150, "--save-every", 7, "--log", "run.jsonl", *late)
    assert run(first, cwd=folder).status == 0
    expected = files()["run.bin"], files()["run.state"], logged()
    for number in budget.rounds():
        for path in folder.glob("run.*"):
            path.unlink()
        for strike in range(5 if budget.long else 1, -1, -1):  # the last run is left alone
            words = command("train", "--resume", "run.state", *late) if list(folder.glob("run.state*")) else [*first, "--force"]
            count, mark = rng.choice((2, 3)), f"{folder}-{number}-{strike}"
            process = start([MPIEXEC, "-n", count, *words], cwd=folder, env=environment(MARK=mark), start_new_session=True)
            detail = f"run {number}: {count} ranks"
            if strike:
                time.sleep(rng.random() * 3)
                target, which = rng.randrange(4), rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
                pids = [pid for pid, argv in marked(mark).items() if argv.startswith(f"{PYTHON}\0-m\0pygpt".encode())]
                chosen = (pids and [rng.choice(pids)], pids, [process.pid], [-process.pid])[target]
                detail += f": {which.name} to {('a rank', 'the ranks', 'the launcher', 'the group')[target]}"
                for pid in chosen:
                    with suppress(ProcessLookupError):
                        os.kill(pid, which)
            outcome = finish(process)
            assert "HANGS" not in outcome.err, (detail, outcome)
            begins = '/__main__.py", line 4,'  # `import signal`: before that, Ctrl-C is Python's
            ours, early = (outcome.err.count(f"{ROOT}/pygpt{place}") for place in ("", begins))
            starting = "KeyboardInterrupt" in outcome.err and ours == early  # Python itself was
            assert starting or "Traceback" not in outcome.err, (detail, outcome)
            assert wait_until(lambda mark=mark: not marked(mark)), (detail, marked(mark))  # type: ignore[misc]
            for path in folder.glob("run.*"):
                if path.suffix == ".tmp":  # of a rank that was killed
                    path.unlink()
                else:
                    sound_training(path)
        assert outcome.status == 0, (detail, outcome)
        assert (files()["run.bin"], files()["run.state"], logged()) == expected, detail


FAULTS = [
    ("os.kill(os.getpid(), 9)", 1, 9, "", []),
    ("os.replace = lambda *names: os.kill(os.getpid(), 9)", 0, 9, "", []),  # in the middle of a save
    ("os.fsync = lambda file: os.kill(os.getpid(), 9)", 0, 9, "", []),
    ("raise ValueError('a bug')", 1, 1, "ValueError: a bug", []),
    ("sys.exit(3)", 1, 1, "", []),
    (
        "from mpi4py import MPI; raise MPI.Exception(16)",
        1,
        1,
        r"pygpt: error: rank 1 on \S+: MPI lost a rank \(\S.*--resume\n",
        [],
    ),
    ("from pygpt import PyGPTError; raise PyGPTError('a failure')", 1, 1, r"pygpt: error: rank 1 on \S+: a failure\n", []),
    ("os.kill(os.getpid(), 19)", 1, 75, r"rank 0 on \S+: .* rank 1 on \S+ for 2 s", ["--timeout", 2]),
    ("time.sleep(1)", 0, 0, "saved run.bin", ["--timeout", 5]),
    ("self.engine.parameters[:] = float('nan')", 1, 1, "error: step 3: .*nan .*epoch 0, shard 0, batch 42", []),
    (
        "share, x = self._shared.share, self.engine.parameters; "
        "self._shared.share = lambda share=share, x=x: (share(), x.__setitem__(9, 1.0))",
        1,
        1,
        r"after step 4, the weights of rank [01] on \S+ differ",
        [],
    ),
    (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, -1))",  # the log has room, the state does not
        0,
        1,
        "contains the run after 2 steps; then .*\n.*: cannot write the training state: File too large\n$",
        [],
    ),
]


@pytest.mark.parametrize(
    ("how", "rank", "status", "words", "options"), FAULTS[:1] + [pytest.param(*f, marks=pytest.mark.slow) for f in FAULTS[1:]]
)
def test_a_failure_of_one_rank_ends_all(
    folder: Path, how: str, rank: int, status: int, words: str, options: list[object]
) -> None:
    begin = time.monotonic()
    found = faulty(how, rank, 2, *options)
    assert found.status == status, found
    assert re.search(words, found.err), found
    assert time.monotonic() - begin < 60
    assert ranks(2, command("train", "--resume", "run.state", "-t", 1)).status == 0
    continued = files()
    assert run(train("--force"), cwd=folder).status == 0
    assert files()["run.bin"] == continued["run.bin"]


@pytest.mark.slow
def test_ranks_that_differ_are_refused_by_name(folder: Path) -> None:
    write_tokens("other.bin", np.random.default_rng(2).integers(0, 999, 3000))
    env = ["env", "PYGPT_ISA=baseline"]
    version = [
        PYTHON,
        "-c",
        "import sys, pygpt; pygpt.__version__ = '9'; from pygpt.__main__ import main; sys.exit(main(sys.argv[1:]))",
    ]
    for second, words in (
        (train("--data", "other.bin"), "rank 1 on .* has training data of SHA-256 "),
        (train("--lr", "1e-3"), "rank 1 on .* has --lr 0.001, rank 0 on .* has 0.01"),
        (train("--seed", "2"), "rank 1 on .* has --seed 2"),
        ([*env, *train()], "rank 1 on .* has fused multiply-add False, rank 0"),
        ([*version, *train()[3:]], "rank 1 on .* has pygpt 9"),
        (train("--data", "none.bin"), "rank 1 on .*none.bin"),
        (train("--parts", "0"), "rank 1 on .*--parts"),
    ):
        found = ranks(1, train(), ":", "-n", 1, *second)
        assert found.status == 2, found
        assert re.search(words, found.err), (words, found)
        assert found.err.count("pygpt: error") == 1, found
        assert not Path("run.state").exists()


def test_ranks_must_divide_the_parts(folder: Path) -> None:
    found = ranks(2, train("--parts", "3"))
    assert (found.status, found.err.count("parts (--parts) is 3: 2 ranks must divide it")) == (2, 1), found


def test_missing_mpi_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "pygpt.training.mpi", None)
    assert main(["--data", "data.bin"]) == 2
    assert re.fullmatch(r"pygpt: error: several ranks were started, .* pip install mpi4py mpich\n", capsys.readouterr().err)


def test_a_launcher_of_another_mpi_is_one_line(folder: Path) -> None:
    """Without the check, each rank would train alone, and all would write the same files."""
    found = run(train("--parts", "2"), cwd=folder, env=environment(OMPI_COMM_WORLD_SIZE="2"))
    assert (found.status, found.err.count("finds only this one: use its launcher")) == (2, 1), found
    assert not Path("run.bin").exists()


def test_the_estimate_adds_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "L=2,NH=2,C=64,maxT=16,V=999", "-B", "2", "-T", "16", "-t", "1"]
    assert main([*shape, "--estimate", "--parts", "12", "--gbit", "1"]) == 0
    table = [[float(word) for word in line.split()] for line in capsys.readouterr().out.splitlines()[5:]]
    assert [row[0] for row in table] == [1, 2, 3, 4, 6, 12]
    P = 64 * (1024 + 16) + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    for ranks_, compute, messages, step, _, speedup, efficiency, _ in table:
        assert messages == pytest.approx(1.1 * 8 * P * 8 * (1 - 1 / ranks_) / 1e9, abs=0.005)
        assert step == pytest.approx(compute + messages, abs=0.011)
        assert efficiency == pytest.approx(speedup / ranks_, abs=0.011)
    for words, named in (
        (["--estimate", "--parts", "4", "--ranks", "3"], "--ranks is 3"),
        (["--estimate", "--gbit", "0"], "--gbit is 0"),
        (["--estimate", "-T", "64"], "-T is 64"),
        (["--ranks", "2", "--data", "data.bin"], "--ranks is for --estimate"),
    ):
        assert main([*shape, *words]) == 2
        assert named in capsys.readouterr().err
