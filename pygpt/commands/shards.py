"""Turn texts into llm.c's token shards, for training; or show a shard.

    pygpt shards input.txt -o data/ --val-tokens 32768    data/input_train.bin and data/input_val.bin
    pygpt shards 'books/*.txt' -o data/books --shard-size 100000000 --val-fraction 0.01
    zcat dump.gz | pygpt shards - -o data/dump --eot document
    pygpt shards --show data/input_val.bin -n 20

Texts are UTF-8 and may be larger than memory. Tokens are GPT-2's. --eot says where <|endoftext|> goes. paragraph: before each
text and after every blank line, as llm.c prepares tinyshakespeare; document: before each text; none: nowhere.
The files are NAME_train.bin and NAME_val.bin, or with --shard-size NAME_train_000001.bin and so on. If NAME ends in a /, it is
a folder, and is created if necessary.

All files appear together once they are whole. Until then, they and a second copy of all tokens are in a temporary folder beside
them. The command refuses to write beside older files of the same name: a pattern would take both for one data set.

Exit status: 0; 1 for a failure at run time; 2 for bad input, with one line on stderr; 130 after Ctrl-C.
"""

import argparse
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, PyGPTError
from ..formats.shards import MOST_TOKENS, read_tokens, write_tokens
from ..formats.text import encode_text, read_text
from ..tokenizer import Tokenizer
from ..training.data import split
from .console import HelpFormatter, Parser, check_stdout, for_terminal, say, status_of, whole
from .progress import Progress

