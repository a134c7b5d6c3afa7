"""Turn a request into a job on a shared cluster: send it, follow it, and send it again if its driver dies.

A repeated command does not send the same request twice. A process that follows a job can end at any time; the job
continues, and nothing is lost.
"""

from __future__ import annotations

import platform
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from raytrainer import preflight, tracking
from raytrainer.attempt import CONFIG, STOP, SUBMITTED, Record, probe_first_batch, tracking_uri, written_storage_path
from raytrainer.backends.jobs_api.api import JobInfo, Jobs, check_environment
from raytrainer.backends.kubernetes.kubectl import RayJobs, RayJobStatus
from raytrainer.config import Composition
from raytrainer.core.interrupts import Interrupted, Interrupts
from raytrainer.errors import ClusterError, ClusterUnreachable, ConfigError, JobExists, PreflightError, StorageError
from raytrainer.storage import Storage
from raytrainer.submission import request as requests
from raytrainer.submission.ending import REFUSED, ending_of
from raytrainer.submission.request import Request
from raytrainer.sweep import Plan

ACTIVE = ("PENDING", "RUNNING")
_LOOK_S, _TELL_S = 0.25, 10.0
_PATIENCE_S, _AGAIN_S = 120.0, 2.0  # how long the cluster may not answer; between two tries
_ATTEMPT = re.compile(r".*--(\d+)")

Asked = Composition | Plan
Job = JobInfo | RayJobStatus


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


def launch(
    asked: Asked,
    argv: Sequence[str],
    *,
    record: Record | None = None,
    changed: Sequence[str] = (),
    say: Callable[[str], None],
    out: TextIO,
    folder: Path | None = None,
) -> Submission:
    """Submit a run or sweep and follow it to its end, unless `cluster.wait` is false.

    Args:
        asked: The run or sweep; its `cluster` says where it runs.
        argv: The command line, for the records.
        record: The run to continue; None: a new one.
        changed: As in `run.launch`.
        say: Receives lines that say what happens here.
        out: Receives what the job prints.
        folder: The launching directory; None: the current one.

    Raises:
        Refused: Nothing was sent.
        ClusterError: The cluster cannot be reached any more; a job that was sent continues.
    """
    folder = folder or Path.cwd()
    request = prepared(asked, argv, record=record, changed=changed, say=say, folder=folder)
    cluster, wait = connect(request), request.experiment.cluster.wait
    if not wait and request.experiment.cluster.kind == "job":
        preflight.check_objects(request.experiment)  # here, because the user does not see the job's messages
    with Interrupts() as interrupts:
        sender = _Sender(request, cluster, record, say, folder)
        try:
            sent = sender.send()
            return sender.follow(out, sent=sent) if wait else sender.looked_at(sent=sent)
        except Interrupted:
            if not sender.is_sent:
                raise
            interrupts.install()
            gone = "may have been sent" if sender.is_sending else "continues"
            say(f"no longer followed: {request.name} {gone} at {request.address}")
            return sender.submission("RUNNING", interrupts.exit_code or 128 + signal.SIGINT, sent=True)


def check(asked: Asked, argv: Sequence[str], *, record: Record | None = None, say: Callable[[str], None]) -> str:
    """Check everything that can be checked before a submission, and send nothing. Return where it would run, as text.

    Raises:
        Refused: A check has failed.
        ClusterError: The cluster cannot be reached.
    """
    request = prepared(asked, argv, record=record, say=say, folder=Path.cwd())
    preflight.check_objects(request.experiment)
    cluster = connect(request)
    if isinstance(cluster, Jobs):
        _check_cluster(request, cluster, say)
    example = asked.example if isinstance(asked, Plan) else asked
    probe_first_batch(example, request.experiment.scaling.use_gpu is not False, say)
    return f"a job at {request.address}"


def prepared(
    asked: Asked,
    argv: Sequence[str],
    *,
    record: Record | None = None,
    changed: Sequence[str] = (),
    say: Callable[[str], None],
    folder: Path,
) -> Request:
    """Return the request. Warn about files that the cluster may lack.

    Raises:
        Refused: Something cannot be sent, or the cluster could not reach it; the message names the fix.
    """
    attempt = 1 if record is None else record.attempts + 1
    request = requests.prepare(asked, argv, folder=folder, changed=changed, resumes=record is not None, attempt=attempt)
    refused, told = requests.problems(request)
    if refused:
        raise PreflightError(refused)
    for text in told:
        say(f"warning: {text}")
    return request


def connect(request: Request) -> Jobs | RayJobs:
    """Return the client for the request's cluster."""
    c = request.experiment.cluster
    if c.kind == "kuberay":
        return RayJobs(request.address)
    check_environment(request.address)
    return Jobs(request.address, ca_file=c.ca_file, token_file=c.token_file)


