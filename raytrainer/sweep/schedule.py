"""Build Tune's schedulers from the config, and replay a journal to them if they support it. They decide which trials
continue; their unit of time is the evaluation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import (
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from raytrainer import ray_internals
from raytrainer.config import Parameter, bind, factory, locate
from raytrainer.config.nodes import SUPPLIED
from raytrainer.errors import ConfigError
from raytrainer.ray_internals import METRIC, is_full_length, pauses
from raytrainer.sweep.journal import Mode, Trial, worst
from raytrainer.sweep.sampling import GridSearch, RandomSearch
from raytrainer.sweep.tune_space import RUN, TRIAL, domain, nearest, points

__all__ = ["TIME", "changes_parameters", "check_bounded", "is_full_length", "make_scheduler", "pauses", "replay"]

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
    searcher = locate("sweep.search_alg", search["_target_"]) if search else RandomSearch
    target = locate(key, node.get("_target_")) if node else FIFOScheduler
    _check_bohb(target, searcher, node, key)
    if not node:
        return FIFOScheduler()
    if inspect.isclass(target) and not issubclass(target, TrialScheduler):
        raise ConfigError("is not a ray.tune.schedulers.TrialScheduler", key=f"{key}._target_", value=node["_target_"])
    names = inspect.signature(target).parameters
    arguments = _with_defaults(node, target, names, evaluations, key)
    supplied: dict[str, Any] = {
        name: value for name, value in (("metric", METRIC), ("mode", mode), ("time_attr", TIME)) if name in names
    }
    if not _is(target, PopulationBasedTraining):
        return _built(arguments, supplied, key)
    _check_population(parameters, may_change, searcher, key)
    if not _is(target, PB2):
        supplied["hyperparam_mutations"] = {p.key: _mutation(p) for p in parameters}
    elif arguments.get("hyperparam_bounds") is None:
        supplied["hyperparam_bounds"] = {p.key: _bounds(p) for p in parameters}
    supplied["custom_explore_fn"] = _MoveIntoSpace(tuple(parameters))
    scheduler = _built(arguments, supplied, key)
    ray_internals.keep_own_values(scheduler, (TRIAL, RUN))
    return scheduler


def _check_bohb(target: Any, searcher: Any, node: Mapping[str, Any] | None, key: str) -> None:
    is_bohb = str(getattr(searcher, "__module__", "")).startswith("ray.tune.search.bohb")
    if is_bohb and not _is(target, HyperBandForBOHB):
        raise ConfigError(
            "is needed by TuneBOHB, which learns from the brackets of ray.tune.schedulers.HyperBandForBOHB only",
            key=key,
            value=None if node is None else node["_target_"],
        )


def _with_defaults(
    node: Mapping[str, Any], target: Any, names: Mapping[str, Any], evaluations: int | None, key: str
) -> dict[str, Any]:
    """Return the node with our defaults, and with `max_t` if the scheduler has one. `names` are its arguments."""
    arguments = {name: value for name, value in node.items() if not (name == "max_t" and value is None)}
    bind(key, arguments, SUPPLIED["sweep.scheduler"])
    for kind, defaults in _DEFAULTS.items():
        if _is(target, kind):
            arguments = {**{name: value for name, value in defaults.items() if name in names}, **arguments}
    if "max_t" in names and "max_t" not in arguments:
        if evaluations is None:
            raise ConfigError(
                "must be given: how often a trial is evaluated does not follow from its config", key=f"{key}.max_t"
            )
        arguments["max_t"] = evaluations
    if "max_t" in arguments and arguments.get("grace_period", 0) > arguments["max_t"]:
        raise ConfigError(
            f"is more than the {arguments['max_t']} evaluations of a trial",
            key=f"{key}.grace_period",
            value=arguments["grace_period"],
        )
    return arguments


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


def changes_parameters(node: Mapping[str, Any] | None) -> bool:
    """Return whether the scheduler changes parameters during trials, so that trials with equal starts are distinct."""
    return node is not None and _is(locate("sweep.scheduler", node["_target_"]), PopulationBasedTraining)


def check_bounded(scheduler: TrialScheduler, search: Mapping[str, Any] | None, num_samples: int | None) -> None:
    """Check that the number of trials is bounded, if the scheduler needs all of them sampled before it compares any.

    Args:
        scheduler: The scheduler.
        search: The searcher's node.
        num_samples: `sweep.num_samples`.

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


