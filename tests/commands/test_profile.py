"""Test pygpt profile: its numbers agree with each other, and with independent parsers of its traces.

Profiling keeps all bits, the report finds artificial slowdowns, and bad arguments are refused in one line. No test depends on
the machine's speed."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make, tensors
from running import PATIENCE, ROOT, assert_refused, assert_refuses, environment, run

from pygpt import GPT2, Ceilings, Config, InputError, Trace, TrainableGPT2, ceilings, cpus
from pygpt.commands import quantize
from pygpt.commands.profile import job, numbers, perf, strategies, text
from pygpt.commands.profile import main as profile
from pygpt.generation.sampling import sample
from pygpt.hub.find import EMBEDDED_MODEL

BEST = cpus.workers_for  # the value outside tests
Report = dict[str, Any]
SMALL = ("-m", EMBEDDED_MODEL, "-t", "2", "--all-workers", "--skip", "all", "--prompt-length", "40", "-n", "5", "-r", "2")
TRAIN = ("--train", "-t", "2", "--all-workers", "--skip", "all", "-B", "2", "-T", "16", "-n", "3", "-r", "2")
CONFIG = Config(maxT=64, V=300, L=2, NH=4, C=64)
STAGES = ("forward", "backward", "norm", "update")


def profiled(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run("profile", *arguments, **variables)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's limits in a moment, without accuracy."""
    monkeypatch.setattr(strategies, "Ceilings", partial(Ceilings, megabytes=8))
    monkeypatch.setattr(ceilings, "FMA_TIMES", 100_000)


