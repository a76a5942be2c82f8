"""Every moment of a program at which Python may run a signal's handler, one after the other: where Ctrl-C would take effect.

Python looks for signals where a function begins, when a call has returned, and where a loop jumps back (its eval breaker);
in between, and in compiled code, nothing interrupts it. Chance finds a window of some instructions once in a thousand runs;
this finds each one, every time, without a signal and without a clock.
"""

import dis
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class Moment:
    """In a `with` block, raise KeyboardInterrupt at moment number `number` of this thread; `passed` counts those before it."""

    def __init__(self, number: int) -> None:
        self.number, self.passed, self.reached = number, 0, False
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
            if before is not None and looks(frame.f_code.co_code[before]):
                self._pass()
        return self._look

    def _pass(self) -> None:
        if self.passed == self.number and not self.reached:
            self.reached = True
            raise KeyboardInterrupt
        self.passed += 1


def looks(opcode: int) -> bool:
    """Whether Python looks for signals once this instruction is done."""
    name = dis.opname[opcode]
    return name.startswith(("CALL", "JUMP_BACKWARD")) and "NO_INTERRUPT" not in name


def moments(job: Callable[[], object]) -> Iterator[bool]:
    """Do a job again and again, each time interrupted one moment later, until it ends before its moment comes. Yields after
    each: whether a KeyboardInterrupt came out of it."""
    number = 0
    while True:
        moment = Moment(number)
        came = False
        try:
            with moment:
                job()
        except KeyboardInterrupt:
            came = True
        if not moment.reached:
            return
        yield came
        number += 1
