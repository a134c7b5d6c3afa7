"""A backend of another package: `cluster.kind=subprocess` starts the driver as a detached process of this machine.

It trains without Ray. `cluster.options.folder` is where its jobs keep their files and logs, by default ./jobs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from raytrainer import Experiment, Job
from raytrainer.config import ClusterConfig
from raytrainer.errors import ConfigError, JobExists
from raytrainer.submission import MOUNTED, JobBackend, Request


class Subprocess(JobBackend):
    name = "subprocess"
    schemes = ("subprocess",)
    options = ("folder",)
    driver, ray = "inline", "none"

    def validate(self, experiment: Experiment) -> Sequence[ConfigError]:
        folder, workers = experiment.cluster.options.get("folder", ""), experiment.scaling.num_workers
        problems = (
            []
            if isinstance(folder, str)
            else [ConfigError("must be a path", key="cluster.options.folder", value=folder)]
        )
        if workers != 1:
            problems.append(
                ConfigError("must be 1 with cluster.kind=subprocess", key="scaling.num_workers", value=workers)
            )
        return [*problems, *super().validate(experiment)]

    def address(self, experiment: Experiment) -> str:
        return f"subprocess://{Path(experiment.cluster.options.get('folder', 'jobs')).resolve()}"

    def start(self, request: Request, previous: Job | None = None) -> Job:
        folder = folder_at(request.address) / request.submission_id
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise JobExists(f"{folder} exists") from None
        for name, content in request.files.items():
            (folder / name).write_bytes(content)
        (folder / "metadata.json").write_text(json.dumps(dict(request.metadata)))
        # The shell outlives the driver, and writes down how it has ended.
        script = f"trap : TERM; {request.entrypoint} > log 2>&1; echo $? > exit_code.new; mv exit_code.new exit_code"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environ = {**os.environ, MOUNTED: str(folder), "PATH": path}
        shell = subprocess.Popen(["sh", "-c", script], cwd=folder, env=environ, start_new_session=True)
        (folder / "pid").write_text(str(shell.pid))
        return Process.of(folder)

    def jobs(self, address: str, settings: ClusterConfig) -> Sequence[Job]:
        return [Process.of(file.parent) for file in sorted(folder_at(address).glob("*/pid"))]


@dataclass(frozen=True, kw_only=True)
class Process(Job):
    """A driver, and the folder with its files."""

    folder: Path

    @classmethod
    def of(cls, folder: Path) -> Process:
        code, log = folder / "exit_code", folder / "log"
        exit_code = int(code.read_text()) if code.exists() else None
        status = "RUNNING" if exit_code is None else "SUCCEEDED" if exit_code == 0 else "FAILED"
        message = "".join(log.read_text().splitlines(keepends=True)[-20:]) if status == "FAILED" else ""
        if exit_code is None and not psutil.pid_exists(int((folder / "pid").read_text())):
            status, message = "FAILED", "its process was killed"
        metadata = json.loads((folder / "metadata.json").read_text())
        started, ended = (file.stat().st_mtime if file.exists() else None for file in (folder / "pid", code))
        return cls(
            submission_id=folder.name,
            status=status,
            message=message,
            metadata=metadata,
            started=started,
            ended=ended,
            exit_code=exit_code,
            folder=folder,
        )

    def refresh(self) -> Job:
        return Process.of(self.folder)

    def stop(self) -> None:
        for pid in self._living():
            os.kill(pid, signal.SIGTERM)

    def logs(self, follow: bool = False) -> Iterator[str]:
        while not (self.folder / "log").exists():
            time.sleep(0.05)
        with (self.folder / "log").open() as log:
            while True:
                goes = follow and self.refresh().is_active  # asked first: an ended job adds nothing
                yield log.read()
                if not goes:
                    return
                time.sleep(0.1)

    def held_by(self) -> Mapping[str, float]:
        return {"processes": float(len(living))} if (living := self._living()) else {}

    def _living(self) -> list[int]:
        """Return the processes of the driver, which are in its session."""
        session = int((self.folder / "pid").read_text())
        processes = [p for p in psutil.process_iter(["status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
        return [process.pid for process in processes if _session(process.pid) == session]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def folder_at(address: str) -> Path:
    return Path(address.removeprefix("subprocess://"))