def here(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command in this process; return its output."""
    capsys.readouterr()
    assert profile.main(list(arguments)) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def report_of(*arguments: str, **variables: str) -> Report:
    done = profiled(*arguments, "-o", "json", **variables)
    assert done.returncode == 0, done.stderr
    report: Report = json.loads(done.stdout)
    return report


def traced_report(folder: Path, *arguments: str) -> tuple[Report, Path]:
    """Return a report, and the folder of its traces: out.json, out.prv, out.pcf and out.row."""
    return report_of(*arguments, "--trace", str(folder / "out.json"), "--paraver", str(folder / "out")), folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.bin"
    make(path, **{name: getattr(CONFIG, name) for name in ("L", "NH", "C", "V", "maxT")})
    return str(path)


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    return traced_report(tmp_path_factory.mktemp("traces"), *SMALL)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, small: str) -> tuple[Report, Path]:
    return traced_report(tmp_path_factory.mktemp("traces"), *TRAIN, "-m", small)


@pytest.fixture(scope="module")
def speculation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    return traced_report(tmp_path_factory.mktemp("traces"), *SMALL, "--speculate", "3", "--draft-model", "q8_0", "-n", "12")


@pytest.fixture(scope="module", params=["generation", "training", "speculation"])
def traced(request: pytest.FixtureRequest) -> tuple[Report, Path]:
    found: tuple[Report, Path] = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def any_report(traced: tuple[Report, Path]) -> Report:
    return traced[0]


@pytest.fixture(scope="module")
def base(generation: tuple[Report, Path]) -> Report:
    return generation[0]


@pytest.fixture(scope="module")
def trained(training: tuple[Report, Path]) -> Report:
    return training[0]


@pytest.fixture
def model() -> Iterator[GPT2]:
    with GPT2.load(EMBEDDED_MODEL, threads=2, all_workers=True) as model:
        yield model


# ---------------------------------------------------------------------------------------------------------------------
# The numbers agree with each other


def test_rows_add_up_to_the_wall_time(any_report: Report) -> None:
    assert any_report["wall_ns"] == sum(mode["wall_ns"] for mode in any_report["modes"].values())
    for mode, summary in any_report["modes"].items():
        rows = [row for row in any_report["kernels"] if row["mode"] == mode]
        assert sum(row["total_ns"] for row in rows) == pytest.approx(summary["wall_ns"], rel=0.02)
        assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.02)
        assert rows[-1]["cumulative"] == pytest.approx(1, abs=0.02)
        assert [row["total_ns"] for row in rows] == sorted((row["total_ns"] for row in rows), reverse=True)
        for row in rows:
            assert row["total_ns"] == pytest.approx(row["self_ns"] + row["wait_ns"])
            assert row["self_ns"] >= 0, "time outside the kernels is what is left: none may be counted twice"
            assert row["wait_ns"] >= 0
        in_layers = sum(row["total_ns"] for row in summary["layers"])
        assert in_layers == pytest.approx(sum(row["total_ns"] for row in rows if row["kind"] != "outside"))


def test_calls_are_counted(base: Report) -> None:
    calls = {(row["mode"], row["name"]): row["calls"] for row in base["kernels"]}
    for mode, times in (("prefill", 2), ("decode", 10)):  # two rounds of one prompt and five tokens
        assert base["modes"][mode]["calls"] == base["modes"][mode]["steps"] == times
        for name in ("ln1", "qkv", "attention", "attproj", "ln2", "fc", "fcproj"):
            assert calls[mode, name] == times * base["model"]["L"]
        for name in ("encoder", "lnf", "logits", "sampler"):
            assert calls[mode, name] == times


def test_computing_together_by_hand() -> None:
    """The times in which 0, 1 and 2 of two workers compute, with a gap and a wait, which do not count."""
    step = [
        [job.Event("fc", 0, 0, 10, 12), job.Event("fcproj", 0, 12, 20, 25)],
        [job.Event("fc", 0, 4, 6, 12), job.Event("fcproj", 0, 12, 14, 25)],
    ]
    assert numbers.computing(step) == {0: 2, 1: 14, 2: 4}


def test_a_tally_by_hand() -> None:
    """Two instances of a kernel: the first on two workers, where the second is slower, and the second on one worker."""
    tally = numbers.Tally(2)
    tally.add([(0, 10, 20), (1, 30, 0)], 2)
    tally.add([(0, 40, 6)], 2)
    row = tally.row(200)
    assert (row["calls"], row["self_ns"], row["wait_ns"], row["total_ns"]) == (2, 20 + 20, 10 + 3, 53)
    assert (row["median_ns"], row["share"]) == (20, 53 / 200)
    assert row["imbalance"] == (30 + 40) / 40 - 1
    assert row["workers"] == [{"calls": 2, "self_ns": 50, "wait_ns": 26}, {"calls": 1, "self_ns": 30, "wait_ns": 0}]


def test_work_is_the_networks(base: Report) -> None:
    shape = base["model"]
    C, L, V = shape["C"], shape["L"], shape["V"]
    flop = {(row["mode"], row["name"]): row["flop"] for row in base["kernels"]}
    size = {(row["mode"], row["name"]): row["bytes"] for row in base["kernels"]}
    rounds, T = 2, 40
    assert flop["prefill", "qkv"] == rounds * L * 2 * T * C * 3 * C
    assert flop["prefill", "fc"] == rounds * ((L - 1) * T + 1) * 2 * C * 4 * C  # in the last layer, only the last row
    assert flop["decode", "logits"] == rounds * 5 * 2 * V * C
    assert flop["prefill", "attention"] == rounds * 4 * C * ((L - 1) * sum(range(1, T + 1)) + T)
    assert flop["decode", "attention"] == rounds * L * 4 * C * sum(range(T + 1, T + 6))
    weights = 2 * (12 * L * C * C + V * C)
    assert (shape["weights"], shape["head"]) == ("bfloat16", "bfloat16")
    assert weights < shape["weight_bytes"] < 1.05 * weights
    products = sum(size["decode", name] for name in ("qkv", "attproj", "fc", "fcproj", "logits")) / (rounds * 5)
    assert weights <= products <= 1.2 * weights


@pytest.mark.parametrize(("target", "weights"), [("q4.gguf", None), ("q4.safetensors", None), ("f32.gguf", "q8_0")])
def test_every_kind_of_model_and_weights(
    small: str, tmp_path: Path, small_limits: None, capsys: pytest.CaptureFixture[str], target: str, weights: str | None
) -> None:
    path = str(tmp_path / target)
    assert quantize.main(["--format", target.partition(".")[0].replace("q4", "q4_0"), small, path]) == 0
    given = [] if weights is None else ["--weights", weights]
    job_of = ("-t", "2", "--all-workers", "--skip", "scaling,strategies", "--prompt-length", "40", "-n", "5", "-r", "1")
    report = json.loads(here(capsys, "-m", path, *given, *job_of, "-o", "json"))
    kind, C, L, V = weights or "q4_0", CONFIG.C, CONFIG.L, CONFIG.V
    assert (report["model"]["weights"], report["model"]["head"], report["model"]["version"]) == (kind, "q8_0", None)
    assert all(row["dot_gop_s"].keys() == {kind, "q8_0"} for row in report["ceilings"])
    assert report["bits"]["same"]
    size = {(row["mode"], row["name"]): row["bytes"] for row in report["kernels"]}
    assert size["decode", "fc"] == 5 * L * (4 * C * C * (34 if weights else 18) // 32 + 4 * 5 * C)
    assert size["decode", "logits"] == 5 * ((V + 15) // 16 * 16 * C * 34 // 32 + 4 * (V + C))
    assert {row["bound"] for row in report["kernels"] if row["name"] in ("fc", "logits")} <= {"dot", "read"}
    assert len(report["startup"]) == 6
    assert f"{kind} weights" in text.render(report)


def test_times_agree_with_the_time_around_the_calls(model: GPT2) -> None:
    task = job.Generation(list(range(40)), 5)
    task.warm_up(model)
    covered = []
    for _ in range(5):
        begin = time.perf_counter_ns()
        calls, _ = task.run(model, digest=False)
        elapsed = time.perf_counter_ns() - begin
        inside = sum(call.done - call.begin for call in calls)
        assert inside <= elapsed
        covered.append(inside / elapsed)
    assert max(covered) > 0.95


def test_the_schema_is_documented(any_report: Report) -> None:
    def keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    assert any_report["schema"] == 1
    page = (ROOT / "docs/reference/reports.md").read_text().partition("## pygpt profile")[2].partition("## Least work")[0]
    missing = {key for key in keys(any_report) if not re.search(rf"\b{key}\b", page)}
    assert not missing


# ---------------------------------------------------------------------------------------------------------------------
# Traces, read by independent parsers

APART = ("encoder", "wake-up", "dencoder", "norm", "update")  # phases outside the layers and the head
Sums = dict[tuple[int, str], int]  # (worker, phase) -> ns


def sums_of(report: Report, key: str) -> Sums:
    sums: Sums = defaultdict(int)
    for row in report["kernels"]:
        for ith, worker in enumerate(row["workers"]):
            sums[ith, row["name"]] += worker[key]
    return {where: ns for where, ns in sums.items() if ns}


def test_chrome_trace(traced: tuple[Report, Path]) -> None:
    report, folder = traced
    events = json.loads((folder / "out.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks == {0: "worker 0", 1: "worker 1"}
    selves: Sums = defaultdict(int)
    waits: Sums = defaultdict(int)
    outside = {"call": 0, "sampler": 0}
    stages: dict[str, int] = defaultdict(int)
    within = ["call", "stage"] if "train" in report["modes"] else ["call"]
    for tid in tracks:
        open_: list[tuple[int, int, str]] = []  # begin, end, category
        spans = [event for event in events if event["ph"] == "X" and event["tid"] == tid]
        for event in sorted(spans, key=lambda event: (event["ts"], -event["dur"])):
            begin = round(event["ts"] * 1000)
            end = begin + round(event["dur"] * 1000)
            while open_ and open_[-1][1] <= begin:
                open_.pop()
            assert not open_ or end <= open_[-1][1], "an interval ends before what it contains"
            around = [category for _, _, category in open_]
            category = event["cat"]
            if category in ("phase", "wait"):
                assert "phase" not in around
                assert "wait" not in around
                (selves if category == "phase" else waits)[tid, event["args"].get("after", event["name"])] += end - begin
                assert "step" in around
                assert ("layer" in around) == (event["args"].get("after", event["name"]) not in APART)
            elif category == "layer":
                assert around[-1] == "step"
            elif category == "step":
                assert around == (within if tid == 0 else [])
            elif category == "stage":
                assert around == ["call"]
                stages[event["name"]] += end - begin
            else:
                assert around == []
                outside[category] += end - begin
            open_.append((begin, end, category))
    assert selves == sums_of(report, "self_ns")
    assert waits == sums_of(report, "wait_ns")
    assert outside["call"] + outside["sampler"] == report["wall_ns"]
    assert stages == {row["name"]: row["wall_ns"] for mode in report["modes"].values() for row in mode["stages"]}


def parse_pcf(text: str) -> tuple[dict[int, str], dict[int, dict[int, str]]]:
    """Return the names of states, and the names of the values of each event type."""
    states: dict[int, str] = {}
    types: dict[int, dict[int, str]] = {}
    section, current = "", 0
    for line in filter(str.strip, text.splitlines()):
        if re.match(r"[A-Z]", line):
            section = line.split()[0]
        elif section == "STATES":
            number, name = line.split(None, 1)
            states[int(number)] = name
        elif section == "STATES_COLOR":
            assert re.fullmatch(r"\d+\s+\{\d+,\d+,\d+\}", line)
        elif section == "EVENT_TYPE":
            zero, number, _ = line.split(None, 2)
            assert zero == "0"
            current = int(number)
            types[current] = {}
        elif section == "VALUES":
            number, name = line.split(None, 1)
            types[current][int(number)] = name
    return states, types


def test_paraver_trace(traced: tuple[Report, Path]) -> None:
    report, folder = traced
    states, types = parse_pcf((folder / "out.pcf").read_text())
    assert (states[1], states[5]) == ("Running", "Synchronization")
    names = next(values for values in types.values() if "fcproj" in values.values())
    phase_type = next(number for number, values in types.items() if values is names)
    header, *records = (folder / "out.prv").read_text().splitlines()
    found = re.fullmatch(r"#Paraver \(\d\d/\d\d/\d{4} at \d\d:\d\d\):(\d+)_ns:1\(2\):1:1\(2:1\)", header)
    assert found
    end = int(found[1])
    intervals: dict[int, list[tuple[int, int, int]]] = {0: [], 1: []}
    current: dict[int, tuple[int, str]] = {}  # worker -> begin and name of its phase
    selves: Sums = defaultdict(int)
    last = 0
    for record in records:
        kind, *fields = (int(field) for field in record.split(":"))
        cpu, application, task, thread, moment = fields[:5]
        assert (application, task, cpu) == (1, 1, thread)
        assert last <= moment <= end
        last = moment
        if kind == 1:
            assert len(fields) == 7
            assert fields[6] in states
            intervals[thread - 1].append((moment, fields[5], fields[6]))
            continue
        assert kind == 2
        assert len(fields) >= 7
        assert len(fields) % 2 == 1
        for number, value in zip(fields[5::2], fields[6::2], strict=True):
            assert value in types[number]
            if number == phase_type and value:
                assert thread - 1 not in current, "a phase begins before the last one has ended"
                current[thread - 1] = moment, names[value]
            elif number == phase_type:
                begin, name = current.pop(thread - 1)
                selves[thread - 1, name] += moment - begin
    assert not current
    sampler = sum(row["total_ns"] for row in report["kernels"] if row["name"] == "sampler")
    assert selves.pop((0, "sampler"), 0) == sampler
    assert selves == sums_of(report, "self_ns")
    for ith, states_ in intervals.items():
        assert [begin for begin, _, _ in states_] == [0, *(until for _, until, _ in states_[:-1])], "gaps or overlaps"
        assert states_[-1][1] == end
        assert all(begin <= until for begin, until, _ in states_)
        running = sum(until - begin for begin, until, state in states_ if state == 1)
        assert running == sum(ns for (worker, _), ns in selves.items() if worker == ith) + (sampler if ith == 0 else 0)
        waiting = sum(until - begin for begin, until, state in states_ if state == 5)
        assert waiting == sum(ns for (worker, _), ns in sums_of(report, "wait_ns").items() if worker == ith)


def test_paraver_names_every_row(traced: tuple[Report, Path]) -> None:
    blocks = (traced[1] / "out.row").read_text().strip().split("\n\n")
    sizes = {}
    for block in blocks:
        head, *names = block.splitlines()
        level, size = re.fullmatch(r"LEVEL (\w+) SIZE (\d+)", head).groups()  # type: ignore[union-attr]
        assert len(names) == int(size)
        sizes[level] = len(names)
    assert sizes == {"CPU": 2, "NODE": 1, "THREAD": 2}


# ---------------------------------------------------------------------------------------------------------------------
# The same bits


def test_profiling_keeps_all_bits(base: Report, model: GPT2) -> None:
    assert base["bits"]["same"]
    digest = hashlib.blake2b(digest_size=16)
    cache = model.new_cache()
    logits = model.prefill(cache, [(31373 + 7919 * i) % model.config.V for i in range(40)])
    digest.update(logits.data)
    for _ in range(5):
        logits = model.decode(cache, sample("median", logits.reshape(1, -1).data, 0))
        digest.update(logits.data)
    assert base["bits"]["profiled"] == base["bits"]["unprofiled"] == digest.hexdigest()


def test_a_trace_needs_room_for_every_worker(model: GPT2) -> None:
    with pytest.raises(InputError, match=r"1 workers.* 2$"):
        model.record(Trace(1, 8))
    with pytest.raises(InputError, match=r"worker is 2.*0 to 1"):
        Trace(2, 8).events(2)
    for nth, capacity in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(InputError, match="at least 1"):
            Trace(nth, capacity)
    for nth, capacity in ((1 << 60, 1), (1 << 58, 1), (1, 1 << 61), (1, 1 << 62)):  # sizes that wrap around in 64 bits
        with pytest.raises(MemoryError, match="not enough memory"):
            Trace(nth, capacity)


@pytest.mark.parametrize("all_workers", [False, True])
def test_a_step_that_is_too_small_is_one_workers(small: str, monkeypatch: pytest.MonkeyPatch, all_workers: bool) -> None:
    """With all_workers, all workers run it."""
    monkeypatch.setattr(cpus, "workers_for", BEST)
    trace = Trace(2, 64)
    with GPT2.load(small, threads=2, all_workers=all_workers) as model:
        model.record(trace)
        model.decode(model.new_cache(), 1)
    assert [bool(trace.events(ith)) for ith in range(2)] == [True, all_workers]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_serial_time_is_that_of_the_workers_in_use() -> None:
    """With three workers on two processors, two compute: their common time is not serial."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two processors")
    os.sched_setaffinity(0, sorted(allowed)[:2])
    try:
        report = report_of("-t", "3", "--prompt-length", "120", "-n", "1", "-r", "1", "--skip", "all")
    finally:
        os.sched_setaffinity(0, allowed)
    summary = report["modes"]["prefill"]
    assert (summary["workers_used"], summary["amdahl"]["workers"]) == (2, 2)


