"""A shared cluster as the verbs need it: what its Jobs API says of a run's job, asked only where a run has one."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from raytrainer.config import from_text
from raytrainer.errors import RaytrainerError
from raytrainer.history.finding import Known


class Job(Protocol):
    """A job as Ray tells of it.

    Attributes:
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: Why, in Ray's words.
        metadata: Ours: `raytrainer.name` and more.
        started, ended: Seconds since the epoch.
        exit_code: Of its driver, where it is known.
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
    """The part of `cluster.api.Jobs` that the verbs use; bounded in time, and raises ClusterError."""

    def info(self, submission_id: str) -> Job | None: ...
    def list(self) -> Sequence[Job]: ...
    def stop(self, submission_id: str) -> None: ...
    def logs(self, submission_id: str) -> str: ...
    def tail(self, submission_id: str) -> Iterator[str]: ...
    def explain_waiting(self, submission_id: str) -> str: ...
    def held_by(self, submission_id: str) -> Mapping[str, float]: ...


class Clusters:
    """The clusters of some runs, each asked once. What does not answer is remembered in `silent`, by its address."""

    def __init__(self, connect: Callable[[str, str | None, str | None], Cluster] | None = None) -> None:
        self._connect = connect or _connect
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lists: dict[str, Sequence[Job]] = {}
        self.silent: dict[str, str] = {}

    def of(self, known: Known) -> Cluster | None:
        """The one that has a run's job; None where it has none.

        Raises:
            ClusterError: It cannot be asked, or refuses the token.
        """
        if known.submission_id is None or known.cluster_address is None:
            return None
        ca_file, token_file = _access(known)
        return self._connect(known.cluster_address, ca_file, token_file)

    def jobs_of(self, known: Known) -> tuple[Job | None, list[Job]]:
        """A run's job, and the other jobs that are attempts at the same run; None where its cluster does not know it
        or does not answer."""
        address = known.cluster_address
        if known.submission_id is None or address is None:
            return None, []
        with self._asking[address]:  # several runs of one cluster ask at once
            if address not in self._lists and address not in self.silent:
                try:
                    cluster = self.of(known)
                    assert cluster is not None
                    self._lists[address] = cluster.list()
                except (RaytrainerError, OSError) as error:
                    self.silent[address] = str(error)
        found = self._lists.get(address, ())
        mine = next((job for job in found if job.submission_id == known.submission_id), None)
        name = known.record.name
        return mine, [j for j in found if j is not mine and j.metadata.get("raytrainer.name") == name]

    def forget(self, known: Known) -> None:
        """Asks a run's cluster again."""
        self._lists.pop(known.cluster_address or "", None)


def _access(known: Known) -> tuple[str | None, str | None]:
    """`cluster.ca_file` and `cluster.token_file`, as the run was submitted with."""
    text = known.storage.read_if_exists("config.yaml") if known.storage is not None else None
    if text is not None:
        cluster = from_text(text.decode()).experiment.cluster
        return cluster.ca_file, cluster.token_file
    params = known.stored.params if known.stored is not None else {}
    found = [params.get(f"cluster.{key}", "null") for key in ("ca_file", "token_file")]
    # A reference is to a variable of whoever submitted it; the environment has what Ray itself looks at.
    ca_file, token_file = (None if value == "null" or "${" in value else value for value in found)
    return ca_file, token_file


def _connect(address: str, ca_file: str | None, token_file: str | None) -> Cluster:
    if address.startswith("kubernetes://"):
        from raytrainer.cluster.kubectl import RayJobs

        return RayJobs(address)
    from raytrainer.cluster.api import Jobs

    return Jobs(address, ca_file=ca_file, token_file=token_file)
