"""Test pygpt chat as a process, on pipes and on a terminal.

Most tests replace the `pygpt` command by a fake: a small package on PYTHONPATH that speaks the protocol and logs all requests.
So a test controls every id and every fault that the chat sees. The last section runs the real command. No test depends on
time: tests wait for a text, a line of the log or the end of a process."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import PIPE_BYTES, ROOT, assert_one_line_error, execute, forks, gist
from running import run as run_command

from pygpt import GPT2, InputError
from pygpt.commands import chat as chat_module
from pygpt.commands.child import ChildError, child_environment, read_ids
from pygpt.config import Config
from pygpt.formats.checkpoint import Checkpoint, write_checkpoint
from pygpt.hub.find import EMBEDDED_MODEL
from pygpt.tokenizer import Tokenizer, vocabulary_of

CHAT = ROOT / "chat.py"
TOKENIZER = Tokenizer()
PATIENCE = 60.0  # seconds; only a failing test waits this long

# Runs a command as a shell does: Ctrl-C has its default effect, and a terminal on stdin is the controlling terminal.
LAUNCHER = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if os.isatty(0):
    os.close(os.open(os.ttyname(0), os.O_RDWR))
os.execv(sys.argv[1], sys.argv[1:])
"""

# The fake command. A test's code may replace `start`, `answer` and `interrupted`.
FAKE = """
import json, os, signal, sys

def log(**entry):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(entry) + "\\n")

def put(text):
    sys.stdout.write(text)
    sys.stdout.flush()

def tell(text):
    sys.stderr.write(text)
    sys.stderr.flush()

def put_ids(ids):
    for i, token in enumerate(ids, start=1):
        put(f"{token}" + (" " if i < len(ids) else "\\n"))

def start():
    pass

def answer(tokens, new):  # by default, an echo; `request` has the other fields of the request
    put_ids(tokens[:new])

def interrupted():
    put("\\n")

#CODE#

signal.alarm(120)  # ends this process soon after its test
try:
    log(pid=os.getpid(), argv=sys.argv[1:], group=os.getpgrp())
    start()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        log(**request)
        try:
            answer(request["tokens"], request["max_new_tokens"])
        except KeyboardInterrupt:
            log(interrupted=True)
            interrupted()
    log(ended=True)
except KeyboardInterrupt:
    sys.exit(130)
"""

# Writes some ids, then waits for Ctrl-C. Answers later requests with an echo.
ENDLESS_ONCE = """
def answer(tokens, new):
    global answer
    answer = put_ids_of
    put("31373 612 ")
    signal.pause()

def put_ids_of(tokens, new):
    put_ids(tokens)
"""


class Fake:
    """The package of the fake command, its log, and the environment in which chat.py finds it."""

    def __init__(self, folder: Path, code: str = "") -> None:
        self.cwd = folder / "cwd"  # empty, so without gpt2_124M.bin
        self.cwd.mkdir()
        self._log = folder / "log"
        package = folder / "fake" / "pygpt"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        self._main = package / "__main__.py"
        self.code(code)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYGPT_", "PYTHON"))} | {
            "FAKE_LOG": str(self._log),
            "PYTHONPATH": str(package.parent),
            "PYTHONUTF8": "1",
            "TERM": "dumb",  # turns off colours and bracketed paste
        }

    def code(self, code: str) -> None:
        self._main.write_text(FAKE.replace("#CODE#", code))

    def command(self, *words: str | bytes) -> list[str | bytes]:
        return [sys.executable, "-c", LAUNCHER, sys.executable, str(CHAT), *words]

    def run(self, *words: str | bytes, text: bytes | None = None, **environment: str) -> "subprocess.CompletedProcess[bytes]":
        """Run chat.py on pipes until it ends, with `text` on its stdin."""
        if not environment and len(text or b"") <= PIPE_BYTES:
            return forks().run([str(CHAT), *map(os.fsdecode, words)], text, self.cwd, self.environment)
        return subprocess.run(
            self.command(*words),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            cwd=self.cwd,
            env=self.environment | environment,
            timeout=PATIENCE,
        )

    def log(self, key: str) -> list[Any]:
        """Return the values that the children logged under this key, in order."""
        if not self._log.exists():
            return []
        entries = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [entry[key] for entry in entries if key in entry]

    def wait_for(self, key: str) -> None:
        """Wait until a child has logged this key."""
        wait_until(lambda: bool(self.log(key)))

    def model(self, maxT: int) -> str:
        """Write the smallest model file with this context and GPT-2's vocabulary; return its name."""
        config = Config(maxT=maxT, V=TOKENIZER.V, L=1, NH=1, C=1)
        path = self.cwd / f"context{maxT}.bin"
        write_checkpoint(path, config, {name: np.zeros(shape) for name, shape, _, _ in config.tensors(padded=False)})
        return path.name


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def state(pid: int) -> str:
    """Return Linux's letter for the state of a process: R runs, S sleeps, Z has ended. Without /proc, return S."""
    path = Path(f"/proc/{pid}/stat")
    return path.read_text().rpartition(")")[2].split()[0] if path.exists() else "S"


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def replying(text: str, *, cut: int = 0) -> str:
    """Return the code of a fake that answers with this text without its last `cut` ids."""
    tokens = ids_of(text)
    return f"def answer(tokens, new): put_ids({tokens[: len(tokens) - cut]})"


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def assert_refused(result: "subprocess.CompletedProcess[bytes]", status: int, *named: str) -> None:
    """Assert that the run wrote only one error line."""
    assert (result.returncode, result.stdout) == (status, b""), result.stderr
    assert_one_line_error(result.stderr.decode(), *named)


# ---------------------------------------------------------------- one text


def test_words_are_one_text_answered_once(fake: Fake) -> None:
    result = fake.run("Ladies", "and")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"Ladies and\n", b"")
    assert fake.log("tokens") == [[43, 50192, 290]]
    assert fake.log("max_new_tokens") == [40]
    assert fake.log("argv") == [["-"]]
    assert fake.log("ended") == [True]


def test_quoted_text_keeps_its_spaces_and_lines(fake: Fake) -> None:
    assert fake.run(" Ladies  and\n").stdout == b" Ladies  and\n\n"


def test_text_after_two_dashes_may_look_like_an_option(fake: Fake) -> None:
    assert fake.run("to", "-n", "7", "--", "-n", "--").stdout == b"to -n --\n"
    assert fake.log("max_new_tokens") == [7]


def test_piped_text_is_whole_except_its_last_newline(fake: Fake) -> None:
    result = fake.run(text=b"one\n\ntwo\n\n")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one\n\ntwo\n\n", b"")
    assert fake.log("tokens") == [ids_of("one\n\ntwo\n")]


@pytest.mark.parametrize("text", [b"", b"\n"])
def test_empty_piped_text_is_refused(fake: Fake, text: bytes) -> None:
    assert_refused(fake.run(text=text), 2, "empty")


@pytest.mark.parametrize("words", [[""], ["", ""], ["--", ""]])
def test_empty_words_are_refused_before_anything_starts(fake: Fake, words: list[str]) -> None:
    assert_refused(fake.run(*words), 2, "empty")
    assert fake.log("pid") == []


def test_end_of_text_typed_as_text_is_text(fake: Fake) -> None:
    assert fake.run("<|endoftext|>").stdout == b"<|endoftext|>\n"
    assert 50256 not in fake.log("tokens")[0]


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["utf8", "ascii"])
def test_text_is_utf8_in_every_locale(fake: Fake, locale: dict[str, str]) -> None:
    fake.environment.update(locale)
    assert_refused(fake.run(b"caf\xe9"), 2, "is not UTF-8")
    assert_refused(fake.run(text=b"caf\xe9"), 2, "0xe9 ... 3 ... UTF-8")
    assert_refused(fake.run(text="café".encode("utf-16")), 2, "UTF-16")
    fake.run("café")
    fake.run(text="\ufeffcafé\r\n".encode())
    assert fake.log("tokens") == [[66, 1878, 2634]] * 2


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_newlines_of_piped_and_given_text(fake: Fake, newline: str) -> None:
    text = f"Ladies and{newline}{newline}gentlemen"
    fake.run(text=(text + newline).encode())
    fake.run(text)
    assert fake.log("tokens") == [ids_of("Ladies and\n\ngentlemen")] * 2


