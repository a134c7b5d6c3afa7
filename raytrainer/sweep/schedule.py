"""Build Tune's schedulers from the config, and replay a journal to them if they support it. They decide which trials
continue; their unit of time is the evaluation. Private attributes were checked in ray 2.60 (`ray/tune/schedulers`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    PopulationBasedTrainingReplay,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from raytrainer.config import Parameter, bind, factory, locate
from raytrainer.config.nodes import SUPPLIED
from raytrainer.errors import ConfigError
from raytrainer.ray_internals import METRIC
from raytrainer.sweep.journal import Mode, Trial, worst
from raytrainer.sweep.search import RUN, TRIAL, GridSearch, RandomSearch
from raytrainer.sweep.space import domain, nearest, points

TIME = "training_iteration"  # key in Tune's results: the number of the evaluation
_LISTED = 1000  # a range with at most so many values is perturbed to a neighbour; a longer one by a factor
# Defaults for a time in evaluations. Tune's own are meant for seconds.
_DEFAULTS: Mapping[type, Mapping[str, Any]] = {
    # With a finite slice it pauses trials until it knows enough, and each pause writes a checkpoint.
    MedianStoppingRule: {"grace_period": 1, "min_time_slice": math.inf},
    # The journal records the exploits.
    PopulationBasedTraining: {"perturbation_interval": 1, "log_config": False},
}


def make_scheduler(
    node: Mapping[str, Any] | None,
    parameters: Sequence[Parameter],
    *,
    mode: Mode,
    evaluations: int | None,
    may_change: Callable[[str], bool] = lambda key: True,
    search: Mapping[str, Any] | None = None,
    key: str = "sweep.scheduler",
) -> TrialScheduler:
    """Build the scheduler of a node. Without a node, every trial runs to its end. Nothing is started, so this also
    serves as a check.

    Args:
        node: The scheduler's node.
        parameters: The search space.
        mode: The mode of the objective.
        evaluations: The number of reports of a trial, which replaces `max_t: null`; None if it is unknown.
        may_change: Whether a key may change during a trial without changing the meaning of its checkpoint.
        search: The searcher's node, to check that it supports the scheduler.
        key: The key of the node, for errors.

    Raises:
        ConfigError: The scheduler cannot be built, or does not support the parameters or the searcher.
    """
    drawn_by = locate("sweep.search_alg", search["_target_"]) if search else RandomSearch
    target = locate(key, node.get("_target_")) if node else FIFOScheduler
    if f"{getattr(drawn_by, '__module__', '')}".startswith("ray.tune.search.bohb") and not _is(
        target, HyperBandForBOHB
    ):
        raise ConfigError(
            "is needed by TuneBOHB, which learns from the brackets of ray.tune.schedulers.HyperBandForBOHB only",
            key=key,
            value=None if node is None else node["_target_"],
        )
    if not node:
        return FIFOScheduler()
    if inspect.isclass(target) and not issubclass(target, TrialScheduler):
        raise ConfigError("is not a ray.tune.schedulers.TrialScheduler", key=f"{key}._target_", value=node["_target_"])
    names = inspect.signature(target).parameters
    given = {name: value for name, value in node.items() if not (name == "max_t" and value is None)}
    bind(key, given, SUPPLIED["sweep.scheduler"])
    for kind, values in _DEFAULTS.items():
        if _is(target, kind):
            given = {**{name: value for name, value in values.items() if name in names}, **given}
    if "max_t" in names and "max_t" not in given:
        if evaluations is None:
            raise ConfigError(
                "must be given: how often a trial is evaluated does not follow from its config", key=f"{key}.max_t"
            )
        given["max_t"] = evaluations
    if "max_t" in given and given.get("grace_period", 0) > given["max_t"]:
        raise ConfigError(
            f"is more than the {given['max_t']} evaluations of a trial",
            key=f"{key}.grace_period",
            value=given["grace_period"],
        )
    supplied: dict[str, Any] = {
        name: value for name, value in (("metric", METRIC), ("mode", mode), ("time_attr", TIME)) if name in names
    }
    if not _is(target, PopulationBasedTraining):
        return _built(given, supplied, key)
    _check_population(parameters, may_change, drawn_by, key)
    if _is(target, PB2):
        if given.get("hyperparam_bounds") is None:
            supplied["hyperparam_bounds"] = {p.key: _bounds(p, key) for p in parameters}
    else:
        supplied["hyperparam_mutations"] = {p.key: _mutation(p) for p in parameters}
    supplied["custom_explore_fn"] = _Kept(tuple(parameters))
    found = _built(given, supplied, key)
    _adapt(found)
    return found


def _built(node: Mapping[str, Any], supplied: Mapping[str, Any], key: str) -> TrialScheduler:
    # Not through Hydra, which copies arguments and treats a dataclass as a config.
    make = factory(node)
    try:
        return make(**supplied)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"could not be built: {reason}", key=key, value=node["_target_"]) from error


def _is(target: Any, kind: type) -> bool:
    return inspect.isclass(target) and issubclass(target, kind)


# --- population based training --------------------------------------------------------------------------------------


def _check_population(
    parameters: Sequence[Parameter], may_change: Callable[[str], bool], drawn_by: Any, key: str
) -> None:
    for p in parameters:
        if p.group or not may_change(p.key):
            what = "chooses another config" if p.group else "changes what a checkpoint means"
            raise ConfigError(
                f"{what}, and cannot change in the middle of a trial, as population based training requires; leave it "
                "out, or choose sweep=asha",
                key=p.key,
            )
    if not _is(drawn_by, RandomSearch):
        raise ConfigError(
            "changes parameters by itself, and begins with random draws: leave sweep.search_alg null",
            key=key,
            value="population based training",
        )


def _mutation(p: Parameter) -> Any:
    """Return a value for `hyperparam_mutations`. A list is perturbed to a neighbour, a domain by a factor."""
    if p.kind == "choice":
        return list(p.values)
    if p.kind == "range" and not p.log:
        found = points(p)
        if len(found) <= _LISTED:
            return list(found)
        return domain(Parameter(p.key, "interval", low=p.low, high=p.high, integer=p.integer))
    return domain(p)


def _bounds(p: Parameter, key: str) -> list[float]:
    if p.kind == "choice":
        raise ConfigError("is a list, and PB2 takes intervals only", key=p.key)
    assert p.low is not None
    assert p.high is not None
    return [p.low, p.high]


@dataclass(frozen=True)
class _Kept:
    """Moves perturbed values back into the bounds of their parameters, and integers to whole numbers."""

    parameters: tuple[Parameter, ...]

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, **{p.key: nearest(p, config[p.key]) for p in self.parameters}}


def _adapt(scheduler: Any) -> None:
    """Change two assumptions of Tune's population based training that do not hold here."""
    new_config, on_trial_add = scheduler._get_new_config, scheduler.on_trial_add

    def kept_id(trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], Any]:
        # A clone gets the config of the other trial, which contains the ids of that trial.
        found, operations = new_config(trial, trial_to_clone)
        return {**found, **{name: trial.config[name] for name in (TRIAL, RUN) if name in trial.config}}, operations

    def added(tune_controller: Any, trial: Any) -> None:
        # Tune refuses to combine it with any searcher. Ours samples at random, so it is hidden from the check.
        on_trial_add(SimpleNamespace(search_alg=None), trial)

    scheduler._get_new_config, scheduler.on_trial_add = kept_id, added


