"""`list`: the runs and sweeps of one user or of all, the newest first. Runs marked RUNNING whose driver is dead are marked FAILED."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from raytrainer import provenance, tracking
from raytrainer.attempt import SUBMITTED, Record
from raytrainer.core.background import in_background
from raytrainer.core.formatting import ago, aligned
from raytrainer.errors import ConfigError, StorageError, TrackingError
from raytrainer.runs import printing
from raytrainer.runs.arguments import VerbParser, positive
from raytrainer.runs.handle import RunHandle, attempt_number
from raytrainer.runs.job_summary import summarize_job, with_active_job, with_last_job
from raytrainer.runs.jobs import ACTIVE, Clusters, Job
from raytrainer.runs.liveness import Liveness
from raytrainer.runs.reconcile import check_all, close_orphans
from raytrainer.runs.resolve import runs_in, submitted_from, tracking_uri_here, with_directory, with_submission
from raytrainer.runs.summary import RunSummary, summarize
from raytrainer.storage import Storage
from raytrainer.tracking import lookup
from raytrainer.tracking.sender import LOCAL_PREFIX

ABOUT = "Runs and sweeps, the newest first. Runs marked RUNNING whose driver is dead are marked FAILED."
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED", "SCHEDULED", "REFUSED", "PENDING", "UNKNOWN")
_MOST_RUNNING = 100  # running runs that one listing checks
_MOST_CLUSTERS, _CLUSTERS_S = 5, 4.0  # how many of the last used clusters to query for others' jobs, and for how long


def add_arguments(parser: VerbParser) -> None:
    add = parser.add_argument
    add("-a", "--all", action="store_true", help="runs of all users, not only mine")
    add("-s", "--status", metavar="STATUS", help=f"only runs with this status: {', '.join(STATUSES)}")
    add("-n", "--limit", metavar="N", type=positive, default=30, help="at most this many (30)")


def run(arguments: argparse.Namespace) -> int:
    status = arguments.status.upper() if arguments.status else None
    if status is not None and status not in STATUSES:
        raise ConfigError("is not a status", key="--status", value=arguments.status, choices=STATUSES)
    runs = list_runs(everyone=arguments.all, status=status, limit=arguments.limit, say=printing.say)
    print(
        printing.to_json([summary.to_json() for summary in runs])
        if arguments.json
        else table(runs, users=arguments.all)
    )
    return 0


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
        say: Called with messages about runs that were closed and sources that could not be queried.
        clusters: For tests.
    """
    clusters, root = clusters or Clusters(), Path.cwd() / "runs"
    uri = tracking_uri_here()
    runs: list[RunSummary] = []
    if uri is not None:
        try:
            runs = _in_mlflow(uri, None if everyone else provenance.user(), status, limit, clusters, say)
        except TrackingError as error:
            say(f"{error}; what follows is from {root} alone")
            uri = None
    runs += _on_disk(root, uri, {summary.run_id for summary in runs if summary.run_id is not None}, status, clusters)
    _add_submitted(runs, root, clusters)
    if everyone:
        _add_jobs_of_others(runs, root, clusters)
    clusters.report_failures(say)
    runs = [summary for summary in runs if status is None or summary.status == status]
    return sorted(runs, key=lambda summary: summary.started or 0.0, reverse=True)[:limit]


def table(
    runs: Sequence[RunSummary], *, users: bool = False, now: float | None = None, width: int | None = None
) -> str:
    """Return the runs as a table.

    Args:
        runs: The runs, in the order of the rows.
        users: Whether to add a column with the users.
        now: The current time, in seconds since the epoch; None for the clock's.
        width: The width to which lines are cut; None for the terminal's, or no limit in a file.
    """
    if not runs:
        return "no runs"
    if width is None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    now = time.time() if now is None else now
    columns: dict[str, Callable[[RunSummary], str | None]] = {
        "NAME": lambda run: run.name,
        **({"USER": lambda run: run.user} if users else {}),
        "STATUS": lambda run: run.status + ("?" if run.life == "unsure" else ""),
        "WHERE": lambda run: run.where and run.where.partition(",")[0],
        "STARTED": lambda run: ago(run.started, now),
        "STEP": lambda run: run.progress,
        "BEST": lambda run: None if run.best is None else f"{run.monitor} {run.best:.4g}",
        "WORKERS": lambda run: run.workers,
        "LAST ERROR": lambda run: run.cause if run.status != "FINISHED" or run.last_job else None,
    }
    rows = [[cell(run) or "" for cell in columns.values()] for run in runs]
    return aligned([list(columns), *rows], width=width)


