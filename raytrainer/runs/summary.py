"""The summary of a run that `list` and `status` show: from MLflow if it was queried, else from the run directory."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from raytrainer.attempt.record import ATTEMPTS_TAG, LAUNCHED_TAG, SECONDS_TAG, STEP_TAG, Record
from raytrainer.errors import RunNotFound, StorageError
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.liveness import Liveness
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Mode, TrialJournal
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.table import ranked
from raytrainer.tracking.runs import CAUSE_TAG
from raytrainer.tracking.server import StoredRun

_TRIAL_STATUS = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "pruned": "KILLED",
    "stopped": "KILLED",
}
_CHECKPOINT = re.compile(r"step-(\d+)(\.\d+)?")


@dataclass(frozen=True)
class RunSummary:
    """The summary of a run, sweep or trial. Unknown values are None.

    Attributes:
        status: The status in MLflow. A job without an MLflow run is PENDING while it waits, REFUSED if the cluster side
            refused it, and UNKNOWN if its cluster does not answer.
        where: A description such as `local Ray, 2 workers on CPU`, or the address of the cluster.
        started, ended: Start of the first attempt and end of the last one, in seconds since the epoch.
        seconds: Duration of all attempts together, up to now for a running one. For a trial, the time in which it trained.
        step, total_steps: Optimizer steps done, and planned.
        monitor, best, best_step: The monitored metric, its best value, and the step of that value. For a sweep, those of
            the best trial, whose number is `best_trial`.
        trials: Number of trials by status, for a sweep.
        cause: Why the run ended as it did. For a running one, what is uncertain about it.
        last_job: `submission_id`, `status` and `cause` of the last job, if that ended before it started the run.
        life: `alive`, `dead` or `unsure`, for a run marked RUNNING.
    """

    name: str
    kind: str
    status: str
    run_id: str | None = None
    user: str | None = None
    host: str | None = None
    where: str | None = None
    started: float | None = None
    ended: float | None = None
    seconds: float | None = None
    step: int | None = None
    total_steps: int | None = None
    monitor: str | None = None
    best: float | None = None
    best_step: int | None = None
    best_trial: str | None = None
    workers: str | None = None
    trials: Mapping[str, int] = field(default_factory=dict)
    cause: str | None = None
    life: str | None = None
    run_dir: str = ""
    submission_id: str | None = None
    cluster_address: str | None = None
    attempts: int | None = None
    last_job: Mapping[str, str] | None = None

    @property
    def progress(self) -> str:
        """The progress as text: `30/132`, or for a sweep `12 trials: 3 running, 9 finished`."""
        if self.kind == "sweep":
            counts = ", ".join(f"{count} {status}" for status, count in sorted(self.trials.items()))
            return f"{sum(self.trials.values())} trials" + (f": {counts}" if counts else "")
        if self.step is None:
            return ""
        return f"{self.step}/{self.total_steps}" if self.total_steps else str(self.step)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON. Times are ISO 8601 in UTC."""
        values: dict[str, Any] = {**self.__dict__, "trials": dict(self.trials)}
        for key in ("started", "ended"):
            if values[key] is not None:
                values[key] = datetime.fromtimestamp(values[key], UTC).isoformat(timespec="seconds")
        if self.seconds is not None:
            values["seconds"] = round(self.seconds, 3)
        return values


@dataclass(frozen=True)
class SavedCheckpoint:
    """A committed checkpoint as its manifest describes it. Its files are neither read nor verified."""

    name: str
    step: int
    metric: float | None
    created: str


