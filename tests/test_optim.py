"""Parameter groups, and the schedules compared with their closed forms."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raytrainer.errors import ConfigError
from raytrainer.models import ResNet
from raytrainer.optim import (
    WSD,
    Constant,
    Cosine,
    Curve,
    Linear,
    build_optimizer,
    build_scheduler,
    freeze,
    parameter_groups,
)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_matrices_and_kernels_decay_and_vectors_do_not() -> None:
    model = net()
    decay, plain = parameter_groups(model, 0.1)
    assert [p.ndim for p in decay["params"]] == [4, 2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_parameter_is_in_one_group(norm: Any) -> None:
    model = ResNet("bottleneck", (1, 1), 10, width=4, norm=norm)
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_tied_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False), "c": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert [id(p) for p in group["params"]] == [id(model["a"].weight)]
    with pytest.raises(ConfigError, match="no trainable parameter"):
        parameter_groups(model["c"], 0.1)


def test_frozen_by_pattern() -> None:
    model = net()
    freeze(model, ["0.*", "1.weight"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["1.bias", "3.weight", "3.bias"]
    assert model[1].training  # type: ignore[index]
    freeze(model, ["1.*"])
    assert not model[1].training  # type: ignore[index]
    assert model[0].training  # type: ignore[index]


@pytest.mark.parametrize(
    ("pattern", "close"), [("3.weigth", "3.weight"), ("4.*", r"0.\*, 1.\*, 3.\*"), ("x", "0.bias, 0.weight, 1.bias")]
)
def test_a_pattern_that_freezes_nothing(pattern: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"trainer.freeze={re.escape(pattern)} matches no name .*; valid: {close}"):
        freeze(net(), ["0.bias", pattern])


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (partial(torch.optim.SGD, lr=0.1, weight_decay=5e-4, fused=True), [5e-4, 0.0]),
        (partial(torch.optim.AdamW, lr=1e-3), [0.01, 0.0]),  # AdamW's default
        (partial(torch.optim.SGD, lr=0.1), [0.0, 0.0]),
    ],
)
def test_the_optimizers_own_weight_decay_is_that_of_the_matrices(
    factory: Callable[..., Any], expected: list[float]
) -> None:
    optimizer = build_optimizer(factory, net())
    assert [group["weight_decay"] for group in optimizer.param_groups] == expected


def test_a_weight_decay_taken_as_a_keyword_of_any_name() -> None:
    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, **options)

    optimizer = build_optimizer(partial(make, weight_decay=0.3), net())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_an_optimizer_without_weight_decay_gets_the_parameters() -> None:
    model = net()
    optimizer = build_optimizer(torch.optim.Rprop, model)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentun": 0.9}])
def test_what_an_optimizer_refuses_is_a_config_error(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="optimizer is refused"):
        build_optimizer(partial(torch.optim.SGD, **wrong), net())  # type: ignore[arg-type]


T, W = 100, 10


@pytest.mark.parametrize(
    "curve", [Constant(warmup_steps=W), Linear(warmup_steps=W), Cosine(warmup_steps=W), WSD(warmup_steps=W)]
)
def test_warm_up_is_a_line_from_above_zero_to_one(curve: Curve) -> None:
    for step in range(W):
        assert curve(step, T) == pytest.approx((step + 1) / (W + 1))
    assert curve(W, T) == 1


def test_closed_forms() -> None:
    linear = Linear(warmup_steps=W, min_factor=0.1)
    cosine = Cosine(warmup_steps=W, min_factor=0.1)
    for step in range(W, T + 1):
        p = (step - W) / (T - W)
        assert linear(step, T) == pytest.approx(1 - 0.9 * p)
        assert cosine(step, T) == pytest.approx(0.55 + 0.45 * math.cos(math.pi * p))
    wsd = WSD(warmup_steps=W, min_factor=0.1, decay_fraction=0.25)
    assert [wsd(step, T) for step in range(W, 76)] == [1.0] * 66
    for step in range(75, T + 1):
        assert wsd(step, T) == pytest.approx(1 - 0.9 * (step - 75) / 25)


def test_a_cosine_is_torchs_own() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    curve = Cosine()
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(curve(step, 50), abs=1e-12)
        optimizer.step()
        reference.step()


def test_warm_up_as_a_fraction_of_the_run() -> None:
    assert [Cosine(warmup_steps=0.1)(s, T) for s in range(T)] == [Cosine(warmup_steps=10)(s, T) for s in range(T)]
    assert Constant(warmup_steps=1)(0, None) == 0.5
    assert Constant(warmup_steps=1.0)(1, None) == 1


@given(
    st.sampled_from([Linear, Cosine, WSD]),
    st.integers(1, 500),
    st.integers(0, 600) | st.floats(0, 0.99),
    st.floats(0, 1),
    st.integers(0, 700),
)
def test_a_curve_stays_in_its_bounds_and_falls_after_the_warm_up(
    kind: type[Linear | Cosine | WSD], total: int, warmup: float, floor: float, step: int
) -> None:
    curve = kind(warmup_steps=warmup, min_factor=floor)
    now, then = curve(step, total), curve(step + 1, total)
    assert 0 <= now <= 1
    steps = warmup if warmup >= 1 or warmup == 0 else round(warmup * total)
    if step >= steps:
        assert then <= now
        assert now >= floor - 1e-12
    else:
        assert now > 0
        # A warm-up as long as the run ends with the run.
        assert then > now or step + 1 >= max(total, steps)
    if step >= max(total, steps):
        assert now == pytest.approx(floor)


@pytest.mark.parametrize("curve", [Linear(), Cosine(), WSD(), Constant(warmup_steps=0.1)])
def test_an_unknown_length_is_refused_with_what_to_set(curve: Curve) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps, or lr_scheduler=constant"):
        curve(0, None)


def test_a_constant_needs_no_length() -> None:
    assert [Constant(warmup_steps=3)(step, None) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": -1}, {"warmup_steps": 1.5}, {"min_factor": 1.1}, {"decay_fraction": -0.1}]
)
def test_a_wrong_value_names_its_key(wrong: dict[str, float]) -> None:
    (key,) = wrong
    with pytest.raises(ConfigError, match=rf"lr_scheduler\.{key}"):
        WSD(**wrong)


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_build_scheduler_from_a_curve_class_a_function_and_torch() -> None:
    def halved(step: int, total_steps: int | None, *, base: float) -> float:
        return base / 2

    def fresh() -> torch.optim.Optimizer:
        return torch.optim.SGD(net().parameters(), lr=0.2)

    expected = [0.2 * Linear(warmup_steps=2)(step, 8) for step in range(8)]
    assert rates(build_scheduler(partial(Linear, warmup_steps=2), fresh(), 8), 8) == pytest.approx(expected)
    assert rates(build_scheduler(partial(halved, base=1.0), fresh(), None), 2) == pytest.approx([0.1, 0.1])
    step_lr = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    assert rates(build_scheduler(step_lr, fresh(), 8), 3) == pytest.approx([0.2, 0.1, 0.05])


def test_both_groups_follow_the_curve() -> None:
    optimizer = build_optimizer(partial(torch.optim.SGD, lr=1.0, weight_decay=0.1), net())
    scheduler = build_scheduler(partial(Cosine), optimizer, 10)
    rates(scheduler, 4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([Cosine()(4, 10)] * 2)


def test_a_schedulers_state_is_json_and_goes_on() -> None:
    def fresh() -> torch.optim.lr_scheduler.LRScheduler:
        return build_scheduler(partial(Cosine, warmup_steps=2), torch.optim.SGD(net().parameters(), lr=0.2), 20)

    whole = rates(fresh(), 20)
    first = fresh()
    rates(first, 7)
    state = json.loads(json.dumps(first.state_dict()))
    second = fresh()
    second.load_state_dict(state)
    assert rates(second, 13) == whole[7:]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=2), r"ReduceLROnPlateau.step\(\) needs metrics"),
        (partial(cast("Any", Cosine), warmup=3), "unexpected keyword argument 'warmup'"),
        (torch.optim.lr_scheduler.StepLR, "step_size"),
    ],
)
def test_what_a_scheduler_refuses_is_a_config_error(factory: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_scheduler(factory, torch.optim.SGD(net().parameters(), lr=0.2), 8)
    assert caught.value.key == "lr_scheduler"


def test_the_length_is_asked_for_when_the_scheduler_is_built() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        build_scheduler(partial(Cosine), torch.optim.SGD(net().parameters(), lr=0.2), None)
