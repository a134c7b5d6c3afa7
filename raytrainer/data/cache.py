"""A directory of converted data. Each conversion is made only once, even if several processes need it.
A rename makes it visible when it is complete."""

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

from raytrainer.core.atomic import sync
from raytrainer.errors import ConfigError, DataError, StorageLocked
from raytrainer.storage import Storage

FORMAT = 1
_RECORD = "cache.json"
_POLL_S = 0.25
_log = logging.getLogger(__name__)


class Cache:
    """The conversion of one `source`: a directory in `folder`, named by a hash of the source.

    Args:
        folder: A directory on this machine, created if it does not exist.
        source: Everything that decides the content, JSON-serialisable. It is stored beside the content. Another source,
            or another version of raytrainer's format, has another cache.
    """

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self._folder = folder
        self._source = json.loads(json.dumps({**source, "format": FORMAT}))
        text = json.dumps(self._source, sort_keys=True)
        self.path = folder / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def find(self) -> dict[str, Any] | None:
        """Return the result of `make`'s `write` if the conversion exists and is complete; else None."""
        try:
            record: dict[str, Any] = json.loads((self.path / _RECORD).read_bytes())
            sizes = {name: (self.path / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError, KeyError):
            return None
        return record["content"] if (record["source"], record["files"]) == (self._source, sizes) else None

    def make(self, write: Callable[[Path], dict[str, Any]], needed: int) -> dict[str, Any]:
        """Make the conversion and return what `find` returns. Of several processes, one converts and the others wait.

        Args:
            write: Writes the files into the directory that it receives, and returns what `find` is to return.
            needed: The approximate size of the files, in bytes.

        Raises:
            ConfigError: The directory cannot be used.
            DataError: There is not enough space.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._make(write, needed)
        except OSError as error:
            if error.errno == errno.ENOSPC:  # the files are larger than expected, or another process used the space
                raise self._no_space(needed) from error
            raise ConfigError(f"{error.strerror}: {error.filename or self._folder}", key="cache") from error

    def _make(self, write: Callable[[Path], dict[str, Any]], needed: int) -> dict[str, Any]:
        is_reported = False
        while True:
            try:
                with Storage(self._folder).lock(f"{self.path.name}.lock", {"run": "the conversion"}) as lock:
                    # Another process may have made it in the meantime.
                    return self.find() or self._written(write, needed, lock.check)
            except StorageLocked as held:
                if not is_reported:
                    _log.info("waiting for the conversion to %s: %s", self.path, held)
                    is_reported = True
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
        # Left by a conversion that was killed, because this process holds the lock.
        for left in self._folder.glob(f"{self.path.name}.*.part"):
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
                sync(place)
            check()
            if self.path.exists():  # incomplete, otherwise `find` would have returned it
                shutil.rmtree(self.path)
            part.rename(self.path)
            sync(self._folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return content


def cache_folder(chosen: str | Path) -> Path:
    """Return the directory for `cache=`. For `auto` it is `$XDG_CACHE_HOME/raytrainer`, else ~/.cache/raytrainer.

    Raises:
        ConfigError: The value is a URI, which cannot be memory-mapped.
    """
    if str(chosen) == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "raytrainer"
    if "://" in str(chosen):
        raise ConfigError(
            "is a URI, and a cache is mapped into memory from a disk of each machine", key="cache", value=str(chosen)
        )
    return Path(chosen).expanduser().absolute()
