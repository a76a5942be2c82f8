"""NEON gives the same bits as the x86-64 sets with FMA. Every kernel is cross-compiled for aarch64 and runs in an emulator.

AMX runs in emulated_amx.h, plain C in place of its few instructions. The kernels are compiled here, so this is also where
the format of docs/add-a-weight-format.md is added and tried.

Needs an x86-64 machine with FMA and a C compiler, for NEON also Debian's gcc-aarch64-linux-gnu and qemu-user. Elsewhere the
tests are skipped."""

import ast
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from running import execute

from pygpt import cpu_info

ROOT = Path(__file__).resolve().parents[2]
FUSED = [isa for isa in cpu_info()["available"] if isa != "baseline"]
TILED = ["micro_avx512", "quantised_avx512vnni"]  # the sources with AMX
NATIVE, CROSS = shutil.which("cc") or shutil.which("gcc"), shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.slow,  # compiles every kernel: .ci/run does it
    pytest.mark.skipif(platform.machine() != "x86_64" or not FUSED, reason="needs an x86-64 machine with FMA to compare with"),
    pytest.mark.skipif(not NATIVE, reason="needs a C compiler"),
    pytest.mark.timeout(900),
]
SOURCES = ROOT / "pygpt" / "csrc"


def build(folder: Path, csrc: Path = SOURCES, *, cross: bool = False) -> list[str]:
    """Compile the harness with the kernels of every set and the flags of setup.py, files side by side. Return its command."""
    found = re.search(r"^FLAGS = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert found
    compiler = CROSS if cross else NATIVE
    assert compiler
    flags = [*ast.literal_eval(found[1]), "-I", str(csrc)]
    objects = folder / ("cross" if cross else "native")
    objects.mkdir()

    def compiled(source: Path) -> str:
        target = str(objects / f"{source.stem}.o")
        emulated = ["-include", str(ROOT / "tests" / "emulated_amx.h")] if source.stem in TILED else []
        run([compiler, *flags, *emulated, "-c", str(source), "-o", target])
        return target

    sources = [*csrc.glob("micro_*.c"), *csrc.glob("quantised_*.c"), ROOT / "tests" / "neon_harness.c"]
    with ThreadPoolExecutor() as jobs:
        run([compiler, *["-static"] * cross, *jobs.map(compiled, sources), "-lm", "-o", str(objects / "harness")])
    return [*[EMULATOR] * cross, str(objects / "harness")] if EMULATOR else [str(objects / "harness")]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = execute(command, timeout=200)
    assert done.returncode == 0, done.stderr
    return done


def results(program: list[str], isa: str) -> dict[str, str]:
    """Run a set's kernels: the hash of each case."""
    done = run([*program, isa])
    assert done.stderr == f"{isa}\n"
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build(tmp_path_factory.mktemp("native"))


@pytest.mark.skipif(not CROSS, reason="needs aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu)")
@pytest.mark.skipif(not EMULATOR, reason="needs qemu-aarch64 (Debian: qemu-user)")
def test_neon_gives_the_same_bits(tmp_path: Path, native: list[str]) -> None:
    cross = build(tmp_path, cross=True)
    neon = results(cross, "neon")
    kernels = {name.split()[0] for name in neon}
    assert kernels >= {
        "gemm",
        "product",
        "outer",
        "layernorm",
        "add_bias",
        "add_bias_act",
        "add_bias_residual",
        "softmax",
        "mix",
        "widen",
        "quantise",
        "exps",
        "add_rows",
        "act_backward",
        "layernorm_backward",
        "layernorm_gains",
        "softmax_backward",
        "adamw",
        "square_sum",
    }
    cases = {name: value for name, value in neon.items() if not name.startswith("product") and "in place" not in name}
    assert len(set(cases.values())) > 0.95 * len(cases)  # the cases really differ
    assert results(cross, "neondot") == neon
    for isa in FUSED:
        expected = results(native, isa)
        assert list(neon) == list(expected)
        assert [name for name in neon if neon[name] != expected[name]] == [], isa


def test_the_baseline_gives_the_same_bits_for_quantised_weights(native: list[str]) -> None:
    baseline, expected = results(native, "baseline"), results(native, FUSED[0])
    assert {name.split()[0] for name in baseline} == {"gemm", "product", "widen", "quantise"}
    assert {name.split()[-1] for name in baseline} == {"q8_0", "q4_0"}
    assert baseline.items() <= expected.items()


@pytest.mark.skipif("avx512vnni" not in FUSED, reason="needs AVX-512 VNNI, which all processors with AMX have")
def test_amx_gives_the_same_bits(native: list[str]) -> None:
    assert results(native, "avx512amx") == results(native, "avx2")


@pytest.mark.slow  # half a minute of compiling
def test_the_format_of_the_guide(tmp_path: Path) -> None:
    """The additions in the guide are enough for float8 kernels."""
    guide = (ROOT / "docs" / "add-a-weight-format.md").read_text()
    line, function = re.findall(r"```c\n(.*?)```", guide, re.DOTALL)[:2]
    csrc = tmp_path / "csrc"
    shutil.copytree(SOURCES, csrc)
    body = (csrc / "micro_body.h").read_text()
    rows = re.search(r"#define EACH_FORMAT\(f\)(?:[^\\\n]*\\\n)+.*", body)
    assert rows
    (csrc / "micro_body.h").write_text(body.replace(rows[0], f"{function}\n{rows[0]} \\\n{line}"))
    program = build(tmp_path, csrc)
    found = [results(program, isa) for isa in FUSED]
    float8 = {name for name in found[0] if name.endswith(" float8_e5m2")}
    assert {name.split()[0] for name in float8} == {"gemm", "product", "widen"}
    assert len(float8) == sum(name.endswith(" float16") for name in found[0])
    assert all(cases == found[0] for cases in found)
