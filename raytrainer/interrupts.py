"""Ctrl-C, SIGTERM and SIGHUP of the launching process: the first asks training to stop, a second forces the end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from raytrainer.errors import Stopped

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
_NAMES = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped by SIGHUP (its terminal was closed)",
}


class Interrupted(KeyboardInterrupt):
    """Raised where a signal finds the main thread, which may be in anybody's code: `except Exception` there must not
    take it for a failure of its own. Outside of `Interrupts` it is `Stopped`."""


class Interrupts:
    """A context in which these signals raise `Interrupted` in the main thread, or are only noted while `deferred`.

    What leaves the context is `Stopped`. A SIGHUP that was ignored at the start, as `nohup` does, stays ignored.

    Attributes:
        count: How many came.
        exit_code: 130, 143 or 129 once one came, by the first; else None.
        deferred: True: the first is noted, not raised; the second is raised all the same.
    """

    def __init__(self) -> None:
        self.count = 0
        self.exit_code: int | None = None
        self.reason = ""
        self.deferred = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        self.install()
        return self

    def install(self) -> None:
        """Sets the handlers (again: libraries set their own). Only a main thread can; another leaves signals alone."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _EXIT_CODES:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            before = signal.signal(number, self._take)
            self._before.setdefault(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, before)  # type: ignore[arg-type]
        if isinstance(error, Interrupted):
            raise self.stopped() from None

    def ask(self, reason: str, exit_code: int = 143) -> None:
        """As a first signal that is noted: somebody asked by another way."""
        self.count += 1
        if self.exit_code is None:
            self.exit_code, self.reason = exit_code, reason

    def check(self) -> None:
        """Raises `Interrupted` for a signal that was noted while `deferred`."""
        if self.requested:
            raise Interrupted(self.reason)

    def stopped(self) -> Stopped:
        """The error that tells the first signal."""
        return Stopped(self.reason, exit_code=self.exit_code or 130)

    @property
    def requested(self) -> bool:
        return self.count > 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        if which == signal.SIGHUP and self.requested:
            return  # a closed terminal sends several: the shell does, then the kernel. Nobody insists by it
        self.count += 1
        if self.exit_code is None:
            self.exit_code, self.reason = _EXIT_CODES[which], _NAMES[which]
        if not self.deferred or self.count > 1:
            raise Interrupted(self.reason)