def _in_mlflow(
    uri: str, user: str | None, status: str | None, limit: int, clusters: Clusters, say: Callable[[str], None]
) -> list[RunSummary]:
    """Return the runs that MLflow has, after closing runs marked RUNNING whose driver is dead."""
    root = Path.cwd() / "runs"
    running = lookup.search_runs(uri, limit=_MOST_RUNNING, user=user, status="RUNNING")
    checked = check_all([with_submission(RunHandle.of_mlflow_run(run, uri), root) for run in running], clusters)
    if close_orphans(checked, clusters, say):
        running = lookup.search_runs(uri, limit=_MOST_RUNNING, user=user, status="RUNNING")
    still_running = {run.run_id for run in running}
    by_id = {
        handle.mlflow_run.run_id: _running(handle, liveness)
        for handle, liveness in checked
        if handle.mlflow_run is not None and handle.mlflow_run.run_id in still_running
    }
    if status == "RUNNING":
        return list(by_id.values())
    if status in ("PENDING", "REFUSED", "UNKNOWN"):  # only jobs have these
        return []
    runs = lookup.search_runs(uri, limit=limit, user=user, status=status)
    return [by_id.get(run.run_id) or summarize(_ended(RunHandle.of_mlflow_run(run, uri))) for run in runs]


def _ended(handle: RunHandle) -> RunHandle:
    """Return the handle of a run that has ended. MLflow has everything that a list shows, so its directory is not read,
    except for a sweep whose driver was killed before it uploaded the results."""
    tags = handle.mlflow_run.tags if handle.mlflow_run is not None else {}
    has_results = any(name.startswith("raytrainer.trials.") for name in tags)
    is_local = "://" not in handle.record.run_dir
    return with_directory(handle) if handle.record.kind == "sweep" and is_local and not has_results else handle


def _running(handle: RunHandle, liveness: Liveness) -> RunSummary:
    """Return a run's summary with its active job. A job that was submitted from here is added later."""
    summary, job = summarize(handle, liveness), liveness.active_job
    if job is None or handle.next_submission_id is not None:
        return summary
    if job.status == "RUNNING" and handle.submission_id is not None and job.submission_id == handle.submission_id:
        return summary
    return with_active_job(summary, handle, job)


def _on_disk(
    root: Path, uri: str | None, known_ids: Collection[str], status: str | None, clusters: Clusters
) -> list[RunSummary]:
    """Return the runs that MLflow does not have, or no longer has; all runs if it could not be queried.

    Args:
        root: The directory with the runs.
        uri: The tracking store that was queried.
        known_ids: The ids of the runs that it returned.
        status: Return only runs with this status in their record.
        clusters: The clusters that may know jobs.
    """
    runs: list[RunHandle] = []
    doubtful: dict[str, RunHandle] = {}
    for handle in runs_in(root):
        record = handle.record
        if not _is_in(uri, record):
            runs.append(handle)
        elif record.run_id not in known_ids and status in (None, record.status):
            doubtful[record.run_id or ""] = handle
    if uri is not None and doubtful:
        # MLflow did not return these: they belong to another user, are too old for the list, or were deleted in MLflow.
        with suppress(TrackingError):
            runs += [doubtful[run_id] for run_id in sorted(lookup.missing(uri, doubtful))]
    runs = [with_submission(handle, root) for handle in runs]
    checked = check_all([handle for handle in runs if handle.record.status == "RUNNING"], clusters)
    by_name = {handle.name: liveness for handle, liveness in checked}
    return [_with_true_status(summarize(handle, by_name.get(handle.name)), by_name.get(handle.name)) for handle in runs]


def _is_in(uri: str | None, record: Record) -> bool:
    if uri is None or record.run_id is None or record.run_id.startswith(LOCAL_PREFIX):
        return False
    return record.tracking_uri == tracking.redacted(uri)


def _with_true_status(summary: RunSummary, liveness: Liveness | None) -> RunSummary:
    """Return a dead run with its true status, even if MLflow could not be updated."""
    if liveness is None or liveness.state != "dead":
        return summary
    return replace(summary, status=liveness.status, cause=liveness.cause, ended=liveness.ended)


