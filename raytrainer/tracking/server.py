"""A tracking server, as the rest of the package sees it: the only module that imports mlflow, and does so when called.
Every call is short, is never retried by MLflow itself, and fails with one of our errors, with no secret in its message.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from raytrainer import proxies
from raytrainer.errors import TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.tracking.database import (
    check_schema,
    check_writable,
    create,
    is_sqlite,
    read_experiment,
    schema_problem,
)
from raytrainer.tracking.spool import Row

CHECK_SECONDS = 14  # of the 15 promised
MAX_PARAM = 6000  # characters, as MLflow's validation has them
MAX_TAG = 8000
MAX_KEY = 250

_SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class Rejected(TrackingError):
    """The server understood the call and refuses its content."""


class RunGone(TrackingError):
    """The run was deleted, or never was."""


@dataclass(frozen=True)
class RunState:
    """What MLflow holds of a run. `steps`: the last step of each metric."""

    run_id: str
    experiment_id: str
    active: bool
    params: dict[str, str]
    tags: dict[str, str]
    steps: dict[str, int]


@dataclass(frozen=True)
class StoredRun:
    """A run as a search tells of it.

    Attributes:
        status: MLflow's: RUNNING, FINISHED, FAILED, KILLED, SCHEDULED.
        started, ended, logged: Seconds since the epoch; `logged` is the time of its last metric.
        metrics: Key → the last value, and its step.
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
        uri: http(s), or a database URL.
        timeout_s: Of one request, unless the user set MLFLOW_HTTP_REQUEST_TIMEOUT.

    Every method raises:
        TrackingUnreachable: No answer, or one of a server in trouble (5xx, 429); worth another try.
        TrackingDenied: 401 or 403; not worth one.
        Rejected: The content is refused.
        RunGone: No such run.
    """

    def __init__(self, uri: str, *, timeout_s: int = 10) -> None:
        self.uri, self.timeout_s = uri, timeout_s
        self._client: Any = None
        self._experiments: dict[str, str] = {}

    def with_timeout(self, timeout_s: int) -> Server:
        return Server(self.uri, timeout_s=timeout_s)

    def log_batch(
        self, run_id: str, rows: Sequence[Row], tags: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> None:
        """Rows that MLflow has already (same key, step, time and value) are swallowed by it.

        Long parameters are cut at 6,000 characters; one that differs from what was logged is `Rejected`. One request,
        or as many as MLflow's limits want.
        """
        with self._call() as client:
            from mlflow.entities import Metric, Param, RunTag

            client.log_batch(
                run_id,
                metrics=[Metric(row.key, row.value, row.time, row.step) for row in rows],
                params=[Param(key, _cut(value, MAX_PARAM)) for key, value in (params or {}).items()],
                tags=[RunTag(key, value[:MAX_TAG]) for key, value in tags.items()],
                synchronous=True,
            )

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Uploads a file, or a directory under its own name."""
        with self._call() as client:
            if path.is_dir():
                client.log_artifacts(run_id, str(path), f"{folder}/{path.name}" if folder else path.name)
            else:
                client.log_artifact(run_id, str(path), folder)

    def run(self, run_id: str) -> RunState:
        with self._call() as client:
            return _run_state(client.get_run(run_id))

    def experiment(self, name: str, artifact_root: str | None) -> str:
        """The id of the experiment, created if need be; two that create it at once get the same. Asked for once."""
        if name in self._experiments:
            return self._experiments[name]
        for _ in range(2):
            with self._call() as client:
                found = client.get_experiment_by_name(name)
            if found is not None:
                _refuse_deleted(name, found.experiment_id, found.lifecycle_stage)
                return self._experiments.setdefault(name, str(found.experiment_id))
            try:
                with self._call() as client:
                    created = str(client.create_experiment(name, artifact_location=artifact_root))
                return self._experiments.setdefault(name, created)
            except Rejected:
                continue  # made by another process in between
        raise Rejected(f"MLflow refuses to create the experiment {name!r}")

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_time: int | None) -> str:
        cut = {key: value[:MAX_TAG] for key, value in tags.items()}
        try:
            with self._call() as client:
                return str(client.create_run(experiment_id, start_time, cut, name).info.run_id)
        except TrackingError:
            self._experiments.clear()  # it may have been deleted: ask again before the next
            raise

    def find_run(self, experiment_id: str, tag: str, value: str) -> str | None:
        """A run with this tag; the names and values here are our own, so that quoting is no matter."""
        with self._call() as client:
            found = client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def search(self, where: str, limit: int) -> list[StoredRun]:
        """Runs of all experiments that are not deleted, the newest first.

        Args:
            where: In MLflow's language of filters.
            limit: The most that are returned.
        """
        with self._call() as client:
            everywhere, token = [], None
            while token != "":
                page = client.search_experiments(page_token=token)
                everywhere += [e.experiment_id for e in page]
                token = page.token or ""
            found = client.search_runs(everywhere, where, max_results=limit, order_by=["attributes.start_time DESC"])
            return [_stored_run(run) for run in found]

    def artifacts(self, run_id: str, folder: str) -> list[str]:
        """The paths of the files directly in a folder of the run's artifacts."""
        with self._call() as client:
            return [str(entry.path) for entry in client.list_artifacts(run_id, folder or None) if not entry.is_dir]

    def read_artifact(self, run_id: str, path: str) -> bytes:
        """A whole file of the run's artifacts."""
        with self._call() as client, tempfile.TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, path, folder)).read_bytes()

    def create_model_version(self, run_id: str, folder: str, name: str) -> str:
        """A new version of the registered model `name`, created if need be, from a folder of the run's artifacts."""
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
        """`end_time` in milliseconds: given always, because a reopened run keeps its old one."""
        with self._call() as client:
            client.set_terminated(run_id, status, end_time)

    def probe(self, experiment_name: str | None = None) -> None:
        """Make the cheapest call that needs the server, its database and the credentials. An experiment of this name that
        is deleted is `Rejected`."""
        with self._call() as client:
            client.search_experiments(max_results=1)
            experiment = None if experiment_name is None else client.get_experiment_by_name(experiment_name)
        if experiment_name is not None and experiment is not None:
            _refuse_deleted(experiment_name, experiment.experiment_id, experiment.lifecycle_stage)

    @contextmanager
    def _call(self) -> Iterator[Any]:
        with _request_settings(self.timeout_s):
            try:
                if self._client is None:
                    self._client = _client(self.uri)
                yield self._client
            except TrackingError:
                raise
            except Exception as error:  # noqa: BLE001
                # Any library below (requests, SQLAlchemy, an artifact store's) may raise here. The original is not
                # chained: it quotes URLs and headers.
                raise _translated(error, self.uri) from None


