"""Tests of marking dead runs with their final status, in MLflow and in their records: once, and never a live run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raytrainer import tracking
from raytrainer.attempt import Record
from raytrainer.errors import StorageLocked
from raytrainer.runs import reconcile
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.jobs import Clusters
from raytrainer.runs.liveness import LIMIT_S, Liveness, LockState
from raytrainer.runs.resolve import resolve_run, with_mlflow_run
from raytrainer.storage import Storage
from raytrainer.tracking.server import Server
from tests.runs.past import ADDRESS, FakeCluster, Store, claim, of_here

JOB = {"submission_id": "one", "cluster_address": ADDRESS}


def killed() -> dict[str, Any]:
    """Return the lease fields of a process of this machine that has been killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        who = of_here(process.pid)
        process.kill()
    return who


def look(name: str, clusters: Clusters) -> tuple[RunHandle, Liveness]:
    known = with_mlflow_run(resolve_run(name))
    return known, reconcile.check_liveness(known, clusters)


def test_a_killed_driver(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    claim(storage, **killed(), age_s=1000)
    said: list[str] = []
    clusters = Clusters()
    assert reconcile.close_orphans([look("one", clusters)], clusters, said.append) == {"one"}
    status, cause = store.status(made.run_id)
    assert status == "FAILED"
    assert cause is not None
    assert cause.startswith("its driver died: process ")
    assert cause.endswith(" on elsewhere is gone")
    ended = store.client.get_run(made.run_id).info.end_time
    assert ended / 1000 == pytest.approx(time.time() - 1000, abs=60)  # its last heartbeat, not now
    found = Record.read(storage)
    assert found is not None
    assert found.status == "FAILED"
    assert storage.list("lock") == []
    assert len(said) == 1
    assert said[0].startswith("one is marked FAILED: its driver is dead (process ")
    assert reconcile.close_orphans([look("one", clusters)], clusters, said.append) == set()


def test_one_that_lives_is_left_alone(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    claim(storage, **of_here(os.getpid()), age_s=1000)
    clusters = Clusters()
    known, liveness = look("one", clusters)
    assert liveness.state == "alive"
    assert reconcile.close_orphans([(known, liveness)], clusters, print) == set()
    # The liveness was true when it was made, but the run has been resumed since then.
    assert not reconcile.close_orphan(known, Liveness("dead", "", "FAILED", "x"), clusters)
    assert store.status(made.run_id) == ("RUNNING", None)


def test_an_end_told_in_between_stands(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    claim(storage, **killed())
    clusters = Clusters()
    known, liveness = look("one", clusters)
    store.client.set_terminated(made.run_id, "FINISHED", 5000)
    assert not reconcile.close_orphan(known, liveness, clusters)
    assert store.status(made.run_id) == ("FINISHED", None)


def test_an_attempt_that_began_in_between_is_left_alone(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    claim(storage, **killed())
    clusters = Clusters()
    known, liveness = look("one", clusters)
    Record(**{**made.__dict__, "attempts": 2}).write(storage)
    assert not reconcile.close_orphan(known, liveness, clusters)
    assert store.status(made.run_id)[0] == "RUNNING"


def test_nobody_can_go_on_with_it_while_it_is_closed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = store.add("one", status="RUNNING")
    claim(storage, **killed())
    tried = []

    def told(*_: object) -> bool:
        with pytest.raises(StorageLocked, match="one, being closed"):
            storage.lock("lock", {"run": "one"}).acquire()
        tried.append(True)
        return True

    monkeypatch.setattr(reconcile, "_close_in_mlflow", told)
    clusters = Clusters()
    assert reconcile.close_orphan(*look("one", clusters), clusters)
    assert tried == [True]


def test_what_the_dead_driver_had_in_its_spool_is_sent_first(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    claim(storage, **killed())
    assert made.run_id is not None
    tracker = tracking.MlflowTracker(
        made.run_id, store.uri, storage.local_path / "spool", ship=False, system_metrics=False
    )
    tracker.log_metrics({"train/loss": 0.5}, 17)
    tracker.close()
    clusters = Clusters()
    assert reconcile.close_orphan(*look("one", clusters), clusters)
    run = store.client.get_run(made.run_id)
    assert (run.info.status, run.data.metrics) == ("FAILED", {"train/loss": 0.5})


def test_an_end_that_mlflow_was_not_told_is_told(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    Record(**{**made.__dict__, "status": "FINISHED"}).write(storage)
    clusters = Clusters()
    assert reconcile.close_orphan(*look("one", clusters), clusters)
    assert store.status(made.run_id)[0] == "FINISHED"


def test_a_dead_sweep_takes_its_trials_along(store: Store) -> None:
    made, storage = store.add("sweep", kind="sweep", status="RUNNING")
    claim(storage, **killed())
    running, ended = store.add_trial("sweep", "0001"), store.add_trial("sweep", "0002", status="FINISHED")
    other = store.add_trial("other", "0001")
    clusters = Clusters()
    assert reconcile.close_orphan(*look("sweep", clusters), clusters)
    assert store.status(made.run_id)[0] == "FAILED"
    assert store.status(running) == ("KILLED", "its sweep sweep died")
    assert store.status(ended)[0] == "FINISHED"
    assert store.status(other)[0] == "RUNNING"


@pytest.mark.parametrize(
    ("state", "status", "cause"),
    [("STOPPED", "KILLED", "its job one was stopped"), ("FAILED", "FAILED", "its job one failed: no more memory")],
)
def test_a_job_that_ended(store: Store, state: str, status: str, cause: str) -> None:
    made, storage = store.add("one", status="RUNNING", job=JOB)
    claim(storage, owner={"job": "one"})  # of a driver on another machine that was just killed
    cluster = FakeCluster(log="the last words\n")
    now = float(int(time.time()))
    cluster.add("one", state, message="no more memory", started=now - 60, ended=now)
    clusters = cluster.clusters()
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == {"one"}
    assert store.status(made.run_id) == (status, cause)
    assert store.client.get_run(made.run_id).info.end_time == now * 1000
    assert made.run_id is not None
    assert Server(store.uri).read_artifact(made.run_id, "logs/job.log") == b"the last words\n"
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == set()
    assert storage.list("lock") == []  # nobody has to wait until the lease is stale
    assert cluster.asked.count("list") == 1  # a cluster is asked once, however many runs it has


def test_a_job_whose_directory_cannot_be_read(store: Store) -> None:
    made, _ = store.add("one", status="RUNNING", job=JOB, on_disk=False)
    cluster = FakeCluster()
    clusters = cluster.clusters()
    # The cluster does not know the job, and the directory cannot be read.
    assert look("one", clusters)[1].state == "unsure"
    cluster.add("one", "STOPPED")
    clusters = cluster.clusters()
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == {"one"}
    assert store.status(made.run_id)[0] == "KILLED"


def test_a_job_that_went_well_and_could_not_tell(store: Store) -> None:
    made, _ = store.add("one", status="RUNNING", job=JOB, on_disk=False)
    cluster = FakeCluster()
    cluster.add("one", "SUCCEEDED", exit_code=0)
    clusters = cluster.clusters()
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == {"one"}
    assert store.status(made.run_id) == ("FINISHED", "its job one succeeded, but MLflow does not have the status")


def test_a_cluster_that_is_gone(store: Store) -> None:
    """The lease decides: the driver is dead only when its lease is stale."""
    made, storage = store.add("one", status="RUNNING", job=JOB)
    name = claim(storage, owner={"job": "one"}, age_s=100)
    clusters = FakeCluster(down=OSError("connection refused")).clusters()
    assert look("one", clusters)[1].state == "alive"
    assert clusters.silent == {ADDRESS: "connection refused"}
    when = time.time() - LIMIT_S - 10
    os.utime(storage.local_path / "lock" / f"{name}.json", (when, when))
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == {"one"}
    assert store.status(made.run_id)[0] == "FAILED"


def test_a_store_that_cannot_be_told_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = store.add("one", status="RUNNING")
    claim(storage, **killed())
    clusters = Clusters()
    found = look("one", clusters)
    Path("mlflow.db").unlink()
    Path("mlflow.db").mkdir()
    said: list[str] = []
    assert reconcile.close_orphans([found], clusters, said.append) == set()
    assert len(said) == 1
    assert "could not be closed" in said[0]


def test_one_that_takes_too_long_to_look_at_is_left_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = store.add("one", status="RUNNING")
    claim(storage, **killed())
    store.add("two", status="RUNNING")

    over = threading.Event()

    def read(storage: Storage | None) -> LockState:
        if storage is not None and storage.uri.endswith("two"):
            over.wait(60)
        return read_lock(storage)

    read_lock = LockState.read
    monkeypatch.setattr(LockState, "read", read)
    monkeypatch.setattr(reconcile, "_CHECK_S", 0.5)
    found = [liveness for _, liveness in reconcile.check_all([resolve_run("one"), resolve_run("two")], Clusters())]
    over.set()
    assert [liveness.state for liveness in found] == ["dead", "unsure"]
    assert found[1].reason == "it could not be looked at: no answer in 0.5 s"
