"""The plan of a sweep before anything runs: its parameters, its configs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrainer.config import Composition, group_names
from raytrainer.errors import ConfigError, StorageError
from raytrainer.storage import Storage
from raytrainer.sweep import Plan, make_plan
from raytrainer.sweep.plan import choices_of
from tests.launches import OUTSIDE

pytestmark = pytest.mark.usefixtures("in_tmp")

LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"


def plan(*overrides: str, choice: str = "random", of: str = "mlp", space: dict[str, Any] | None = None) -> Plan:
    given = [f"experiment={of}", f"sweep={choice}", *overrides]
    return make_plan(given, choice=choice, space=space or {}, groups=group_names())


def test_one_config_for_each_combination_of_group_choices() -> None:
    found = plan("model=mlp,resnet_digits", "optimizer=adamw,sgd", LR, "trainer.max_epochs=3")
    assert len(found.compositions) == 4
    assert [p.key for p in found.parameters] == ["model", "optimizer", "optimizer.lr"]
    assert len({c.experiment.name for c in found.compositions.values()}) == 1
    assert {c.experiment.trainer.max_epochs for c in found.compositions.values()} == {3}
    for model, part in (("mlp", "MLP"), ("resnet_digits", "ResNet")):
        values = {"model": model, "optimizer": "sgd", "optimizer.lr": 0.01}
        trial = found.composition_of(values)
        assert trial.experiment.model is not None
        assert trial.experiment.optimizer is not None
        assert part in trial.experiment.model["_target_"]
        assert "sgd" in trial.experiment.optimizer["_target_"].lower()
        assert trial.experiment.optimizer["lr"] == 0.01
        assert dict(trial.choices)["model"] == model
        assert found.text_of(values) == found.compositions[choices_of(found.parameters, values)].text
        assert found.overrides_of(values) == [f"model={model}", "optimizer=sgd", "optimizer.lr=0.01"]


def test_the_name_says_what_it_is_of() -> None:
    assert (plan(LR).experiment.name or "").startswith("mlp-random-")
    assert (plan("model=mlp,resnet_digits", choice="grid").experiment.name or "").startswith("mlp-grid-")
    several = plan("sweep.metric=val/loss", choice="grid", of="mlp,smoke")
    assert (several.experiment.name or "").startswith("sweep-grid-")
    assert plan(LR, "name=mine").experiment.name == "mine"


def test_a_space_of_the_config_and_the_command_line_over_it() -> None:
    found = plan("model.width=8,16", space={"optimizer.lr": "tag(log,interval(1e-4,1e-1))", "model.width": "32,64"})
    values = {p.key: p.values for p in found.parameters}
    assert values == {"optimizer.lr": (), "model.width": (8, 16)}


def test_as_it_was_written(tmp_path: Path) -> None:
    found = plan("model=mlp,resnet_digits", LR, "+trainer.max_time=null,3.5", "seed=1,2")
    storage = Storage(tmp_path)
    found.write(storage)
    again = Plan.read(storage)
    assert again.parameters == found.parameters
    assert again.fixed == found.fixed
    assert {key: c.text for key, c in again.compositions.items()} == {
        key: c.text for key, c in found.compositions.items()
    }
    values = {"model": "mlp", "optimizer.lr": 0.1 + 0.2, "+trainer.max_time": None, "seed": 2}
    assert again.composition_of(values).text == found.composition_of(values).text
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(StorageError, match="is not a valid sweep plan"):
        Plan.read(storage)
    (tmp_path / "sweep.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(StorageError, match="later version"):
        Plan.read(storage)


def test_other_values_for_all_trials() -> None:
    found = plan("model=mlp,resnet_digits", LR).with_overrides(["sweep.num_samples=3", "trainer.max_epochs=7"])
    assert {c.experiment.trainer.max_epochs for c in found.compositions.values()} == {7}
    assert found.total == 3
    assert dict(found.first.choices)["model"] == "mlp"


def test_the_metric_is_the_checkpoints_where_nothing_is_said() -> None:
    assert (plan(LR).metric, plan(LR).mode) == ("val/accuracy", "max")
    other = plan(LR, "sweep.metric=val/loss", "sweep.mode=min")
    assert (other.metric, other.mode) == ("val/loss", "min")


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        ([], 10),
        (["trainer.max_epochs=4"], 4),
        (["trainer.max_epochs=2,8,4"], 8),
        (["trainer.max_epochs=null", "trainer.max_steps=40,80", "trainer.eval_every_n_steps=20,10"], 8),
        (["trainer.max_epochs=null", "trainer.max_steps=50", "trainer.eval_every_n_steps=20"], 3),
        (["trainer.max_epochs=null", "trainer.max_steps=50"], None),
        (["trainer.eval_every_n_steps=0"], 1),
    ],
)
def test_how_often_a_trial_evaluates(overrides: list[str], evaluations: int | None) -> None:
    assert plan(LR, *overrides).evaluations == evaluations


def test_a_required_argument_may_come_from_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A required argument may get its values from the sweep alone; no config of the sweep is complete without them."""
    monkeypatch.syspath_prepend(str(OUTSIDE))
    found = plan("+callbacks.changes._target_=probes.Changes", "+callbacks.changes.what=nothing,raises")
    assert "changes" in found.example.experiment.callbacks
    assert isinstance(found.example, Composition)
    with pytest.raises(ConfigError, match="step"):
        plan("+callbacks.meets._target_=probes.Meets", "+callbacks.meets.steps=1,2")


def test_each_value_is_tried_before_anything_runs() -> None:
    for swept in ("optimizer.lr=0.1,-1", "optimizer.lr=interval(-1,0.1)"):
        with pytest.raises(ConfigError, match="Invalid learning rate"):
            plan(swept)
    with pytest.raises(ConfigError, match="widht=3 is not an argument"):
        plan("+model.widht=3,4")
    with pytest.raises(ConfigError, match="betas"):
        plan("optimizer=adamw,sgd", "+optimizer.betas=[0.9,0.99],[0.8,0.9]")  # sgd has no argument betas


def test_too_many_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.sweep.plan._MOST_COMBINATIONS", 3)
    with pytest.raises(ConfigError, match=r"^model, optimizer have more than 3 combinations"):
        plan("model=mlp,resnet_digits", "optimizer=adamw,sgd")


def test_another_metric_has_its_own_direction() -> None:
    assert plan(LR, "sweep.metric=val/loss").mode == "min"
    assert yaml.safe_load(plan(LR, "sweep.metric=val/loss").first.text)["sweep"]["mode"] == "min"
    with pytest.raises(ConfigError, match=r"^sweep\.mode=max .*sweep\.metric=val/loss"):
        plan(LR, "sweep.metric=val/loss", "sweep.mode=max")
    with pytest.raises(ConfigError, match=r"^sweep\.mode .*sweep\.mode=min or sweep\.mode=max"):
        plan(LR, "sweep.metric=val/score")


def test_trials_of_several_experiments_have_one_objective() -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.metric .*val/accuracy \(max\), val/loss \(min\)"):
        plan(LR, of="mlp,smoke")
    assert plan(LR, "sweep.metric=val/loss", of="mlp,smoke").mode == "min"


def test_a_list_that_was_meant_as_several_values() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("model.width=[16,32]")
    assert str(caught.value).startswith("model.width=[16,32] ")
    assert str(caught.value).endswith(" model.width=16,32")
