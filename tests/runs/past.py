"""Past runs as a launch leaves them: a directory below ./runs, and a run in a real SQLite store of MLflow."""

from __future__ import annotations

import getpass
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from raytrainer.attempt import Record
from raytrainer.config import ClusterConfig, compose
from raytrainer.plugins import ACTIVE, Backend, Job
from raytrainer.runs.jobs import Clusters
from raytrainer.storage import Storage
from raytrainer.storage import lock as locks

ADDRESS = "http://cluster.example:8265"


def record(name: str, **fields: Any) -> tuple[Record, Storage]:
    """Create a run directory with its config and its record."""
    composition = compose(["experiment=mlp", f"name={name}"])
    assert composition.experiment.storage_path is not None
    storage = Storage(composition.experiment.storage_path).child(name)
    found = Record(name, storage.uri, created="2026-01-01T12:00:00+00:00", attempts=1, **fields)
    storage.write_bytes("config.yaml", composition.text.encode())
    found.write(storage)
    return found, storage


@dataclass
class Store:
    """The MLflow store in ./mlflow.db, filled as a launch fills it."""

    uri: str
    artifact_root: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def add(
        self,
        name: str,
        *,
        status: str = "FINISHED",
        user: str | None = None,
        on_disk: bool = True,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, Sequence[tuple[int, float]]] | None = None,
        cause: str | None = None,
        job: Mapping[str, str] | None = None,
        kind: str = "run",
        started: float | None = None,
    ) -> tuple[Record, Storage]:
        """Add a run with its directory and its MLflow run. It has a final status unless it is RUNNING."""
        made, storage = record(name, kind=kind, status=status, job=dict(job or {}), tracking_uri=self.uri)
        told = {
            "raytrainer.name": name,
            "raytrainer.run_dir": storage.uri,
            "raytrainer.where": "local Ray, 2 workers on CPU",
            "raytrainer.host": "somewhere",
            **{f"raytrainer.{key}": value for key, value in (job or {}).items()},
            **({"raytrainer.kind": kind} if kind != "run" else {}),
            **({"mlflow.user": user} if user else {}),
            **(tags or {}),
        }
        run_id = self._run(name, told, metrics or {}, status, cause, started)
        made = replace(made, run_id=run_id)
        if on_disk:
            made.write(storage)
        else:
            storage.delete("run.json")
        return made, storage

    def add_trial(self, sweep: str, number: str, *, status: str = "RUNNING") -> str:
        place = Storage(Path.cwd() / "runs" / sweep / "trials" / number).uri
        tags = {
            "raytrainer.name": f"{sweep}.{number}",
            "raytrainer.kind": "trial",
            "raytrainer.sweep": sweep,
            "raytrainer.run_dir": place,
        }
        return self._run(f"{sweep}.{number}", tags, {}, status, None, None)

    def status(self, run_id: str | None) -> tuple[str, str | None]:
        """Return the status and the cause in MLflow."""
        assert run_id is not None
        run = self.client.get_run(run_id)
        return run.info.status, run.data.tags.get("raytrainer.cause")

    def _run(
        self,
        name: str,
        tags: Mapping[str, str],
        metrics: Mapping[str, Sequence[tuple[int, float]]],
        status: str,
        cause: str | None,
        started: float | None,
    ) -> str:
        client = self.client
        experiment = client.get_experiment_by_name("mlp")
        experiment_id = experiment.experiment_id if experiment else client.create_experiment("mlp", self.artifact_root)
        start = int((started or time.time()) * 1e3)
        tags = {"mlflow.user": getpass.getuser(), **tags, **({"raytrainer.cause": cause} if cause else {})}
        run_id = str(client.create_run(experiment_id, start, dict(tags), name).info.run_id)
        rows = [Metric(key, value, start, step) for key, values in metrics.items() for step, value in values]
        client.log_batch(run_id, metrics=rows, params=[])
        if status != "RUNNING":
            client.set_terminated(run_id, status, start + 60_000)
        return run_id


def write_lease(
    storage: Storage,
    *,
    machine: str | None = "another boot pid:[1]",
    pid: int = 4242,
    started: str | None = "1",
    owner: Mapping[str, str] | None = None,
    age_s: float = 0.0,
    name: str = "a" * 32,
) -> str:
    """Write a lease on a run directory, taken and last renewed `age_s` seconds ago, and return its name."""
    since = datetime.fromtimestamp(time.time() - age_s, UTC).isoformat(timespec="seconds")
    fields = {"run": "x", "host": "elsewhere", "pid": str(pid), "since": since, **(owner or {})}
    data = json.dumps({"owner": fields, "machine": machine, "started": started}).encode()
    storage.write_bytes(f"lock/{name}.json", data)
    storage.write_bytes(f"lock/{name}.held", b"")
    if age_s:
        when = time.time() - age_s
        os.utime(storage.local_path / "lock" / f"{name}.json", (when, when))
    return name


def local_owner(pid: int) -> dict[str, Any]:
    """Return the fields of a lease whose owner is a process of this machine."""
    return {"machine": locks.machine(), "pid": pid, "started": locks.process_start(pid)}


@dataclass(frozen=True, kw_only=True)
class FakeJob(Job):
    """A job as its backend reports it."""

    status: str = "RUNNING"
    cluster: FakeCluster = field(default_factory=lambda: FakeCluster(), repr=False, compare=False)

    def refresh(self) -> Job | None:
        self.cluster.ask("info")
        return self.cluster.known.get(self.submission_id)

    def stop(self) -> None:
        self.cluster.ask("stop")
        ended = None if self.cluster.ends in ACTIVE else time.time()
        self.cluster.known[self.submission_id] = replace(self, status=self.cluster.ends, ended=ended)

    def logs(self, follow: bool = False) -> Iterator[str]:
        self.cluster.ask("tail" if follow else "logs")
        yield from (self.cluster.log[:5], self.cluster.log[5:])

    def explain_waiting(self) -> str:
        self.cluster.ask("explain_waiting")
        return "it asks for 8 GPU, of which 2 are free\nother-run holds 6 GPU"

    def held_by(self) -> dict[str, float]:
        self.cluster.ask("held_by")
        return self.cluster.holds.pop(0) if self.cluster.holds else {}


@dataclass
class FakeCluster(Backend):
    """A backend in memory. `ends` is a job's status after a stop; `holds` are the answers of `held_by`, in order."""

    known: dict[str, FakeJob] = field(default_factory=dict)
    log: str = "one\n[rank 1] two\nthree\n"
    ends: str = "STOPPED"
    holds: list[dict[str, float]] = field(default_factory=list)
    down: Exception | None = None
    asked: list[str] = field(default_factory=list)
    settings: list[ClusterConfig] = field(default_factory=list)

    def add(self, submission_id: str, status: str = "RUNNING", **fields: Any) -> FakeJob:
        self.known[submission_id] = FakeJob(submission_id=submission_id, status=status, cluster=self, **fields)
        return self.known[submission_id]

    def jobs(self, address: str, settings: ClusterConfig) -> Sequence[Job]:
        self.ask("list")
        self.settings.append(settings)
        return [*self.known.values()]

    def job(self, submission_id: str, address: str, settings: ClusterConfig) -> Job | None:
        self.ask("info")
        return self.known.get(submission_id)

    def ask(self, what: str) -> None:
        self.asked.append(what)
        if self.down is not None:
            raise self.down

    def clusters(self) -> Clusters:
        """Return clusters in which every address leads to this one."""
        return Clusters(lambda address: self)
