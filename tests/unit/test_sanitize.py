"""tools/sanitize on a machine without working sanitizers: one line with the reason, and a special status, after which .ci/run
continues.

That it works elsewhere it proves itself, by planted mistakes, before every run."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from running import execute

ROOT = Path(__file__).resolve().parents[2]
GCC = shutil.which("gcc")


@pytest.mark.parametrize(
    ("gcc", "said"),
    [
        ('echo "cannot find libasan.so" >&2; exit 1', "cannot find libasan.so"),
        (f"{GCC} -shared -fPIC planted.c -o planted.so", "there is no libasan.so"),  # the flags change nothing
    ],
)
def test_without_the_runtime_library(gcc: str, said: str, tmp_path: Path) -> None:
    if not GCC:
        pytest.skip("needs gcc")
    for name in ("pygpt", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("data", "*.so", "__pycache__"))
    for name in ("tests", "examples"):
        (tmp_path / name).mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "chat.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gcc").write_text(f"#!/bin/sh\n{gcc}\n")
    (tmp_path / "bin/gcc").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    done = execute([str(tmp_path / "tools/sanitize"), "--short"], env=variables)
    assert (done.returncode, done.stderr) == (77, f"tools/sanitize: the sanitizers do not work here: {said}\n")
    assert "tools/sanitize --short || [ $? = 77 ]" in (ROOT / ".ci/run").read_text()
