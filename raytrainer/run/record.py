"""What is kept of a run on disk (`Record`), how a launch ended (`Outcome`), and the words for it (`summary`)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from raytrainer import tracking
from raytrainer.config import Composition, Experiment, holds_password, resolved
from raytrainer.errors import StorageError
from raytrainer.progress import duration
from raytrainer.storage import Storage

RECORD = "run.json"
ATTEMPTS_TAG, LAUNCHED_TAG = "raytrainer.attempts", "raytrainer.launched"
SECONDS_TAG, STEP_TAG = (
    "raytrainer.seconds",
    "raytrainer.step",
)  # of all attempts that have ended; at the last one's end
CONFIG = "config.yaml"
# What these keys say is in the checkpoint's state, or decides what its numbers mean.
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
    """What a run's directory says of it, so that a later command finds and goes on with it.

    Attributes:
        name: The run's name.
        run_dir: Its storage, a path or URI, without a password.
        run_id: In MLflow; None without tracking.
        tracking_uri: Where that is.
        experiment_name: Its MLflow experiment.
        status: RUNNING, or how it ended.
        attempts: How often it was launched, the first included.
        created: When, in UTC.
        choices: Group → the choice taken.
        changed: Settings of the optimizer that a resume has given, over those in the checkpoints.
        kind: `run`, or `sweep`.
        storage_path: Where `run_dir` lacks a password: as the config has it, the references to that kept.
        job: On a shared cluster: its address, the submission_id there, and the content of the request, by which a
            second submission of the same is known.
        resolved: The nodes `optimizer` and `lr_scheduler` with the values that their references had: what the state in the
            checkpoints was made with.
        launched: When the last attempt began, in seconds since the epoch; 0 of a version that did not note it.
        seconds: For which all attempts that have ended went on, each from its launch to its end.
        ended: When the last attempt ended; 0 while it runs.
        cause: Why it did not finish.
        step: Optimizer steps done at its end.
        best: The metric that is watched, its best value, and where that was: `monitor`, `value`, `step`.
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
        """The record of the next attempt, which begins at `launched`."""
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
        """The record of an attempt that ended at `ended`."""
        before = self.seconds - max(0.0, self.ended - self.launched if self.ended else 0.0)  # closed once more
        seconds = before + (max(0.0, ended - self.launched) if self.launched else 0.0)
        return replace(self, status=status, ended=ended, seconds=seconds, cause=cause or "")

    @property
    def mark(self) -> str:
        """What this attempt's record says, and no other's: a worker looks for it in what should be the same place."""
        return f"{self.name} {self.created} {self.attempts}"

    @property
    def storage(self) -> Storage:
        """Its directory, with the password that the config refers to where that is known here.

        Raises:
            StorageError: There can be none of this name.
        """
        if self.storage_path:
            return Storage.shown_as(self.run_dir, resolved(self.storage_path))
        return Storage(self.run_dir)

    def write(self, storage: Storage) -> None:
        storage.write_bytes(RECORD, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, storage: Storage) -> Record | None:
        """The record in a run's directory; None where there is none.

        Raises:
            StorageError: It is there and is no record.
        """
        data = storage.read_if_exists(RECORD)
        if data is None:
            return None
        try:
            found = json.loads(data)
            # Those of a later version may hold more.
            return cls(**{k: v for k, v in found.items() if k in cls.__dataclass_fields__})
        except (ValueError, TypeError, AttributeError) as error:
            raise StorageError(f"{storage.uri}/{RECORD} is no record of a run: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """How a launch ended, as its summary tells it.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        exit_code: 0, 1, 129, 130 or 143.
        record: The run.
        where: E.g. `local Ray, 2 workers on CPU`.
        result: What `FitResult` holds; None if training did not end by itself.
        cause: Why it failed, in a line.
        traceback: Of the worker that failed first.
        mlflow: The address to open; None without tracking.
        mlflow_command: The command that opens it where there is no server.
        seconds: From launch to end, of this attempt; `record.seconds` has those of all.
        step: Optimizer steps done, as far as is known.
        gone: Whether the run's directory was deleted meanwhile.
        length: The key that says how long the run is, for going on with it.
    """

    status: str
    exit_code: int
    record: Record
    where: str
    result: Mapping[str, Any] | None = None
    cause: str | None = None
    traceback: str | None = None
    mlflow: str | None = None
    mlflow_command: str | None = None
    seconds: float = 0.0
    step: int | None = None
    gone: bool = False
    length: str = "trainer.max_epochs"


def resolved_nodes(composition: Composition) -> dict[str, Any]:
    """`Record.resolved`. A text that a reference gave is left out, since it might be a secret."""
    raw, e = yaml.safe_load(composition.text), composition.experiment

    def kept(written: Any, value: Any) -> Any:
        if isinstance(value, dict):
            below = written if isinstance(written, dict) else {}
            return {k: kept(below.get(k), v) for k, v in value.items()}
        return written if isinstance(written, str) and "${" in written and isinstance(value, str) else value

    return {name: kept(raw.get(name), getattr(e, name)) for name in ("optimizer", "lr_scheduler") if getattr(e, name)}


def written_storage_path(composition: Composition) -> str:
    """`Record.storage_path` of a new run; empty where the config itself has a password, which is told nobody again."""
    place = Storage(composition.experiment.storage_path or "")
    written = str(yaml.safe_load(composition.text).get("storage_path") or "") if place.display != place.uri else ""
    return "" if holds_password(written) else written


STOP = "stop"  # an object in a run's directory: whoever wants it to end puts it there, `stop ID` for one


# Below ./runs: what was submitted from here and is on a cluster, a record each, so that a job is known before it runs.
SUBMITTED = ".submitted"


class StopAsked:
    """Whether somebody has asked a run to end by the object `stop` in its directory. Looks every two seconds.

    One from before this attempt does not count, unless it asks this attempt's job, which was still starting: it is deleted
    when the attempt begins.
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
        except StorageError:  # a server that does not answer now will another time
            return False


def _job_asked(storage: Storage) -> str | None:
    """The job that the object `stop` means; None where there is none, or it is not for a job."""
    try:
        asked = json.loads(storage.read_if_exists(STOP) or b"{}")
    except ValueError:
        return None
    return asked.get("job") if isinstance(asked, dict) else None


def job_tags(record: Record) -> dict[str, str]:
    """Where on a shared cluster a run is, for its MLflow run; one that goes on elsewhere is no job's any more."""
    job = record.job or ({"submission_id": "", "cluster_address": ""} if record.attempts > 1 else {})
    return {f"raytrainer.{name}": value for name, value in job.items()}


def changes_meaning(name: str) -> bool:
    """Whether another value of a key changes what the state in a checkpoint means: it cannot be resumed with it."""
    return name in FIXED or name in _FIXED_KEYS or any(name == k or name.startswith(k + ".") for k in _FIXED_BELOW)


def tracking_uri(e: Experiment, recorded: str = "") -> str:
    """`tracking.tracking_uri` made absolute; without one the SQLite store in the current directory.

    Args:
        e: The experiment, its references resolved here and now.
        recorded: Of a run that goes on: where it is kept, without credentials. What the config refers to now is used
            if it is the same place.
    """
    uri = e.tracking.tracking_uri
    if recorded and (uri is None or tracking.redacted(uri) != recorded):
        return recorded
    if uri is None:
        return tracking.default_tracking_uri(Path.cwd())
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path.cwd() / uri.removeprefix('sqlite:///')}"
    return uri


