"""`run`: train, resume or evaluate in one process, with its checkpoints, tracker and progress messages."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raytrainer import config, errors
from raytrainer.core import environment, garbage
from raytrainer.progress import Reporter
from raytrainer.storage import Storage
from raytrainer.tracking import MlflowTracker, Tracker, find_own_dir, redacted
from raytrainer.worker.job import WorkerJob
from raytrainer.worker.recording import TrackerListener, log_inherited, log_model, open_trackers

if TYPE_CHECKING:
    from raytrainer.checkpoint import Checkpointer
    from raytrainer.trainer import Trainer

Emit = Callable[[dict[str, Any]], None]
Report = Callable[[Any, bool], None]


def no_report(trainer: Any, ends: bool) -> None:
    """Ignore the report: the default of `run`."""


def run(
    job: WorkerJob,
    world: Any,
    *,
    emit: Emit,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = no_report,
    later: Callable[[Callable[[], None]], None] = lambda work: work(),
) -> dict[str, Any]:
    """Train, from the run's last checkpoint if it has one, and return the values of `FitResult` as plain values. If
    `evaluate` is set, evaluate a checkpoint instead.

    Args:
        job: The job of this process.
        world: `parallel.World` of this process. Its process group exists already.
        emit: Called with rank 0's progress messages.
        should_stop: Called at every log.
        report: As for `Trainer`.
        later: Called with work that remains when training is over and need not be waited for: closing a save in flight
            after an error, and uploading the last metrics.
    """
    _import_torch(world)
    environment.provide(job.forward_env, job.env_file)
    experiment = config.experiment_of(job.text, job.overrides)
    _check_shared(job, experiment.storage_path or "")
    if experiment.trainer.num_threads is None:
        experiment.trainer.num_threads = _cpus(experiment)
    # Use the config's URI with credentials, if it is the same. They are resolved here, and never sent with the job.
    uri = experiment.tracking.tracking_uri or ""
    uri = uri if redacted(uri) == job.tracking_uri else job.tracking_uri
    # The checkpoint's thread communicates with the other ranks during training, so it needs its own process group.
    group = _new_group() if world.distributed else None
    tracker, node_tracker = open_trackers(job, experiment, world, uri)
    checkpointer = _open_checkpoints(job, experiment, world, group, tracker)
    try:
        trainer = _build(job, experiment, world, checkpointer, tracker, emit, should_stop, report)
        if experiment.evaluate is not None:
            from raytrainer.trainer import evaluation

            result = evaluation.of_checkpoint(trainer, checkpointer, experiment.evaluate.checkpoint, group)
        else:
            _resume(trainer, checkpointer, job, tracker, uri, emit)
            result = asdict(trainer.fit())
            wanted = experiment.tracking.log_model and job.run_id is not None and result["reason"] != "stopped"
            if wanted and world.rank == 0:
                log_model(trainer, job, tracker, emit)
            checkpointer.close()
    except BaseException as error:
        # Report this error, and ignore errors of a save in flight, which may follow from it. Write the best state that
        # is still in memory, unless that needs other ranks, or the user wants an immediate end.
        if not world.distributed and (job.label or isinstance(error, Exception)):
            _ignoring_errors(checkpointer.write_held)
        later(lambda: _ignoring_errors(checkpointer.close))
        raise
    finally:
        # Closing is fast on a local disk, but an upload to a server may take long.
        for opened in (tracker, node_tracker):
            later(opened.close) if job.ship else opened.close()
    return {**result, "metrics": dict(result["metrics"]), "monitor": experiment.checkpoint.monitor}


def _import_torch(world: Any) -> None:
    garbage.collect_less()
    import torch

    import raytrainer.trainer  # noqa: F401  with everything else that training needs

    garbage.collect_as_usual()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # the default device for allocations of user code


def _new_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo")


def _open_checkpoints(
    job: WorkerJob, experiment: config.Experiment, world: Any, group: Any, tracker: Tracker
) -> Checkpointer:
    """Return the checkpoints of the run, or of the run that is evaluated."""
    from raytrainer.checkpoint import Checkpointer

    root, evaluate, options = experiment.storage_path or "", experiment.evaluate, experiment.checkpoint
    storage = Storage.shown_as((evaluate and evaluate.run_dir) or job.run_dir, root)
    # For a trial, the sweep's directory must exist.
    storage = storage.anchored(Storage.shown_as(job.record_dir, root) if job.record_dir else None)
    return Checkpointer(
        storage.child("checkpoints"),
        rank=world.rank,
        world_size=world.size,
        num_to_keep=options.num_to_keep,
        mode=job.objective_mode or config.checkpoint_mode(experiment),
        async_save=options.async_save,
        group=group,
        # Earlier metrics must be on disk before the commit, because a run that resumes does not log them again.
        before_commit=tracker.flush if isinstance(tracker, MlflowTracker) else None,
    )


def _build(
    job: WorkerJob,
    experiment: config.Experiment,
    world: Any,
    checkpointer: Checkpointer,
    tracker: Tracker,
    emit: Emit,
    should_stop: Callable[[], bool],
    report: Report,
) -> Trainer:
    from raytrainer.trainer import Objective, Trainer

    def report_when_safe(trainer: Any, ends: bool) -> None:
        # This process may be ended during the report.
        if job.wait_for_commit:
            checkpointer.wait()
        if isinstance(tracker, MlflowTracker):
            tracker.flush()
        report(trainer, ends)

    return Trainer(
        experiment,
        world=world,
        checkpointer=checkpointer,
        listeners=[TrackerListener(tracker), Reporter(emit)] if world.rank == 0 else [],
        should_stop=should_stop,
        report=report_when_safe,
        objective=Objective(job.objective, job.objective_mode, job.best_at_once) if job.objective else None,
    )


def _resume(
    trainer: Trainer, checkpointer: Checkpointer, job: WorkerJob, tracker: Tracker, uri: str, emit: Emit
) -> None:
    """Restore the run's last checkpoint, or else load the weights of `init_from`."""
    if info := checkpointer.latest():
        trainer.restore(info, job.changed)
        if job.inherited and trainer.evaluations == job.inherited["evaluation"]:
            log_inherited(tracker, job.inherited, trainer.step)
    elif trainer.experiment.init_from:
        line = trainer.init_from(trainer.experiment.init_from, lambda name: find_own_dir(uri, name) if uri else None)
        if trainer.world.rank == 0:
            emit({"kind": "note", "text": line})
            tracker.set_tags({"raytrainer.init_from": line})


def _ignoring_errors(work: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        work()


def _check_shared(job: WorkerJob, root: str) -> None:
    """Check that `run_dir` is the driver's directory. On several nodes, a local path may be a different disk on each.

    Raises:
        ConfigError: It is another directory.
    """
    place = job.record_dir or job.run_dir
    data = Storage.shown_as(place, root).read_if_exists("run.json") if job.record_mark else None
    record = json.loads(data) if data else {}
    if job.record_mark and " ".join(str(record.get(k)) for k in ("name", "created", "attempts")) != job.record_mark:
        raise errors.ConfigError(
            f"is not the same place on {socket.gethostname()} as where the run was launched; use a disk that all nodes "
            "share, or a URI (s3://…)",
            key="storage_path",
            value=place.rpartition("/")[0],
        )


def _cpus(experiment: config.Experiment) -> int | None:
    """Return the CPUs of one worker, the limit for its threads. More would be slower, and change the order of sums."""
    cpus = (experiment.scaling.resources_per_worker or {}).get("CPU")
    if cpus is None and experiment.backend.ray == "none":
        return None
    return max(1, int(cpus or 1))
