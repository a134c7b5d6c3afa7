"""`status ID`: everything about one run, from MLflow, its directory and, for a job, its cluster."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from raytrainer import provenance, tracking
from raytrainer.core.formatting import ago, duration
from raytrainer.errors import RaytrainerError, StorageError, TrackingError
from raytrainer.runs import printing
from raytrainer.runs.arguments import VerbParser
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.job_summary import summarize_job, with_active_job, with_last_job
from raytrainer.runs.jobs import ACTIVE, Clusters, Job
from raytrainer.runs.liveness import Liveness
from raytrainer.runs.reconcile import check_liveness, close_orphans
from raytrainer.runs.resolve import resolve_run, with_mlflow_run
from raytrainer.runs.summary import RunSummary, SavedCheckpoint, saved_checkpoints, summarize
from raytrainer.submission.ending import ending_of, one_line
from raytrainer.tracking.sender import LOCAL_PREFIX

ABOUT = "Everything about a run: where it is, how far, its best value, what it waits for, what to do next."


def add_arguments(parser: VerbParser) -> None:
    parser.add_id()


def run(arguments: argparse.Namespace) -> int:
    status = status_of(arguments.id, say=printing.say)
    print(printing.to_json(status.to_json()) if arguments.json else text(status))
    return 0


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        summary: The summary, as in a list.
        checkpoints: The committed checkpoints, the oldest first; none for a sweep.
        mlflow: The address of its MLflow page, or of the tracking store.
        is_lost: Whether its MLflow run, or MLflow's database, was deleted.
        job: The state of its job, as Ray names it, and the cause of its end in one line.
        waits: What a pending job lacks, and who holds it.
        liveness: Whether the driver is alive, for a run marked RUNNING.
        next: Commands that make sense now.
    """

    summary: RunSummary
    checkpoints: Sequence[SavedCheckpoint]
    mlflow: str | None
    is_lost: bool
    job: tuple[str, str] | None
    waits: str | None
    liveness: Liveness | None
    next: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.summary.to_json(),
            "checkpoints": [checkpoint.__dict__ for checkpoint in self.checkpoints],
            "mlflow": self.mlflow,
            "mlflow_run_is_gone": self.is_lost,
            "job": None if self.job is None else {"status": self.job[0], "message": self.job[1]},
            "waits": self.waits,
            "next": list(self.next),
        }


def status_of(
    identifier: str, *, say: Callable[[str], None] = lambda text: None, clusters: Clusters | None = None
) -> RunStatus:
    """Return what `status` shows of a run. A run marked RUNNING whose driver is dead gets its final status first.

    Raises:
        RunNotFound: There is no such run.
    """
    clusters, handle = clusters or Clusters(), resolve_run(identifier)
    is_lost = False
    try:
        handle = with_mlflow_run(handle)
        is_lost = handle.mlflow_run is None and _was_in_mlflow(handle)
    except TrackingError as error:
        say(f"{error}; what follows is from {handle.record.run_dir} alone")
    handle, job = clusters.attempt(handle) if handle.trial is None else (handle, None)
    clusters.report_failures(say)
    liveness = None
    if _says_running(handle):
        liveness = check_liveness(handle, clusters)
        if close_orphans([(handle, liveness)], clusters, say):
            record = replace(handle.record, status=liveness.status)
            handle = with_mlflow_run(replace(handle, mlflow_run=None, record=record))
    summary = _summary(handle, liveness, job, clusters)
    checkpoints: list[SavedCheckpoint] = []
    if handle.storage is not None and handle.trial is None and summary.kind == "run":
        with suppress(StorageError):
            checkpoints = saved_checkpoints(handle.storage)
    if summary.best is None and summary.kind == "run":  # recorded by a version without the best value
        summary = _with_best_of(checkpoints, handle, summary)
    return RunStatus(
        summary,
        checkpoints,
        _mlflow_page(handle),
        is_lost,
        None if job is None else (job.status, _job_message(job)),
        _waits(job),
        liveness,
        _next_commands(summary, checkpoints, provenance.program()),
    )


def text(status: RunStatus, now: float | None = None) -> str:
    """Return a status as lines of text for a person."""
    now = time.time() if now is None else now
    summary = status.summary
    liveness = status.liveness
    rows = [
        ("name", summary.name + ("" if summary.kind == "run" else f"  ({summary.kind})")),
        ("status", _status_text(summary)),
        ("cause", summary.cause),
        ("", liveness.reason if liveness is not None and liveness.state == "alive" else None),
        ("where", summary.where and summary.where + (f", launched on {summary.host}" if summary.host else "")),
        ("started", _started_text(summary, now)),
        ("so far" if summary.status == "RUNNING" else "took", _duration_text(summary)),
        ("trials" if summary.kind == "sweep" else "step", summary.progress),
        ("best", _best_text(summary)),
        ("workers", summary.workers),
        ("job", _job_text(status)),
        ("waits", status.waits),
        ("saved", _saved_text(status.checkpoints)),
        ("mlflow", _mlflow_text(status)),
        ("output", summary.run_dir),
        ("next", "\n".join(status.next)),
    ]
    lines = []
    for name, value in rows:
        for number, line in enumerate((value or "").splitlines()):
            lines.append(f"{'' if number else name:<8} {line}".rstrip())
    return "\n".join(lines)


