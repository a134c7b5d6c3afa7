"""The model's first inputs and outputs in an evaluation, kept for an export after training.

The export must not call the loss again, because a loss with a collective would wait for ranks that have ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.batches import map_tensors

_MOST_BYTES = 64 * 2**20
_ROWS = 2  # rows of an output that are kept; an export needs only its form, not the size of the batch


@dataclass
class Example:
    """One call of the model, on the device where it was made.

    Attributes:
        args, kwargs: Its arguments.
        output: What it returned; only the first rows of each tensor.
        too_large: Whether the arguments needed too much memory to be kept.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    too_large: bool = False

    def on_cpu(self) -> dict[str, Any]:
        """Return the call on the CPU and in float32, which every consumer can run."""

        def plain(tensor: Tensor) -> Tensor:
            return tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()

        return {
            "args": map_tensors(self.args, plain),
            "kwargs": map_tensors(self.kwargs, plain),
            "output": map_tensors(self.output, plain),
        }


class ExampleRecorder:
    """A recorder of the first call of a model. It never waits for the device, and later calls cost nothing."""

    def __init__(self) -> None:
        self.example: Example | None = None

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record the next call of `model` within the context, unless one was recorded before."""
        if self.example is not None:
            yield
            return
        compiled = getattr(model, "_compiled_call_impl", None)
        if compiled is not None:  # a hook would be compiled, too, and the model a second time without it

            def call(*args: Any, **kwargs: Any) -> Any:
                output = compiled(*args, **kwargs)
                self._keep(args, kwargs, output)
                return output

            model._compiled_call_impl = call
            try:
                yield
            finally:
                model._compiled_call_impl = compiled
            return
        hook = model.register_forward_hook(
            lambda _, args, kwargs, output: self._keep(args, kwargs, output), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.example is not None:
            return
        size = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        map_tensors((args, kwargs), count)
        if size > _MOST_BYTES:
            self.example = Example((), {}, None, too_large=True)
            return
        with torch.no_grad():
            copied = map_tensors((args, kwargs), lambda tensor: tensor.detach().clone())
            first = map_tensors(output, lambda t: (t.detach()[:_ROWS] if t.dim() else t.detach()).clone())
        self.example = Example(copied[0], copied[1], first)
