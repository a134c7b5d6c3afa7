"""`WorkerJob`: what a training process has to do, in plain values that can be sent to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkerJob:
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
        record_mark: `Record.mark` of this attempt, to check that `run_dir` is the same place on all nodes; empty for no
            check.
        record_dir: The directory of that record, if it is not `run_dir`. For a trial, it is the sweep's directory.
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
    record_mark: str = ""
    record_dir: str = ""
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
