"""`list`: the runs and sweeps of one user or of all, the newest first. Runs whose driver is dead are closed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from raytrainer import provenance, tracking
from raytrainer.submission.ending import ending_of
from raytrainer.core.background import in_background
from raytrainer.errors import StorageError, TrackingError
from raytrainer.runs import finding
from raytrainer.runs.finding import RunHandle, SubmittedRun, reached
from raytrainer.runs.jobs import ACTIVE, Clusters, Job, never_sent
from raytrainer.runs.liveness import Verdict
from raytrainer.runs.reconcile import close_dead, look_at
from raytrainer.runs.run_summary import RunSummary, facts_of
from raytrainer.progress import duration
from raytrainer.attempt import SUBMITTED, Record
from raytrainer.storage import Storage
from raytrainer.tracking import lookup
from raytrainer.tracking.sender import LOCAL_PREFIX
from raytrainer.tracking.server import StoredRun

STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED", "REFUSED", "PENDING", "UNKNOWN")
_MOST_RUNNING = 100  # running runs that one listing checks
_MOST_CLUSTERS, _CLUSTERS_S = 5, 4.0  # how many of the last used clusters to ask for others' jobs, and for how long


def list_runs(
    *,
    everyone: bool = False,
    status: str | None = None,
    limit: int = 30,
    say: Callable[[str], None] = lambda text: None,
    clusters: Clusters | None = None,
) -> list[RunSummary]:
    """Return runs and sweeps by their start, the newest first.

    Args:
        everyone: Whether to return the runs of other users too.
        status: Return only runs with this status.
        limit: The maximum number of runs.
        say: Called with messages about runs that were closed and sources that could not be asked.
        clusters: For tests.
    """
    clusters, root = clusters or Clusters(), Path.cwd() / "runs"
    uri = finding.tracking_uri_here()
    found: list[RunSummary] = []
    if uri is not None:
        try:
            found = _from_mlflow(uri, None if everyone else provenance.user(), status, limit, clusters, say)
        except TrackingError as error:
            say(f"{error}; what follows is from {root} alone")
            uri = None
    found += _from_disk(root, uri, {facts.run_id for facts in found if facts.run_id is not None}, status, clusters)
    found = _with_submitted(found, root, clusters)
    if everyone:
        found = _with_others(found, root, clusters)
    clusters.tell(say)
    found = [facts for facts in found if status is None or facts.status == status]
    return sorted(found, key=lambda facts: facts.started or 0.0, reverse=True)[:limit]


def _from_mlflow(
    uri: str, user: str | None, status: str | None, limit: int, clusters: Clusters, say: Callable[[str], None]
) -> list[RunSummary]:
    found = lookup.search_runs(uri, limit=_MOST_RUNNING, user=user, status="RUNNING")
    root = Path.cwd() / "runs"
    looked = look_at([finding.with_sent(finding.as_stored(run, uri), root) for run in found], clusters)
    if close_dead(looked, clusters, say):
        again = {r.run_id for r in lookup.search_runs(uri, limit=_MOST_RUNNING, user=user, status="RUNNING")}
        looked = [(known, verdict) for known, verdict in looked if known.stored and known.stored.run_id in again]
    by_id = {known.stored.run_id: (known, verdict) for known, verdict in looked if known.stored is not None}
    if status == "RUNNING":
        return [_while_running(known, verdict) for known, verdict in looked]
    if status in ("PENDING", "REFUSED", "UNKNOWN"):  # only jobs have these
        return []

    def facts(run: StoredRun) -> RunSummary:
        # For a run that has ended, MLflow has everything that a list shows, so its directory is not read.
        known, verdict = by_id.get(run.run_id, (None, None))
        return facts_of(finding.as_stored(run, uri)) if known is None else _while_running(known, verdict)

    return [facts(run) for run in lookup.search_runs(uri, limit=limit, user=user, status=status)]


def _while_running(known: RunHandle, verdict: Verdict | None) -> RunSummary:
    """Return a run's summary with its active job. A job that was submitted from here is added later."""
    facts, going = facts_of(known, verdict), verdict.going if verdict is not None else None
    if (
        going is None
        or known.coming is not None
        or (
            going.status == "RUNNING" and known.submission_id is not None and going.submission_id == known.submission_id
        )
    ):
        return facts
    return as_attempt(facts, known, going)


