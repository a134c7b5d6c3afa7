"""Ray Tune, held by its hooks: the loop that gives trials to processes and keeps a process for the next trial.

Read in ray 2.60 (`ray/tune/execution/tune_controller.py`). The loop is driven step by step by our own driver, so that a
signal, a lost cluster and a lost lock are seen between two steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import ray
from ray.tune import Callback, CheckpointConfig, PlacementGroupFactory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from raytrainer.supervise.train import death, full_words

METRIC = "objective"  # what schedulers and searchers are told, whatever the sweep's metric is called
_DRAWS_S = 0.2  # of drawing trials between two looks at signals


def _as_deaths(failed: Callable[..., None]) -> Callable[..., None]:
    """Tune knows processes that died and tasks that raised; a process that was killed for memory ends its loop."""

    def told(tracked_actor_task: Any, exception: Exception) -> None:
        if not isinstance(exception, ray.exceptions.RayActorError | ray.exceptions.RayTaskError):
            gone: Exception = ray.exceptions.RayActorError(error_msg=str(exception))
            gone.__cause__ = exception
            exception = gone
        failed(tracked_actor_task=tracked_actor_task, exception=exception)

    return told


class _Drawn(SearchGenerator):  # type: ignore[misc]
    """Is not finished before the trials that it is `waited_for` by.

    When nothing is left to be drawn Tune ends each process that no trial has asked for; those of paused trials are about
    to be, and would be started anew, 3 s each, at every pause.
    """

    waited_for: Collection[Any] = ()

    def is_finished(self) -> bool:
        return super().is_finished() and all(trial.is_finished() for trial in self.waited_for)


class TrialController(TuneController):  # type: ignore[misc]
    """Tune's own, less its snapshots, with an exact bound on the trials that run at a time.

    Tune bounds them through the searcher, which a scheduler that pauses trials (PBT, HyperBand) cannot live with: it
    needs all of them drawn before it compares any. What a callback, searcher or scheduler raises comes out of `step` as
    it is: Tune would fail a trial by it, or raise a `TuneError` with its text.
    """

    def __init__(
        self,
        *,
        resources: PlacementGroupFactory,
        limit: int,
        all_drawn_early: bool,
        on_death: Callable[[str, str, str], None],
        on_replaced: Callable[[str], None],
        search_alg: _Drawn,
        **arguments: Any,
    ) -> None:
        super().__init__(reuse_actors=True, search_alg=search_alg, **arguments)
        self._fail_fast = self.RAISE  # given to Tune above it would be announced in the log
        self._limit, self._all_drawn_early = limit, all_drawn_early
        self._on_death, self._on_replaced = on_death, on_replaced
        self._actor_manager._actor_task_failed = _as_deaths(self._actor_manager._actor_task_failed)
        if all_drawn_early:  # a paused trial's process is another's next one, or its own
            self._actor_cache.increase_max(resources, by=limit)
            search_alg.waited_for = self._live_trials

    def checkpoint(self, force: bool = False, wait: bool = False) -> None:
        """Nothing: Tune would pickle its trials and the searcher, again and again. Ours is the journal."""

    @property
    def _max_pending_trials(self) -> int:
        """What Tune compares with the number of processes that are starting, at each one that it adds."""
        return int(self._actor_manager.num_pending_actors) + self._limit - len(self._trial_to_actor)

    @_max_pending_trials.setter
    def _max_pending_trials(self, value: int) -> None:
        """Tune's own bound."""

    def _maybe_update_trial_queue(self) -> None:
        # A searcher is asked when a place is free, not before: it then knows of every trial that has ended.
        free = 1_000_000 if self._all_drawn_early else self._limit - len(self._trial_to_actor)
        until = time.monotonic() + _DRAWS_S
        while len(self._pending_trials) < free and not self._search_alg.is_finished():
            # Nor is it waited for, or drawn for long: a signal is heeded between two steps.
            if not self._update_trial_queue() or time.monotonic() >= until:
                break

    def _maybe_add_actors(self) -> None:
        if len(self._trial_to_actor) < self._limit:
            super()._maybe_add_actors()

    def _actor_failed(self, tracked_actor: Any, exception: Exception) -> None:
        # A process that dies while it is given to the next trial: its task is told to have failed after this.
        if self._actor_to_trial.get(tracked_actor) not in self._resetting_trials:
            super()._actor_failed(tracked_actor, exception)

    def _trial_task_failure(self, trial: Any, exception: Exception) -> None:
        if trial not in self._resetting_trials:
            self._process_trial_failure(trial, exception)
            return
        # Its process could not end the trial before it: this one, which has not begun, gets another.
        self._on_replaced(death(exception))
        self._resetting_trials.discard(trial)
        process = self._trial_to_actor.pop(trial)
        self._actor_to_trial.pop(process)
        self._started_actors.discard(process)
        trial.set_ray_actor(None)
        process.set_on_stop(None)
        process.set_on_error(None)
        self._actor_manager.clear_actor_task_futures(process)
        self._actor_manager.remove_actor(process, kill=True)  # `stop` would wait for the same once more
        self._schedule_trial_actor(trial)

    def _process_trial_failure(self, trial: Any, exception: BaseException) -> None:
        # Tune writes the exception as a pickle beside the trial; the journal has it as a line.
        self._on_death(trial.trial_id, death(exception), full_words(exception))
        super()._process_trial_failure(trial, exception)
        self._has_errored = False  # of one trial: the others go on

    def on_step_end(self) -> None:
        super().on_step_end()
        if self._all_drawn_early:
            return  # such a scheduler compares trials that have ended, too
        # Tune keeps every trial for its snapshots and its analysis: tens of kilobytes each, for ever.
        for ended in (self._stopped_trials, self._failed_trials):
            for trial in [t for t in ended if t not in self._trial_to_actor]:
                ended.discard(trial)
                self._trials.remove(trial)
                self._live_trials.discard(trial)
                self._trials_to_cache.discard(trial)

    @property
    def waits(self) -> bool:
        """Whether trials want to begin and the cluster has a place for none of them."""
        # A process that is being started has its place.
        return bool(self._pending_trials) and not self._running_trials and not self._actor_manager.num_live_actors

    def drain(self, seconds: float) -> None:
        """Waits until the processes have done what they do in the background, but no longer than so many seconds."""
        handles = [handle for handle, _ in self._actor_manager._live_actors_to_ray_actors_resources.values()]
        if waits := [handle.drain.remote() for handle in handles if hasattr(handle, "drain")]:
            ray.wait(waits, num_returns=len(waits), timeout=seconds)

    def abandon(self) -> None:
        """Kills every trial's process without a word to it."""
        for handle, _ in list(self._actor_manager._live_actors_to_ray_actors_resources.values()):
            with contextlib.suppress(Exception):  # gone already
                ray.kill(handle)
        self._actor_manager.cleanup()


