"""The record of a run or a sweep on disk, its MLflow tags, and the file `stop` that asks for the end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from raytrainer import tracking
from raytrainer.config import Composition, Experiment, holds_password, resolved
from raytrainer.errors import StorageError
from raytrainer.storage import Storage

RECORD = "run.json"
ATTEMPTS_TAG, LAUNCHED_TAG = "raytrainer.attempts", "raytrainer.launched"
SECONDS_TAG = "raytrainer.seconds"  # of all ended attempts
STEP_TAG = "raytrainer.step"  # at the end of the last attempt
CONFIG = "config.yaml"
# Keys whose values are in the checkpoint's state or decide what it means. A resume cannot change them.
FIXED = ("name", "seed", "init_from", "debug", "storage_path")
_FIXED_BELOW = ("init_from", "model", "loss", "callbacks", "metrics", "data.train", "data.val", "data.collate_fn")
_FIXED_KEYS = (
    "optimizer._target_",
    "optimizer.muon_params",
    "optimizer.adamw_params",
    "lr_scheduler._target_",
    "data.global_batch_size",
    "data.shuffle",
    "data.drop_last",
    "trainer.precision",
    "trainer.ema_decay",
    "trainer.freeze",
    "checkpoint.monitor",
    "checkpoint.mode",
    "tracking.tracking_uri",
    "tracking.experiment_name",
)


@dataclass(frozen=True)
class Record:
    """The run record in a run directory, from which later commands find and resume the run.

    Attributes:
        name: The run's name.
        run_dir: The run directory, a path or URI without a password.
        run_id: The MLflow run; None without tracking.
        tracking_uri: The tracking URI of the MLflow run.
        experiment_name: The MLflow experiment.
        status: RUNNING, or the final status.
        attempts: The number of attempts, including the first.
        created: The time of the first launch, in UTC.
        choices: Config group → its choice.
        changed: Optimizer settings that a resume has set. They replace those in the checkpoints.
        kind: `run` or `sweep`.
        storage_path: If `run_dir` lacks its password: `storage_path` of the config, with unresolved references.
        job: On a shared cluster: the cluster's address, the submission_id, and the content of the request, by which a
            repeated submission is recognised.
        resolved: The nodes `optimizer` and `lr_scheduler` with resolved references, from which the state in the
            checkpoints was made.
        launched: When the last attempt was launched, in seconds since the epoch; 0 in records of old versions.
        seconds: The total duration of all ended attempts, each from its launch to its end.
        ended: When the last attempt ended, in seconds since the epoch; 0 while it runs.
        cause: Why the run did not finish.
        step: Optimizer steps done at the end of the last attempt.
        best: The monitor, its best value and the step of that value: `monitor`, `value`, `step`.
    """

    name: str
    run_dir: str
    run_id: str | None = None
    tracking_uri: str = ""
    experiment_name: str = ""
    status: str = "RUNNING"
    attempts: int = 0
    created: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    kind: str = "run"
    storage_path: str = ""
    job: dict[str, str] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    launched: float = 0.0
    seconds: float = 0.0
    ended: float = 0.0
    cause: str = ""
    step: int | None = None
    best: dict[str, Any] = field(default_factory=dict)

    def begun(self, launched: float) -> Record:
        """Return the record of the next attempt, launched at `launched`."""
        return replace(
            self,
            status="RUNNING",
            attempts=self.attempts + 1,
            launched=launched,
            ended=0.0,
            cause="",
            step=None,
            best={},
        )

    def closed(self, status: str, ended: float, cause: str | None = None) -> Record:
        """Return the record after the end of the last attempt.

        Args:
            status: The final status.
            ended: The end, in seconds since the epoch.
            cause: Why the run did not finish; None if it did.
        """
        before = self.seconds - max(0.0, self.ended - self.launched if self.ended else 0.0)  # if closed again
        seconds = before + (max(0.0, ended - self.launched) if self.launched else 0.0)
        return replace(self, status=status, ended=ended, seconds=seconds, cause=cause or "")

    @property
    def mark(self) -> str:
        """An identifier of this attempt, by which a worker checks that its `run_dir` is the driver's directory."""
        return f"{self.name} {self.created} {self.attempts}"

    @property
    def storage(self) -> Storage:
        """The run directory, with the password that the config refers to if it is available here.

        Raises:
            StorageError: The path or URI is invalid.
        """
        if self.storage_path:
            return Storage.shown_as(self.run_dir, resolved(self.storage_path))
        return Storage(self.run_dir)

    def write(self, storage: Storage) -> None:
        storage.write_bytes(RECORD, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, storage: Storage) -> Record | None:
        """Read the record in a run directory; return None if it does not exist.

        Raises:
            StorageError: The file is not a valid record.
        """
        data = storage.read_if_exists(RECORD)
        if data is None:
            return None
        try:
            fields = json.loads(data)
            # Records of later versions may have more fields.
            return cls(**{k: v for k, v in fields.items() if k in cls.__dataclass_fields__})
        except (ValueError, TypeError, AttributeError) as error:
            raise StorageError(f"{storage.uri}/{RECORD} is not a valid run record: {error}") from error


