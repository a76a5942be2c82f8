"""NEON gives the same bits as the x86-64 sets with FMA. Every kernel is cross-compiled for aarch64 and runs in an emulator.

Needs an x86-64 machine with FMA, a C compiler, and Debian's gcc-aarch64-linux-gnu and qemu-user. Elsewhere the test is skipped.
"""

import ast
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pygpt import cpu_info

ROOT = Path(__file__).resolve().parents[2]
FUSED = [isa for isa in cpu_info()["available"] if isa in ("avx2", "avx512")]
NATIVE, CROSS = shutil.which("cc") or shutil.which("gcc"), shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64" or not FUSED, reason="needs an x86-64 machine with FMA to compare with"),
    pytest.mark.skipif(not NATIVE, reason="needs a C compiler"),
    pytest.mark.skipif(not CROSS, reason="needs aarch64-linux-gnu-gcc (Debian: gcc-aarch64-linux-gnu)"),
    pytest.mark.skipif(not EMULATOR, reason="needs qemu-aarch64 (Debian: qemu-user)"),
]


def results(folder: Path, isa: str) -> dict[str, str]:
    """Compile the harness with the kernels of one set and the flags of setup.py; run it; return the hash of each case."""
    compiler, emulator = ([CROSS, "-static"], [EMULATOR]) if isa == "neon" else ([NATIVE], [])
    found = re.search(r"^FLAGS = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert found
    flags = [*ast.literal_eval(found[1]), "-I", str(ROOT / "pygpt" / "csrc"), f"-DMICRO=micro_{isa}"]
    sources = [str(ROOT / "pygpt" / "csrc" / f"micro_{isa}.c"), str(ROOT / "tests" / "neon_harness.c")]
    program = str(folder / isa)
    for command in [*compiler, *flags, *sources, "-lm", "-o", program], [*emulator, program]:
        assert None not in command
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stderr == f"{isa}\n"
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


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
    assert len(set(cases.values())) > 0.95 * len(cases)  # the cases really differ
    for isa in FUSED:
        expected = results(tmp_path, isa)
        assert list(neon) == list(expected)
        assert [name for name in neon if neon[name] != expected[name]] == [], isa
