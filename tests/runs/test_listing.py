"""Tests of `list`: runs of one or all users, by status, one row per sweep, orphans marked FAILED, without MLflow."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer.attempt import SUBMITTED, Record
from raytrainer.config import ClusterConfig
from raytrainer.plugins import Job
from raytrainer.runs import listing
from raytrainer.runs.jobs import Clusters
from raytrainer.runs.listing import list_runs, table
from raytrainer.runs.resolve import resolve_run
from raytrainer.runs.status import status_of
from raytrainer.runs.summary import RunSummary
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.trial_state import Status
from tests.runs.past import ADDRESS, FakeCluster, Store, local_owner, record, write_lease
from tests.runs.test_reconcile import killed

TAGS = {
    "raytrainer.workers": "2",
    "raytrainer.total_steps": "132",
    "raytrainer.monitor": "val/accuracy",
    "raytrainer.monitor.best": "0.97",
    "raytrainer.monitor.best_step": "22",
}
METRICS = {"train/loss": [(10, 0.5), (30, 0.2)], "val/accuracy": [(22, 0.97)], "system/cpu": [(999, 1.0)]}


def names(found: list[RunSummary]) -> list[str]:
    return [facts.name for facts in found]


def test_summary_of_a_run(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING", tags=TAGS, metrics=METRICS)
    write_lease(storage, **local_owner(os.getpid()))
    (facts,) = list_runs()
    assert facts.to_json() | {"started": 0, "seconds": 0, "user": ""} == {
        "name": "one",
        "kind": "run",
        "status": "RUNNING",
        "run_id": made.run_id,
        "user": "",
        "host": "somewhere",
        "where": "local Ray, 2 workers on CPU",
        "started": 0,
        "ended": None,
        "seconds": 0,
        "step": 30,
        "total_steps": 132,
        "monitor": "val/accuracy",
        "best": 0.97,
        "best_step": 22,
        "best_trial": None,
        "workers": "2",
        "trials": {},
        "cause": None,
        "life": "alive",
        "run_dir": storage.uri,
        "submission_id": None,
        "cluster_address": None,
        "attempts": 1,
        "last_job": None,
    }


def test_only_my_runs_or_all(store: Store) -> None:
    store.add("mine", started=1000.0)
    store.add("theirs", user="o'somebody", started=2000.0)
    assert names(list_runs()) == ["mine"]
    assert names(list_runs(everyone=True)) == ["theirs", "mine"]


def test_by_status_and_limit(store: Store) -> None:
    for number, status in enumerate(["FINISHED", "FAILED", "KILLED", "FAILED", "RUNNING"]):
        _, storage = store.add(f"r{number}", status=status, started=1000.0 + number)
    write_lease(storage, **local_owner(os.getpid()))
    assert names(list_runs(status="FAILED")) == ["r3", "r1"]
    assert names(list_runs(status="RUNNING")) == ["r4"]
    assert names(list_runs(limit=2)) == ["r4", "r3"]
    assert names(list_runs(status="PENDING")) == []


def test_an_orphan_is_closed_and_listed_with_its_true_status(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING")
    write_lease(storage, **killed())
    messages: list[str] = []
    (facts,) = list_runs(status="FAILED", say=messages.append)
    assert (facts.status, facts.life) == ("FAILED", None)
    assert facts.cause is not None
    assert facts.cause.startswith("its driver died: ")
    assert store.status(made.run_id)[0] == "FAILED"
    assert len(messages) == 1
    assert list_runs(status="RUNNING", say=messages.append) == []
    assert len(messages) == 1


def test_an_orphan_of_another_user_is_left_alone(store: Store) -> None:
    made, storage = store.add("one", status="RUNNING", user="somebody")
    write_lease(storage, **killed())
    assert list_runs() == []
    assert store.status(made.run_id)[0] == "RUNNING"


def test_a_run_whose_directory_cannot_be_read_is_uncertain(store: Store) -> None:
    made, _ = store.add("one", status="RUNNING", on_disk=False)
    (facts,) = list_runs()
    assert (facts.status, facts.life) == ("RUNNING", "unsure")
    assert facts.cause == "uncertain whether its driver is alive: its directory cannot be read from here"
    assert "RUNNING?" in table([facts])
    assert store.status(made.run_id)[0] == "RUNNING"


def test_trials_are_listed_with_their_sweep(store: Store) -> None:
    """The numbers of trials come from the journal for a running sweep, and from MLflow for one that has ended."""
    _, storage = store.add(
        "sweep", kind="sweep", status="RUNNING", tags={"raytrainer.sweep.metric": "val/loss"}, started=2000.0
    )
    write_lease(storage, **local_owner(os.getpid()))
    journal = TrialJournal.open(storage)
    journal.begin({})
    for number, value in (("0001", 0.5), ("0002", 0.25), ("0003", None)):
        store.add_trial("sweep", number)
        journal.start(Trial(number, {}, [], 1.0))
        if value is not None:
            journal.report(number, Report(1, 10, value, {"val/loss": value}, 1.0))
            journal.end(number, Status.FINISHED)
    journal.close()
    ended = {
        "raytrainer.trials.finished": "7",
        "raytrainer.trials.failed": "1",
        "raytrainer.best_value": "0.125",
        "raytrainer.sweep.metric": "val/loss",
    }
    store.add("ended", kind="sweep", tags=ended, started=1000.0)
    running, over = list_runs()
    assert (running.name, running.trials, running.best) == ("sweep", {"finished": 2, "running": 1}, 0.25)
    assert (over.name, over.trials, over.best) == ("ended", {"finished": 7, "failed": 1}, 0.125)
    assert "3 trials: 2 finished, 1 running" in table([running])


def test_a_killed_sweep_keeps_its_results(store: Store) -> None:
    """Its driver died before it could upload the numbers of trials."""
    _, storage = store.add("sweep", kind="sweep", status="FAILED", tags={"raytrainer.sweep.metric": "val/loss"})
    journal = TrialJournal.open(storage)
    journal.begin({})
    journal.start(Trial("0001", {}, [], 1.0))
    journal.report("0001", Report(1, 10, 0.5, {"val/loss": 0.5}, 1.0))
    journal.end("0001", Status.FINISHED)
    journal.close()
    (killed,) = list_runs()
    assert (killed.status, killed.trials, killed.best, killed.best_trial) == ("FAILED", {"finished": 1}, 0.5, "0001")


def test_a_job(store: Store) -> None:
    _, storage = store.add(
        "one",
        status="RUNNING",
        job={"submission_id": "one", "cluster_address": ADDRESS},
        tags={"raytrainer.where": "Ray at auto, 4 workers on GPU"},
    )
    write_lease(storage, owner={"job": "one"})
    cluster = FakeCluster()
    cluster.add("one", "RUNNING")
    (facts,) = list_runs(clusters=cluster.clusters())
    assert (facts.where, facts.life) == (f"{ADDRESS}, 4 workers on GPU", "alive")


def sent(name: str) -> Record:
    found = Record(name, f"/nowhere/{name}", job={"submission_id": name, "cluster_address": ADDRESS})
    found.write(Storage(Path.cwd() / "runs" / SUBMITTED / name))
    return found


def refusal(cause: str) -> str:
    """Return Ray's message for a job that was refused on its cluster."""
    log = "".join(f"a line of its log, {number}\n" for number in range(9))
    return (
        f"Job entrypoint command failed with exit code 2, last available logs (…):\n{log}raytrainer: refused: {cause}"
    )


