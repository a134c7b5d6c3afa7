"""Calls to a tracking server. Only this module imports mlflow, and only when a call needs it.
Every call is short and is not retried by MLflow itself. It fails with one of our errors, whose message has no secret.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrainer.errors import TrackingError, TrackingUnreachable
from raytrainer.tracking.database import check_schema, create, is_sqlite, schema_problem
from raytrainer.tracking.failures import Rejected, RunGone, denied, reason_of, redacted, shortened, unusable
from raytrainer.tracking.mlflow_internals import status_of_search
from raytrainer.tracking.request_settings import request_settings
from raytrainer.tracking.segments import SpoolRow

MAX_PARAM = 6000  # characters, the limit of MLflow's validation
MAX_TAG = 8000


@dataclass(frozen=True)
class RunState:
    """The state of a run in MLflow. `steps` holds the last step of each metric."""

    run_id: str
    experiment_id: str
    active: bool
    params: dict[str, str]
    tags: dict[str, str]
    steps: dict[str, int]


@dataclass(frozen=True)
class StoredRun:
    """A run as returned by a search.

    Attributes:
        status: MLflow's status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        started, ended, logged: Seconds since the epoch; `logged` is the time of the last metric.
        metrics: Key → (last value, its step).
    """

    run_id: str
    name: str
    experiment_id: str
    status: str
    started: float
    ended: float | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, tuple[float, int]]
    logged: float | None


class Server:
    """Calls to one tracking URI.

    Args:
        uri: An http(s) address, or a database URL.
        timeout_s: The timeout of one request in seconds, unless the user has set MLFLOW_HTTP_REQUEST_TIMEOUT.

    Every method raises:
        TrackingUnreachable: The server does not answer, or has a temporary problem (5xx, 429). A retry may succeed.
        TrackingDenied: The answer is 401 or 403. A retry cannot succeed.
        Rejected: The server rejects the content.
        RunGone: The run does not exist.
    """

    def __init__(self, uri: str, *, timeout_s: int = 10) -> None:
        self.uri, self.timeout_s = uri, timeout_s
        self._client: Any = None
        self._experiments: dict[str, str] = {}

    def with_timeout(self, timeout_s: int) -> Server:
        return Server(self.uri, timeout_s=timeout_s)

    def log_batch(
        self, run_id: str, rows: Sequence[SpoolRow], tags: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> None:
        """Log rows, tags and parameters. MLflow ignores rows that it already has (same key, step, time and value).

        Long parameters are cut at 6,000 characters. A parameter whose value differs from the logged one raises
        `Rejected`. The call is one request, or several if MLflow's limits require that.
        """
        with self._call() as client:
            from mlflow.entities import Metric, Param, RunTag

            client.log_batch(
                run_id,
                metrics=[Metric(row.key, row.value, row.time, row.step) for row in rows],
                params=[Param(key, shortened(value, MAX_PARAM)) for key, value in (params or {}).items()],
                tags=[RunTag(key, value[:MAX_TAG]) for key, value in tags.items()],
                synchronous=True,
            )

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Upload a file, or a directory under its own name."""
        with self._call() as client:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), f"{folder}/{path.name}" if folder else path.name)
            else:
                client.log_artifact(run_id, str(path), folder)

    def run(self, run_id: str) -> RunState:
        with self._call() as client:
            return _run_state(client.get_run(run_id))

    def experiment(self, name: str, artifact_root: str | None) -> str:
        """Return the id of the experiment, and create it if necessary. The id is cached.

        Processes that create it at the same time get the same id.
        """
        if name in self._experiments:
            return self._experiments[name]
        for _ in range(2):
            with self._call() as client:
                experiment = client.get_experiment_by_name(name)
            if experiment is not None:
                refuse_deleted(name, experiment.experiment_id, experiment.lifecycle_stage)
                return self._experiments.setdefault(name, str(experiment.experiment_id))
            try:
                with self._call() as client:
                    created = str(client.create_experiment(name, artifact_location=artifact_root))
                return self._experiments.setdefault(name, created)
            except Rejected:
                continue  # another process has just created it
        raise Rejected(f"MLflow refuses to create the experiment {name!r}")

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_time: int | None) -> str:
        cut = {key: value[:MAX_TAG] for key, value in tags.items()}
        try:
            with self._call() as client:
                return str(client.create_run(experiment_id, start_time, cut, name).info.run_id)
        except TrackingError:
            self._experiments.clear()  # the experiment may have been deleted, so look it up again next time
            raise

    def find_run(self, experiment_id: str, tag: str, value: str) -> str | None:
        """Return a run with this tag. Tags and values are raytrainer's own, so they need no quoting."""
        with self._call() as client:
            runs = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def search(self, where: str, limit: int) -> list[StoredRun]:
        """Return runs of all experiments that are not deleted, newest first.

        Args:
            where: A filter in MLflow's search syntax.
            limit: The maximum number of runs.
        """
        with self._call() as client:
            everywhere, token = [], None
            while token != "":
                page = client.search_experiments(page_token=token)
                everywhere += [e.experiment_id for e in page]
                token = page.token or ""
            runs = client.search_runs(everywhere, where, max_results=limit, order_by=["attributes.start_time DESC"])
            return [_stored_run(run) for run in runs]

    def artifacts(self, run_id: str, folder: str) -> list[str]:
        """Return the paths of the files directly in a folder of the run's artifacts."""
        with self._call() as client:
            return [str(entry.path) for entry in client.list_artifacts(run_id, folder or None) if not entry.is_dir]

    def read_artifact(self, run_id: str, path: str) -> bytes:
        """Return the content of a file of the run's artifacts."""
        with self._call() as client, tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, path, folder)).read_bytes()

    def create_model_version(self, run_id: str, folder: str, name: str) -> str:
        """Create a version of the registered model `name` from a folder of the run's artifacts. Return the version."""
        with self._call() as client:
            from mlflow.exceptions import MlflowException

            if f"{folder}/MLmodel" not in {entry.path for entry in client.list_artifacts(run_id, folder)}:
                raise Rejected(f"the run {run_id} has no model in {folder}")
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{folder}"
            return str(client.create_model_version(name, source, run_id).version)

    def set_running(self, run_id: str) -> None:
        with self._call() as client:
            client.update_run(run_id, status="RUNNING")

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        """Set the final status and the end in milliseconds. A reopened run would otherwise keep its old end."""
        with self._call() as client:
            client.set_terminated(run_id, status, end_time)

    def probe(self, experiment_name: str | None = None) -> None:
        """Make the cheapest call that needs the server, its database and the credentials.

        Raises `Rejected` if the experiment of this name was deleted.
        """
        with self._call() as client:
            client.search_experiments(max_results=1)
            experiment = None if experiment_name is None else client.get_experiment_by_name(experiment_name)
        if experiment_name is not None and experiment is not None:
            refuse_deleted(experiment_name, experiment.experiment_id, experiment.lifecycle_stage)

    @contextmanager
    def _call(self) -> Iterator[Any]:
        with request_settings(self.timeout_s):
            try:
                if self._client is None:
                    self._client = _client(self.uri)
                yield self._client
            except TrackingError:
                raise
            except Exception as error:  # noqa: BLE001
                # Any library below (requests, SQLAlchemy, an artifact store's client) may raise here. The original
                # error is not chained, because it quotes URLs and headers.
                raise _translated(error, self.uri) from None