@pytest.mark.parametrize("length", [0, 1, 10**5])
def test_text_of_any_length_reaches_the_child(fake: Fake, length: int) -> None:
    text = b"x" + b" y" * length  # the longest text is much larger than a pipe's buffer
    assert fake.run("--overflow", "slide", "-n", str(length + 1), text=text).stdout == text + b"\n"


# ---------------------------------------------------------------- options


def test_options_of_the_command_are_passed_on_unjudged(fake: Fake) -> None:
    model = fake.model(16)
    fake.run("-m", model, "hi", "--threads", "9", "--no-mmap", "-t3", "-n", "3")
    assert fake.log("argv") == [[f"--model={model}", "--threads=3", "--no-mmap", "-"]]
    assert fake.log("max_new_tokens") == [3]


SAMPLING_FLAGS = {
    "--temp": ("temperature", 0.8),
    "--top-k": ("top_k", 5),
    "--top-p": ("top_p", 0.9),
    "--min-p": ("min_p", 0.01),
    "--repeat-penalty": ("repetition_penalty", 1.1),
    "-s": ("seed", 2**64 - 1),
}
FLAGS = {**SAMPLING_FLAGS, "--sampler": ("sampler", "sample"), "--overflow": ("overflow", "slide"), "-n": ("max_new_tokens", 3)}


def test_options_of_a_completion_are_in_the_request(fake: Fake) -> None:
    words = [word for flag, (_, value) in FLAGS.items() for word in (flag, str(value))]
    fake.run("hi", *words, "--stop", "\n\n", "--stop", "é", "--stop-token", "7", "--stop-at-eot")
    for name, value in FLAGS.values():
        assert fake.log(name) == [value]
    assert fake.log("stop_strings") == [["\n\n", "é"]]
    assert fake.log("stop_token_ids") == [[7]]
    assert fake.log("stop_at_eot") == [True]
    assert fake.log("argv") == [["-"]]


@pytest.mark.parametrize("flag", ["-n", "--new", "--max-new-tokens"])
def test_new_tokens_have_three_names(fake: Fake, flag: str) -> None:
    fake.run("hi", flag, "7")
    assert fake.log("max_new_tokens") == [7]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["-n", "0"], "max_new_tokens is 0"),
        (["-n", "-1"], "-n"),
        (["-n", "1.5"], "'1.5'"),
        (["-n", "many"], "'many'"),
        (["-n", "9" * 5000], "whole number"),
        (["-n"], "-n"),
        (["-m"], "-m"),
        (["--fast"], "--fast"),
        (["--ne", "3"], "--ne"),
        (["--sampler", "dice"], "'dice'"),
        (["--temp", "-1"], "temperature is -1"),
        (["--temp", "warm"], "'warm'"),
        (["--top-p", "2"], "top_p is 2"),
        (["--min-p=-1"], "min_p is -1"),
        (["-s", "-1"], "-s"),
        (["--seed", str(2**64)], "seed is"),
        (["--temp", "1", "--sampler", "greedy"], "greedy"),
        (["--stop", ""], "stop string is empty"),
        (["--stop-token", "50257"], "50257"),
        (["--overflow", "sideways"], "'sideways'"),
    ],
)
def test_bad_usage_is_one_line(fake: Fake, words: list[str], part: str) -> None:
    assert_refused(fake.run("hi", *words), 2, part)
    assert fake.log("pid") == []


def test_help_shows_the_examples(fake: Fake) -> None:
    result = fake.run("--help")
    assert (result.returncode, result.stderr) == (0, b"")
    assert b'pygpt chat "Ladies and"' in result.stdout


@pytest.mark.parametrize("how", ["option", "variable", "folder"])
def test_long_text_keeps_its_last_tokens(fake: Fake, how: str) -> None:
    words, environment, model = ["-n", "6"], {}, fake.model(16)
    if how == "option":
        words += ["-m", model]
    elif how == "variable":
        environment["PYGPT_MODEL"] = model
    else:
        (fake.cwd / model).rename(fake.cwd / "gpt2_124M.bin")
    text = "".join(f" {digit}" for digit in range(10))
    fits = fake.run(*words, text=text.encode(), **environment)
    assert fits.stderr == b""
    result = fake.run(*words, text=b"zero" + text.encode(), **environment)
    assert fake.log("tokens") == [ids_of(text), ids_of(text)]
    assert result.returncode == 0
    assert result.stderr.count(b"\n") == 1
    for number in (b"11 tokens", b"last 10", b"16", b"6"):
        assert number in result.stderr


def test_text_that_fills_the_context_is_refused_where_the_end_of_it_is_the_end(fake: Fake) -> None:
    words = ["-m", fake.model(16), "-n", "100", "--overflow", "stop"]
    assert fake.run(*words, text=b" y" * 15).stdout == b" y" * 15 + b"\n"
    assert_refused(fake.run(*words, text=b" y" * 16), 2, "16 tokens", "slide")
    assert len(fake.log("tokens")) == 1


def test_text_of_any_length_slides(fake: Fake) -> None:
    words = ["-m", fake.model(16), "-n", "1", "--overflow", "slide"]
    assert fake.run(*words, text=b" y" * 100).stderr == b""
    result = fake.run(*words, text=b" y" * 140000)  # more ids than fit into an input line of the real command
    assert (result.returncode, result.stdout) == (0, b" y\n")
    assert b"140000 tokens; only the last 131072 are used" in result.stderr
    assert [len(tokens) for tokens in fake.log("tokens")] == [100, 131072]


def test_as_many_new_tokens_as_the_context_has_room_for(fake: Fake) -> None:
    model = fake.model(16)
    assert fake.run("-m", model, "-n", "15", "one").returncode == 0
    assert_refused(fake.run("-m", model, "-n", "16", "one"), 2, "max_new_tokens is 16", "from 1 to 15")
    assert fake.run("-m", model, "one").returncode == 0
    assert fake.log("max_new_tokens") == [15, 10]  # by default, a third of the context stays free for the text


def test_a_bad_model_file_is_bad_input(fake: Fake) -> None:
    (fake.cwd / "bad.bin").write_bytes(b"no model")
    assert_refused(fake.run("-m", "bad.bin", "hi"), 2, "bad.bin: ")
    assert fake.log("tokens") == []


# ---------------------------------------------------------------- the reply's text


def test_characters_stay_whole_over_ids(fake: Fake) -> None:
    text = "é☃🙂 中文"
    assert len(ids_of(text)) > len(text)
    fake.code(replying(text))
    assert fake.run("hi").stdout.decode() == text + "\n"


def test_character_cut_by_the_end_is_replaced(fake: Fake) -> None:
    fake.code(replying("snow ☃", cut=1))
    assert fake.run("hi").stdout.decode() == "snow \ufffd\n"


def test_any_bytes_in_the_reply_are_shown(fake: Fake) -> None:
    fake.code("def answer(tokens, new): put_ids([*range(256), 50256])")
    assert fake.run("hi").stdout.decode() == TOKENIZER.decode([*range(256)]) + "\n"
    assert fake.run("hi", "--show-stop").stdout.decode() == TOKENIZER.decode([*range(256), 50256]) + "\n"


def test_output_that_cannot_show_a_character_replaces_it(fake: Fake) -> None:
    fake.code(replying("snow ☃!"))
    result = fake.run("hi", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"snow ?!\n", b"")


def test_reply_streams_and_half_a_character_waits(fake: Fake) -> None:
    first, *rest = ids_of("☃")
    fake.code(f"""
def answer(tokens, new):
    put("31373 {first} ")
    with open("go"):  # a FIFO: blocks until the test opens it
        put_ids({rest})
""")
    os.mkfifo(fake.cwd / "go")
    with Piped(fake, "hi") as chat:
        assert chat.read(len("hello")) == b"hello"
        with open(fake.cwd / "go", "w"):
            pass
        assert chat.finish() == (0, "☃\n".encode(), b"")


def test_ids_may_come_in_any_chunks(fake: Fake) -> None:
    fake.code("""
def answer(tokens, new):
    for part in ("313", "73 6", "12", " 31373  612\\n"):
        put(part)
""")
    assert fake.run("hi").stdout == b"hello therehello there\n"


def test_empty_reply_is_an_empty_line(fake: Fake) -> None:
    fake.code('def answer(tokens, new): put("\\n")')
    assert fake.run("hi").stdout == b"\n"


# ---------------------------------------------------------------- faults of the child

BEGUN = "def answer(tokens, new):\n    put('31373 612')\n    "  # the second id is incomplete until a space or newline follows


