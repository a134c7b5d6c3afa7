"""Our own searchers: random draws and grids. Draw number n is a pure function of n, so that a resumed sweep samples the
same trials as an uninterrupted one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Domain, Integer

from raytrainer.config import Parameter

_TRIES = 20  # random attempts to find a combination that is new


class NumberedSearch(Searcher):  # type: ignore[misc]
    """The base of our own searchers. Draw number n, from 0, is a pure function of n, so a resumed sweep samples the
    same trials as an uninterrupted one."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0  # the number of the next draw, set when a sweep is resumed
        self.space: dict[str, Domain] = {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Domain], **spec: Any
    ) -> bool:
        self.space = dict(config)
        return True

    def suggest(self, trial_id: str) -> Any:
        values = self.draw(self.drawn)
        self.drawn += 1
        return self.FINISHED if values is None else values

    def draw(self, number: int) -> dict[str, Any] | None:
        """Return the values of a draw; None if there are no more."""
        raise NotImplementedError

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing, because draws do not depend on results."""


class RandomSearch(NumberedSearch):
    """Independent random draws from the space. In a space without float intervals, each combination comes once.

    Args:
        seed: None for the sweep's seed.

    Attributes:
        distinct: Whether each combination comes once. False for a population, whose members change during training.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed, self.distinct = seed or 0, True
        self._draws: list[dict[str, Any]] = []  # for a finite space: all draws from the first
        self._combinations: set[tuple[Any, ...]] = set()  # those of `_draws`

    def draw(self, number: int) -> dict[str, Any] | None:
        size = space_size(self.space.values()) if self.distinct else None
        if size is None:
            return self._sample(self._state(number))
        if number >= size:
            return None
        while len(self._draws) <= number:
            self._draws.append(self._new(len(self._draws), size))
            self._combinations.add(tuple(self._draws[-1].values()))
        return self._draws[number]

    def _new(self, number: int, size: int) -> dict[str, Any]:
        for attempt in ((), *((n,) for n in range(_TRIES))):
            values = self._sample(self._state(number, *attempt))
            if tuple(values.values()) not in self._combinations:
                return values
        # Few combinations are left, or the remaining ones are rare: take the next unused one after a random place.
        place = int(self._state(number, _TRIES).random_sample() * size)
        while tuple((values := _combination(self.space, place % size)).values()) in self._combinations:
            place += 1
        return values

    def _state(self, *numbers: int) -> np.random.RandomState:
        # RandomState, because NumPy guarantees that its stream never changes.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, *numbers))))

    def _sample(self, state: np.random.RandomState) -> dict[str, Any]:
        return {key: domain.sample(random_state=state) for key, domain in self.space.items()}


class GridSearch(NumberedSearch):
    """Every combination once, in the order of Hydra's own sweeps: the last parameter changes fastest."""

    def draw(self, number: int) -> dict[str, Any] | None:
        size = math.prod(len(_values(domain)) for domain in self.space.values())
        return _combination(self.space, number) if number < size else None


def _combination(space: Mapping[str, Domain], number: int) -> dict[str, Any]:
    """Return a combination by its number. The last parameter changes fastest."""
    axes = [_values(domain) for domain in space.values()]
    places = []
    for axis in reversed(axes):
        number, place = divmod(number, len(axis))
        places.append(place)
    return dict(zip(space, (a[p] for a, p in zip(axes, reversed(places), strict=True)), strict=True))


def space_size(domains: Iterable[Domain]) -> int | None:
    """Return the number of combinations; None if it is infinite."""
    axes = list(domains)
    if not all(isinstance(axis, Categorical | Integer) for axis in axes):
        return None
    return math.prod(len(_values(axis)) for axis in axes)


def grid_size(parameters: Iterable[Parameter]) -> int:
    """Return the number of combinations of a grid.

    Raises:
        ConfigError: One of the parameters is an interval, which has no grid.
    """
    return math.prod(len(p.grid()) for p in parameters)


def _values(domain: Domain) -> Sequence[Any]:
    if isinstance(domain, Categorical):
        return list(dict.fromkeys(domain.categories))
    assert isinstance(domain, Integer)
    return range(domain.lower, domain.upper)
