"""Whether a run's driver lives, by the claim that it holds on the run's directory and the job that it may be.

A run that says RUNNING is taken for dead only if nothing that could be its driver can be alive:

- **A claim of a process of this machine** (its number, its start in ticks since boot, the boot and the process
  namespace are in it) says it exactly: the process is there, or it is gone, also where its number is another's now. How
  long it has been silent does not matter.
- **A claim of another machine** is renewed every 10 s. One that was not for `LIMIT_S`, by the storage's own clock on both
  sides, is of a dead driver: whoever lost touch for so long ends by itself when it sees that its claim is gone. Neither
  this machine's clock nor the other's takes part.
- **No claim**: the driver has given it up, so the record says how it ended. If the record says RUNNING and is not new,
  nobody is there.
- **A job** that the cluster says is waiting or running is alive, whatever its claim says. One that has ended is dead,
  unless another submission or another owner goes on with the run. A claim that names it is its driver's if it was made
  while the job ran and has shown no life since its end: the same address may mean another cluster by now, with another
  job of the same name. Here clocks take part, the cluster's and the storage's: where they differ by more than a beat, the
  claim's age decides. One that the cluster does not know, or that refused to begin, says nothing: then the claim decides.
- **What cannot be read** (the directory, the cluster) is no sign of death.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from raytrainer.cluster.ending import REFUSED, ending_of
from raytrainer.errors import StorageError
from raytrainer.history.jobs import GOING, Job
from raytrainer.progress import duration
from raytrainer.run import Record
from raytrainer.storage import Storage
from raytrainer.storage.lock import Claim, claims
from raytrainer.tracking.runs import Status

LIMIT_S = 300.0  # thirty heartbeats
LOCK = "lock"
_BEAT_S = 10.0  # between two liveness of life


@dataclass(frozen=True)
class Liveness:
    """What a run's directory shows.

    Attributes:
        claims: On it, the driver's among them.
        now: The time by the storage's clock; None where it could not be learnt.
        written: When the record was written, by the same clock.
        readable: Whether it could be looked at.
    """

    claims: Sequence[Claim] = ()
    now: float | None = None
    written: float | None = None
    readable: bool = True

    @classmethod
    def read(cls, storage: Storage | None) -> Liveness:
        """Looks; of another machine's claims the age is learnt by writing a file and deleting it again."""
        if storage is None:
            return cls(readable=False)
        try:
            found = claims(storage.child(LOCK))
            if any(c.is_here and c.lives for c in found):
                return cls(found)
            written = next((e.mtime for e in storage.list() if e.name == "run.json"), None)
        except StorageError:
            return cls(readable=False)
        return cls(found, _clock(storage), written)

    @property
    def here(self) -> Claim | None:
        """The claim of a process of this machine that lives."""
        return next((c for c in self.claims if c.is_here and c.lives), None)

    @property
    def elsewhere(self) -> list[Claim]:
        """Claims of other machines that may live."""
        return [c for c in self.claims if not c.is_here and not self._is_old(c.beat)]

    @property
    def dead(self) -> list[Claim]:
        """Claims of drivers that died."""
        return [c for c in self.claims if (not c.lives if c.is_here else self._is_old(c.beat))]

    @property
    def last(self) -> Claim | None:
        """The claim with the last sign of life."""
        return max(self.claims, key=lambda c: c.beat, default=None)

    def is_settled(self) -> bool:
        """Whether the record is not just being written by a driver that starts."""
        return self.written is not None and self._is_old(self.written)

    def _is_old(self, when: float) -> bool:
        return self.now is not None and self.now - when > LIMIT_S


@dataclass(frozen=True)
class Verdict:
    """What follows from the liveness.

    Attributes:
        life: `alive`, `dead`, or `unsure`, which is treated as alive.
        why: In words.
        status: Of a dead one: how it ended.
        cause: Of a dead one: why, for its records.
        when: Of a dead one: its last sign of life, in seconds since the epoch; None where unknown.
        by_job: Whether the cluster says so.
        going: Of one that lives by its job: that job.
        gone: Of one whose job has ended: the claims that its driver left.
    """

    life: Literal["alive", "dead", "unsure"]
    why: str
    status: Status = "FAILED"
    cause: str = ""
    when: float | None = None
    by_job: bool = False
    going: Job | None = None
    gone: Sequence[Claim] = ()


