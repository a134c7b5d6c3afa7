"""Shared clusters, as the commands need them: the jobs of runs. A cluster is asked only if a run has a job there."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from raytrainer.config import from_text
from raytrainer.errors import RaytrainerError
from raytrainer.runs.finding import RunHandle

ACTIVE = ("PENDING", "RUNNING")


class Job(Protocol):
    """A job as Ray describes it.

    Attributes:
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: The reason, in Ray's words.
        metadata: raytrainer's entries, such as `raytrainer.name`.
        started, ended: Seconds since the epoch.
        exit_code: The exit code of its driver, if known.
    """

    @property
    def submission_id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def started(self) -> float | None: ...
    @property
    def ended(self) -> float | None: ...
    @property
    def exit_code(self) -> int | None: ...


class Cluster(Protocol):
    """The part of `cluster.api.Jobs` that the commands use. Every call has a time limit and may raise ClusterError."""

    def info(self, submission_id: str) -> Job | None: ...
    def list(self) -> Sequence[Job]: ...
    def stop(self, submission_id: str) -> None: ...
    def logs(self, submission_id: str) -> str: ...
    def tail(self, submission_id: str) -> Iterator[str]: ...
    def explain_waiting(self, submission_id: str) -> str: ...
    def held_by(self, submission_id: str) -> Mapping[str, float]: ...


class Clusters:
    """The clusters of some runs, each asked once.

    Attributes:
        silent: Address → why the cluster could not be asked.
    """

    def __init__(self, connect: Callable[[str, str | None, str | None], Cluster] | None = None) -> None:
        self._connect = connect or _connect
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lists: dict[str, Sequence[Job]] = {}
        self.silent: dict[str, str] = {}
        self._told: set[str] = set()

    def of(self, known: RunHandle) -> Cluster | None:
        """Return the cluster that has a run's job; None if the run has no job.

        Raises:
            ClusterError: The cluster does not answer, or refuses the token.
        """
        if known.submission_id is None or known.cluster_address is None:
            return None
        ca_file, token_file = _access(known)
        return self._connect(known.cluster_address, ca_file, token_file)

    def jobs_of(self, known: RunHandle) -> tuple[Job | None, list[Job]]:
        """Return a run's job and the jobs of its other attempts. The job is None if its cluster does not know it or
        does not answer."""
        found = [job for _, job in self._attempts(known)]
        mine = next((job for job in found if job.submission_id == known.submission_id), None)
        return mine, [job for job in found if job is not mine]

    def attempt(self, known: RunHandle) -> tuple[RunHandle, Job | None]:
        """Return the run with the active job of all its attempts, and that job; else the unchanged run and its job."""
        found = self._attempts(known)
        mine = next((job for _, job in found if job.submission_id == known.submission_id), None)
        if mine is not None and mine.status in ACTIVE:
            return known, mine
        for address, job in reversed(found):
            if job.status in ACTIVE:
                place = {"submission_id": job.submission_id, "cluster_address": address}
                return replace(known, record=replace(known.record, job={**known.record.job, **place})), job
        return known, mine

    def ended_before_it_began(self, known: RunHandle) -> Job | None:
        """Return the job that was submitted from here to continue a run and ended before the record knew it, if any."""
        coming = known.coming
        if coming is None:
            return None
        job = next((job for _, job in self._attempts(known) if job.submission_id == coming), None)
        return job if job is not None and job.status not in ACTIVE else None

    def all_of(self, known: RunHandle) -> Sequence[Job]:
        """Return all jobs of the cluster that a run uses or has used; none if it does not answer."""
        address = known.cluster_address
        if address is None:
            return ()
        with self._asking[address]:  # several runs of one cluster may ask at the same time
            if address not in self._lists and address not in self.silent:
                try:
                    self._lists[address] = self._connect(address, *_access(known)).list()
                except (RaytrainerError, OSError) as error:
                    self.silent[address] = str(error)
        return self._lists.get(address, ())

    def silence_of(self, known: RunHandle) -> str | None:
        """Return why a run's cluster could not be asked, as text; None if it could, or if the run has no cluster."""
        found = [address for address in _addresses(known) if address in self.silent]
        return f"the cluster {found[0]} could not be asked: {self.silent[found[0]]}" if found else None

    def tell(self, say: Callable[[str], None]) -> None:
        """Report the clusters that could not be asked, each once."""
        for address, why in self.silent.items():
            if address not in self._told:
                self._told.add(address)
                say(f"the cluster {address} could not be asked: {why}")

    def forget(self, known: RunHandle) -> None:
        """Forget the answer of a run's cluster, so that it is asked again."""
        for address in _addresses(known):
            self._lists.pop(address, None)

    def _attempts(self, known: RunHandle) -> list[tuple[str, Job]]:
        """Return the jobs of all attempts at a run, with their clusters' addresses: the cluster of its record, and the
        one to which it was last submitted from here."""
        found: dict[tuple[str, str], Job] = {}
        name, ids = known.record.name, {known.submission_id}
        if known.sent is not None:
            ids.add(known.sent.record.job.get("submission_id"))
        for address, one in _addresses(known).items():
            for job in self.all_of(one):
                if job.submission_id in ids or job.metadata.get("raytrainer.name") == name:
                    found[address, job.submission_id] = job
        return [(address, job) for (address, _), job in found.items()]


def never_sent(known: RunHandle) -> str:
    """Return the text about a job that its cluster does not have."""
    return f"{known.cluster_address} has no job {known.submission_id}: it was not submitted, or the cluster has restarted since"


def _addresses(known: RunHandle) -> dict[str, RunHandle]:
    """Return the clusters that may have jobs of a run: address → the run with its job there."""
    found = {}
    if known.submission_id is not None and known.cluster_address is not None:
        found[known.cluster_address] = known
    if known.sent is not None and (address := known.sent.record.job.get("cluster_address")) is not None:
        found.setdefault(address, replace(known, record=known.sent.record))
    return found


def _access(known: RunHandle) -> tuple[str | None, str | None]:
    """Return the `cluster.ca_file` and `cluster.token_file` with which the run was submitted."""
    text = None
    if known.sent is not None and known.sent.record.job.get("cluster_address") == known.cluster_address:
        text = known.sent.storage.read_if_exists("config.yaml")
    if text is None and known.storage is not None:
        text = known.storage.read_if_exists("config.yaml")
    if text is not None:
        cluster = from_text(text.decode()).experiment.cluster
        return cluster.ca_file, cluster.token_file
    params = known.stored.params if known.stored is not None else {}
    found = [params.get(f"cluster.{key}", "null") for key in ("ca_file", "token_file")]
    # A reference names a variable of the user who submitted the run. Without a value, Ray's own variables are used.
    ca_file, token_file = (None if value == "null" or "${" in value else value for value in found)
    return ca_file, token_file


def _connect(address: str, ca_file: str | None, token_file: str | None) -> Cluster:
    if address.startswith("kubernetes://"):
        from raytrainer.backends.kubernetes.kubectl import RayJobs

        return RayJobs(address)
    from raytrainer.backends.jobs_api.api import Jobs

    return Jobs(address, ca_file=ca_file, token_file=token_file)
