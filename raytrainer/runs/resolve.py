"""Find the run that an ID names: a name, an MLflow run id or a Ray submission id, in `./runs` or in the tracking store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from raytrainer import tracking
from raytrainer.attempt import SUBMITTED, Record
from raytrainer.attempt.record import LAUNCHED_TAG, SECONDS_TAG
from raytrainer.config.schema import NAME_PATTERN
from raytrainer.errors import RunNotFound, StorageError, nearest
from raytrainer.storage import Storage
from raytrainer.tracking import lookup
from raytrainer.tracking.server import StoredRun


@dataclass(frozen=True)
class SubmittedRun:
    """A run that was submitted from this directory, as it was sent.

    Attributes:
        record: The run record, with the last job that the run was sent as.
        storage: The directory with the record and the config.
    """

    record: Record
    storage: Storage

    def is_of(self, record: Record) -> bool:
        """Return whether a record of this name belongs to the same run, and not to another one with that name."""
        if self.record.run_id is not None and self.record.run_id == record.run_id:
            return True
        return _place(self.record.run_dir) == _place(record.run_dir)


@dataclass(frozen=True)
class RunHandle:
    """A run, and where to find it.

    Attributes:
        record: From the run directory; else from the submission; else built from what MLflow says.
        storage: The run directory; None if it is gone, does not exist yet or cannot be read from here.
        stored: The MLflow run; None if MLflow was not asked or does not know it.
        trial: The number of the trial that the ID names, if the run is a sweep.
        sent: The submission from this directory, if there is one. Its attempt may not be in the run directory yet.
    """

    record: Record
    storage: Storage | None
    stored: StoredRun | None = None
    trial: str | None = None
    sent: SubmittedRun | None = None

    @property
    def coming(self) -> str | None:
        """The job of an attempt that was submitted from here and is not in the run record yet."""
        there = None if self.sent is None else self.sent.record.job.get("submission_id")
        if self.sent is None or there is None:
            return None
        if self.submission_id is None:
            return there if self.record.attempts <= self.sent.record.attempts else None
        return there if number_of(there) > number_of(self.submission_id) else None

    @property
    def submission_id(self) -> str | None:
        return self.record.job.get("submission_id")

    @property
    def cluster_address(self) -> str | None:
        return self.record.job.get("cluster_address")


def number_of(submission_id: str) -> int:
    """Return the number of the attempt that a job is: NAME is the first, NAME--3 the third."""
    number = submission_id.rpartition("--")[2]
    return int(number) if number != submission_id and number.isdecimal() else 1


def find(identifier: str, root: Path | None = None) -> tuple[Record, Storage]:
    """Return the record and the directory of a run, from `./runs` or from where the tracking store says it is.

    Raises:
        RunNotFound: There is no such run, or its directory cannot be read. The message lists the nearest names.
    """
    known = look_up(identifier, root)
    if known.storage is not None:
        return known.record, known.storage
    if known.stored is None:
        raise RunNotFound(f"{identifier} was submitted to {known.cluster_address}, and has no directory yet")
    raise RunNotFound(f"{identifier}: its directory {known.record.run_dir} is gone, or cannot be read from here")


def look_up(identifier: str, root: Path | None = None) -> RunHandle:
    """Return the handle of a run. Its directory may be gone, or not readable from here.

    Raises:
        RunNotFound: There is no such run. The message lists the nearest names.
    """
    root = root or Path.cwd() / "runs"
    if not re.fullmatch(NAME_PATTERN, identifier):
        raise RunNotFound(
            f"{identifier!r} is neither a run's name nor an MLflow run id (nor a submission id): a name has letters, "
            "digits, dots, dashes and underscores"
        )
    if (handle := _by_name(identifier, root)) is not None:
        return with_sent(handle, root)
    names = []
    for record, storage in records(root):
        if identifier in (record.run_id, record.job.get("submission_id")):
            return with_sent(RunHandle(record, storage), root)
        names.append(record.name)
    for sent in submitted(root):
        if identifier == sent.record.name:
            return reached(RunHandle(sent.record, None, sent=sent))
        if identifier == sent.record.job.get("submission_id"):
            handle = reached(RunHandle(sent.record, None, sent=sent))  # its directory may still name an earlier job
            return replace(handle, record=replace(handle.record, job=sent.record.job))
        names.append(sent.record.name)
    uri = tracking_uri_here()
    stored = None if uri is None else lookup.find_run(uri, identifier)
    if stored is not None and uri is not None:
        return with_sent(from_tracking(stored, uri), root)
    close = nearest(identifier, names) or names[-3:]
    raise RunNotFound(
        f"{identifier}: no run of this name, MLflow id or submission id in {root} or the tracking store"
        + (f"; there are {', '.join(close)}" if close else "")
    )


def with_sent(known: RunHandle, root: Path) -> RunHandle:
    """Add the submission of this run from this directory, if there is one."""
    storage = Storage(root / SUBMITTED / known.record.name)
    with suppress(StorageError):
        record = Record.read(storage)
        if record is not None and (sent := SubmittedRun(record, storage)).is_of(known.record):
            return replace(known, sent=sent)
    return known


def from_tracking(stored: StoredRun, uri: str) -> RunHandle:
    """Return the handle of an MLflow run, with the record of its directory if that can be read."""
    return reached(as_stored(stored, uri))


def reached(known: RunHandle) -> RunHandle:
    """Add the run directory and its record, if it can be read from here."""
    if known.storage is not None:
        return known
    try:
        storage = known.record.storage
        own = Record.read(storage)
    except StorageError:  # a disk or bucket that this machine cannot read
        own = None
    return known if own is None else replace(known, record=own, storage=storage)


def as_stored(stored: StoredRun, uri: str) -> RunHandle:
    """Return the handle of a run from its MLflow run alone."""
    tags = stored.tags
    trial = stored.name.rpartition(".")[2] if lookup.SWEEP_TAG in tags else None
    record = Record(
        name=tags.get(lookup.SWEEP_TAG) or tags.get("raytrainer.name", stored.name),
        run_dir=lookup.run_dir_of(stored),
        run_id=stored.run_id,
        tracking_uri=tracking.redacted(uri),
        status=stored.status,
        choices={k.removeprefix(_CHOICE): v for k, v in tags.items() if k.startswith(_CHOICE)},
        storage_path=stored.params.get("storage_path", ""),
        kind="sweep" if trial or tags.get("raytrainer.kind") == "sweep" else "run",
        job={k: value for k in _JOB if (value := tags.get(f"raytrainer.{k}"))},
        launched=float(tags.get(LAUNCHED_TAG) or 0.0),
        seconds=float(tags.get(SECONDS_TAG) or 0.0),
    )
    return RunHandle(record, None, stored, trial)


_CHOICE = "raytrainer.choice."
_JOB = ("submission_id", "cluster_address", "content")


def trial_of(identifier: str, record: Record) -> str | None:
    """Return the number of the trial that an ID names, or None. The ID is `NAME.0007` or the trial's MLflow run id.

    Raises:
        StorageError: The sweep's journal cannot be read.
    """
    if record.kind != "sweep" or identifier in (record.name, record.run_id):
        return None
    if number := _numbered(identifier, record):
        return number
    from raytrainer.sweep.journal import TrialJournal

    trials = TrialJournal.open(record.storage).trials.values()
    return next((trial.id for trial in trials if trial.run_id == identifier), None)


def _numbered(identifier: str, record: Record) -> str | None:
    sweep, _, number = identifier.rpartition(".")
    return number if record.kind == "sweep" and sweep == record.name and re.fullmatch(r"\d{4,}", number) else None


def records(root: Path) -> Iterator[tuple[Record, Storage]]:
    """Yield the records of all runs in a directory. A record that cannot be read is skipped."""
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else ():
        storage = Storage(path)
        try:
            record = Record.read(storage)
        except StorageError:
            continue
        if record is not None:
            yield record, storage


def submitted(root: Path) -> Iterator[SubmittedRun]:
    """Yield the runs that were submitted from this directory."""
    for record, storage in records(root / SUBMITTED):
        yield SubmittedRun(record, storage)


def tracking_uri_here() -> str | None:
    """Return the tracking store of this directory: MLFLOW_TRACKING_URI, else ./mlflow.db; None if there is neither."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or None
    if uri is None and not (Path.cwd() / "mlflow.db").exists():
        return None
    return uri or tracking.default_tracking_uri(Path.cwd())


