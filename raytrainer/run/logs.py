"""The logs of driver and ranks, and when the launch got how far."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

from raytrainer.errors import RaytrainerError
from raytrainer.progress import Display
from raytrainer.storage import Storage


class _Warnings(logging.Handler):
    """Warnings of raytrainer's modules, shown as lines."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(f"warning: {record.getMessage()}")


@dataclass
class Logs:
    """The logs of driver and ranks, as files in the run's directory (or a temporary one) and on the display."""

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
        self._files: dict[str, TextIO] = {}
        self._marks: dict[str, float] = {}
        self.display.also = self._file("driver")
        # This process's own warnings (a lost server, a corrupt checkpoint) are for the person who watches.
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
        """A worker's message: shown, and where it says who the worker is, written to its log."""
        self.mark(
            {"hello": "worker_up", "start": "training_starts", "log": "first_log"}.get(message["kind"], "first_other")
        )
        if message["kind"] == "hello":
            self._write(f"rank-{rank}", f"rank {rank} on {message['host']}, process {message['pid']}")
        else:
            self.display.show(message)

    def text(self, rank: int | None, line: str) -> None:
        """A line that a worker printed; one of Ray's own processes (no rank) goes to `ray.log` alone."""
        if rank is None:
            self._write("ray", line)
            return
        self._write(f"rank-{rank}", line)
        self.display.say(f"[rank {rank}] {line}")

    def text_of(self, name: str, text: str) -> None:
        """A text for the log file `name` alone."""
        self._write(name, text)

    def flush(self) -> None:
        (self.folder / "launch.json").write_text(json.dumps(self._marks, indent=1) + "\n")
        for file in self._files.values():
            file.flush()

    def _write(self, name: str, line: str) -> None:
        self._file(name).write(line + "\n")

    def mark(self, name: str) -> None:
        """Notes when the launch got so far, in seconds since its process began: `launch.json` beside the logs."""
        self._marks.setdefault(name, round(time.time() - psutil.Process().create_time(), 3))

    def _file(self, name: str) -> TextIO:
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.log").open("a", encoding="utf-8", errors="replace", buffering=1)
        return self._files[name]
