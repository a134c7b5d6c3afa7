"""Tests of what a job's driver does with a request: it starts the requested run once, exactly as requested."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrainer import attempt, provenance, sweep
from raytrainer.attempt import Outcome, Record
from raytrainer.config import compose, group_names
from raytrainer.errors import ConfigError
from raytrainer.provenance import Provenance
from raytrainer.storage import Storage
from raytrainer.storage.lock import leases_in
from raytrainer.submission import entrypoint
from raytrainer.submission.entrypoint import DriverRequest
from raytrainer.sweep import Plan, make_plan

JOB = {"submission_id": "one", "cluster_address": "https://203.0.113.7", "content": "abc"}


@pytest.fixture
def launched(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of `launch` for a run or a sweep."""
    calls = list[dict[str, Any]]()

    def launch(thing: Any, **given: Any) -> Any:
        calls.append({"thing": thing, **given})
        record = Record("one", "/runs/one")
        if isinstance(thing, Plan):
            return Outcome("FAILED", 1, record, "", traceback="Traceback of a trial")
        return Outcome("FINISHED", 0, record, "Ray, 2 workers")

    monkeypatch.setattr(attempt, "launch", launch)
    monkeypatch.setattr(sweep, "launch", launch)
    monkeypatch.setattr(sweep, "summary", lambda outcome, program: "the summary of a sweep")
    monkeypatch.setenv("RAYTRAINER_SUBMITTED_BY", "")
    return calls


def asked(**fields: Any) -> DriverRequest:
    composition = compose(["experiment=mlp", "name=one", "cluster=job", "cluster.address=https://203.0.113.7"])
    given = {
        "kind": "run",
        "argv": ["experiment=mlp"],
        "config": composition.text,
        "choices": {"model": "mlp"},
        "plan": None,
        "changed": [],
        "job": JOB,
        "forward_env": [],
        "env_file": None,
    }
    return DriverRequest(**{**given, **fields})


def directory() -> Storage:
    return Storage(Path.cwd() / "runs" / "one")


def test_it_runs_in_the_middle_of_the_cluster(
    launched: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    origin = Path.cwd() / "origin.json"
    origin.write_bytes(Provenance("python -m raytrainer …", commit="0" * 40, user="ada").to_json())
    assert entrypoint.run(asked(origin=origin, changed=["lr"])) == 0
    (call,) = launched
    cluster = call["thing"].experiment.cluster
    assert (cluster.kind, cluster.address, cluster.runtime_env) == ("existing", "auto", {})
    assert "kind: job" in call["thing"].text
    assert (call["job"], call["record"], call["changed"], call["argv"]) == (JOB, None, ["lr"], ["experiment=mlp"])
    assert (provenance.user(), provenance.collect([], Path.cwd()).commit) == ("ada", "0" * 40)
    printed = capsys.readouterr().out
    assert printed.startswith("raytrainer: job one on ")
    assert "outcome  finished" in printed


def test_a_sweep(launched: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["experiment=mlp", "name=one", "cluster=job", "cluster.address=https://203.0.113.7"]
    plan = make_plan([*overrides, "sweep=grid", "optimizer.lr=0.1,0.2"], choice="grid", space={}, groups=group_names())
    assert entrypoint.run(asked(kind="sweep", plan=plan.to_dict())) == 1
    (call,) = launched
    assert {c.experiment.cluster.kind for c in call["thing"].compositions.values()} == {"existing"}
    assert "Traceback of a trial" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("FINISHED", 0), ("FAILED", 1), ("KILLED", 143)])
