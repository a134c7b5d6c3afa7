"""The runs of a Kubernetes namespace as jobs: their RayJobs, by submission id, with Ray's statuses."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from raytrainer.backends.cluster_job import Client, ClusterJob
from raytrainer.backends.kubernetes.kubectl import Kubectl, content_of, notes_of
from raytrainer.backends.kubernetes.rayjob import NAME, QUEUE, SUBMISSION
from raytrainer.errors import ClusterError, ClusterUnreachable
from raytrainer.submission.ending import one_line

_RETRY_S, _PATIENCE_S = 2.0, 120.0  # between two checks of a followed job; how long the server may not answer
_EXIT_CODE = re.compile(r"failed with exit code (-?\d+)")  # Ray's wording


@dataclass(frozen=True, kw_only=True)
class RayJobStatus(ClusterJob):
    """The state of a run in Kubernetes.

    Attributes:
        name: The name of the run.
        object: The name of the RayJob.
        content: The digest of the request.
        deployment: KubeRay's state: Initializing, Running, Complete, Failed, Suspended, Retrying, …
        suspended: Whether it waits for Kueue to admit it.
        queue: The Kueue queue, if it has one.
        cluster: The name of its RayCluster, which differs between KubeRay's own retries.
    """

    name: str
    object: str
    content: str = ""
    deployment: str = ""
    suspended: bool = False
    queue: str | None = None
    cluster: str = ""


def status_of(deployment: str, job: str) -> str:
    """Return a status in Ray's words: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.

    Args:
        deployment: KubeRay's state.
        job: Ray's status; empty before the Ray job exists.
    """
    if deployment == "Complete":
        return job or "SUCCEEDED"
    if deployment in ("Failed", "ValidationFailed"):
        return "FAILED"
    # Without a job status, its submitter is still starting. A retried job keeps the status of its last try.
    return "RUNNING" if deployment == "Running" and job not in ("", "PENDING") else "PENDING"


def parsed(rayjob: Mapping[str, Any], client: Client) -> RayJobStatus:
    """Parse a RayJob object from Kubernetes."""
    meta, spec, status = rayjob["metadata"], rayjob.get("spec") or {}, rayjob.get("status") or {}
    notes = notes_of(rayjob)
    message = status.get("message") or ""
    code = _EXIT_CODE.search(message)
    deployment = status.get("jobDeploymentStatus") or ""
    return RayJobStatus(
        name=notes.get(NAME) or meta["name"],
        object=meta["name"],
        submission_id=status.get("jobId") or notes.get(SUBMISSION) or spec.get("jobId") or "",
        content=content_of(rayjob),
        deployment=deployment,
        status=status_of(deployment, status.get("jobStatus") or ""),
        message=": ".join(text for text in (status.get("reason") or "", message.strip()) if text),
        suspended=bool(spec.get("suspend")),
        started=_epoch(status.get("startTime")),
        ended=_epoch(status.get("endTime")),
        queue=(meta.get("labels") or {}).get(QUEUE),
        cluster=status.get("rayClusterName") or "",
        exit_code=int(code[1]) if code else None,
        metadata=spec.get("metadata") or {},
        client=client,
    )


def _epoch(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


class Namespace:
    """The runs of a namespace, with the interface of `cluster_job.Client`: by submission id, with Ray's statuses.

    Attributes:
        kubectl: The cluster and namespace.
    """

    def __init__(self, kubectl: Kubectl) -> None:
        self.kubectl = kubectl

    @classmethod
    def at(cls, address: str) -> Namespace:
        """Return the runs at an address from `address_of`."""
        parts = urlsplit(address)
        return cls(Kubectl(unquote(parts.netloc) or None, unquote(parts.path.strip("/"))))

    def list(self) -> Sequence[RayJobStatus]:
        return [parsed(rayjob, self) for rayjob in self.kubectl.rayjobs()]

    def remove(self, submission_id: str) -> None:
        """Delete an ended attempt, whose object has the name of the next one.

        Raises:
            ClusterError: It cannot be deleted.
        """
        job = self.find(submission_id)
        if job is not None and (left := self.kubectl.delete(job.object)):
            raise ClusterError(
                f"the previous attempt, {submission_id}, cannot be deleted{self.kubectl.where}: {', '.join(left)}; "
                f"kubectl describe rayjob {job.object} says why"
            )

    def info(self, submission_id: str) -> RayJobStatus:
        """Return the state of a run's job; STOPPED if its RayJob was deleted."""
        return self.find(submission_id) or RayJobStatus(
            name=submission_id,
            object="",
            submission_id=submission_id,
            status="STOPPED",
            message="its RayJob no longer exists",
            client=self,
        )

    def stop(self, submission_id: str) -> None:
        """Delete the RayJob, because KubeRay offers no other way to end a job."""
        if (job := self.find(submission_id)) is not None:
            self.kubectl.delete(job.object, within_s=0)

    def held_by(self, submission_id: str) -> Mapping[str, float]:
        return self.kubectl.held(submission_id)

    def logs(self, submission_id: str) -> str:
        return "".join(f"{line}\n" for line in self.kubectl.logs(self._known(submission_id).object))

    def tail(self, submission_id: str) -> Iterator[str]:
        """Yield the lines that its driver prints, until the job has ended or is deleted.

        If KubeRay retries the job, it yields the lines of each try from its beginning.
        """
        cluster, shown, is_whole, lost = "", 0, False, None
        while True:
            try:
                job, lost = self.info(submission_id), None
            except ClusterUnreachable:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _PATIENCE_S:
                    raise
                time.sleep(_RETRY_S)
                continue
            goes = job.is_active
            if job.cluster != cluster:
                cluster, shown, is_whole = job.cluster, 0, False
            if job.status == "RUNNING" or (job.object and not goes and not is_whole):
                is_whole = False
                # There may be no log, because the submitter's pod is not running yet or is gone.
                with contextlib.suppress(ClusterError), contextlib.closing(self._lines(job, follow=goes)) as lines:
                    for line in itertools.islice(lines, shown, None):
                        shown += 1
                        yield f"{line}\n"
                    is_whole = True
            if not goes:
                return
            time.sleep(_RETRY_S)

    def explain_waiting(self, submission_id: str) -> str:
        job = self.info(submission_id)
        if not job.object:
            return one_line(job.message)
        if job.suspended:
            return f"it waits for Kueue to admit it (queue {job.queue})"
        reasons = self.kubectl.waiting(job.object)
        return "; ".join(reasons) or one_line(job.message) or f"KubeRay: {job.deployment or 'has not started it'}"

    def _lines(self, job: RayJobStatus, follow: bool) -> Generator[str]:
        yield from self.kubectl.logs(job.object, follow)

    def find(self, submission_id: str) -> RayJobStatus | None:
        """Return the state of a run's job; None if it does not exist."""
        return next((job for job in self.list() if job.submission_id == submission_id), None)

    def _known(self, submission_id: str) -> RayJobStatus:
        job = self.find(submission_id)
        if job is None:
            raise ClusterError(f"there is no RayJob of {submission_id}{self.kubectl.where}: it was deleted")
        return job


SCHEME = "kubernetes"


def address_of(context: str, namespace: str) -> str:
    """Return the address for the run record: `kubernetes://CONTEXT/NAMESPACE`."""
    return f"{SCHEME}://{quote(context, safe='')}/{quote(namespace, safe='')}"
