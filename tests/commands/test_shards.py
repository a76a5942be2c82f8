"""Test pygpt shards: it writes files as llm.c does, all or none of them, and reports each failure in one line."""

import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from limits import full_disk
from running import PYGPT, assert_refuses, environment, run
from test_data import by_hand, shard_bytes

from pygpt import DataLoader, Tokenizer
from pygpt.commands import console, shards
from pygpt.formats import llmc as token_files
from pygpt.formats import text

TEXT = "hello there\n\nLadies and gentlemen\n\nna\u00efve \u4e2d"
IDS = by_hand(TEXT, "paragraph")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with one text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text(TEXT, "utf-8")
    return tmp_path


def made(folder: Path) -> dict[str, bytes]:
    """Return all files in the folder except the text."""
    files = (path for path in folder.rglob("*") if path.name != "in.txt")
    return {str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes() for path in files}


# ---------------------------------------------------------------------------------------------------------------------
# The files


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        ("-o .", {"in_train.bin": IDS}),
        ("-o ./", {"in_train.bin": IDS}),
        ("-o b.c --val-tokens 5", {"b.c_val.bin": IDS[:5], "b.c_train.bin": IDS[5:]}),
        ("-o b --val-fraction .25", {"b_train.bin": IDS[: -round(len(IDS) / 4)], "b_val.bin": IDS[-round(len(IDS) / 4) :]}),
        ("-o b --eot document", {"b_train.bin": by_hand(TEXT, "document")}),
        ("-o b --eot none", {"b_train.bin": by_hand(TEXT, "none")}),
        ("in.txt -o b", {"b_train.bin": IDS + IDS}),
        (
            "-o b --shard-size 4 --val-tokens 6",
            {"b_val_000001.bin": IDS[:4], "b_val_000002.bin": IDS[4:6]}
            | {f"b_train_{1 + i // 4:06d}.bin": IDS[6:][i : i + 4] for i in range(0, len(IDS) - 6, 4)},
        ),
    ],
)
def test_files(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, files: dict[str, list[int]]) -> None:
    assert shards.main(["in.txt", *arguments.split()]) == 0
    assert made(folder) == {name: shard_bytes(ids) for name, ids in files.items()}
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"pygpt: [^\n]+\n", output.err)
    for part in ("train", "val"):
        count = sum(len(ids) for name, ids in files.items() if part in name)
        assert (f": {count} tokens" in output.err) == (count > 0)