def make_controller(
    trainable: type,
    *,
    searcher: Searcher,
    scheduler: TrialScheduler,
    callbacks: Iterable[Callback],
    name: str,
    storage_path: str,
    resources: PlacementGroupFactory,
    mode: str,
    limit: int,
    all_drawn_early: bool,
    max_failures: int,
    on_death: Callable[[str, str, str], None],
    on_replaced: Callable[[str], None],
) -> TrialController:
    """A controller with everything that `ray.tune.run` would give it, before its first step.

    Args:
        trainable: A `ray.tune.Trainable`, whose results have `objective`, `training_iteration` and `done`.
        searcher: Ends the sweep by `FINISHED`.
        storage_path: Where Tune may keep checkpoints of trials that it pauses or clones, below `name`.
        resources: What each trial holds.
        limit: The most trials at a time.
        all_drawn_early: Whether the scheduler needs every trial drawn before it compares them.
        max_failures: How often a process that died is replaced.
        on_death: Told, before anybody else, Tune's id of a trial that failed, why in a line, and all that is known.
        on_replaced: Told why a process could not be given to the next trial, which is started in another.
    """
    experiment = Experiment(
        name=name,
        run=trainable,
        num_samples=1_000_000_000,  # the searcher says when it is enough
        storage_path=storage_path,
        checkpoint_config=CheckpointConfig(num_to_keep=4),  # PBT may clone one that is not the newest
        resources_per_trial=resources,
        max_failures=max_failures,
        trial_name_creator=lambda trial: trial.trial_id,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    search = _Drawn(searcher)
    search.set_search_properties(METRIC, mode, {}, **experiment.public_spec)
    scheduler.set_search_properties(METRIC, mode, **experiment.public_spec)
    controller = TrialController(
        resources=resources,
        limit=limit,
        all_drawn_early=all_drawn_early,
        on_death=on_death,
        on_replaced=on_replaced,
        search_alg=search,
        scheduler=scheduler,
        callbacks=list(callbacks),
        metric=METRIC,
        trial_checkpoint_config=experiment.checkpoint_config,
        storage=experiment.storage,
    )
    search.add_configurations([experiment])
    controller.setup_experiments([experiment], total_num_samples=1)
    return controller


def trial_resources(each: Mapping[str, float], workers: int, strategy: str) -> PlacementGroupFactory:
    """What a trial reserves: one bundle for its own process, or one a worker (its own process then holds nothing)."""
    if workers == 1:
        return PlacementGroupFactory([dict(each)])
    return PlacementGroupFactory([{}, *[dict(each)] * workers], strategy=strategy)


def capacity(bundle: Mapping[str, float], workers: int, nodes: Iterable[Mapping[str, float]], strategy: str) -> int:
    """How many trials of `workers` bundles the nodes can hold at a time.

    Args:
        bundle: The resources of one worker.
        nodes: The resources of each living node.
        strategy: Ray's placement strategy of the bundles of one trial.
    """
    wanted = {name: amount for name, amount in bundle.items() if amount}
    room = [
        min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()), default=0) for node in nodes
    ]
    if strategy == "STRICT_PACK":
        return sum(most // workers for most in room)
    if strategy == "STRICT_SPREAD":  # a trial takes one place on each of `workers` nodes
        trials = 0
        while (
            sum(1 for most in room if most > trials) >= 1
            and sum(min(most, trials + 1) for most in room) >= (trials + 1) * workers
        ):
            trials += 1
        return trials
    return sum(room) // workers
