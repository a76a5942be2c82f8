"""The vocabulary of a model in any of its files, as the contents of a tokenizer.json: find, read, make and write it.

A model's vocabulary lies beside the model file as NAME.tokenizer.json, or inside a GGUF or safetensors file. The folder of a
Hugging Face model has tokenizer.json, or vocab.json with merges.txt. llm.c's tokenizer.bin has the tokens without their merges;
the merge of a token is the pair that its bytes become by the merges before it.

Refuses a vocabulary that is not byte-level BPE. Source: Hugging Face's tokenizers, tokenizer/serialization.rs."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

from ..errors import DataError, InputError, is_whole, shown
from ..tokenizer import END_OF_TEXT, FLAGS, NEVER, Tokenizer, merged, spelled, vocabulary_of
from .files import GGUF_MAGIC, atomic_file, begins_with, small_file
from .safetensors import parse_object

FILE, VOCAB, MERGES, SETTINGS = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
LIMIT = 1 << 27  # bytes of a file: far more than any vocabulary needs
EACH_CHARACTER = r"[\s\S]"


def load_tokenizer(path: str | os.PathLike[str], *, V: int | None = None) -> Tokenizer:
    """Return the tokenizer of a folder or file: tokenizer.json, vocab.json or merges.txt, llm.c's .bin, .gguf, .safetensors.

    V: the model's ids; those beyond the vocabulary decode to placeholders. Added tokens beyond the model's ids, such as one for
    padding, are left out. Raises InputError for any other file, and for a vocabulary of more than V ids."""
    path = os.fspath(path)
    try:
        found = read_vocabulary(path, V)
        added = [token for token in found.get("added_tokens") or () if V is None or not is_whole(token["id"], V, 1 << 62)]
        return Tokenizer(found | {"added_tokens": added}, V=V)
    except InputError as error:
        raise (error if str(error).startswith((path, repr(path))) else InputError(f"{path}: {error}")) from None
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the vocabulary or its {SETTINGS} is damaged ({shown(error)}): fetch them again") from error


def read_vocabulary(path: str, V: int | None) -> dict[str, Any]:
    """Read a vocabulary of any form, for a model of V ids. Raises InputError."""
    if os.path.isdir(path):
        path = next((name for name in (os.path.join(path, FILE), os.path.join(path, VOCAB)) if os.path.isfile(name)), path)
    if path.endswith(".gguf") or begins_with(path, GGUF_MAGIC):
        from .gguf import GGUFFile

        with GGUFFile(path) as model:
            return model.vocabulary()
    if path.endswith(".safetensors"):
        from .safetensors import SafetensorsFile

        with SafetensorsFile(path) as file:
            return parse_object(file.metadata.get(FILE, "").encode(), path, InputError)
    if path.endswith(".bin"):
        from .llmc import read_tokenizer

        return _of_tokens(*read_tokenizer(path))
    name = os.path.basename(path)
    found = _of_two_files(path) if name.endswith((VOCAB, MERGES)) else parse_object(_read(path), path, InputError)
    if not isinstance(found.get("model"), dict):
        raise InputError(f"{path}: not a tokenizer.json: it has no object `model`")
    return _with_settings(found, V, *os.path.split(path)) if name in (FILE, VOCAB, MERGES) else found


def _with_settings(found: dict[str, Any], V: int | None, folder: str, name: str) -> dict[str, Any]:
    """Apply what transformers keeps beside a vocabulary: added tokens, the token that ends a text, and add_prefix_space.

    Source: transformers 4.57, tokenization_utils_base.py, _from_pretrained()."""
    paths = [os.path.join(folder, each) for each in (SETTINGS, "special_tokens_map.json", "added_tokens.json")]
    settings, special, plain = [parse_object(_read(path), path, InputError) if os.path.exists(path) else {} for path in paths]
    named = [(special | settings).get("eos_token"), *special.values(), *(special.get("additional_special_tokens") or [])]
    end, *texts = [token["content"] if isinstance(token, dict) else token for token in named]
    if not isinstance(end, str | None):
        raise TypeError(f"eos_token is {shown(end)}")
    if (listed := settings.get("added_tokens_decoder")) is None:
        listed = {i: {"content": text, "special": text in (end, *texts)} for text, i in plain.items() if name != FILE}
    added = {token["content"]: token for token in found.get("added_tokens") or []}
    if end in found["model"]["vocab"] and end not in added:
        listed[found["model"]["vocab"][end]] = {"content": end, "special": True}
    for i, token in listed.items():
        new = {"id": int(i) if re.fullmatch(r"[0-9]{1,7}", str(i)) else i, "content": token["content"], **FLAGS}
        if V is None or token["content"] in added or new["id"] < V:  # else the model never got a row for it
            added[token["content"]] = new | added.get(token["content"], {"special": False}) | token
    for token in added.values() if end else ():
        token.pop("eos", None)
        token.update({"eos": True} if token["content"] == end != END_OF_TEXT else {})
    rule, prefix = found.get("pre_tokenizer"), settings.get("add_prefix_space")
    if rule and rule["type"] == "ByteLevel" and isinstance(prefix, bool):
        rule["add_prefix_space"] = prefix
    return found | {"added_tokens": [*added.values()]}


def _of_two_files(path: str) -> dict[str, Any]:
    """Read vocab.json and merges.txt. Either may be named; NAME-vocab.json belongs to NAME-merges.txt."""
    stem = path.removesuffix(VOCAB).removesuffix(MERGES)
    vocab = parse_object(_read(stem + VOCAB), stem + VOCAB, InputError)
    lines = _read(stem + MERGES).decode("utf-8", "replace").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    for merge in merges:
        if merge.count(" ") != 1:
            raise InputError(f"{stem}{MERGES}: {merge[:40]!r} is not a merge: two tokens with a space between them")
    tokens = {i: token for token, i in vocab.items() if type(i) is int}
    if sorted(tokens) != [*range(len(vocab))]:
        raise InputError(f"{stem}{VOCAB}: its ids are not the whole numbers from 0 to {len(vocab) - 1}")
    merged = {merge.replace(" ", "") for merge in merges}
    special = {token: True for token in vocab if re.fullmatch(r"<\|?\w+\|?>", token) and token not in merged}
    return vocabulary_of([tokens[i] for i in range(len(vocab))], merges, special)


def _of_tokens(contents: list[bytes], eot: int) -> dict[str, Any]:
    """Find the merges of tokens in the order of their ids; `eot` is special."""
    ranks = {content: i for i, content in enumerate(contents) if i != eot}
    merges = []
    for content, rank in ranks.items():
        if len(content) > 1:
            parts = merged(content, lambda left, right: ranks.get(left + right, NEVER), limit=rank, fewest=2)
            if len(parts) != 2 or not ranks.keys() >= {*parts}:
                raise InputError(f"token {rank}, {content[:40]!r}, is not a merge of two tokens before it")
            merges.append([spelled(part) for part in parts])
    tokens = [END_OF_TEXT if i == eot else spelled(content) for i, content in enumerate(contents)]
    return vocabulary_of(tokens, merges, {END_OF_TEXT: True})


def _read(path: str) -> bytes:
    return small_file(path, "vocabulary", InputError, LIMIT)


def characters_of(text: Iterable[str]) -> dict[str, Any]:
    """Return a vocabulary whose tokens are the characters of a text, in ascending order, without merges between characters.

    A character of several bytes is merged from them, so these bytes and the parts of the character are tokens too."""
    found = sorted({char for piece in text for char in piece})
    if not found:
        raise DataError("the text is empty: it has no characters for a vocabulary")
    encoded = [char.encode() for char in found]
    parts = {content[:n] for content in encoded for n in range(1, len(content))}
    rest = {content[i : i + 1] for content in encoded for i in range(len(content))} | parts
    contents = [content for content in encoded if len(content) == 1] + sorted(rest - {*encoded})
    contents += [content for content in encoded if len(content) > 1]
    merges = [[spelled(c[:-1]), spelled(c[-1:])] for c in sorted(parts | {*encoded}, key=len) if len(c) > 1]
    return vocabulary_of([spelled(content) for content in contents], merges, {}, pattern=EACH_CHARACTER)


def trained_on(text: Iterable[str], size: int) -> dict[str, Any]:
    """Return a vocabulary of `size` ids, `<|endoftext|>` included, made from a text by Hugging Face's tokenizers.

    Raises InputError for a size below 257, and ImportError without the package."""
    if size < 257:
        raise InputError(f"a vocabulary of {size} ids was asked for: byte-level BPE needs at least 257, one for each byte")
    try:
        from tokenizers import Tokenizer as Trainee
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        install = "python -m pip install 'pygpt[tokenizers]'"
        raise ImportError(f"a new vocabulary needs tokenizers, which cannot be imported ({error}): {install}") from error
    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainee.decoder = decoders.ByteLevel()
    given: dict[str, Any] = {"special_tokens": [END_OF_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainee.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, show_progress=False, **given))
    return parse_object(trainee.to_str().encode(), FILE)


def write_vocabulary(path: str, vocabulary: dict[str, Any]) -> None:
    """Write a tokenizer.json atomically. Raises OSError."""
    with atomic_file(path) as file:
        file.write(json.dumps(vocabulary, indent=1).encode())


def tokenizer_files(tokenizer: Tokenizer, maxT: int) -> dict[str, bytes]:
    """Return the files of a tokenizer in a Hugging Face folder, by name."""
    found, end = tokenizer.vocabulary(), tokenizer.eot
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.decode([end]))
    kind = "GPT2Tokenizer" if tokenizer.splits_before_space and END_OF_TEXT in special.values() else "PreTrainedTokenizerFast"
    prefix = bool((found.get("pre_tokenizer") or {}).get("add_prefix_space"))
    settings = {"add_prefix_space": prefix, **special, "model_max_length": maxT, "tokenizer_class": kind}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    added = [{key: token[key] for key in token if key != "eos"} for token in found.get("added_tokens") or []]
    vocab = found["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    objects = {FILE: found | {"added_tokens": added}, SETTINGS: settings, "special_tokens_map.json": special, VOCAB: vocab}
    files = {name: json.dumps(value, indent=1).encode() for name, value in objects.items()}
    return files | {MERGES: "\n".join(["#version: 0.2", *merges, ""]).encode("utf-8", "replace")}