def test_one_round_a_kernel_gives_the_same_bits(model: GPT2) -> None:
    task = job.Generation(list(range(300, 320)), 3)
    _, together = task.run(model)
    model.fork_join(True)
    _, apart = task.run(model)
    model.fork_join(False)
    assert together == apart == task.run(model)[1]


def test_profiling_training_keeps_all_bits(trained: Report, small: str) -> None:
    bits = hashlib.blake2b(digest_size=16)
    ids = [(13 + 7919 * i) % 300 for i in range(33)]
    with TrainableGPT2.load(small, threads=1) as model:
        for step in (1, 2, 3):
            losses = model.forward(np.array(ids[:32]).reshape(2, 16), np.array(ids[1:]).reshape(2, 16))
            model.backward()
            bits.update(losses.tobytes() + np.float64(model.gradient_norm()).tobytes())
            model.update(lr=1e-4, step=step)
        bits.update(model.parameters.tobytes())
    assert trained["bits"] == {"profiled": bits.hexdigest(), "unprofiled": bits.hexdigest(), "same": True}


# ---------------------------------------------------------------------------------------------------------------------
# Speculation


def test_speculation_keeps_all_bits_and_counts(speculation: tuple[Report, Path]) -> None:
    """The digest is of the logits that chose the tokens, so it is that of plain decoding."""
    report, _ = speculation
    prompt = [(31373 + 7919 * i) % report["model"]["V"] for i in range(40)]
    plain = job.Generation(prompt, 12)
    with plain.open(EMBEDDED_MODEL, 1) as model:
        assert report["bits"] == {"profiled": plain.run(model)[1], "unprofiled": plain.run(model)[1], "same": True}
    found, modes = report["speculation"], report["modes"]
    steps = sum(modes[mode]["calls"] for mode in ("verify", "decode") if mode in modes)
    assert (found["guesses"], found["draft"]) == (3, "q8_0")
    assert found["drafted"] == modes["verify"]["tokens"] - modes["verify"]["calls"]
    assert 0 < found["accepted"] == 2 * 12 - steps  # each step gives its right guesses and one more token
    assert found["acceptance"] == pytest.approx(found["accepted"] / found["drafted"])
    assert found["tokens_per_step"] == pytest.approx(24 / steps)
    assert "SPECULATION" in text.render(report)
    assert max(map(len, text.render(report).splitlines())) <= 100


