"""`report`, for functions of other applications in a sweep: how far a trial has come, so that a bad one can be stopped.
Imports nothing: an application may have it in every run of its own.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

_listener: Callable[[float, int | None], None] | None = None


def report(value: Any, step: int | None = None) -> None:
    """Tells a sweep of `hydra/sweeper=ray_tune` what its trial has reached so far; without a sweep it does nothing.

    The sweep's scheduler may stop the trial here: the function is left by an exception that is no `Exception`, after
    its `finally` clauses. The value of a trial that goes on is what its function returns.

    Args:
        value: A number: of the kind that the function returns, or another one of which the better is the better trial.
            NaN and infinities are the worst there is.
        step: How far the trial is, for people; by default the number of the call. Schedulers count calls.

    Raises:
        TypeError: `value` is no number.
        RuntimeError: In a sweep, in another thread than the function was called in.
    """
    number = as_number(value)
    if number is None:
        raise TypeError(f"report takes a number, not {described(value)}")
    if _listener is not None:
        _listener(number, step)


@contextlib.contextmanager
def listening(listener: Callable[[float, int | None], None]) -> Iterator[None]:
    """For as long as the context is entered, `report` in this process tells `listener`."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def as_number(value: Any) -> float | None:
    """A number as a float, also NumPy's and an array's or tensor's only element; None: it is none."""
    if hasattr(value, "item") and getattr(value, "size", 1) != 0:
        with contextlib.suppress(Exception):  # more than one element, whatever its library raises
            value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer that no float holds
        return math.nan


def described(value: Any) -> str:
    """A value that is no number, in words."""
    if value is None:
        return "None"
    size = f" of {len(value)}" if isinstance(value, tuple | list | dict) else ""
    return f"a {type(value).__name__}{size}"
