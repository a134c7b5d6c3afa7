"""`trainer.strategy=ddp`: every rank has the whole model. It also controls when gradients are reduced, for FSDP too."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytrainer.errors import ConfigError
from raytrainer.parallel.reduction import unused_parameters
from raytrainer.parallel.world import World
from raytrainer.sharding import is_sharded

# torch 2.13 renamed the argument, and warns about the old name whenever a worker starts.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def replicate(model: nn.Module, world: World, *, find_unused_parameters: bool = False) -> nn.Module:
    """Return the model wrapped in DDP, or the model itself if there is only one rank.

    Buffers are not broadcast at each step: every rank keeps its own batch statistics, and evaluation and export use the
    mean over all ranks (`averaged_buffers`).
    """
    # DDP refuses a model without trained parameters, for instance if only the loss is trained.
    if not world.distributed or not any(p.requires_grad for p in model.parameters()):
        return model
    options: dict[str, Any] = {_SYNC_BUFFERS: False}
    try:
        return DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=find_unused_parameters,
            **options,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"cannot replicate this model over several workers: {error}. Train it with scaling.num_workers=1, or "
            "change the model",
            key="trainer.strategy",
            value="ddp",
        ) from error


def check_reduced(model: nn.Module) -> None:
    """Check DDP's reduction after the backward pass of a step's last micro-batch. It costs nothing and never waits.

    A rank whose loss leaves out a parameter never finishes DDP's reduction. The other ranks wait for it in theirs, and
    this rank would join them in its next collective, with other data. So the rank that detects it raises the error.

    Raises:
        ConfigError: A trained parameter has no gradient on this rank.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    try:
        model._check_reducer_finalized()
    except RuntimeError:
        unused = [name for name, p in model.module.named_parameters() if p.requires_grad and p.grad is None]
        raise unused_parameters(unused) from None  # torch's message names an argument that users cannot set


def synchronise(model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which DDP reduces gradients only in the backward of a step's last micro-batch.

    FSDP reduces and scatters them in each, because keeping whole gradients would use the memory that it is meant to
    save. With hybrid sharding, only the sums over replicas wait for the last micro-batch.
    """
    if last:
        return contextlib.nullcontext()
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _sums_later(model) if is_sharded(model) else contextlib.nullcontext()


@contextlib.contextmanager
def _sums_later(model: Any) -> Iterator[None]:
    model.set_requires_all_reduce(False)
    try:
        yield
    finally:
        model.set_requires_all_reduce(True)
