"""From a request to a job on a shared cluster: sent once however often it is asked for, followed, sent again if it dies.

Whoever follows a job can go at any time: nothing here keeps it alive, and nothing of it is lost.
"""

from __future__ import annotations

import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from raytrainer import preflight, tracking
from raytrainer.cluster import request as requests
from raytrainer.cluster.api import JobInfo, Jobs, check_environment
from raytrainer.cluster.kubectl import RayJobs, RayJobStatus
from raytrainer.cluster.request import Request
from raytrainer.config import Composition
from raytrainer.errors import ClusterError, ConfigError, JobExists, PreflightError
from raytrainer.interrupts import Interrupted, Interrupts
from raytrainer.run import SUBMITTED, Record, tracking_uri
from raytrainer.storage import Storage
from raytrainer.sweep import Plan

GOING = ("PENDING", "RUNNING")
_LOOK_S, _TELL_S = 0.25, 10.0
# What the entrypoint ends with when it has told how the run did: any other end is that of a driver that was killed.
_TOLD = {0: "FINISHED", 1: "FAILED", 2: "REFUSED", 130: "KILLED", 143: "KILLED"}
_ATTEMPT = re.compile(r".*--(\d+)")

Asked = Composition | Plan
Job = JobInfo | RayJobStatus


@dataclass(frozen=True)
class Submission:
    """What became of a submission.

    Attributes:
        name: The run's.
        submission_id: Of its job; the last one where it was sent several times.
        address: The cluster's.
        status: PENDING or RUNNING: it goes on there, and nobody follows it any more; FINISHED, FAILED, KILLED; REFUSED:
            the cluster's side found what cannot work.
        exit_code: For the command that submitted it.
        sent: False: the same was there already.
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
        """The last words: what is known, and what to type next."""
        words = {"PENDING": "submitted", "REFUSED": "refused", "KILLED": "stopped"}
        rows = [("outcome", words.get(self.status, self.status.lower()) + ("" if self.sent else ", submitted before"))]
        if self.cause:
            rows.append(("cause", self.cause))
        rows.append(("where", f"job {self.submission_id} at {self.address}"))
        if self.status in GOING:
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
    """Submits a run or sweep and follows it to its end, unless `cluster.wait` is false.

    Args:
        asked: What is to be run; its `cluster` says where.
        argv: The command line, for the records.
        record: The run to go on with; None: a new one.
        changed: As `run.launch`.
        say: Told what happens here.
        out: Takes what the job prints.
        folder: The launching directory; None: the current one.

    Raises:
        Refused: Nothing was sent.
        ClusterError: The cluster cannot be asked any more; what was sent goes on.
    """
    folder = folder or Path.cwd()
    request = prepared(asked, argv, record=record, changed=changed, say=say, folder=folder)
    cluster, wait = connect(request), request.experiment.cluster.wait
    if not wait and request.experiment.cluster.kind == "job":
        preflight.check_objects(request.experiment)  # nobody looks at what the job would say
    with Interrupts() as interrupts:
        sender = _Sender(request, cluster, record, say, folder)
        try:
            sent = sender.send()
            if not wait:
                return sender.submission("PENDING", 0, sent=sent)
            return sender.follow(out, sent=sent)
        except Interrupted:
            if not sender.is_sent:
                raise
            interrupts.install()
            say(f"no longer followed: {request.name} goes on at {request.address}")
            return sender.submission("RUNNING", interrupts.exit_code or 128 + signal.SIGINT, sent=True)


def check(asked: Asked, argv: Sequence[str], *, record: Record | None = None, say: Callable[[str], None]) -> str:
    """All that can be known before a submission; sends nothing. Returns where it would run, in words.

    Raises:
        Refused: What does not hold.
        ClusterError: The cluster cannot be asked.
    """
    request = prepared(asked, argv, record=record, say=say, folder=Path.cwd())
    preflight.check_objects(request.experiment)
    cluster = connect(request)
    if isinstance(cluster, Jobs):
        _check_cluster(request, cluster, say)
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
    """The request, unless there is something that the cluster could not reach; what it may miss is told.

    Raises:
        Refused: What cannot be sent, and how it can.
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
    """What the request is for."""
    c = request.experiment.cluster
    if c.kind == "kuberay":
        return RayJobs(request.address)
    check_environment(request.address)
    return Jobs(request.address, ca_file=c.ca_file, token_file=c.token_file)


