"""Compare the tokenizer with GPT-2's published vocabulary and with tiktoken's own definition; test its errors.

The tests work without a network: tiktoken's loader gets the package's files instead of downloads."""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from running import execute

from pygpt import tokenizer as module
from pygpt.errors import InputError, PyGPTError
from pygpt.tokenizer import END_OF_TEXT, PATTERN, VOCABULARY_FILE, StreamDecoder, Tokenizer

# sha256 of the lines "<id> <bytes in hex>" of all 50,257 entries of GPT-2's encoder.json, in the order of their ids. It was
# computed from the published file (sha256 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783).
ENCODER_JSON_SHA256 = "c0cbb77810dc181ea5f911df052ec89a82d5e1fd33da8e41adf71a54a9735656"

# GPT-2's own split pattern, for the `regex` module. tiktoken and this project use a faster equivalent.
ORIGINAL_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

TOKENIZER = Tokenizer()
EOT = 50256

# Any text, and text with many cases of the split pattern: all kinds of spaces, apostrophes, scripts.
CHARACTERS = st.characters(exclude_categories=["Cs"])
DENSE = st.text(st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0\u2003\u3000'stremvld1²aéж\u017f中🙂!.<|>"))
TEXTS = st.text(CHARACTERS) | DENSE
IDS = st.lists(st.integers(0, EOT))
# Ids of single bytes cut characters everywhere, and give many invalid sequences.
BYTE_IDS = st.lists(st.integers(0, 255) | st.just(EOT))


# ---------------------------------------------------------------- the vocabulary


def test_known_encodings() -> None:
    assert TOKENIZER.encode("hello there") == [31373, 612]
    assert TOKENIZER.encode("Ladies and") == [43, 50192, 290]
    assert TOKENIZER.encode("") == []


def test_sizes() -> None:
    assert (TOKENIZER.V, TOKENIZER.eot) == (50257, EOT)


def test_vocabulary_is_that_of_encoder_json() -> None:
    canonical = "".join(f"{token} {TOKENIZER.decode_bytes([token]).hex()}\n" for token in range(TOKENIZER.V))
    assert hashlib.sha256(canonical.encode()).hexdigest() == ENCODER_JSON_SHA256


@pytest.fixture
def definition(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return tiktoken's own gpt2 definition, which tiktoken computes from the package's vocabulary."""
    spelled = {chr(byte): byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    others = [byte for byte in range(256) if chr(byte) not in spelled]
    character = {byte: char for char, byte in spelled.items()} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    encoder = {"".join(character[byte] for byte in TOKENIZER.decode_bytes([token])): token for token in range(EOT)}

    def carried(url: str, _sha256: str | None = None) -> bytes:
        return Path(VOCABULARY_FILE).read_bytes() if url.endswith("vocab.bpe") else json.dumps(encoder).encode()

    monkeypatch.setattr("tiktoken.load.read_file_cached", carried)
    made: dict[str, Any] = import_module("tiktoken_ext.openai_public").gpt2()
    return made


def test_definition_is_tiktokens_own(definition: dict[str, Any]) -> None:
    assert definition["mergeable_ranks"] == {TOKENIZER.decode_bytes([token]): token for token in range(EOT)}
    assert definition["special_tokens"] == {END_OF_TEXT: TOKENIZER.eot}
    assert definition["explicit_n_vocab"] == TOKENIZER.V
    other = tiktoken.Encoding(**definition)

    @settings(deadline=None)
    @given(TEXTS)
    def same_ids(text: str) -> None:
        assert TOKENIZER.encode(text) == other.encode_ordinary(text)
        assert TOKENIZER.encode(text, allow_special=True) == other.encode(text, allowed_special="all")

    same_ids()


@settings(deadline=None)
@given(TEXTS)
def test_text_is_split_as_by_the_original_pattern(text: str) -> None:
    pieces = import_module("regex").findall(ORIGINAL_PATTERN, text)
    assert TOKENIZER.encode(text) == [token for piece in pieces for token in TOKENIZER.encode(piece)]


def test_pattern_is_tiktokens_if_it_has_the_same_spelling() -> None:
    public = import_module("tiktoken_ext.openai_public")
    spelling = getattr(public, "r50k_pat_str", PATTERN)  # older releases have no such constant
    assert "++" not in spelling or spelling == PATTERN  # other releases spelled it without possessive quantifiers


# ---------------------------------------------------------------- text to ids and back


@settings(deadline=None)
@given(TEXTS)
def test_round_trip(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert TOKENIZER.decode_bytes(tokens) == text.encode()


@settings(deadline=None)
@given(st.text(st.characters()))
def test_text_with_surrogates_is_read_with_replacements(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_lone_surrogate_is_one_replacement_character() -> None:
    assert TOKENIZER.encode("a\ud800b") == TOKENIZER.encode("a\ufffdb")


def test_end_of_text_is_ordinary_text_unless_asked_for() -> None:
    text = "one<|endoftext|> two<|endoftext|>"
    ordinary = TOKENIZER.encode(text)
    assert EOT not in ordinary
    assert TOKENIZER.decode(ordinary) == text
    special = [*TOKENIZER.encode("one"), EOT, *TOKENIZER.encode(" two"), EOT]
    assert TOKENIZER.encode(text, allow_special=True) == special
    assert TOKENIZER.decode(special) == text


@cache
def uncut() -> Any:
    """tiktoken's own encoding."""
    assert TOKENIZER._bpe._encoding is not None
    return import_module("tiktoken").Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=TOKENIZER._bpe._encoding._mergeable_ranks, special_tokens={END_OF_TEXT: EOT}
    )


@pytest.mark.parametrize("length", [4095, 4096, 4097, 4098, 10000])
@pytest.mark.parametrize("space", [" ", "\n", "\u3000", " \n"])
@pytest.mark.parametrize("tail", ["", "x", " x", "\x1c", END_OF_TEXT])
def test_long_white_space_gives_the_ids_of_the_uncut_text(length: int, space: str, tail: str) -> None:
    text = "a" + (space * length + tail) * 2
    assert TOKENIZER.encode(text) == uncut().encode_ordinary(text)
    assert TOKENIZER.encode(text, allow_special=True) == uncut().encode(text, allowed_special="all")


def test_a_million_spaces_do_not_overflow_the_stack() -> None:
    text = " " * 1_500_000 + "x"  # in one piece, tiktoken panics
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


# ---------------------------------------------------------------- ids to text while they stream


@settings(deadline=None)
@given(IDS | BYTE_IDS)
def test_streamed_text_is_the_whole_text(tokens: list[int]) -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert "".join([*map(decoder.push, tokens), decoder.finish()]) == TOKENIZER.decode(tokens)


@settings(deadline=None)
@given(TEXTS)
def test_streamed_text_never_shows_half_a_character(text: str) -> None:
    decoder = StreamDecoder(TOKENIZER)
    shown = ""
    for byte in text.encode():
        shown += decoder.push(single_byte_id(byte))
        assert text.startswith(shown)
    assert (shown, decoder.finish()) == (text, "")


def test_cut_character_is_replaced_at_the_end_and_the_next_text_is_clean() -> None:
    decoder = StreamDecoder(TOKENIZER)
    first, *_ = "☃".encode()
    assert decoder.push(single_byte_id(first)) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(TOKENIZER.encode("a")[0]) == "a"
    assert decoder.finish() == ""


def single_byte_id(byte: int) -> int:
    return next(token for token in range(256) if TOKENIZER.decode_bytes([token]) == bytes([byte]))


# ---------------------------------------------------------------- errors


NOT_IDS: list[Any] = [-1, 50257, 1 << 70, 1.0, "1", None, True, np.float32(1)]


@pytest.mark.parametrize("wrong", NOT_IDS, ids=repr)
def test_wrong_id_is_refused_by_value_and_limit(wrong: Any) -> None:
    for refused in (TOKENIZER.decode, TOKENIZER.decode_bytes, lambda ids: StreamDecoder(TOKENIZER).push(ids[-1])):
        with pytest.raises(InputError) as caught:
            refused([0, wrong])
        assert repr(wrong) in str(caught.value)
        assert "50256" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_refused_id_leaves_the_stream_as_it_was() -> None:
    decoder = StreamDecoder(TOKENIZER)
    first, second = map(single_byte_id, "é".encode())
    assert decoder.push(first) == ""
    with pytest.raises(InputError):
        decoder.push(-1)
    assert decoder.push(second) == "é"


def test_a_decoder_checks_its_stops_as_generate_does() -> None:
    for strings, ids in (([""], ()), ([3], ()), (7, ()), ((), [1.5]), ((), [-1]), ((), [50257]), ((), "13")):
        with pytest.raises(InputError):
            StreamDecoder(TOKENIZER, stop_strings=strings, stop_token_ids=ids)  # type: ignore[arg-type]
    decoder = StreamDecoder(TOKENIZER, stop_strings="ayk", stop_token_ids=13)  # one of each
    assert "".join(map(decoder.push, TOKENIZER.encode("Speak, my lord."))) == "Speak, my lord"
    assert decoder.stopped


def test_numpy_integers_are_ids() -> None:
    assert TOKENIZER.decode(np.array([31373, 612], dtype=np.uint16)) == "hello there"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "longer", "empty"])
