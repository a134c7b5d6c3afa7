"""The results of a sweep: typed tables of its trials, and its best trial as an experiment that trains the same way."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from raytrainer.config import Experiment, compose
from raytrainer.config.schema import SweepConfig
from raytrainer.errors import StorageError
from raytrainer.storage import Storage
from raytrainer.sweep import pictures, results
from raytrainer.sweep.journal import Report, Trial
from raytrainer.sweep.plan import Plan, make_plan
from raytrainer.sweep.trial_state import Status

pytestmark = pytest.mark.usefixtures("in_tmp")

GROUPS = ("model", "optimizer", "lr_scheduler", "experiment")
KEYS = ["optimizer.lr", "model.width", "+model.dropout"]


def trial(
    number: int, values: list[float], status: Status = Status.FINISHED, parameters: dict[str, Any] | None = None
) -> Trial:
    reports = [Report(i, 10 * i, v, {"val/accuracy": v, "val/loss": 1 - v}, 5.0 + i) for i, v in enumerate(values, 1)]
    given = parameters or {}
    cause = 'RuntimeError: "no", said it,\nand left' if status == "failed" else None
    ended = None if status == "running" else 1e9 + 7.5
    return Trial(f"{number:04d}", given, [], 1e9, f"run{number}", reports, status, cause, ended)


TRIALS = [
    trial(1, [0.5, 0.9, 0.8], parameters={"optimizer.lr": 0.1, "model.width": 64, "+model.dropout": 0}),
    trial(2, [0.4], Status.PRUNED, {"optimizer.lr": 1e-05, "model.width": 128, "+model.dropout": 0.5}),
    trial(3, [0.6, math.nan], Status.FAILED, {"optimizer.lr": 0.3, "model.width": 64, "+model.dropout": None}),
    trial(4, [], Status.RUNNING, {"optimizer.lr": 0.01, "model.width": 32, "+model.dropout": 0.1}),
]


def plan_of(*overrides: str) -> Plan:
    return make_plan([*overrides, "sweep.num_samples=4"], choice="random", space={}, groups=GROUPS)


def test_the_table_has_a_row_a_trial_and_proper_types() -> None:
    table = results.trials_table(TRIALS, KEYS, "max")
    assert table.schema.names == [
        *("id", "status", "value", "evaluation", "step", "last_value", "evaluations", "steps"),
        *("started", "seconds", "cause", "run_id", "parameter/optimizer.lr", "parameter/model.width"),
        *("parameter/model.dropout", "metric/val/accuracy", "metric/val/loss"),
    ]
    first, _, third, fourth = table.to_pylist()
    assert (first["value"], first["evaluation"], first["step"]) == (0.9, 2, 20)
    assert (first["last_value"], first["evaluations"], first["steps"], first["seconds"]) == (0.8, 3, 30, 7.5)
    assert first["started"].timestamp() == 1e9
    assert first["metric/val/loss"] == pytest.approx(0.2)
    assert third["value"] == 0.6
    assert math.isnan(third["last_value"])
    assert third["parameter/model.dropout"] is None
    assert (fourth["value"], fourth["seconds"], fourth["metric/val/loss"]) == (None, None, None)
    assert table.schema.field("parameter/model.width").type == pa.int64()
    assert table.schema.field("parameter/optimizer.lr").type == pa.float64()
    assert table.schema.field("parameter/model.dropout").type == pa.float64()
    assert table.column("parameter/optimizer.lr").to_pylist()[1] == 1e-05


@pytest.mark.parametrize(
    ("values", "kept", "kind"),
    [
        ([1, 2, None], [1, 2, None], pa.int64()),
        ([1, 2.5], [1.0, 2.5], pa.float64()),
        ([True, False, None], [True, False, None], pa.bool_()),
        ([True, 1], ["true", "1"], pa.string()),
        ([1, "a", None, 0.5], ["1", "a", None, "0.5"], pa.string()),
        (["[1,2]", "[3]"], ["[1,2]", "[3]"], pa.string()),
        ([None, None], [None, None], pa.string()),
        ([2**63, 1], [str(2**63), "1"], pa.string()),
        ([math.inf, -1], [math.inf, -1.0], pa.float64()),
    ],
)
def test_a_parameters_column_is_of_the_narrowest_type_that_takes_all(
    values: list[Any], kept: list[Any], kind: Any
) -> None:
    trials = [trial(n, [0.1], parameters={"a.b": value}) for n, value in enumerate(values)]
    column = results.trials_table(trials, ["a.b"], "max").column("parameter/a.b")
    assert column.type == kind
    assert column.to_pylist() == kept


def test_what_only_some_trials_have_is_a_column_too() -> None:
    trials = [trial(1, [0.1], parameters={"a": 1}), trial(2, [0.2], parameters={"b": "x"})]
    trials[1].reports[0] = replace(trials[1].reports[0], metrics={"val/other": 3.0})
    rows = results.trials_table(trials, ["a"], "max").to_pylist()
    assert [row["parameter/a"] for row in rows] == [1, None]
    assert [row["parameter/b"] for row in rows] == [None, "x"]
    assert [row["metric/val/other"] for row in rows] == [None, 3.0]


def test_no_trial_is_an_empty_table() -> None:
    table = results.trials_table([], KEYS, "min")
    assert (table.num_rows, "parameter/optimizer.lr" in table.schema.names) == (0, True)


def test_everything_is_written_and_gathered_for_the_artifacts(in_tmp: Path) -> None:
    storage = Storage(in_tmp / "sweep")
    plan = plan_of("experiment=mlp", "optimizer.lr=tag(log,interval(1e-5,1))", "model.width=32,64,128", "seed=1,2")
    trials = [
        replace(t, parameters={"optimizer.lr": t.parameters["optimizer.lr"], "model.width": 64, "seed": 2})
        for t in TRIALS
    ]
    results.write(storage, trials=trials, plan=plan)
    written = sorted(str(p.relative_to(in_tmp / "sweep")) for p in (in_tmp / "sweep").rglob("*") if p.is_file())
    assert written == ["best/experiment/best.yaml", "parameters.png", "progress.png", "trials.csv", "trials.parquet"]
    with storage.open_read("trials.parquet") as file:
        table = pyarrow.parquet.read_table(pa.BufferReader(file.read()))
    assert table.column("id").to_pylist() == ["0001", "0002", "0003", "0004"]
    rows = list(csv.DictReader(io.StringIO(storage.read_bytes("trials.csv").decode())))
    assert [row["id"] for row in rows] == ["0001", "0002", "0003", "0004"]
    assert [row["value"] for row in rows] == ["0.9", "0.4", "0.6", ""]
    assert rows[2]["cause"] == 'RuntimeError: "no", said it,\nand left'
    assert rows[1]["parameter/model.width"] == "64"
    assert storage.read_bytes("progress.png").startswith(b"\x89PNG")
    with results.as_folder(storage) as folder:
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == written
        assert (folder / "trials.csv").read_bytes() == storage.read_bytes("trials.csv")
        assert folder.name == "sweep"
    assert not folder.exists()


def test_without_a_value_there_is_no_best_config(in_tmp: Path) -> None:
    storage, plan = Storage(in_tmp / "sweep"), plan_of("experiment=mlp", "optimizer.lr=0.1,0.2")
    results.write(storage, trials=[trial(1, [], Status.FAILED, {"optimizer.lr": 0.1})], plan=plan)
    assert storage.exists("progress.png")
    assert not storage.exists("best")


def test_a_full_disk_is_reported(in_tmp: Path) -> None:
    (in_tmp / "file").write_text("")
    plan = plan_of("experiment=mlp", "optimizer.lr=0.1,0.2")
    with pytest.raises(StorageError):
        results.write(Storage(in_tmp / "file"), trials=TRIALS[:1], plan=plan)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second."""
    for name in ("progress_png", "parameters_png"):
        monkeypatch.setattr(pictures, name, lambda *_, **__: b"png")


