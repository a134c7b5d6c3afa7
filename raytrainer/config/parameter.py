"""One parameter of a sweep: which values it may have, and the override that sets one."""

from __future__ import annotations

import decimal
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from raytrainer.errors import ConfigError

# A grid of more trials, or a range of more floats, is a mistake.
MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Attributes:
        key: As on the command line: `optimizer.lr`, `model` (a group), `+model.dropout`, `model@pkg`.
        kind: `choice`, `range` (equally spaced numbers) or `interval` (every number between two).
        values: Of a choice: int, float, bool, None or str each; a list or dict is its text.
        texts: Of a choice: what stands after the `=` for each value.
        low: Of a range or interval: the least value.
        high: The greatest. It is itself a value of a range and of an integer interval; one of floats may end before it.
        step: Of a range: the distance of two values, negative where the grid goes down from `high`.
        log: To be searched in the logarithm; then `low` is above 0, and the step of a range is 1 or -1.
        integer: Whether all values of a range or interval are integers.
        group: Whether it chooses a group's config instead of setting a value.
    """

    key: str
    kind: str
    values: tuple[Any, ...] = ()
    texts: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    log: bool = False
    integer: bool = False
    group: bool = False

    def override(self, value: Any) -> str:
        """The override that sets a value, which Hydra reads as the very same one, e.g. `optimizer.lr=0.01`.

        Bounds are not checked: a scheduler may leave them.

        Raises:
            ConfigError: A value that a choice does not have; no number, or no integer where only those are.
        """
        value = _plain(value)
        if self.kind == "choice":
            place = self._place(value)
            if place is None:
                raise ConfigError("is not a value of the sweep", key=self.key, value=value, choices=self.texts)
            return f"{self.key}={self.texts[place]}"
        number = self._number(value)
        if number is None:
            raise ConfigError(
                f"must be {'a whole number' if self.integer else 'a number'}, as every value of the sweep",
                key=self.key,
                value=value,
            )
        return f"{self.key}={number!r}"

    def contains(self, value: Any) -> bool:
        """Whether the sweep may take a value; one of a range of floats may be off by rounding."""
        value = _plain(value)
        if self.kind == "choice":
            return self._place(value) is not None
        number = self._number(value)
        if number is None or not math.isfinite(number):
            return False
        low, high, step = self._bounds()
        if self.kind == "interval":
            return low <= number <= high
        if self.integer:
            return low <= number <= high and (number - low) % int(step) == 0
        slack = 1e-6 * step + 4 * math.ulp(max(abs(low), abs(high)))
        if not low - slack <= number <= high + slack:
            return False
        return abs(low + round((number - low) / step) * step - number) <= slack

    def grid(self) -> tuple[Any, ...]:
        """The values of a grid, in the order in which they were written.

        Raises:
            ConfigError: For an interval, and for more than `MOST_VALUES`.
        """
        if self.kind == "choice":
            return self.values
        low, high, step = self._bounds()
        if self.kind == "interval":
            raise ConfigError(
                "is an interval, which has no grid: list values, as 0.1,0.01, or choose sweep=random",
                key=self.key,
                value=f"interval({low!r},{high!r})",
            )
        down = self.step is not None and self.step < 0
        if not self.integer:
            return tuple(_floats(high, low, -step) if down else _floats(low, high, step))
        count = (int(high) - int(low)) // int(step) + 1
        if count > MOST_VALUES:
            raise ConfigError(f"has {count} values, too many for a grid; choose sweep=random", key=self.key)
        first, last, stride = int(low), int(high), int(step)
        return tuple(range(last, first - 1, -stride) if down else range(first, last + 1, stride))

    def probes(self) -> tuple[Any, ...]:
        """The values worth checking before a sweep starts: all of a choice, both ends of a range or an interval."""
        if self.kind == "choice":
            return self.values
        return (self.low,) if self.low == self.high else (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, also strictly so: a float that is not finite is `{"float": "inf"}`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["values"] = [
            {"float": repr(v)} if isinstance(v, float) and not math.isfinite(v) else v for v in self.values
        ]
        return {**found, "texts": list(self.texts)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Parameter:
        """The parameter of a `to_dict`."""
        values = tuple(float(v["float"]) if isinstance(v, Mapping) else v for v in saved["values"])
        return cls(**{**saved, "values": values, "texts": tuple(saved["texts"])})

    def _bounds(self) -> tuple[float, float, float]:
        """low, high and the step's size."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high, abs(self.step or 0)

    def _number(self, value: Any) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            if not self.integer:
                return float(value)
            return int(value) if value == int(value) else None
        except (OverflowError, ValueError):  # no float that large; no integer of inf or nan
            return None

    def _place(self, value: Any) -> int | None:
        """The place of a value in `values`: of its very type (1, 1.0 and true differ), else an equal number's."""
        for place, one in enumerate(self.values):
            if repr(one) == repr(value):
                return place
        for place, one in enumerate(self.values):
            if one == value and not isinstance(one, bool) and not isinstance(value, bool):
                return place
        return None


def _floats(first: float, last: float, step: float) -> Iterator[float]:
    """The values of Hydra's range of floats: exact sums of the step, each then a float."""
    value, stride = decimal.Decimal(first), decimal.Decimal(step)
    while (float(value) <= last) if step > 0 else (float(value) >= last):
        yield float(value)
        value += stride


def _plain(value: Any) -> Any:
    """A sampler's number of NumPy is written as Python's."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.item() if hasattr(value, "item") else value
