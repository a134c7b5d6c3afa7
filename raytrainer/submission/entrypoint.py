"""The driver of a job on a shared cluster. Its command is `python -m raytrainer.cluster.entry` for every run.

The request comes as files beside the code, in the package `raytrainer_request`, so no command line contains any of it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytrainer import plugins, provenance
from raytrainer.attempt import Record
from raytrainer.config import Composition, Experiment, from_text
from raytrainer.core import environment, proxies, streams
from raytrainer.errors import ConfigError, RaytrainerError, Refused, Stopped
from raytrainer.storage import Storage, redacted
from raytrainer.storage.lock import leases_in, withdraw
from raytrainer.submission.target import Target, compositions_of, first_of
from raytrainer.sweep import Plan

REQUEST = "raytrainer_request"
MOUNTED = "RAYTRAINER_REQUEST"  # a variable: the directory of a request's files that come in a Kubernetes ConfigMap


@dataclass(frozen=True)
class DriverRequest:
    """A request as its driver reads it.

    Attributes:
        kind: `run` or `sweep`.
        argv: The command line, for the records.
        config: `Composition.text` of a run.
        choices: Its group choices.
        plan: For a sweep, the content of `sweep.json`.
        changed: Optimizer settings that were given with `resume`.
        job: Address, submission_id and content, for the run record; `resumes` if the job continues an existing run;
            `replaces`, an earlier job of the same run that is known to be dead.
        forward_env, env_file: As in `environment.provide`.
        origin: The file with the submitting machine's `Provenance`.
        driver: The backend that the driver uses.
    """

    kind: str
    argv: list[str]
    config: str
    choices: dict[str, str]
    plan: dict[str, Any] | None
    changed: list[str]
    job: dict[str, str]
    forward_env: list[str]
    env_file: str | None
    origin: Path | None = None
    driver: str = plugins.ON_ITS_CLUSTER

    @classmethod
    def read(cls, folder: Path) -> DriverRequest:
        """Read the files of a request."""
        content: Mapping[str, Any] = json.loads((folder / "request.json").read_text())
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        origin = folder / provenance.FILE
        return cls(
            **{
                "config": (folder / "config.yaml").read_text(),
                "plan": None,
                "changed": [],
                "origin": origin if origin.exists() else None,
                **known,
            }
        )

    @property
    def place(self) -> dict[str, str]:
        """The value of `Record.job`."""
        return {name: self.job[name] for name in ("submission_id", "cluster_address", "content") if name in self.job}


def main() -> int:
    """Run the request. Return the exit code that the same command has on a laptop."""
    try:
        return run(DriverRequest.read(_folder()))
    except Refused as error:
        _say_end("refused", error)
        return 2
    except Stopped as error:
        _say_end("stopped", error)
        return error.exit_code
    except RaytrainerError as error:
        _say_end("failed", error)
        return 1


def start() -> int:
    """Prepare this process as a driver, and run the request."""
    streams.protect()
    proxies.exempt_loopback()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return main()


def _say_end(how: str, error: RaytrainerError) -> None:
    """Print how the run ended, and last the cause in one line, because Ray keeps only the last ten lines."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    if more:
        print(f"raytrainer: {how}:", *(f"  {line}" for line in (first, *more)), sep="\n", file=sys.stderr)
        first += f" (and {len(more)} more {'line' if len(more) == 1 else 'lines'} above)"
    print(f"raytrainer: {how}: {first}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(f"raytrainer: {text}", flush=True)


def run(request: DriverRequest) -> int:
    """Run a request in this process, which is on the cluster."""
    # Printed before the imports, which take seconds, so that the log starts at once.
    print(f"raytrainer: job {request.job.get('submission_id')} on {platform.node()}", flush=True)
    environment.provide(request.forward_env, request.env_file)
    if request.origin is not None:
        provenance.adopt(request.origin)
    target = _target(request)
    for composition in compositions_of(target):
        use_driver_backend(composition.experiment, request.driver)
    record = _earlier(first_of(target), request)
    if record is not None and (code := _ended(record, request)) is not None:
        return code
    from raytrainer import attempt, sweep

    package: Any = sweep if request.kind == "sweep" else attempt
    options = {} if request.kind == "sweep" else {"changed": request.changed}
    outcome = package.launch(target, argv=request.argv, record=record, job=request.place, **options)
    if outcome.traceback:
        print(outcome.traceback, file=sys.stderr)
    print(package.summary(outcome, "python -m raytrainer"), flush=True)
    return int(outcome.exit_code)


def _target(request: DriverRequest) -> Target:
    if request.kind == "sweep":
        return Plan.from_dict(request.plan or {})
    return replace(from_text(request.config), choices=tuple(sorted(request.choices.items())))


def use_driver_backend(e: Experiment, name: str = plugins.ON_ITS_CLUSTER) -> None:
    """Change the experiment's backend to that of the driver in this process. The logged config keeps the original.

    Args:
        e: The experiment.
        name: The backend; its address is the Ray on this machine, if it has one.
    """
    e.cluster.kind = name
    e.cluster.address = "auto" if e.backend.address_form is not None else None
    e.cluster.runtime_env = {}  # the job has it already, and its workers inherit it


def _earlier(composition: Composition, request: DriverRequest) -> Record | None:
    """Return the record of the run that this job continues, after `resume` or an earlier attempt at the same request.

    Raises:
        ConfigError: The name belongs to another run.
    """
    e, job = composition.experiment, request.job
    storage = Storage(e.storage_path or "").child(e.name or "")
    record = Record.read(storage)
    if record is None:
        return None
    if record.job.get("content") != job.get("content") and not job.get("resumes"):
        raise ConfigError(
            f"is the name of an existing run with different content in {redacted(e.storage_path or '')}; resume {e.name} continues that run",
            key="name",
            value=e.name,
        )
    _wait_for_leases(record, storage.child("lock"), {job.get("submission_id", ""), job.get("replaces", "")}, say=_say)
    return record


_LEASE_S = 80.0  # after this time a lease without a heartbeat is stale
_HEARTBEAT_S = 15.0  # a live driver renews its lease more often


def _wait_for_leases(
    record: Record,
    lock: Storage,
    jobs: Collection[str],
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait until earlier drivers of this run have no lease.

    Those are the drivers of the attempt that this job replaces, and of this same job if the cluster restarts it. The
    cluster reports that they are dead. A driver that is alive in spite of that still occupies its node.

    Args:
        record: The run record.
        lock: The directory of leases.
        jobs: The submission ids of those drivers.
        say: Receives a line that says what is waited for.
        sleep, clock: Replaced in tests.
    """
    began, reported, heartbeats = clock(), False, dict[str, tuple[float, float]]()
    while theirs := [c for c in leases_in(lock) if c.owner.get("job") in jobs]:
        now = clock()
        for lease in theirs:
            heartbeat, since = heartbeats.setdefault(lease.name, (lease.heartbeat, now))
            if heartbeat != lease.heartbeat:
                heartbeats[lease.name] = (lease.heartbeat, now)
            if not lease.lives if lease.is_here else now - since >= _HEARTBEAT_S:
                withdraw(lock, lease)
        if now - began > _LEASE_S:
            return  # then the launch raises an error that names the owner
        if not reported and now - began > 1.0:
            say(f"{record.name}: an earlier driver holds the run directory; waiting for its lease to become stale")
            reported = True
        sleep(0.5)


_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 143}


def _ended(record: Record, request: DriverRequest) -> int | None:
    """Return the exit code of a run that has ended, if this request only repeats it; None if there is work to do.

    Some clusters repeat every job that fails, and a restarted cluster forgets its jobs.
    """
    # Another process marked the run of a killed driver FAILED; that does not end the request.
    if request.job.get("replaces") and record.status == "FAILED":
        return None
    is_the_same = record.job.get("submission_id") == request.job.get("submission_id") or not request.job.get("resumes")
    if record.status not in _CODES or not is_the_same:
        return None
    print(f"raytrainer: {record.name} has already ended: {record.status}; nothing is repeated", flush=True)
    return _CODES[record.status]


def _folder() -> Path:
    """Return the directory in which Ray or Kubernetes has put the request's files."""
    if mounted := os.environ.get(MOUNTED):
        return Path(mounted)
    spec = importlib.util.find_spec(REQUEST)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the package {REQUEST}, which every submission contains, is missing: this job was not submitted by raytrainer"
        )
    return Path(spec.submodule_search_locations[0])
