"""Run `pygpt` as a process, and check its one-line errors.

A process takes 0.1 s to start, mostly for imports. So most processes are forks of one that has made the imports."""

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYGPT = [sys.executable, "-W", "error", "-m", "pygpt"]
PATIENCE = 100  # seconds; only a failing test waits this long
SHELL = 'exec "$@"'
PIPE_BYTES = 60_000  # a pipe holds them before anyone reads
# Waits for requests, each with four open files: stdin, stdout, stderr, and {"argv", "cwd", "env"} as JSON. A fork then runs the
# program argv[0], a path or -m NAME, and ends as any interpreter does.
FORKS = """
import gc, json, os, runpy, socket, sys, warnings
import numpy, tiktoken
from pygpt.commands import bench, chat, complete, convert, eval, profile, quantize, shards, train
channel = socket.socket(fileno=int(sys.argv[1]))
gc.freeze()
while True:
    start, files, _, _ = socket.recv_fds(channel, 1, 4)
    if not start:
        os._exit(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads of NumPy's libraries, which survive a fork
        child = os.fork()
    if not child:
        break
    for file in files:
        os.close(file)
    channel.sendall(b"%d\\n" % child)
    channel.sendall(b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
channel.close()
with open(files.pop()) as file:
    asked = json.load(file)
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
sys.stdin = open(0, errors=sys.stdin.errors)
sys.stdout, sys.stderr = open(1, "w", errors=sys.stdout.errors), open(2, "w", 1, errors=sys.stderr.errors)
sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
os.environ.clear()
os.environ.update(asked["env"])
os.chdir(asked["cwd"])
program, *sys.argv[1:] = asked["argv"]
if program == "-m":
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
else:
    sys.argv[0] = program
    sys.path[0] = os.path.dirname(program)
    runpy.run_path(program, run_name="__main__")
"""


def environment(**variables: str) -> dict[str, str]:
    """Return this environment without variables of pygpt and Python, with the package on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYGPT", "PYTHON", "COLUMNS"))}
    path = os.pathsep.join(filter(None, [variables.get("PYTHONPATH"), str(ROOT)]))
    return {**kept, **variables, "PYTHONPATH": path}


class Forks:
    """The process FORKS, which runs programs without the time of their imports."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair()
        words = [sys.executable, "-W", "error", "-c", FORKS, str(theirs.fileno())]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=environment(), pass_fds=[theirs.fileno()])
        theirs.close()
        self.answers = self.channel.makefile("r")
        atexit.register(self.close)

    def run(
        self, argv: Sequence[str], stdin: bytes | None, cwd: str | Path, env: dict[str, str]
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run a program, a path or -m NAME with arguments, until it ends. stdin: at most PIPE_BYTES, or None for no input."""
        if stdin is None:
            there = os.open(os.devnull, os.O_RDONLY)
        else:
            there, given = os.pipe()
            os.write(given, stdin)
            os.close(given)
        with (
            os.fdopen(there),
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            tempfile.TemporaryFile() as asked,
        ):
            asked.write(json.dumps({"argv": argv, "cwd": str(cwd), "env": env}).encode())
            asked.seek(0)
            socket.send_fds(self.channel, [b"."], [there, *(file.fileno() for file in (out, err, asked))])
            child = int(self.answers.readline())
            try:
                status = int(self.answers.readline())
            except BaseException:  # a test that takes too long
                os.kill(child, signal.SIGKILL)
                self.answers.readline()
                raise
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(argv, status, out.read(), err.read())

    def close(self) -> None:
        """End the process."""
        self.answers.close()
        self.channel.close()
        self.process.wait()


@cache
def forks() -> Forks:
    """The one process of this process."""
    return Forks()


def execute(command: Sequence[str], *, timeout: float = PATIENCE, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run any command until it ends. stdout and stderr are text."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)


def run(
    *arguments: str, stdin: str | bytes = "", shell: str = SHELL, cwd: str | Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run `pygpt ARGUMENTS` until it ends. shell: a line of sh in which "$@" is the command."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    if shell == SHELL and not variables and len(given) <= PIPE_BYTES:
        done = forks().run(["-m", "pygpt", *arguments], given, cwd or Path.cwd(), environment())
    else:
        command = ["/bin/sh", "-c", shell, "sh", *PYGPT, *arguments]
        env = environment(**variables)
        done = subprocess.run(command, input=given, capture_output=True, cwd=cwd, env=env, timeout=PATIENCE)
    out, err = done.stdout.decode(), done.stderr.decode("utf-8", "surrogateescape")
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def gist(words: str) -> str:
    """Return a pattern for these parts, in order, any words for " ... ". A number at an end of a part is whole."""
    parts = (re.escape(part) for part in words.split(" ... "))
    return ".*".join(re.sub(r"^(?=\d)", r"(?<!\\d)", part) + (r"(?!\d)" if part[-1:].isdigit() else "") for part in parts)


def assert_one_line_error(err: str, *named: str) -> None:
    """Assert that `err` is one printable line that contains all these words, without usage or traceback. See gist()."""
    assert re.fullmatch(r"pygpt: error: [^\n]+\n", err)
    assert err[:-1].isprintable()
    assert len(err) < 600
    assert "usage:" not in err
    for word in named:
        assert re.search(gist(word), err), (word, err)


def assert_refused(done: "subprocess.CompletedProcess[str]", *named: str, status: int = 2, stdout: str = "") -> None:
    """Assert that a run ended with this status and stdout, and with one line on stderr that contains all these words."""
    assert (done.returncode, done.stdout) == (status, stdout), done.stderr
    assert_one_line_error(done.stderr, *named)


def assert_refuses(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], arguments: Sequence[str], *named: str, status: int = 2
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
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], arguments: Sequence[str], *named: str, status: int = 2
) -> None:
    """Assert what assert_refuses() does, and that no file below the current folder changes."""
    before = contents(Path())
    capsys.readouterr()
    assert_refuses(main, capsys, arguments, *named, status=status)
    assert contents(Path()) == before
