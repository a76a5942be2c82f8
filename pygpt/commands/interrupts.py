"""Ctrl-C in commands: it is never lost, and never said with a traceback. For commands only: a library leaves signals alone."""

import signal
import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType


def made_of_ctrl_c(error: BaseException | None) -> bool:
    """Whether an exception is, or came of, a KeyboardInterrupt: compiled code makes an ImportError or a SystemError of it, the
    body of a class a RuntimeError (before Python 3.12), another handler that raises its own exception."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class Interrupts:
    """In a `with` block of a command's main thread Ctrl-C raises KeyboardInterrupt, but where Python would lose it, or it would
    break what it meets, a little later:

    - when the import is over in which it came: compiled modules swallow it or make another error of it, weak references that
      imports use print and forget it, and what is left half-imported cannot be imported again. A second one does not wait.
    - after the finalizer (__del__, a callback of a weak reference) that it ended, where Python would print and forget it.

    It waits for that as a profiler does, which costs nothing while no Ctrl-C comes. One that is ignored stays so, and a
    handler that is not Python's own stays, too. Before the block, while a command is imported, and after it, while the
    interpreter ends, Ctrl-C ends the process as the system does: each script begins with that, and the block puts it back.
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
    """Raise KeyboardInterrupt at the first event of Python's profiler (a call, a return) after the caller's end for which now()
    says so."""
    here = sys._getframe()
    before = here, here.f_back

    def look(frame: "FrameType", event: str, _: object) -> None:
        if frame not in before and now(frame, event):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)
