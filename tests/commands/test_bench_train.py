"""Test pygpt bench --train: its numbers agree with each other and with the network's shapes.

Losses that differ and bad arguments are refused in one line. No test depends on the machine's speed or needs PyTorch."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import oracle
import oracle_training
import pytest
from make_checkpoint import make, tensors
from running import ROOT, assert_refuses, run

from pygpt import Ceilings, Config, InputError, PyGPTError, TrainableGPT2
from pygpt.commands.bench import main as bench
from pygpt.commands.bench import peers as bench_peers
from pygpt.commands.bench import tests as bench_train
from pygpt.commands.bench.measuring import batch_of

SHAPE = {"L": 2, "NH": 2, "C": 32, "V": 200, "maxT": 24}
CONFIG = Config(**SHAPE)
PARTS = ("forward", "backward", "norm", "update")
Result = dict[str, Any]
NOBODY: Any = None  # replaces training in tests with given iterations


def bench_run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run("bench", "--limit-megabytes", "8", *arguments)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.bin"
    make(path, **SHAPE, peak=1.0)
    return str(path)


@pytest.fixture(scope="module")
def found(path: str) -> list[Result]:
    """All objects of a run: the machine, one thread, two threads, the reference."""
    done = bench_run("--train", "-m", path, "-B", "2", "-T", "8", "-r", "3", "--reference", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    objects: list[Result] = json.loads(done.stdout)
    return objects


@pytest.fixture(scope="module")
def ceilings() -> Iterator[dict[int, Ceilings]]:
    with Ceilings(1, megabytes=4, stream=True) as one, Ceilings(2, megabytes=4, stream=True) as two:
        yield {1: one, 2: two}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def test_machine_and_tests_are_named(found: list[Result]) -> None:
    machine, *results = found
    assert machine["test"] == "ceilings"
    assert machine["model"] == {**SHAPE, "version": 3}
    for name in ("read_gb_s", "fma_gflop_s", "stream_gb_s"):
        assert {threads: 0 < rate < math.inf for threads, rate in machine[name].items()} == {"1": True, "2": True}
    assert [(r["test"], r["by"], r["threads"], r["rounds"]) for r in results] == [
        ("train_b2_t8", "pygpt", 1, 3),
        ("train_b2_t8", "pygpt", 2, 3),
        ("train_b2_t8", "reference", 1, 1),
    ]


def test_figures_follow_from_each_other(found: list[Result]) -> None:
    machine, one, two, reference = found
    for r in (one, two, reference):
        low, high = r["total_ms_middle_half"]
        assert low <= r["total_ms"] <= high
        assert r["seconds"] == pytest.approx(r["total_ms"] / 1e3)
        assert r["tokens_per_s"] == pytest.approx(16 / r["seconds"])
        assert r["tokens_per_s_middle_half"] == pytest.approx([16e3 / high, 16e3 / low])
        for part in PARTS:
            assert 0 < r[f"{part}_ms"] <= high
    assert reference["total_ms"] == pytest.approx(sum(reference[f"{part}_ms"] for part in PARTS))
    for r in (one, two):
        assert r["speed_up_over_reference"] == pytest.approx(reference["total_ms"] / r["total_ms"])
        assert r["efficiency_over_reference"] == pytest.approx(r["speed_up_over_reference"] / r["threads"])
        for part in PARTS:
            assert r[f"{part}_speed_up_over_reference"] == pytest.approx(reference[f"{part}_ms"] / r[f"{part}_ms"])
        seconds = least_seconds(machine, str(r["threads"]))
        for part in PARTS:
            assert r[f"{part}_percent_of_limit"] == pytest.approx(1e5 * seconds[part] / r[f"{part}_ms"])
        assert r["percent_of_limit"] == pytest.approx(1e5 * sum(seconds.values()) / r["total_ms"])
    assert two["speed_up"] == pytest.approx(one["total_ms"] / two["total_ms"])
    assert two["efficiency"] == pytest.approx(two["speed_up"] / 2)
    assert two["backward_speed_up"] == pytest.approx(one["backward_ms"] / two["backward_ms"])
    hardware = sum(least_seconds(machine, "1").values()) / sum(least_seconds(machine, "2").values())
    assert two["hardware_speed_up"] == pytest.approx(hardware)
    assert two["percent_of_hardware_scaling"] == pytest.approx(100 * two["speed_up"] / hardware)
    assert "speed_up" not in one
    assert reference["percent_of_limit"] is None
    assert "forward_percent_of_limit" not in reference


def test_every_field_is_described(found: list[Result]) -> None:
    page = (ROOT / "docs/reference/reports.md").read_text().partition("## pygpt profile")[0]
    shown = {re.sub("^(backward|norm|update)_", "forward_", key) for r in found for key in r}
    assert {key for key in shown - {"forward_ms_middle_half"} if not re.search(rf"\b{key}\b", page)} == set()


def least_seconds(machine: Result, threads: str) -> dict[str, float]:
    """Return the least seconds for the documented operations and bytes, counted product by product."""
    B, T, C, L, V = 2, 8, SHAPE["C"], SHAPE["L"], SHAPE["V"]
    products = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * L + [(V, C)]
    operations = sum(2 * B * T * N * K for N, K in products)
    operations += L * B * sum(2 * 2 * C * keys for keys in range(1, T + 1))  # scores, and the sum of values
    values = sum(tensor.size for _, tensor in tensors(L, C, 256, SHAPE["maxT"], 1, 1.0))  # V padded to 256 rows
    fma, read, stream = (1e9 * machine[name][threads] for name in ("fma_gflop_s", "read_gb_s", "stream_gb_s"))
    return {
        "forward": operations / fma,
        "backward": 2 * operations / fma,
        "norm": 4 * values / read,
        "update": 28 * values / stream,
    }


def test_losses_are_the_networks(found: list[Result], path: str) -> None:
    _, one, two, reference = found
    assert one["losses"] == two["losses"]
    assert len(one["losses"]) == 3
    assert one["losses"][0] > one["losses"][1] > one["losses"][2]
    ids = [(13 + 7919 * i) % SHAPE["V"] for i in range(17)]
    batch = np.array(ids[:16]).reshape(2, 8), np.array(ids[1:]).reshape(2, 8)
    expected = float(oracle_training.losses(oracle.weights(path), CONFIG, *batch).mean())
    assert one["losses"][0] == pytest.approx(expected, rel=1e-5)
    assert reference["losses"] == [pytest.approx(expected, rel=1e-5)]


def test_memory_is_of_a_process_of_its_own(found: list[Result]) -> None:
    _, one, two, reference = found
    values = sum(tensor.size for _, tensor in tensors(SHAPE["L"], SHAPE["C"], 256, SHAPE["maxT"], 1, 1.0))
    for r in (one, two):
        assert r["parameter_bytes"] == 16 * values
        assert 16 * values < r["peak_rss_bytes"] < 400e6
    assert "peak_rss_bytes" not in reference


def test_the_table_and_csv_show_the_same(found: list[Result], path: str, capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_text(found[0], found[1:], bench.TRAINING)
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index("") + 1 :]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[3].startswith(f"| pygpt | 2 | {found[2]['forward_ms']:.4g} | {found[2]['backward_ms']:.4g} | ")
    assert lines[-2:] == [
        "train_b2_t8: medians of 3 iterations after one warm-up iteration.",
        "The reference ran one iteration only.",
    ]
    done = bench_run("--train", "-m", path, "-B", "1", "-T", "1", "-t", "1", "-r", "1", "--no-memory", "-o", "csv")
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert (row["test"], row["by"], row["threads"], row["rounds"]) == ("train_b1_t1", "pygpt", "1", "1")
    assert float(row["total_ms"]) == pytest.approx(sum(float(row[f"{part}_ms"]) for part in PARTS))


def test_medians_and_spread_leave_out_the_first() -> None:
    rows = [(90.0, 90.0, 90.0, 90.0), *((k, 10.0 * k, 0.5, 2.0) for k in (3.0, 1.0, 2.0, 5.0, 4.0))]
    facts = {"losses": [9.0] * 6}
    result = bench_train.Test("train", 1, 6, NOBODY, "pygpt", facts=facts, rounds=[*rows]).result({})
    totals = sorted(1e3 * sum(row) for row in rows[1:])
    assert (result["forward_ms"], result["backward_ms"], result["update_ms"]) == (3e3, 30e3, 2e3)
    assert result["forward_ms_middle_half"] == [2e3, 4e3]
    assert result["total_ms"] == median(totals)
    assert (result["rounds"], result["losses"]) == (5, [9.0, 9.0, 9.0])


def test_generation_is_measured_as_before(path: str) -> None:
    done = bench_run("-m", path, "-p", "4", "-n", "2", "-d", "2", "-b", "2", "-t", "1", "-r", "1", "--no-process", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    machine, prefill, decode = json.loads(done.stdout)
    assert "stream_gb_s" not in machine
    assert [(r["test"], r["by"], r["rounds"]) for r in (prefill, decode)] == [("pp4", "pygpt", 1), ("tg2@d2xb2", "pygpt", 1)]
    cache = 2 * 4 * SHAPE["L"] * SHAPE["C"]
    assert (prefill["cache_bytes"], decode["cache_bytes"]) == (4 * cache, 2 * 4 * cache)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def losses_of(by: str, threads: int, *losses: float) -> Any:
    return bench_train.Test("train", threads, 1, NOBODY, by, facts={"losses": [*losses]})


@pytest.mark.parametrize("theirs", [(9.0, 8.0), (9.0089, 8.0), (9.0, 7.993), (9.0,), (9.0, 8.0, 7.0, 1.0)])
def test_losses_that_agree(theirs: tuple[float, ...]) -> None:
    bench_train.check_losses([losses_of("pygpt", 1, 9.0, 8.0, 7.0, 6.0), losses_of("torch", 2, *theirs)])


@pytest.mark.parametrize(
    ("by", "theirs", "named"),
    [
        ("torch", (9.02,), "iteration 1 .*torch's with 2 threads is 9.02, .* by 0.009$"),
        ("torch", (9.0, 7.99), "iteration 2 .*pygpt's loss with 1 threads is 8.0, .* is 7.99, .* by 0.008$"),
        ("torch", (9.0, math.nan), "iteration 2 .*nan"),
        ("pygpt", (math.nextafter(9.0, 10),), "iteration 1 .* by 0$"),
    ],
)
def test_losses_that_do_not_agree(by: str, theirs: tuple[float, ...], named: str) -> None:
    with pytest.raises(PyGPTError, match=named):
        bench_train.check_losses([losses_of("pygpt", 1, 9.0, 8.0), losses_of(by, 2, *theirs)])


class OtherNetwork:
    """A peer whose losses are too large by the share `off`."""

    off = 0.0

    def __init__(self, name: str, path: str, threads: int) -> None:
        self.name, self.model, self.step = name, TrainableGPT2.load(path, threads=1), 0

    def train(self, inputs: Any, targets: Any, **adamw: float) -> dict[str, float]:
        self.step += 1
        facts = {"losses": [0.0] * (self.step - 1)}
        seconds = bench_train.iterate(self.model, (inputs, targets), facts)
        return {"loss": facts["losses"][-1] * (1 + self.off), **dict(zip(PARTS, seconds, strict=True))}

    def peak_rss_bytes(self) -> int:
        return 123

    def __enter__(self) -> "OtherNetwork":
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()


@pytest.mark.parametrize("off", [0.0, 0.002])
def test_a_peer_takes_its_turns_and_must_train_the_same(off: float, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "Peer", OtherNetwork)
    monkeypatch.setitem(bench_peers.PEERS, "torch", ())
    monkeypatch.setattr(OtherNetwork, "off", off)
    monkeypatch.setattr(bench_train, "memory_of", lambda *_: {"peak_anon_bytes": 5})
    rounds: list[int] = []
    run_rounds = bench.run_rounds
    monkeypatch.setattr(bench, "run_rounds", lambda count, ceilings, _: run_rounds(count, ceilings, rounds.append))

    def measure() -> list[Result]:
        given = ["--train", "-B", "1", "-T", "4", "-r", "4", "--limit-megabytes", "4", "--against", "torch"]
        results: list[Result] = bench.measure(bench.parse(given), path)[1]
        return results

    if off:
        with pytest.raises(PyGPTError, match="losses of iteration 1 differ"):
            measure()
        assert rounds == []
        return
    results = measure()
    assert rounds == [0, 1, 2, 3, 4]
    assert [(r["by"], r["threads"], r["rounds"]) for r in results] == [("pygpt", 1, 4), ("pygpt", 2, 4), ("torch", 2, 4)]
    assert [r.get("peak_anon_bytes") for r in results] == [5, 5, None]
    assert results[2]["peak_rss_bytes"] == 123
    assert len({tuple(r["losses"]) for r in results}) == 1
    bench.scaling(results, {})
    assert "speed_up" not in results[2]


def test_a_peer_that_does_not_train_says_so(path: str) -> None:
    with bench_peers.Peer("numpy", path, 1) as peer:
        with pytest.raises(RuntimeError, match=r"^peer numpy: NotImplementedError: this peer cannot train$"):
            peer.train([[1]], [[2]], lr=1e-4)
        assert peer.prefill(2) > 0


def test_those_that_train_can(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its weights and its pass over a batch, here with stand-ins for the libraries."""
    for package in ("torch", "torch.nn.functional", "transformers"):
        monkeypatch.setitem(sys.modules, package, MagicMock())
    for name in bench_peers.TRAINING:
        engine = bench_peers.ENGINES[name](path, 1)
        assert isinstance(engine, bench_peers.Torch)
        assert isinstance(vars(engine)["trained"], list)
        assert callable(vars(engine)["batch"])


