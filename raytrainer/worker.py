"""The code of one training process: a Ray Train worker or, inline, the launching process.

It determines the rank, finds the last checkpoint, builds the `Trainer`, and connects it to progress, tracking and
checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer import config, errors, mlflow_model
from raytrainer.core import environment, garbage, streams
from raytrainer.errors import CheckpointNotFound
from raytrainer.progress import Reporter, to_line
from raytrainer.storage import Storage
from raytrainer.tracking import MlflowTracker, NullTracker, Tracker, find_own_dir, redacted

if TYPE_CHECKING:
    from raytrainer.trainer.example import Example

MODEL_FOLDER = "model"
_log = logging.getLogger("raytrainer.worker")
_stop = threading.Event()  # set in each worker's process by `request_stop`

# Errors that a retry cannot fix. A restart would only occupy the GPUs again.
_HOPELESS = (
    errors.Refused,
    errors.DataError,
    errors.NonFiniteLoss,
    errors.CheckpointError,
    errors.StorageFull,
    errors.StorageGone,
    errors.StorageLocked,
    TypeError,
    ValueError,
    AttributeError,
    NameError,
    LookupError,
    AssertionError,
    ImportError,
    NotImplementedError,
    SyntaxError,
)


@dataclass(frozen=True)
class Job:
    """The job of a training process, in plain values.

    Attributes:
        text: `Composition.text`: the config with unresolved references to secrets.
        overrides: Overrides of the config (`optimizer.lr=0.1`), for a trial.
        run_dir: The run directory: a path or URI, without a password that the config refers to.
        run_id: The MLflow run; None without tracking.
        tracking_uri: The tracking URI of the MLflow run.
        spool_dir: The spool for metrics until MLflow has them: a local path on the worker.
        ship: Whether the worker uploads the metrics itself. False if the driver reads the same disk and uploads them.
        changed: The optimizer's settings whose values in the config replace those in the checkpoint.
        mark: `Record.mark` of this attempt, to check that `run_dir` is the same place on all nodes; empty for no check.
        marked: The directory of that record, if it is not `run_dir`. For a trial, it is the sweep's directory.
        label: The name of this process in the logs if it is one of several: the id of a trial.
        forward_env, env_file: As for `environment.provide`: values that the config's references may need here.
        reports: On Ray Train: whether each evaluation is reported to the controller, in whose process a trial waits.
        wait_for_commit: Whether an evaluation is reported only after earlier checkpoints are committed, because the
            newest may then be copied or replaced.
        objective, objective_mode: The metric and mode for the best checkpoint, if it is not `checkpoint.monitor`.
        best_at_once: As in `trainer.Objective`.
        inherited: Set if population based training has replaced the last checkpoint by that of another trial: `from`,
            `evaluation` and the new `parameters`.
    """

    text: str
    run_dir: str
    run_id: str | None = None
    tracking_uri: str = ""
    spool_dir: str = ""
    ship: bool = True
    changed: Sequence[str] = ()
    mark: str = ""
    marked: str = ""
    overrides: Sequence[str] = ()
    label: str = ""
    forward_env: Sequence[str] = ()
    env_file: str | None = None
    reports: bool = False
    wait_for_commit: bool = False
    objective: str = ""
    objective_mode: str = ""
    best_at_once: bool = False
    inherited: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def request_stop() -> None:
    """Ask this worker to end after the next log, with a checkpoint. All ranks end after the same step."""
    _stop.set()


def on_ray(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a job in a Ray Train worker. Ray provides the rank and the device.

    Raises:
        WorkerError: Any error of training, with rank, node, time and traceback. Any process can unpickle it.
    """
    _stop.clear()
    # Without Ray's arguments, because child processes inherit them, and a user's module may parse them on import.
    sys.argv = sys.argv[:1]
    rank = -1
    try:
        import ray.train
        import ray.train.torch

        # Otherwise Ray logs the exception of the training function. The driver shows the first error of all ranks.
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        from raytrainer.parallel import World

        context = ray.train.get_context()
        rank = context.get_world_rank()
        hello(rank, job.get("label", ""))
        device, node = ray.train.torch.get_device(), context.get_node_rank()
        world = World(rank, context.get_world_size(), context.get_local_rank(), device, node)
        found = Job(**job)
        result = run(found, world, emit=_say, should_stop=_stop.is_set, report=_report if found.reports else _no_report)
        _say({"kind": "end"})  # the launching process waits for this line, after which the output is complete
        return result
    except BaseException as error:  # also sys.exit() in a script, which must not end the process
        raise described(error, rank) from error


