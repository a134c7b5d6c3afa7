"""The tracker protocol, by which training logs metrics, tags and artifacts. `MlflowTracker` is one implementation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Receives what a rank logs while it trains: metrics, tags and artifacts.

    The driver opens the run with its name and parameters before the ranks start, and sets its final status after they
    have ended (`open_run`, `Run.finish`). A tracker belongs to one attempt of one run in one process. Only the training
    thread calls it. No method fails or blocks because of a server or a disk: what cannot be kept is counted and reported.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the values of one step. A call takes microseconds.

        Args:
            metrics: Name → value as a plain number, also NaN and infinities.
            step: The step of the run, from 0. An attempt that continues from a checkpoint logs some steps again; the
                values of the first time stay.
        """

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set texts that describe the run. A later value replaces an earlier one."""

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file, or a directory under its own name. The caller may delete it as soon as the call returns.

        Args:
            path: The file or directory.
            folder: The folder in the run's artifacts; None for their root.
        """

    def close(self) -> None:
        """End the logging of this process. Return when everything that was logged is safe. Later calls are ignored."""


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