# --- population based training --------------------------------------------------------------------------------------


def _check_population(
    parameters: Sequence[Parameter], may_change: Callable[[str], bool], searcher: Any, key: str
) -> None:
    for p in parameters:
        if p.group or not may_change(p.key):
            effect = "chooses another config" if p.group else "changes what a checkpoint means"
            raise ConfigError(
                f"{effect}, and cannot change in the middle of a trial, as population based training requires; leave it "
                "out, or choose sweep=asha",
                key=p.key,
            )
    if not _is(searcher, RandomSearch):
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
        values = points(p)
        if len(values) <= _LISTED:
            return list(values)
        return domain(Parameter(p.key, "interval", low=p.low, high=p.high, integer=p.integer))
    return domain(p)


def _bounds(p: Parameter) -> list[float]:
    if p.kind == "choice":
        raise ConfigError("is a list, and PB2 takes intervals only", key=p.key)
    assert p.low is not None
    assert p.high is not None
    return [p.low, p.high]


@dataclass(frozen=True)
class _MoveIntoSpace:
    """A function that moves perturbed values back into the bounds of their parameters, and rounds integers."""

    parameters: tuple[Parameter, ...]

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, **{p.key: nearest(p, config[p.key]) for p in self.parameters}}


# --- resumed sweeps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _EarlierTrial:
    """A trial of the journal, as a scheduler sees it."""

    trial_id: str


def replay(scheduler: TrialScheduler, trials: Sequence[Trial], mode: Mode) -> str | None:
    """Replay the reports of a journal's trials to a new scheduler.

    A trial that Tune adds later and that continues is recognised by the id in its config.

    Args:
        scheduler: The scheduler.
        trials: The trials in the journal.
        mode: The mode of the objective.

    Returns:
        A sentence that says what the scheduler cannot restore; None if it decides as if it had seen all reports.
    """
    seen = [trial for trial in trials if trial.reports or trial.status == "failed"]
    if type(scheduler) is FIFOScheduler or not seen:
        return None
    name = type(scheduler).__name__
    if record := ray_internals.record_of(scheduler):
        _replay(scheduler, seen, record, mode)
        if ray_internals.draws_brackets(scheduler):
            return f"{name} cannot restore in which of its brackets a trial was: the brackets are drawn again"
        return None
    effect = "it starts from scratch"
    if isinstance(scheduler, HyperBandScheduler):
        effect = "its brackets start from scratch"
    if isinstance(scheduler, PopulationBasedTraining):
        effect = "the trials that continue are compared only with each other"
    return f"{name} cannot restore the reports of the earlier trials: {effect}"


def _replay(scheduler: TrialScheduler, trials: Sequence[Trial], record: Callable[..., Any], mode: Mode) -> None:
    unfinished: dict[str, _EarlierTrial] = {}
    for trial in trials:
        earlier = _EarlierTrial(f"earlier-{trial.id}")
        scheduler.on_trial_add(None, earlier)
        results = [_result(r.evaluation, r.value, mode) for r in trial.reports]
        # Tune passes the last result of a finished or failed trial only together with its end.
        last = results.pop() if trial.status == "finished" else results[-1] if results else None
        if trial.status == "failed":
            last = _result(trial.reports[-1].evaluation if trial.reports else 1, math.nan, mode)
        for result in results:
            record(None, earlier, result)
        if trial.status in ("running", "stopped"):
            unfinished[trial.id] = earlier
        else:
            scheduler.on_trial_complete(None, earlier, last)
    on_trial_add = scheduler.on_trial_add

    def add(tune_controller: Any, trial: Any) -> None:
        on_trial_add(tune_controller, trial)
        if (earlier := unfinished.pop(trial.config.get(TRIAL), None)) is not None:
            ray_internals.rename(scheduler, earlier, trial)

    scheduler.on_trial_add = add


def _result(evaluation: int, value: float, mode: Mode) -> dict[str, Any]:
    return {TIME: evaluation, METRIC: value if math.isfinite(value) else worst(mode)}
