"""Text for training and evaluation: read it in pieces, and encode it as tokens. JSON lines hold a document in each row.

Because text is read and encoded in pieces, a file may be larger than memory. Refuses text that is not UTF-8.
Source: llm.c, dev/data/tinyshakespeare.py, for the positions of `<|endoftext|>`."""

import codecs
import gzip
import io
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import IO, Any

from ..config import IGNORED
from ..errors import TYPE_CHECKING, DataError, InputError, PyGPTError, check_flag, shown
from ..tokenizer import Tokenizer
from .files import Path, atomic_file, foreign_file, reason

if TYPE_CHECKING:  # chat starts without NumPy
    import numpy as np
    import numpy.typing as npt

    from .llmc import Shard

    Labels = npt.NDArray[np.int32]  # (tokens,)

PIECE = 1 << 20  # bytes of text read at a time
LONGEST = 1 << 24  # bytes of a line in a file that may be compressed
EOT_MODES = ("document", "paragraph", "none")
MARK = "\ufeff"  # the byte order mark
OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # of UTF-16 and UTF-32
ROWS = (".jsonl", ".ndjson")  # files with these endings hold a JSON object in each line
PAIR = ("prompt", "completion")  # the fields of a row whose prompt is not trained on
WAY_OUT = "convert the text to UTF-8, for example with iconv"


def plain(text: Iterable[str]) -> Iterator[str]:
    """Yield text in pieces with every newline (CR LF, CR) as "\\n", and without a byte order mark at its beginning."""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    begun = False
    for piece in text:
        yield newlines.decode(piece if begun else piece.removeprefix(MARK))
        begun = begun or piece != ""
    yield newlines.decode("", final=True)


def given_text(text: str) -> str:
    """Return a text that the user typed, pasted or gave as an argument, as read_text() would read it.

    Python gives half a surrogate pair for a byte outside the locale's encoding. Raises InputError if they are not UTF-8."""
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise InputError(f"the text {shown(text)} is not UTF-8: use a terminal and a locale with UTF-8") from None
    return "".join(plain([text]))


def read_text(path: "Path") -> Iterator[str]:
    """Yield the text of a UTF-8 file, or of stdin if the path is "-", in pieces.

    Every newline becomes "\\n", and a byte order mark at the beginning is dropped. Raises DataError if the text cannot be read,
    and for bytes that are not UTF-8, with their offset."""
    if path == "-":
        if sys.stdin is None:
            raise DataError("-: stdin is closed: give the text on stdin, or the path of a file")
        yield from plain(_decoded(sys.stdin.buffer, "stdin"))
        return
    try:
        file = open(path, "rb")  # noqa: SIM115 (errors of opening and of reading have different messages)
    except (OSError, ValueError) as error:
        raise DataError(f"{os.fspath(path)!r}: cannot open the text: {getattr(error, 'strerror', None) or error}") from error
    with file:
        yield from plain(_decoded(file, os.fspath(path)))


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    taken, piece = 0, b" "
    while piece:
        try:
            piece = file.read(PIECE)
            if not taken and (other := _other_than_text(piece[:64])):
                raise DataError(f"{name}: the text is {other}")
            taken += len(piece)
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = taken - len(error.object) + error.start
            flaw = f"byte {error.object[error.start]:#04x} at offset {offset} is not UTF-8 ({error.reason})"
            raise DataError(f"{name}: {flaw}: {WAY_OUT}") from None
        except OSError as error:
            raise DataError(f"{name}: cannot read the text: {error.strerror}") from error
        yield text


def _other_than_text(head: bytes) -> str:
    """Return what a file is that begins as UTF-16 or UTF-32, or as a file of another kind, with the way out; else ""."""
    halves = head[::2], head[1::2]  # UTF-16 has a NUL as every other byte
    if head.startswith(OTHER_MARKS) or (any(halves) and not all(map(any, halves)) and len(head) > 1):
        return f"UTF-16 or UTF-32: {WAY_OUT}"
    return "" if head.lstrip().startswith(b"<") else foreign_file(head)  # a page can be a text


def tokens_of_text(
    text: str | Iterable[str], *, eot: str = "paragraph", allow_special: bool = True, tokenizer: Tokenizer | None = None
) -> "Shard":
    """Return the tokens of a text, given whole or in pieces, as a uint16 array (tokens,). See encode_text()."""
    pieces = [text] if isinstance(text, str) else text
    return joined(encode_text(pieces, eot=eot, allow_special=allow_special, tokenizer=tokenizer))