class _Sender:
    """One request on its way; `request` is what was sent last."""

    def __init__(
        self, request: Request, cluster: Jobs | RayJobs, record: Record | None, say: Callable[[str], None], folder: Path
    ) -> None:
        self.request, self.cluster, self.record, self.say, self.folder = request, cluster, record, say, folder
        self.is_sent = False

    def send(self) -> bool:
        """Sends it; False: the same is there already.

        Raises:
            ConfigError: Another of this name is there.
        """
        if isinstance(self.cluster, RayJobs):
            self._remember()
            sent = self.cluster.kubectl.apply(*self.request.manifest())
            self.is_sent = True
            return sent
        while True:
            last = self._last_attempt()
            if last is not None and self._is_it(last):
                self.is_sent = True
                return False
            number = max(_number(last) + 1 if last is not None else 1, self._first)
            self.request = self.request.again(number)
            try:
                self._submit(self.cluster)
            except JobExists:  # somebody sends the same at this moment
                continue
            return True

    def follow(self, out: TextIO, *, sent: bool) -> Submission:
        """Shows what the job prints, to its end; sends it again where its driver was killed."""
        left, first = self.request.experiment.cluster.retries, _number_of(self.request.submission_id)
        while True:
            job = self._followed(out)
            ended, code, cause = _end(job)
            number = _number_of(self.request.submission_id)
            used = number - (1 if self.record is None else first)
            if cause is None or not _died(job) or used >= left or not isinstance(self.cluster, Jobs):
                return self.submission(ended, code, sent=sent, cause=cause)
            self.say(f"{job.submission_id} died: {cause}; submitting it again ({used + 1} of {left})")
            self.request = self.request.again(number + 1, replaces=job.submission_id)
            try:
                self._submit(self.cluster)
            except JobExists:
                self.say(f"{self.request.submission_id} is there already: another command follows the run, too")

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
        """Whether a job of this name is the one that is asked for; else, whether there may be another.

        Raises:
            ConfigError: It is of other content, and is in the way.
        """
        name, going = self.request.name, job.status in GOING
        same = job.metadata.get("raytrainer.content") == self.request.content
        if self.record is not None and not going:
            return False  # what goes on after its end is another job
        if same:
            self.request = self.request.again(_number(job))
            self.say(f"{name} was submitted before: job {job.submission_id} is {job.status}")
            return True
        other = ", ".join(self.request.differences(job.metadata)) or "content"
        what = "runs" if going else "was submitted"
        raise ConfigError(
            f"is the name of a job that {what} at {self.request.address} with another {other}"
            f" ({job.submission_id}, {job.status}); another name starts a new run"
            + ("" if going else f", and resume {name} goes on with that one"),
            key="name",
            value=name,
        )

    def _submit(self, cluster: Jobs) -> None:
        request = self.request
        _check_cluster(request, cluster, self.say)
        if table := request.table():
            self.say(f"what goes along:\n{table}")
        self._remember()
        with tempfile.TemporaryDirectory(prefix="raytrainer-") as folder:
            # From here on a signal cannot tell whether it came before or after.
            self.is_sent = True
            try:
                cluster.submit(request, Path(folder))
            except JobExists:
                raise
            except BaseException:
                self.is_sent = cluster_has(cluster, request.submission_id)
                raise
        self.say(f"{request.name}: submitted to {request.address} as job {request.submission_id}")

    def _remember(self) -> None:
        """Before it is sent: also if we die in between, the verbs here ask the cluster for it."""
        e, r = self.request.experiment, self.request
        known = self.record or Record(r.name, "", created=datetime.now(UTC).isoformat(timespec="seconds"), kind=r.kind)
        run_dir = Storage(e.storage_path or "").child(r.name).uri
        job = {"submission_id": r.submission_id, "cluster_address": r.address, "content": r.content}
        uri = tracking.redacted(tracking_uri(e))
        replace(known, run_dir=run_dir, tracking_uri=known.tracking_uri or uri, job=job).write(
            Storage(self.folder / "runs" / SUBMITTED / r.name)
        )

    def _followed(self, out: TextIO) -> Job:
        identifier, due = self.request.submission_id, time.monotonic() + _TELL_S
        while (job := self._job(identifier)).status == "PENDING":
            if time.monotonic() >= due:
                self.say(f"{self.request.name} waits: {self.cluster.explain_waiting(identifier)}")
                due = time.monotonic() + _TELL_S
            time.sleep(_LOOK_S)
        for piece in self.cluster.tail(identifier):
            out.write(piece)
            out.flush()
        while (job := self._job(identifier)).status in GOING:  # its log ends a moment before it does
            time.sleep(_LOOK_S)
        return job

    def _job(self, identifier: str) -> Job:
        job: Job | None = self.cluster.info(identifier)
        if job is None:
            raise ClusterError(
                f"{self.request.address} does not know the job {identifier} any more: its head was started anew; "
                f"status {self.request.name} tells what is known of the run"
            )
        return job


def cluster_has(cluster: Jobs, submission_id: str) -> bool:
    """Whether a job came through of which the answer was lost; True where that is not known."""
    try:
        return cluster.info(submission_id) is not None
    except ClusterError:
        return True


def _check_cluster(request: Request, cluster: Jobs, say: Callable[[str], None]) -> None:
    """That the cluster can run it at all, when all of it is free and it has grown.

    Raises:
        PreflightError: It cannot.
    """
    facts = cluster.facts()
    if problem := facts.version_problem():
        raise PreflightError([problem])
    compositions = request.asked.compositions.values() if isinstance(request.asked, Plan) else [request.asked]
    found = [problem for composition in compositions for problem in facts.problems(composition.experiment)]
    preflight.refuse(list(dict.fromkeys(found)))
    if facts.ray_version != (ours := metadata.version("ray")):
        say(f"warning: the cluster at {request.address} has ray {facts.ray_version}, and here it is {ours}")


def _number(job: Job) -> int:
    return _number_of(job.submission_id)


def _number_of(submission_id: str) -> int:
    match = _ATTEMPT.fullmatch(submission_id)
    return int(match[1]) if match else 1


def _end(job: Job) -> tuple[str, int, str | None]:
    """Of a job that has ended: the run's status, our exit code, and why it did not finish."""
    message = " ".join(job.message.split())[:500]
    if job.status == "SUCCEEDED":
        return "FINISHED", 0, None
    if job.status == "STOPPED":
        return "KILLED", 143, "the job was stopped"
    if job.exit_code in _TOLD:
        return _TOLD[job.exit_code], job.exit_code, f"exit code {job.exit_code}; its last lines say why"
    return "FAILED", 1, message or "Ray does not say why"


def _died(job: Job) -> bool:
    """Whether its driver or supervisor was killed, so that the same could go well another time."""
    return job.status == "FAILED" and job.exit_code not in _TOLD and "runtime_env" not in job.message.lower()
