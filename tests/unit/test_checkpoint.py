"""Checkpoints: the choice of the file, the refusals of the strict reader, and the files of the writer."""

import errno
import math
import mmap
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import full_disk
from make_checkpoint import make, to_bfloat16
from running import gist

from pygpt.config import Config
from pygpt.errors import CheckpointError, ClosedError, InputError, PyGPTError
from pygpt.formats.checkpoint import Checkpoint, file_bytes, write_checkpoint
from pygpt.formats.files import MappedFile, only_writer
from pygpt.formats.safetensors import SafetensorsFile
from pygpt.hub.find import EMBEDDED_MODEL, find_model

VERSIONS = (1, 3, 5)
MAGIC, HEADER_BYTES = 20240326, 1024  # the tests' own words for the format: nothing here is taken from the code under test
SMALL = {"L": 2, "NH": 2, "C": 4, "V": 5, "maxT": 3}
INT32 = st.integers(-(2**31), 2**31 - 1)
SMALL_MEMORY = 256 * 1024  # bytes: far more than a header and an error take, far less than any tensor that a header could claim

# ---------------------------------------------------------------------------------------------------------------------
# The format, a second time


def layout(version: int, *, L: int, C: int, V: int, maxT: int, **_: int) -> list[tuple[str, tuple[int, ...]]]:
    """The sixteen tensors of a file, in order."""
    rows = V if version == 1 else -(-V // 128) * 128
    return [
        *[("wte", (rows, C)), ("wpe", (maxT, C)), ("ln1w", (L, C)), ("ln1b", (L, C)), ("qkvw", (L, 3 * C, C))],
        *[("qkvb", (L, 3 * C)), ("attprojw", (L, C, C)), ("attprojb", (L, C)), ("ln2w", (L, C)), ("ln2b", (L, C))],
        *[("fcw", (L, 4 * C, C)), ("fcb", (L, 4 * C)), ("fcprojw", (L, C, 4 * C)), ("fcprojb", (L, C))],
        *[("lnfw", (C,)), ("lnfb", (C,))],
    ]


def edges(version: int, **shape: int) -> list[int]:
    """Where each tensor begins in the file, and where the last one ends."""
    positions = [HEADER_BYTES]
    for _, extents in layout(version, **shape):
        positions.append(positions[-1] + math.prod(extents) * (2 if version == 5 else 4))
    return positions


def is_checkpoint(fields: Sequence[int], size: int) -> bool:
    """Whether a file of this header and size may be read: the rules of the format, without the reader's upper limits."""
    magic, version, maxT, V, L, NH, C, Vp, *reserved = fields
    if magic != MAGIC or version not in VERSIONS or min(maxT, V, L, NH, C) < 1 or C % NH or any(reserved):
        return False
    if version != 1 and Vp != -(-V // 128) * 128:
        return False
    return size == edges(version, L=L, C=C, V=V, maxT=maxT)[-1]


def header(version: int, *, L: int, NH: int, C: int, V: int, maxT: int) -> list[int]:
    return [MAGIC, version, maxT, V, L, NH, C, 0 if version == 1 else -(-V // 128) * 128, *[0] * 248]


def pack(fields: Sequence[int]) -> bytes:
    return struct.pack("<256i", *fields)


def small_model(folder: Path, version: int = 3, *, seed: int = 1, name: str = "model.bin") -> Path:
    make(folder / name, version=version, seed=seed, **SMALL)
    return folder / name


def random_tensors(config: Config, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shape = {"L": config.L, "C": config.C, "V": config.V, "maxT": config.maxT}
    return {name: rng.standard_normal(extents, np.float32) for name, extents in layout(1, **shape)}


def refusal(path: str | Path) -> str:
    """Open a file that must be refused, without noticeable memory, and return the reason, one line."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(path).stored()
        assert tracemalloc.get_traced_memory()[1] < SMALL_MEMORY
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith((f"{path}: ", f"{str(path)!r}: "))
    assert "\n" not in message
    return message


@contextmanager
def unprivileged() -> Iterator[None]:
    """Be an ordinary user for a while: permissions do not bind root."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("runs as root, whom no permission refuses, and may not become another user")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user may enter: pytest's own are closed to all but one."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The reader: files that are refused


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_cut_at_any_tensor_is_refused(tmp_path: Path, version: int) -> None:
    path = small_model(tmp_path, version)
    whole = path.read_bytes()
    assert len(whole) == edges(version, **SMALL)[-1]
    Checkpoint(path).close()
    for length in sorted({edge + step for edge in edges(version, **SMALL) for step in (-1, 0, 1)} - {len(whole)}):
        path.write_bytes((whole + b"\0")[:length])
        message = refusal(path)
        assert f" {length} bytes" in message
        assert str(HEADER_BYTES if length < HEADER_BYTES else len(whole)) in message
        if length >= HEADER_BYTES:
            assert ("too long" if length > len(whole) else "truncated") in message


@pytest.mark.parametrize("length", [0, 1, 32, 1023])
def test_a_file_shorter_than_the_header_is_refused(tmp_path: Path, length: int) -> None:
    path = small_model(tmp_path)
    os.truncate(path, length)
    assert re.search(rf"\b{length} bytes.*\b1024 bytes", refusal(path))


FOREIGN = {
    "ELF": b"\x7fELF\x02\x01\x01",
    "text": b"First Citizen:\nBefore we proceed any further, hear me speak.\n",
    "gguf": b"GGUF\x03\x00\x00\x00",
    "safetensors": b'\x40\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"}',
    "tokenizer": struct.pack("<4i", 20240328, 2, 50257, 50256),
    "big-endian checkpoint": struct.pack(">8i", *header(3, **SMALL)[:8]),
    "zeros": b"",
}


@pytest.mark.parametrize("beginning", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused(tmp_path: Path, beginning: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(beginning.ljust(4096, b"\0"))
    found = int.from_bytes(beginning[:4].ljust(4, b"\0"), "little", signed=True)
    assert re.search(gist(f"magic ... {found} ... {MAGIC}"), refusal(path))
    path.write_bytes(beginning)
    assert f"{len(beginning)} bytes, shorter" in refusal(path)


@pytest.mark.parametrize(
    ("index", "value", "expected"),
    [
        (0, 20240327, "20240327 ... 20240326"),
        (1, 2, "version 2 ... 1, 3 (float32) or 5 (bfloat16)"),
        (1, -3, "version -3 ... 1, 3 (float32) or 5 (bfloat16)"),
        (2, 0, "maxT is 0 ... from 1 to 65536"),
        (2, 65537, "maxT is 65537 ... from 1 to 65536"),
        (3, -5, "V is -5 ... from 1 to 1048576"),
        (4, 257, "L is 257 ... from 1 to 256"),
        (5, 3, "C is 4 ... NH = 3"),
        (5, 8, "C is 4 ... NH = 8"),
        (5, 0, "NH is 0 ... from 1 to 1024"),
        (6, 2**31 - 1, "C is 2147483647 ... from 1 to 16384"),
        (7, 0, "Vp is 0 ... 128 for V = 5"),
        (7, 5, "Vp is 5 ... 128 for V = 5"),
        (7, 256, "Vp is 256 ... 128 for V = 5"),
        (8, 1, "reserved field 8 is 1 ... 0"),
        (255, -1, "reserved field 255 is -1 ... 0"),
    ],
)
def test_the_message_names_what_was_found_and_expected(tmp_path: Path, index: int, value: int, expected: str) -> None:
    path = small_model(tmp_path)
    fields = header(3, **SMALL)
    assert path.read_bytes()[:HEADER_BYTES] == pack(fields)
    fields[index] = value
    path.write_bytes(pack(fields) + path.read_bytes()[HEADER_BYTES:])
    assert re.search(gist(expected), refusal(path))


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One file for each version. The tests below overwrite its header."""
    folder = tmp_path_factory.mktemp("headers")
    return {version: small_model(folder, version, name=f"v{version}.bin") for version in VERSIONS}


def judge(path: Path, fields: Sequence[int]) -> None:
    """Give the file this header. It must open if the format allows it, and otherwise be refused with little memory."""
    with path.open("r+b") as file:
        file.write(pack(fields))
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        Checkpoint(path).close()
        opened = True
    except CheckpointError:
        opened = False
    peak = tracemalloc.get_traced_memory()[1] - before
    assert opened == is_checkpoint(fields, path.stat().st_size), fields[:8]
    assert peak < SMALL_MEMORY, fields[:8]


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_of_the_header_is_checked(patients: dict[int, Path], version: int) -> None:
    @settings(max_examples=40, deadline=None)
    @given(
        value=st.integers(-2, 130) | st.sampled_from([MAGIC, 1 << 16, 1 << 20, 1 << 30, -(1 << 31)]) | INT32,
        reserved=st.integers(8, 255),
    )
    def change(value: int, reserved: int) -> None:
        for index in (*range(9), reserved, 255):
            alter(index, value)

    def alter(index: int, value: int) -> None:
        fields = header(version, **SMALL)
        fields[index] = value
        judge(patients[version], fields)

    change()
    for index in range(8, 256):
        alter(index, 1)


@pytest.mark.usefixtures("_traced")
def test_any_shape_is_checked(patients: dict[int, Path]) -> None:
    extent = st.integers(-1, 9) | st.sampled_from([1 << 8, 1 << 10, 1 << 14, 1 << 16, 1 << 20, 1 << 30, 2**31 - 1]) | INT32

    @settings(max_examples=150, deadline=None)
    @given(version=st.sampled_from(VERSIONS), shape=st.tuples(*[extent] * 5), padding=st.sampled_from([0, 128]) | INT32)
    def change(version: int, shape: tuple[int, ...], padding: int) -> None:
        judge(patients[version], [MAGIC, version, *shape, padding, *[0] * 248])

    change()


@pytest.mark.parametrize(
    ("bits", "shape"),
    [
        (32, {"L": 1, "NH": 1, "C": 1 << 14, "V": 64497, "maxT": 1024}),  # within every limit: only the size is wrong
        (64, {"L": 1, "NH": 1, "C": 1 << 30, "V": 2**31 - 1, "maxT": 2**31 - 14}),
    ],
)
def test_a_size_that_wraps_around_is_refused(tmp_path: Path, bits: int, shape: dict[str, int]) -> None:
    # The claimed values fill a whole multiple of 2^bits bytes: a reader that computes in that width sees none at all.
    claimed = edges(1, **shape)[-1]
    assert claimed > HEADER_BYTES
    assert claimed % 2**bits == HEADER_BYTES
    path = tmp_path / "wrapped.bin"
    path.write_bytes(pack(header(1, **shape)))
    message = refusal(path)
    assert re.search(gist(f"1024 bytes ... {claimed}"), message) if bits == 32 else "maxT is 2147483634" in message


@settings(max_examples=50, deadline=None)
@given(value=INT32)
def test_version_1_has_no_padding_field(patients: dict[int, Path], value: int) -> None:
    fields = header(1, **SMALL)
    fields[7] = value
    with patients[1].open("r+b") as file:
        file.write(pack(fields))
    with Checkpoint(patients[1]) as checkpoint:
        assert checkpoint.config == Config(**SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# The reader: things that are not files


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent.bin")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "regular" in refusal(tmp_path)


@pytest.mark.timeout(10)
def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refusal(tmp_path / "pipe")


def test_a_device_and_a_socket_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "regular" in refusal("/dev/zero")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert "cannot open" in refusal("socket")


def test_an_impossible_path_is_refused() -> None:
    assert "null" in refusal("model\0.bin")


def test_a_ring_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to("ring")
    assert "cannot open" in refusal(tmp_path / "ring")


def test_an_unreadable_file_is_refused(public_folder: Path) -> None:
    path = small_model(public_folder)
    with unprivileged():
        Checkpoint(path).close()  # permitted: what follows is due to the file's mode
    path.chmod(0)
    with unprivileged():
        assert "Permission denied" in refusal(path)


def test_a_file_that_shrinks_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_model(tmp_path)
    real = mmap.mmap

    def shrink_then_map(fd: int, length: int, access: int, offset: int) -> Any:
        os.truncate(path, 2000)
        return real(fd, length, access=access, offset=offset)

    monkeypatch.setattr(mmap, "mmap", shrink_then_map)
    assert "cannot map" in refusal(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading instead of mapping


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_read_into_memory_is_equal_and_independent(tmp_path: Path, version: int) -> None:
    path = small_model(tmp_path, version=version)
    with Checkpoint(path) as mapped, Checkpoint(path, mmap=False) as read:
        assert (read.config, read.version, bytes(read.values)) == (mapped.config, mapped.version, bytes(mapped.values))
        assert read.values.readonly
        kept, copy = read.tensor("wte"), mapped.tensor("wte").copy()
        os.truncate(path, 10)
        assert np.array_equal(read.tensor("wte"), copy)
    assert np.array_equal(kept, copy)
    with pytest.raises(ClosedError):
        read.tensor("wte")


def test_a_view_is_of_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """During view(), a second thread closes the file and opens another file, which may get the same descriptor."""
    (tmp_path / "a").write_bytes(b"a" * 4096)
    (tmp_path / "b").write_bytes(b"b" * 4096)
    file, real, opened = MappedFile(str(tmp_path / "a"), "file", CheckpointError), mmap.mmap, []

    def reuse() -> None:
        file.close()
        opened.append(os.open(tmp_path / "b", os.O_RDONLY))

    other = threading.Thread(target=reuse)

    def wait_then_map(*arguments: Any, **options: Any) -> mmap.mmap:
        other.start()
        other.join(0.3)  # it must wait for the map
        return real(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", wait_then_map)
    assert bytes(file.view(0, 4)) == b"aaaa"
    other.join()
    os.close(opened[0])
    with pytest.raises(ClosedError, match="closed"):
        file.view(0, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        lambda path: os.truncate(path, 0),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
    ],
    ids=["shorter", "longer", "empty", "touched", "other bytes"],
)
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    path = small_model(tmp_path)
    real = mmap.mmap

    def change_then_reserve(fd: int, length: int, flags: int) -> Any:
        assert fd == -1
        change(path)
        return real(fd, length, flags=flags)

    monkeypatch.setattr(mmap, "mmap", change_then_reserve)
    with pytest.raises(CheckpointError, match=f"^{path}: .*changed"):
        Checkpoint(path, mmap=False)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_too_large_for_memory_is_a_memory_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool) -> None:
    path = small_model(tmp_path)

    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match=f"^{path}: .*ulimit -v"):
        Checkpoint(path, mmap=mapped).stored()
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(MemoryError, match="ulimit -v"):
        SafetensorsFile(tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The reader: what it gives


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tensors_are_the_bytes_of_the_file(tmp_path: Path, version: int) -> None:
    path = small_model(tmp_path, version)
    whole = path.read_bytes()
    with Checkpoint(path) as checkpoint:
        assert (checkpoint.version, checkpoint.config) == (version, Config(**SMALL))
        assert checkpoint.path == str(path)
        assert checkpoint.format.name == ("bfloat16" if version == 5 else "float32")
        assert checkpoint.values == whole[HEADER_BYTES:]
        assert checkpoint.values.readonly
        for (name, shape), start in zip(layout(version, **SMALL), edges(version, **SMALL), strict=False):
            count = math.prod(shape)
            if version == 5:
                values = [struct.unpack("<f", b"\0\0" + whole[start + 2 * i : start + 2 * i + 2])[0] for i in range(count)]
            else:
                values = list(struct.unpack_from(f"<{count}f", whole, start))
            expected = np.array(values, np.float32).reshape(shape)
            tensor = checkpoint.tensor(name)
            stored, data = checkpoint.stored()[name]
            held = count * SMALL["V"] // shape[0] if name == "wte" else count  # without padding
            assert (stored, bytes(data)) == (checkpoint.format.name, whole[start : start + held * (2 if version == 5 else 4)])
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(tensor, expected[: SMALL["V"]] if name == "wte" else expected)


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    with Checkpoint(small_model(tmp_path)) as checkpoint, pytest.raises(InputError, match="'lm_head'"):
        checkpoint.tensor("lm_head")


def test_values_beyond_4_gib_are_found(tmp_path: Path) -> None:
    shape = {"L": 48, "NH": 25, "C": 1600, "V": 50257, "maxT": 1024}  # GPT-2 XL, as a file of holes
    path = tmp_path / "xl.bin"
    last = np.arange(1600, dtype="<f4")
    with path.open("wb") as file:
        file.write(pack(header(3, **shape)))
        try:
            file.seek(edges(3, **shape)[-2])
            file.write(last.tobytes())
            file.flush()
        except OSError as error:
            pytest.skip(f"no file of 6 GB can be made here, even one of holes: {error}")
    with Checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("lnfb"), last)
        assert not checkpoint.tensor("lnfw").any()
    path.unlink()


@pytest.mark.parametrize(
    ("L", "NH", "C", "parameters"),
    [(12, 12, 768, 124439808), (24, 16, 1024, 354823168), (36, 20, 1280, 774030080), (48, 25, 1600, 1557611200)],
)
def test_the_sizes_of_the_published_models(L: int, NH: int, C: int, parameters: int) -> None:
    config = Config(L=L, NH=NH, C=C, V=50257, maxT=1024)
    padded = parameters + 47 * C
    assert config.parameters(padded=False) == parameters
    assert [file_bytes(config, version) for version in VERSIONS] == [
        1024 + 4 * parameters,
        1024 + 4 * padded,
        1024 + 2 * padded,
    ]
    if L == 12:
        assert file_bytes(config, 3) == 497904640  # gpt2_124M.bin


# ---------------------------------------------------------------------------------------------------------------------
# The reader: closing


@pytest.mark.parametrize("version", VERSIONS)
def test_a_closed_checkpoint_refuses_and_its_arrays_live_on(tmp_path: Path, version: int) -> None:
    checkpoint = Checkpoint(small_model(tmp_path, version))
    array = checkpoint.tensor("fcw")
    copy = array.copy()
    checkpoint.close()
    checkpoint.close()
    (tmp_path / "model.bin").unlink()
    np.testing.assert_array_equal(array, copy)
    with pytest.raises(ClosedError, match=re.escape(checkpoint.path)):
        checkpoint.tensor("fcw")


def test_closing_while_the_values_are_viewed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(small_model(tmp_path))
    view = np.frombuffer(checkpoint.values, "<f4")
    copy = view.copy()
    checkpoint.close()
    np.testing.assert_array_equal(view, copy)
    del view
    checkpoint.close()
    with pytest.raises(ClosedError):
        checkpoint.tensor("wte")


def test_a_view_cannot_change_the_file(tmp_path: Path) -> None:
    with Checkpoint(small_model(tmp_path)) as checkpoint:
        view = checkpoint.tensor("wpe")
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1


def test_leaving_the_block_closes_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Checkpoint(small_model(tmp_path)) as checkpoint:
        _ = 1 / 0
    with pytest.raises(ClosedError):
        checkpoint.tensor("wte")


@pytest.mark.skipif(sys.platform != "linux", reason="the list of maps is read from /proc")
def test_the_map_goes_with_the_last_view(tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    path = small_model(tmp_path)
    assert not mapped()
    checkpoint = Checkpoint(path)
    array = checkpoint.tensor("lnfb")
    assert mapped()
    checkpoint.close()
    assert mapped()
    del array, checkpoint
    assert not mapped()


def test_200_cycles_keep_the_number_of_descriptors(tmp_path: Path) -> None:
    good, bad = small_model(tmp_path), tmp_path / "bad.bin"
    bad.write_bytes(b"\0" * 2000)
    before = len(os.listdir("/dev/fd"))
    failed = 0
    for _ in range(200):
        with Checkpoint(good) as checkpoint:
            checkpoint.tensor("wte")
        Checkpoint(good).tensor("wte")  # dropped without close()
        for path in (bad, tmp_path, tmp_path / "absent.bin"):
            try:
                Checkpoint(path)
            except CheckpointError:
                failed += 1
    assert failed == 600
    assert len(os.listdir("/dev/fd")) == before


# ---------------------------------------------------------------------------------------------------------------------
# The writer: what it writes


@pytest.mark.parametrize("version", VERSIONS)
def test_reading_and_writing_gives_the_same_file(tmp_path: Path, version: int) -> None:
    path = small_model(tmp_path, version)
    with Checkpoint(path) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name, _ in layout(version, **SMALL)}
        write_checkpoint(tmp_path / "again.bin", checkpoint.config, tensors, version=version)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


@st.composite
def configs(draw: st.DrawFn) -> Config:
    NH, HS = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    V = draw(st.sampled_from([1, 127, 128, 129, 256]) | st.integers(1, 300))
    return Config(L=draw(st.integers(1, 3)), NH=NH, C=NH * HS, V=V, maxT=draw(st.integers(1, 5)))


@settings(max_examples=60, deadline=None)
@given(config=configs(), version=st.sampled_from(VERSIONS), seed=st.integers(0, 99))
def test_written_files_are_read(tmp_path_factory: pytest.TempPathFactory, config: Config, version: int, seed: int) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.bin"
    tensors = random_tensors(config, seed)
    write_checkpoint(path, config, tensors, version=version)
    with Checkpoint(path) as checkpoint:
        assert (checkpoint.config, checkpoint.version) == (config, version)
        for name, array in tensors.items():
            kept = array if version != 5 else (to_bfloat16(array).astype("<u4") << 16).view("<f4")
            np.testing.assert_array_equal(checkpoint.tensor(name), kept)
        padding = (config.Vp - config.V) * config.C if version != 1 else 0
        width = 2 if version == 5 else 4
        start = config.V * config.C * width
        assert bytes(checkpoint.values[start : start + padding * width]) == bytes(padding * width)
    path.unlink()


def test_lists_and_other_layouts_are_converted(tmp_path: Path) -> None:
    config = Config(**SMALL)
    tensors: dict[str, npt.ArrayLike] = {**random_tensors(config)}
    plain = dict(tensors)
    tensors["fcw"] = np.asfortranarray(tensors["fcw"])
    tensors["lnfb"] = np.asarray(tensors["lnfb"]).tolist()
    tensors["wte"] = np.asarray(tensors["wte"], np.float64)
    tensors["wpe"] = np.asarray(tensors["wpe"]).astype(">f4")
    write_checkpoint(tmp_path / "plain.bin", config, plain)
    write_checkpoint(tmp_path / "mixed.bin", config, tensors)
    assert (tmp_path / "mixed.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The writer: bfloat16


def written_bfloat16(folder: Path, patterns: Sequence[int]) -> list[int]:
    """Send float32 bit patterns through a version 5 file, as its lnfb; return the 16-bit patterns found there."""
    config = Config(L=1, NH=1, C=len(patterns), V=1, maxT=1)
    tensors = {name: np.zeros_like(array) for name, array in random_tensors(config).items()}
    tensors["lnfb"] = np.array(patterns, "<u4").view("<f4")
    write_checkpoint(folder / "rounded.bin", config, tensors, version=5)
    return list(struct.unpack(f"<{len(patterns)}H", (folder / "rounded.bin").read_bytes()[-2 * len(patterns) :]))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F807FFF, 0x3F80),  # just below the half: down
        (0x3F808000, 0x3F80),  # halfway: to the even neighbour, here down
        (0x3F808001, 0x3F81),  # just above the half: up
        (0x3F818000, 0x3F82),  # halfway: to the even neighbour, here up
        (0xBF818000, 0xBF82),  # the same below zero
        (0x3FFF8000, 0x4000),  # the carry reaches the exponent
        (0x80000000, 0x8000),  # -0
        (0x00000001, 0x0000),  # the least subnormal
        (0x00008000, 0x0000),  # halfway between 0 and the least bfloat16
        (0x00008001, 0x0001),
        (0x007FFFFF, 0x0080),  # subnormal to normal
        (0x7F7F7FFF, 0x7F7F),  # the greatest that stays finite
        (0x7F7F8000, 0x7F80),  # from here on: infinity
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),  # infinity
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FC0),  # a NaN whose payload lies in the lower half: it must not become infinity
        (0x7FC00000, 0x7FC0),
        (0x7FFFFFFF, 0x7FFF),  # a NaN that rounding would carry to -0
        (0xFFFFFFFF, 0xFFFF),
    ],
)
def test_bfloat16_by_hand(tmp_path: Path, pattern: int, expected: int) -> None:
    assert f"{written_bfloat16(tmp_path, [pattern])[0]:#06x}" == f"{expected:#06x}"


def bfloat16_value(pattern: int) -> Fraction:
    """Return the exact value of a finite bfloat16. The pattern of infinity means the next power of two."""
    sign, exponent, fraction = pattern >> 15, pattern >> 7 & 0xFF, pattern & 0x7F
    magnitude = Fraction(fraction + 128 * (exponent > 0)) * Fraction(2) ** (max(exponent, 1) - 134)
    return -magnitude if sign else magnitude


@settings(max_examples=50, deadline=None)
@given(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_is_the_nearest_of_exact_numbers(tmp_path_factory: pytest.TempPathFactory, patterns: list[int]) -> None:
    for pattern, found in zip(patterns, written_bfloat16(tmp_path_factory.getbasetemp(), patterns), strict=True):
        value = struct.unpack("<f", struct.pack("<I", pattern))[0]
        if math.isnan(value):
            assert found & 0x7F80 == 0x7F80
            assert found & 0x7F
        elif math.isinf(value):
            assert found == pattern >> 16
        else:
            inner, outer = pattern >> 16, (pattern >> 16) + 1  # the neighbours towards zero and away from it
            below, above = (abs(Fraction(value) - bfloat16_value(neighbour)) for neighbour in (inner, outer))
            nearest = inner if below < above or (below == above and inner % 2 == 0) else outer
            assert found == nearest, hex(pattern)


# ---------------------------------------------------------------------------------------------------------------------
# The writer: wrong arguments


@pytest.mark.parametrize("version", [0, 2, 4, 6, -1, 3.0, True, "3", [3]])
def test_an_unknown_version_is_not_written(tmp_path: Path, version: Any) -> None:
    with pytest.raises(InputError, match=gist(f"version is {version!r} ... 1, 3 or 5")):
        write_checkpoint(tmp_path / "model.bin", Config(**SMALL), random_tensors(Config(**SMALL)), version=version)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", ["missing", "added", "renamed"])
def test_other_names_are_not_written(tmp_path: Path, change: str) -> None:
    tensors = random_tensors(Config(**SMALL))
    if change != "added":
        del tensors["fcb"]
    if change != "missing":
        tensors["lm_head"] = np.zeros(3, np.float32)
    named = {"missing": "'fcb'", "added": "'lm_head'", "renamed": "'fcb', 'lm_head'"}[change]
    with pytest.raises(InputError, match=rf"\[{named}\]"):
        write_checkpoint(tmp_path / "model.bin", Config(**SMALL), tensors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "shape"), [("wte", (128, 4)), ("lnfb", (3,)), ("lnfb", ()), ("fcw", (2, 4, 16)), ("qkvb", (1, 12)), ("wpe", (12,))]
)
def test_other_shapes_are_not_written(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = {**random_tensors(Config(**SMALL)), name: np.zeros(shape, np.float32)}
    with pytest.raises(InputError, match=rf"{name} .*\(.*\), .*\("):
        write_checkpoint(tmp_path / "model.bin", Config(**SMALL), tensors)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# The writer: all or nothing


class Interrupted(Mapping[str, Any]):
    """Tensors that call `at_fcw` for the eleventh tensor, in the middle of the file."""

    def __init__(self, at_fcw: Callable[[], None]) -> None:
        self.tensors = random_tensors(Config(**SMALL), seed=9)
        self.at_fcw = at_fcw

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        if name == "fcw":
            self.at_fcw()
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_an_exception_midway_leaves_the_folder_as_it_was(tmp_path: Path, error: type[BaseException], existed: bool) -> None:
    def fail() -> None:
        assert len(os.listdir(tmp_path)) == len(before) + 1  # the temporary file is beside its target, on the same file system
        raise error

    if existed:
        small_model(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(error):
        write_checkpoint(tmp_path / "model.bin", Config(**SMALL), Interrupted(fail))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a crash of the machine could leave the name without its content."""
    path, synced = small_model(tmp_path), []
    old, fsync, replace = path.read_bytes(), os.fsync, os.replace

    def spy(fd: int) -> None:
        fsync(fd)
        synced.append(os.fstat(fd).st_size)

    def late(source: str, target: str) -> None:
        assert synced == [len(old)]
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", late)
    write_checkpoint(path, Config(**SMALL), Interrupted(lambda: None))
    assert synced == [len(old)]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = small_model(tmp_path)
    old = path.read_bytes()
    seen: list[bytes] = []
    write_checkpoint(path, Config(**SMALL), Interrupted(lambda: seen.append(path.read_bytes())))
    assert seen == [old]
    assert path.read_bytes() != old
    assert os.listdir(tmp_path) == ["model.bin"]
    Checkpoint(path).close()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = small_model(tmp_path)
    old = path.read_bytes()
    with full_disk(2000), pytest.raises(OSError, match="File too large"):
        write_checkpoint(path, Config(**SMALL), random_tensors(Config(**SMALL)))
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model.bin"]


def test_an_unwritable_folder_is_left_alone(public_folder: Path) -> None:
    path = small_model(public_folder)
    old = path.read_bytes()
    path.chmod(0o666)
    public_folder.chmod(0o555)
    with unprivileged(), pytest.raises(PermissionError):
        write_checkpoint(path, Config(**SMALL), random_tensors(Config(**SMALL)))
    assert path.read_bytes() == old
    assert os.listdir(public_folder) == ["model.bin"]


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_checkpoint(tmp_path / "absent" / "model.bin", Config(**SMALL), random_tensors(Config(**SMALL)))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_only_a_regular_file_is_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    (os.mkdir if kind == "directory" else os.mkfifo)(target)
    mode = target.stat().st_mode
    with pytest.raises(FileExistsError, match="regular"):
        write_checkpoint(target, Config(**SMALL), random_tensors(Config(**SMALL)))
    assert target.stat().st_mode == mode
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path, dangling: bool) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "blob", tmp_path / "model.bin"
    link.symlink_to("store/blob")
    if not dangling:
        small_model(tmp_path / "store", name="blob")
    write_checkpoint(link, Config(**SMALL), random_tensors(Config(**SMALL), seed=9))
    assert os.readlink(link) == "store/blob"
    assert os.listdir(tmp_path / "store") == ["blob"]
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "store"]
    with Checkpoint(target) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("lnfb"), random_tensors(Config(**SMALL), seed=9)["lnfb"])


def test_an_open_checkpoint_may_be_written_over(tmp_path: Path) -> None:
    path = small_model(tmp_path)
    with Checkpoint(path) as checkpoint:
        tensors = {name: checkpoint.tensor(name) for name, _ in layout(3, **SMALL)}
        kept = tensors["fcprojw"].copy()
        write_checkpoint(path, checkpoint.config, tensors, version=5)
        np.testing.assert_array_equal(tensors["fcprojw"], kept)
    with Checkpoint(path) as checkpoint:
        assert checkpoint.version == 5


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "model.bin", Config(**SMALL), random_tensors(Config(**SMALL)))
    finally:
        os.umask(old)
    assert (tmp_path / "model.bin").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------------------------------------------
# Which model answers


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, with PYGPT_MODEL unset."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYGPT_MODEL", raising=False)
    return tmp_path


def test_models_are_looked_for_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("given.bin", "named.bin", "gpt2_124M.bin"):
        (folder / name).touch()
    monkeypatch.setenv("PYGPT_MODEL", "named.bin")
    assert find_model("given.bin") == ("given.bin", "given")
    assert find_model(folder / "given.bin") == (str(folder / "given.bin"), "given")
    assert find_model() == ("named.bin", "PYGPT_MODEL")
    monkeypatch.setenv("PYGPT_MODEL", "")  # empty counts as unset
    assert find_model() == ("gpt2_124M.bin", "folder")
    monkeypatch.delenv("PYGPT_MODEL")
    assert find_model() == ("gpt2_124M.bin", "folder")
    (folder / "gpt2_124M.bin").unlink()
    assert find_model() == (EMBEDDED_MODEL, "embedded")


def test_the_embedded_model_is_complete(folder: Path) -> None:
    with Checkpoint(find_model()[0]) as checkpoint:
        assert checkpoint.version == 5
        assert checkpoint.config.V == 50257


@pytest.mark.parametrize("name", ["absent.bin", "folder/absent.bin"])
def test_a_given_file_that_is_missing_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (folder / "gpt2_124M.bin").touch()
    monkeypatch.setenv("PYGPT_MODEL", "gpt2_124M.bin")  # neither stands in for a file that was asked for by name
    with pytest.raises(CheckpointError, match=f"^{name}: no such"):
        find_model(name)


def test_an_empty_name_is_an_error(folder: Path) -> None:
    (folder / "gpt2_124M.bin").touch()
    with pytest.raises(CheckpointError, match=r"^the model's name is empty"):
        find_model("")


def test_a_file_named_by_the_environment_that_is_missing_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gpt2_124M.bin").touch()
    monkeypatch.setenv("PYGPT_MODEL", "absent.bin")
    with pytest.raises(CheckpointError, match=r"^absent\.bin .*PYGPT_MODEL"):
        find_model()


def test_a_dangling_link_in_the_folder_is_an_error(folder: Path) -> None:
    (folder / "gpt2_124M.bin").symlink_to("moved.bin")
    with pytest.raises(CheckpointError, match=r"^gpt2_124M\.bin: no such"):
        find_model()


def test_finding_does_not_open(folder: Path) -> None:
    (folder / "gpt2_124M.bin").write_bytes(b"not a checkpoint")
    assert find_model() == ("gpt2_124M.bin", "folder")
    with pytest.raises(CheckpointError):
        Checkpoint("gpt2_124M.bin")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    state, link = tmp_path / "a.state", tmp_path / "b.state"
    state.touch()
    link.symlink_to(state)
    for _ in range(2):
        with only_writer(str(state)):
            for name in (state, link):
                with pytest.raises(PyGPTError, match="another process is writing it"), only_writer(str(name)):
                    pass
            os.unlink(f"{state}.lock")  # somebody tidies up
    assert {path.name for path in tmp_path.iterdir()} == {"a.state", "b.state"}
