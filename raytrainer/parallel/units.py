"""The blocks that a model is made of: what is sharded as one, and what is recomputed as one in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from raytrainer.errors import ConfigError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_units(model: nn.Module, classes: Sequence[str] | None, key: str) -> list[nn.Module]:
    """Modules of these classes, outer ones first.

    Args:
        model: Where they are looked for; itself is none.
        classes: Names of classes, bare (`Block`) or dotted (`mypackage.nets.Block`). None: those that the model itself
            names in `_no_split_modules`, as Hugging Face's do; else its repeated blocks: what is in a `ModuleList` or
            `Sequential`, has parts, and is there at least twice, the outermost of such.
        key: Of the configuration, for the error.

    Raises:
        ConfigError: No module is of such a class.
    """
    below = [module for module in model.modules() if module is not model]
    if classes is None:
        named = [str(name) for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()]
        # Of a family of models each names the blocks of all.
        found = [module for module in below if type(module).__name__ in named]
        return found or _repeated(model)
    for name in classes:
        if not any(name in _names(module) for module in below):
            choices = sorted({type(module).__name__ for module in below if _has_forward(module)})
            raise ConfigError("is no class of the model's modules", key=key, value=name, choices=choices)
    found = [module for module in below if not _names(module).isdisjoint(classes)]
    if bad := next((module for module in found if not _has_forward(module)), None):
        raise ConfigError("is a container that is never called", key=key, value=type(bad).__name__)
    return found


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
