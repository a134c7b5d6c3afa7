"""`trainer.activation_checkpointing`: a block keeps only its inputs, and its backward pass recomputes the rest.

After Chen et al. 2016, arXiv:1604.06174.
"""

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
    """Make these modules recompute their activations, in place. Results and names in the state dict do not change.

    Dropout draws the same values again. Batch norm adds a batch to its running statistics once. Other modules that
    change their buffers in the forward pass (spectral norm) do so twice.
    """
    for block in blocks:
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)


@functools.cache
def _recomputed(kind: type[Any]) -> type[Any]:
    """Return a subclass, as FSDP2 does, because a wrapper module would change every name in the block.

    All blocks of a class share it; otherwise they would no longer be repeated blocks for `find_units`.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_Recomputed, kind), names)


class _Recomputed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(self._computed, *args, use_reentrant=False, **kwargs)

    def _computed(self, *args: Any, **kwargs: Any) -> Any:
        # Within a backward pass this is the second call. (A compiled block updates its statistics once in any case.)
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return super().forward(*args, **kwargs)
        with _statistics_kept(self):
            return super().forward(*args, **kwargs)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms unchanged within the context, while they compute as usual."""
    kept = [(m, m.momentum, m.num_batches_tracked) for m in block.modules() if isinstance(m, _NormBase)]
    for m, _, _ in kept:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, momentum, count in kept:
            m.momentum, m.num_batches_tracked = momentum, count