def test_patterns_and_stdin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.text", "a.text", "[.text"):
        Path(name).write_text(name)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    assert shards.main(["?.text", "-", "[.text", "-o", "all", "--eot", "document"]) == 0
    texts = ("[.text", "a.text", "b.text", "from stdin", "[.text")
    assert made(folder)["all_train.bin"] == shard_bytes([token for text in texts for token in by_hand(text, "document")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    assert shards.main(["-", "-o", "."]) == 0
    assert made(folder)["stdin_train.bin"] == shard_bytes(by_hand("from stdin", "paragraph"))


def test_the_loader_reads_them(folder: Path) -> None:
    assert shards.main(["in.txt", "-o", "b", "--shard-size", "5"]) == 0
    loader = DataLoader("b_train_*.bin", 1, 2, V=50257)
    assert loader.tokens == len(IDS)
    assert loader.next_batch()[1].tolist() == [IDS[1:3]]


def test_a_text_need_not_fit_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in text, token_files:
        monkeypatch.setattr(module, "PIECE", 1 << 14)
    line = "To be, or not to be, that is the question.\n"
    Path("long.txt").write_text(line * 100_000)
    shards.main(["in.txt", "-o", "first"])  # data that are loaded once do not count below
    tracemalloc.start()
    try:
        assert shards.main(["long.txt", "-o", "long", "--val-fraction", "0.1"]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < Path("long.txt").stat().st_size / 4  # less than the size of the tokens
    assert sum(path.stat().st_size - 1024 for path in folder.glob("long_*.bin")) == 2 * (
        1 + 100_000 * len(by_hand(line, "none"))
    )


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and files after a failure


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("", ["text is missing", "-"]),
        ("in.txt", ["-o is missing"]),
        ("in.txt -o b --eot line", ["--eot: invalid choice: 'line'", "document", "none"]),
        ("in.txt -o b --val-tokens 1 --val-fraction 0.5", ["give one"]),
        ("in.txt -o b --val-tokens 0", ["--val-tokens", "'0'", "from 1"]),
        ("in.txt -o b --val-tokens x", ["--val-tokens", "'x'"]),
        ("in.txt -o b --val-tokens 999", ["val_tokens is 999", f"from 1 to {len(IDS) - 1}"]),
        ("in.txt -o b --val-fraction 1", ["--val-fraction", "'1'", "between 0 and 1"]),
        ("in.txt -o b --val-fraction 0.0", ["--val-fraction", "'0.0'"]),
        ("in.txt -o b --val-fraction 0.001", ["val_fraction is 0.001"]),
        ("in.txt -o b --shard-size -5", ["--shard-size"]),
        ("in.txt -o b -n 5", ["-n goes with --show"]),
        ("in.txt -o b --shard 5", ["--shard"]),
        ("absent.txt -o b", ["'absent.txt'", "not a file"]),
        ("*.text -o b", ["'*.text'", "pattern"]),
        ("- - -o b", ["stdin"]),
        ("in.txt -o absent/b", ["folder 'absent'"]),
        ("in.txt -o absent/more/", ["folder 'absent/more'"]),
        ("in.txt -o in.txt/", ["folder 'in.txt'"]),
        ("in.txt -o in.txt/b", ["folder 'in.txt'"]),
        ("empty.txt -o b --eot none", ["the texts are empty"]),
        ("empty.txt -o b", ["the texts are empty"]),
        ("latin.txt -o b", ["latin.txt: ... 0xe9 ... 4 ... UTF-8"]),
        ("in.txt latin.txt -o b", ["latin.txt: ... 0xe9 ... 4 ... UTF-8"]),
        ("in.txt -o old", ["old_val_000001.bin exists already"]),
        ("sub -o b", ["'sub'", "Is a directory"]),
        ("empty.txt -o new/", ["texts are empty"]),
        ("--show in.txt -o b", ["one or the other"]),
        ("--show in.txt in.txt", ["one or the other"]),
        ("--show in.txt", ["in.txt", "1024 bytes"]),
        ("--show in.txt -n 0", ["-n", "'0'"]),
        ("--show absent.bin", ["absent.bin", "No such file"]),
        ("--show old_val_000001.bin", ["old_val_000001.bin: ... token id 50257 ... position 1"]),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, named: list[str]) -> None:
    Path("latin.txt").write_bytes("caf é".encode("latin-1"))
    Path("empty.txt").write_bytes(b"")
    Path("sub").mkdir()
    Path("old_val_000001.bin").write_bytes(shard_bytes([1, 50257]))
    before = made(folder)
    assert_refuses(shards.main, capsys, arguments.split(), *named)
    assert made(folder) == before
    assert not Path("new").exists()


def test_a_folder_is_made_where_a_slash_asks_for_it(folder: Path) -> None:
    for _ in range(2):
        assert shards.main(["in.txt", "-o", "new/"]) == 0
        Path("new/in_train.bin").unlink()
    assert list(Path("new").iterdir()) == []


def test_other_files_do_not_matter(folder: Path) -> None:
    for name in ("b_train.txt", "b_train_x.bin", "bb_train.bin", "b.bin"):
        Path(name).touch()
    assert shards.main(["in.txt", "-o", "b"]) == 0


def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("long.txt").write_text("to be or not to be " * 5000)
    before = made(folder)
    with full_disk(3000):
        assert_refuses(shards.main, capsys, ["in.txt", "long.txt", "-o", "b"], "b: cannot write", "File too large", status=1)
    assert made(folder) == before


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 1)])
def test_a_failure_midway_leaves_the_folder_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[BaseException], status: int
) -> None:
    real, calls = token_files.write_tokens, []

    def fail(path: str, tokens: Any) -> int:
        calls.append(path)
        if len(calls) == 3:
            raise error
        return int(real(path, tokens))

    monkeypatch.setattr(shards, "write_tokens", fail)
    assert shards.main(["in.txt", "-o", "b", "--shard-size", "4"]) == status
    assert len(calls) == 3
    assert made(folder) == {}
    assert capsys.readouterr().err.count("\n") == (status == 1)