def test_phases_of_speculation(speculation: tuple[Report, Path]) -> None:
    """A draft has quantised weights, a verification has a row and logits for each guess, and a rollback has no kernels."""
    report, _ = speculation
    modes, shape, found = report["modes"], report["model"], report["speculation"]
    assert modes.keys() - {"decode"} == {"prefill", "draft", "verify", "rollback"}
    flop = {(row["mode"], row["name"]): row["flop"] for row in report["kernels"]}
    size = {(row["mode"], row["name"]): row["bytes"] for row in report["kernels"]}
    C, L, V = shape["C"], shape["L"], shape["V"]
    steps, checked = modes["verify"]["calls"], modes["verify"]["tokens"]
    assert checked == steps + found["drafted"]
    assert flop["verify", "logits"] == 2 * checked * V * C
    assert flop["verify", "fc"] == 2 * checked * L * 4 * C * C
    assert flop["draft", "logits"] == 2 * modes["draft"]["calls"] * V * C
    assert size["draft", "fc"] == modes["draft"]["calls"] * L * (4 * C * C * 34 // 32 + 4 * 5 * C)
    assert size["verify", "fc"] == L * (steps * 4 * C * C * 2 + 4 * 5 * C * checked)
    assert modes["rollback"]["steps"] == modes["rollback"]["flop"] == 0
    wrong = found["drafted"] - found["accepted"]
    assert wrong <= modes["rollback"]["tokens"] <= wrong + modes["draft"]["calls"]  # rows of the draft, and wrong guesses


@pytest.mark.parametrize("draft", ["lookup", "file"])
def test_speculation_with_every_part(small: str, draft: str) -> None:
    """A draft from a file has its own caches; with auto, some steps have guesses and others do not."""
    arguments = [argument if argument != "all" else "ceilings" for argument in SMALL[2:]]
    given = ["--draft-model", small if draft == "file" else draft, "--sampler", "greedy", "--serial-tokens", "1", "-n", "9"]
    report = report_of("-m", small, *arguments, *given, "--speculate", "auto" if draft == "lookup" else "2")
    assert report["bits"]["same"]
    assert report["speculation"]["draft"] == given[1]
    if draft == "file":
        assert report["speculation"]["acceptance"] == 1, "the draft is the model itself"
        assert {"draft_speedup", "verify_ns", "rollback_ns"} <= report["scaling"][0].keys()
    assert max(map(len, text.render(report).splitlines())) <= 100


def test_a_long_prompt_is_one_call(tmp_path: Path) -> None:
    make(tmp_path / "long.bin", L=1, NH=1, C=16, V=90, maxT=700)
    job_of = ("-m", str(tmp_path / "long.bin"), "-t", "1", "--skip", "all", "--prompt-length", "600", "-n", "4", "-r", "1")
    report, plain = report_of(*job_of, "--speculate", "2"), report_of(*job_of)
    for name in ("calls", "steps", "tokens", "flop"):
        assert report["modes"]["prefill"][name] == plain["modes"]["prefill"][name]
    assert report["bits"] == plain["bits"]


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_iterations_are_counted(trained: Report) -> None:
    calls = {row["name"]: row["calls"] for row in trained["kernels"]}
    iterations, L, summary = 2 * 3, trained["model"]["L"], trained["modes"]["train"]
    assert (summary["calls"], summary["steps"], summary["tokens"]) == (iterations, 4 * iterations, 32 * iterations)
    in_layers = ("ln1", "qkv", "attention", "attproj", "ln2", "fc", "fcproj")
    for name in in_layers:
        assert (calls[name], calls[f"d{name}"]) == (iterations * L, iterations * L)
    for name in ("encoder", "lnf", "logits", "loss", "dlogits", "dhead", "dlnf", "dencoder", "norm", "update", "python, pool"):
        assert calls[name] == iterations
    assert calls.keys() - {"wake-up"} == {
        *in_layers, *(f"d{name}" for name in in_layers), "encoder", "lnf", "logits", "loss", "dlogits", "dhead", "dlnf",
        "dencoder", "norm", "update", "python, pool",
    }  # fmt: skip
    assert {row["layer"] for row in summary["layers"]} - {"wake-up"} == {"encoder", "0", "1", "head", "norm", "update"}


def test_stages_are_the_iteration(trained: Report) -> None:
    summary = trained["modes"]["train"]
    assert [row["name"] for row in summary["stages"]] == list(STAGES)
    assert sum(row["wall_ns"] for row in summary["stages"]) == summary["wall_ns"]
    assert sum(row["share"] for row in summary["stages"]) == pytest.approx(1)
    totals = {row["name"]: row["total_ns"] for row in trained["kernels"]}
    walls = {row["name"]: row["wall_ns"] for row in summary["stages"]}
    backward = {name for name in totals if name.startswith("d")}
    assert 0 < sum(totals[name] for name in backward) <= walls["backward"]
    for name in ("norm", "update"):
        assert 0 < totals[name] <= walls[name]
    forward = totals.keys() - backward - {"norm", "update", "wake-up", "python, pool"}
    assert 0 < sum(totals[name] for name in forward) <= walls["forward"]


def test_work_of_training_is_the_networks(trained: Report) -> None:
    shape, iterations, B, T = trained["model"], 6, 2, 16
    C, L, V, R = shape["C"], shape["L"], shape["V"], 32
    flop = {row["name"]: row["flop"] / iterations for row in trained["kernels"]}
    size = {row["name"]: row["bytes"] / iterations for row in trained["kernels"]}
    weights = 12 * L * C * C + V * C
    forward = ("qkv", "attproj", "fc", "fcproj", "logits")
    backward = ("dqkv", "dattproj", "dfc", "dfcproj", "dhead")
    assert sum(flop[name] for name in forward) == 2 * R * weights
    assert sum(flop[name] for name in backward) == 4 * R * weights
    assert flop["attention"] == L * B * 4 * C * sum(range(1, T + 1))
    assert flop["dattention"] == 2 * flop["attention"]
    assert sum(size[name] for name in forward) > 4 * weights
    assert sum(size[name] for name in backward) > 8 * weights
    parameters = sum(tensor.size for _, tensor in tensors(L, C, 384, shape["maxT"], 1, 1.0))  # V padded to 384 rows
    assert (size["norm"], size["update"]) == (4 * parameters, 28 * parameters)


def test_slowness_planted_in_training_is_found(small: str) -> None:
    report = report_of(*TRAIN, "-m", small, "--stretch", "dattention=1000")
    rows = [row for row in report["kernels"] if row["kind"] == "kernel"]
    assert max(rows, key=lambda row: row["self_ns"])["name"] == "dattention"
    assert report["job"]["planted"] == ["dattention takes 1000 times as long"]


@pytest.mark.parametrize("worker", [0, 1])
def test_a_slow_worker_is_imbalance_in_training(small: str, worker: int) -> None:
    done = profiled(*TRAIN, "-m", small, "--stretch", f"{worker}:all=50")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"IMBALANCE: worker (\d) computes", " ".join(done.stdout.split())) == [str(worker)]


