"""Byte-level byte-pair encoding: encode text as ids, decode ids to text, also while they stream.

tiktoken merges any two neighbours that make a token. A vocabulary allows only its listed merges. Both give the same ids if
every token has one merge, and if the listed merges turn its own text into this token. Until a part of a text joins its
neighbours, its merges do not depend on them, so other pairs cannot occur. For other vocabularies, this module merges in Python.
The first Tokenizer imports tiktoken; this module does not.

Sources: GPT-2's encoder.py (order of the bytes, split pattern); tiktoken_ext/openai_public.py (`gpt2`); Hugging Face's
tokenizers, models/bpe, pre_tokenizers/byte_level.rs and added_vocabulary.rs."""

import codecs
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from unicodedata import normalize

from ._signals import holding
from .config import Config
from .errors import TYPE_CHECKING, InputError, PyGPTError, check_whole, several, shown, stop_bytes, whole

if TYPE_CHECKING:
    from typing import Any, SupportsIndex

    import tiktoken

VOCABULARY_FILE = os.path.join(os.path.dirname(__file__), "data", "vocab.bpe")
VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # added tokens that end a text if none is marked: the first one
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)  # of an added token
GPT2_V = 50257
NEVER = 1 << 62  # the rank of a pair that is not merged

# The pattern that splits text before bytes are merged, from tiktoken: it finds the pieces of GPT-2's own pattern faster.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
WHOLE = r"[\s\S]+"  # the pattern of a vocabulary that does not split

# All but the last character of a long run of white space before other text. `\s` is written out, because Python also counts
# four control characters as white space. Unicode, and so the pattern above, does not.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_SPACE = re.compile(rf"(?<![{_SPACE}])[{_SPACE}]{{4096,}}(?=[{_SPACE}][^{_SPACE}])")
_ONE_SPACE = re.compile(rf"[{_SPACE}]")
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]"

# The 256 bytes in the order of their ids, first those that are printable in Latin-1, and their spelling in vocab.bpe.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = _PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE]
_SYMBOLS = [*map(chr, _PRINTABLE), *(chr(0x100 + i) for i in range(256 - len(_PRINTABLE)))]
_BYTE_OF_SYMBOL = dict(zip(_SYMBOLS, _BYTES, strict=True))
_SYMBOL_OF_BYTE = [symbol for _, symbol in sorted(zip(_BYTES, _SYMBOLS, strict=True))]

_loading = threading.Lock()


class Tokenizer:
    """A byte-pair encoding, by default GPT-2's with 50,257 ids. GPT-2's is loaded once in a process.

    vocabulary: the contents of a tokenizer.json, or None for GPT-2's. V: the model's ids; ids that the vocabulary does not have
    decode to a placeholder such as <|50300|>. Any number of threads may use one Tokenizer. Raises PyGPTError if the installed
    vocabulary is missing or damaged, and InputError for a vocabulary that is not byte-level BPE, or has more than V ids."""

    def __init__(self, vocabulary: "dict[str, Any] | None" = None, *, V: int | None = None) -> None:
        self._bpe = holding(_loading, lambda: _load() if vocabulary is None else _Encoding(vocabulary))
        self._bytes = self._bpe.bytes  # shared by all Tokenizers of the vocabulary
        if V is not None and self.known > V:
            raise InputError(f"the tokenizer has {self.known} ids, and the model {V}: give the model's own tokenizer")
        if V is not None and self.known < V:
            self._bytes = self._bytes + [f"<|{token}|>".encode() for token in range(self.known, V)]

    @property
    def V(self) -> int:
        """The number of ids, `<|endoftext|>` and placeholders included."""
        return len(self._bytes)

    @property
    def known(self) -> int:
        """The number of ids up to the last one of the vocabulary: those after it are placeholders."""
        return len(self._bpe.bytes)

    @property
    def eot(self) -> int | None:
        """The id that ends a text: as the model's files say, else of `<|endoftext|>` or a similar token; None without one."""
        return self._bpe.eot

    @property
    def splits_before_space(self) -> bool:
        """Whether every token ends before white space that follows other text, as GPT-2's do."""
        return self._bpe.pattern == PATTERN and not self._bpe.cuts and not self._bpe.prefix_space and not self._bpe.normalizers

    def vocabulary(self) -> "dict[str, Any]":
        """Return the vocabulary in the form of tokenizer.json."""
        return self._bpe.vocabulary()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode any text as ids. A lone surrogate, which UTF-8 cannot represent, becomes U+FFFD.

        `<|endoftext|>` and other special tokens in the text are ordinary text, because users may type anything. With
        allow_special they become their ids. Raises InputError for a character that the vocabulary cannot represent."""
        ids, end = [], 0
        for start, stop, token in self._bpe.added_in(text, special=allow_special):
            ids += self._bpe.encode(text[end:start])
            ids.append(token)
            end = stop
        return ids + self._bpe.encode(text[end:])

    def decode(self, ids: "Iterable[SupportsIndex]") -> str:
        """Decode ids to text. Bytes that are not UTF-8, such as half a character at the end, become U+FFFD.

        Raises InputError for an id outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: "Iterable[SupportsIndex]") -> bytes:
        """Decode ids to their exact bytes. Raises InputError for an id outside the vocabulary."""
        return b"".join([self._bytes[self._checked(token)] for token in ids])

    def _checked(self, token: "SupportsIndex") -> int:
        """Return an id as an int. Accepts NumPy's integers; raises InputError for an id outside the vocabulary or a bool."""
        number = whole(token)
        if number is None or not 0 <= number < self.V:
            raise InputError(f"token id is {shown(token)}: it must be a whole number from 0 to {self.V - 1}")
        return number


