"""Interrupt a job at every moment at which Python may run a signal's handler, one moment after the other.

Python looks for signals where a function begins, when a call of compiled code has returned, and where a loop jumps back.
Chance finds a window of some instructions once in a thousand runs. This search finds each one, every time, without a signal
and without a clock. Two signals may also arrive together: their handlers raise one at a time, the second where Python looks
next."""

import _thread
import dis
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any

from pygpt.commands.console import made_of_ctrl_c


def raise_ctrl_c() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt


def send_together(*numbers: signal.Signals) -> None:
    """Send signals that arrive together: only compiled code runs between them, so no handler is called before the last."""
    any(map(_thread.interrupt_main, numbers))


class Moment:
    """In a `with` block, call strike() at moment number `number` of this thread; `reached` becomes True if this moment came."""

    def __init__(self, number: int, strike: Callable[[], object]) -> None:
        self.number, self.strike, self.passed, self.reached = number, strike, 0, False
        self._last: dict[FrameType, int] = {}  # the instruction before, of each frame

    def __enter__(self) -> "Moment":
        self._before = sys.gettrace()
        sys.settrace(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._last.clear()

    def _look(self, frame: FrameType, event: str, _: object) -> "Callable[..., Any] | None":
        if frame.f_code is Moment.__exit__.__code__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "call":
            self._pass()
        elif event == "opcode":
            before, self._last[frame] = self._last.get(frame), frame.f_lasti
            if before is not None and looks(frame.f_code, before, frame.f_lasti):
                self._pass()
        elif event == "return" and frame.f_back is not None:
            self._last.pop(frame.f_back, None)
        return self._look

    def _pass(self) -> None:
        if self.passed == self.number and not self.reached:
            self.reached = True
            self.strike()
        self.passed += 1


def looks(code: CodeType, before: int, now: int) -> bool:
    """Whether Python looks for signals between these two instructions. An exception raised there belongs to the first one, so a
    place whose second instruction is in another `try` is left out."""
    name = dis.opname[code.co_code[before]]
    if not (name.startswith("CALL") or ("JUMP_BACKWARD" in name and now < before)) or "NO_INTERRUPT" in name:
        return False
    handlers = handlers_of(code)
    return handlers(before) == handlers(now)


@cache
def handlers_of(code: CodeType) -> Callable[[int], "int | None"]:
    """Where an exception of an instruction goes, as a function of its offset."""
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    return lambda offset: next((entry.target for entry in entries if entry.start <= offset < entry.end), None)


def moments(job: Callable[[], object], strike: Callable[[], object] = raise_ctrl_c) -> Iterator[bool]:
    """Do a job again and again, each time interrupted one moment later, until it ends before its moment comes. Yields after
    each: whether it raised a KeyboardInterrupt, itself or as the context of another exception. Raises any other."""
    gc.collect()
    gc.disable()  # finalizers of other tests' garbage would swallow the exception
    try:
        number = 0
        while True:
            moment = Moment(number, strike)
            came = False
            try:
                with moment:
                    job()
            except BaseException as error:
                came = made_of_ctrl_c(error)
                if not came:
                    raise
            if not moment.reached:
                return
            yield came
            number += 1
    finally:
        gc.enable()