def test_damaged_vocabulary_is_refused_in_one_line(damage: str, tmp_path: Path, fresh_cache: None) -> None:
    content = Path(VOCABULARY_FILE).read_bytes()
    flipped = content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
    damaged = {"flipped": flipped, "truncated": content[:-1], "longer": content + b"\n", "empty": b""}
    path = tmp_path / "vocab.bpe"
    path.write_bytes(damaged[damage])
    assert_refused(path, "damaged")


def test_missing_vocabulary_is_refused_in_one_line(tmp_path: Path, fresh_cache: None) -> None:
    assert_refused(tmp_path / "vocab.bpe", "cannot read")


def assert_refused(path: Path, reason: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "VOCABULARY_FILE", str(path))
        with pytest.raises(PyGPTError) as caught:
            Tokenizer()
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- loading


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    """Make the next Tokenizer load its vocabulary again."""
    module._load.cache_clear()
    yield
    module._load.cache_clear()


def test_vocabulary_is_loaded_once_by_many_threads(fresh_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    read = module._read_checked
    together = threading.Barrier(8)

    def counted(path: str) -> bytes:
        loads.append(path)
        return read(path)

    def make(_: int) -> Tokenizer:
        together.wait()
        return Tokenizer()

    monkeypatch.setattr(module, "_read_checked", counted)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert loads == [VOCABULARY_FILE]
    assert {tuple(each.encode("hello there")) for each in made} == {(31373, 612)}


def test_importing_the_module_does_not_import_tiktoken() -> None:
    assert run_python("import sys, pygpt.tokenizer; print('tiktoken' in sys.modules)") == "False\n"


def test_sockets_are_never_made(tmp_path: Path) -> None:
    script = """
import sys
def forbid(event, args):
    if event.startswith(("socket.", "urllib.", "http.")):
        raise SystemExit(f"network: {event}")
sys.addaudithook(forbid)
from pygpt.tokenizer import Tokenizer
print(Tokenizer().encode("hello there"))
"""
    cache = tmp_path / "cache"  # tiktoken would keep downloads here
    assert run_python(script, TIKTOKEN_CACHE_DIR=str(cache)) == "[31373, 612]\n"
    assert not cache.exists()


def run_python(script: str, **environment: str) -> str:
    root = str(Path(module.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return execute([sys.executable, "-c", script], env=variables, check=True).stdout
