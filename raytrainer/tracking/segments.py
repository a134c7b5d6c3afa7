"""Segments: the files of a spool that hold metrics and tags, one JSON array a line.

A segment's first line is `["segment", 1]` (the format's version). Further lines are
`["m", time in ms, step, {key: value}]`, `["t", {tag: value}]` and `["dropped", rows]`. Each line holds its time, so
sending a line twice produces the same rows.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from raytrainer.core import atomic
from raytrainer.errors import StorageError
from raytrainer.storage.os_errors import storage_errors

FORMAT = 1
MAX_ROWS = 1000  # MLflow's limits for one log_batch call: metrics, tags, and bytes of a request (1 MB) with a margin
MAX_TAGS = 100
MAX_BATCH_BYTES = 400_000

_SEGMENT = re.compile(r"metrics-(\d{6,})-([0-9a-f]{8})\.jsonl")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class SegmentFolder(Protocol):
    """The part of a `Spool` that its segments need."""

    root: Path

    def create(self) -> None: ...
    def segments(self) -> list[Segment]: ...


class SpoolRow(NamedTuple):
    """One metric value; `time` is in milliseconds since the epoch."""

    key: str
    value: float
    time: int
    step: int


class SpoolBatch(NamedTuple):
    """Whole lines of a segment, up to byte `end`. `broken` counts lines that cannot be parsed."""

    rows: list[SpoolRow]
    tags: dict[str, str]
    dropped: int
    broken: int
    end: int


class Segment(NamedTuple):
    """A file of lines. `attempt` identifies the writer that created it; each start of a process is another writer."""

    path: Path
    number: int
    attempt: str


def segments_in(folder: Path) -> Iterator[Segment]:
    """Yield the segments in a spool's folder, in any order."""
    for name in names_in(folder):
        if match := _SEGMENT.fullmatch(name):
            yield Segment(folder / name, int(match[1]), match[2])


class SegmentWriter:
    """The writer of an attempt's segments, which appends whole lines durably. One thread at a time uses it.

    Args:
        spool: The spool.
        segment_bytes: The size after which a new segment begins, so that sent segments can be deleted.
    """

    def __init__(self, spool: SegmentFolder, segment_bytes: int) -> None:
        self.attempt = uuid.uuid4().hex[:8]
        self._spool, self._segment_bytes = spool, segment_bytes
        self._path, self._descriptor, self._end = Path(), -1, 0
        self._begin()

    def append(self, data: bytes) -> None:
        """Write lines and wait for the disk. After an error, no part of `data` is left in the file.

        Raises:
            StorageFull: No space is left.
            StorageError: Any other error of the file system.
        """
        # On a file system without locks, a sender may take an open segment for a finished one and delete it after
        # sending.
        if self._end >= self._segment_bytes or not self._path.exists():
            before = self._descriptor
            self._begin()
            os.close(before)
        with storage_errors(self._path):
            try:
                _write(self._descriptor, data)
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, self._end)
                raise
        self._end += len(data)

    def close(self) -> None:
        """Close the segment. An empty one is deleted; any other may be deleted once it is sent."""
        if self._descriptor >= 0:
            if self._end <= HEADER_BYTES:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _begin(self) -> None:
        self._spool.create()
        number = max((segment.number for segment in self._spool.segments()), default=0) + 1
        path = self._spool.root / f"metrics-{number:06d}-{self.attempt}.jsonl"
        partial = path.with_suffix(".partial")
        with storage_errors(path):
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            try:
                # Lock the file before it gets its name, so that a segment that a sender can see and lock has no writer.
                flock(descriptor)
                _write(descriptor, _HEADER)
                os.fsync(descriptor)
                partial.replace(path)
                atomic.sync(path.parent)
            except OSError:
                os.close(descriptor)
                partial.unlink(missing_ok=True)
                raise
        self._path, self._descriptor, self._end = path, descriptor, len(_HEADER)


def line(*fields: Any) -> bytes:
    """Return a line of a segment. NaN and infinities are written as Python's json writes and reads them."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


_HEADER = line("segment", FORMAT)
HEADER_BYTES = len(_HEADER)


class _BatchBuilder:
    """Collects the content of lines, within the limits of one call."""

    def __init__(self) -> None:
        self.rows: list[SpoolRow] = []
        self.tags: dict[str, str] = {}
        self.dropped = self.broken = 0

    def add(self, segment: Segment, raw: bytes) -> bool:
        """Add a line. Return False if it does not fit beside what is there."""
        try:
            kind, *fields = json.loads(raw)
            if kind == "segment":
                _check_format(segment, fields)
            elif kind == "m":
                time, step, metrics = fields
                rows = [SpoolRow(str(key), float(value), int(time), int(step)) for key, value in metrics.items()]
                if self.rows and len(self.rows) + len(rows) > MAX_ROWS:
                    return False
                self.rows += rows
            elif kind == "t":
                if self.tags and len(self.tags) + len(fields[0]) > MAX_TAGS:
                    return False
                self.tags |= {str(key): str(value) for key, value in fields[0].items()}
            elif kind == "dropped":
                self.dropped += int(fields[0])
            else:
                self.broken += 1
        except (ValueError, TypeError, AttributeError, IndexError):
            self.broken += 1
        return True


def _check_format(segment: Segment, fields: list[Any]) -> None:
    if fields != [FORMAT]:
        raise StorageError(f"{segment.path} has format {fields}, this version reads {FORMAT}")


def read_batch(segment: Segment, offset: int) -> SpoolBatch:
    """Read whole lines from `offset`, within the limits of one call (a single line may exceed them).

    A last line without a newline is incomplete, because its writer is still writing or has died. It is not read.

    Raises:
        StorageError: The segment has another format version.
    """
    batch, end = _BatchBuilder(), offset
    with storage_errors(segment.path), segment.path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n") or not batch.add(segment, raw):
                break
            end += len(raw)
            if end - offset >= MAX_BATCH_BYTES:
                break
    return SpoolBatch(batch.rows, batch.tags, batch.dropped, batch.broken, end)


def last_logged(spool: SegmentFolder, key: str) -> tuple[float, int, dict[str, float]] | None:
    """Return the newest line that has a value of `key`: seconds since the epoch, the step, and all metrics of the line.

    Returns None if no segment has one. Segments that are sent and have no writer may already be deleted.

    Raises:
        StorageError: A segment cannot be read.
    """
    for segment in reversed(spool.segments()):
        with storage_errors(segment.path):
            lines = segment.path.read_bytes().split(b"\n")
        for raw in reversed(lines[:-1]):  # a line without a newline is incomplete
            with suppress(ValueError, TypeError, AttributeError):
                kind, *fields = json.loads(raw)
                if kind == "m" and key in fields[2]:
                    return fields[0] / 1000, int(fields[1]), {name: float(value) for name, value in fields[2].items()}
    return None


def discard_if_finished(segment: Segment, acked: int) -> bool:
    """Delete a segment that has no writer and whose whole lines are all sent. Return whether it was deleted."""
    with storage_errors(segment.path), segment.path.open("rb") as file:
        if not flock(file.fileno()):
            return False
        file.seek(acked)
        if b"\n" in file.read():
            return False
        segment.path.unlink()
    return True


def flock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock a file. Return False if another process has it locked, True also on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def names_in(path: Path) -> list[str]:
    """Return the names in a folder; empty if it does not exist."""
    with storage_errors(path):
        try:
            return [entry.name for entry in path.iterdir()]
        except FileNotFoundError:
            return []


def size(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
