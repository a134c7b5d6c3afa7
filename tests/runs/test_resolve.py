"""Tests of which run an ID means: a name, MLflow id or submission id, below ./runs, in submissions or in MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytrainer.attempt import SUBMITTED, Record
from raytrainer.errors import RunNotFound, StorageError
from raytrainer.runs.resolve import find, resolve_run, with_mlflow_run
from raytrainer.storage import Storage
from tests.runs.past import ADDRESS, Store, record

RUN_ID = "0123456789abcdef0123456789abcdef"
NAME = "mlp-20260101-120000-abcd"
JOB = {"submission_id": f"{NAME}--2", "cluster_address": ADDRESS}


@pytest.fixture
def past(in_tmp: Path) -> Record:
    """A past run with a directory below ./runs."""
    found, storage = record(NAME, run_id=RUN_ID, status="FINISHED", job=JOB)
    found.write(storage)
    return found


def test_by_name_mlflow_id_and_submission_id(past: Record) -> None:
    for identifier in (past.name, RUN_ID, JOB["submission_id"]):
        found, storage = find(identifier)
        assert found == past
        assert storage.uri == past.run_dir


def test_from_another_directory_through_the_tracking_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = store.add("one", job={"submission_id": "one--2", "cluster_address": ADDRESS})
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    assert made.run_id is not None
    for identifier in ("one", made.run_id, "one--2"):
        assert find(identifier)[0] == made


def test_a_trial_is_found_by_its_sweep(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, storage = store.add("sweep", kind="sweep")
    run_id = store.add_trial("sweep", "0003")
    here = resolve_run("sweep.0003")
    assert (here.record, here.trial, here.mlflow_run) == (made, "0003", None)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    for identifier in ("sweep.0003", run_id):
        found = resolve_run(identifier)
        assert (found.record, found.trial) == (made, "0003")
        assert found.storage is not None
        assert found.storage.uri == storage.uri


def test_the_newest_of_a_name_in_mlflow(store: Store) -> None:
    store.add("one", on_disk=False, started=1_000_000.0)
    newest, _ = store.add("one", on_disk=False, started=2_000_000.0)
    found = resolve_run("one")
    assert found.mlflow_run is not None
    assert found.mlflow_run.run_id == newest.run_id


def test_a_directory_that_is_gone(store: Store) -> None:
    made, _ = store.add("one", on_disk=False, job=JOB)
    with pytest.raises(RunNotFound, match=r"directory .*one is gone"):
        find("one")
    known = resolve_run("one")
    assert (known.storage, known.record.run_dir, known.record.job) == (None, made.run_dir, JOB)


def test_a_foreign_run_in_mlflow_is_not_found(store: Store) -> None:
    experiment = store.client.create_experiment("other", store.artifact_root)
    store.client.create_run(experiment, run_name="theirs")
    with pytest.raises(RunNotFound, match="theirs: no run of this name"):
        find("theirs")


def test_a_submission_is_known_before_it_starts(in_tmp: Path) -> None:
    place = in_tmp / "shared" / "one"
    sent = Record("one", str(place), tracking_uri="http://x", job={**JOB, "submission_id": "one"})
    sent.write(Storage(in_tmp / "runs" / SUBMITTED / "one"))
    known = resolve_run("one")
    assert (known.record, known.storage, known.submission_id) == (sent, None, "one")
    with pytest.raises(RunNotFound, match=f"^one .*submitted to {ADDRESS}.* no directory yet"):
        find("one")
    begun = Record("one", str(place), RUN_ID, "http://x", job=sent.job)
    begun.write(Storage(place))
    assert find("one")[0] == begun


def test_the_mlflow_run_of_a_local_run(store: Store) -> None:
    made, _ = store.add("one", tags={"raytrainer.where": "there"})
    known = resolve_run("one")
    assert known.mlflow_run is None
    stored = with_mlflow_run(known).mlflow_run
    assert stored is not None
    assert (stored.run_id, stored.tags["raytrainer.where"]) == (made.run_id, "there")


def test_the_error_lists_the_nearest_names(past: Record) -> None:
    with pytest.raises(RunNotFound, match=f"abce: .*; there are {NAME}"):
        find("mlp-20260101-120000-abce")
    with pytest.raises(RunNotFound, match="; there are "):
        find("zzzzzz")


def test_an_empty_directory(in_tmp: Path) -> None:
    with pytest.raises(RunNotFound, match=r"^one: no run of this name.*tracking store$"):
        find("one")


@pytest.mark.parametrize("identifier", ["../x", "/etc", "a b", "", ".", "..", "x/y", "x\n", "$(reboot)"])
def test_hostile_names_are_refused(past: Record, identifier: str) -> None:
    with pytest.raises(RunNotFound, match="neither a run's name"):
        find(identifier)


def test_other_files_in_the_directory_are_skipped(past: Record) -> None:
    folder = Path("runs")
    (folder / "a-file").write_text("")
    (folder / "empty").mkdir()
    for name, text in {"broken": "{", "list": "[1]", "less": "{}"}.items():
        (folder / name).mkdir()
        (folder / name / "run.json").write_text(text)
    assert find(RUN_ID)[0] == past
    with pytest.raises(StorageError, match=r"broken/run\.json is not a valid"):
        find("broken")


def test_a_record_of_a_later_version_is_read(past: Record) -> None:
    path = Path(past.run_dir, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_the_future": 1}))
    assert find(past.name)[0] == past


def test_an_unreadable_submission_is_found_in_mlflow(store: Store) -> None:
    """The run directory identifies the run, because another user's run has the same name and the same job id."""
    job = {"submission_id": "one", "cluster_address": ADDRESS}
    made, storage = store.add("one", job=job, started=1_000_000.0)
    storage.delete("run.json")
    store.add("one", job=job, tags={"raytrainer.run_dir": "/elsewhere/one"}, started=2_000_000.0)[1].delete("run.json")
    sent = Record("one", made.run_dir, tracking_uri=store.uri, job=job)
    sent.write(Storage(Path.cwd() / "runs" / SUBMITTED / "one"))
    known = resolve_run("one")
    assert (known.storage, known.record.run_id) == (None, None)
    known = with_mlflow_run(known)
    assert known.mlflow_run is not None
    assert (known.mlflow_run.run_id, known.record.run_id) == (made.run_id, made.run_id)
    missing = Record("two", "/nowhere/two", tracking_uri=store.uri, job={**job, "submission_id": "two"})
    missing.write(Storage(Path.cwd() / "runs" / SUBMITTED / "two"))
    assert with_mlflow_run(resolve_run("two")).mlflow_run is None


@pytest.mark.parametrize(
    ("attempt", "job", "coming"),
    [
        ("one--2", "one", "one--2"),
        ("one--2", "one--2", None),
        ("one--2", "one--10", None),
        ("one", None, "one"),
    ],
)
def test_an_attempt_that_is_not_in_the_record_yet(
    in_tmp: Path, attempt: str, job: str | None, coming: str | None
) -> None:
    own = {} if job is None else {"submission_id": job, "cluster_address": ADDRESS}
    made, storage = record("one", job=own)
    place = {"submission_id": attempt, "cluster_address": ADDRESS}
    sent = Storage(in_tmp / "runs" / SUBMITTED / "one")
    Record("one", made.run_dir, attempts=1, job=place).write(sent)
    assert resolve_run("one").next_submission_id == coming
    Record("one", made.run_dir, attempts=2, job=own).write(storage)
    assert resolve_run("one").next_submission_id == (None if job is None else coming)
    Record("one", "s3://elsewhere/one", attempts=9, job=place).write(sent)  # another run with this name
    assert resolve_run("one").submission is None
