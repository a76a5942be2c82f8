"""Test pygpt convert between versions: the bytes are those of the tests' writer, files are atomic, each failure is one line."""

import os
import re
import shlex
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import full_disk
from make_checkpoint import make
from running import assert_one_line_error, assert_refused, assert_refuses, contents, environment, execute, gist, run

from pygpt.commands.convert import EXAMPLES, main
from pygpt.config import TENSORS, Config
from pygpt.errors import ClosedError, InputError
from pygpt.formats import checkpoint, dtypes
from pygpt.formats.checkpoint import Checkpoint, write_checkpoint
from pygpt.formats.open import open_model
from pygpt.formats.vocabulary import characters_of, load_tokenizer, write_vocabulary
from pygpt.tokenizer import tokenizer_of

SMALL = {"L": 2, "NH": 2, "C": 6, "V": 130, "maxT": 5}
WIDE = {"L": 2, "NH": 2, "C": 32, "V": 70, "maxT": 9}  # rows of whole blocks
PAIRS = [(1, 3), (1, 5), (3, 1), (3, 5), (5, 1), (5, 3)]
HEADER_BYTES = 1024
MB = 1 << 20


def converted(source: Path, version: int | None = None) -> bytes:
    """Return the bytes of the file after a conversion."""
    target = source.with_name("converted.bin")
    assert main([str(source), str(target), *([] if version is None else ["--version", str(version)])]) == 0
    return target.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The bytes


def widened(bfloat16: bytes) -> bytes:
    """Return the values of a version 5 file as float32."""
    return b"".join(b"\0\0" + bfloat16[i : i + 2] for i in range(0, len(bfloat16), 2))


def as_float32(path: Path, version: int, *, C: int, V: int) -> bytes:
    """Return the bytes of a version 5 file's values in version 1 or 3."""
    values = widened(path.read_bytes()[HEADER_BYTES:])
    padded = -(-V // 128) * 128
    return values if version == 3 else values[: V * C * 4] + values[padded * C * 4 :]


@pytest.mark.parametrize(("found", "version"), PAIRS)
@pytest.mark.parametrize("V", [1, 127, 128, 129, 300])
def test_every_pair_of_versions(tmp_path: Path, found: int, version: int, V: int) -> None:
    shape = {**SMALL, "V": V}
    make(tmp_path / "source.bin", version=found, seed=V, **shape)
    make(tmp_path / "other.bin", version=version, seed=V, **shape)
    expected = (tmp_path / "other.bin").read_bytes()  # rounded by the tests' code
    if found == 5:
        expected = expected[:HEADER_BYTES] + as_float32(tmp_path / "source.bin", version, C=shape["C"], V=V)
    assert converted(tmp_path / "source.bin", version) == expected


@pytest.mark.parametrize(("found", "version"), PAIRS)
def test_back_again_is_the_same_file(tmp_path: Path, found: int, version: int) -> None:
    make(tmp_path / "source.bin", version=found, **SMALL)
    if found != 5 and version == 5:  # values that bfloat16 represents exactly
        converted(tmp_path / "source.bin", 5)
        (tmp_path / "converted.bin").rename(tmp_path / "rounded.bin")
        converted(tmp_path / "rounded.bin", found)
        (tmp_path / "converted.bin").rename(tmp_path / "source.bin")
    before = (tmp_path / "source.bin").read_bytes()
    converted(tmp_path / "source.bin", version)
    (tmp_path / "converted.bin").rename(tmp_path / "there.bin")
    assert converted(tmp_path / "there.bin", found) == before


@pytest.mark.parametrize("found", [1, 3, 5])
def test_the_version_that_is_meant(tmp_path: Path, found: int) -> None:
    make(tmp_path / "source.bin", version=found, **SMALL)
    assert struct.unpack_from("<2i", converted(tmp_path / "source.bin"))[1] == {1: 5, 3: 5, 5: 3}[found]


def test_every_bfloat16_widens_exactly(tmp_path: Path) -> None:
    shape = {"L": 1, "NH": 1, "C": 64, "V": 1024, "maxT": 1}
    make(tmp_path / "source.bin", version=5, **shape)
    patterns = np.arange(1 << 16, dtype="<u2").tobytes()  # infinities, subnormals and every NaN among them
    with (tmp_path / "source.bin").open("r+b") as file:
        file.seek(HEADER_BYTES)
        file.write(patterns)
    found = converted(tmp_path / "source.bin")
    assert found[HEADER_BYTES : HEADER_BYTES + (4 << 16)] == widened(patterns)


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_float32_moves_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[int]) -> None:
    """A conversion between versions 1 and 3 copies all values, including NaNs, bit for bit."""
    source = tmp_path_factory.mktemp("convert") / "source.bin"
    make(source, version=1, **SMALL)
    before = source.read_bytes()[:-24] + struct.pack("<6I", *values)
    source.write_bytes(before)
    assert converted(source, 3)[-24:] == before[-24:]
    source.with_name("converted.bin").rename(source)
    assert converted(source, 1) == before


