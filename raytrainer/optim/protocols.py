"""What an optimizer and a learning-rate scheduler must support, checked when they are built.

Some optimizers have separate modes for training and evaluation ("schedule-free", Defazio et al. 2024,
arXiv:2405.15682).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.errors import ConfigError

_OPTIMIZER = ("step", "zero_grad", "state_dict", "load_state_dict", "param_groups")
_SCHEDULER = ("step", "state_dict", "load_state_dict")


def check_optimizer(optimizer: Any, trained: dict[str, nn.Parameter]) -> None:
    """Check an optimizer.

    Raises:
        ConfigError: It is not an optimizer, needs a closure, or has parameters that are not trained ones of the model
            or the loss.
    """
    kind = type(optimizer).__name__
    if lacking := [name for name in _OPTIMIZER if not hasattr(optimizer, name)]:
        raise ConfigError(
            f"gives a {kind}, which has no {lacking[0]}, so it is not an optimizer. Name a class of torch.optim, or one with "
            f"its methods ({', '.join(_OPTIMIZER)})",
            key="optimizer._target_",
        )
    if needed := required_arguments(optimizer.step):
        raise ConfigError(
            f"cannot be used: {kind}.step() needs {needed[0]}, and raytrainer calls step() without arguments. Use an optimizer "
            "of first order, as optimizer=adamw or optimizer=sgd",
            key="optimizer",
            value=kind,
        )
    own = {id(p) for p in trained.values()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            f"has parameters in its groups that are not trained parameters of the model or the loss, so a checkpoint could "
            f"not name them. {kind} must keep the parameters that it is given, and leave out those with requires_grad=False",
            key="optimizer",
            value=kind,
        )


def check_scheduler(scheduler: Any) -> None:
    """Check a learning-rate scheduler.

    Raises:
        ConfigError: It lacks a method, or its `step` needs an argument.
    """
    kind = type(scheduler).__name__
    if lacking := [name for name in _SCHEDULER if not callable(getattr(scheduler, name, None))]:
        raise ConfigError(
            f"gives a {kind}, which has no {lacking[0]}(). A scheduler has {', '.join(_SCHEDULER)}; a function of (step, "
            "total_steps) needs lr_scheduler._partial_=true",
            key="lr_scheduler._target_",
        )
    if needed := required_arguments(scheduler.step):
        raise ConfigError(
            f"cannot be used: {kind}.step() needs {needed[0]}, and raytrainer calls step() without arguments after each "
            "optimizer step. Use a curve of the step",
            key="lr_scheduler",
            value=kind,
            choices=("constant", "linear", "cosine", "wsd"),
        )


def required_arguments(method: Any) -> list[str]:
    """Return the names of a bound method's parameters that have no default."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def has_modes(optimizer: Any) -> bool:
    """Return whether the optimizer has `train()` and `eval()` modes, like schedule-free ones."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def enter_training(optimizer: Any) -> None:
    """Set the training mode. Call it before the first step, and before a checkpoint is restored."""
    if has_modes(optimizer):
        optimizer.train()


@contextlib.contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Set the evaluation and export weights within the context, and the same training weights again after it.

    For most optimizers they are the same. For the others, `eval()` and `train()` are inverse only up to rounding, so
    copies of the training weights are kept.
    """
    if not has_modes(optimizer):
        yield
        return
    kept = training_weights(optimizer)
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        load_training_weights(optimizer, kept)


@torch.no_grad()
def training_weights(optimizer: Any) -> list[Tensor]:
    """Return copies of the parameters, in the optimizer's order."""
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def load_training_weights(optimizer: Any, kept: list[Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, value in zip(parameters, kept, strict=True):
        p.copy_(value)