class _Sender:
    """Sends a request, again if necessary; `request` is the last one that was sent."""

    def __init__(
        self, request: Request, cluster: Jobs | RayJobs, record: Record | None, say: Callable[[str], None], folder: Path
    ) -> None:
        self.request, self.cluster, self.record, self.say, self.folder = request, cluster, record, say, folder
        self.is_sent = self.is_sending = False

    def send(self) -> bool:
        """Send the request. Return False if the same job exists already.

        Raises:
            ConfigError: Another job has this name.
        """
        while True:
            last = self._last_attempt()
            if last is not None and self._is_it(last):
                self.is_sent = True
                return False
            number = max(_number(last) + 1 if last is not None else 1, self._first)
            # A job that ended without a report may have left its lease on the run directory.
            self.request = self.request.again(number, replaces=last.submission_id if last and _is_mute(last) else None)
            if isinstance(self.cluster, RayJobs):
                if self._apply(self.cluster, last):
                    return True
                continue
            try:
                self._submit(self.cluster)
            except JobExists:  # another process sends the same at this moment
                if self.cluster.info(self.request.submission_id) is not None and self._last_attempt() == last:
                    raise ConfigError(
                        f"is the id of a job at {self.request.address} that was not submitted by raytrainer; give another name",
                        key="name",
                        value=self.request.submission_id,
                    ) from None
                continue
            return True

    def looked_at(self, *, sent: bool) -> Submission:
        """Return the current result without waiting."""
        if sent:
            return self.submission("PENDING", 0, sent=True)
        job = self._job()
        if job is None or job.status in ACTIVE:
            return self.submission(job.status if job else "PENDING", 0, sent=False)
        status, code, cause = _end(job)
        return self.submission(status, code, sent=False, cause=cause)

    def follow(self, out: TextIO, *, sent: bool) -> Submission:
        """Show what the job prints until it ends; send it again if its driver was killed."""
        left, used = self.request.experiment.cluster.retries, 0
        while True:
            job = self._followed(out)
            status, code, cause = _end(job)
            again = job is None or (_is_mute(job) and not _had_no_environment(job))
            if not again or used >= left or not isinstance(self.cluster, Jobs):
                return self.submission(status, code, sent=sent, cause=cause)
            if self._is_to_stop():
                return self.submission("KILLED", 143, sent=sent, cause=f"a stop was requested, and it died: {cause}")
            used += 1
            died = self.request.submission_id
            self.say(f"{died} died: {cause}; submitting it again ({used} of {left})")
            self.request = self.request.again(_number_of(died) + 1, replaces=died)
            try:
                # Not checked for capacity: the cluster will replace a node that died.
                self._submit(self.cluster, checked=True)
            except JobExists:
                self.say(f"{self.request.submission_id} already exists: another command follows the run, too")

    def submission(self, status: str, code: int, *, sent: bool, cause: str | None = None) -> Submission:
        r = self.request
        return Submission(r.name, r.submission_id, r.address, status, code, sent, cause)

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> int:
        return 1 if self.record is None else self.record.attempts + 1

    def _last_attempt(self) -> Job | None:
        mine = [job for job in self.cluster.list() if job.metadata.get("raytrainer.name") == self.request.name]
        return max(mine, key=_number, default=None)

    def _is_it(self, job: Job) -> bool:
        """Return whether a job of this name is the requested one; False if another one may be started.

        Raises:
            ConfigError: The job has other content and blocks the name.
        """
        name, going = self.request.name, job.status in ACTIVE
        same = job.metadata.get("raytrainer.content") == self.request.content
        if not going and (self.record is not None or job.exit_code == REFUSED):
            return False  # an ended job is continued by a new one, and a refused job has started nothing
        if same and not going and _is_mute(job):
            return False
        if same:
            self.request = self.request.again(_number(job))
            self.say(f"{name} was submitted before: job {job.submission_id} is {job.status}")
            return True
        other = ", ".join(self.request.differences(job.metadata)) or "content"
        what = "runs" if going else "was submitted"
        raise ConfigError(
            f"is the name of a job that {what} at {self.request.address} with another {other}"
            f" ({job.submission_id}, {job.status}); another name starts a new run"
            + ("" if going else f", and resume {name} continues that one"),
            key="name",
            value=name,
        )

    def _apply(self, cluster: RayJobs, last: Job | None) -> bool:
        self._remember()
        manifest = self.request.manifest()
        self.is_sent = self.is_sending = True
        try:
            sent = cluster.send(*manifest, instead_of=last if isinstance(last, RayJobStatus) else None)
        except Interrupted:
            raise
        except BaseException:
            self.is_sent = False
            raise
        self.is_sending = False
        return sent

    def _submit(self, cluster: Jobs, *, checked: bool = False) -> None:
        request = self.request
        if not checked:
            _check_cluster(request, cluster, self.say)
            if table := request.table():
                self.say(f"uploading:\n{table}")
        self._remember()
        with tempfile.TemporaryDirectory(prefix="raytrainer-") as folder:
            self.is_sent = self.is_sending = True
            try:
                cluster.submit(request, Path(folder))
            except (Interrupted, JobExists):
                raise  # after an interrupt it is unknown whether the job was sent
            except BaseException:
                self.is_sent = cluster_has(cluster, request.submission_id)
                raise
            self.is_sending = False
        self.say(f"{request.name}: submitted to {request.address} as job {request.submission_id}")

    def _remember(self) -> None:
        """Write the submission record before sending, so that the verbs here find the job even if this process dies."""
        e, r = self.request.experiment, self.request
        known = self.record or Record(r.name, "", created=datetime.now(UTC).isoformat(timespec="seconds"), kind=r.kind)
        job = {"submission_id": r.submission_id, "cluster_address": r.address, "content": r.content}
        uri = tracking.redacted(tracking_uri(e))
        place = Storage(self.folder / "runs" / SUBMITTED / r.name)
        place.write_bytes(CONFIG, r.files["config.yaml"])  # it also says how to reach the cluster
        written = written_storage_path(r.asked.first if isinstance(r.asked, Plan) else r.asked)
        known = replace(known, run_dir=self._storage().display, storage_path=written, job=job)
        replace(known, tracking_uri=known.tracking_uri or uri).write(place)

    def _storage(self) -> Storage:
        return Storage(self.request.experiment.storage_path or "").child(self.request.name)

    def _is_to_stop(self) -> bool:
        """Return whether a stop was requested that the driver did not live to handle."""
        try:
            return self._storage().exists(STOP)
        except StorageError:  # this machine cannot reach the storage
            return False

    def _followed(self, out: TextIO) -> Job | None:
        """Follow the job and return it after its end; None if the cluster no longer knows it."""
        due = time.monotonic() + _TELL_S
        while (job := self._job()) is not None and job.status == "PENDING":
            if time.monotonic() >= due:
                with suppress(ClusterUnreachable):  # it may answer the next time
                    self.say(f"{self.request.name} waits: {self.cluster.explain_waiting(job.submission_id)}")
                due = time.monotonic() + _TELL_S
            time.sleep(_LOOK_S)
        if job is None:
            return None
        for piece in self.cluster.tail(job.submission_id):
            out.write(piece)
            out.flush()
        while (job := self._job()) is not None and job.status in ACTIVE:  # its log ends a moment before the job
            time.sleep(_LOOK_S)
        return job

    def _job(self) -> Job | None:
        """Return the job's current state. If the cluster does not answer, try again for some time."""
        began, told = time.monotonic(), False
        while True:
            try:
                return self.cluster.info(self.request.submission_id)
            except ClusterUnreachable as error:
                if time.monotonic() - began > _PATIENCE_S:
                    raise
                if not told:
                    self.say(f"{error}; trying again for {_PATIENCE_S:g} s")
                told = True
                time.sleep(_AGAIN_S)