def test_padding_is_zeros_whatever_it_was(tmp_path: Path) -> None:
    make(tmp_path / "clean.bin", version=5, **SMALL)
    data = bytearray((tmp_path / "clean.bin").read_bytes())
    first = HEADER_BYTES + SMALL["V"] * SMALL["C"] * 2
    data[first : first + 8] = b"\x7f" * 8
    (tmp_path / "dirty.bin").write_bytes(data)
    assert converted(tmp_path / "dirty.bin", 3) == converted(tmp_path / "clean.bin", 3)


@pytest.mark.parametrize(("found", "version"), PAIRS)
@pytest.mark.parametrize("piece", [1, 5, 6, 7, 100])
def test_the_size_of_the_pieces_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: int, version: int, piece: int
) -> None:
    make(tmp_path / "source.bin", version=found, **SMALL)
    expected = converted(tmp_path / "source.bin", version)
    monkeypatch.setattr(dtypes, "PIECE", piece)
    assert converted(tmp_path / "source.bin", version) == expected


@pytest.mark.parametrize(("found", "version"), PAIRS)
def test_it_needs_little_memory(tmp_path: Path, found: int, version: int) -> None:
    shape = {"maxT": 64, "V": 20000, "L": 40, "NH": 1, "C": 128}
    config = Config(**shape)
    size = checkpoint.file_bytes(config, found)
    with (tmp_path / "source.bin").open("wb") as file:
        file.write(struct.pack("<8i", 20240326, found, 64, 20000, 40, 1, 128, 0 if found == 1 else 20096))
        file.truncate(size)
    main([])  # modules imported here do not count below
    tracemalloc.start()
    try:
        assert main([str(tmp_path / "source.bin"), str(tmp_path / "target.bin"), "--version", str(version)]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "target.bin").stat().st_size == checkpoint.file_bytes(config, version)
    assert peak < 8 * MB < size / 2


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_it_reports_its_work(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make("a.bin", version=3, **SMALL)
    assert main(["a.bin", "b.bin"]) == 0
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == (
        f"pygpt: a.bin (version 3, float32, {os.path.getsize('a.bin')} bytes) -> "
        f"b.bin (version 5, bfloat16, {os.path.getsize('b.bin')} bytes)\n"
    )
    assert sorted(os.listdir()) == ["a.bin", "b.bin"]


def test_an_older_file_is_replaced(folder: Path) -> None:
    make("a.bin", version=3, **SMALL)
    Path("b.bin").write_bytes(b"older")
    assert main(["a.bin", "b.bin"]) == 0
    with Checkpoint("b.bin") as found:
        assert found.version == 5


def test_names_that_look_odd(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("-a b\n.bin", version=3, **SMALL)
    assert main(["--version", "1", "--", "-a b\n.bin", "-ü\n"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir()) == ["-a b\n.bin", "-ü\n"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["SRC", "DST", "--help"]),
        (["a.bin"], ["DST", "--help"]),
        (["a.bin", "b.bin", "c.bin"], ["c.bin"]),
        (["a.bin", "b.bin", "--version", "2"], ["2 ... 1 ... 3 ... 5"]),
        (["a.bin", "b.bin", "--version", "five"], ["'five'"]),
        (["a.bin", "b.bin", "--version", ""], ["''"]),
        (["a.bin", "b.bin", "--vers", "5"], ["--vers"]),
        (["a.bin", "b.bin", "--version", "3"], ["a.bin", "version 3 already"]),
        (["absent.bin", "b.bin"], ["absent.bin"]),
        (["text.txt", "b.bin"], ["text.txt", "header"]),
        (["cut.bin", "b.bin"], ["cut.bin", "truncated"]),
        (["sub", "b.bin"], ["sub", "config.json is missing"]),
        (["", "b.bin"], ["''"]),
        (["a.bin", ""], ["DST"]),
        (["a.bin", "a.bin"], ["a.bin", "same file"]),
        (["a.bin", "./sub/../a.bin"], ["same file"]),
        (["a.bin", "link.bin"], ["same file"]),
        (["link.bin", "a.bin"], ["same file"]),
        (["a.bin", "hard.bin"], ["same file"]),
        (["a.bin", "sub"], ["sub", "not a regular file"]),
        (["a.bin", "fifo"], ["fifo", "not a regular file"]),
        (["a.bin", "/dev/null"], ["/dev/null", "not a regular file"]),
        (["a.bin", "b.safetensors"], ["b.safetensors", "pygpt quantize", "folder/"]),
        (["a.bin", "b.gguf"], ["b.gguf", "pygpt quantize"]),
        (["a.bin", "absent/b.bin"], ["absent", "does not exist"]),
        (["a.bin", "text.txt/b.bin"], ["text.txt", "does not exist"]),
    ],
)
def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: list[str]) -> None:
    make("a.bin", version=3, **SMALL)
    Path("cut.bin").write_bytes(Path("a.bin").read_bytes()[:-1])
    Path("text.txt").write_text("text")
    Path("sub").mkdir()
    os.mkfifo("fifo")
    os.symlink("a.bin", "link.bin")
    os.link("a.bin", "hard.bin")
    before = contents(folder)
    assert_refuses(main, capsys, arguments, *named)
    assert contents(folder) == before


