"""README, help text, public names and the file tree agree with what is there, and README's commands and examples work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_checkpoint import make

import pygpt
from pygpt.__main__ import EXAMPLES, build_parser
from pygpt.commands.convert import convert

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*command: str, stdin: str = "", cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYGPT_")} | variables
    return subprocess.run(command, input=stdin, env=environment, cwd=cwd, capture_output=True, text=True, timeout=100)


def test_the_two_commands_come_first_and_are_the_ones_ci_runs() -> None:
    first, second = (block.strip() for block in blocks("sh")[:2])
    assert first.endswith("&& python -m pygpt 31373 612")
    assert second.endswith("&& python -m pytest")
    assert "grep -m 1 'python -m pytest' README.md" in (ROOT / ".ci/run").read_text()
    assert README.index("python -m pytest") == README.index(second) + second.index("python -m pytest")


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run_as_written(number: int) -> None:
    result = run(sys.executable, "-W", "error", "-c", blocks("python")[number])
    assert (result.returncode, result.stderr) == (0, "")


def test_there_are_python_examples() -> None:
    assert len(blocks("python")) >= 2


# ---------------------------------------------------------------------------------------------------------------------
# Commands: those in blocks and in the text, each in a folder that has what it is about, in small


def commands() -> list[str]:
    """The README's commands, each once: the lines of its blocks, then those inside sentences."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").replace(" && ", "\n").splitlines()]
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    for inline in re.findall(r"`([^`]+)`", text):
        if re.match(r"(python3?|echo|tools/\w+) ", inline) and not inline.endswith("-m pygpt"):  # which is but a name
            lines += inline.split(" && ")
    return list(dict.fromkeys(" ".join(line.split()) for line in lines))


# Commands that are not run here, and why; their beginnings are enough.
ELSEWHERE = {
    "python -m pip install": "installs; .ci/run does",
    "python -m pytest": "is what runs this",
    "python3 -m venv": "makes an environment; .ci/run does",
    ". .venv/bin/activate": "so does this",
    "python -m pygpt.commands.download": "needs a network; test_download.py brings one",
    "python tools/stress.py": "takes minutes; test_stress.py runs short forms",
    "python tools/fuzz.py": "takes minutes; test_fuzz.py runs short forms",
    "tools/sanitize": "compiles everything anew and takes minutes",
    "python setup.py build_ext": "compiles; tools/check does",
    "python -m pip wheel": "compiles; test_package.py does",
    "python -m cibuildwheel": "needs containers",
}

