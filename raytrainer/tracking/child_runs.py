"""Upload the MLflow runs of a sweep's trials in a background thread of the driver.
Trials write to their spools. This thread creates, fills and ends their child runs, with as few requests as MLflow allows.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from raytrainer.core.retry import Backoff
from raytrainer.errors import StorageError, TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.tracking.database import default_artifact_root
from raytrainer.tracking.failures import RunGone
from raytrainer.tracking.runs import CAUSE_TAG, CONTINUES_TAG, Status, merged, source_tags
from raytrainer.tracking.sender import LOCAL_PREFIX, Busy, Calls, NoteMissing, Sender
from raytrainer.tracking.server import Server
from raytrainer.tracking.spool import RunNote, Spool

PARENT_TAG = "mlflow.parentRunId"

_WRITER_S = 5.0  # how long the end of a run waits for a process that still has its spool open
_LAST_TRIES = 3
_LAST_PAUSE_S = 0.2  # between rounds at the end

logger = logging.getLogger("raytrainer.tracking")


@dataclass(eq=False)
class _Child:
    """A child run that is not completely in MLflow yet. Its spool's note says what is missing."""

    spool: Spool
    run_id: str
    name: str
    fresh: bool = False
    reached: bool = False  # MLflow has accepted something for this run
    ended: float | None = None  # on the monotonic clock
    unsaved: RunNote | None = None  # a note that could not be written to disk
    sender: Sender | None = None
    announced: bool = False
    backoff: Backoff = field(default_factory=Backoff)  # after failures of this run alone
    due: float = 0.0


