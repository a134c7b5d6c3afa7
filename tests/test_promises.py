"""Time limits that a slow machine extends. Other tests rely on them, so they must be able to fail."""

from __future__ import annotations

import pytest

from tests import promises
from tests.promises import Within


def asked(monkeypatch: pytest.MonkeyPatch, slower: float) -> list[float]:
    """Pretend that the machine is slower by this factor. Return a list that grows with each measurement."""
    found: list[float] = []

    def slowness() -> float:
        found.append(slower)
        return slower

    monkeypatch.setattr(promises, "slowness", slowness)
    return found


def ago(limit_s: float, seconds: float) -> Within:
    within = Within(limit_s)
    within.began -= seconds
    return within


def test_who_is_in_time_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = asked(monkeypatch, 3.0)
    ago(1000.0, 900.0).check()
    assert measured == []


def test_a_slow_machine_has_as_much_more_and_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = asked(monkeypatch, 3.0)
    within = ago(1000.0, 2900.0)
    within.check()
    within.check()
    assert measured == [3.0]
    with pytest.raises(AssertionError, match=r"are promised, and here 3000\.0\nthe output"):
        ago(1000.0, 3100.0).check("the output")


def test_a_machine_that_is_not_slow_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, 1.0)
    with pytest.raises(AssertionError, match="1000 are promised"):
        ago(1000.0, 1001.0).check()
