"""The evaluation of a `Trainer`: the loss and what else it gives over all of the validation set, on all ranks.

Each sample counts once, and training goes on after it as if there had been none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from raytrainer import parallel, seeds
from raytrainer.errors import ConfigError
from raytrainer.metrics import WeightedMeans

if TYPE_CHECKING:
    from raytrainer.trainer.loop import Trainer


@torch.no_grad()
def evaluate(t: Trainer) -> dict[str, float]:
    """The metrics of the whole validation set, as `val/NAME`. Every rank calls it.

    The weights are the EMA's where there is one, batch statistics the mean over ranks.
    """
    if t.val_loader is None:
        raise ConfigError("is not set: there is nothing to evaluate on", key="data.val")
    model = t.raw_model if t.ema_model is None else t.ema_model
    if t.ema_model is not None:
        parallel.load_buffers(t.ema_model, dict(t.raw_model.named_buffers()))
    means = WeightedMeans(t.world.device, t.world.all_reduce)
    with _evaluating(model), parallel.averaged_buffers(model, t.world):
        batches = t.val_loader.batches(0, t.val_loader.steps_per_epoch)
        with contextlib.closing(batches):
            for batch in batches:
                for micro in batch.micro:
                    with t.precision.autocast():
                        values = dict(t.loss(model, t.prepare(micro.data)))
                    weight = values.pop("weight", None)
                    means.add(values, micro.size if weight is None else weight * (1 if micro.size else 0))
                if batch.ends_epoch:  # an iterable would go on for ever
                    break
    return {f"val/{name}": value for name, value in means.reduce()[0].items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval(); after it its modules' modes and all random states are as before."""
    kept = seeds.random_state()
    # Each module's own: a part that a model keeps in eval() for good (a frozen backbone) must stay there.
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        seeds.set_random_state(kept)
