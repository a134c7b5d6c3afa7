"""Resolve an ID to a run: a name, an MLflow run id or a Ray submission id, in `./runs` or in the tracking store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raytrainer import tracking
from raytrainer.attempt import SUBMITTED, Record
from raytrainer.config.schema import NAME_PATTERN
from raytrainer.errors import RunNotFound, StorageError, nearest
from raytrainer.runs.handle import RunHandle, SubmittedRun, without_options
from raytrainer.storage import Storage
from raytrainer.tracking import lookup


def find(identifier: str, root: Path | None = None) -> tuple[Record, Storage]:
    """Return the record and the directory of a run, from `./runs` or from where the tracking store says it is.

    Raises:
        RunNotFound: There is no such run, or its directory cannot be read. The message lists the nearest names.
    """
    handle = resolve_run(identifier, root)
    if handle.storage is not None:
        return handle.record, handle.storage
    if handle.mlflow_run is None:
        raise RunNotFound(f"{identifier} was submitted to {handle.cluster_address}, and has no directory yet")
    raise RunNotFound(f"{identifier}: its directory {handle.record.run_dir} is gone, or cannot be read from here")


def resolve_run(identifier: str, root: Path | None = None) -> RunHandle:
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
        return with_submission(handle, root)
    names = []
    for handle in runs_in(root):
        if identifier in (handle.record.run_id, handle.submission_id):
            return with_submission(handle, root)
        names.append(handle.name)
    for handle in submitted_from(root):
        if identifier == handle.name:
            return with_directory(handle)
        if identifier == handle.submission_id:
            current = with_directory(handle)  # its directory may still name an earlier job
            return replace(current, record=replace(current.record, job=handle.record.job))
        names.append(handle.name)
    uri = tracking_uri_here()
    mlflow_run = None if uri is None else lookup.find_run(uri, identifier)
    if mlflow_run is not None and uri is not None:
        return with_submission(with_directory(RunHandle.of_mlflow_run(mlflow_run, uri)), root)
    suggestions = nearest(identifier, names) or names[-3:]
    raise RunNotFound(
        f"{identifier}: no run of this name, MLflow id or submission id in {root} or the tracking store"
        + (f"; there are {', '.join(suggestions)}" if suggestions else "")
    )


def runs_in(root: Path) -> Iterator[RunHandle]:
    """Yield all runs in a directory. A run whose record cannot be read is skipped."""
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else ():
        storage = Storage(path)
        try:
            record = Record.read(storage)
        except StorageError:
            continue
        if record is not None:
            yield RunHandle(record, storage)


def submitted_from(root: Path) -> Iterator[RunHandle]:
    """Yield the runs that were submitted from this directory, as they were sent."""
    for handle in runs_in(root / SUBMITTED):
        assert handle.storage is not None
        yield RunHandle.of_submission(SubmittedRun(handle.record, handle.storage))


def with_submission(handle: RunHandle, root: Path) -> RunHandle:
    """Add the submission of this run from this directory, if there is one."""
    storage = Storage(root / SUBMITTED / handle.name)
    with suppress(StorageError):
        record = Record.read(storage)
        if record is not None and (submission := SubmittedRun(record, storage)).belongs_to(handle.record):
            return replace(handle, submission=submission)
    return handle


def with_directory(handle: RunHandle) -> RunHandle:
    """Add the run directory and its record, if it can be read from here."""
    if handle.storage is not None:
        return handle
    try:
        storage = handle.record.storage
        record = Record.read(storage)
    except StorageError:  # a disk or bucket that this machine cannot read
        record = None
    return handle if record is None else replace(handle, record=record, storage=storage)


def with_mlflow_run(handle: RunHandle) -> RunHandle:
    """Add the MLflow run.

    Raises:
        TrackingError: The tracking store does not answer.
    """
    uri, run_id, record = tracking_uri_of(handle.record), handle.record.run_id, handle.record
    if handle.mlflow_run is not None or uri is None:
        return handle
    if run_id is None:  # a submitted run has no MLflow run yet, and its directory may not be readable from here
        run = lookup.find_launched(uri, record.name, without_options(record.run_dir), handle.submission_id)
        return handle if run is None else replace(handle, mlflow_run=run, record=replace(record, run_id=run.run_id))
    if handle.trial is not None:
        run_id = f"{record.name}.{handle.trial}"
    return replace(handle, mlflow_run=lookup.find_run(uri, run_id))


def trial_of(identifier: str, record: Record) -> str | None:
    """Return the number of the trial that an ID names, or None. The ID is `NAME.0007` or the trial's MLflow run id.

    Raises:
        StorageError: The sweep's journal cannot be read.
    """
    if record.kind != "sweep" or identifier in (record.name, record.run_id):
        return None
    if number := _trial_in_name(identifier, record):
        return number
    from raytrainer.sweep.journal import TrialJournal

    trials = TrialJournal.open(record.storage).trials.values()
    return next((trial.id for trial in trials if trial.run_id == identifier), None)


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


def _by_name(identifier: str, root: Path) -> RunHandle | None:
    for name in (identifier, identifier.rpartition(".")[0]):
        if not name or not (root / name).is_dir():
            continue
        storage = Storage(root / name)
        record = Record.read(storage)
        if record is not None and name == identifier:
            return RunHandle(record, storage)
        if record is not None and (number := _trial_in_name(identifier, record)):
            return RunHandle(record, storage, trial=number)
    return None


def _trial_in_name(identifier: str, record: Record) -> str | None:
    sweep, _, number = identifier.rpartition(".")
    return number if record.kind == "sweep" and sweep == record.name and re.fullmatch(r"\d{4,}", number) else None