def hello(rank: int, label: str = "") -> None:
    """Announce this process's rank and label to the launching process, for the output that follows."""
    streams.take_any_text()
    _say({"kind": "hello", "rank": rank, "label": label, "pid": os.getpid(), "host": socket.gethostname()})


def _report(trainer: Any, ends: bool) -> None:
    """Report an evaluation of a trial from all ranks to Ray Train's controller. Return when the trial may continue.

    Ray's `report` puts a report into a queue of size one, which the controller empties when it polls. After it come two
    empty reports: the first waits until the controller has taken the evaluation, the second until it has handled it and
    polls again.
    """
    import ray.train

    found = {"step": trainer.step, "metrics": dict(trainer.metrics), "evaluations": trainer.evaluations, "ends": ends}
    ray.train.report(found)
    for _ in range(0 if ends else 2):
        ray.train.report({})


def _after(*first: Callable[[], None], report: Callable[[Any, bool], None]) -> Callable[[Any, bool], None]:
    """Return a function that calls all of `first` and then `report`, during which this process may be ended."""

    def all_of_them(trainer: Any, ends: bool) -> None:
        for one in first:
            one()
        report(trainer, ends)

    return all_of_them


def _no_report(trainer: Any, ends: bool) -> None:
    pass


def described(error: BaseException, rank: int) -> errors.WorkerError:
    """Return an exception of a worker as a `WorkerError`."""
    first = str(error).strip() or "(no message)"
    return errors.WorkerError(
        f"{type(error).__name__}: {first}",
        rank=rank,
        node=socket.gethostname(),
        traceback="".join(traceback.format_exception(error)),
        when=time.time(),
        retry=not isinstance(error, _HOPELESS) and "out of memory" not in first,
    )


def run(
    job: Job,
    world: Any,
    *,
    emit: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[Any, bool], None] = _no_report,
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
    garbage.collect_less()
    import torch
    import torch.distributed as dist

    from raytrainer.checkpoint import Checkpointer
    from raytrainer.trainer import Objective, Trainer, evaluation

    garbage.collect_as_usual()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # the default device for allocations of user code
    environment.provide(job.forward_env, job.env_file)
    experiment = config.experiment_of(job.text, job.overrides)
    root = experiment.storage_path or ""
    _check_shared(job, root)
    options, c = experiment.trainer, experiment.checkpoint
    if options.num_threads is None:
        options.num_threads = _cpus(experiment)
    # The checkpoint's thread communicates with the other ranks during training, so it needs its own process group.
    group = dist.new_group(backend="gloo") if world.distributed else None
    # Use the config's URI with credentials, if it is the same. They are resolved here, and never sent with the job.
    uri = experiment.tracking.tracking_uri or ""
    uri = uri if redacted(uri) == job.tracking_uri else job.tracking_uri
    tracker, node_tracker = _trackers(job, experiment, world, uri)
    evaluate = experiment.evaluate
    place = Storage.shown_as((evaluate and evaluate.run_dir) or job.run_dir, root)
    # For a trial, the sweep's directory must exist.
    place = place.anchored(Storage.shown_as(job.marked, root) if job.marked else None)
    checkpointer = Checkpointer(
        place.child("checkpoints"),
        rank=world.rank,
        world_size=world.size,
        num_to_keep=c.num_to_keep,
        mode=job.objective_mode or config.checkpoint_mode(experiment),
        async_save=c.async_save,
        group=group,
        # Earlier metrics must be on disk before the commit, because a run that resumes does not log them again.
        before_commit=tracker.flush if isinstance(tracker, MlflowTracker) else None,
    )
    before = [checkpointer.wait] if job.wait_for_commit else []
    if isinstance(tracker, MlflowTracker):  # metrics must be on disk before the report
        before.append(tracker.flush)
    listeners = [_Tracking(tracker), Reporter(emit)] if world.rank == 0 else []
    try:
        trainer = Trainer(
            experiment,
            world=world,
            checkpointer=checkpointer,
            listeners=listeners,
            should_stop=should_stop,
            report=_after(*before, report=report),
            objective=Objective(job.objective, job.objective_mode, job.best_at_once) if job.objective else None,
        )
        if evaluate is not None:
            return {**evaluation.of_checkpoint(trainer, evaluate.checkpoint, group), "monitor": c.monitor}
        if info := checkpointer.latest():
            trainer.restore(info, job.changed)
            if job.inherited and trainer.evaluations == job.inherited["evaluation"]:
                _tell_inherited(tracker, job.inherited, trainer.step)
        elif experiment.init_from:
            told = trainer.init_from(experiment.init_from, lambda name: find_own_dir(uri, name) if uri else None)
            if world.rank == 0:
                emit({"kind": "note", "text": told})
                tracker.set_tags({"raytrainer.init_from": told})
        result = trainer.fit()
        if world.rank == 0 and experiment.tracking.log_model and job.run_id is not None and result.reason != "stopped":
            log_model(trainer, job, tracker, emit)
        checkpointer.close()
    except BaseException as error:
        # Report this error, and ignore errors of a save in flight, which may follow from it. Write the best state that
        # is still in memory, unless that needs other ranks, or the user wants an immediate end.
        if not world.distributed and (job.label or isinstance(error, Exception)):
            _without_a_word(checkpointer.write_held)
        later(lambda: _without_a_word(checkpointer.close))
        raise
    finally:
        # Closing is fast on a local disk, but an upload to a server may take long.
        for one in (tracker, node_tracker):
            later(one.close) if job.ship else one.close()
    return {**asdict(result), "metrics": dict(result.metrics), "monitor": c.monitor}


