"""What a system does that fails, has no room, lacks a package, or lets another process change a file at the wrong moment.

An input's "faults" are a list of [call, number, how]: the call of this function from pygpt's own code that has this number, 1
being the first, goes wrong. `how` is the name of an errno, or one of HOWS. Two more: ["limit", bytes, ""] lets no file grow
beyond so many bytes (the system itself does it: RLIMIT_FSIZE), and ["system", 0, NAME] is a sys.platform. Whatever is no such
entry is passed over.
"""

import builtins
import errno
import fcntl
import io
import mmap
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

PACKAGE = str(Path(__file__).resolve().parents[2] / "pygpt") + os.sep
COMMON = PACKAGE + "cli.py"  # it says what went wrong: a second fault there would be one too many
CALLS: dict[str, tuple[Any, str]] = {
    "open": (builtins, "open"), "import": (builtins, "__import__"), "mmap": (mmap, "mmap"), "lock": (fcntl, "flock"),
    "room": (shutil, "disk_usage"),
    **{name: (os, name) for name in ("fdopen", "fstat", "fsync", "makedirs", "mkdir", "read", "replace")},
    "os.open": (os, "open"),
}  # fmt: skip
ERRORS = ("EACCES", "EAGAIN", "EEXIST", "EIO", "EMFILE", "ENOENT", "ENOMEM", "ENOSPC", "EROFS")
# Ctrl-C and no memory in the middle of the call; half of the bytes that it gives, and no room on the disk; and what another
# process does to the call's file just before.
HOWS = ("interrupt", "memory", "half", "cut", "grow", "touch", "remove")
SYSTEMS = ("darwin", "linux", "freebsd14")


def draw(random: Random) -> list[Any]:
    """Any fault."""
    kind = random.random()
    if kind < 0.15:
        return ["limit", random.choice((0, 1, 100, 1023, 1024, 1500, 4000)), ""]
    if kind < 0.2:
        return ["system", 0, random.choice(SYSTEMS)]
    return [random.choice(list(CALLS)), random.choice((1, 1, 1, 2, 2, 3, 4, 6)), random.choice((*ERRORS, *HOWS))]


@contextmanager
def failing(plan: object, folder: Path) -> Iterator[set[str]]:
    """In this block the system fails as planned. Gives the names of the files in `folder` that another process changes; no
    file elsewhere is touched."""
    faults = Faults(folder)
    with ExitStack() as stack:
        for entry in plan if isinstance(plan, list) else []:
            match entry:
                case ["limit", int(most), _] if 0 <= most < 1 << 30:
                    stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
                    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
                case ["system", _, str(name)] if name in SYSTEMS:
                    stack.enter_context(patch.object(sys, "platform", name))
                case [str(call), int(number), str(how)] if call in CALLS:
                    faults.planned.setdefault((call, number), how)
        for call, (owner, name) in CALLS.items() if faults.planned else ():
            stack.enter_context(patch.object(owner, name, faults.wrapped(call, getattr(owner, name))))
        yield faults.changed


class Faults:
    """Counts the calls and has the planned ones go wrong."""

    def __init__(self, folder: Path) -> None:
        self.planned: dict[tuple[str, int], str] = {}
        self.changed: set[str] = set()
        self._folder = folder
        self._counts = dict.fromkeys(CALLS, 0)
        self._mapped: set[tuple[int, int]] = set()  # files that a map may view

    def wrapped(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that counts its calls from pygpt."""

        def instead(*arguments: Any, **options: Any) -> Any:
            code = sys._getframe(1).f_code
            if not code.co_filename.startswith(PACKAGE) or code.co_filename == COMMON:
                return function(*arguments, **options)
            if call == "import" and (code.co_name == "<module>" or arguments[0].startswith("pygpt") or arguments[4:] > (0,)):
                return function(*arguments, **options)  # another package's, in a function: no module is left half imported
            self._counts[call] += 1
            how = self.planned.get((call, self._counts[call]))
            if how is not None:
                self._fail(call, how, arguments)
            if call == "mmap" and (place := _status(arguments[0])) is not None:
                self._mapped.add((place.st_dev, place.st_ino))
            result = function(*arguments, **options)
            return _half(call, arguments, result) if how == "half" else result

        return instead

    def _fail(self, call: str, how: str, arguments: tuple[Any, ...]) -> None:
        """Raise what is planned, or change the call's file."""
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "memory":
            raise MemoryError
        if how in ERRORS:
            if call == "import":
                raise ModuleNotFoundError(f"No module named {arguments[0]!r}", name=arguments[0])
            code, names = getattr(errno, how), [one for one in arguments if isinstance(one, str)]
            second = [None, names[1]] if call == "replace" else []  # as the system's own errors have it
            raise OSError(code, os.strerror(code), *names[:1], *second)
        if how in ("cut", "grow", "touch", "remove") and (status := _status(arguments[0])) is not None:
            for path in self._folder.rglob("*"):
                if path.is_file() and os.path.samestat(path.stat(), status):
                    self._change(how, path, status)

    def _change(self, how: str, path: Path, status: os.stat_result) -> None:
        """What another process does to a file."""
        if how == "cut" and (status.st_dev, status.st_ino) in self._mapped:
            return  # it would end this process, as it should
        self.changed.add(str(path.relative_to(self._folder)))
        if how == "cut":
            os.truncate(path, status.st_size // 2)
        elif how == "grow":
            with path.open("ab") as file:
                file.write(b"more")
        elif how == "touch":
            os.utime(path, ns=(0, 1))
        else:
            path.unlink()


def _status(handle: Any) -> os.stat_result | None:
    """The status of a call's file, given as a path, a descriptor or an open file; None for no file."""
    try:
        return os.stat(handle if isinstance(handle, str | int) else handle.fileno())
    except (OSError, ValueError, AttributeError):
        return None


def _half(call: str, arguments: tuple[Any, ...], result: Any) -> Any:
    """Half of what a call gives."""
    if call == "open" and arguments[1:] == ("rb",):
        with result:
            content = result.read()
        return io.BytesIO(content[: len(content) // 2])
    if call == "room":
        return result._replace(free=0)
    return result[: len(result) // 2] if isinstance(result, bytes) else result
