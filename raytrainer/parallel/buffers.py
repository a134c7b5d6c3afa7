"""Buffers that differ by rank, such as batch statistics: their mean over ranks, for evaluation and the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer.parallel.world import World


def mean_buffers(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Return copies of the model's buffers under all their names, as in a state dict.

    Floating-point ones are the mean over all ranks, others are from rank 0.

    The mean of batch norm's running means is the running mean of the whole batch. The mean of the running variances
    lacks the variance between the ranks' means, which for shuffled data is of order 1/batch.
    """
    buffers = {name: b.detach().clone() for name, b in model.named_buffers(remove_duplicate=False)}
    if world.distributed:
        for b in buffers.values():
            if b.is_floating_point():
                dist.all_reduce(b)
                b /= world.size
            else:
                _broadcast(b)
    return buffers


@contextlib.contextmanager
def averaged_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Give the model `mean_buffers` within the context, and each rank's own buffers again after it."""
    if not world.distributed or not any(True for _ in model.buffers()):
        yield
        return
    own = {name: b.detach().clone() for name, b in model.named_buffers()}
    load_buffers(model, mean_buffers(model, world))
    try:
        yield
    finally:
        load_buffers(model, own)


@contextlib.contextmanager
def holding_mean_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Let the model hold `mean_buffers` within the context, for its state dict, which keeps the means after it.

    Other tensors replace the buffers meanwhile, and no own value is overwritten. So hooks that copy, rename or compute
    with buffers use the means. It is a collective if there is more than one rank: every rank calls it.
    """
    if not world.distributed:
        yield
        return
    means = mean_buffers(model, world)
    held: list[tuple[dict[str, Any], str, Tensor]] = []
    stand_in: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                held.append((module._buffers, name, buffer))
                # A buffer that is in two places stays one tensor.
                module._buffers[name] = stand_in.setdefault(id(buffer), means[f"{path}.{name}".lstrip(".")])
    try:
        yield
    finally:
        for buffers, name, buffer in held:
            buffers[name] = buffer


@torch.no_grad()
def broadcast_state(module: nn.Module, world: World) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if world.distributed:
        for t in (*module.parameters(), *module.buffers()):
            _broadcast(t)


def _broadcast(tensor: Tensor) -> None:
    """Broadcast in place, as bytes if a backend may not support the type (int16, complex numbers)."""
    if tensor.dtype in (torch.float32, torch.float64):
        dist.broadcast(tensor, src=0)
    elif tensor.numel():
        whole = tensor.detach().contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)
        tensor.copy_(whole)


def load_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, b in model.named_buffers():
            if name in values:
                b.copy_(values[name])
