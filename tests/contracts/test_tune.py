"""The private parts of Ray Tune behave as `ray_internals` relies on. No Ray is started."""

from __future__ import annotations

import inspect

import pytest
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune.execution.tune_controller import TuneController
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

from raytrainer.ray_internals import METRIC
from tests.contracts.private_parts import TUNE, PrivatePart


@pytest.mark.parametrize("part", TUNE, ids=lambda part: part.name)
def test_part(part: PrivatePart) -> None:
    part.check()


class Trial:
    trial_id = "t1"
    config: dict[str, object] = {}  # noqa: RUF012


def test_rungs_of_asha_map_trials_to_values() -> None:
    scheduler = ASHAScheduler(metric=METRIC, mode="max", time_attr="training_iteration", max_t=9, grace_period=1)
    scheduler.on_trial_add(None, Trial())
    scheduler.on_trial_result(None, Trial(), {METRIC: 3.0, "training_iteration": 1})
    (bracket,) = scheduler._brackets
    assert scheduler._trial_info == {"t1": bracket}
    assert [milestone for milestone, _ in bracket._rungs] == [4, 1]
    assert dict(bracket._rungs)[1] == {"t1": 3.0}


def test_results_of_the_median_rule_are_by_trial() -> None:
    scheduler = MedianStoppingRule(metric=METRIC, mode="min", time_attr="training_iteration")
    trial, result = Trial(), {METRIC: 3.0, "training_iteration": 1}
    scheduler.on_trial_complete(None, trial, result)
    assert dict(scheduler._results) == {trial: [result]}


def test_actor_manager_reports_a_failed_task_by_keywords() -> None:
    """`_as_deaths` replaces the method by a function with these keywords, on the instance."""
    source = inspect.getsource(RayActorManager)
    assert "self._actor_task_failed(" in source
    call = source.partition("self._actor_task_failed(")[2].partition(")")[0]
    assert "tracked_actor_task=" in call
    assert "exception=" in call


def test_live_actors_are_pairs_of_handle_and_resources() -> None:
    assert "self._live_actors_to_ray_actors_resources[tracked_actor] = (" in inspect.getsource(RayActorManager)


def test_limit_of_pending_trials_is_read_at_each_decision() -> None:
    """`TrialController` overrides it by a property, which Tune's own assignment must not replace."""
    assert "_max_pending_trials" not in vars(TuneController)
    assert inspect.getsource(TuneController).count("self._max_pending_trials") >= 2
