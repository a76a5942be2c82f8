"""Run `pygpt` as a process, and check its one-line errors."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYGPT = [sys.executable, "-W", "error", "-m", "pygpt"]
PATIENCE = 100  # seconds; only a failing test waits this long


def environment(**variables: str) -> dict[str, str]:
    """Return this environment without variables of pygpt and Python, with the package on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYGPT", "PYTHON", "COLUMNS"))}
    path = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), str(ROOT)]))
    return {**kept, **variables, "PYTHONPATH": path}


def run(
    *arguments: str, stdin: str | bytes = "", shell: str = 'exec "$@"', cwd: str | Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run `pygpt ARGUMENTS` until it ends. shell: a line of sh in which "$@" is the command."""
    done = subprocess.run(
        ["/bin/sh", "-c", shell, "sh", *PYGPT, *arguments],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        cwd=cwd,
        env=environment(**variables),
        timeout=PATIENCE,
    )
    out, err = done.stdout.decode(), done.stderr.decode("utf-8", "surrogateescape")
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def assert_one_line_error(err: str, *named: str) -> None:
    """Assert that `err` is one printable line that contains all these words, without usage or traceback."""
    assert re.fullmatch(r"pygpt: error: [^\n]+\n", err)
    assert err[:-1].isprintable()
    assert len(err) < 600
    assert "usage:" not in err
    for word in named:
        assert word in err


def assert_refused(done: "subprocess.CompletedProcess[str]", *named: str, status: int = 2, stdout: str = "") -> None:
    """Assert that a run ended with this status and stdout, and with one line on stderr that contains all these words."""
    assert (done.returncode, done.stdout) == (status, stdout), done.stderr
    assert_one_line_error(done.stderr, *named)


def assert_refuses(
    main: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    *named: str,
    status: int = 2,
) -> None:
    """Assert that main() returns this status, prints one line with all these words on stderr, and writes nothing to stdout."""
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line_error(err, *named)


def contents(folder: Path) -> dict[str, bytes]:
    """Map the files below a folder to their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refuses_and_keeps(
    main: Callable[[list[str]], int],
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    *named: str,
    status: int = 2,
) -> None:
    """Assert what assert_refuses() does, and that no file below the current folder changes."""
    before = contents(Path())
    capsys.readouterr()
    assert_refuses(main, capsys, arguments, *named, status=status)
    assert contents(Path()) == before
