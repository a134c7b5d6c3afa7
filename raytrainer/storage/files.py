"""`Storage`: the files below an absolute local path or a URI that pyarrow supports (s3, gs, abfs, hdfs, file).
Local files are written with the standard library, atomically and synced. Only URIs import pyarrow."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from raytrainer.errors import RaytrainerError, StorageError, StorageFull, StorageGone

if TYPE_CHECKING:
    from raytrainer.storage.lock import Lock

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHECK_S = 30.0
_READS = 20  # attempts to read an object that changes while it is read
_SECRET = re.compile(r"key|secret|token|sas|sig|password|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a listing. `size` in bytes (0 for a directory), `mtime` in seconds since 1970 (0.0 if unknown)."""

    name: str
    is_dir: bool
    size: int
    mtime: float


class Storage:
    """The files below one root.

    Names are relative to the root, with `/` between parts. A StorageError refuses `..`, `.`, empty parts, absolute
    names and NUL, so no name can leave the root.

    Args:
        uri: An absolute local path, or a URI (`s3://bucket/prefix?region=...`, gs, abfs, hdfs, file).
        filesystem: A `pyarrow.fs.FileSystem` to use instead of the URI's own; `uri` is then its path.
    """

    def __init__(self, uri: str | os.PathLike[str], *, filesystem: Any = None) -> None:
        text = os.fspath(uri)
        scheme = _SCHEME.match(text)
        local: str | None = None
        if filesystem is not None:
            local = None
        elif scheme is None:
            if not Path(text).is_absolute():
                raise StorageError(f"{text!r} is neither an absolute path nor a URI ({', '.join(_SCHEMES)})")
            local = text
        elif scheme[1].lower() not in _SCHEMES:
            hint = "; Azure is abfs://" if scheme[1].lower() in ("az", "adl", "wasb", "wasbs") else ""
            raise StorageError(f"{scheme[1]}:// is not a known scheme: one of {', '.join(_SCHEMES)}{hint}")
        elif scheme[1].lower() == "file":
            local = unquote(urlsplit(text).path)
            if urlsplit(text).netloc not in ("", "localhost") or not Path(local).is_absolute():
                raise StorageError(f"{text!r} is not file:///ABSOLUTE/PATH")
        if "\0" in text:
            raise StorageError(f"{text!r} holds a NUL")
        self._local = None if local is None else Path(os.path.normpath(local))
        self._anchor: Path | None = None
        self.uri: str = text if self._local is None else str(self._local)
        self._fs, self._base = filesystem, (text.strip("/") if filesystem is not None else None)

    def __repr__(self) -> str:
        return f"Storage({self.display!r})"

    # -- names ---------------------------------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether the root is a directory on this machine (including a shared mount)."""
        return self._local is not None

    @property
    def local_path(self) -> Path:
        """The root as a path. Raises StorageError for a URI."""
        if self._local is None:
            raise StorageError(f"{self.display} is not a local directory")
        return self._local

    @property
    def display(self) -> str:
        """The URI without user, password and secret-looking query values, for messages and logs."""
        return redacted(self.uri)

    @classmethod
    def shown_as(cls, display: str, root: str) -> Storage:
        """Return the storage for a recorded `display`.

        If it is `root` or below it, it gets the user, password and query of `root`.
        """
        shown, whole = urlsplit(display), urlsplit(root)
        known, path = urlsplit(redacted(root)), whole.path.rstrip("/")
        if not shown.scheme:
            return cls(display)
        is_below = shown.path == path or shown.path.startswith(f"{path}/")
        if (shown.scheme, shown.netloc, shown.query) != (known.scheme, known.netloc, known.query) or not is_below:
            return cls(display)
        return cls(urlunsplit(shown._replace(netloc=whole.netloc, query=whole.query)))

    def for_ray(self) -> dict[str, Any]:
        """Return Ray's `storage_path` and `storage_filesystem`. Ray's dashboard shows the former."""
        if self.display == self.uri:
            return {"storage_path": self.uri}
        return {"storage_path": self._key(""), "storage_filesystem": self._filesystem()}

    def child(self, name: str) -> Storage:
        """Return the storage below `name` (one or more parts)."""
        parts = _parts(name)
        if not parts:
            return self
        if self._local is not None:
            child = Storage(self._local.joinpath(*parts))
            child._anchor = self._anchor
            return child
        if self._fs is not None and self._base is not None and not _SCHEME.match(self.uri):
            return Storage("/".join((self.uri.rstrip("/"), *parts)), filesystem=self._fs)
        url = urlsplit(self.uri)
        below = Storage(urlunsplit(url._replace(path="/".join((url.path.rstrip("/"), *map(quote, parts))))))
        if self._fs is not None and self._base is not None:
            below._fs, below._base = self._fs, "/".join((self._base, *parts))
        return below

    def anchored(self, at: Storage | None = None) -> Storage:
        """Return the same storage, which writes nothing once the local directory `at` (default: its own) is deleted.

        Writes then raise StorageGone and never create a part of the directory again. A directory that does not exist
        now, and a URI, have no anchor.
        """
        anchor = (at or self)._local
        found = self.child("")
        if self._local is not None and anchor is not None and anchor.is_dir():
            found = Storage(self._local)
            found._anchor = anchor
        return found

    def check_there(self) -> None:
        """Raise StorageGone if the directory to which this storage is anchored no longer exists."""
        if self._anchor is not None and not self._anchor.is_dir():
            raise StorageGone(f"The run's directory {self._anchor} is gone: it was deleted or moved during the run")

    def _make_parent(self, path: Path) -> None:
        self.check_there()
        path.parent.mkdir(parents=True, exist_ok=True)

    def where(self, rel: str) -> str:
        """Return `rel` as a full path or URI, for messages."""
        if self._local is not None:
            return str(self._local.joinpath(*_parts(rel)))
        url = urlsplit(self.display)
        return urlunsplit(url._replace(path="/".join((url.path.rstrip("/"), *_parts(rel)))))

    # -- reading -------------------------------------------------------------------------------------------------

    def exists(self, rel: str = "") -> bool:
        """Return whether a file or directory exists."""
        with self._errors(rel):
            if self._local is not None:
                return os.path.lexists(self._path(rel))
            return bool(self._info(rel).type.name != "NotFound")

    def read_bytes(self, rel: str) -> bytes:
        """Read a whole file. Raises StorageError if it does not exist."""
        data = self.read_if_exists(rel)
        if data is None:
            raise StorageError(f"{self.where(rel)}: no such file")
        return data

    def read_if_exists(self, rel: str) -> bytes | None:
        """Read a whole file; None if it does not exist."""
        with self._errors(rel):
            try:
                if self._local is None:
                    return self._read_object(rel)
                with self._open_read(rel) as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _read_object(self, rel: str) -> bytes | None:
        """Read a whole object.

        A stream first requests the length and then that many bytes. If the object is replaced in between, it returns
        only a part. If the object is deleted, it raises any kind of error.
        """
        for left in reversed(range(_READS)):
            data: bytes | None = None
            try:
                with self._open_read(rel) as file:
                    data = file.read()
            except FileNotFoundError:
                return None
            except OSError:
                if not left:
                    raise
            info = self._info(rel)
            if info.type.name == "NotFound":
                return None
            if data is not None and len(data) == info.size:
                return data
        raise StorageError(f"{self.where(rel)}: it is replaced faster than it can be read")

    @contextmanager
    def open_read(self, rel: str) -> Iterator[BinaryIO]:
        """Open a file with `read`, `readinto` and `seek`. It is unbuffered if that is cheaper for large reads."""
        with self._errors(rel), self._open_read(rel) as file:
            yield file

    def list(self, rel: str = "") -> list[Entry]:
        """Return the entries directly below `rel`, sorted by name; empty if it does not exist."""
        with self._errors(rel):
            if self._local is not None:
                return _list_local(self._path(rel))
            from pyarrow import fs

            selector = fs.FileSelector(self._key(rel), allow_not_found=True, recursive=False)
            infos = self._filesystem().get_file_info(selector)
            entries = [
                Entry(i.base_name, i.type == fs.FileType.Directory, i.size or 0, (i.mtime_ns or 0) / 1e9) for i in infos
            ]
            return sorted(entries, key=lambda entry: entry.name)

    def download_tree(self, rel: str, local_dir: str | os.PathLike[str]) -> None:
        """Copy the tree at `rel` into the local directory `local_dir`."""
        target = Path(local_dir).absolute()
        with self._errors(rel):
            if self._local is not None:
                shutil.copytree(self._path(rel), target, dirs_exist_ok=True, symlinks=True)
            else:
                from pyarrow import fs

                target.mkdir(parents=True, exist_ok=True)
                fs.copy_files(self._key(rel), str(target), self._filesystem(), fs.LocalFileSystem())

    # -- writing -------------------------------------------------------------------------------------------------

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write a whole file. Readers see the old or the new content, never a part.

        Local: a temporary file beside it, fsync, rename, and fsync of the directory.
        """
        if self._local is None:
            _to_its_end(lambda: self._write_object(rel, data))
            return
        path = self._path(rel, file=True)
        with self._errors(rel):
            self._make_parent(path)
            # Use a short name, because the target's name may already have the longest length that the file system
            # allows.
            beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
            try:
                with beside.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            _sync_directory(path.parent)

    def _write_object(self, rel: str, data: bytes) -> None:
        # An object appears only when it is complete. A file system with directories needs a rename for that.
        moves = self._has_directories()
        target = f"{rel}.{uuid.uuid4().hex}.tmp" if moves else rel
        with self.open_write(target) as file:
            file.write(data)
        if moves:
            with self._errors(rel):
                self._filesystem().move(self._key(target), self._key(rel))

    @contextmanager
    def open_write(self, rel: str) -> Iterator[BinaryIO]:
        """Open a new file for writing in pieces. It is synced to disk at the end.

        This is not atomic: write another file last to commit it.
        """
        with self._errors(rel):
            if self._local is not None:
                path = self._path(rel, file=True)
                self._make_parent(path)
                with path.open("wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
            else:
                key = self._key(rel, file=True)
                filesystem = self._filesystem()
                if self._has_directories():
                    filesystem.create_dir(str(PurePosixPath(key).parent), recursive=True)
                with filesystem.open_output_stream(key) as file:
                    yield cast(BinaryIO, file)

    def create_dir(self, rel: str) -> bool:
        """Create a directory. Return False if the name is taken.

        This is atomic on a local file system. An object store has no directories, so there it only checks whether any
        object has that prefix.
        """
        with self._errors(rel):
            if self._local is None:
                return not self.list(rel) and self._info(rel).type.name == "NotFound"
            path = self._path(rel, file=True)
            self._make_parent(path)
            try:
                path.mkdir()
            except FileExistsError:
                return False
            return True

    def sync_dir(self, rel: str) -> None:
        """Make the names in a local directory durable. Does nothing on an object store."""
        with self._errors(rel):
            if self._local is not None:
                _sync_directory(self._path(rel))

    def upload_tree(self, local_dir: str | os.PathLike[str], rel: str) -> None:
        """Copy a local directory to `rel`, file by file. This is not atomic."""
        source = Path(local_dir).absolute()
        with self._errors(rel):
            if self._local is not None:
                shutil.copytree(source, self._path(rel), dirs_exist_ok=True, symlinks=True)
            else:
                from pyarrow import fs

                if self._has_directories():
                    self._filesystem().create_dir(self._key(rel), recursive=True)
                fs.copy_files(str(source), self._key(rel), fs.LocalFileSystem(), self._filesystem())

    def delete(self, rel: str) -> None:
        """Delete a file or a tree. Does nothing if it does not exist.

        The root itself, and any path that a symbolic link leads out of the root, are refused. A link at `rel` is
        unlinked, never followed.
        """
        if not _parts(rel):
            raise StorageError(f"{self.display}: refusing to delete the root")
        with self._errors(rel):
            if self._local is None:
                info = self._info(rel)
                with suppress(FileNotFoundError):  # another process has just deleted it
                    if info.type.name == "Directory":
                        self._filesystem().delete_dir(self._key(rel))
                    elif info.type.name != "NotFound":
                        self._filesystem().delete_file(self._key(rel))
                return
            path = self._path(rel)
            root = self._local.resolve()
            if not path.parent.resolve().is_relative_to(root):
                raise StorageError(f"{path}: refusing to delete outside {root}")
            try:
                mode = path.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                return
            if stat.S_ISDIR(mode):
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Write and delete a small probe file. Raises StorageError (or StorageFull) with the reason if that fails.

        It creates no directory: if the root does not exist yet, it probes the nearest existing parent. It gives up
        after 30 s if a server accepts the connection but does not answer, because clients would wait for minutes.
        """
        if self._local is None:
            problems: list[BaseException] = []
            asked = _thread(self._probe, problems)
            asked.start()
            asked.join(_CHECK_S)
            if asked.is_alive():
                raise StorageError(f"{self.display}: no answer in {_CHECK_S:g} s")
            if problems:
                raise problems[0]
            return
        place = self._local
        with self._errors(""):
            while not os.path.lexists(place) and place != place.parent:
                place = place.parent
            if not place.is_dir():
                raise StorageError(f"{self.display}: {place} is not a directory")
            try:
                with tempfile.NamedTemporaryFile(dir=place, prefix=".probe-") as file:
                    file.write(b"probe" * 1000)
                    file.flush()
                    os.fsync(file.fileno())
            except PermissionError as exc:
                raise StorageError(f"{self.display}: {place} is not writable") from exc

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

    # -- inside --------------------------------------------------------------------------------------------------

    def _path(self, rel: str, *, file: bool = False) -> Path:
        return self.local_path.joinpath(*_parts(rel, file=file))

    def _key(self, rel: str, *, file: bool = False) -> str:
        self._filesystem()
        return "/".join(part for part in (self._base or "", *_parts(rel, file=file)) if part)

    def _filesystem(self) -> Any:
        if self._fs is None:
            from pyarrow import fs

            # Connect on first use, because this may need the network (for an S3 bucket's region).
            try:
                self._fs, base = fs.FileSystem.from_uri(self.uri)
            except (OSError, ValueError) as exc:
                raise StorageError(f"{self.display}: {_first_line(exc)}") from exc
            self._base = base.rstrip("/")
        return self._fs

    def _has_directories(self) -> bool:
        return self._filesystem().type_name in ("local", "hdfs", "subtree", "mock")

    def _info(self, rel: str) -> Any:
        return self._filesystem().get_file_info(self._key(rel))

    def _open_read(self, rel: str) -> BinaryIO:
        if self._local is not None:
            return self._path(rel, file=True).open("rb", buffering=0)
        return cast(BinaryIO, self._filesystem().open_input_file(self._key(rel, file=True)))

    @contextmanager
    def _errors(self, rel: str) -> Iterator[None]:
        try:
            yield
        except RaytrainerError:
            raise
        except OSError as exc:
            where = self.where(rel)
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"no space at {where}") from exc
            raise StorageError(f"{where}: {exc.strerror or _first_line(exc)}") from exc