def joined(pieces: "Iterable[Shard]") -> "Shard":
    """Return pieces of tokens as one uint16 array (tokens,)."""
    import numpy as np

    return np.concatenate([np.empty(0, "<u2"), *pieces])


def encode_text(
    text: Iterable[str], *, eot: str = "paragraph", allow_special: bool = True, tokenizer: Tokenizer | None = None
) -> "Iterator[Shard]":
    """Yield the tokens of one text, given in pieces, as uint16 arrays. The tokens do not depend on the pieces.

    eot: the positions of `<|endoftext|>`. "paragraph" adds it before the text and after every blank line (each "\\n\\n"), as
    llm.c prepares tinyshakespeare. "document" adds it before the text, "none" nowhere. allow_special: `<|endoftext|>` in the
    text becomes its one id, which separates documents; if False, it is ordinary text. Newlines and a byte order mark are read
    as read_text() reads them. The text is cut only before white space that follows other text, so a long run without such a
    place must fit in memory. tokenizer: by default GPT-2's; one that splits text otherwise gets it whole, and one without
    `<|endoftext|>` adds nothing. Raises InputError for another `eot`, and for ids beyond uint16."""
    if not isinstance(eot, str) or eot not in EOT_MODES:
        raise InputError(f"eot is {shown(eot)}: it must be one of {', '.join(EOT_MODES)}")
    tokenizer = Tokenizer() if tokenizer is None else tokenizer
    if tokenizer.V > 1 << 16:
        raise InputError(f"the tokenizer has {tokenizer.V} ids: tokens of texts are stored as uint16, at most {1 << 16} ids")
    pieces = plain(text) if tokenizer.splits_before_space else ["".join(plain(text))]
    return _encoded(pieces, tokenizer, eot, check_flag("allow_special", allow_special))


def _encoded(text: Iterable[str], tokenizer: Tokenizer, eot: str, allow_special: bool) -> "Iterator[Shard]":
    import numpy as np

    end = [] if eot == "none" or tokenizer.eot is None else [tokenizer.eot]
    ids = [*end]
    for piece in _independent(text):
        *paragraphs, last = piece.split("\n\n") if eot == "paragraph" else [piece]
        for paragraph in paragraphs:
            ids += tokenizer.encode(paragraph + "\n\n", allow_special=allow_special)
            ids += end
        ids += tokenizer.encode(last, allow_special=allow_special)
        if ids:
            yield np.array(ids, "<u2")
        ids = []


# A cut between other text and the white space after it never splits a token of GPT-2, a blank line or <|endoftext|>.
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


def holds_rows(name: str, field: str | None = None) -> bool:
    """Return whether a file holds JSON lines: its name says so, or the user named the field of their text."""
    return field is not None or name.lower().endswith(ROWS)


