"""Tests of what `evaluate` launches for past runs, and of what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer.attempt import Record
from raytrainer.checkpoint import Checkpointer
from raytrainer.config import compose, group_names
from raytrainer.errors import ConfigError, RunNotFound
from raytrainer.runs.evaluate import to_evaluate
from raytrainer.storage import Storage
from raytrainer.sweep import Trial, TrialJournal, make_plan
from tests.runs import past

RUN_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def run(in_tmp: Path) -> Record:
    """A run with checkpoints after 10 and 20 steps; the first is the best."""
    record, storage = past.record("mlp-20260101-120000-abcd", run_id=RUN_ID, experiment_name="mlp")
    saved(storage)
    return record


def saved(storage: Storage) -> None:
    checkpoints = Checkpointer(storage.child("checkpoints"), mode="max")
    for step, metric in ((10, 0.9), (20, 0.8)):
        checkpoints.save(step, {"step": step}, {}, metric=metric)
    checkpoints.close()


def refusal(identifier: str, *overrides: str, checkpoint: str = "best") -> str:
    with pytest.raises((ConfigError, RunNotFound)) as caught:
        to_evaluate(identifier, overrides, checkpoint=checkpoint)
    return str(caught.value)


def test_an_evaluation_is_a_child_run(run: Record) -> None:
    e = to_evaluate(run.name, ["data.global_batch_size=7", "+data.val.transform=null"]).experiment
    assert e.evaluate is not None
    assert (e.evaluate.run_dir, e.evaluate.checkpoint, e.evaluate.run_id) == (run.run_dir, "best", RUN_ID)
    assert e.name is not None
    assert e.name.startswith("mlp-evaluate-")
    assert (e.data.global_batch_size, e.data.val_sets[""]["transform"]) == (7, None)
    assert (e.tracking.log_model, e.tracking.experiment_name) == (False, "mlp")
    assert e.cluster.kind == "local"  # like the run


def test_another_validation_set_and_another_cluster(run: Record, tmp_path: Path) -> None:
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/far.yaml").write_text(
        "val: {night: {_target_: raytrainer.data.Digits, split: val}, day: {_target_: raytrainer.data.Digits, "
        "split: '${oc.env:NOT_HERE,val}'}}\n"
    )
    found = to_evaluate(run.name, ["data=far", "cluster=inline"], checkpoint="last", config_dir=str(tmp_path / "conf"))
    e = found.experiment
    assert list(e.data.val_sets) == ["night", "day"]
    assert e.data.train == {"_target_": "raytrainer.data.Digits", "split": "train"}  # from the run's config
    assert "${oc.env:NOT_HERE,val}" in found.text
    assert (e.cluster.kind, e.max_workers, e.evaluate and e.evaluate.checkpoint) == ("inline", 1, "last")
    sent = to_evaluate(run.name, ["cluster=job", "cluster.address=http://x:8265"]).experiment
    assert (sent.cluster.kind, sent.cluster.address) == ("job", "http://x:8265")
    assert dict(found.choices)["data"] == "far"


def test_an_override_of_the_model_is_refused(run: Record) -> None:
    for override in ("model=resnet18", "model.width=3", "optimizer.lr=1", "trainer.ema_decay=0.9", "loss=mse"):
        assert f"{override.partition('=')[0]}=" in refusal(run.name, override)
        assert "cannot be changed in an evaluation" in refusal(run.name, override)
    assert "data=digitz is not a valid choice" in refusal(run.name, "data=digitz")
    assert "data.vall=1 is not a key" in refusal(run.name, "data.vall=1")
    assert refusal(run.name, "data.val=null").startswith("data.val is not set")


def test_a_checkpoint_that_is_not_there_is_refused(run: Record) -> None:
    message = refusal(run.name, checkpoint="15")
    assert message.startswith("--step=15 ")
    assert message.endswith("valid: 10, 20")
    to_evaluate(run.name, [], checkpoint="20")
    Storage(run.run_dir).delete("checkpoints")
    assert "has no checkpoint in" in refusal(run.name)


def test_a_run_that_was_copied_is_evaluated_where_it_is(run: Record, tmp_path: Path) -> None:
    Path(run.run_dir).rename(tmp_path / "runs" / "moved")
    e = to_evaluate("moved", []).experiment
    assert e.evaluate is not None
    assert e.evaluate.run_dir == str(tmp_path / "runs" / "moved")
    assert e.storage_path == str(tmp_path / "runs")


def test_a_trial_of_a_sweep(in_tmp: Path) -> None:
    _, storage = past.record("search", kind="sweep", run_id=RUN_ID)
    overrides = ["experiment=mlp", "name=search", "sweep=random", "optimizer.lr=interval(0.1,0.3)"]
    plan = make_plan(overrides, choice="random", space={}, groups=group_names())
    plan.write(storage)
    journal, values = TrialJournal.open(storage), {"optimizer.lr": 0.2}
    journal.begin({})
    journal.start(Trial("0001", values, plan.overrides_of(values), 1.0, run_id="1" * 32))
    journal.close()
    saved(storage.child("trials/0001"))
    e = to_evaluate("search.0001", []).experiment
    assert e.evaluate is not None
    assert (e.evaluate.run_dir, e.evaluate.run_id) == (storage.child("trials/0001").display, "1" * 32)
    assert (e.optimizer or {})["lr"] == 0.2
    assert re.search("search is a sweep.*trials", refusal("search"))


def test_it_is_tracked_in_the_store_of_the_run(run: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that is set here now does not have the parent run, so the run's own store is used."""
    storage = Storage(run.run_dir)
    replace(run, tracking_uri="http://theirs:5000").write(storage)

    def told_to() -> str | None:
        return to_evaluate(run.name, []).experiment.tracking.tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://others:5000")
    assert told_to() == "http://theirs:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@theirs:5000")  # the same store, with credentials
    assert told_to() == "http://me:secret@theirs:5000"
    assert "me:secret" not in to_evaluate(run.name, []).text


def test_the_text_is_complete(run: Record) -> None:
    """A cluster receives only this text, so the text must say everything."""
    text = to_evaluate(run.name, []).text
    assert "evaluate:" in text
    assert compose(["experiment=mlp"]).experiment.evaluate is None