def summary(outcome: Outcome, program: str) -> str:
    """The last words of a launch: what came out, where everything is, and what to type next."""
    record, result = outcome.record, outcome.result
    words = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[outcome.status]
    how = (
        f" ({result['reason'].replace('_', ' ')})" if result and result["reason"] not in ("finished", "stopped") else ""
    )
    if result and "checkpoint" in result:
        return _of_evaluation(outcome, result)
    steps = f", {outcome.step} steps" if outcome.step else ""
    rows = [("outcome", f"{words}{how}{steps} in {took(record, outcome.seconds)}")]
    if outcome.cause and outcome.status == "FAILED":
        rows.append(("cause", outcome.cause))
    rows.append(("where", outcome.where))
    if result and result["best"]:
        value, step = result["best"]
        rows.append(("best", f"{result['monitor']} {value:.4g} at step {step}"))
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {record.run_id}"))
    if outcome.gone:
        rows.append(("output", f"{record.run_dir} is gone, and with it the run's checkpoints"))
    elif record.run_dir:
        rows.append(("output", record.run_dir))
        if outcome.mlflow_command:
            rows.append(("next", outcome.mlflow_command))
        more = f" {outcome.length}=…" if outcome.status == "FINISHED" else ""
        rows.append(("" if outcome.mlflow_command else "next", f"{program} resume {record.name}{more}"))
    return "\n".join(f"{name:<8} {text}" for name, text in rows)


def took(record: Record, seconds: float) -> str:
    """How long a run went on: `0:21`, or of several attempts `1:05 in 2 attempts, the last 0:21`."""
    if record.attempts < 2 or not record.seconds:
        return duration(seconds)
    return f"{duration(record.seconds)} in {record.attempts} attempts, the last {duration(seconds)}"


def end_tags(record: Record) -> dict[str, str]:
    """What MLflow is told of an attempt's end beside its status: the figures that `status` shows."""
    tags = {SECONDS_TAG: f"{record.seconds:.3f}"}
    if record.step is not None:
        tags[STEP_TAG] = str(record.step)
    return tags


def begin_tags(record: Record) -> dict[str, str]:
    """What MLflow is told of an attempt's begin; the figures of the attempt before are taken back."""
    tags = {ATTEMPTS_TAG: str(record.attempts), LAUNCHED_TAG: f"{record.launched:.3f}"}
    if record.attempts > 1:
        tags |= {SECONDS_TAG: f"{record.seconds:.3f}", STEP_TAG: ""}
    return tags


def _of_evaluation(outcome: Outcome, result: Mapping[str, Any]) -> str:
    """The last words of an evaluation: every metric, in full."""
    wide = max(8, *(len(name) for name in result["metrics"]))
    rows = [("outcome", f"step {result['step']} evaluated in {duration(outcome.seconds)}"), ("where", outcome.where)]
    rows += [(name, f"{value:.6g}") for name, value in result["metrics"].items()]
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {outcome.record.run_id}"))
    rows.append(("output", outcome.record.run_dir))
    return "\n".join(f"{name:<{wide}} {text}" for name, text in rows)


def table(outcomes: Sequence[Outcome]) -> str:
    """Runs that were started one after the other, one a line: what became of each."""
    words = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
    rows = [("run", "outcome", "time", "best")]
    for outcome in outcomes:
        best = (outcome.result or {}).get("best")
        shown = f"{outcome.result['monitor']} {best[0]:.4g} at step {best[1]}" if outcome.result and best else "-"
        told = outcome.cause if outcome.status == "FAILED" and outcome.cause else shown
        rows.append((outcome.record.name, words[outcome.status], duration(outcome.seconds), told))
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{wide[0]}}  {status:<{wide[1]}}  {time:>{wide[2]}}  {told}" for name, status, time, told in rows
    )