def read_rows(text: Iterable[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON objects of a text, one a line, each with its place for messages. Blank lines are skipped.

    Raises DataError for a line that is not a JSON object."""
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            where = f"{name}: line {number}"
            yield where, row_of(line, where)


def row_of(line: str | bytes, where: str, example: str = '{"text": "..."}') -> dict[str, Any]:
    """Return the JSON object in a line. where: its place, for messages. Raises DataError for other text."""
    try:
        row = json.loads(line if isinstance(line, str) else line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is {shown(row)}: it must be an object such as {example}")
    return row


def _lines(text: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in text:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


def field_of(where: str, row: dict[str, Any], field: str, way_out: str = "") -> str:
    """Return the text of a row's field. Raises DataError if it is missing or is not a text."""
    if not isinstance(text := row.get(field), str):
        what = f"is {shown(text)}, not a text" if field in row else f"is missing; there are {shown(sorted(row))[1:-1]}"
        raise DataError(f"{where}: the field {field!r} {what}{way_out}")
    return text


def read_documents(text: Iterable[str], name: str, field: str | None = None) -> Iterator[tuple[str | None, str]]:
    """Yield the documents of JSON lines as pairs (prompt, text). The prompt is None if a row has only one text.

    field: the field of the text (default "text"). A row without it may have the fields "prompt" and "completion" instead.
    Raises DataError for a row without these fields."""
    for where, row in read_rows(text, name):
        if field is None and "text" not in row and set(PAIR) <= set(row):
            yield field_of(where, row, PAIR[0]), field_of(where, row, PAIR[1])
        else:
            yield None, field_of(where, row, field or "text", ": name the field of the text with --field")


def encode_file(
    text: Iterable[str],
    name: str,
    *,
    eot: str | None = None,
    field: str | None = None,
    allow_special: bool = True,
    tokenizer: Tokenizer | None = None,
) -> "Iterator[Shard]":
    """Yield the tokens of one file: a text, or JSON lines with one document in each row (holds_rows).

    eot: as for encode_text(); by default "paragraph" for text, and "document" for each row. Raises DataError for rows with a
    prompt, because tokens alone do not say what is trained on."""
    if not holds_rows(name, field):
        yield from encode_text(text, eot=eot or "paragraph", allow_special=allow_special, tokenizer=tokenizer)
        return
    for prompt, document in read_documents(text, name, field):
        if prompt is not None:
            way = "`pygpt train --data` takes this file itself; or name one --field"
            raise DataError(f"{name}: it has prompts and completions: {way}")
        yield from encode_text([document], eot=eot or "document", allow_special=allow_special, tokenizer=tokenizer)


def tokens_and_labels(
    path: "Path", field: str | None = None, *, allow_special: bool = True, tokenizer: Tokenizer | None = None
) -> "tuple[Shard, Labels | None]":
    """Return the tokens of a file to train on, and their labels: -100 for the tokens of prompts, else the token itself.

    Prompts come from JSON lines with the fields "prompt" and "completion" (read_documents). Without them, labels are None."""
    import numpy as np

    name = os.fspath(path)
    reading: dict[str, Any] = {"allow_special": allow_special, "tokenizer": tokenizer}
    if not holds_rows(name, field):
        return joined(encode_file(read_text(path), name, **reading)), None
    tokens, labels, masked = [], [], False
    marked = int(tokenizer is None or tokenizer.eot is not None)  # the number of ids before each row
    for prompt, document in read_documents(read_text(path), name, field):
        begin = tokens_of_text(prompt or "", eot="document", **reading)  # <|endoftext|> ends the row before
        end = tokens_of_text(document, eot="none", **reading)
        tokens += [begin, end]
        labels += [begin[:marked].astype(np.int32), np.full(len(begin) - marked, IGNORED, np.int32), end.astype(np.int32)]
        masked = masked or prompt is not None
    return joined(tokens), np.concatenate(labels) if masked else None


def read_lines(path: str) -> Iterator[bytes]:
    """Yield a file's lines, decompressed by its name (.gz, .zst). Raises DataError for damage or a long line."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: {'not a regular' if os.path.exists(path) else 'no such'} file: name a file of JSON lines")
    damage = (OSError, EOFError, zlib.error, *([_zstd().ZstdError] if path.endswith(".zst") else []))
    try:
        with open(path, "rb") as raw, _opened(raw, path, "rb") as file:
            while line := file.readline(LONGEST + 1):
                if len(line) > LONGEST:
                    raise DataError(f"{path}: a line is longer than {LONGEST} bytes: write one object on a line")
                yield line
    except damage as error:
        raise DataError(f"{path}: cannot read the lines: {reason(error)}") from error


def compress(source: str, path: str) -> None:
    """Write the bytes of the file `source` as `path` atomically, compressed by its name. They do not depend on the time."""
    with atomic_file(path) as target, open(source, "rb") as file, _opened(target, path, "wb") as packed:
        shutil.copyfileobj(file, packed, 1 << 20)


def is_compressed(path: str) -> bool:
    """Return whether the name is of a compressed file. Raises PyGPTError for .zst if this Python has no zstd."""
    return path.endswith(".gz") or (path.endswith(".zst") and bool(_zstd()))


def _opened(file: IO[bytes], path: str, mode: str) -> Any:
    if path.endswith(".zst"):
        return _zstd().open(file, mode)
    return gzip.GzipFile("", mode, 6, file, 0) if path.endswith(".gz") else file


def _zstd() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            pass
    raise PyGPTError("files of zstd (.zst) need Python 3.14, or python -m pip install backports.zstd")