def events_of(*phases: tuple[str, int, int]) -> list[Any]:
    return [job.Event(phase, 0, begin, end, end) for phase, begin, end in phases]


def test_a_worker_may_finish_before_worker_0_begins() -> None:
    """Norm and update have no barrier. The pool wakes the other workers first, so worker 0 may begin later."""
    mine = events_of(("norm", 50, 60), ("update", 100, 140))
    theirs = events_of(("norm", 20, 30), ("update", 70, 90))
    calls = [job.Call("train", 0, 1, 0, 150, 150, (5, 10, 65, 150))]
    (call,) = job.assign(calls, [mine, theirs])
    found = [[[event.phase for event in worker] for worker in step] for step in call.steps]
    assert found == [[["wake-up", "norm"], ["norm"]], [["wake-up", "update"], ["update"]]]
    rows = {row["name"]: row for row in numbers.hotspots(CONFIG, {}, [call], 2, None)}
    assert sum(row["total_ns"] for row in rows.values()) == 150
    assert rows["update"]["self_ns"] == (40 + 20) / 2


def test_every_part_of_training(small: str) -> None:
    arguments = [argument if argument != "all" else "ceilings" for argument in TRAIN]
    report = report_of(*arguments, "-m", small, "--serial-tokens", "2")
    ways = {way["name"]: way for way in report["strategies"]["ways"]}
    assert list(ways) == ["serial reference", "one worker", "one round a stage"]
    assert (report["strategies"]["B"], report["strategies"]["T"]) == (1, 2)
    assert report["strategies"]["same_bits"]
    assert report["strategies"]["same_losses"]
    for way in ways.values():
        for name in ("train", *STAGES):
            assert way[f"{name}_speedup"] == pytest.approx(ways["serial reference"][f"{name}_ns"] / way[f"{name}_ns"])
            assert way[f"{name}_efficiency"] == pytest.approx(way[f"{name}_speedup"] / way["threads"])
    alone = next(row for row in report["scaling"] if row["threads"] == 1)
    for row in report["scaling"]:
        for name in ("train", *STAGES):
            assert row[f"{name}_speedup"] == pytest.approx(alone[f"{name}_ns"] / row[f"{name}_ns"])
    f = report["modes"]["train"]["amdahl"]["serial_fraction"]
    for row in report["modes"]["train"]["amdahl"]["predictions"]:
        assert row["amdahl"] == pytest.approx(1 / (f + (1 - f) / row["threads"]))
    assert [row["name"].split()[0] for row in report["startup"]] == ["interpreter", "import", "import", "read", "first", "the"]
    lines = text.render(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert "Bits: all except the reference give the same bits; all end at the same loss." in lines
    assert any(line.startswith("START-UP") for line in lines)


def test_the_roof_of_the_update_is_its_own_traffic() -> None:
    ceiling = {"threads": 2, "fma_gflop_s": 1000.0, "read_gb_s": 10.0, "stream_gb_s": 40.0, "dot_gop_s": {"q8_0": 4000.0}}
    row = numbers.rates("update", 17, 28, 1.0, ceiling)
    assert (row["bound"], row["roof"]) == ("stream", pytest.approx(28 / 40))
    row = numbers.rates("norm", 2, 4, 1.0, ceiling)
    assert (row["bound"], row["roof"]) == ("read", pytest.approx(4 / 10))
    for kind, bound, roof in ("q8_0", "dot", 1 / 2), ("float32", "fma", 2):
        row = numbers.rates("fc", 2000, 1, 1.0, ceiling, kind)
        assert (row["bound"], row["roof"]) == (bound, pytest.approx(roof))
    rows = [
        {"name": "update", "bytes": 28, "self_ns": 1, "kind": "kernel"},
        {"name": "norm", "bytes": 4, "self_ns": 1, "kind": "kernel"},
    ]
    assert numbers.bandwidth_floor(rows, [ceiling]) == pytest.approx(28 / 40 + 4 / 10)


def test_the_text_of_training_fits_and_reads(small: str, small_limits: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument if argument != "all" else "scaling,strategies,serial,startup" for argument in TRAIN]
    found = here(capsys, *arguments, "-m", small, "--by-layer")
    assert max(map(len, found.splitlines())) <= 100
    for title in ("TRAIN", "TRAIN BY LAYER", "SPEED-UP", "NOTES"):
        assert f"\n{title}" in found
    assert "3 iterations of training on 2 x 16 tokens" in found
    assert re.search(r"^ceiling  2 threads: .* AdamW's traffic$", found, re.MULTILINE)
    assert re.search(r"^Stages: forward [\d.]+ ms \([\d.]+%\), backward ", found, re.MULTILINE)
    assert re.search(r"^112 .* prediction only$", found, re.MULTILINE)
    assert re.search(r"^total .* 100.0%", found, re.MULTILINE)


def test_training_overflow_is_reported(small: str) -> None:
    report = report_of(*TRAIN, "-m", small, "--capacity", "50")
    noted = 3 * (14 * 2 + 10)  # iterations of encoder, loss, head, layers, update
    assert report["trace"]["dropped"] == [2 * (noted - 50)] * 2


def test_compare_training(trained: Report, base: Report, tmp_path: Path) -> None:
    moved = json.loads(json.dumps(trained))
    for row in moved["kernels"]:
        if row["name"] == "update":
            row["self_ns"] = 3 * row["self_ns"] + 1e9
    for name, report in (("a", trained), ("b", moved), ("c", base)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    lines = profiled("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")).stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("TRAIN") and "ms an iteration" in line)
    assert lines[at + 2].startswith("update ")
    done = profiled("--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json"))
    assert_refused(done, "a.json ... train", "c.json ... prefill and decode")


