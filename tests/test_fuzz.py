"""Every target of tools/fuzz.py for a fixed number of inputs, tests/corpus/ first; and the fuzzer, by planted defects."""

import importlib
import os
import re
import resource
import signal
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import make_checkpoint
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pygpt import Checkpoint, CheckpointError, Config, PyGPTError, Tokenizer, write_checkpoint
from pygpt.formats.checkpoint import StreamedCheckpoint
from pygpt.tokenizer import _load

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
fuzz: Any = importlib.import_module("fuzz")
target: Any = importlib.import_module("fuzzing.target")
mutate: Any = importlib.import_module("fuzzing.mutate")
reference: Any = importlib.import_module("fuzzing.reference")
commands: Any = importlib.import_module("fuzzing.commands")
faults: Any = importlib.import_module("fuzzing.faults")

MUTATED = 120  # inputs beside the stored ones
FEW = {"process": 3, "terminal": 0, "serve": 60, "calls": 80, "text": 60, "train": 30, "eval": 30, "shards": 30}
IN_PROCESS = ["checkpoint", "safetensors", "shard", "tokenizer", "debug-state", "examples", "state", "text", "calls"]


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_no_finding(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = len(fuzz.stored(name)) + len(fuzz.new_target(name, tmp_path).seeds())
    count = first + FEW.get(name, MUTATED)
    with fuzz.Fuzzer(name, 1, 110, tmp_path / "findings") as fuzzer:
        result = fuzzer.run(None, count)
    assert [(found.text, found.path.read_bytes()[:200]) for found in result.findings] == []
    assert result.executions == count
    assert result.corpus >= first


@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(IN_PROCESS), st.randoms(use_true_random=False), st.integers(1, 3))
def test_no_finding_where_hypothesis_chooses(name: str, random: Random, times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "work").mkdir()
        one = fuzz.new_target(name, Path(folder) / "work")
        seeds = one.seeds()
        one.open()
        try:
            data = random.choice(seeds)
            for _ in range(times):
                data = one.mutate(random, data, random.choice(seeds))
            kind, text = target.attempt(one, data)
        finally:
            one.close()
        assert kind != "finding", text


def test_the_corpus_is_small_and_of_known_targets() -> None:
    folders = {path.name for path in fuzz.CORPUS.iterdir()}
    assert folders <= set(fuzz.NAMES)
    files = [path for path in fuzz.CORPUS.rglob("*") if path.is_file()]
    assert len(files) >= 50
    assert sum(path.stat().st_size for path in files) < 400_000


def test_equal_seeds_give_equal_runs(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        with fuzz.Fuzzer("examples", 7, 110, tmp_path) as fuzzer:
            results.append(fuzzer.run(None, 150)._replace(seconds=0.0))
    assert results[0] == results[1]
    assert results[0].executions == 150


# ------------------------------------------------------------------------------------------------ planted defects


class Planted(target.Target):  # type: ignore[misc]
    """Does what a test says."""

    name = "planted"

    def seeds(self) -> list[bytes]:
        return [b"seed"]

    def run(self, data: bytes) -> str:
        if data == b"half":
            (self.folder / "x.0123abcd.tmp").write_bytes(b"")
        if data == b"refused":
            raise CheckpointError(f"{self.folder}/x: magic number 7, expected 20240326: not an llm.c checkpoint")
        if data == b"two lines":
            raise CheckpointError("one\ntwo")
        if data == b"endless":
            raise PyGPTError("x" * 100_000)
        if data == b"other":
            return str(1 // 0)
        if data == b"accepted":
            with target.agreeing(False, "file"):
                pass
        if data == b"sound":
            with target.agreeing(True, "file"):
                raise PyGPTError("no")
        return "label"


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (b"", "ok", "label"),
        (b"refused", "refused", "CheckpointError: /x: magic number _, expected _: not an llm.c checkpoint"),
        (b"half", "finding", "left half-written: ['x.0123abcd.tmp']"),
        (b"two lines", "finding", "not a clear line"),
        (b"endless", "finding", "not a clear line"),
        (b"other", "finding", "ZeroDivisionError"),
        (b"accepted", "finding", "accepted, and it is no sound file"),
        (b"sound", "finding", "a sound file is refused: no"),
    ],
)
def test_an_attempt_judges(data: bytes, kind: str, text: str, tmp_path: Path) -> None:
    found = target.attempt(Planted(tmp_path), data)
    assert found[0] == kind
    assert text in found[1]


