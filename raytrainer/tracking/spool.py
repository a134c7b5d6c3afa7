"""The spool of a run: files with everything that MLflow does not have yet. They survive the death of any process.
This module defines only the formats and their invariants. It has no threads and uses no network.

    metrics-000001-4f1c09aa.jsonl   a segment (segments.py); the 8 hex digits name the attempt that wrote it
    state.json                      what MLflow has acknowledged; only the holder of send.lock replaces it, atomically
    run.json                        what the driver could not send to MLflow yet (see `RunNote`)
    artifacts/                      copies of files to upload, one directory each
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from raytrainer.core.atomic import write_atomically
from raytrainer.errors import StorageError, StorageGone
from raytrainer.storage import Storage
from raytrainer.storage.os_errors import storage_errors
from raytrainer.tracking.segments import FORMAT, HEADER_BYTES, Segment, SpoolRow, flock, names_in, segments_in, size


def spool_of(place: Storage) -> Path:
    """Return the spool directory of a run, sweep or trial: in its directory if that is local, else on this machine.

    On this machine, the path depends on the user and on the storage, because another user or another storage may have a
    run with the same name.
    """
    if place.is_local:
        return place.local_path / "spool"
    name = hashlib.sha256(place.display.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"raytrainer-{os.getuid()}", "spools", name)


class SpoolArtifact(NamedTuple):
    """A file or directory to upload into `folder` of the run's artifacts. `entry` is deleted after the upload."""

    entry: Path
    path: Path
    folder: str | None


@dataclass
class State:
    """The state of the sender, on disk.

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
    def rows(self) -> list[SpoolRow]:
        return [SpoolRow(key, *row) for key, row in self.metrics.items()]


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
        return sorted(segments_in(self.root), key=lambda segment: (segment.number, segment.attempt))

    def size(self) -> int:
        """Return the bytes on disk: segments, and files waiting for upload."""
        total = sum(size(segment.path) for segment in segments_in(self.root))
        for folder, _, names in os.walk(self.root / "artifacts"):
            total += sum(size(Path(folder, name)) for name in names)
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
        return any(size(segment.path) > max(acked.get(segment.path.name, 0), HEADER_BYTES) for segment in segments)

    # State and note

    def state(self) -> State:
        data = _read_json(self.root / "state.json")
        return State() if data is None else State(**data)

    def write_state(self, state: State) -> None:
        """Write the state without segments that no longer exist. The caller holds the lock."""
        segments = list(segments_in(self.root))
        names, attempts = {segment.path.name for segment in segments}, {segment.attempt for segment in segments}
        state.acked = {name: offset for name, offset in state.acked.items() if name in names}
        state.floors = {attempt: floor for attempt, floor in state.floors.items() if attempt in attempts}
        self._write_json("state.json", asdict(state))

    @property
    def note_path(self) -> Path:
        return self.root / "run.json"

    def note(self) -> RunNote | None:
        data = _read_json(self.note_path)
        return None if data is None else RunNote(**data)

    def write_note(self, note: RunNote, *, durable: bool = True) -> None:
        """Write the note; if `durable`, so that it survives a power cut. The caller holds `note_lock` since reading."""
        self.create()
        self._write_json("run.json", asdict(note), durable)

    def drop_note(self, applied: RunNote) -> None:
        """Delete the note, unless it was changed after `applied` was read."""
        with self.note_lock():
            if self.note() == applied:
                self.note_path.unlink(missing_ok=True)

    def remove(self, sent: RunNote) -> bool:
        """Delete everything unless the note differs from `sent` or something is unsent. Return whether it did."""
        with self.note_lock():
            if self.note() != sent or self.segments() or any(self.artifacts()):
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
            flock(file.fileno(), wait=True)
            yield

    def _write_json(self, name: str, content: dict[str, Any], durable: bool = True) -> None:
        with storage_errors(self.root / name):
            write_atomically(self.root / name, json.dumps(content).encode(), durable=durable)

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
                number = max((int(name.split("-")[0]) for name in names_in(home) if name[0] != "."), default=0) + 1
                partial.replace(home / f"{number:06d}-{partial.name[1:9]}")
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

    def artifacts(self) -> Iterator[SpoolArtifact]:
        """Yield the artifacts that were copied completely, oldest first."""
        for name in sorted(name for name in names_in(self.root / "artifacts") if name[0] != "."):
            entry = self.root / "artifacts" / name
            for payload in names_in(entry / "payload"):
                folder = json.loads((entry / "folder.json").read_text(encoding="utf-8"))
                yield SpoolArtifact(entry, entry / "payload" / payload, folder)

    # Sending

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Yield whether this caller alone may send now. The kernel releases the lock when the process dies."""
        self.create()
        with storage_errors(self.root), (self.root / "send.lock").open("ab") as file:
            yield flock(file.fileno())


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