@pytest.mark.parametrize(
    ("end", "named"),
    [
        ("tell('pygpt: error: out of luck\\n'); sys.exit(1)", "out of luck"),
        ("tell('pygpt: error: bad line\\n'); sys.exit(2)", "bad line"),
        ("tell('pygpt: error: no newline'); sys.exit(1)", "no newline"),
        ("raise LookupError('lost')", "status 1: LookupError: lost"),
        ("sys.exit(0)", "status 0"),
        ("sys.exit(130)", "status 130"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("tell('dying\\n'); os._exit(70)", "status 70: dying"),
        ("put(' foo 613\\n')", "'foo'"),
        ("put(' -1\\n')", "'-1'"),
        ("put(' \\0\\n')", r"'\x00'"),
        ("put(' 50257\\n')", "50257"),
    ],
)
def test_end_in_the_middle_of_a_reply_is_one_line(fake: Fake, end: str, named: str) -> None:
    fake.code(BEGUN + end)
    result = fake.run("hi")
    shown = b"hello there\n" if end.startswith("put") else b"hello\n"
    assert (result.returncode, result.stdout) == (2 if "exit(2)" in end else 1, shown)
    assert_one_line_error(result.stderr.decode(), named)


@pytest.mark.parametrize("text", [None, b"hi"])
def test_end_before_any_reply_is_one_line(fake: Fake, text: bytes | None) -> None:
    fake.code("def start():\n    tell('pygpt: error: bad option\\n')\n    sys.exit(2)")
    assert_refused(fake.run(*([] if text else ["hi"]), text=text), 2, "bad option")


def test_number_without_end_is_refused(fake: Fake) -> None:
    fake.code("def answer(tokens, new):\n    while True: put('1' * 1000)")
    result = fake.run("hi")
    assert_refused(result, 1, "instead of a token id")
    assert gone(fake.log("pid")[0])


def test_notice_is_shown_once_before_the_reply(fake: Fake) -> None:
    fake.code("def start(): tell('pygpt: a small model answers\\n')")
    result = fake.run("hi")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"hi\n", b"pygpt: a small model answers\n")


def test_notice_and_error_are_both_shown(fake: Fake) -> None:
    fake.code("""
def start(): tell("pygpt: a small model answers\\n")
def answer(tokens, new):
    tell("pygpt: error: out of luck\\n")
    sys.exit(1)
""")
    result = fake.run("hi")
    assert (result.returncode, result.stderr) == (1, b"pygpt: a small model answers\npygpt: error: out of luck\n")


def test_floods_on_stderr_neither_block_nor_tear_the_reply(fake: Fake) -> None:
    fake.code("""
flood = "".join(f"line {i}\\n" for i in range(20000))
def start(): tell(flood)
def answer(tokens, new):
    put("31373 ")
    tell(flood.replace("line", "again"))
    put("612\\n")
""")
    result = fake.run("--overflow", "slide", text=b" y" * 100000)
    assert (result.returncode, result.stdout) == (0, b"hello there\n")
    lines = result.stderr.decode().splitlines()
    assert lines[:20000] == [f"line {i}" for i in range(20000)]
    assert lines[20000:] == [f"again {i}" for i in range(len(lines) - 20000)]


# ---------------------------------------------------------------- processes, pipes and signals


class Piped:
    """chat.py running on pipes."""

    def __init__(self, fake: Fake, *words: str) -> None:
        self.process = subprocess.Popen(
            fake.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=fake.cwd,
            env=fake.environment,
        )

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes of the reply."""
        assert self.process.stdout is not None
        return self.process.stdout.read(count)

    def finish(self) -> tuple[int, bytes, bytes]:
        """Read until the end; return status, stdout and stderr."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def __enter__(self) -> "Piped":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_child_has_a_process_group_of_its_own_and_ends_with_the_chat(fake: Fake) -> None:
    fake.run("hi")
    assert fake.log("group") == fake.log("pid")
    assert gone(fake.log("pid")[0])


@given(ids=st.lists(st.integers(0, (1 << 20) - 1), max_size=6), size=st.integers(1, 20), ends=st.sampled_from([b"", b" "]))
def test_ids_are_read_in_any_pieces(ids: list[int], size: int, ends: bytes) -> None:
    line = b" ".join(b"%d" % number for number in ids) + ends + b"\n"
    assert list(read_ids(line[at : at + size] for at in range(0, len(line), size))) == ids
    with pytest.raises(EOFError):
        list(read_ids([line[:-1]]))


def test_a_number_too_long_for_an_id_is_not_waited_for() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"5 12345678"
        pytest.fail("it has asked for more")

    found = read_ids(chunks())
    assert next(found) == 5
    with pytest.raises(ChildError, match="'12345678'"):
        next(found)


def test_ctrl_c_stops_the_only_reply(fake: Fake) -> None:
    fake.code(ENDLESS_ONCE)
    with Piped(fake, "hi") as chat:
        assert chat.read(len("hello there")) == b"hello there"
        chat.process.send_signal(signal.SIGINT)
        assert chat.finish() == (130, b"\n", b"")
    assert fake.log("interrupted") == [True]
    assert gone(fake.log("pid")[0])


def test_ids_after_ctrl_c_are_not_shown(fake: Fake) -> None:
    fake.code(ENDLESS_ONCE + "def interrupted(): put('31373 612\\n')")
    with Piped(fake, "hi") as chat:
        chat.read(len("hello there"))
        chat.process.send_signal(signal.SIGINT)
        assert chat.finish() == (130, b"\n", b"")


def test_ctrl_c_before_the_first_id(fake: Fake) -> None:
    fake.code("def answer(tokens, new): signal.pause()")
    with Piped(fake, "hi") as chat:
        fake.wait_for("tokens")
        chat.process.send_signal(signal.SIGINT)
        assert chat.finish() == (130, b"\n", b"")


def test_broken_pipe_is_quiet(fake: Fake) -> None:
    fake.code("def answer(tokens, new):\n    while True: put('31373 ')")
    with Piped(fake, "hi") as chat:
        chat.read(5)
        assert chat.process.stdout is not None
        chat.process.stdout.close()
        assert chat.process.wait(PATIENCE) == 141
        assert chat.process.stderr is not None
        assert chat.process.stderr.read() == b""
    assert gone(fake.log("pid")[0])


def test_child_of_a_killed_chat_ends_by_itself(fake: Fake) -> None:
    fake.code("def answer(tokens, new):\n    with open('go'): pass  # a FIFO: blocks until the test opens it")
    os.mkfifo(fake.cwd / "go")
    with Piped(fake, "hi") as chat:
        fake.wait_for("tokens")
        chat.process.kill()
        chat.process.wait(PATIENCE)
    with open(fake.cwd / "go", "w"):
        pass
    fake.wait_for("ended")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_one_line(fake: Fake) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            fake.command("hi"), stdout=full, stderr=subprocess.PIPE, cwd=fake.cwd, env=fake.environment, timeout=PATIENCE
        )
    assert result.returncode == 1
    assert result.stderr.startswith(b"pygpt: error: ")
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("closed", "out", "status"), [("2>&-", b"hi\n", 0), (">&-", b"", 1), ("<&-", b"hi\n", 0)])
def test_an_answer_needs_only_stdout(fake: Fake, closed: str, out: bytes, status: int) -> None:
    fake.code("def start(): tell('pygpt: a small model answers\\n')")
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, str(CHAT), "hi"]
    result = subprocess.run(shell, capture_output=True, cwd=fake.cwd, env=fake.environment, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (status, out)
    assert result.stderr.startswith(b"pygpt: error: stdout is closed") == bool(status)


def test_closed_input_is_empty_text(fake: Fake) -> None:
    shell = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, str(CHAT)]
    result = subprocess.run(shell, capture_output=True, cwd=fake.cwd, env=fake.environment, timeout=PATIENCE)
    assert_refused(result, 2, "empty")


# ---------------------------------------------------------------- commands


class Echo:
    """A replacement for the child: it answers with the ids in `reply`, and stores the requests."""

    def __init__(self, reply: str = "hello there") -> None:
        self.reply: list[int] = ids_of(reply)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []
        self.stopped = False

    def ask(self, tokens: list[int], options: dict[str, Any]) -> Iterator[int]:
        self.asked.append((tokens, dict(options)))
        yield from self.reply

    def interruptible(self) -> AbstractContextManager[None]:
        return nullcontext()

    def show_notices(self, *, others: bool = False) -> None:
        pass


