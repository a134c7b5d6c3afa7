"""The source of a sweep's trials. `Draws` gives Tune the unfinished trials of the journal, then new ones from any of
Tune's searchers, to which it reports all ended trials. Private attributes were checked in ray 2.60 (`ray/tune/search`).
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.sample import Categorical, Domain, Integer

from raytrainer.config import Parameter, bind, build, locate
from raytrainer.config.nodes import SUPPLIED
from raytrainer.errors import ConfigError
from raytrainer.sweep.journal import WORST, Mode, Trial, TrialJournal, worst
from raytrainer.sweep.space import alias, decoded, encoded, tune_space
from raytrainer.sweep.trial_state import Status

__all__ = [
    "Draws",
    "GridSearch",
    "RandomSearch",
    "Translated",
    "check_search",
    "grid_size",
    "make_search",
    "tell",
    "total_of",
    "tune_space",
    "worst",
]

# The modules of Tune's searchers → the modules that they import → the names of their packages for pip.
LIBRARIES: Mapping[str, Mapping[str, str]] = {
    "ray.tune.search.ax": {"ax": "ax-platform"},
    "ray.tune.search.bayesopt": {"bayes_opt": "bayesian-optimization"},
    "ray.tune.search.bohb": {"hpbandster": "hpbandster", "ConfigSpace": "ConfigSpace"},
    "ray.tune.search.hebo": {"hebo": "HEBO"},
    "ray.tune.search.hyperopt": {"hyperopt": "hyperopt"},
    "ray.tune.search.nevergrad": {"nevergrad": "nevergrad"},
    "ray.tune.search.optuna": {"optuna": "optuna"},
    "ray.tune.search.zoopt": {"zoopt": "zoopt"},
    "optuna": {"optuna": "optuna"},
}
_SEEDS = ("seed", "random_state_seed", "random_state")  # the searchers' names of this argument
# Keys in Tune's config of a trial for its id and its MLflow run. No parameter can have these names.
TRIAL, RUN = "|trial", "|run"
_TRIES = 20  # random attempts to find a combination that is new


# --- our own searchers ----------------------------------------------------------------------------------------------


class _OwnSearch(Searcher):  # type: ignore[misc]
    """The base of our own searchers. Draw number n, from 0, is a pure function of n, so a resumed sweep samples the
    same trials as an uninterrupted one."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0  # the number of the next draw, set when a sweep is resumed
        self.space: dict[str, Domain] = {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Domain], **spec: Any
    ) -> bool:
        self._metric, self._mode, self.space = metric, mode, dict(config)
        return True

    def suggest(self, trial_id: str) -> Any:
        found = self.draw(self.drawn)
        self.drawn += 1
        return self.FINISHED if found is None else found

    def draw(self, number: int) -> dict[str, Any] | None:
        """Return the values of a draw; None if there are no more."""
        raise NotImplementedError

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing, because draws do not depend on results."""


class RandomSearch(_OwnSearch):
    """Independent random draws from the space. In a space without float intervals, each combination comes once.

    Args:
        seed: None for the sweep's seed.

    Attributes:
        distinct: Whether each combination comes once. False for a population, whose members change during training.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed, self.distinct = seed or 0, True
        self._found: list[dict[str, Any]] = []  # for a finite space: all draws from the first
        self._seen: set[tuple[Any, ...]] = set()

    def draw(self, number: int) -> dict[str, Any] | None:
        size = _size(self.space.values()) if self.distinct else None
        if size is None:
            return self._sample(self._state(number))
        if number >= size:
            return None
        while len(self._found) <= number:
            self._found.append(self._new(len(self._found), size))
            self._seen.add(tuple(self._found[-1].values()))
        return self._found[number]

    def _new(self, number: int, size: int) -> dict[str, Any]:
        for more in ((), *((again,) for again in range(_TRIES))):
            found = self._sample(self._state(number, *more))
            if tuple(found.values()) not in self._seen:
                return found
        # Few combinations are left, or the remaining ones are rare: take the next unused one after a random place.
        place = int(self._state(number, _TRIES).random_sample() * size)
        while tuple((found := _combination(self.space, place % size)).values()) in self._seen:
            place += 1
        return found

    def _state(self, *of: int) -> np.random.RandomState:
        # RandomState, because NumPy guarantees that its stream never changes.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, *of))))

    def _sample(self, state: np.random.RandomState) -> dict[str, Any]:
        return {key: domain.sample(random_state=state) for key, domain in self.space.items()}


class GridSearch(_OwnSearch):
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


