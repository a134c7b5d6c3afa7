"""Handle Ctrl-C, SIGTERM and SIGHUP in the driver: the first asks training to stop, a second forces the end."""

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
    """The exception that a signal raises in the main thread. `Interrupts` turns it into `Stopped`.

    It is a KeyboardInterrupt, so that no `except Exception` catches it, whatever code is running at that moment.
    """


class Interrupts:
    """A context in which these signals raise `Interrupted` in the main thread, or are only recorded while `deferred`.

    The context raises `Stopped` to its caller. A SIGHUP that was ignored at the start, as by `nohup`, stays ignored.

    Attributes:
        count: The number of signals received.
        exit_code: 130, 143 or 129 by the first signal; None before it.
        reason: The first signal, as text.
        deferred: If True, the first signal is only recorded. A second one is raised in any case.
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
        """Set the handlers, again if a library has replaced them. Does nothing outside the main thread."""
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
        """Record a request to stop that came by another way than a signal."""
        self.count += 1
        if self.exit_code is None:
            self.exit_code, self.reason = exit_code, reason

    def check(self) -> None:
        """Raise `Interrupted` for a signal that was recorded while `deferred`."""
        if self.requested:
            raise Interrupted(self.reason)

    def stopped(self) -> Stopped:
        """Return the error for the first signal."""
        return Stopped(self.reason, exit_code=self.exit_code or 130)

    @property
    def requested(self) -> bool:
        return self.count > 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        which = signal.Signals(number)
        if which == signal.SIGHUP and self.requested:
            return  # a closed terminal sends several, from the shell and the kernel; they do not force the end
        self.count += 1
        if self.exit_code is None:
            self.exit_code, self.reason = _EXIT_CODES[which], _NAMES[which]
        if not self.deferred or self.count > 1:
            raise Interrupted(self.reason)
