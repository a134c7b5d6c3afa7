"""Set the true final status of orphans: runs that MLflow lists as RUNNING although their driver is dead."""

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
from raytrainer.attempt import Record
from raytrainer.attempt.record import SECONDS_TAG
from raytrainer.core.background import in_background
from raytrainer.errors import RaytrainerError, StorageError, StorageLocked, TrackingError
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.jobs import Clusters
from raytrainer.runs.liveness import LOCK, Liveness, LockState, judge
from raytrainer.runs.resolve import tracking_uri_of, with_directory
from raytrainer.storage.lock import withdraw
from raytrainer.tracking import lookup
from raytrainer.tracking.server import Server

_REPLAY_S = 5.0  # to upload what a dead driver left in its spool
_CHECK_S = 4.0  # to check all runs; one whose disk or cluster takes longer is left unchanged


def check_liveness(handle: RunHandle, clusters: Clusters) -> Liveness:
    """Return whether a run's driver is alive, from its directory and from its cluster, if it has one."""
    job, other_jobs = clusters.jobs_of(handle)
    lock, record = LockState.read(handle.storage), handle.record
    if handle.storage is not None and lock.readable:
        # Read after the leases: a driver that ends writes its record and then releases its lease.
        record = Record.read(handle.storage) or record
    return judge(record, lock, job, other_jobs)


def check_all(runs: Sequence[RunHandle], clusters: Clusters) -> list[tuple[RunHandle, Liveness]]:
    """Return each run, with what can be read of its directory, and its liveness; in parallel and with a time limit."""

    def check(handle: RunHandle) -> tuple[RunHandle, Liveness]:
        handle = with_directory(handle)
        return handle, check_liveness(handle, clusters)

    futures = [in_background(partial(check, handle), "check") for handle in runs]
    wait(futures, timeout=_CHECK_S)
    checked = []
    for handle, future in zip(runs, futures, strict=True):
        if future.done() and future.exception() is None:
            checked.append(future.result())
        else:
            reason = str(future.exception()) if future.done() else f"no answer in {_CHECK_S:g} s"
            checked.append((handle, Liveness("unsure", f"it could not be looked at: {reason}")))
    return checked


def close_orphans(
    runs: Iterable[tuple[RunHandle, Liveness]], clusters: Clusters, say: Callable[[str], None]
) -> set[str]:
    """Close the runs whose driver is dead, and report them. Return their names.

    A run stays unchanged if its tracking store or its directory cannot be written from here.

    Args:
        runs: Each run with its liveness.
        clusters: The clusters of their jobs.
        say: Called with a line about each run that is closed, or cannot be closed.
    """
    closed = set()
    for handle, liveness in runs:
        if liveness.state != "dead":
            continue
        try:
            if close_orphan(handle, liveness, clusters):
                closed.add(handle.name)
                say(f"{handle.name} is marked {liveness.status}: its driver is dead ({liveness.reason})")
        except (RaytrainerError, OSError) as error:
            say(f"{handle.name} is not running ({liveness.reason}), and could not be closed: {error}")
    return closed


def close_orphan(handle: RunHandle, liveness: Liveness, clusters: Clusters) -> bool:
    """End a dead run in MLflow and in its record. Return False if it was not dead, or is already closed.

    It holds the run's lock, so that no process continues the run meanwhile, and reads the record again: the driver may
    have written its final status in between.

    Raises:
        TrackingError, StorageError: The status could not be written.
    """
    record, storage = handle.record, handle.storage
    if storage is None:
        return _close_in_mlflow(handle, record, liveness, clusters)
    if uri := tracking_uri_of(record):
        lookup.reach(uri)  # takes a second or more, so it is done before the lock is held
    lock = LockState.read(storage)
    for lease in lock.leases:
        # The lease of a killed job's driver is not stale yet, but its cluster knows that the driver is dead.
        if lease in lock.dead or lease in liveness.dead_leases:
            withdraw(storage.child(LOCK), lease)
    try:
        with storage.lock(LOCK, {"run": f"{record.name}, being closed"}):
            current = Record.read(storage) or record
            if current.attempts != record.attempts:
                return False
            if current.status != "RUNNING":
                liveness = replace(liveness, status=current.status)  # type: ignore[arg-type]
            is_closed = _close_in_mlflow(handle, current, liveness, clusters)
            if current.status == "RUNNING":
                current = current.closed(liveness.status, _end(handle, liveness), liveness.cause)
            replace(current, status=liveness.status).write(storage)
            return is_closed
    except StorageLocked:
        return False


def _close_in_mlflow(handle: RunHandle, record: Record, liveness: Liveness, clusters: Clusters) -> bool:
    uri, run_id = tracking_uri_of(record), record.run_id
    if uri is None or run_id is None:
        return False
    if handle.storage is not None and handle.storage.is_local:
        # First upload what the driver had no time to send. The rest stays in the spool, and resume uploads it.
        with suppress(TrackingError, StorageError):
            tracking.replay(handle.storage.local_path / "spool", run_id, uri, timeout_s=_REPLAY_S)
    ended = _end(handle, liveness)
    if liveness.by_job:
        _save_job_log(handle, uri, run_id, clusters)
    seconds = (record if record.ended else record.closed(liveness.status, ended)).seconds
    tags = {SECONDS_TAG: f"{seconds:.3f}"} if seconds else {}
    is_closed = lookup.close_run(uri, run_id, liveness.status, liveness.cause, ended, tags)
    if is_closed and record.kind == "sweep":
        # Like the trials of a stopped sweep, its running trials are KILLED, so that they can continue with it.
        for trial in lookup.search_runs(uri, limit=1000, sweep=record.name, status="RUNNING"):
            lookup.close_run(uri, trial.run_id, "KILLED", f"its sweep {record.name} died", ended)
    return is_closed


def _end(handle: RunHandle, liveness: Liveness) -> float:
    """Return when a dead run ended, in seconds since the epoch: its last heartbeat, or its last metric."""
    logged = handle.mlflow_run.logged if handle.mlflow_run is not None else None
    return liveness.ended or logged or time.time()


def _save_job_log(handle: RunHandle, uri: str, run_id: str, clusters: Clusters) -> None:
    """Save the job's log in the run if the driver has not saved its own. It would be lost with the head node."""
    with suppress(RaytrainerError, OSError):
        job = clusters.job_of(handle)
        server = Server(uri, timeout_s=30)
        if job is None or "logs/driver.log" in server.artifacts(run_id, "logs"):
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "job.log")
            file.write_text("".join(job.logs()), encoding="utf-8")
            server.log_artifact(run_id, file, "logs")
