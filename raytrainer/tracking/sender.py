"""Send a spool to MLflow exactly once: acknowledged rows are never sent again, rows without an answer are repeated.
`Sender.send` is the only place that decides which rows are sent.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from raytrainer.errors import TrackingError, TrackingUnreachable
from raytrainer.tracking.failures import Rejected, RunGone
from raytrainer.tracking.segments import MAX_ROWS, Segment, SpoolBatch, SpoolRow, discard_if_finished, read_batch
from raytrainer.tracking.server import RunState
from raytrainer.tracking.spool import RunNote, Spool, SpoolArtifact, State

SYSTEM_PREFIX = "system/"
LOCAL_PREFIX = "offline-"
LOCAL_ID_TAG = "raytrainer.offline_id"
DROPPED_TAG = "raytrainer.dropped_rows"

logger = logging.getLogger("raytrainer.tracking")


class Calls(Protocol):
    """The methods of `Server` that sending needs."""

    def with_timeout(self, timeout_s: int) -> Calls: ...
    def log_batch(
        self, run_id: str, rows: Sequence[SpoolRow], tags: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> None: ...
    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None: ...
    def run(self, run_id: str) -> RunState: ...
    def experiment(self, name: str, artifact_root: str | None) -> str: ...
    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_time: int | None) -> str: ...
    def find_run(self, experiment_id: str, tag: str, value: str) -> str | None: ...
    def set_running(self, run_id: str) -> None: ...
    def set_terminated(self, run_id: str, status: str, end_time: int) -> None: ...


class Busy(TrackingError):
    """Another process is sending this spool."""


class NoteMissing(TrackingUnreachable):
    """A run that was opened without a server cannot be created, because its note is missing or not written yet."""


class RunNotCreated(NoteMissing):
    """The run that another process has to create does not exist yet."""


class Content(NamedTuple):
    """The content of one request."""

    rows: Sequence[SpoolRow]
    tags: Mapping[str, str]
    params: Mapping[str, str]

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.tags) + len(self.params)

    def parts(self) -> list[Content]:
        """Split the content: by kind if it has several kinds, otherwise in halves."""
        rows, tags, params = self
        if sum(map(bool, self)) > 1:
            return [Content(rows, {}, {}), Content([], tags, {}), Content([], {}, params)]
        halves = slice(self.size // 2), slice(self.size // 2, None)
        return [Content(rows[s], dict(list(tags.items())[s]), dict(list(params.items())[s])) for s in halves]


NOTHING = Content([], {}, {})


class Sender:
    """The sender of one run's spool. Its state in memory only saves requests.

    Args:
        spool: The spool.
        run_id: The MLflow run id, or the local id of a run that was opened without a server.
        server: The tracking server.
        tags: Tags for the run, in addition to the note's, if this sender creates it.
        fresh: Whether this process made the local id and passed it to no other sender. No MLflow run can have it yet.
        awaited: Set if another process creates the run of the local id and sends everything except what is logged. It
            holds the experiment's name and artifact root, by which the run is found.

    Attributes:
        real_id: The MLflow run id, once it is known.
    """

    def __init__(
        self,
        spool: Spool,
        run_id: str,
        server: Calls,
        *,
        tags: Mapping[str, str] | None = None,
        fresh: bool = False,
        awaited: tuple[str, str | None] | None = None,
    ) -> None:
        self._spool, self._run_id, self._server = spool, run_id, server
        self._tags = dict(tags or {})
        self._fresh, self._awaited = fresh, awaited
        self._no_rows = self._no_params = False  # whether this sender created the run and has sent it none
        self._described: RunNote | None = None  # the note whose parameters and tags were sent
        self._ended: RunNote | None = None  # the note whose final status was sent
        self._warned: set[str] = set()
        self.real_id = None if run_id.startswith(LOCAL_PREFIX) else run_id

    def send(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Send the whole spool in order, and return the number of rows that MLflow accepted.

        It stops early when `stop()` is true.

        A row is sent unless its step is at or below the floor of its key. The floor is the last step that MLflow had
        before the first row of the same attempt was sent. It is written to disk before that row is sent. A
        restarted worker that repeats steps therefore logs nothing twice, and a row that was sent but not acknowledged
        is sent again unchanged.

        Raises:
            Busy: Another sender holds the lock.
            TrackingUnreachable, TrackingDenied, RunGone: As in `Server`. Rows acknowledged before the error stay
                acknowledged.
        """
        with self._alone() as state:
            run_id = self._resolve(state)
            note = None if self._awaited else self._spool.note()
            if note is not None:
                apply_note(self._server, run_id, note)
                self._spool.drop_note(note)
            return self._send_all(run_id, state, stop)

    def send_and_end(
        self, stop: Callable[[], bool] = lambda: False, *, wait_for_writer: bool = False, keep_newest: bool = False
    ) -> bool:
        """Send everything like `send`, in as few requests as possible, and end the run.

        The note's parameters and tags are sent with the first rows. The final status is sent last; after it, nothing is
        left that could be sent twice.

        Args:
            stop: As in `send`.
            wait_for_writer: Do not send the final status while a process has a segment open, because it may add rows.
            keep_newest: Do not delete the newest segment after it is sent, so that `last_logged` can still read it.

        Returns:
            Whether the run has ended and its spool is deleted.

        Raises:
            TrackingError: As in `send`.
        """
        with self._alone() as state:
            run_id = self._resolve(state)
            note = self._spool.note()
            if note is None:
                self._send_all(run_id, state, stop, keep_newest=keep_newest)
                return False
            if note.status == "RUNNING":
                self._server.set_running(run_id)
            self._send_all(run_id, state, stop, self._unsent(run_id, note), keep_newest=keep_newest)
            self._described = note
            if note.end_time is None:
                self._spool.drop_note(note)
                return False
            rest = bool(self._spool.segments() or any(self._spool.artifacts()))
            if stop() or (rest and wait_for_writer):
                return False
            if note != self._ended:
                self._server.set_terminated(run_id, note.status or "FINISHED", note.end_time)
                self._ended = note
            return not rest and self._spool.remove(note)

    @contextmanager
    def _alone(self) -> Iterator[State]:
        with self._spool.lock() as alone:
            if not alone:
                raise Busy(f"another process is sending {self._spool.root}")
            yield self._spool.state()

    def _unsent(self, run_id: str, note: RunNote) -> Content:
        """Return what MLflow may not have of the note."""
        old = self._described
        if note == old:
            return NOTHING
        rows = [row for row in note.rows if old is None or row not in old.rows]
        tags = {key: value for key, value in note.tags.items() if old is None or old.tags.get(key) != value}
        params = note.params
        if params and not self._no_params:
            known = self._server.run(run_id).params
            params = {key: value for key, value in params.items() if key not in known}
        return Content(rows, tags, params)

    def _send_all(
        self,
        run_id: str,
        state: State,
        stop: Callable[[], bool],
        content: Content = NOTHING,
        *,
        keep_newest: bool = False,
    ) -> int:
        """Send the note's content with the first rows, then artifacts. Return the number of accepted rows."""
        sent = 0
        segments = self._spool.segments()
        for segment in segments:
            while not stop():
                batch = read_batch(segment, state.acked.get(segment.path.name, 0))
                if batch.end == state.acked.get(segment.path.name, 0):
                    if not (keep_newest and segment is segments[-1]):
                        discard_if_finished(segment, batch.end)
                    break
                sent += self._send_batch(segment, batch, run_id, state, content)
                content = NOTHING
        self._log(run_id, content)
        for artifact in self._spool.artifacts():
            if stop():
                break
            self._upload(artifact, run_id)
        return sent

    def _send_batch(self, segment: Segment, batch: SpoolBatch, run_id: str, state: State, content: Content) -> int:
        """Send a batch and further content. Return the number of accepted rows."""
        if batch.rows and segment.attempt not in state.floors:
            state.floors[segment.attempt] = {} if self._no_rows else self._server.run(run_id).steps
            self._spool.write_state(state)
        if batch.broken:
            logger.warning("%s: %d lines cannot be read and are skipped", segment.path, batch.broken)
        rows = self._above_floor(batch.rows, state.floors.get(segment.attempt, {}))
        if len(rows) + len(content.rows) > MAX_ROWS:
            self._log(run_id, Content(content.rows, {}, {}))
        else:
            rows += content.rows
        refused, refused_texts = self._log(run_id, Content(rows, {**content.tags, **batch.tags}, content.params))
        lost = refused + refused_texts + batch.dropped + batch.broken
        if lost:
            state.dropped += lost
            self._server.log_batch(run_id, [], {DROPPED_TAG: str(state.dropped)})
        state.acked[segment.path.name] = batch.end
        self._spool.write_state(state)
        return len(rows) - refused

    @staticmethod
    def _above_floor(rows: list[SpoolRow], floor: dict[str, int]) -> list[SpoolRow]:
        # The steps of system metrics start at 0 in each attempt and are never measured twice, so they continue after
        # the floor of their node.
        base: dict[str, int] = {}
        for key, step in floor.items():
            if key.startswith(SYSTEM_PREFIX):
                base[_node_of(key)] = max(base.get(_node_of(key), 0), step + 1)
        kept = []
        for row in rows:
            if row.key.startswith(SYSTEM_PREFIX):
                kept.append(row._replace(step=row.step + base.get(_node_of(row.key), 0)))
            elif row.step > floor.get(row.key, row.step - 1):
                kept.append(row)
        return kept

    def _log(self, run_id: str, content: Content) -> tuple[int, int]:
        """Log one batch. If MLflow rejects it because of its content, find the entries at fault and log the others.

        Returns:
            The number of rejected rows, and the number of rejected tags and parameters.
        """
        if not content.size:
            return 0, 0
        rows, tags, params = content
        self._no_rows, self._no_params = self._no_rows and not rows, self._no_params and not params
        try:
            self._server.log_batch(run_id, *content)
            return 0, 0
        except Rejected as error:
            _check_active(self._server, run_id)
            if content.size == 1:
                key = rows[0].key if rows else next(iter({**tags, **params}))
                if key not in self._warned:
                    self._warned.add(key)
                    logger.warning("MLflow refuses %r, which is skipped: %s", key, error)
                return len(rows), len(tags) + len(params)
        refused = [self._log(run_id, part) for part in content.parts()]
        return sum(rows for rows, _ in refused), sum(texts for _, texts in refused)

    def _upload(self, artifact: SpoolArtifact, run_id: str) -> None:
        try:
            self._server.log_artifact(run_id, artifact.path, artifact.folder)
        except Rejected as error:
            logger.warning("MLflow refuses the artifact %s, which is skipped: %s", artifact.path.name, error)
        shutil.rmtree(artifact.entry)

    def _resolve(self, state: State) -> str:
        """Return the MLflow run id. For a local id, create the run if it does not exist."""
        if not self._run_id.startswith(LOCAL_PREFIX):
            return self._run_id
        if state.run_id is None and self._awaited:
            experiment = self._server.experiment(*self._awaited)
            state.run_id = self._server.find_run(experiment, LOCAL_ID_TAG, self._run_id)
            if state.run_id is None:
                raise RunNotCreated(f"the run {self._run_id} does not exist yet")
            self._spool.write_state(state)
        elif state.run_id is None:
            note = self._spool.note()
            if note is None:
                raise NoteMissing(f"{self._spool.root} has no description of the run {self._run_id}")
            experiment = self._server.experiment(note.experiment_name, note.artifact_root)
            # The run may exist: a sender may have created it and died before it recorded the id, or it may not have
            # received the answer.
            if not self._fresh:
                state.run_id = self._server.find_run(experiment, LOCAL_ID_TAG, note.run_id)
            self._fresh = False
            if state.run_id is None:
                tags = {**note.tags, **self._tags, LOCAL_ID_TAG: note.run_id}
                state.run_id = self._server.create_run(experiment, note.run_name, tags, note.start_time)
                self._no_rows = self._no_params = True
                self._described = replace(note, params={}, metrics={})
            self._spool.write_state(state)
        self.real_id = state.run_id
        return state.run_id


