"""Tests of `logs ID`: from the directory, the cluster or MLflow; complete, followed live, and ending with the run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrainer.attempt import SUBMITTED, Record
from raytrainer.config import compose
from raytrainer.errors import ConfigError, RunNotFound
from raytrainer.runs import logs
from raytrainer.runs.jobs import Clusters
from raytrainer.storage import Storage
from raytrainer.tracking.server import Server
from tests.runs.past import ADDRESS, FakeCluster, Store, local_owner, record, write_lease

JOB = {"submission_id": "one", "cluster_address": ADDRESS}


@pytest.fixture
def ended(in_tmp: Path) -> Storage:
    _, storage = record("one", status="FINISHED")
    storage.write_bytes("logs/driver.log", "a\nb é\n[rank 1] c\nno end".encode())
    storage.write_bytes("logs/rank-0.log", b"zero\n")
    storage.write_bytes("logs/rank-1.log", b"c\n")
    storage.write_bytes("logs/launch.json", b"{}")
    return storage


@pytest.mark.parametrize("follow", [False, True])
def test_a_run_that_has_ended(ended: Storage, follow: bool) -> None:
    assert list(logs.log_lines("one", follow=follow)) == ["a", "b é", "[rank 1] c", "no end"]
    assert list(logs.log_lines("one", rank=1, follow=follow)) == ["c"]


@pytest.mark.parametrize("follow", [False, True])
def test_a_rank_that_does_not_exist(ended: Storage, follow: bool) -> None:
    with pytest.raises(ConfigError, match=r"^--rank=2 has no log; valid: 0, 1$"):
        list(logs.log_lines("one", rank=2, follow=follow))


def test_a_damaged_log_is_shown(ended: Storage) -> None:
    ended.write_bytes("logs/driver.log", b"a\xff\nb\n\n")
    assert list(logs.log_lines("one")) == ["a�", "b", ""]


def following(later: list[Any], rank: int | None = None) -> Iterator[str]:
    """Follow the logs. Each look that finds nothing new calls the next function of `later`."""

    def sleep(_: float) -> None:
        later.pop(0)()

    return logs.log_lines("one", rank=rank, follow=True, sleep=sleep)


def test_a_job_that_ends_while_its_local_log_is_followed(ended: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_CHECK_S", 0.0)
    made = Record.read(ended)
    assert made is not None
    replace(made, status="RUNNING", job=JOB).write(ended)
    cluster = FakeCluster()
    cluster.add("one")
    states = ["RUNNING", "FAILED"]

    def sleep(_: float) -> None:
        cluster.add("one", states.pop(0))

    assert list(logs.log_lines("one", follow=True, clusters=cluster.clusters(), sleep=sleep))[-1] == "no end"
    assert states == []


def test_new_lines_while_it_is_followed(ended: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line arrives in two pieces, split within a letter, and the last line arrives as the driver ends."""
    monkeypatch.setattr(logs, "_CHECK_S", 0.0)
    made = Record.read(ended)
    assert made is not None
    replace(made, status="RUNNING").write(ended)
    path = ended.local_path / "logs" / "driver.log"
    path.write_bytes(b"")

    def append(data: bytes) -> None:
        with path.open("ab") as file:
            file.write(data)

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        write_lease(ended, **local_owner(driver.pid))

        def end() -> None:
            append(b"last\n")
            driver.kill()
            driver.wait()

        later = [lambda: append(b"one\nt\xc3"), lambda: append(b"\xa9o\n"), lambda: None, end]
        assert list(following(later)) == ["one", "téo", "last"]
    assert later == []


