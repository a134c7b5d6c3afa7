"""`stop ID`: ask a run to save a last checkpoint and end, wherever it runs, and wait until its resources are free."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil

from raytrainer import provenance
from raytrainer.errors import ConfigError, RaytrainerError, StorageError, TrackingError
from raytrainer.runs.finding import look_up, with_tracking
from raytrainer.runs.jobs import ACTIVE, Clusters, Job, never_sent
from raytrainer.runs.liveness import Liveness, Verdict
from raytrainer.runs.reconcile import close, verdict_of
from raytrainer.progress import duration
from raytrainer.attempt import STOP, Record
from raytrainer.storage.lock import Lease, process_start

TIMEOUT_S = 120.0
# A driver looks for the object every 2 s, gives its workers 8 s for a checkpoint and MLflow 6 s for the end.
_GRACE_S = 30.0
_PLACED_S = 10.0  # how long a pending job may take to end before the user is told that it cannot end yet
_SECOND_S, _KILL_S = 10.0, 16.0  # with --force: from the first signal to the second, and to SIGKILL


@dataclass(frozen=True)
class StopResult:
    """The result of a stop.

    Attributes:
        name: The run.
        status: The run's status after the stop.
        done: Whether the run has ended and none of its processes or jobs is left.
        told: What ended, or what is left, as text.
        seconds: How long the stop took.
        asked: Whether what is left was asked to end, and nothing more can be done.
    """

    name: str
    status: str
    done: bool
    told: str
    seconds: float
    asked: bool = False

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Stopper:
    """Stops one run.

    Args:
        identifier: The run's name, MLflow run id or submission id.
        force: End the run without a checkpoint if it does not end in time.
        timeout_s: The longest time to wait, in seconds.
        say: Receives a line about each step of the stop.
        clusters, sleep: Replaced in tests.

    Raises:
        RunNotFound: There is no such run.
        ConfigError: The ID names a trial, which ends with its sweep.
    """

    def __init__(
        self,
        identifier: str,
        *,
        force: bool = False,
        timeout_s: float = TIMEOUT_S,
        say: Callable[[str], None] = lambda text: None,
        clusters: Clusters | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.known, self.force, self.say, self.sleep = look_up(identifier), force, say, sleep
        self.clusters = clusters or Clusters()
        self.name = self.known.record.name
        if self.known.trial is not None:
            raise ConfigError(f"{identifier} is a trial; it ends with its sweep: stop {self.name}")
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s

    def stop(self) -> StopResult:
        """Stop the run and wait for its end.

        Raises:
            RaytrainerError: The run cannot be reached from here.
        """
        with suppress(TrackingError):
            self.known = with_tracking(self.known)
        self.known, job = self.clusters.attempt(self.known)
        self.clusters.tell(self.say)
        if job is not None and job.status in ACTIVE:
            return self._stop_job(job)
        liveness = Liveness.read(self.known.storage)
        # Only the run's own lease: another command may hold the directory briefly while it closes a dead run.
        mine = [c for c in liveness.leases if c.is_here and c.lives and c.owner.get("run") == self.name]
        if mine and (result := self._stop_process(mine[0])) is not None:
            return result
        if liveness.here is not None or liveness.elsewhere:
            return self._stop_elsewhere(liveness)
        verdict, silence = verdict_of(self.known, self.clusters), self.clusters.silence_of(self.known)
        has_ended = verdict.life == "dead" or (self._status() != "RUNNING" and self.known.storage is None)
        # A cluster that does not answer is no proof that the run is dead.
        if silence is not None and (self.known.coming is not None or not has_ended):
            raise RaytrainerError(
                f"{self.name} is not stopped: {silence}; so it is not known whether its job {self.known.coming or self.known.submission_id} runs"
            )
        if verdict.life == "dead":
            closed = self._closed(verdict)
            state = f"its job {job.submission_id} had ended: {job.status}" if job is not None else "it had ended"
            return self._result(True, closed or state)
        if has_ended:
            return self._result(True, "it had ended")
        if self.known.submission_id is not None and self.known.storage is None and self.known.stored is None:
            raise RaytrainerError(f"{self.name} has nothing to stop: {never_sent(self.known)}")
        if self.force:
            cause = "declared dead by stop --force"
            return self._result(True, self._closed(Verdict("dead", verdict.why, "KILLED", cause)) or verdict.why)
        raise RaytrainerError(
            f"{self.name} cannot be reached ({verdict.why}), so it is not known whether it runs"
            f"{self._where()}; if you know that it does not: stop --force {self.name} marks it KILLED"
        )

    # --- a process of this machine --------------------------------------------------------------------------------

    def _stop_process(self, lease: Lease) -> StopResult | None:
        """Signal a process on this machine. Returns None if we may not signal it."""
        pid = int(lease.owner["pid"])
        try:
            # The descriptor belongs to one process, even if its id is reused later. So open it first, then compare.
            with _descriptor(pid) as process:
                if process_start(pid) != lease.started:
                    raise ProcessLookupError
                family = _family(pid)
                signal.pidfd_send_signal(process, signal.SIGTERM)
                self.say(f"{self.name}: asked process {pid} to end after a last checkpoint")
                return self._wait_for(pid, process, family)
        except ProcessLookupError:
            return self._after_death("it had ended")
        except PermissionError:
            self.say(
                f"{self.name}: process {pid} is {lease.owner.get('user', 'another user')}'s; it is asked by a file"
            )
            return None

    def _wait_for(self, pid: int, process: int, family: dict[tuple[int, float], psutil.Process]) -> StopResult:
        began, signals = time.monotonic(), 1
        while left := [p for p in family.values() if _lives(p)]:
            waited = time.monotonic() - began
            if any(p.pid == pid for p in left):
                family.update(_family(pid))
            if self.force and signals == 1 and waited > _SECOND_S:
                signals = 2
                self.say(f"{self.name}: still there; ending it without a checkpoint")
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGTERM)
            if self.force and waited > _KILL_S:
                for one in left:
                    with suppress(psutil.Error):
                        one.kill()
            if time.monotonic() > self.deadline:
                names = ", ".join(str(p.pid) for p in left[:5])
                return self._result(False, f"{len(left)} of its processes are still there: {names}")
            self.sleep(0.1)
        count = len(family)
        return self._after_death(f"its {count} processes are gone" if count > 1 else "its process is gone")

    def _after_death(self, message: str) -> StopResult:
        """Record the end of a driver that may have been killed before it could do so."""
        with suppress(TrackingError):
            self.known = with_tracking(replace(self.known, stored=None))
        verdict = verdict_of(self.known, self.clusters)
        if verdict.life == "dead":
            by_force = verdict.status == "FAILED" and self.force
            self._closed(replace(verdict, status="KILLED", cause="killed by stop --force") if by_force else verdict)
        return self._result(True, message)

    # --- a driver on another machine ------------------------------------------------------------------------------

    def _stop_elsewhere(self, liveness: Liveness) -> StopResult:
        owner = next((c.owner for c in (liveness.here, *liveness.elsewhere) if c is not None), {})
        where = f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
        self._ask_by_file()
        self.say(f"{self.name}: asked {where} to end after a last checkpoint, by the file {STOP} in its directory")
        while (verdict := verdict_of(self.known, self.clusters)).life == "alive":
            if time.monotonic() > self.deadline:
                force = f"; on {owner.get('host', 'that machine')}: kill -9 {owner.get('pid', '?')}"
                return self._result(False, f"{where} still holds its lock{force}")
            self.sleep(1.0)
            self.clusters.forget(self.known)
        return self._result(True, self._closed(verdict) or f"{where} has released its lock")

    def _ask_by_file(self, job: str | None = None) -> None:
        assert self.known.storage is not None
        by = {"by": provenance.user(), "host": socket.gethostname(), "pid": os.getpid(), "job": job}
        self.known.storage.write_bytes(STOP, json.dumps(by).encode())

    # --- a job ----------------------------------------------------------------------------------------------------

    def _stop_job(self, job: Job) -> StopResult:
        asked = job.status == "RUNNING" and not self.force and self._asked_by_file(job.submission_id)
        if asked:
            self.say(f"{self.name}: asked its job to end after a last checkpoint")
            job = job.wait(min(self.deadline - time.monotonic(), _GRACE_S), sleep=self.sleep)
        if job.status in ACTIVE:
            self.say(f"{self.name}: stopping the job {job.submission_id}" + (", which did not end" if asked else ""))
            job.stop()
            job = job.wait(min(self.deadline - time.monotonic(), _PLACED_S), sleep=self.sleep)
        message = f"its job {job.submission_id} is asked to end, and does as soon as its driver gets what it waits for"
        if job.status == "PENDING":  # Ray cannot end a job whose driver is not placed yet
            self.say(f"{self.name}: {message}")
        if job.status in ACTIVE:
            job = job.wait(self.deadline - time.monotonic(), sleep=self.sleep)
        if job.status == "PENDING":
            return self._result(False, message, asked=True)
        if job.status == "RUNNING":
            return self._result(False, f"its job {job.submission_id} is still {job.status}")
        while held := job.held_by():
            if time.monotonic() > self.deadline:
                return self._result(False, f"its job is {job.status}, and still holds {_amounts(held)}")
            self.sleep(0.5)
        self.clusters.forget(self.known)
        verdict = verdict_of(self.known, self.clusters)
        if verdict.life == "dead":
            self._closed(verdict)
        return self._result(True, f"its job {job.submission_id} is {job.status}, and what it held is free")

    def _asked_by_file(self, job: str) -> bool:
        if self.known.storage is None:
            self.say(f"{self.name}: its directory cannot be written from here, so it is ended without a checkpoint")
            return False
        try:
            self._ask_by_file(job)
        except StorageError as error:
            self.say(f"{self.name}: {error}; it is ended without a checkpoint")
            return False
        return True

    # --- the end --------------------------------------------------------------------------------------------------

    def _closed(self, verdict: Verdict) -> str | None:
        """Record the end of the run if nothing has recorded it; return a sentence about it, or None if it was recorded."""
        stored = self.known.stored
        if stored is None and self.known.storage is None:  # the run is no more than a job
            self.known = replace(self.known, record=replace(self.known.record, status=verdict.status))
            return None
        if self._status() != "RUNNING" and (stored is None or stored.status != "RUNNING"):
            return None
        try:
            if close(self.known, verdict, self.clusters):
                self.known = replace(self.known, record=replace(self.known.record, status=verdict.status))
                return f"its driver was dead already ({verdict.why}); it is marked {verdict.status}"
        except RaytrainerError as error:
            self.say(f"warning: could not update MLflow: {error}")
        return None

    def _status(self) -> str:
        if self.known.storage is not None:
            with suppress(StorageError):
                return (Record.read(self.known.storage) or self.known.record).status
        return self.known.stored.status if self.known.stored is not None else self.known.record.status

    def _result(self, done: bool, message: str, *, asked: bool = False) -> StopResult:
        return StopResult(self.name, self._status(), done, message, time.monotonic() - self.began, asked)

    def _where(self) -> str:
        host = self.known.stored.tags.get("raytrainer.host") if self.known.stored is not None else None
        return "" if host is None else f"; it was launched on {host}"


def text(result: StopResult, program: str) -> str:
    """Return the result as lines for the terminal."""
    if not result.done:
        following = "status" if result.asked else "stop --force"
        message = f"{result.name} is not stopped after {duration(result.seconds)}: {result.told}"
        return f"{message}\nnext     {program} {following} {result.name}"
    return f"{result.name} is stopped ({result.status}) after {duration(result.seconds)}: {result.told}"


@contextmanager
def _descriptor(pid: int) -> Iterator[int]:
    """Open a process as a descriptor, which stays with that process even if its id is reused."""
    file = os.pidfd_open(pid)
    try:
        yield file
    finally:
        os.close(file)


def _family(pid: int) -> dict[tuple[int, float], psutil.Process]:
    """Return a process and all its descendants, by process id and start time."""
    processes: dict[tuple[int, float], psutil.Process] = {}
    with suppress(psutil.Error):
        driver = psutil.Process(pid)
        for process in (driver, *driver.children(recursive=True)):
            with suppress(psutil.Error):
                processes[process.pid, process.create_time()] = process
    return processes


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _amounts(held: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in held.items())