@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk(folder: Path, capsys: pytest.CaptureFixture[str], existed: bool) -> None:
    make("a.bin", version=3, **SMALL)
    if existed:
        Path("b.bin").write_bytes(b"older")
    before = contents(folder)
    with full_disk(3000):
        assert_refuses(main, capsys, ["a.bin", "b.bin"], "b.bin: cannot write", "File too large", status=1)
    assert contents(folder) == before


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (MemoryError, 1), (OSError, 1)])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_midway_leaves_the_folder_as_it_was(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    status: int,
    existed: bool,
) -> None:
    calls: list[int] = []
    real = dtypes.BFLOAT16.from_float32
    assert real is not None

    def fail(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
        calls.append(len(os.listdir()) - len(before))
        if len(calls) == 9:
            raise error
        return real(array)

    make("a.bin", version=3, **SMALL)
    if existed:
        Path("b.bin").write_bytes(b"older")
    before = contents(folder)
    monkeypatch.setitem(checkpoint.FORMATS, 5, dtypes.Format("bfloat16", "<u2", 1, 2, dtypes.BFLOAT16.to_float32, fail))
    assert main(["a.bin", "b.bin"]) == status
    assert calls == [1] * 9  # a temporary file in the target's folder
    assert contents(folder) == before
    out, err = capsys.readouterr()
    assert out == ""
    if status == 1:
        assert_one_line_error(err)
    else:
        assert err == ""


def test_as_a_process(folder: Path) -> None:
    make("a.bin", version=3, **SMALL)
    done = run("convert", "a.bin", "b.bin")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert_refused(run("convert", "a.bin", "a.bin"), "same file")
    assert run("convert", "a.bin", "c.bin", shell='"$@" >&- 2>&-').returncode == 0
    assert Path("c.bin").read_bytes() == Path("b.bin").read_bytes()


def test_ctrl_c(folder: Path) -> None:
    """If a signal comes in the middle of the file, the status is 130, without a message."""
    make("a.bin", version=3, **SMALL)
    program = """
import os, signal, sys
from pygpt.commands.convert import main
from pygpt.formats.dtypes import Format
real = Format.write
signal.signal(signal.SIGINT, signal.default_int_handler)
def write(row, file, array):
    real(row, file, array)
    if len(array) == 5:
        os.kill(os.getpid(), signal.SIGINT)
Format.write = write
sys.exit(main(["a.bin", "b.bin"]))
"""
    command = [sys.executable, "-c", program]
    done = execute(command, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert os.listdir() == ["a.bin"]


def test_examples_of_the_help_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    assert EXAMPLES in capsys.readouterr().out
    make("gpt2_124M.bin", version=3, **SMALL)
    make("wide.bin", **WIDE)
    assert run("quantize", "wide.bin", "gpt2_q8.gguf").returncode == 0
    commands = re.findall(r"^  pygpt convert (.*?)  ", EXAMPLES, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        assert main(shlex.split(command)) == 0, command
    assert len(os.listdir()) == 9


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_vocabulary_of_its_own_stays_with_the_model(folder: Path, known: bool) -> None:
    vocabulary = characters_of(["abc é"])
    make("a.bin", version=3, **WIDE | {"V": len(vocabulary["model"]["vocab"])})
    write_vocabulary("a.tokenizer.json", vocabulary if known else {"model": {"type": "Unigram", "vocab": []}})
    assert main(["a.bin", "b.bin"]) == main(["b.bin", "c.bin"]) == 0
    assert run("quantize", "a.bin", "d.safetensors").returncode == 0
    assert len([name for name in os.listdir() if name.endswith(".tokenizer.json")]) == (4 if known else 1)
    for name in ("b.bin", "c.bin", "d.safetensors") if known else ():
        with open_model(name) as model:
            assert tokenizer_of(model.config).vocabulary() == load_tokenizer("a.tokenizer.json").vocabulary()


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that come in pieces


SOURCES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0", "q4_0": "q4_0"}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("ending", [".gguf", ".safetensors"])
def test_models_of_every_format_are_sources(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, ending: str) -> None:
    """All values stay exact in float32, and are rounded to bfloat16; a folder has the same values."""
    make("wide.bin", **WIDE)
    source = f"model{ending}"
    assert run("quantize", "--format", kind, "wide.bin", source).returncode == 0
    with open_model(source) as opened:
        wanted = {name: np.concatenate(list(opened.pieces(name))) for name, _ in TENSORS}
    for arguments in (
        [source, "exact.bin"],
        ["--version", "5", source, "rounded.bin"],
        [source, "folder/"],
        ["folder", "back.bin"],
    ):
        assert main(arguments) == 0, capsys.readouterr().err
    for name, exact in (("exact.bin", True), ("back.bin", True), ("rounded.bin", False)):
        with Checkpoint(name) as found:
            assert found.version == (3 if exact else 5)
            for tensor, values in wanted.items():
                rounded = values if exact else dtypes.BFLOAT16.to_float32(dtypes.BFLOAT16.from_float32(values))  # type: ignore[misc]
                assert np.array_equal(found.tensor(tensor), rounded)
    assert f"{source} ({SOURCES[kind]}, " in capsys.readouterr().err


def in_pieces(array: npt.NDArray[np.float32], step: int) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(array), step):
        yield array[start : start + step]


def arrays(path: str) -> tuple[Config, dict[str, Any]]:
    make(path, version=3, **SMALL)
    with Checkpoint(path) as source:
        return source.config, {name: source.tensor(name).copy() for name, _, _, _ in source.config.tensors(padded=False)}


@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_written_in_pieces_or_whole(folder: Path, version: int, step: int) -> None:
    config, tensors = arrays("a.bin")
    write_checkpoint("whole.bin", config, tensors, version=version)
    pieces = {name: in_pieces(array, step) for name, array in tensors.items()}
    write_checkpoint("pieces.bin", config, pieces, version=version)
    assert Path("pieces.bin").read_bytes() == Path("whole.bin").read_bytes()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda array: in_pieces(array[:-1], 2), "(4, 6)"),
        (lambda array: in_pieces(array[:0], 2), "(0, 6)"),
        (lambda array: in_pieces(np.concatenate([array, array]), 3), "(6, 6)"),
        (lambda array: in_pieces(array[:, :5], 2), "(2, 5)"),
        (lambda array: in_pieces(array.reshape(-1), 2), "(2,)"),
        (lambda array: iter([array, [[]]]), "(6, 0)"),
    ],
)
def test_pieces_of_another_shape_are_refused(folder: Path, change: Callable[[Any], Any], found: str) -> None:
    config, tensors = arrays("a.bin")
    tensors["wpe"] = change(tensors["wpe"])
    with pytest.raises(InputError, match=gist(f"wpe ... {found} ... (5, 6)")):
        write_checkpoint("b.bin", config, tensors)
    assert os.listdir() == ["a.bin"]


@pytest.mark.parametrize("version", [1, 3, 5])
def test_pieces_are_the_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr(dtypes, "PIECE", 100)
    make("a.bin", version=version, **SMALL)
    with Checkpoint("a.bin") as source:
        for name, shape, _, _ in source.config.tensors(padded=False):
            found = list(source.pieces(name))
            assert all(len(piece) <= 16 for piece in found)
            assert sum(map(len, found)) == shape[0]
            np.testing.assert_array_equal(np.concatenate(found), source.tensor(name))
        with pytest.raises(InputError, match="'wtf'"):
            next(source.pieces("wtf"))
        del found
    with pytest.raises(ClosedError):
        next(source.pieces("wte"))
