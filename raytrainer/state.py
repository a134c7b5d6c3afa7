"""Weights and optimizer state under their parameters' names, so that a checkpoint does not depend on their order.

An optimizer numbers its parameters by group; names survive another grouping, DDP's prefix and another framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.errors import CheckpointCorrupt
from raytrainer.names import match
from raytrainer.sharding import placed_as


def named_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()` with names for numbers: `{"state": {name: …}, "groups": [{"names": […], …}]}`."""
    names = {id(p): n for n, p in model.named_parameters()}
    state = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {
        "state": {order[number]: dict(values) for number, values in state["state"].items()},
        "groups": [
            {**{k: v for k, v in group.items() if k != "params"}, "names": [order[i] for i in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def restore_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Loads what `named_optimizer_state` gave.

    Raises:
        CheckpointCorrupt: Its parameters are not this model's, or their groups differ.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    groups = list(saved["groups"])
    if [sorted(g["names"]) for g in groups] != [sorted(g) for g in order]:
        raise CheckpointCorrupt(
            "the checkpoint's optimizer has other parameters, or groups them otherwise, than this one"
        )
    number, state, new_groups = 0, {}, []
    for wanted, group, own in zip(order, groups, optimizer.param_groups, strict=True):
        numbers = list(range(number, number + len(wanted)))
        number += len(wanted)
        state.update({i: saved["state"][n] for i, n in zip(numbers, wanted, strict=True) if n in saved["state"]})
        # JSON has no tuples (AdamW's betas); torch compares and unpacks either.
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k != "names"}
        # How the steps are computed is this process's: shards may have no fused ones.
        how = {k: own[k] for k in ("fused", "foreach") if k in own}
        new_groups.append({**values, **how, "params": numbers})
    optimizer.load_state_dict({"state": state, "param_groups": new_groups})


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights and buffers into `model`.

    Raises:
        CheckpointCorrupt: Names or shapes differ; the message gives the first few of each kind.
    """
    own = model.state_dict()
    problem = match(
        {n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in weights.items()}
    ).problem
    if problem:
        raise CheckpointCorrupt(f"{source} {problem}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed_as(tensor, weights[name]))
