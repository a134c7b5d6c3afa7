"""The spool of a run: files with everything that MLflow does not have yet. They survive the death of any process.
This module defines only the formats and their invariants. It has no threads and uses no network.

    metrics-000001-4f1c09aa.jsonl   a segment: one JSON array per line; the 8 hex digits name the attempt that wrote it
    state.json                      what MLflow has acknowledged; only the holder of send.lock replaces it, atomically
    run.json                        what the driver could not send to MLflow yet (see `RunNote`)
    artifacts/                      copies of files to upload, one directory each

A segment's first line is `["segment", 1]` (the format's version). Further lines are
`["m", time in ms, step, {key: value}]`, `["t", {tag: value}]` and `["dropped", rows]`. Each line holds its time, so
sending a line twice produces the same rows.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from raytrainer.errors import StorageError, StorageFull, StorageGone
from raytrainer.storage import Storage

FORMAT = 1
MAX_ROWS = 1000  # MLflow's limits for one log_batch call: metrics, tags, and bytes of a request (1 MB) with a margin
MAX_TAGS = 100
MAX_BATCH_BYTES = 400_000

_SEGMENT = re.compile(r"metrics-(\d{6,})-([0-9a-f]{8})\.jsonl")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def spool_of(place: Storage) -> Path:
    """Return the spool directory of a run, sweep or trial: in its directory if that is local, else on this machine.

    On this machine, the path depends on the user and on the storage, because another user or another storage may have a
    run with the same name.
    """
    if place.is_local:
        return place.local_path / "spool"
    name = hashlib.sha256(place.display.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"raytrainer-{os.getuid()}", "spools", name)


class Row(NamedTuple):
    """One metric value; `time` is in milliseconds since the epoch."""

    key: str
    value: float
    time: int
    step: int


class Batch(NamedTuple):
    """Whole lines of a segment, up to byte `end`. `broken` counts lines that cannot be parsed."""

    rows: list[Row]
    tags: dict[str, str]
    dropped: int
    broken: int
    end: int


class Segment(NamedTuple):
    """A file of lines. `attempt` identifies the writer that created it; each start of a process is another writer."""

    path: Path
    number: int
    attempt: str


class Artifact(NamedTuple):
    """A file or directory to upload into `folder` of the run's artifacts. `entry` is deleted after the upload."""

    entry: Path
    path: Path
    folder: str | None


@dataclass
class State:
    """What the sender remembers.

    Attributes:
        acked: For each segment, the number of bytes that are in MLflow.
        floors: For each attempt, the last step of each key that MLflow had before the attempt's first row was sent.
        dropped: The number of lost rows, over all attempts.
        run_id: The MLflow run id of a run that was opened without a server.
    """

    acked: dict[str, int] = field(default_factory=dict)
    floors: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: int = 0
    run_id: str | None = None
    version: int = FORMAT


@dataclass
class RunNote:
    """Changes to a run, applied when MLflow can be reached. Applying them twice changes nothing.

    `run_id` may be a local id. Times are in milliseconds since the epoch. `status` is RUNNING for a run that continues
    after it ended; otherwise it comes with an `end_time`. `metrics` maps keys to values with their time and step.
    """

    run_id: str
    experiment_name: str
    run_name: str
    artifact_root: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    start_time: int | None = None
    status: str | None = None
    end_time: int | None = None
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    version: int = FORMAT

    @property
    def rows(self) -> list[Row]:
        return [Row(key, *found) for key, found in self.metrics.items()]


