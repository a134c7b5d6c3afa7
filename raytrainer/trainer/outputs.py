"""Convert a loss's result to numbers on the device, or raise an error that names the entry and the fix."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrainer.errors import ConfigError
from raytrainer.metrics import BAD_WEIGHT

_EXAMPLE = "return {'loss': loss}, and further numbers under names of their own"


def entries(returned: Any, device: torch.device, *, training: bool = True) -> dict[str, Any]:
    """Return a loss's entries by name: each is a 0-d tensor, except `weight` (0-d or a number), `preds` and `target`.

    Numbers, NumPy scalars and tensors of one element are converted. It never waits for the device.

    Args:
        returned: The result of the loss.
        device: The device for the entries.
        training: Whether a backward pass follows, for which `loss` is needed.

    Raises:
        ConfigError: The result is not a mapping, `loss` is missing or is not a real floating-point number, or an entry
            is not one number.
    """
    if not isinstance(returned, Mapping):
        raise ConfigError(f"returned {_described(returned)} instead of a dict: {_EXAMPLE}", key="loss")
    values = dict(returned)
    for name, value in values.items():
        if isinstance(value, Tensor) and not value.ndim and value.device == device and isinstance(name, str):
            continue  # the usual case, which costs nothing in a step
        if name in ("preds", "target"):
            continue
        values[_name(name)] = _number(name, value, device)
    loss = values.get("loss")
    if loss is None:
        if training:
            have = ", ".join(map(str, values)) or "nothing"
            raise ConfigError(f"returned no entry 'loss', only {have}: {_EXAMPLE}", key="loss")
    elif not loss.is_floating_point():
        raise ConfigError(
            f"returned a 'loss' of type {loss.dtype}; it must be a real floating-point number (of a complex one take .abs() "
            "or .real)",
            key="loss",
        )
    return values


def take_predictions(values: dict[str, Any]) -> tuple[Any, Any] | None:
    """Remove `preds` and `target` from a loss's result and return them; None unless it has both."""
    predictions, target = values.pop("preds", None), values.pop("target", None)
    return None if predictions is None or target is None else (predictions, target)


def weight_of(value: Any) -> Tensor | float:
    """Return the entry `weight` as a float64 tensor, or as a plain number if it is one.

    Raises:
        ConfigError: The number is below 0, infinite or NaN.
    """
    if isinstance(value, Tensor):
        # Also for integers, because their float32 quotients would cost a float64 run precision.
        return value.detach().double()
    check_weight(value)
    return float(value)


def check_weight(value: float) -> None:
    """Check the weight of a micro-batch.

    Raises:
        ConfigError: It is below 0, infinite or NaN.
    """
    if not 0 <= value < float("inf"):
        raise ConfigError(BAD_WEIGHT.format(given=f"the weight {value:g}, which is"), key="loss")


def check_gradient(loss: Tensor) -> None:
    """Check that a backward pass is possible.

    Raises:
        ConfigError: The loss has no gradient.
    """
    if not loss.requires_grad:
        raise ConfigError(
            "returned a 'loss' without a gradient, so nothing could be trained: it was computed under torch.no_grad(), "
            "detached (.detach(), .item(), .numpy()), or from nothing that is trained. Return the tensor itself",
            key="loss",
        )


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise ConfigError(
            f"returned an entry whose name is {name!r}: names must be text, as in {{'loss': loss}}", key="loss"
        )
    return name


def _number(name: str, value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_sparse:
        value = value.reshape(())
        return value if value.device == device else value.to(device)
    if isinstance(value, np.generic | np.ndarray) and value.size == 1 and value.dtype.kind in "biuf":
        value = value.item()
    if isinstance(value, numbers.Real):
        # A fill, because a copy from the host's memory would wait for the device.
        return float(value) if name == "weight" else torch.full((), float(value), dtype=torch.float64, device=device)
    fix = "leave the entry out where there is no value" if value is None else "take its mean or sum"
    if name not in ("loss", "weight"):
        fix += "; tensors for `metrics` belong under 'preds' and 'target'"
    raise ConfigError(
        f"returned {_described(value)} for '{name}'; each entry must be one number (a 0-d tensor): {fix}", key="loss"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