def check_tracking(tracking_uri: str, experiment_name: str | None = None) -> None:
    """Whether runs can be logged there, within 15 seconds. A SQLite file is not created by asking.

    Args:
        tracking_uri: http(s), or a database URL.
        experiment_name: Of a new run's experiment, which may exist or not.

    Raises:
        TrackingUnreachable: No answer, or no store that MLflow can use.
        TrackingDenied: 401 or 403, at the first answer.
        TrackingError: The experiment is deleted.
    """
    scheme = urlsplit(tracking_uri).scheme
    if is_sqlite(tracking_uri):
        check_writable(tracking_uri)
        if experiment_name is not None and (id_and_stage := read_experiment(tracking_uri, experiment_name)):
            _refuse_deleted(experiment_name, *id_and_stage)
        return
    if scheme in ("", "file"):
        raise TrackingUnreachable(
            f"tracking.tracking_uri={tracking_uri} is a directory, a store that MLflow has given up:"
            " use sqlite:////ABSOLUTE/PATH/mlflow.db or a server's http(s) address"
        )
    problem: list[Exception] = []

    def probe() -> None:
        try:
            Server(tracking_uri, timeout_s=10).probe(experiment_name)
        except Exception as error:  # noqa: BLE001  # handed to the caller's thread, which raises it
            problem.append(error)

    # The import takes seconds on a slow machine, which are not the server's.
    with _request_settings(10):
        importlib.import_module("mlflow.tracking")
    # In a thread, because neither a database driver's connect nor a name lookup has a timeout of ours.
    thread = threading.Thread(target=probe, name="tracking-check", daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    if thread.is_alive():
        raise TrackingUnreachable(
            f"the tracking server {redacted(tracking_uri)} gave no answer in {CHECK_SECONDS} s{proxies.hint(tracking_uri)}"
        )
    if problem:
        raise problem[0]


def _refuse_deleted(name: str, experiment_id: str, stage: str) -> None:
    if stage != "active":
        raise Rejected(
            f"the experiment {name!r} is deleted in MLflow: choose another tracking.experiment_name,"
            f" or `mlflow experiments restore --experiment-id {experiment_id}`"
        )


def redacted(uri: str) -> str:
    """The URI without the user and password in it."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _client(uri: str) -> Any:
    if is_sqlite(uri):
        check_schema(uri)
    from mlflow.tracking import MlflowClient

    # Creating a database tells of each of its ~70 migrations, at INFO on stderr; what fails there, our error says.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if is_sqlite(uri):
        create(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class _Settings:
    """The environment that MLflow reads at each call, while any of our calls is under way in this process.

    In Python's view of it alone. Calls are made by threads, and what a thread writes into C's environment moves it
    under native code that reads it at that moment, as a start of Ray does for hundreds of variables: with glibc before
    2.41 that can be a segmentation fault.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timeouts: list[int] = []
        self._saved: dict[str, str | None] = {}

    @contextmanager
    def use(self, timeout_s: int) -> Iterator[None]:
        with self._lock:
            self._timeouts.append(timeout_s)
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._timeouts.remove(timeout_s)
                self._apply()

    def _apply(self) -> None:
        if not self._timeouts:
            for name, value in self._saved.items():
                _show(name, value)
            self._saved = {}
            return
        values = {
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # 7 by default, about 4 minutes; retrying is the sender's
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(self._timeouts)),
            "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            # Read once, when MLflow is imported; with it on, that writes C's environment.
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        values |= proxies.exemptions()  # also in a worker of somebody's cluster, whose environment is not ours
        if not self._saved:
            self._saved = {name: os.environ.get(name) for name in values}
        for name in _USERS:
            if self._saved[name] is not None:
                del values[name]
        for name, value in values.items():
            _show(name, value)


# Settings that are the user's where they are set.
_USERS = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_DISABLE_TELEMETRY")


def _show(name: str, value: str | None) -> None:
    """What Python's code in this process finds in `os.environ`; None: nothing. `putenv` is not called."""
    python: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    if value is None:
        python.pop(os.fsencode(name), None)
    else:
        python[os.fsencode(name)] = os.fsencode(value)


_request_settings = _Settings().use


def _translated(error: Exception, uri: str) -> TrackingError:
    from mlflow.exceptions import MlflowException

    name = redacted(uri)
    status = _status(error, uri)
    if status in (401, 403):
        return denied(uri, status)
    if schema := re.search(r"out-of-date database schema \(found version (\w+)", str(error)):
        return TrackingUnreachable(schema_problem(name, None if schema[1] == "None" else schema[1]))
    reason = with_fix(without_secrets(_reason(error), uri))
    if isinstance(error, MlflowException):
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return RunGone(f"{name}: {reason}")
        if status in (400, 413, 422):
            return Rejected(f"{name}: {reason}")
    return TrackingUnreachable(f"the tracking server {name} cannot be used: {reason}{proxies.hint(uri)}")


def denied(uri: str, status: int) -> TrackingDenied:
    """The error for an answer of 401 or 403: which variables were set, never what they hold."""
    given = [key for key in (*_SECRETS, "MLFLOW_TRACKING_USERNAME") if os.environ.get(key)]
    return TrackingDenied(
        f"the tracking server {redacted(uri)} answers {status} to the credentials given"
        f" ({', '.join(given) if given else 'none: MLFLOW_TRACKING_TOKEN or _USERNAME and _PASSWORD are not set'}){proxies.hint(uri)}"
    )


def _status(error: Exception, uri: str) -> int | None:
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, RestException) and error.get_http_status_code() == 500 and uri.startswith("http"):
        # MLflow keeps the body's error code alone, and takes one that it does not know (a gateway's) for a 500; a real
        # 500 is never a RestException. So ask once more, for the status.
        return _asked_status(uri)
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    # requests' HTTPError, of uploads.
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _asked_status(uri: str) -> int | None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    endpoint = "/api/2.0/mlflow/experiments/search?max_results=1"
    try:
        return int(http_request(get_default_host_creds(uri), endpoint, "GET", raise_on_status=False).status_code)
    except MlflowException:
        return None


def _reason(error: BaseException) -> str:
    """The innermost cause in a line: `[Errno 111] Connection refused` rather than four wrappings of it."""
    seen = {id(error)}
    inner = error
    while (deeper := inner.__cause__ or inner.__context__) is not None and id(deeper) not in seen:
        seen.add(id(deeper))
        inner = deeper
    text = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    return _cut(f"{type(inner).__name__}: {text}" if text else type(inner).__name__, 300)


def without_secrets(text: str, uri: str) -> str:
    """A text that may quote the address or a header."""
    secrets = [os.environ.get(key) for key in _SECRETS]
    password = urlsplit(uri).password
    for secret in (*secrets, password, unquote(password) if password else None, *proxies.passwords()):
        if secret:
            text = text.replace(secret, "***")
    return text


def with_fix(reason: str) -> str:
    """A reason, and where it is a certificate of an unknown authority, what makes it known."""
    if "self-signed certificate" in reason or "unable to get local issuer certificate" in reason:
        return f"{reason}; MLFLOW_TRACKING_SERVER_CERT_PATH=FILE names the authority that signed its certificate"
    return reason


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _run_state(run: Any) -> RunState:
    # `data.metrics` has the values alone; the protocol message has the steps with them.
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
