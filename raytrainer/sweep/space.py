"""A sweep's parameters as Tune's searchers take them, and what a searcher or scheduler returns as values of ours.

They see names without a `/`, which several take for nesting, and plain numbers and texts; a value that leaves the space
is put back into it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from ray import tune
from ray.tune.search.sample import Domain

from raytrainer.config import Parameter
from raytrainer.errors import ConfigError


def tune_space(parameters: Iterable[Parameter]) -> dict[str, Domain]:
    """The space as searchers take it.

    A choice is one of its texts: searchers compare values with `==`, where 1 and true are one. A range is the place of
    its value, from 0 at the least: Tune's quantized domains hold multiples of the step, whatever the range begins with.
    An interval is itself. Ends are inclusive.
    """
    return {alias(p.key): domain(p) for p in parameters}


def domain(parameter: Parameter) -> Domain:
    """One parameter of `tune_space`."""
    if parameter.kind == "choice":
        return tune.choice(list(parameter.texts))
    low, high = parameter.low, parameter.high
    if parameter.kind == "range" and not parameter.log:
        low, high = 0, len(points(parameter)) - 1
    elif not parameter.integer:
        return tune.loguniform(low, high) if parameter.log else tune.uniform(low, high)
    assert low is not None
    assert high is not None
    if low == high:
        return tune.choice([low])  # some searchers refuse a domain of one number
    return tune.lograndint(low, int(high) + 1) if parameter.log else tune.randint(low, int(high) + 1)


@cache
def points(parameter: Parameter) -> Sequence[float]:
    """The values of a range, as they were written: upwards or downwards."""
    low, high, step = parameter.low, parameter.high, parameter.step
    if not parameter.integer:
        return parameter.grid()
    assert isinstance(low, int)
    assert isinstance(high, int)
    assert isinstance(step, int)
    # Not the grid itself, which is bounded: a range to search may be long.
    return range(low, high + 1, step) if step > 0 else range(high, low - 1, step)


def _place(parameter: Parameter, value: float) -> int:
    """Where in `points` the nearest to a value stands."""
    found = points(parameter)
    first, last = found[0], len(found) - 1
    step = (found[-1] - first) // last if parameter.integer and last else (found[-1] - first) / max(last, 1)
    guess = min(max(int((value - first) // step) if step else 0, 0), last)
    return min(range(max(guess - 1, 0), min(guess + 2, last + 1)), key=lambda place: abs(found[place] - value))


def nearest(parameter: Parameter, value: Any) -> Any:
    """The value of the parameter that is nearest to one of a scheduler or searcher.

    Raises:
        ConfigError: It is not comparable: NaN, or no number where only those are.
    """
    if parameter.kind == "choice":
        if parameter.contains(value):
            return next(one for one in parameter.values if parameter.override(one) == parameter.override(value))
        numbers = [one for one in parameter.values if _is_number(one)]
        if not numbers or not _is_number(value):
            raise ConfigError("was drawn with a value that it cannot have", key=parameter.key, value=value)
        return min(numbers, key=lambda one: abs(one - value))
    if not _is_number(value):
        raise ConfigError("was drawn with a value that is no number", key=parameter.key, value=value)
    assert parameter.low is not None
    assert parameter.high is not None
    inside = min(max(value, parameter.low), parameter.high)
    if parameter.kind == "range":
        return points(parameter)[_place(parameter, inside)]
    return round(inside) if parameter.integer else float(inside)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def alias(key: str) -> str:
    """What a searcher calls a key. None of Hydra's has a `|`."""
    return key.replace("/", "|")


def decoded(parameter: Parameter, drawn: Any) -> Any:
    """The value that a searcher means by what it drew from `domain`.

    Raises:
        ConfigError: It means none.
    """
    value = drawn.item() if hasattr(drawn, "item") else drawn
    if parameter.kind == "choice" and str(value) in parameter.texts:
        return parameter.values[parameter.texts.index(str(value))]
    if parameter.kind == "range" and not parameter.log and _is_number(value):
        found = points(parameter)
        return found[min(max(round(value), 0), len(found) - 1)]
    return nearest(parameter, value)


def encoded(parameter: Parameter, value: Any) -> Any:
    """A value as an element of `domain`.

    Raises:
        ConfigError: It is nothing like the parameter's values.
    """
    value = nearest(parameter, value)
    if parameter.kind == "choice":
        return parameter.override(value).partition("=")[2]
    if parameter.kind == "range" and not parameter.log:
        return _place(parameter, value)
    return value
