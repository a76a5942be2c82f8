"""Turn texts into llm.c's token shards for training, or show the content of a shard.

    pygpt shards input.txt -o data/ --val-tokens 32768    writes data/input_train.bin and data/input_val.bin
    pygpt shards 'books/*.txt' -o data/books --shard-size 100000000 --val-fraction 0.01
    zcat dump.gz | pygpt shards - -o data/dump --eot document
    pygpt shards --show data/input_val.bin -n 20

If NAME ends in /, the folder is created if needed. docs/reference/shards.md describes texts, --eot and the files' names."""

import argparse
import os
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, PyGPTError
from ..formats.llmc import MOST_TOKENS, read_tokens, write_tokens
from ..formats.text import EOT_MODES, encode_file, read_text
from ..formats.vocabulary import load_tokenizer
from ..tokenizer import Tokenizer
from ..training.data import matching, split
from .console import Parser, Progress, check_stdout, command, for_terminal, say, whole
from .options import TOKENIZER_HELP, add_text_options

STDIN = "-"
Tokens = npt.NDArray[np.integer[Any]]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    usage = "pygpt shards TEXT... -o NAME [options]\n       pygpt shards --show FILE [-n N]"
    parser = Parser(prog="pygpt shards", usage=usage, description=__doc__)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="UTF-8 text files, quoted patterns, or - for stdin")
    add("-o", "--output", metavar="NAME", help="a folder for the files, or the beginning of their names")
    count = whole(1, MOST_TOKENS)
    add("--shard-size", metavar="N", type=count, help="tokens in each shard; the last may have fewer (default: one file)")
    add("--val-tokens", metavar="N", type=count, help="use the first N tokens for validation")
    add("--val-fraction", metavar="F", type=fraction, help="use this last part of the tokens for validation, such as 0.1")
    where = "where to add <|endoftext|>: paragraph (default), document (default for .jsonl) or none"
    add("--eot", metavar="WHERE", choices=EOT_MODES, help=where)
    add_text_options(add)
    add("--tokenizer", metavar="FILE", help=f"{TOKENIZER_HELP[: TOKENIZER_HELP.index(' (')]} (default: GPT-2's)")
    add("--show", metavar="FILE", help="print the size and the first tokens of a shard")
    add("-n", "--tokens", metavar="N", type=count, help="number of tokens that --show prints (default 64)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, then show a shard or write shards."""
    tokenizer = Tokenizer() if options.tokenizer is None else load_tokenizer(options.tokenizer)
    if options.show is not None:
        if options.texts or options.output is not None:
            raise InputError("--show reads a shard, but TEXT and -o write shards: give one or the other")
        show(options.show, options.tokens or 64, tokenizer)
        return
    if options.tokens is not None:
        raise InputError("-n goes with --show: to set the sizes of files, use --shard-size and --val-tokens")
    if not options.texts:
        raise InputError("the text is missing: name at least one text file, or - for stdin")
    if options.output is None:
        raise InputError("-o is missing: give a folder for the files, or the beginning of their names")
    if options.val_tokens is not None and options.val_fraction is not None:
        raise InputError("--val-tokens and --val-fraction were both given: give one")
    advice = "check the name of the text"
    texts = [name for given in options.texts for name in ([STDIN] if given == STDIN else matching(given, advice))]
    if texts.count(STDIN) > 1:
        raise InputError("- was given twice, but stdin can be read once: give it once")
    folder = os.path.dirname(options.output)
    new = not os.path.exists(folder)
    prefix = target(options.output, texts[0])
    try:
        say(make(texts, prefix, options, tokenizer))
    except BaseException:
        with suppress(OSError):
            if new:
                os.rmdir(folder)
        raise


def fraction(text: str) -> float:
    """Read a number between 0 and 1, as a type for argparse."""
    if not re.fullmatch(r"0?\.[0-9]{1,16}", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: it must be a number between 0 and 1, such as 0.1")
    return float(text)


def target(output: str, first: str) -> str:
    """Return the beginning of the files' names; make the folder if `output` ends in /. Raises InputError for a bad name."""
    asked = output.endswith("/")
    if os.path.isdir(output) or asked:
        output = os.path.join(output, "stdin" if first == STDIN else Path(first).stem)
    folder, name = os.path.split(output)
    if asked and not os.path.lexists(folder) and os.path.isdir(os.path.dirname(folder) or "."):
        os.mkdir(folder)
    if not name or not os.path.isdir(folder or "."):
        raise InputError(f"-o is {output!r}: the folder {folder!r} does not exist: make it first")
    pattern = re.compile(rf"{re.escape(name)}_(train|val)(_[0-9]+)?\.bin")
    if older := sorted(filter(pattern.fullmatch, os.listdir(folder or "."))):
        raise InputError(f"{os.path.join(folder, older[0])} exists already: delete it, or choose another name with -o")
    return output


def make(texts: list[str], prefix: str, options: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """Write the files; return a one-line summary. Raises PyGPTError if writing fails."""
    sizes = {"val_tokens": options.val_tokens, "val_fraction": options.val_fraction}
    folder, name = os.path.split(prefix)
    try:
        with tempfile.TemporaryDirectory(dir=folder or ".", prefix=f".{name}.") as work:
            tokens = tokenize(texts, os.path.join(work, "tokens"), options, tokenizer)
            unsplit = options.val_tokens is None and options.val_fraction is None
            parts = {"train": tokens} if unsplit else dict(zip(("train", "val"), split(tokens, **sizes), strict=True))
            files = {part: write(f"{name}_{part}", parts[part], options.shard_size, work) for part in parts}
            for file in [file for part in parts for file in files[part]]:
                os.replace(os.path.join(work, file), os.path.join(folder, file))
    except OSError as error:
        raise PyGPTError(f"{prefix}: cannot write the token files: {error.strerror or error}") from error
    more = {part: f" and {len(files[part]) - 1} more" if len(files[part]) > 1 else "" for part in parts}
    return "; ".join(f"{os.path.join(folder, files[part][0])}{more[part]}: {len(parts[part])} tokens" for part in parts)


def tokenize(texts: list[str], spool: str, options: argparse.Namespace, tokenizer: Tokenizer) -> Tokens:
    """Write all tokens to the file `spool`; return them as a mapped array. The split needs their number, known at the end."""
    reading = {"field": options.field, "allow_special": not options.no_special, "tokenizer": tokenizer, "eot": options.eot}
    total = None if any(not os.path.isfile(text) for text in texts) else sum(map(os.path.getsize, texts))
    count = 0
    with open(spool, "wb") as file, Progress("bytes", total) as progress:
        for name in texts:
            text = progress.watch(read_text(name), lambda piece: len(piece.encode()))
            for tokens in encode_file(text, name, **reading):
                file.write(tokens.data)
                count += len(tokens)
    if not count or total == 0:  # an empty text has its <|endoftext|>
        raise InputError("the texts are empty: give at least one character")
    return np.memmap(spool, "<u2", "r")


def write(name: str, tokens: Tokens, shard_size: int | None, work: str) -> list[str]:
    """Write tokens to the folder `work` as one file or as shards; return the files' names."""
    starts = range(0, len(tokens), shard_size or len(tokens))
    pieces = [tokens[start : start + starts.step] for start in starts]
    names = [f"{name}.bin"] if shard_size is None else [f"{name}_{i:06d}.bin" for i in range(1, len(pieces) + 1)]
    for file, piece in zip(names, pieces, strict=True):
        write_tokens(os.path.join(work, file), piece)
    return names


def show(path: str, count: int, tokenizer: Tokenizer) -> None:
    """Print a shard's size, its first `count` ids, and their text. Raises DataError if the file is not a shard."""
    check_stdout("the tokens")
    tokens = read_tokens(path, V=tokenizer.V)
    ids = tokens[:count].tolist()
    print(for_terminal(f"{path}: {len(tokens)} tokens, {os.path.getsize(path)} bytes; the first {len(ids)}:", sys.stdout))
    print(*ids)
    content = tokenizer.decode_bytes(ids)
    if sys.stdout.isatty():
        print(for_terminal(content.decode("utf-8", "replace"), sys.stdout))
    else:  # write the bytes as they are, even if they are not UTF-8
        sys.stdout.flush()
        sys.stdout.buffer.write(content + b"\n")
    sys.stdout.flush()


main = command(build_parser, run)
