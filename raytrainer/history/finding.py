"""Which run an ID means: a name, an MLflow run id or a Ray submission id, below `./runs` or in the tracking store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from raytrainer import tracking
from raytrainer.config.schema import NAME_PATTERN
from raytrainer.errors import RunNotFound, StorageError, nearest
from raytrainer.run import SUBMITTED, Record
from raytrainer.storage import Storage
from raytrainer.tracking import lookup
from raytrainer.tracking.server import StoredRun


@dataclass(frozen=True)
class Known:
    """A run, and where what is known of it comes from.

    Attributes:
        record: Its directory's own; else the submission's from here; else made of what MLflow says.
        storage: Its directory; None where that is gone, not made yet, or not to be read from here.
        stored: What MLflow says; None where it was not asked, or does not know the run.
        trial: The number of the trial that was meant, of a sweep.
    """

    record: Record
    storage: Storage | None
    stored: StoredRun | None = None
    trial: str | None = None

    @property
    def submission_id(self) -> str | None:
        return self.record.job.get("submission_id")

    @property
    def cluster_address(self) -> str | None:
        return self.record.job.get("cluster_address")


def find(identifier: str, root: Path | None = None) -> tuple[Record, Storage]:
    """The run of an ID, of whose directory it has all: below `./runs`, else wherever the tracking store says it is.

    Raises:
        RunNotFound: There is none; the nearest names are told.
    """
    known = look_up(identifier, root)
    if known.storage is not None:
        return known.record, known.storage
    if known.stored is None:
        raise RunNotFound(f"{identifier} was submitted to {known.cluster_address}, and has no directory yet")
    raise RunNotFound(f"{identifier}: its directory {known.record.run_dir} is gone, or cannot be read from here")


def look_up(identifier: str, root: Path | None = None) -> Known:
    """The run of an ID, as far as it is known: its directory may be gone, or not reachable from here.

    Raises:
        RunNotFound: There is none; the nearest names are told.
    """
    root = root or Path.cwd() / "runs"
    if not re.fullmatch(NAME_PATTERN, identifier):
        raise RunNotFound(
            f"{identifier!r} is neither a run's name nor an MLflow run id (nor a submission id): a name has letters, "
            "digits, dots, dashes and underscores"
        )
    if (found := _by_name(identifier, root)) is not None:
        return found
    names = []
    for record, storage in records(root):
        if identifier in (record.run_id, record.job.get("submission_id")):
            return Known(record, storage)
        names.append(record.name)
    for record in submitted(root):
        if identifier in (record.name, record.job.get("submission_id")):
            return reached(Known(record, None))
        names.append(record.name)
    uri = tracking_uri_here()
    stored = None if uri is None else lookup.find_run(uri, identifier)
    if stored is not None and uri is not None:
        return from_tracking(stored, uri)
    close = nearest(identifier, names) or names[-3:]
    raise RunNotFound(
        f"{identifier}: no run of this name, MLflow id or submission id in {root} or the tracking store"
        + (f"; there are {', '.join(close)}" if close else "")
    )


def from_tracking(stored: StoredRun, uri: str) -> Known:
    """A run that MLflow tells of, with its directory's record where that can be read."""
    return reached(as_stored(stored, uri))


def reached(known: Known) -> Known:
    """The same with its directory and the record there, where that can be read from here."""
    if known.storage is not None:
        return known
    try:
        storage = Storage(known.record.run_dir)
        own = Record.read(storage)
    except StorageError:  # a disk or bucket that this machine does not reach
        own = None
    return known if own is None else replace(known, record=own, storage=storage)


def as_stored(stored: StoredRun, uri: str) -> Known:
    """A run by what MLflow tells of it alone."""
    tags = stored.tags
    trial = stored.name.rpartition(".")[2] if lookup.SWEEP_TAG in tags else None
    record = Record(
        name=tags.get(lookup.SWEEP_TAG) or tags.get("raytrainer.name", stored.name),
        run_dir=lookup.run_dir_of(stored),
        run_id=stored.run_id,
        tracking_uri=tracking.redacted(uri),
        status=stored.status,
        choices={k.removeprefix(_CHOICE): v for k, v in tags.items() if k.startswith(_CHOICE)},
        kind="sweep" if trial or tags.get("raytrainer.kind") == "sweep" else "run",
        job={k: found for k in _JOB if (found := tags.get(f"raytrainer.{k}"))},
    )
    return Known(record, None, stored, trial)


_CHOICE = "raytrainer.choice."
_JOB = ("submission_id", "cluster_address", "content")


def trial_of(identifier: str, record: Record) -> str | None:
    """The number of the trial of this sweep that an ID names, `NAME.0007` or the trial's run id in MLflow; or None.

    Raises:
        StorageError: The sweep's ledger cannot be read.
    """
    if record.kind != "sweep" or identifier in (record.name, record.run_id):
        return None
    if number := _numbered(identifier, record):
        return number
    from raytrainer.sweep.ledger import Ledger

    trials = Ledger.open(Storage(record.run_dir)).trials.values()
    return next((trial.id for trial in trials if trial.run_id == identifier), None)


def _numbered(identifier: str, record: Record) -> str | None:
    sweep, _, number = identifier.rpartition(".")
    return number if record.kind == "sweep" and sweep == record.name and re.fullmatch(r"\d{4,}", number) else None


def records(root: Path) -> Iterator[tuple[Record, Storage]]:
    """Those of all runs in a directory; another run's damage is not this one's."""
    for path in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else ():
        storage = Storage(path)
        try:
            record = Record.read(storage)
        except StorageError:
            continue
        if record is not None:
            yield record, storage


def submitted(root: Path) -> Iterator[Record]:
    """What was submitted from here, as it was sent."""
    for record, _ in records(root / SUBMITTED):
        yield record


def tracking_uri_here() -> str | None:
    """The tracking store of this directory: MLFLOW_TRACKING_URI, else ./mlflow.db; None where there is neither."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and not (Path.cwd() / "mlflow.db").exists():
        return None
    return uri or tracking.default_tracking_uri(Path.cwd())


def tracking_uri_of(record: Record) -> str | None:
    """The store of a run, with the credentials of this environment where it is the same one."""
    here = os.environ.get("MLFLOW_TRACKING_URI")
    if here and tracking.redacted(here) == record.tracking_uri:
        return here
    return record.tracking_uri or None


def with_tracking(known: Known) -> Known:
    """The same with what MLflow says of it.

    Raises:
        TrackingError: It cannot be asked.
    """
    uri, run_id = tracking_uri_of(known.record), known.record.run_id
    if known.stored is not None or uri is None or run_id is None:
        return known
    if known.trial is not None:
        run_id = f"{known.record.name}.{known.trial}"
    return replace(known, stored=lookup.find_run(uri, run_id))


def _by_name(identifier: str, root: Path) -> Known | None:
    for name in (identifier, identifier.rpartition(".")[0]):
        if not name or not (root / name).is_dir():
            continue
        storage = Storage(root / name)
        record = Record.read(storage)
        if record is not None and name == identifier:
            return Known(record, storage)
        if record is not None and (number := _numbered(identifier, record)):
            return Known(record, storage, trial=number)
    return None
