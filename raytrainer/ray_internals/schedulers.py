"""Read and adapt Tune's schedulers: which ones pause trials, and how a resumed sweep restores their records.

Private attributes are in the table of `tests/contracts/private_parts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    PopulationBasedTrainingReplay,
    TrialScheduler,
)

METRIC = "objective"  # the metric's name for schedulers and searchers, whatever the sweep's metric is


def pauses(scheduler: TrialScheduler) -> bool:
    """Return whether the scheduler pauses trials to wait for others, and therefore needs all trials sampled early."""
    if isinstance(scheduler, MedianStoppingRule):
        return not scheduler._hard_stop or scheduler._min_time_slice != math.inf
    return isinstance(scheduler, PopulationBasedTraining | PopulationBasedTrainingReplay | HyperBandScheduler)


def is_full_length(scheduler: TrialScheduler, evaluation: int) -> bool:
    """Return whether a trial that the scheduler ends at this evaluation has reached its full length (`max_t`)."""
    if isinstance(scheduler, AsyncHyperBandScheduler):
        return bool(scheduler._stop_last_trials and evaluation >= scheduler._max_t)
    if isinstance(scheduler, HyperBandScheduler):
        return bool(scheduler._stop_last_trials and evaluation >= scheduler._max_t_attr)
    return False


def keep_own_values(scheduler: PopulationBasedTraining, names: Collection[str]) -> None:
    """Change two assumptions of Tune's population based training that do not hold here.

    Args:
        scheduler: The scheduler, which is modified.
        names: Keys of a trial's config that a clone keeps, because they identify the trial.
    """
    new_config, on_trial_add = scheduler._get_new_config, scheduler.on_trial_add

    def with_own_values(trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], Any]:
        config, operations = new_config(trial, trial_to_clone)
        return {**config, **{name: trial.config[name] for name in names if name in trial.config}}, operations

    def add(tune_controller: Any, trial: Any) -> None:
        # Tune refuses to combine it with any searcher. Ours samples at random, so it is hidden from the check.
        on_trial_add(SimpleNamespace(search_alg=None), trial)

    scheduler._get_new_config, scheduler.on_trial_add = with_own_values, add


def record_of(scheduler: Any) -> Callable[..., Any] | None:
    """Return the function that records a report, or None if the scheduler cannot restore reports.

    It takes `(None, trial, result)`. After it, `rename` moves the records of one trial to another.
    """
    record: Callable[..., Any] | None = None
    if isinstance(scheduler, AsyncHyperBandScheduler):
        record = scheduler.on_trial_result
    elif isinstance(scheduler, MedianStoppingRule):
        record = scheduler.on_trial_complete  # stores a result without making a decision
    return record


def draws_brackets(scheduler: TrialScheduler) -> bool:
    """Return whether the scheduler puts each trial into one of several brackets at random."""
    return isinstance(scheduler, AsyncHyperBandScheduler) and len(scheduler._brackets) > 1


def rename(scheduler: TrialScheduler, earlier: Any, trial: Any) -> None:
    """Move what the scheduler has recorded of `earlier` to `trial`. Both have a `trial_id`."""
    if isinstance(scheduler, MedianStoppingRule):
        scheduler._results[trial] = scheduler._results.pop(earlier)
        return
    scheduler._trial_info[trial.trial_id] = scheduler._trial_info.pop(earlier.trial_id)
    for bracket in scheduler._brackets:
        for _, recorded in bracket._rungs:
            if earlier.trial_id in recorded:
                recorded[trial.trial_id] = recorded.pop(earlier.trial_id)
