"""Test `python -m pygpt` as a process in its own folder, by its stdout, stderr and exit status.

No test depends on the machine's speed. If the moment matters (streaming, Ctrl-C within an answer), the test steps the model:
the model computes a token only after a byte has come through a pipe."""

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make
from running import PYGPT, assert_refused, environment, execute, run

import pygpt
from pygpt import GPT2, Config, cpu_info, write_checkpoint
from pygpt.commands import COMMANDS

SHAPE: dict[str, int] = {"L": 2, "NH": 3, "C": 48, "V": 211, "maxT": 64, "seed": 5}
MAIN_JOB = [284, 869, 502, 307, 1221, 3166, 26, 198]
DEADLINE = 60  # seconds for jobs of a tenth of a second: only a hang takes this long

# ---------------------------------------------------------------------------------------------------------------------
# Running it


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the command runs."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    return home


pytestmark = pytest.mark.usefixtures("folder")


def serving(*arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
    """Start the command with -, which answers requests."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*PYGPT, *arguments, "-"], stdin=pipe, stdout=stdout, stderr=pipe, env=environment())


def succeed(*arguments: str, stdin: str | bytes = "", **variables: str) -> str:
    """Run the command; assert that it succeeds without a line on stderr. Return its output."""
    result = run(*arguments, stdin=stdin, **variables)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def ids(*arguments: str, **variables: str) -> list[int]:
    """Return the ids that the command prints, one per line."""
    return numbers(succeed(*arguments, **variables))


def numbers(output: str) -> list[int]:
    assert re.fullmatch(r"(\d+\n)+", output)
    return [int(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model."""
    path = tmp_path_factory.mktemp("command") / "small.bin"
    make(path, **SHAPE)
    return str(path)


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model file with damaged weights."""
    path = tmp_path_factory.mktemp("command") / "nan.bin"
    config = Config(maxT=64, V=5, L=1, NH=1, C=4)
    write_checkpoint(path, config, {name: np.full(shape, np.nan) for name, shape, _, _ in config.tensors(padded=False)})
    return str(path)


def generate(path: str, tokens: Sequence[int], **options: Any) -> list[int]:
    with GPT2.load(path, threads=1) as model:
        return list(model.generate(tokens, **options))


# ---------------------------------------------------------------------------------------------------------------------
# The main job


def test_the_main_job() -> None:
    """The command prints eight ids, one per line. One line on stderr names the model, and how to get the real one."""
    result = run("31373", "612")
    assert result.returncode == 0
    assert result.stdout == "".join(f"{token}\n" for token in MAIN_JOB)
    assert result.stderr.count("\n") == 1
    for word in ("embedded", "gpt2_124M.bin", "`pygpt download gpt2`", "-m gpt2", "PYGPT_MODEL=gpt2"):
        assert word in result.stderr


@pytest.mark.parametrize("options", [["--reference"], *[["-t", str(nth)] for nth in range(1, 9)]], ids=" ".join)
def test_the_main_job_however_it_is_computed(options: list[str]) -> None:
    assert numbers(run(*options, "31373", "612").stdout) == MAIN_JOB


@pytest.mark.parametrize("isa", cpu_info()["available"])
def test_the_main_job_on_every_instruction_set(isa: str) -> None:
    assert numbers(run("31373", "612", PYGPT_ISA=isa).stdout) == MAIN_JOB


@pytest.mark.parametrize("options", [[], ["--reference"], ["-t", "3"]], ids=" ".join)
def test_a_model_read_into_memory_answers_the_same(small: str, options: list[str]) -> None:
    expected = generate(small, [1, 2])
    assert ids("-m", small, "--no-mmap", *options, "1", "2") == expected
    assert succeed("-m", small, "--no-mmap", *options, "-", stdin="1 2\n") == " ".join(map(str, expected)) + "\n"


@pytest.mark.parametrize("options", [[], ["--reference"]], ids=" ".join)
def test_a_model_read_into_memory_may_be_written_over(small: str, tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(Path(small).read_bytes())
    child = serving("-m", str(path), "--no-mmap", *options)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    assert child.stdout.readline() == b"\n"  # the model is open now
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    out, err = child.communicate(b"1 2\n", timeout=DEADLINE)
    assert (child.returncode, out.decode(), err) == (0, answer(small, [1, 2]), b"")


def test_a_module_that_cannot_be_loaded_is_one_line(small: str) -> None:
    """This happens if the memory limit leaves no room to map the module."""
    program = """
import sys
sys.modules["pygpt._reference"] = None
from pygpt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", program, "-m", small, "--reference", "1"]
    result = execute(words, timeout=DEADLINE, env=environment())
    assert_refused(result, "pygpt._reference", status=1)


def test_a_named_model_answers_in_silence(small: str) -> None:
    expected = generate(small, [1, 2])
    assert len(expected) == 8
    for options in (["-m", small], ["--model", small], [f"-m{small}"], [f"--model={small}"]):
        assert ids(*options, "1", "2") == expected
    assert ids("1", "2", PYGPT_MODEL=small) == expected
    Path("gpt2_124M.bin").symlink_to(small)
    assert ids("1", "2") == expected


def test_which_model_goes_first(small: str, tmp_path: Path) -> None:
    """The option comes before the variable, and the variable before the folder."""
    paths = [small]
    for seed in (6, 7):
        paths.append(str(tmp_path / f"{seed}.bin"))
        make(paths[-1], **{**SHAPE, "seed": seed})
    answers = [generate(path, [1]) for path in paths]
    assert len({tuple(answer) for answer in answers}) == 3
    Path("gpt2_124M.bin").symlink_to(paths[2])
    assert ids("-m", paths[0], "1", PYGPT_MODEL=paths[1]) == answers[0]
    assert ids("1", PYGPT_MODEL=paths[1]) == answers[1]
    assert ids("1", PYGPT_MODEL="") == answers[2]


@pytest.mark.parametrize("total", [2, 3, 9, 10, 11, 63, 64])
def test_total(small: str, total: int) -> None:
    expected = generate(small, [5], total=total)
    assert len(expected) == total - 1
    for options in (["-n", str(total)], [f"-n{total}"], ["--total", str(total)], [f"--total={total}"]):
        assert ids("-m", small, *options, "5") == expected
    assert ids("-m", small, "5", "-n", str(total)) == expected


def test_nine_tokens_leave_one(small: str) -> None:
    prompt = [str(token) for token in range(9)]
    assert len(ids("-m", small, *prompt)) == 1


@pytest.mark.parametrize("sampler", ["median", "greedy"])
def test_samplers(small: str, sampler: str) -> None:
    prompts = [[3], [100, 7, 9], [210, 0, 0]]
    for prompt in prompts:
        words = [str(token) for token in prompt]
        expected = generate(small, prompt, sampler=sampler)
        assert ids("-m", small, "--sampler", sampler, *words) == expected
        assert ids("-m", small, "--sampler", sampler, "--reference", *words) == expected
    assert generate(small, [3], sampler="median") != generate(small, [3], sampler="greedy")


def test_threads(small: str) -> None:
    expected = generate(small, [1, 2])
    for nth in (1, 2, 3, 16, 256):
        assert ids("-m", small, "-t", str(nth), "1", "2") == expected
        assert ids("-m", small, "1", "2", PYGPT_THREADS=str(nth)) == expected
    assert ids("-m", small, "--threads", "2", "1", "2", PYGPT_THREADS="nonsense") == expected  # the option is used


def test_ways_to_write_ids(small: str) -> None:
    assert ids("-m", small, "007", "0") == generate(small, [7, 0])
    assert ids("-m", small, "0" * 5000 + "7") == generate(small, [7])
    assert ids("-m", small, "--", "7") == generate(small, [7])


@pytest.mark.parametrize("version", [1, 3, 5])
def test_file_versions(tmp_path: Path, version: int) -> None:
    path = str(tmp_path / "model.bin")
    make(path, **{**SHAPE, "version": version})
    assert ids("-m", path, "1", "2") == generate(path, [1, 2])
    assert ids("-m", path, "--reference", "1", "2") == generate(path, [1, 2])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

HUGE = "9" * 5000
NINES = "9" * 40  # the part that an error shows


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["at least one"]),
        (["foo"], ["'foo'"]),
        (["7.9"], ["'7.9'"]),
        (["1_000"], ["'1_000'"]),
        (["-1"], ["'-1'"]),
        (["+1"], ["'+1'"]),
        (["1e3"], ["'1e3'"]),
        (["0x10"], ["'0x10'"]),
        ([" 1"], ["' 1'"]),
        (["1\n2"], ["'1\\n2'"]),
        (["1,2"], ["'1,2'"]),
        (["50257"], ["50257", "50256"]),
        (["31373", "612", "50257"], ["50257"]),
        (["99999999999999999999"], ["99999999999999999999"]),
        (["18446744073709551617"], ["18446744073709551617"]),
        ([HUGE], [NINES]),
        (["1", HUGE], [NINES]),
        ([""], ["''"]),
        (["١٢"], []),
        (["²"], ["'²'"]),
        (["\udcff"], []),
        (["31373", "-"], ["'-'"]),
        (["-", "31373"], ["'-'"]),
        ([str(token) for token in range(10)], ["10 tokens", "at most 9"]),
        ([str(token) for token in range(300)], ["300 tokens", "256"]),
        (["-n", "1", "5"], ["total", "1"]),
        (["-n", "0", "5"], ["total", "0"]),
        (["-n", "2", "5", "6"], ["2 tokens"]),
        (["-n", "257", "5"], ["257", "256"]),
        (["-n", "100000", "5"], ["100000", "256"]),
        (["-n", "-1", "5"], ["-1"]),
        (["-n", "ten", "5"], ["'ten'"]),
        (["-n", "1.5", "5"], ["'1.5'"]),
        (["-n", "", "5"], ["''"]),
        (["-n", HUGE, "5"], [NINES]),
        (["-n", "٣", "5"], []),
        (["5", "-n"], ["-n"]),
        (["-t", "0", "5"], ["threads", "0"]),
        (["-t", "257", "5"], ["threads", "257", "256"]),
        (["-t", "-1", "5"], ["-1"]),
        (["-t", "x", "5"], ["threads", "'x'"]),
        (["-t", "1.0", "5"], ["'1.0'"]),
        (["-t", "", "5"], ["''"]),
        (["-t", HUGE, "5"], [NINES]),
        (["--reference", "-t", "0", "5"], ["threads", "0"]),
        (["--reference", "50257"], ["50257"]),
        (["-ngl", "99", "-n", "4", "5"], ["-n", "gl"]),
        (["--sampler", "best", "5"], ["'best'", "median", "greedy"]),
        (["--sampler", "", "5"], ["''"]),
        (["--sampler", "Greedy", "5"], ["'Greedy'"]),
        (["--frobnicate", "5"], ["--frobnicate", "--help"]),
        (["--temprature", "1", "5"], ["--temprature", "did you mean --temperature"]),
        (["--top-k", "-1", "5"], ["'-1'", "0 or more"]),
        (["hello", "there"], ["'hello'", "pygpt chat TEXT"]),
        (["-x", "5"], ["-x"]),
        (["--samp", "greedy", "5"], ["--samp"]),
        (["--reference=yes", "5"], ["yes"]),
        (["-", "-n", "1"], ["total", "1"]),
        (["-", "--sampler", "best"], ["'best'"]),
        (["-", "-t", "0"], ["threads", "0"]),
    ],
    ids=lambda words: " ".join(words)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_bad_arguments(arguments: list[str], named: list[str]) -> None:
    """The error is the only line: the notice about the embedded model appears only if that model answers."""
    assert_refused(run(*arguments), *named)