def test_a_refused_job_shows_why_in_one_line(store: Store) -> None:
    """Runs and sweeps show it alike, until the same name is submitted again."""
    cluster = FakeCluster()
    for name, kind in (("one", "run"), ("two", "sweep")):
        replace(sent(name), kind=kind).write(Storage(Path.cwd() / "runs" / SUBMITTED / name))
        cluster.add(name, "FAILED", message=refusal(f"{name}=1 is wrong"), exit_code=2, started=2.0, ended=4.0)
    found = list_runs(clusters=cluster.clusters())
    assert {(f.name, f.kind, f.status, f.cause) for f in found} == {
        ("one", "run", "REFUSED", "one=1 is wrong"),
        ("two", "sweep", "REFUSED", "two=1 is wrong"),
    }
    assert "a line of its log" not in table(found)
    assert {f.name for f in list_runs(status="REFUSED", clusters=cluster.clusters())} == {"one", "two"}
    again = Record("one", "/nowhere/one", job={"submission_id": "one--2", "cluster_address": ADDRESS})
    again.write(Storage(Path.cwd() / "runs" / SUBMITTED / "one"))
    cluster.add("one--2", "RUNNING", started=5.0)
    assert {(f.name, f.status, f.cause) for f in list_runs(clusters=cluster.clusters())} == {
        ("one", "RUNNING", None),
        ("two", "REFUSED", "two=1 is wrong"),
    }


