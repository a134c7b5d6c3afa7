"""One class, `Storage`: the files below an absolute local path or a URI that pyarrow knows (s3, gs, abfs, hdfs, file).
Local files are written with the standard library, atomically and synced; pyarrow is imported for URIs alone."""

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
_READS = 20  # of an object that changes meanwhile
_SECRET = re.compile(r"key|secret|token|sas|sig|password|credential", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a listing. `size` in bytes (0 for a directory), `mtime` in seconds since 1970 (0.0 where unknown)."""

    name: str
    is_dir: bool
    size: int
    mtime: float


class Storage:
    """The files below one root. Names are relative to it, with `/` between parts; `..`, `.`, empty parts, absolute
    names and NUL are refused with a StorageError, so that no name leaves the root.

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
        """Whether the root is a directory of this machine (a shared mount included)."""
        return self._local is not None

    @property
    def local_path(self) -> Path:
        """The root as a path; StorageError for a URI."""
        if self._local is None:
            raise StorageError(f"{self.display} is not a local directory")
        return self._local

    @property
    def display(self) -> str:
        """The URI without user, password and secret-looking query values: what messages and logs may show."""
        return redacted(self.uri)

    @classmethod
    def shown_as(cls, display: str, root: str) -> Storage:
        """The storage of which `display` is kept: with the user, password and query of `root`, where it is that or below."""
        shown, whole = urlsplit(display), urlsplit(root)
        known, path = urlsplit(redacted(root)), whole.path.rstrip("/")
        if not shown.scheme:
            return cls(display)
        is_below = shown.path == path or shown.path.startswith(f"{path}/")
        if (shown.scheme, shown.netloc, shown.query) != (known.scheme, known.netloc, known.query) or not is_below:
            return cls(display)
        return cls(urlunsplit(shown._replace(netloc=whole.netloc, query=whole.query)))

    def for_ray(self) -> dict[str, Any]:
        """What Ray calls `storage_path` and `storage_filesystem`; its dashboard shows the first."""
        if self.display == self.uri:
            return {"storage_path": self.uri}
        return {"storage_path": self._key(""), "storage_filesystem": self._filesystem()}

    def child(self, name: str) -> Storage:
        """The storage below `name` (one or more parts)."""
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
        """The same storage, which writes nothing any more once the local directory `at` (default: its own) is gone, and so
        never makes a part of it again: StorageGone. A directory that is not there now, and a URI, have no anchor."""
        anchor = (at or self)._local
        found = self.child("")
        if self._local is not None and anchor is not None and anchor.is_dir():
            found = Storage(self._local)
            found._anchor = anchor
        return found

    def check_there(self) -> None:
        """StorageGone if the directory that this is anchored to is not there any more."""
        if self._anchor is not None and not self._anchor.is_dir():
            raise StorageGone(
                f"The run's directory {self._anchor} is gone: it was deleted or moved while the run was going on"
            )

    def _make_parent(self, path: Path) -> None:
        self.check_there()
        path.parent.mkdir(parents=True, exist_ok=True)

    def where(self, rel: str) -> str:
        """`rel` in full, as messages show it."""
        if self._local is not None:
            return str(self._local.joinpath(*_parts(rel)))
        url = urlsplit(self.display)
        return urlunsplit(url._replace(path="/".join((url.path.rstrip("/"), *_parts(rel)))))

    # -- reading -------------------------------------------------------------------------------------------------

    def exists(self, rel: str = "") -> bool:
        """Whether a file or directory is there."""
        with self._errors(rel):
            if self._local is not None:
                return os.path.lexists(self._path(rel))
            return bool(self._info(rel).type.name != "NotFound")

    def read_bytes(self, rel: str) -> bytes:
        """A whole file; StorageError if there is none."""
        data = self.read_if_exists(rel)
        if data is None:
            raise StorageError(f"{self.where(rel)}: no such file")
        return data

    def read_if_exists(self, rel: str) -> bytes | None:
        """A whole file, or None if there is none."""
        with self._errors(rel):
            try:
                if self._local is None:
                    return self._read_object(rel)
                with self._open_read(rel) as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _read_object(self, rel: str) -> bytes | None:
        """A whole object. A stream asks first how long it is, then for so many bytes: of one that was replaced in between
        that is a part, and of one that was deleted an error of any kind."""
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
        """A file with `read`, `readinto` and `seek`, unbuffered where that is cheaper for large reads."""
        with self._errors(rel), self._open_read(rel) as file:
            yield file

    def list(self, rel: str = "") -> list[Entry]:
        """The names directly below `rel`, sorted; none if it does not exist."""
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
        """Write a whole file: readers see the old or the new content, never a part. Local: temporary file beside,
        fsync, rename, fsync of the directory."""
        if self._local is None:
            _to_its_end(lambda: self._write_object(rel, data))
            return
        path = self._path(rel, file=True)
        with self._errors(rel):
            self._make_parent(path)
            # A short name of its own: the target's may already be as long as the file system allows.
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
        # An object appears when it is complete; where there are directories, a rename makes it so.
        moves = self._has_directories()
        target = f"{rel}.{uuid.uuid4().hex}.tmp" if moves else rel
        with self.open_write(target) as file:
            file.write(data)
        if moves:
            with self._errors(rel):
                self._filesystem().move(self._key(target), self._key(rel))

    @contextmanager
    def open_write(self, rel: str) -> Iterator[BinaryIO]:
        """A new file to write in pieces, synced to disk at the end. Not atomic: commit it by another file's name."""
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
        """Claim a new directory; False if the name is taken. Atomic on a local file system. An object store has no
        directories: there it only says whether something has that prefix."""
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
        """Make the names in a local directory durable; nothing to do on an object store."""
        with self._errors(rel):
            if self._local is not None:
                _sync_directory(self._path(rel))

    def upload_tree(self, local_dir: str | os.PathLike[str], rel: str) -> None:
        """Copy a local directory to `rel`, file by file (not atomic)."""
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
        """Delete a file or a tree; nothing if there is none. The root itself and anything that a symbolic link leads
        out of it are refused; a link at `rel` is unlinked, never followed."""
        if not _parts(rel):
            raise StorageError(f"{self.display}: refusing to delete the root")
        with self._errors(rel):
            if self._local is None:
                info = self._info(rel)
                with suppress(FileNotFoundError):  # another was faster
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
        """Write and delete a small probe; StorageError (or StorageFull) says why not. Creates no directory: where the
        root does not exist yet, the nearest directory above it is probed. A server that takes a connection and does not
        answer is given up after 30 s; a client's own patience is minutes."""
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
        """Own this storage (or the part that `rel` names) while the returned lock is entered.

        Args:
            rel: The lock's name, a small directory.
            owner: Who asks, e.g. `{"run": NAME}`: named in the StorageLocked of all others.
            limit_s: A claim without a sign of life for so long is stale (of this machine's processes it is known).
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

            # Connecting is put off to the first use: it may ask the network (an S3 bucket's region).
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
    """Runs it where no signal's handler can raise: a stream that is dropped half written is closed, not aborted, and
    what it has by then becomes the object."""
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
    """A thread to run it; what it raises is in `problems` in the end."""

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  raised again by who waits
            problems.append(error)

    return threading.Thread(target=run, name="raytrainer-storage", daemon=True)


def _parts(rel: str, *, file: bool = False) -> tuple[str, ...]:
    """The parts of a relative name; a file's cannot be the root."""
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
                except FileNotFoundError:  # deleted since the directory was read
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
    except OSError as exc:  # some network and user-space file systems have no fsync of directories
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def redacted(uri: str) -> str:
    """A path or URI without user, password and secret-looking query values."""
    if _SCHEME.match(uri) is None:
        return uri
    url = urlsplit(uri)
    # Azure's `abfs://container@account` is a place, not a secret: only what has a password loses its user.
    user, at, host = url.netloc.rpartition("@")
    netloc = host if at and ":" in user else url.netloc
    query = [(key, "***" if _SECRET.search(key) else value) for key, value in parse_qsl(url.query)]
    return urlunsplit(url._replace(netloc=netloc, query=urlencode(query, safe="*:/")))


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0] or type(exc).__name__