class Bench:
    """A chat in this process, for a model with this context, and the Echo that answers it."""

    def __init__(self, *words: str, maxT: int = 64, model: str | None = None, eot: bool = False, **loading: Any) -> None:
        self.echo = Echo()
        config = Config(maxT=maxT, V=TOKENIZER.V, L=1, NH=1, C=1)
        self.settings = chat_module.Settings(chat_module.parse(words if eot else ["--no-stop-at-eot", *words]), config)
        self.chat = chat_module.Chat(self.echo, self.settings, model, **loading)  # type: ignore[arg-type]

    def take(self, *lines: str) -> None:
        for line in lines:
            self.chat.take(line)

    @property
    def request(self) -> dict[str, Any]:
        return dict(self.settings.request)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("wish", "key", "value"),
    [
        ("temperature 0.8", "temperature", 0.8),
        ("temp 1e-3", "temperature", 0.001),
        ("--top-k   40 ", "top_k", 40),
        ("TOP_P .5", "top_p", 0.5),
        ("min_p 0", "min_p", 0.0),
        ("repeat-penalty 1.2", "repetition_penalty", 1.2),
        ("repetition_penalty 2", "repetition_penalty", 2.0),
        ("seed 18446744073709551615", "seed", 2**64 - 1),
        ("sampler greedy", "sampler", "greedy"),
        ("n 63", "max_new_tokens", 63),
        ("new 1", "max_new_tokens", 1),
        ("stop the  end", "stop_strings", ["the  end"]),
        ('stop "\\n \\u00e9 "', "stop_strings", ["\n é "]),
        ("stop_token 50256", "stop_token_ids", [50256]),
        ("overflow slide", "overflow", "slide"),
        ("frequency_penalty -.5", "frequency_penalty", -0.5),
        ("no-repeat-ngram-size 3", "no_repeat_ngram_size", 3),
        ("logit_bias 5=1 7=-2.5", "logit_bias", {5: 1.0, 7: -2.5}),
        ("suppress_tokens 5 7", "suppress_tokens", [5, 7]),
        ("bad_words 5 7", "bad_words_ids", [[5, 7]]),
    ],
)
def test_set_changes_the_next_requests(
    bench: Bench, capsys: pytest.CaptureFixture[str], wish: str, key: str, value: Any
) -> None:
    bench.take(f"/set {wish}", "hi", "/again")
    assert [request[key] for _, request in bench.echo.asked][:1] == [value]
    shown = capsys.readouterr()
    assert shown.out == "hello there\n" * 2
    assert shown.err.count("\n") == 1
    bench.take(f"/set {wish.split()[0]} default")
    assert bench.request == {"max_new_tokens": 40}


def test_stop_text_and_the_end_of_text_end_a_reply_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(eot=True)
    assert bench.request["stop_at_eot"] is True
    bench.echo.reply = [*ids_of("Hi.\n\n"), 50256]
    bench.take("hello", '/set stop "\\n\\n"', "hello", "hello\\n", "/set show_stop on", "hello", "/set stop_at_eot off")
    out = capsys.readouterr().out
    assert out == "Hi.\n\n\n" + "Hi.\n" * 2 + "Hi.\n\n<|endoftext|>\n"
    assert "stop_at_eot" not in bench.request


def test_the_end_of_a_reply_is_that_of_the_models_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    """Not GPT-2's: here <eos> has id 3, id 50256 does not exist, and the other vocabulary has no such token."""
    for added, end in ({"<eos>": True}, 3), ({}, None):
        tokens = ["a", "b", "c", *added]
        vocabulary = vocabulary_of(tokens, [], added)
        config = Config(maxT=64, V=len(tokens), L=1, NH=1, C=1)
        config.tokenizer = lambda vocabulary=vocabulary: Tokenizer(vocabulary)
        settings, echo = chat_module.Settings(chat_module.parse(["-n", "5"]), config), Echo()
        chat = chat_module.Chat(echo, settings)  # type: ignore[arg-type]
        echo.reply = [0, 1] if end is None else [0, 1, end]
        chat.take("ab")
        assert capsys.readouterr().out == "ab\n"
        assert settings.request == {"max_new_tokens": 5, **({} if end is None else {"stop_at_eot": True})}
    with pytest.raises(InputError, match=r"stop_at_eot is True.*vocabulary"):
        chat_module.Settings(chat_module.parse(["--stop-at-eot"]), config)


@pytest.mark.parametrize(
    ("wish", "part"),
    [
        ("logit_bias 5", "logit_bias is"),
        ("bad_words x", "'x'"),
        ("stop_at_eot 1", "on or off"),
        ("temp -1", "temp is -1.0"),
        ("temperature hot", "temperature is 'hot'"),
        ("temperature 1 2", "'1 2'"),
        ("temperature nan", "nan"),
        ("top_k -1", "top_k is '-1'"),
        ("--top-k x", "--top-k is 'x'"),
        ("top_p 1.1", "1.1"),
        ("min_p x", "'x'"),
        ("repetition_penalty 0", "0"),
        ("seed 18446744073709551616", "2^64"),
        ("sampler dice", "'dice'"),
        ("n 0", "n is 0"),
        ("n 64", "from 1 to 63"),
        ("new 400", "new is 400"),
        ("new many", "new is 'many'"),
        ("max_new_tokens 400", "max_new_tokens is 400"),
        ('stop "', "'\"'"),
        ('stop_strings "', "stop_strings is '\"'"),
        ('stop "a" b', "quotes"),
        ('stop ""', "empty"),
        ("stop_token 50257", "50257"),
        ("overflow sideways", "'sideways'"),
        ("stats maybe", "'maybe'"),
        ("speed 3", "'speed'"),
        ("model x", "'model'"),
        ("-", "'-'"),
    ],
)
def test_bad_settings_are_one_line_and_keep_the_settings(
    bench: Bench, capsys: pytest.CaptureFixture[str], wish: str, part: str
) -> None:
    bench.take("/set temperature 0.7", "/set stats on")
    before = bench.request
    capsys.readouterr()
    bench.take(f"/set {wish}")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith("pygpt: ")
    assert part in shown.err
    assert (bench.request, bench.settings.switches["stats"]) == (before, True)


def test_newer_setting_replaces_contradictions(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.take("/set temp 0.8", "/set seed 3", "/set sampler greedy")
    assert bench.request == {"max_new_tokens": 40, "sampler": "greedy"}
    assert capsys.readouterr().err.splitlines()[-1].split(None, 1) == ["sampler", "greedy (removed: temperature, seed)"]
    bench.take("/set top_k 3")
    assert bench.request == {"max_new_tokens": 40, "top_k": 3}
    assert "(removed: sampler)" in capsys.readouterr().err


def test_set_alone_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench("-n", "9", "--temp", "0.5", "--stop", "\n", "--stats")
    bench.take("/set")
    listed = dict(line.split(None, 1) for line in capsys.readouterr().err.splitlines())
    assert list(listed) == list(chat_module.SETTINGS)
    told = {
        "new": "9",
        "temperature": "0.5",
        "stop": '["\\n"]',
        "stats": "on",
        "sampler": "default (sample)",
        "seed": "default",
    }
    assert told.items() <= listed.items()
    bench.take("/set temp default", "/set sampler")
    assert capsys.readouterr().err.splitlines()[-1].split(None, 1) == ["sampler", "default (median)"]


def test_help_names_every_command(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.take("/help")
    lines = capsys.readouterr().err.splitlines()
    assert {line.split()[0] for line in lines if line.startswith("/") and line[1] != "/"} == {"/set", *bench.chat._commands}
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/", "'/'"),
        ("/foo", "'/foo'"),
        ("/SET n 3", "'/SET'"),
        ("/ help", "'/'"),
        ("/a\n\nb", "'/a'"),
        ("/help me", "/help ... 'me'"),
        ("/quit\nnow", "/quit ... 'now'"),
        ("/again 2", "/again ... '2'"),
        ("/" + "x" * 500, "'/xxx"),
    ],
)
def test_unknown_command_is_one_line(bench: Bench, capsys: pytest.CaptureFixture[str], line: str, told: str) -> None:
    bench.take("hi")
    capsys.readouterr()
    bench.take(line)
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert re.match(gist(f"pygpt: {told}"), shown.err)
    assert len(shown.err) < 150
    assert len(bench.echo.asked) == 1


