"""The driver of a run: preflight, the MLflow run, training with Ray Train or in this process, and the final status."""

from __future__ import annotations

from raytrainer.attempt.launching import check, experiment_name, launch, lock_owner, probe_first_batch, refuse_existing
from raytrainer.attempt.logs import Logs
from raytrainer.attempt.record import (
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
from raytrainer.attempt.session import cluster_resources, ray_session
from raytrainer.attempt.waiting import Waiting, selected_nodes

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
    "cluster_resources",
    "end_tags",
    "experiment_name",
    "job_tags",
    "launch",
    "lock_owner",
    "probe_first_batch",
    "ray_session",
    "refuse_existing",
    "selected_nodes",
    "summary",
    "table",
    "took",
    "tracking_uri",
    "written_storage_path",
]