def saved_checkpoints(storage: Storage) -> list[SavedCheckpoint]:
    """Return the committed checkpoints in a run directory, the oldest first.

    Raises:
        StorageError: The directory cannot be read.
    """
    checkpoints = []
    place = storage.child("checkpoints")
    for entry in place.list():
        match = _CHECKPOINT.fullmatch(entry.name)
        data = place.read_if_exists(f"{entry.name}/manifest.json") if match else None
        if match is None or data is None:
            continue
        with suppress(ValueError, AttributeError):  # damaged: `resume` reports it
            manifest = json.loads(data)
            metric = manifest.get("metric")
            value = float(metric) if isinstance(metric, int | float) else None
            checkpoints.append(SavedCheckpoint(entry.name, int(match[1]), value, str(manifest.get("created", ""))))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def summarize(handle: RunHandle, liveness: Liveness | None = None) -> RunSummary:
    """Return the summary of a run. It reads the run directory, and makes no request to MLflow or to a cluster."""
    if handle.trial is not None and handle.storage is not None:
        return _summarize_trial(handle, handle.storage, handle.trial)
    record, run = handle.record, handle.mlflow_run
    tags, params = (run.tags, run.params) if run is not None else ({}, {})
    base = _Base.of_mlflow_run(run) if run is not None else _Base.of_record(record)
    cause, life = base.cause, None
    if liveness is not None:
        life = liveness.state
        cause = f"uncertain whether its driver is alive: {liveness.reason}" if life == "unsure" else cause
    is_sweep = record.kind == "sweep" and not handle.trial
    return RunSummary(
        name=f"{record.name}.{handle.trial}" if handle.trial else record.name,
        kind="trial" if handle.trial else record.kind,
        status=base.status,
        run_id=base.run_id,
        user=tags.get("mlflow.user"),
        host=tags.get("raytrainer.host"),
        where=_where(tags, handle.cluster_address),
        started=base.started,
        ended=base.ended,
        seconds=base.total_seconds(),
        workers=tags.get("raytrainer.workers") or params.get("scaling.num_workers"),
        cause=cause,
        life=life,
        run_dir=record.run_dir,
        submission_id=handle.submission_id,
        cluster_address=handle.cluster_address,
        attempts=record.attempts or _whole(tags.get(ATTEMPTS_TAG)),
        **(_sweep_progress(handle, tags) if is_sweep else _run_progress(handle)),
    )


@dataclass(frozen=True)
class _Base:
    """The values of a run that both MLflow and the run record have.

    Attributes:
        seconds: The duration of all attempts that have ended.
        launched: When the attempt that runs was launched.
    """

    status: str
    run_id: str | None
    started: float | None
    ended: float | None
    cause: str | None
    seconds: float | None
    launched: float | None

    @classmethod
    def of_mlflow_run(cls, run: StoredRun) -> _Base:
        tags, ended = run.tags, run.ended if run.status != "RUNNING" else None
        seconds, launched = _real(tags.get(SECONDS_TAG)), _real(tags.get(LAUNCHED_TAG))
        return cls(run.status, run.run_id, run.started, ended, tags.get(CAUSE_TAG) or None, seconds, launched)

    @classmethod
    def of_record(cls, record: Record) -> _Base:
        started = None
        with suppress(ValueError):
            started = datetime.fromisoformat(record.created).timestamp()
        ended = record.ended or None if record.status != "RUNNING" else None
        seconds, launched = record.seconds or None, record.launched or None
        return cls(record.status, record.run_id, started, ended, record.cause or None, seconds, launched)

    def total_seconds(self) -> float | None:
        """Return the duration of all attempts. For runs of versions that did not record it, return the time from the
        start of the first attempt to the end of the last."""
        is_running = self.status == "RUNNING"
        if not is_running and self.seconds is not None:
            return self.seconds
        if is_running and self.launched is not None:
            return (self.seconds or 0.0) + max(0.0, time.time() - self.launched)
        if self.started is None or (self.ended is None and not is_running):
            return None
        return max(0.0, (time.time() if self.ended is None else self.ended) - self.started)