# ---------------------------------------------------------------------------------------------------------------------
# Artificial slowdowns


def median_of(model: GPT2, task: Any, planted: list[Any]) -> float:
    """Return the median self time of a call of fc in the prefill."""
    recording = job.record(model, task, 1, planted=planted)
    calls = [call for call in recording.calls if call.mode == "prefill"]
    rows = numbers.hotspots(model.config, model.network.stored, calls, model.threads, None)
    return float(next(row for row in rows if row["name"] == "fc")["median_ns"])


@pytest.mark.parametrize("times", [2.0, 4.0])
def test_a_repeated_kernel_moves_its_own_row(model: GPT2, times: float) -> None:
    task = job.Generation([(7 * i) % model.config.V for i in range(200)], 1)
    ratios = []
    for _ in range(6):  # a shared machine changes its speed: alternate the runs, and try again after a bad minute
        plain, slow = [], []
        for _ in range(9):
            plain.append(median_of(model, task, []))
            slow.append(median_of(model, task, [job.Planted("fc", times, None)]))
        ratios.append(median(slow) / median(plain))
        if ratios[-1] == pytest.approx(times, rel=0.05):
            return
    pytest.fail(f"fc was made {times} times as long, its row moved by {ratios}")


def test_the_planted_bottleneck_is_named() -> None:
    """Compare medians and try again, because a loaded system may delay another kernel for longer than these take."""
    named = []
    for _ in range(6):
        report = report_of(*SMALL, "--stretch", "attproj=1000")
        assert report["job"]["planted"] == ["attproj takes 1000 times as long"]
        kernels = [row for row in report["kernels"] if row["kind"] == "kernel"]
        modes = [[row for row in kernels if row["mode"] == mode] for mode in ("prefill", "decode")]
        named.append([max(rows, key=lambda row: row["median_ns"])["name"] for rows in modes])
        if named[-1] == ["attproj", "attproj"]:
            return
    pytest.fail(f"attproj was made 1000 times as long, the longest were {named}")