def same(one: Experiment, other: Experiment) -> bool:
    return replace(one, name=None, sweep=SweepConfig()) == replace(other, name=None, sweep=SweepConfig())


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("sweep", "parameters"),
    [
        (
            ["experiment=mlp", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "model.width=64,128", "seed=3"],
            {"optimizer.lr": 0.012345678901234567, "model.width": 128},
        ),
        (
            ["experiment=mlp", "optimizer=adamw,sgd", "lr_scheduler=cosine,wsd", "optimizer.weight_decay=0,1e-3"],
            {"optimizer": "sgd", "lr_scheduler": "wsd", "optimizer.weight_decay": 0.001},
        ),
        (
            [
                "experiment=resnet",
                "model.layers=[1,1,1],[1,2]",
                "checkpoint.num_to_keep=1,null",
                "trainer.max_epochs=range(2,9)",
            ],
            {"model.layers": "[1,2]", "checkpoint.num_to_keep": None, "trainer.max_epochs": 7},
        ),
        (
            ["experiment=resnet,mlp", "data.global_batch_size=64,128", "+trainer.early_stopping.patience=2"],
            {"experiment": "resnet", "data.global_batch_size": 64},
        ),
    ],
)
def test_the_best_composes_to_what_its_overrides_compose(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, sweep: list[str], parameters: dict[str, Any]
) -> None:
    plan = plan_of(*sweep)
    best = trial(2, [0.5, 0.97], parameters=parameters)
    best.overrides = plan.overrides_of(parameters)
    others = [trial(1, [0.6], Status.PRUNED, {}), trial(3, [0.99], Status.FAILED, {})]
    results.write(Storage(in_tmp / "s"), trials=[others[0], best, others[1]], plan=plan)
    original = compose([*plan.fixed, *best.overrides]).experiment
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    again = compose(["experiment=best"], in_tmp / "s" / "best").experiment
    assert same(replace(again, storage_path=original.storage_path), original)
    over = compose(["experiment=best", "trainer.max_epochs=2", "optimizer.lr=0.5"], in_tmp / "s" / "best").experiment
    assert (over.trainer.max_epochs, (over.optimizer or {})["lr"]) == (2, 0.5)
    comment = (in_tmp / "s" / "best" / "experiment" / "best.yaml").read_text().splitlines()[1]
    assert comment.startswith("# The best trial of the sweep ")
    assert ": 0002, val/accuracy 0.97 at step 20, with " in comment