def test_bad_variables(small: str) -> None:
    for text in ("0", "257", "x", "-1", HUGE):
        assert_refused(run("-m", small, "5", PYGPT_THREADS=text), "PYGPT_THREADS", text[:40])
    assert_refused(run("-m", small, "5", PYGPT_ISA="sse9"), "'sse9'", "baseline")
    assert_refused(run("5", PYGPT_MODEL="/no/such/model.bin"), "/no/such/model.bin", "PYGPT_MODEL")


def test_bad_models(small: str, tmp_path: Path) -> None:
    whole = Path(small).read_bytes()

    def model(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return str(path)

    for name, content, named in (
        ("empty.bin", b"", ["0 bytes"]),
        ("header.bin", whole[:1000], ["1000 bytes", "1024"]),
        ("short.bin", whole[:-1], ["truncated", str(len(whole) - 1), str(len(whole))]),
        ("half.bin", whole[: len(whole) // 2], ["truncated", str(len(whole) // 2), str(len(whole))]),
        ("long.bin", whole + b"\0", ["too long", str(len(whole) + 1), str(len(whole))]),
        ("foreign.bin", b"GGUF" + whole[4:], ["GGUF"]),
        ("zip.bin", b"PK\3\4" + whole[4:], ["zip.bin", "PyTorch"]),
        ("text.bin", b"hello\n" * 1000, ["magic"]),
        ("version.bin", whole[:4] + struct.pack("<i", 2) + whole[8:], ["version 2", "1, 3", "5"]),
        ("heads.bin", whole[:20] + struct.pack("<i", 5) + whole[24:], ["NH = 5"]),
        ("huge.bin", whole[:12] + struct.pack("<i", 2**31 - 1) + whole[16:], [str(2**31 - 1)]),
        ("negative.bin", whole[:16] + struct.pack("<i", -1) + whole[20:], ["-1"]),
        ("a\nb.bin", whole[:-4], ["truncated"]),
    ):
        path = model(name, content)
        for options in ([], ["--reference"]):
            assert_refused(run("-m", path, *options, "5"), *named)
    for path, named in (
        (str(tmp_path / "none.bin"), ["none.bin", "no such"]),
        (str(tmp_path), [str(tmp_path), "config.json"]),
        ("/dev/zero", ["/dev/zero", "regular file"]),
        ("", ["name is empty"]),
        (str(tmp_path / "none" / "x.bin"), ["no such"]),
        (f"{small}/x", ["no such"]),
        ("x" * 300, []),
    ):
        assert_refused(run("-m", path, "5"), *named)
    Path("gpt2_124M.bin").symlink_to("nowhere")
    assert_refused(run("5"), "gpt2_124M.bin")


def test_arguments_are_checked_before_the_model() -> None:
    """Errors that need no model are reported before the model is opened."""
    for arguments in (["foo"], [], ["-n", "x", "5"], ["-t", "x", "5"], [HUGE]):
        result = run("-m", "/no/such/model.bin", *arguments)
        assert_refused(result)
        assert "/no/such" not in result.stderr


def test_damaged_weights(nan_model: str) -> None:
    for options in (["-m", nan_model], ["-m", nan_model, "--reference"], ["-m", nan_model, "--sampler", "greedy"]):
        assert_refused(run(*options, "1"), "not finite", status=1)
    assert_refused(run("-m", nan_model, "-", stdin="1\n"), "not finite", status=1)


# ---------------------------------------------------------------------------------------------------------------------
# Requests from stdin


def answer(path: str, *prompts: Sequence[int], **options: Any) -> str:
    """Return the output of `-` for these requests."""
    return "".join(" ".join(map(str, generate(path, prompt, **options))) + "\n" for prompt in prompts)


def test_requests(small: str) -> None:
    lines = b"1 2\n3\n100 101 102\n"
    assert succeed("-m", small, "-", stdin=lines) == answer(small, [1, 2], [3], [100, 101, 102])


@pytest.mark.parametrize(
    ("stdin", "prompts"),
    [
        (b"", []),
        (b"1 2", [[1, 2]]),
        (b"1 2\r\n3\r\n", [[1, 2], [3]]),
        (b"  1\t2  \n", [[1, 2]]),
        (b"0001 2\n", [[1, 2]]),
        (b'{"tokens": [1, 2]}', [[1, 2]]),
        (b' \t{"tokens":[1,2]} \r\n3\n', [[1, 2], [3]]),
        (b'{"tokens": [1], "tokens": [3]}\n', [[3]]),
    ],
)
def test_forms_of_requests(small: str, stdin: bytes, prompts: list[list[int]]) -> None:
    assert succeed("-m", small, "-", stdin=stdin) == answer(small, *prompts)


def test_blank_lines_answer_blank_lines(small: str) -> None:
    one = answer(small, [1])
    assert succeed("-m", small, "-", stdin=b"\n1\n\n  \t\r\n1\n\n") == "\n" + one + "\n\n" + one + "\n"


@pytest.mark.parametrize("options", [[], ["--reference"], ["-t", "3"]], ids=" ".join)
def test_keys_of_requests(small: str, options: list[str]) -> None:
    requests: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"tokens": [1, 2], "total": 5}, {"total": 5}),
        ({"tokens": [1, 2], "max_new_tokens": 5}, {"max_new_tokens": 5}),
        ({"tokens": [1, 2], "sampler": "greedy"}, {"sampler": "greedy", "total": 7}),
        ({"tokens": [1, 2], "sampler": "median", "total": 64}, {"total": 64}),
        ({"tokens": [1, 2], "max_new_tokens": 62, "sampler": "greedy"}, {"max_new_tokens": 62, "sampler": "greedy"}),
        ({"tokens": [1, 2]}, {"total": 7}),
    ]
    stdin = "".join(json.dumps(request) + "\n" for request, _ in requests) + "1 2\n"
    expected = "".join(answer(small, [1, 2], **keywords) for _, keywords in requests) + answer(small, [1, 2], total=7)
    assert succeed("-m", small, "-n", "7", *options, "-", stdin=stdin) == expected