def tracking_uri_of(record: Record) -> str | None:
    """Return the tracking store of a run, with the credentials of MLFLOW_TRACKING_URI if that is the same store."""
    here = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if here and tracking.redacted(here) == record.tracking_uri:
        return here
    return record.tracking_uri or None


def with_tracking(known: RunHandle) -> RunHandle:
    """Add the MLflow run.

    Raises:
        TrackingError: The tracking store does not answer.
    """
    uri, run_id, record = tracking_uri_of(known.record), known.record.run_id, known.record
    if known.stored is not None or uri is None:
        return known
    if run_id is None:  # a submitted run has no MLflow run yet, and its directory may not be readable from here
        stored = lookup.find_launched(uri, record.name, _place(record.run_dir), known.submission_id)
        if stored is None:
            return known
        return replace(known, stored=stored, record=replace(record, run_id=stored.run_id))
    if known.trial is not None:
        run_id = f"{record.name}.{known.trial}"
    return replace(known, stored=lookup.find_run(uri, run_id))


def _place(run_dir: str) -> str:
    """Return a run directory without the options of its storage URI."""
    return run_dir.partition("?")[0].rstrip("/")


def _by_name(identifier: str, root: Path) -> RunHandle | None:
    for name in (identifier, identifier.rpartition(".")[0]):
        if not name or not (root / name).is_dir():
            continue
        storage = Storage(root / name)
        record = Record.read(storage)
        if record is not None and name == identifier:
            return RunHandle(record, storage)
        if record is not None and (number := _numbered(identifier, record)):
            return RunHandle(record, storage, trial=number)
    return None
