"""The Ray Jobs API of a shared cluster: what it has and who holds it, a job sent, looked at, read and stopped.

Plain HTTP: nothing here imports ray or torch, but for a submission, which is left to Ray's own client (`upload`).
"""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from raytrainer.cluster import facts, tables
from raytrainer.cluster.auth import find_token
from raytrainer.cluster.connection import Connection, NotThere
from raytrainer.cluster.facts import ClusterFacts
from raytrainer.cluster.tables import Tables
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError
from raytrainer.run import in_background

if TYPE_CHECKING:
    from raytrainer.cluster.request import Request

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_TASKS = {"state": "RUNNING", "type": "NORMAL_TASK"}  # the others hold nothing that is not their actor's
_LAST_S = 1.0  # Ray knows of a process's end by its connection's, when the kernel has still to take back its memory
_LOG_S = 30.0  # of a long log
_READ_S = 5.0
_AUTOSCALER_BYTES = 2**22  # of its log: what it is set to is near the beginning


@dataclass(frozen=True)
class JobInfo:
    """A job as Ray tells of it.

    Attributes:
        submission_id: Its own.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: Why, in Ray's words; of a failed one with the end of its log.
        metadata: As it was submitted with.
        started, ended: Seconds since the epoch.
        exit_code: Of its driver, once that has ended.
    """

    submission_id: str
    status: str
    message: str
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> JobInfo:
        """From the entry of the Jobs API."""
        started, ended = row.get("start_time"), row.get("end_time")
        return cls(
            submission_id=row["submission_id"],
            status=row["status"],
            message=row.get("message") or "",
            metadata=row.get("metadata") or {},
            started=started / 1e3 if started else None,
            ended=ended / 1e3 if ended else None,
            exit_code=row.get("driver_exit_code"),
        )


