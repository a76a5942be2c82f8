"""Text for training and evaluation: read it in pieces, and encode it as tokens.

Because text is read and encoded in pieces, a file may be larger than memory. Refuses text that is not UTF-8.
Source: llm.c, dev/data/tinyshakespeare.py, for the positions of `<|endoftext|>`.
"""

import codecs
import os
import re
import sys
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import DataError, InputError, shown
from ..tokenizer import Tokenizer
from .shards import TOKEN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

    from .shards import Path, Shard

PIECE = 1 << 20  # bytes of text read at a time
EOT_MODES = ("document", "paragraph", "none")


def read_text(path: "Path") -> Iterator[str]:
    """Yield the exact text of a UTF-8 file, or of stdin if the path is "-", in pieces.

    Raises DataError if the text cannot be read, and for bytes that are not UTF-8, with their offset.
    """
    if path == "-":
        if sys.stdin is None:
            raise DataError("-: stdin is closed: give the text on stdin, or the path of a file")
        yield from _decoded(sys.stdin.buffer, "stdin")
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 (errors of opening and of reading have different messages)
    except (OSError, ValueError) as error:
        raise DataError(f"{os.fspath(path)!r}: cannot open the text: {getattr(error, 'strerror', None) or error}") from error
    with file:
        yield from _decoded(file, os.fspath(path))


def _decoded(file: "IO[bytes]", name: str) -> Iterator[str]:
    """Decode a binary file piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    taken, piece = 0, b" "
    while piece:
        try:
            piece = file.read(PIECE)
            taken += len(piece)
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = taken - len(error.object) + error.start
            raise DataError(
                f"{name}: byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8 ({error.reason}): "
                f"convert the text to UTF-8"
            ) from None
        except OSError as error:
            raise DataError(f"{name}: cannot read the text: {error.strerror}") from error
        yield text


def tokens_of_text(text: str | Iterable[str], *, eot: str = "paragraph", tokenizer: Tokenizer | None = None) -> "Shard":
    """Return the tokens of a text, given whole or in pieces, as a uint16 array (tokens,). eot, tokenizer: see encode_text()."""
    pieces = list(encode_text([text] if isinstance(text, str) else text, eot=eot, tokenizer=tokenizer))
    return np.concatenate(pieces) if pieces else np.empty(0, TOKEN)


def encode_text(text: Iterable[str], *, eot: str = "paragraph", tokenizer: Tokenizer | None = None) -> "Iterator[Shard]":
    """Yield the tokens of one text, given in pieces, as uint16 arrays. The tokens do not depend on the pieces.

    eot: the positions of `<|endoftext|>`. "paragraph" adds it before the text and after every blank line (each "\\n\\n"), as
    llm.c prepares tinyshakespeare. "document" adds it before the text, "none" nowhere. In the text itself it is ordinary text.
    The text is cut only before white space that follows other text, so a long run without such a place must fit in memory.
    tokenizer: by default GPT-2's; one that splits text otherwise gets it whole. One without `<|endoftext|>` adds nothing.
    Raises InputError for another `eot`, and for ids beyond uint16.
    """
    if not isinstance(eot, str) or eot not in EOT_MODES:
        raise InputError(f"eot is {shown(eot)}: it must be one of {', '.join(EOT_MODES)}")
    tokenizer = Tokenizer() if tokenizer is None else tokenizer
    if tokenizer.V > 1 << 16:
        raise InputError(f"the tokenizer has {tokenizer.V} ids: tokens of texts are stored as uint16, at most {1 << 16} ids")
    return _encoded(text if tokenizer.splits_before_space else ["".join(text)], tokenizer, eot)


def _encoded(text: Iterable[str], tokenizer: Tokenizer, eot: str) -> "Iterator[Shard]":
    end = [] if eot == "none" or tokenizer.eot is None else [tokenizer.eot]
    ids = [*end]
    for piece in _independent(text):
        *paragraphs, last = piece.split("\n\n") if eot == "paragraph" else [piece]
        for paragraph in paragraphs:
            ids += tokenizer.encode(paragraph + "\n\n")
            ids += end
        ids += tokenizer.encode(last)
        if ids:
            yield np.array(ids, TOKEN)
        ids = []


# A cut between other text and the white space after it never splits a token of GPT-2 or a blank line.
_LAST_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _independent(text: Iterable[str]) -> Iterator[str]:
    """Yield the text in other pieces, cut at places where a token always ends."""
    kept: list[str] = []
    for piece in text:
        cut = _LAST_CUT.match(piece)
        if cut:
            yield "".join([*kept, cut[0]])
            kept = []
        kept.append(piece[cut.end() :] if cut else piece)
    yield "".join(kept)
