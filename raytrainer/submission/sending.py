"""Send a request as a job, follow it, and send it again if its driver dies.

A repeated command does not send the same request twice. A process that follows a job can end at any time; the job
continues, and nothing is lost.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from raytrainer import tracking
from raytrainer.attempt import CONFIG, STOP, SUBMITTED, Record, tracking_uri, written_storage_path
from raytrainer.config import ClusterConfig
from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import ClusterUnreachable, ConfigError, JobExists, StorageError
from raytrainer.plugins import ACTIVE, Job
from raytrainer.storage import Storage
from raytrainer.submission.ending import REFUSED, ending_of
from raytrainer.submission.request import Request, attempt_of
from raytrainer.submission.target import first_of

_POLL_S, _REPORT_S = 0.25, 10.0  # between two looks at a waiting job; between two lines that say what it waits for
_PATIENCE_S, _RETRY_S = 120.0, 2.0  # how long the cluster may not answer; between two tries


class SubmittingBackend(Protocol):
    """The part of `job_backend.JobBackend` that sending needs."""

    resends: bool

    def check_capacity(self, request: Request, say: Callable[[str], None]) -> None: ...
    def start(self, request: Request, previous: Job | None = None) -> Job: ...
    def jobs(self, address: str, settings: ClusterConfig) -> Sequence[Job]: ...
    def job(self, submission_id: str, address: str, settings: ClusterConfig) -> Job | None: ...


@dataclass(frozen=True)
class Submission:
    """The result of a submission.

    Attributes:
        name: The name of the run.
        submission_id: The id of its job; of the last one if it was sent several times.
        address: The address of the cluster.
        status: PENDING or RUNNING if the job continues and this process no longer follows it; FINISHED, FAILED or
            KILLED; REFUSED if the driver on the cluster refused the run.
        exit_code: The exit code for the command that submitted it.
        sent: False if the same job existed already.
        cause: Why it did not finish.
    """

    name: str
    submission_id: str
    address: str
    status: str
    exit_code: int
    sent: bool
    cause: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, program: str) -> str:
        """Return the summary: what is known, and what to type next."""
        words = {"PENDING": "submitted", "REFUSED": "refused", "KILLED": "stopped"}
        rows = [("outcome", words.get(self.status, self.status.lower()) + ("" if self.sent else ", submitted before"))]
        if self.cause:
            rows.append(("cause", self.cause))
        rows.append(("where", f"job {self.submission_id} at {self.address}"))
        if self.status in ACTIVE:
            verbs = ["logs -f", "status", "stop"]
        elif self.status == "REFUSED":
            verbs = ["logs"]
        else:
            verbs = ["status", "logs"] if self.status == "FINISHED" else ["logs", "resume"]
        rows += [("" if i else "next", f"{program} {verb} {self.name}") for i, verb in enumerate(verbs)]
        return "\n".join(f"{name:<8} {text}" for name, text in rows)


def send(
    backend: SubmittingBackend, request: Request, record: Record | None, *, say: Callable[[str], None], out: TextIO
) -> Submission:
    """Send a request and follow its job to the end, unless `cluster.wait` is false.

    Args:
        backend: Where to send it.
        request: The request.
        record: The run that it continues; None: a new one.
        say: Receives lines that say what happens here.
        out: Receives what the job prints.

    Raises:
        Refused: Nothing was sent.
        ClusterError: The cluster cannot be reached any more; a job that was sent continues.
    """
    with Interrupts() as interrupts:
        sender = _Sender(backend, request, record, say)
        try:
            sent = sender.send()
            return sender.follow(out, sent=sent) if request.experiment.cluster.wait else sender.result(sent=sent)
        except Interrupted:
            if not sender.may_be_sent:
                raise
            interrupts.install()
            state = "may have been sent" if sender.job is None else "continues"
            say(f"no longer followed: {request.name} {state} at {request.address}")
            return sender.submission("RUNNING", interrupts.exit_code or 128 + signal.SIGINT, sent=True)


class _Sender:
    """The sender of one request, which sends it again if necessary.

    Attributes:
        request: The last one that was sent.
        job: Its job; None until the cluster has confirmed it, or if the cluster no longer knows it.
        may_be_sent: Whether the cluster may have received the request.
    """

    def __init__(
        self, backend: SubmittingBackend, request: Request, record: Record | None, say: Callable[[str], None]
    ) -> None:
        self.backend, self.request, self.record, self.say = backend, request, record, say
        self.job: Job | None = None
        self.may_be_sent = False

    def send(self) -> bool:
        """Send the request. Return False if the same job exists already.

        Raises:
            ConfigError: Another job has this name.
        """
        while True:
            last = self._last_attempt()
            if last is not None and self._is_same_request(last):
                self.job, self.may_be_sent = last, True
                return False
            number = max(attempt_of(last.submission_id) + 1 if last is not None else 1, self._first)
            # A job that ended without a report may have left its lease on the run directory.
            dead = last.submission_id if last is not None and _died_unreported(last) else None
            self.request = self.request.again(number, replaces=dead)
            self.backend.check_capacity(self.request, self.say)
            if table := self.request.table():
                self.say(f"uploading:\n{table}")
            try:
                self._start(last)
            except JobExists:  # another process sends the same at this moment
                if self._known_job() is not None and self._last_attempt() == last:
                    raise ConfigError(
                        f"is the id of a job at {self.request.address} that was not submitted by raytrainer; give another name",
                        key="name",
                        value=self.request.submission_id,
                    ) from None
                continue
            return True

    def result(self, *, sent: bool) -> Submission:
        """Return the current result without waiting."""
        job = self.job
        if sent or job is None:
            return self.submission("PENDING", 0, sent=sent)
        if job.is_active:
            return self.submission(job.status, 0, sent=False)
        return self.submission(*_end(job), sent=False)

    def follow(self, out: TextIO, *, sent: bool) -> Submission:
        """Show what the job prints until it ends; send it again if its driver was killed."""
        left, used = self.request.experiment.cluster.retries if self.backend.resends else 0, 0
        while True:
            self._follow(out)
            status, code, cause = _end(self.job)
            died = self.job is None or (_died_unreported(self.job) and not _lacked_environment(self.job))
            if not died or used >= left:
                return self.submission(status, code, cause, sent=sent)
            if self._is_to_stop():
                return self.submission("KILLED", 143, f"a stop was requested, and it died: {cause}", sent=sent)
            used += 1
            dead = self.request.submission_id
            self.say(f"{dead} died: {cause}; submitting it again ({used} of {left})")
            self.request = self.request.again(attempt_of(dead) + 1, replaces=dead)
            try:
                # The capacity is not checked again, because the cluster will replace a node that died.
                self._start(self.job)
            except JobExists:
                self.say(f"{self.request.submission_id} already exists: another command follows the run, too")
                self.job = self._known_job()

    def submission(self, status: str, code: int, cause: str | None = None, *, sent: bool) -> Submission:
        r = self.request
        return Submission(r.name, r.submission_id, r.address, status, code, sent, cause)

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> int:
        return 1 if self.record is None else self.record.attempts + 1

    def _last_attempt(self) -> Job | None:
        jobs = self.backend.jobs(self.request.address, self.request.experiment.cluster)
        mine = [job for job in jobs if job.metadata.get("raytrainer.name") == self.request.name]
        return max(mine, key=lambda job: attempt_of(job.submission_id), default=None)

    def _known_job(self) -> Job | None:
        r = self.request
        return self.backend.job(r.submission_id, r.address, r.experiment.cluster)

    def _is_same_request(self, job: Job) -> bool:
        """Return whether a job of this name is the requested one; False if another one may be started.

        Raises:
            ConfigError: The job has other content and blocks the name.
        """
        name = self.request.name
        same = job.metadata.get("raytrainer.content") == self.request.content
        if not job.is_active and (self.record is not None or job.exit_code == REFUSED):
            return False  # an ended job is continued by a new one, and a refused job has started nothing
        if same and not job.is_active and _died_unreported(job):
            return False
        if same:
            self.request = self.request.again(attempt_of(job.submission_id))
            self.say(f"{name} was submitted before: job {job.submission_id} is {job.status}")
            return True
        other = ", ".join(self.request.differences(job.metadata)) or "content"
        state = "runs" if job.is_active else "was submitted"
        raise ConfigError(
            f"is the name of a job that {state} at {self.request.address} with another {other}"
            f" ({job.submission_id}, {job.status}); another name starts a new run"
            + ("" if job.is_active else f", and resume {name} continues that one"),
            key="name",
            value=name,
        )

    def _start(self, previous: Job | None) -> None:
        self._write_record()
        self.job, self.may_be_sent = None, True  # after an interrupt it is unknown whether the job was sent
        self.job = self.backend.start(self.request, previous)
        self.say(f"{self.request.name}: submitted to {self.request.address} as job {self.request.submission_id}")

    def _write_record(self) -> None:
        """Write the submission record before sending, so that the verbs here find the job even if this process dies."""
        e, r = self.request.experiment, self.request
        known = self.record or Record(r.name, "", created=datetime.now(UTC).isoformat(timespec="seconds"), kind=r.kind)
        job = {"submission_id": r.submission_id, "cluster_address": r.address, "content": r.content}
        place = Storage(Path.cwd() / "runs" / SUBMITTED / r.name)
        place.write_bytes(CONFIG, r.files["config.yaml"])  # it also says how to reach the cluster
        known = replace(
            known,
            run_dir=self._storage().display,
            storage_path=written_storage_path(first_of(r.target)),
            job=job,
            tracking_uri=known.tracking_uri or tracking.redacted(tracking_uri(e)),
        )
        known.write(place)

    def _storage(self) -> Storage:
        return Storage(self.request.experiment.storage_path or "").child(self.request.name)

    def _is_to_stop(self) -> bool:
        """Return whether a stop was requested that the driver did not live to handle."""
        try:
            return self._storage().exists(STOP)
        except StorageError:  # this machine cannot reach the storage
            return False

    def _follow(self, out: TextIO) -> None:
        """Follow the job to its end, and keep `job` up to date."""
        due = time.monotonic() + _REPORT_S
        while self._refresh() and self.job is not None and self.job.status == "PENDING":
            if time.monotonic() >= due:
                with suppress(ClusterUnreachable):  # it may answer the next time
                    self.say(f"{self.request.name} waits: {self.job.explain_waiting()}")
                due = time.monotonic() + _REPORT_S
            time.sleep(_POLL_S)
        if self.job is None:
            return
        for piece in self.job.logs(follow=True):
            out.write(piece)
            out.flush()
        while self._refresh() and self.job.is_active:  # its log ends a moment before the job
            time.sleep(_POLL_S)

    def _refresh(self) -> bool:
        """Query the job's current state, again for some time if the cluster does not answer. Return whether it exists."""
        began, reported = time.monotonic(), False
        while self.job is not None:
            try:
                self.job = self.job.refresh()
                break
            except ClusterUnreachable as error:
                if time.monotonic() - began > _PATIENCE_S:
                    raise
                if not reported:
                    self.say(f"{error}; trying again for {_PATIENCE_S:g} s")
                reported = True
                time.sleep(_RETRY_S)
        return self.job is not None


def _end(job: Job | None) -> tuple[str, int, str | None]:
    """Return, for a job that has ended, the run's status, our exit code, and why it did not finish."""
    if job is None:
        return "FAILED", 1, "its cluster no longer knows it: its head was restarted"
    end = ending_of(job)
    return end.status, end.exit_code, end.cause


def _died_unreported(job: Job) -> bool:
    """Return whether a job ended without a report of how the run ended. Another try may succeed.

    Its driver or supervisor was killed, or its environment could not be set up.
    """
    return job.status == "FAILED" and not ending_of(job).reported


def _lacked_environment(job: Job) -> bool:
    """Return whether its packages could not be installed, which an immediate retry does not fix."""
    return job.exit_code is None and job.message.lower().startswith("runtime_env setup failed")
