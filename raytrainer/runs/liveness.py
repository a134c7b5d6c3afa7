"""Decide whether the driver of a run is alive, from the leases on the run directory and from the run's job.

A run marked RUNNING counts as dead only if no process that could be its driver can be alive. `judge` applies these
rules in order; the first that applies decides:

1. **A lease of a live process on this machine**: alive. This is exact: the lease holds the process id, the start time in
   ticks since boot, the boot id and the process namespace. So a reused process id is not mistaken for the driver. The
   age of the lease does not matter.
2. **A job that the cluster reports as pending or running**, of this attempt or of another: alive, whatever its lease says.
3. **A lease of another machine**, renewed within `LIMIT_S`: alive. A driver that lost contact for longer ends itself as
   soon as it finds that its lease is gone. Both times come from the storage's clock, never from this machine's or the other's.
   A lease that names an ended job does not count if it was taken while the job ran and has no heartbeat after the job's
   end. (The same address may now be another cluster with another job of the same name.) This compares the cluster's
   clock with the storage's; if they differ by more than a heartbeat, the age of the lease decides.
4. **A job that has ended**: dead. A job that the cluster does not know, or that was refused, decides nothing.
5. **A directory that cannot be read**: unsure, because it does not prove that the driver is dead.
6. **A record with a final status**: dead. The driver writes it before it releases its lease.
7. **Only stale leases**: dead.
8. **No lease** on a record that is not new: dead. On a new record, no rule applies: its driver may be starting.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from raytrainer.attempt import Record
from raytrainer.core.formatting import duration
from raytrainer.errors import StorageError
from raytrainer.runs.jobs import ACTIVE, Job
from raytrainer.storage import Storage
from raytrainer.storage.lock import Lease, leases_in
from raytrainer.submission.ending import REFUSED, ending_of
from raytrainer.tracking.runs import Status

LIMIT_S = 300.0  # thirty heartbeats
LOCK = "lock"
_HEARTBEAT_S = 10.0  # between two heartbeats


@dataclass(frozen=True)
class LockState:
    """The evidence about a driver in the run directory.

    Attributes:
        leases: All leases on the directory, the driver's among them.
        now: The current time of the storage's clock, in seconds since the epoch; None if it is unknown.
        written: When the run record was written, by the same clock.
        readable: Whether the directory could be read.
    """

    leases: Sequence[Lease] = ()
    now: float | None = None
    written: float | None = None
    readable: bool = True

    @classmethod
    def read(cls, storage: Storage | None) -> LockState:
        """Read the leases in a run directory.

        If another machine has a lease, its age is measured by writing a file and deleting it again.
        """
        if storage is None:
            return cls(readable=False)
        try:
            leases = leases_in(storage.child(LOCK))
            if any(lease.is_here and lease.lives for lease in leases):
                return cls(leases)
            written = next((entry.mtime for entry in storage.list() if entry.name == "run.json"), None)
        except StorageError:
            return cls(readable=False)
        return cls(leases, _clock(storage), written)

    @property
    def here(self) -> Lease | None:
        """The lease of a process on this machine that is alive, if there is one."""
        return next((lease for lease in self.leases if lease.is_here and lease.lives), None)

    @property
    def elsewhere(self) -> list[Lease]:
        """The leases of other machines whose owners may be alive."""
        return [lease for lease in self.leases if not lease.is_here and not self._is_stale(lease.heartbeat)]

    @property
    def dead(self) -> list[Lease]:
        """The leases whose owners are dead."""
        return [
            lease for lease in self.leases if (not lease.lives if lease.is_here else self._is_stale(lease.heartbeat))
        ]

    @property
    def last(self) -> Lease | None:
        """The lease with the newest heartbeat, if there is any."""
        return max(self.leases, key=lambda lease: lease.heartbeat, default=None)

    @property
    def last_change(self) -> float | None:
        """The newest heartbeat, or when the record was written; None if neither is known."""
        return self.last.heartbeat if self.last is not None else self.written

    @property
    def is_new(self) -> bool:
        """Whether the record may be so new that its driver is just starting."""
        return self.written is None or not self._is_stale(self.written)

    def _is_stale(self, heartbeat: float) -> bool:
        return self.now is not None and self.now - heartbeat > LIMIT_S


@dataclass(frozen=True)
class Liveness:
    """The verdict whether a driver is alive, and the reason.

    Attributes:
        state: `alive`, `dead`, or `unsure`, which is treated as alive.
        reason: How we know, as text.
        status: The final status of a run whose driver is dead.
        cause: Why its driver died, for the records.
        ended: The last heartbeat of a dead driver, in seconds since the epoch; None if it is unknown.
        by_job: Whether the cluster decided it.
        active_job: The job that keeps the run alive, if a job does.
        dead_leases: The leases that the driver of an ended job left behind.
    """

    state: Literal["alive", "dead", "unsure"]
    reason: str
    status: Status = "FAILED"
    cause: str = ""
    ended: float | None = None
    by_job: bool = False
    active_job: Job | None = None
    dead_leases: Sequence[Lease] = ()


def judge(record: Record, lock: LockState, job: Job | None = None, other_jobs: Sequence[Job] = ()) -> Liveness:
    """Decide whether the driver of a run is alive, by the rules above. It reads and writes nothing.

    Args:
        record: The run record from the run directory.
        lock: The evidence in the run directory.
        job: The run's job; None if it has none, or if the cluster does not know the job or does not answer.
        other_jobs: Other jobs of the same run, one for each further attempt.
    """
    jobs = [*other_jobs] if job is None else [job, *other_jobs]
    left_behind = [lease for lease in lock.elsewhere if any(_ended_with(lease, ended) for ended in jobs)]
    return (
        _process_here(lock)
        or _active_job(job, other_jobs)
        or _process_elsewhere(lock, left_behind)
        or _ended_job(record, job, left_behind)
        or _unreadable(lock)
        or _final_status(record, lock)
        or _stale_leases(lock)
        or _no_lease(lock)
        or Liveness("unsure", "no process holds its lock yet; it may be starting")
    )


def _process_here(lock: LockState) -> Liveness | None:
    if lock.here is None:
        return None
    return Liveness("alive", f"process {lock.here.owner.get('pid')} of this machine holds the lock")


def _active_job(job: Job | None, other_jobs: Sequence[Job]) -> Liveness | None:
    if job is not None and job.status in ACTIVE:
        return Liveness("alive", f"its job {job.submission_id} is {job.status}", active_job=job)
    for other in other_jobs:
        if other.status in ACTIVE:
            return Liveness("alive", f"the job {other.submission_id} continues it", active_job=other)
    return None


def _process_elsewhere(lock: LockState, left_behind: Sequence[Lease]) -> Liveness | None:
    lease = next((lease for lease in lock.elsewhere if lease not in left_behind), None)
    return None if lease is None else Liveness("alive", f"{_owner(lease)} holds the lock")


def _ended_job(record: Record, job: Job | None, left_behind: Sequence[Lease]) -> Liveness | None:
    if job is None or job.exit_code == REFUSED:  # a refused job never started the run
        return None
    status, cause = _end_of_job(job)
    if record.status != "RUNNING":
        status = record.status  # type: ignore[assignment]
    reason = f"its job {job.submission_id} {job.status}"
    return Liveness("dead", reason, status, cause, job.ended, by_job=True, dead_leases=left_behind)


def _unreadable(lock: LockState) -> Liveness | None:
    return None if lock.readable else Liveness("unsure", "its directory cannot be read from here")


def _final_status(record: Record, lock: LockState) -> Liveness | None:
    if record.status == "RUNNING":
        return None
    reason = f"it ended as {record.status}, but MLflow does not have the status"
    return Liveness("dead", reason, record.status, reason, lock.last_change)  # type: ignore[arg-type]


def _stale_leases(lock: LockState) -> Liveness | None:
    lease = lock.last
    if lease is None:
        return None
    reason = f"{_owner(lease)} is gone" if lease.is_here else f"no heartbeat from {_owner(lease)}"
    if lock.now is not None and not lease.is_here:
        reason += f" for {duration(lock.now - lease.heartbeat)}"
    return Liveness("dead", reason, cause=f"its driver died: {reason}", ended=lock.last_change)


def _no_lease(lock: LockState) -> Liveness | None:
    if lock.is_new:
        return None
    reason = "no process holds its lock"
    return Liveness("dead", reason, cause=f"its driver died: {reason}", ended=lock.last_change)


def _end_of_job(job: Job) -> tuple[Status, str]:
    name = f"its job {job.submission_id}"
    if job.status == "STOPPED":
        return "KILLED", f"{name} was stopped"
    if job.status == "SUCCEEDED" or job.exit_code == 0:
        return "FINISHED", f"{name} succeeded, but MLflow does not have the status"
    end = ending_of(job)
    if end.status == "KILLED":
        return "KILLED", f"{name} ended with exit code {job.exit_code}: it was asked to"
    return "FAILED", f"{name} failed: {end.cause}"


def _ended_with(lease: Lease, job: Job) -> bool:
    """Return whether a lease belongs to the driver of a job that has ended."""
    if lease.owner.get("job") != job.submission_id or job.ended is None or job.exit_code == REFUSED:
        return False
    try:
        taken = datetime.fromisoformat(lease.owner.get("since", "")).timestamp()
    except ValueError:
        return False
    last = job.ended + _HEARTBEAT_S
    return (job.started or 0.0) - _HEARTBEAT_S <= taken <= last and lease.heartbeat <= last


def _owner(lease: Lease) -> str:
    return f"process {lease.owner.get('pid', '?')} on {lease.owner.get('host', 'an unknown machine')}"


def _clock(storage: Storage) -> float | None:
    """Return the storage's own time, from the date of a new file; None if it cannot be written."""
    name = f"{uuid.uuid4().hex}.probe"
    place = storage.child(LOCK)
    try:
        place.write_bytes(name, b"")
        try:
            return next((entry.mtime for entry in place.list() if entry.name == name), None) or None
        finally:
            place.delete(name)
    except StorageError:
        return None