class ChildRunUploader:
    """Creates and uploads the child runs of a parent run, in a daemon thread.

    `open` and `finish` write a small file and return within milliseconds. They raise no error, whatever the server does.
    Their content, and what trials log with `MlflowTracker(…, ship=False)`, reaches MLflow exactly once, metrics before the
    status. Until then it is in the spool. A spool is deleted when its run has ended and is complete in MLflow. A spool
    that is left therefore has something to upload, and a later uploader can `adopt` it.

    An outage is logged once. The uploader tries again after one second and doubles the delay up to a minute. After 401 or
    403 it does not try again until `close`. A run that a person deleted is logged once and tried again in the same way,
    while the other runs continue. Memory grows with the runs that are not complete yet; one file is open at a time.

    Args:
        tracking_uri: An http(s) address, or a database URL with an absolute path.
        experiment_name: The MLflow experiment of the child runs, which is created if it does not exist.
        parent: Returns the parent's MLflow run id, or None while there is none. The thread calls it until it returns an
            id, and creates child runs only after that.
        artifact_root: As in `open_run`.
        interval_s: Seconds between two rounds over the spools.
        on_created: The thread calls it with a spool directory and the MLflow run id, as soon as the id is known. It
            calls it again for a child run that is opened again.
        server: Replaced in tests; by default it is made from `tracking_uri`.

    Attributes:
        cpu_s: CPU seconds that the thread has used.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment_name: str,
        *,
        parent: Callable[[], str | None],
        artifact_root: str | None = None,
        interval_s: float = 2.0,
        on_created: Callable[[Path, str], None] | None = None,
        server: Calls | None = None,
    ) -> None:
        self.cpu_s = 0.0
        self._experiment_name, self._interval_s = experiment_name, interval_s
        self._artifact_root = artifact_root or default_artifact_root(tracking_uri)
        self._ask_parent, self._parent_id = parent, ""
        self._on_created = on_created
        # A request may take a minute, because no caller waits for it.
        self._server = server or Server(tracking_uri, timeout_s=60)
        self._tags = source_tags()
        self._lock = threading.Lock()
        self._children: dict[Path, _Child] = {}
        self._warned: set[str] = set()
        self._backoff = Backoff()
        self._denied = False
        self._closing, self._abandon = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracking-uploader", daemon=True)
        self._thread.start()

    def open(
        self,
        spool_dir: Path,
        run_name: str,
        *,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> str:
        """Open the child run of a trial that starts or continues. Call it before the trial's process writes its spool.

        Args:
            spool_dir: The trial's spool directory, which is created.
            run_name: The name that MLflow shows.
            params: Flat parameter names and values. For a run that continues, only those that it lacks are logged.
            tags: Set each time the run is opened.
            run_id: The MLflow run or local id to continue with; its status becomes RUNNING again. If MLflow no longer has
                the run, a new one continues it, and `on_created` receives its id.

        Returns:
            The run id for `MlflowTracker`: `run_id`, or a local id (`offline-…`) for a new run, whose MLflow run id
            `on_created` receives later.
        """
        child = _Child(Spool(spool_dir), run_id or f"{LOCAL_PREFIX}{uuid.uuid4().hex}", run_name, fresh=run_id is None)
        parent = {PARENT_TAG: self._parent_id} if self._parent_id else {}
        before = {} if child.fresh else {CAUSE_TAG: ""}  # of the attempt before this one
        note = RunNote(
            child.run_id,
            self._experiment_name,
            run_name,
            self._artifact_root,
            dict(params),
            {**self._tags, **parent, **before, **tags},
            _now(),
            status=None if child.fresh else "RUNNING",
        )
        self._write(child, lambda old: merged(old and replace(old, status=None, end_time=None), note))
        with self._lock:
            self._children[child.spool.root] = child
        return child.run_id

    def adopt(self, spool_dir: Path, run_id: str) -> bool:
        """Upload what an earlier process left in a spool, and end the run if that process wanted to end it.

        `finish` may follow if the earlier process could not call it. `open` makes this call unnecessary.

        Returns:
            Whether there is anything to upload; False if the directory does not exist.
        """
        spool = Spool(spool_dir)
        if not spool.root.is_dir():
            return False
        try:
            note = spool.note()
            if note is None and run_id.startswith(LOCAL_PREFIX) and spool.state().run_id is None:
                logger.warning(
                    "%s has no description of the run %s, so its MLflow run cannot be created", spool.root, run_id
                )
                return False
        except StorageError as error:
            logger.warning("%s. This spool is not uploaded", error)
            return False
        child = _Child(spool, run_id, note.run_name if note else "")
        if note is not None and note.end_time is not None:
            child.ended = -_WRITER_S  # long ago, because its writer is dead
        with self._lock:
            self._children[spool.root] = child
        return True

    def finish(
        self,
        spool_dir: Path,
        status: Status,
        cause: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, tuple[float, int, float]] | None = None,
        ended: float | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Set the final status of a trial. Metrics that its process still writes are uploaded before the status.

        A spool that was neither opened nor adopted is ignored.

        Args:
            spool_dir: The directory that was opened or adopted.
            status: The final status.
            cause: One line for the tag `raytrainer.cause`; None leaves the tag as it is.
            tags: Further tags.
            metrics: Name → (value, step, time in seconds since the epoch). Logging the same again changes nothing.
            ended: The end, in seconds since the epoch; default: now.
            texts: Text artifacts: file name → content.
        """
        with self._lock:
            child = self._children.get(Path(spool_dir))
        if child is None:
            return
        for name, text in (texts or {}).items():
            self._attach(child, name, text)
        all_tags = {**(tags or {}), **({} if cause is None else {CAUSE_TAG: cause})}
        end_time = _now() if ended is None else round(1000 * ended)
        note = RunNote(child.run_id, self._experiment_name, child.name, tags=all_tags, status=status, end_time=end_time)
        note.metrics = {key: [value, round(1000 * at), step] for key, (value, step, at) in (metrics or {}).items()}
        child.ended = time.monotonic()
        self._write(child, lambda old: merged(old, note))

    def close(self, timeout_s: float = 30.0) -> bool:
        """Upload what is left, then end the thread. Return whether everything is in MLflow; the rest stays in the spools.

        Args:
            timeout_s: The longest time to wait, in seconds. A thread that hangs in a request ends with the process.
        """
        self._closing.set()
        self._thread.join(timeout_s)
        self._abandon.set()
        return not self._thread.is_alive() and not self._left()

    def _attach(self, child: _Child, name: str, text: str) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, name)
                path.write_text(text, errors="replace")
                child.spool.add_artifact(path, None)
        except (StorageError, OSError) as error:
            self._warn_once("artifact", f"{error}. {name} of a trial is skipped")

    def _write(self, child: _Child, change: Callable[[RunNote | None], RunNote]) -> None:
        with self._lock:
            note: RunNote | None = None
            try:
                with child.spool.note_lock():
                    note = change(child.unsaved or child.spool.note())
                    # No fsync, which can take milliseconds in which no trial starts: the trial journal has the same content.
                    child.spool.write_note(note, durable=False)
                    child.unsaved = None
            except StorageError as error:
                child.unsaved = note or change(child.unsaved)
                self._warn_once(
                    "note", f"{error}. Updates of a trial are kept in memory until its spool can be written"
                )

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning("%s", text)

    def _loop(self) -> None:
        while not self._closing.wait(self._backoff.delay_s or self._interval_s):
            if not self._denied:
                self._try()
        # The last tries: a lost answer must not lose metrics, and a dead server must not delay the end of the sweep.
        failures = 0
        while not self._abandon.is_set() and failures < _LAST_TRIES:
            well = self._try()
            if self._denied or (well and not self._left()):
                break
            failures += not well or not self._parent_id
            self._abandon.wait(_LAST_PAUSE_S)

    def _try(self) -> bool:
        try:
            well = self._send_all()
            if self._backoff.delay_s:
                logger.warning("the tracking server is back")
            self._backoff.succeeded()
            self._denied = False
        except TrackingDenied as error:
            well, self._denied = False, True
            self._warn_once("denied", f"{error}. Uploading stops; trials are kept in their spools")
        except TrackingError as error:
            well = False
            if not self._backoff.delay_s:
                logger.warning("%s. Trials are kept in their spools and sent when the server answers", error)
            self._backoff.failed()
        self.cpu_s = time.thread_time()
        return well

    def _send_all(self) -> bool:
        """Upload each child run once. Return whether all succeeded; raise errors that concern the whole server."""
        well = True
        with self._lock:
            children = list(self._children.values())
        for child in children:
            if self._abandon.is_set():
                return False
            if time.monotonic() < child.due and not self._closing.is_set():
                continue
            try:
                if self._send(child):
                    with self._lock:
                        # The run may have been opened again meanwhile.
                        if self._children.get(child.spool.root) is child:
                            del self._children[child.spool.root]
                child.backoff.succeeded()
                child.reached = True
            except Busy:
                well = False
            except RunGone as error:
                well = False
                if not self._renewed(child, error):
                    self._put_off(child, child.run_id, error)
            except Exception as error:
                if isinstance(error, TrackingDenied | TrackingUnreachable) and not isinstance(error, NoteMissing):
                    raise
                # A problem with one child run must not stop the others or the thread.
                well = False
                self._put_off(child, type(error).__name__, error)
        return well

    def _put_off(self, child: _Child, what: str, error: Exception) -> None:
        self._warn_once(what, f"{error}. The trial is kept in {child.spool.root}")
        child.backoff.failed()
        child.due = time.monotonic() + child.backoff.delay_s

    def _renewed(self, child: _Child, error: RunGone) -> bool:
        """Give a trial a new run if MLflow lost its run before this attempt; return whether it did. A run that a person
        deletes while it is running gets no new one."""
        if child.fresh or child.reached:
            return False
        gone, new = child.run_id, f"{LOCAL_PREFIX}{uuid.uuid4().hex}"
        with child.spool.lock() as alone, child.spool.note_lock():
            note = child.spool.note()
            if not alone or note is None:
                return False
            state = child.spool.state()
            state.run_id = None
            child.spool.write_state(state)
            child.spool.write_note(replace(note, run_id=new, tags={**note.tags, CONTINUES_TAG: gone}))
        child.run_id, child.sender, child.fresh, child.announced = new, None, True, False
        self._warn_once("renewed", f"{error}. Trials whose runs are gone continue in new ones")
        return True

    def _send(self, child: _Child) -> bool:
        """Upload one child run. Return whether it has ended and is complete in MLflow."""
        if (unsaved := child.unsaved) is not None:
            self._write(child, lambda old: old or unsaved)
            if child.unsaved is not None:
                raise StorageError(f"{child.spool.root} cannot be written")
        if child.ended is None and not child.spool.pending():
            return False
        sender = child.sender
        if sender is None:
            parent = self._parent()
            if parent is None and child.run_id.startswith(LOCAL_PREFIX):
                return False
            tags = {} if parent is None else {PARENT_TAG: parent}
            sender = child.sender = Sender(child.spool, child.run_id, self._server, tags=tags, fresh=child.fresh)
        wait = child.ended is not None and time.monotonic() < child.ended + _WRITER_S and not self._closing.is_set()
        try:
            keep = child.ended is None  # until `finish`, the owner of the trial may read its last evaluation
            return sender.send_and_end(self._abandon.is_set, wait_for_writer=wait, keep_newest=keep)
        finally:
            if sender.real_id is not None and not child.announced:
                child.announced = True
                self._announce(child.spool.root, sender.real_id)

    def _announce(self, spool_dir: Path, run_id: str) -> None:
        if self._on_created is None:
            return
        try:
            self._on_created(spool_dir, run_id)
        except Exception as error:  # noqa: BLE001  # an error in the caller's function must not stop the upload
            logger.warning("the id of the run %s could not be recorded: %s", run_id, error)

    def _parent(self) -> str | None:
        if not self._parent_id:
            self._parent_id = self._ask_parent() or ""
        return self._parent_id or None

    def _left(self) -> bool:
        with self._lock:
            children = list(self._children.values())
        return any(child.ended is not None or child.unsaved or _pending(child.spool) for child in children)


def _pending(spool: Spool) -> bool:
    try:
        return spool.pending()
    except StorageError:
        return True


def _now() -> int:
    return time.time_ns() // 1_000_000