def _trackers(job: Job, experiment: config.Experiment, world: Any, uri: str) -> tuple[Tracker, Tracker]:
    """Return rank 0's tracker, and the tracker that samples system metrics of a node without rank 0. Each is a
    `NullTracker` in every other process."""
    nothing = NullTracker()
    if job.run_id is None or (world.rank > 0 and (world.node == 0 or world.local_rank > 0)):
        return nothing, nothing
    # The driver creates the MLflow run of a trial, and may not have done so yet.
    awaited_in = experiment.tracking.experiment_name if job.label else None
    spool = Path(job.spool_dir)
    if world.rank == 0:
        return MlflowTracker(job.run_id, uri, spool, ship=job.ship, awaited_in=awaited_in), nothing
    try:
        tracker = MlflowTracker(job.run_id, uri, spool, ship=job.ship, awaited_in=awaited_in, node=world.node)
    except errors.StorageError as error:  # system metrics must not end training
        _log.warning("The system metrics of node %d (%s) are left out: %s", world.node, socket.gethostname(), error)
        return nothing, nothing
    tracker.set_tags({f"raytrainer.node.{world.node}": socket.gethostname()})
    return nothing, tracker


def _tell_inherited(tracker: Tracker, inherited: Mapping[str, Any], step: int) -> None:
    """Log a trial's new parameters as metrics and tags, because MLflow's parameters cannot be changed."""
    values = inherited["parameters"]
    numbers = {key: float(v) for key, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    tracker.log_metrics({f"parameter/{key.lstrip('+')}": value for key, value in numbers.items()}, step)
    told = " ".join(f"{key}={value}" for key, value in values.items())
    tracker.set_tags({f"raytrainer.inherited.{inherited['evaluation']}": f"from {inherited['from']}: {told}"})


def _without_a_word(work: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        work()


def _check_shared(job: Job, root: str) -> None:
    """Check that `run_dir` is the driver's directory. On several nodes, a local path may be a different disk on each.

    Raises:
        ConfigError: It is another directory.
    """
    place = job.marked or job.run_dir
    found = Storage.shown_as(place, root).read_if_exists("run.json") if job.mark else None
    record = json.loads(found) if found else {}
    if job.mark and " ".join(str(record.get(k)) for k in ("name", "created", "attempts")) != job.mark:
        raise errors.ConfigError(
            f"is not the same place on {socket.gethostname()} as where the run was launched; use a disk that all nodes "
            "share, or a URI (s3://…)",
            key="storage_path",
            value=place.rpartition("/")[0],
        )


def inline_world(use_gpu: Any) -> Any:
    """Return the world of one process without Ray Train, on a GPU if there is one and `scaling.use_gpu` allows it."""
    import torch

    from raytrainer.parallel import World

    if use_gpu is True and not torch.cuda.is_available():
        raise errors.ConfigError("is set, and this machine has no usable GPU", key="scaling.use_gpu", value=True)
    return World(device=torch.device("cuda", 0) if use_gpu and torch.cuda.is_available() else torch.device("cpu"))


def _cpus(experiment: config.Experiment) -> int | None:
    """Return the CPUs of one worker, the limit for its threads. More would be slower, and change the order of sums."""
    asked = (experiment.scaling.resources_per_worker or {}).get("CPU")
    if asked is None and experiment.backend.ray == "none":
        return None
    return max(1, int(asked or 1))


class _Tracking:
    """Passes events of the training loop to the tracker: metrics, artifacts, and tags that a list of runs shows."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_fit_start(self, trainer: Any, event: Any) -> None:
        tags = {"raytrainer.workers": str(event.world_size)}
        if event.total_steps is not None:
            tags["raytrainer.total_steps"] = str(event.total_steps)
        # If the run continues from an earlier checkpoint, a later best value no longer counts.
        self._tracker.set_tags({**tags, **self._best(trainer)})

    def on_log(self, trainer: Any, event: Any) -> None:
        self._tracker.log_metrics(event.metrics, event.step)

    def on_eval_end(self, trainer: Any, event: Any) -> None:
        self._tracker.log_metrics(event.metrics, event.step)
        if trainer.best.step == event.step:
            self._tracker.set_tags(self._best(trainer))

    @staticmethod
    def _best(trainer: Any) -> dict[str, str]:
        best = trainer.best
        if best.value is None:
            return {}
        return {
            "raytrainer.monitor": best.metric,
            "raytrainer.monitor.best": repr(float(best.value)),
            "raytrainer.monitor.best_step": str(best.step),
        }

    def on_checkpoint(self, trainer: Any, event: Any) -> None:
        self._tracker.log_metrics({"checkpoint/stall_seconds": event.stall_s}, event.step)

    def on_artifact(self, trainer: Any, event: Any) -> None:
        self._tracker.log_artifact(event.path, event.folder)


def _say(message: dict[str, Any]) -> None:
    # One write, so that lines of two threads do not mix.
    sys.stdout.write(to_line(message) + "\n")
    sys.stdout.flush()


def log_model(trainer: Any, job: Job, tracker: Tracker, emit: Callable[[dict[str, Any]], None]) -> None:
    """Log the best weights (or the last, if there are none) as an MLflow model for `mlflow.pytorch.load_model`.

    A separate process with a time limit writes it. The model is a graph by torch.export, with a batch dimension of any
    size, which can be loaded without our code. A model that cannot be exported is pickled, with a note. An error
    becomes a warning, so it never fails a run that has trained.
    """
    seen: Example | None = trainer.example.example
    try:
        if trainer.world.distributed and not trainer.checkpointer.list():
            raise CheckpointNotFound("there is no checkpoint, and one rank alone does not have all of the weights")
        step, weights = trainer.best_weights()
        too_large = "its inputs take more than 64 MiB" if seen is not None and seen.too_large else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, MODEL_FOLDER)
            example = seen.on_cpu() if seen is not None and too_large is None else None
            how = mlflow_model.export(
                job.text, job.overrides, weights, path, step=step, example=example, no_graph=too_large
            )
            if how != "pt2":
                emit({"kind": "note", "text": f"the MLflow model is in the form {how}"})
            tracker.log_artifact(path)
        tracker.set_tags({"raytrainer.model_step": str(step), "raytrainer.model_format": how})
    except Exception as error:  # noqa: BLE001  the weights are in the checkpoint; an export is a convenience
        reason = mlflow_model.first_line(error)
        emit({"kind": "warning", "text": f"the MLflow model was left out: {type(error).__name__}: {reason}"})
        tracker.set_tags({"raytrainer.model_format": f"none: {reason}"[:500]})