def next_attempt(
    old: Record | None,
    composition: Composition,
    storage: Storage,
    *,
    launched: float,
    job: Mapping[str, str] | None,
    kind: str = "run",
    changed: Sequence[str] = (),
) -> Record:
    """Return the record of a new run or sweep, or that of the next attempt of an old one.

    Args:
        old: The record to continue; None for a new run or sweep.
        composition: What to train.
        storage: The directory.
        launched: When the attempt was launched, in seconds since the epoch.
        job: As in `Record.job`.
        kind: `run` or `sweep`.
        changed: More keys for `Record.changed`.
    """
    e = composition.experiment
    if old is None:
        now, written = datetime.now(UTC).isoformat(timespec="seconds"), written_storage_path(composition)
        old = Record(e.name or "", storage.display, created=now, kind=kind, storage_path=written)
    return replace(
        old,
        # Without user and password, which the record must not contain.
        tracking_uri=old.tracking_uri or tracking.redacted(tracking_uri(e)),
        choices=old.choices or dict(composition.choices),
        changed=[*old.changed, *(name for name in changed if name not in old.changed)],
        experiment_name=old.experiment_name or experiment_name(composition),
        job=dict(job or {}),
        resolved=resolved_nodes(composition) if kind == "run" else old.resolved,
    ).begun(launched)


def resolved_nodes(composition: Composition) -> dict[str, Any]:
    """Return the value for `Record.resolved`. References to texts are kept, because the text might be a secret."""
    raw, e = yaml.safe_load(composition.text), composition.experiment

    def kept(written: Any, value: Any) -> Any:
        if isinstance(value, dict):
            below = written if isinstance(written, dict) else {}
            return {k: kept(below.get(k), v) for k, v in value.items()}
        return written if isinstance(written, str) and "${" in written and isinstance(value, str) else value

    return {name: kept(raw.get(name), getattr(e, name)) for name in ("optimizer", "lr_scheduler") if getattr(e, name)}


def written_storage_path(composition: Composition) -> str:
    """Return `Record.storage_path` for a new run. It is empty if the config itself contains a password, which must not
    be copied."""
    place = Storage(composition.experiment.storage_path or "")
    written = str(yaml.safe_load(composition.text).get("storage_path") or "") if place.display != place.uri else ""
    return "" if holds_password(written) else written


STOP = "stop"  # a file in a run directory that asks the run to end; the command `stop ID` writes it


# The folder below ./runs with a record of each submission to a cluster, so that a job is known before it runs.
SUBMITTED = ".submitted"


class StopRequest:
    """The check whether the file `stop` in the run directory asks the run to end. It reads at most every two seconds.

    When an attempt begins, it deletes an older file. A file that names the attempt's own job stays: the user stopped
    that job before its driver had started.
    """

    def __init__(self, storage: Storage, submission_id: str | None = None) -> None:
        self._storage, self._due = storage, 0.0
        if submission_id is None or _job_asked(storage) != submission_id:
            storage.delete(STOP)

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + 2.0
        try:
            return self._storage.exists(STOP)
        except StorageError:  # the server may answer the next time
            return False


def _job_asked(storage: Storage) -> str | None:
    """Return the job that the file `stop` names; None if there is no such file or it names no job."""
    try:
        request = json.loads(storage.read_if_exists(STOP) or b"{}")
    except ValueError:
        return None
    return request.get("job") if isinstance(request, dict) else None


def job_tags(record: Record) -> dict[str, str]:
    """Return the MLflow tags for the job on a shared cluster. They are emptied if a resumed run is no longer a job."""
    job = record.job or ({"submission_id": "", "cluster_address": ""} if record.attempts > 1 else {})
    return {f"raytrainer.{name}": value for name, value in job.items()}


def changes_meaning(name: str) -> bool:
    """Return whether a new value for this key changes the meaning of a checkpoint, so that a resume must refuse it."""
    return name in FIXED or name in _FIXED_KEYS or any(name == k or name.startswith(k + ".") for k in _FIXED_BELOW)


def tracking_uri(e: Experiment, recorded: str = "") -> str:
    """Return the absolute `tracking.tracking_uri`; by default the SQLite store in the current directory.

    Args:
        e: The experiment, with its references resolved now.
        recorded: The tracking URI of a resumed run, without credentials. The config's URI, with credentials, is used
            only if it is the same place.
    """
    uri = e.tracking.tracking_uri
    if recorded and (uri is None or tracking.redacted(uri) != recorded):
        return recorded
    if uri is None:
        return tracking.default_tracking_uri(Path.cwd())
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path.cwd() / uri.removeprefix('sqlite:///')}"
    return uri


def experiment_name(composition: Composition) -> str:
    """Return the MLflow experiment of a new run."""
    chosen = dict(composition.choices).get("experiment")
    return composition.experiment.tracking.experiment_name or chosen or "raytrainer"


def end_tags(record: Record) -> dict[str, str]:
    """Return the MLflow tags for the end of an attempt, with the figures that the command `status` shows."""
    tags = {SECONDS_TAG: f"{record.seconds:.3f}"}
    if record.step is not None:
        tags[STEP_TAG] = str(record.step)
    return tags


def begin_tags(record: Record) -> dict[str, str]:
    """Return the MLflow tags for the start of an attempt. They reset the step of the previous attempt."""
    tags = {ATTEMPTS_TAG: str(record.attempts), LAUNCHED_TAG: f"{record.launched:.3f}"}
    if record.attempts > 1:
        tags |= {SECONDS_TAG: f"{record.seconds:.3f}", STEP_TAG: ""}
    return tags


def best_tags(record: Record) -> dict[str, str]:
    """Return the MLflow tags for the best value of the monitor."""
    best = record.best
    if not best:
        return {}
    return {
        "raytrainer.monitor": best["monitor"],
        "raytrainer.monitor.best": repr(float(best["value"])),
        "raytrainer.monitor.best_step": str(best["step"]),
    }
