"""Micro-batches of weight 0: nothing of theirs enters the gradient, even if it is NaN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytrainer.sharding import is_sharded

_COUNTS = contextlib.nullcontext()


class ZeroWeights:
    """Sets the gradients of a backward pass to 0 if the micro-batch has weight 0.

    Multiplying the loss by its weight is not enough: the mean over nothing is NaN, its derivatives are NaN, and 0 * NaN
    is NaN. So each gradient is replaced before it is added to those of earlier micro-batches or, by DDP and FSDP, of
    other ranks.

    On an accelerator the host does not know the weight, and asking for it would wait for the device. There every
    gradient of a weighted loss passes through `torch.where`. On the CPU the weight is simply read, and a micro-batch
    that counts costs nothing.

    Args:
        model: The trained model as it is called: sharded, wrapped in DDP, or itself.
        parameters: Everything that is trained.

    Attributes:
        reads_cpu: Whether weights on the CPU are read. Tests set it to False to use the accelerator's way.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self.reads_cpu = True
        self._model = model
        # Gradients of shards exist only after the reduction over ranks, so they are masked before it.
        self._parameters = [p for p in parameters if not is_sharded(p)]
        self._zero: Tensor | None = None  # 0-d bool: whether the micro-batch in its backward pass has weight 0
        self._hooked = self._reduces = False

    def known(self, weight: Tensor | float) -> float | None:
        """Return the weight if the host knows it: a number, or a tensor on the CPU."""
        if not isinstance(weight, Tensor):
            return weight
        return float(weight) if weight.device.type == "cpu" and self.reads_cpu else None

    def masked(self, weight: Tensor | float, known: float | None) -> contextlib.AbstractContextManager[None]:
        """Return the context for the backward pass of a micro-batch of this weight, given the result of `known`."""
        if known is None:
            assert isinstance(weight, Tensor)
            return self._masked(weight <= 0, keep=True)
        if known > 0:
            return _COUNTS
        device = self._parameters[0].device if self._parameters else None
        return self._masked(torch.ones((), dtype=torch.bool, device=device), keep=False)

    @contextlib.contextmanager
    def _masked(self, zero: Tensor, keep: bool) -> Iterator[None]:
        """Mask the gradients within the context.

        Args:
            zero: Whether the weight is 0; a 0-d bool tensor.
            keep: Whether the hooks stay, because the next micro-batch needs them, too.
        """
        self._mask_reductions()
        self._zero = zero
        handles = [] if self._hooked else [p.register_hook(self._mask) for p in self._parameters if p.requires_grad]
        self._hooked = self._hooked or keep
        try:
            yield
        finally:
            self._zero = None
            for handle in handles if not keep else ():
                handle.remove()

    def _mask(self, gradient: Tensor) -> Tensor | None:
        return None if self._zero is None else _without(gradient, self._zero)

    def _mask_reductions(self) -> None:
        """Make FSDP's gradients pass through `_Reduction` from now on, because FSDP reduces after each micro-batch."""
        if self._reduces or not is_sharded(self._model):
            return
        self._reduces = True
        modules: Iterable[Any] = self._model.modules()
        for module in modules:
            if is_sharded(module):
                module.set_custom_reduce_scatter(_Reduction(self))


class _Reduction:
    """FSDP's own reduction, with the gradients set to 0 if the rank's micro-batch has weight 0."""

    def __init__(self, weights: ZeroWeights) -> None:
        self._weights = weights

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        if self._weights._zero is not None:
            input_tensor.masked_fill_(self._weights._zero, 0)
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _without(gradient: Tensor, zero: Tensor) -> Tensor:
    if gradient.is_sparse:
        values = torch.where(zero, 0, gradient._values())
        return torch.sparse_coo_tensor(
            gradient._indices(), values, gradient.shape, is_coalesced=gradient.is_coalesced(), check_invariants=False
        )
    return torch.where(zero, 0, gradient)
