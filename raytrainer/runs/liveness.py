"""Whether the driver of a run is alive, judged from the leases on the run directory and from the run's job.

A run that says RUNNING is declared dead only when nothing that could be its driver can be alive:

- **A lease of a process on this machine** is exact. It holds the process id, its start time in ticks since boot, the boot
  id and the process namespace, so a reused process id is not mistaken for the driver. Its age does not matter.
- **A lease of another machine** is renewed every 10 s. After `LIMIT_S` without a heartbeat its driver is dead, because a
  driver that lost contact for so long ends itself when it sees that its lease is gone. Both times come from the storage's
  clock, never from this machine's or the other's.
- **No lease**: the driver has released it, so the record has the final status. If the record says RUNNING and is not
  new, no driver exists.
- **A job** that the cluster reports as pending or running is alive, whatever its lease says. A job that has ended is
  dead, unless another submission or another owner continues the run. A lease that names the job belongs to its driver if
  it was taken while the job ran and has no heartbeat after the job's end, because the same address may now be another
  cluster with another job of the same name. This compares the cluster's clock with the storage's; if they differ by
  more than a heartbeat, the age of the lease decides. A job that the cluster does not know, or that was refused, says
  nothing, and the lease decides.
- **What cannot be read** (the directory, the cluster) is no evidence of death.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from raytrainer.submission.ending import REFUSED, ending_of
from raytrainer.errors import StorageError
from raytrainer.runs.jobs import ACTIVE, Job
from raytrainer.progress import duration
from raytrainer.attempt import Record
from raytrainer.storage import Storage
from raytrainer.storage.lock import Lease, leases_in
from raytrainer.tracking.runs import Status

LIMIT_S = 300.0  # thirty heartbeats
LOCK = "lock"
_HEARTBEAT_S = 10.0  # between two heartbeats


@dataclass(frozen=True)
class Liveness:
    """What the run directory says about its driver.

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
    def read(cls, storage: Storage | None) -> Liveness:
        """Read the leases in a run directory.

        If another machine has a lease, its age is measured by writing a file and deleting it again.
        """
        if storage is None:
            return cls(readable=False)
        try:
            leases = leases_in(storage.child(LOCK))
            if any(c.is_here and c.lives for c in leases):
                return cls(leases)
            written = next((e.mtime for e in storage.list() if e.name == "run.json"), None)
        except StorageError:
            return cls(readable=False)
        return cls(leases, _clock(storage), written)

    @property
    def here(self) -> Lease | None:
        """The lease of a process on this machine that is alive, if there is one."""
        return next((c for c in self.leases if c.is_here and c.lives), None)

    @property
    def elsewhere(self) -> list[Lease]:
        """The leases of other machines whose owners may be alive."""
        return [c for c in self.leases if not c.is_here and not self._is_old(c.heartbeat)]

    @property
    def dead(self) -> list[Lease]:
        """The leases whose owners are dead."""
        return [c for c in self.leases if (not c.lives if c.is_here else self._is_old(c.heartbeat))]

    @property
    def last(self) -> Lease | None:
        """The lease with the newest heartbeat, if there is any."""
        return max(self.leases, key=lambda c: c.heartbeat, default=None)

    def is_settled(self) -> bool:
        """Return whether the record is old enough that no driver can just be starting."""
        return self.written is not None and self._is_old(self.written)

    def _is_old(self, when: float) -> bool:
        return self.now is not None and self.now - when > LIMIT_S


@dataclass(frozen=True)
class Verdict:
    """Whether the driver is alive, and how we know.

    Attributes:
        life: `alive`, `dead`, or `unsure`, which is treated as alive.
        why: The reason, as text.
        status: The final status of a run whose driver is dead.
        cause: Why its driver died, for the records.
        when: The last heartbeat of a dead driver, in seconds since the epoch; None if it is unknown.
        by_job: Whether the cluster decided it.
        going: The job that keeps the run alive, if a job does.
        gone: The leases that the driver of an ended job left behind.
    """

    life: Literal["alive", "dead", "unsure"]
    why: str
    status: Status = "FAILED"
    cause: str = ""
    when: float | None = None
    by_job: bool = False
    going: Job | None = None
    gone: Sequence[Lease] = ()


def judge(record: Record, liveness: Liveness, job: Job | None = None, others: Sequence[Job] = ()) -> Verdict:
    """Decide whether the driver of a run is alive, by the rule above. It reads and writes nothing.

    Args:
        record: The run record from the run directory.
        liveness: What the run directory says.
        job: The run's job; None if it has none, or if the cluster does not know the job or does not answer.
        others: Other jobs of the same run, one for each further attempt.
    """
    if (lease := liveness.here) is not None:
        return Verdict("alive", f"process {lease.owner.get('pid')} of this machine holds the lock")
    if job is not None and job.status in ACTIVE:
        return Verdict("alive", f"its job {job.submission_id} is {job.status}", going=job)
    if going := next((other for other in others if other.status in ACTIVE), None):
        return Verdict("alive", f"the job {going.submission_id} continues it", going=going)
    ended = [one for one in (job, *others) if one is not None]
    gone = [lease for lease in liveness.elsewhere if any(_ended_with(lease, one) for one in ended)]
    if left := [lease for lease in liveness.elsewhere if lease not in gone]:
        return Verdict("alive", f"{_named(left[0])} holds the lock")
    if job is not None and job.exit_code != REFUSED:  # a refused job never started the run
        status, cause = _end_of_job(job)
        if record.status != "RUNNING":
            status = record.status  # type: ignore[assignment]
        why = f"its job {job.submission_id} {job.status}"
        return Verdict("dead", why, status, cause, job.ended, by_job=True, gone=gone)
    if not liveness.readable:
        return Verdict("unsure", "its directory cannot be read from here")
    last = liveness.last
    when = last.heartbeat if last is not None else liveness.written
    if record.status != "RUNNING":
        why = f"it ended as {record.status}, but MLflow does not have the status"
        return Verdict("dead", why, record.status, why, when)  # type: ignore[arg-type]
    if last is not None:
        what = f"{_named(last)} is gone" if last.is_here else f"no heartbeat from {_named(last)}"
        since = f" for {duration(liveness.now - last.heartbeat)}" if liveness.now is not None and not last.is_here else ""
        return Verdict("dead", what + since, "FAILED", f"its driver died: {what}{since}", when)
    if liveness.is_settled():
        return Verdict(
            "dead", "no process holds its lock", "FAILED", "its driver died: no process holds its lock", when
        )
    return Verdict("unsure", "no process holds its lock yet; it may be starting")


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
        since = datetime.fromisoformat(lease.owner.get("since", "")).timestamp()
    except ValueError:
        return False
    made = (job.started or 0.0) - _HEARTBEAT_S <= since <= job.ended + _HEARTBEAT_S
    return made and lease.heartbeat <= job.ended + _HEARTBEAT_S


def _named(lease: Lease) -> str:
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