def refuse_deleted(name: str, experiment_id: str, stage: str) -> None:
    """Raise `Rejected` if an experiment is in another lifecycle stage than `active`."""
    if stage != "active":
        raise Rejected(
            f"the experiment {name!r} is deleted in MLflow: choose another tracking.experiment_name,"
            f" or `mlflow experiments restore --experiment-id {experiment_id}`"
        )


def _client(uri: str) -> Any:
    if is_sqlite(uri):
        check_schema(uri)
    from mlflow.tracking import MlflowClient

    # MLflow logs each of the ~70 migrations of a new database at INFO on stderr. Our own error reports a failure.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if is_sqlite(uri):
        create(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _translated(error: Exception, uri: str) -> TrackingError:
    from mlflow.exceptions import MlflowException

    name = redacted(uri)
    status = _status(error, uri)
    if status in (401, 403):
        return denied(uri, status)
    if schema := re.search(r"out-of-date database schema \(found version (\w+)", str(error)):
        return TrackingUnreachable(schema_problem(name, None if schema[1] == "None" else schema[1]))
    reason = reason_of(error, uri)
    if isinstance(error, MlflowException):
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return RunGone(f"{name}: {reason}")
        if status in (400, 413, 422):
            return Rejected(f"{name}: {reason}")
    return unusable(uri, reason)


def _status(error: Exception, uri: str) -> int | None:
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, RestException) and error.get_http_status_code() == 500 and uri.startswith("http"):
        # MLflow keeps only the error code from the body and treats an unknown one (a gateway's) as 500. A real 500
        # never raises RestException. So ask again for the HTTP status.
        return _asked_status(uri)
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    # Uploads raise HTTPError from requests.
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _asked_status(uri: str) -> int | None:
    from mlflow.exceptions import MlflowException

    try:
        return status_of_search(uri)
    except MlflowException:
        return None


def _run_state(run: Any) -> RunState:
    # `data.metrics` has only the values; the protocol message also has the steps.
    return RunState(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        active=run.info.lifecycle_stage == "active",
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        steps={metric.key: int(metric.step) for metric in run.data.to_proto().metrics},
    )


def _stored_run(run: Any) -> StoredRun:
    metrics = run.data.to_proto().metrics
    return StoredRun(
        run_id=run.info.run_id,
        name=run.info.run_name or "",
        experiment_id=run.info.experiment_id,
        status=run.info.status,
        started=(run.info.start_time or 0) / 1e3,
        ended=run.info.end_time / 1e3 if run.info.end_time else None,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics={metric.key: (float(metric.value), int(metric.step)) for metric in metrics},
        logged=max((metric.timestamp for metric in metrics), default=0) / 1e3 or None,
    )