def _run_progress(handle: RunHandle) -> dict[str, Any]:
    run = handle.mlflow_run
    if run is None:
        return _run_progress_on_disk(handle)
    tags = run.tags
    best = tags.get("raytrainer.monitor.best")
    # System metrics count their samples, not steps.
    steps = [step for key, (_, step) in run.metrics.items() if key.startswith(("train/", "val/"))]
    last_step = _whole(tags.get(STEP_TAG)) if run.status != "RUNNING" else None
    total_steps = _whole(tags.get("raytrainer.total_steps") or run.params.get("trainer.max_steps"))
    return {
        "step": max(steps, default=None) if last_step is None else last_step,
        # An evaluation knows only the checkpoint of its run.
        "total_steps": None if "raytrainer.evaluates" in tags else total_steps,
        "monitor": tags.get("raytrainer.monitor") or run.params.get("checkpoint.monitor"),
        "best": float(best) if best else None,
        "best_step": _whole(tags.get("raytrainer.monitor.best_step")),
    }


def _run_progress_on_disk(handle: RunHandle) -> dict[str, Any]:
    record = handle.record
    if record.step is not None and record.status != "RUNNING":
        best = record.best
        return {
            "step": record.step,
            "monitor": best.get("monitor"),
            "best": best.get("value"),
            "best_step": best.get("step"),
        }
    steps: list[int] = []
    if handle.storage is not None:
        with suppress(StorageError):
            names = [entry.name for entry in handle.storage.list("checkpoints")]
            steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return {"step": max(steps, default=None)}


def _summarize_trial(handle: RunHandle, storage: Storage, number: str) -> RunSummary:
    """Return the summary of a trial from the trial journal, which is newer than MLflow."""
    trials, name = TrialJournal.open(storage).trials, f"{handle.name}.{number}"
    if number not in trials:
        raise RunNotFound(f"{handle.name} has no trial {number}")
    trial, tags = trials[number], handle.mlflow_run.tags if handle.mlflow_run is not None else {}
    plan = Plan.read(storage)
    best = trial.best(cast(Mode, plan.mode))
    return RunSummary(
        name,
        "trial",
        _TRIAL_STATUS[trial.status],
        run_id=trial.run_id,
        user=tags.get("mlflow.user"),
        where=f"trial of {handle.name}",
        started=trial.started,
        ended=trial.ended,
        seconds=trial.took(time.time()),
        step=trial.reports[-1].step if trial.reports else None,
        monitor=plan.metric,
        best=best.value if best is not None else None,
        best_step=best.step if best is not None else None,
        cause=trial.cause,
        run_dir=storage.child(f"trials/{number}").display,
    )


def _sweep_progress(handle: RunHandle, tags: Mapping[str, str]) -> dict[str, Any]:
    value, mode = tags.get("raytrainer.best_value"), cast(Mode, tags.get("raytrainer.sweep.mode", "min"))
    trials = {k.rpartition(".")[2]: int(v) for k, v in tags.items() if k.startswith("raytrainer.trials.")}
    best = float(value) if value else None
    best_step, best_trial = _whole(tags.get("raytrainer.best_step")), tags.get("raytrainer.best_trial")
    has_ended = handle.mlflow_run is not None and handle.mlflow_run.status != "RUNNING"
    if not (has_ended and trials) and handle.storage is not None and handle.storage.is_local:
        # The driver uploads these values at the end of the sweep, or never if it was killed. The journal has them at once.
        with suppress(StorageError):
            all_trials = TrialJournal.open(handle.storage).trials.values()
            trials = dict(Counter(trial.status for trial in all_trials))
            first = next(iter(ranked(all_trials, mode)), None)  # the order of the sweep's own table
            report = None if first is None else first.best(mode)
            best, best_step = (None, None) if report is None else (report.value, report.step)
            best_trial = first.id if first is not None else None
    metric = tags.get("raytrainer.sweep.metric")
    return {"trials": trials, "monitor": metric, "best": best, "best_step": best_step, "best_trial": best_trial}


def _where(tags: Mapping[str, str], address: str | None) -> str | None:
    where = tags.get("raytrainer.where")
    if address is None:
        return where
    # On the cluster the driver connects to `auto`, which means nothing on this machine.
    rest = where.partition(", ")[2] if where else ""
    return f"{address}, {rest}" if rest else address


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _real(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