# ---------------------------------------------------------------------------------------------------------------------
# Limits, batches


def test_the_stream_is_measured_only_if_wanted(ceilings: dict[int, Ceilings]) -> None:
    with Ceilings(1, megabytes=4) as plain:
        assert math.isnan(plain.measure(1).stream_gb_s)
        assert 0 < plain.read_gb_s < math.inf
    with Ceilings(2, megabytes=4, stream=True) as fresh:
        assert math.isnan(fresh.stream_gb_s)
        assert 0 < fresh.measure(2).stream_gb_s < math.inf
    with pytest.raises(PyGPTError, match="closed"):
        fresh.measure(1)


def test_limits_are_held_against_the_right_ceiling() -> None:
    ceiling: Any = SimpleNamespace(operations_gop_s={"float32": 2.0}.get, read_gb_s=4.0, stream_gb_s=8.0)
    least = [bench_train.least_seconds(work, ceiling) for work in bench_train.training_work(CONFIG, 1, 1)]
    C, L, V, size = CONFIG.C, CONFIG.L, CONFIG.V, 4 * CONFIG.parameters(padded=True)
    forward = 2 * (12 * L * C * C + V * C) + 4 * L * C  # one token sees one key
    assert least == pytest.approx((forward / 2e9, 2 * forward / 2e9, size / 4e9, 7 * size / 8e9))


