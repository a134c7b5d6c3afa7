"""Which parameters are trained, and in which groups an optimizer gets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, Optimizer

from raytrainer.errors import ConfigError
from raytrainer.names import matching
from raytrainer.optim.protocols import check_optimizer
from raytrainer.sharding import is_sharded

Factory = Callable[..., Any]


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze what the patterns match: parameters get no gradient, and so no optimizer state.

    A batch norm whose `running_mean` matches uses its running statistics in training, too (`eval()`). Dropout stays
    active.

    Args:
        model: The model before it is wrapped or sharded.
        patterns: Patterns of names of parameters and buffers, as in `names.matching`.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    frozen = matching(patterns, [*parameters, *buffers], "trainer.freeze")
    for name in frozen & parameters.keys():
        parameters[name].requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and (f"{name}." if name else "") + "running_mean" in frozen:
            module.eval()


def has_sparse_gradients(model: nn.Module) -> set[torch.Tensor]:
    """Return the parameters of embeddings with `sparse=True`."""
    return {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in at most two groups: matrices and kernels, and vectors, which do not decay.

    A parameter with fewer than two dimensions is a bias or a norm's scale; pulling those to zero does not regularise
    (He et al. 2018, arXiv:1812.01187, 3.1).

    Raises:
        ConfigError: Nothing is trainable.
    """
    return grouped(trainable(model).values(), weight_decay)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that get a gradient, by name.

    Raises:
        ConfigError: There are none.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            "has no trainable parameter: it has no parameters at all, or all of them have requires_grad=False or are in "
            "trainer.freeze",
            key="model",
        )
    return trained


def apart(parameters: Iterable[nn.Parameter], model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the model's parameters and the loss's as two lists, without empty ones.

    The former may be sharded and the latter are not, and torch updates a whole group at once.
    """
    own, parameters = {id(p) for p in model.parameters()}, list(parameters)
    parts = [[p for p in parameters if id(p) in own], [p for p in parameters if id(p) not in own]]
    return [part for part in parts if part]


def grouped(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return a group of parameters with at least two dimensions, and one of the others, which do not decay.

    Empty groups are omitted.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(factory: Factory, model: nn.Module, system: nn.Module | None = None) -> Optimizer:
    """Build the optimizer of everything that is trained.

    Args:
        factory: Called with only the parameters, so everything else is bound: `partial(torch.optim.AdamW, lr=1e-3)`.
            Its `weight_decay`, bound or by default, applies to the matrices; one without that argument gets a plain
            list. One with an argument `model` gets the model instead, and makes its own groups; with an argument
            `system` it also gets the model and the loss as one module.
        model: The model as it is trained: wrapped, sharded and on its device.
        system: The model and the loss as one module, if the loss has parameters.

    Raises:
        ConfigError: The constructor refuses a value, the result is not an optimizer or leaves out the loss, or nothing
            is trainable.
    """
    system = model if system is None else system
    parameters = trainable(system)
    try:
        accepted = arguments(factory)
        if "model" in accepted:
            further = {"system": system} if "system" in accepted else {}
            optimizer = factory(model=model, **further)
        else:
            weight_decay = _bound(factory, "weight_decay")
            parts = apart(parameters.values(), model)
            groups = [group for part in parts for group in grouped(part, weight_decay or 0.0)]
            params: list[Any] = groups
            if weight_decay is None:
                lists = [[p for group in grouped(part, 0.0) for p in group["params"]] for part in parts]
                params = lists[0] if len(lists) == 1 else [{"params": part} for part in lists]
            optimizer = factory(params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"is refused by its constructor: {error}", key="optimizer") from error
    check_optimizer(optimizer, parameters)
    if system is not model:
        _check_loss_is_in(optimizer, parameters, model)
    made = cast("Optimizer", optimizer)
    _unfuse(made, system)
    mend_fused_sgd(made)
    return made


def _check_loss_is_in(optimizer: Any, parameters: dict[str, nn.Parameter], model: nn.Module) -> None:
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    inside |= {id(p) for p in model.parameters()}
    if left := [name for name, p in parameters.items() if id(p) not in inside]:
        kind = type(optimizer).__name__
        raise ConfigError(
            f"makes its groups from the argument `model`, and leaves out the loss's parameter {left[0]}. Give {kind} an argument "
            "`system`, which has the parameters of both, or exclude the loss's with trainer.freeze=[loss.*]",
            key="optimizer",
            value=kind,
        )


def _unfuse(optimizer: Optimizer, system: nn.Module) -> None:
    """Disable `fused` for groups with sparse gradients or complex parameters, which fused optimizers do not support."""
    sparse = has_sparse_gradients(system)
    for group in optimizer.param_groups:
        if group.get("fused") and any(p.is_complex() or p in sparse for p in group["params"]):
            group["fused"] = False
            # Otherwise a gradient scaler would rely on `step` to skip a step.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def mend_fused_sgd(optimizer: Optimizer) -> None:
    """Work around three faults of torch's fused SGD (2.13), for a new optimizer and for one whose state was loaded.

    On the CPU it does not update parameters in half precision (pytorch#191763), and it does not support shards, so
    those groups are not fused. If a gradient scaler skips the very first step, which is usual, it leaves the momentum
    in uninitialised memory. Zeros are set instead, from which the first real step gives the same result (without
    dampening).
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"]:
            continue
        if any(is_sharded(p) for p in group["params"]):
            group["fused"] = False
            # Otherwise a gradient scaler would rely on `step` to skip a step.
            optimizer._step_supports_amp_scaling = False
        elif any(p.device.type == "cpu" and p.dtype in (torch.bfloat16, torch.float16) for p in group["params"]):
            group["fused"] = False
        elif group["momentum"]:
            for p in group["params"]:
                optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p, requires_grad=False))


def arguments(factory: Factory) -> dict[str, inspect.Parameter]:
    """Return the parameters of a callable's signature."""
    try:
        return dict(inspect.signature(factory).parameters)
    except ValueError:  # a builtin without a signature
        return {}


def _bound(factory: Factory, name: str) -> float | None:
    """Return the value that the factory will use for `name`, bound or its default; None if there is none."""
    if isinstance(factory, partial) and name in factory.keywords:
        return float(factory.keywords[name])
    parameter = arguments(factory).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else float(parameter.default)
