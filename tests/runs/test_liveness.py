"""Tests of whether a run's driver is alive: both sides of every rule, with real processes, real leases and clocks that
differ."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from raytrainer.attempt import Record
from raytrainer.errors import StorageError
from raytrainer.runs.liveness import LIMIT_S, LockState, judge
from raytrainer.storage import Storage
from tests.runs.past import FakeJob, local_owner, write_lease

RUN = Record("x", "/x", status="RUNNING")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    found = Storage(tmp_path / "x")
    RUN.write(found)
    return found


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing: it sends no heartbeat and prints nothing."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        yield started
        started.kill()


def old(storage: Storage, name: str = "run.json") -> None:
    when = (storage.local_path / name).stat().st_mtime - LIMIT_S - 10
    os.utime(storage.local_path / name, (when, when))


# --- this machine -----------------------------------------------------------------------------------------------------


def test_a_live_process_without_heartbeats_is_alive(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    write_lease(storage, **local_owner(process.pid), age_s=30 * 86400)
    old(storage)
    liveness = judge(RUN, LockState.read(storage))
    assert (liveness.state, liveness.reason) == ("alive", f"process {process.pid} of this machine holds the lock")


def test_a_dead_process(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    who = local_owner(process.pid)
    process.kill()
    process.wait()
    write_lease(storage, **who, owner={"host": "here"}, age_s=20)
    liveness = judge(RUN, LockState.read(storage))
    assert (liveness.state, liveness.status) == ("dead", "FAILED")
    assert liveness.cause == f"its driver died: process {process.pid} on here is gone"
    written = (storage.local_path / "lock" / ("a" * 32 + ".json")).stat().st_mtime
    assert liveness.ended == pytest.approx(written)  # the run ended at the last heartbeat


def test_a_zombie_is_dead(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    write_lease(storage, **local_owner(process.pid))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert judge(RUN, LockState.read(storage)).state == "dead"


def test_a_reused_process_id(storage: Storage) -> None:
    write_lease(storage, **{**local_owner(os.getpid()), "started": "1"})
    liveness = judge(RUN, LockState.read(storage))
    assert (liveness.state, liveness.status) == ("dead", "FAILED")


def test_a_final_status_that_is_not_in_mlflow(storage: Storage) -> None:
    for status in ("FINISHED", "FAILED", "KILLED"):
        liveness = judge(Record("x", "/x", status=status), LockState.read(storage))
        assert (liveness.state, liveness.status) == ("dead", status)
        assert liveness.cause == f"it ended as {status}, but MLflow does not have the status"


def test_no_lease_and_a_new_or_old_record(storage: Storage) -> None:
    assert judge(RUN, LockState.read(storage)).state == "unsure"
    old(storage)
    liveness = judge(RUN, LockState.read(storage))
    assert (liveness.state, liveness.cause) == ("dead", "its driver died: no process holds its lock")


# --- another machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "life"), [(0, "alive"), (LIMIT_S - 20, "alive"), (LIMIT_S + 20, "dead")])
def test_another_machine_by_the_age_of_its_lease(storage: Storage, age_s: float, life: str) -> None:
    write_lease(storage, age_s=age_s)
    liveness = judge(RUN, LockState.read(storage))
    assert liveness.state == life
    if life == "dead":
        assert liveness.cause == f"its driver died: no heartbeat from process 4242 on elsewhere for 5:{age_s - 300:02g}"
    assert [e.name for e in storage.list("lock")] == ["a" * 32 + ".held", "a" * 32 + ".json"]  # no probe file is left


class ClockedFiles(fs.FileSystemHandler):  # type: ignore[misc]
    """A file system with a clock of its own, like an object store."""

    def __init__(self, clock: Iterator[datetime]) -> None:
        self._clock, self._times = clock, dict[str, datetime]()
        self._files = fs.LocalFileSystem()

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._times[path] = next(self._clock)
        return self._files.open_output_stream(path)

    def _dated(self, info: fs.FileInfo) -> fs.FileInfo:
        if info.path not in self._times:
            return info
        return fs.FileInfo(info.path, type=info.type, size=info.size, mtime=self._times[info.path])

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._dated(info) for info in self._files.get_file_info(paths)]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return [self._dated(info) for info in self._files.get_file_info(selector)]

    def move(self, source: str, target: str) -> None:
        self._times[target] = self._times.pop(source)
        self._files.move(source, target)

    def delete_file(self, path: str) -> None:
        self._files.delete_file(path)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._files.create_dir(path, recursive=recursive)

    def open_input_file(self, path: str) -> Any:
        return self._files.open_input_file(path)

    def get_type_name(self) -> str:
        return "clocked"

    def normalize_path(self, path: str) -> str:
        return path

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def _refuse(self, *_: Any) -> None:
        raise NotImplementedError

    copy_file = delete_dir = delete_dir_contents = delete_root_dir_contents = open_append_stream = _refuse
    open_input_stream = _refuse


@pytest.mark.parametrize("off", [timedelta(hours=-9), timedelta(0), timedelta(hours=9)])
@pytest.mark.parametrize(("age_s", "life"), [(60, "alive"), (400, "dead")])
def test_different_clocks_decide_nothing(tmp_path: Path, off: timedelta, age_s: float, life: str) -> None:
    then = datetime.now(UTC) + off
    times = itertools.chain([then] * 3, itertools.repeat(then + timedelta(seconds=age_s)))
    files = fs.SubTreeFileSystem(str(tmp_path), fs.PyFileSystem(ClockedFiles(times)))
    storage = Storage("x", filesystem=files)
    RUN.write(storage)
    write_lease(storage)
    assert judge(RUN, LockState.read(storage)).state == life


# --- jobs -------------------------------------------------------------------------------------------------------------

JOB = {"job": "x"}


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_an_active_job_is_alive_whatever_its_lease_says(storage: Storage, status: str) -> None:
    write_lease(storage, owner=JOB, age_s=30 * 86400)
    assert judge(RUN, LockState.read(storage), FakeJob(submission_id="x", status=status)).state == "alive"


@pytest.mark.parametrize(
    ("job", "status", "cause"),
    [
        (FakeJob(submission_id="x", status="STOPPED"), "KILLED", "its job x was stopped"),
        (
            FakeJob(submission_id="x", status="FAILED", message="supervisor\n died"),
            "FAILED",
            "its job x failed: supervisor died",
        ),
        (
            FakeJob(submission_id="x", status="FAILED", exit_code=1),
            "FAILED",
            "its job x failed: exit code 1; the last lines of its log say why",
        ),
        (
            FakeJob(submission_id="x", status="SUCCEEDED"),
            "FINISHED",
            "its job x succeeded, but MLflow does not have the status",
        ),
        (
            FakeJob(submission_id="x", status="FAILED", exit_code=143),
            "KILLED",
            "its job x ended with exit code 143: it was asked to",
        ),
        (
            FakeJob(submission_id="x", status="FAILED", exit_code=130),
            "KILLED",
            "its job x ended with exit code 130: it was asked to",
        ),
    ],
)
def test_an_ended_job_is_dead_and_so_is_its_lease(storage: Storage, job: FakeJob, status: str, cause: str) -> None:
    name = write_lease(storage, owner=JOB)  # not stale: a killed driver's lease still looks valid for a while
    job = replace(job, started=time.time() - 60, ended=time.time())
    for lock in (LockState.read(storage), LockState.read(None)):
        liveness = judge(RUN, lock, job)
        assert (liveness.state, liveness.status, liveness.cause, liveness.ended) == ("dead", status, cause, job.ended)
        assert liveness.by_job
        assert [lease.name for lease in liveness.dead_leases] == ([name] if lock.readable else [])


@pytest.mark.parametrize(
    ("exit_code", "began_s", "ended_s", "since_s", "beat_s"),
    [
        (2, 60, 1, 30, 1),  # the job was refused, so it never started the run
        (1, 60, 1, 900, 1),  # the lease was taken before the job started
        (1, 900, 300, 600, 1),  # the lease was renewed long after the job's end
        (1, 900, None, 600, 1),
    ],
)
def test_a_job_of_the_same_name_on_another_cluster_proves_nothing(
    storage: Storage, exit_code: int, began_s: float, ended_s: float | None, since_s: float, beat_s: float
) -> None:
    """The same address may now mean another cluster, or the lease may belong to a driver on another machine."""
    now = time.time()
    since = datetime.fromtimestamp(now - since_s, UTC).isoformat(timespec="seconds")
    write_lease(storage, owner={**JOB, "since": since}, age_s=beat_s)
    job = FakeJob(submission_id="x", status="FAILED", exit_code=exit_code, started=now - began_s)
    job = replace(job, ended=None if ended_s is None else now - ended_s)
    liveness = judge(RUN, LockState.read(storage), job)
    assert (liveness.state, liveness.reason) == ("alive", "process 4242 on elsewhere holds the lock")


def test_a_refused_job_without_a_readable_directory() -> None:
    liveness = judge(RUN, LockState.read(None), FakeJob(submission_id="x", status="FAILED", exit_code=2, ended=7.0))
    assert liveness.state == "unsure"


def test_the_record_decides_how_a_job_ended(storage: Storage) -> None:
    liveness = judge(
        Record("x", "/x", status="FINISHED"), LockState.read(storage), FakeJob(submission_id="x", status="SUCCEEDED")
    )
    assert liveness.status == "FINISHED"


def test_a_run_that_another_job_continues_is_alive(storage: Storage) -> None:
    """A resubmission, or a resume here or on another machine, keeps the run alive after its job has ended."""
    ended = FakeJob(submission_id="x", status="FAILED")
    assert (
        judge(RUN, LockState.read(storage), ended, [FakeJob(submission_id="x--2", status="PENDING")]).state == "alive"
    )
    assert judge(RUN, LockState.read(storage), ended, [FakeJob(submission_id="x--2", status="FAILED")]).state == "dead"
    name = write_lease(storage, owner={"run": "x"})
    assert judge(RUN, LockState.read(storage), ended).state == "alive"
    storage.delete(f"lock/{name}.json")
    write_lease(storage, **local_owner(os.getpid()), owner=JOB)
    assert judge(RUN, LockState.read(storage), ended).state == "alive"


def test_a_job_that_its_cluster_does_not_know(storage: Storage) -> None:
    name = write_lease(storage, owner=JOB)
    assert judge(RUN, LockState.read(storage), None).state == "alive"
    storage.delete(f"lock/{name}.json")
    write_lease(storage, owner=JOB, age_s=LIMIT_S + 10)
    assert judge(RUN, LockState.read(storage), None).state == "dead"


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_an_unreadable_directory_is_no_evidence_of_death(tmp_path: Path) -> None:
    for storage in (None, Storage(tmp_path / "file" / "x")):
        (tmp_path / "file").write_text("")
        liveness = judge(RUN, LockState.read(storage))
        assert (liveness.state, liveness.reason) == ("unsure", "its directory cannot be read from here")


def test_a_storage_that_cannot_be_written_has_no_clock(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lease(storage, age_s=30 * 86400)

    def refuse(self: Storage, *_: object) -> None:
        raise StorageError("read only")

    monkeypatch.setattr(Storage, "write_bytes", refuse)
    assert judge(RUN, LockState.read(storage)).state == "alive"