def tokenizer_of(config: Config) -> Tokenizer:
    """Return the tokenizer of a model: the one that lies beside it or inside it, else GPT-2's.

    Raises InputError if there is none and the model has fewer ids than GPT-2's vocabulary."""
    if config.tokenizer is not None:
        own: Tokenizer = config.tokenizer()
        return own
    if config.V < GPT2_V:
        way = "no tokenizer lies beside it: give its tokenizer.json (--tokenizer), or use token ids"
        raise InputError(f"this model has {config.V} ids, which are not GPT-2's vocabulary of {GPT2_V}, and {way}")
    return _gpt2(config.V)


def end_of_text(config: Config) -> int | None:
    """Return the id that ends a text in the vocabulary of a model, or None if it has none. Raises tokenizer_of()'s errors."""
    known = config.tokenizer is None and config.V >= GPT2_V
    return GPT2_V - 1 if known else tokenizer_of(config).eot  # without loading GPT-2's vocabulary


@cache
def _gpt2(V: int) -> Tokenizer:
    return Tokenizer(V=V)


class _Encoding:
    """A vocabulary that is ready to encode. `bytes`: of each id, a placeholder for one that is not there."""

    def __init__(self, vocabulary: "dict[str, Any]") -> None:
        try:
            self._read(vocabulary)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            what = f"the vocabulary is damaged ({type(error).__name__} {shown(str(error))})"
            raise InputError(f"{what}: fetch it again; load_tokenizer(path) opens a file") from error

    def _read(self, vocabulary: "dict[str, Any]") -> None:
        self._given = vocabulary
        model = vocabulary["model"]
        if model.get("type", "BPE") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise InputError(f"the tokenizer is of type {shown(model.get('type'))}: only byte-level BPE is supported")
        self.cuts, self.pattern, self.prefix_space = _patterns(vocabulary.get("pre_tokenizer"))
        self.normalizers = _normalizers(vocabulary.get("normalizer"))
        vocab: dict[str, int] = model["vocab"]
        # As in tokenizers, the id in `vocab` counts.
        added = [{**each, "id": vocab.get(each["content"], each["id"])} for each in vocabulary.get("added_tokens") or []]
        most = max([*vocab.values(), *(token["id"] for token in added)])
        if not all(type(i) is int and 0 <= i <= 1 << 20 for i in (*vocab.values(), *(token["id"] for token in added))):
            raise InputError("the vocabulary has ids that are not whole numbers from 0 to 1048576")
        self.bytes = [f"<|{token}|>".encode() for token in range(most + 1)]
        for spelled, i in vocab.items():
            self.bytes[i] = _unspelled(spelled)
        for each in added:
            self.bytes[each["id"]] = each["content"].encode()
        self._rules = {token["content"]: token for token in sorted(added, key=lambda token: -len(token["content"]))}
        ends = [*(token["content"] for token in added if token.get("eos")), *ENDS]
        self.eot = next((self._rules[end]["id"] for end in ends if end in self._rules), None)
        self._unknown = vocab[model["unk_token"]] if model.get("unk_token") in vocab else None
        self._fuse = bool(model.get("fuse_unk"))
        merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        self._build(vocab, merges, whole=bool(model.get("ignore_merges")))

    def _build(self, vocab: dict[str, int], merges: "list[tuple[str, ...]]", *, whole: bool = False) -> None:
        """Make tiktoken's encoding of the bytes and the merges in order. whole: a piece that is a token stays whole."""
        self._ids = [vocab.get(symbol) for symbol in _SYMBOL_OF_BYTE]  # by rank; None for a byte that is not there
        ranks = {bytes([byte]): byte for byte in range(256)}
        self._pairs: dict[tuple[bytes, bytes], int] = {}
        for left, right in merges:
            self._pairs.setdefault((_unspelled(left), _unspelled(right)), len(self._ids))
            ranks.setdefault(_unspelled(left + right), len(self._ids))
            self._ids.append(vocab[left + right])
        self._id_of = {_unspelled(token): i for token, i in vocab.items()}
        self._whole = whole
        gpt2 = spelled_vocabulary()[1] if len(merges) == GPT2_V - 257 else []  # reading it takes time
        known = not whole and [left + " " + right for left, right in merges] == gpt2
        sound = len(ranks) == len(self._ids) and (known or all(len(self._merged(token)) == 1 for token in ranks))
        sound = sound and (not whole or self._id_of.keys() <= ranks.keys())
        self._encoding = _tiktoken("vocabulary", self.pattern, ranks) if sound else None
        self._plain = self._ids == [*range(len(self._ids))]

    def _merged(self, piece: bytes) -> list[bytes]:
        return merged(piece, lambda left, right: self._pairs.get((left, right), NEVER))

    def vocabulary(self) -> "dict[str, Any]":
        """Return the contents of a tokenizer.json."""
        return self._given

    def added_in(self, text: str, *, special: bool) -> "Iterator[tuple[int, int, int]]":
        """Yield (start, stop, id) of the added tokens in a text: of several that begin at one place, the longest."""
        wanted = tuple(content for content, rule in self._rules.items() if content and (special or not rule.get("special")))
        end = 0
        for match in _any_of(wanted).finditer(text) if wanted else ():
            rule, (start, stop) = self._rules[match[0]], match.span()
            around = text[max(start - 1, 0) : start] + text[stop : stop + 1]
            if rule.get("single_word") and _split(_WORD, around):
                continue
            while rule.get("lstrip") and start > end and _ONE_SPACE.match(text, start - 1):
                start -= 1
            while rule.get("rstrip") and _ONE_SPACE.match(text, stop):
                stop += 1
            yield start, stop, rule["id"]
            end = stop

    def encode(self, text: str) -> list[int]:
        """Encode text without added tokens."""
        for form in self.normalizers:
            text = normalize(form, text)
        if not text:
            return []
        pieces = [text]
        for pattern in self.cuts:
            pieces = [part for piece in pieces for part in _split(pattern, piece)]
        ids: list[int] = []
        for piece in pieces:
            if self.prefix_space and not piece.startswith(" "):
                piece = " " + piece
            ids += self._encode_piece(piece)
        return ids

    def _encode_piece(self, text: str) -> list[int]:
        """Encode a text that only the last pattern still splits.

        To match a run of white space without its last character, GPT-2's pattern backtracks. tiktoken's stack then overflows at
        about a million characters. A cut before that last character gives the same pieces without backtracking, because the
        run is then at the end of its part."""
        if self._encoding is None:
            return self._encode_slowly(text)
        ranks: list[int] = []
        start = 0
        for run in _LONG_SPACE.finditer(text) if self.pattern == PATTERN else ():
            ranks += self._encoding.encode_ordinary(text[start : run.end()])
            start = run.end()
        ranks += self._encoding.encode_ordinary(text[start:])
        return ranks if self._plain else self._numbered([self._ids[rank] for rank in ranks], text)

    def _encode_slowly(self, text: str) -> list[int]:
        """Encode as _encode_piece() does, for a vocabulary that tiktoken would merge differently."""
        found: list[int | None] = []
        for piece in _split(self.pattern, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")):
            content = piece.encode()
            parts = [content] if self._whole and content in self._id_of else self._merged(content)
            found += [self._id_of.get(part) for part in parts]
        return self._numbered(found, text)

    def _numbered(self, found: "list[int | None]", text: str) -> list[int]:
        """Replace bytes that the vocabulary lacks by its token for unknown text. Raises InputError if it has none."""
        if None not in found:
            return found  # type: ignore[return-value]
        if self._unknown is None:
            lacks = (char for char in text if any(self._ids[byte] is None for byte in char.encode("utf-8", "replace")))
            wrong = next(lacks, "\ufffd")  # which stands for half of a surrogate pair
            raise InputError(f"the model's vocabulary has no {wrong!r}: leave this character out of the text")
        ids: list[int] = []
        for i, token in enumerate(found):
            if token is not None or not (self._fuse and i and found[i - 1] is None):
                ids.append(self._unknown if token is None else token)
        return ids


@cache
def _any_of(contents: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, contents)))