@pytest.mark.parametrize("line", ["/again", "/more", "/tokens", "/probs"])
def test_commands_about_the_last_text_want_one(bench: Bench, capsys: pytest.CaptureFixture[str], line: str) -> None:
    bench.take(line)
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "earlier text" in shown.err
    assert bench.echo.asked == []


def test_two_slashes_begin_a_text_with_one(bench: Bench) -> None:
    bench.take("//set n 3", "///", " /set n 3")
    assert [TOKENIZER.decode(tokens) for tokens, _ in bench.echo.asked] == ["/set n 3", "//", " /set n 3"]


def test_again_and_more_send_the_whole_text(bench: Bench) -> None:
    bench.take("hi", "/more", "/more", "/again", "/more", "new")
    text, reply = ids_of("hi"), bench.echo.reply
    expected = [text, text + reply, text + reply * 2, text, text + reply, ids_of("new")]
    assert [tokens for tokens, _ in bench.echo.asked] == expected


def test_seed_of_a_repeated_text_is_another_one_each_time() -> None:
    bench = Bench("-s", str(2**64 - 2))
    bench.take("hi", "/again", "/again", "/more", "hi")
    assert [request["seed"] for _, request in bench.echo.asked] == [2**64 - 2, 2**64 - 1, 0, 0, 2**64 - 2]