@pytest.mark.parametrize("worker", [0, 1])
def test_a_slow_worker_is_imbalance(worker: int) -> None:
    done = profiled(*SMALL, "--stretch", f"{worker}:all=20")
    assert done.returncode == 0, done.stderr
    warnings = re.findall(r"IMBALANCE: worker (\d) computes (\d+)\.\d% longer", " ".join(done.stdout.split()))
    assert [int(name) for name, _ in warnings] == [worker, worker]
    assert all(25 < int(excess) <= 100 for _, excess in warnings)
    assert f"STRETCH  every phase takes 20 times as long on worker {worker}" in done.stdout


def test_overflow_is_reported() -> None:
    arguments = (*SMALL, "--capacity", "50")
    report = report_of(*arguments)
    noted = 7 * report["model"]["L"] + 3
    assert report["trace"]["dropped"] == [2 * (6 * noted - 50)] * 2  # two rounds of six steps
    text = profiled(*arguments).stdout
    assert "WARNING  the trace overflowed" in text
    assert str(2 * (6 * noted - 50)) in text


def test_enough_room_by_default(base: Report) -> None:
    assert base["trace"]["dropped"] == [0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The whole report


def test_every_part(tmp_path: Path) -> None:
    arguments = [argument if argument != "all" else "ceilings" for argument in SMALL]
    report = report_of(*arguments, "--serial-tokens", "2")
    ways = {way["name"]: way for way in report["strategies"]["ways"]}
    assert set(ways) == {"serial reference", "one worker", "one round a kernel", "one round a step"}
    assert report["strategies"]["same_bits"]
    assert report["strategies"]["same_tokens"]
    for way in ways.values():
        for mode in ("prefill", "decode"):
            assert way[f"{mode}_speedup"] == pytest.approx(ways["serial reference"][f"{mode}_ns"] / way[f"{mode}_ns"])
            assert way[f"{mode}_efficiency"] == pytest.approx(way[f"{mode}_speedup"] / way["threads"])
    assert {row["threads"] for row in report["scaling"]} >= {1, 2}
    assert not any(row["prediction"] for row in report["scaling"])
    for summary in report["modes"].values():
        found = summary["amdahl"]
        assert [row["threads"] for row in found["predictions"]] == [2, 4, 8, 16, 112]
        assert all(row["prediction"] for row in found["predictions"])
        f = found["serial_fraction"]
        for row in found["predictions"]:
            assert row["amdahl"] == pytest.approx(1 / (f + (1 - f) / row["threads"]))
    assert [row["name"].split()[0] for row in report["startup"]] == ["interpreter", "import", "import", "map", "first", "the"]
    assert sum(row["minor"] for row in report["startup"]) > 0


def test_the_text_fits_and_reads(small_limits: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument if argument != "all" else "startup" for argument in SMALL]
    found = here(capsys, *arguments, "--by-layer", "--serial-tokens", "1")
    assert max(map(len, found.splitlines())) <= 100
    for title in ("PREFILL", "PREFILL BY LAYER", "DECODE", "DECODE BY LAYER", "SPEED-UP", "STRATEGIES", "NOTES"):
        assert f"\n{title}" in found
    assert re.search(r"^ceiling  2 threads: +\d+ GFLOP/s", found, re.MULTILINE)
    assert re.search(r"^112 .* prediction only$", found, re.MULTILINE)
    totals = re.findall(r"^total .* (\d+\.\d)%", found, re.MULTILINE)
    assert [float(total) for total in totals] == [pytest.approx(100, abs=2)] * 2


def test_compare(base: Report, tmp_path: Path) -> None:
    moved = json.loads(json.dumps(base))
    for row in moved["kernels"]:
        if row["name"] == "fc":
            row["self_ns"] = 3 * row["self_ns"] + 1e9
    (tmp_path / "a.json").write_text(json.dumps(base))
    (tmp_path / "b.json").write_text(json.dumps(moved))
    same = profiled("--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json"))
    assert same.returncode == 0
    assert "WARNING" not in same.stdout
    assert set(re.findall(r"([\d.]+)x", same.stdout)) <= {"1.00"}
    found = profiled("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    lines = found.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for mode in ("PREFILL", "DECODE"):
        at = next(i for i, line in enumerate(lines) if line.startswith(mode))
        assert lines[at + 2].startswith("fc "), "the row that moved most comes first"


def test_compare_shows_the_modes_of_both(base: Report, speculation: tuple[Report, Path], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(base))
    (tmp_path / "b.json").write_text(json.dumps(speculation[0]))
    shown = profiled("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")).stdout
    assert "\nPREFILL" in shown
    assert "VERIFY" not in shown


def test_compare_says_what_else_differs(base: Report, tmp_path: Path) -> None:
    other = json.loads(json.dumps(base))
    other["machine"]["threads"] = 7
    (tmp_path / "a.json").write_text(json.dumps(base))
    (tmp_path / "b.json").write_text(json.dumps(other))
    shown = profiled("--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")).stdout
    assert "WARNING  machine threads: 2 in a, 7 in b" in shown


# ---------------------------------------------------------------------------------------------------------------------
# Optional packages and programs


