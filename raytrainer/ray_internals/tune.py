"""Adapt Ray Tune's controller, the loop that gives trials to processes and reuses a process for the next trial.

Our driver calls the loop step by step, so that it notices a signal, a lost cluster and a lost lock between two steps.
Private attributes are in the table of `tests/contracts/private_parts.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.tune import Callback, CheckpointConfig, PlacementGroupFactory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from raytrainer.ray_internals.schedulers import METRIC, pauses
from raytrainer.ray_internals.train import death, full_words

_SAMPLING_S = 0.2  # time for sampling trials between two checks for signals


class TrialEvents(Callback):  # type: ignore[misc]
    """Tune's callback with two more events."""

    def on_death(self, trial_id: str, cause: str, text: str) -> None:
        """A trial failed; called first. `trial_id` is Tune's id, `cause` one line, and `text` everything known."""

    def on_replaced(self, cause: str) -> None:
        """A process could not be reset for the next trial, which gets another one."""


@dataclass(frozen=True)
class TrialSettings:
    """The settings with which trials run.

    Attributes:
        name, storage_path: Tune writes checkpoints of paused and cloned trials to `name` below `storage_path`.
        resources: The resources of each trial.
        limit: The maximum number of concurrent trials.
        max_failures: How often a trial is tried again after its process died or raised.
    """

    name: str
    storage_path: str
    resources: PlacementGroupFactory
    limit: int
    max_failures: int


def _as_deaths(failed: Callable[..., None]) -> Callable[..., None]:
    """Convert other exceptions, such as a kill for too much memory, to a dead actor. They would end Tune's loop, which
    knows only dead actors and tasks that raised."""

    def report(tracked_actor_task: Any, exception: Exception) -> None:
        if not isinstance(exception, ray.exceptions.RayActorError | ray.exceptions.RayTaskError):
            died: Exception = ray.exceptions.RayActorError(error_msg=str(exception))
            died.__cause__ = exception
            exception = died
        failed(tracked_actor_task=tracked_actor_task, exception=exception)

    return report


class _SearchGenerator(SearchGenerator):  # type: ignore[misc]
    """A search generator that is not finished before all trials in `waited_for` are.

    When the generator is finished, Tune ends each process without a trial. Processes of paused trials are needed again
    soon, and would have to be restarted after every pause, which takes 3 s each.
    """

    waited_for: Collection[Any] = ()

    def is_finished(self) -> bool:
        return super().is_finished() and all(trial.is_finished() for trial in self.waited_for)


class TrialController(TuneController):  # type: ignore[misc]
    """Tune's controller without snapshots and with an exact limit on concurrent trials.

    Tune limits them through the searcher. That does not work with a scheduler that pauses trials (PBT, HyperBand),
    because it needs all trials sampled before it compares any. Exceptions of callbacks, searchers and schedulers leave
    `step` unchanged; Tune would mark a trial as failed, or raise a `TuneError` with the text.
    """

    def __init__(
        self,
        *,
        events: TrialEvents,
        settings: TrialSettings,
        search_alg: _SearchGenerator,
        scheduler: TrialScheduler,
        **arguments: Any,
    ) -> None:
        super().__init__(reuse_actors=True, search_alg=search_alg, scheduler=scheduler, callbacks=[events], **arguments)
        self._fail_fast = self.RAISE  # as an argument above, Tune would announce it in the log
        self._events, self._limit, self._all_sampled_early = events, settings.limit, pauses(scheduler)
        self._actor_manager._actor_task_failed = _as_deaths(self._actor_manager._actor_task_failed)
        if self._all_sampled_early:  # the process of a paused trial is reused by that trial or another one
            self._actor_cache.increase_max(settings.resources, by=settings.limit)
            search_alg.waited_for = self._live_trials

    def checkpoint(self, force: bool = False, wait: bool = False) -> None:
        """Do nothing. Tune would pickle its trials and the searcher repeatedly; the journal replaces that."""

    @property
    def _max_pending_trials(self) -> int:
        """The limit that Tune compares with the number of starting processes whenever it adds one."""
        return int(self._actor_manager.num_pending_actors) + self._limit - len(self._trial_to_actor)

    @_max_pending_trials.setter
    def _max_pending_trials(self, value: int) -> None:
        """Ignore Tune's own limit."""

    def _maybe_update_trial_queue(self) -> None:
        # Ask the searcher only when there is room for a trial, because it then knows all results so far.
        free = 1_000_000 if self._all_sampled_early else self._limit - len(self._trial_to_actor)
        until = time.monotonic() + _SAMPLING_S
        while len(self._pending_trials) < free and not self._search_alg.is_finished():
            # Do not wait for the searcher or sample for long, because signals are handled between two steps.
            if not self._update_trial_queue() or time.monotonic() >= until:
                break

    def _maybe_add_actors(self) -> None:
        if len(self._trial_to_actor) < self._limit:
            super()._maybe_add_actors()

    def _actor_failed(self, tracked_actor: Any, exception: Exception) -> None:
        # If a process dies while it is reset for the next trial, `_trial_task_failure` handles it afterwards.
        if self._actor_to_trial.get(tracked_actor) not in self._resetting_trials:
            super()._actor_failed(tracked_actor, exception)

    def _trial_task_failure(self, trial: Any, exception: Exception) -> None:
        if trial not in self._resetting_trials:
            self._process_trial_failure(trial, exception)
            return
        # The process could not end its previous trial. This trial has not started yet, and gets another process.
        self._events.on_replaced(death(exception))
        self._resetting_trials.discard(trial)
        process = self._trial_to_actor.pop(trial)
        self._actor_to_trial.pop(process)
        self._started_actors.discard(process)
        trial.set_ray_actor(None)
        process.set_on_stop(None)
        process.set_on_error(None)
        self._actor_manager.clear_actor_task_futures(process)
        self._actor_manager.remove_actor(process, kill=True)  # `stop` would wait for the previous trial once more
        self._schedule_trial_actor(trial)

    def _process_trial_failure(self, trial: Any, exception: BaseException) -> None:
        # Tune pickles the exception beside the trial. The journal has it as text.
        self._events.on_death(trial.trial_id, death(exception), full_words(exception))
        super()._process_trial_failure(trial, exception)
        self._has_errored = False  # a failed trial must not end the others

    def on_step_end(self) -> None:
        super().on_step_end()
        if self._all_sampled_early:
            return  # such a scheduler also compares ended trials
        # Tune keeps every trial for its snapshots and its analysis, which costs tens of kilobytes each.
        for ended in (self._stopped_trials, self._failed_trials):
            for trial in [t for t in ended if t not in self._trial_to_actor]:
                ended.discard(trial)
                self._trials.remove(trial)
                self._live_trials.discard(trial)
                self._trials_to_cache.discard(trial)

    @property
    def waits(self) -> bool:
        """Whether trials are pending, and none of them has resources."""
        # A process that is starting already has its resources.
        return bool(self._pending_trials) and not self._running_trials and not self._actor_manager.num_live_actors

    def drain(self, seconds: float) -> None:
        """Wait until the trial processes have finished their background work, at most so many seconds."""
        handles = [handle for handle, _ in self._actor_manager._live_actors_to_ray_actors_resources.values()]
        if waits := [handle.drain.remote() for handle in handles if hasattr(handle, "drain")]:
            ray.wait(waits, num_returns=len(waits), timeout=seconds)

    def abandon(self) -> None:
        """Kill every trial process without notice."""
        for handle, _ in list(self._actor_manager._live_actors_to_ray_actors_resources.values()):
            with contextlib.suppress(Exception):  # it may have ended already
                ray.kill(handle)
        self._actor_manager.cleanup()


