"""The jobs of runs, for the verbs. A cluster is queried only if a run has a job there."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from raytrainer.config import ClusterConfig, from_text
from raytrainer.errors import RaytrainerError
from raytrainer.plugins import ACTIVE, Backend, Job, backend_at
from raytrainer.runs.handle import RunHandle

__all__ = ["ACTIVE", "Clusters", "Job", "never_sent"]


class Clusters:
    """The clusters of some runs, each queried once. The address of a cluster determines its backend.

    Attributes:
        silent: Address → why the cluster could not be queried.
    """

    def __init__(self, find_backend: Callable[[str], Backend] = backend_at) -> None:
        self._find_backend = find_backend
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._jobs: dict[str, Sequence[Job]] = {}
        self.silent: dict[str, str] = {}
        self._reported: set[str] = set()

    def job_of(self, handle: RunHandle) -> Job | None:
        """Return a run's job in its present state; None if the run has no job, or if its cluster does not know it.

        Raises:
            ClusterError: The cluster does not answer, or refuses the token.
        """
        address = handle.cluster_address
        if handle.submission_id is None or address is None:
            return None
        return self._find_backend(address).job(handle.submission_id, address, _settings(handle))

    def jobs_of(self, handle: RunHandle) -> tuple[Job | None, list[Job]]:
        """Return a run's job and the jobs of its other attempts. The job is None if its cluster does not know it or
        does not answer."""
        jobs = [job for _, job in self._attempts(handle)]
        own = next((job for job in jobs if job.submission_id == handle.submission_id), None)
        return own, [job for job in jobs if job is not own]

    def attempt(self, handle: RunHandle) -> tuple[RunHandle, Job | None]:
        """Return the run with the active job of all its attempts, and that job; else the unchanged run and its job."""
        attempts = self._attempts(handle)
        own = next((job for _, job in attempts if job.submission_id == handle.submission_id), None)
        if own is not None and own.is_active:
            return handle, own
        for address, job in reversed(attempts):
            if job.is_active:
                place = {"submission_id": job.submission_id, "cluster_address": address}
                return replace(handle, record=replace(handle.record, job={**handle.record.job, **place})), job
        return handle, own

    def ended_before_it_began(self, handle: RunHandle) -> Job | None:
        """Return the job that was submitted from here to continue a run and ended before the record knew it, if any."""
        next_id = handle.next_submission_id
        if next_id is None:
            return None
        job = next((job for _, job in self._attempts(handle) if job.submission_id == next_id), None)
        return job if job is not None and not job.is_active else None

    def all_of(self, handle: RunHandle) -> Sequence[Job]:
        """Return all jobs of the cluster that a run uses or has used; none if it does not answer."""
        address = handle.cluster_address
        if address is None:
            return ()
        with self._asking[address]:  # several threads may query one cluster at the same time
            if address not in self._jobs and address not in self.silent:
                try:
                    self._jobs[address] = self._find_backend(address).jobs(address, _settings(handle))
                except (RaytrainerError, OSError) as error:
                    self.silent[address] = str(error)
        return self._jobs.get(address, ())

    def query_error(self, handle: RunHandle) -> str | None:
        """Return why a run's cluster could not be queried, as text; None if it could, or if the run has no cluster."""
        silent = [address for address in _addresses(handle) if address in self.silent]
        return f"the cluster {silent[0]} could not be queried: {self.silent[silent[0]]}" if silent else None

    def report_failures(self, say: Callable[[str], None]) -> None:
        """Report the clusters that could not be queried, each once."""
        for address, reason in self.silent.items():
            if address not in self._reported:
                self._reported.add(address)
                say(f"the cluster {address} could not be queried: {reason}")

    def forget(self, handle: RunHandle) -> None:
        """Forget the answer of a run's cluster, so that it is queried again."""
        for address in _addresses(handle):
            self._jobs.pop(address, None)

    def _attempts(self, handle: RunHandle) -> list[tuple[str, Job]]:
        """Return the jobs of all attempts at a run, with their clusters' addresses.

        The clusters are that of the run record, and that to which the run was last submitted from here.
        """
        attempts: dict[tuple[str, str], Job] = {}
        name, ids = handle.record.name, {handle.submission_id}
        if handle.submission is not None:
            ids.add(handle.submission.record.job.get("submission_id"))
        for address, place in _addresses(handle).items():
            for job in self.all_of(place):
                if job.submission_id in ids or job.metadata.get("raytrainer.name") == name:
                    attempts[address, job.submission_id] = job
        return [(address, job) for (address, _), job in attempts.items()]


def never_sent(handle: RunHandle) -> str:
    """Return the text about a job that its cluster does not have."""
    return f"{handle.cluster_address} has no job {handle.submission_id}: it was not submitted, or the cluster has restarted since"


def _addresses(handle: RunHandle) -> dict[str, RunHandle]:
    """Return the clusters that may have jobs of a run: address → the run with its job there."""
    handles = {}
    if handle.submission_id is not None and handle.cluster_address is not None:
        handles[handle.cluster_address] = handle
    if handle.submission is not None and (address := handle.submission.record.job.get("cluster_address")) is not None:
        handles.setdefault(address, replace(handle, record=handle.submission.record))
    return handles


def _settings(handle: RunHandle) -> ClusterConfig:
    """Return the section `cluster` with which the run was submitted: how to reach its cluster."""
    text = None
    if handle.submission is not None and handle.submission.record.job.get("cluster_address") == handle.cluster_address:
        text = handle.submission.storage.read_if_exists("config.yaml")
    if text is None and handle.storage is not None:
        text = handle.storage.read_if_exists("config.yaml")
    if text is not None:
        return from_text(text.decode()).experiment.cluster
    params = handle.mlflow_run.params if handle.mlflow_run is not None else {}
    values = [params.get(f"cluster.{name}", "null") for name in ("ca_file", "token_file")]
    # A reference names a variable of the user who submitted the run. Without a value, Ray's own variables are used.
    ca_file, token_file = (None if value == "null" or "${" in value else value for value in values)
    return ClusterConfig(ca_file=ca_file, token_file=token_file)
