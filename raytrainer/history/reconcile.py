"""Close runs that MLflow lists as RUNNING although their driver is dead, with their true final status."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from raytrainer import tracking
from raytrainer.errors import RaytrainerError, StorageError, StorageLocked, TrackingError
from raytrainer.history.finding import RunHandle, reached, tracking_uri_of
from raytrainer.history.jobs import Clusters
from raytrainer.history.liveness import LOCK, Liveness, Verdict, judge
from raytrainer.run import Record, in_background
from raytrainer.run.record import SECONDS_TAG
from raytrainer.storage.lock import withdraw
from raytrainer.tracking import lookup
from raytrainer.tracking.runs import Status
from raytrainer.tracking.server import Server

_REPLAY_S = 5.0  # for sending what a dead driver left in its spool
_LOOK_S = 4.0  # for looking at all runs: one whose disk or cluster takes longer is left as it is


def verdict_of(known: RunHandle, clusters: Clusters) -> Verdict:
    """Whether a run's driver lives; looks at its directory, and asks its cluster if it has one."""
    job, others = clusters.jobs_of(known)
    liveness, record = Liveness.read(known.storage), known.record
    if known.storage is not None and liveness.readable:
        # Read after the claims: a driver that ends writes its record, then gives up its claim.
        record = Record.read(known.storage) or record
    return judge(record, liveness, job, others)


def look_at(runs: Sequence[RunHandle], clusters: Clusters) -> list[tuple[RunHandle, Verdict]]:
    """`verdict_of` each of them, at once and in bounded time; with what could be read of its directory."""
    looking = [in_background(partial(_look, known, clusters), "look") for known in runs]
    wait(looking, timeout=_LOOK_S)
    found = []
    for known, future in zip(runs, looking, strict=True):
        if future.done() and future.exception() is None:
            found.append(future.result())
        else:
            why = str(future.exception()) if future.done() else f"no answer in {_LOOK_S:g} s"
            found.append((known, Verdict("unsure", f"it could not be looked at: {why}")))
    return found


def _look(known: RunHandle, clusters: Clusters) -> tuple[RunHandle, Verdict]:
    known = reached(known)
    return known, verdict_of(known, clusters)


def close_dead(runs: Iterable[tuple[RunHandle, Verdict]], clusters: Clusters, say: Callable[[str], None]) -> set[str]:
    """Closes those whose driver is surely dead, and says so; returns the names of those that were.

    A run that cannot be closed, because its store or its directory cannot be written from here, stays as it is.
    """
    closed = set()
    for known, verdict in runs:
        name = known.record.name
        if verdict.life != "dead":
            continue
        try:
            if close(known, verdict, clusters):
                closed.add(name)
                say(f"{name} is marked {verdict.status}: its driver is dead ({verdict.why})")
        except (RaytrainerError, OSError) as error:
            say(f"{name} is not running ({verdict.why}), and could not be closed: {error}")
    return closed


def close(known: RunHandle, verdict: Verdict, clusters: Clusters) -> bool:
    """Ends a dead run in MLflow and in its record; False: it was not dead, or somebody has closed it.

    Under the run's own lock, so that nobody begins to go on with it meanwhile, and asking once more: whoever was thought
    dead may have told its end in between.

    Raises:
        TrackingError, StorageError: It could not be told.
    """
    record, storage = known.record, known.storage
    if storage is None:
        return _tell(known, record, verdict, clusters)
    if uri := tracking_uri_of(record):
        lookup.reach(uri)  # a second or more, in which nobody should be kept from going on with the run
    liveness = Liveness.read(storage)
    for claim in liveness.claims:
        # One of a job's driver that was killed is not old yet, and its cluster knows better.
        if claim in liveness.dead or claim in verdict.gone:
            withdraw(storage.child(LOCK), claim)
    try:
        with storage.lock(LOCK, {"run": f"{record.name}, being closed"}):
            fresh = Record.read(storage) or record
            if fresh.attempts != record.attempts:
                return False
            if fresh.status != "RUNNING":
                verdict = replace(verdict, status=fresh.status)  # type: ignore[arg-type]
            told = _tell(known, fresh, verdict, clusters)
            if fresh.status == "RUNNING":
                fresh = fresh.closed(verdict.status, _end(known, verdict), verdict.cause)
            replace(fresh, status=verdict.status).write(storage)
            return told
    except StorageLocked:
        return False


def _tell(known: RunHandle, record: Record, verdict: Verdict, clusters: Clusters) -> bool:
    uri, run_id = tracking_uri_of(record), record.run_id
    if uri is None or run_id is None:
        return False
    if known.storage is not None and known.storage.is_local:
        # What it had no time to send goes first. What is not sent now stays there; resume sends it.
        with suppress(TrackingError, StorageError):
            tracking.replay(known.storage.local_path / "spool", run_id, uri, timeout_s=_REPLAY_S)
    ended = _end(known, verdict)
    if verdict.by_job:
        _keep_log(known, uri, run_id, clusters)
    closed = record if record.ended else record.closed(verdict.status, ended)
    tags = {SECONDS_TAG: f"{closed.seconds:.3f}"} if closed.seconds else {}
    told = lookup.close_run(uri, run_id, verdict.status, verdict.cause, ended, tags)
    if told and record.kind == "sweep":
        _close_trials(uri, record.name, ended)
    return told


def _end(known: RunHandle, verdict: Verdict) -> float:
    """When a dead run ended, in seconds since the epoch: by its last sign of life."""
    last = known.stored.logged if known.stored is not None else None
    return verdict.when or last or time.time()


def _close_trials(uri: str, sweep: str, ended: float) -> None:
    """Those that ran can go on with their sweep, as those of a sweep that was stopped."""
    status: Status = "KILLED"
    for trial in lookup.search_runs(uri, limit=1000, sweep=sweep, status="RUNNING"):
        lookup.close_run(uri, trial.run_id, status, f"its sweep {sweep} died", ended)


def _keep_log(known: RunHandle, uri: str, run_id: str, clusters: Clusters) -> None:
    """The job's log into the run, where there is none: it goes with the head node, and the driver could not keep it."""
    with suppress(RaytrainerError, OSError):
        cluster = clusters.of(known)
        server = Server(uri, timeout_s=30)
        if cluster is None or known.submission_id is None or "logs/driver.log" in server.artifacts(run_id, "logs"):
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "job.log")
            file.write_text(cluster.logs(known.submission_id), encoding="utf-8")
            server.log_artifact(run_id, file, "logs")
