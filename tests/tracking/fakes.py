"""A tracking server in memory that identifies rows as MLflow does, and fails when and how a test says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raytrainer.errors import TrackingUnreachable
from raytrainer.tracking.failures import Rejected, RunGone
from raytrainer.tracking.segments import SpoolRow
from raytrainer.tracking.server import RunState


@dataclass
class FakeRun:
    name: str
    experiment_id: str
    start_time: int | None
    rows: set[SpoolRow] = field(default_factory=set)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    end_time: int | None = None
    active: bool = True

    def count(self) -> dict[tuple[str, int], int]:
        counts: dict[tuple[str, int], int] = {}
        for row in self.rows:
            counts[row.key, row.step] = counts.get((row.key, row.step), 0) + 1
        return counts


class FakeServer:
    """A fake server. `before` and `after` run around every call and may raise: the call is lost, or done but not
    acknowledged."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.experiments: dict[str, str] = {}
        self.calls: list[str] = []
        self.down = False
        self.before: Callable[[str], None] = lambda name: None
        self.after: Callable[[str], None] = lambda name: None
        self.refuses: set[str] = set()

    def add(self, run_id: str = "r") -> FakeRun:
        self.runs[run_id] = FakeRun("name", "0", 0)
        return self.runs[run_id]

    def with_timeout(self, timeout_s: int) -> FakeServer:
        return self

    def log_batch(
        self, run_id: str, rows: Sequence[SpoolRow], tags: Mapping[str, str], params: Mapping[str, str] | None = None
    ) -> None:
        run = self._begin("log_batch", run_id)
        if not run.active:
            raise Rejected("the run must be active")
        if self.refuses & ({row.key for row in rows} | set(tags) | set(params or {})):
            raise Rejected("invalid name")
        assert len(rows) <= 1000
        for key, value in (params or {}).items():
            if run.params.get(key, value) != value:
                raise Rejected(f"{key} changed")
        run.params |= params or {}
        run.rows |= set(rows)
        run.tags |= tags
        self.after("log_batch")

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        run = self._begin("log_artifact", run_id)
        for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
            name = str(file.relative_to(path.parent))
            run.artifacts[f"{folder}/{name}" if folder else name] = file.read_text(encoding="utf-8", errors="replace")
        self.after("log_artifact")

    def run(self, run_id: str) -> RunState:
        run = self._begin("run", run_id)
        steps: dict[str, int] = {}
        for row in run.rows:
            steps[row.key] = max(row.step, steps.get(row.key, row.step))
        self.after("run")
        return RunState(run_id, run.experiment_id, run.active, dict(run.params), dict(run.tags), steps)

    def experiment(self, name: str, artifact_root: str | None) -> str:
        self._begin("experiment")
        return self.experiments.setdefault(name, str(len(self.experiments) + 1))

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_time: int | None) -> str:
        self._begin("create_run")
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = FakeRun(name, experiment_id, start_time, tags=dict(tags))
        self.after("create_run")
        return run_id

    def find_run(self, experiment_id: str, tag: str, value: str) -> str | None:
        self._begin("find_run")
        return next((run_id for run_id, run in self.runs.items() if run.tags.get(tag) == value), None)

    def set_running(self, run_id: str) -> None:
        self._begin("set_running", run_id).status = "RUNNING"

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        run = self._begin("set_terminated", run_id)
        run.status, run.end_time = status, end_time
        self.after("set_terminated")

    def _begin(self, name: str, run_id: str | None = None) -> FakeRun:
        self.calls.append(name)
        if self.down:
            raise TrackingUnreachable("connection refused")
        self.before(name)
        if run_id is None:
            return FakeRun("", "", None)
        if run_id not in self.runs:
            raise RunGone(f"no run {run_id}")
        return self.runs[run_id]
