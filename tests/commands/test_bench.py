"""Test pygpt bench with prefill, decode and the whole process.

Its numbers agree with each other and with the network's shapes, it times the documented work, and bad input is refused in one
line. No test depends on the machine's speed."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from make_checkpoint import make, tensors
from running import assert_refuses, run

from pygpt import GPT2, Ceilings, KVCache
from pygpt._kernels import probe_dots, probe_fma
from pygpt.commands import quantize
from pygpt.commands.bench import main as bench
from pygpt.commands.bench import tests as bench_tests
from pygpt.network import Network

SHAPE = {"L": 2, "NH": 2, "C": 32, "V": 200, "maxT": 24}
SIZES = ("-p", "5,24", "-n", "3", "-d", "2,7", "-b", "1,8", "-r", "3")
FEW = ("-p", "5", "-n", "3", "-d", "2", "-b", "1,8", "-r", "1")
Result = dict[str, Any]


def bench_run(*arguments: str, cwd: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run("bench", "--limit-megabytes", "4", *arguments, cwd=cwd, **variables)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.bin"
    make(path, **SHAPE)
    return path


@pytest.fixture(scope="module")
def found(path: Path) -> list[Result]:
    """All objects of a run with all options, in the model's folder."""
    done = bench_run("-m", path.name, *SIZES, "--reference", "-o", "json", cwd=path.parent)
    assert (done.returncode, done.stderr) == (0, "")
    objects: list[Result] = json.loads(done.stdout)
    return objects


def test_machine_and_tests_are_named(found: list[Result]) -> None:
    machine, *results = found
    assert machine["test"] == "ceilings"
    assert machine["model"] == {**SHAPE, "version": 3}
    for name in ("read_gb_s", "fma_gflop_s"):
        assert {threads: 0 < rate < math.inf for threads, rate in machine[name].items()} == {"1": True, "2": True}
    own = ["pp5", "pp24", "tg3@d2", "tg3@d2xb8", "tg3@d7", "tg3@d7xb8", "process"]
    assert [(r["test"], r["by"], r["threads"], r["rounds"]) for r in results] == [
        *((name, "pygpt", threads, 3) for threads in (1, 2) for name in own),
        ("tg8@d2", "reference", 1, 3),
        ("tg8@d2", "pygpt", 1, 3),
        ("tg8@d2", "pygpt", 2, 3),
        ("process", "reference", 1, 3),
    ]


def tokens_of(test: str) -> int:
    """Return the number of tokens of a test, by its name."""
    if test == "process":
        return 8
    if test.startswith("pp"):
        return int(test[2:])
    new, _, rest = test[2:].partition("@d")
    return int(new) * int(rest.partition("xb")[2] or 1)


def test_figures_follow_from_each_other(found: list[Result]) -> None:
    machine, *results = found
    by_name = {(r["by"], r["test"], r["threads"]): r for r in results}
    assert len(by_name) == len(results)
    for r in results:
        low, high = r["tokens_per_s_middle_half"]
        assert 0 < low <= r["tokens_per_s"] <= high
        assert r["tokens_per_s"] == pytest.approx(tokens_of(r["test"]) / r["seconds"])
        if r["by"] == "pygpt" and r["threads"] == 2:
            limit = "fma_gflop_s" if r["test"].startswith("pp") else "read_gb_s"
            assert r["speed_up"] == pytest.approx(r["tokens_per_s"] / by_name["pygpt", r["test"], 1]["tokens_per_s"])
            assert r["hardware_speed_up"] == pytest.approx(machine[limit]["2"] / machine[limit]["1"])
            assert r["percent_of_hardware_scaling"] == pytest.approx(100 * r["speed_up"] / r["hardware_speed_up"])
        else:
            assert "speed_up" not in r
        if r["by"] == "pygpt" and r["test"] in ("tg8@d2", "process"):
            ratio = r["tokens_per_s"] / by_name["reference", r["test"], 1]["tokens_per_s"]
            assert r["speed_up_over_reference"] == pytest.approx(ratio)
            assert r["efficiency_over_reference"] == pytest.approx(ratio / r["threads"])
        else:
            assert "speed_up_over_reference" not in r


def test_limits_are_the_networks(found: list[Result]) -> None:
    """The limits count operations of each product, and bytes of each tensor, as documented."""
    machine, *results = found
    C, L, V = SHAPE["C"], SHAPE["L"], SHAPE["V"]
    products = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * L
    weights = sum(tensor.size for name, tensor in tensors(L, C, V, SHAPE["maxT"], 1, 1.0) if name != "wpe")
    for r in results:
        limit = r["percent_of_limit"]
        if r["test"] in ("process", "tg8@d2"):
            assert limit is None
        elif r["test"].startswith("pp"):
            T = tokens_of(r["test"])
            operations = sum(2 * T * N * K for N, K in products) + 2 * V * C - 2 * (T - 1) * 9 * C * C
            operations += (L - 1) * sum(2 * 2 * C * keys for keys in range(1, T + 1)) + 2 * 2 * C * T
            ceiling = machine["fma_gflop_s"][str(r["threads"])]
            assert limit == pytest.approx(100 * operations / r["seconds"] / (1e9 * ceiling))
        else:
            depth, _, batch = r["test"].partition("@d")[2].partition("xb")
            keys = sum(int(depth) + i for i in (1, 2, 3))
            read = 4 * 3 * weights + 4 * int(batch or 1) * 2 * L * C * keys
            ceiling = machine["read_gb_s"][str(r["threads"])]
            assert limit == pytest.approx(100 * read / r["seconds"] / (1e9 * ceiling))


