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
from tests.runs.past import ADDRESS, FakeCluster, Store, local_owner, write_lease

JOB = {"submission_id": "one", "cluster_address": ADDRESS}


def killed() -> dict[str, Any]:
    """Return the lease fields of a process of this machine that has been killed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        who = local_owner(process.pid)
        process.kill()
    return who


def look(name: str, clusters: Clusters) -> tuple[RunHandle, Liveness]:
    known = with_mlflow_run(resolve_run(name))
    return known, reconcile.check_liveness(known, clusters)


def test_a_killed_driver(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed(), age_s=1000)
    messages: list[str] = []
    clusters = Clusters()
    assert reconcile.close_orphans([look("one", clusters)], clusters, messages.append) == {"one"}
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
    assert len(messages) == 1
    assert messages[0].startswith("one is marked FAILED: its driver is dead (process ")
    assert reconcile.close_orphans([look("one", clusters)], clusters, messages.append) == set()


def test_a_live_run_is_left_alone(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **local_owner(os.getpid()), age_s=1000)
    clusters = Clusters()
    known, liveness = look("one", clusters)
    assert liveness.state == "alive"
    assert reconcile.close_orphans([(known, liveness)], clusters, print) == set()
    # The liveness was true when it was made, but the run has been resumed since then.
    assert not reconcile.close_orphan(known, Liveness("dead", "", "FAILED", "x"), clusters)
    assert store.status(made.run_id) == ("RUNNING", None)


def test_a_final_status_written_meanwhile_stays(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
    clusters = Clusters()
    known, liveness = look("one", clusters)
    store.client.set_terminated(made.run_id, "FINISHED", 5000)
    assert not reconcile.close_orphan(known, liveness, clusters)
    assert store.status(made.run_id) == ("FINISHED", None)


def test_an_attempt_that_started_meanwhile_is_left_alone(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
    clusters = Clusters()
    known, liveness = look("one", clusters)
    Record(**{**made.__dict__, "attempts": 2}).write(storage)
    assert not reconcile.close_orphan(known, liveness, clusters)
    assert store.status(made.run_id)[0] == "RUNNING"


def test_a_run_cannot_be_resumed_while_it_is_closed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
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


def test_the_spool_of_a_dead_driver_is_uploaded_first(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
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


def test_a_final_status_that_mlflow_lacks_is_sent(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    Record(**{**made.__dict__, "status": "FINISHED"}).write(storage)
    clusters = Clusters()
    assert reconcile.close_orphan(*look("one", clusters), clusters)
    assert store.status(made.run_id)[0] == "FINISHED"


def test_the_trials_of_a_dead_sweep_are_closed(store: Store) -> None:
    made, storage = store.add("sweep", kind="sweep", status="RUNNING")
    write_lease(storage, **killed())
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
    write_lease(storage, owner={"job": "one"})  # of a driver on another machine that was just killed
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


def test_a_job_that_succeeded_without_reaching_mlflow(store: Store) -> None:
    made, _ = store.add("one", status="RUNNING", job=JOB, on_disk=False)
    cluster = FakeCluster()
    cluster.add("one", "SUCCEEDED", exit_code=0)
    clusters = cluster.clusters()
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == {"one"}
    assert store.status(made.run_id) == ("FINISHED", "its job one succeeded, but MLflow does not have the status")


def test_a_cluster_that_is_gone(store: Store) -> None:
    """The lease decides: the driver is dead only when its lease is stale."""
    made, storage = store.add("one", status="RUNNING", job=JOB)
    name = write_lease(storage, owner={"job": "one"}, age_s=100)
    clusters = FakeCluster(down=OSError("connection refused")).clusters()
    assert look("one", clusters)[1].state == "alive"
    assert clusters.silent == {ADDRESS: "connection refused"}
    when = time.time() - LIMIT_S - 10
    os.utime(storage.local_path / "lock" / f"{name}.json", (when, when))
    assert reconcile.close_orphans([look("one", clusters)], clusters, print) == {"one"}
    assert store.status(made.run_id)[0] == "FAILED"


def test_a_store_that_cannot_be_written_is_reported(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
    clusters = Clusters()
    found = look("one", clusters)
    Path("mlflow.db").unlink()
    Path("mlflow.db").mkdir()
    messages: list[str] = []
    assert reconcile.close_orphans([found], clusters, messages.append) == set()
    assert len(messages) == 1
    assert "could not be closed" in messages[0]


def test_a_run_that_takes_too_long_to_check_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
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