def test_without_perf(tmp_path: Path) -> None:
    done = profiled(*SMALL, "--sample", PATH=str(tmp_path))
    assert done.returncode == 0
    assert re.fullmatch(r"pygpt: --sample: perf is not installed [^\n]+\n", done.stderr)
    assert "DECODE" in done.stdout


def test_perf_sees_the_kernels() -> None:
    report = report_of(*SMALL[:-2], "-r", "3", "--sample")
    if report["perf"] is None:
        pytest.skip("perf is not here or not permitted")
    names = {row["symbol"] for row in report["perf"]["symbols"]}
    assert any(name.startswith("gemm_") for name in names)
    assert sum(row["share"] for row in report["perf"]["symbols"]) == pytest.approx(1, abs=0.05)
    assert sum(report["perf"]["families"].values()) == pytest.approx(1)
    assert report["perf"]["reported"].keys() == report["perf"]["families"].keys()


def test_perf_report_is_read_by_families() -> None:
    symbols = [
        {"symbol": "gemm", "object": "_kernels.so", "share": 0.6},
        {"symbol": "layernorm", "object": "_kernels.so", "share": 0.2},
        {"symbol": "barrier_wait", "object": "_kernels.so", "share": 0.1},
        {"symbol": "gemm", "object": "other.so", "share": 0.1},
    ]
    assert perf.families(symbols)["products, attention"] == pytest.approx(0.75)
    assert perf.families(symbols)["layernorm"] == pytest.approx(0.25)
    found = {"samples": 9, "symbols": symbols, "families": perf.families(symbols), "reported": perf.families(symbols)}
    lines = text.perf_text({"perf": found}).splitlines()
    assert lines[2].split() == ["gemm", "_kernels.so", "60.0%"]
    assert lines[-1].split()[:3] == ["this", "report", "25.0%"]


def test_without_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    done = profiled(*SMALL, "--plot", str(tmp_path / "pictures"), PYTHONPATH=str(tmp_path))
    assert_refused(done, "matplotlib", "pip install", status=1)


@pytest.mark.parametrize("arguments", [SMALL, (*TRAIN, "-m", "{small}")], ids=["generation", "training"])
def test_pictures(tmp_path: Path, small: str, arguments: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    assert profile.main([*(word.format(small=small) for word in arguments), "--plot", str(tmp_path)]) == 0
    for name in ("hotspots", "timeline", "speedup"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "1", "--prompt-length", "2"], "--prompt-length"),
        (["--tokens", "1,x"], "'x'"),
        (["--tokens", "50257"], "50256"),
        (["--tokens", ""], "--tokens"),
        (["--prompt-length", "0"], "--prompt-length"),
        (["--prompt-length", "257"], "256"),
        (["--prompt-length", "250", "-n", "7"], "256"),
        (["-n", "0"], "-n"),
        (["-n", "-1"], "-n"),
        (["-n", ""], "-n"),
        (["-t", "0"], "-t"),
        (["-t", "two"], "-t"),
        (["-r", "1.5"], "-r"),
        (["-o", "xml"], "xml"),
        (["--sampler", "best"], "best"),
        (["--sampler", ""], "--sampler"),
        (["--trace", "missing/out.json"], "missing/out ... missing"),
        (["--paraver", "missing/out"], "missing/out ... missing"),
        (["--skip", "lunch"], "lunch"),
        (["--stretch", "fc"], "fc"),
        (["--stretch", "fc=0.5"], "fc=0.5"),
        (["--stretch", "fd=2"], "fd"),
        (["--stretch", "2:fc=2"], "worker 2"),
        (["--capacity", "0"], "--capacity"),
        (["-m", "missing.bin"], "missing.bin"),
        (["--compare", "missing.json", "missing.json"], "missing.json"),
        (["--compare", __file__, __file__], "test_profile.py"),
        (["--compare", "{half}", "{half}"], "half.json"),
        (["-B", "2"], "-B ... without --train"),
        (["-T", "2"], "-T ... without --train"),
        (["--train", "--tokens", "1"], "--tokens ... with --train"),
        (["--train", "--prompt-length", "1"], "--prompt-length ... with --train"),
        (["--train", "--sampler", "greedy"], "--sampler ... with --train"),
        (["--train", "-B", "0"], "-B"),
        (["--train", "-T", "257"], "256"),
        (["--train", "-n", "0"], "-n"),
        (["--train", "--stretch", "dfd=2"], "dattention"),
        (["--train", "--speculate", "auto"], "--speculate ... with --train"),
        (["--speculate", "many"], "'many'"),
        (["--speculate", "65"], "speculation is 65"),
        (["--draft-model", "q8_0"], "--draft-model ... without --speculate"),
        (["--speculate", "auto", "--prompt-length", "225"], "prompt-length, -n"),
        (["--what"], "--what"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    half = tmp_path / "half.json"
    half.write_text('{"schema": 1, "modes": {}}')
    arguments = [word.replace("{half}", str(half)) for word in arguments]
    model = [] if "-m" in arguments else ["-m", EMBEDDED_MODEL]
    threads = [] if "-t" in arguments else ["-t", "2"]
    assert_refuses(profile.main, capsys, ["--skip", "ceilings,scaling,strategies,startup", *model, *threads, *arguments], named)


# ---------------------------------------------------------------------------------------------------------------------
# tools/profile.py


def test_the_script_is_the_command(tmp_path: Path) -> None:
    """The script runs from any folder with this checkout's package. Scripts next to it do not hide standard modules."""
    script = [sys.executable, "-W", "error", str(ROOT / "tools" / "profile.py"), "--help"]
    kept = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(script, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, profiled("--help").stdout, "")


def test_the_standard_library_keeps_its_profile() -> None:
    code = (
        "import runpy, sys; sys.path.insert(0, 'tools'); runpy.run_path('tools/profile.py', run_name='tool');"
        "import cProfile, profile; assert hasattr(profile, 'Profile'), profile.__file__"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
