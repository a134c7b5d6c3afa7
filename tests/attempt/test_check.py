"""Tests that `check` and a launch refuse the same configs with the same message."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from raytrainer import cli
from raytrainer.storage import Storage
from tests.launches import empty_store

RUN = ["experiment=mlp", "name=run", "cluster=inline", "trainer.max_steps=2", "tracking.log_model=false"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error line of a refused command."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("raytrainer: refused: ")]
    return line


def deleted_experiment(folder: Path) -> None:
    (folder / "mlflow.db").write_bytes(empty_store())
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute("INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (7, 'mlp', 'deleted')")


def database_of_another_program(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE birds (name TEXT)")


def run_of_that_name(folder: Path) -> None:
    (folder / "runs" / "run" / "checkpoints").mkdir(parents=True)


def file_in_place_of_runs(folder: Path) -> None:
    (folder / "runs").write_text("")


@pytest.mark.parametrize(
    ("prepare", "overrides", "said"),
    [
        (deleted_experiment, [], "the experiment 'mlp' is deleted in MLflow"),
        (database_of_another_program, [], "mlflow.db"),
        (run_of_that_name, [], "name=run is the name of an existing run"),
        (file_in_place_of_runs, [], "storage_path="),
        (None, ["scaling.num_workers=2"], "cluster=inline"),
        (None, ["scaling.use_gpu=true"], "scaling.use_gpu=false trains on CPUs"),
        (None, ["optimizer.lrr=1"], "optimizer.lrr=1"),
        (None, ["model.widht=8"], "model.widht=8"),
        (None, ["+callbacks.mine._target_=nowhere.Mine"], "callbacks.mine._target_=nowhere.Mine"),
        (None, ["checkpoint.monitor=val/score"], "checkpoint.mode"),
        (None, ["init_from=nowhere"], "init_from=nowhere"),
        (None, ["tracking.tracking_uri=file:///tmp/x"], "tracking.tracking_uri=file:///tmp/x"),
    ],
)
def test_both_refuse(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], prepare: object, overrides: list[str], said: str
) -> None:
    if callable(prepare):
        prepare(in_tmp)
    checked = refusal(capsys, "check", *RUN, *overrides)
    assert said in checked
    assert refusal(capsys, *RUN, *overrides) == checked


def test_a_run_that_goes_on_elsewhere(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`resume` and its dry run refuse the run and name the owner of its lock, which is alive."""
    assert cli.main([*RUN, "trainer.max_epochs=null"]) == 0
    with Storage(in_tmp / "runs" / "run").lock("lock", {"run": "run"}):
        checked = refusal(capsys, "resume", "run", "trainer.max_steps=4", "--dry-run")
        assert f"is in use by run (host {os.uname().nodename}, pid {os.getpid()}" in checked
        assert refusal(capsys, "resume", "run", "trainer.max_steps=4") == checked
    assert cli.main(["resume", "run", "trainer.max_steps=4", "--dry-run"]) == 0
    assert cli.main(["resume", "run", "trainer.max_steps=4"]) == 0
    assert json.loads((in_tmp / "runs" / "run" / "run.json").read_text())["status"] == "FINISHED"
