"""Explain torch's errors in an optimizer's step that a configuration key has caused."""

from __future__ import annotations

from typing import Any

from raytrainer.errors import ConfigError


def explained(error: RuntimeError, optimizer: Any) -> Exception:
    """Return a ConfigError for torch's errors about sparse gradients and complex parameters, else the error itself."""
    text, kind = str(error), type(optimizer).__name__
    if "sparse" in text.lower():
        return ConfigError(
            f"cannot be used with sparse gradients ({_first_line(text)}). Use sparse=False in the embedding, or an optimizer "
            "for them: torch.optim.SGD with weight_decay=0, torch.optim.SparseAdam, torch.optim.Adagrad",
            key="optimizer",
            value=kind,
        )
    if "complex" in text.lower():
        return ConfigError(
            f"cannot be used with the model's complex parameters ({_first_line(text)}). Set optimizer.fused=false, use "
            "another optimizer, or keep them as pairs of real numbers (torch.view_as_complex in forward)",
            key="optimizer",
            value=kind,
        )
    return error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200]