@pytest.mark.usefixtures("no_pictures")
def test_the_best_of_a_population_has_the_parameters_of_its_best_report(in_tmp: Path) -> None:
    """The best config has the parameters of the best report, and says under which ones its weights were trained
    before."""
    plan = plan_of("experiment=mlp", "optimizer.lr=interval(0.1,0.2)")
    one = trial(1, [0.5, 0.9, 0.6], parameters={"optimizer.lr": 0.18})
    one.before = [(1, {"optimizer.lr": 0.12}), (2, {"optimizer.lr": 0.15})]
    one.inherited = [{"evaluation": n, "from": "0001", "parameters": {"optimizer.lr": 0.0}} for n in (1, 2)]
    other = trial(2, [0.4], parameters={"optimizer.lr": 0.1})
    results.write(Storage(in_tmp / "s"), trials=[one, other], plan=plan)
    text = (in_tmp / "s" / "best" / "experiment" / "best.yaml").read_text()
    assert (
        "# Trained under a schedule, of which these are the last parameters: lr 0.12 to step 10, lr 0.15 to step 20."
        in text
    )
    assert (compose(["experiment=best"], in_tmp / "s" / "best").experiment.optimizer or {})["lr"] == 0.15
    table = results.trials_table([one, other], ["optimizer.lr"], "max")
    assert table["inherited"].to_pylist() == ["0001@1 0001@2", None]
    assert table["parameter/optimizer.lr"].to_pylist() == [0.15, 0.1]
