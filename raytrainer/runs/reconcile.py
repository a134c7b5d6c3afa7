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
from raytrainer.core.background import in_background
from raytrainer.errors import RaytrainerError, StorageError, StorageLocked, TrackingError
from raytrainer.runs.finding import RunHandle, reached, tracking_uri_of
from raytrainer.runs.jobs import Clusters
from raytrainer.runs.liveness import LOCK, Liveness, Verdict, judge
from raytrainer.attempt import Record
from raytrainer.attempt.record import SECONDS_TAG
from raytrainer.storage.lock import withdraw
from raytrainer.tracking import lookup
from raytrainer.tracking.runs import Status
from raytrainer.tracking.server import Server

_REPLAY_S = 5.0  # to upload what a dead driver left in its spool
_LOOK_S = 4.0  # to check all runs; one whose disk or cluster takes longer is left unchanged


def verdict_of(known: RunHandle, clusters: Clusters) -> Verdict:
    """Return whether a run's driver is alive, from its directory and from its cluster, if it has one."""
    job, others = clusters.jobs_of(known)
    liveness, record = Liveness.read(known.storage), known.record
    if known.storage is not None and liveness.readable:
        # Read after the leases: a driver that ends writes its record and then releases its lease.
        record = Record.read(known.storage) or record
    return judge(record, liveness, job, others)


def look_at(runs: Sequence[RunHandle], clusters: Clusters) -> list[tuple[RunHandle, Verdict]]:
    """Return `verdict_of` for each run, in parallel and with a time limit, and what could be read of its directory."""
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
    """Close the runs whose driver is dead, and report them. Return their names.

    A run stays unchanged if its tracking store or its directory cannot be written from here.
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
    """End a dead run in MLflow and in its record. Return False if it was not dead, or is already closed.

    It holds the run's lock, so that no process continues the run meanwhile, and reads the record again: the driver may
    have written its final status in between.

    Raises:
        TrackingError, StorageError: The status could not be written.
    """
    record, storage = known.record, known.storage
    if storage is None:
        return _tell(known, record, verdict, clusters)
    if uri := tracking_uri_of(record):
        lookup.reach(uri)  # takes a second or more, so it is done before the lock is held
    liveness = Liveness.read(storage)
    for lease in liveness.leases:
        # The lease of a killed job's driver is not stale yet, but its cluster knows that the driver is dead.
        if lease in liveness.dead or lease in verdict.gone:
            withdraw(storage.child(LOCK), lease)
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
        # First upload what the driver had no time to send. The rest stays in the spool, and resume uploads it.
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
    """Return when a dead run ended, in seconds since the epoch: its last sign of life."""
    last = known.stored.logged if known.stored is not None else None
    return verdict.when or last or time.time()


def _close_trials(uri: str, sweep: str, ended: float) -> None:
    """Mark a sweep's running trials KILLED, like those of a stopped sweep, so that they can continue with it."""
    status: Status = "KILLED"
    for trial in lookup.search_runs(uri, limit=1000, sweep=sweep, status="RUNNING"):
        lookup.close_run(uri, trial.run_id, status, f"its sweep {sweep} died", ended)


def _keep_log(known: RunHandle, uri: str, run_id: str, clusters: Clusters) -> None:
    """Save the job's log in the run if the driver has not saved its own. It would be lost with the head node."""
    with suppress(RaytrainerError, OSError):
        job = clusters.job_of(known)
        server = Server(uri, timeout_s=30)
        if job is None or "logs/driver.log" in server.artifacts(run_id, "logs"):
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "job.log")
            file.write_text("".join(job.logs()), encoding="utf-8")
            server.log_artifact(run_id, file, "logs")
