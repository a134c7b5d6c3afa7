"""`ObjectStore`: the objects below a URI that pyarrow supports (s3, gs, abfs, hdfs). It imports pyarrow when it is used."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from raytrainer.errors import StorageError
from raytrainer.storage.os_errors import first_line
from raytrainer.storage.storage_entry import StorageEntry
from raytrainer.storage.uris import below, has_scheme, redacted

_READS = 20  # attempts to read an object that changes while it is read


class ObjectStore:
    """The objects below `uri`. Names are given by their parts.

    Args:
        uri: A URI, or a path in `filesystem`.
        filesystem: A `pyarrow.fs.FileSystem` to use instead of the URI's own.
        base: The path of `uri` in `filesystem`; None if it follows from the URI.
    """

    def __init__(self, uri: str, filesystem: Any = None, base: str | None = None) -> None:
        self.uri, self._opened, self._base = uri, filesystem, base

    def child(self, parts: tuple[str, ...]) -> ObjectStore:
        if self._opened is not None and not has_scheme(self.uri):
            path = "/".join((self.uri.rstrip("/"), *parts))
            return ObjectStore(path, self._opened, path.strip("/"))
        base = None if self._base is None else "/".join((self._base, *parts))
        return ObjectStore(below(self.uri, parts, quoted=True), self._opened, base)

    @property
    def filesystem(self) -> Any:
        """The file system. It is opened on first use, because this may need the network (for an S3 bucket's region)."""
        if self._opened is None:
            from pyarrow import fs

            try:
                self._opened, base = fs.FileSystem.from_uri(self.uri)
            except (OSError, ValueError) as error:
                raise StorageError(f"{redacted(self.uri)}: {first_line(error)}") from error
            self._base = base.rstrip("/")
        return self._opened

    def key(self, parts: tuple[str, ...]) -> str:
        """Return the path of a name in the file system."""
        assert self.filesystem is not None
        return "/".join(part for part in (self._base or "", *parts) if part)

    def exists(self, parts: tuple[str, ...]) -> bool:
        return bool(self._info(parts).type.name != "NotFound")

    def read(self, parts: tuple[str, ...]) -> bytes | None:
        """Return the content of an object; None if it does not exist.

        A stream first requests the length and then that many bytes. If the object is replaced in between, it returns
        only a part. If the object is deleted, it raises any kind of error.
        """
        for left in reversed(range(_READS)):
            data: bytes | None = None
            try:
                with self.open_read(parts) as file:
                    data = file.read()
            except FileNotFoundError:
                return None
            except OSError:
                if not left:
                    raise
            info = self._info(parts)
            if info.type.name == "NotFound":
                return None
            if data is not None and len(data) == info.size:
                return data
        where = below(redacted(self.uri), parts, quoted=False)
        raise StorageError(f"{where}: it is replaced faster than it can be read")

    def open_read(self, parts: tuple[str, ...]) -> BinaryIO:
        return cast(BinaryIO, self.filesystem.open_input_file(self.key(parts)))

    def list(self, parts: tuple[str, ...]) -> list[StorageEntry]:
        from pyarrow import fs

        infos = self.filesystem.get_file_info(fs.FileSelector(self.key(parts), allow_not_found=True, recursive=False))
        return [
            StorageEntry(i.base_name, i.type == fs.FileType.Directory, i.size or 0, (i.mtime_ns or 0) / 1e9)
            for i in infos
        ]

    def write(self, parts: tuple[str, ...], data: bytes) -> None:
        _run_to_its_end(lambda: self._write(parts, data))

    def _write(self, parts: tuple[str, ...], data: bytes) -> None:
        # An object appears only when it is complete. A file system with directories needs a rename for that.
        moves = self._has_directories()
        target = (*parts[:-1], f"{parts[-1]}.{uuid.uuid4().hex}.tmp") if moves else parts
        with self.open_write(target) as file:
            file.write(data)
        if moves:
            self.filesystem.move(self.key(target), self.key(parts))

    @contextmanager
    def open_write(self, parts: tuple[str, ...]) -> Iterator[BinaryIO]:
        key = self.key(parts)
        if self._has_directories():
            self.filesystem.create_dir(str(PurePosixPath(key).parent), recursive=True)
        with self.filesystem.open_output_stream(key) as file:
            yield cast(BinaryIO, file)

    def create_dir(self, parts: tuple[str, ...]) -> bool:
        return not self.list(parts) and not self.exists(parts)

    def sync_dir(self, parts: tuple[str, ...]) -> None:
        pass

    def download_tree(self, parts: tuple[str, ...], target: Path) -> None:
        from pyarrow import fs

        target.mkdir(parents=True, exist_ok=True)
        fs.copy_files(self.key(parts), str(target), self.filesystem, fs.LocalFileSystem())

    def upload_tree(self, source: Path, parts: tuple[str, ...]) -> None:
        from pyarrow import fs

        if self._has_directories():
            self.filesystem.create_dir(self.key(parts), recursive=True)
        fs.copy_files(str(source), self.key(parts), fs.LocalFileSystem(), self.filesystem)

    def delete(self, parts: tuple[str, ...]) -> None:
        info = self._info(parts)
        with suppress(FileNotFoundError):  # another process has just deleted it
            if info.type.name == "Directory":
                self.filesystem.delete_dir(self.key(parts))
            elif info.type.name != "NotFound":
                self.filesystem.delete_file(self.key(parts))

    def _has_directories(self) -> bool:
        return self.filesystem.type_name in ("local", "hdfs", "subtree", "mock")

    def _info(self, parts: tuple[str, ...]) -> Any:
        return self.filesystem.get_file_info(self.key(parts))


def _run_to_its_end(action: Callable[[], None]) -> None:
    """Run an action in a thread, in which no signal handler can raise.

    A stream that is dropped half-written is closed instead of aborted, and the bytes so far become the object.
    """
    if threading.current_thread() is not threading.main_thread():
        action()
        return
    problems: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  raised below
            problems.append(error)

    thread = threading.Thread(target=run, name="raytrainer-storage", daemon=True)
    try:
        thread.start()
        thread.join()
    except BaseException:
        if thread.ident is not None:
            thread.join()
        raise
    if problems:
        raise problems[0]