# What makes a command short: the last of two options counts.
SHORTENED = {
    "python tools/train.py --data": "--steps 1 --warmup 0 --val-batches 1",
    "python tools/train.py --resume": "--steps 2",
    "python tools/bench.py": "--rounds 1 --prompts 64 --limit-megabytes 8 --no-memory",
    "python tools/profile.py": "--rounds 1 --skip all",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files by the names that README gives to large ones."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text("Once upon a time there was a king, and he had a daughter.\n" * 1500)
    (folder / "input.txt").write_text("To be, or not to be: that is the question.\n" * 3000)
    make(folder / "gpt2_124M.bin", L=1, NH=2, C=16, maxT=128)
    (folder / "home").mkdir()
    shutil.copy(folder / "gpt2_124M.bin", folder / "home" / "gpt2.bin")
    (folder / "data").mkdir()
    pygpt.write_tokens(folder / "data" / "input_val.bin", range(1000, 1300))
    convert(str(folder / "gpt2_124M.bin"), f"{folder / 'gpt2-hf'}/")
    for name in "pygpt", "tools", "chat.py":
        (folder / name).symlink_to(ROOT / name)
    training = ("tools/train.py", "--data", "my.txt", "--init", "gpt2_124M.bin", "--steps", "1", "--out", "mine.bin")
    done = run(sys.executable, *training, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def place(stand_ins: Path, tmp_path: Path) -> Path:
    """A copy of them, and `python` as README writes it."""
    folder = tmp_path / "place"
    shutil.copytree(stand_ins, folder, symlinks=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -W error "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder


def runs_elsewhere(command: str) -> bool:
    return command.startswith(tuple(ELSEWHERE))


@pytest.mark.parametrize("command", [command for command in commands() if not runs_elsewhere(command)])
def test_commands_run_as_written(place: Path, command: str) -> None:
    for name in outputs(command):  # which may stand there as another's input
        for old in place.glob(f"{name.removesuffix('.bin').rstrip('/')}*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    more = [options for beginning, options in SHORTENED.items() if command.startswith(beginning)]
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = run("sh", "-c", " ".join([command, *more]), cwd=place, PATH=path, PYGPT_HOME=str(place / "home"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in outputs(command):
        assert (place / name).exists(), name
    if not outputs(command):
        assert done.stdout.split()
    if re.match(r"python -m pygpt\b(?!\.)", command):
        assert all(word.isdigit() for word in done.stdout.split())


def outputs(command: str) -> list[str]:
    """The files that a command says it writes."""
    words = shlex.split(command)
    named = [words[i + 1] for i, word in enumerate(words) if word in ("-o", "--out")]
    return [*named, words[-1]] if "pygpt.commands.convert" in words else named


def test_commands_are_found() -> None:
    found = commands()
    assert {"python -m pygpt 31373 612", "python -m pytest", 'echo "Ladies and" | python chat.py'} <= set(found)
    assert sum(not runs_elsewhere(command) for command in found) >= 15


def test_no_exception_is_stale() -> None:
    for beginning in (*ELSEWHERE, *SHORTENED):
        assert any(command.startswith(beginning) for command in commands()), beginning


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"(?<![\w/])(?:tools|tests|pygpt|\.ci)/[\w./-]*\w", README)
    assert len(named) >= 20
    for name in named:
        assert (ROOT / name).exists(), name


# ---------------------------------------------------------------------------------------------------------------------
# Help, names, figures


def test_help_is_quoted_word_for_word() -> None:
    quoted = " ".join(next(block for block in blocks("text") if block.startswith("usage:")).split())
    parser = build_parser()
    assert " ".join(parser.format_usage().split()) in quoted
    assert parser.description is not None
    assert parser.description in quoted
    for action in parser._actions:
        assert all(option in quoted for option in action.option_strings)
        assert action.help is not None
        assert " ".join(action.help.split()) in quoted
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", quoted))
    assert options == {option for action in parser._actions for option in action.option_strings}


def test_examples_of_the_help_run() -> None:
    commands = [line.split("  ")[1].strip() for line in EXAMPLES.splitlines() if re.match(r"  (python|echo)", line)]
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command.replace("-m gpt2_124M.bin", ""))
        stdin = ""
        if words[0] == "echo":
            bar = words.index("|")
            stdin, words = " ".join(words[1:bar]) + "\n", words[bar + 1 :]
        result = run(sys.executable, *words[1:], stdin=stdin)
        assert result.returncode == 0, (command, result.stderr)
        assert result.stdout.split(), command
        assert all(word.isdigit() for word in result.stdout.split()), command


def test_the_file_tree_is_complete() -> None:
    tree = next(block for block in blocks("text") if block.startswith("pygpt/"))
    files = [path for path in (ROOT / "pygpt").iterdir() if path.is_file() and path.suffix not in {".so", ".c", ".typed"}]
    files += (ROOT / "pygpt").glob("micro_*.c")
    missing = [path.name for path in files if path.name not in tree]
    assert not missing
    named = re.findall(r"^  ([\w.]+\.\w+)", tree, re.MULTILINE)
    assert [name for name in named if not (ROOT / "pygpt" / name).exists()] == []


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^##+ (.+)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert (ROOT / target).exists()
    chapters = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert [title for title in chapters if f"(#{title.lower().replace(' ', '-').replace(',', '')})" not in README] == []


def test_kernels_and_tests_that_are_named_exist() -> None:
    kernels = (ROOT / "pygpt" / "_kernels.pyx").read_text()
    linked = re.findall(r"\[`(\w+)`\]\(pygpt/_kernels\.pyx\)", README)
    assert len(linked) >= 10
    for name in linked:
        assert re.search(rf"^cdef .*\b{name}\(", kernels, re.MULTILINE), name
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 10
    for name in named:
        assert f"\ndef {name}(" in tests, name


def test_every_variable_is_documented() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "pygpt").glob("*.py*"))
    assert set(re.findall(r"PYGPT_[A-Z]+", sources)) == set(re.findall(r"`(PYGPT_[A-Z]+)`", README))


def test_public_names() -> None:
    assert sorted(pygpt.__all__) == sorted([*pygpt._HOME, "__version__"])
    for name in pygpt.__all__:
        assert getattr(pygpt, name) is not None
    assert set(pygpt.__all__) <= set(dir(pygpt))
    with pytest.raises(AttributeError, match="no attribute 'torch'"):
        _ = pygpt.torch


def test_no_forbidden_flags() -> None:
    flags = (ROOT / "setup.py").read_text().split('"""')[2]
    assert "-ffp-contract=off" in flags
    assert not re.search(r"march=native|ffast-math|Ofast|openmp", flags)
