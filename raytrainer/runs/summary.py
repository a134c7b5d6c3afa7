"""The summary of a run that `list` and `status` show: from MLflow if it was asked, else from the run directory."""

from __future__ import annotations

import json
import math
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
from raytrainer.runs.liveness import Verdict
from raytrainer.runs.resolve import RunHandle
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Mode, TrialJournal
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.table import ranked
from raytrainer.tracking.runs import CAUSE_TAG
from raytrainer.tracking.server import StoredRun

_MANIFEST = re.compile(r"step-(\d+)(\.\d+)?")


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run, sweep or trial. Values that are not known are None.

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
        life: `alive`, `dead` or `unsure`, for a run that says RUNNING.
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

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values. Times are ISO 8601 in UTC; a number that JSON cannot express is null."""
        values: dict[str, Any] = {**self.__dict__, "trials": dict(self.trials)}
        for key in ("started", "ended"):
            values[key] = None if values[key] is None else _iso(values[key])
        if self.best is not None and not math.isfinite(self.best):
            values["best"] = None
        if self.seconds is not None:
            values["seconds"] = round(self.seconds, 3)
        return values


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint as its manifest describes it. Its files are neither read nor verified."""

    name: str
    step: int
    metric: float | None
    created: str


def facts_of(known: RunHandle, verdict: Verdict | None = None) -> RunSummary:
    """Return the summary of a run. It reads the run directory, and makes no request to MLflow or to a cluster."""
    if known.trial is not None and known.storage is not None:
        return _of_trial(known, known.storage, known.trial)
    record, stored = known.record, known.stored
    tags = stored.tags if stored is not None else {}
    cause = (tags.get(CAUSE_TAG) if stored is not None else record.cause) or None
    status = stored.status if stored is not None else record.status
    started = stored.started if stored is not None else _seconds(record.created)
    ended = (stored.ended if stored is not None else record.ended or None) if status != "RUNNING" else None
    if verdict is not None and verdict.life == "unsure":
        cause = f"uncertain whether its driver is alive: {verdict.why}"
    return RunSummary(
        name=f"{record.name}.{known.trial}" if known.trial else record.name,
        kind="trial" if known.trial else record.kind,
        status=status,
        run_id=stored.run_id if stored is not None else record.run_id,
        user=tags.get("mlflow.user"),
        host=tags.get("raytrainer.host"),
        where=_where(tags, known.cluster_address),
        started=started,
        ended=ended,
        seconds=_seconds_of(record, stored, started, ended),
        workers=tags.get("raytrainer.workers") or (stored.params.get("scaling.num_workers") if stored else None),
        cause=cause,
        life=verdict.life if verdict is not None else None,
        run_dir=record.run_dir,
        submission_id=known.submission_id,
        cluster_address=known.cluster_address,
        attempts=record.attempts or _number(tags.get(ATTEMPTS_TAG)),
        **(_of_sweep(known, tags) if record.kind == "sweep" and not known.trial else _of_run(known, stored)),
    )


def checkpoints(storage: Storage) -> list[Saved]:
    """Return the committed checkpoints in a run directory, the oldest first.

    Raises:
        StorageError: The directory cannot be read.
    """
    saved_checkpoints = []
    place = storage.child("checkpoints")
    for entry in place.list():
        match = _MANIFEST.fullmatch(entry.name)
        data = place.read_if_exists(f"{entry.name}/manifest.json") if match else None
        if match is None or data is None:
            continue
        with suppress(ValueError, AttributeError):  # damaged: `resume` reports it
            manifest = json.loads(data)
            metric = manifest.get("metric")
            value = float(metric) if isinstance(metric, int | float) else None
            saved_checkpoints.append(Saved(entry.name, int(match[1]), value, str(manifest.get("created", ""))))
    return sorted(saved_checkpoints, key=lambda saved: saved.step)


def _seconds_of(record: Record, stored: StoredRun | None, started: float | None, ended: float | None) -> float | None:
    """Return the duration of all attempts, from MLflow if it was asked, else from the run record. For runs of versions that
    did not record it: the time from the start of the first attempt to the end of the last."""
    tags = stored.tags if stored is not None else {}
    before = _real(tags.get(SECONDS_TAG)) if stored is not None else record.seconds or None
    launched = _real(tags.get(LAUNCHED_TAG)) if stored is not None else record.launched or None
    running = (stored.status if stored is not None else record.status) == "RUNNING"
    if not running and before is not None:
        return before
    if running and launched is not None:
        return (before or 0.0) + max(0.0, time.time() - launched)
    if started is None or (ended is None and not running):
        return None
    return max(0.0, (time.time() if ended is None else ended) - started)


