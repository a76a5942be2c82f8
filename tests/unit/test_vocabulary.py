"""Vocabularies other than GPT-2's: the same ids as Hugging Face's tokenizers, from every file, in every command."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoint import make
from running import assert_one_line_error, assert_refuses
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Peer

from pygpt import GPT2, InputError, SerialGPT2, StreamDecoder, Tokenizer
from pygpt.commands.batch import main as batch
from pygpt.commands.chat import main as chat
from pygpt.commands.complete import main as complete
from pygpt.commands.convert import main as convert
from pygpt.commands.eval import main as evaluate
from pygpt.commands.quantize import main as quantize
from pygpt.commands.train.main import main as train
from pygpt.formats.llmc import write_tokenizer
from pygpt.formats.open import open_model
from pygpt.formats.text import tokens_and_labels
from pygpt.formats.vocabulary import characters_of, load_tokenizer, tokenizer_files, write_vocabulary
from pygpt.tokenizer import tokenizer_of, vocabulary_of

TEXT = Path(__file__).with_name("test_tokenizer.py").read_text()
TEXT += "äöü ß 中文字 🙂🙃 e\u0301 123 4567 \r\n\t  x I'll we've DON'T\n" * 20

LLAMA = (  # the pattern of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [*"abcdesthLRxy'.,!0123 \t\n\r<|>", "  ", "   ", "<nl>", "tok", " tok ", "RR", "the", "'s", "'S", "é", "ß", "中", "🙂"]
PIECES += ["e\u0301", "\xa0", "\u2003", "\x85", "\x1c", "\u017f", "<|endoftext|>", "  L"]


def level(**options: bool) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


def several(*steps: Any) -> Any:
    return pre_tokenizers.Sequence([*steps])


def trained(split: Any, *, normalizer: Any = None, added: tuple[Any, ...] = ()) -> Peer:
    """A vocabulary of 500 ids, made from TEXT."""
    peer = Peer(models.BPE())
    peer.pre_tokenizer, peer.decoder = split, decoders.ByteLevel()
    if normalizer is not None:
        peer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    for token in added:
        peer.add_tokens([token])
    return peer


def changed(peer: Peer, change: Callable[[dict[str, Any]], object]) -> Peer:
    vocabulary = json.loads(peer.to_str())
    change(vocabulary["model"])
    return Peer.from_str(json.dumps(vocabulary))


def shuffle(model: dict[str, Any]) -> None:
    random.Random(3).shuffle(model["merges"])


ADDED = ("<nl>", AddedToken("tok", single_word=True), AddedToken("  L", lstrip=True), AddedToken("RR", rstrip=True), "  ")
PEERS: dict[str, Callable[[], Peer]] = {
    "GPT-2's kind": lambda: trained(level()),
    "prefix": lambda: trained(level(add_prefix_space=True)),
    "unsplit": lambda: trained(level(use_regex=False)),
    "Llama's": lambda: trained(several(pre_tokenizers.Split(Regex(LLAMA), "isolated"), level(use_regex=False))),
    "digits": lambda: trained(several(pre_tokenizers.Digits(individual_digits=True), level())),
    "gaps": lambda: trained(several(pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), level(add_prefix_space=True))),
    "NFC": lambda: trained(level(), normalizer=normalizers.NFC()),
    "added": lambda: trained(level(), added=ADDED),
    "added, prefix": lambda: trained(level(add_prefix_space=True), added=("<nl>", "xy")),
    "shuffled": lambda: changed(trained(level()), shuffle),
    "shuffled, unsplit": lambda: changed(trained(level(use_regex=False)), shuffle),
    "whole": lambda: changed(trained(level()), lambda model: model.update(ignore_merges=True)),
    "shuffled, whole": lambda: changed(changed(trained(level()), shuffle), lambda model: model.update(ignore_merges=True)),
}


@pytest.mark.parametrize("name", PEERS)
def test_the_ids_are_those_of_tokenizers(name: str) -> None:
    peer = PEERS[name]()
    mine = Tokenizer(json.loads(peer.to_str()))
    rng = random.Random(5)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 30))) for _ in range(600)]
    known = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    if "unsplit" not in name:  # Python merges one long piece slowly; the rarer splits see a part of Unicode
        few = 3000 if name == "GPT-2's kind" else 200_000
        texts += ["".join(f"a{chr(code)}b" for code in known[i : i + 3000]) for i in range(0, len(known), few)]
    for text in texts:
        ids = peer.encode(text, add_special_tokens=False).ids
        assert mine.encode(text, allow_special=True) == ids
        if name not in ("NFC", "prefix", "gaps", "added, prefix", "added"):  # these change the text
            assert mine.decode(ids) == text
    assert mine.eot == peer.token_to_id("<|endoftext|>")
    assert mine.vocabulary() == json.loads(peer.to_str())


def test_special_tokens_are_text_unless_allowed() -> None:
    mine = Tokenizer(json.loads(PEERS["added"]().to_str()))
    assert len(mine.encode("<|endoftext|>")) > 3
    assert mine.encode("<|endoftext|>", allow_special=True) == [mine.eot]
    assert mine.encode("a<nl>") == mine.encode("a<nl>", allow_special=True)  # not special: always one token


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_every_file_gives_the_same_tokenizer(folder: Path) -> None:
    peer = PEERS["GPT-2's kind"]()
    mine = Tokenizer(json.loads(peer.to_str()))
    for name, content in tokenizer_files(mine, 16).items():
        (folder / name).write_bytes(content)
    Path("alone").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(folder / "alone" / name)
    Path("alone/merges.txt").write_bytes(Path("alone/merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    contents = [mine.decode_bytes([i]) for i in range(mine.V)]
    write_tokenizer("tokenizer.bin", [*contents[1:], contents[0]], mine.V - 1)  # in an order of ranks: <|endoftext|> last
    make("m.bin", L=1, NH=1, C=32, V=mine.V, maxT=16)
    assert quantize(["--format", "f32", "--head", "f32", "m.bin", "m.gguf"]) == 0  # tokenizer.json lies in its folder
    Path("blob").hardlink_to("m.gguf")  # without its ending, as caches keep files
    same = [".", "tokenizer.json", "alone", "alone/vocab.json", "alone/merges.txt", "m.gguf", "blob"]
    for text in (TEXT, "".join(map(chr, range(0x20, 0x3000)))):
        ids = peer.encode(text, add_special_tokens=False).ids
        for path in same:
            assert load_tokenizer(path).encode(text, allow_special=True) == ids, path
        moved = load_tokenizer("tokenizer.bin")
        assert moved.encode(text, allow_special=True) == [i - 1 if i else moved.V - 1 for i in ids]
    with GPT2.load("m.gguf") as model:
        assert tokenizer_of(model.config).encode("the") == mine.encode("the")


def test_gpt2s_own_vocabulary_from_every_file(folder: Path) -> None:
    gpt2 = Tokenizer()
    for name, content in tokenizer_files(gpt2, 1024).items():
        (folder / name).write_bytes(content)
    write_tokenizer("gpt2_tokenizer.bin", [gpt2.decode_bytes([i]) for i in range(gpt2.V)], 50256)
    peer = Peer.from_file("tokenizer.json")
    for path in ("tokenizer.json", "vocab.json", "gpt2_tokenizer.bin"):
        found = load_tokenizer(path)
        assert (found.V, found.eot) == (50257, 50256)
        assert found.encode(TEXT) == gpt2.encode(TEXT)
        assert found.encode(TEXT, allow_special=True) == peer.encode(TEXT).ids
        assert found.encode("hello there<|endoftext|>", allow_special=True) == [31373, 612, 50256]
    assert json.loads(Path("tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer.json", b"", "is not JSON"),
        ("tokenizer.json", b"[]", "not a JSON object"),
        ("tokenizer.json", b"{}", "`model`"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": []}}', "'Unigram'"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}, "merges": []}}', "splits text by None"),
        ("vocab.json", b'{"a": 0}', "'merges.txt'"),
        ("tokenizer.bin", b"x" * 2000, "magic number"),
        ("absent.json", None, "No such file"),
    ],
)
def test_a_file_that_is_no_vocabulary(folder: Path, name: str, content: bytes | None, named: str) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(name)
    assert named in str(caught.value)
    assert str(caught.value).lstrip("'").startswith(name.removesuffix("vocab.json"))
    assert "\n" not in str(caught.value)


def other_folder(*, two: bool, **files: Any) -> None:
    """Write a vocabulary of 9 ids, in two files or in tokenizer.json, and the JSON files of transformers beside it."""
    vocabulary = vocabulary_of([*"fobarĠ", "fo", "<|endoftext|>", "<s>"], ["f o"], {"<|endoftext|>": True})
    files |= {"vocab": vocabulary["model"]["vocab"]} if two else {"tokenizer": vocabulary}
    for name, content in files.items():
        Path(f"{name}.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    if two:
        Path("merges.txt").write_text("#version: 0.2\nf o\n")


LISTED = {"9": {"content": "<|user|>", "special": True}, "10": {"content": "foo", "special": False, "lstrip": True}}
SETTINGS = {"added_tokens_decoder": {**LISTED, "8": {"content": "<s>", "special": False, "rstrip": True}}}
PLAIN, USER = {"<|user|>": 9, "foo": 10}, {"content": "<|user|>", "lstrip": False}


@pytest.mark.parametrize(
    ("two", "files", "ids", "special", "eot"),
    [
        (True, {"tokenizer_config": SETTINGS}, [6, 10, 9, 2, 3, 4, 8], {7, 9}, 7),
        (False, {"tokenizer_config": SETTINGS}, [6, 10, 9, 2, 3, 4, 8], {7, 9}, 7),
        (True, {"added_tokens": {"foo": 9}, "tokenizer_config": SETTINGS}, [6, 10, 9, 2, 3, 4, 8], {7, 9}, 7),
        (True, {"added_tokens": PLAIN}, [6, 5, 10, 9, 2, 3, 4, 8, 5], {7, 8}, 7),
        (True, {"added_tokens": PLAIN, "special_tokens_map": {"additional_special_tokens": [USER]}}, None, {7, 8, 9}, 7),
        (True, {"added_tokens": PLAIN, "special_tokens_map": {"eos_token": USER}}, None, {7, 8, 9}, 9),
        (False, {"added_tokens": PLAIN, "tokenizer_config": {"eos_token": "<s>"}}, None, {7, 8}, 8),
        (False, {"tokenizer_config": {"eos_token": "<|endoftext|>"}}, None, {7}, 7),
    ],
)
def test_the_settings_of_transformers_count(
    folder: Path, two: bool, files: dict[str, Any], ids: list[int] | None, special: set[int], eot: int
) -> None:
    """Also in a copy. The ids are those of transformers 4.57, which does not guess that <s> is special."""
    other_folder(two=two, **files)
    write_vocabulary("NAME.tokenizer.json", load_tokenizer(".").vocabulary())
    for mine in load_tokenizer("."), load_tokenizer("NAME.tokenizer.json"):
        assert ids is None or mine.encode("fo foo<|user|>bar<s> ", allow_special=True) == ids
        assert {token["id"] for token in mine.vocabulary()["added_tokens"] if token["special"]} == special
        assert [token["id"] for token in mine.vocabulary()["added_tokens"] if "eos" in token] == [eot] * (eot != 7)
        assert mine.eot == eot
        assert Peer.from_file("NAME.tokenizer.json").get_vocab_size() == mine.known  # tokenizers accepts the mark


@pytest.mark.parametrize("files", [{"added_tokens": PLAIN}, {"tokenizer_config": SETTINGS}])
def test_added_tokens_for_which_the_model_has_no_row_are_left_out(folder: Path, files: dict[str, Any]) -> None:
    other_folder(two=True, **files)
    assert load_tokenizer(".", V=10).known == 10  # <|user|>, but not foo
    assert load_tokenizer(".", V=9).known == 9
    write_vocabulary(
        "own.json", load_tokenizer(".").vocabulary()
    )  # as transformers writes a token for padding into tokenizer.json
    assert load_tokenizer("own.json", V=10).known == 10
    with pytest.raises(InputError, match="9 ids, and the model 7"):  # <s> is in the vocabulary itself
        load_tokenizer("own.json", V=7)


@pytest.mark.parametrize("two", [True, False])
def test_the_prefix_and_the_end_stay_with_a_converted_model(folder: Path, two: bool) -> None:
    other_folder(two=two, tokenizer_config=SETTINGS | {"add_prefix_space": True, "eos_token": "<|user|>"})
    make("m.bin", L=1, NH=1, C=32, V=11, maxT=8)
    assert convert(["m.bin", "hf/"]) == 0
    written = json.loads(Path("hf/tokenizer_config.json").read_text())
    assert (written["add_prefix_space"], written["eos_token"]) == (True, "<|user|>")
    assert json.loads(Path("hf/config.json").read_text())["eos_token_id"] == 9
    assert b'"eos"' not in Path("hf/tokenizer.json").read_bytes()  # transformers would print a warning
    for path in ".", "hf", "hf/vocab.json":
        assert load_tokenizer(path).encode("bar") == [5, 2, 3, 4]
        assert load_tokenizer(path).eot == 9


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        *[("tokenizer_config", text, r"tokenizer_config\.json") for text in (b"", b"[]", b'{"add_prefix_space": NaN}')],
        *[("tokenizer_config", b'{"eos_token": %b}' % end, "damaged") for end in (b"5", b"[]", b"{}", b'{"content": 5}')],
        *[("tokenizer_config", {"added_tokens_decoder": {"9": token}}, "damaged") for token in ("a", ["a"])],
        *[("tokenizer_config", {"added_tokens_decoder": {i: {"content": "new"}}}, "") for i in ("x", "-1", "9" * 5000)],
        ("tokenizer_config", {"added_tokens_decoder": [], "eos_token": "fo"}, "damaged"),
        ("special_tokens_map", b"{", r"special_tokens_map\.json is not JSON"),
        ("added_tokens", b"[]", r"added_tokens\.json is not a JSON object"),
    ],
)
def test_settings_of_transformers_that_cannot_be(folder: Path, name: str, content: Any, named: str) -> None:
    for two in True, False:
        other_folder(two=two, **{name: content})
        with pytest.raises(InputError, match=rf"^\./?.*{named}"):
            load_tokenizer(".")


def test_a_tokenizer_that_does_not_exist_is_refused_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("m.bin", L=1, NH=1, C=32, V=10, maxT=8)
    assert_refuses(complete, capsys, ["1", "2", "-m", "m.bin", "--tokenizer", "/nope"], "'/nope': no such file")


def damage(**changes: Any) -> dict[str, Any]:
    vocabulary = Tokenizer(characters_of(["ab"])).vocabulary()
    return vocabulary | {"model": vocabulary["model"] | changes.pop("model", {})} | changes


@pytest.mark.parametrize(
    ("vocabulary", "named"),
    [
        (damage(model={"vocab": {"a": -1}}), "not whole numbers from 0"),
        (damage(model={"vocab": {"a": 1 << 40}}), "not whole numbers from 0"),
        (damage(model={"vocab": {}}), "damaged"),
        (damage(model={"vocab": ["a"]}), "damaged"),
        (damage(model={"merges": [["a", "b"]]}), "damaged (KeyError"),
        (damage(model={"merges": ["ab"]}), "damaged"),
        (damage(normalizer={"type": "Lowercase"}), "changes text by 'Lowercase'"),
        (damage(pre_tokenizer={"type": "Metaspace"}), "splits text by 'Metaspace'"),
        (damage(pre_tokenizer={"type": "Split"}), "damaged"),
        (damage(added_tokens=[{"id": 5}]), "damaged"),
    ],
)
def test_a_vocabulary_that_cannot_be(vocabulary: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        Tokenizer(vocabulary)
    assert named in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Ids beyond the vocabulary


@pytest.mark.parametrize("V", [50258, 50304])
def test_ids_beyond_gpt2s_vocabulary_print_a_placeholder(folder: Path, capsys: pytest.CaptureFixture[str], V: int) -> None:
    """A model that always chooses its last id is chatted with, stopped, and evaluated; --text-only never chooses the id."""
    make("m.bin", L=1, NH=1, C=32, V=V, maxT=16)
    content = bytearray(Path("m.bin").read_bytes())
    values = np.frombuffer(content, "<f4", offset=1024)  # the last rows of the head grow with the last norm's bias
    wte = values[: V * 32].reshape(V, 32)
    wte[V - 1] = 10
    values[-32:] = 1
    Path("m.bin").write_bytes(content)
    with GPT2.load("m.bin") as model, SerialGPT2.load("m.bin", text_only=True) as serial:
        tokenizer = tokenizer_of(model.config)
        assert tokenizer.decode([31373, V - 1]) == f"hello<|{V - 1}|>"
        decoder = StreamDecoder(tokenizer)
        assert decoder.push(V - 1) + decoder.finish() == f"<|{V - 1}|>"
        assert list(model.generate([31373], max_new_tokens=4, sampler="greedy", stop_strings=f"|{V - 1}")) == [V - 1]
        assert serial.config.V == 50257
        with pytest.raises(InputError, match=f"token id is {V}"):
            tokenizer.decode([V])
        for weights in (None, "q8_0", "q4_0"):
            with GPT2.load("m.bin", weights=weights, text_only=True) as text:
                with GPT2.load("m.bin", weights=weights) as whole:
                    assert np.array_equal(text.logits([1, 2]), whole.logits([1, 2])[:, :50257])
                assert max(text.generate([31373], max_new_tokens=4)) < 50257
    assert quantize(["m.bin", "q.safetensors"]) == 0
    with GPT2.load("q.safetensors", text_only=True) as text, GPT2.load("q.safetensors") as whole:
        assert np.array_equal(text.logits([1, 2]), whole.logits([1, 2])[:, :50257])
    assert chat(["-m", "m.bin", "-n", "3", "--sampler", "greedy", "hello"]) == 0
    assert capsys.readouterr().out == f"<|{V - 1}|>" * 3 + "\n"
    assert chat(["-m", "m.bin", "-n", "3", "--sampler", "greedy", "--text-only", "hello"]) == 0
    assert "<|" not in capsys.readouterr().out
    Path("t.txt").write_text("hello there")
    assert evaluate(["perplexity", "-m", "m.bin", "t.txt"]) == 0
    assert evaluate(["next", "-m", "m.bin", "-k", "1", "hello"]) == 0
    assert f"<|{V - 1}|>" in capsys.readouterr().out
    assert train(["--init", "m.bin", "--data", "t.txt", "-B", "1", "-T", "1", "--steps", "1", "--out", "new"]) == 0


def test_a_model_of_unknown_vocabulary_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("m.bin", L=1, NH=1, C=32, V=70, maxT=16)
    Path("t.txt").write_text("hello there")
    for run, arguments in (
        (chat, ["-m", "m.bin", "hello"]),
        (evaluate, ["perplexity", "-m", "m.bin", "t.txt"]),
        (train, ["--init", "m.bin", "--data", "t.txt", "-T", "1"]),
    ):
        assert run(arguments) == 2
        assert_one_line_error(capsys.readouterr().err, "70 ids ... 50257", "--tokenizer")
    write_vocabulary("other.json", characters_of(["helo thr"]))
    assert evaluate(["perplexity", "-m", "m.bin", "--tokenizer", "other.json", "t.txt"]) == 0
    assert chat(["-m", "m.bin", "--tokenizer", "other.json", "-n", "2", "hello"]) == 0
    assert chat(["-m", "m.bin", "--tokenizer", "other.json", "Hello"]) == 2
    assert "'H'" in capsys.readouterr().err
    write_vocabulary("large.json", json.loads(PEERS["GPT-2's kind"]().to_str()))
    assert chat(["-m", "m.bin", "--tokenizer", "large.json", "hello"]) == 2
    assert_one_line_error(capsys.readouterr().err, "large.json: ... 500 ids ... 70")


# ---------------------------------------------------------------------------------------------------------------------
# A vocabulary of one's own

RUN = ["--data", "play.txt", "--shape", "L=1,NH=1,C=32,maxT=16", "-B", "2", "-T", "8", "--steps", "3", "--sample-every", "3"]


@pytest.fixture
def play(folder: Path) -> str:
    text = "ROMEO:\nÉtude, é 中 & all!\n\nJULIET:\nNo.\n" * 40
    Path("play.txt").write_text(text, encoding="utf-8")
    return text


def test_characters(play: str) -> None:
    mine = Tokenizer(characters_of([play[:50], play[50:]]))
    plain = sorted({char for char in play if ord(char) < 128})
    assert mine.encode("".join(plain)) == [*range(len(plain))]
    ids = mine.encode(play)
    assert len(ids) == len(play)
    assert mine.decode(ids) == play
    peer = Peer.from_str(json.dumps(mine.vocabulary()))
    assert peer.encode(play).ids == ids
    assert peer.decode(ids) == play
    with pytest.raises(InputError, match="has no 'Q'"):
        mine.encode("Quite")
    with pytest.raises(InputError, match="has no '\ufffd'"):  # '?' is there, which str.encode() puts in its place
        Tokenizer(characters_of(["?a"])).encode("a\ud800")
    assert Tokenizer(characters_of(["\n !aZ"])).V == 5  # as many ids as characters, if each is one byte


@pytest.mark.parametrize("options", [["--chars"], ["--train-tokenizer", "300"], ["--tokenizer", "own.json"]])
@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_from_text_to_chat_in_two_commands(
    play: str, capsys: pytest.CaptureFixture[str], options: list[str], ending: str
) -> None:
    write_vocabulary("own.json", characters_of([play]))
    assert train([*RUN, *options, "--out", f"run{ending}"]) == 0
    model = f"run{ending or '.bin'}"
    assert chat(["-m", model, "-n", "3", "ROMEO"]) == 0
    with open_model(model) as opened:
        tokenizer = tokenizer_of(opened.config)
        assert opened.config.V == tokenizer.V == tokenizer.known
        assert tokenizer.decode(tokenizer.encode(play)) == play
    assert evaluate(["perplexity", "-m", model, "play.txt", "-o", "json"]) == 0
    assert train(["--resume", "run.state", "--steps", "4"]) == 0
    assert train(["--data", "play.txt", "--init", model, "-B", "1", "-T", "8", "--steps", "1", "--out", "more"]) == 0
    assert Path("more.tokenizer.json").read_bytes() == Path("run.tokenizer.json").read_bytes()
    Path("other").mkdir()
    shutil.copy("run.state", "other/run.state")  # without the vocabulary
    assert train(["--resume", "other/run.state", "--tokenizer", "run.tokenizer.json", "--steps", "5"]) == 0
    assert Path("other/run.tokenizer.json").read_bytes() == Path("run.tokenizer.json").read_bytes()
    assert train([*RUN, *options, "--out", f"run{ending}"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert([model, "hf/"]) == 0
    peer = Peer.from_file("hf/tokenizer.json")
    assert peer.encode(play).ids == tokenizer.encode(play)
    write_vocabulary("q.tokenizer.json", characters_of(["another model's"]))
    assert quantize([model, "q.gguf"]) == 0  # GGUF cannot describe every vocabulary, and an old file would count
    with open_model("q.gguf") as opened:
        again = pickle.loads(pickle.dumps(opened.config))
        assert again.tokenizer().encode(play) == tokenizer_of(opened.config).encode(play) == tokenizer.encode(play)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--chars", "--train-tokenizer", "300"], "--train-tokenizer and --chars"),
        (["--train-tokenizer", "256"], "257"),
        (["--tokenizer", "absent.json"], "'absent.json': cannot open"),
        (["--chars", "--data", "ids.bin"], "--chars ... ids.bin"),
        (["--chars", "--shape", "L=1,NH=1,C=32,maxT=16,V=7"], "the tokenizer has"),
    ],
)
def test_bad_vocabularies_for_training(play: str, capsys: pytest.CaptureFixture[str], options: list[str], named: str) -> None:
    Path("ids.bin").write_bytes(struct.pack("<256i", 20240520, 1, 20, *[0] * 253) + bytes(40))
    assert_refuses(train, capsys, [*RUN, *options], named)


@pytest.mark.parametrize("rows", [["text"], ["prompt"], ["text", "prompt"]])
def test_rows_are_documents_in_every_vocabulary(play: str, rows: list[str]) -> None:
    """Before each row is the id that ends a text, if the vocabulary has one. Prompts are masked without it, too."""
    given = [dict.fromkeys(["prompt", "completion"] if row == "prompt" else [row], "ROMEO") for row in rows]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, given)))
    for tokenizer in Tokenizer(characters_of([play])), Tokenizer(vocabulary_of([*"ROME", "</s>"], [], {"</s>": True})):
        mark, text = [] if tokenizer.eot is None else [tokenizer.eot], tokenizer.encode("ROMEO")
        tokens, labels = tokens_and_labels("rows.jsonl", tokenizer=tokenizer)
        parts = [(mark + text, mark + [-100] * 5) if "prompt" in row else (mark, mark) for row in given]
        assert tokens.tolist() == [i for ids, _ in parts for i in ids + text]
        assert (labels is None) == ("prompt" not in given[-1])
        assert labels is None or labels.tolist() == [i for _, ids in parts for i in ids + text]


def test_the_end_of_a_text_is_that_of_the_vocabulary(play: str, capsys: pytest.CaptureFixture[str]) -> None:
    """stop_at_eot ends at the model's own id in every program; a model that always chooses it shows this."""
    write_vocabulary("m.tokenizer.json", vocabulary_of([*"ROME", "<eos>"], [], {"<eos>": True}))
    make("m.bin", L=1, NH=1, C=32, V=5, maxT=8)
    content = bytearray(Path("m.bin").read_bytes())
    values = np.frombuffer(content, "<f4", offset=1024)
    values[4 * 32 : 5 * 32], values[-32:] = 10, 1
    Path("m.bin").write_bytes(content)
    for kind in GPT2, SerialGPT2:
        with kind.load("m.bin") as model:
            assert list(model.generate([1], max_new_tokens=5, sampler="greedy")) == [4] * 5
            assert list(model.generate([1], max_new_tokens=5, sampler="greedy", stop_at_eot=True)) == [4]
            assert list(model.generate([1], max_new_tokens=2, sampler="greedy", stop_at_eot=False)) == [4] * 2
            with pytest.raises(InputError, match="stop_at_eot is 1"):
                model.generate([1], stop_at_eot=1)  # type: ignore[arg-type]
    assert chat(["-m", "m.bin", "-n", "3", "--sampler", "greedy", "ROM"]) == 0
    assert chat(["-m", "m.bin", "-n", "3", "--sampler", "greedy", "--no-stop-at-eot", "ROM"]) == 0
    assert capsys.readouterr().out == "\n<eos><eos><eos>\n"
    Path("in.jsonl").write_text('{"prompt": "ROM", "max_new_tokens": 4}\n{"prompt": "E", "stop_at_eot": false}\n')
    assert batch(["in.jsonl", "-o", "out.jsonl", "-m", "m.bin", "--sampler", "greedy", "--stop-at-eot"]) == 0
    assert [json.loads(line)["tokens"] for line in Path("out.jsonl").read_text().splitlines()] == [[4], [4] * 7]
    write_vocabulary("none.json", vocabulary_of([*"ROME"], [], {}))
    with (
        GPT2.load("m.bin", tokenizer="none.json") as model,
        pytest.raises(InputError, match=r"stop_at_eot .*vocabulary.*give an id"),
    ):
        model.generate([1], stop_at_eot=True)
    Path("m.tokenizer.json").unlink()
    with GPT2.load("m.bin") as model, pytest.raises(InputError, match=r"5 ids.*tokenizer"):
        model.generate([1], stop_at_eot=True)