def _add_submitted(runs: list[RunSummary], root: Path, clusters: Clusters) -> None:
    """Add the runs that were submitted from here and are not in MLflow yet, with the status from their clusters."""
    for handle in submitted_from(root):
        if handle.submission_id is None:
            continue
        if any(_has_started(handle, summary) for summary in runs):
            with suppress(StorageError):  # the run itself is known now
                Storage(root / SUBMITTED).delete(handle.name)
            continue
        job, _ = clusters.jobs_of(handle)
        own = [place for place, summary in enumerate(runs) if _is_same_run(handle, summary)]
        if not own and (job is not None or handle.cluster_address in clusters.silent):
            runs.append(summarize_job(handle, job, clusters))
        for place in own:
            runs[place] = _with_submitted_job(runs[place], handle, job)


def _has_started(handle: RunHandle, summary: RunSummary) -> bool:
    """Return whether a submission has become the run that is shown, perhaps in a later attempt. A run of the same name
    on another cluster does not count."""
    if summary.name != handle.name or summary.cluster_address != handle.cluster_address:
        return False
    if summary.submission_id is None or handle.submission_id is None:
        return False
    return attempt_number(summary.submission_id) >= attempt_number(handle.submission_id)


def _is_same_run(handle: RunHandle, summary: RunSummary) -> bool:
    record = Record(summary.name, summary.run_dir, summary.run_id)
    return summary.name == handle.name and handle.submission is not None and handle.submission.belongs_to(record)


def _with_submitted_job(summary: RunSummary, handle: RunHandle, job: Job | None) -> RunSummary:
    if job is None:
        return summary
    if job.status in ACTIVE:
        return with_active_job(summary, handle, job)
    # The run record may have a later attempt, which MLflow alone does not show.
    current = with_directory(handle)
    has_later_attempt = current.storage is not None and current.next_submission_id is None
    return summary if has_later_attempt else with_last_job(summary, job)


def _add_jobs_of_others(runs: list[RunSummary], root: Path, clusters: Clusters) -> None:
    """Add the runs of any user on the clusters that are known here and that MLflow does not know yet."""
    for address, job in _active_jobs(root, clusters):
        name = job.metadata.get("raytrainer.name")
        if name is None or any((s.submission_id, s.cluster_address) == (job.submission_id, address) for s in runs):
            continue
        handle = RunHandle(Record(name, "", job={"submission_id": job.submission_id, "cluster_address": address}), None)
        # Names are unique on a cluster.
        own = [i for i, summary in enumerate(runs) if summary.name == name and summary.cluster_address == address]
        for place in own:
            runs[place] = with_active_job(runs[place], handle, job)
        if not own:
            kind, user = job.metadata.get("raytrainer.kind", "run"), job.metadata.get("raytrainer.user")
            runs.append(replace(summarize_job(handle, job, clusters), kind=kind, user=user))


def _active_jobs(root: Path, clusters: Clusters) -> Iterator[tuple[str, Job]]:
    """Yield the pending and running jobs of the clusters that were used last, with the clusters' addresses."""
    clusters_to_ask = list(_known_clusters(root).items())[:_MOST_CLUSTERS]
    futures = [in_background(partial(clusters.all_of, handle), "jobs") for _, handle in clusters_to_ask]
    wait(futures, timeout=_CLUSTERS_S)
    for (address, _), future in zip(clusters_to_ask, futures, strict=True):
        if not future.done():
            clusters.silent.setdefault(address, f"no answer in {_CLUSTERS_S:g} s")
        elif future.exception() is None:
            yield from ((address, job) for job in future.result() if job.status in ACTIVE)


def _known_clusters(root: Path) -> dict[str, RunHandle]:
    """Return the clusters that are known here: address → a run with a job there. The last used ones come first."""
    known: dict[str, RunHandle] = {}
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "").rstrip("/")
    if address.startswith(("http://", "https://")):
        known[address] = RunHandle(Record("", "", job={"cluster_address": address}), None)
    runs = [*submitted_from(root), *runs_in(root)]
    for handle in sorted(runs, key=lambda handle: handle.record.created, reverse=True):
        if handle.cluster_address is not None:
            known.setdefault(handle.cluster_address, handle)
    return known