def test_options_are_defaults_of_requests(small: str) -> None:
    stdin = '1\n{"tokens": [1], "sampler": "median"}\n{"tokens": [1], "max_new_tokens": 3}\n'
    expected = answer(small, [1], total=5, sampler="greedy") + answer(small, [1], total=5)
    expected += answer(small, [1], max_new_tokens=3, sampler="greedy")
    assert succeed("-m", small, "-n", "5", "--sampler", "greedy", "-", stdin=stdin) == expected


def test_the_embedded_model_serves() -> None:
    result = run("-", stdin="31373 612\n\n31373 612\n")
    line = " ".join(map(str, MAIN_JOB)) + "\n"
    assert (result.returncode, result.stdout) == (0, line + "\n" + line)
    assert result.stderr.count("\n") == 1
    assert "embedded" in result.stderr


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"foo", ["'foo'"]),
        (b"1 x 2", ["'x'"]),
        (b"-1", ["'-1'"]),
        (b"-", ["'-'"]),
        (b"211", ["211", "210"]),
        (b"1.5", ["'1.5'"]),
        (b"1,2", ["'1,2'"]),
        (b"\xff\xfe", []),
        ("٣".encode(), []),
        (HUGE.encode(), [NINES]),
        (b"1 \x00", []),
        (" ".join(["1"] * 10).encode(), ["10 tokens"]),
        (" ".join(["1"] * 65).encode(), ["65 tokens", "64"]),
        (b"[1, 2]", ["'[1,'"]),
        (b'"1"', []),
        (b"{", ["JSON"]),
        (b"{'tokens': [1]}", ["JSON"]),
        (b"{}", ["tokens"]),
        (b'{"total": 5}', ["tokens"]),
        (b'{"tokens": [1], "temp": 1}', ["'temp'", "temperature"]),
        (b'{"tokens": 1}', ["tokens"]),
        (b'{"tokens": "1"}', ["tokens"]),
        (b'{"tokens": null}', ["tokens"]),
        (b'{"tokens": {}}', ["tokens"]),
        (b'{"tokens": []}', ["at least one"]),
        (b'{"tokens": ["1"]}', ["'1'"]),
        (b'{"tokens": [1.0]}', ["'1.0'"]),
        (b'{"tokens": [true]}', ["'True'"]),
        (b'{"tokens": [null]}', ["'None'"]),
        (b'{"tokens": [[1]]}', ["'[1]'"]),
        (b'{"tokens": [-1]}', ["'-1'"]),
        (b'{"tokens": [211]}', ["'211'"]),
        (b'{"tokens": [18446744073709551617]}', ["18446744073709551617"]),
        (b'{"tokens": [' + HUGE.encode() + b"]}", []),
        (b'{"tokens": [NaN]}', ["'nan'"]),
        (b'{"tokens": [1], "total": 1}', ["total", "1"]),
        (b'{"tokens": [1], "total": 65}', ["total", "65", "64"]),
        (b'{"tokens": [1], "total": "5"}', ["total", "'5'"]),
        (b'{"tokens": [1], "total": 5.0}', ["total", "5.0"]),
        (b'{"tokens": [1], "total": true}', ["total", "True"]),
        (b'{"tokens": [1], "total": 1e999}', ["total", "inf"]),
        (b'{"tokens": [1], "max_new_tokens": 0}', ["max_new_tokens", "0"]),
        (b'{"tokens": [1], "max_new_tokens": -1}', ["max_new_tokens", "-1"]),
        (b'{"tokens": [1], "max_new_tokens": 64}', ["max_new_tokens", "64", "63"]),
        (b'{"tokens": [1], "max_new_tokens": [3]}', ["max_new_tokens", "[3]"]),
        (b'{"tokens": [1], "total": 5, "max_new_tokens": 4}', ["total", "max_new_tokens"]),
        (b'{"tokens": [1], "sampler": "best"}', ["'best'"]),
        (b'{"tokens": [1], "sampler": null}', ["None"]),
        (b'{"tokens": [1], "seed": null}', ["'seed'", "null"]),
        (b'{"tokens": [1], "total": null}', ["'total'", "null"]),
        (b'{"tokens": [1], "temperature": "1"}', ["temperature", "'1'"]),
        (b'{"tokens": [1], "temperature": "' + b"9" * 10_000 + b'"}', ["temperature is", "a finite number above 0"]),
        (b'{"tokens": [1], "temperature": NaN}', ["temperature", "nan"]),
        (b'{"tokens": [1], "temperature": -1}', ["temperature", "-1"]),
        (b'{"tokens": [1], "temprature": 1}', ["'temprature'", "did you mean temperature?"]),
        (b'{"tokens": [1], "logit_bias": {"211": 1}}', ["211", "210"]),
        (b'{"tokens": [1], "logit_bias": {"x": 1}}', ["'x'"]),
        (b'{"tokens": [1], "logit_bias": {"1": 1e31}}', ["logit_bias of token 1", "1e+31"]),
        (b'{"tokens": [1], "bad_words_ids": [[]]}', ["bad_words_ids", "empty"]),
        (b'{"tokens": [1], "suppress_tokens": [1, 300]}', ["300", "210"]),
        (b'{"tokens": [1], "logits_processor": [1]}', ["unknown key 'logits_processor'"]),
        (b'{"tokens": [1], "top_k": 5.0}', ["top_k", "5.0"]),
        (b'{"tokens": [1], "top_p": [1]}', ["top_p", "[1]"]),
        (b'{"tokens": [1], "min_p": true}', ["min_p", "True"]),
        (b'{"tokens": [1], "seed": -1}', ["seed", "-1"]),
        (b'{"tokens": [1], "repetition_penalty": 0}', ["repetition_penalty", "0"]),
        (b'{"tokens": [1], "sampler": "greedy", "seed": 1}', ["seed", "greedy"]),
        (b'{"tokens": [1], "stop_token_ids": [211]}', ["211", "210"]),
        (b'{"tokens": [1], "stop_token_ids": "5"}', ["stop_token_ids", "'5'"]),
        (b'{"tokens": [1], "stop_strings": [""]}', ["empty"]),
        (b'{"tokens": [1], "stop_strings": {"a": 1}}', ["stop_strings"]),
        (b'{"tokens": [1], "overflow": true}', ["overflow", "True"]),
        (b'{"tokens": [1], "do_sample": true}', ["'do_sample'"]),
        (b'{"tokens": [1], "sampler": ["greedy"]}', ["greedy"]),
        (b'{"tokens": [1]} {"tokens": [2]}', ["JSON"]),
        (b'{"tokens": [1], "\xff": 1}', ["JSON"]),
        (b'{"tokens": ' + b"[" * 100_000, ["JSON"]),
        (b"1 " * 600_000, ["longer", str(1 << 20)]),
        (b'{"tokens": [1], "' + b"k" * 10_000 + b'": 1}', ["unknown key 'kkk", "tokens"]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_requests(small: str, line: bytes, named: list[str]) -> None:
    """Earlier requests are answered, later ones are not. stderr has one line, and the status is 2."""
    result = run("-m", small, "-", stdin=b"1 2\n" + line + b"\n3\n")
    assert_refused(result, *named, stdout=answer(small, [1, 2]))


def test_a_bad_first_request_to_the_embedded_model() -> None:
    """The embedded model did not answer, so the notice about it does not appear."""
    assert_refused(run("-", stdin="foo\n"), "'foo'")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, stops, overflow

# Options of the command, and the same options for generate().
CHOICES: list[tuple[list[str], dict[str, Any]]] = [
    (["--sampler", "sample", "-s", "3"], {"sampler": "sample", "seed": 3}),
    (["--seed=18446744073709551615"], {"seed": 2**64 - 1}),
    (["--temp", "0.7", "-s0"], {"temperature": 0.7, "seed": 0}),
    (["--temp", "1e1", "--top-k", "0", "--seed", "1"], {"temperature": 10, "seed": 1}),
    (["--top-k", "5", "--top-p", ".9", "--min-p", "0.05", "-s", "9"], {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "seed": 9}),
    (["--repeat-penalty", "1.5", "--top-k", "1"], {"repetition_penalty": 1.5, "top_k": 1}),
    (["--temp", "0"], {"sampler": "greedy"}),
    (["--repeat-penalty", "1.5", "--presence-penalty", "-0.5"], {"repetition_penalty": 1.5, "presence_penalty": -0.5}),
    (["--frequency-penalty", "1", "--no-repeat-ngram-size", "2"], {"frequency_penalty": 1, "no_repeat_ngram_size": 2}),
    (["--logit-bias", "7=2.5", "--logit-bias", "8=-1", "--temp", "0"], {"logit_bias": {7: 2.5, 8: -1}, "temperature": 0}),
    (["--suppress-token", "5", "--bad-words", "1 2", "-s1"], {"suppress_tokens": 5, "bad_words_ids": [[1, 2]], "seed": 1}),
    (["--max-new-tokens", "30", "-s", "4"], {"max_new_tokens": 30, "seed": 4}),
    (["--overflow", "slide", "-n", "150"], {"overflow": "slide", "total": 150}),
    (["--overflow", "stop", "--max-new-tokens", "900", "-s", "5"], {"overflow": "stop", "max_new_tokens": 900, "seed": 5}),
]


@pytest.mark.parametrize(("words", "keywords"), CHOICES, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_options_of_generation(small: str, words: list[str], keywords: dict[str, Any]) -> None:
    """An option gives the same ids on the command line, and as a default of requests."""
    expected = generate(small, [1, 2], **keywords)
    assert ids("-m", small, *words, "1", "2") == expected
    line = " ".join(map(str, expected)) + "\n"
    assert succeed("-m", small, "-t", "3", *words, "-", stdin="1 2\n1 2\n") == line * 2


@pytest.mark.parametrize("program", [[], ["--reference"]])
def test_options_of_requests(small: str, program: list[str]) -> None:
    """They are named as those of generate(). The reference takes only short ones: each token computes the whole sequence."""
    asked = [{"tokens": [1, 2], **keywords} for _, keywords in CHOICES if not program or "overflow" not in keywords]
    found = succeed("-m", small, *program, "-", stdin="".join(json.dumps(request) + "\n" for request in asked))
    assert [[int(word) for word in line.split()] for line in found.splitlines()] == [
        generate(small, **request) for request in asked
    ]


def test_stop_tokens(small: str) -> None:
    whole = generate(small, [1, 2], total=40)
    first = whole[5]
    expected = whole[: whole.index(first) + 1]
    assert ids("-m", small, "-n", "40", "--stop-token", str(first), "1", "2") == expected
    assert ids("-m", small, "-n", "40", "--stop-token", "0" + str(first), "--stop-token", str(whole[-1]), "1", "2") == [
        token for i, token in enumerate(whole) if not {first, whole[-1]} & set(whole[:i])
    ]
    line = " ".join(map(str, expected)) + "\n"
    for stops in (first, [first]):
        request = json.dumps({"tokens": [1, 2], "total": 40, "stop_token_ids": stops})
        assert succeed("-m", small, "-", stdin=request + "\n1 2\n") == line + answer(small, [1, 2])
    assert succeed("-m", small, "-n", "40", "--stop-token", str(first), "-", stdin="1 2\n") == line


def test_stop_strings_and_end_of_text() -> None:
    """The embedded model has GPT-2's vocabulary, and its greedy answer to the main job contains 50256."""
    job = [13, 628, 50256, 33, 11262, 9795, 25, 198]  # as recorded in data/goldens.json
    words = ["--sampler", "greedy", "31373", "612"]
    end = job.index(50256) + 1
    assert numbers(run(*words).stdout) == job
    assert numbers(run("--stop-at-eot", *words).stdout) == job[:end]
    assert numbers(run("--stop", "<|endoftext|>", *words).stdout) == job[:end]
    assert numbers(run("--stop", "no such text", "--stop", "of|", "--stop", "text|", *words).stdout) == job[:end]
    assert numbers(run("--stop-at-eot", "--stop-token", "628", *words).stdout) == job[:2]
    request = json.dumps({"tokens": [31373, 612], "stop_strings": ["oftext"]})
    line = " ".join(map(str, job))
    result = run("--reference", "--sampler", "greedy", "-", stdin=f"{request}\n31373 612\n")
    assert result.stdout == " ".join(map(str, job[:end])) + f"\n{line}\n"


def test_requests_complete_the_commands_options(small: str) -> None:
    """Fields of a request override options of the command, and remove options that contradict them."""
    words = ["-n", "30", "--temp", "0.7", "--top-k", "20", "-s", "8"]
    options: dict[str, Any] = {"total": 30, "temperature": 0.7, "top_k": 20, "seed": 8}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, options),
        ({"seed": 9}, {**options, "seed": 9}),
        ({"top_k": 0, "top_p": 0.5}, {**options, "top_k": 0, "top_p": 0.5}),
        ({"sampler": "greedy"}, {"total": 30, "sampler": "greedy"}),
        ({"sampler": "median"}, {"total": 30}),
        ({"sampler": "sample"}, options),
        ({"max_new_tokens": 3}, {"max_new_tokens": 3, "temperature": 0.7, "top_k": 20, "seed": 8}),
    ]
    stdin = "".join(json.dumps({"tokens": [1, 2], **asked}) + "\n" for asked, _ in cases)
    assert succeed("-m", small, *words, "-", stdin=stdin) == "".join(answer(small, [1, 2], **meant) for _, meant in cases)
    stdin = '{"tokens": [1], "seed": 3}\n{"tokens": [1]}\n{"tokens": [1], "total": 5}\n'
    expected = answer(small, [1], max_new_tokens=6, seed=3) + answer(small, [1], max_new_tokens=6, sampler="greedy")
    expected += answer(small, [1], total=5, sampler="greedy")
    assert succeed("-m", small, "--sampler", "greedy", "--max-new-tokens", "6", "-", stdin=stdin) == expected


