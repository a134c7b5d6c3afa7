"""Trackers: the protocol that training uses, and MLflow behind it, which never delays a training step.
Importing this package imports neither mlflow nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from raytrainer.tracking.checking import check_tracking
from raytrainer.tracking.child_runs import ChildRunUploader
from raytrainer.tracking.database import default_tracking_uri
from raytrainer.tracking.failures import redacted
from raytrainer.tracking.lookup import find_own_dir, find_run_dir, register_model
from raytrainer.tracking.runs import Run, open_run
from raytrainer.tracking.sender import recorded_run_id
from raytrainer.tracking.tracker import MlflowTracker
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
    "find_run_dir",
    "open_run",
    "recorded_run_id",
    "redacted",
    "register_model",
    "replay",
    "variable_problems",
]


@runtime_checkable
class Tracker(Protocol):
    """The methods that training needs from a tracker. No method may fail or block because of a server."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the values of one step as plain numbers. A call takes microseconds."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set texts that describe the run. A later value replaces an earlier one."""

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file or directory. The caller may delete it as soon as the call returns."""

    def close(self) -> None:
        """Return when everything that was logged is safe. Later calls are ignored."""


class NullTracker:
    """A tracker that keeps nothing, for ranks other than 0 and for runs without tracking."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass
