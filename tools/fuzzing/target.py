"""What a target of the fuzzer is: a way to make inputs, and a way to try one that says what became of it."""

import json
import os
import re
import shutil
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from pygpt import PyGPTError

from .mutate import mutate_bytes

LONGEST_MESSAGE = 1500  # characters: one clear line, a path in it


class Finding(Exception):
    """What must not happen, in a few words."""


class LeftOut(Exception):
    """An input that cannot be judged: it would take too long, or its answer is chance."""


class Target(ABC):
    """One reader, command or interface. `folder` is a folder of the target's own, empty before every input.

    seeds() are sound inputs. run() tries one and returns a label for what it did; it may raise PyGPTError, a refusal, and
    Finding; every other exception is a finding, too. Inputs are bytes, whatever they stand for.
    """

    name: str
    batch = 1000  # executions of one child process: what they leave behind ends with it

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:  # noqa: B027 (most need nothing)
        """Make what run() needs and seeds() and mutate() do not."""

    def close(self) -> None:  # noqa: B027
        """Let go of it."""

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Sound inputs to begin with: the same ones each time."""

    @abstractmethod
    def run(self, data: bytes) -> str:
        """Try one input."""

    def mutate(self, random: Random, data: bytes, other: bytes) -> bytes:
        """Change an input; `other` is another one, for parts of it."""
        return mutate_bytes(random, data, other)


def attempt(target: Target, data: bytes) -> tuple[str, str]:
    """Try one input: ("ok", label), ("refused", skeleton of the message) or ("finding", what)."""
    empty(target.folder)
    try:
        label = target.run(data)
    except Finding as finding:
        return "finding", str(finding)
    except LeftOut:
        return "ok", "left out"
    except PyGPTError as error:
        return _judge_refusal(error, target.folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "finding", "an exception that is no PyGPTError: " + "".join(traceback.format_exception(error))
    if left := [path.name for path in target.folder.rglob("*") if path.name.endswith(".tmp")]:
        return "finding", f"left half-written: {left}"
    return "ok", label


def _judge_refusal(error: PyGPTError, folder: Path) -> tuple[str, str]:
    """A message is one line of a length that can be read, and nothing half-written stays behind."""
    text = str(error).replace(str(folder), "")
    if not text.strip() or "\n" in text or len(text) > LONGEST_MESSAGE:
        return "finding", f"not a clear line of up to {LONGEST_MESSAGE} characters: {type(error).__name__}: {text[:3000]!r}"
    if left := [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]:
        return "finding", f"left half-written: {left}"
    return "refused", f"{type(error).__name__}: {skeleton(text)}"


def skeleton(text: str) -> str:
    """What is left of a message without the values in it: messages of one kind have the same."""
    text = re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "_", text)
    text = re.sub(r"\b(example|token|tensor|field|row) \S+", r"\1 _", text)
    return re.sub(r"[-+.\w]*\d[-+.\w]*", "_", text)[:80]


@contextmanager
def agreeing(sound: bool, what: str) -> Iterator[None]:
    """In this block a reader reads what another parser found sound, or unsound: it must find the same."""
    try:
        yield
    except PyGPTError as error:
        if sound:
            raise Finding(f"a sound {what} is refused: {error}") from error
        raise
    if not sound:
        raise Finding(f"accepted, and it is no sound {what}")


def same(what: str, found: object, expected: object) -> None:
    """Raise a Finding unless two values are equal."""
    if found != expected:
        raise Finding(f"{what} is {found!r:.200}, expected {expected!r:.200}")


def empty(folder: Path) -> None:
    """Delete everything in a folder. Files are not written anew in place: an older map may still view them."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def pack(files: dict[str, bytes]) -> bytes:
    """Several files as one input."""
    return b"".join(f"{len(data)} {name}\n".encode("utf-8", "surrogateescape") + data for name, data in files.items())


def unpack(data: bytes) -> dict[str, bytes]:
    """The files of an input; whatever is no such input has none."""
    files: dict[str, bytes] = {}
    while match := re.match(rb"(\d{1,9}) ([\w.-]{1,80})\n", data):
        end = match.end() + int(match[1])
        files[match[2].decode()] = data[match.end() : end]
        data = data[end:]
    return files


def load_json(data: bytes) -> object:
    """An input that is JSON; None for what is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
