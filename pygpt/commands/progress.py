"""A progress bar on stderr, drawn by tqdm. If tqdm is missing or stderr is not a terminal, no bar is drawn."""

import sys
from importlib import import_module
from typing import Any


class Progress:
    """Show how many of `total` items are done. Use it in a `with` block; the end of the block removes the bar.

    what: the name of the items, in the plural. done: the number of items done at the beginning.
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
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
