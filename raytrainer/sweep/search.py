"""Build the searcher of a sweep from the config: one of our own, one of Tune's, or one of another library."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.search import SearchAlgorithm, Searcher
from ray.tune.search.sample import Domain

from raytrainer.config import Parameter, bind, build, locate
from raytrainer.config.nodes import SUPPLIED
from raytrainer.errors import ConfigError
from raytrainer.ray_internals import METRIC
from raytrainer.sweep.sampling import GridSearch, NumberedSearch, RandomSearch, grid_size, space_size
from raytrainer.sweep.tune_space import alias, decoded, encoded, tune_space

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


class TranslatedSearch(Searcher):  # type: ignore[misc]
    """Any searcher, with our keys and values. It gets the space as `tune_space` gives it, and the values that it
    samples are moved into the space. `make_search` builds it."""

    def __init__(self, inner: Searcher, parameters: Sequence[Parameter]) -> None:
        super().__init__(metric=METRIC)
        self.inner, self.parameters, self._has_space = inner, list(parameters), False

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: Mapping[str, Domain], **spec: Any
    ) -> bool:
        """Give the inner searcher its space, the first time only. `config` is not used.

        Raises:
            ConfigError: The inner searcher does not support these parameters.
        """
        if not self._has_space:
            self._has_space = True
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
        values = self.inner.suggest(trial_id)
        if values is None or values == self.FINISHED:
            return values
        missing = [p.key for p in self.parameters if alias(p.key) not in values]
        if missing:
            raise ConfigError(f"got no value from {type(self.inner).__name__}", key=missing[0])
        return {p.key: decoded(p, values[alias(p.key)]) for p in self.parameters}

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

    Args:
        node: The searcher's node; None for random draws.
        parameters: The search space.
        key: The key of the node, for errors.

    Raises:
        ConfigError: A library is missing (the error has the command that installs it); the target is not a searcher or
            refuses its arguments; or a grid search has an interval.
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
    sampled: int = 0,
    distinct: bool = True,
    key: str = "sweep.search_alg",
) -> TranslatedSearch:
    """Build the searcher of a node. Without a node, it is a random search.

    Args:
        node: The searcher's node.
        parameters: The search space.
        seed: The seed of the searcher and its sampler, if the node does not set one.
        sampled: The number of trials that the sweep has already. It changes the seed of other libraries' searchers, which
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
    if sampled and not (inspect.isclass(target) and issubclass(target, NumberedSearch)):
        seed = int(np.random.SeedSequence((seed, sampled)).generate_state(1)[0] >> 1)
    # Optuna announces each study on the terminal.
    logging.getLogger("optuna").setLevel(logging.WARNING)
    searcher = build(_seeded(node, seed, key))
    if isinstance(searcher, RandomSearch):
        searcher.distinct = distinct
    return TranslatedSearch(searcher, parameters)


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
        size = space_size(tune_space(parameters).values())
    return min((count for count in (size, num_samples) if count is not None), default=None)


def _seeded(node: Mapping[str, Any], seed: int, key: str) -> dict[str, Any]:
    arguments = {
        name: _seeded(child, seed, f"{key}.{name}") if isinstance(child, Mapping) and "_target_" in child else child
        for name, child in node.items()
    }
    try:
        names = inspect.signature(locate(key, node["_target_"])).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return arguments
    # A searcher refuses a seed in addition to a sampler, which has its own seed.
    unset = [name for name in _SEEDS if name in names and arguments.get(name) is None and not arguments.get("sampler")]
    return {**arguments, **dict.fromkeys(unset, seed)}


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