def test_unseeded_answers_are_random(small: str) -> None:
    lines = succeed("-m", small, "--temp", "5", "-n", "60", "-", stdin="1\n" * 5).splitlines()
    assert len(set(lines)) == 5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sampler", "median", "--temp", "0"], ["temperature", "median"]),
        (["--logit-bias", "5"], ["logit_bias of token 5", "''"]),
        (["--bad-words", "5 x"], ["'x'"]),
        (["--no-repeat-ngram-size", "-1"], ["no_repeat_ngram_size (--no-repeat-ngram-size)", "'-1'"]),
        (["--frequency-penalty", "x"], ["frequency_penalty (--frequency-penalty)", "'x'"]),
        (["--temp", "-1"], ["temperature", "-1"]),
        (["--temp", "nan"], ["temperature", "nan"]),
        (["--temp", "inf"], ["temperature", "inf"]),
        (["--temp", "1e999"], ["temperature", "inf"]),
        (["--temp", "hot"], ["temperature (--temp)", "'hot'"]),
        (["--temp", "1_0"], ["'1_0'"]),
        (["--temp", " 1"], ["' 1'"]),
        (["--temp", ""], ["''"]),
        (["--temp", HUGE], ["temperature", "inf"]),
        (["--top-k", "-1"], ["top_k (--top-k)", "'-1'"]),
        (["--top-k", "1.5"], ["'1.5'"]),
        (["--top-k", HUGE], [NINES]),
        (["--top-p", "1.1"], ["top_p", "1.1"]),
        (["--top-p", "-0.1"], ["top_p", "-0.1"]),
        (["--min-p", "2"], ["min_p", "2"]),
        (["--repeat-penalty", "0"], ["repetition_penalty", "0"]),
        (["--seed", "-1"], ["seed (--seed)", "'-1'"]),
        (["-s", "18446744073709551616"], ["seed", "18446744073709551616"]),
        (["-s", "x"], ["'x'"]),
        (["--sampler", "greedy", "--temp", "1"], ["temperature", "greedy"]),
        (["--sampler", "median", "-s", "1"], ["seed", "median"]),
        (["--stop", ""], ["stop string", "empty"]),
        (["--stop-token", "50257"], ["50257", "50256"]),
        (["--stop-token", "x"], ["'x'"]),
        (["--overflow", "wrap"], ["'wrap'", "stop", "slide"]),
        (["--draft-model", "q8_0"], ["--draft-model", "--speculate"]),
        (["--overflow", ""], ["''"]),
        (["--max-new-tokens", "0"], ["max_new_tokens", "0"]),
        (["--max-new-tokens", "256"], ["max_new_tokens", "256", "255"]),
        (["--max-new-tokens", "5", "-n", "6"], ["total", "max_new_tokens"]),
        (["--max-new-tokens", "5", "--overflow", "stop", *["7"] * 255], ["256 tokens", "256", "slide"]),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_bad_options_of_generation(arguments: list[str], named: list[str]) -> None:
    assert_refused(run(*arguments, "5"), *named)