# --- resumed sweeps -------------------------------------------------------------------------------------------------


def pauses(scheduler: TrialScheduler) -> bool:
    """Return whether the scheduler pauses trials to wait for others, and therefore needs all trials sampled early."""
    if isinstance(scheduler, MedianStoppingRule):
        return not scheduler._hard_stop or scheduler._min_time_slice != math.inf
    return isinstance(scheduler, PopulationBasedTraining | PopulationBasedTrainingReplay | HyperBandScheduler)


def parts_ways(node: Mapping[str, Any] | None) -> bool:
    """Return whether the scheduler changes parameters during trials, so that trials with equal starts are distinct."""
    return node is not None and _is(locate("sweep.scheduler", node["_target_"]), PopulationBasedTraining)


def check_bounded(scheduler: TrialScheduler, search: Mapping[str, Any] | None, num_samples: int | None) -> None:
    """Check that the number of trials is bounded, if the scheduler needs all of them sampled before it compares any.

    Raises:
        ConfigError: It is not. A time budget does not help, because trials would be sampled until it is over.
    """
    grid = search is not None and _is(locate("sweep.search_alg", search["_target_"]), GridSearch)
    if pauses(scheduler) and num_samples is None and not grid:
        raise ConfigError(
            f"must be set: {type(scheduler).__name__} samples all trials before it compares them, and "
            "sweep.time_budget_s does not limit their number",
            key="sweep.num_samples",
        )


