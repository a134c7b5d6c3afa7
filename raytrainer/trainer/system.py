"""The trained system: the model, and the loss if it has its own parameters or buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from raytrainer import seeds
from raytrainer.config import Experiment, build
from raytrainer.errors import ConfigError

PREFIX = "loss"

Loss = Callable[[nn.Module, Any], Mapping[str, Tensor]]


class System(nn.Module):
    """The model and the loss under one set of names: the model's unchanged, the loss's with the prefix `loss.`.

    The optimizer, `trainer.freeze`, buffers and counts use it. Neither module is called through it.

    Args:
        model: The model, not wrapped.
        loss: The `stateful_part` of the loss.
    """

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from self.model.named_modules(memo, prefix, remove_duplicate)
        yield from self.loss.named_modules(memo, f"{prefix}.{PREFIX}" if prefix else PREFIX, remove_duplicate)


def together(model: nn.Module, loss: nn.Module | None) -> nn.Module:
    """Return the `System` of both, or the model itself if the loss has no state.

    Raises:
        ConfigError: A parameter or buffer of the model has the same name as one of the loss.
    """
    if loss is None:
        return model
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for name, _ in (*loss.named_parameters(prefix=PREFIX), *loss.named_buffers(prefix=PREFIX)):
        if name in own:
            raise ConfigError(
                f"has a tensor that would be called {name} in checkpoints and patterns, and so has the model. Rename the "
                "model's attribute `loss`",
                key="loss",
            )
    return System(model, loss)


def build_loss(e: Experiment) -> Loss:
    """Build the loss, with initial values drawn from the experiment's seed.

    Raises:
        ConfigError: It cannot be called.
    """
    seeds.seed_everything("loss", e.seed)
    loss = build(e.loss or {})
    if not callable(loss):
        raise ConfigError(
            f"gives a {type(loss).__name__}, which cannot be called with (model, batch). For a function use "
            "loss._partial_=true",
            key="loss",
            value=(e.loss or {}).get("_target_"),
        )
    made: Loss = loss
    return made


def stateful_part(loss: Any) -> nn.Module | None:
    """Return the module with the loss's parameters and buffers; None if there are none.

    It is the loss itself, or holds the modules among an object's attributes or a function's bound arguments.
    """
    if isinstance(loss, nn.Module):
        return loss if _has_state(loss) else None
    if isinstance(loss, partial):
        held = {**{str(i): value for i, value in enumerate(loss.args)}, **loss.keywords}
        if isinstance(owner := getattr(loss.func, "__self__", None), nn.Module):
            held["function"] = owner
    elif isinstance(owner := getattr(loss, "__self__", None), nn.Module):
        return owner if _has_state(owner) else None
    else:
        held = getattr(loss, "__dict__", {})
    modules = {name: value for name, value in held.items() if isinstance(value, nn.Module) and _has_state(value)}
    return nn.ModuleDict(modules) if modules else None


def _has_state(module: nn.Module) -> bool:
    tensors = (*module.parameters(), *module.buffers())
    return bool(tensors) or any(type(m).get_extra_state is not nn.Module.get_extra_state for m in module.modules())


def with_state_dict(loss: Any, part: nn.Module | None) -> Any:
    """Return the loss if it is an object with its own `state_dict` that `part`, its `stateful_part`, does not cover."""
    return loss if loss is not part and callable(getattr(loss, "state_dict", None)) else None


def modules_of(model: nn.Module, loss: Any) -> list[nn.Module]:
    """Return all modules of both, including those of a loss without state, which have a train or eval mode, too."""
    modules = list(model.modules())
    part = loss if isinstance(loss, nn.Module) else stateful_part(loss)
    return modules if part is None else [*modules, *part.modules()]


def check_apart(model: nn.Module, loss: nn.Module | None) -> None:
    """Check that the loss does not keep the model as an attribute, which would make the model's parameters its own.
    Call it after the first call of the loss.

    Raises:
        ConfigError: The model is among the loss's modules.
    """
    if loss is None or not any(module is model for module in loss.modules()):
        return
    name = next(name for name, module in loss.named_modules() if module is model)
    raise ConfigError(
        f"keeps the model as its attribute {name}, so the model's parameters would be the loss's too. Take the model from "
        "the arguments of forward, or keep it in a list or a weakref",
        key="loss",
        value=type(loss).__name__,
    )
