"""Adapt Ray Train: run its controller in this process, decide which failures are retried, and find the first error.

Private attributes are in the table of `tests/contracts/private_parts.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback, WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ReportCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.train.v2.api.exceptions import WorkerGroupError

from raytrainer import worker
from raytrainer.errors import WorkerError
from raytrainer.storage import Storage

# Texts in the errors of a rank that lost another rank in a collective.
_COLLATERAL = (
    "DistBackendError",
    "DistNetworkError",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "the other ranks cannot be reached",
    "Timed out waiting",
)


class Retries(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray Train's failure policy with its budgets, but without retries of errors that a retry cannot fix.

    A non-retryable error of a worker ends the run at once. So does the same error twice without a step in between.
    `on_retry` is called at each restart.
    """

    def __init__(
        self, failure_config: FailureConfig, progress: Callable[[], int], on_retry: Callable[[str], None]
    ) -> None:
        super().__init__(failure_config)
        self._progress, self._on_retry = progress, on_retry
        self._last: tuple[str, int] | None = None
        self.restarts = 0
        self.nodes: dict[int, str] = {}  # the host of each rank of the last worker group, also for errors of dead ranks
        self.abandoned = False  # whether the run is to end without a retry

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if self.abandoned:
            return FailureDecision.RAISE
        first = first_error(training_failed_error, self.nodes)
        if isinstance(training_failed_error, WorkerGroupError) and isinstance(first, WorkerError):
            here = (first.cause, self._progress())
            if not first.retry or (first.traceback and here == self._last):
                return FailureDecision.RAISE
            self._last = here
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            self.restarts += 1
            limit = self.failure_config.max_failures
            self._on_retry(
                f"{first}; restarting the workers ({self.restarts} of {'any number' if limit < 0 else limit})"
            )
        return decision

    def _log_decision(self, *_: Any, **__: Any) -> None:
        """Suppress Ray's own message, which has the same error with its stack."""


def first_error(error: BaseException, nodes: Mapping[int, str] | None = None) -> BaseException:
    """Return the first error of a worker group. `nodes` has the host of each rank.

    When one rank fails, the others fail later in the collective that waits for it. A process that died without an
    exception takes precedence over such errors.
    """
    if not isinstance(error, WorkerGroupError):
        return getattr(error, "controller_failure", None) or error
    raised: list[WorkerError] = []
    died: list[WorkerError] = []
    for rank, failure in error.worker_failures.items():
        if isinstance(failure, WorkerError):
            raised.append(failure)
        else:
            died.append(WorkerError(death(failure), rank=rank, node=(nodes or {}).get(rank)))
    causes = [e for e in raised if not any(text in e.cause for text in _COLLATERAL)]
    if causes:
        return min(causes, key=lambda e: e.when)
    if died:
        return died[0]
    # No process died, but all lost each other. The cause is the network, which may recover.
    first = min(raised, key=lambda e: e.when)
    first.retry = True
    return first


def death(error: BaseException) -> str:
    """Return one line that says how a Ray process ended."""
    if isinstance(error, ray.exceptions.RayTaskError):
        raised = error.cause
        error = raised if isinstance(raised, WorkerError) else error.as_instanceof_cause()
    if isinstance(error, WorkerError):
        return error.cause
    chain: list[BaseException | None] = [error, error.__cause__, getattr(error, "failure", None)]
    text = " ".join(" ".join(str(e) for e in chain if e is not None).split())
    if any(isinstance(e, ray.exceptions.OutOfMemoryError) for e in chain) or "memory pressure" in text:
        return f"killed for using too much memory: {text[:300]}"
    if isinstance(error, ray.exceptions.RayActorError) and "creation task" in text:  # the last line is the exception
        return f"its process could not start: {str(error).strip().splitlines()[-1][:300]}"
    if isinstance(error, ray.exceptions.RayActorError) or "WorkerHealthCheckFailed" in type(error).__name__:
        # Ray knows the exit code only if its own code ended the process, not after a signal or os._exit.
        if code := re.search(r"Worker exits with an exit code (-?\d+)", text):
            return f"the process died with exit code {code[1]}"
        return "the process died (killed from outside, crashed, or out of memory)"
    return f"{type(error).__name__}: {text[:300]}"


