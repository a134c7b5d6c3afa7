"""A directory of converted data: each made once however many ask, and there by a rename when it is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raytrainer.errors import ConfigError, DataError, StorageLocked
from raytrainer.storage import Storage

FORMAT = 1
_RECORD = "cache.json"
_POLL_S = 0.25
_log = logging.getLogger(__name__)


class Cache:
    """What was made of one `source`, in `folder`: a directory named by a hash of it.

    Args:
        folder: A directory of this machine; made where it is missing.
        source: What decides the content, JSON-able: it is written beside it. Of another source, or another format of
            ours, is another cache.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self._folder = folder
        self._source = json.loads(json.dumps({**source, "format": FORMAT}))
        text = json.dumps(self._source, sort_keys=True)
        self.path = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def find(self) -> dict[str, Any] | None:
        """What `make`'s `write` returned, where it was made and is whole."""
        try:
            record: dict[str, Any] = json.loads((self.path / _RECORD).read_bytes())
            sizes = {name: (self.path / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError, KeyError):
            return None
        return record["content"] if (record["source"], record["files"]) == (self._source, sizes) else None

    def make(self, write: Callable[[Path], dict[str, Any]], needed: int) -> dict[str, Any]:
        """As `find`, after making it; of several processes one does, and the others wait.

        Args:
            write: Puts the files into the directory that it is given, and returns what is to be known of them.
            needed: The bytes that they take, about.

        Raises:
            ConfigError: The directory cannot be used.
            DataError: There is not enough space for it.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._make(write, needed)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # more came out than was expected, or somebody else took it
                raise self._no_space(needed) from error
            raise ConfigError(f"{error.strerror}: {error.filename or self._folder}", key="cache") from error

    def _make(self, write: Callable[[Path], dict[str, Any]], needed: int) -> dict[str, Any]:
        told = False
        while True:
            try:
                with Storage(self._folder).lock(f"{self.path.name}.lock", {"run": "the conversion"}) as lock:
                    # Another may have made it since we looked.
                    return self.find() or self._written(write, needed, lock.check)
            except StorageLocked as held:
                if not told:
                    _log.info("waiting for the conversion to %s: %s", self.path, held)
                    told = True
            time.sleep(_POLL_S)
            if (content := self.find()) is not None:
                return content

    def _no_space(self, needed: int) -> DataError:
        free = shutil.disk_usage(self._folder).free
        return DataError(
            f"{self._folder}: a conversion needs about {needed:,} bytes, and {free:,} are free; "
            "cache=DIR chooses another place"
        )

    def _written(
        self, write: Callable[[Path], dict[str, Any]], needed: int, check: Callable[[], None]
    ) -> dict[str, Any]:
        for left in self._folder.glob(f"{self.path.name}.*.part"):  # of a conversion that was killed: we have the lock
            shutil.rmtree(left, ignore_errors=True)
        if needed > shutil.disk_usage(self._folder).free:
            raise self._no_space(needed)
        part = self._folder / f"{self.path.name}.{uuid.uuid4().hex}.part"
        part.mkdir()
        try:
            content = write(part)
            record = {"source": self._source, "content": content}
            record["files"] = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
            (part / _RECORD).write_text(json.dumps(record, indent=1))
            for place in [*part.iterdir(), part]:
                _sync(place)
            check()
            if self.path.exists():  # not whole, or it would have been found
                shutil.rmtree(self.path)
            part.rename(self.path)
            _sync(self._folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return content


def cache_folder(chosen: str | Path) -> Path:
    """The directory that `cache=` names; of `auto` the user's own: `$XDG_CACHE_HOME/raytrainer`, else ~/.cache/raytrainer.

    Raises:
        ConfigError: A URI: there is no memory map of what is far away.
    """
    if str(chosen) == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raytrainer"
    if "://" in str(chosen):
        raise ConfigError(
            "is a URI, and a cache is mapped into memory from a disk of each machine", key="cache", value=str(chosen)
        )
    return Path(chosen).expanduser().absolute()


def _sync(place: Path) -> None:
    """A crash of the machine leaves what was written, or no cache."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
