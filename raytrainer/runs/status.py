"""`status ID`: all that is known of one run, from MLflow, its directory and, for a job, its cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from raytrainer import provenance, tracking
from raytrainer.submission.ending import ending_of, one_line
from raytrainer.errors import RaytrainerError, StorageError, TrackingError
from raytrainer.runs.finding import RunHandle, look_up, with_tracking
from raytrainer.runs.jobs import ACTIVE, Clusters, Job
from raytrainer.runs.listing import ago, as_attempt, facts_of_job, progress, with_failed_job
from raytrainer.runs.liveness import Verdict
from raytrainer.runs.reconcile import close_dead, verdict_of
from raytrainer.runs.run_summary import RunSummary, Saved, checkpoints, facts_of
from raytrainer.progress import duration
from raytrainer.tracking.sender import LOCAL_PREFIX


@dataclass(frozen=True)
class Status:
    """The status of one run.

    Attributes:
        facts: The summary, as in a list.
        checkpoints: The committed checkpoints, the oldest first; none for a sweep.
        mlflow: The address of its MLflow page, or of the tracking store.
        lost: Whether its MLflow run, or MLflow's database, was deleted.
        job: The state of its job, as Ray names it, and the cause of its end in one line.
        waits: What a pending job lacks, and who holds it.
        verdict: Whether the driver is alive, for a run that says RUNNING.
        next: Commands that make sense now.
    """

    facts: RunSummary
    checkpoints: Sequence[Saved]
    mlflow: str | None
    job: tuple[str, str] | None
    waits: str | None
    verdict: Verdict | None
    next: Sequence[str]
    lost: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            **self.facts.to_json(),
            "checkpoints": [saved.__dict__ for saved in self.checkpoints],
            "mlflow": self.mlflow,
            "mlflow_run_is_gone": self.lost,
            "job": None if self.job is None else {"status": self.job[0], "message": self.job[1]},
            "waits": self.waits,
            "next": list(self.next),
        }


def status_of(
    identifier: str, *, say: Callable[[str], None] = lambda text: None, clusters: Clusters | None = None
) -> Status:
    """Return what `status` shows of a run. A run marked RUNNING whose driver is dead gets its final status first.

    Raises:
        RunNotFound: There is no such run.
    """
    clusters, known = clusters or Clusters(), look_up(identifier)
    lost = False
    try:
        known = with_tracking(known)
        lost = known.stored is None and bool(known.record.run_id) and bool(known.record.tracking_uri)
        lost = lost and not (known.record.run_id or "").startswith(LOCAL_PREFIX)
    except TrackingError as error:
        say(f"{error}; what follows is from {known.record.run_dir} alone")
    verdict = None
    known, job = clusters.attempt(known) if known.trial is None else (known, None)
    clusters.tell(say)
    if known.storage is None and known.stored is None:
        facts = facts_of_job(known, job, clusters)
    else:
        running = (known.stored.status if known.stored is not None else known.record.status) == "RUNNING"
        if running and known.trial is None:
            verdict = verdict_of(known, clusters)
            if close_dead([(known, verdict)], clusters, say):
                known = with_tracking(replace(known, stored=None, record=replace(known.record, status=verdict.status)))
        facts = facts_of(known, verdict)
        if verdict is not None and verdict.life == "dead":
            facts = replace(facts, status=verdict.status, cause=facts.cause or verdict.cause)
        if (last := clusters.ended_before_it_began(known)) is not None:
            facts = with_failed_job(facts, last)
        if job is not None and job.status in ACTIVE and (facts.status != "RUNNING" or job.status == "PENDING"):
            facts = as_attempt(facts, known, job)
    saved: list[Saved] = []
    if known.storage is not None and known.trial is None and facts.kind == "run":
        with suppress(StorageError):
            saved = checkpoints(known.storage)
    if facts.best is None and facts.kind == "run":  # recorded by a version without the best value
        facts = _best_of(saved, known, facts)
    return Status(
        facts,
        saved,
        _page(known),
        None
        if job is None
        else (job.status, (one_line(job.message) if job.status in ACTIVE else ending_of(job).cause) or ""),
        _waits(job),
        verdict,
        _next(facts, saved, provenance.program()),
        lost,
    )


def text(status: Status, now: float | None = None) -> str:
    """Return a status as lines of text for a person."""
    now = time.time() if now is None else now
    f = status.facts
    rows = [("name", f.name + ("" if f.kind == "run" else f"  ({f.kind})"))]
    how = {"alive": "", "unsure": ", but that is uncertain"}.get(f.life or "", "")
    rows.append(("status", f.status + how + (f", attempt {f.attempts}" if f.attempts and f.attempts > 1 else "")))
    if f.cause:
        rows.append(("cause", f.cause))
    if status.verdict is not None and status.verdict.life == "alive":
        rows.append(("", status.verdict.why))
    if f.where:
        rows.append(("where", f.where + (f", launched on {f.host}" if f.host else "")))
    if f.started is not None:
        rows.append(
            ("started", f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(f.started))}, {ago(f.started, now)}")
        )
    if f.seconds is not None:
        several = f" in {f.attempts} attempts" if f.attempts and f.attempts > 1 else ""
        rows.append(("so far" if f.status == "RUNNING" else "took", duration(f.seconds) + several))
    if told := progress(f):
        rows.append(("trials" if f.kind == "sweep" else "step", told))
    if f.best is not None:
        where = (f" at step {f.best_step}" if f.best_step else "") + (
            f" of trial {f.best_trial}" if f.best_trial else ""
        )
        rows.append(("best", f"{f.monitor} {f.best:.4g}{where}"))
    if f.workers:
        rows.append(("workers", f.workers))
    if f.submission_id:
        why = "" if status.job is None or status.job[1] == f.cause else status.job[1]
        state = "" if status.job is None else f", {status.job[0]}" + (f": {why}" if why else "")
        rows.append(("job", f"{f.submission_id} at {f.cluster_address}{state}"))
    if status.waits:
        rows += [("waits" if not i else "", line) for i, line in enumerate(status.waits.splitlines())]
    if status.checkpoints:
        last = status.checkpoints[-1]
        count = len(status.checkpoints)
        rows.append(("saved", f"step {last.step}, {last.created}" + (f", and {count - 1} more" if count > 1 else "")))
    if status.mlflow:
        gone = " is gone; resume continues in a new one" if status.lost else ""
        rows.append(("mlflow", f"{status.mlflow}  run {f.run_id}{gone}"))
    if f.run_dir:
        rows.append(("output", f.run_dir))
    rows += [("next" if not i else "", line) for i, line in enumerate(status.next)]
    return "\n".join(f"{name:<8} {line}".rstrip() for name, line in rows)


def _best_of(saved: Sequence[Saved], known: RunHandle, facts: RunSummary) -> RunSummary:
    """Add the best value from the checkpoints, for a run whose best value is not in MLflow."""
    values = [(s.metric, s.step) for s in saved if s.metric is not None and s.metric == s.metric]
    config = known.storage.read_if_exists("config.yaml") if known.storage is not None else None
    if not values or config is None:
        return facts
    from raytrainer.config import flattened

    flat = flattened(config.decode())
    best, step = (max if flat.get("checkpoint.mode") == "max" else min)(values)
    return replace(facts, monitor=flat.get("checkpoint.monitor"), best=best, best_step=step)


def _page(known: RunHandle) -> str | None:
    """Return the address of the MLflow page, as the summary of a launch shows it."""
    uri = known.record.tracking_uri
    if not uri.startswith(("http://", "https://")) or known.stored is None:
        return uri or None
    stored = known.stored
    return f"{tracking.redacted(uri).rstrip('/')}/#/experiments/{stored.experiment_id}/runs/{stored.run_id}"


def _waits(job: Job | None) -> str | None:
    """Return what a pending job is waiting for."""
    if job is None or job.status != "PENDING":
        return None
    try:
        return job.explain_waiting()
    except (RaytrainerError, OSError) as error:
        return str(error)


def _next(facts: RunSummary, saved: Sequence[Saved], program: str) -> list[str]:
    name = facts.name
    if facts.status in ("RUNNING", "PENDING", "UNKNOWN"):
        return [f"{program} logs -f {name}", *([f"{program} stop {name}"] if facts.kind != "trial" else [])]
    if facts.kind == "trial":
        return [f"{program} rerun {name}"]
    if facts.status == "REFUSED":  # there is no run: after the fix, the same name can be submitted again
        return [f"{program} logs {name}"]
    found = [f"{program} logs {name}"]
    if facts.status != "FINISHED" and (saved or facts.kind == "sweep"):
        found.append(f"{program} resume {name}")
    return [*found, f"{program} rerun {name}"]