def _status_text(summary: RunSummary) -> str:
    uncertain = ", but that is uncertain" if summary.life == "unsure" else ""
    attempt = f", attempt {summary.attempts}" if summary.attempts and summary.attempts > 1 else ""
    return summary.status + uncertain + attempt


def _started_text(summary: RunSummary, now: float) -> str | None:
    if summary.started is None:
        return None
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(summary.started))}, {ago(summary.started, now)}"


def _duration_text(summary: RunSummary) -> str | None:
    if summary.seconds is None:
        return None
    attempts = f" in {summary.attempts} attempts" if summary.attempts and summary.attempts > 1 else ""
    return duration(summary.seconds) + attempts


def _best_text(summary: RunSummary) -> str | None:
    if summary.best is None:
        return None
    step = f" at step {summary.best_step}" if summary.best_step else ""
    trial = f" of trial {summary.best_trial}" if summary.best_trial else ""
    return f"{summary.monitor} {summary.best:.4g}{step}{trial}"


def _job_text(status: RunStatus) -> str | None:
    summary = status.summary
    if not summary.submission_id:
        return None
    text = f"{summary.submission_id} at {summary.cluster_address}"
    if status.job is None:
        return text
    state, message = status.job
    return f"{text}, {state}" + (f": {message}" if message and message != summary.cause else "")


def _saved_text(checkpoints: Sequence[SavedCheckpoint]) -> str | None:
    if not checkpoints:
        return None
    last, more = checkpoints[-1], len(checkpoints) - 1
    return f"step {last.step}, {last.created}" + (f", and {more} more" if more else "")


def _mlflow_text(status: RunStatus) -> str | None:
    lost = " is gone; resume continues in a new one" if status.is_lost else ""
    return status.mlflow and f"{status.mlflow}  run {status.summary.run_id}{lost}"


def _was_in_mlflow(handle: RunHandle) -> bool:
    record = handle.record
    return bool(record.run_id and record.tracking_uri) and not (record.run_id or "").startswith(LOCAL_PREFIX)


def _says_running(handle: RunHandle) -> bool:
    if handle.trial is not None or (handle.storage is None and handle.mlflow_run is None):
        return False
    return (handle.mlflow_run.status if handle.mlflow_run is not None else handle.record.status) == "RUNNING"


def _summary(handle: RunHandle, liveness: Liveness | None, job: Job | None, clusters: Clusters) -> RunSummary:
    """Return the summary of a run with what its liveness and its jobs add."""
    if handle.storage is None and handle.mlflow_run is None:
        return summarize_job(handle, job, clusters)
    summary = summarize(handle, liveness)
    if liveness is not None and liveness.state == "dead":
        summary = replace(summary, status=liveness.status, cause=summary.cause or liveness.cause)
    if (last_job := clusters.ended_before_it_began(handle)) is not None:
        summary = with_last_job(summary, last_job)
    if job is not None and job.status in ACTIVE and (summary.status != "RUNNING" or job.status == "PENDING"):
        summary = with_active_job(summary, handle, job)
    return summary


def _with_best_of(checkpoints: Sequence[SavedCheckpoint], handle: RunHandle, summary: RunSummary) -> RunSummary:
    """Add the best value from the checkpoints, for a run whose best value is not in MLflow."""
    values = [(c.metric, c.step) for c in checkpoints if c.metric is not None and c.metric == c.metric]
    config = handle.storage.read_if_exists("config.yaml") if handle.storage is not None else None
    if not values or config is None:
        return summary
    from raytrainer.config import flattened

    flat = flattened(config.decode())
    best, step = (max if flat.get("checkpoint.mode") == "max" else min)(values)
    return replace(summary, monitor=flat.get("checkpoint.monitor"), best=best, best_step=step)


def _mlflow_page(handle: RunHandle) -> str | None:
    """Return the address of the MLflow page, as the summary of a launch shows it."""
    uri, run = handle.record.tracking_uri, handle.mlflow_run
    if not uri.startswith(("http://", "https://")) or run is None:
        return uri or None
    return f"{tracking.redacted(uri).rstrip('/')}/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def _job_message(job: Job) -> str:
    return (one_line(job.message) if job.status in ACTIVE else ending_of(job).cause) or ""


def _waits(job: Job | None) -> str | None:
    """Return what a pending job is waiting for."""
    if job is None or job.status != "PENDING":
        return None
    try:
        return job.explain_waiting()
    except (RaytrainerError, OSError) as error:
        return str(error)


def _next_commands(summary: RunSummary, checkpoints: Sequence[SavedCheckpoint], program: str) -> list[str]:
    name = summary.name
    if summary.status in ("RUNNING", "PENDING", "UNKNOWN"):
        return [f"{program} logs -f {name}", *([f"{program} stop {name}"] if summary.kind != "trial" else [])]
    if summary.kind == "trial":
        return [f"{program} rerun {name}"]
    if summary.status == "REFUSED":  # there is no run: after the fix, the same name can be submitted again
        return [f"{program} logs {name}"]
    can_resume = summary.status != "FINISHED" and (checkpoints or summary.kind == "sweep")
    verbs = ["logs", *(["resume"] if can_resume else []), "rerun"]
    return [f"{program} {verb} {name}" for verb in verbs]