def _patterns(rule: "dict[str, Any] | None") -> tuple[list[str], str, bool]:
    """Read a pre-tokenizer: patterns whose matches are split off one after the other, the last one, and add_prefix_space.

    Raises InputError for one that drops or changes text, or that is not byte-level."""
    steps = rule["pretokenizers"] if rule and rule["type"] == "Sequence" else [rule]
    patterns, prefix = [], False
    for i, step in enumerate(steps):
        kind = step["type"] if step else None
        if kind == "Digits":
            patterns.append(_total(r"\p{N}" if step.get("individual_digits") else r"\p{N}+"))
        elif kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            pattern = step["pattern"]
            patterns.append(_total(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"])))
        elif kind == "ByteLevel" and i == len(steps) - 1:
            prefix = bool(step.get("add_prefix_space", True))
            if step.get("use_regex", True):
                patterns.append(PATTERN)
            return patterns[:-1], patterns[-1] if patterns else WHOLE, prefix
        else:
            raise InputError(f"the tokenizer splits text by {shown(kind)}: only byte-level BPE is supported")
    raise InputError("the tokenizer is not byte-level: only byte-level BPE is supported")


def _split(pattern: str, text: str) -> list[str]:
    return [match[0] for match in import_module("regex").finditer(pattern, text)]


def _total(pattern: str) -> str:
    """Return a pattern whose matches cover a text: those of `pattern`, and the runs between them."""
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _normalizers(rule: "dict[str, Any] | None") -> "list[Any]":
    steps = rule["normalizers"] if rule and rule["type"] == "Sequence" else [rule] if rule else []
    for step in steps:
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
            raise InputError(f"the tokenizer changes text by {shown(step['type'])}: only Unicode's normal forms are supported")
    return [step["type"] for step in steps]


def _tiktoken(name: str, pattern: str, ranks: dict[bytes, int]) -> "tiktoken.Encoding":
    import tiktoken

    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def merged(piece: bytes, rank_of: Callable[[bytes, bytes], int], *, limit: int = NEVER, fewest: int = 1) -> list[bytes]:
    """Merge the bytes of a piece: always the first of the neighbours with the lowest rank.

    Ends if no rank is below `limit`, or if only `fewest` parts are left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > fewest:
        found = [rank_of(*pair) for pair in pairwise(parts)]
        if (best := min(found)) >= limit:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


class _GPT2(_Encoding):
    """GPT-2's vocabulary."""

    def __init__(self) -> None:
        tokens = [_unspelled(token) for token in spelled_vocabulary(VOCABULARY_FILE)[0]]
        self.bytes = [*tokens, END_OF_TEXT.encode()]
        self.cuts, self.pattern, self.prefix_space, self.normalizers = [], PATTERN, False, []
        self.eot, self._plain = len(tokens), True
        self._rules = {END_OF_TEXT: {"id": len(tokens), "special": True}}
        self._encoding = _tiktoken("gpt2", PATTERN, {token: rank for rank, token in enumerate(tokens)})

    def vocabulary(self) -> "dict[str, Any]":
        """Return the contents of a tokenizer.json."""
        tokens, merges = spelled_vocabulary()
        return vocabulary_of([*tokens, END_OF_TEXT], merges, {END_OF_TEXT: True})


def vocabulary_of(
    tokens: list[str], merges: "list[Any]", added: dict[str, bool], *, pattern: str | None = None, end: str | None = None
) -> "dict[str, Any]":
    """Return a vocabulary in the form of tokenizer.json. tokens: spelled as in vocab.bpe, in the order of their ids.

    added: tokens that are not merged, and whether they are special. pattern: splits text, else GPT-2's. end: ends a text."""
    added = added if end is None else added | {end: added.get(end, True)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model: dict[str, Any] = {"type": "BPE", **dict.fromkeys(("dropout", "unk_token"))}
    model |= dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), "")
    model |= dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    vocab = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "added_tokens": [
            {"id": vocab[token], "content": token, **FLAGS, "special": special}
            | ({"eos": True} if token == end != END_OF_TEXT else {})
            for token, special in added.items()
        ],
        "pre_tokenizer": byte_level if pattern is None else {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level | {"use_regex": True},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {**model, "vocab": vocab, "merges": merges},
    }


class StreamDecoder:
    """Decode ids one at a time, in whole characters. The pieces together equal the result of Tokenizer.decode().

    stop_strings, stop_token_ids: the text ends before the first of them, and `stopped` is then True. Text in which a stop
    string may have begun is held back until the next ids, or finish()."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_strings: str | Iterable[str] = (),
        stop_token_ids: "SupportsIndex | Iterable[SupportsIndex]" = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop_bytes(text) for text in several("stop_strings", stop_strings, str)]
        ids = several("stop_token_ids", stop_token_ids if whole(stop_token_ids) is None else [stop_token_ids], int)
        self._stop_ids = {check_whole("a stop token", token, 0, tokenizer.V - 1) for token in ids}
        self._held = b""
        self._before = 0  # how many of the held bytes belong to the text before
        self.stopped = False

    def begin(self, ids: "Iterable[SupportsIndex]") -> None:
        """Take the ids before the text. A stop string or a character that begins in them may end in the text."""
        self._held = self._tokenizer.decode_bytes(ids)
        self._before = len(self._held)
        self._release(self._before - self._begun())

    def push(self, token: "SupportsIndex") -> str:
        """Take the next id; return the text that it completes, possibly "". Raises InputError as decode() does."""
        content = self._tokenizer.decode_bytes((token,))
        if self.stopped:
            return ""
        if whole(token) in self._stop_ids:
            self.stopped = True
            return self._release(len(self._held))
        self._held += content
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        return self._release(min(found) if found else len(self._held) - self._begun())

    def _begun(self) -> int:
        """Return how many bytes at the end may begin a stop string."""
        sizes = (size for stop in self._stops for size in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:size]))
        return max(sizes, default=0)

    def _release(self, count: int) -> str:
        """Decode the first `count` held bytes; return the text of those that do not belong to the text before."""
        old = min(self._before, count)
        self._utf8.decode(self._held[:old])
        text = self._utf8.decode(self._held[old:count])
        self._held, self._before = self._held[count:], self._before - old
        return text

    def finish(self) -> str:
        """End the text; return what was held back, with U+FFFD for half a character. The next push() begins a new text."""
        rest = "" if self.stopped else self._release(len(self._held)) + self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._held, self._before, self.stopped = b"", 0, False
        return rest


_load = cache(_GPT2)


def spelled(content: bytes) -> str:
    """Return bytes in the spelling of vocab.bpe."""
    return "".join([_SYMBOL_OF_BYTE[byte] for byte in content])


def _unspelled(token: str) -> bytes:
    """Return the bytes of a token in the spelling of vocab.bpe, or its UTF-8 if it is not in this spelling."""
    try:
        return bytes([_BYTE_OF_SYMBOL[char] for char in token])
    except KeyError:
        return token.encode("utf-8", "replace")


def spelled_vocabulary(path: str = VOCABULARY_FILE) -> tuple[list[str], list[str]]:
    """Return all ordinary tokens in the order of their ids, and the merges, with the spelling of vocab.bpe.

    The first 256 ids are single bytes: the 188 bytes that are printable in Latin-1, then the other 68. Each line of the file
    then defines one token by the two tokens that it merges. The file spells a printable byte as its Latin-1 character, and
    the others as U+0100 and up."""
    _version, *merges = _read_checked(path).decode("utf-8").splitlines()
    return _SYMBOLS + [merge.replace(" ", "") for merge in merges], merges


def _read_checked(path: str) -> bytes:
    """Read a file and compare it with the published vocabulary: one wrong merge would silently give wrong ids."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise PyGPTError(f"{path}: cannot read GPT-2's vocabulary: {error.strerror}; install pygpt again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != VOCABULARY_SHA256:
        what = f"GPT-2's vocabulary is damaged: sha256 {found}, expected {VOCABULARY_SHA256}"
        raise PyGPTError(f"{path}: {what}; install pygpt again")
    return content
