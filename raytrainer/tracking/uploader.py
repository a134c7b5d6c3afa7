"""Upload spools: a thread that sends a spool while it grows, and `replay`, which sends what is left at the end."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from raytrainer.core.retry import Backoff
from raytrainer.errors import StorageGone, TrackingDenied, TrackingUnreachable
from raytrainer.tracking.database import default_artifact_root
from raytrainer.tracking.failures import RunGone
from raytrainer.tracking.sender import Busy, Calls, RunNotCreated, Sender
from raytrainer.tracking.server import Server
from raytrainer.tracking.spool import Spool

_LAST_TRIES = 3

logger = logging.getLogger("raytrainer.tracking")


class Uploader:
    """An uploader: a thread that sends a spool while it grows. Another process may write the spool.

    It logs once when the server cannot be used and once when the server is back. After each failure it doubles the
    delay, up to a minute. After 401, 403 or the deletion of the run it stops until it is closed, and then tries one
    last time.

    Args:
        spool_dir: The run's spool.
        run_id: As in `Sender`.
        tracking_uri: The tracking server.
        interval_s: Seconds between two checks of the spool.
        awaited_in: The experiment in which another process creates and ends the run of a local id. This uploader then
            sends only what is logged, and continues after `close` for as long as the process lives.
        server: Replaced in tests; by default it is made from `tracking_uri`.
    """

    def __init__(
        self,
        spool_dir: Path,
        run_id: str,
        tracking_uri: str,
        *,
        interval_s: float = 5.0,
        awaited_in: str | None = None,
        server: Calls | None = None,
    ) -> None:
        self._spool, self._interval_s = Spool(spool_dir), interval_s
        awaited = None if awaited_in is None else (awaited_in, default_artifact_root(tracking_uri))
        self._sends_notes = awaited is None
        # A request may take a minute, because no caller waits for it. A slow server that needs 30 s for a call still
        # works.
        server = server or Server(tracking_uri, timeout_s=60)
        self._sender = Sender(self._spool, run_id, server, awaited=awaited)
        self._closing, self._abandon = threading.Event(), threading.Event()
        self._backoff = Backoff()
        self._is_down = self._is_denied = False
        self._thread = threading.Thread(target=self._loop, name="tracking-uploads", daemon=True)
        self._thread.start()

    def close(self, *, drain: bool = True, timeout_s: float = 30.0) -> bool:
        """End the thread. Return whether everything was sent; the rest stays in the spool for `replay`.

        Args:
            drain: Whether to try to send the rest first. If false, only the current call may finish.
            timeout_s: The longest time to wait, in seconds. A thread that hangs in a call ends with the process.
        """
        if not drain:
            self._abandon.set()
        self._closing.set()
        self._thread.join(timeout_s)
        self._abandon.set()
        if not self._thread.is_alive() and not self._spool.pending(notes=self._sends_notes):
            return True
        if drain and not self._sends_notes and not self._is_denied:
            _leftovers.add(self._spool, self._sender)
        return False

    def _loop(self) -> None:
        while not self._closing.wait(self._backoff.delay_s or self._interval_s):
            if not self._is_denied:
                self._send()
        # The last tries: one lost answer must not leave rows behind, and a dead server must not delay the end of the
        # run.
        for _ in range(_LAST_TRIES):
            if self._abandon.is_set() or self._send() or self._is_denied:
                break
            self._abandon.wait(0.5)

    def _send(self) -> bool:
        try:
            if self._spool.pending(notes=self._sends_notes):
                sent = self._sender.send(self._abandon.is_set)
                if self._is_down:
                    logger.warning("the tracking server is back: %d rows sent", sent)
            self._is_down = False
            self._backoff.succeeded()
            return True
        except Busy:
            self._backoff.succeeded()  # the process that sends reports an outage
        except RunNotCreated:
            # The run will exist later. If the server is down, the process that creates the run reports it.
            self._backoff.failed()
        except (TrackingDenied, RunGone) as error:
            if not self._is_denied:
                logger.warning("%s. Uploading stops; metrics are kept in %s", error, self._spool.root)
            self._is_denied = True
        except Exception as error:  # noqa: BLE001
            # A tracking error must not stop training: the thread continues, logs the error and tries again.
            if not self._is_down:
                kept = f". Metrics are kept in {self._spool.root} and sent when the server answers"
                logger.warning("%s%s", error, "" if isinstance(error, StorageGone) else kept)
            self._is_down = True
            self._backoff.failed()
        return False


class _Leftovers:
    """Spools that were not fully sent when their `Uploader` was closed.

    One thread tries them again while the process lives, because a trial process lives longer than one trial.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Spool, Sender]] = []
        self._thread: threading.Thread | None = None

    def add(self, spool: Spool, sender: Sender) -> None:
        with self._lock:
            self._waiting.append((spool, sender))
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="tracking-leftovers", daemon=True)
                self._thread.start()

    def _loop(self) -> None:
        backoff = Backoff()
        backoff.failed()
        while True:
            time.sleep(backoff.delay_s)
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                spool, sender = self._waiting[0]
            is_done = False
            try:
                sender.send()
                backoff.succeeded()
                if not (is_done := not spool.pending(notes=False)):
                    backoff.failed()
            except (TrackingDenied, RunGone) as error:
                logger.warning("%s. Uploading of %s stops", error, spool.root)
                backoff.succeeded()
                is_done = True
            except Exception as error:  # noqa: BLE001  already logged at close; continue with the next spool
                logger.debug("%s is kept: %s", spool.root, error)
                backoff.failed()
            with self._lock:
                first = self._waiting.pop(0)
                if not is_done:
                    self._waiting.append(first)


_leftovers = _Leftovers()


def replay(
    spool_dir: Path, run_id: str, tracking_uri: str, *, timeout_s: float = 30.0, server: Calls | None = None
) -> int:
    """Send what workers left in the spool and what the driver could not send. Return the number of rows sent.

    The driver calls it at the end of a run. It tries three times, and starts no new try and no new batch after
    `timeout_s` seconds.

    Args:
        spool_dir: The run's spool.
        run_id: The MLflow run id, or a local id.
        tracking_uri: The tracking store.
        timeout_s: The time limit, in seconds.
        server: Replaced in tests.

    Raises:
        TrackingError: Not everything could be sent. The rest stays in the spool, and another `replay` continues from
            there.
    """
    spool = Spool(spool_dir)
    if not spool.pending():
        return 0
    sender = Sender(spool, run_id, server or Server(tracking_uri, timeout_s=60))
    deadline = time.monotonic() + timeout_s
    tries = 0
    while True:
        try:
            sent = sender.send(lambda: time.monotonic() > deadline)
        except (Busy, TrackingUnreachable) as error:
            # A worker that was killed during a call releases its lock when its process ends. A live sender may take
            # longer.
            tries += not isinstance(error, Busy)
            if tries >= _LAST_TRIES or time.monotonic() + 1.0 >= deadline:
                raise
            time.sleep(1.0)
            continue
        if time.monotonic() > deadline and spool.pending():
            raise TrackingUnreachable(f"not everything could be sent in {timeout_s:g} s; the rest is in {spool_dir}")
        return sent