def cluster_has(cluster: Jobs, submission_id: str) -> bool:
    """Return whether a job whose answer was lost was accepted; True if that is unknown."""
    try:
        return cluster.info(submission_id) is not None
    except ClusterError:
        return True


def _check_cluster(request: Request, cluster: Jobs, say: Callable[[str], None]) -> None:
    """Check that the whole cluster, with all nodes that it can add, could run the request.

    Raises:
        PreflightError: It could not.
    """
    facts = cluster.facts()
    if problem := facts.version_problem():
        raise PreflightError([problem])
    compositions = request.asked.compositions.values() if isinstance(request.asked, Plan) else [request.asked]
    asked = [composition.experiment for composition in compositions]
    found = [problem for e in asked for problem in facts.problems(e)]
    if facts.head is not None and not preflight.is_this_machine(facts.head):
        # Also for a loopback address, which may be a forwarded port.
        found += [problem for e in asked for problem in preflight.check_reach(e, tracking_uri(e), lambda host: False)]
    preflight.refuse(list(dict.fromkeys(found)))
    for text in facts.other_versions(metadata.version("ray"), platform.python_version()):
        say(f"warning: {text}")


def _number(job: Job) -> int:
    return _number_of(job.submission_id)


def _number_of(submission_id: str) -> int:
    match = _ATTEMPT.fullmatch(submission_id)
    return int(match[1]) if match else 1


def _end(job: Job | None) -> tuple[str, int, str | None]:
    """Return, for a job that has ended, the run's status, our exit code, and why it did not finish."""
    if job is None:
        return "FAILED", 1, "its cluster no longer knows it: its head was restarted"
    end = ending_of(job)
    return end.status, end.exit_code, end.cause


def _is_mute(job: Job) -> bool:
    """Return whether a job ended without a report of how the run ended. Another try may succeed.

    Its driver or supervisor was killed, or its environment could not be set up.
    """
    return job.status == "FAILED" and not ending_of(job).reported


def _had_no_environment(job: Job) -> bool:
    """Return whether its packages could not be installed, which an immediate retry does not fix."""
    return job.exit_code is None and job.message.lower().startswith("runtime_env setup failed")
