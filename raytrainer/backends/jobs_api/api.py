"""The Ray Jobs API of a shared cluster: capacity and holders of resources; submit, inspect, read and stop jobs.

It uses plain HTTP and imports neither ray nor torch, except to submit a job, which uses Ray's own client (`upload`).
"""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from raytrainer.backends.cluster_job import ClusterJob
from raytrainer.backends.jobs_api import facts, tables
from raytrainer.backends.jobs_api.auth import find_token
from raytrainer.backends.jobs_api.connection import Connection, NotThere
from raytrainer.backends.jobs_api.facts import ClusterFacts
from raytrainer.backends.jobs_api.tables import Tables
from raytrainer.core.background import in_background
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError

if TYPE_CHECKING:
    from raytrainer.submission.request import Request

_TASKS = {"state": "RUNNING", "type": "NORMAL_TASK"}  # tasks of actors hold only what their actor holds
_LAST_S = 1.0  # Ray sees a process end when its connection closes; the kernel may free its memory a little later
_LOG_S = 30.0  # for a long log


class JobsClient:
    """The jobs of a cluster. Each call except `submit` and `tail` returns or raises within some seconds.

    Args:
        address: The dashboard's address, http(s)://host[:port][/path].
        ca_file, token_file: As `cluster.ca_file` and `cluster.token_file`.

    Raises:
        ConfigError: A certificate or a token cannot be used; the message says why.
    """

    def __init__(self, address: str, *, ca_file: str | None = None, token_file: str | None = None) -> None:
        self.address = address.rstrip("/")
        self._connection = Connection(self.address, ca_file, find_token(token_file))

    # --- a job ----------------------------------------------------------------------------------------------------

    def info(self, submission_id: str) -> ClusterJob | None:
        """Return a job's state; None if the cluster knows no job with this id.

        Raises:
            ClusterError: The cluster cannot be reached or refuses the request. Every method here may raise it.
        """
        row = self._row(submission_id)
        return None if row is None else self._job(row)

    def list(self) -> builtins.list[ClusterJob]:
        """Return all submitted jobs, including ended ones, but not drivers that were started without a submission."""
        return [self._job(row) for row in self._rows() if row.get("submission_id")]

    def stop(self, submission_id: str) -> None:
        """Ask Ray to stop a job. Ray sends its driver SIGTERM, and SIGKILL three seconds later.

        A job that still waits for its driver's resources ends only when it gets them; Ray offers no other way.
        """
        self._connection.request("POST", f"/api/jobs/{_path(submission_id)}/stop")

    def logs(self, submission_id: str) -> str:
        """Return everything that its driver has printed so far."""
        try:
            answer = self._connection.get(f"/api/jobs/{_path(submission_id)}/logs", dict, read_s=_LOG_S)
            return str(answer.get("logs") or "")
        except (NotThere, ClusterUnreachable, ClusterDenied):
            raise
        except ClusterError as error:
            # Ray answers with an error if the log is not valid UTF-8 or if the driver's node is gone.
            with suppress(ClusterError):
                node = (self._row(submission_id) or {}).get("driver_node_id")
                text = self._log_file(node, f"job-driver-{submission_id}.log")
                return text.replace("\r\n", "\n").replace("\r", "\n")  # as the Jobs API returns it
            raise ClusterError(
                f"{self.address} cannot give the log of job {submission_id}: the node of its driver is gone, or does not "
                "answer"
            ) from error

    def tail(self, submission_id: str) -> Iterator[str]:
        """Yield what its driver prints, in pieces, from the beginning until the job has ended."""
        from raytrainer.backends.jobs_api.follow import follow

        return follow(
            self._connection,
            submission_id,
            has_ended=lambda: not self._known(submission_id).is_active,
            whole=lambda: self.logs(submission_id),
        )

    def held_by(self, submission_id: str) -> dict[str, float]:
        """Return what a job still holds: resources, and as `processes` the number of live ones. Empty if nothing."""
        row = self._row(submission_id)
        if row is None:
            return {}
        state, job = self._connection.state, row.get("job_id")
        requests: dict[str, Callable[[], Sequence[tables.Row]]] = {
            "supervisor": lambda: state("actors", name=f"{tables.SUPERVISOR}{submission_id}"),
            "workers": lambda: state("workers", is_alive="true"),
        }
        if job:
            requests |= {
                "actors": lambda: state("actors", job_id=job),
                "groups": lambda: state("placement_groups", creator_job_id=job),
                "tasks": lambda: state("tasks", job_id=job, **_TASKS),
            }
        rows_of = _at_once(requests)
        actors = [*rows_of.pop("supervisor"), *rows_of.pop("actors", ())]
        held = tables.held_by(submission_id, Tables(actors=actors, jobs=[row], **rows_of))
        if not held and time.time() - (row.get("end_time") or 0) / 1e3 < 2 * _LAST_S:
            time.sleep(_LAST_S)
        return held

    def explain_waiting(self, submission_id: str) -> str:
        """Return, as text, what a job waits for, who holds it, and whether the cluster can ever provide it."""
        job = self._known(submission_id)
        cluster, rows = self._facts()
        demands = tables.asked_by(submission_id, rows)
        if demands:
            return facts.explain_waiting(demands, cluster, leave_out=submission_id)
        return (
            "for its runtime environment to be set up"
            if job.status == "PENDING"
            else f"for nothing: it is {job.status}"
        )

    def facts(self) -> ClusterFacts:
        """Return the cluster's resources, those it may add, and who holds them."""
        return self._facts()[0]

    def _facts(self) -> tuple[ClusterFacts, Tables]:
        get, state = self._connection.get, self._connection.state
        version = get("/api/version", dict).get("ray_version") or ""
        bare = ClusterFacts(self.address, version, None, ())
        if bare.version_problem() is not None:  # the tables of other versions differ, too
            return bare, Tables()
        requests: dict[str, Callable[[], Any]] = {
            "metadata": lambda: get("/api/v0/cluster_metadata", dict),
            "status": lambda: get("/api/cluster_status", dict),
            "nodes": lambda: state("nodes"),
            "actors": lambda: state("actors", state="!DEAD"),
            "groups": lambda: state("placement_groups", state="!REMOVED"),
            "tasks": lambda: state("tasks", **_TASKS),
            "jobs": self._rows,
        }
        answers = _at_once(requests)
        may_grow = tables.may_grow(answers.pop("status"))
        python = (answers.pop("metadata").get("data") or {}).get("pythonVersion")
        rows = Tables(**answers)
        try:
            return tables.read(self.address, version, python, rows, may_grow), rows
        except (KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"{self.address} has ray {version}, whose tables raytrainer cannot read") from error

    def _log_file(self, node: str | None, name: str) -> str:
        """Return a file of a node's logs."""
        query = {"node_id": node, "filename": name, "lines": -1, "timeout": int(_LOG_S)}
        return self._connection.content("/api/v0/logs/file", _LOG_S, **query).decode(errors="replace")

    # --- a submission ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, staged: Path) -> str:
        """Send a request: upload the packages that the cluster lacks, and start the job. Return the job's id.

        Args:
            request: The request.
            staged: An empty folder for the packages.

        Raises:
            JobExists: The cluster has a job with this id, possibly one submitted at the same moment.
            ConfigError: An environment variable would send Ray's tools to another cluster, a file cannot be read any
                more, or Ray rejects a package or the runtime environment.
        """
        check_environment(self.address)
        from raytrainer.backends.jobs_api import packages, upload

        try:
            return upload.submit(
                self._connection,
                submission_id=request.submission_id,
                entrypoint=request.entrypoint,
                runtime_env=packages.stage(request, staged),
                metadata=request.metadata,
                resources=request.resources,
            )
        except ClusterUnreachable:
            # Only the answer may have been lost, and the job started.
            there = self.info(request.submission_id)
            if there is None or dict(there.metadata) != dict(request.metadata):
                raise
            return there.submission_id

    def _job(self, row: Mapping[str, Any]) -> ClusterJob:
        started, ended = row.get("start_time"), row.get("end_time")
        return ClusterJob(
            submission_id=row["submission_id"],
            status=row["status"],
            message=row.get("message") or "",
            metadata=row.get("metadata") or {},
            started=started / 1e3 if started else None,
            ended=ended / 1e3 if ended else None,
            exit_code=row.get("driver_exit_code"),
            client=self,
        )

    # --- the dashboard's own rows ---------------------------------------------------------------------------------

    def _known(self, submission_id: str) -> ClusterJob:
        job = self.info(submission_id)
        if job is None:
            raise ClusterError(f"{self.address} has no job {submission_id}")
        return job

    def _row(self, submission_id: str) -> Mapping[str, Any] | None:
        try:
            row = self._connection.get(f"/api/jobs/{_path(submission_id)}", dict)
        except NotThere as error:
            if "does not exist" in str(error):  # Ray's wording; any other 404 does not come from a dashboard
                return None
            raise
        return row if row.get("submission_id") == submission_id else None

    def _rows(self) -> builtins.list[dict[str, Any]]:
        return self._connection.get("/api/jobs/", builtins.list)


def check_environment(address: str, environ: Mapping[str, str] = os.environ) -> None:
    """Check that no environment variable makes Ray's own tools use another address than `address`.

    Raises:
        ConfigError: RAY_API_SERVER_ADDRESS or RAY_ADDRESS names another address.
    """
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        other = environ.get(name, "").rstrip("/")
        if other and other != address.rstrip("/"):
            raise ConfigError(
                f"and {name}={other} is set, which Ray's own tools follow instead: unset {name}, or give its address",
                key="cluster.address",
                value=address,
            )


def _at_once(requests: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Make several requests in parallel and return their answers by name."""
    futures = {name: in_background(request, "ray-jobs") for name, request in requests.items()}
    return {name: future.result() for name, future in futures.items()}


def _path(submission_id: str) -> str:
    return quote(submission_id, safe="")
