"""`trainer.activation_checkpointing`: a block keeps its inputs only, and its backward pass computes the rest once more
(Chen et al. 2016, arXiv:1604.06174)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """From now on these modules recompute, in place; neither results nor names in the state dict change.

    Dropout draws the same again. Batch norm takes the batch into its running statistics once. What else changes its own
    buffers in the forward pass (spectral norm) would do so twice.
    """
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)


@functools.cache
def _recomputed(kind: type[Any]) -> type[Any]:
    """A class, as FSDP2 makes one: a module around a block would change every name in it. One for all blocks of a class,
    or they would no longer be repeated ones (`find_units`)."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Recomputed, kind), names)


class _Recomputed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(self._computed, *args, use_reentrant=False, **kwargs)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        # Within a backward pass it is the second time. (A compiled block takes statistics once in any case.)
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return super().forward(*args, **kwargs)
        with _statistics_kept(self):
            return super().forward(*args, **kwargs)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Within it batch norms compute as ever, and their running statistics stay as they are."""
    kept = [(m, m.momentum, m.num_batches_tracked) for m in block.modules() if isinstance(m, _NormBase)]
    for m, _, _ in kept:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, momentum, count in kept:
            m.momentum, m.num_batches_tracked = momentum, count
