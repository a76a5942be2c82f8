"""Test Ctrl-C in commands: it ends them with status 130 and without a message, whenever it comes.

It may come during an import, even if the module turns it into another error, in a finalizer, before the job or after it. No
test depends on time: the interrupted code itself sends the signal."""

import io
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import ROOT, execute

from pygpt.__main__ import main
from pygpt.commands import COMMANDS
from pygpt.commands.console import Interrupts, made_of_ctrl_c, status_of

SCRIPTS = ["chat.py", *(f"tools/{name}.py" for name in ("chart", "make_model", "profile"))]


def press() -> None:
    """Press Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """Set Python's handler: in a shell's background job, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.getprofile() is None
    signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------------------
# During the job


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return write(text), which makes the module `interrupted_import`. Its text may use press()."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "interrupted_import.py").write_text(f"from test_interrupts import press\n{text}\n")

    yield write
    for name in ("interrupted_import", "test_interrupts"):
        sys.modules.pop(name, None)


def importing(after: list[object]) -> Callable[[], None]:
    """A job that imports the module."""

    def job() -> None:
        import interrupted_import  # type: ignore[import-not-found]

        after.append(interrupted_import.whole)

    return job


@pytest.mark.parametrize(
    "text",
    [
        "press(); whole = True",
        "whole = True; press()",
        "try:\n    press(); whole = True\nexcept BaseException:\n    raise ImportError('as compiled modules do') from None",
        "try:\n    press(); whole = True\nexcept BaseException:\n    whole = False",
    ],
)
def test_an_import_is_finished_first(module: Callable[[str], None], capfd: pytest.CaptureFixture[str], text: str) -> None:
    """The import ends before the KeyboardInterrupt, so the module cannot swallow it, and can be imported again."""
    module(text)
    after: list[object] = []
    assert status_of(importing(after)) == 130
    assert after == []
    assert sys.modules["interrupted_import"].whole is True
    assert capfd.readouterr() == ("", "")


def test_an_import_that_fails_after_ctrl_c_is_ctrl_c(module: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    module("press()\nimport there_is_no_such_module")
    assert status_of(importing([])) == 130
    assert capfd.readouterr() == ("", "")


def test_the_second_ctrl_c_does_not_wait_for_an_import(module: Callable[[str], None]) -> None:
    module("press()\npress()\nwhole = True")
    assert status_of(importing([])) == 130
    assert "interrupted_import" not in sys.modules


def test_imports_below_a_command_do_not_count(module: Callable[[str], None]) -> None:
    """If a program runs a command during an import, Ctrl-C takes effect at once."""
    module(
        "from pygpt.commands.console import status_of\nfound = []\n"
        "def job():\n    press()\n    found.append('later')\n"
        "whole = [status_of(job), *found]"
    )
    after: list[object] = []
    importing(after)()
    assert after == [[130]]


NUMPY = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
from pygpt.commands.console import status_of

class Presses:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Presses())
status = status_of(lambda: __import__("numpy"))
assert len([found for found in sys.meta_path if isinstance(found, Presses)]) == 0
import numpy
assert numpy.zeros(3).sum() == 0
sys.exit(status)
"""


@pytest.mark.parametrize("name", ["numpy", "datetime", "numpy.linalg"])
def test_ctrl_c_while_numpy_is_imported(name: str) -> None:
    """NumPy's compiled modules import others, such as datetime, and turn their exceptions into a plain ImportError."""
    result = program(NUMPY, name)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


class Finalized:
    """An object whose finalizer presses Ctrl-C."""

    def __del__(self) -> None:
        press()


def deleted() -> None:
    thing = Finalized()
    del thing


def called_back() -> None:
    class Thing:
        pass

    thing = Thing()
    weakref.finalize(thing, press)
    del thing


def generator_closed() -> None:
    def generator() -> Iterator[int]:
        try:
            yield 1
        finally:
            press()

    iterator = generator()
    next(iterator)
    del iterator


@pytest.mark.parametrize("finalizer", [deleted, called_back, generator_closed])
def test_ctrl_c_in_a_finalizer_is_not_lost(finalizer: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> None:
    reached: list[int] = []

    def job() -> None:
        finalizer()
        for i in range(10):
            reached.append(i)

    assert status_of(job) == 130
    assert reached == []
    assert capfd.readouterr() == ("", "")


def test_other_exceptions_in_finalizers_are_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError

    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: seen.append(lost.exc_type))

    def job() -> None:
        thing = Failing()
        del thing

    assert status_of(job) == 0
    assert seen == [ValueError]


def raises(error: BaseException, *, cause: BaseException | None = None, context: BaseException | None = None) -> object:
    error.__cause__, error.__context__ = cause, context
    return lambda: (_ for _ in ()).throw(error)


