"""The mean over all ranks of gradients outside DDP and FSDP: those of a loss with parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer.errors import ConfigError
from raytrainer.parallel.world import World


class MeanGradients:
    """Replaces gradients by their mean over ranks after the last backward pass of a step, in one collective per dtype.

    The loss is not wrapped in DDP, because two reducers could start their collectives in different orders on different
    ranks.

    A parameter that no rank has used keeps no gradient, so that the optimizer skips it, as in one process. The ranks
    agree in the first step which ones are used; with `find_unused_parameters` in each step, which waits for the device.

    Args:
        parameters: Name → parameter.
        world: This process among all.
        find_unused_parameters: `trainer.find_unused_parameters`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, *, find_unused_parameters: bool) -> None:
        self._parameters, self._world, self._find_unused = dict(parameters), world, find_unused_parameters
        self._used: dict[str, bool] | None = None

    def __call__(self) -> None:
        """Replace the gradients by their mean.

        Raises:
            ConfigError: A parameter has a gradient only on some ranks or in some steps, and
                `trainer.find_unused_parameters` is false.
        """
        own = {name: p.grad is not None for name, p in self._parameters.items()}
        if self._used is None or self._find_unused:
            flags = torch.tensor(list(own.values()), dtype=torch.int32, device=self._world.device)
            counts = self._world.all_reduce(flags, dist.ReduceOp.MAX).tolist()
            self._used = {name: count > 0 for name, count in zip(own, counts, strict=True)}
        if not self._find_unused and own != self._used:
            names = [name for name, used in own.items() if used != self._used[name]]
            raise unused_parameters(names)
        with torch.no_grad():
            for parts in self._gradients([p for name, p in self._parameters.items() if self._used[name]]):
                flat = torch.cat([part.flatten() for part in parts])
                dist.all_reduce(flat)
                flat /= self._world.size
                pieces = flat.split([part.numel() for part in parts])
                torch._foreach_copy_(parts, [new.view_as(part) for new, part in zip(pieces, parts, strict=True)])

    def _gradients(self, parameters: list[nn.Parameter]) -> Iterable[list[Tensor]]:
        """Return dense real views of the gradients by dtype; zeros where this rank has none."""
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
            # Not every backend can add complex numbers.
            part = torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad
            by_type.setdefault(part.dtype, []).append(part)
        return by_type.values()


def unused_parameters(names: list[str]) -> ConfigError:
    """Return the error for parameters that got no gradient on this rank, in terms of the configuration."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    which = (
        f"The loss of this rank did not use {shown}" if names else "The loss of this rank did not use some parameters"
    )
    return ConfigError(
        f"is not enough for this model. {which}, and with several workers every trained parameter must get a gradient in "
        "every step. Set trainer.find_unused_parameters=true, or exclude the parameters with trainer.freeze",
        key="trainer.find_unused_parameters",
        value=False,
    )
