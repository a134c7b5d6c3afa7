"""The tracker of MLflow: a queue for the training loop, a thread that writes to disk, and a thread that uploads.
A call from the training loop takes microseconds, however slow the disk and the server are."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrainer.errors import StorageError
from raytrainer.tracking.keys import MetricKeys
from raytrainer.tracking.segments import SegmentWriter, line
from raytrainer.tracking.spool import Spool
from raytrainer.tracking.system_metrics import SystemSampler
from raytrainer.tracking.uploader import Uploader

_TICK_S = 0.5  # a row is on disk after this time and one write
_QUEUE_ENTRIES = 100_000  # calls of log_metrics between two ticks
_MEMORY_BYTES = 8 * 2**20  # for lines that could not be written to disk yet
_SEGMENT_BYTES = 4 * 2**20
_KEY_BYTES = 250
_FIRST_SYSTEM_S = 1.0

logger = logging.getLogger("raytrainer.tracking")


class MlflowTracker:
    """The tracker of one run. It logs to disk within a second, and to MLflow when the server answers.

    No method fails or waits because of the server. If there is no room, the newest rows are dropped, and rows on disk
    are kept. Dropped rows are counted, reported once, and added to the run's tag `raytrainer.dropped_rows`.

    Args:
        run_id: The MLflow run id, or the local id that `open_run` made without a server.
        tracking_uri: Must be absolute, because a worker has another current directory.
        spool_dir: The run's own directory on a disk that outlives the process.
        flush_interval_s: Seconds between batches to MLflow.
        max_spool_bytes: The maximum size of the spool in bytes, artifacts included.
        system_metrics: Whether to log CPU, memory, disk, network and GPU use of this node as `system/…`.
        node: The number of this node in the run, for the names of its system metrics, as in `SystemSampler`.
        system_interval_s: Seconds between two samples of system metrics.
        ship: Whether this process sends. If false, it never imports mlflow (1.3 s), and another process must send.
        awaited_in: As in `Uploader`.

    Raises:
        StorageError: The spool cannot be written at all.
    """

    def __init__(
        self,
        run_id: str,
        tracking_uri: str,
        spool_dir: Path,
        *,
        flush_interval_s: float = 5.0,
        max_spool_bytes: int = 256 * 2**20,
        system_metrics: bool = True,
        system_interval_s: float = 10.0,
        node: int = 0,
        ship: bool = True,
        awaited_in: str | None = None,
    ) -> None:
        self._max_spool_bytes = max_spool_bytes
        self._spool = Spool(spool_dir)
        self._queue: deque[tuple[Any, ...]] = deque()
        self._refused = 0  # rows refused because the queue was full; only callers increase it
        self._reported_refusals = 0
        self._lines: deque[tuple[bytes, int]] = deque()  # not yet on disk: lines with their numbers of rows
        self._line_bytes = 0
        self._dropped = 0
        self._warned: set[str] = set()
        self._keys = MetricKeys()
        self._system: SystemSampler | None = None
        self._system_metrics, self._node = system_metrics, node
        self._system_interval_s = system_interval_s
        self._system_due = time.monotonic() + min(_FIRST_SYSTEM_S, system_interval_s)
        self._system_step = 0
        self._closed = False
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._writer = SegmentWriter(self._spool, min(_SEGMENT_BYTES, max(max_spool_bytes // 8, 4096)))
        self._uploader: Uploader | None = None
        if ship:
            self._uploader = Uploader(
                spool_dir, run_id, tracking_uri, interval_s=flush_interval_s, awaited_in=awaited_in
            )
        self._thread = threading.Thread(target=self._loop, name="tracking-spool", daemon=True)
        self._thread.start()
        # A process that ends without close() still writes its last half second to disk.
        atexit.register(self._flush)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the values of one step as plain numbers, also NaN and infinities (MLflow stores ±inf as ±1.8e308)."""
        if self._closed or len(self._queue) >= _QUEUE_ENTRIES:
            self._refused += len(metrics)
            return
        self._queue.append(("m", time.time_ns() // 1_000_000, step, dict(metrics)))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        if self._closed or len(self._queue) >= _QUEUE_ENTRIES:
            self._refused += len(tags)
            return
        self._queue.append(("t", dict(tags)))

    def log_artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Copy a file or directory to the spool at once, and upload the copy into `folder` later."""
        source = Path(path)
        try:
            size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.rglob("*")))
            if self._spool.size() + size > self._max_spool_bytes:
                logger.warning("the artifact %s is skipped: %s is full", source, self._spool.root)
                return
            self._spool.add_artifact(source, folder)
        except (OSError, StorageError) as error:
            logger.warning("the artifact %s is skipped: %s", source, error)

    def flush(self) -> None:
        """Write everything logged so far to disk and wait for it. Any thread may call it; disk errors are only logged.

        Call it before a checkpoint: a run that continues from a checkpoint does not log the steps before it again.
        """
        if not self._closed:
            self._flush()

    def close(self, *, timeout_s: float = 30.0) -> None:
        """Write everything to disk, then send it, if this process sends. The rest stays in the spool for `replay`.

        Args:
            timeout_s: The longest time to wait for the server, in seconds.
        """
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        self._thread.join()
        self._flush(last=True)
        atexit.unregister(self._flush)
        self._writer.close()
        if self._uploader is not None and not self._uploader.close(timeout_s=timeout_s):
            logger.warning("not everything is in MLflow yet: the rest is kept in %s", self._spool.root)

    def _loop(self) -> None:
        # Poll instead of waiting on the queue, so that a put never wakes this thread in the middle of a step.
        while not self._stop.wait(_TICK_S):
            self._flush()

    def _flush(self, last: bool = False) -> None:
        with self._writing:
            for _ in range(len(self._queue)):
                self._encode(self._queue.popleft())
            if self._system_metrics:
                self._sample(last)
            refused = self._refused
            if refused > self._reported_refusals:
                self._drop(refused - self._reported_refusals, "the queue in memory is full")
                self._reported_refusals = refused
            if self._lines or self._dropped:
                self._write(last)

    def _sample(self, last: bool) -> None:
        if self._system is None:
            self._system = SystemSampler(self._node)  # not in the constructor, because NVML may take a while
        elif last or time.monotonic() >= self._system_due:
            self._encode(("m", time.time_ns() // 1_000_000, self._system_step, self._system.sample()))
            self._system_step += 1
            self._system_due = time.monotonic() + self._system_interval_s

    def _encode(self, entry: tuple[Any, ...]) -> None:
        rows: dict[str, Any]
        try:
            if entry[0] == "m":
                _, milliseconds, step, metrics = entry
                for sentence in self._keys.add(map(str, metrics)):
                    logger.warning("%s", sentence)
                rows = {self._keys[str(name)]: float(value) for name, value in metrics.items()}
                data = line("m", milliseconds, int(step), rows)
            else:
                rows = {str(key)[:_KEY_BYTES]: str(value) for key, value in entry[1].items()}
                data = line("t", rows)
        except (TypeError, ValueError, OverflowError) as error:
            self._drop(len(entry[-1]), f"one of {sorted(map(str, entry[-1]))} is not a number ({error})")
            return
        if not rows:
            return
        if self._line_bytes + len(data) > _MEMORY_BYTES:
            self._drop(len(rows), f"{self._spool.root} cannot be written")
            return
        self._lines.append((data, len(rows)))
        self._line_bytes += len(data)

    def _write(self, last: bool) -> None:
        room = self._max_spool_bytes - self._spool.size()
        if self._line_bytes > room:
            self._drop(
                sum(rows for _, rows in self._lines),
                f"{self._spool.root} has reached its limit, max_spool_bytes={self._max_spool_bytes}",
            )
            self._lines.clear()
            self._line_bytes = 0
        lines = [data for data, _ in self._lines]
        # The count of dropped rows is written even beyond the size limit, because it is only one line.
        dropped = self._dropped
        if dropped and (lines or last):
            lines.append(line("dropped", dropped))
        if not lines:
            return
        try:
            self._writer.append(b"".join(lines))
        except StorageError as error:
            self._warn_once("disk", f"{error}; metrics are kept in memory, up to {_MEMORY_BYTES >> 20} MB")
            if last and self._lines:
                logger.error("%s; %d metrics are lost", error, sum(rows for _, rows in self._lines))
            return
        self._lines.clear()
        self._line_bytes = 0
        if dropped and lines[-1].startswith(b'["dropped"'):
            self._dropped -= dropped

    def _drop(self, rows: int, why: str) -> None:
        self._dropped += rows
        self._warn_once(why.split("=")[0], f"metrics are dropped: {why}")

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning("%s", text)