def full_words(error: BaseException) -> str:
    """Return everything known about the end of a Ray process: its traceback if it raised, else Ray's own report."""
    raised = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return getattr(raised, "traceback", None) or "".join(traceback.format_exception(error))


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Ray's worker group for a controller that is not an actor. Workers need the controller's handle only for
    `ray.train.get_all_reported_checkpoints`, which we do not call."""

    # Both belong to one trainer, which makes a subclass with them.
    reserved: list[Any]  # its placement groups, recorded before their workers start
    nodes: dict[int, str]  # `Retries.nodes`

    def _create_placement_group(self, *arguments: Any, **named: Any) -> Any:
        # For a trial of a sweep, Tune has reserved the workers' bundles already. If trials requested them a second
        # time, they would wait for each other.
        if (own := ray.util.get_current_placement_group()) is not None:
            return _Borrowed(own)
        handle = super()._create_placement_group(*arguments, **named)
        self.reserved.append(handle)
        return handle

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        self.nodes.update({w.distributed_context.world_rank: w.metadata.hostname for w in workers})
        ray.get(
            [
                w.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=w.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, w in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _Borrowed(DefaultPlacementGroupHandle):  # type: ignore[misc]
    """A trial's placement group. It stays after the workers have ended, because the next trial uses it too."""

    def shutdown(self) -> None:
        pass


class _Reports(ReportCallback):  # type: ignore[misc]
    """A callback that passes each report of rank 0 to `take`, in the controller's thread."""

    def __init__(self, take: Callable[[dict[str, Any]], None]) -> None:
        self._take = take

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        self._take(metrics[0])


class _StaticScaling(FixedScalingPolicy):  # type: ignore[misc]
    """A policy for a fixed number of workers. Their placement group requests the resources, even if a cluster grows.

    Ray's own policy requests them again, through a detached actor that it starts and that stays on the cluster.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class SupervisedTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` with its controller in the launching process and our failure policy.

    With the controller as an actor, one more process imports ray.train and torch (3 s of CPU) before any worker starts,
    and its death orphans the workers. Here the workers belong to the launching process, so Ray ends them and their
    placement group whenever and however that process ends.
    """

    def __init__(
        self, *args: Any, policy: Retries, on_report: Callable[[dict[str, Any]], None] | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._policy, self._on_report = policy, on_report
        self._controller: TrainController | None = None
        self._reserved: list[Any] = []

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        arguments["failure_policy"] = self._policy
        if isinstance(self.scaling_config.num_workers, int):
            arguments["scaling_policy"] = _StaticScaling(self.scaling_config)
        records = {"reserved": self._reserved, "nodes": self._policy.nodes}
        group = type("SupervisedWorkerGroup", (_WorkerGroup,), records)
        self._controller = type("SupervisedController", (TrainController,), {"worker_group_cls": group})(**arguments)
        asyncio.run(self._controller.run())
        return self._controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner watches a controller actor, which does not exist. The others start actors for unused features.
        unused = (PlacementGroupCleanerCallback, DatasetsCallback, ControllerMetricsCallback, WorkerMetricsCallback)
        reports = [] if self._on_report is None else [_Reports(self._on_report)]
        return [*(c for c in super()._create_default_callbacks() if not isinstance(c, unused)), *reports]

    def first_error(self, error: BaseException) -> BaseException:
        """Return the first error of the workers, with the host of its rank."""
        return first_error(error, self._policy.nodes)

    def waits(self) -> bool:
        """Return whether the workers wait for resources of the cluster."""
        group = self._controller.get_worker_group() if self._controller is not None else None
        if self._controller is None or (group is not None and group.has_started()):
            return False
        # An elastic run has no placement group until its minimum number of workers fits.
        last = self._reserved[-1:]
        return not any(ray.util.placement_group_table(h.placement_group)["state"] == "CREATED" for h in last)

    def ask_to_stop(self) -> bool:
        """Ask every worker to end after the next log, with a checkpoint. Return False if none has started yet."""
        group = self._controller.get_worker_group() if self._controller is not None else None
        if group is None or not group.has_started():
            return False
        group.execute_async(worker.request_stop)
        return True

    def abandon(self, done: threading.Event, within_s: float) -> None:
        """Kill the workers, started or starting, and wait until `fit` has raised and set `done`, at most `within_s`.

        Ray must not be shut down before that, because its core ends the whole process if a thread calls it later.
        """
        deadline = time.monotonic() + within_s
        self.kill_workers()
        while not done.wait(0.1) and time.monotonic() < deadline:
            self.kill_workers()

    def kill_workers(self) -> None:
        """Kill all workers, started or starting. They are not restarted."""
        self._policy.abandoned = True
        for handle in self._reserved:
            with contextlib.suppress(Exception):  # it may have ended already
                handle.shutdown()
        group = self._controller.get_worker_group() if self._controller is not None else None
        for member in group.get_workers() if group is not None and group.has_started() else ():
            with contextlib.suppress(Exception):
                ray.kill(member.actor)


def _failure_config(max_failures: int, max_preemption_failures: int, warn: Callable[[str], None]) -> FailureConfig:
    if "max_preemption_failures" in inspect.signature(FailureConfig).parameters:
        return FailureConfig(max_failures=max_failures, max_preemption_failures=max_preemption_failures)
    if max_preemption_failures != max_failures:
        warn(
            f"warning: ray {ray.__version__} has no limit of its own for preempted nodes: each preemption counts as one "
            f"of failure.max_failures={max_failures}, and failure.max_preemption_failures={max_preemption_failures} is "
            "not used. Ray 2.58 or newer has it"
        )
    return FailureConfig(max_failures=max_failures)


def make_trainer(
    job: worker.WorkerJob,
    *,
    num_workers: int | tuple[int, int],
    use_gpu: bool,
    resources_per_worker: Mapping[str, float] | None,
    placement_strategy: str,
    accelerator_type: str | None,
    label_selector: Mapping[str, str] | None,
    max_failures: int,
    max_preemption_failures: int,
    ray_storage: Storage,
    attempt: str,
    progress: Callable[[], int],
    on_retry: Callable[[str], None],
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> SupervisedTrainer:
    """Return the trainer that runs `worker.on_ray(job)` on every worker.

    Args:
        job: The job of each worker.
        num_workers: The number of workers, or the minimum and maximum of an elastic run.
        use_gpu, resources_per_worker, placement_strategy, accelerator_type, label_selector: As in section `scaling`.
        max_failures, max_preemption_failures: As in section `failure`.
        ray_storage: Where Ray keeps its own records.
        attempt: The trainer's name below `ray_storage`. It must be unique, because Ray silently resumes a name that
            exists.
        progress: Returns the steps done. Two equal errors without a step in between are not retried.
        on_retry: Called with a line at each restart of the workers, and with a warning about the version of Ray.
        on_report: Called with each evaluation if `job.reports` is set.
    """
    failure = _failure_config(max_failures, max_preemption_failures, on_retry)
    return SupervisedTrainer(
        worker.on_ray,
        train_loop_config=job.to_dict(),
        torch_config=TorchConfig(),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=use_gpu,
            resources_per_worker=dict(resources_per_worker) if resources_per_worker else None,
            placement_strategy=placement_strategy,
            accelerator_type=accelerator_type,
            label_selector=dict(label_selector) if label_selector else None,
        ),
        run_config=RunConfig(name=attempt, failure_config=failure, **ray_storage.for_ray()),
        policy=Retries(failure, progress, on_retry),
        on_report=on_report,
    )