def test_stops_outside_the_vocabulary(small: str) -> None:
    assert_refused(run("-m", small, "--stop-at-eot", "5"), "50257", "211")
    assert_refused(run("-m", small, "--stop", "a", "5"), "50257", "211")
    assert_refused(run("-m", small, "--stop", "a", "-"), "50257", "211")


COUNTING = """
import sys
from pygpt.network import Network
from pygpt.__main__ import main

step = Network.step

def counting(self, rows):
    print(len(rows), file=sys.stderr)
    return step(self, rows)

Network.step = counting
sys.exit(main(sys.argv[1:]))
"""


def test_requests_go_on_from_where_they_part(small: str) -> None:
    """A request computes only the tokens after the prefix that it shares with the previous one."""
    start = generate(small, [1, 2, 3], max_new_tokens=3)
    talk = [1, 2, 3, *start, 9, 9]
    requests = [[1, 2, 3], talk, talk[:4], [5, 2]]
    stdin = "".join(json.dumps({"tokens": tokens, "max_new_tokens": 3}) + "\n" for tokens in requests)
    words = [sys.executable, "-c", COUNTING, "-m", small, "-"]
    result = execute(words, input=stdin, timeout=DEADLINE, env=environment())
    assert (result.returncode, result.stdout) == (0, answer(small, *requests, max_new_tokens=3))
    assert result.stderr.split() == [*"311", *"311", *"111", *"211"]