@pytest.mark.parametrize("kind", [ImportError, RuntimeError, SystemError])
def test_results_of_ctrl_c(kind: type[Exception], capfd: pytest.CaptureFixture[str]) -> None:
    between = ValueError()
    between.__context__ = KeyboardInterrupt()
    for more in ({"cause": KeyboardInterrupt()}, {"context": KeyboardInterrupt()}, {"cause": between}):
        assert status_of(raises(kind("made of it"), **more)) == 130  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
    assert not made_of_ctrl_c(None)
    assert not made_of_ctrl_c(kind())


def test_an_import_that_fails_by_itself_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of(raises(ImportError("not built"), context=ValueError())) == 1  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "pygpt: error: not built\n")
    with pytest.raises(SystemError, match="another"):
        status_of(raises(SystemError("another")))  # type: ignore[arg-type]


def test_other_handlers_stay() -> None:
    """A program's own handler stays, and so does the ignored signal of a background job."""
    calls: list[int] = []

    def handler(number: int, _: object) -> None:
        calls.append(number)

    try:
        for chosen in (handler, signal.SIG_IGN):
            signal.signal(signal.SIGINT, chosen)
            assert status_of(press) == 0
            assert signal.getsignal(signal.SIGINT) is chosen
        assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_is_given_back() -> None:
    for before in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, before)
        inside: list[object] = []
        assert status_of(lambda inside=inside: inside.append(signal.getsignal(signal.SIGINT))) == 0  # type: ignore[misc]
        assert inside[0] not in (signal.SIG_DFL, signal.default_int_handler)
        assert signal.getsignal(signal.SIGINT) is before


def test_a_command_in_another_thread() -> None:
    """Signals do not interrupt other threads, so the command leaves the handler as it is."""
    found: list[object] = []

    def work() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


class Unbuffered(io.StringIO):
    """An unbuffered stdout, as with PYTHONUNBUFFERED. Ctrl-C may come between any two writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes += [text] if text else []
        return len(text)


@pytest.mark.parametrize(("words", "given"), [(["1", "2", "-n", "6"], b""), (["-n", "6", "-"], b"1 2\n\n1 2\n")])
def test_one_write_is_complete(monkeypatch: pytest.MonkeyPatch, words: list[str], given: bytes) -> None:
    """Each write is an id with the space or newline after it."""
    monkeypatch.setattr(sys, "stdout", out := Unbuffered())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(words) == 0
    assert len(out.writes) == (9 if given else 4)
    assert all(re.fullmatch(r"(\d+[ \n]|\n)", text) for text in out.writes)


# ---------------------------------------------------------------------------------------------------------------------
# Before and after


def program(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code in a process that does not ignore Ctrl-C."""
    code = f"import signal; signal.signal(2, signal.default_int_handler)\n{code}"
    words = [sys.executable, "-W", "error", "-c", code, *arguments]
    return execute(words, timeout=60, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None)


BEFORE = """
import runpy, sys
kind, name, moment = sys.argv[1:]
for known in [known for known in sys.modules if known.split(".")[0] in ("argparse", "pygpt", "json")]:
    del sys.modules[known]

class Presses:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Presses())
sys.argv = [name, "--help"]
if kind == "script":
    runpy.run_path(name, run_name="__main__")
elif kind == "subcommand":
    sys.argv = ["pygpt", name, "--help"] if name else ["pygpt", "--help"]
    runpy.run_module("pygpt", run_name="__main__", alter_sys=True)
else:
    import importlib, pathlib, tomllib
    module, _, function = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]["scripts"][name].partition(":")
    sys.exit(getattr(importlib.import_module(module), function)())
"""
PROGRAMS = (
    [("script", name) for name in SCRIPTS] + [("subcommand", name) for name in ("", *COMMANDS)] + [("installed", "pygpt")]
)


@pytest.mark.parametrize(("kind", "name"), PROGRAMS)
@pytest.mark.parametrize("moment", ["argparse", "pygpt.errors"])
def test_ctrl_c_while_a_command_is_imported(kind: str, name: str, moment: str) -> None:
    """Ctrl-C comes in the first import, or in an import of pygpt. The signal ends the process without a message."""
    result = program(BEFORE, kind, name, moment)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


AFTER = """
import atexit, runpy, sys
atexit.register(signal.raise_signal, signal.SIGINT)
sys.argv = ["pygpt", *sys.argv[1:]]
runpy.run_module("pygpt", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("words", [["--version"], ["1", "2"], ["nonsense"]])
def test_ctrl_c_while_the_interpreter_ends(words: list[str]) -> None:
    result = program(AFTER, *words)
    assert result.returncode == -signal.SIGINT
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
    assert ("nonsense" in result.stderr) == (words == ["nonsense"])
    assert bool(result.stdout) == (words != ["nonsense"])


@pytest.mark.parametrize(("kind", "name"), PROGRAMS)
def test_a_background_job_goes_on_ignoring_it(kind: str, name: str) -> None:
    result = program(f"signal.signal(2, signal.SIG_IGN)\n{BEFORE}", kind, name, "argparse")
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: " in result.stdout