class Jobs:
    """The jobs of a cluster. Each call but `submit` and `tail` has its answer, or its error, within some seconds.

    Args:
        address: http(s)://host[:port][/path] of its dashboard.
        ca_file, token_file: As `cluster.ca_file` and `cluster.token_file`.

    Raises:
        ConfigError: A certificate or a token that cannot be used, and why.
    """

    def __init__(self, address: str, *, ca_file: str | None = None, token_file: str | None = None) -> None:
        self.address = address.rstrip("/")
        self._connection = Connection(self.address, ca_file, find_token(token_file))

    # --- a job ----------------------------------------------------------------------------------------------------

    def info(self, submission_id: str) -> JobInfo | None:
        """What there is of a job; None where the cluster knows none of this id.

        Raises:
            ClusterError: It cannot be asked, or refuses us; as of every call here.
        """
        row = self._row(submission_id)
        return None if row is None else JobInfo.of(row)

    def list(self) -> builtins.list[JobInfo]:
        """All jobs that were submitted, the ended ones too; drivers that came another way are none."""
        return [JobInfo.of(row) for row in self._rows() if row.get("submission_id")]

    def stop(self, submission_id: str) -> None:
        """Asks for a job's end: Ray sends its driver SIGTERM, and SIGKILL three seconds later.

        One that waits for its driver's resources ends when it has got them: Ray cannot be asked for more.
        """
        self._connection.request("POST", f"/api/jobs/{_path(submission_id)}/stop")

    def logs(self, submission_id: str) -> str:
        """All that its driver has printed by now."""
        try:
            found = self._connection.get(f"/api/jobs/{_path(submission_id)}/logs", dict, read_s=_LOG_S)
            return str(found.get("logs") or "")
        except (NotThere, ClusterUnreachable, ClusterDenied):
            raise
        except ClusterError as error:
            # So it answers where not all of it is UTF-8, and where the driver's node is gone.
            with suppress(ClusterError):
                node = (self._row(submission_id) or {}).get("driver_node_id")
                text = self._log_file(node, f"job-driver-{submission_id}.log", read_s=_LOG_S)
                return text.replace("\r\n", "\n").replace("\r", "\n")  # as the other way gives it
            raise ClusterError(
                f"{self.address} cannot give the log of job {submission_id}: the node of its driver is gone, or does not "
                "answer"
            ) from error

    def tail(self, submission_id: str) -> Iterator[str]:
        """What its driver prints, in pieces, from the beginning until the job has ended."""
        from raytrainer.cluster.follow import follow

        return follow(
            self._connection,
            submission_id,
            has_ended=lambda: self._known(submission_id).has_ended,
            whole=lambda: self.logs(submission_id),
        )

    def held_by(self, submission_id: str) -> dict[str, float]:
        """What a job still has: resources, and the number of its `processes` that are there; empty: nothing."""
        row = self._row(submission_id)
        if row is None:
            return {}
        state, job = self._connection.state, row.get("job_id")
        asks: dict[str, Callable[[], Sequence[tables.Row]]] = {
            "supervisor": lambda: state("actors", name=f"{tables.SUPERVISOR}{submission_id}"),
            "workers": lambda: state("workers", is_alive="true"),
        }
        if job:
            asks |= {
                "actors": lambda: state("actors", job_id=job),
                "groups": lambda: state("placement_groups", creator_job_id=job),
                "tasks": lambda: state("tasks", job_id=job, **_TASKS),
            }
        found = _at_once(asks)
        actors = [*found.pop("supervisor"), *found.pop("actors", ())]
        held = tables.held_by(submission_id, Tables(actors=actors, jobs=[row], **found))
        if not held and time.time() - (row.get("end_time") or 0) / 1e3 < 2 * _LAST_S:
            time.sleep(_LAST_S)
        return held

    def explain_waiting(self, submission_id: str) -> str:
        """What a job waits for, who holds it, and whether it can come at all; a sentence."""
        job = self._known(submission_id)
        found, rows = self._facts()
        asked = tables.asked_by(submission_id, rows)
        if asked:
            return facts.explain_waiting(asked, found, leave_out=submission_id)
        return (
            "for its runtime environment to be set up"
            if job.status == "PENDING"
            else f"for nothing: it is {job.status}"
        )

    def facts(self) -> ClusterFacts:
        """What the cluster has, may have, and who holds it."""
        return self._facts()[0]

    def _facts(self) -> tuple[ClusterFacts, Tables]:
        get, state = self._connection.get, self._connection.state
        version = get("/api/version", dict).get("ray_version") or ""
        bare = ClusterFacts(self.address, version, None, ())
        if bare.version_problem() is not None:  # its tables are others, too
            return bare, Tables()
        asks: dict[str, Callable[[], Any]] = {
            "metadata": lambda: get("/api/v0/cluster_metadata", dict),
            "nodes": lambda: state("nodes"),
            "actors": lambda: state("actors", state="!DEAD"),
            "groups": lambda: state("placement_groups", state="!REMOVED"),
            "tasks": lambda: state("tasks", **_TASKS),
            "jobs": self._rows,
        }
        found = _at_once(asks)
        python = (found.pop("metadata").get("data") or {}).get("pythonVersion")
        rows = Tables(**found)
        try:
            return tables.read(self.address, version, python, rows, self._autoscaler_log(rows)), rows
        except (KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"{self.address} has ray {version}, whose tables raytrainer cannot read") from error

    def _autoscaler_log(self, rows: Tables) -> str | None:
        """The beginning of what the cluster's autoscaler has logged; None: it cannot be read."""
        head = next((node for node in rows.nodes if node["state"] == "ALIVE" and node.get("is_head_node")), None)
        if head is None:
            return None
        with suppress(ClusterError):
            return self._log_file(head["node_id"], "monitor.log", most=_AUTOSCALER_BYTES)
        return None

    def _log_file(self, node: str | None, name: str, most: int | None = None, read_s: float = _READ_S) -> str:
        """A file of a node's logs, or the first `most` bytes of it."""
        asked = {"node_id": node, "filename": name, "lines": -1, "timeout": int(read_s)}
        return self._connection.content("/api/v0/logs/file", most, read_s, **asked).decode(errors="replace")

    # --- a submission ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, staged: Path) -> str:
        """Sends a request: uploads what the cluster has not got, and starts the job; returns its id.

        Args:
            request: What is sent.
            staged: An empty folder, for the packages.

        Raises:
            JobExists: The cluster has a job of this id, also where two are sent at once.
            ConfigError: A variable that Ray's tools would take another cluster's address from; a file that cannot be
                read any more; or a package or runtime environment that Ray does not take.
        """
        check_environment(self.address)
        runtime_env = request.stage(staged)
        from raytrainer.cluster import upload

        try:
            return upload.submit(
                self._connection,
                submission_id=request.submission_id,
                entrypoint=request.entrypoint,
                runtime_env=runtime_env,
                metadata=request.metadata,
                resources=request.resources,
            )
        except ClusterUnreachable:
            # The answer may be what was lost.
            there = self.info(request.submission_id)
            if there is None or dict(there.metadata) != dict(request.metadata):
                raise
            return there.submission_id

    # --- as the dashboard has it ----------------------------------------------------------------------------------

    def _known(self, submission_id: str) -> JobInfo:
        found = self.info(submission_id)
        if found is None:
            raise ClusterError(f"{self.address} has no job {submission_id}")
        return found

    def _row(self, submission_id: str) -> Mapping[str, Any] | None:
        try:
            found = self._connection.get(f"/api/jobs/{_path(submission_id)}", dict)
        except NotThere as error:
            if "does not exist" in str(error):  # Ray's words: what else answers 404 is no dashboard
                return None
            raise
        return found if found.get("submission_id") == submission_id else None

    def _rows(self) -> builtins.list[dict[str, Any]]:
        return self._connection.get("/api/jobs/", builtins.list)


def check_environment(address: str, environ: Mapping[str, str] = os.environ) -> None:
    """Variables from which Ray's own tools take another address than the one that is given.

    Raises:
        ConfigError: There is one.
    """
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        given = environ.get(name, "").rstrip("/")
        if given and given != address.rstrip("/"):
            raise ConfigError(
                f"and {name}={given} is set, which Ray's own tools follow instead: unset {name}, or give its address",
                key="cluster.address",
                value=address,
            )


def _at_once(asks: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Several answers, in the time of the slowest."""
    coming = {name: in_background(ask, "ray-jobs") for name, ask in asks.items()}
    return {name: future.result() for name, future in coming.items()}


def _path(submission_id: str) -> str:
    return quote(submission_id, safe="")
