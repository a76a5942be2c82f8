"""NEON gives the bits of the x86-64 sets with FMA: every kernel, cross-compiled for aarch64 and run by an emulator.

The kernels are compiled here, so this is also where the format of docs/add-a-weight-format.md is added and tried.

Needs an x86-64 machine with FMA and a C compiler, for NEON also Debian's gcc-aarch64-linux-gnu and qemu-user. Elsewhere the
tests are skipped.
"""

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pygpt import cpu_info

ROOT = Path(__file__).resolve().parent.parent
FUSED = [isa for isa in cpu_info()["available"] if isa in ("avx2", "avx512")]
NATIVE, CROSS = shutil.which("cc") or shutil.which("gcc"), shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64" or not FUSED, reason="needs an x86-64 machine with FMA to compare with"),
    pytest.mark.skipif(not NATIVE, reason="needs a C compiler"),
]
SOURCES = ROOT / "pygpt" / "csrc"


def results(folder: Path, isa: str, csrc: Path = SOURCES) -> dict[str, str]:
    """Compile the harness with a set's kernels and the build's own flags, run it: the hash of each case."""
    compiler, emulator = ([CROSS, "-static"], [EMULATOR]) if isa == "neon" else ([NATIVE], [])
    found = re.search(r"^FLAGS = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert found
    flags = [*ast.literal_eval(found[1]), "-I", str(csrc), f"-DMICRO=micro_{isa}"]
    sources = [str(csrc / f"micro_{isa}.c"), str(ROOT / "tests" / "neon_harness.c")]
    program = str(folder / isa)
    for command in [*compiler, *flags, *sources, "-lm", "-o", program], [*emulator, program]:
        assert None not in command
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stderr == f"{isa}\n"
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


@pytest.mark.skipif(not CROSS, reason="needs aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu)")
@pytest.mark.skipif(not EMULATOR, reason="needs qemu-aarch64 (Debian: qemu-user)")
def test_neon_gives_the_same_bits(tmp_path: Path) -> None:
    neon = results(tmp_path, "neon")
    kernels = {name.split()[0] for name in neon}
    assert kernels >= {
        "gemm",
        "product",
        "outer",
        "layernorm",
        "add_bias",
        "add_bias_gelu",
        "add_bias_residual",
        "softmax",
        "mix",
        "widen",
        "exps",
        "add_rows",
        "gelu_backward",
        "layernorm_backward",
        "layernorm_gains",
        "softmax_backward",
        "adamw",
        "square_sum",
    }
    cases = {name: value for name, value in neon.items() if not name.startswith("product") and "in place" not in name}
    assert len(set(cases.values())) > 0.95 * len(cases)  # the cases are different ones
    for isa in FUSED:
        expected = results(tmp_path, isa)
        assert list(neon) == list(expected)
        assert [name for name in neon if neon[name] != expected[name]] == [], isa


def test_the_format_of_the_guide(tmp_path: Path) -> None:
    """What the guide says to add for float16 is all that the kernels need."""
    guide = (ROOT / "docs" / "add-a-weight-format.md").read_text()
    line, function = re.findall(r"```c\n(.*?)```", guide, re.DOTALL)[:2]
    csrc = tmp_path / "csrc"
    shutil.copytree(SOURCES, csrc)
    body = (csrc / "micro_body.h").read_text()
    rows = re.search(r"#define EACH_FORMAT\(f\)(?:[^\\\n]*\\\n)+.*", body)
    assert rows
    (csrc / "micro_body.h").write_text(body.replace(rows[0], f"{function}\n{rows[0]} \\\n{line}"))
    found = [results(tmp_path, isa, csrc) for isa in FUSED]
    float16 = {name for name in found[0] if name.endswith(" float16")}
    assert {name.split()[0] for name in float16} == {"gemm", "product", "widen"}
    assert len(float16) * 3 == sum(name.endswith((" float32", " bfloat16", " float16")) for name in found[0])
    assert all(cases == found[0] for cases in found)
