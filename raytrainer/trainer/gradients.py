"""The gradients of a step: over all micro-batches and ranks they add up to that of the mean over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer import parallel
from raytrainer.config import TrainerConfig
from raytrainer.errors import ConfigError
from raytrainer.parallel import MeanGradients, World, ZeroWeights
from raytrainer.sharding import whole
from raytrainer.trainer import outputs


class Gradients:
    """Backward passes, and the work between them and the optimizer's step. Nothing here waits for the device.

    Args:
        model: The model as it is called: wrapped in DDP, sharded, or itself.
        raw_model: The model without DDP.
        system: The model and the loss, with everything that is trained.
        world: This process among all.
        scaler: The gradient scaler for half precision, or None.
        options: Section `trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        raw_model: nn.Module,
        system: nn.Module,
        world: World,
        scaler: torch.amp.GradScaler | None,
        options: TrainerConfig,
    ) -> None:
        self._model, self._world, self._scaler, self._limit = model, world, scaler, options.max_grad_norm
        trained = {name: p for name, p in system.named_parameters() if p.requires_grad}
        self.parameters = list(trained.values())
        self.zero_weights = ZeroWeights(model, self.parameters)
        own = {id(p) for p in raw_model.parameters()}
        outside = {name: p for name, p in trained.items() if id(p) not in own}
        self._mean: MeanGradients | None = None
        if outside and world.distributed:
            self._mean = MeanGradients(outside, world, find_unused_parameters=options.find_unused_parameters)
        self._mixed = bool(outside) and parallel.is_sharded(raw_model)  # gradients of shards and whole ones
        if self._mixed and scaler is not None:
            raise ConfigError(
                "cannot be used with trainer.strategy=fsdp and a loss that has parameters: torch's gradient scaler does not "
                "take shards and whole gradients together. Use trainer.precision=bf16-mixed",
                key="trainer.precision",
                value=options.precision,
            )
        self._sparse: bool | None = None  # whether some gradient is sparse; unknown before the first step

    def add(self, loss: Tensor, weight: Tensor | float, global_size: int) -> None:
        """Do the backward pass of a micro-batch.

        Args:
            loss: Its mean, 0-d.
            weight: The weight of the mean.
            global_size: Number of samples in the global batch.

        Raises:
            ConfigError: The loss has no gradient, or the weight is below 0, infinite or NaN.
        """
        known = self.zero_weights.known(weight)
        if known is not None:
            outputs.check_weight(known)
        if known == 0 and not loss.requires_grad and not self._world.distributed:
            return  # a loss may return a plain 0 if no sample counts
        outputs.check_gradient(loss)
        # DDP and FSDP take the mean over ranks; multiplied by their number it is a sum.
        share = weight * (self._world.size / global_size)
        if not isinstance(share, float) or share != 1.0:
            loss = loss * share
        with self.zero_weights.masked(weight, known):
            (self._scaler.scale(loss) if self._scaler is not None else loss).backward()

    def finish(self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor | float], global_size: int) -> None:
        """Finish the gradients after the last micro-batch: the mean over ranks, the scale, clipping.

        Args:
            optimizer: The optimizer that does the next step.
            weights: The weights of the micro-batches if the loss returns them; empty if they are numbers of samples.
            global_size: As in `add`.

        Raises:
            ConfigError: The loss on this rank has left out a parameter.
        """
        parallel.check_reduced(self._model)
        if self._mean is not None:
            self._mean()
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        if self._sparse is None:
            self._sparse = any(p.grad is not None and p.grad.layout is not torch.strided for p in self.parameters)
        if weights:
            # Weights are known only after the forward passes, so divide now by their sum instead of global_size.
            total = self._world.all_reduce(self._summed(weights))
            self._multiply(torch.where(total > 0, global_size / total, 0.0))
        if self._limit is not None:
            if self._sparse or self._mixed:
                # torch's function supports neither sparse gradients, nor shards and whole tensors together.
                values = self._values(local=False)
                kinds = [[v for v in values if parallel.is_sharded(v) is sharded] for sharded in (True, False)]
                norms = [whole(nn.utils.get_total_norm(kind)).double() for kind in kinds if kind]
                norm = torch.linalg.vector_norm(torch.stack(norms))
                self._multiply((self._limit / (norm + 1e-6)).clamp(max=1.0))
            else:
                nn.utils.clip_grad_norm_(self.parameters, self._limit, foreach=True)

    def _summed(self, weights: Sequence[Tensor | float]) -> Tensor:
        device = self._world.device
        own = [w if isinstance(w, Tensor) else torch.full((), w, dtype=torch.float64, device=device) for w in weights]
        return torch.stack(own).sum()

    def _multiply(self, factor: Tensor) -> None:
        gradients = self._values()
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype.to_real()))

    def _values(self, local: bool = True) -> list[Tensor]:
        """Return the gradients: this rank's part of shards, and the values of sparse ones, with each index once."""
        if self._sparse:
            for p in self.parameters:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.coalesce()
        gradients: list[Any] = [p.grad for p in self.parameters if p.grad is not None]
        gradients = parallel.local_parts(gradients) if local else gradients
        return [g._values() if g.layout is torch.sparse_coo else g for g in gradients]
