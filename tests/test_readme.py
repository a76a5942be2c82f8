"""README, help text, public names and the file tree agree with what is there, and README's commands and examples work."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pygpt
from pygpt.__main__ import EXAMPLES, build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(*command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYGPT_")}
    return subprocess.run(command, input=stdin, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)


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