# ---------------------------------------------------------------------------------------------------------------------
# Streaming and Ctrl-C

STEPPED = """
import os, signal, sys, time
from pygpt.generation.engine import Engine, Event
from pygpt.__main__ import main

# A model that makes a token when a byte comes through the pipe: 'g' go on, 'i' be interrupted once the tokens are out.
gate = int(sys.argv[1])

def run(self):
    job = self._inbox.popleft().job
    [completion] = job.completions
    for token in range(completion.new):
        os.read(gate, 1)
        if token == completion.new - 1:
            completion.finish_reason = "length"
        yield Event(job, 0, 10 + token)
    if os.read(gate, 1) == b"i":
        raise KeyboardInterrupt

Engine.run = run
sys.exit(main(sys.argv[2:]))
"""


class Stepped:
    """The command with a model that the test steps. The test reads the flushed output byte by byte."""

    def __init__(self, *arguments: str) -> None:
        gate, self.gate = os.pipe()
        words, pipe = [sys.executable, "-c", STEPPED, str(gate), *arguments], subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(), pass_fds=[gate])
        os.close(gate)

    def ask(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def step(self, *, byte: bytes = b"g") -> None:
        os.write(self.gate, byte)

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes of output; fail if they do not come."""
        assert self.process.stdout is not None
        data = b""
        while len(data) < count:
            ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
            assert ready, f"only {data!r} was flushed"
            piece = os.read(self.process.stdout.fileno(), count - len(data))
            assert piece, f"the output ended after {data!r}"
            data += piece
        return data

    def nothing_more(self) -> None:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 0) == ([], [], [])

    def end(self) -> tuple[int, bytes, bytes]:
        """Close the command's input and gate; return its status and the rest of its output."""
        os.close(self.gate)
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err


@pytest.fixture
def stepped(small: str) -> Iterator[Stepped]:
    """A command that answers requests with a stepped model."""
    child = Stepped("-m", small, "-t", "1", "-n", "4", "-")
    yield child
    if child.process.poll() is None:
        child.process.kill()
    child.process.communicate()


def test_requests_stream(stepped: Stepped) -> None:
    """Each id arrives before the next one is computed. The space after an id marks its end."""
    for _ in range(2):
        stepped.ask(b"1\n")
        for expected in (b"10 ", b"11 ", b"12\n"):
            stepped.nothing_more()
            stepped.step()
            assert stepped.read(3) == expected
        stepped.step()  # raised inside complete()
    stepped.ask(b"\n")
    assert stepped.read(1) == b"\n"
    assert stepped.end() == (0, b"", b"")


def test_plain_output_streams(small: str) -> None:
    child = Stepped("-m", small, "-t", "1", "-n", "4", "1")
    for expected in (b"10\n", b"11\n", b"12\n"):
        child.nothing_more()
        child.step()
        assert child.read(3) == expected
    child.step()
    assert child.end() == (0, b"", b"")


@pytest.mark.parametrize("made", [0, 1, 2])
def test_interrupt_ends_an_answers_line(stepped: Stepped, made: int) -> None:
    """Ctrl-C ends the line after any number of tokens. Then the next request is answered."""
    stepped.ask(b"1\n\n")
    for token in range(made):
        stepped.step()
        assert stepped.read(3) == b"%d " % (10 + token)
    wait_until_asleep(stepped.process.pid)
    stepped.process.send_signal(signal.SIGINT)
    assert stepped.read(1) == b"\n"
    assert stepped.read(1) == b"\n"  # the answer to the blank line
    stepped.ask(b"1\n")
    for _ in range(4):
        stepped.step()
    assert stepped.read(9) == b"10 11 12\n"
    assert stepped.end() == (0, b"", b"")


def test_interrupt_just_after_an_answer(stepped: Stepped) -> None:
    """The answer's line has ended. A second newline would be read as the next answer, and shift all later answers."""
    stepped.ask(b"1\n1\n")
    for byte in (b"g", b"g", b"g", b"i"):
        stepped.step(byte=byte)
    assert stepped.read(9) == b"10 11 12\n"
    for _ in range(4):
        stepped.step()
    assert stepped.read(9) == b"10 11 12\n"
    assert stepped.end() == (0, b"", b"")


def test_interrupt_while_the_pipe_is_full(small: str) -> None:
    """If the command waits for a full pipe to write the end of a line, Ctrl-C does not end that line twice."""
    if not hasattr(fcntl, "F_SETPIPE_SZ"):
        pytest.skip("needs pipes of a given size")
    read, write = os.pipe()
    room = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    lines = b"\n" * (room + 10)
    with serving("-m", small, "-t", "1", stdout=write) as child:
        os.close(write)
        assert child.stdin is not None
        assert child.stderr is not None
        child.stdin.write(lines + b"1 2\n")
        child.stdin.close()
        deadline = time.monotonic() + DEADLINE
        while struct.unpack("i", fcntl.ioctl(read, termios.FIONREAD, bytes(4))) != (room,):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        wait_until_asleep(child.pid)
        child.send_signal(signal.SIGINT)
        with open(read, "rb") as stdout:
            assert stdout.read() == lines + answer(small, [1, 2]).encode()
        assert (child.wait(DEADLINE), child.stderr.read()) == (0, b"")


def wait_until_asleep(pid: int) -> None:
    """Wait until the process sleeps in a system call, waiting for a token or a request."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        pytest.skip("needs /proc")
    deadline = time.monotonic() + DEADLINE
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("options", [["-t", "1"], ["-t", "4"], ["--reference"]], ids=" ".join)
def test_interrupt_when_idle(small: str, options: list[str]) -> None:
    child = Stepped("-m", small, *options, "-")
    child.ask(b"\n")
    assert child.read(1) == b"\n"
    wait_until_asleep(child.process.pid)
    child.process.send_signal(signal.SIGINT)
    assert child.process.wait(DEADLINE) == 130
    assert child.end() == (130, b"", b"")


def test_interrupt_of_a_completion(small: str) -> None:
    child = Stepped("-m", small, "-t", "1", "1")
    child.step()
    assert child.read(3) == b"10\n"
    wait_until_asleep(child.process.pid)
    child.process.send_signal(signal.SIGINT)
    assert child.process.wait(DEADLINE) == 130
    assert child.end() == (130, b"", b"")


@pytest.mark.parametrize("threads", ["1", "2", "8"])
def test_interrupt_of_a_real_answer(tmp_path: Path, threads: str) -> None:
    """Ctrl-C ends an answer of thousands of tokens early. The same process then answers the next request completely."""
    path = str(tmp_path / "long.bin")
    make(path, **{**SHAPE, "maxT": 20000})
    child = serving("-m", path, "-t", threads)
    assert child.stdin is not None
    assert child.stdout is not None
    for _ in range(3):
        child.stdin.write(b'{"tokens": [1], "total": 20000}\n')
        child.stdin.flush()
        start = child.stdout.read(8)
        child.send_signal(signal.SIGINT)
        line = start + child.stdout.readline()
        assert line.endswith(b"\n")
        told = [int(word) for word in line.split()]
        assert 1 <= len(told) < 19999
        assert told[:3] == generate(path, [1], total=4)[: len(told)]
    child.stdin.write(b"1 2\n")
    out, err = child.communicate(timeout=DEADLINE)
    assert (child.returncode, out.decode(), err) == (0, answer(path, [1, 2]), b"")


# ---------------------------------------------------------------------------------------------------------------------
# Pipes, full disks, closed descriptors


@pytest.mark.parametrize("arguments", [["1"], ["-n", "64", "1"], ["--reference", "1"], ["-"]], ids=" ".join)
def test_broken_pipe(small: str, arguments: list[str]) -> None:
    """If the reader closes the pipe, the status is 141, without a message."""
    read, write = os.pipe()
    os.close(read)
    words, pipe = [*PYGPT, "-m", small, *arguments], subprocess.PIPE
    result = subprocess.run(words, input=b"1\n" * 100, stdout=write, stderr=pipe, timeout=DEADLINE, env=environment())
    os.close(write)
    assert (result.returncode, result.stderr) == (141, b"")


def test_a_reader_that_leaves_early(small: str) -> None:
    child = Stepped("-m", small, "-t", "1", "1")
    child.step()
    assert child.read(3) == b"10\n"
    assert child.process.stdout is not None
    child.process.stdout.close()
    child.step()
    assert child.process.wait(DEADLINE) == 141
    assert child.process.stderr is not None
    assert child.process.stderr.read() == b""
    os.close(child.gate)
    child.process.stderr.close()
    assert child.process.stdin is not None
    child.process.stdin.close()


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=" ".join)
def test_help_that_cannot_be_written(arguments: list[str], unbuffered: str) -> None:
    result = run(*arguments, shell='"$@" > /dev/full', PYTHONUNBUFFERED=unbuffered)
    assert_refused(result, "No space left on device", status=1)
    assert_refused(run(*arguments, shell='"$@" >&-'), "stdout is closed", status=1)


@needs_full
@pytest.mark.parametrize("arguments", [["1"], ["--reference", "1"], ["-"]], ids=" ".join)
def test_full_disk(small: str, arguments: list[str]) -> None:
    result = run("-m", small, *arguments, stdin="1\n", shell='"$@" > /dev/full')
    assert_refused(result, "No space left on device", status=1)


@needs_full
def test_output_that_is_still_buffered_when_the_job_is_done() -> None:
    """A report is buffered in this way, because it is not flushed line by line."""
    program = "import sys; from pygpt.commands.console import status_of; sys.exit(status_of(lambda: print('a report')))"
    words = [sys.executable, "-c", program]
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, env=environment(), timeout=DEADLINE, check=False)
    os.close(write)
    assert (gone.returncode, gone.stderr) == (141, b"")
    with open("/dev/full", "wb") as full:
        told = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=environment(), timeout=DEADLINE, check=False)
    assert (told.returncode, told.stderr) == (1, b"pygpt: error: [Errno 28] No space left on device\n")


def test_closed_stdout(small: str) -> None:
    for arguments in (["1"], ["-"]):
        assert_refused(run("-m", small, *arguments, stdin="1\n", shell='"$@" >&-'), "stdout", status=1)


def test_closed_stdin(small: str) -> None:
    result = run("-m", small, "1", "2", shell='"$@" <&-')
    assert (result.returncode, result.stderr) == (0, "")
    assert numbers(result.stdout) == generate(small, [1, 2])
    result = run("-m", small, "-", shell='"$@" <&-')
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("stderr", ["2>&-", pytest.param("2>/dev/full", marks=needs_full)])
def test_stderr_that_cannot_be_written(stderr: str) -> None:
    """If stderr cannot be written, the messages are dropped. They do not appear on stdout, and the job continues."""
    shell = f'"$@" {stderr}'
    assert numbers(run("31373", "612", shell=shell).stdout) == MAIN_JOB
    assert run("31373", "612", shell=shell).returncode == 0
    for arguments in (["foo"], ["50257"], []):
        result = run(*arguments, shell=shell)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


def test_all_closed(small: str) -> None:
    assert run("-m", small, "1", shell='"$@" <&- >&- 2>&-').returncode == 1


# ---------------------------------------------------------------------------------------------------------------------
# Subcommands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help(name: str) -> None:
    assert re.match(rf"usage: pygpt {name} ", succeed(name, "--help"))
    assert f"  {name:<10}{COMMANDS[name][1]}\n" in succeed("--help")


@pytest.mark.parametrize("word", ["trian", "Train", "training", "h", "x" * 5000])
def test_a_misspelt_subcommand_names_all(word: str) -> None:
    assert_refused(run(word, "--data", "x"), repr(word[:40]), *COMMANDS)


# ---------------------------------------------------------------------------------------------------------------------
# Help, version, imports


def test_version() -> None:
    assert succeed("--version") == f"pygpt {pygpt.__version__}\n"


def test_help_names_every_option() -> None:
    text = succeed("--help")
    assert text == succeed("-h") == succeed("--help", "foo", COLUMNS="40")
    for option in ("-m", "--model", "-n", "--total", "-t", "--threads", "--sampler", "--reference", "--version", "TOKEN", "-"):
        assert option in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def examples() -> list[str]:
    """Return the example commands of --help, without their descriptions."""
    text = succeed("--help").partition("examples:\n")[2]
    lines = [line.strip() for line in text.splitlines() if "python -m pygpt" in line]
    return [re.split(r"\s{2,}", line)[0] for line in lines]


def test_examples_of_the_help_run(tmp_path: Path) -> None:
    shown = examples()
    assert len(shown) >= 5
    make("gpt2_124M.bin", L=1, NH=1, C=8, V=50257, maxT=1024, seed=1)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    variables = environment(PATH=f"{python.parent}:{os.environ['PATH']}")
    for line in shown:
        result = execute(["/bin/sh", "-c", line], timeout=DEADLINE, env=variables)
        assert (result.returncode, result.stderr) == (0, ""), line
        assert re.fullmatch(r"(\d+[ \n])+", result.stdout), line


@pytest.mark.parametrize(
    "arguments",
    [
        ["1", "2"],
        ["--reference", "1", "2"],
        ["-t", "2", "--sampler", "greedy", "1"],
        ["--temp", "2", "1"],
        ["-"],
        ["foo"],
        ["--help"],
    ],
)
def test_light_imports(small: str, arguments: list[str]) -> None:
    """The command imports only the modules that its job needs, so that it starts fast."""
    program = """
import sys
from pygpt.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"numpy", "tiktoken", "json", "subprocess", "asyncio", "multiprocessing", "logging", "unittest"}
heavy |= {name for name in sys.modules if name.startswith("pygpt.commands.")}
heavy -= {f"pygpt.commands.{name}" for name in ("complete", "console", "options")}
sys.exit(" ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    words = [sys.executable, "-c", program, "-m", small, *arguments]
    result = execute(words, input="1 2\n\n3\n", timeout=DEADLINE, env=environment())
    assert result.returncode == 0, result.stderr


def test_wherever_it_runs(small: str) -> None:
    """The package works from any folder, and reads only named files there."""
    for name in ("json.py", "numpy.py", "argparse.py"):
        (Path("elsewhere") / name).parent.mkdir(exist_ok=True)
        (Path("elsewhere") / name).write_text("raise SystemExit('the wrong module')\n")
    Path("data").mkdir()
    assert ids("-m", small, "1", "2") == generate(small, [1, 2])
    relative = os.path.relpath(small)
    assert ids("-m", relative, "1", "2") == generate(small, [1, 2])
