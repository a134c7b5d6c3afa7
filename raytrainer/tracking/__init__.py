"""Where a run's metrics, tags and artifacts go: a protocol of four methods, and MLflow behind it, off the step's path.
Importing this imports neither mlflow nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from raytrainer.tracking.child_runs import ChildRunUploader
from raytrainer.tracking.database import default_tracking_uri
from raytrainer.tracking.lookup import find_own_dir, find_run_dir, register_model
from raytrainer.tracking.runs import Run, open_run
from raytrainer.tracking.sender import Shipper, recorded_run_id, replay
from raytrainer.tracking.server import check_tracking, redacted
from raytrainer.tracking.tracker import MlflowTracker
from raytrainer.tracking.variables import odd_values

__all__ = [
    "ChildRunUploader",
    "MlflowTracker",
    "NullTracker",
    "Run",
    "Shipper",
    "Tracker",
    "check_tracking",
    "default_tracking_uri",
    "find_own_dir",
    "find_run_dir",
    "odd_values",
    "open_run",
    "recorded_run_id",
    "redacted",
    "register_model",
    "replay",
]


@runtime_checkable
class Tracker(Protocol):
    """What training needs of a tracker. No method may fail or block for the sake of a server."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values of one step, plain numbers. Costs microseconds."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Texts that describe the run; a later value replaces an earlier one."""

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """A file or directory, which the caller may delete at once."""

    def close(self) -> None:
        """Returns when what was logged is safe; further calls are dropped."""


class NullTracker:
    """Keeps nothing: ranks other than the first, and runs without tracking."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def set_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass
