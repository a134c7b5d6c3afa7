"""The driver of a run: preflight, the MLflow run, training with Ray Train or in this process, and the final status."""

from __future__ import annotations

from raytrainer.run.driver import in_background
from raytrainer.run.launching import check, experiment_name, launch, lock_owner, refuse_existing, try_first_batch
from raytrainer.run.logs import Logs
from raytrainer.run.record import (
    CONFIG,
    FIXED,
    STOP,
    SUBMITTED,
    Outcome,
    Record,
    StopAsked,
    begin_tags,
    changes_meaning,
    end_tags,
    job_tags,
    summary,
    table,
    took,
    tracking_uri,
    written_storage_path,
)
from raytrainer.run.session import ray_session
from raytrainer.run.waiting import Waiting, selected_nodes

__all__ = [
    "CONFIG",
    "FIXED",
    "STOP",
    "SUBMITTED",
    "Logs",
    "Outcome",
    "Record",
    "StopAsked",
    "Waiting",
    "begin_tags",
    "changes_meaning",
    "check",
    "end_tags",
    "experiment_name",
    "in_background",
    "job_tags",
    "launch",
    "lock_owner",
    "ray_session",
    "refuse_existing",
    "selected_nodes",
    "summary",
    "table",
    "took",
    "tracking_uri",
    "try_first_batch",
    "written_storage_path",
]