def test_a_batch_is_sequences_and_their_next_tokens() -> None:
    inputs, targets = batch_of(CONFIG, 3, 5)
    flat = [token for row in inputs for token in row]
    assert [token for row in targets for token in row][:-1] == flat[1:]
    assert (len(inputs), len(inputs[0])) == (3, 5)
    assert all(0 <= token < SHAPE["V"] for token in flat)
    with pytest.raises(InputError, match=r"^-T is 25: .* 24 tokens$"):
        batch_of(CONFIG, 1, 25)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-B", "2"], "-B ... --train"),
        (["-T", "2"], "-T ... --train"),
        (["--train", "-p", "8"], "-p ... --train"),
        (["--train", "-n", "8"], "-n ... --train"),
        (["--train", "-B", "0"], "'0'"),
        (["--train", "-B", "1,2"], "'1,2'"),
        (["--train", "-T", "25"], "-T is 25 ... 24"),
        (["--train", "-t", "two"], "'two'"),
        (["--train", "-o", "xml"], "'xml'"),
        (["--train", "--against", "numpy"], "'numpy' ... torch, transformers"),
        (["--against", "nunpy"], "'nunpy' ... numpy, torch"),
        (["--train", "-m", "missing.bin"], "missing.bin: "),
        (["--limit-megabytes", "0"], "'0'"),
        (["--what"], "--what"),
    ],
)
def test_bad_arguments(path: str, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    model = [] if "-m" in arguments else ["-m", str(path)]
    assert_refuses(bench.main, capsys, [*model, *arguments], named)