def _size(domains: Iterable[Domain]) -> int | None:
    """Return the number of combinations; None if it is infinite."""
    found = list(domains)
    return (
        math.prod(len(_values(d)) for d in found) if all(isinstance(d, Categorical | Integer) for d in found) else None
    )


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


# --- searchers of other libraries -----------------------------------------------------------------------------------


class Translated(Searcher):  # type: ignore[misc]
    """Any searcher, with our keys and values. It gets the space as `tune_space` gives it, and the values that it
    samples are moved into the space. `make_search` builds it."""

    def __init__(self, inner: Searcher, parameters: Sequence[Parameter]) -> None:
        super().__init__()
        self.inner, self.parameters, self._has_space = inner, list(parameters), False

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Domain], **spec: Any
    ) -> bool:
        """Give the inner searcher its space, the first time only. `config` is not used.

        Raises:
            ConfigError: The inner searcher does not support these parameters.
        """
        if not self._has_space:
            self._metric, self._mode, self._has_space = metric, mode, True
            try:
                self.inner.set_search_properties(metric, mode, tune_space(self.parameters))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ConfigError(f"cannot search this space: {error}", key="sweep.search_alg") from error
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the values by key, `FINISHED`, or None if there is no suggestion yet.

        Raises:
            ConfigError: The searcher gave no value for a parameter, or one that the parameter cannot have.
        """
        drawn = self.inner.suggest(trial_id)
        if drawn is None or drawn == self.FINISHED:
            return drawn
        missing = [p.key for p in self.parameters if alias(p.key) not in drawn]
        if missing:
            raise ConfigError(f"got no value from {type(self.inner).__name__}", key=missing[0])
        return {p.key: decoded(p, drawn[alias(p.key)]) for p in self.parameters}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        self.inner.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        self.inner.on_trial_complete(trial_id, result=result, error=error)

    def on_pause(self, trial_id: str) -> None:
        if hasattr(self.inner, "on_pause"):
            self.inner.on_pause(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        if hasattr(self.inner, "on_unpause"):
            self.inner.on_unpause(trial_id)

    @property
    def takes_points(self) -> bool:
        """Whether the searcher accepts trials that it has not sampled."""
        return type(self.inner).add_evaluated_point is not Searcher.add_evaluated_point

    def add_evaluated_point(
        self, parameters: Mapping[str, Any], value: float | None, error: bool = False, **more: Any
    ) -> None:
        """Add a trial that the searcher has not sampled. `value` is None if the trial failed (`error`).

        Raises:
            KeyError, ValueError, ConfigError: The trial is not in the space.
        """
        point = {alias(p.key): encoded(p, parameters[p.key]) for p in self.parameters}
        self.inner.add_evaluated_point(point, value, error=error, **more)


def check_search(
    node: Mapping[str, Any] | None, parameters: Sequence[Parameter] = (), *, key: str = "sweep.search_alg"
) -> None:
    """Check a searcher before Ray starts.

    Raises:
        ConfigError: A library is missing (the error has the command that installs it), the target is not a searcher or
            refuses its arguments, or a grid search has an interval.
    """
    if not node:
        return
    for path in _paths(node):
        for module, libraries in LIBRARIES.items():
            if not f"{path}.".startswith(f"{module}."):
                continue
            if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
                raise ConfigError(
                    f"needs {' and '.join(missing)}, not installed here: "
                    f"pip install {' '.join(libraries[name] for name in missing)}",
                    key=f"{key}._target_",
                    value=path,
                )
    target = locate(key, node.get("_target_"))
    if inspect.isclass(target) and not issubclass(target, Searcher):
        hint = "; leave sweep.search_alg null for random draws" if issubclass(target, SearchAlgorithm) else ""
        raise ConfigError(f"is not a ray.tune.search.Searcher{hint}", key=f"{key}._target_", value=node["_target_"])
    bind(key, dict(node), SUPPLIED["sweep.search_alg"])
    if inspect.isclass(target) and issubclass(target, GridSearch):
        grid_size(parameters)


def make_search(
    node: Mapping[str, Any] | None,
    parameters: Sequence[Parameter],
    *,
    seed: int,
    drawn: int = 0,
    distinct: bool = True,
    key: str = "sweep.search_alg",
) -> Translated:
    """Build the searcher of a node. Without a node, it is a random search.

    Args:
        node: The searcher's node.
        parameters: The search space.
        seed: The seed of the searcher and its sampler, if the node does not set one.
        drawn: The number of trials that the sweep has already. It changes the seed of other libraries' searchers, which
            would otherwise sample the same trials again when a sweep is resumed.
        distinct: As `RandomSearch.distinct`.
        key: The key of the node, for errors.

    Raises:
        ConfigError: `check_search` finds a problem, or the searcher cannot be built.
    """
    check_search(node, parameters, key=key)
    if not node:
        node = {"_target_": f"{RandomSearch.__module__}.{RandomSearch.__qualname__}"}
    target = locate(key, node["_target_"])
    if drawn and not (inspect.isclass(target) and issubclass(target, _OwnSearch)):
        seed = int(np.random.SeedSequence((seed, drawn)).generate_state(1)[0] >> 1)
    # Optuna announces each study on the terminal.
    logging.getLogger("optuna").setLevel(logging.WARNING)
    found = build(_seeded(node, seed, key))
    if isinstance(found, RandomSearch):
        found.distinct = distinct
    return Translated(found, parameters)


def total_of(
    node: Mapping[str, Any] | None,
    parameters: Sequence[Parameter],
    num_samples: int | None,
    *,
    distinct: bool = True,
    key: str = "sweep.search_alg",
) -> int | None:
    """Return how many trials there will be: `num_samples`, but at most the combinations of a grid or a `RandomSearch`.
    None if only the time budget ends the sweep."""
    target, size = locate(key, node["_target_"]) if node else RandomSearch, None
    if inspect.isclass(target) and issubclass(target, GridSearch):
        size = grid_size(parameters)
    elif inspect.isclass(target) and issubclass(target, RandomSearch) and distinct:
        size = _size(tune_space(parameters).values())
    return min((count for count in (size, num_samples) if count is not None), default=None)


def tell(search: Translated, trials: Sequence[Trial], mode: Mode) -> str | None:
    """Report the ended trials to a new searcher. Each has its best value; diverged ones have the worst of all values.

    Returns:
        A sentence that says what is lost; None if nothing is.
    """
    ended = [trial for trial in trials if trial.status not in _WAITING]
    if isinstance(search.inner, _OwnSearch) or not ended:
        return None
    name = type(search.inner).__name__
    if not search.takes_points:
        return f"{name} cannot learn from the {len(ended)} ended trials and starts from scratch"
    from raytrainer.ray_internals import METRIC  # not at the top, because trial processes import this module without it

    search.set_search_properties(METRIC, mode, {})
    least = _worst_of((report.value for trial in trials for report in trial.reports), mode)
    refused = 0
    for trial in ended:
        value, error = _lesson(trial, least, mode, trial.status, trial.diverged)
        if value is None and not error:
            continue  # it ended before its first evaluation
        try:
            search.add_evaluated_point(trial.parameters, value, error)
        except (KeyError, ValueError, ConfigError):
            refused += 1
    return (
        f"{name} cannot learn from {refused} ended trials, which are outside the current search space"
        if refused
        else None
    )


# --- the trials -----------------------------------------------------------------------------------------------------


class Draws(Searcher):  # type: ignore[misc]
    """Gives Tune the trials of a sweep: first the unfinished ones of the journal, then new ones until there are
    `total`. It records each new trial in the journal.

    A trial's config is `{TRIAL: id, RUN: its MLflow run or "", **parameters}`. When a trial ends, the searcher gets its
    best value. For a diverged trial it gets the worst value of all, so that it learns to avoid the region. For any
    other failed trial it gets the failure.

    Args:
        search: The searcher for new trials.
        parameters: The search space.
        mode: The mode of the objective.
        total: The number of trials, including those of the journal; None for as many as the searcher samples.
        journal: The journal, after its `begin`.
        overrides_of: Returns the overrides that set given parameters.
        on_draw: Called with each trial that Tune gets, after the journal has recorded it.
        clock: Returns the time in seconds since the epoch.
    """

    def __init__(
        self,
        search: Translated,
        parameters: Sequence[Parameter],
        *,
        mode: Mode,
        total: int | None,
        journal: TrialJournal,
        overrides_of: Callable[[Mapping[str, Any]], list[str]],
        on_draw: Callable[[Trial], None] = lambda trial: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.total = total
        self._search, self._parameters, self._mode = search, list(parameters), mode
        self._journal, self._overrides_of, self._on_draw, self._clock = journal, overrides_of, on_draw, clock
        self._waiting = deque(trial for trial in journal.trials.values() if trial.status in _WAITING)
        self._ids: dict[str, str] = {}  # Tune's id of a trial → our id
        self._drawn_here: set[str] = set()  # Tune's ids of the trials that the searcher has sampled
        if isinstance(search.inner, _OwnSearch):
            search.inner.drawn = len(journal.trials)
        values = [report.value for trial in journal.trials.values() for report in trial.reports]
        self._least = _worst_of(values, mode)

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Domain], **spec: Any
    ) -> bool:
        self._metric = metric
        return self._search.set_search_properties(metric, mode, config)

    def trial_of(self, trial_id: str) -> str | None:
        """Return our id of a trial, from Tune's id."""
        return self._ids.get(trial_id)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config, `FINISHED`, or None if the searcher waits for other trials to end.

        Raises:
            StorageError: The journal cannot be written.
        """
        if self._waiting:
            trial = self._waiting.popleft()
            self._journal.reopen(trial.id)
        else:
            if self.total is not None and len(self._journal.trials) >= self.total:
                return self.FINISHED
            values = self._search.suggest(trial_id)
            if values is None or values == self.FINISHED:
                return values
            self._drawn_here.add(trial_id)
            number = max((int(id_) for id_ in self._journal.trials), default=0) + 1
            trial = Trial(f"{number:04d}", values, self._overrides_of(values), self._clock())
            self._journal.start(trial)
        self._ids[trial_id] = trial.id
        self._on_draw(trial)
        return {TRIAL: trial.id, RUN: trial.run_id or "", **trial.parameters}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        told = self._told(result)
        if trial_id in self._drawn_here:
            self._search.on_trial_result(trial_id, told)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._ids:
            return
        trial = self._journal.trials[self._ids[trial_id]]
        # Tune calls the searcher before the callback that records the end of the trial.
        end = json.loads(result["end"]) if result and "end" in result else {}
        if result:
            self._told(result)
        status = Status.FAILED if error else Status(end.get("status", trial.status))
        value, failed = _lesson(trial, self._least, self._mode, status, end.get("diverged", trial.diverged))
        if trial_id in self._drawn_here:
            told = None if value is None else {"training_iteration": 1, **(result or {}), self.metric: value}
            self._search.on_trial_complete(trial_id, result=told, error=failed)
        elif self._search.takes_points and (failed or value is not None):
            self._search.add_evaluated_point(trial.parameters, value, failed)

    def on_pause(self, trial_id: str) -> None:
        if trial_id in self._drawn_here:
            self._search.on_pause(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        if trial_id in self._drawn_here:
            self._search.on_unpause(trial_id)

    def _told(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return a result with a finite value, which every searcher accepts."""
        value = float(result.get(self.metric, math.nan))
        if math.isfinite(value) and abs(value) < WORST:
            self._least = _worst_of((self._least, value), self._mode)
        return {**result, self.metric: value if math.isfinite(value) and abs(value) < WORST else self._least}