def judge(record: Record, liveness: Liveness, job: Job | None = None, others: Sequence[Job] = ()) -> Verdict:
    """Whether the driver of a run lives. Pure: the rule above, in its order.

    Args:
        record: Of the run, its status as its directory has it.
        liveness: Of its directory.
        job: What the cluster says of its job; None where there is none, or it does not know it or does not answer.
        others: Other jobs of the same run, an attempt at it each.
    """
    if (claim := liveness.here) is not None:
        return Verdict("alive", f"process {claim.owner.get('pid')} of this machine has it")
    if job is not None and job.status in GOING:
        return Verdict("alive", f"its job {job.submission_id} is {job.status}", going=job)
    if going := next((other for other in others if other.status in GOING), None):
        return Verdict("alive", f"the job {going.submission_id} goes on with it", going=going)
    ended = [one for one in (job, *others) if one is not None]
    gone = [claim for claim in liveness.elsewhere if any(_ended_with(claim, one) for one in ended)]
    if left := [claim for claim in liveness.elsewhere if claim not in gone]:
        return Verdict("alive", f"{_named(left[0])} has it")
    if job is not None and job.exit_code != REFUSED:  # one that was refused never had the run
        status, cause = _end_of_job(job)
        if record.status != "RUNNING":
            status = record.status  # type: ignore[assignment]
        why = f"its job {job.submission_id} {job.status}"
        return Verdict("dead", why, status, cause, job.ended, by_job=True, gone=gone)
    if not liveness.readable:
        return Verdict("unsure", "its directory cannot be read from here")
    last = liveness.last
    when = last.beat if last is not None else liveness.written
    if record.status != "RUNNING":
        why = f"it ended as {record.status}, which MLflow was not told"
        return Verdict("dead", why, record.status, why, when)  # type: ignore[arg-type]
    if last is not None:
        what = f"{_named(last)} is gone" if last.is_here else f"no sign of life from {_named(last)}"
        since = f" for {duration(liveness.now - last.beat)}" if liveness.now is not None and not last.is_here else ""
        return Verdict("dead", what + since, "FAILED", f"its driver died: {what}{since}", when)
    if liveness.is_settled():
        return Verdict("dead", "nobody has its directory", "FAILED", "its driver died: nobody has its directory", when)
    return Verdict("unsure", "nobody has its directory yet; it may be starting")


def _end_of_job(job: Job) -> tuple[Status, str]:
    name = f"its job {job.submission_id}"
    if job.status == "STOPPED":
        return "KILLED", f"{name} was stopped"
    if job.status == "SUCCEEDED" or job.exit_code == 0:
        return "FINISHED", f"{name} succeeded, which MLflow was not told"
    end = ending_of(job)
    if end.status == "KILLED":
        return "KILLED", f"{name} ended with exit code {job.exit_code}: it was asked to"
    return "FAILED", f"{name} failed: {end.cause}"


def _ended_with(claim: Claim, job: Job) -> bool:
    """Whether a claim is of the driver of a job that has ended."""
    if claim.owner.get("job") != job.submission_id or job.ended is None or job.exit_code == REFUSED:
        return False
    try:
        since = datetime.fromisoformat(claim.owner.get("since", "")).timestamp()
    except ValueError:
        return False
    made = (job.started or 0.0) - _BEAT_S <= since <= job.ended + _BEAT_S
    return made and claim.beat <= job.ended + _BEAT_S


def _named(claim: Claim) -> str:
    return f"process {claim.owner.get('pid', '?')} on {claim.owner.get('host', 'an unknown machine')}"


def _clock(storage: Storage) -> float | None:
    """The storage's own time, by the date of a file; None where it takes none."""
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
