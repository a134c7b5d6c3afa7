"""The driver's side of a run: opened before training starts, closed with the true status whatever happens.
With a spool, what MLflow cannot be told is written down there, and told later.
"""

from __future__ import annotations

import logging
import shlex
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from raytrainer import provenance
from raytrainer.errors import StorageError, TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.tracking.database import default_artifact_root
from raytrainer.tracking.sender import LOCAL_ID_TAG, LOCAL_PREFIX, Calls, apply_note, recorded_run_id, replay
from raytrainer.tracking.server import RunGone, RunState, Server, redacted
from raytrainer.tracking.spool import RunNote, Spool

Status = Literal["FINISHED", "FAILED", "KILLED"]
CAUSE_TAG = "raytrainer.cause"
CONTINUES_TAG = "raytrainer.continues"  # of a run that goes on in place of one that is gone: the id of that one

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
    """Creates the run, or sets an existing one running again; creates the experiment and the database if need be.

    Args:
        tracking_uri: http(s), or a database URL with an absolute path.
        experiment_name: Created with `artifact_root` where it does not exist.
        run_name: What MLflow lists.
        params: Flat names and values; cut at 6,000 characters. Of a reopened run only those it does not have.
        tags: Set on every opening.
        artifact_root: An absolute path or URI; default: beside a SQLite store, the server's own otherwise.
        required: False: a server that cannot be used is a warning, and the run is described in the spool. Its `run_id`
            is then a local one (`offline-…`), good for `MlflowTracker` and `replay`, which make the real run as soon as
            the server answers (tag `raytrainer.offline_id`; `recorded_run_id` has its id).
        run_id: The run to go on with, real or local. One that is deleted, or of which the store knows nothing any more,
            is continued in a new run, which is said.
        started: When the first attempt began, in seconds since the epoch; default: now.
        spool_dir: The run's spool, where what cannot be sent later is kept. Needed where `required` is false.

    Raises:
        TrackingUnreachable, TrackingDenied: Where `required`.
        TrackingError: The experiment is deleted.
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
        logger.warning("%s. tracking.required=false: the run is kept in %s until it can", error, spool.root)
        experiment_id = ""
    return Run(note.run_id, experiment_id, tracking_uri, experiment_name, run_name, calls, spool)


class Run:
    """A run that is open.

    Attributes:
        run_id: MLflow's, or a local one: `offline`.
        experiment_id: Empty while offline.
        tracking_uri: As given.

    With a spool no method fails for want of the server; without, they raise `TrackingError`.
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
        """The run's page, or the tracking URI of a store without a server; no credentials in it."""
        base = redacted(self.tracking_uri).rstrip("/")
        if not base.startswith(("http://", "https://")) or self.offline:
            return base
        return f"{base}/#/experiments/{self.experiment_id}/runs/{self.run_id}"

    @property
    def ui_command(self) -> str | None:
        """The command that shows a store without a server; None where there is one."""
        if self.tracking_uri.startswith(("http://", "https://")):
            return None
        return f"mlflow ui --backend-store-uri {shlex.quote(redacted(self.tracking_uri))}"

    def hurry(self, timeout_s: float) -> None:
        """From now on a call waits no longer for the server than this."""
        self._server = self._server.with_timeout(max(1, int(timeout_s)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._tell(RunNote(self.run_id, *self._names, tags=dict(tags)))

    def log_metrics(self, metrics: Mapping[str, float], step: int, time: float) -> None:
        """Values at a step; of the same time (seconds since the epoch) they may be told again."""
        rows = {key: [value, round(1000 * time), step] for key, value in metrics.items()}
        self._tell(RunNote(self.run_id, *self._names, metrics=rows))

    def log_params(self, params: Mapping[str, str]) -> None:
        """Those that the run does not have yet; a parameter is written once."""
        self._tell(RunNote(self.run_id, *self._names, params=dict(params)))

    def log_text(self, text: str, path: str) -> None:
        """A text as the artifact `path`; what could not be decoded when it was read is the same bytes again."""
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, name)
            file.write_bytes(text.encode("utf-8", "surrogateescape"))
            self.log_artifact(file, folder or None)

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """A file, or a directory under its own name, into `folder` of the run's artifacts."""
        source = Path(path)
        if self._direct():
            try:
                self._server.log_artifact(self.run_id, source, folder)
                return
            except (TrackingUnreachable, TrackingDenied, RunGone) as error:
                if self._spool is None:
                    raise
                logger.warning("%s. %s is kept in %s until it can", error, source.name, self._spool.root)
        if self._spool is not None:
            try:
                self._spool.add_artifact(source, folder)
            except StorageError as error:
                logger.warning("the artifact %s is left out: %s", source, error)

    def finish(
        self,
        status: Status,
        cause: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        ended: float | None = None,
        timeout_s: float = 30.0,
    ) -> bool:
        """Tells the terminal status, then sends what is left in the spool.

        Args:
            status: How it ended.
            cause: In a line, as the tag `raytrainer.cause`. Of a run that finished, None takes away what was said before
                it: by somebody who took it for dead, say.
            tags: Further ones.
            ended: When, in seconds since the epoch; default: now.
            timeout_s: Of each call, and no new try after it: a server that hangs costs up to twice this.

        Returns:
            Whether MLflow has everything; otherwise the spool does, and `replay` sends it.
        """
        deadline = time.monotonic() + timeout_s
        server = self._server.with_timeout(max(1, int(timeout_s)))
        told = {**(tags or {}), **({} if cause is None else {CAUSE_TAG: cause})}
        end_time = _now() if ended is None else round(1000 * ended)
        note = RunNote(self.run_id, *self._names, tags=told, status=status, end_time=end_time)
        if status == "FINISHED" and cause is None and self._has_cause(server):
            note.tags[CAUSE_TAG] = ""
        if self._spool is None:
            apply_note(server, self.run_id, note)
            return True
        # Written down first: the status is not lost if this process is killed now. And told first, past the lock of a
        # sender that hangs in a call.
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
            logger.warning("%s. What is left of the run, which ended as %s, is in %s", error, status, self._spool.root)
            return False

    def _has_cause(self, server: Calls) -> bool:
        try:
            return not self.offline and bool(server.run(self.run_id).tags.get(CAUSE_TAG))
        except TrackingError:  # what follows says so
            return False

    def _direct(self) -> bool:
        """What is kept goes first, so that no later value is overtaken, and nobody waits for a hanging server twice."""
        if self.offline:
            return False
        return self._spool is None or not (self._spool.note_path.exists() or any(self._spool.artifacts()))

    def _tell(self, note: RunNote) -> None:
        if self._direct():
            try:
                apply_note(self._server, self.run_id, note)
                return
            except (TrackingUnreachable, TrackingDenied, RunGone) as error:
                if self._spool is None:
                    raise
                logger.warning("%s. The run's description is kept in %s until it can", error, self._spool.root)
        if self._spool is not None:
            self._keep(self._spool, note)

    @staticmethod
    def _keep(spool: Spool, note: RunNote) -> RunNote:
        try:
            with spool.note_lock():
                note = merged(spool.note(), note)
                spool.write_note(note)
        except StorageError as error:
            logger.warning("%s. The run's description cannot be kept there", error)
        return note


def _open(server: Calls, note: RunNote, spool: Spool | None) -> str:
    """The experiment's id; `note.run_id` is the run's when this returns, and MLflow says what the note says."""
    old = None if spool is None else spool.note()
    if old is not None:
        # The status that an earlier attempt could not tell is no longer true; the rest is.
        told = merged(replace(old, status=None, end_time=None), note)
        note.params, note.tags, note.start_time = told.params, told.tags, told.start_time
    existing = note.run_id
    if existing.startswith(LOCAL_PREFIX):
        experiment_id = server.experiment(note.experiment_name, note.artifact_root)
        note.tags[LOCAL_ID_TAG] = existing
        existing = server.find_run(experiment_id, LOCAL_ID_TAG, existing) or ""
    state = _state(server, existing) if existing else None
    if state is not None:
        if state.tags.get(CAUSE_TAG):
            note.tags[CAUSE_TAG] = ""  # of an attempt before this one
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
            "MLflow does not have the run %s any more: it, or its database, was deleted. %s continues in the new MLflow run "
            "%s, without the metrics of before",
            existing,
            note.run_name,
            note.run_id,
        )
    if spool is not None and old is not None:
        spool.drop_note(old)
    return experiment_id


def _state(server: Calls, run_id: str) -> RunState | None:
    """What MLflow has of a run; None where the run is deleted, or not known at all."""
    try:
        state = server.run(run_id)
    except RunGone:
        return None
    return state if state.active else None


def merged(old: RunNote | None, new: RunNote) -> RunNote:
    """Both, the later one over the earlier; but parameters, and when the run started, stay as they were."""
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
    """Who and what made a run, where MLflow's pages look for it."""
    return {"mlflow.user": provenance.user(), "mlflow.source.name": "raytrainer", "mlflow.source.type": "LOCAL"}


def _now() -> int:
    return time.time_ns() // 1_000_000
