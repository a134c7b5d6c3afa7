"""Tests that the summary of a launch, `status`, `list`, --json, the run record and MLflow agree. They also cover a run
whose MLflow run, database or directory is deleted while it trains. The runs are real, inline in this process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrainer import attempt
from raytrainer.attempt import Outcome, Record, summary
from raytrainer.config import compose
from raytrainer.core.formatting import duration
from raytrainer.runs.evaluate import to_evaluate
from raytrainer.runs.handle import RunHandle
from raytrainer.runs.listing import list_runs
from raytrainer.runs.printing import outcome_json
from raytrainer.runs.resume import to_resume
from raytrainer.runs.status import status_of, text
from raytrainer.runs.summary import RunSummary, summarize
from raytrainer.storage import Storage
from tests.runs.past import Store

FEW = ["experiment=smoke", "cluster=inline", "name=one", "trainer.log_every_n_steps=1", "trainer.eval_every_n_steps=2"]
FEW += ["tracking.log_model=false", "trainer.max_steps=5"]
ME = "tests.runs.test_agreeing"


def launched(*overrides: str) -> Outcome:
    return attempt.launch(compose([*FEW, *overrides]))


def resumed(*overrides: str) -> Outcome:
    composition, record, changed = to_resume("one", overrides)
    return attempt.launch(composition, record=record, changed=changed)


class Fails:
    """A callback that raises after step 4."""

    def on_log(self, trainer: Any, event: Any) -> None:
        if event.step == 4:
            raise ValueError("enough")


class Deletes:
    """A callback that deletes something after step 2."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_log(self, trainer: Any, event: Any) -> None:
        if event.step != 2:
            return
        record = Record.read(Storage(Path("runs/one").absolute()))
        assert record is not None
        if self.what == "run":
            from mlflow import MlflowClient

            MlflowClient(record.tracking_uri).delete_run(record.run_id or "")
        elif self.what == "database":
            Path("mlflow.db").unlink()
        else:
            shutil.rmtree("runs/one")


