"""Ctrl-C in commands: it always takes effect, and never prints a traceback. A library must leave signals alone."""

import signal
import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType


def made_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether an exception is a KeyboardInterrupt or was caused by one.

    Compiled code turns it into an ImportError or a SystemError, the body of a class into a RuntimeError (before Python 3.12),
    and a handler may raise an exception of its own.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class Interrupts:
    """Raise KeyboardInterrupt for Ctrl-C in a `with` block of a command's main thread, if necessary a little later:

    - During an import: when the outermost import has ended. Compiled modules would swallow the exception or turn it into
      another one, and a half-imported module cannot be imported again. A second Ctrl-C does not wait.
    - In a finalizer (__del__, a callback of a weak reference): after the finalizer. Python would print and forget it there.

    The wait uses Python's profiler hook, which costs nothing while no Ctrl-C comes. If SIGINT is ignored, or has a handler that
    is not Python's own, nothing changes. Before the block (the command is imported) and after it (the interpreter ends), Ctrl-C
    ends the process by its signal: each script begins with that setting, and the block restores it.
    """

    def __enter__(self) -> None:
        self._base, self._hook, self._before = sys._getframe(1), sys.unraisablehook, signal.getsignal(signal.SIGINT)
        self._ours = self._before == signal.SIG_DFL or self._before is signal.default_int_handler
        if self._ours:
            try:
                signal.signal(signal.SIGINT, self._on_ctrl_c)
                sys.unraisablehook = self._on_lost
            except ValueError:  # not the main thread, the only one that signals interrupt
                self._ours = False

    def __exit__(self, *_: object) -> None:
        if self._ours:
            sys.unraisablehook = self._hook
            signal.signal(signal.SIGINT, self._before)
        del self._base

    def _on_ctrl_c(self, _: int, frame: "FrameType | None") -> None:
        """The signal's handler."""
        outermost = None  # of the import's frames, if there is an import
        while frame is not None and frame is not self._base:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                outermost = frame
            frame = frame.f_back
        if outermost is None or sys.getprofile() is not None:
            raise KeyboardInterrupt
        raise_later(lambda frame, event: frame is outermost and event == "return")

    def _on_lost(self, lost: "sys.UnraisableHookArgs") -> None:
        """Python's hook for exceptions that nobody can catch."""
        if issubclass(lost.exc_type, KeyboardInterrupt) and sys.getprofile() is None:
            raise_later(lambda frame, event: True)
        else:
            self._hook(lost)


def raise_later(now: "Callable[[FrameType, str], bool]") -> None:
    """Raise KeyboardInterrupt at the first event of Python's profiler (a call, a return) that now() accepts, after the caller
    has returned."""
    here = sys._getframe()
    before = here, here.f_back

    def look(frame: "FrameType", event: str, _: object) -> None:
        if frame not in before and now(frame, event):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)
