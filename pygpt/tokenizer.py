"""GPT-2's tokenizer: encode text as ids, decode ids to text, also while they stream.

tiktoken merges the byte pairs. The vocabulary is the file data/vocab.bpe of this package. tiktoken.get_encoding() would
download one. The first Tokenizer imports tiktoken; this module does not.

Refuses ids outside the vocabulary, and a vocabulary file that is not the published one. Accepts any text.
Sources: GPT-2's encoder.py (order of the bytes, split pattern); tiktoken_ext/openai_public.py (`gpt2`).
"""

import codecs
import hashlib
import os
import re
import threading
from collections.abc import Iterable
from functools import cache

from .errors import InputError, PyGPTError, shown, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

    import tiktoken

VOCABULARY_FILE = os.path.join(os.path.dirname(__file__), "data", "vocab.bpe")
VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
END_OF_TEXT = "<|endoftext|>"

# The pattern that splits text before bytes are merged, from tiktoken: it finds the pieces of GPT-2's own pattern faster.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# All but the last character of a long run of white space before other text. `\s` is written out, because Python also counts
# four control characters as white space. Unicode, and so the pattern above, does not.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_SPACE = re.compile(rf"(?<![{_SPACE}])[{_SPACE}]{{4096,}}(?=[{_SPACE}][^{_SPACE}])")

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that are printable in Latin-1

_loading = threading.Lock()


class Tokenizer:
    """GPT-2's byte-pair encoding with 50,257 ids. All Tokenizers of a process share one vocabulary, loaded once.

    Any number of threads may use one Tokenizer. Raises PyGPTError if the installed vocabulary is missing or damaged.
    """

    def __init__(self) -> None:
        with _loading:
            self._bytes, self._encoding = _load()

    @property
    def V(self) -> int:
        """The number of ids, `<|endoftext|>` included: 50257."""
        return len(self._bytes)

    @property
    def eot(self) -> int:
        """The id of `<|endoftext|>`, the last one: 50256."""
        return len(self._bytes) - 1

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode any text as ids. A lone surrogate, which UTF-8 cannot represent, becomes U+FFFD.

        `<|endoftext|>` in the text is ordinary text, because users may type anything. With allow_special it becomes id `eot`.
        """
        first, *others = text.split(END_OF_TEXT) if allow_special else [text]
        ids = self._encode_ordinary(first)
        for part in others:
            ids.append(self.eot)
            ids += self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        """Encode text as ordinary text.

        To match a run of white space without its last character, the pattern backtracks. tiktoken's stack then overflows at
        about a million characters. A cut before that last character gives the same pieces without backtracking, because the
        run is then at the end of its part.
        """
        ids: list[int] = []
        start = 0
        for run in _LONG_SPACE.finditer(text):
            ids += self._encoding.encode_ordinary(text[start : run.end()])
            start = run.end()
        return ids + self._encoding.encode_ordinary(text[start:])

    def decode(self, ids: "Iterable[SupportsIndex]") -> str:
        """Decode ids to text. Bytes that are not UTF-8, such as half a character at the end, become U+FFFD.

        Raises InputError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: "Iterable[SupportsIndex]") -> bytes:
        """Decode ids to their exact bytes. Raises InputError for an id outside the vocabulary."""
        return b"".join([self._bytes[self._checked(token)] for token in ids])

    def _checked(self, token: "SupportsIndex") -> int:
        """Return an id as an int. Accepts NumPy's integers; raises InputError for an id outside the vocabulary or a bool."""
        number = whole(token)
        if number is None or not 0 <= number < self.V:
            raise InputError(f"token id is {shown(token)}: it must be a whole number from 0 to {self.eot}")
        return number


class StreamDecoder:
    """Decode ids one at a time, in whole characters. The pieces together equal the result of Tokenizer.decode().

    stop_strings, stop_token_ids: the text ends before the first of them, and `stopped` is then True. Text in which a stop
    string may have begun is held back until the next ids, or finish().
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop_strings: Iterable[str] = (), stop_token_ids: "Iterable[SupportsIndex]" = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [text.encode("utf-8", "surrogateescape") for text in stop_strings]
        self._stop_ids = {whole(token) for token in stop_token_ids}
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


@cache
def _load() -> "tuple[list[bytes], tiktoken.Encoding]":
    """Load the vocabulary; return the bytes of every id, and the encoder."""
    import tiktoken

    tokens = _read_tokens(VOCABULARY_FILE)
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )
    return [*tokens, END_OF_TEXT.encode()], encoding


def _read_tokens(path: str) -> list[bytes]:
    """Read vocab.bpe: the bytes of every ordinary token in the order of their ids."""
    tokens, _ = spelled_vocabulary(path)
    byte_of = dict(zip(_symbols(), _order(), strict=True))
    return [bytes([byte_of[char] for char in token]) for token in tokens]


def spelled_vocabulary(path: str = VOCABULARY_FILE) -> tuple[list[str], list[str]]:
    """Return all ordinary tokens in the order of their ids, and the merges, with the spelling of vocab.bpe.

    The first 256 ids are single bytes: the 188 bytes that are printable in Latin-1, then the other 68. Each line of the file
    then defines one token by the two tokens that it merges. The file spells a printable byte as its Latin-1 character, and
    the others as U+0100 and up.
    """
    _version, *merges = _read_checked(path).decode("utf-8").splitlines()
    return _symbols() + [merge.replace(" ", "") for merge in merges], merges


def _order() -> list[int]:
    """Return the 256 bytes in the order of their ids."""
    return _PRINTABLE + [byte for byte in range(256) if byte not in _PRINTABLE]


def _symbols() -> list[str]:
    """Return vocab.bpe's spelling of the 256 bytes, in the order of their ids."""
    return [*map(chr, _PRINTABLE), *(chr(0x100 + i) for i in range(256 - len(_PRINTABLE)))]


def _read_checked(path: str) -> bytes:
    """Read a file and compare it with the published vocabulary: one wrong merge would silently give wrong ids."""
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise PyGPTError(f"{path}: cannot read GPT-2's vocabulary: {error.strerror}; install pygpt again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != VOCABULARY_SHA256:
        raise PyGPTError(
            f"{path}: GPT-2's vocabulary is damaged: sha256 {found}, expected {VOCABULARY_SHA256}; install pygpt again"
        )
    return content