def test_what_has_ended_is_not_done_again(
    launched: list[dict[str, Any]], status: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ended run does not start again if its cluster forgets the job or retries every failed job."""
    Record("one", directory().uri, status=status, job=JOB).write(directory())
    assert entrypoint.run(asked()) == code
    assert entrypoint.run(asked(job={**JOB, "resumes": "true"})) == code
    assert launched == []
    assert f"one has already ended: {status}" in capsys.readouterr().out
    # Another job that resumes the run starts it.
    assert entrypoint.run(asked(job={**JOB, "submission_id": "one--2", "resumes": "true"})) == 0
    assert launched[0]["record"].status == status


def test_what_died_goes_on(launched: list[dict[str, Any]]) -> None:
    Record("one", directory().uri, run_id="0" * 32, job=JOB).write(directory())
    entrypoint.run(asked(job={**JOB, "submission_id": "one--2", "replaces": "one"}))
    assert launched[0]["record"].run_id == "0" * 32
    assert launched[0]["job"] == {**JOB, "submission_id": "one--2"}


def test_what_somebody_has_closed_goes_on_all_the_same(launched: list[dict[str, Any]]) -> None:
    """The next attempt starts even if `list` has marked the run FAILED because its driver was killed."""
    Record("one", directory().uri, status="FAILED", job=JOB).write(directory())
    assert entrypoint.run(asked(job={**JOB, "submission_id": "one--2", "replaces": "one"})) == 0
    assert len(launched) == 1
    Record("one", directory().uri, status="FINISHED", job=JOB).write(directory())
    entrypoint.run(asked(job={**JOB, "submission_id": "one--3", "replaces": "one--2"}))
    assert len(launched) == 1


@contextmanager
def claimed(job: str, machine: str | None = "another") -> Iterator[Callable[[], None]]:
    """Hold a lease for a driver of `job` on another machine, and yield a function that renews it."""
    with directory().lock("lock", {"run": "one", "job": job}):
        (file,) = (directory().local_path / "lock").glob("*.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "machine": machine}))
        beats = itertools.count(1)
        yield lambda: os.utime(file, (0, next(beats)))


@pytest.mark.parametrize("job", ["one", "one--2"])
def test_the_claim_of_a_dead_driver_is_withdrawn(launched: list[dict[str, Any]], job: str) -> None:
    """The lease belongs to the attempt that this one replaces, or to this one before its cluster restarted it."""
    record, lock = Record("one", directory().uri, job=JOB), directory().child("lock")
    said, now = list[str](), [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    with claimed(job):
        entrypoint._wait_for_leases(record, lock, {"one", "one--2"}, say=said.append, sleep=sleep, clock=lambda: now[0])
        assert leases_in(lock) == []
    assert entrypoint._HEARTBEAT_S <= now[0] < entrypoint._HEARTBEAT_S + 1
    assert said == ["one: an earlier driver holds the run directory; waiting for its lease to become stale"]


def test_the_claim_of_one_that_lives_stays(launched: list[dict[str, Any]]) -> None:
    record, lock = Record("one", directory().uri, job=JOB), directory().child("lock")
    now = [0.0]
    with claimed("one") as beat:

        def sleep(seconds: float) -> None:
            now[0] += seconds
            beat()

        entrypoint._wait_for_leases(record, lock, {"one"}, say=lambda text: None, sleep=sleep, clock=lambda: now[0])
        assert len(leases_in(lock)) == 1
        assert now[0] > entrypoint._LEASE_S
        now[0] = 0.0
        entrypoint._wait_for_leases(record, lock, {"another"}, say=lambda text: None, sleep=sleep, clock=lambda: now[0])
        assert now[0] == 0.0


def test_another_runs_name(launched: list[dict[str, Any]]) -> None:
    Record("one", directory().uri, job={**JOB, "content": "other"}).write(directory())
    with pytest.raises(ConfigError, match=r"^name=one .*existing run .* resume one"):
        entrypoint.run(asked())
    entrypoint.run(asked(job={**JOB, "resumes": "true", "submission_id": "one--2"}))
    assert len(launched) == 1


def test_the_program_reads_its_files(tmp_path: Path) -> None:
    """The program runs as Ray starts it. Its request is refused, so the test needs no cluster."""
    folder = tmp_path / entrypoint.REQUEST
    folder.mkdir()
    (folder / "__init__.py").write_bytes(b"")
    given = asked(job={**JOB}, forward_env=["NOT_THERE"])
    (folder / "config.yaml").write_text(given.config)
    told = {k: v for k, v in vars(replace(given, config="")).items() if k not in ("config", "origin")}
    (folder / "request.json").write_text(json.dumps(told))
    done = subprocess.run(
        [sys.executable, "-m", "raytrainer.cluster.entry"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "raytrainer: refused: " in done.stderr
    assert "NOT_THERE" in done.stderr
