"""`stop ID`: ask a run to save a last checkpoint and end, wherever it runs, and wait until its resources are free."""

from __future__ import annotations

import argparse
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
from raytrainer.attempt import STOP, Record
from raytrainer.core.formatting import duration
from raytrainer.errors import ConfigError, RaytrainerError, StorageError, TrackingError
from raytrainer.runs import printing
from raytrainer.runs.arguments import VerbParser, number_of_seconds
from raytrainer.runs.jobs import ACTIVE, Clusters, Job, never_sent
from raytrainer.runs.liveness import Liveness, LockState
from raytrainer.runs.reconcile import check_liveness, close_orphan
from raytrainer.runs.resolve import resolve_run, with_mlflow_run
from raytrainer.storage.lock import Lease, process_start

ABOUT = "Ask a run to end after a last checkpoint, and wait until its resources are free."
TIMEOUT_S = 120.0
# A driver looks for the file `stop` every 2 s. It gives its workers 8 s for a checkpoint, and MLflow 6 s for the end.
_GRACE_S = 30.0
_PLACED_S = 10.0  # how long a pending job may take to end before a message says that it cannot end yet
_SECOND_S, _KILL_S = 10.0, 16.0  # with --force: from the first signal to the second, and to SIGKILL


def add_arguments(parser: VerbParser) -> None:
    add = parser.add_argument
    add("--force", action="store_true", help="end it without a checkpoint, if it has not ended after 10 s")
    about = "wait at most this many seconds (120)"
    add("--timeout", metavar="S", type=number_of_seconds, default=TIMEOUT_S, help=about)
    parser.add_id()


def run(arguments: argparse.Namespace) -> int:
    identifier = arguments.id
    try:
        result = Stopper(identifier, force=arguments.force, timeout_s=arguments.timeout, say=printing.say).stop()
    except KeyboardInterrupt:
        printing.say(f"stopped waiting; the stop request for {identifier} remains")
        return 130
    print(printing.to_json(result.to_json()) if arguments.json else result.text(provenance.program()))
    return 0 if result.is_stopped else 1


@dataclass(frozen=True)
class StopResult:
    """The result of a stop.

    Attributes:
        name: The run.
        status: The run's status after the stop.
        is_stopped: Whether the run has ended and none of its processes or jobs is left.
        message: What ended, or what is left, as text.
        seconds: How long the stop took.
        is_requested: Whether what is left was asked to end, and nothing more can be done.
    """

    name: str
    status: str
    is_stopped: bool
    message: str
    seconds: float
    is_requested: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "done": self.is_stopped,
            "told": self.message,
            "seconds": self.seconds,
            "asked": self.is_requested,
        }

    def text(self, program: str) -> str:
        """Return the result as lines for the terminal."""
        took = duration(self.seconds)
        if self.is_stopped:
            return f"{self.name} is stopped ({self.status}) after {took}: {self.message}"
        verb = "status" if self.is_requested else "stop --force"
        return f"{self.name} is not stopped after {took}: {self.message}\nnext     {program} {verb} {self.name}"