def _from_disk(
    root: Path, asked: str | None, told: Collection[str], status: str | None, clusters: Clusters
) -> list[RunSummary]:
    """Return the runs that MLflow does not have, or no longer has; all runs if it could not be asked.

    Args:
        root: The directory with the runs.
        asked: The tracking store that was asked.
        told: The ids of the runs that it returned.
        status: Return only runs with this status in their record.
        clusters: The clusters that may know jobs.
    """
    there = []
    doubtful: dict[str, RunHandle] = {}
    for record, storage in finding.records(root):
        if not _is_in(asked, record):
            there.append(RunHandle(record, storage))
        elif record.run_id not in told and status in (None, record.status):
            doubtful[record.run_id or ""] = RunHandle(record, storage)
    if asked is not None and doubtful:
        # MLflow did not return these: they belong to another user, are too old for the list, or were deleted in MLflow.
        with suppress(TrackingError):
            there += [doubtful[run_id] for run_id in sorted(lookup.missing(asked, doubtful))]
    found = [finding.with_sent(known, root) for known in there]
    running = [known for known in found if known.record.status == "RUNNING"]
    lives = {known.record.name: verdict for known, verdict in look_at(running, clusters)}
    return [_judged(facts_of(known, lives.get(known.record.name)), lives.get(known.record.name)) for known in found]


def _is_in(asked: str | None, record: Record) -> bool:
    if asked is None or record.run_id is None or record.run_id.startswith(LOCAL_PREFIX):
        return False
    return record.tracking_uri == tracking.redacted(asked)


def _judged(facts: RunSummary, verdict: Verdict | None) -> RunSummary:
    """Return a dead run with its true status, even if MLflow could not be updated."""
    if verdict is None or verdict.life != "dead":
        return facts
    return replace(facts, status=verdict.status, cause=verdict.cause, ended=verdict.when)


def _with_submitted(found: list[RunSummary], root: Path, clusters: Clusters) -> list[RunSummary]:
    """Add the runs that were submitted from here and are not in MLflow yet, with the status from their clusters."""
    for sent in finding.submitted(root):
        known = RunHandle(sent.record, None, sent=sent)
        if known.submission_id is None:
            continue
        if any(_is_past(known, facts) for facts in found):
            with suppress(StorageError):  # the run itself is known now
                Storage(root / SUBMITTED).delete(sent.record.name)
            continue
        job, _ = clusters.jobs_of(known)
        is_it = [facts.name == known.record.name and sent.is_of(_record_of(facts)) for facts in found]
        if job is not None and job.status in ACTIVE and any(is_it):
            found = [as_attempt(f, known, job) if same else f for f, same in zip(found, is_it, strict=True)]
        elif job is not None and any(is_it) and not _has_gone_on(sent):
            found = [with_failed_job(f, job) if same else f for f, same in zip(found, is_it, strict=True)]
        elif not any(is_it) and (job is not None or known.cluster_address in clusters.silent):
            found = [*found, facts_of_job(known, job, clusters)]
    return found


def _has_gone_on(sent: SubmittedRun) -> bool:
    """Return whether the run record has an attempt after the submitted job, which MLflow alone does not show."""
    known = reached(RunHandle(sent.record, None, sent=sent))
    return known.storage is not None and known.coming is None


def _is_past(known: RunHandle, facts: RunSummary) -> bool:
    """Return whether a submission has become the run that is shown, perhaps in a later attempt. A run of the same name
    on another cluster does not count."""
    if facts.name != known.record.name or facts.cluster_address != known.cluster_address:
        return False
    if facts.submission_id is None or known.submission_id is None:
        return False
    return finding.number_of(facts.submission_id) >= finding.number_of(known.submission_id)


def _record_of(facts: RunSummary) -> Record:
    return Record(facts.name, facts.run_dir, facts.run_id)


