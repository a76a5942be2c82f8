"""A bar on stderr that says how far a tool has come: tqdm's (the extra `tools`); nothing without it, or without a terminal."""

import sys
from importlib import import_module
from typing import Any


class Progress:
    """`total` things to do, of which update() says how many are done; use it in a `with` block, whose end wipes the bar.

    done: how many are done already.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self._bar: Any = None
        if sys.stderr is not None and sys.stderr.isatty():
            try:
                tqdm = import_module("tqdm").tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=done, unit=f" {what}", leave=False, dynamic_ncols=True, file=sys.stderr)

    def update(self, done: int, note: str = "") -> None:
        """Show it, ten times a second at most, and what else there is to note: ", loss 4.1"."""
        if self._bar is not None:
            self._bar.set_postfix_str(note.removeprefix(", "), refresh=False)
            self._bar.update(done - self._bar.n)

    def line(self, text: str) -> None:
        """Print to stdout, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