class Spool:
    """The spool directory. It is created by `create` or the first write, unless its parent was deleted."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._is_in_place = self.root.parent.is_dir()

    def create(self) -> None:
        """Make the directory.

        Raises:
            StorageGone: The parent directory existed earlier and no longer does.
        """
        if self._is_in_place and not self.root.parent.is_dir():
            raise StorageGone(f"The run's directory {self.root.parent} is gone: it was deleted or moved during the run")
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        self._is_in_place = True

    # Segments

    def segments(self) -> list[Segment]:
        """Return all segments, in the order in which their rows were logged."""
        return sorted(self._segments(), key=lambda segment: (segment.number, segment.attempt))

    def _segments(self) -> Iterator[Segment]:
        for name in _names(self.root):
            if match := _SEGMENT.fullmatch(name):
                yield Segment(self.root / name, int(match[1]), match[2])

    def size(self) -> int:
        """Return the bytes on disk: segments, and files waiting for upload."""
        total = sum(_size(segment.path) for segment in self._segments())
        for folder, _, names in os.walk(self.root / "artifacts"):
            total += sum(_size(Path(folder, name)) for name in names)
        return total

    def pending(self, *, notes: bool = True) -> bool:
        """Return whether there is anything to send.

        Args:
            notes: Whether the driver's note counts.
        """
        if (notes and self.note_path.exists()) or any(self.artifacts()):
            return True
        segments = self.segments()
        if not segments:
            return False
        acked = self.state().acked
        return any(_size(segment.path) > max(acked.get(segment.path.name, 0), _HEADER_BYTES) for segment in segments)

    # State and note

    def state(self) -> State:
        data = _read_json(self.root / "state.json")
        return State() if data is None else State(**data)

    def write_state(self, state: State) -> None:
        """Write the state without segments that no longer exist. The caller holds the lock."""
        segments = list(self._segments())
        names, attempts = {segment.path.name for segment in segments}, {segment.attempt for segment in segments}
        state.acked = {name: offset for name, offset in state.acked.items() if name in names}
        state.floors = {attempt: floor for attempt, floor in state.floors.items() if attempt in attempts}
        _replace(self.root / "state.json", asdict(state))

    @property
    def note_path(self) -> Path:
        return self.root / "run.json"

    def note(self) -> RunNote | None:
        data = _read_json(self.note_path)
        return None if data is None else RunNote(**data)

    def write_note(self, note: RunNote, *, durable: bool = True) -> None:
        """Write the note; if `durable`, so that it survives a power cut. The caller holds `note_lock` since reading."""
        self.create()
        _replace(self.note_path, asdict(note), durable)

    def drop_note(self, applied: RunNote) -> None:
        """Delete the note, unless it was changed after `applied` was read."""
        with self.note_lock():
            if self.note() == applied:
                self.note_path.unlink(missing_ok=True)

    def remove(self, told: RunNote) -> bool:
        """Delete everything unless the note differs from `told` or something is unsent. Return whether it did."""
        with self.note_lock():
            if self.note() != told or self.segments() or any(self.artifacts()):
                return False
            shutil.rmtree(self.root / "artifacts", ignore_errors=True)
            for name in ("state.json", "send.lock", "run.lock"):
                (self.root / name).unlink(missing_ok=True)
            # Delete the note last: while it exists, another sender continues from here.
            self.note_path.unlink()
            with suppress(OSError):  # the directory is kept if another process put something into it
                self.root.rmdir()
        return True

    @contextmanager
    def note_lock(self) -> Iterator[None]:
        """Hold the note's lock while the driver or a sender changes the note."""
        self.create()
        with storage_errors(self.root), (self.root / "run.lock").open("ab") as file:
            _flock(file.fileno(), wait=True)
            yield

    # Artifacts

    def add_artifact(self, path: Path, folder: str | None) -> None:
        """Copy a file or directory, so that the caller may delete its own copy at once."""
        home = self.root / "artifacts"
        partial = home / f".{uuid.uuid4().hex}"
        with storage_errors(path):
            payload = partial / "payload" / path.name
            payload.parent.mkdir(parents=True)
            try:
                shutil.copytree(path, payload) if path.is_dir() else shutil.copy2(path, payload)
                (partial / "folder.json").write_text(json.dumps(folder), encoding="utf-8")
                number = max((int(name.split("-")[0]) for name in _names(home) if name[0] != "."), default=0) + 1
                partial.replace(home / f"{number:06d}-{partial.name[1:9]}")
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def artifacts(self) -> Iterator[Artifact]:
        """Yield the artifacts that were copied completely, oldest first."""
        for name in sorted(name for name in _names(self.root / "artifacts") if name[0] != "."):
            entry = self.root / "artifacts" / name
            for payload in _names(entry / "payload"):
                folder = json.loads((entry / "folder.json").read_text(encoding="utf-8"))
                yield Artifact(entry, entry / "payload" / payload, folder)

    # Sending

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Yield whether this caller alone may send now. The kernel releases the lock when the process dies."""
        self.create()
        with storage_errors(self.root), (self.root / "send.lock").open("ab") as file:
            yield _flock(file.fileno())


class SegmentWriter:
    """Appends whole lines to the attempt's segments, durably. There is one writer, used by one thread at a time.

    Args:
        spool: The spool.
        segment_bytes: The size after which a new segment begins, so that sent segments can be deleted.
    """

    def __init__(self, spool: Spool, segment_bytes: int) -> None:
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
            if self._end <= _HEADER_BYTES:
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
                _flock(descriptor)
                _write(descriptor, _HEADER)
                os.fsync(descriptor)
                partial.replace(path)
                _sync_directory(path.parent)
            except OSError:
                os.close(descriptor)
                partial.unlink(missing_ok=True)
                raise
        self._path, self._descriptor, self._end = path, descriptor, len(_HEADER)


def line(*fields: Any) -> bytes:
    """Return a line of a segment. NaN and infinities are written as Python's json writes and reads them."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


