"""`Disk`: the files below a local directory, with the standard library, written atomically and synced."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from raytrainer.core import atomic
from raytrainer.errors import StorageError, StorageGone
from raytrainer.storage.storage_entry import StorageEntry


class Disk:
    """The files below `root`. Paths are given by their parts.

    Args:
        root: The directory, which need not exist.
        anchor: A directory. Once it is deleted, nothing is written any more. None: no such directory.
    """

    def __init__(self, root: Path, anchor: Path | None = None) -> None:
        self.root, self.anchor = root, anchor

    def child(self, parts: tuple[str, ...]) -> Disk:
        return Disk(self._path(parts), self.anchor)

    def check_there(self) -> None:
        if self.anchor is not None and not self.anchor.is_dir():
            raise StorageGone(f"The run's directory {self.anchor} is gone: it was deleted or moved during the run")

    def exists(self, parts: tuple[str, ...]) -> bool:
        return os.path.lexists(self._path(parts))

    def read(self, parts: tuple[str, ...]) -> bytes | None:
        try:
            return self._path(parts).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open_read(self, parts: tuple[str, ...]) -> BinaryIO:
        return self._path(parts).open("rb", buffering=0)

    def list(self, parts: tuple[str, ...]) -> list[StorageEntry]:
        entries = []
        try:
            with os.scandir(self._path(parts)) as names:
                for name in names:
                    try:
                        info = name.stat(follow_symlinks=False)
                    except FileNotFoundError:  # deleted after the directory was read
                        continue
                    is_dir = stat.S_ISDIR(info.st_mode)
                    entries.append(StorageEntry(name.name, is_dir, 0 if is_dir else info.st_size, info.st_mtime))
        except FileNotFoundError:
            return []
        return entries

    def write(self, parts: tuple[str, ...], data: bytes) -> None:
        path = self._path(parts)
        self._make_parent(path)
        atomic.write_atomically(path, data)

    @contextmanager
    def open_write(self, parts: tuple[str, ...]) -> Iterator[BinaryIO]:
        path = self._path(parts)
        self._make_parent(path)
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def create_dir(self, parts: tuple[str, ...]) -> bool:
        path = self._path(parts)
        self._make_parent(path)
        try:
            path.mkdir()
        except FileExistsError:
            return False
        return True

    def sync_dir(self, parts: tuple[str, ...]) -> None:
        atomic.sync(self._path(parts))

    def download_tree(self, parts: tuple[str, ...], target: Path) -> None:
        shutil.copytree(self._path(parts), target, dirs_exist_ok=True, symlinks=True)

    def upload_tree(self, source: Path, parts: tuple[str, ...]) -> None:
        shutil.copytree(source, self._path(parts), dirs_exist_ok=True, symlinks=True)

    def delete(self, parts: tuple[str, ...]) -> None:
        path, root = self._path(parts), self.root.resolve()
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
        folder = next(folder for folder in (self.root, *self.root.parents) if os.path.lexists(folder))
        if not folder.is_dir():
            raise StorageError(f"{self.root}: {folder} is not a directory")
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
                file.write(b"probe" * 1000)
                file.flush()
                os.fsync(file.fileno())
        except PermissionError as error:
            raise StorageError(f"{self.root}: {folder} is not writable") from error

    def _path(self, parts: tuple[str, ...]) -> Path:
        return self.root.joinpath(*parts)

    def _make_parent(self, path: Path) -> None:
        self.check_there()
        path.parent.mkdir(parents=True, exist_ok=True)
