"""Draw bars: of progress on stderr, by tqdm if it is there and stderr is a terminal, and of probabilities."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from shutil import get_terminal_size
from typing import Any, TextIO

BAR = 30  # columns of the longest bar of a table


class Progress:
    """Show how many of `total` items are done. Use it in a `with` block; the end of the block removes the bar.

    what: the name of the items, in the plural. done: the number of items done at the beginning."""

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self._bar: Any = None
        self._options = {"total": total, "initial": done, "unit": f" {what}"}

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` items are done, and a note such as ", loss 4.1". tqdm redraws at most ten times a second."""
        if self._bar is not None:
            self._bar.set_postfix_str(note.removeprefix(", "), refresh=False)
            self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        """Print a line to stdout, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def __enter__(self) -> "Progress":
        if sys.stderr is not None and sys.stderr.isatty():
            with suppress(ImportError):
                self._bar = import_module("tqdm").tqdm(**self._options, leave=False, dynamic_ncols=True, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def text_of(content: bytes) -> str | None:
    """Return the text of a token's bytes, or None for a part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def piece(content: bytes) -> str:
    """Return the text of a token in quotes, or its bytes if it is a part of a character."""
    return repr(content if (text := text_of(content)) is None else text)


def table(rows: Sequence[tuple[int, bytes, float]], stream: TextIO) -> str:
    """Return a line for each token (id, bytes, probability), with a bar that compares it with the first one."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    names = [piece(content).encode(encoding, "backslashreplace").decode(encoding) for _, content, _ in rows]
    width = max(map(len, names))
    longest = max(1, min(BAR, get_terminal_size((1000, 1)).columns - width - 19))
    block = "█" if "█".encode(encoding, "ignore") else "#"
    lines = [f"{'id':>6}  {'token':<{width}}  {'%':>7}"]
    for (token, _, probability), name in zip(rows, names, strict=True):
        bar = block * round(longest * probability / rows[0][2])
        lines.append(f"{token:>6}  {name:<{width}}  {100 * probability:7.3f}  {bar}".rstrip())
    return "\n".join(lines)
