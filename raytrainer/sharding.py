"""Sharded models and tensors (FSDP2, DTensor), for code that is to work on whole and on sharded ones alike.

Their modules are looked up, not imported: where nobody has imported them, which takes half a second, there are none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """Whether a module is FSDP2's, or a tensor a DTensor."""
    if isinstance(value, nn.Module):
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is not None and isinstance(value, fsdp.FSDPModule)
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(value, dtensor.DTensor)


@torch.no_grad()
def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory: what is elementwise needs no more, and costs less on it."""
    found: list[Any] = [t.detach() for t in tensors]
    return [t.to_local() if is_sharded(t) else t for t in found]


def whole(tensor: Any) -> Tensor:
    """All of a tensor, on every rank; of a sharded one every rank calls it."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def placed_as(own: Any, value: Tensor) -> Tensor:
    """`value`, which every rank has whole, as `own` is: of a sharded one this rank's shard. Nothing is sent."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward leaves gathered; the model's parameters are the sharded ones again."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if is_sharded(module):
            module.reshard()
