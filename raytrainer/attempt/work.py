"""The work of an attempt between its start and its end, training or a sweep's trials. `attempt.lifecycle` calls it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from raytrainer import tracking
from raytrainer.attempt.outcome import AttemptOutcome

OPEN_S = 30.0  # importing mlflow and making a database, on a busy machine

Result = TypeVar("Result")
O = TypeVar("O", bound=AttemptOutcome)  # noqa: E741


@dataclass(frozen=True)
class TrackedRun:
    """The content with which the MLflow run of an attempt is opened, besides what every attempt logs.

    Attributes:
        text: The config, which becomes an artifact.
        params: The parameters.
        tags: Further tags.
        resumed_with: What a resume was called with. It becomes a tag, because parameters cannot be changed.
    """

    text: str
    params: Mapping[str, str]
    tags: Mapping[str, str] = field(default_factory=dict)
    resumed_with: str = ""


class Work(ABC, Generic[Result, O]):
    """The work of an attempt between its start and its end. The methods are called in the order in which they are here.

    Attributes:
        closing_s: The timeout for the tracking server at the end, in seconds.
    """

    closing_s = 30.0

    def admit(self) -> None:
        """Called in the background while Ray starts, before the MLflow run is opened.

        Raises:
            PreflightError: The attempt is refused, and must not have written a record.
        """

    @abstractmethod
    def tracked_run(self) -> TrackedRun:
        """Return the content with which the MLflow run is opened. Called in the background, after `admit`."""

    @abstractmethod
    def execute(self) -> Result:
        """Start or join Ray, call `Attempt.ray_is_up` and `Attempt.begin_work`, and do the work."""

    def end_open_work(self, error: BaseException | None) -> BaseException | None:
        """End what is still open after `execute`. Return the error that ended the attempt."""
        return error

    @abstractmethod
    def outcome(self, result: Result | None, error: BaseException | None) -> O:
        """Return the outcome, from the result of `execute` or from the error that ended the attempt."""

    def write_files(self, outcome: O) -> O:
        """Write result files. Return the outcome, with what the files say."""
        return outcome

    def opening_timeout(self, outcome: O) -> float:
        """Return how long the end of the attempt waits for the MLflow run to be opened, in seconds.

        A stopped run waits just as long: an MLflow run that is created later would stay RUNNING forever.
        """
        return OPEN_S

    @abstractmethod
    def upload(self, run: tracking.Run | None, outcome: O, timeout_s: float) -> bool:
        """Upload tags, files and the last metrics to the MLflow run. Return whether everything was uploaded.

        Args:
            run: The MLflow run; None if it could not be opened.
            outcome: The outcome.
            timeout_s: The longest time to wait for metrics.
        """

    def figures(self, outcome: O) -> dict[str, Any]:
        """Return fields of the record that say how far the attempt came."""
        return {}

    def close(self, outcome: O) -> None:
        """Close the work's own files."""
