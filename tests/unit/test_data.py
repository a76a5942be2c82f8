"""Training data against hand-made bytes, llm.c's rules written down a second time, and a generator of the tests' own."""

import hashlib
import io
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import gist

from pygpt.errors import DataError, InputError
from pygpt.formats import llmc, text
from pygpt.formats.llmc import read_tokens, write_tokens
from pygpt.formats.text import encode_text, read_text, tokens_of_text
from pygpt.tokenizer import Tokenizer
from pygpt.training import data as loader
from pygpt.training.data import DataLoader, split

TOKENIZER = Tokenizer()
EOT = 50256
IDS = [50256, 0, 1, 65535, 258]


def shard_bytes(ids: list[int], magic: int = 20240520, version: int = 1, count: int | None = None, reserved: int = 0) -> bytes:
    """A token file, written a second time."""
    header = struct.pack("<256i", magic, version, len(ids) if count is None else count, *[0] * 252, reserved)
    return header + struct.pack(f"<{len(ids)}H", *ids)


def shard(folder: Path, ids: list[int], name: str = "a.bin") -> str:
    (folder / name).write_bytes(shard_bytes(ids))
    return str(folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def test_reading(tmp_path: Path) -> None:
    tokens = read_tokens(shard(tmp_path, IDS))
    assert tokens.tolist() == IDS
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable
    os.unlink(tmp_path / "a.bin")
    assert tokens.tolist() == IDS  # the map outlives the name
    assert read_tokens(shard(tmp_path, [7]), V=8).tolist() == [7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes ... 1024 bytes"),
        (shard_bytes([1])[:1023], "1023 bytes ... 1024 bytes"),
        (shard_bytes([1], magic=20240801), "magic ... 20240801 ... 20240520 ... llm.c"),
        (shard_bytes([1], version=7), "version 7 ... 1"),
        (shard_bytes([]), "0 tokens ... 1"),
        (shard_bytes([1], count=-1), "-1 tokens ... 1"),
        (shard_bytes([1], reserved=5), "field 255 is 5 ... 0"),
        (shard_bytes([1, 2])[:-1], "truncated ... 1027 bytes ... 1028 ... 2 tokens"),
        (shard_bytes([1], count=2**31 - 1), "truncated ... 1026 bytes ... 4294968318 ... 2147483647 tokens"),
        (shard_bytes([1]) + b"\0", "too long ... 1027 bytes ... 1026 ... 1 tokens"),
    ],
)
def test_other_files_than_shards_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: .*{gist(message)}"):
        read_tokens(path)


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(DataError, match="regular"):
            read_tokens(tmp_path / name)
    with pytest.raises(DataError, match=r"absent\.bin'.*No such file"):
        read_tokens(tmp_path / "absent.bin")


@pytest.mark.parametrize("position", [0, 2, 4])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    monkeypatch.setattr(llmc, "PIECE", 2)
    ids = [9, 9, 9, 9, 9]
    ids[position] = 10
    path = shard(tmp_path, ids)
    read_tokens(path, V=11)
    with pytest.raises(DataError, match=rf"a.bin: .* 10 .*\b{position}\b.* 10 ids"):
        read_tokens(path, V=10)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_writing(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.bin"
    assert write_tokens(path, IDS) == 5
    assert path.read_bytes() == shard_bytes(IDS)
    pieces = (np.array(IDS[i : i + cut], np.int64) for i in range(0, 5, cut))
    assert write_tokens(path, pieces) == 5
    assert path.read_bytes() == shard_bytes(IDS)
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "no tokens"),
        (iter([[], []]), "no tokens"),
        ([1, 65536], "token id 65536 at position 1"),
        ([1, -1], "token id -1 at position 1"),
        ([1.0], "float64"),
        (["1"], "<U1"),
        ([[1], [2]], r"shape \(2, 1\)"),
        ([[1], [2, 3]], "inhomogeneous"),
        (7, r"shape \(\)"),
        (iter([[1], [2.5]]), "float64"),
    ],
)
def test_writing_refuses_bad_tokens(tmp_path: Path, tokens: Any, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"older")
    with pytest.raises(InputError, match=message):
        write_tokens(tmp_path / "a.bin", tokens)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"older"


def test_writing_more_than_the_header_can_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmc, "MOST_TOKENS", 4)
    assert write_tokens(tmp_path / "a.bin", iter([[1, 2], [3, 4]])) == 4
    with pytest.raises(InputError, match="4 tokens"):
        write_tokens(tmp_path / "b.bin", iter([[1, 2], [3, 4, 5]]))
    assert os.listdir(tmp_path) == ["a.bin"]


def test_splitting() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    train, val = split(tokens, val_tokens=3)
    assert (train.tolist(), val.tolist()) == ([3, 4, 5, 6, 7, 8, 9], [0, 1, 2])
    train, val = split(tokens, val_fraction=0.2)
    assert (train.tolist(), val.tolist()) == ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either"),
        ({"val_tokens": 1, "val_fraction": 0.5}, "give either"),
        ({"val_tokens": 0}, "val_tokens is 0: .*10 tokens.* 1 to 9"),
        ({"val_tokens": 10}, "val_tokens is 10"),
        ({"val_tokens": 1.0}, "val_tokens is 1.0"),
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": 0.01}, "val_fraction is 0.01: .* 10 tokens"),
        ({"val_fraction": 0.99}, "val_fraction is 0.99"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
    ],
)
def test_splitting_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split(np.arange(10), **given)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def philox(seed: int, epoch: int, stream: int, count: int) -> list[int]:
    """`count` words of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    mask = 2**64 - 1
    words: list[int] = []
    for block in range(1, count // 4 + 2):
        c, (k0, k1) = (block, stream, 0, 0), (seed, epoch)
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = (p1 >> 64) ^ c[1] ^ k0, p1 & mask, (p0 >> 64) ^ c[3] ^ k1, p0 & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += c
    return words[:count]


def order(seed: int | None, epoch: int, stream: int, count: int) -> list[int]:
    if seed is None:
        return list(range(count))
    words = philox(seed, epoch, stream, count)
    return sorted(range(count), key=words.__getitem__)


def expected_batches(shards: list[list[int]], B: int, T: int, seed: int | None, epoch: int) -> Iterator[tuple[Any, Any]]:
    """An epoch by llm.c's rules, token by token."""
    for s in order(seed, epoch, 0, len(shards)):
        ids = shards[s]
        for batch in order(seed, epoch, 1 + s, (len(ids) - 1) // (B * T)):
            at = [[batch * B * T + b * T + t for t in range(T)] for b in range(B)]
            yield [[ids[i] for i in row] for row in at], [[ids[i + 1] for i in row] for row in at]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.integers(0, 25), min_size=1, max_size=4),
    st.none() | st.integers(0, 2**64 - 1),
    st.data(),
)
def test_batches(
    tmp_path_factory: pytest.TempPathFactory, B: int, T: int, extra: list[int], seed: int | None, drawn: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards, start = [], 0
    for number, more in enumerate(extra):
        shards.append(list(range(start, start + B * T + 1 + more)))  # every id once: a batch says where it is from
        start += len(shards[-1])
        shard(folder, shards[-1], f"s_{number}.bin")
    loader = DataLoader(str(folder / "s_*.bin"), B, T, shuffle_seed=seed, V=start)
    wanted = [batch for epoch in range(3) for batch in expected_batches(shards, B, T, seed, epoch)]
    assert loader.tokens == start
    assert 3 * loader.batches == len(wanted)

    stop = drawn.draw(st.integers(0, len(wanted)))
    found = [loader.next_batch() for _ in range(stop)]
    state = json.loads(json.dumps(loader.state()))
    found += [loader.next_batch() for _ in range(len(wanted) - stop)]
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in found] == wanted
    assert all(array.shape == (B, T) and array.dtype == np.int32 for batch in found for array in batch)
    assert loader.epoch == 2

    resumed = DataLoader([str(folder / f"s_{number}.bin") for number in range(len(extra))], B, T, shuffle_seed=seed)
    for _ in range(drawn.draw(st.integers(0, 4))):
        resumed.next_batch()
    resumed.restore(state)
    assert resumed.state() == state
    again = [resumed.next_batch() for _ in range(len(wanted) - stop)]
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in again] == wanted[stop:]
    resumed.reset()
    assert resumed.next_batch()[0].tolist() == wanted[0][0]