def _of_run(known: RunHandle, stored: StoredRun | None) -> dict[str, Any]:
    record = known.record
    if stored is None:
        if record.step is not None and record.status != "RUNNING":
            of_best = {"monitor": "monitor", "best": "value", "best_step": "step"}
            return {"step": record.step, **{name: record.best.get(key) for name, key in of_best.items()}}
        steps: list[int] = []
        if known.storage is not None:
            with suppress(StorageError):
                folders = [entry.name for entry in known.storage.list("checkpoints")]
                steps = [int(match[1]) for name in folders if (match := _MANIFEST.fullmatch(name))]
        return {"step": max(steps, default=None)}
    tags = stored.tags
    best, monitor = tags.get("raytrainer.monitor.best"), tags.get("raytrainer.monitor")
    # System metrics count their samples, not steps.
    steps = [step for key, (_, step) in stored.metrics.items() if key.startswith(("train/", "val/"))]
    told = _number(tags.get(STEP_TAG)) if stored.status != "RUNNING" else None
    evaluates = "raytrainer.evaluates" in tags  # an evaluation knows only the checkpoint of its run
    return {
        "step": max(steps, default=None) if told is None else told,
        "total_steps": None
        if evaluates
        else _number(tags.get("raytrainer.total_steps") or stored.params.get("trainer.max_steps")),
        "monitor": monitor or stored.params.get("checkpoint.monitor"),
        "best": float(best) if best else None,
        "best_step": _number(tags.get("raytrainer.monitor.best_step")),
    }


def _of_trial(known: RunHandle, storage: Storage, number: str) -> RunSummary:
    """Return the summary of a trial from the trial journal, which is newer than MLflow."""
    trials, name = TrialJournal.open(storage).trials, f"{known.record.name}.{number}"
    if number not in trials:
        raise RunNotFound(f"{known.record.name} has no trial {number}")
    trial, tags = trials[number], known.stored.tags if known.stored is not None else {}
    plan = Plan.read(storage)
    best = trial.best(cast(Mode, plan.mode))
    return RunSummary(
        name,
        "trial",
        _IN_MLFLOW[trial.status],
        run_id=trial.run_id,
        user=tags.get("mlflow.user"),
        where=f"trial of {known.record.name}",
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


_IN_MLFLOW = {
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "pruned": "KILLED",
    "stopped": "KILLED",
}


def _of_sweep(known: RunHandle, tags: Mapping[str, str]) -> dict[str, Any]:
    metric, mode = tags.get("raytrainer.sweep.metric"), tags.get("raytrainer.sweep.mode", "min")
    value = tags.get("raytrainer.best_value")
    trials = {k.rpartition(".")[2]: int(v) for k, v in tags.items() if k.startswith("raytrainer.trials.")}
    best = float(value) if value else None
    best_step, best_trial = _number(tags.get("raytrainer.best_step")), tags.get("raytrainer.best_trial")
    running = known.stored is None or known.stored.status == "RUNNING"
    if running and known.storage is not None and known.storage.is_local:
        # MLflow gets these values at the end of the sweep; the trial journal has them at once.
        with suppress(StorageError):
            all_trials = TrialJournal.open(known.storage).trials.values()
            trials = dict(Counter(trial.status for trial in all_trials))
            first = next(iter(ranked(all_trials, cast(Mode, mode))), None)  # the order of the sweep's own table
            report = None if first is None else first.best(cast(Mode, mode))
            best, best_step = (None, None) if report is None else (report.value, report.step)
            best_trial = first.id if first is not None else None
    return {"trials": trials, "monitor": metric, "best": best, "best_step": best_step, "best_trial": best_trial}


def _where(tags: Mapping[str, str], address: str | None) -> str | None:
    where = tags.get("raytrainer.where")
    if address is None:
        return where
    # On the cluster the driver connects to `auto`, which means nothing on this machine.
    rest = where.partition(", ")[2] if where else ""
    return f"{address}, {rest}" if rest else address


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _real(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _seconds(created: str) -> float | None:
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