class Stopper:
    """The stop of one run.

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
        self.handle, self.force, self.say, self.sleep = resolve_run(identifier), force, say, sleep
        self.clusters = clusters or Clusters()
        self.name = self.handle.name
        if self.handle.trial is not None:
            raise ConfigError(f"{identifier} is a trial; it ends with its sweep: stop {self.name}")
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s

    def stop(self) -> StopResult:
        """Stop the run and wait for its end.

        Raises:
            RaytrainerError: The run cannot be reached from here.
        """
        with suppress(TrackingError):
            self.handle = with_mlflow_run(self.handle)
        self.handle, job = self.clusters.attempt(self.handle)
        self.clusters.report_failures(self.say)
        if job is not None and job.status in ACTIVE:
            return self._stop_job(job)
        lock = LockState.read(self.handle.storage)
        # Only the run's own lease: another command may hold the directory briefly while it closes a dead run.
        own = [c for c in lock.leases if c.is_here and c.lives and c.owner.get("run") == self.name]
        if own and (result := self._stop_process(own[0])) is not None:
            return result
        if lock.here is not None or lock.elsewhere:
            return self._stop_elsewhere(lock)
        return self._stop_ended(job)

    def _stop_ended(self, job: Job | None) -> StopResult:
        """Return the result for a run without a process or an active job, as far as is known here."""
        handle, liveness = self.handle, check_liveness(self.handle, self.clusters)
        has_ended = liveness.state == "dead" or (self._status() != "RUNNING" and handle.storage is None)
        # An answer that is missing does not prove that the run is dead.
        silence, next_job = self.clusters.query_error(handle), handle.next_submission_id
        if silence is not None and (next_job is not None or not has_ended):
            raise RaytrainerError(
                f"{self.name} is not stopped: {silence}; so it is not known whether its job "
                f"{next_job or handle.submission_id} runs"
            )
        if liveness.state == "dead":
            ended = f"its job {job.submission_id} had ended: {job.status}" if job is not None else "it had ended"
            return self._result(True, self._close(liveness) or ended)
        if has_ended:
            return self._result(True, "it had ended")
        if handle.submission_id is not None and handle.storage is None and handle.mlflow_run is None:
            raise RaytrainerError(f"{self.name} has nothing to stop: {never_sent(handle)}")
        if self.force:
            forced = Liveness("dead", liveness.reason, "KILLED", "declared dead by stop --force")
            return self._result(True, self._close(forced) or liveness.reason)
        raise self._unreachable(liveness)

    def _unreachable(self, liveness: Liveness) -> RaytrainerError:
        run = self.handle.mlflow_run
        host = run.tags.get("raytrainer.host") if run is not None else None
        return RaytrainerError(
            f"{self.name} cannot be reached ({liveness.reason}), so it is not known whether it runs"
            + ("" if host is None else f"; it was launched on {host}")
            + f"; if you know that it does not: stop --force {self.name} marks it KILLED"
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
                self._report(f"asked process {pid} to end after a last checkpoint")
                return self._wait_for(pid, process, family)
        except ProcessLookupError:
            return self._after_death("it had ended")
        except PermissionError:
            self._report(f"process {pid} is {lease.owner.get('user', 'another user')}'s; it is asked by a file")
            return None

    def _wait_for(self, pid: int, process: int, family: dict[tuple[int, float], psutil.Process]) -> StopResult:
        began, signals = time.monotonic(), 1
        while left := [p for p in family.values() if _lives(p)]:
            waited = time.monotonic() - began
            if any(p.pid == pid for p in left):
                family.update(_family(pid))
            if self.force and signals == 1 and waited > _SECOND_S:
                signals = 2
                self._report("still there; ending it without a checkpoint")
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGTERM)
            if self.force and waited > _KILL_S:
                for p in left:
                    with suppress(psutil.Error):
                        p.kill()
            if time.monotonic() > self.deadline:
                names = ", ".join(str(p.pid) for p in left[:5])
                return self._result(False, f"{len(left)} of its processes are still there: {names}")
            self.sleep(0.1)
        count = len(family)
        return self._after_death(f"its {count} processes are gone" if count > 1 else "its process is gone")

    def _after_death(self, message: str) -> StopResult:
        """Record the end of a driver that may have been killed before it could do so."""
        with suppress(TrackingError):
            self.handle = with_mlflow_run(replace(self.handle, mlflow_run=None))
        liveness = check_liveness(self.handle, self.clusters)
        if liveness.state == "dead":
            by_force = liveness.status == "FAILED" and self.force
            self._close(replace(liveness, status="KILLED", cause="killed by stop --force") if by_force else liveness)
        return self._result(True, message)

    # --- a driver on another machine ------------------------------------------------------------------------------

    def _stop_elsewhere(self, lock: LockState) -> StopResult:
        owner = next((c.owner for c in (lock.here, *lock.elsewhere) if c is not None), {})
        where = f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
        self._write_stop_file()
        self._report(f"asked {where} to end after a last checkpoint, by the file {STOP} in its directory")
        while (liveness := check_liveness(self.handle, self.clusters)).state == "alive":
            if time.monotonic() > self.deadline:
                force = f"; on {owner.get('host', 'that machine')}: kill -9 {owner.get('pid', '?')}"
                return self._result(False, f"{where} still holds its lock{force}")
            self.sleep(1.0)
            self.clusters.forget(self.handle)
        return self._result(True, self._close(liveness) or f"{where} has released its lock")

    def _write_stop_file(self, job: str | None = None) -> None:
        assert self.handle.storage is not None
        by = {"by": provenance.user(), "host": socket.gethostname(), "pid": os.getpid(), "job": job}
        self.handle.storage.write_bytes(STOP, json.dumps(by).encode())

    # --- a job ----------------------------------------------------------------------------------------------------

    def _stop_job(self, job: Job) -> StopResult:
        is_requested = job.status == "RUNNING" and not self.force and self._request_by_file(job.submission_id)
        if is_requested:
            self._report("asked its job to end after a last checkpoint")
            job = job.wait(min(self.deadline - time.monotonic(), _GRACE_S), sleep=self.sleep)
        if job.status in ACTIVE:
            self._report(f"stopping the job {job.submission_id}" + (", which did not end" if is_requested else ""))
            job.stop()
            job = job.wait(min(self.deadline - time.monotonic(), _PLACED_S), sleep=self.sleep)
        message = f"its job {job.submission_id} will stop when its driver gets the resources that it waits for; Ray cannot cancel it before"
        if job.status == "PENDING":  # Ray cannot end a job whose driver is not placed yet
            self._report(f"{message}")
        if job.status in ACTIVE:
            job = job.wait(self.deadline - time.monotonic(), sleep=self.sleep)
        if job.status == "PENDING":
            return self._result(False, message, is_requested=True)
        if job.status == "RUNNING":
            return self._result(False, f"its job {job.submission_id} is still {job.status}")
        while held := job.held_by():
            if time.monotonic() > self.deadline:
                return self._result(False, f"its job is {job.status}, and still holds {_amounts(held)}")
            self.sleep(0.5)
        self.clusters.forget(self.handle)
        liveness = check_liveness(self.handle, self.clusters)
        if liveness.state == "dead":
            self._close(liveness)
        return self._result(True, f"its job {job.submission_id} is {job.status}, and what it held is free")

    def _request_by_file(self, job: str) -> bool:
        if self.handle.storage is None:
            self._report("its directory cannot be written from here, so it is ended without a checkpoint")
            return False
        try:
            self._write_stop_file(job)
        except StorageError as error:
            self._report(f"{error}; it is ended without a checkpoint")
            return False
        return True

    # --- the end --------------------------------------------------------------------------------------------------

    def _close(self, liveness: Liveness) -> str | None:
        """Record the end of the run if nothing has recorded it; return a sentence about it, or None if it was recorded."""
        stored = self.handle.mlflow_run
        if stored is None and self.handle.storage is None:  # the run is no more than a job
            self.handle = replace(self.handle, record=replace(self.handle.record, status=liveness.status))
            return None
        if self._status() != "RUNNING" and (stored is None or stored.status != "RUNNING"):
            return None
        try:
            if close_orphan(self.handle, liveness, self.clusters):
                self.handle = replace(self.handle, record=replace(self.handle.record, status=liveness.status))
                return f"its driver was dead already ({liveness.reason}); it is marked {liveness.status}"
        except RaytrainerError as error:
            self.say(f"warning: could not update MLflow: {error}")
        return None

    def _status(self) -> str:
        if self.handle.storage is not None:
            with suppress(StorageError):
                return (Record.read(self.handle.storage) or self.handle.record).status
        return self.handle.mlflow_run.status if self.handle.mlflow_run is not None else self.handle.record.status

    def _report(self, message: str) -> None:
        self.say(f"{self.name}: {message}")

    def _result(self, is_stopped: bool, message: str, *, is_requested: bool = False) -> StopResult:
        return StopResult(self.name, self._status(), is_stopped, message, time.monotonic() - self.began, is_requested)


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
