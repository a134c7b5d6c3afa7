"""`list`: runs and sweeps, mine or everybody's, the newest first; those that only seem to run are closed on the way."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raytrainer import provenance, tracking
from raytrainer.errors import StorageError, TrackingError
from raytrainer.history import finding
from raytrainer.history.facts import Facts, facts_of
from raytrainer.history.finding import Known
from raytrainer.history.jobs import Clusters, Job
from raytrainer.history.reconcile import close_dead, look_at
from raytrainer.history.signs import Verdict
from raytrainer.progress import duration
from raytrainer.run import SUBMITTED, Record
from raytrainer.storage import Storage
from raytrainer.tracking import lookup
from raytrainer.tracking.sender import LOCAL_PREFIX
from raytrainer.tracking.server import StoredRun

STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED", "PENDING", "UNKNOWN")
_MOST_RUNNING = 100  # that are looked at in one listing
_OF_JOB = {"PENDING": "PENDING", "RUNNING": "RUNNING", "STOPPED": "KILLED", "SUCCEEDED": "FINISHED", "FAILED": "FAILED"}


def list_runs(
    *,
    everyone: bool = False,
    status: str | None = None,
    limit: int = 30,
    say: Callable[[str], None] = lambda text: None,
    clusters: Clusters | None = None,
) -> list[Facts]:
    """Runs and sweeps by their start, the newest first.

    Args:
        everyone: Not only those of this user.
        status: Only those.
        limit: The most that are returned.
        say: Told what was closed, and what could not be asked.
        clusters: For tests.
    """
    clusters, root = clusters or Clusters(), Path.cwd() / "runs"
    uri = finding.tracking_uri_here()
    found: list[Facts] = []
    if uri is not None:
        try:
            found = _from_mlflow(uri, None if everyone else provenance.user(), status, limit, clusters, say)
        except TrackingError as error:
            say(f"{error}; what follows is from {root} alone")
            uri = None
    found += _from_disk(root, uri, clusters)
    found += _submitted(root, {facts.name for facts in found}, clusters)
    for address, why in clusters.silent.items():
        say(f"the cluster {address} could not be asked: {why}")
    found = [facts for facts in found if status is None or facts.status == status]
    return sorted(found, key=lambda facts: facts.started or 0.0, reverse=True)[:limit]


def _from_mlflow(
    uri: str, user: str | None, status: str | None, limit: int, clusters: Clusters, say: Callable[[str], None]
) -> list[Facts]:
    found = lookup.search_runs(uri, limit=_MOST_RUNNING, user=user, status="RUNNING")
    looked = look_at([finding.as_stored(run, uri) for run in found], clusters)
    if close_dead(looked, clusters, say):
        again = {r.run_id for r in lookup.search_runs(uri, limit=_MOST_RUNNING, user=user, status="RUNNING")}
        looked = [(known, verdict) for known, verdict in looked if known.stored and known.stored.run_id in again]
    by_id = {known.stored.run_id: (known, verdict) for known, verdict in looked if known.stored is not None}
    if status == "RUNNING":
        return [facts_of(known, verdict) for known, verdict in looked]
    if status in ("PENDING", "UNKNOWN"):
        return []

    def facts(run: StoredRun) -> Facts:
        # Of one that has ended MLflow knows all that a list shows: its directory need not be read.
        known, verdict = by_id.get(run.run_id, (None, None))
        return facts_of(known or finding.as_stored(run, uri), verdict)

    return [facts(run) for run in lookup.search_runs(uri, limit=limit, user=user, status=status)]


def _from_disk(root: Path, asked: str | None, clusters: Clusters) -> list[Facts]:
    """Those that MLflow does not have; all where it could not be asked."""
    found = [Known(record, storage) for record, storage in finding.records(root) if not _is_in(asked, record)]
    running = [known for known in found if known.record.status == "RUNNING"]
    lives = {known.record.name: verdict for known, verdict in look_at(running, clusters)}
    return [_judged(facts_of(known, lives.get(known.record.name)), lives.get(known.record.name)) for known in found]


def _is_in(asked: str | None, record: Record) -> bool:
    if asked is None or record.run_id is None or record.run_id.startswith(LOCAL_PREFIX):
        return False
    return record.tracking_uri == tracking.redacted(asked)


def _judged(facts: Facts, verdict: Verdict | None) -> Facts:
    """A dead one as what it is, though nobody could be told."""
    if verdict is None or verdict.life != "dead":
        return facts
    return replace(facts, status=verdict.status, cause=verdict.cause, ended=verdict.when)


def _submitted(root: Path, shown: set[str], clusters: Clusters) -> list[Facts]:
    """What was submitted from here and has not come so far that MLflow knows it: its cluster says how it is."""
    found = []
    for record in finding.submitted(root):
        if record.name in shown:
            with suppress(StorageError):  # the run itself is known now
                Storage(root / SUBMITTED).delete(record.name)
        elif (known := Known(record, None)).submission_id is not None:
            job, _ = clusters.jobs_of(known)
            if job is not None or known.cluster_address in clusters.silent:
                found.append(facts_of_job(known, job))
    return found


def facts_of_job(known: Known, job: Job | None) -> Facts:
    """A run of which there is nothing yet but its job."""
    facts = facts_of(known)
    if job is None:
        return replace(facts, status="UNKNOWN", cause="its cluster does not say")
    cause = " ".join(job.message.split())[:500] if job.status in ("FAILED", "STOPPED") else None
    return replace(facts, status=_OF_JOB.get(job.status, job.status), started=job.started, ended=job.ended, cause=cause)


def table(runs: Sequence[Facts], *, users: bool = False, now: float | None = None, width: int | None = None) -> str:
    """The runs as lines of text, as wide as the terminal; for a file nothing is cut."""
    if not runs:
        return "no runs"
    now = time.time() if now is None else now
    heads = [
        "NAME",
        *(["USER"] if users else []),
        "STATUS",
        "WHERE",
        "STARTED",
        "STEP",
        "BEST",
        "WORKERS",
        "LAST ERROR",
    ]
    rows = [
        [
            facts.name,
            *([facts.user or ""] if users else []),
            facts.status + ("?" if facts.life == "unsure" else ""),
            (facts.where or "").partition(",")[0],
            ago(facts.started, now),
            progress(facts),
            "" if facts.best is None else f"{facts.monitor} {facts.best:.4g}",
            facts.workers or "",
            (facts.cause or "") if facts.status != "FINISHED" else "",
        ]
        for facts in runs
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads) - 1)]
    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    lines = [
        "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in [heads, *rows]
    ]
    return "\n".join(line.rstrip()[:width] for line in lines)


def progress(facts: Facts) -> str:
    """`30/132`, or of a sweep `12 trials: 3 running, 9 finished`."""
    if facts.kind == "sweep":
        told = ", ".join(f"{count} {status}" for status, count in sorted(facts.trials.items()))
        return f"{sum(facts.trials.values())} trials" + (f": {told}" if told else "")
    if facts.step is None:
        return ""
    return f"{facts.step}/{facts.total_steps}" if facts.total_steps else str(facts.step)


def ago(when: float | None, now: float) -> str:
    """`3:04:59 ago`, or of more than two days the day."""
    if when is None:
        return ""
    if 0 <= now - when < 2 * 86400:
        return f"{duration(now - when)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(when))
