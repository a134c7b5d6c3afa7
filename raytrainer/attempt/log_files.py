"""The log files of the driver and the ranks, and the times of the launch."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from raytrainer.errors import RaytrainerError
from raytrainer.progress import Display
from raytrainer.storage import Storage


class _Warnings(logging.Handler):
    """A log handler that shows warnings of raytrainer's modules on the display."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(f"warning: {record.getMessage()}")


class _File:
    """A log file. If the disk is full or fails, it warns once and drops the text, because a log must not end a run."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say, self._cut = path, say, False
        self._file: FileIO | None = None

    def write(self, text: str) -> None:
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            self._file.write(text.encode(errors="replace"))
        except OSError as error:
            if not self._cut:
                self._cut = True
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                where = f"no space at {self._path}" if full else f"{self._path}: {error.strerror}"
                self._say(f"warning: {where}; this log is incomplete")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class Logs:
    """The logs of the driver and the ranks, as files in the run directory (or a temporary one) and on the display."""

    storage: Storage
    display: Display
    folder: Path = field(init=False)

    def __enter__(self) -> Logs:
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if self.storage.is_local:
            self.folder = self.storage.local_path / "logs"
        else:
            self._temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self._temporary.name, "logs")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._temporary is not None and self.storage.exists("logs"):
            self.storage.download_tree("logs", self.folder)  # append to those of earlier attempts
        self._files: dict[str, _File] = {}
        self._marks: dict[str, float] = {}
        self.display.also = self._file("driver").write
        # Show the user this process's own warnings, such as a lost server or a corrupt checkpoint.
        self._warnings = _Warnings(self.display)
        logger = logging.getLogger("raytrainer")
        logger.addHandler(self._warnings)
        logger.setLevel(logging.WARNING)
        self._propagated, logger.propagate = logger.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("raytrainer")
        logger.removeHandler(self._warnings)
        logger.propagate = self._propagated
        self.display.also = None
        for file in self._files.values():
            file.close()
        if self._temporary is not None:
            with contextlib.suppress(RaytrainerError):  # the same logs are in MLflow
                self.storage.upload_tree(self.folder, "logs")
            self._temporary.cleanup()

    def message(self, rank: int | None, message: Mapping[str, Any]) -> None:
        """Show a worker's message. A message that identifies the worker goes to its log instead."""
        self.mark(
            {"hello": "worker_up", "start": "training_starts", "log": "first_log"}.get(message["kind"], "first_other")
        )
        if message["kind"] == "hello":
            self._write(f"rank-{rank}", f"rank {rank} on {message['host']}, process {message['pid']}")
        else:
            self.display.show(message)

    def text(self, rank: int | None, line: str) -> None:
        """Log and show a line that a worker printed. A line of Ray's own processes (no rank) goes only to `ray.log`."""
        if rank is None:
            self._write("ray", line)
            return
        self._write(f"rank-{rank}", line)
        self.display.say(f"[rank {rank}] {line}")

    def text_of(self, name: str, text: str) -> None:
        """Write a text to the log file `name` without showing it."""
        self._write(name, text)

    def write_marks(self) -> None:
        """Write the times of `mark` to `launch.json` beside the logs. A full disk is ignored."""
        with contextlib.suppress(OSError):
            (self.folder / "launch.json").write_text(json.dumps(self._marks, indent=1) + "\n")

    def _write(self, name: str, line: str) -> None:
        self._file(name).write(line + "\n")

    def mark(self, name: str) -> None:
        """Record when the launch first reached this point, in seconds since the process started, for `launch.json`."""
        self._marks.setdefault(name, round(time.time() - psutil.Process().create_time(), 3))

    def _file(self, name: str) -> _File:
        if name not in self._files:
            self._files[name] = _File(self.folder / f"{name}.log", self.display.say)
        return self._files[name]
