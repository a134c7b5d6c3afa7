"""Handles of runs: what is known of a run, and where its record, directory, MLflow run and submission are."""

from __future__ import annotations

from dataclasses import dataclass

from raytrainer import tracking
from raytrainer.attempt import Record
from raytrainer.attempt.record import LAUNCHED_TAG, SECONDS_TAG
from raytrainer.storage import Storage
from raytrainer.tracking import lookup
from raytrainer.tracking.server import StoredRun

_CHOICE = "raytrainer.choice."
_JOB = ("submission_id", "cluster_address", "content")


@dataclass(frozen=True)
class SubmittedRun:
    """A run that was submitted from this directory, as it was sent.

    Attributes:
        record: The run record, with the last job that the run was sent as.
        storage: The directory with the record and the config.
    """

    record: Record
    storage: Storage

    def belongs_to(self, record: Record) -> bool:
        """Return whether a record of this name is of the same run, and not of another one with that name."""
        if self.record.run_id is not None and self.record.run_id == record.run_id:
            return True
        return without_options(self.record.run_dir) == without_options(record.run_dir)


@dataclass(frozen=True)
class RunHandle:
    """A run, and where to find it.

    Attributes:
        record: From the run directory; else from the submission; else built from the MLflow run.
        storage: The run directory; None if it is gone, does not exist yet or cannot be read from here.
        mlflow_run: The MLflow run; None if MLflow was not queried or does not have it.
        trial: The number of the trial that the ID names, if the run is a sweep.
        submission: The submission from this directory, if there is one. Its attempt may not be in the run directory yet.
    """

    record: Record
    storage: Storage | None
    mlflow_run: StoredRun | None = None
    trial: str | None = None
    submission: SubmittedRun | None = None

    @classmethod
    def of_submission(cls, submission: SubmittedRun) -> RunHandle:
        """Return the handle of a run from its submission alone."""
        return cls(submission.record, None, submission=submission)

    @classmethod
    def of_mlflow_run(cls, run: StoredRun, uri: str) -> RunHandle:
        """Return the handle of a run from its MLflow run alone.

        Args:
            run: The MLflow run.
            uri: The tracking store that has it.
        """
        tags = run.tags
        trial = run.name.rpartition(".")[2] if lookup.SWEEP_TAG in tags else None
        record = Record(
            name=tags.get(lookup.SWEEP_TAG) or tags.get("raytrainer.name", run.name),
            run_dir=lookup.run_dir_of(run),
            run_id=run.run_id,
            tracking_uri=tracking.redacted(uri),
            status=run.status,
            choices={k.removeprefix(_CHOICE): v for k, v in tags.items() if k.startswith(_CHOICE)},
            storage_path=run.params.get("storage_path", ""),
            kind="sweep" if trial or tags.get("raytrainer.kind") == "sweep" else "run",
            job={k: value for k in _JOB if (value := tags.get(f"raytrainer.{k}"))},
            launched=float(tags.get(LAUNCHED_TAG) or 0.0),
            seconds=float(tags.get(SECONDS_TAG) or 0.0),
        )
        return cls(record, None, run, trial)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def submission_id(self) -> str | None:
        return self.record.job.get("submission_id")

    @property
    def cluster_address(self) -> str | None:
        return self.record.job.get("cluster_address")

    @property
    def next_submission_id(self) -> str | None:
        """The job of an attempt that was submitted from here and is not in the run record yet."""
        submitted = None if self.submission is None else self.submission.record.job.get("submission_id")
        if self.submission is None or submitted is None:
            return None
        if self.submission_id is None:
            return submitted if self.record.attempts <= self.submission.record.attempts else None
        return submitted if attempt_number(submitted) > attempt_number(self.submission_id) else None


def attempt_number(submission_id: str) -> int:
    """Return the number of the attempt that a job is: NAME is the first, NAME--3 the third."""
    number = submission_id.rpartition("--")[2]
    return int(number) if number != submission_id and number.isdecimal() else 1


def without_options(run_dir: str) -> str:
    """Return a run directory without the options of its storage URI."""
    return run_dir.partition("?")[0].rstrip("/")
