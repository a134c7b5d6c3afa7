"""`Storage`: the files below an absolute local path or a URI, with the same interface for both.
It checks names and names the place in errors; `Disk` and `ObjectStore` read and write."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from raytrainer.core.background import in_background
from raytrainer.errors import StorageError
from raytrainer.storage.disk import Disk
from raytrainer.storage.object_store import ObjectStore
from raytrainer.storage.os_errors import storage_errors
from raytrainer.storage.storage_entry import StorageEntry
from raytrainer.storage.uris import below, local_root, parts_of, redacted, with_secrets

if TYPE_CHECKING:
    from raytrainer.storage.lock import Lock

_CHECK_S = 30.0


class Storage:
    """The files below one root.

    Names are relative to the root, with `/` between parts. A StorageError refuses `..`, `.`, empty parts, absolute
    names and NUL, so no name can leave the root. Errors are StorageError with the place, or StorageFull.

    Args:
        uri: An absolute local path, or a URI (`s3://bucket/prefix?region=...`, gs, abfs, hdfs, file).
        filesystem: A `pyarrow.fs.FileSystem` to use instead of the URI's own; `uri` is then its path.
    """

    def __init__(self, uri: str | os.PathLike[str], *, filesystem: Any = None) -> None:
        text = os.fspath(uri)
        root = local_root(text) if filesystem is None else None
        self._files: Disk | ObjectStore
        if root is not None:
            self._files = Disk(Path(os.path.normpath(root)))
        else:
            self._files = ObjectStore(text, filesystem, None if filesystem is None else text.strip("/"))

    @classmethod
    def _of(cls, files: Disk | ObjectStore) -> Storage:
        storage = cls.__new__(cls)
        storage._files = files
        return storage

    def __repr__(self) -> str:
        return f"Storage({self.display!r})"

    # -- names ---------------------------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """The absolute path, or the URI with its secrets."""
        return str(self._files.root) if isinstance(self._files, Disk) else self._files.uri

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory on this machine (including a shared mount)."""
        return isinstance(self._files, Disk)

    @property
    def local_path(self) -> Path:
        """The root as a path. Raises StorageError for a URI."""
        if not isinstance(self._files, Disk):
            raise StorageError(f"{self.display} is not a local directory")
        return self._files.root

    @property
    def display(self) -> str:
        """The URI without user, password and secret-looking query values, for messages and logs."""
        return redacted(self.uri)

    @classmethod
    def shown_as(cls, display: str, root: str) -> Storage:
        """Return the storage for a recorded `display`.

        If it is `root` or below it, it gets the user, password and query of `root`.
        """
        return cls(with_secrets(display, root))

    def for_ray(self) -> dict[str, Any]:
        """Return Ray's `storage_path` and `storage_filesystem`. Ray's dashboard shows the former."""
        if isinstance(self._files, Disk) or self.display == self.uri:
            return {"storage_path": self.uri}
        return {"storage_path": self._files.key(()), "storage_filesystem": self._files.filesystem}

    def child(self, name: str) -> Storage:
        """Return the storage below `name` (one or more parts)."""
        parts = parts_of(name)
        return self._of(self._files.child(parts)) if parts else self

    def anchored(self, at: Storage | None = None) -> Storage:
        """Return the same storage, which writes nothing once the local directory `at` (default: its own) is deleted.

        Writes then raise StorageGone and never create a part of the directory again. A directory that does not exist
        now, and a URI, have no anchor.
        """
        anchor = (at or self)._files
        if isinstance(self._files, Disk) and isinstance(anchor, Disk) and anchor.root.is_dir():
            return self._of(Disk(self._files.root, anchor.root))
        return self

    def check_there(self) -> None:
        """Raise StorageGone if the directory to which this storage is anchored no longer exists."""
        if isinstance(self._files, Disk):
            self._files.check_there()

    def where(self, rel: str) -> str:
        """Return `rel` as a full path or URI, for messages."""
        parts = parts_of(rel)
        if isinstance(self._files, Disk):
            return str(self._files.root.joinpath(*parts))
        return below(self.display, parts, quoted=False)

    # -- reading -------------------------------------------------------------------------------------------------

    def exists(self, rel: str = "") -> bool:
        """Return whether a file or directory exists."""
        with self._errors(rel):
            return self._files.exists(parts_of(rel))

    def read_bytes(self, rel: str) -> bytes:
        """Read a whole file. Raises StorageError if it does not exist."""
        data = self.read_if_exists(rel)
        if data is None:
            raise StorageError(f"{self.where(rel)}: no such file")
        return data

    def read_if_exists(self, rel: str) -> bytes | None:
        """Read a whole file; None if it does not exist."""
        with self._errors(rel):
            return self._files.read(parts_of(rel, file=True))

    @contextmanager
    def open_read(self, rel: str) -> Iterator[BinaryIO]:
        """Open a file with `read`, `readinto` and `seek`. It is unbuffered if that is cheaper for large reads."""
        with self._errors(rel), self._files.open_read(parts_of(rel, file=True)) as file:
            yield file

    def list(self, rel: str = "") -> list[StorageEntry]:
        """Return the entries directly below `rel`, sorted by name; empty if it does not exist."""
        with self._errors(rel):
            return sorted(self._files.list(parts_of(rel)), key=lambda entry: entry.name)

    def download_tree(self, rel: str, local_dir: str | os.PathLike[str]) -> None:
        """Copy the tree at `rel` into the local directory `local_dir`."""
        with self._errors(rel):
            self._files.download_tree(parts_of(rel), Path(local_dir).absolute())

    # -- writing -------------------------------------------------------------------------------------------------

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a whole file. Readers see the old or the new content, never a part. A local file is synced to disk."""
        with self._errors(rel):
            self._files.write(parts_of(rel, file=True), data)

    @contextmanager
    def open_write(self, rel: str) -> Iterator[BinaryIO]:
        """Open a new file for writing in pieces. It is synced to disk at the end.

        This is not atomic: write another file last to commit it.
        """
        with self._errors(rel), self._files.open_write(parts_of(rel, file=True)) as file:
            yield file

    def create_dir(self, rel: str) -> bool:
        """Create a directory. Return False if the name is taken.

        This is atomic on a local file system. An object store has no directories, so there it only checks whether any
        object has that prefix.
        """
        with self._errors(rel):
            return self._files.create_dir(parts_of(rel, file=True))

    def sync_dir(self, rel: str) -> None:
        """Make the names in a local directory durable. Does nothing on an object store."""
        with self._errors(rel):
            self._files.sync_dir(parts_of(rel))

    def upload_tree(self, local_dir: str | os.PathLike[str], rel: str) -> None:
        """Copy a local directory to `rel`, file by file. This is not atomic."""
        with self._errors(rel):
            self._files.upload_tree(Path(local_dir).absolute(), parts_of(rel))

    def delete(self, rel: str) -> None:
        """Delete a file or a tree. Does nothing if it does not exist.

        The root itself, and any path that a symbolic link leads out of the root, are refused. A link at `rel` is
        unlinked, never followed.
        """
        parts = parts_of(rel)
        if not parts:
            raise StorageError(f"{self.display}: refusing to delete the root")
        with self._errors(rel):
            self._files.delete(parts)

    def check_writable(self) -> None:
        """Write and delete a small probe file. Raises StorageError (or StorageFull) with the reason if that fails.

        It creates no directory: if the root does not exist yet, it probes the nearest existing parent. It gives up
        after 30 s if a server accepts the connection but does not answer, because clients would wait for minutes.
        """
        if isinstance(self._files, Disk):
            with self._errors(""):
                self._files.check_writable()
            return
        try:
            in_background(self._probe, "raytrainer-storage").result(_CHECK_S)
        except TimeoutError:
            raise StorageError(f"{self.display}: no answer in {_CHECK_S:g} s") from None

    def _probe(self) -> None:
        probe = f".probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"probe")
        self.delete(probe)

    def lock(self, rel: str, owner: Mapping[str, str], *, limit_s: float = 60.0) -> Lock:
        """Return a lock on this storage, or on the part that `rel` names.

        Args:
            rel: The lock's name, a small directory.
            owner: The owner, e.g. `{"run": NAME}`, which the StorageLocked of others names.
            limit_s: The age in seconds at which a lease without a heartbeat is stale. Of processes on this machine, the
                lock knows whether they are alive.
        """
        from raytrainer.storage.lock import Lock

        return Lock(self.child(rel), owner, limit_s=limit_s)

    def _errors(self, rel: str) -> AbstractContextManager[None]:
        return storage_errors(lambda: self.where(rel))
