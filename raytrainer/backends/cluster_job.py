"""The `Job` of a cluster whose client finds jobs by submission id: the Ray Jobs API, or Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from raytrainer.plugins import Job


class Client(Protocol):
    """The methods of a client that a `ClusterJob` needs."""

    def info(self, submission_id: str) -> Job | None: ...
    def stop(self, submission_id: str) -> None: ...
    def logs(self, submission_id: str) -> str: ...
    def tail(self, submission_id: str) -> Iterator[str]: ...
    def explain_waiting(self, submission_id: str) -> str: ...
    def held_by(self, submission_id: str) -> Mapping[str, float]: ...


@dataclass(frozen=True, kw_only=True)
class ClusterJob(Job):
    """A job, and the client that queries it.

    Attributes:
        client: The client of its cluster.
    """

    client: Client = field(compare=False, repr=False)

    def refresh(self) -> Job | None:
        return self.client.info(self.submission_id)

    def stop(self) -> None:
        self.client.stop(self.submission_id)

    def logs(self, follow: bool = False) -> Iterator[str]:
        if follow:
            yield from self.client.tail(self.submission_id)
        else:
            yield self.client.logs(self.submission_id)

    def explain_waiting(self) -> str:
        return self.client.explain_waiting(self.submission_id)

    def held_by(self) -> Mapping[str, float]:
        return self.client.held_by(self.submission_id)
