"""`report`, with which the function of a Hydra application reports a trial's value to its sweep, so that the sweep can
stop a bad trial. It imports only the standard library, so an application can use it in all of its runs.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

_listener: Callable[[float, int | None], None] | None = None


def report(value: Any, step: int | None = None) -> None:
    """Report the current value of a trial to a sweep of `hydra/sweeper=ray_tune`. Outside a sweep it does nothing.

    The sweep's scheduler may stop the trial here. Then this call raises a `BaseException` that is not an `Exception`,
    and the `finally` blocks of the function run. The final value of a trial is the value that its function returns.

    Args:
        value: A number by which schedulers compare trials. It may be another quantity than the returned one, if the
            same direction is better. NaN and infinity count as the worst value.
        step: The progress of the trial, for display. The default is the number of the call. Schedulers count calls.

    Raises:
        TypeError: `value` is not a number.
        RuntimeError: The call in a sweep is in another thread than the function.
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"report takes a number, not {described(value)}")
    if _listener is not None:
        _listener(number, step)


@contextlib.contextmanager
def listening(listener: Callable[[float, int | None], None]) -> Iterator[None]:
    """Pass every call of `report` in this process to `listener` while the context is open."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def as_number(value: Any) -> float | None:
    """Return a number, or the only element of an array or tensor, as a float; None if it is not a number."""
    if hasattr(value, "item") and getattr(value, "size", 1) != 0:
        with contextlib.suppress(Exception):  # more than one element; each library raises its own error
            value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that is too large for a float
        return math.nan


def described(value: Any) -> str:
    """Return a text that describes a value that is not a number."""
    if value is None:
        return "None"
    size = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return f"a {type(value).__name__}{size}"
