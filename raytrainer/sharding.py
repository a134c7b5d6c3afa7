"""Sharded modules and tensors (FSDP2, DTensor), for code that handles whole and sharded ones alike.

The modules of FSDP2 and DTensor are looked up, not imported, because importing them takes half a second. If nothing
has imported them, nothing is sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(value: Any) -> bool:
    """Return whether a module is FSDP2's, or a tensor a DTensor."""
    if isinstance(value, nn.Module):
        fsdp = sys.modules.get("torch.distributed.fsdp")
        return fsdp is not None and isinstance(value, fsdp.FSDPModule)
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(value, dtensor.DTensor)


@torch.no_grad()
def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor, sharing its memory, which suffices for elementwise operations."""
    detached: list[Any] = [t.detach() for t in tensors]
    return [t.to_local() if is_sharded(t) else t for t in detached]


def whole(tensor: Any) -> Tensor:
    """Return the whole tensor on every rank. If it is sharded, every rank must call it."""
    result: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return result


def placed_as(own: Any, value: Tensor) -> Tensor:
    """Return `value`, which is whole on every rank, placed like `own`, as a shard if that is sharded. Sends nothing."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward leaves gathered, so that the parameters are the sharded ones again."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if is_sharded(module):
            module.reshard()