def _node_of(key: str) -> str:
    """Return the node of a system metric: `node-1` for `system/node-1/disk_usage_percentage`, empty for node 0."""
    return key.removeprefix(SYSTEM_PREFIX).rpartition("/")[0]


def apply_note(server: Calls, run_id: str, note: RunNote) -> None:
    """Apply a note to the run in MLflow. MLflow stores each parameter once, so existing parameters stay unchanged.

    Raises:
        RunGone: The run was deleted.
    """
    if note.params:
        known = server.run(run_id).params
        new = {key: value for key, value in note.params.items() if key not in known}
        try:
            server.log_batch(run_id, [], {}, new)
        except Rejected as error:
            _check_active(server, run_id)
            logger.warning("MLflow refuses the parameters: %s", error)
    try:
        server.log_batch(run_id, note.rows, note.tags)
    except Rejected as error:
        _check_active(server, run_id)
        logger.warning("MLflow refuses the tags or metrics: %s", error)
    if note.status is not None and note.end_time is not None:
        server.set_terminated(run_id, note.status, note.end_time)
    elif note.status == "RUNNING":
        server.set_running(run_id)


def _check_active(server: Calls, run_id: str) -> None:
    """Check that the run was not deleted. A deleted run rejects every call, whatever its content.

    Raises:
        RunGone: The run was deleted.
    """
    if not server.run(run_id).active:
        raise RunGone(f"the MLflow run {run_id} is deleted") from None


def recorded_run_id(spool_dir: Path) -> str | None:
    """Return the MLflow run id of a run that was opened without a server; None if it has none yet."""
    return Spool(spool_dir).state().run_id
