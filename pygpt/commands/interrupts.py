"""Ctrl-C in commands: it always takes effect and never prints a traceback. Only commands use this: a library must not handle
signals."""

import signal
import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType


def made_of_ctrl_c(error: BaseException | None) -> bool:
    """Return whether an exception is a KeyboardInterrupt or was caused by one.

    Compiled code can turn a KeyboardInterrupt into an ImportError or a SystemError. Before Python 3.12, a class body turns it
    into a RuntimeError. An exception handler may raise another exception."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class Interrupts:
    """Raise KeyboardInterrupt for Ctrl-C in a `with` block of a command's main thread. Two cases delay it:

    - During an import, raise it after the outermost import. Compiled modules would swallow the exception or replace it, and a
      half-imported module cannot be imported again. A second Ctrl-C raises it immediately.
    - In a finalizer (__del__, a callback of a weak reference), raise it after the finalizer. There, Python would only print it.

    The delay uses Python's profiler hook, which costs nothing until Ctrl-C is pressed. If SIGINT is ignored, or has a handler
    other than Python's, nothing changes. Before the block (during the command's imports) and after it (at the interpreter's
    exit), Ctrl-C ends the process by the signal: each script begins with that setting, and the block restores it."""

    def __enter__(self) -> None:
        self._base, self._hook, self._before = sys._getframe(1), sys.unraisablehook, signal.getsignal(signal.SIGINT)
        self._ours = self._before == signal.SIG_DFL or self._before is signal.default_int_handler
        if self._ours:
            try:
                signal.signal(signal.SIGINT, self._on_ctrl_c)
                sys.unraisablehook = self._on_lost
            except ValueError:  # not the main thread: signals interrupt only the main thread
                self._ours = False

    def __exit__(self, *_: object) -> None:
        if self._ours:
            sys.unraisablehook = self._hook
            signal.signal(signal.SIGINT, self._before)
        del self._base

    def _on_ctrl_c(self, _: int, frame: "FrameType | None") -> None:
        """Handle SIGINT: raise KeyboardInterrupt now, or after the current import."""
        outermost = None  # the outermost frame of the current import, if there is one
        while frame is not None and frame is not self._base:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                outermost = frame
            frame = frame.f_back
        if outermost is None or sys.getprofile() is not None:
            raise KeyboardInterrupt
        raise_later(lambda frame, event: frame is outermost and event == "return")

    def _on_lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """Handle an exception that Python cannot propagate (sys.unraisablehook)."""
        if issubclass(lost.exc_type, KeyboardInterrupt) and sys.getprofile() is None:
            raise_later(lambda frame, event: True)
        else:
            self._hook(lost)


def raise_later(now: "Callable[[FrameType, str], bool]") -> None:
    """Raise KeyboardInterrupt at the first profiler event (a call or return) that now() accepts after the caller returned."""
    here = sys._getframe()
    before = here, here.f_back

    def look(frame: "FrameType", event: str, _: object) -> None:
        if frame not in before and now(frame, event):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)