@pytest.mark.parametrize("status", ["FINISHED", "KILLED"])
def test_a_refused_resume_is_shown_beside_the_runs_status(store: Store, status: str) -> None:
    """The run keeps its own status. The refusal disappears when a later attempt continues the run."""
    made, storage = store.add(
        "one", status=status, cause="stopped by SIGTERM", job={"submission_id": "one", "cluster_address": ADDRESS}
    )
    later = replace(made, job={"submission_id": "one--2", "cluster_address": ADDRESS})
    later.write(Storage(Path.cwd() / "runs" / SUBMITTED / "one"))
    cluster = FakeCluster()
    cluster.add("one", "SUCCEEDED", started=1.0)
    cluster.add("one--2", "FAILED", message=refusal("trainer.max_epochs=0 is wrong"), exit_code=2, started=2.0)
    expected = {"submission_id": "one--2", "status": "REFUSED", "cause": "trainer.max_epochs=0 is wrong"}
    (facts,) = list_runs(clusters=cluster.clusters())
    for found in (facts, status_of("one", clusters=cluster.clusters()).summary):
        assert (found.status, found.cause) == (status, "REFUSED: job one--2: trainer.max_epochs=0 is wrong")
        assert found.to_json()["last_job"] == expected
    assert "REFUSED: job one--2: trainer.max_epochs=0 is wrong" in table([facts])
    replace(made, attempts=2, job={}).write(storage)  # it continued on this machine
    store.client.set_tag(made.run_id, "raytrainer.submission_id", "")
    store.client.set_tag(made.run_id, "raytrainer.cluster_address", "")
    assert status_of("one", clusters=cluster.clusters()).summary.last_job is None
    (facts,) = list_runs(clusters=cluster.clusters())
    assert facts.last_job is None


def test_a_submission_that_has_not_started(store: Store) -> None:
    for name in ("waits", "failed", "begun", "forgotten"):
        sent(name)
    store.add("begun", started=1.0, job={"submission_id": "begun", "cluster_address": ADDRESS})
    cluster = FakeCluster()
    cluster.add("waits", "PENDING", started=3.0)
    cluster.add("failed", "FAILED", message="no such\nmodule", started=2.0, ended=4.0)
    cluster.add("begun", "SUCCEEDED", started=1.0)
    found = list_runs(clusters=cluster.clusters())
    assert [(f.name, f.status, f.cause) for f in found] == [
        ("waits", "PENDING", None),
        ("failed", "FAILED", "no such module"),
        ("begun", "FINISHED", None),
    ]
    assert names(list_runs(status="PENDING", clusters=cluster.clusters())) == ["waits"]
    assert sorted(p.name for p in Path("runs", SUBMITTED).iterdir()) == ["failed", "forgotten", "waits"]