EOT = ("document", "paragraph", "none")
STDIN = "-"
Tokens = npt.NDArray[np.integer[Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The options and their help."""
    parser = Parser(
        prog="pygpt shards",
        usage="pygpt shards TEXT... -o DIR_OR_PREFIX [options]\n       pygpt shards --show FILE [-n N]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="UTF-8 text files, patterns of them, or - for stdin")
    add("-o", "--output", metavar="DIR_OR_PREFIX", help="where the files go: a folder, or the beginning of their names")
    count = whole(1, MOST_TOKENS)
    add("--shard-size", metavar="N", type=count, help="tokens of a shard, the last one's rest excepted (default: one file)")
    add("--val-tokens", metavar="N", type=count, help="the first N tokens validate")
    add("--val-fraction", metavar="F", type=fraction, help="the last part validates, as in 0.1")
    add("--eot", metavar="WHERE", default="paragraph", help="paragraph (default), document or none")
    add("--show", metavar="FILE", help="print a shard's header and first tokens")
    add("-n", "--tokens", metavar="N", type=count, help="how many tokens --show prints (default 64)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, then show or make."""
    if options.show is not None:
        if options.texts or options.output is not None:
            raise InputError("--show reads a shard, TEXT and -o write some: give one or the other")
        show(options.show, options.tokens or 64)
        return
    if options.tokens is not None:
        raise InputError("-n goes with --show; the sizes of files are --shard-size and --val-tokens")
    if not options.texts:
        raise InputError("no text was given: name at least one text file, or - for stdin")
    if options.output is None:
        raise InputError("-o is missing: name the folder of the files, or how their names begin")
    if options.eot not in EOT:
        raise InputError(f"--eot is {options.eot[:40]!r}: it must be one of {', '.join(EOT)}")
    if options.val_tokens is not None and options.val_fraction is not None:
        raise InputError("--val-tokens and --val-fraction were both given: give one")
    texts = [name for given in options.texts for name in expand(given)]
    if texts.count(STDIN) > 1:
        raise InputError("- was given twice: stdin can be read once")
    prefix = target(options.output, texts[0])
    say(make(texts, prefix, options.eot, options.shard_size, options.val_tokens, options.val_fraction))


def fraction(text: str) -> float:
    """A type for argparse: a number between 0 and 1."""
    if not re.fullmatch(r"0?\.[0-9]{1,16}", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: it must be a number between 0 and 1, such as 0.1")
    return float(text)


# ------------------------------------------------------------------------------------------------ names


def expand(given: str) -> list[str]:
    """The texts that a word of the command line means: a file, a pattern's files sorted, or stdin."""
    if given == STDIN or os.path.lexists(given):
        return [given]
    if found := sorted(glob.glob(given)):
        return found
    raise InputError(f"{given!r}: no such text file, and as a pattern it matches none")


def target(output: str, first: str) -> str:
    """How the files' names begin; makes the folder that a slash asks for. Raises InputError where there is no other folder, or
    where older files would be among them."""
    asked = output.endswith("/")
    if os.path.isdir(output) or asked:
        output = os.path.join(output, "stdin" if first == STDIN else Path(first).stem)
    folder, name = os.path.split(output)
    if asked and not os.path.lexists(folder) and os.path.isdir(os.path.dirname(folder) or "."):
        os.mkdir(folder)
    if not name or not os.path.isdir(folder or "."):
        raise InputError(f"-o is {output!r}: there is no folder {folder!r}")
    pattern = re.compile(rf"{re.escape(name)}_(train|val)(_[0-9]+)?\.bin")
    if older := sorted(filter(pattern.fullmatch, os.listdir(folder or "."))):
        raise InputError(f"{os.path.join(folder, older[0])} is there already: delete it, or choose another name with -o")
    return output


# ------------------------------------------------------------------------------------------------ texts to shards


def make(
    texts: Sequence[str],
    prefix: str,
    eot: str,
    shard_size: int | None = None,
    val_tokens: int | None = None,
    val_fraction: float | None = None,
) -> str:
    """Write the files; return a line that says what was done."""
    folder, name = os.path.split(prefix)
    try:
        with tempfile.TemporaryDirectory(dir=folder or ".", prefix=f".{name}.") as work:
            tokens = tokenize(texts, eot, os.path.join(work, "tokens"))
            parts = {"train": tokens}
            if val_tokens is not None or val_fraction is not None:
                parts["train"], parts["val"] = split(tokens, val_tokens=val_tokens, val_fraction=val_fraction)
            files = {part: write(f"{name}_{part}", parts[part], shard_size, work) for part in parts}
            for file in [file for part in parts for file in files[part]]:
                os.replace(os.path.join(work, file), os.path.join(folder, file))
    except OSError as error:
        raise PyGPTError(f"{prefix}: cannot write the token files: {error.strerror or error}") from error
    return "; ".join(described(os.path.join(folder, files[part][0]), len(files[part]), len(parts[part])) for part in parts)


def tokenize(texts: Sequence[str], eot: str, spool: str) -> Tokens:
    """All tokens, in a file: where validation begins may be known at the end only."""
    total = None if any(not os.path.isfile(text) for text in texts) else sum(map(os.path.getsize, texts))
    count = 0
    with open(spool, "wb") as file, Progress("bytes", total) as progress:
        for piece in tokenized(texts, eot, progress):
            file.write(piece.data)
            count += len(piece)
    if not count:
        raise InputError("the texts are empty: there are no tokens to write")
    return np.memmap(spool, "<u2", "r")


def tokenized(texts: Sequence[str], eot: str, progress: Progress) -> Iterator[Tokens]:
    """The tokens of the texts, piece by piece."""
    done = 0

    def watched(text: Iterator[str]) -> Iterator[str]:
        nonlocal done
        for piece in text:
            yield piece
            done += len(piece.encode())
            progress.update(done)

    for name in texts:
        yield from encode_text(watched(read_text(name)), eot=eot)


def write(name: str, tokens: Tokens, shard_size: int | None, work: str) -> list[str]:
    """Write tokens as one file or as shards; return the files' names."""
    if shard_size is None:
        files = [(f"{name}.bin", tokens)]
    else:
        starts = range(0, len(tokens), shard_size)
        files = [(f"{name}_{i:06d}.bin", tokens[start : start + shard_size]) for i, start in enumerate(starts, 1)]
    for file, part in files:
        write_tokens(os.path.join(work, file), part)
    return [file for file, _ in files]


def described(first: str, files: int, tokens: int) -> str:
    """Some files in a few words."""
    return f"{first}{f' and {files - 1} more' if files > 1 else ''}: {tokens} tokens"


# ------------------------------------------------------------------------------------------------ a look into a shard


def show(path: str, count: int) -> None:
    """Print a shard's size, its first ids, and the text that they are."""
    check_stdout("the tokens")
    tokenizer = Tokenizer()
    tokens = read_tokens(path, V=tokenizer.V)
    ids = tokens[:count].tolist()
    header = f"{path}: {len(tokens)} tokens, {os.path.getsize(path)} bytes; the first {len(ids)}:"
    print(for_terminal(header, sys.stdout))
    print(*ids)
    content = tokenizer.decode_bytes(ids)
    if sys.stdout.isatty():
        print(for_terminal(content.decode("utf-8", "replace"), sys.stdout))
    else:  # as they are, also where they are no text
        sys.stdout.flush()
        sys.stdout.buffer.write(content + b"\n")
    sys.stdout.flush()