def _to_its_end(action: Callable[[], None]) -> None:
    """Run an action in a thread, in which no signal handler can raise.

    A stream that is dropped half-written is closed instead of aborted, and the bytes so far become the object.
    """
    if threading.current_thread() is not threading.main_thread():
        action()
        return
    problems: list[BaseException] = []
    thread = _thread(action, problems)
    try:
        thread.start()
        thread.join()
    except BaseException:
        if thread.ident is not None:
            thread.join()
        raise
    if problems:
        raise problems[0]


def _thread(action: Callable[[], None], problems: list[BaseException]) -> threading.Thread:
    """Return a thread that runs an action and appends its exception to `problems`."""

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  the waiting thread raises it
            problems.append(error)

    return threading.Thread(target=run, name="raytrainer-storage", daemon=True)


def _parts(rel: str, *, file: bool = False) -> tuple[str, ...]:
    """Return the parts of a relative name. The name of a file cannot be empty."""
    if rel == "" and not file:
        return ()
    parts = tuple(rel.split("/"))
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise StorageError(f"{rel!r} is not a name below a storage: parts between '/' that are not empty, '.' or '..'")
    return parts


def _list_local(path: Path) -> list[Entry]:
    entries = []
    try:
        with os.scandir(path) as names:
            for name in names:
                try:
                    info = name.stat(follow_symlinks=False)
                except FileNotFoundError:  # deleted after the directory was read
                    continue
                is_dir = stat.S_ISDIR(info.st_mode)
                entries.append(Entry(name.name, is_dir, 0 if is_dir else info.st_size, info.st_mtime))
    except FileNotFoundError:
        return []
    return sorted(entries, key=lambda entry: entry.name)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as exc:  # some network and user-space file systems cannot fsync directories
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def redacted(uri: str) -> str:
    """Return a path or URI without user, password and secret-looking query values."""
    if _SCHEME.match(uri) is None:
        return uri
    url = urlsplit(uri)
    # Azure's `abfs://container@account` is a location, not a secret, so the user is removed only if there is a
    # password.
    user, at, host = url.netloc.rpartition("@")
    netloc = host if at and ":" in user else url.netloc
    query = [(key, "***" if _SECRET.search(key) else value) for key, value in parse_qsl(url.query)]
    return urlunsplit(url._replace(netloc=netloc, query=urlencode(query, safe="*:/")))


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0] or type(exc).__name__
