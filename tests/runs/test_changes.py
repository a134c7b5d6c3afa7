"""Tests of values that a resume changes, by name or by reference: refused if the checkpoint cannot follow them."""

from __future__ import annotations

from typing import Any

import pytest

from raytrainer.attempt import Record
from raytrainer.config import Experiment
from raytrainer.config.schema import DataConfig
from raytrainer.errors import ConfigError
from raytrainer.runs.changes import check_changes

TORCH = "torch.optim.lr_scheduler"


def my_curve(step: int, total_steps: int | None, power: float = 1.0) -> float:
    return 1.0


def experiment(
    scheduler: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **more: Any
) -> Experiment:
    optimizer = optimizer or {"_target_": "torch.optim.SGD", "lr": 0.1}
    return Experiment(lr_scheduler=scheduler, optimizer=optimizer, **more)


def change(before: Experiment, after: Experiment, *overrides: str, resolved: dict[str, Any] | None = None) -> list[str]:
    return check_changes(before, after, Record("past", "/runs/past", resolved=resolved or {}), overrides)


def refusal(*given: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        change(*given, **more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("CosineAnnealingLR", "T_max"),
        ("OneCycleLR", "total_steps"),
        ("StepLR", "step_size"),
        ("LinearLR", "total_iters"),
        ("PolynomialLR", "total_iters"),
        ("CosineAnnealingWarmRestarts", "T_0"),
    ],
)
def test_an_argument_that_refers_to_the_length_cannot_follow_it(target: str, name: str) -> None:
    before, after = (experiment({"_target_": f"{TORCH}.{target}", name: n}) for n in (6, 12))
    message = refusal(before, after, "trainer.max_steps=12")
    assert message.startswith(f"lr_scheduler.{name}=12 was 6 ")
    assert "raytrainer rerun past init_from=past trainer.max_steps=12" in message
    assert "lr_scheduler=cosine" in message
    assert (f"keep it with lr_scheduler.{name}=6" in message) == (name != "total_steps")
    assert change(before, before, "trainer.max_steps=12", f"lr_scheduler.{name}=6") == []


def test_a_scheduler_made_of_others_is_compared_to_its_depth() -> None:
    def sequential(n: int) -> dict[str, Any]:
        inner = [{"_target_": f"{TORCH}.ConstantLR"}, {"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": n}]
        return {"_target_": f"{TORCH}.SequentialLR", "schedulers": inner, "milestones": [2]}

    message = refusal(experiment(sequential(4)), experiment(sequential(9)), "trainer.max_steps=11")
    assert message.startswith("lr_scheduler.schedulers=")


def test_curves_follow() -> None:
    for node in ({"_target_": "raytrainer.optim.Cosine"}, {"_target_": f"{__name__}.my_curve", "_partial_": True}):
        changed = experiment({**node, "warmup_steps": 3, "power": 2})
        assert change(experiment({**node, "warmup_steps": 1, "power": 1}), changed, "lr_scheduler.power=2") == []


def test_what_the_record_says_counts_where_the_environment_has_changed() -> None:
    now = experiment({"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": 12})
    recorded = {"lr_scheduler": {"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": 6}}
    assert "lr_scheduler.T_max=12 was 6 " in refusal(now, now, resolved=recorded)
    assert change(now, now) == []


def test_a_torch_schedulers_values_are_refused_by_name_and_taken_where_they_are_the_same() -> None:
    before, after = (experiment({"_target_": f"{TORCH}.StepLR", "step_size": n}) for n in (3, 100))
    message = refusal(before, after, "lr_scheduler.step_size=100")
    assert message.startswith("lr_scheduler.step_size=100 was 3 ")
    assert "torch.optim.lr_scheduler.StepLR" in message
    assert change(before, before, "lr_scheduler.step_size=3") == []


def test_a_reference_changes_what_the_checkpoint_means() -> None:
    before, after = (experiment(data=DataConfig(train={"_target_": "x.Y", "n": n})) for n in (6, 12))
    message = refusal(before, after, "trainer.max_steps=12")
    assert message.startswith("data.train.n=12 was 6 ")
    assert "refers to what trainer.max_steps=12 changes" in message
    before, after = (experiment(data=DataConfig(global_batch_size=n)) for n in (64, 128))
    assert refusal(before, after, "scaling.num_workers=2").startswith("data.global_batch_size=128 was 64")
    before, after = (experiment(loss={"_target_": "x.Y", "n": n}) for n in (6, 12))
    assert change(before, after, "trainer.max_steps=12") == []  # a loss takes its new value


def test_a_fixed_value_may_be_named_where_it_is_the_same() -> None:
    e = experiment(seed=3, model={"_target_": "x.Y", "width": 4})
    assert change(e, e, "seed=3", "model.width=4") == []
    message = refusal(e, experiment(seed=4), "seed=4")
    assert message.startswith("seed=4 ")
    assert "checkpoint" in message


def test_an_optimizers_setting_follows_also_by_a_reference() -> None:
    def decayed(weight_decay: float) -> Experiment:
        return experiment(optimizer={"_target_": "torch.optim.SGD", "lr": 0.1, "weight_decay": weight_decay})

    assert change(decayed(0.1), decayed(0.2), "trainer.max_steps=12") == ["weight_decay"]
    assert change(decayed(0.1), decayed(0.1), "optimizer.lr=0.1") == ["lr"]
    recorded = {"optimizer": decayed(0.3).optimizer}
    assert change(decayed(0.1), decayed(0.1), resolved=recorded) == ["weight_decay"]


@pytest.mark.parametrize(
    ("optimizer", "name", "was", "now", "reason"),
    [
        ("torch.optim.AdamW", "amsgrad", False, True, "lacks what it needs (max_exp_avg_sq)"),
        ("torch.optim.RMSprop", "centered", False, True, "lacks what it needs (grad_avg)"),
        ("torch.optim.RMSprop", "momentum", 0.0, 0.9, "lacks what it needs (momentum_buffer)"),
    ],
)
def test_a_setting_that_needs_a_state_is_refused(optimizer: str, name: str, was: Any, now: Any, reason: str) -> None:
    before, after = (experiment(optimizer={"_target_": optimizer, name: value}) for value in (was, now))
    message = refusal(before, after, f"optimizer.{name}={str(now).lower()}")
    assert message.startswith(f"optimizer.{name}={str(now).lower()} was {str(was).lower()}")
    assert reason in message
    assert change(after, before, f"optimizer.{name}={str(was).lower()}") == [name]


def test_a_rate_that_the_scheduler_sets_is_refused() -> None:
    cycle = {"_target_": f"{TORCH}.OneCycleLR", "max_lr": 0.1, "total_steps": 9}
    before, after = (experiment(cycle, {"_target_": "torch.optim.SGD", "lr": lr}) for lr in (0.1, 0.01))
    assert refusal(before, after, "optimizer.lr=0.01").startswith("optimizer.lr=0.01 would be ignored")
    assert change(before, before, "trainer.log_every_n_steps=3") == []
