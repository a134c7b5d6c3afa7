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

from raytrainer.errors import StorageError
from raytrainer.runs.liveness import LIMIT_S, Liveness, judge
from raytrainer.attempt import Record
from raytrainer.storage import Storage
from tests.runs.past import FakeJob, claim, of_here

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


def test_alive_but_silent(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    claim(storage, **of_here(process.pid), age_s=30 * 86400)
    old(storage)
    verdict = judge(RUN, Liveness.read(storage))
    assert (verdict.life, verdict.why) == ("alive", f"process {process.pid} of this machine holds the lock")


def test_dead(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    who = of_here(process.pid)
    process.kill()
    process.wait()
    claim(storage, **who, owner={"host": "here"}, age_s=20)
    verdict = judge(RUN, Liveness.read(storage))
    assert (verdict.life, verdict.status) == ("dead", "FAILED")
    assert verdict.cause == f"its driver died: process {process.pid} on here is gone"
    written = (storage.local_path / "lock" / ("a" * 32 + ".json")).stat().st_mtime
    assert verdict.when == pytest.approx(written)  # the run ended at the last heartbeat


def test_a_zombie_is_dead(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    claim(storage, **of_here(process.pid))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert judge(RUN, Liveness.read(storage)).life == "dead"


def test_a_number_that_is_anothers_now(storage: Storage) -> None:
    claim(storage, **{**of_here(os.getpid()), "started": "1"})
    verdict = judge(RUN, Liveness.read(storage))
    assert (verdict.life, verdict.status) == ("dead", "FAILED")


def test_an_end_that_mlflow_was_not_told(storage: Storage) -> None:
    for status in ("FINISHED", "FAILED", "KILLED"):
        verdict = judge(Record("x", "/x", status=status), Liveness.read(storage))
        assert (verdict.life, verdict.status) == ("dead", status)
        assert verdict.cause == f"it ended as {status}, but MLflow does not have the status"


def test_nobody_and_a_record_that_is_new_or_old(storage: Storage) -> None:
    assert judge(RUN, Liveness.read(storage)).life == "unsure"
    old(storage)
    verdict = judge(RUN, Liveness.read(storage))
    assert (verdict.life, verdict.cause) == ("dead", "its driver died: no process holds its lock")


# --- another machine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("age_s", "life"), [(0, "alive"), (LIMIT_S - 20, "alive"), (LIMIT_S + 20, "dead")])
def test_another_machine_by_the_age_of_its_claim(storage: Storage, age_s: float, life: str) -> None:
    claim(storage, age_s=age_s)
    verdict = judge(RUN, Liveness.read(storage))
    assert verdict.life == life
    if life == "dead":
        assert verdict.cause == f"its driver died: no heartbeat from process 4242 on elsewhere for 5:{age_s - 300:02g}"
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
def test_clocks_that_differ_decide_nothing(tmp_path: Path, off: timedelta, age_s: float, life: str) -> None:
    then = datetime.now(UTC) + off
    times = itertools.chain([then] * 3, itertools.repeat(then + timedelta(seconds=age_s)))
    files = fs.SubTreeFileSystem(str(tmp_path), fs.PyFileSystem(ClockedFiles(times)))
    storage = Storage("x", filesystem=files)
    RUN.write(storage)
    claim(storage)
    assert judge(RUN, Liveness.read(storage)).life == life


# --- jobs -------------------------------------------------------------------------------------------------------------

JOB = {"job": "x"}


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_job_that_runs_is_alive_whatever_its_claim_says(storage: Storage, status: str) -> None:
    claim(storage, owner=JOB, age_s=30 * 86400)
    assert judge(RUN, Liveness.read(storage), FakeJob(submission_id="x", status=status)).life == "alive"


@pytest.mark.parametrize(
    ("job", "status", "cause"),
    [
        (FakeJob(submission_id="x", status="STOPPED"), "KILLED", "its job x was stopped"),
        (FakeJob(submission_id="x", status="FAILED", message="supervisor\n died"), "FAILED", "its job x failed: supervisor died"),
        (
            FakeJob(submission_id="x", status="FAILED", exit_code=1),
            "FAILED",
            "its job x failed: exit code 1; the last lines of its log say why",
        ),
        (FakeJob(submission_id="x", status="SUCCEEDED"), "FINISHED", "its job x succeeded, but MLflow does not have the status"),
        (FakeJob(submission_id="x", status="FAILED", exit_code=143), "KILLED", "its job x ended with exit code 143: it was asked to"),
        (FakeJob(submission_id="x", status="FAILED", exit_code=130), "KILLED", "its job x ended with exit code 130: it was asked to"),
    ],
)
def test_a_job_that_ended_is_dead_and_with_it_its_claim(
    storage: Storage, job: FakeJob, status: str, cause: str
) -> None:
    name = claim(storage, owner=JOB)  # not stale: a killed driver's lease still looks valid for a while
    job = replace(job, started=time.time() - 60, ended=time.time())
    for liveness in (Liveness.read(storage), Liveness.read(None)):
        verdict = judge(RUN, liveness, job)
        assert (verdict.life, verdict.status, verdict.cause, verdict.when) == ("dead", status, cause, job.ended)
        assert verdict.by_job
        assert [one.name for one in verdict.gone] == ([name] if liveness.readable else [])


@pytest.mark.parametrize(
    ("exit_code", "began_s", "ended_s", "since_s", "beat_s"),
    [
        (2, 60, 1, 30, 1),  # the job was refused, so it never started the run
        (1, 60, 1, 900, 1),  # the lease was taken before the job started
        (1, 900, 300, 600, 1),  # the lease was renewed long after the job's end
        (1, 900, None, 600, 1),
    ],
)
def test_a_job_of_the_same_name_elsewhere_proves_nothing(
    storage: Storage, exit_code: int, began_s: float, ended_s: float | None, since_s: float, beat_s: float
) -> None:
    """The same address may now mean another cluster, or the lease may belong to a driver on another machine."""
    now = time.time()
    since = datetime.fromtimestamp(now - since_s, UTC).isoformat(timespec="seconds")
    claim(storage, owner={**JOB, "since": since}, age_s=beat_s)
    ended = None if ended_s is None else now - ended_s
    job = FakeJob(submission_id="x", status="FAILED", exit_code=exit_code, started=now - began_s, ended=ended)
    verdict = judge(RUN, Liveness.read(storage), job)
    assert (verdict.life, verdict.why) == ("alive", "process 4242 on elsewhere holds the lock")


def test_a_refused_job_says_nothing_where_nothing_can_be_read() -> None:
    verdict = judge(RUN, Liveness.read(None), FakeJob(submission_id="x", status="FAILED", exit_code=2, ended=7.0))
    assert verdict.life == "unsure"


def test_the_record_knows_better_how_a_job_went(storage: Storage) -> None:
    verdict = judge(Record("x", "/x", status="FINISHED"), Liveness.read(storage), FakeJob(submission_id="x", status="SUCCEEDED"))
    assert verdict.status == "FINISHED"


def test_a_run_that_another_goes_on_with_is_alive(storage: Storage) -> None:
    """A resubmission, or a resume here or on another machine, keeps the run alive after its job has ended."""
    ended = FakeJob(submission_id="x", status="FAILED")
    assert judge(RUN, Liveness.read(storage), ended, [FakeJob(submission_id="x--2", status="PENDING")]).life == "alive"
    assert judge(RUN, Liveness.read(storage), ended, [FakeJob(submission_id="x--2", status="FAILED")]).life == "dead"
    name = claim(storage, owner={"run": "x"})
    assert judge(RUN, Liveness.read(storage), ended).life == "alive"
    storage.delete(f"lock/{name}.json")
    claim(storage, **of_here(os.getpid()), owner=JOB)
    assert judge(RUN, Liveness.read(storage), ended).life == "alive"


def test_a_job_that_its_cluster_does_not_know_says_nothing(storage: Storage) -> None:
    name = claim(storage, owner=JOB)
    assert judge(RUN, Liveness.read(storage), None).life == "alive"
    storage.delete(f"lock/{name}.json")
    claim(storage, owner=JOB, age_s=LIMIT_S + 10)
    assert judge(RUN, Liveness.read(storage), None).life == "dead"


# --- what cannot be read ----------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_no_sign_of_death(tmp_path: Path) -> None:
    for storage in (None, Storage(tmp_path / "file" / "x")):
        (tmp_path / "file").write_text("")
        verdict = judge(RUN, Liveness.read(storage))
        assert (verdict.life, verdict.why) == ("unsure", "its directory cannot be read from here")


def test_a_storage_that_cannot_be_written_does_not_tell_the_time(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(storage, age_s=30 * 86400)

    def refuse(self: Storage, *_: object) -> None:
        raise StorageError("read only")

    monkeypatch.setattr(Storage, "write_bytes", refuse)
    assert judge(RUN, Liveness.read(storage)).life == "alive"
