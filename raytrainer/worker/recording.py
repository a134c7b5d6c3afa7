"""The records of a training process: metrics, tags and artifacts through the tracker, and the trained model."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrainer import config, errors, mlflow_model
from raytrainer.errors import CheckpointNotFound
from raytrainer.tracking import MlflowTracker, NullTracker, Tracker
from raytrainer.worker.job import WorkerJob

if TYPE_CHECKING:
    from raytrainer.trainer.example import Example

MODEL_FOLDER = "model"
_log = logging.getLogger("raytrainer.worker")


def open_trackers(job: WorkerJob, experiment: config.Experiment, world: Any, uri: str) -> tuple[Tracker, Tracker]:
    """Return rank 0's tracker, and the tracker that samples system metrics of a node without rank 0.

    Each is a `NullTracker` in every other process.

    Args:
        job: The job of this process.
        experiment: The experiment.
        world: The `parallel.World` of this process.
        uri: The tracking URI, with credentials.
    """
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


class TrackerListener:
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


def log_inherited(tracker: Tracker, inherited: Mapping[str, Any], step: int) -> None:
    """Log a trial's new parameters as metrics and tags, because MLflow's parameters cannot be changed."""
    values = inherited["parameters"]
    numbers = {key: float(v) for key, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    tracker.log_metrics({f"parameter/{key.lstrip('+')}": value for key, value in numbers.items()}, step)
    texts = " ".join(f"{key}={value}" for key, value in values.items())
    tracker.set_tags({f"raytrainer.inherited.{inherited['evaluation']}": f"from {inherited['from']}: {texts}"})


def log_model(trainer: Any, job: WorkerJob, tracker: Tracker, emit: Callable[[dict[str, Any]], None]) -> None:
    """Log the best weights (or the last, if there are none) as an MLflow model for `mlflow.pytorch.load_model`.

    A separate process with a time limit writes it. The model is a graph by torch.export, with a batch dimension of any
    size, which can be loaded without our code. A model that cannot be exported is pickled, with a note. An error
    becomes a warning, so it never fails a run that has trained.

    Args:
        trainer: The `Trainer`, after training.
        job: The job of this process.
        tracker: Receives the model's folder.
        emit: Receives notes and warnings as progress messages.
    """
    call: Example | None = trainer.example.example
    try:
        if trainer.world.distributed and not trainer.checkpointer.list():
            raise CheckpointNotFound("there is no checkpoint, and one rank alone does not have all of the weights")
        step, weights = trainer.best_weights()
        too_large = "its inputs take more than 64 MiB" if call is not None and call.too_large else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, MODEL_FOLDER)
            example = call.on_cpu() if call is not None and too_large is None else None
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
