"""Run a call in a daemon thread and return its future: for requests that may take long, and for several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` in a thread that does not keep the process alive.

    Args:
        work: What to run.
        name: The thread's name.

    Returns:
        A future of the result, or of the exception.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  raised by `future.result()`
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
