"""The units of a model: the blocks that are sharded as a whole, or recomputed as a whole in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from raytrainer.errors import ConfigError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_units(model: nn.Module, classes: Sequence[str] | None, key: str) -> list[nn.Module]:
    """Return the modules of some classes, outer ones first.

    Args:
        model: The model to search; it is never a unit itself.
        classes: Names of classes, plain (`Block`) or dotted (`mypackage.nets.Block`). None: those that the model itself
            lists in `_no_split_modules`, as Hugging Face's models do, else its repeated blocks: modules in a
            `ModuleList` or `Sequential` with submodules, of a class that occurs at least twice, only the outermost
            ones.
        key: The configuration key, for the error.

    Raises:
        ConfigError: No module has such a class.
    """
    below = [module for module in model.modules() if module is not model]
    if classes is None:
        named = [str(name) for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()]
        # Each model of a family may list the blocks of the whole family.
        units = [module for module in below if type(module).__name__ in named]
        return units or _repeated(model)
    for name in classes:
        if not any(name in _names(module) for module in below):
            choices = sorted({type(module).__name__ for module in below if _has_forward(module)})
            raise ConfigError("is not a class of the model's modules", key=key, value=name, choices=choices)
    units = [module for module in below if not _names(module).isdisjoint(classes)]
    if bad := next((module for module in units if not _has_forward(module)), None):
        raise ConfigError("is a container that is never called", key=key, value=type(bad).__name__)
    return units


def _repeated(model: nn.Module) -> list[nn.Module]:
    blocks = list(_outermost(model))
    count = Counter(type(block) for block in blocks)
    return [block for block in blocks if count[type(block)] > 1]


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        listed = isinstance(module, _CONTAINERS) and not isinstance(child, _CONTAINERS)
        if listed and any(True for _ in child.children()) and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _outermost(child)


def _names(module: nn.Module) -> set[str]:
    kind = type(module)
    return {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward
