"""A line on stderr that says how far a tool has come. It is written over and over, and nothing is where no terminal is."""

import sys
import time

EVERY_S = 0.1


class Progress:
    """`total` things to do, of which update() says how many are done; use it in a `with` block, whose end wipes the line."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._total = what, total
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Show it, ten times a second at most."""
        now = time.monotonic()
        if self._terminal and now - self._shown >= EVERY_S:
            self._shown = now
            share = f"{100 * done / self._total:.0f} %, " if self._total else ""
            self._write(f"{share}{done:,} {self._what}, {done / (now - self._start):,.0f}/s{note}")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._write("")
