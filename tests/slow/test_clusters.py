"""The programs for Ray Data and Dask in the guide write the bytes of `pygpt batch`. Runs where Ray or Dask is installed."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from programs import PYTHON, ROOT, command, environment, run

PROGRAMS = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/guides/many-machines.md").read_text(), re.MULTILINE | re.DOTALL)
OPTIONS = ["-t", 1, "--seed", 7, "--max-new-tokens", 20, "--temp", 0.8]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["ray", "dask"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_guides_programs_write_the_bytes_of_a_batch(tmp_path: Path, module: str, workers: int) -> None:
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    lines = [json.dumps({"id": f"r{i}", "prompt": "To be, or not to be"[: 3 + i % 16]}) for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (program,) = [program for program in PROGRAMS if f"import {module}" in program or f"from {module}." in program]
    (tmp_path / "program.py").write_text(program)
    assert run(command("batch", "rows.jsonl", "-o", "expected", *OPTIONS), cwd=tmp_path).status == 0
    env = environment(RAY_USAGE_STATS_ENABLED="0")
    outcome = run([PYTHON, "program.py", workers, tmp_path / "rows.jsonl", tmp_path / "found"], cwd=tmp_path, env=env)
    assert outcome.status == 0, outcome
    assert (tmp_path / "found").read_bytes() == (tmp_path / "expected").read_bytes()
