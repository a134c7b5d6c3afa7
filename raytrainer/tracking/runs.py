"""The driver's side of an MLflow run: open it before training starts, and set its true final status in every case.
With a spool, everything that MLflow cannot receive now is kept on disk and sent later."""

from __future__ import annotations

import logging
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raytrainer import provenance
from raytrainer.errors import StorageError, TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.tracking.database import default_artifact_root
from raytrainer.tracking.failures import RunGone, redacted
from raytrainer.tracking.sender import LOCAL_ID_TAG, LOCAL_PREFIX, Calls, apply_note, recorded_run_id
from raytrainer.tracking.server import RunState, Server
from raytrainer.tracking.spool import RunNote, Spool
from raytrainer.tracking.uploader import replay

Status = Literal["FINISHED", "FAILED", "KILLED"]
CAUSE_TAG = "raytrainer.cause"
CONTINUES_TAG = "raytrainer.continues"  # on a run that continues a deleted one: the deleted run's id

logger = logging.getLogger("raytrainer.tracking")


def open_run(
    tracking_uri: str,
    experiment_name: str,
    run_name: str,
    *,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    artifact_root: str | None = None,
    required: bool = True,
    run_id: str | None = None,
    started: float | None = None,
    spool_dir: Path | None = None,
    server: Calls | None = None,
) -> Run:
    """Create a run, or set an existing one to RUNNING again. Create the experiment and the database if necessary.

    Args:
        tracking_uri: An http(s) address, or a database URL with an absolute path.
        experiment_name: Created with `artifact_root` if it does not exist.
        run_name: The name that MLflow shows.
        params: Flat parameter names and values, cut at 6,000 characters. A reopened run gets only those that it lacks.
        tags: Set each time the run is opened.
        artifact_root: An absolute path or URI. By default, a folder beside a SQLite store, else the server's own.
        required: If false, a server that cannot be used causes only a warning, and the run is described in the spool.
            Its `run_id` is then a local id (`offline-…`). `MlflowTracker` and `replay` accept it and create the MLflow
            run as soon as the server answers, with the tag `raytrainer.offline_id`. `recorded_run_id` then returns the
            MLflow run id.
        run_id: The run to continue, as an MLflow run id or a local id. If the run was deleted or the store does not
            know it, a new run continues it, and a warning says so.
        started: The start of the first attempt, in seconds since the epoch; default: now.
        spool_dir: The run's spool, which keeps what cannot be sent. Needed if `required` is false.

    Raises:
        TrackingUnreachable, TrackingDenied: The server cannot be used, and `required` is true.
        TrackingError: The experiment was deleted.
    """
    calls = server or Server(tracking_uri)
    spool = None if spool_dir is None else Spool(spool_dir)
    if artifact_root is None:
        artifact_root = default_artifact_root(tracking_uri)
    if run_id is not None and run_id.startswith(LOCAL_PREFIX) and spool_dir is not None:
        run_id = recorded_run_id(spool_dir) or run_id
    tags = {**source_tags(), **tags}
    start_time = _now() if started is None else round(1000 * started)
    note = RunNote(run_id or "", experiment_name, run_name, artifact_root, dict(params), dict(tags), start_time)
    try:
        experiment_id = _open(calls, note, spool)
    except (TrackingUnreachable, TrackingDenied) as error:
        if required or spool is None:
            raise
        note.run_id = note.run_id or f"{LOCAL_PREFIX}{uuid.uuid4().hex}"
        with spool.note_lock():
            spool.write_note(merged(spool.note(), note))
        logger.warning(
            "%s. tracking.required=false: the run is kept in %s and sent when the server accepts it", error, spool.root
        )
        experiment_id = ""
    return Run(note.run_id, experiment_id, tracking_uri, experiment_name, run_name, calls, spool)


