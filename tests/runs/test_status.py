"""Tests of `status ID` for a run that is running, pending, ended or dead, with and without MLflow and its cluster."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from raytrainer.attempt import SUBMITTED, Record
from raytrainer.errors import RunNotFound
from raytrainer.runs.status import status_of, text
from raytrainer.storage import Storage
from raytrainer.sweep import make_plan
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.trial_state import Status
from tests.runs.past import ADDRESS, FakeCluster, Store, local_owner, record, write_lease
from tests.runs.test_listing import METRICS, TAGS
from tests.runs.test_reconcile import killed

JOB = {"submission_id": "one--2", "cluster_address": ADDRESS}


def saved(storage: Storage, step: int, metric: float) -> None:
    manifest = {"step": step, "metric": metric, "created": f"2026-01-01T00:00:{step:02d}+00:00"}
    storage.write_bytes(f"checkpoints/step-{step:09d}/manifest.json", json.dumps(manifest).encode())


def test_a_running_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["raytrainer"])
    made, storage = store.add("one", status="RUNNING", tags=TAGS, metrics=METRICS, started=time.time() - 100)
    write_lease(storage, **local_owner(os.getpid()))
    for step in (20, 30):
        saved(storage, step, 0.5)
    storage.write_bytes("checkpoints/step-000000040/tensors", b"")  # not committed
    found = status_of("one")
    assert [s.step for s in found.checkpoints] == [20, 30]
    lines = text(found).splitlines()
    for line in (
        "name     one",
        "status   RUNNING",
        f"         process {os.getpid()} of this machine holds the lock",
        "where    local Ray, 2 workers on CPU, launched on somewhere",
        "step     30/132",
        "best     val/accuracy 0.97 at step 22",
        "workers  2",
        "saved    step 30, 2026-01-01T00:00:30+00:00, and 1 more",
        f"mlflow   {store.uri}  run {made.run_id}",
        f"output   {storage.uri}",
        "next     raytrainer logs -f one",
        "         raytrainer stop one",
    ):
        assert line in lines
    assert json.dumps(found.to_json())


def test_a_failed_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["raytrainer"])
    _, storage = store.add("one", status="FAILED", cause="rank 1: ValueError: x")
    saved(storage, 10, 0.5)
    lines = text(status_of("one")).splitlines()
    assert "cause    rank 1: ValueError: x" in lines
    assert "took     1:00" in lines
    assert lines[-3:] == [
        "next     raytrainer logs one",
        "         raytrainer resume one",
        "         raytrainer rerun one",
    ]


def test_an_orphan_is_closed(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
    messages: list[str] = []
    found = status_of("one", say=messages.append)
    assert found.summary.status == "FAILED"
    assert found.summary.cause is not None
    assert found.summary.cause.startswith("its driver died")
    assert store.status(made.run_id)[0] == "FAILED"
    assert len(messages) == 1


def test_without_mlflow_the_directory_is_shown(in_tmp: Path) -> None:
    _, storage = record("one", status="RUNNING", run_id="0" * 32, tracking_uri="http://127.0.0.1:9")
    write_lease(storage, **killed())
    saved(storage, 10, 0.75)
    saved(storage, 20, 0.5)
    messages: list[str] = []
    found = status_of("one", say=messages.append)
    facts = found.summary
    assert (facts.status, facts.step) == ("FAILED", 20)
    assert (facts.monitor, facts.best, facts.best_step) == ("val/accuracy", 0.75, 10)
    assert "what follows is from" in messages[0]
    assert "could not be closed" in messages[1]


def test_a_running_job(store: Store) -> None:
    _, storage = store.add("one", status="RUNNING", job=JOB)
    write_lease(storage, owner={"job": "one--2"})
    cluster = FakeCluster()
    cluster.add("one--2", message="Job is currently running.")
    for identifier in ("one", "one--2"):
        found = status_of(identifier, clusters=cluster.clusters())
        assert found.job == ("RUNNING", "Job is currently running.")
        assert f"job      one--2 at {ADDRESS}, RUNNING: Job is currently running." in text(found)


def test_a_pending_job_says_what_it_waits_for(in_tmp: Path) -> None:
    sent = Record("one", "/nowhere/one", job=JOB)
    sent.write(Storage(in_tmp / "runs" / SUBMITTED / "one"))
    cluster = FakeCluster()
    cluster.add("one--2", "PENDING", started=time.time() - 5)
    found = status_of("one", clusters=cluster.clusters())
    assert found.summary.status == "PENDING"
    assert found.to_json()["waits"] == "it asks for 8 GPU, of which 2 are free\nother-run holds 6 GPU"
    lines = text(found).splitlines()
    assert "waits    it asks for 8 GPU, of which 2 are free" in lines
    assert "         other-run holds 6 GPU" in lines


def test_a_cluster_that_does_not_answer(store: Store) -> None:
    _, storage = store.add("one", status="RUNNING", job=JOB)
    write_lease(storage, owner={"job": "one--2"})
    messages: list[str] = []
    found = status_of("one", clusters=FakeCluster(down=OSError("refused")).clusters(), say=messages.append)
    assert (found.summary.status, found.job) == ("RUNNING", None)
    assert messages == [f"the cluster {ADDRESS} could not be queried: refused"]


@pytest.fixture
def sweep(store: Store) -> Storage:
    _, storage = store.add("sweep", kind="sweep", tags={"raytrainer.trials.finished": "1"})
    plan = make_plan(
        ["experiment=mlp", "name=sweep", "sweep.num_samples=2", "optimizer.lr=0.1,0.2"],
        choice="grid",
        space={},
        groups={"experiment"},
    )
    plan.write(storage)
    journal = TrialJournal.open(storage)
    journal.begin({})
    journal.start(Trial("0001", {"optimizer.lr": 0.1}, ["optimizer.lr=0.1"], 1.0, "f" * 32))
    journal.report("0001", Report(1, 10, 0.5, {}, 1.0))
    journal.report("0001", Report(2, 20, 0.25, {}, 1.0))
    journal.end("0001", Status.PRUNED, "by the scheduler")
    journal.close()
    return storage


def test_a_sweep_and_its_trial(sweep: Storage) -> None:
    assert "trials   1 trials: 1 finished" in text(status_of("sweep"))
    found = status_of("sweep.0001").summary
    assert (found.kind, found.status, found.step, found.best, found.best_step) == ("trial", "KILLED", 20, 0.5, 10)
    assert (found.cause, found.run_dir) == ("by the scheduler", f"{sweep.uri}/trials/0001")
    with pytest.raises(RunNotFound, match="sweep has no trial 0007"):
        status_of("sweep.0007")


def test_a_job_that_was_never_submitted(in_tmp: Path) -> None:
    sent = Record("one", "/nowhere/one", job=JOB)
    sent.write(Storage(in_tmp / "runs" / SUBMITTED / "one"))
    found = status_of("one", clusters=FakeCluster().clusters())
    assert found.summary.status == "UNKNOWN"
    assert (
        found.summary.cause == f"{ADDRESS} has no job one--2: it was not submitted, or the cluster has restarted since"
    )
    found = status_of("one", clusters=FakeCluster(down=OSError("refused")).clusters())
    assert found.summary.cause == "unknown: its cluster does not answer"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "FAILED"])
@pytest.mark.parametrize("before", ["FAILED", "RUNNING"])
def test_the_running_attempt_is_shown(store: Store, before: str, state: str) -> None:
    """The attempt is a resume, or a resubmission whose dead driver is still RUNNING in MLflow."""
    made, _ = store.add(
        "one", status=before, cause="it failed" if before == "FAILED" else None, job={**JOB, "submission_id": "one"}
    )
    Record("one", made.run_dir, job=JOB).write(Storage(Path.cwd() / "runs" / SUBMITTED / "one"))
    cluster = FakeCluster()
    cluster.add("one", "FAILED", ended=time.time())
    cluster.add("one--2", state)
    found = status_of("one", clusters=cluster.clusters())
    if state == "FAILED":
        assert (found.summary.status, found.summary.submission_id) == ("FAILED", "one")
        return
    assert (found.summary.status, found.summary.cause, found.summary.submission_id) == (state, None, "one--2")
    assert found.job == (state, "")
    assert (found.waits is not None) == (state == "PENDING")
    assert store.status(made.run_id)[0] == before