@pytest.mark.parametrize(
    ("target", "options", "weights"),
    [
        ("q8.safetensors", [], "file"),
        ("q4.gguf", ["--format", "q4_0"], "file"),
        ("f32.gguf", ["--format", "f32"], "file,q4_0"),
        ("bf16.safetensors", ["--format", "bf16"], "q8_0"),
    ],
)
def test_every_kind_of_model_and_weights(path: Path, tmp_path: Path, target: str, options: list[str], weights: str) -> None:
    """A limit counts integer operations at the rate of each format, and the bytes of each format."""
    assert quantize.main([*options, str(path), str(tmp_path / target)]) == 0
    done = bench_run("-m", str(tmp_path / target), "--weights", weights, *FEW, "-t", "1", "--reference", "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    machine, *results = json.loads(done.stdout)
    C, L, V = SHAPE["C"], SHAPE["L"], SHAPE["V"]
    assert machine["model"] == {**SHAPE, "version": None}
    assert {r["by"] for r in results} == {
        program if word == "file" else f"{program} {word}" for program in ("pygpt", "reference") for word in weights.split(",")
    }
    rates = {kind: found["1"] for kind, found in machine["dot_gop_s"].items()}
    for r in results:
        kind = r["by"].partition(" ")[2] or (options[-1] if options else "q8_0")
        kind = {"f32": "float32", "bf16": "bfloat16"}.get(kind, kind)
        head = "q8_0" if kind == "q4_0" else kind
        assert r["weights"] == kind
        if r["test"] in ("process", "tg8@d2"):
            assert (r["by"].startswith("reference")) != ("speed_up_over_reference" in r)
        elif r["test"].startswith("pp"):
            T, fma = tokens_of(r["test"]), machine["fma_gflop_s"]["1"]
            products = 24 * T * L * C * C - 18 * (T - 1) * C * C  # the last layer needs only keys and values of T - 1 rows
            pairs = (L - 1) * T * (T + 1) // 2 + T
            least = products / rates.get(kind, fma) + 2 * V * C / rates.get(head, fma) + 4 * C * pairs / fma
            assert r["percent_of_limit"] == pytest.approx(100 * least / r["seconds"] / 1e9)
        else:
            depth, _, batch = r["test"].partition("@d")[2].partition("xb")
            size = {"float32": 4, "bfloat16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
            vectors = (L * 13 * C + 2 * C) * (2 if kind == "bfloat16" and weights == "file" else 4)
            read = size[kind] * 12 * L * C * C + size[head] * C * (V if size[head] >= 2 else (V + 15) // 16 * 16) + vectors
            read = 3 * read + 4 * int(batch or 1) * 2 * L * C * sum(int(depth) + i for i in (1, 2, 3))
            limit = 100 * read / r["seconds"] / (1e9 * machine["read_gb_s"]["1"])
            assert r["percent_of_limit"] == pytest.approx(limit, rel=2e-3)  # scales are padded to 64 bytes


def test_memory_is_of_a_process_of_its_own(found: list[Result]) -> None:
    for r in found[1:]:
        if r["by"] == "reference" or r["test"] in ("process", "tg8@d2"):
            assert r["peak_anon_bytes"] is None
            continue
        tokens = tokens_of(r["test"])
        if r["test"].startswith("tg"):
            depth, _, batch = r["test"].partition("@d")[2].partition("xb")
            tokens = (int(depth) + 3) * int(batch or 1)
        assert r["cache_bytes"] == 2 * 4 * SHAPE["L"] * SHAPE["C"] * tokens
        if sys.platform == "linux":
            assert 0 < r["anon_before_bytes"] <= r["peak_anon_bytes"] < 400e6
            assert 0 < r["mapped_bytes"] < 400e6


def test_ceilings_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement takes two seconds here, and reading in 4 streams takes one. The fastest counts."""
    with Ceilings(2, megabytes=3, stream=True, dots=["q4_0"]) as ceilings:
        assert all(math.isnan(rate) for rate in (ceilings.read_gb_s, ceilings.fma_gflop_s, ceilings.stream_gb_s))
        assert all(math.isnan(ceilings.operations_gop_s(kind)) for kind in ("float32", "q4_0"))

        def seconds(job: Any, before: Any = None) -> float:
            return 1.0 if 4 in getattr(job, "args", ()) else 2.0

        monkeypatch.setattr(ceilings, "_seconds", seconds)
        ceilings.measure(2)
        assert ceilings.read_gb_s == pytest.approx(3 * 2**20 / 1e9)
        assert ceilings.fma_gflop_s == pytest.approx(2 * probe_fma(2_000_000) / 2 / 1e9)
        assert ceilings.operations_gop_s("bfloat16") == ceilings.fma_gflop_s
        assert ceilings.operations_gop_s("q4_0") == pytest.approx(2 * probe_dots("q4_0", 2_000_000) / 2 / 1e9)
        assert ceilings.stream_gb_s == pytest.approx(7 * 4 * (3 * 2**16) / 2 / 1e9)  # 7 values of 4 bytes for each parameter


def test_ceilings_that_are_too_large() -> None:
    for megabytes in (1 << 62, 1 << 45, -1):
        with pytest.raises(MemoryError, match="memory"):
            Ceilings(1, megabytes=megabytes)


def test_it_times_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the rows of each pass through the network, and the lengths of the caches after it."""
    passes: list[dict[int, int]] = []
    caches: dict[int, KVCache] = {}
    step = Network.step

    def spy(self: Network, rows: Any, *rest: Any) -> Any:
        passes.append(dict(Counter(id(cache) for _, cache, _ in rows)))
        caches.update((id(cache), cache) for _, cache, _ in rows)
        return step(self, rows, *rest)

    monkeypatch.setattr(Network, "step", spy)
    with GPT2.load(path, threads=1) as model:
        assert bench_tests.time_prefill(model, 9) > 0
        assert ([list(rows.values()) for rows in passes], [cache.length for cache in caches.values()]) == ([[9]], [9])
        passes.clear()
        caches.clear()
        assert bench_tests.time_decode(model, 4, 3, 2) > 0
        assert [list(rows.values()) for rows in passes] == [[4], [4], [1, 1], [1, 1], [1, 1]]
        assert [cache.length for cache in caches.values()] == [7, 7]
        passes.clear()
        assert bench_tests.time_reference_job(model) > 0
        assert [list(rows.values()) for rows in passes] == [[2], *[[1]] * 7]


def test_csv_and_table(path: Path) -> None:
    common = ("-m", str(path), "-p", "5", "-d", "2", "-n", "1", "-b", "1", "-t", "1", "-r", "1", "--no-memory")
    table = list(csv.DictReader(io.StringIO(bench_run(*common, "-o", "csv", PATH="").stdout)))  # also without git
    assert [row["test"] for row in table] == ["pp5", "tg1@d2", "process"]
    assert all(float(row["tokens_per_s"]) > 0 for row in table)
    lines = bench_run(*common, "--no-process").stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[-4:]] == [
        "| test",
        "|---|---|---|---|---|---|---|---|---|",
        "| pp5",
        "| tg1@d2",
    ]
    assert len({line.count("|") for line in lines[-4:]}) == 1


def test_tests_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    make(path, L=1, NH=1, C=4, V=1, maxT=8)
    done = bench_run(
        "-m", str(path), "-p", "8,9", "-n", "4", "-d", "4,5", "-b", "1", "-t", "1", "-r", "1", "--no-memory", "--reference"
    )
    assert done.returncode == 0
    assert re.fullmatch(r"pygpt: left out, [^\n]* 8 tokens: pp9, tg4@d5, process, the reference\n", done.stderr)
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[-2:]] == ["| pp8", "| tg4@d4"]


def test_a_child_that_fails_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        bench_tests, "time_process", lambda path, *options: subprocess.run([sys.executable, "-c", "exit(3)"], check=True)
    )
    small = ["-p", "5", "-d", "2", "-n", "1", "-b", "1", "-t", "1", "-r", "1", "--no-memory", "--limit-megabytes", "1"]
    assert_refuses(bench.main, capsys, ["-m", str(path), *small], "exit status 3", status=1)


def test_without_git(path: Path) -> None:
    done = bench_run("-m", str(path), *FEW, "-t", "1", "--no-process", "--no-memory", "-o", "json", PATH="")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0]["commit"] == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-p", "0"], "'0'"),
        (["-n", "1,2"], "'1,2'"),
        (["-d", "x"], "'x'"),
        (["-b", ""], "''"),
        (["-t", "257"], "threads is 257"),
        (["-r", "0"], "'0'"),
        (["-o", "yaml"], "'yaml'"),
        (["--weights", "file,q5_0"], "'q5_0' ... file, q8_0, q4_0"),
        (["--train", "--weights", "q8_0"], "--weights ... --train"),
        (["-m", "missing.bin"], "missing.bin: "),
        (["--against", "nobody"], "'nobody'"),
        (["surplus"], "surplus"),
    ],
)
def test_bad_arguments(path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    model = [] if "-m" in arguments else ["-m", str(path)]
    assert_refuses(bench.main, capsys, [*model, *arguments], named)