def test_a_cluster_that_does_not_answer_is_reported_once(in_tmp: Path) -> None:
    for name in ("one", "two"):
        sent(name)
    messages: list[str] = []
    cluster = FakeCluster(down=OSError("connection refused"))
    found = list_runs(clusters=cluster.clusters(), say=messages.append)
    assert [(f.status, f.cause) for f in found] == [("UNKNOWN", "unknown: its cluster does not answer")] * 2
    assert messages == [f"the cluster {ADDRESS} could not be queried: connection refused"]
    assert cluster.asked == ["list"]


def test_without_mlflow_the_directories_are_listed(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, status in (("dead", "RUNNING"), ("done", "FINISHED"), ("lives", "RUNNING")):
        _, storage = record(name, status=status, run_id="0" * 32, tracking_uri="http://127.0.0.1:9")
        storage.write_bytes("checkpoints/step-000000020/manifest.json", b"{}")
        storage.write_bytes("checkpoints/step-000000010/manifest.json", b"{}")
        if status == "RUNNING":
            write_lease(storage, **(killed() if name == "dead" else local_owner(os.getpid())))
    messages: list[str] = []
    found = {facts.name: (facts.status, facts.life, facts.step) for facts in list_runs()}
    expected = {"dead": ("FAILED", "dead", 20), "done": ("FINISHED", None, 20), "lives": ("RUNNING", "alive", 20)}
    assert found == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert {f.name: (f.status, f.life, f.step) for f in list_runs(say=messages.append)} == expected
    assert len(messages) == 1
    assert re.search(r"http://127\.0\.0\.1:9 cannot be used: .*runs alone", messages[0])


def test_a_run_that_mlflow_does_not_have_yet_is_listed(store: Store) -> None:
    store.add("there")
    record("not-yet", status="FINISHED", run_id="offline-1", tracking_uri=store.uri)
    record("other-store", status="FINISHED", run_id="1" * 32, tracking_uri="http://elsewhere")
    assert sorted(names(list_runs())) == ["not-yet", "other-store", "there"]


def test_a_table_is_as_wide_as_its_terminal(store: Store) -> None:
    found = [
        RunSummary(
            "a", "run", "FAILED", started=0.0, step=3, total_steps=9, cause="x" * 300, where="local Ray, 2 workers"
        ),
        RunSummary("longer", "run", "FINISHED", started=3000.0, cause="not an error", user="me", monitor="m", best=0.5),
    ]
    lines = table(found, now=3600.0, width=100).splitlines()
    assert lines[0].split("  ")[0] == "NAME"
    assert [re.sub(r" +", " ", line) for line in lines[1:]] == [
        "a FAILED local Ray 1:00:00 ago 3/9 " + lines[1].split()[-1],
        "longer FINISHED 10:00 ago m 0.5",
    ]
    assert max(map(len, lines)) == 100
    assert "USER" in table(found, users=True)
    assert len(table(found).splitlines()[1]) > 300  # output to a file is not cut
    assert table([]) == "no runs"
    assert json.dumps(RunSummary("a", "run", "FAILED", best=float("nan")).to_json())


def test_no_cluster_is_asked_for_runs_without_a_job(store: Store) -> None:
    store.add("one", status="RUNNING")

    def connect(*_: object) -> FakeCluster:
        raise AssertionError

    assert names(list_runs(clusters=Clusters(connect))) == ["one"]


def test_a_run_of_another_user_with_the_same_name(store: Store) -> None:
    sent("one")
    elsewhere = {"submission_id": "one", "cluster_address": "http://theirs.example:8265"}
    store.add("one", user="somebody", on_disk=False, job=elsewhere, tags={"raytrainer.run_dir": "/theirs/one"})
    cluster = FakeCluster()
    cluster.add("one", "PENDING")
    found = list_runs(everyone=True, clusters=cluster.clusters())
    assert sorted((f.status, f.cluster_address) for f in found) == [
        ("FINISHED", "http://theirs.example:8265"),
        ("PENDING", ADDRESS),
    ]
    known = resolve_run("one")
    assert (known.submission_id, known.cluster_address) == ("one", ADDRESS)


@pytest.mark.parametrize("how", ["resumed", "resumed elsewhere", "sent again", "sent again from elsewhere"])
def test_the_running_attempt_is_listed(store: Store, how: str) -> None:
    """The attempt replaces the run's status in MLflow: it is listed once, and the earlier status does not hide it."""
    job = None if how == "resumed elsewhere" else {"submission_id": "one", "cluster_address": ADDRESS}
    status = "RUNNING" if how.startswith("sent again") else "FAILED"
    made, _ = store.add("one", status=status, cause=None if status == "RUNNING" else "it failed", job=job)
    if how != "sent again from elsewhere":
        place = {"submission_id": "one--2", "cluster_address": ADDRESS}
        Record("one", made.run_dir, attempts=1, job=place).write(Storage(Path.cwd() / "runs" / SUBMITTED / "one"))
    cluster = FakeCluster()
    cluster.add("one", "FAILED", ended=1.0)
    cluster.add("one--2", "PENDING", metadata={"raytrainer.name": "one"})
    (facts,) = list_runs(clusters=cluster.clusters())
    assert (facts.status, facts.submission_id, facts.cause, facts.run_id) == ("PENDING", "one--2", None, made.run_id)
    assert Path("runs", SUBMITTED, "one").exists() == (how != "sent again from elsewhere")
    assert store.status(made.run_id)[0] == status
    if job is not None:
        made, _ = store.add("one", job={**job, "submission_id": "one--2"})
        cluster.add("one--2", "SUCCEEDED")
        assert list_runs(clusters=cluster.clusters())[0].status == "FINISHED"
        assert not Path("runs", SUBMITTED, "one").exists()


def test_submissions_of_others_are_listed_before_they_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other.example:8265/")
    store.add("mine", job={"submission_id": "mine", "cluster_address": ADDRESS}, started=1.0)
    store.add("again", user="somebody", job={"submission_id": "again", "cluster_address": ADDRESS}, started=1.0)
    here, other = FakeCluster(), FakeCluster()
    for name, status in (("waits", "PENDING"), ("mine", "SUCCEEDED"), ("over", "SUCCEEDED")):
        theirs = {"raytrainer.name": name, "raytrainer.user": "somebody", "raytrainer.kind": "sweep"}
        here.add(name, status, metadata=theirs, started=2.0)
    here.add("again--2", "PENDING", metadata={"raytrainer.name": "again"}, started=3.0)
    here.add("raysubmit_1", "RUNNING")  # a job of another program
    other.add("begins", "RUNNING", metadata={"raytrainer.name": "begins"}, started=4.0)
    clusters = {ADDRESS: here, "http://other.example:8265": other}
    assert names(list_runs(clusters=Clusters(clusters.__getitem__))) == ["mine"]
    found = list_runs(everyone=True, clusters=Clusters(clusters.__getitem__))
    assert [(f.name, f.kind, f.user, f.status, f.submission_id) for f in found if f.name != "mine"] == [
        ("begins", "run", None, "RUNNING", "begins"),
        ("again", "run", "somebody", "PENDING", "again--2"),
        ("waits", "sweep", "somebody", "PENDING", "waits"),
    ]
    waiting = list_runs(everyone=True, status="PENDING", clusters=Clusters(clusters.__getitem__))
    assert sorted(names(waiting)) == ["again", "waits"]


def test_a_slow_cluster_is_not_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_CLUSTERS_S", 0.1)
    store.add("mine", job={"submission_id": "mine", "cluster_address": ADDRESS})
    over = threading.Event()

    class Slow(FakeCluster):
        def jobs(self, address: str, settings: ClusterConfig) -> list[Job]:
            over.wait(60)
            return []

    messages: list[str] = []
    assert names(list_runs(everyone=True, clusters=Slow().clusters(), say=messages.append)) == ["mine"]
    over.set()
    assert messages == [f"the cluster {ADDRESS} could not be queried: no answer in 0.1 s"]