def test_a_rank_whose_log_appears_later(ended: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_CHECK_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        write_lease(ended, **local_owner(driver.pid))

        def begin() -> None:
            ended.write_bytes("logs/rank-2.log", b"hello\n")

        def end() -> None:
            driver.kill()
            driver.wait()

        assert list(following([begin, end], rank=2)) == ["hello"]


def test_a_trial_has_the_log_of_its_sweep(in_tmp: Path) -> None:
    _, storage = record("sweep", kind="sweep", status="FINISHED")
    storage.write_bytes("logs/trials.log", b"a trial\n")
    assert list(logs.log_lines("sweep.0003")) == ["a trial"]


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_the_log_of_a_running_job_is_read_from_its_cluster(store: Store) -> None:
    store.add("one", status="RUNNING", job=JOB)
    cluster = FakeCluster()
    cluster.add("one")
    assert list(logs.log_lines("one", clusters=cluster.clusters())) == ["one", "[rank 1] two", "three"]
    assert list(logs.log_lines("one", follow=True, clusters=cluster.clusters())) == ["one", "[rank 1] two", "three"]
    assert list(logs.log_lines("one", rank=1, clusters=cluster.clusters())) == ["two"]
    assert cluster.asked.count("tail") == 1


def test_a_job_that_ended_without_saving_its_log(store: Store) -> None:
    store.add("one", status="FAILED", job=JOB)
    cluster = FakeCluster()
    cluster.add("one", "FAILED")
    assert list(logs.log_lines("one", clusters=cluster.clusters())) == ["one", "[rank 1] two", "three"]


def test_a_log_after_the_head_node_is_gone(store: Store, tmp_path: Path) -> None:
    made, storage = store.add("one", status="FAILED", job=JOB)
    away = FakeCluster(down=OSError("no route to host"))
    with pytest.raises(RunNotFound, match="one has no logs here"):
        list(logs.log_lines("one", clusters=away.clusters()))
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "job.log").write_text("of the job\n")
    assert made.run_id is not None
    Server(store.uri).log_artifact(made.run_id, folder, None)
    assert list(logs.log_lines("one", clusters=away.clusters())) == ["of the job"]
    (folder / "driver.log").write_text("of the driver\n")
    (folder / "rank-0.log").write_text("of rank 0\n")
    Server(store.uri).log_artifact(made.run_id, folder, None)
    storage.delete("run.json")  # the run directory is gone, too
    assert list(logs.log_lines("one", clusters=away.clusters())) == ["of the driver"]
    assert list(logs.log_lines("one", rank=0, clusters=away.clusters())) == ["of rank 0"]
    with pytest.raises(ConfigError, match=r"--rank=3 has no log; valid: 0"):
        list(logs.log_lines("one", rank=3, clusters=away.clusters()))


def test_a_run_whose_logs_are_on_another_machine(store: Store) -> None:
    store.add("one", status="RUNNING", on_disk=False)
    with pytest.raises(RunNotFound, match=r"one has no logs here.* on somewhere"):
        list(logs.log_lines("one"))


# --- submissions ------------------------------------------------------------------------------------------------------


def sent(name: str, run_dir: str, job: str, **fields: Any) -> Storage:
    storage = Storage(Path.cwd() / "runs" / SUBMITTED / name)
    Record(name, run_dir, job={"submission_id": job, "cluster_address": ADDRESS}, **fields).write(storage)
    return storage


@pytest.mark.parametrize("follow", [False, True])
def test_a_run_that_cannot_be_read_from_here_has_its_logs_in_mlflow(store: Store, tmp_path: Path, follow: bool) -> None:
    made, storage = store.add("one", job=JOB)
    storage.delete("run.json")
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "driver.log").write_text("of the driver\n")
    assert made.run_id is not None
    Server(store.uri).log_artifact(made.run_id, folder, None)
    sent("one", made.run_dir, "one", tracking_uri=store.uri)
    messages: list[str] = []
    away = FakeCluster(down=OSError("no route to host")).clusters()
    assert list(logs.log_lines("one", follow=follow, clusters=away, say=messages.append)) == ["of the driver"]
    assert messages == [f"the cluster {ADDRESS} could not be queried: no route to host"]


def test_the_running_attempt_is_followed(ended: Storage) -> None:
    """With `follow`, the log is that of the new attempt, not that of the earlier attempt, which is here."""
    made = Record.read(ended)
    assert made is not None
    replace(made, status="FAILED", job=JOB).write(ended)
    sent("one", made.run_dir, "one--2")
    cluster = FakeCluster()
    cluster.add("one", "FAILED")
    cluster.add("one--2", "PENDING")
    assert next(iter(logs.log_lines("one", follow=True, clusters=cluster.clusters()))) == "one"
    assert next(iter(logs.log_lines("one", clusters=cluster.clusters()))) == "a"  # the new attempt has no log yet
    replace(made, status="RUNNING", job={**JOB, "submission_id": "one--2"}).write(ended)
    cluster.add("one--2", "FAILED")
    assert next(iter(logs.log_lines("one", follow=True, clusters=cluster.clusters()))) == "a"


def test_a_cluster_is_asked_with_the_settings_of_the_submission(in_tmp: Path) -> None:
    asked: list[str] = []
    cluster = FakeCluster()
    cluster.add("one")

    def connect(address: str) -> FakeCluster:
        asked.append(address)
        return cluster

    place = sent("one", "/nowhere/one", "one")
    text = compose(
        [
            *("experiment=mlp", "cluster=job", "name=one", f"cluster.address={ADDRESS}", "storage_path=/nowhere"),
            *("cluster.ca_file=/etc/ca.pem", "cluster.token_file=/etc/token"),
        ]
    ).text
    place.write_bytes("config.yaml", text.encode())
    assert next(iter(logs.log_lines("one", follow=True, clusters=Clusters(connect)))) == "one"
    assert set(asked) == {ADDRESS}
    assert {(c.ca_file, c.token_file) for c in cluster.settings} == {("/etc/ca.pem", "/etc/token")}