def test_an_order_never_changes() -> None:
    """A run that is resumed years later, under another NumPy, goes on with the same batches."""
    loader = DataLoader(np.arange(41), 2, 2, shuffle_seed=42)
    firsts = [int(loader.next_batch()[0][0, 0]) // 4 for _ in range(20)]
    assert firsts[:10] == [8, 5, 4, 0, 1, 7, 6, 2, 9, 3]
    assert firsts[10:] == [6, 4, 3, 2, 8, 1, 7, 0, 5, 9]


def test_tokens_in_memory_may_have_any_integer_type() -> None:
    for tokens in (list(range(7)), np.arange(7), np.arange(7, dtype=np.uint8), tuple(range(7))):
        inputs, targets = DataLoader(tokens, 1, 3).next_batch()
        assert (inputs.tolist(), targets.tolist()) == ([[0, 1, 2]], [[1, 2, 3]])


def test_batches_are_the_callers_own() -> None:
    tokens = np.arange(5, dtype=np.int32)
    inputs, targets = DataLoader(tokens, 1, 4).next_batch()
    inputs[:] = 9
    assert (targets.tolist(), tokens.tolist()) == ([[1, 2, 3, 4]], [0, 1, 2, 3, 4])


def test_a_file_whose_name_is_a_pattern(tmp_path: Path) -> None:
    path = shard(tmp_path, [1, 2], "a[1].bin")
    shard(tmp_path, [3, 4], "a1.bin")
    assert DataLoader(path, 1, 1).next_batch()[0].tolist() == [[1]]
    assert DataLoader(Path(path), 1, 1).next_batch()[0].tolist() == [[1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: DataLoader(path, 0, 4), "B is 0: .* from 1"),
        (lambda path: DataLoader(path, 1, -1), "T is -1"),
        (lambda path: DataLoader(path, True, 4), "B is True"),
        (lambda path: DataLoader(path, 1, 4, shuffle_seed=-1), "shuffle_seed is -1"),
        (lambda path: DataLoader(path, 1, 4, shuffle_seed=2**64), "shuffle_seed is 18446744073709551616"),
        (lambda path: DataLoader(path, 1, 4, V=0), "V is 0"),
        (lambda path: DataLoader(path, 1, 4, V=4), "a.bin: .*token id 4 .*position 4.* 4 ids"),
        (lambda path: DataLoader([0, 1, 9], 1, 1, V=9), "tokens: .*token id 9 .*position 2"),
        (lambda path: DataLoader([0, -1], 1, 1), "tokens: .*token id -1 .*position 1"),
        (lambda path: DataLoader(path, 1, 5), r"a.bin: 5 tokens, .*1\*5 \+ 1 = 6"),
        (lambda path: DataLoader([path.replace("a.bin", "b.bin"), path], 1, 4), r"b.bin: 2 tokens, .* leave this file out"),
        (lambda path: DataLoader([1, 2], 2, 1), "tokens: 2 tokens"),
        (lambda path: DataLoader(path + "x", 1, 4), "pattern"),
        (lambda path: DataLoader([], 1, 4), "empty"),
        (lambda path: DataLoader([0.5, 1.5], 1, 1), "float64"),
    ],
)
def test_the_loader_refuses(tmp_path: Path, make: Callable[[str], Any], message: str) -> None:
    shard(tmp_path, [1, 2], "b.bin")
    with pytest.raises(InputError, match=message):
        make(shard(tmp_path, [0, 1, 2, 3, 4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": 3}, r"B = 3\b.* 2\b"),
        ({"T": 1}, r"T = 1\b.* 2\b"),
        ({"tokens": 8}, r"tokens = 8\b.* 9\b"),
        ({"shards": 2}, r"shards = 2\b.* 1\b"),
        ({"shards": True}, "shards = True.* 1"),
        ({"fingerprint": "0" * 32}, "fingerprint = '0{32}'.*'[0-9a-f]{32}'.*the same data"),
        ({"shuffle_seed": None}, r"shuffle_seed = None\b.* 5\b"),
        ({"shard": 1}, "shard is 1: .*0 to 0"),
        ({"batch": 3}, "batch is 3: .*0 to 2"),
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": None}, "epoch is None"),
        ({"epoch": "1"}, "epoch is '1'"),
        ({"more": 0}, "fields .*more"),
    ],
)
def test_states_of_other_loaders_are_refused(change: dict[str, int | str | None], message: str) -> None:
    loader = DataLoader(np.arange(9), 2, 2, shuffle_seed=5)
    loader.next_batch()
    before = loader.state()
    with pytest.raises(InputError, match=message):
        loader.restore({**before, **change})
    assert loader.state() == before


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=12), min_size=1, max_size=3), st.booleans(), st.data())
def test_data_have_a_fingerprint(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], large: bool, drawn: st.DataObject
) -> None:
    """It is a function of the tokens and of how they are cut. Of a large data set some places of every shard are looked at."""
    samples, sample = 3, 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "SAMPLES", samples)
        patch.setattr(loader, "SAMPLE", sample)
        patch.setattr(loader, "PIECE", 5)
        patch.setattr(loader, "WHOLE", sum(map(len, shards)) - large)

        def fingerprint(shards: list[list[int]]) -> str:
            folder = tmp_path_factory.mktemp("shards")
            return DataLoader([shard(folder, ids, f"{i}.bin") for i, ids in enumerate(shards)], 1, 1).fingerprint

        digest, seen = hashlib.sha256(), set[tuple[int, int]]()
        for s, ids in enumerate(shards):
            digest.update(struct.pack("<q", len(ids)))
            places = [[*range(len(ids))]]
            if large:
                starts = [(len(ids) - sample) * i // (samples - 1) for i in range(samples)]
                places = [[*range(start, start + sample)] for start in starts]
            for place in places:
                digest.update(struct.pack(f"<{len(place)}I", *(ids[i] for i in place)))
                seen.update((s, i) for i in place)
        assert fingerprint(shards) == digest.hexdigest()[:32]
        if len(shards) == 1:
            assert DataLoader(np.array(shards[0], np.int64), 1, 1).fingerprint == digest.hexdigest()[:32]

        s, i = drawn.draw(st.sampled_from([(s, i) for s, ids in enumerate(shards) for i in range(len(ids))]))
        other = [list(ids) for ids in shards]
        other[s][i] += 1
        assert (fingerprint(other) != fingerprint(shards)) == ((s, i) in seen)


def test_the_first_states_had_no_fingerprint() -> None:
    loader = DataLoader(np.arange(9), 1, 2)
    state = loader.state()
    expected = loader.next_batch()[0].tolist()
    del state["fingerprint"]
    loader.restore(state)
    assert loader.next_batch()[0].tolist() == expected


def test_a_batch_that_its_shard_has_not(tmp_path: Path) -> None:
    loader = DataLoader([shard(tmp_path, [1, 2], "a.bin"), shard(tmp_path, [1, 2, 3], "b.bin")], 1, 1)
    with pytest.raises(InputError, match=r"batch = 2.* 1 batches"):
        loader.restore({**loader.state(), "batch": 2})


def test_a_shard_that_changes_meanwhile(tmp_path: Path) -> None:
    loader = DataLoader([shard(tmp_path, [1, 2], "a.bin"), shard(tmp_path, [3, 4], "b.bin")], 1, 1)
    loader.next_batch()
    before = loader.state()
    shard(tmp_path, [3, 4, 5], "b.bin")
    with pytest.raises(DataError, match=r"b\.bin: 3 tokens.* 2\b"):
        loader.next_batch()
    assert loader.state() == before
    shard(tmp_path, [3, 4], "b.bin")
    assert loader.next_batch()[0].tolist() == [[3]]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def by_hand(text: str, eot: str, allow_special: bool = True) -> list[int]:
    """A text's tokens as llm.c prepares them, section by section."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if eot != "paragraph":
        return [EOT] * (eot == "document") + TOKENIZER.encode(text, allow_special=allow_special)
    sections = text.split("\n\n")
    ids = []
    for number, section in enumerate(sections, 1):
        section += "" if number == len(sections) else "\n\n"
        ids += [EOT, *TOKENIZER.encode(section, allow_special=allow_special)]
    return ids


def test_text_as_llm_c_prepares_it() -> None:
    text = "hello there\n\nLadies and\n\n\n\nhello\n\n\nthere\n\n"
    n, nn = TOKENIZER.encode("\n"), TOKENIZER.encode("\n\n")
    wanted = [
        EOT,
        31373,
        612,
        *nn,
        EOT,
        43,
        50192,
        290,
        *nn,
        EOT,
        *nn,
        EOT,
        31373,
        *nn,
        EOT,
        *n,
        *TOKENIZER.encode("there\n\n"),
        EOT,
    ]
    assert tokens_of_text(text).tolist() == wanted == by_hand(text, "paragraph")
    assert tokens_of_text("hello there", eot="document").tolist() == [EOT, 31373, 612]
    assert tokens_of_text("hello there", eot="none").tolist() == [31373, 612]
    assert tokens_of_text("", eot="none").tolist() == []
    assert tokens_of_text("").tolist() == [EOT]
    assert tokens_of_text("").dtype == np.uint16


TEXTS = st.text(st.sampled_from(" \n\n\t\r\x0b\x1c\x1f\x85\xa0\u2003\u3000'stremvldab1²é中🙂!.<|>"), max_size=60) | st.text(
    max_size=60
)
ODD = st.sampled_from(["\r\n", "\r\n\r\n", "\n\r", "\ufeff", "<|endoftext|>", "<|endof", "text|>", "a\r", "\n b"])


@settings(max_examples=400, deadline=None)
@given(st.lists(TEXTS | ODD, max_size=8), st.sampled_from(text.EOT_MODES), st.booleans())
def test_tokens_are_the_same_wherever_the_text_is_cut(pieces: list[str], eot: str, special: bool) -> None:
    found = [token for array in encode_text(iter(pieces), eot=eot, allow_special=special) for token in array.tolist()]
    whole = "".join(pieces)
    assert found == by_hand(whole, eot, special)
    assert found == tokens_of_text(pieces, eot=eot, allow_special=special).tolist()
    assert found == tokens_of_text(whole, eot=eot, allow_special=special).tolist()


def test_text_is_encoded_before_all_of_it_has_come() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "to be or not to be "

    tokens = encode_text(endless(), eot="none")
    for count in range(1, 20):
        assert next(tokens).size
        assert taken == count


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"eot is 'line'.*document.*paragraph.*none"):
        encode_text(["a"], eot="line")


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1000])
def test_reading_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("pygpt.formats.text.PIECE", piece)
    text = "\ufeffné\r\n中🙂\x00\u2028\r end\r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    text = "né\n中🙂\x00\u2028\n end\n"
    assert "".join(read_text(tmp_path / "a.txt")) == text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert "".join(read_text("-")) == text


@pytest.mark.parametrize("piece", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("content", "offset", "byte"),
    [
        (b"\xffabc", 0, 0xFF),
        (b"n\xc3\xa9\xe4\xb8!", 3, 0xE4),
        (b"abcd\xf0\x9f\x99", 4, 0xF0),
        ("né中\udc80".encode("utf-8", "surrogateescape"), 6, 0x80),
    ],
)
def test_bytes_that_are_not_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, offset: int, byte: int, piece: int
) -> None:
    monkeypatch.setattr("pygpt.formats.text.PIECE", piece)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"a.txt: .*{byte:#x}.* {offset} .*UTF-8"):
        list(read_text(tmp_path / "a.txt"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(DataError, match=rf"stdin: .*{byte:#x}.* {offset} .*UTF-8"):
        list(read_text("-"))


def test_texts_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="-: stdin is closed"):
        list(read_text("-"))
    with pytest.raises(DataError, match=r"absent'.*No such file"):
        list(read_text(tmp_path / "absent"))
    with pytest.raises(DataError, match="Is a directory"):
        list(read_text(tmp_path))
    with pytest.raises(DataError, match="null byte"):
        list(read_text("a\0b"))


def test_the_last_shard_may_be_too_small_for_a_batch(tmp_path: Path) -> None:
    """`pygpt shards --shard-size` writes the rest there. Its tokens are in no batch; every order of shards works."""
    for number, count in enumerate((20, 20, 3), 1):
        shard(tmp_path, list(range(count)), f"a_{number}.bin")
    for seed in (None, 1, 2, 3, 4):
        loader = DataLoader(str(tmp_path / "a_*.bin"), 2, 4, shuffle_seed=seed)
        assert (loader.batches, loader.tokens) == (4, 43)
        batches = [loader.next_batch()[0].tolist() for _ in range(8)]
        assert sorted(batches[:4]) == sorted(batches[4:])
        assert loader.epoch == 1
        loader.restore(place := loader.state())
        assert loader.state() == place


def test_labels_replace_targets() -> None:
    tokens, labels = np.arange(13), np.arange(13) - 100 * (np.arange(13) < 5)
    loader, plain = DataLoader(tokens, 1, 4, labels=labels), DataLoader(tokens, 1, 4)
    assert [loader.next_batch()[1].tolist() for _ in range(3)] == [[[-99, -98, -97, -96]], [[5, 6, 7, 8]], [[9, 10, 11, 12]]]
    assert (loader.masked, plain.masked) == (True, False)
    with pytest.raises(InputError, match="fingerprint"):
        loader.restore(plain.state())
    with pytest.raises(InputError, match="labels have shape"):
        DataLoader(tokens, 1, 4, labels=labels[1:])
