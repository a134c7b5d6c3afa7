"""What one process is among many: its rank and device, precision, DDP, and the buffers that differ by rank.

Knows torch.distributed, not Ray: whoever starts the processes has made the default process group already.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The place of this process. The default is a process alone, on the CPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def distributed(self) -> bool:
        return self.size > 1

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Sums `tensor` over all ranks, in place; without a second rank it is returned as it is."""
        if self.distributed:
            dist.all_reduce(tensor, op)
        return tensor


# torch 2.13 renamed the argument and warns of the old name at every worker's start.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)
_DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Precision:
    """`32-true`, `64-true`, `bf16-true` (parameters and inputs of that type), `bf16-mixed`, `16-mixed` (autocast; the
    latter with a gradient scaler)."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype = _DTYPES.get(name, torch.float32)
        self._autocast = _AUTOCAST.get(name)
        self._device = device.type
        self.scaler: torch.amp.GradScaler | None = torch.amp.GradScaler(device.type) if name == "16-mixed" else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._autocast)

    def convert(self, model: nn.Module) -> nn.Module:
        """The model with its floating-point parameters and buffers in that type, in place.

        Not `model.to(dtype)`, which makes complex buffers (rotary embeddings) real.
        """
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.data = t.data.to(self.dtype)
            elif t.is_complex() and self.dtype is torch.float64:
                t.data = t.data.to(torch.complex128)
        return model

    def cast(self, data: Any) -> Any:
        """Floating-point tensors of a batch in the model's type; everything else as it is."""
        return map_tensors(data, lambda t: t.to(self.dtype) if t.is_floating_point() else t)


def map_tensors(data: Any, change: Any) -> Any:
    """`change` applied to every tensor of nested dicts, lists and tuples."""
    if isinstance(data, Tensor):
        return change(data)
    if isinstance(data, Mapping):
        return {k: map_tensors(v, change) for k, v in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(map_tensors(v, change) for v in data))
    if isinstance(data, list | tuple):
        return type(data)(map_tensors(v, change) for v in data)
    return data


def set_determinism(deterministic: bool, device: torch.device, num_threads: int | None) -> None:
    """Settings of the whole process that bit-for-bit repetition depends on.

    The number of threads is part of it: a convolution's sums differ between 1 and 2 threads.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            # cuBLAS wants a fixed workspace for repeatable sums; read when its first handle is made.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Deterministic mode also fills fresh memory, which only hides bugs and costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def replicate(model: nn.Module, world: World, *, find_unused_parameters: bool = False) -> nn.Module:
    """The model wrapped in DDP where there is more than one rank; else itself.

    Buffers are not broadcast at each step: every rank keeps its own batch statistics, and `averaged_buffers` gives
    the mean of all to evaluation and export.
    """
    if not world.distributed:
        return model
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    return DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
        **options,
    )


def synchronise(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are reduced only in the backward of a step's last micro-batch."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def mean_buffers(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Copies of the model's buffers: floating-point ones as the mean over all ranks, others as rank 0 has them.

    Batch norm's running mean over ranks is the running mean of the whole batch; of the running variance it leaves out
    the variance between the ranks' means, which for shuffled data is of order 1/batch.
    """
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    if world.distributed:
        for b in buffers.values():
            if b.is_floating_point():
                dist.all_reduce(b)
                b /= world.size
            else:
                dist.broadcast(b, src=0)
    return buffers


@contextlib.contextmanager
def averaged_buffers(model: nn.Module, world: World) -> Iterator[None]:
    """Within it the model has `mean_buffers`; after it each rank's own again, untouched by evaluation."""
    if not world.distributed or not any(True for _ in model.buffers()):
        yield
        return
    own = {name: b.detach().clone() for name, b in model.named_buffers()}
    load_buffers(model, mean_buffers(model, world))
    try:
        yield
    finally:
        load_buffers(model, own)


def load_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, b in model.named_buffers():
            if name in values:
                b.copy_(values[name])