_WAITING = (Status.RUNNING, Status.STOPPED)


def _lesson(trial: Trial, least: float, mode: Mode, status: Status, diverged: bool) -> tuple[float | None, bool]:
    """Return what a searcher gets for an ended trial: its value, or None, and whether it failed for a reason that may
    be unrelated to its parameters."""
    if status == "failed":
        return (least, False) if diverged else (None, True)
    best = trial.best(mode)
    if best is not None:
        return best.value, False
    if status == "pruned" and trial.reports and math.isfinite(trial.reports[-1].value):
        return trial.reports[-1].value, False  # an interim value, if there is no other
    return (least, False) if trial.reports else (None, False)


def _worst_of(values: Iterable[float], mode: Mode) -> float:
    """Return the worst finite value; ±1e30 if there is none. With 1e30 in the data, a searcher's model could not tell
    the other values apart."""
    finite = [value for value in values if math.isfinite(value) and abs(value) < WORST]
    if not finite:
        return worst(mode)
    return max(finite) if mode == "min" else min(finite)


def _seeded(node: Mapping[str, Any], seed: int, key: str) -> dict[str, Any]:
    found = {
        name: _seeded(child, seed, f"{key}.{name}") if isinstance(child, Mapping) and "_target_" in child else child
        for name, child in node.items()
    }
    try:
        names = inspect.signature(locate(key, node["_target_"])).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return found
    # A searcher refuses a seed in addition to a sampler, which has its own seed.
    left = [name for name in _SEEDS if name in names and found.get(name) is None and not found.get("sampler")]
    return {**found, **dict.fromkeys(left, seed)}


def _paths(node: Any) -> Iterator[str]:
    """Yield every `_target_` in a node, the node's own first."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for child in node.values():
            yield from _paths(child)
    elif isinstance(node, list):
        for child in node:
            yield from _paths(child)