CHILD = """
import os, signal, struct, sys, time
print("ready 9", flush=True)
while head := sys.stdin.buffer.read(4):
    data = sys.stdin.buffer.read(struct.unpack("<I", head)[0])
    if data == b"crash": os.kill(os.getpid(), signal.SIGBUS)
    if data == b"leave": print("last words", file=sys.stderr); sys.exit(3)
    if data == b"hang": time.sleep(10000)
    print('["ok", "", []]', flush=True)
"""


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"crash", "signal SIGBUS"), (b"leave", "status 3: last words"), (b"hang", "no end after 3 seconds")],
)
def test_a_child_that_dies_or_hangs_is_a_finding_and_is_replaced(data: bytes, text: str) -> None:
    with fuzz.Child("planted", 110, command=[sys.executable, "-c", CHILD]) as child:
        assert child.attempt(b"x") == ("ok", "", [])
        child._limit = 3 if data == b"hang" else 110
        kind, found, _ = child.attempt(data)
        assert kind == "finding"
        assert text in found
        child._limit = 110
        assert child.attempt(b"x") == ("ok", "", [])


@pytest.mark.parametrize(
    ("status", "err", "text"),
    [
        (3, "", "exit status 3"),
        (0, "pygpt: one\npygpt: two\n", "stderr"),
        (1, "Traceback (most recent call last):\n", "stderr"),
        (2, "", "without an error line"),
        (2, f"pygpt: error: {'x' * 10_000}\n", "characters"),
        (0, "anything\n", "stderr"),
        (2, "pygpt: error: \x1b[31mred\n", "x1b' in it"),
    ],
)
def test_a_command_is_judged(status: int, err: str, text: str) -> None:
    commands.judge(commands.Outcome(2, b"", "pygpt: error: bad\n"), ["x"])
    with pytest.raises(target.Finding, match=text):
        commands.judge(commands.Outcome(status, b"", err), ["x"])


def test_a_command_whose_reader_goes(tmp_path: Path) -> None:
    def endless(_: Any) -> int:
        try:
            while True:
                print("12345", flush=True)
        except BrokenPipeError:
            return 141

    outcome = commands.run_main(endless, [])
    assert outcome.status == 141
    assert outcome.out.startswith(b"12345\n12345\n")


def test_findings_are_saved_once_and_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer = fuzz.Fuzzer("examples", 1, 110, tmp_path)
    for data in (b"one", b"two"):
        fuzzer._save(data, f"the process ended with signal SIGSEGV: {len(data)}")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]
    assert fuzz.main(["examples", "--repeat", str(next(tmp_path.iterdir()))]) == 0  # no finding of the real target


def test_a_status_that_is_not_the_promised_one_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = commands.StatusTarget(tmp_path)
    assert target.attempt(one, b'{"raise": "MemoryError"}') == ("ok", "status 1 pygpt: error: out of memory")
    assert target.attempt(one, b'{"raise": "RuntimeError", "cause": "KeyboardInterrupt"}') == ("ok", "status 130 ")
    assert target.attempt(one, b'{"raise": "ZeroDivisionError"}') == ("ok", "ZeroDivisionError comes out")
    monkeypatch.setattr(commands, "status_of", lambda job: 0)
    kind, text = target.attempt(one, b'{"raise": "InputError", "text": "no"}')
    assert (kind, text) == ("finding", "InputError('no') ends with 0, expected 2")


# ------------------------------------------------------------------------------------------------ a system that fails


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_checkpoint.make(tmp_path / "a.bin", L=1, NH=1, C=2, V=5, maxT=3, version=3)
    return tmp_path / "a.bin"


