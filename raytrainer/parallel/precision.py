"""`trainer.precision`: the types of parameters, inputs and products, and the gradient scaler for half precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from raytrainer import batches

_DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Precision:
    """The mode of `trainer.precision`.

    `32-true`, `64-true` and `bf16-true` have parameters and inputs in that type. `bf16-mixed` and `16-mixed` use
    autocast, the latter with a gradient scaler.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.dtype = _DTYPES.get(name, torch.float32)
        self._autocast = _AUTOCAST.get(name)
        self._device = device.type
        self.scaler: torch.amp.GradScaler | None = torch.amp.GradScaler(device.type) if name == "16-mixed" else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=self._autocast)

    def convert(self, model: nn.Module) -> nn.Module:
        """Convert the model's floating-point parameters and buffers to that type, in place, and return the model.

        `model.to(dtype)` would make complex buffers (rotary embeddings) real.
        """
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.data = t.data.to(self.dtype)
            elif t.is_complex() and self.dtype is torch.float64:
                t.data = t.data.to(torch.complex128)
        return model

    def cast(self, data: Any) -> Any:
        """Return a batch with its floating-point tensors in the model's type; everything else is unchanged."""
        return batches.cast(data, self.dtype)
