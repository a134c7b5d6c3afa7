"""Tests of `stop ID`: signals to real processes, stop files for other machines, jobs, and the reported result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytrainer.attempt import STOP, SUBMITTED, Record, StopRequest
from raytrainer.errors import ConfigError, RaytrainerError
from raytrainer.runs import stop
from raytrainer.runs.stop import Stopper, StopResult
from raytrainer.storage import Storage
from tests.runs.past import ADDRESS, FakeCluster, Store, local_owner, write_lease
from tests.runs.test_reconcile import killed

JOB = {"submission_id": "one", "cluster_address": ADDRESS}

# A driver with one worker. With `deaf` it does not end on SIGTERM. It writes how many signals it has received.
DRIVER = """
import pathlib, signal, subprocess, sys, time
deaf, worker_stays, place = sys.argv[1] == "deaf", sys.argv[2] == "stays", pathlib.Path(sys.argv[3])
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))
ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); " if worker_stays else "print(flush=True); "
worker = subprocess.Popen([sys.executable, "-c", ignore + "import time; time.sleep(600)"], stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
told = None
while deaf or not got:
    time.sleep(0.01)
    if told != len(got):  # a file that is written is empty for a moment
        told = len(got)
        (place / "got").write_text(str(told))
if not worker_stays:
    worker.terminate()
    worker.wait()
record = place / "run.json"
record.write_text(record.read_text().replace('"RUNNING"', '"KILLED"'))
"""


@contextmanager
def driver(storage: Storage, *, deaf: bool = False, worker_stays: bool = False) -> Iterator[tuple[Any, int]]:
    """Start the driver of a run, and yield its process and the process id of its worker."""
    arguments = ["deaf" if deaf else "hears", "stays" if worker_stays else "goes", str(storage.local_path)]
    program = textwrap.dedent(DRIVER)
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        write_lease(storage, **local_owner(process.pid), owner={"run": "one"})
        try:
            yield process, worker
        finally:
            for pid in (process.pid, worker):
                try:
                    os.kill(pid, 9)
                except ProcessLookupError:
                    continue


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# --- a process of this machine ----------------------------------------------------------------------------------------


def test_a_local_run_ends_with_all_its_processes(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    messages: list[str] = []
    with driver(storage) as (process, worker):
        result = Stopper("one", say=messages.append).stop()
        assert gone(process.pid)
        assert gone(worker)
    assert (result.is_stopped, result.status, result.message) == (True, "KILLED", "its 2 processes are gone")
    assert messages == [f"one: asked process {process.pid} to end after a last checkpoint"]
    assert (
        replace(result, seconds=0.2).text("raytrainer")
        == "one is stopped (KILLED) after 0:00: its 2 processes are gone"
    )
    assert store.status(made.run_id)[0] == "KILLED"  # the record had this status, but MLflow did not


def test_a_worker_that_outlives_its_driver_is_reported(store: Store) -> None:
    _, storage = store.add("one", status="RUNNING")
    with driver(storage, worker_stays=True) as (_, worker):
        result = Stopper("one", timeout_s=1.0).stop()
        assert (result.is_stopped, result.message) == (False, f"1 of its processes are still there: {worker}")
        assert result.text("raytrainer").splitlines()[1] == "next     raytrainer stop --force one"


def test_a_driver_that_ignores_signals_is_killed_with_force_only(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made, storage = store.add("one", status="RUNNING")
    monkeypatch.setattr(stop, "_SECOND_S", 0.3)
    monkeypatch.setattr(stop, "_KILL_S", 0.6)
    with driver(storage, deaf=True, worker_stays=True) as (process, worker):
        assert not Stopper("one", timeout_s=1.0).stop().is_stopped
        assert process.poll() is None
        messages: list[str] = []
        result = Stopper("one", force=True, say=messages.append).stop()
        assert gone(process.pid)
        assert gone(worker)
    assert (result.is_stopped, result.status) == (True, "KILLED")
    assert (storage.local_path / "got").read_text() == "3"  # one signal from the first stop, two from the second
    assert "one: still there; ending it without a checkpoint" in messages
    assert store.status(made.run_id) == ("KILLED", "killed by stop --force")


def test_another_process_with_the_same_id_is_left_alone(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    with driver(storage, deaf=True) as (process, _):
        write_lease(storage, **{**local_owner(process.pid), "started": "1"})
        result = Stopper("one").stop()
        time.sleep(0.1)  # enough time for a signal to arrive
        assert (storage.local_path / "got").read_text() == "0"
        assert process.poll() is None
    assert result.is_stopped
    assert store.status(made.run_id)[0] == "FAILED"


def test_a_command_that_closes_the_run_is_not_its_driver(store: Store) -> None:
    _, storage = store.add("one", status="RUNNING")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        name = write_lease(storage, **local_owner(other.pid), owner={"run": "one, being closed"})
        result = Stopper("one", sleep=at_look(2, lambda: storage.delete(f"lock/{name}.json")), timeout_s=60).stop()
        assert other.poll() is None
        other.kill()
    assert result.seconds < 60


# --- another machine --------------------------------------------------------------------------------------------------


def at_look(number: int, what: Callable[[], object]) -> Callable[[float], None]:
    """Return a `sleep` that calls `what` the `number`th time it is called."""
    left = [number]

    def sleep(_: float) -> None:
        left[0] -= 1
        if left[0] == 0:
            what()

    return sleep


def test_a_driver_on_another_machine_gets_a_stop_file(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    name = write_lease(storage)

    def end() -> None:
        assert storage.exists("stop")
        replace(made, status="KILLED").write(storage)
        storage.delete(f"lock/{name}.json")

    messages: list[str] = []
    result = Stopper("one", say=messages.append, sleep=at_look(3, end)).stop()
    assert (result.is_stopped, result.status) == (True, "KILLED")
    assert messages == [
        "one: asked process 4242 on elsewhere to end after a last checkpoint, by the file stop in its directory"
    ]


def test_a_driver_on_another_machine_that_does_not_end(store: Store) -> None:
    _, storage = store.add("one", status="RUNNING")
    write_lease(storage)
    result = Stopper("one", timeout_s=0.05, sleep=lambda _: time.sleep(0.02)).stop()
    assert (result.is_stopped, result.message) == (
        False,
        "process 4242 on elsewhere still holds its lock; on elsewhere: kill -9 4242",
    )


# --- a job ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(store: Store) -> tuple[Record, Storage]:
    made, storage = store.add("one", status="RUNNING", job=JOB)
    write_lease(storage, owner={"job": "one"})
    return made, storage


def test_a_job_ends_by_itself_after_a_checkpoint(store: Store, job: tuple[Record, Storage]) -> None:
    made, storage = job
    cluster = FakeCluster(holds=[{"GPU": 2.0}, {"GPU": 1.0}])
    cluster.add("one")

    def end() -> None:
        if storage.exists("stop"):
            cluster.add("one", "FAILED")  # Ray reports FAILED for exit code 143
            replace(made, status="KILLED").write(storage)
            store.client.set_terminated(made.run_id, "KILLED")

    result = Stopper("one", clusters=cluster.clusters(), sleep=at_look(2, end)).stop()
    assert (result.is_stopped, result.status) == (True, "KILLED")
    assert result.message == "its job one is FAILED, and what it held is free"
    assert "stop" not in cluster.asked
    assert cluster.asked.count("held_by") == 3


def test_a_job_that_does_not_end_is_stopped_by_ray(
    store: Store, job: tuple[Record, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = job
    monkeypatch.setattr(stop, "_GRACE_S", 0.02)
    cluster = FakeCluster()
    cluster.add("one")
    messages: list[str] = []
    result = Stopper("one", clusters=cluster.clusters(), say=messages.append, sleep=lambda _: time.sleep(0.01)).stop()
    assert (result.is_stopped, result.status) == (True, "KILLED")
    assert messages == [
        "one: asked its job to end after a last checkpoint",
        "one: stopping the job one, which did not end",
    ]
    assert store.status(made.run_id) == ("KILLED", "its job one was stopped")


@pytest.mark.parametrize("how", ["waits", "force", "unreachable"])
def test_a_job_that_cannot_save_is_stopped_at_once(store: Store, job: tuple[Record, Storage], how: str) -> None:
    cluster = FakeCluster()
    cluster.add("one", "PENDING" if how == "waits" else "RUNNING")
    if how == "unreachable":
        job[1].delete("run.json")
    messages: list[str] = []
    result = Stopper("one", force=how == "force", clusters=cluster.clusters(), say=messages.append).stop()
    assert result.is_stopped
    assert messages[-1] == "one: stopping the job one"
    assert not job[1].exists("stop")
    assert ("cannot be written from here" in messages[0]) == (how == "unreachable")


def test_gpus_that_are_held_after_the_end_are_reported(store: Store, job: tuple[Record, Storage]) -> None:
    cluster = FakeCluster(holds=[{"GPU": 2.0, "CPU": 1.0}] * 1000)
    cluster.add("one")
    result = Stopper(
        "one", force=True, timeout_s=0.05, clusters=cluster.clusters(), sleep=lambda _: time.sleep(0.02)
    ).stop()
    assert (result.is_stopped, result.message) == (False, "its job is STOPPED, and still holds 2 GPU, 1 CPU")


def test_the_active_job_is_stopped(store: Store, job: tuple[Record, Storage]) -> None:
    cluster = FakeCluster()
    cluster.add("one", "FAILED")
    cluster.add("one--2", "PENDING", metadata={"raytrainer.name": "one"})
    result = Stopper("one", clusters=cluster.clusters()).stop()
    assert (result.is_stopped, cluster.known["one--2"].status) == (True, "STOPPED")


# --- runs that have ended or cannot be reached ------------------------------------------------------------------------


def test_a_run_that_had_ended(store: Store) -> None:
    store.add("one", status="FINISHED")
    result = Stopper("one").stop()
    assert (result.is_stopped, result.status, result.message) == (True, "FINISHED", "it had ended")


@pytest.mark.parametrize("state", ["PENDING", "FAILED"])
def test_a_job_that_has_no_run_yet(in_tmp: Path, state: str) -> None:
    sent = Record("one", "/nowhere/one", job=JOB)
    sent.write(Storage(in_tmp / "runs" / SUBMITTED / "one"))
    cluster = FakeCluster()
    cluster.add("one", state)
    result = Stopper("one", clusters=cluster.clusters()).stop()
    if state == "PENDING":
        assert (result.is_stopped, result.status) == (True, "KILLED")
        assert result.message == "its job one is STOPPED, and what it held is free"
    else:
        assert (result.is_stopped, result.status, result.message) == (True, "FAILED", "its job one had ended: FAILED")


def test_a_run_that_had_died(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
    result = Stopper("one").stop()
    assert result.is_stopped
    assert result.message.startswith("its driver was dead already (process ")
    assert result.message.endswith(" is gone); it is marked FAILED")
    assert store.status(made.run_id)[0] == "FAILED"


def test_an_unreachable_run_is_closed_with_force_only(store: Store) -> None:
    made, _ = store.add("one", status="RUNNING", on_disk=False)
    with pytest.raises(RaytrainerError, match=r"cannot be reached .*somewhere; .*stop --force one"):
        Stopper("one").stop()
    assert store.status(made.run_id)[0] == "RUNNING"
    assert Stopper("one", force=True).stop().is_stopped
    assert store.status(made.run_id) == ("KILLED", "declared dead by stop --force")


def test_a_trial_ends_with_its_sweep(store: Store) -> None:
    store.add("sweep", kind="sweep", status="RUNNING")
    with pytest.raises(ConfigError, match=r"sweep\.0001 is a trial.*stop sweep"):
        Stopper("sweep.0001")


def test_the_keys_of_the_json() -> None:
    result = StopResult("one", "KILLED", True, "gone", 1.5)
    assert result.to_json() == {
        "name": "one",
        "status": "KILLED",
        "done": True,
        "told": "gone",
        "seconds": 1.5,
        "asked": False,
    }


def test_a_stop_leaves_no_files(store: Store, tmp_path: Path) -> None:
    """A stop of an ended run leaves neither a lock nor a stop file. A new driver removes an old file (`StopRequest`)."""
    _, storage = store.add("one", status="FINISHED")
    Stopper("one").stop()
    assert storage.list("lock") == []
    assert not storage.exists("stop")


@pytest.mark.parametrize(
    ("asks", "attempt", "counts"),
    [
        ("one--2", "one--2", True),
        ("one", "one--2", False),
        (None, "one--2", False),
        (None, None, False),
        ("one", None, False),
    ],
)
def test_a_stop_file_that_was_written_while_the_job_started_counts(
    in_tmp: Path, asks: str | None, attempt: str | None, counts: bool
) -> None:
    storage = Storage(in_tmp)
    storage.write_bytes(STOP, json.dumps({"by": "me", "job": asks}).encode())
    assert StopRequest(storage, attempt)() is counts
    storage.write_bytes(STOP, b"by hand")
    assert not StopRequest(storage, attempt)()


def sent(name: str, root: Path, **fields: Any) -> Record:
    """Write the record of a run that was submitted from here."""
    made = Record(name, fields.pop("run_dir", f"/nowhere/{name}"), **{"job": JOB, **fields})
    made.write(Storage(root / "runs" / SUBMITTED / name))
    return made


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("known_by", ["submission", "mlflow"])
def test_a_run_on_a_silent_cluster_is_not_declared_dead(store: Store, force: bool, known_by: str) -> None:
    if known_by == "mlflow":
        made, _ = store.add("one", status="RUNNING", job=JOB, on_disk=False)
    else:
        sent("one", Path.cwd())
    messages: list[str] = []
    cluster = FakeCluster(down=OSError("no route to host"))
    with pytest.raises(RaytrainerError, match=rf"^one is not stopped: .*{ADDRESS} .*no route"):
        Stopper("one", force=force, clusters=cluster.clusters(), say=messages.append).stop()
    assert messages == [f"the cluster {ADDRESS} could not be queried: no route to host"]
    if known_by == "mlflow":
        assert store.status(made.run_id)[0] == "RUNNING"


def test_an_ended_run_with_a_next_job_on_a_silent_cluster(store: Store) -> None:
    made, _ = store.add("one", status="FAILED", job=JOB)
    cluster = FakeCluster(down=OSError("no route to host"))
    assert Stopper("one", clusters=cluster.clusters()).stop().message == "it had ended"
    sent("one", Path.cwd(), run_dir=made.run_dir, job={**JOB, "submission_id": "one--2"})
    with pytest.raises(RaytrainerError, match="not known whether its job one--2 runs"):
        Stopper("one", clusters=cluster.clusters()).stop()


def test_a_job_that_was_never_submitted_is_reported(in_tmp: Path) -> None:
    sent("one", in_tmp)
    with pytest.raises(RaytrainerError, match=f"^one has nothing to stop: {ADDRESS} has no job one"):
        Stopper("one", force=True, clusters=FakeCluster().clusters()).stop()


def test_a_pending_job_that_ray_cannot_end_yet(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray accepts the stop, but the job stays PENDING until its driver gets its resources."""
    monkeypatch.setattr(stop, "_PLACED_S", 0.02)
    sent("one", in_tmp)
    cluster = FakeCluster(ends="PENDING")
    cluster.add("one", "PENDING")
    messages: list[str] = []
    stopper = Stopper("one", timeout_s=0.1, clusters=cluster.clusters(), say=messages.append)
    stopper.sleep = lambda _: time.sleep(0.01)
    result = stopper.stop()
    told = "its job one will stop when its driver gets the resources that it waits for; Ray cannot cancel it before"
    assert (result.is_stopped, result.is_requested, result.message) == (False, True, told)
    assert messages == ["one: stopping the job one", f"one: {told}"]
    assert result.text("raytrainer").splitlines()[1] == "next     raytrainer status one"


def test_a_pending_resume_on_another_cluster_is_stopped(store: Store) -> None:
    made, _ = store.add("one", status="FAILED")
    elsewhere = {"submission_id": "one--2", "cluster_address": "http://other.example:8265"}
    sent("one", Path.cwd(), run_dir=made.run_dir, run_id=made.run_id, attempts=1, job=elsewhere)
    cluster = FakeCluster()
    cluster.add("one--2", "PENDING")
    result = Stopper("one", clusters=cluster.clusters()).stop()
    assert (result.is_stopped, result.status, cluster.known["one--2"].status) == (True, "FAILED", "STOPPED")
    assert result.message == "its job one--2 is STOPPED, and what it held is free"