def is_full_length(scheduler: TrialScheduler, evaluation: int) -> bool:
    """Return whether a trial that the scheduler ends at this evaluation has reached its full length (`max_t`)."""
    if isinstance(scheduler, AsyncHyperBandScheduler):
        return bool(scheduler._stop_last_trials and evaluation >= scheduler._max_t)
    if isinstance(scheduler, HyperBandScheduler):
        return bool(scheduler._stop_last_trials and evaluation >= scheduler._max_t_attr)
    return False


@dataclass(frozen=True, eq=False)
class _Earlier:
    """A trial of the journal, as a scheduler sees it."""

    trial_id: str


def replay(scheduler: TrialScheduler, trials: Sequence[Trial]) -> str | None:
    """Replay the reports of a journal's trials to a new scheduler. When Tune adds a trial that continues, it is
    recognised by the id in its config.

    Returns:
        A sentence that says what the scheduler cannot restore; None if it decides as if it had seen all reports.
    """
    seen = [trial for trial in trials if trial.reports or trial.status == "failed"]
    if type(scheduler) is FIFOScheduler or not seen:
        return None
    name = type(scheduler).__name__
    if isinstance(scheduler, AsyncHyperBandScheduler):
        _replay(scheduler, seen, scheduler.on_trial_result, _renamed_rungs)
        if len(scheduler._brackets) == 1:
            return None
        return f"{name} cannot restore in which of its brackets a trial was: the brackets are drawn again"
    if isinstance(scheduler, MedianStoppingRule):
        # Reports go to `on_trial_complete`, which stores a result without making a decision.
        _replay(scheduler, seen, scheduler.on_trial_complete, _renamed_results)
        return None
    anew = "it starts from scratch"
    if isinstance(scheduler, HyperBandScheduler):
        anew = "its brackets start from scratch"
    if isinstance(scheduler, PopulationBasedTraining):
        anew = "the trials that continue are compared only with each other"
    return f"{name} cannot restore the reports of the earlier trials: {anew}"


def _replay(
    scheduler: Any, trials: Sequence[Trial], report: Callable[..., Any], rename: Callable[[Any, _Earlier, Any], None]
) -> None:
    going_on: dict[str, _Earlier] = {}
    for trial in trials:
        earlier = _Earlier(f"earlier-{trial.id}")
        scheduler.on_trial_add(None, earlier)
        results = [_result(r.evaluation, r.value, scheduler._mode) for r in trial.reports]
        # Tune passes the last result of a finished or failed trial only together with its end.
        last = results.pop() if trial.status == "finished" else results[-1] if results else None
        if trial.status == "failed":
            last = _result(trial.reports[-1].evaluation if trial.reports else 1, math.nan, scheduler._mode)
        for result in results:
            report(None, earlier, result)
        if trial.status in ("running", "stopped"):
            going_on[trial.id] = earlier
        else:
            scheduler.on_trial_complete(None, earlier, last)
    on_trial_add = scheduler.on_trial_add

    def added(tune_controller: Any, trial: Any) -> None:
        on_trial_add(tune_controller, trial)
        if (earlier := going_on.pop(trial.config.get(TRIAL), None)) is not None:
            rename(scheduler, earlier, trial)

    scheduler.on_trial_add = added


def _result(evaluation: int, value: float, mode: Mode) -> dict[str, Any]:
    return {TIME: evaluation, METRIC: value if math.isfinite(value) else worst(mode)}


def _renamed_rungs(scheduler: Any, earlier: _Earlier, trial: Any) -> None:
    scheduler._trial_info[trial.trial_id] = scheduler._trial_info.pop(earlier.trial_id)
    for bracket in scheduler._brackets:
        for _, recorded in bracket._rungs:
            if earlier.trial_id in recorded:
                recorded[trial.trial_id] = recorded.pop(earlier.trial_id)


def _renamed_results(scheduler: Any, earlier: _Earlier, trial: Any) -> None:
    scheduler._results[trial] = scheduler._results.pop(earlier)
