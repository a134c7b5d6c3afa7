"""What an optimizer and a learning-rate scheduler must support, checked when they are built; and optimizers with a mode of
their own for training and for evaluation (Defazio et al. 2024, arXiv:2405.15682, "schedule-free")."""

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
    """
    Raises:
        ConfigError: It is not an optimizer, needs a closure, or has parameters that are not of the model.
    """
    kind = type(optimizer).__name__
    if lacking := [name for name in _OPTIMIZER if not hasattr(optimizer, name)]:
        raise ConfigError(
            f"gives a {kind}, which has no {lacking[0]} and so is no optimizer. Name a class of torch.optim, or one with "
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
    """
    Raises:
        ConfigError: Its `step` needs an argument, or it lacks a method.
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
    """Names of the parameters of a bound method that have no default."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return []
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in given]


def has_modes(optimizer: Any) -> bool:
    """Whether the optimizer must be told of training and evaluation, as schedule-free ones: `train()` and `eval()`."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def enter_training(optimizer: Any) -> None:
    """Call it before the first step, and before a checkpoint is restored."""
    if has_modes(optimizer):
        optimizer.train()


@contextlib.contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Within it the parameters are those to evaluate and to export; after it those to train, to the last bit.

    Of most optimizers these are the same. `eval()` and `train()` of the others are inverse to each other only up to
    rounding, so the trained parameters are kept beside.
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
    """Copies of the parameters, in the optimizer's order."""
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def load_training_weights(optimizer: Any, kept: list[Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, value in zip(parameters, kept, strict=True):
        p.copy_(value)
