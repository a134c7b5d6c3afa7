"""Ctrl-C and SIGTERM of the launching process: the first asks training to stop, a second forces the end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from raytrainer.errors import Stopped

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}


class Interrupts:
    """A context in which both signals raise `Stopped` in the main thread, or are only noted while `deferred`.

    Attributes:
        count: How many came.
        exit_code: 130 or 143 once one came, by the first; else None.
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
            before = signal.signal(number, self._take)
            self._before.setdefault(number, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, before)  # type: ignore[arg-type]

    def note(self, which: signal.Signals) -> Stopped:
        """A signal that another handler took: counted as ours; the exception that tells it."""
        self.count += 1
        if self.exit_code is None:
            self.exit_code, self.reason = _EXIT_CODES[which], _NAMES[which]
        return Stopped(self.reason, exit_code=self.exit_code)

    @property
    def requested(self) -> bool:
        return self.count > 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        stopped = self.note(signal.Signals(number))
        if not self.deferred or self.count > 1:
            raise stopped