def test_more_completes_a_character_that_was_broken_off(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    snow = ids_of(" ☃")
    bench.echo.reply = snow[:-1]
    bench.take("hi")
    bench.echo.reply = [*snow[-1:], *ids_of("!")]
    bench.take("/more")
    assert capsys.readouterr().out == " \ufffd\n☃!\n"
    assert bench.echo.asked[1][0] == ids_of("hi") + snow[:-1]


def test_long_conversation_keeps_its_last_tokens_slides_or_stops(capsys: pytest.CaptureFixture[str]) -> None:
    for overflow, lengths in (None, [1, 3, 5, 6, 6]), ("slide", [1, 3, 5, 7, 9]), ("stop", [1, 3, 5, 7]):
        bench = Bench("-n", "2", *(["--overflow", overflow] if overflow else []), maxT=8)
        bench.take("hi", *["/more"] * 4)
        assert [len(tokens) for tokens, _ in bench.echo.asked] == lengths
        told = capsys.readouterr().err
        if overflow is None:
            assert re.search(gist("7 tokens ... last 6"), told)
        elif overflow == "stop":
            assert told.startswith("pygpt: 9 tokens were given")
            assert told.count("\n") == 1
        else:
            assert told == ""


def test_tokens_shows_ids_and_pieces(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.echo.reply = [*ids_of(" ☃"), 50256, 198]
    bench.take("hello there")
    capsys.readouterr()
    bench.take("/tokens")
    assert [line.split(None, 1) for line in capsys.readouterr().err.splitlines()] == [
        ["text:", "2 tokens"],
        ["31373", "'hello'"],
        ["612", "' there'"],
        ["reply:", "4 tokens"],
        ["34719", "b' \\xe2\\x98'"],
        ["225", "b'\\x83'"],
        ["50256", "'<|endoftext|>'"],
        ["198", "'\\n'"],
    ]


@pytest.mark.parametrize("weights", [None, "q4_0"])
def test_probs_shows_the_most_probable_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, weights: str | None
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bench = Bench(weights=weights)
    bench.take("/set sampler greedy", "hello there")
    capsys.readouterr()
    bench.take("/probs")
    with GPT2.load(EMBEDDED_MODEL, weights=weights) as model:
        logits = model.logits(ids_of("hello there"))[-1].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-probabilities)[:10]
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == best.tolist()
    for line, token in zip(lines, best.tolist(), strict=True):
        assert repr(TOKENIZER.decode([token])) in line
        assert f" {100 * probabilities[token]:.3f}  " in line + "  "
    bars = [line.count("█") + line.count("#") for line in lines]
    assert bars[0] == 30
    assert bars == [round(30 * probabilities[token] / probabilities[best[0]]) for token in best.tolist()]


@pytest.mark.parametrize(("columns", "longest"), [(300, 30), (40, None), (10, 1)])
def test_probs_fits_the_terminal(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, longest: int | None
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    bench.take("hi")
    capsys.readouterr()
    bench.take("/probs")
    lines = capsys.readouterr().err.splitlines()[1:]
    if longest is None:
        assert max(map(len, lines)) == columns
    else:
        assert lines[0].count("█") + lines[0].count("#") == longest


def test_probs_of_a_model_file_that_has_gone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(model="gone.bin")
    bench.take("hi", "/probs")
    assert capsys.readouterr().err.startswith("pygpt: gone.bin: ")


def test_ctrl_c_stops_probs(bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT2, "generate_batch", interrupted)
    bench.take("hi", "/probs", "hi")
    assert capsys.readouterr() == ("hello there\n" * 2, "\n")


def test_stats_go_to_stderr_on_request(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.take("hi")
    assert capsys.readouterr() == ("hello there\n", "")
    bench.take("/set stats on", "hi")
    shown = capsys.readouterr()
    assert shown.out == "hello there\n"
    assert re.fullmatch(r"pygpt: 2 tokens, the first after \d+\.\d\d s(, then \d+\.\d tokens/s)?", shown.err.splitlines()[1])
    bench.echo.reply = []
    bench.take("hi", "/set stats off", "hi")
    assert capsys.readouterr().err.splitlines()[0] == "pygpt: 0 tokens"


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([5.0], "0 tokens"),
        ([5.0, 5.25], "1 token, the first after 0.25 s"),
        ([5.0, 5.0, 5.0], "2 tokens, the first after 0.00 s"),
        ([5.0, 6.0, 6.5, 7.0], "3 tokens, the first after 1.00 s, then 2.0 tokens/s"),
    ],
)
def test_speed_counts_from_the_first_token(times: list[float], told: str) -> None:
    assert chat_module.speed(times) == told


def test_stats_flag(fake: Fake) -> None:
    result = fake.run("--stats", "hi")
    assert result.stdout == b"hi\n"
    assert result.stderr.startswith(b"pygpt: 1 token, the first after ")


def test_counts_that_come_with_the_whole_reply(fake: Fake) -> None:
    fake.code("""def answer(tokens, new):
    tell("pygpt: 2 tokens in 1.00 s, 2.0 tokens/s; 1 of 2 guessed tokens were right\\n")
    put("71 72\\n")""")
    assert fake.run("--stats", "hi").stderr.endswith(b" tokens/s; 1 of 2 guessed tokens were right\n")


def test_stats_count_guesses() -> None:
    """The child writes its counts before the last token, so they are there at the end of each reply."""
    chat = ("chat", "--stats", "--sampler", "greedy", "-n", "12")
    found = [run_command(*chat, *more, "ROMEO:") for more in ([], ["--speculate", "3"])]
    assert found[0].stdout == found[1].stdout
    assert "guess" not in found[0].stderr
    assert re.search(r"^pygpt: \d+ tokens, the first .* tokens/s; \d+ of \d+ guessed tokens were right$", found[1].stderr, re.M)


COMMANDS = ["/set", "/again", "/more", "/tokens", "/help", "/quit", "/", "//"]
SETTING_NAMES = ["n", "temp", "top_k", "top-p", "min_p", "repeat_penalty", "seed", "sampler", "stop", "stop_token", "overflow"]
VALUES = st.one_of(
    st.text(max_size=8),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(
        ["default", "greedy", "median", "sample", "slide", "stop", "on", "off", '"', '"\\n"', '"\\ud800"', "1e999"]
    ),
)
LINES = st.one_of(
    st.text(),
    st.text().map("/".__add__),
    st.tuples(st.sampled_from(COMMANDS), st.sampled_from(["", " ", "\n"]), st.text(max_size=5)).map("".join),
    st.tuples(st.just("/set"), st.sampled_from([*SETTING_NAMES, "stats", "x"]), VALUES).map(" ".join),
)


@given(lines=st.lists(LINES.filter(lambda line: line.split()[:1] != ["/probs"]), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_lines_are_answered_or_refused_in_one(capsys: pytest.CaptureFixture[str], lines: list[str]) -> None:
    bench = Bench()
    for line in lines:
        before, asked = bench.request, len(bench.echo.asked)
        capsys.readouterr()
        bench.take(line)
        refusals = [told for told in capsys.readouterr().err.split("\n") if told.startswith("pygpt: ")]
        refusals = [told for told in refusals if not re.match(r"pygpt: (\d+ tokens, the first|0 tokens$|the text )", told)]
        assert len(refusals) <= 1
        if refusals:
            assert (bench.request, len(bench.echo.asked)) == (before, asked)
        json.dumps(bench.request)  # the request can be sent, and the child accepts it
        bench.settings.check([0])


# ---------------------------------------------------------------- on a terminal


class Terminal:
    """chat.py on its own terminal. With `piped`, only its stdin and stderr are the terminal."""

    def __init__(self, fake: Fake, *words: str, piped: bool = False, prompt: str = "Text: ") -> None:
        self._prompt = prompt
        self._screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            fake.command(*words),
            stdin=terminal,
            stdout=subprocess.PIPE if piped else terminal,
            stderr=terminal,
            cwd=fake.cwd,
            env=fake.environment,
            start_new_session=True,
        )
        os.close(terminal)
        self._unread = b""

    def expect(self, text: str) -> str:
        """Wait for this text; return all output up to its end."""
        wanted = text.encode()
        while wanted not in self._unread:
            ready, _, _ = select.select([self._screen], [], [], PATIENCE)
            data = self._read() if ready else b""
            assert data, f"{text!r} did not come after {self._unread!r}"
            self._unread += data
        before, found, self._unread = self._unread.partition(wanted)
        return (before + found).decode(errors="replace").replace("\r\n", "\n")

    def type(self, keys: str | bytes) -> None:
        """Type these keys. Type Ctrl-C only when the chat waits, as people do: input() notices a signal only then."""
        if keys == CTRL_C:
            wait_until(lambda: state(self.process.pid) == "S")
        os.write(self._screen, keys if isinstance(keys, bytes) else keys.encode())

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return the status and the remaining output."""
        while data := self._read():
            self._unread += data
        return self.process.wait(PATIENCE), self._unread.decode().replace("\r\n", "\n")

    def _read(self) -> bytes:
        try:
            return os.read(self._screen, 65536)
        except OSError:  # Linux's sign that the last program on the terminal has ended
            return b""

    def __enter__(self) -> "Terminal":
        self.expect(self._prompt)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._screen)


CTRL_C, CTRL_D = "\x03", "\x04"


def test_terminal_asks_again_and_again(fake: Fake) -> None:
    with Terminal(fake) as chat:
        chat.type("Ladies and\n")
        assert chat.expect("Text: ") == "Ladies and\nLadies and\nText: "
        chat.type("é☃🙂\n")
        assert chat.expect("Text: ") == "é☃🙂\né☃🙂\nText: "
        chat.type("\n")
        assert chat.finish() == (0, "\n")
    assert fake.log("tokens") == [ids_of("Ladies and"), ids_of("é☃🙂")]
    assert len(fake.log("pid")) == 1


def test_a_reply_does_not_command_the_terminal(fake: Fake) -> None:
    """On a terminal, control characters in a reply are escaped. On a pipe, the reply stays as it is."""
    hostile = "a\x1b]0;title\x07b\x1b[2J\r\x9bc\td\n"
    fake.code(f"def answer(tokens, new): put_ids({ids_of(hostile)})")
    with Terminal(fake) as chat:
        chat.type("x\n")
        assert chat.expect("Text: ") == "x\na\\x1b]0;title\\x07b\\x1b[2J\\r\\x9bc\td\n\nText: "
    assert fake.run("x").stdout.decode() == f"{hostile}\n"


def test_ctrl_d_leaves(fake: Fake) -> None:
    with Terminal(fake) as chat:
        chat.type(CTRL_D)
        assert chat.finish() == (0, "\n")
    assert fake.log("ended") == [True]


def test_ctrl_c_stops_the_reply_and_the_same_child_answers_on(fake: Fake) -> None:
    fake.code(ENDLESS_ONCE)
    with Terminal(fake) as chat:
        chat.type("hi\n")
        chat.expect("hello there")
        chat.type(CTRL_C)
        assert chat.expect("Text: ") == "^C\nText: "
        chat.type("more\n")
        assert chat.expect("Text: ") == "more\nmore\nText: "
        chat.type(CTRL_D)
        assert chat.finish() == (0, "\n")
    assert len(fake.log("pid")) == 1


def test_child_that_ctrl_c_found_idle_is_started_again(fake: Fake) -> None:
    fake.code(f"""
def start(): tell("pygpt: a small model answers\\n")
{ENDLESS_ONCE}
def interrupted():  # as if the reply had just ended when the signal came
    put("\\n")
    sys.exit(130)
""")
    with Terminal(fake) as chat:
        for _ in range(2):
            chat.type("hi\n")
            chat.expect("hello there")
            chat.type(CTRL_C)
            assert chat.expect("Text: ") == "^C\nText: "
        chat.type(CTRL_D)
        assert chat.finish() == (0, "\n")
    assert len(fake.log("pid")) == 2


def test_notice_is_not_repeated_by_a_child_started_again(fake: Fake) -> None:
    fake.code("def start(): tell('pygpt: a small model answers\\n')\n" + ENDLESS_ONCE + "def interrupted(): os._exit(130)")
    with Terminal(fake) as chat:
        chat.type("hi\n")
        assert chat.expect("hello there") == "hi\npygpt: a small model answers\nhello there"
        chat.type(CTRL_C)
        chat.expect("Text: ")
        chat.type("hi\n")
        assert chat.expect("hello there") == "hi\nhello there"
        chat.type(CTRL_C)
        chat.expect("Text: ")


def test_line_ended_twice_by_ctrl_c_does_not_end_the_next_reply(fake: Fake) -> None:
    fake.code(ENDLESS_ONCE + "def interrupted():\n    put('\\n')\n    with open('go'): put('\\n')\n    log(twice=True)")
    os.mkfifo(fake.cwd / "go")
    with Terminal(fake) as chat:
        chat.type("hi\n")
        chat.expect("hello there")
        chat.type(CTRL_C)
        chat.expect("Text: ")
        with open(fake.cwd / "go", "w"):
            pass
        fake.wait_for("twice")
        chat.type("more\n")
        assert chat.expect("Text: ") == "more\nmore\nText: "


def test_second_ctrl_c_in_a_reply_leaves(fake: Fake) -> None:
    fake.code("""
def answer(tokens, new):
    signal.signal(signal.SIGINT, lambda *_: tell("\\n") or log(deaf=True))
    put("31373 ")
    while True: signal.pause()
""")
    with Terminal(fake) as chat:
        chat.type("hi\n")
        chat.expect("hello")
        chat.type(CTRL_C)
        fake.wait_for("deaf")
        chat.type(CTRL_C)
        assert chat.finish()[0] == 130
    assert gone(fake.log("pid")[0])


def test_ctrl_c_twice_at_the_prompt_leaves(fake: Fake) -> None:
    with Terminal(fake) as chat:
        chat.type("half a te")
        chat.expect("half a te")
        chat.type(CTRL_C)
        assert "press Ctrl-C again" in chat.expect("Text: ")
        chat.type(CTRL_C)
        status, shown = chat.finish()
    assert status == 130
    assert "Traceback" not in shown
    assert fake.log("tokens") == []


def test_text_between_two_ctrl_c_at_the_prompt_lets_the_chat_go_on(fake: Fake) -> None:
    with Terminal(fake) as chat:
        for _ in range(2):
            chat.type(CTRL_C)
            assert "press Ctrl-C again" in chat.expect("Text: ")
            chat.type("hi\n")
            assert chat.expect("Text: ") == "hi\nhi\nText: "


def test_ctrl_c_in_a_reply_does_not_count_at_the_prompt(fake: Fake) -> None:
    fake.code(ENDLESS_ONCE)
    with Terminal(fake) as chat:
        chat.type("hi\n")
        chat.expect("hello there")
        chat.type(CTRL_C)
        chat.expect("Text: ")
        chat.type(CTRL_C)
        assert "press Ctrl-C again" in chat.expect("Text: ")


def test_error_in_the_child_leaves(fake: Fake) -> None:
    fake.code("def answer(tokens, new):\n    tell('pygpt: error: out of luck\\n')\n    sys.exit(1)")
    with Terminal(fake) as chat:
        chat.type("hi\n")
        assert chat.finish() == (1, "hi\npygpt: error: out of luck\n")


def test_child_that_died_between_two_texts_is_reported(fake: Fake) -> None:
    fake.code("def answer(tokens, new):\n    put('31373\\n')\n    os.kill(os.getpid(), 9)")
    with Terminal(fake) as chat:
        chat.type("hi\n")
        chat.expect("hello\n".replace("\n", "\r\n"))
        chat.type("again\n")  # the chat reads this only if it has not yet noticed the child's end
        status, shown = chat.finish()
    assert status == 1
    assert "signal 9\n" in shown  # the terminal may echo "again" after it


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc to see that a process has ended")
def test_child_that_died_at_the_prompt_is_reported_before_the_next(fake: Fake) -> None:
    with Terminal(fake) as chat:
        fake.wait_for("pid")
        pid = fake.log("pid")[0]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: state(pid) == "Z")
        chat.type(CTRL_C)  # the chat would ask again
        status, shown = chat.finish()
    assert status == 1
    assert "Text: " not in shown
    assert "signal 9\n" in shown  # the terminal may echo "again" after it


def test_prompt_keeps_off_a_stdout_that_is_not_the_terminal(fake: Fake) -> None:
    with Terminal(fake, piped=True) as chat:
        chat.type("hi\n")
        chat.expect("Text: ")
        chat.type(CTRL_C)
        assert "press Ctrl-C again" in chat.expect("Text: ")
        chat.type(CTRL_D)
        assert chat.finish()[0] == 0
        assert chat.process.stdout is not None
        assert chat.process.stdout.read() == b"hi\n"


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii"])
def test_typed_text_is_utf8(fake: Fake, encoding: str) -> None:
    fake.environment["PYTHONIOENCODING"] = encoding
    with Terminal(fake, piped=True) as chat:
        chat.type("café\n".encode())
        chat.expect("Text: ")
    assert fake.log("tokens") == [[66, 1878, 2634]]


def test_a_long_line_is_pasted_whole_while_stdout_is_a_file(fake: Fake) -> None:
    """The terminal itself would cut it at 4,095 bytes. Its keys still edit the line."""
    line = "lorem é " * 1000
    with Terminal(fake, "--overflow", "slide", piped=True) as chat:  # a text of any length
        for text in line + "\r", "abé\x7f\x7fcd\x7f e\r", "xyz\x15a\n":
            chat.type(text)
            chat.expect("Text: ")
        chat.type("\x04")  # Ctrl-D
        assert chat.finish()[0] == 0
    assert fake.log("tokens") == [ids_of(line), ids_of("ac e"), ids_of("a")]


def test_commands_on_the_terminal(fake: Fake) -> None:
    fake.code("def answer(tokens, new): put_ids([31373])")
    with Terminal(fake, "-n", "9") as chat:
        for keys in "/set n 7\n", "hi\n", "/more\n", "/nonsense\n", "/again\n", "//x\n":
            chat.type(keys)
            assert chat.expect("Text: ").count("\n") == 2  # the typed text, and one line
        chat.type("/quit\n")
        assert chat.finish() == (0, "/quit\n")
    assert fake.log("tokens") == [ids_of("hi"), [*ids_of("hi"), 31373], ids_of("hi"), ids_of("/x")]
    assert fake.log("max_new_tokens") == [7] * 4
    assert fake.log("ended") == [True]


def test_commands_answer_on_stderr_if_stdout_is_not_the_terminal(fake: Fake) -> None:
    with Terminal(fake, piped=True) as chat:
        for keys in "hi\n", "/set n\n", "/tokens\n", "/probs\n", "/help\n":
            chat.type(keys)
            chat.expect("Text: ")
        chat.type(CTRL_D)
        assert chat.finish()[0] == 0
        assert chat.process.stdout is not None
        assert chat.process.stdout.read() == b"hi\n"


def test_commands_are_texts_without_a_terminal(fake: Fake) -> None:
    assert fake.run("/quit").stdout == b"/quit\n"
    assert fake.run(text=b"/help\n").stdout == b"/help\n"
    assert fake.run("//").stdout == b"//\n"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("one\\\ntwo\n", "one\ntwo"),
        ("one\\\n\\\n\n", "one\n\n"),
        ("C:\\\\\n", "C:\\"),
        ("\\ a\n", "\\ a"),
        ("/set \\\nn\\\n 3\nhi\n", "hi"),
    ],
)
def test_line_that_ends_in_a_backslash_goes_on(fake: Fake, keys: str, text: str) -> None:
    with Terminal(fake) as chat:
        chat.type(keys)
        fake.wait_for("tokens")
    assert fake.log("tokens") == [ids_of(text)]


def test_ctrl_c_and_ctrl_d_in_a_text_of_several_lines(fake: Fake) -> None:
    with Terminal(fake) as chat:
        chat.type("one\\\n")
        chat.expect(" ...  ")
        chat.type(CTRL_C)
        assert "press Ctrl-C again" in chat.expect("Text: ")
        chat.type("two\\\n")
        chat.expect(" ...  ")
        chat.type(CTRL_D)
        assert chat.finish()[0] == 0
    assert fake.log("tokens") == []


def test_empty_line_among_pasted_ones_does_not_leave(fake: Fake) -> None:
    with Terminal(fake) as chat:
        chat.type("one\n\ntwo\n")
        chat.expect("two\r\n")
        chat.expect("Text: ")
        chat.type("\n")
        assert chat.finish()[0] == 0
    assert fake.log("tokens") == [ids_of("one"), ids_of("two")]


def test_ctrl_c_while_leaving_ends_the_child(fake: Fake) -> None:
    fake.code("""
import atexit
def linger():
    log(lingering=True)
    while True: signal.pause()
atexit.register(linger)
""")
    with Terminal(fake) as chat:
        chat.type(CTRL_D)
        fake.wait_for("lingering")
        chat.type(CTRL_C)
        assert "Traceback" not in chat.finish()[1]
    assert gone(fake.log("pid")[0])


EDITORS = pytest.mark.parametrize("editor", ["readline", "prompt_toolkit"])


GREET = "def answer(tokens, new): put_ids([31373, 612])"


def editing(fake: Fake, editor: str, code: str = GREET) -> Terminal:
    """Start the chat with this line editor, on a terminal that is not dumb."""
    module = pytest.importorskip(editor)
    if editor == "readline":
        if "libedit" in (module.__doc__ or ""):
            pytest.skip("this Python has libedit for readline, which knows no bracketed paste")
        Path(fake.environment["PYTHONPATH"], "prompt_toolkit.py").write_text("raise ImportError")
    fake.environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "INPUTRC": os.devnull}
    fake.code(code)
    return Terminal(fake, prompt="Text:")  # prompt_toolkit moves the cursor instead of writing the space


def type_text(chat: Terminal, keys: str) -> None:
    """Type a text, and wait for the prompt after its reply."""
    chat.type(keys + "\r")
    chat.expect("hello there\r\n")
    chat.expect("Text:")


@EDITORS
def test_pasted_lines_are_one_text(fake: Fake, editor: str) -> None:
    with editing(fake, editor) as chat:
        type_text(chat, "\x1b[200~one\r\rtwo\x1b[201~")
        chat.type(CTRL_D)
        assert chat.finish()[0] == 0
    assert fake.log("tokens") == [ids_of("one\n\ntwo")]


@EDITORS
def test_history_and_editing(fake: Fake, editor: str) -> None:
    with editing(fake, editor) as chat:
        type_text(chat, "first")
        type_text(chat, "\x1b[A\x1b[D\x1b[DX")  # up, left, left
        chat.type(CTRL_D)
        assert chat.finish()[0] == 0
    assert fake.log("tokens") == [ids_of("first"), ids_of("firXst")]


@EDITORS
def test_ctrl_c_with_an_editor(fake: Fake, editor: str) -> None:
    with editing(fake, editor, ENDLESS_ONCE) as chat:
        chat.type("hi\r")
        chat.expect("hello there")
        chat.type(CTRL_C)
        chat.expect("Text:")
        chat.type(CTRL_C)
        chat.expect("press Ctrl-C again")
        chat.expect("Text:")
        chat.type(CTRL_C)
        status, shown = chat.finish()
    assert (status, "Traceback" in shown) == (130, False)
    assert gone(fake.log("pid")[0])


@EDITORS
@pytest.mark.parametrize("no_color", ["", "1"])
def test_prompt_is_bold_unless_no_color_is_set(fake: Fake, editor: str, no_color: str) -> None:
    fake.environment["NO_COLOR"] = no_color
    chat = editing(fake, editor)
    try:
        shown = chat.expect("Text:")
    finally:
        chat.__exit__()
    assert bool(re.search(r"\x1b\[(0;)?1m", shown)) == (not no_color)


def test_prompt_is_plain_on_a_dumb_terminal(fake: Fake) -> None:
    chat = Terminal(fake)
    try:
        assert chat.expect("Text: ") == "Text: "
    finally:
        chat.__exit__()


# ---------------------------------------------------------------- where the child finds its package


def test_other_pygpt_on_the_path_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pygpt").mkdir()
    (tmp_path / "pygpt" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path)])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "PYTHONPATH" not in child_environment()


def test_folder_of_chat_comes_last_where_no_other_pygpt_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pygpt").mkdir()  # a folder of that name without a package, such as a clone of this project
    monkeypatch.setattr(sys, "path", [str(ROOT), str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert child_environment()["PYTHONPATH"] == f"{tmp_path}{os.pathsep}{ROOT}"


def test_files_in_the_current_folder_do_not_stand_for_modules(fake: Fake) -> None:
    for name in ("json", "random", "pygpt"):
        (fake.cwd / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    assert fake.run("hi").stdout == b"hi\n"


# ---------------------------------------------------------------- with the real command


@pytest.fixture
def real(tmp_path: Path) -> Fake:
    """An environment in which the chat finds the real command, in a folder outside the project."""
    fake = Fake(tmp_path)
    del fake.environment["PYTHONPATH"]
    return fake


def real_ids(fake: Fake, request: dict[str, Any] | str, *options: str) -> list[int]:
    """Return the real command's answer to one request, as ids."""
    line = request if isinstance(request, str) else json.dumps(request)
    words, variables = [sys.executable, "-m", "pygpt", *options, "-"], fake.environment | {"PYTHONPATH": str(ROOT)}
    result = execute(words, input=line + "\n", cwd=fake.cwd, env=variables, check=True)
    return [int(word) for word in result.stdout.split()]


def test_real_reply_is_what_the_command_generates(real: Fake) -> None:
    expected = real_ids(real, {"tokens": [31373, 612], "max_new_tokens": 12})
    assert len(expected) == 12
    result = real.run("-n", "12", "hello", "there")
    assert (result.returncode, result.stdout.decode()) == (0, TOKENIZER.decode(expected) + "\n")
    assert result.stderr.count(b"\n") == 1  # the notice about the embedded model


def test_real_command_answers_text_after_text(real: Fake) -> None:
    expected = [TOKENIZER.decode(real_ids(real, {"tokens": ids_of(text), "max_new_tokens": 5})) for text in ("Ladies and", "é")]
    with Terminal(real, "-n", "5") as chat:
        for text, reply in zip(("Ladies and", "é"), expected, strict=True):
            chat.type(text + "\n")
            assert chat.expect("Text: ").endswith(f"\n{reply}\nText: ")
        chat.type(CTRL_D)
        assert chat.finish() == (0, "\n")


def test_real_command_takes_every_option_of_a_completion(real: Fake) -> None:
    words = [word for flag, (_, value) in FLAGS.items() for word in (flag, str(value))]
    request = dict(FLAGS.values()) | {"stop_strings": ["zzz", "\n\n\n"], "stop_token_ids": [7]}
    expected = real_ids(real, {"tokens": ids_of("hello there"), **request})
    result = real.run(*words, "--no-stop-at-eot", "--stop", "zzz", "--stop", "\n\n\n", "--stop-token", "7", "hello there")
    assert (result.returncode, result.stdout.decode()) == (0, TOKENIZER.decode(expected) + "\n")


def test_real_command_repeats_and_goes_on(real: Fake) -> None:
    text, request = ids_of("hello there"), {"max_new_tokens": 6, "temperature": 0.9}
    first = real_ids(real, {"tokens": text, **request, "seed": 5})
    second = real_ids(real, {"tokens": text, **request, "seed": 6})
    more = real_ids(real, {"tokens": text + second, **request, "seed": 6})
    assert first != second
    with Terminal(real, "-n", "6", "-s", "5", "--no-stop-at-eot") as chat:
        chat.type("/set temperature 0.9\n")
        chat.expect("Text: ")
        for keys, reply in ("hello there", first), ("/again", second), ("/more", more):
            chat.type(keys + "\n")
            assert chat.expect("Text: ").endswith(f"\n{TOKENIZER.decode(reply)}\nText: ")


@pytest.mark.parametrize("overflow", ["slide", "stop", None])
def test_real_command_survives_a_full_context(real: Fake, overflow: str | None) -> None:
    with Checkpoint(EMBEDDED_MODEL) as checkpoint:
        maxT = checkpoint.config.maxT
    with Terminal(real, "-n", "4", *([] if overflow is None else ["--overflow", overflow])) as chat:
        chat.type("\u2603" + " word" * (maxT - 9) + "\n")  # all tokens of the context except seven
        chat.expect("Text: ")
        for _ in range(2):
            chat.type("/more\n")
            shown = chat.expect("Text: ")
            assert "error" not in shown
        assert ("pygpt: " in shown) == (overflow != "slide")
        chat.type(CTRL_D)
        assert chat.finish() == (0, "\n")


def test_real_command_survives_ctrl_c(real: Fake) -> None:
    tokens = real_ids(real, {"tokens": ids_of("hi"), "max_new_tokens": 200})
    first, whole = (TOKENIZER.decode(ids).replace("\n", "\r\n") for ids in (tokens[:1], tokens))
    with Terminal(real, "--no-stop-at-eot", "-n", "200") as chat:
        for _ in range(3):  # Ctrl-C comes in the reply, at its end or at the next prompt
            chat.type("hi\n")
            chat.expect("hi\r\n")
            chat.expect(first)
            chat.type(CTRL_C)
            chat.expect("Text: ")
        chat.type("hi\n")
        chat.expect(whole)


def test_real_command_cuts_a_long_text(real: Fake) -> None:
    with Checkpoint(EMBEDDED_MODEL) as checkpoint:
        maxT = checkpoint.config.maxT
    result = real.run("-n", "6", text=b" word" * (maxT + 1))
    expected = real_ids(real, {"tokens": ids_of(" word" * (maxT - 6)), "max_new_tokens": 6})
    assert (result.returncode, result.stdout.decode()) == (0, TOKENIZER.decode(expected) + "\n")
    assert f"the last {maxT - 6} are used".encode() in result.stderr


def test_words_before_a_bus_error_are_shown(fake: Fake) -> None:
    """If the model file is truncated, the command explains that before the signal ends it."""
    fake.code("""
import signal
def answer(tokens, new):
    tell("pygpt: error: a file in use was cut short\\n")
    os.kill(os.getpid(), signal.SIGBUS)
""")
    assert_refused(fake.run("hi"), 1, "a file in use was cut short")


@pytest.mark.parametrize("options", [("-m", "no.bin"), ("-t", "0"), ("-t", "x"), ("-t", "257"), ("--weights", "q3")])
def test_real_error_is_one_line(real: Fake, options: tuple[str, str]) -> None:
    assert_refused(real.run(*options, "hi"), 2, options[1])


def test_relative_model_path_is_meant_from_the_current_folder(real: Fake) -> None:
    (real.cwd / "mine.bin").symlink_to(EMBEDDED_MODEL)
    result = real.run("-m", "mine.bin", "-n", "1", "hi")
    assert (result.returncode, result.stderr) == (0, b"")


def copied_chat(folder: Path) -> Path:
    """A chat.py with its own package in the same folder."""
    shutil.copytree(ROOT / "pygpt", folder / "copy" / "pygpt")
    return Path(shutil.copy(CHAT, folder / "copy"))


def run_copy(real: Fake, copy: Path) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, copy, "hi"], capture_output=True, cwd=real.cwd, env=real.environment, timeout=PATIENCE
    )


def test_damaged_vocabulary_is_one_line(real: Fake, tmp_path: Path) -> None:
    copy = copied_chat(tmp_path)
    with open(copy.parent / "pygpt" / "data" / "vocab.bpe", "ab") as file:
        file.write(b"\n")
    assert_refused(run_copy(real, copy), 1, "damaged")


def test_kernels_that_were_not_built_are_one_line(real: Fake, tmp_path: Path) -> None:
    copy = copied_chat(tmp_path)
    for built in (copy.parent / "pygpt").glob("*.so"):
        built.unlink()
    assert_refused(run_copy(real, copy), 1, "'_signals'")
