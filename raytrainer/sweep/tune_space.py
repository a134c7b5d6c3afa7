"""Translate between a sweep's parameters and the domains and values of Tune's searchers and schedulers.

Tune gets plain numbers and texts, and names without `/`, which several searchers treat as nesting. A value outside the
space is moved to the nearest value inside.
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

# Keys in Tune's config of a trial for its id and its MLflow run. No parameter can have these names.
TRIAL, RUN = "|trial", "|run"


def tune_space(parameters: Iterable[Parameter]) -> dict[str, Domain]:
    """Return the search space as Tune's domains. Both ends are inclusive.

    A choice becomes its texts, because searchers compare values with `==`, by which 1 equals true. A range becomes the
    index of its value, because Tune's quantized domains hold multiples of the step, wherever the range begins. An
    interval stays an interval.
    """
    return {alias(p.key): domain(p) for p in parameters}


def domain(parameter: Parameter) -> Domain:
    """Return the domain of one parameter, for `tune_space`."""
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
    """Return the values of a range in their order, which may be descending."""
    low, high, step = parameter.low, parameter.high, parameter.step
    if not parameter.integer:
        return parameter.grid()
    assert isinstance(low, int)
    assert isinstance(high, int)
    assert isinstance(step, int)
    # Not `grid`, which limits the number of values: a range for a searcher may be long.
    return range(low, high + 1, step) if step > 0 else range(high, low - 1, step)


def _place(parameter: Parameter, value: float) -> int:
    """Return the index in `points` of the point that is nearest to a value."""
    values = points(parameter)
    first, last = values[0], len(values) - 1
    step = (values[-1] - first) // last if parameter.integer and last else (values[-1] - first) / max(last, 1)
    guess = min(max(int((value - first) // step) if step else 0, 0), last)
    return min(range(max(guess - 1, 0), min(guess + 2, last + 1)), key=lambda place: abs(values[place] - value))


def nearest(parameter: Parameter, value: Any) -> Any:
    """Return the parameter's value that is nearest to a value from a scheduler or searcher.

    Raises:
        ConfigError: The value cannot be compared: it is NaN, or it is not a number but the parameter's values are.
    """
    if parameter.kind == "choice":
        if parameter.contains(value):
            return next(v for v in parameter.values if parameter.override(v) == parameter.override(value))
        numbers = [v for v in parameter.values if _is_number(v)]
        if not numbers or not _is_number(value):
            raise ConfigError("was sampled with a value that it cannot have", key=parameter.key, value=value)
        return min(numbers, key=lambda number: abs(number - value))
    if not _is_number(value):
        raise ConfigError("was sampled with a value that is not a number", key=parameter.key, value=value)
    assert parameter.low is not None
    assert parameter.high is not None
    inside = min(max(value, parameter.low), parameter.high)
    if parameter.kind == "range":
        return points(parameter)[_place(parameter, inside)]
    return round(inside) if parameter.integer else float(inside)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def alias(key: str) -> str:
    """Return a searcher's name for a key. `|` never occurs in Hydra's keys."""
    return key.replace("/", "|")


def decoded(parameter: Parameter, element: Any) -> Any:
    """Return the parameter's value for an element of `domain` that a searcher sampled.

    Raises:
        ConfigError: No value corresponds to it.
    """
    value = element.item() if hasattr(element, "item") else element
    if parameter.kind == "choice" and str(value) in parameter.texts:
        return parameter.values[parameter.texts.index(str(value))]
    if parameter.kind == "range" and not parameter.log and _is_number(value):
        values = points(parameter)
        return values[min(max(round(value), 0), len(values) - 1)]
    return nearest(parameter, value)


def encoded(parameter: Parameter, value: Any) -> Any:
    """Return the element of `domain` for a value.

    Raises:
        ConfigError: The value cannot be compared with the parameter's values.
    """
    value = nearest(parameter, value)
    if parameter.kind == "choice":
        return parameter.override(value).partition("=")[2]
    if parameter.kind == "range" and not parameter.log:
        return _place(parameter, value)
    return value
