"""Files that earlier code has written stay readable: recorded runs, sweeps and submissions (`tests/recorded/record.py`).

Most tests read. The stopped run and the submitted one train on in this process, and one launch continues the sweep.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import compare_weights
from raytrainer.attempt import Record
from raytrainer.config import compose, from_text
from raytrainer.provenance import Provenance
from raytrainer.runs import listing
from raytrainer.runs.resolve import resolve_run
from raytrainer.storage import Storage
from raytrainer.submission import entrypoint
from raytrainer.submission.entrypoint import DriverRequest
from raytrainer.sweep import Plan, TrialJournal, results
from tests.launches import Runs, empty_store, launched
from tests.recorded.record import (
    HERE,
    USER,
    Restored,
    answer,
    command,
    more_steps,
    restore,
    trials_of,
    versions,
    weights_of,
)
from tests.runs.past import FakeCluster

Recording = Callable[[str], Restored]
ON_DISK = ("finished", "stopped", "sweep", "interrupted")


@pytest.fixture(params=versions())
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recording(version: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """Restores a recording below the current directory, for the user who made it."""
    monkeypatch.setenv("LOGNAME", USER)
    (in_tmp / "mlflow.db").write_bytes(empty_store())
    return lambda name: restore(version, name, in_tmp)


def keys_of(value: Any) -> Any:
    """Return the form of a JSON document: the keys at every depth, without the values."""
    if isinstance(value, dict):
        return {key: keys_of(below) for key, below in value.items()}
    return [keys_of(below) for below in value] if isinstance(value, list) else None


def csv_of(data: bytes) -> list[dict[str, str]]:
    return [*csv.DictReader(io.StringIO(data.decode()))]


def seconds_of(row: Mapping[str, str]) -> float:
    return float(row["seconds"])


def in_mlflow(version: str, name: str) -> list[dict[str, Any]]:
    """Return the recorded MLflow runs of a recording, as they were recorded."""
    return json_of(HERE / version / f"{name}.json")["mlflow"]  # type: ignore[no-any-return]


def without_system(metrics: Mapping[str, Any]) -> set[str]:
    """Return the names of metrics that do not depend on how long a run takes."""
    return {name for name in metrics if not name.startswith("system/")}


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def contains(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Check that an answer has everything that was recorded. It may have more keys."""
    assert {key: found.get(key) for key in recorded} == recorded


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_DISK)
def test_list_status_and_logs_say_what_they_said(
    recording: Recording, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = recording(name)
    (listed,) = answer("list")
    contains(listed, recorded.expected["list"])
    contains(answer("status", name), recorded.expected["status"])
    code, out = command("logs", name)
    assert (code, out) == (0, recorded.expected["logs"])
    for arguments in (["list"], ["status", name]):
        code, out = command(*arguments)
        assert code == 0
        assert name in out
        assert listed["status"] in out
    killed = "is marked FAILED: its driver is dead" in capsys.readouterr().err
    assert killed == (name == "interrupted")


@pytest.mark.parametrize("name", ON_DISK)
def test_records_configs_and_provenance_are_read_and_written_the_same(recording: Recording, name: str) -> None:
    recorded = recording(name)
    run = json_of(recorded.path / "run.json")
    storage = Storage(recorded.path)
    record = Record.read(storage)
    assert record is not None
    assert asdict(record) == run
    record.write(storage)
    assert json_of(recorded.path / "run.json") == run
    text = (recorded.path / "config.yaml").read_text()
    assert from_text(text).text == text
    assert from_text(text).experiment.name == name
    origin = Provenance.from_json((recorded.path / "provenance.json").read_bytes())
    assert json.loads(origin.to_json()) == json_of(recorded.path / "provenance.json")
    assert (origin.user, origin.branch, "+two" in origin.patch) == (USER, "main", True)


@pytest.mark.parametrize("name", ON_DISK)
def test_checkpoints_have_the_recorded_weights(recording: Recording, name: str) -> None:
    recorded = recording(name)
    assert recorded.expected["weights"]
    assert weights_of(recorded.path) == recorded.expected["weights"]


@pytest.mark.parametrize("name", ["sweep", "interrupted"])
def test_the_journal_and_the_plan_of_a_sweep(recording: Recording, name: str) -> None:
    recorded = recording(name)
    assert trials_of(recorded.path) == recorded.expected["trials"]
    plan = Plan.read(Storage(recorded.path))
    assert plan is not None
    assert plan.to_dict() == json_of(recorded.path / "sweep.json")
    assert (plan.metric, plan.mode, plan.experiment.name) == ("val/loss", "min", name)


def test_the_results_of_a_sweep_are_written_the_same(recording: Recording) -> None:
    recorded = recording("sweep")
    again, storage = Storage(recorded.path.with_name("again")), Storage(recorded.path)
    plan, trials = Plan.read(storage), [*TrialJournal.open(storage).trials.values()]
    assert plan is not None
    results.write(again, trials=trials, plan=plan)
    # The file has every key, also those that were added since the recording.
    best = again.read_bytes(results.BEST).decode().replace("  start_method: forkserver\n", "")
    assert best == storage.read_bytes(results.BEST).decode()
    # The driver knows the seconds of a trial more exactly than its journal.
    rows, recorded_rows = (csv_of(place.read_bytes(results.CSV)) for place in (again, storage))
    assert [seconds_of(row) for row in rows] == pytest.approx([seconds_of(row) for row in recorded_rows], abs=0.01)
    assert [{**row, "seconds": ""} for row in rows] == [{**row, "seconds": ""} for row in recorded_rows]
    tables = [pq.read_table(io.BytesIO(place.read_bytes(results.PARQUET))) for place in (again, storage)]
    assert tables[0].schema == tables[1].schema
    assert tables[0].drop_columns(["seconds", "run_id"]) == tables[1].drop_columns(["seconds", "run_id"])
    chosen = compose(["experiment=best"], recorded.path / "best").experiment
    assert chosen.optimizer is not None
    assert chosen.optimizer["lr"] in {trial.parameters["optimizer.lr"] for trial in trials}


@pytest.mark.parametrize(("name", "trial"), [("finished", None), ("stopped", None), ("sweep", "best")])
def test_the_best_weights_are_exported(recording: Recording, name: str, trial: str | None) -> None:
    recorded = recording(name)
    status = recorded.expected["status"]
    identifier = f"{name}.{status['best_trial']}" if trial else name
    export = answer("export", identifier, "--to", "out")
    assert (export["step"], export["averaged"]) == (status["best_step"], name == "finished")
    digest = compare_weights.digest(compare_weights.read(Path("out/model.safetensors").read_bytes()))
    place = f"trials/{status['best_trial']}/checkpoints" if trial else "checkpoints"
    assert digest == recorded.expected["weights"][f"{place}/step-{status['best_step']:09d}"]


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_evaluated(recording: Recording) -> None:
    """Two workers trained it on Ray. One process evaluates it, and MLflow has the evaluation below the run."""
    status = recording("finished").expected["status"]
    outcome = answer("evaluate", "finished", "cluster=inline")
    assert outcome["result"]["metrics"]["val/loss"] == pytest.approx(status["best"], rel=1e-5)
    runs = Runs(Path.cwd())
    assert runs.tags(outcome["name"])["mlflow.parentRunId"] == runs.id_of("finished")


def test_a_stopped_run_goes_on(recording: Recording) -> None:
    """It trains as it did when it was recorded, MLflow gets what was in its spool, and its files keep their form."""
    recorded = recording("stopped")
    stopped, before = recorded.expected["status"], json_of(recorded.path / "run.json")
    old = recorded.path / "checkpoints" / stopped["checkpoints"][-1]["name"]
    forms = {path.name: keys_of(json_of(path)) for path in old.glob("*.json")}
    outcome = answer("resume", "stopped", more_steps(recorded))
    assert (outcome["status"], outcome["attempts"]) == ("FINISHED", 2)
    expected = recorded.expected["resumed"]
    assert outcome["result"]["step"] == expected["step"] == stopped["step"] + 50
    for name in ("train/loss", "val/loss"):
        assert outcome["result"]["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-3), name
    after = json_of(recorded.path / "run.json")
    assert after.keys() == before.keys()
    assert (after["status"], after["run_id"]) == ("FINISHED", Runs(Path.cwd()).id_of("stopped"))
    (new,) = recorded.path.glob(f"checkpoints/step-*{expected['step']}")
    assert {path.name: keys_of(json_of(path)) for path in new.glob("*.json")} == forms
    rows = Runs(Path.cwd()).rows("stopped")["train/loss"]
    assert [step for step, _ in rows] == [*range(50, expected["step"] + 1, 50)]
    assert Runs(Path.cwd()).status("stopped") == "FINISHED"


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(recording: Recording, version: str, tmp_path: Path) -> None:
    """Trials that have ended stay as they were, the running one continues, and the last one is sampled."""
    recorded = recording("interrupted")
    old = recorded.expected["trials"]
    lines = [json.loads(line) for line in (recorded.path / "ledger.jsonl").read_text().splitlines()]
    launched(tmp_path, "resume", "interrupted").exits(0)
    new = trials_of(recorded.path)
    assert [*new] == [*old, "0005"]
    runs = Runs(tmp_path)
    for number, trial in old.items():
        kept = {key: value for key, value in trial.items() if key != "run_id"}
        if trial["status"] == "running":
            kept = {key: kept[key] for key in ("parameters", "overrides", "started")}
            assert new[number]["reports"][: len(trial["reports"]) - 1] == trial["reports"][:-1]
        contains(new[number], kept)
    for number, trial in new.items():
        assert trial["status"] in ("finished", "pruned", "failed")
        assert runs.id_of(f"interrupted.{number}") == trial["run_id"]
        rows = runs.rows(f"interrupted.{number}").get("val/loss", [])
        assert rows == [(report["step"], report["value"]) for report in trial["reports"]]
    # MLflow gets at least the tags of a recorded sweep and of a recorded trial.
    for known, name in (("sweep", "interrupted"), ("sweep.0001", "interrupted.0005")):
        (tags,) = (run["tags"] for run in in_mlflow(version, "sweep") if run["name"] == known)
        assert runs.tags(name).keys() >= tags.keys()
    assert json_of(recorded.path / "run.json")["status"] == runs.status("interrupted") == "FINISHED"
    # The new lines of the journal have the form of the recorded ones.
    forms = {line["kind"]: line.keys() - {"error"} for line in lines}
    for text in (recorded.path / "ledger.jsonl").read_text().splitlines()[len(lines) :]:
        line = json.loads(text)
        if line["kind"] in forms:
            assert line.keys() - {"error"} == forms[line["kind"]], line["kind"]


# --- submissions ------------------------------------------------------------------------------------------------------


def submitted(version: str, name: str, folder: Path) -> tuple[Restored, DriverRequest]:
    """Restore a submission, and return its request as the job's driver reads it."""
    recorded = restore(version, name, folder, "submissions")
    shutil.copytree(recorded.path / "record", folder / "runs/.submitted" / name)
    return recorded, DriverRequest.read(recorded.path / "request")


@pytest.mark.parametrize("name", ["submitted", "submitted-sweep"])
def test_a_submission_is_found(version: str, name: str, in_tmp: Path) -> None:
    recorded, request = submitted(version, name, in_tmp)
    job = json_of(recorded.path / "record/run.json")["job"]
    handle = resolve_run(name)
    assert (handle.record.job, handle.storage) == (job, None)
    assert request.place == job
    cluster = FakeCluster()
    cluster.add(name, "PENDING", metadata={"raytrainer.name": name})
    (listed,) = listing.list_runs(clusters=cluster.clusters())
    assert (listed.name, listed.status, listed.submission_id) == (name, "PENDING", name)


def test_a_submitted_run_is_done(version: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of the job does what was submitted, here without Ray."""
    recorded, request = submitted(version, "submitted", in_tmp)
    (in_tmp / "shared").mkdir()
    (in_tmp / "shared/mlflow.db").write_bytes(empty_store())

    use_driver_backend = entrypoint.use_driver_backend
    monkeypatch.setattr(entrypoint, "use_driver_backend", lambda e, name="": use_driver_backend(e, "inline"))
    monkeypatch.setenv("RAYTRAINER_SUBMITTED_BY", "")
    assert entrypoint.run(request) == 0
    run = json_of(in_tmp / "shared/runs/submitted/run.json")
    assert (run["status"], run["step"], run["job"]) == ("FINISHED", 20, request.place)
    assert run.keys() == json_of(recorded.path / "record/run.json").keys()
    assert json_of(in_tmp / "shared/runs/submitted/provenance.json")["user"] == USER
    assert (in_tmp / "shared/runs/submitted/config.yaml").read_text() == request.config
    # MLflow gets the same tags, parameters and metrics as from the recorded run, and tags for the job.
    mlflow, (finished,) = Runs(in_tmp, in_tmp / "shared/mlflow.db"), in_mlflow(version, "finished")
    job = {f"raytrainer.{key}" for key in request.place}
    assert mlflow.tags("submitted").keys() == finished["tags"].keys() | job
    assert mlflow.params("submitted").keys() == finished["params"].keys()
    assert without_system(mlflow.rows("submitted")) == without_system(finished["metrics"])


def test_a_submitted_sweep_has_its_plan(version: str, in_tmp: Path) -> None:
    _, request = submitted(version, "submitted-sweep", in_tmp)
    assert request.plan is not None
    plan = Plan.from_dict(request.plan)
    assert plan.to_dict() == request.plan
    (lr,) = plan.parameters
    assert (lr.key, [*lr.values]) == ("optimizer.lr", [0.1, 0.01])
    assert plan.first.text == request.config
