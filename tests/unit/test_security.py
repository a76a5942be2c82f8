"""The promises of the threat model that other tests do not cover. This project never runs text as code, by any way that Python
has. A hostile folder or environment does not give more rights than its owner has."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from make_checkpoint import make
from running import execute

import pygpt
from pygpt.__main__ import main
from pygpt.commands.console import one_line
from pygpt.formats.files import atomic_file

ROOT = Path(pygpt.__file__).parent.parent
SOURCES = sorted([*(ROOT / "pygpt").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "chat.py", ROOT / "setup.py"])
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "code", "codeop"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}  # by name alone: model.eval() is another thing
METHODS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.load", "tempfile.mktemp"}
ALLOWED = {("pygpt/formats/huggingface.py", "torch.load"): "always with weights_only=True"}  # (file, finding): why


def findings(source: str) -> list[str]:
    """Everything in a source that could run text as code, or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"import {node.module}"] if node.module.split(".")[0] in MODULES else []
            found += [name for alias in node.names if (name := f"{node.module}.{alias.name}") in METHODS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in CALLS | METHODS or name.removeprefix("builtins.") in CALLS else []
            for keyword in node.keywords:
                given = ast.unparse(keyword.value)
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code", "weights_only") and given != (
                    "True" if keyword.arg == "weights_only" else "False"
                ):
                    found.append(f"{keyword.arg}={given}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_never_run_as_code(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    assert [found for found in findings(path.read_text()) if (place, found) not in ALLOWED] == []


def test_every_exception_is_needed() -> None:
    for place, found in ALLOWED:
        assert found in findings((ROOT / place).read_text())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["import pickle"]),
        ("from pickle import loads", ["import pickle"]),
        ("import os, shelve.x", ["import shelve.x"]),
        ("from os import system", ["os.system"]),
        ("eval(text)", ["eval"]),
        ("builtins.exec(text)", ["builtins.exec"]),
        ("subprocess.run(words, shell=True)", ["shell=True"]),
        ("np.load(path, allow_pickle=yes)", ["allow_pickle=yes"]),
        ("torch.load(path)", ["torch.load"]),
        ("model.eval(); np.load(path, allow_pickle=False); re.compile(text)", []),
    ],
)
def test_the_search_finds(source: str, found: list[str]) -> None:
    assert findings(source) == found


def hostile(folder: Path) -> Path:
    """A folder with files that leave a trace if they are run."""
    folder.mkdir()
    for name in ("json", "numpy", "tiktoken", "argparse", "mmap", "ctypes", "sitecustomize", "regex"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'TRACE')!r}, 'w').close()\n")
    (folder / "pygpt").mkdir()
    (folder / "pygpt" / "__init__.py").write_text((folder / "json.py").read_text())
    return folder


@pytest.mark.parametrize(
    "argv",
    [
        ["-P", "-m", "pygpt", "-m", "{model}", "1"],
        ["-c", "import sys; sys.path.pop(0); from pygpt.__main__ import main; sys.exit(main())", "-m", "{model}", "1"],
        ["{root}/chat.py", "-m", "{model}", "-n", "2", "hi"],
        ["-P", "-m", "pygpt", "shards", "--show", "{model}"],
    ],
    ids=["module", "installed", "chat", "subcommand"],
)
def test_a_hostile_folder_is_not_run(tmp_path: Path, argv: list[str]) -> None:
    """The installed command, its child under the chat, and the tools do not import modules from the current folder."""
    here = hostile(tmp_path / "here")
    make(tmp_path / "model.bin", L=1, NH=1, C=8, V=50257, maxT=16, seed=1)
    words = [word.format(root=ROOT, model=tmp_path / "model.bin") for word in argv]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PY")}
    environment["PYTHONPATH"] = str(ROOT)
    result = execute([sys.executable, *words], cwd=here, env=environment, timeout=60)
    if "--show" in words:
        assert (result.returncode, "magic number" in result.stderr) == (2, True)
    else:
        assert (result.returncode, result.stderr) == (0, "")
    assert not (here / "TRACE").exists()


def test_a_hostile_folder_would_be_noticed(tmp_path: Path) -> None:
    """The trap works: with the folder on the path, it snaps."""
    here = hostile(tmp_path / "here")
    subprocess.run([sys.executable, "-c", "import argparse"], cwd=here, capture_output=True, timeout=60)
    assert (here / "TRACE").exists()


@pytest.mark.parametrize("name", ["PYGPT_MODEL", "PYGPT_THREADS", "PYGPT_ISA", "PYGPT_HOME"])
def test_hostile_variables(tmp_path: Path, name: str) -> None:
    """A variable is a name or a number. Other values give one line, or have no effect."""
    for value in ("../../../dev/zero", "$(touch TRACE); touch TRACE\n%s%n"):
        environment = {key: kept for key, kept in os.environ.items() if not key.startswith("PYGPT_")}
        environment |= {name: value, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "pygpt", "1"]
        result = execute(words, cwd=tmp_path, env=environment, timeout=60)
        assert list(tmp_path.iterdir()) == []
        if name == "PYGPT_HOME":  # nothing is looked for there: no model was named
            assert result.returncode == 0
        else:
            assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_messages_do_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Many of them have a name from outside."""
    assert main(["-m", "\x1b]0;title\x07\x9b2J\r\u202e.bin", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pygpt: error: \\x1b]0;title\\x07\\x9b2J \\u202e.bin: no such model file")
    assert error.removesuffix("\n").isprintable()
    assert one_line("naïve 中文 🙂\n\udcff") == "naïve 中文 🙂 \\udcff"


def test_messages_have_an_end() -> None:
    text = one_line(f"begin {'x' * 10**6} end")
    assert text.startswith("begin xxx")
    assert text.endswith("xxx end")
    assert len(text) < 5000


def test_a_prompt_is_data(tmp_path: Path) -> None:
    """Requests are JSON. Code and options in them are refused, or read as text."""
    make(tmp_path / "model.bin", L=1, NH=1, C=8, V=50257, maxT=64, seed=1)
    bad = [
        {"tokens": ["__import__('os').system('touch TRACE')"]},
        {"tokens": [1], "__class__": 1},
        {"tokens": [1], "model": "/etc/passwd"},
        {"tokens": [1], "total": 10**30},
        {"tokens": [-1]},
        {"tokens": [1] * 200000},
    ]
    for request in bad:
        words = [sys.executable, "-m", "pygpt", "-m", str(tmp_path / "model.bin"), "-"]
        result = execute(words, input=json.dumps(request), cwd=ROOT, timeout=60)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), request


def test_dependencies_are_of_known_versions() -> None:
    """Dependencies of the package have a lower and an upper limit. Tools of the development have exact versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in project["dependencies"]:
        assert re.fullmatch(r"[a-z]+>=[0-9.]+,<[0-9]+", wanted), wanted
    lines = [line for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    extras = [wanted for extra in project["optional-dependencies"].values() for wanted in extra]
    names = {re.split(r"[<>=\[]", wanted)[0].lower().replace("_", "-") for wanted in [*project["dependencies"], *extras]}
    assert names - {"pygpt"} <= locked


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_name_that_was_guessed_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Temporary files are always new, even if a file with the same name exists."""
    victim, trap = tmp_path / "victim", tmp_path / "model.bin.00000000.tmp"
    victim.write_text("mine")
    if kind == "link":
        trap.symlink_to(victim)
    else:
        trap.write_text("mine")
    monkeypatch.setattr(os, "urandom", bytes)
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "model.bin") as file:
        file.write(b"yours")
    assert victim.read_text() == trap.read_text() == "mine"
    assert not (tmp_path / "model.bin").exists()