@pytest.mark.parametrize(
    ("fault", "mapped", "text"),
    [
        (["os.open", 1, "EMFILE"], True, f"cannot open the model file: {os.strerror(24)}"),
        (["read", 1, "EIO"], True, f"cannot map the model file: {os.strerror(5)}"),
        (["read", 1, "half"], True, "shorter than a checkpoint's header"),
        (["mmap", 1, "cut"], True, "cannot map the model file: mmap length is greater than file size"),
        (["fdopen", 1, "cut"], False, "has changed while it was read"),
        (["fdopen", 1, "grow"], False, "has changed while it was read"),
        (["fdopen", 1, "touch"], False, "has changed while it was read"),
    ],
)
def test_a_planned_fault_comes_once(fault: list[Any], mapped: bool, text: str, model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    with faults.failing([fault], tmp_path) as changed:
        with pytest.raises(CheckpointError) as refusal:
            Checkpoint(model, mmap=mapped)
        os.close(os.open(model, os.O_RDONLY))  # not pygpt's own call
        assert changed == ({"a.bin"} if fault[2] in ("cut", "grow", "touch") else set())
        model.write_bytes(whole)
        Checkpoint(model, mmap=mapped).close()
    assert text in str(refusal.value)


def test_the_number_says_which_call(model: Path, tmp_path: Path) -> None:
    with faults.failing([["mmap", 3, "ENOMEM"], ["os.open", 3, "interrupt"], ["os.open", 4, "memory"]], tmp_path):
        Checkpoint(model).close()
        with StreamedCheckpoint(model) as found:  # the header is the second map
            with pytest.raises(MemoryError, match="no room in memory"):
                found.tensor("wte")
            assert found.tensor("wte").shape == (5, 2)
        with pytest.raises(KeyboardInterrupt):
            Checkpoint(model)
        with pytest.raises(MemoryError):
            Checkpoint(model)
        Checkpoint(model).close()


def test_a_file_that_is_mapped_is_not_cut(model: Path, tmp_path: Path) -> None:
    size = model.stat().st_size
    with faults.failing([["read", 2, "cut"]], tmp_path) as changed, Checkpoint(model), Checkpoint(model):
        assert (changed, model.stat().st_size) == (set(), size)


def test_files_elsewhere_stay(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with faults.failing([["read", 1, "cut"], ["read", 2, "remove"]], tmp_path / "other") as changed:
        Checkpoint(model).close()
        Checkpoint(model).close()
    assert changed == set()


def test_a_disk_that_takes_no_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    config = Config(maxT=3, V=5, L=1, NH=1, C=2)
    values = {name: np.zeros(shape, np.float32) for name, shape, _, _ in config.tensors(padded=False)}
    with faults.failing([["limit", 1500, ""]], tmp_path):
        with pytest.raises(OSError, match=os.strerror(27)):  # EFBIG
            write_checkpoint(tmp_path / "b.bin", config, values)
        assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    for call in ("os.open", "replace"):  # a temporary file of this name, and a folder of the file's own, are there
        with faults.failing([[call, 1, "EEXIST"]], tmp_path), pytest.raises(FileExistsError):
            write_checkpoint(tmp_path / "b.bin", config, values)
        assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "b.bin", config, values)
    assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]


def test_a_vocabulary_of_which_half_is_there(tmp_path: Path) -> None:
    _load.cache_clear()
    with faults.failing([["open", 1, "half"], ["open", 2, "ENOENT"]], tmp_path):
        with pytest.raises(PyGPTError, match="vocabulary is damaged"):
            Tokenizer()
        with pytest.raises(PyGPTError, match="cannot read GPT-2's vocabulary: No such file"):
            Tokenizer()
    assert Tokenizer().encode("hello there") == [31373, 612]


def test_another_system_and_a_package_that_is_missing(model: Path, tmp_path: Path) -> None:
    before = sys.platform
    with faults.failing([["system", 0, "freebsd14"], ["import", 1, "ENOENT"]], tmp_path):
        assert sys.platform == "freebsd14"
        import json  # noqa: F401 - not pygpt's own

        with Checkpoint(model) as found, pytest.raises(ModuleNotFoundError, match="numpy"):
            found.tensor("wte")
    assert sys.platform == before


@pytest.mark.parametrize("plan", [None, {}, 7, [1], [[]], [["x", 1, "EIO"]], [["limit", -1, ""]], [["system", 0, "dos"]]])
def test_no_plan(plan: object, model: Path, tmp_path: Path) -> None:
    functions = [getattr(owner, name) for owner, name in faults.CALLS.values()]
    with faults.failing(plan, tmp_path) as changed:
        Checkpoint(model, mmap=False).close()
    assert changed == set()
    assert [getattr(owner, name) for owner, name in faults.CALLS.values()] == functions


