"""The file of the trial journal: on a local disk it is appended to, in an object store it is uploaded as a whole."""

from __future__ import annotations

import logging
import os
import threading
import time

from raytrainer.errors import StorageError, StorageFull
from raytrainer.storage import Storage
from raytrainer.storage.os_errors import storage_errors

_SYNC_S = 1.0  # between two fsyncs of a local file
_UPLOAD_S = 5.0  # between two uploads to an object store

_log = logging.getLogger("raytrainer.sweep")


def open_file(storage: Storage, name: str, size: int, whole: bytes) -> JournalFile:
    """Open the file for appending.

    Args:
        storage: The directory.
        name: The name of the file.
        size: Its size when it was read.
        whole: Its content up to the last complete line, after which the next line is written.
    """
    return (LocalFile if storage.is_local else RemoteFile)(storage, name, size, whole)


class JournalFile:
    """The file of a journal. A background thread saves its lines durably.

    Args:
        every_s: Seconds between two saves.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._unsaved, self._closing = threading.Event(), threading.Event()
        self._failure: StorageError | None = None
        self._warned, self._warning = False, threading.Lock()
        self._thread = threading.Thread(target=self._save_often, name="raytrainer-journal", daemon=True)
        self._thread.start()

    def append(self, data: bytes) -> None:
        if self._failure is not None:
            raise self._failure
        self._write(data)
        self._unsaved.set()

    def sync(self) -> None:
        """Save all appended lines.

        Raises:
            StorageError: They cannot be saved, or an earlier save failed for good.
        """
        if self._failure is not None:
            raise self._failure
        self._save()

    def keep(self) -> None:
        """Save a line that a killed process must not lose."""
        raise NotImplementedError

    def _save(self) -> None:
        raise NotImplementedError

    def _write(self, data: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._closing.set()
        self._unsaved.set()
        self._thread.join()
        self.sync()

    def _save_often(self) -> None:
        while not self._closing.is_set():
            self._unsaved.wait()
            if self._closing.wait(self._every_s):
                return
            self._unsaved.clear()
            self._save_or_warn()

    def _save_or_warn(self) -> None:
        """Save. A temporary failure is logged once, and the thread tries again."""
        try:
            self._save()
            self._warned = False
        except StorageError as error:
            if self._is_final(error):
                self._failure = error
                self._closing.set()
                return
            with self._warning:  # the saving thread may report the same failure at this moment
                if not self._warned:
                    _log.warning("the sweep's journal is kept in memory until it can be saved: %s", error)
                self._warned = True
            self._unsaved.set()

    def _is_final(self, error: StorageError) -> bool:
        raise NotImplementedError


class LocalFile(JournalFile):
    """A local file, to which each line is appended with one write. An incomplete line is removed again."""

    def __init__(self, storage: Storage, name: str, size: int, whole: bytes) -> None:
        self._path = storage.local_path / name
        self._end, self._incomplete = len(whole), False
        with storage_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
            try:
                if os.fstat(self._descriptor).st_size != size:
                    raise StorageError(f"{self._path}: another process has written it since it was read")
                os.ftruncate(self._descriptor, self._end)
                storage.sync_dir("")
            except BaseException:
                os.close(self._descriptor)
                raise
        super().__init__(_SYNC_S)

    def _write(self, data: bytes) -> None:
        with storage_errors(self._path):
            if self._incomplete:
                os.ftruncate(self._descriptor, self._end)
            self._incomplete = True
            try:
                written = os.write(self._descriptor, data)
                while written < len(data):
                    written += os.write(self._descriptor, data[written:])
            except OSError:
                os.ftruncate(self._descriptor, self._end)
                self._incomplete = False
                raise
        self._end, self._incomplete = self._end + len(data), False

    def keep(self) -> None:
        """Do nothing: the operating system already has the line."""

    def _save(self) -> None:
        with storage_errors(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        try:
            super().close()
        finally:
            os.close(self._descriptor)

    def _is_final(self, error: StorageError) -> bool:
        return True  # the kernel drops data that it could not write, so another fsync would succeed without it


class RemoteFile(JournalFile):
    """A file in an object store. It is kept in memory as a whole, and uploaded when it has changed."""

    def __init__(self, storage: Storage, name: str, size: int, whole: bytes) -> None:
        del size
        self._storage, self._name, self._data = storage, name, bytearray(whole)
        self._uploading = threading.Lock()
        self._uploaded, self._unreachable_until = -1, 0.0
        super().__init__(_UPLOAD_S)

    def _write(self, data: bytes) -> None:
        self._data += data

    def keep(self) -> None:
        if self._failure is None and time.monotonic() < self._unreachable_until:
            return  # do not wait again and again for storage that does not answer
        self._save_or_warn()
        if self._failure is not None:
            raise self._failure
        if self._warned:
            self._unreachable_until = time.monotonic() + _UPLOAD_S

    def _save(self) -> None:
        with self._uploading:
            data = bytes(self._data)
            if len(data) != self._uploaded:
                self._storage.write_bytes(self._name, data)
                self._uploaded = len(data)

    def _is_final(self, error: StorageError) -> bool:
        return isinstance(error, StorageFull)  # other failures are temporary; nothing is lost while this process runs
