"""The share of its devices' peak that a `Trainer` uses: `train/mfu` in its log."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raytrainer import batches, seeds
from raytrainer.config import build
from raytrainer.data import Batch
from raytrainer.flops import model_flops, peak_flops
from raytrainer.optim import freeze
from raytrainer.trainer.components import Components, configured
from raytrainer.trainer.system import stateful_part, together


class Utilisation:
    """The FLOPs per second that the model needs, divided by the peak of all devices.

    The model's FLOPs are counted once, on the first log, for one of its micro-batches, and only if the peak is known.
    """

    def __init__(self, trainer: Components) -> None:
        self._trainer, self._flops_per_sample = trainer, 0.0
        options = trainer.experiment.trainer
        self._peak = peak_flops(trainer.world.device, options.precision, options.peak_tflops)

    def metrics(self, batch: Batch, samples_per_second: float) -> dict[str, float]:
        """Return `train/mfu`, or nothing if it is unknown. Every rank calls it, and counts for itself."""
        if not self._peak:
            return {}
        if not self._flops_per_sample:
            self._flops_per_sample = self._counted(batch)
            if not self._flops_per_sample:
                self._peak = None
                return {}
        return {"train/mfu": samples_per_second * self._flops_per_sample / (self._peak * self._trainer.world.size)}

    def _counted(self, batch: Batch) -> float:
        t, micro = self._trainer, batch.micro[0]

        def make() -> tuple[nn.Module, Any]:
            model, loss = (
                t.precision.convert(build(configured(t.experiment.model))),
                build(configured(t.experiment.loss)),
            )
            if (part := stateful_part(loss)) is not None:
                t.precision.convert(part)
            freeze(together(model, part), t.experiment.trainer.freeze)
            return model, loss

        t.throughput.pause()
        kept = seeds.random_state()
        flops = model_flops(make, batches.move(t.prepare(micro.data), torch.device("meta")))
        seeds.set_random_state(kept)
        t.throughput.go_on()
        return (flops or 0.0) / max(micro.size, 1)  # a placeholder sample costs as much as any other
