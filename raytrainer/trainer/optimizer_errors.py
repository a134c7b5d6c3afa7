"""Explain torch's errors in an optimizer's step that a configuration key has caused."""

from __future__ import annotations

from typing import Any

from raytrainer.errors import ConfigError

# A word of torch's message → what the optimizer cannot do, and the fix.
_CAUSES = {
    "sparse": (
        "cannot be used with sparse gradients",
        (
            "Use sparse=False in the embedding, or an optimizer for them: torch.optim.SGD with weight_decay=0, "
            "torch.optim.SparseAdam, torch.optim.Adagrad"
        ),
    ),
    "complex": (
        "cannot be used with the model's complex parameters",
        (
            "Set optimizer.fused=false, use another optimizer, or keep them as pairs of real numbers (torch.view_as_complex in "
            "forward)"
        ),
    ),
}


def explain(error: RuntimeError, optimizer: Any) -> Exception:
    """Return a ConfigError for torch's errors about sparse gradients and complex parameters, else the error itself."""
    text = str(error)
    for word, (problem, fix) in _CAUSES.items():
        if word in text.lower():
            first_line = text.strip().splitlines()[0][:200]
            return ConfigError(f"{problem} ({first_line}). {fix}", key="optimizer", value=type(optimizer).__name__)
    return error