def forget_connections() -> None:
    """Drop MLflow's connections, as in a new process. Otherwise MLflow still reads a database that was deleted."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    SqlAlchemyStore._engine_map.clear()
    _tracking_store_registry._get_store_with_resolved_uri.cache_clear()


def told(store: Store, outcome: Outcome) -> list[RunSummary]:
    """Return the summaries of the run from all sources except its launch."""
    record = Record.read(Storage(Path("runs/one").absolute()))
    assert record is not None
    (listed,) = [facts for facts in list_runs() if facts.name == "one"]
    return [status_of("one").summary, listed, summarize(RunHandle(record, Storage(Path("runs/one").absolute())))]


def agree(store: Store, outcome: Outcome, *, step: int, best: tuple[float, int] | None, seconds: float) -> None:
    for facts in told(store, outcome):
        assert (facts.status, facts.step) == (outcome.status, step)
        assert (facts.best, facts.best_step) == (best or (None, None))
        assert facts.seconds == pytest.approx(seconds, abs=0.002)
        assert facts.cause == (outcome.cause if outcome.status != "FINISHED" else None)
    found = json.loads(outcome_json(outcome))
    assert found["seconds_of_all_attempts"] == pytest.approx(seconds, abs=0.002)
    assert f"{step} steps in {duration(seconds)}" in summary(outcome, "raytrainer")


def in_mlflow(store: Store, outcome: Outcome) -> Any:
    return store.client.get_run(outcome.record.run_id or "")


def test_a_run_and_its_resume(store: Store) -> None:
    first = launched()
    assert (first.status, first.step) == ("FINISHED", 5)
    assert first.result is not None
    agree(store, first, step=5, best=first.result["best"], seconds=first.seconds)
    info = in_mlflow(store, first).info
    assert (info.end_time - info.start_time) / 1e3 == pytest.approx(first.seconds, abs=0.002)
    assert "attempts" not in text(status_of("one"))
    second = resumed("trainer.max_steps=8")
    assert second.result is not None
    agree(store, second, step=8, best=second.result["best"], seconds=first.seconds + second.seconds)
    both = duration(first.seconds + second.seconds)
    assert f"in {both} in 2 attempts, the last {duration(second.seconds)}" in summary(second, "raytrainer")
    assert f"took     {both} in 2 attempts" in text(status_of("one")).splitlines()
    evaluation = attempt.launch(to_evaluate("one", []))
    facts = status_of(evaluation.record.name).summary
    assert evaluation.result is not None
    assert (facts.step, facts.total_steps) == (evaluation.result["step"], None)
    assert (facts.best, facts.best_step) == evaluation.result["best"]
    assert facts.seconds == pytest.approx(evaluation.seconds, abs=0.002)


def test_a_run_that_fails_and_is_resumed(store: Store) -> None:
    """A failed run has its step, duration and cause; once it has finished, it has no cause."""
    failed = launched(f"+callbacks.fails._target_={ME}.Fails")
    assert (failed.status, failed.step) == ("FAILED", 4)
    assert "ValueError: enough" in (failed.cause or "")
    for facts in told(store, failed):
        assert (facts.status, facts.step, facts.cause) == ("FAILED", facts.step, failed.cause)
        assert facts.seconds == pytest.approx(failed.seconds, abs=0.002)
    assert status_of("one").summary.step == 4
    config = Path("runs/one/config.yaml")
    config.write_text(config.read_text().replace(f"{ME}.Fails", f"{ME}.Nothing"))
    finished = resumed()
    assert finished.result is not None
    agree(store, finished, step=5, best=finished.result["best"], seconds=failed.seconds + finished.seconds)
    assert in_mlflow(store, finished).data.tags["raytrainer.cause"] == ""


class Nothing:
    """A callback that does nothing."""

    def on_log(self, trainer: Any, event: Any) -> None: ...


def test_a_driver_that_was_killed_is_closed_with_the_time_it_had(store: Store) -> None:
    outcome = launched()
    place = Storage(Path("runs/one").absolute())
    dead = replace(outcome.record, status="RUNNING", attempts=2, launched=1000.0, ended=0.0, seconds=7.0)
    assert dead.closed("FAILED", 1010.5, "it died").seconds == pytest.approx(17.5)
    assert dead.closed("FAILED", 1010.5).closed("KILLED", 1011.0).seconds == pytest.approx(18.0)
    # Older versions wrote records without `launched`.
    assert replace(dead, launched=0.0).closed("FAILED", 1010.5).seconds == 7.0
    dead.write(place)
    assert Record.read(place) == dead


@pytest.mark.parametrize("what", ["run", "database"])
def test_the_mlflow_run_is_deleted_during_the_run(store: Store, what: str) -> None:
    """Training continues, the record stays correct, and resume continues in a new MLflow run."""
    first = launched(f"+callbacks.deletes._target_={ME}.Deletes", f"+callbacks.deletes.what={what}")
    assert (first.status, first.step) == ("FINISHED", 5)
    forget_connections()
    found = status_of("one")
    assert (found.summary.status, found.summary.step, found.is_lost) == ("FINISHED", 5, True)
    assert "is gone; resume continues in a new one" in text(found)
    assert [(facts.name, facts.status) for facts in list_runs()] == [("one", "FINISHED")]
    assert list_runs(status="FAILED") == []
    second = resumed("trainer.max_steps=8")
    assert (second.status, second.step) == ("FINISHED", 8)
    assert second.record.run_id != first.record.run_id
    kept = in_mlflow(store, second)
    assert kept.info.status == "FINISHED"
    assert kept.data.params["trainer.max_steps"] == "8"
    assert kept.data.tags["raytrainer.continues"] == first.record.run_id
    assert kept.data.metrics["train/loss"] == pytest.approx((second.result or {})["metrics"]["train/loss"])
    assert not status_of("one").is_lost


def test_the_directory_is_deleted_during_the_run(store: Store) -> None:
    """The run fails with a message that says so, and nothing creates the directory again."""
    outcome = launched(f"+callbacks.deletes._target_={ME}.Deletes", "+callbacks.deletes.what=directory")
    assert (outcome.status, outcome.exit_code, outcome.gone) == ("FAILED", 1, True)
    assert "StorageGone: The run's directory" in (outcome.cause or "")
    assert str(Path("runs/one").absolute()) in (outcome.cause or "")
    text = summary(outcome, "raytrainer")
    assert "is gone, and with it the run's checkpoints" in text
    assert "resume" not in text
    assert not Path("runs/one").exists()
    kept = in_mlflow(store, outcome)
    assert (kept.info.status, kept.data.tags["raytrainer.cause"]) == ("FAILED", outcome.cause)
    (facts,) = list_runs()
    assert (facts.status, facts.cause) == ("FAILED", outcome.cause)
