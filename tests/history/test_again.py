"""Runs that were, gone on with, or done again; and what is refused of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raytrainer import history
from raytrainer.config import compose
from raytrainer.errors import ConfigError, RunNotFound
from raytrainer.run import Record
from raytrainer.storage import Storage

RUN_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def past(in_tmp: Path) -> Record:
    """A run that was, as its directory says: `mlp-20260101-120000-abcd`, below ./runs."""
    return recorded("mlp-20260101-120000-abcd", RUN_ID)


def recorded(name: str, run_id: str | None = None) -> Record:
    composition = compose(["experiment=mlp", f"name={name}"])
    assert composition.experiment.storage_path is not None
    storage = Storage(composition.experiment.storage_path).child(name)
    record = Record(name, storage.uri, run_id, "sqlite:////x.db", "mlp", status="FINISHED", attempts=1)
    storage.write_bytes("config.yaml", composition.text.encode())
    storage.write_bytes("checkpoints/step-000000001/manifest.json", b"{}")
    record.write(storage)
    return record


def test_a_finished_run_whose_checkpoints_are_gone(past: Record) -> None:
    Storage(past.run_dir).delete("checkpoints")
    with pytest.raises(RunNotFound, match="its checkpoints are gone; raytrainer rerun"):
        history.to_resume(past.name, [])


def test_a_run_that_was_moved_is_not_resumed_in_its_old_place(
    past: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "copied" / "runs" / past.name
    shutil.copytree(past.run_dir, there)
    monkeypatch.chdir(tmp_path / "copied")
    with pytest.raises(RunNotFound, match="but it ran in"):
        history.to_resume(past.name, [])


def test_a_torch_schedulers_values_cannot_be_changed(in_tmp: Path) -> None:
    record = recorded("steps")
    storage = Storage(record.run_dir)
    text = compose(["experiment=mlp", "name=steps"]).text.replace(
        "raytrainer.optim.Cosine", "torch.optim.lr_scheduler.StepLR"
    )
    storage.write_bytes("config.yaml", text.encode())
    with pytest.raises(ConfigError, match="only curves of raytrainer"):
        history.to_resume("steps", ["lr_scheduler.step_size=3"])


# --- resume --------------------------------------------------------------------------------------------------------


def test_resume_applies_values(past: Record) -> None:
    overrides = ["trainer.max_epochs=20", "optimizer.lr=0.01", "scaling.num_workers=2"]
    composition, record, changed = history.to_resume(past.name, overrides)
    assert record == past
    assert changed == ["lr"]
    e = composition.experiment
    assert (e.name, e.trainer.max_epochs, e.scaling.num_workers) == (past.name, 20, 2)
    assert e.optimizer is not None
    assert e.optimizer["lr"] == 0.01


@pytest.mark.parametrize(
    "override", ["model=resnet18", "optimizer=sgd", "experiment=resnet", "+cluster=inline", "~lr_scheduler"]
)
def test_resume_refuses_choices_of_groups(past: Record, override: str) -> None:
    with pytest.raises(ConfigError, match=f"raytrainer rerun {past.name} …, a new run"):
        history.to_resume(past.name, [override])


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "seed=3",
        "init_from=x",
        "storage_path=/x",
        "model.width=3",
        "+model.new=3",
        "loss.label_smoothing=0.1",
        "optimizer._target_=torch.optim.SGD",
        "lr_scheduler._target_=x.Y",
        "data.train.split=val",
        "data.global_batch_size=64",
        "data.shuffle=false",
        "data.drop_last=false",
        "trainer.precision=64-true",
        "trainer.ema_decay=0.9",
        "checkpoint.monitor=val/loss",
        "checkpoint.mode=min",
        "+callbacks.a={_target_: a.b}",
        "tracking.tracking_uri=http://x",
    ],
)
def test_resume_refuses_what_changes_the_checkpoints_meaning(past: Record, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        history.to_resume(past.name, [override])
    key = override.partition("=")[0].lstrip("+")
    assert str(caught.value).startswith(f"{key}=")
    assert f"raytrainer rerun {past.name} {override} starts a new run" in str(caught.value)


def test_resume_refuses_wrong_values_as_a_first_launch_does(past: Record) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.max_epoch=3 is not a key; valid: trainer\.max_epochs"):
        history.to_resume(past.name, ["trainer.max_epoch=3"])


def test_a_config_that_is_gone(past: Record) -> None:
    Path(past.run_dir, "config.yaml").unlink()
    with pytest.raises(RunNotFound, match=r"its config\.yaml in .* is gone"):
        history.to_resume(past.name, [])


# --- rerun ---------------------------------------------------------------------------------------------------------


def test_rerun_is_a_new_run_of_the_same_thing(past: Record) -> None:
    before = history.to_resume(past.name, [])[0].experiment
    e = history.to_rerun(past.name, ["model.width=32", "seed=3"]).experiment
    assert e.name is not None
    assert e.name.startswith("mlp-")
    assert e.name != past.name
    assert e.name.count("-") == past.name.count("-")  # not mlp-DATE-HEX-DATE-HEX
    assert e.model is not None
    assert (e.model["width"], e.seed, e.data) == (32, 3, before.data)


def test_rerun_under_a_name(past: Record) -> None:
    assert history.to_rerun(past.name, ["name=again"]).experiment.name == "again"


def test_rerun_refuses_wrong_keys(past: Record) -> None:
    with pytest.raises(ConfigError, match=r"^model\.widht=3 is not a key .*valid: model\.width"):
        history.to_rerun(past.name, ["model.widht=3"])