@settings(deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_fault_is_one_that_is_known(random: Random) -> None:
    call, number, how = faults.draw(random)
    assert call in {*faults.CALLS, "limit", "system"}
    assert number >= 0
    assert how in {*faults.ERRORS, *faults.HOWS, *faults.SYSTEMS, ""}


@pytest.mark.parametrize("name", ["convert"])
def test_mutations_of_several_files_reach_each(name: str, tmp_path: Path) -> None:
    random, one = Random(1), fuzz.new_target(name, tmp_path)
    seeds = [data for data in one.seeds() if b"faults" not in data]
    data = max(seeds, key=lambda data: len(target.unpack(data)))
    files, changed, gone = target.unpack(data), set(), set()
    for _ in range(2000):
        found = target.unpack(one.mutate(random, data, random.choice(seeds)))
        changed |= {file for file, content in found.items() if files.get(file) != content}
        gone |= files.keys() - found.keys()
    assert changed >= {*files, "faults"}
    assert gone == set(files)
    assert one.mutate(random, b"nonsense", data) == data


# ------------------------------------------------------------------------------------------------ its parts


@pytest.mark.parametrize("version", [1, 3, 5])
def test_the_second_parser_reads_what_the_third_program_writes(version: int, tmp_path: Path) -> None:
    make_checkpoint.make(tmp_path / "x.bin", L=2, NH=2, C=4, V=130, maxT=3, version=version)
    data = (tmp_path / "x.bin").read_bytes()
    found = reference.checkpoint(data)
    assert found is not None
    assert found[:2] == (version, {"maxT": 3, "V": 130, "L": 2, "NH": 2, "C": 4, "Vp": 256})
    assert b"".join(found[2].values()) == data[1024:]
    assert reference.checkpoint(data[:-1]) is None
    assert reference.checkpoint(data + b"x") is None


@settings(deadline=None)
@given(st.binary(max_size=400), st.binary(max_size=400), st.randoms(use_true_random=False))
def test_mutations_of_any_bytes(data: bytes, other: bytes, random: Random) -> None:
    assert isinstance(mutate.mutate_bytes(random, data, other), bytes)
    assert isinstance(mutate.mutate_json_text(random, data, other), bytes)


def test_mutations_reach_every_field_and_boundary() -> None:
    random, data = Random(1), bytes(1024)
    found = [mutate.mutate_bytes(random, data, data, fields=8) for _ in range(20_000)]
    numbers = np.array([np.frombuffer(one[:32], "<i4") for one in found if len(one) >= 32])
    for field in range(8):
        assert {-1, 1, 2**31 - 1, -(2**31), 46341} <= set(numbers[:, field].tolist())
    assert len({len(one) for one in found}) > 500


def test_several_files_in_one_input() -> None:
    files = {"a.json": b"{}", "b-1.safetensors": b"\x00\n7 x\n", "empty": b""}
    assert target.unpack(target.pack(files)) == files
    assert target.unpack(b"nonsense") == {}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "target 'nothing' is unknown"),
        (["--seconds", "1", "--executions", "1"], "--seconds and --executions were both given"),
        (["--seconds", "1", "--total-seconds", "1"], "--seconds and --total-seconds were both given"),
        (["--total-seconds", "x"], "--total-seconds is 'x'"),
        (["--executions", "x"], "--executions is 'x'"),
        (["--coverage-min", "95%"], "--coverage-min is '95%'"),
        (["--coverage-min", "101"], "--coverage-min is 101: it must be 100 or less"),
        (["--repeat", "nothing"], "take one TARGET"),
        (["shard", "--repeat", "nothing"], "cannot read it"),
    ],
)
def test_bad_arguments(arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert text in err


def test_the_command_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fuzz.Child, "attempt", lambda self, data: fuzz.Reply("finding" if data[:1] != b"\x00" else "ok", "what", [])
    )
    monkeypatch.setattr(fuzz.Child, "end", lambda self: None)
    assert fuzz.main(["shard", "--executions", "9", "--seed", "5", "-o", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^shard +\d+ executions  seed 5  corpus +\d+  new behaviours +\d+  findings 1", out)
    assert re.search(r"\nin all: 1 targets, \d+ executions, seed 5, \d+ seconds, findings 1\n$", out)
    path = Path(out.split("--repeat ")[1].split()[0])
    assert path.parent == tmp_path
    assert path.read_bytes()[:4] == (20240520).to_bytes(4, "little")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_command_measures_branches(capsys: pytest.CaptureFixture[str]) -> None:
    """One target reaches all of one reader, and not all of the others."""
    pytest.importorskip("coverage")
    assert fuzz.main(["cli", "--executions", "1", "--coverage"]) == 0
    out = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if " % " in f"{line} "}
    assert table["stop"][1] == "0.0"
    assert float(table["cli"][1]) > 50
    assert re.search(r"findings 0, \d+\.\d % of the readers' branches, 0\.0 % of the lowest one's\n$", out)
    assert fuzz.main(["cli", "--executions", "1", "--coverage-min", "95"]) == 1
    assert "pygpt: error: stop: 0.0 % of its branches are taken, fewer than 95 %\n" in capsys.readouterr().err


@pytest.mark.parametrize(("taken", "least", "status"), [(19, 95, 0), (19, 96, 1), (0, 0, 0)])
def test_the_least_share_of_branches(taken: int, least: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"cli": fuzz.Branches(taken, 20, "1->2 3->-"), "stop": fuzz.Branches(0, 0, "")}
    text, found_status = fuzz.report_coverage(found, least)
    assert found_status == status
    assert text == f", {5 * taken:.1f} % of the readers' branches, {5 * taken:.1f} % of the lowest one's"
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [f"cli{20:24} {5 * taken:6.1f} %  1->2 3->-", f"stop{0:23} {100:6.1f} %"]
    assert err == ("" if status == 0 else f"pygpt: error: cli: 95.0 % of its branches are taken, fewer than {least} %\n")


def test_coverage_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "coverage", None)
    assert fuzz.main(["cli", "--coverage"]) == 2
    assert "--coverage needs the package coverage: python -m pip install coverage" in capsys.readouterr().err
