"""`TrainStep`: one update of the weights, batch → forward → loss → backward → clip → optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raytrainer import parallel, seeds
from raytrainer.data import Batch
from raytrainer.state import unchanged
from raytrainer.trainer import outputs
from raytrainer.trainer.components import Components
from raytrainer.trainer.optimizer_errors import explain
from raytrainer.trainer.system import check_apart


class TrainStep:
    """One update of the weights of `Components` by a batch. Nothing here waits for the device.

    Attributes:
        lr: The learning rate of the last step, as the optimizer holds it.
        counts_tokens: Whether the loss returned a weight in the last step.
    """

    def __init__(self, t: Components) -> None:
        self._t = t
        options = t.experiment.trainer
        self.lr: Any = 0.0
        self.counts_tokens = False
        self._loss_is_checked = False
        self._uses_cuda_graphs = t.world.device.type == "cuda" and options.compile in (
            "reduce-overhead",
            "max-autotune",
        )
        # Integers have no mean; they are never trained and stay unchanged in the average.
        self._all_averaged = all(p.is_floating_point() or p.is_complex() for p in t.raw_model.parameters())
        self._ema_weight = 1 - (options.ema_decay or 0.0)

    def __call__(self, batch: Batch) -> None:
        """Do one optimizer step over this rank's part of the global batch `batch`.

        The gradient is that of the mean over the *global* weight. Micro-batches and ranks of uneven sizes add up to the
        gradient of one process on the whole batch. Those of weight 0 add nothing.

        Raises:
            ConfigError: The loss, the model or the optimizer cannot be trained.
        """
        t = self._t
        t.optimizer.zero_grad(set_to_none=True)
        weights = self._backward(batch)
        self.counts_tokens = bool(weights)
        if not self._loss_is_checked:
            check_apart(t.raw_model, t.loss_state)
            self._loss_is_checked = True
        try:
            t.gradients.finish(t.optimizer, weights, batch.global_size)
            if t.precision.scaler is not None:
                t.precision.scaler.step(t.optimizer)
                t.precision.scaler.update()
            else:
                t.optimizer.step()
        except RuntimeError as error:
            raise explain(error, t.optimizer) from error
        self.lr = t.optimizer.param_groups[0].get("lr", math.nan)
        if t.scheduler is not None:
            t.scheduler.step()
        if t.ema_model is not None:
            self._move_average(t.ema_model)
        t.state.step += 1
        t.throughput.add(batch.global_size)

    def _backward(self, batch: Batch) -> list[Tensor | float]:
        """Add up the gradients of all micro-batches. Return their weights if the loss returns them, else nothing."""
        t, last, weights = self._t, len(batch.micro) - 1, list[Tensor | float]()
        if self._uses_cuda_graphs and last:
            # A CUDA graph leaves gradients in memory that its next replay overwrites (torch#169545), so they are added
            # to separate tensors.
            for p in t.gradients.parameters:
                p.grad = torch.zeros_like(p)
        for i, micro in enumerate(batch.micro):
            with parallel.synchronise(t.model, last=i == last):
                with t.precision.autocast():
                    values = outputs.entries(t.loss(t.model, t.prepare(micro.data)), t.world.device)
                outputs.take_predictions(values)  # dropped at once, because logits may be the largest tensor
                weight: Tensor | float = micro.size
                if "weight" in values:
                    returned = outputs.weight_of(values.pop("weight"))
                    weight = returned if micro.size else 0.0
                    weights.append(weight)
                t.gradients.add(values["loss"], weight, batch.global_size)
            t.window.add(values, weight)
        return weights

    @torch.no_grad()
    def _move_average(self, ema_model: torch.nn.Module) -> None:
        averages, weights = map(parallel.local_parts, (ema_model.parameters(), self._t.raw_model.parameters()))
        if not self._all_averaged:
            kept = [a.is_floating_point() or a.is_complex() for a in averages]
            averages, weights = ([t for t, k in zip(ts, kept, strict=True) if k] for ts in (averages, weights))
        torch._foreach_lerp_(averages, weights, self._ema_weight)

    def warm_up(self, batch: Batch) -> None:
        """Do one forward and backward pass with DDP and undo it.

        DDP rebuilds its gradient buckets after its first backward, which changes the order of sums. Without this, a
        resumed run is not bit-equal on 3 or more ranks (gloo; conv net with batch norm and dropout).
        """
        t = self._t
        if t.model is t.raw_model:
            return
        random = seeds.random_state()
        with unchanged(t.raw_model, t.loss_state, other=t.loss_object):
            with t.precision.autocast():
                returned = t.loss(t.model, t.prepare(batch.micro[-1].data))
                loss = outputs.entries(returned, t.world.device)["loss"]
            outputs.check_gradient(loss)
            loss.backward()
            parallel.check_reduced(t.model)
        t.optimizer.zero_grad(set_to_none=True)
        seeds.set_random_state(random)