# ---------------------------------------------------------------------------------------------------------------------
# --show, the process, the progress bar


def test_showing(folder: Path) -> None:
    Path("a.bin").write_bytes(shard_bytes([31373, 612, 50256, 198, 198]))
    done = run("shards", "--show", "a.bin", "-n", "3")
    wanted = "a.bin: 5 tokens, 1034 bytes; the first 3:\n31373 612 50256\nhello there<|endoftext|>\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")


def test_showing_does_not_command_the_terminal(folder: Path) -> None:
    """On a terminal, control characters in a shard and in its name are escaped. On a pipe, the bytes are the tokens' bytes."""
    hostile = "a\x1b]0;title\x07b\x1b[2J\r\x9bc\td\n"
    ids = [*Tokenizer().encode(hostile), 128]  # and a byte that is not UTF-8
    Path("\x1b[2J.bin").write_bytes(shard_bytes(ids))
    words = [*PYGPT, "shards", "--show", "\x1b[2J.bin"]
    done = subprocess.run(words, capture_output=True, env=environment(), timeout=100)
    content = Tokenizer().decode_bytes(ids)
    assert content.startswith(hostile.encode())
    assert (done.returncode, done.stdout.split(b"\n", 2)[2], done.stderr) == (0, content + b"\n", b"")
    screen, terminal = pty.openpty()
    with open(screen, "rb", buffering=0) as shown, open(terminal, "wb") as stdout:
        process = subprocess.run(words, stdout=stdout, env=environment(), timeout=100)
        text = shown.read(65536).decode().replace("\r\n", "\n")
    assert process.returncode == 0
    assert text.startswith(f"\\x1b[2J.bin: {len(ids)} tokens")
    assert text.split("\n", 2)[2] == "a\\x1b]0;title\\x07b\\x1b[2J\\r\\x9bc\td\n\ufffd\n"


def test_as_a_process(folder: Path) -> None:
    """The commands of the help run without output on stdout. Without a terminal, there is no progress bar."""
    Path("input.txt").write_text(TEXT * 10, "utf-8")
    Path("books").mkdir()
    Path("books/a.txt").write_text(TEXT, "utf-8")
    Path("data").mkdir()
    commands = re.findall(r"^    pygpt shards ((?!--show).*?)(?:   .*)?$", shards.__doc__ or "", re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = [word.replace("32768", "20").replace("0.01", "0.1") for word in shlex.split(command)]
        done = run("shards", *words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1), done.stderr
        assert "\r" not in done.stderr
    names = ["books_train_000001.bin", "books_val_000001.bin", "input_train.bin", "input_val.bin"]
    assert sorted(os.listdir("data")) == names


def test_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.Progress("tokens", 200) as bar:
        bar.update(50)
    assert screen.getvalue() == ""  # not a terminal
    monkeypatch.setattr(screen, "isatty", lambda: True)
    with console.Progress("tokens", 200, 50) as bar:
        bar.update(70, ", so far")
        bar.line("a line")
    assert re.search(r" 50/200 .* 70/200 .*tokens/s, so far", screen.getvalue().replace("\r", " "))
