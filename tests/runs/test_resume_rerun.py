"""Tests of `resume` and `rerun` of past runs and sweeps, and of what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from raytrainer.attempt import Record
from raytrainer.config import compose, group_names
from raytrainer.errors import ConfigError, RunNotFound
from raytrainer.runs.rerun import to_rerun, to_rerun_sweep
from raytrainer.runs.resolve import find, trial_of
from raytrainer.runs.resume import to_resume, to_resume_sweep
from raytrainer.storage import Storage
from raytrainer.sweep import Plan, Trial, TrialJournal, make_plan
from raytrainer.tracking.server import StoredRun

RUN_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def past(in_tmp: Path) -> Record:
    """A past run with a directory below ./runs: `mlp-20260101-120000-abcd`."""
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
    with pytest.raises(RunNotFound, match=f"no checkpoint.*raytrainer rerun {past.name}"):
        to_resume(past.name, [])


def test_a_run_that_was_moved_is_not_resumed_in_its_old_place(
    past: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "copied" / "runs" / past.name
    shutil.copytree(past.run_dir, there)
    monkeypatch.chdir(tmp_path / "copied")
    with pytest.raises(RunNotFound, match="but it ran in"):
        to_resume(past.name, [])


def test_a_torch_schedulers_values_cannot_be_changed(in_tmp: Path) -> None:
    record = recorded("steps")
    storage = Storage(record.run_dir)
    text = compose(["experiment=mlp", "name=steps"]).text.replace(
        "raytrainer.optim.Cosine", "torch.optim.lr_scheduler.StepLR"
    )
    storage.write_bytes("config.yaml", text.encode())
    with pytest.raises(ConfigError, match="Only curves of raytrainer"):
        to_resume("steps", ["+lr_scheduler.step_size=3"])


# --- resume --------------------------------------------------------------------------------------------------------


def test_resume_applies_values(past: Record) -> None:
    overrides = ["trainer.max_epochs=20", "optimizer.lr=0.01", "scaling.num_workers=2"]
    composition, record, changed = to_resume(past.name, overrides)
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
    with pytest.raises(ConfigError, match=f"raytrainer rerun {past.name} … starts a new run"):
        to_resume(past.name, [override])


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
        to_resume(past.name, [override])
    key = override.partition("=")[0].lstrip("+")
    assert str(caught.value).startswith(f"{key}=")
    assert f"raytrainer rerun {past.name} {override} starts a new run" in str(caught.value)


def test_resume_refuses_wrong_values_as_a_first_launch_does(past: Record) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.max_epoch=3 .*valid: trainer\.max_epochs"):
        to_resume(past.name, ["trainer.max_epoch=3"])


def test_a_config_that_is_gone(past: Record) -> None:
    Path(past.run_dir, "config.yaml").unlink()
    with pytest.raises(RunNotFound, match=r"its config\.yaml in .* is gone"):
        to_resume(past.name, [])


# --- rerun ---------------------------------------------------------------------------------------------------------


def test_rerun_is_a_new_run_of_the_same_config(past: Record) -> None:
    before = to_resume(past.name, [])[0].experiment
    e = to_rerun(past.name, ["model.width=32", "seed=3"]).experiment
    assert e.name is not None
    assert e.name.startswith("mlp-")
    assert e.name != past.name
    assert e.name.count("-") == past.name.count("-")  # not mlp-DATE-HEX-DATE-HEX
    assert e.model is not None
    assert (e.model["width"], e.seed, e.data) == (32, 3, before.data)


def test_rerun_under_a_name(past: Record) -> None:
    assert to_rerun(past.name, ["name=again"]).experiment.name == "again"


def test_rerun_refuses_wrong_keys(past: Record) -> None:
    with pytest.raises(ConfigError, match=r"^model\.widht=3 .*valid: model\.width"):
        to_rerun(past.name, ["model.widht=3"])


# --- sweeps --------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(in_tmp: Path) -> Record:
    """A sweep over the learning rate and the model with two trials, of which tests repeat the second."""
    plan = make_plan(
        ["experiment=mlp", "sweep=random", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "model=mlp,resnet_digits"],
        choice="random",
        space={},
        groups=group_names(),
    )
    storage = Storage(plan.experiment.storage_path or "").child(plan.experiment.name or "")
    record = Record(plan.experiment.name or "", storage.uri, RUN_ID, "sqlite:////x.db", "mlp", kind="sweep")
    plan.write(storage)
    record.write(storage)
    journal = TrialJournal.open(storage)
    journal.begin({})
    for number, (rate, model) in enumerate([(0.1, "mlp"), (0.0123, "resnet_digits")], start=1):
        values = {"optimizer.lr": rate, "model": model}
        journal.start(Trial(f"{number:04d}", values, plan.overrides_of(values), 1.0, run_id=TRIAL_ID * number))
    journal.close()
    return record


TRIAL_ID = "1" * 16


def test_a_trial_is_found_by_its_name_and_by_its_mlflow_id(swept: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(run_id: str, number: str) -> StoredRun:
        name = f"{swept.name}.{number}"
        tags = {"raytrainer.run_dir": f"{swept.run_dir}/trials/{number}", "raytrainer.sweep": swept.name}
        return StoredRun(run_id, name, "0", "FINISHED", 1.0, 2.0, {}, tags, {}, None)

    asked = {TRIAL_ID * 2: stored(TRIAL_ID * 2, "0002")}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere")
    monkeypatch.setattr("raytrainer.tracking.lookup.find_run", lambda uri, identifier: asked.get(identifier))
    for identifier in (f"{swept.name}.0002", TRIAL_ID * 2):
        assert find(identifier)[0] == swept
        assert trial_of(identifier, swept) == "0002"
    for identifier in (swept.name, RUN_ID):
        assert find(identifier)[0] == swept
        assert trial_of(identifier, swept) is None
    with pytest.raises(RunNotFound):
        find("2" * 32)


def test_a_trial_is_rerun_as_a_run(swept: Record) -> None:
    composition = to_rerun(f"{swept.name}.0002", ["trainer.max_epochs=3"])
    e = composition.experiment
    assert e.optimizer is not None
    assert e.model is not None
    assert (e.optimizer["lr"], e.trainer.max_epochs) == (0.0123, 3)
    assert "ResNet" in e.model["_target_"] or "resnet" in e.model["_target_"]
    assert e.name not in (None, swept.name)
    with pytest.raises(RunNotFound, match=f"{swept.name} has no trial 0007; it has 000"):
        to_rerun(f"{swept.name}.0007", [])


def test_a_trial_is_not_resumed_by_itself(swept: Record) -> None:
    with pytest.raises(ConfigError, match=f"is a trial of {swept.name}: resume {swept.name} continues it"):
        to_resume_sweep(f"{swept.name}.0002", [])


def test_a_sweep_is_resumed_with_more_trials(swept: Record) -> None:
    plan, record = to_resume_sweep(swept.name, ["sweep.num_samples=20", "sweep.max_trial_failures=2"])
    assert record == swept
    assert {c.experiment.sweep.num_samples for c in plan.compositions.values()} == {20}
    assert plan.experiment.sweep.max_trial_failures == 2
    assert [p.key for p in plan.parameters] == ["optimizer.lr", "model"]
    assert plan.experiment.name == swept.name


@pytest.mark.parametrize(
    "override",
    ["sweep.metric=val/loss", "optimizer.lr=0.1", "sweep=asha", "trainer.max_epochs=3", "num_samples=3", "seed=3"],
)
def test_a_resumed_sweep_cannot_change_its_trials(swept: Record, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_resume_sweep(swept.name, [override])
    assert str(caught.value).startswith(override)
    assert "sweep.num_samples" in str(caught.value)
    assert "sweep.allow_failed" in str(caught.value)


def test_an_unknown_key_of_a_sweep_is_refused_with_the_nearest(swept: Record) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.num_sample .*valid: sweep\.num_samples, "):
        to_resume_sweep(swept.name, ["sweep.num_sample=20"])


def test_a_sweep_is_rerun_under_another_name(swept: Record) -> None:
    plan = to_rerun_sweep(swept.name, ["trainer.max_epochs=3"])
    assert plan.experiment.name != swept.name
    assert len({c.experiment.name for c in plan.compositions.values()}) == 1
    assert {c.experiment.trainer.max_epochs for c in plan.compositions.values()} == {3}
    assert plan.parameters == Plan.read(Storage(swept.run_dir)).parameters
    with pytest.raises(ConfigError, match=r"^optimizer\.lr.*parameter of the sweep"):
        to_rerun_sweep(swept.name, ["optimizer.lr=0.1"])
    with pytest.raises(ConfigError, match=r"model is a parameter of the sweep"):
        to_rerun_sweep(swept.name, ["+model=mlp"])
    # The command that is printed for the best trial contains these, so it must include the change.
    assert plan.fixed == ("experiment=mlp", "sweep=random", "trainer.max_epochs=3", f"name={plan.experiment.name}")