def _with_others(found: list[RunSummary], root: Path, clusters: Clusters) -> list[RunSummary]:
    """Add the runs of any user on the clusters that are known here and that MLflow does not know yet."""
    places: dict[str, RunHandle] = {}
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "").rstrip("/")
    if address.startswith(("http://", "https://")):
        places[address] = RunHandle(Record("", "", job={"cluster_address": address}), None)
    here = [RunHandle(sent.record, None, sent=sent) for sent in finding.submitted(root)]
    here += [RunHandle(record, storage) for record, storage in finding.records(root)]
    for known in sorted(here, key=lambda known: known.record.created, reverse=True):
        if known.cluster_address is not None:
            places.setdefault(known.cluster_address, known)
    asked = list(places.items())[:_MOST_CLUSTERS]
    coming = [in_background(partial(clusters.all_of, known), "jobs") for _, known in asked]
    wait(coming, timeout=_CLUSTERS_S)
    for (address, _), future in zip(asked, coming, strict=True):
        if not future.done():
            clusters.silent.setdefault(address, f"no answer in {_CLUSTERS_S:g} s")
        for job in future.result() if future.done() and future.exception() is None else ():
            name = job.metadata.get("raytrainer.name")
            place = (job.submission_id, address)
            if name is None or job.status not in ACTIVE:
                continue
            if any((f.submission_id, f.cluster_address) == place for f in found):
                continue
            known = RunHandle(
                Record(name, "", job={"submission_id": job.submission_id, "cluster_address": address}), None
            )
            is_it = [f.name == name and f.cluster_address == address for f in found]  # names are unique on a cluster
            if any(is_it):
                found = [as_attempt(f, known, job) if same else f for f, same in zip(found, is_it, strict=True)]
            else:
                kind, user = job.metadata.get("raytrainer.kind", "run"), job.metadata.get("raytrainer.user")
                found = [*found, replace(facts_of_job(known, job, clusters), kind=kind, user=user)]
    return found


def as_attempt(facts: RunSummary, known: RunHandle, job: Job) -> RunSummary:
    """Return a run that continues, or will soon, as a job that its directory and MLflow may not know."""
    return replace(
        facts,
        status=job.status,
        submission_id=job.submission_id,
        cluster_address=known.cluster_address,
        where=known.cluster_address if facts.cluster_address != known.cluster_address else facts.where,
        started=job.started or facts.started,
        ended=None,
        cause=None,
        life="alive",
    )


def facts_of_job(known: RunHandle, job: Job | None, clusters: Clusters) -> RunSummary:
    """Return the summary of a run that so far has only a job."""
    facts = facts_of(known)
    if job is None:
        why = "its cluster does not say" if clusters.silence_of(known) is not None else never_sent(known)
        return replace(facts, status="UNKNOWN", cause=why)
    if job.status in ACTIVE:
        return replace(facts, status=job.status, started=job.started, cause=None)
    end = ending_of(job)
    return replace(facts, status=end.status, started=job.started, ended=job.ended, cause=end.cause)


def with_failed_job(facts: RunSummary, job: Job) -> RunSummary:
    """Return a run with the job that was to continue it but was refused or died before it started the run.

    The status remains that of the run. A later attempt replaces this information.
    """
    end = ending_of(job)
    if end.status not in ("REFUSED", "FAILED"):
        return facts
    cause = end.cause or ""
    last = {"submission_id": job.submission_id, "status": end.status, "cause": cause}
    return replace(facts, cause=f"{end.status}: job {job.submission_id}: {cause}", last_job=last)


def table(
    runs: Sequence[RunSummary], *, users: bool = False, now: float | None = None, width: int | None = None
) -> str:
    """Return the runs as a table, cut to the width of the terminal; in a file nothing is cut."""
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
            (facts.cause or "") if facts.status != "FINISHED" or facts.last_job else "",
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


def progress(facts: RunSummary) -> str:
    """Return the progress as text: `30/132`, or for a sweep `12 trials: 3 running, 9 finished`."""
    if facts.kind == "sweep":
        told = ", ".join(f"{count} {status}" for status, count in sorted(facts.trials.items()))
        return f"{sum(facts.trials.values())} trials" + (f": {told}" if told else "")
    if facts.step is None:
        return ""
    return f"{facts.step}/{facts.total_steps}" if facts.total_steps else str(facts.step)


def ago(when: float | None, now: float) -> str:
    """Return a time as text: `3:04:59 ago`, or the date if it is more than two days ago."""
    if when is None:
        return ""
    if 0 <= now - when < 2 * 86400:
        return f"{duration(now - when)} ago"
    return time.strftime("%Y-%m-%d", time.localtime(when))