_HEADER = line("segment", FORMAT)
_HEADER_BYTES = len(_HEADER)


def read_batch(segment: Segment, offset: int) -> Batch:
    """Read whole lines from `offset`, within the limits of one call (a single line may exceed them).

    A last line without a newline is incomplete, because its writer is still writing or has died. It is not read.

    Raises:
        StorageError: The segment has another format version.
    """
    rows: list[Row] = []
    tags: dict[str, str] = {}
    dropped = broken = 0
    end = start = offset
    with storage_errors(segment.path), segment.path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            try:
                kind, *fields = json.loads(raw)
                if kind == "segment":
                    if fields != [FORMAT]:
                        raise StorageError(f"{segment.path} has format {fields}, this version reads {FORMAT}")
                elif kind == "m":
                    time, step, metrics = fields
                    new = [Row(str(key), float(value), int(time), int(step)) for key, value in metrics.items()]
                    if rows and len(rows) + len(new) > MAX_ROWS:
                        break
                    rows += new
                elif kind == "t":
                    if tags and len(tags) + len(fields[0]) > MAX_TAGS:
                        break
                    tags |= {str(key): str(value) for key, value in fields[0].items()}
                elif kind == "dropped":
                    dropped += int(fields[0])
                else:
                    broken += 1
            except (ValueError, TypeError, AttributeError, IndexError):
                broken += 1
            end += len(raw)
            if end - start >= MAX_BATCH_BYTES:
                break
    return Batch(rows, tags, dropped, broken, end)


def last_logged(spool: Spool, key: str) -> tuple[float, int, dict[str, float]] | None:
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
        if not _flock(file.fileno()):
            return False
        file.seek(acked)
        if b"\n" in file.read():
            return False
        segment.path.unlink()
    return True


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Convert errors of the file system to ours, with the path."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no space at {where}") from error
        raise StorageError(f"{where}: {error.strerror or error}") from error


def _flock(descriptor: int, *, wait: bool = False) -> bool:
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


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, data: Any, durable: bool = True) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with storage_errors(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(data, file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _read_json(path: Path) -> Any:
    with storage_errors(path):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("version") != FORMAT:
        raise StorageError(f"{path} does not have format version {FORMAT}, which this version reads")
    return data


def _names(path: Path) -> list[str]:
    with storage_errors(path):
        try:
            return [entry.name for entry in path.iterdir()]
        except FileNotFoundError:
            return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