class Run:
    """An open run.

    Attributes:
        run_id: The MLflow run id, or a local id if the run is `offline`.
        experiment_id: The MLflow experiment id; empty while offline.
        tracking_uri: The URI as passed.

    With a spool, no method fails because of the server. Without one, they raise `TrackingError`.
    """

    def __init__(
        self,
        run_id: str,
        experiment_id: str,
        tracking_uri: str,
        experiment_name: str,
        run_name: str,
        server: Calls,
        spool: Spool | None,
    ) -> None:
        self.run_id, self.experiment_id, self.tracking_uri = run_id, experiment_id, tracking_uri
        self._names = (experiment_name, run_name)
        self._server, self._spool = server, spool

    @property
    def offline(self) -> bool:
        """Whether the run was opened without a server."""
        return self.run_id.startswith(LOCAL_PREFIX)

    @property
    def url(self) -> str:
        """The run's web page, or the tracking URI of a store without a server. It contains no credentials."""
        base = redacted(self.tracking_uri).rstrip("/")
        if not base.startswith(("http://", "https://")) or self.offline:
            return base
        return f"{base}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def ui_command(self) -> str | None:
        """The command that shows a store without a server; None if there is a server."""
        if self.tracking_uri.startswith(("http://", "https://")):
            return None
        return f"mlflow ui --backend-store-uri {shlex.quote(redacted(self.tracking_uri))}"

    def set_timeout(self, timeout_s: float) -> None:
        """Set the timeout of all later calls, in seconds."""
        self._server = self._server.with_timeout(max(1, int(timeout_s)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._log(RunNote(self.run_id, *self._names, tags=dict(tags)))

    def log_metrics(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        """Log values at a step. Logging them again with the same time (seconds since the epoch) changes nothing."""
        rows = {key: [value, round(1000 * time), step] for key, value in metrics.items()}
        self._log(RunNote(self.run_id, *self._names, metrics=rows))

    def log_text(self, text: str, path: str) -> None:
        """Log a text as the artifact `path`. Bytes that could not be decoded when the text was read are restored."""
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, name)
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            self.log_artifact(file, folder or None)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file, or a directory under its own name, into `folder` of the run's artifacts."""
        source = Path(path)
        if self._sent(lambda: self._server.log_artifact(self.run_id, source, folder), source.name):
            return
        if self._spool is not None:
            try:
                self._spool.add_artifact(source, folder)
            except StorageError as error:
                logger.warning("the artifact %s is skipped: %s", source, error)

    def finish(
        self,
        status: Status,
        cause: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        ended: float | None = None,
        timeout_s: float = 30.0,
    ) -> bool:
        """Set the final status, then send what is left in the spool.

        Args:
            status: The final status.
            cause: One line for the tag `raytrainer.cause`. For a FINISHED run, None clears the tag, because a
                process that considered the run dead may have set it.
            tags: Further tags.
            ended: The end, in seconds since the epoch; default: now.
            timeout_s: The timeout of each call, in seconds. There is no retry after it, so a server that hangs costs at
                most twice this time.

        Returns:
            Whether everything is in MLflow. If not, the rest is in the spool, and `replay` sends it.
        """
        deadline = time.monotonic() + timeout_s
        server = self._server.with_timeout(max(1, int(timeout_s)))
        all_tags = {**(tags or {}), **({} if cause is None else {CAUSE_TAG: cause})}
        end_time = _now() if ended is None else round(1000 * ended)
        note = RunNote(self.run_id, *self._names, tags=all_tags, status=status, end_time=end_time)
        if status == "FINISHED" and cause is None and self._has_cause(server):
            note.tags[CAUSE_TAG] = ""
        if self._spool is None:
            apply_note(server, self.run_id, note)
            return True
        # Write the note first, so that the status is not lost if this process is killed now. Send it before `replay`,
        # without the send lock, because an uploader may hold that lock in a call that hangs.
        note = self._keep(self._spool, note)
        try:
            if not self.offline:
                try:
                    apply_note(server, self.run_id, note)
                    self._spool.drop_note(note)
                except TrackingUnreachable:
                    if time.monotonic() >= deadline:
                        raise
            left = max(0.0, deadline - time.monotonic())
            replay(self._spool.root, self.run_id, self.tracking_uri, timeout_s=left, server=server)
            return True
        except (TrackingError, StorageError) as error:
            logger.warning("%s. The run ended as %s; its unsent data is in %s", error, status, self._spool.root)
            return False

    def _has_cause(self, server: Calls) -> bool:
        try:
            return not self.offline and bool(server.run(self.run_id).tags.get(CAUSE_TAG))
        except TrackingError:  # the next call reports the error
            return False

    def _log(self, note: RunNote) -> None:
        if not self._sent(lambda: apply_note(self._server, self.run_id, note), "The run's description"):
            assert self._spool is not None
            self._keep(self._spool, note)

    def _sent(self, send: Callable[[], None], content: str) -> bool:
        """Send something to the server. Return False if the spool must keep it.

        Nothing is sent while the spool has content: an older value must not overwrite a newer one, and a server that
        hangs should be waited for only once.
        """
        spool = self._spool
        if spool is not None and (self.offline or spool.note_path.exists() or any(spool.artifacts())):
            return False
        try:
            send()
        except (TrackingUnreachable, TrackingDenied, RunGone) as error:
            if spool is None:
                raise
            logger.warning("%s. %s is kept in %s and sent when the server accepts it", error, content, spool.root)
            return False
        return True

    @staticmethod
    def _keep(spool: Spool, note: RunNote) -> RunNote:
        try:
            with spool.note_lock():
                note = merged(spool.note(), note)
                spool.write_note(note)
        except StorageError as error:
            logger.warning("%s. The run's description could not be written", error)
        return note


def _open(server: Calls, note: RunNote, spool: Spool | None) -> str:
    """Open the run and apply the note. Set `note.run_id` to the MLflow run id, and return the experiment's id."""
    old = None if spool is None else spool.note()
    if old is not None:
        # An earlier attempt's status that could not be sent is no longer true. Everything else in its note still is.
        pending = merged(replace(old, status=None, end_time=None), note)
        note.params, note.tags, note.start_time = pending.params, pending.tags, pending.start_time
    existing = note.run_id
    if existing.startswith(LOCAL_PREFIX):
        experiment_id = server.experiment(note.experiment_name, note.artifact_root)
        note.tags[LOCAL_ID_TAG] = existing
        existing = server.find_run(experiment_id, LOCAL_ID_TAG, existing) or ""
    state = _state(server, existing) if existing else None
    if state is not None:
        if state.tags.get(CAUSE_TAG):
            note.tags[CAUSE_TAG] = ""  # clears the cause of the previous attempt
        server.set_running(existing)
        note.run_id, experiment_id = existing, state.experiment_id
    else:
        if existing:
            note.tags[CONTINUES_TAG] = existing
        experiment_id = server.experiment(note.experiment_name, note.artifact_root)
        note.run_id = server.create_run(experiment_id, note.run_name, note.tags, note.start_time)
    apply_note(server, note.run_id, note)
    if state is None and existing:
        logger.warning(
            "MLflow no longer has the run %s: it, or its database, was deleted. %s continues in the new MLflow run "
            "%s, without the earlier metrics",
            existing,
            note.run_name,
            note.run_id,
        )
    if spool is not None and old is not None:
        spool.drop_note(old)
    return experiment_id


def _state(server: Calls, run_id: str) -> RunState | None:
    """Return the state of a run in MLflow; None if the run was deleted or is not known."""
    try:
        state = server.run(run_id)
    except RunGone:
        return None
    return state if state.active else None


def merged(old: RunNote | None, new: RunNote) -> RunNote:
    """Merge two notes. Later values replace earlier ones, except for parameters and the start time."""
    if old is None:
        return new
    return replace(
        new,
        artifact_root=new.artifact_root or old.artifact_root,
        params={**new.params, **old.params},
        tags={**old.tags, **new.tags},
        metrics={**old.metrics, **new.metrics},
        start_time=old.start_time or new.start_time,
        status=new.status or old.status,
        end_time=new.end_time or old.end_time,
    )


def source_tags() -> dict[str, str]:
    """Return the tags from which MLflow's pages show the user and the source of a run."""
    return {"mlflow.user": provenance.user(), "mlflow.source.name": "raytrainer", "mlflow.source.type": "LOCAL"}


def _now() -> int:
    return time.time_ns() // 1_000_000