def make_controller(
    trainable: type,
    *,
    searcher: Searcher,
    scheduler: TrialScheduler,
    mode: str,
    events: TrialEvents,
    settings: TrialSettings,
) -> TrialController:
    """Make a controller before its first step, set up as `ray.tune.run` would do it.

    Args:
        trainable: A `ray.tune.Trainable`, whose results have `objective`, `training_iteration` and `done`.
        searcher: The searcher, which ends the sweep with `FINISHED`.
        scheduler: The scheduler.
        mode: The mode of the objective.
        events: Receives the events of the trials.
        settings: How the trials run.
    """
    experiment = Experiment(
        name=settings.name,
        run=trainable,
        num_samples=1_000_000_000,  # the searcher ends the sweep
        storage_path=settings.storage_path,
        checkpoint_config=CheckpointConfig(num_to_keep=4),  # PBT may clone an older one
        resources_per_trial=settings.resources,
        max_failures=settings.max_failures,
        trial_name_creator=lambda trial: trial.trial_id,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    search = _SearchGenerator(searcher)
    search.set_search_properties(METRIC, mode, {}, **experiment.public_spec)
    scheduler.set_search_properties(METRIC, mode, **experiment.public_spec)
    controller = TrialController(
        events=events,
        settings=settings,
        search_alg=search,
        scheduler=scheduler,
        metric=METRIC,
        trial_checkpoint_config=experiment.checkpoint_config,
        storage=experiment.storage,
    )
    search.add_configurations([experiment])
    controller.setup_experiments([experiment], total_num_samples=1)
    return controller


def trial_resources(
    bundle: Mapping[str, float], workers: int, strategy: str, label_selector: Mapping[str, str] | None = None
) -> PlacementGroupFactory:
    """Return the resources of a trial: a bundle for its process, or an empty one and a bundle for each worker.

    Args:
        bundle: The resources of one worker.
        workers: The number of workers of a trial.
        strategy: Ray's placement strategy for several workers.
        label_selector: The labels that a node must have for each bundle.
    """
    labels = {"bundle_label_selector": [dict(label_selector)] * workers} if label_selector else {}
    if workers == 1:
        return PlacementGroupFactory([dict(bundle)], **labels)
    return PlacementGroupFactory([{}, *[dict(bundle)] * workers], strategy=strategy, **labels)


def capacity(bundle: Mapping[str, float], workers: int, nodes: Iterable[Mapping[str, float]], strategy: str) -> int:
    """Return how many trials the nodes can hold at a time.

    Args:
        bundle: The resources of one worker.
        workers: The number of workers of a trial.
        nodes: The resources of each live node.
        strategy: Ray's placement strategy for the bundles of one trial.
    """
    wanted = {name: amount for name, amount in bundle.items() if amount}
    room = [
        min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()), default=0) for node in nodes
    ]
    if strategy == "STRICT_PACK":
        return sum(most // workers for most in room)
    if strategy == "STRICT_SPREAD":  # a trial takes one bundle on each of `workers` nodes
        trials = 0
        while (
            sum(1 for most in room if most > trials) >= 1
            and sum(min(most, trials + 1) for most in room) >= (trials + 1) * workers
        ):
            trials += 1
        return trials
    return sum(room) // workers
