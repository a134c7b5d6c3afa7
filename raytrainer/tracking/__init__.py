"""Trackers: the protocol that training uses, and MLflow behind it, which never delays a training step.
Importing this package imports neither mlflow nor torch."""

from __future__ import annotations

from raytrainer.tracking.checking import check_tracking
from raytrainer.tracking.child_runs import ChildRunUploader
from raytrainer.tracking.database import default_tracking_uri
from raytrainer.tracking.failures import redacted
from raytrainer.tracking.lookup import find_own_dir, register_model
from raytrainer.tracking.mlflow_tracker import MlflowTracker
from raytrainer.tracking.runs import Run, open_run
from raytrainer.tracking.sender import recorded_run_id
from raytrainer.tracking.tracker import NullTracker, Tracker
from raytrainer.tracking.uploader import Uploader, replay
from raytrainer.tracking.variables import variable_problems

__all__ = [
    "ChildRunUploader",
    "MlflowTracker",
    "NullTracker",
    "Run",
    "Tracker",
    "Uploader",
    "check_tracking",
    "default_tracking_uri",
    "find_own_dir",
    "open_run",
    "recorded_run_id",
    "redacted",
    "register_model",
    "replay",
    "variable_problems",
]
