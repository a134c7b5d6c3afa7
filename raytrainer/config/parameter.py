"""A parameter of a sweep: the values that it may have, and the override that sets one."""

from __future__ import annotations

import decimal
import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from raytrainer.errors import ConfigError

# A grid with more trials, or a range with more floats, must be a mistake.
MOST_VALUES = 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Attributes:
        key: The key as on the command line: `optimizer.lr`, `model` (a group), `+model.dropout`, `model@pkg`.
        kind: `choice`, `range` (equally spaced numbers) or `interval` (every number between two).
        values: The values of a choice: int, float, bool, None or str; a list or dict is kept as its text.
        texts: The text after the `=` for each value of a choice.
        low: The least value of a range or interval.
        high: The greatest value. A range and an integer interval include it; an interval of floats may end before it.
        step: The distance between two values of a range; negative if the grid goes down from `high`.
        log: Whether to search on a logarithmic scale. Then `low` is above 0, and the step of a range is 1 or -1.
        integer: Whether all values of a range or interval are integers.
        group: Whether it chooses a config of a group instead of setting a value.
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
        """Return the override that sets a value, e.g. `optimizer.lr=0.01`. Hydra parses it to the same value.

        Bounds are not checked, because a scheduler may exceed them.

        Raises:
            ConfigError: The value is not in the choice, not a number, or not an integer although all values are.
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
        """Return whether a value belongs to the sweep. Rounding errors are accepted in a range of floats."""
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
        """Return the values of a grid, in the order in which they were written.

        Raises:
            ConfigError: The parameter is an interval, or has more than `MOST_VALUES` values.
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
        """Return the values to check before a sweep starts: all of a choice, both ends of a range or an interval."""
        if self.kind == "choice":
            return self.values
        return (self.low,) if self.low == self.high else (self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """Return the parameter as values for strict JSON: a float that is not finite becomes `{"float": "inf"}`."""
        saved = {f.name: getattr(self, f.name) for f in fields(self)}
        saved["values"] = [
            {"float": repr(v)} if isinstance(v, float) and not math.isfinite(v) else v for v in self.values
        ]
        return {**saved, "texts": list(self.texts)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Parameter:
        """Return the parameter from the result of `to_dict`."""
        values = tuple(float(v["float"]) if isinstance(v, Mapping) else v for v in saved["values"])
        return cls(**{**saved, "values": values, "texts": tuple(saved["texts"])})

    def _bounds(self) -> tuple[float, float, float]:
        """Return low, high and the absolute value of the step."""
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
        except (OverflowError, ValueError):  # too large for a float, or inf or nan for an integer
            return None

    def _place(self, value: Any) -> int | None:
        """Return the index in `values` of the same value and type (1, 1.0 and true differ), else of an equal number."""
        same = (i for i, choice in enumerate(self.values) if repr(choice) == repr(value))
        equal = (
            i
            for i, choice in enumerate(self.values)
            if choice == value and not isinstance(choice, bool) and not isinstance(value, bool)
        )
        return next(same, next(equal, None))


def _floats(first: float, last: float, step: float) -> Iterator[float]:
    """Yield the values of Hydra's range of floats: exact sums of the step, each converted to a float."""
    value, stride = decimal.Decimal(first), decimal.Decimal(step)
    while (float(value) <= last) if step > 0 else (float(value) >= last):
        yield float(value)
        value += stride


def _plain(value: Any) -> Any:
    """Convert a NumPy number, which a sampler may return, to a Python number."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.item() if hasattr(value, "item") else value
