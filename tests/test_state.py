"""Optimizer state and weights are restored by name, also into another order and grouping; refusals name what
differs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from raytrainer.errors import CheckpointCorrupt
from raytrainer.optim import parameter_groups
from raytrainer.state import named_optimizer_state, restore_module, restore_optimizer_state
from tests.training import differences


def model(names: str = "ab") -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)}
    return nn.Sequential(OrderedDict((name, layers[name]) for name in names))


def trained(of: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Train with gradients that depend only on the parameter's name and the step."""
    for step in range(steps):
        for name, p in of.named_parameters():
            torch.manual_seed(sum(map(ord, name)) + step)
            p.grad = torch.randn_like(p)
        optimizer.step()


OPTIMIZERS: list[Any] = [
    lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9)),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.SGD(p, lr=0.1),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_state_finds_its_parameters_by_name(make: Any) -> None:
    first, second = model("ab"), model("ba")  # the same layers, registered in reverse order
    from_, to = make(parameter_groups(first, 0.1)), make(parameter_groups(second, 0.1))
    trained(first, from_)
    saved = named_optimizer_state(from_, first)
    assert set(saved["state"]) <= {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert [sorted(group["names"]) for group in saved["groups"]] == [["a.weight", "b.weight"], ["a.bias", "b.bias"]]
    # JSON has no tuples, so a loaded state has lists.
    for group in saved["groups"]:
        group.update({k: list(v) for k, v in group.items() if isinstance(v, tuple)})
    restore_module(second, first.state_dict(), "here")
    restore_optimizer_state(to, second, copy.deepcopy(saved))  # a state dict shares its tensors
    trained(first, from_)
    trained(second, to)
    assert differences(dict(second.state_dict()), {k: first.state_dict()[k] for k in second.state_dict()}) == []
    if "betas" in to.param_groups[0]:
        assert to.param_groups[0]["betas"] == (0.8, 0.9)


def test_other_parameters_or_groups_are_refused() -> None:
    whole = model()
    saved = named_optimizer_state(torch.optim.SGD(parameter_groups(whole, 0.1)), whole)
    one_group = torch.optim.SGD(whole.parameters())
    with pytest.raises(CheckpointCorrupt, match="has other parameters"):
        restore_optimizer_state(one_group, whole, saved)
    part = model("a")
    with pytest.raises(CheckpointCorrupt, match="has other parameters"):
        restore_optimizer_state(torch.optim.SGD(parameter_groups(part, 0.1)), part, saved)


def test_weights_are_copied_with_buffers_and_in_the_model_s_type() -> None:
    source = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    source[1].running_mean.fill_(3.0)  # type: ignore[operator]
    target = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    parameter = target[0].weight
    restore_module(target, source.state_dict(), "here")
    assert target[0].weight is parameter
    assert {t.dtype for t in target.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert differences(dict(target.state_dict()), dict(source.float().state_dict())) == []


def test_all_that_differs_is_said_at_once() -> None:
    target = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    weights = {k: v + 1 for k, v in target.state_dict().items()}
    for number in range(2):
        weights[f"{number}.wieght"] = weights.pop(f"{number}.weight")
        weights[f"{number}.bias"] = torch.zeros(3)
    weights |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointCorrupt) as caught:
        restore_module(target, weights, "run.pt")
    message = str(caught.value)
    assert message.startswith("run.pt holds another model: ")
    assert "lacks 0.weight, 1.weight (0.weight may be its 0.wieght); " in message
    assert "unexpected 0.wieght, 1.wieght, extra.0 and 8 more; " in message
    assert message.endswith(": 0.bias: (3,) there, (2,) here, 1.bias: (3,) there, (2,) here")
    assert differences(dict(target.state_dict()), before) == []
