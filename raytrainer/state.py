"""Weights and optimizer state under their parameters' names, so that a checkpoint does not depend on their order.

An optimizer numbers its parameters by group. Names remain valid with other groups, DDP's prefix or another framework.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer.errors import CheckpointCorrupt
from raytrainer.names import match
from raytrainer.sharding import is_sharded, placed_as


def named_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with names for numbers: `{"state": {name: …}, "groups": [{"names": […], …}]}`.

    If an optimizer has more, so has the result: `other`, state that belongs to no parameter; `rest`, further entries of
    the state dict; `unlike`, the keys of tensors in a parameter's state whose type differs from the parameter's, which
    torch would convert.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [names[id(p)] for p in parameters]
    of_parameters = {k: v for k, v in state["state"].items() if type(k) is int and 0 <= k < len(order)}
    result: dict[str, Any] = {
        "state": {order[k]: dict(v) if isinstance(v, Mapping) else v for k, v in of_parameters.items()},
        "groups": [
            {**{k: v for k, v in group.items() if k != "params"}, "names": [order[i] for i in group["params"]]}
            for group in state["param_groups"]
        ],
    }
    unlike = {order[k]: keys for k, v in of_parameters.items() if (keys := _unlike(parameters[k], v))}
    further = {
        "other": {k: v for k, v in state["state"].items() if k not in of_parameters},
        "rest": {k: v for k, v in state.items() if k not in ("state", "param_groups")},
        "unlike": unlike,
    }
    return {**result, **{k: v for k, v in further.items() if v}}


def _unlike(parameter: Tensor, values: Any) -> list[Any]:
    """Return the keys of tensors that torch's `load_state_dict` would convert to the parameter's type; never `step`."""
    if not isinstance(values, Mapping) or not parameter.is_floating_point():
        return []
    return [k for k, v in values.items() if isinstance(v, Tensor) and k != "step" and v.dtype != parameter.dtype]


def restore_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load the result of `named_optimizer_state` through the optimizer's own `load_state_dict`.

    Raises:
        CheckpointCorrupt: The parameters or groups differ from this model's, or the optimizer rejects the state.
    """
    parameters = dict(model.named_parameters())
    names = {id(p): n for n, p in parameters.items()}
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    groups = list(saved["groups"])
    if [sorted(g["names"]) for g in groups] != [sorted(g) for g in order]:
        raise CheckpointCorrupt(
            "the checkpoint's optimizer has other parameters, or groups them otherwise, than this one"
        )
    number, state, new_groups = 0, dict(saved.get("other", {})), []
    for wanted, group, own in zip(order, groups, optimizer.param_groups, strict=True):
        numbers = list(range(number, number + len(wanted)))
        number += len(wanted)
        state.update({i: saved["state"][n] for i, n in zip(numbers, wanted, strict=True) if n in saved["state"]})
        values = {k: tuple(v) if isinstance(own.get(k), tuple) else v for k, v in group.items() if k != "names"}
        # How to compute steps depends on this process: there may be no fused ones for shards.
        how = {k: own[k] for k in ("fused", "foreach") if k in own}
        new_groups.append({**values, **how, "params": numbers})
    try:
        optimizer.load_state_dict({"state": state, "param_groups": new_groups, **saved.get("rest", {})})
    except Exception as error:
        raise CheckpointCorrupt(
            f"the optimizer {type(optimizer).__name__} does not take its saved state: {type(error).__name__}: {error}"
        ) from error
    for name, keys in saved.get("unlike", {}).items():
        own_state, parameter = optimizer.state.get(parameters[name]), parameters[name]
        if isinstance(own_state, dict):
            own_state.update({k: saved["state"][name][k].to(parameter.device) for k in keys if k in own_state})


def restore_object(key: str, thing: Any, state: Any, source: str) -> None:
    """Restore the state of a user's object through its `load_state_dict`.

    Raises:
        CheckpointCorrupt: It fails; the message names `key`, a key of the configuration.
    """
    try:
        thing.load_state_dict(state)
    except Exception as error:
        raise CheckpointCorrupt(
            f"{key} ({type(thing).__name__}) does not take its state of {source}: {type(error).__name__}: {error}"
        ) from error


def restore_module(module: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Load a state dict into a module through its own `load_state_dict`, with all hooks and extra state.

    A sharded module (FSDP2) takes whole tensors and shards alike: each is placed like the module's own tensor, after
    the module's hooks have seen it. Every rank calls it.

    Args:
        module: A module built like the one that was saved.
        state: The result of its `state_dict()`, perhaps read from a checkpoint. If torch's `_metadata`, which includes
            the modules' versions, is missing, that of `module` is used.
        source: Where the state comes from, for the error.

    Raises:
        CheckpointCorrupt: The module rejects it. If names or shapes differ, the message has the first few of each, and
            a module that loads only by name is unchanged.
    """
    if loads_by_name(module) and (problem := _difference(module, state)):
        raise CheckpointCorrupt(f"{source} {problem}")
    if getattr(state, "_metadata", None) is None:
        state = _with_metadata(state, module)
    try:
        with _placing_shards(module):
            module.load_state_dict(state)
    except Exception as error:
        reason = f"cannot be loaded into {type(module).__name__}: {type(error).__name__}: {error}"
        # torch lists every name that differs; the first few are enough.
        problem = _difference(module, state) if type(error) is RuntimeError and "Missing key(s)" in str(error) else ""
        raise CheckpointCorrupt(f"{source} {problem or reason}") from error


def extra_state(module: nn.Module) -> dict[str, Any]:
    """Return copies of what each part's `get_extra_state` returns, by the part's name, for `set_extra_state`."""
    parts = ((name, m) for name, m in module.named_modules() if _overrides(m, "set_extra_state"))
    return {name: copy.deepcopy(m.get_extra_state()) for name, m in parts if _overrides(m, "get_extra_state")}


def set_extra_state(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Restore the extra state that `extra_state` returned for this module, or for one built alike."""
    for name, part in module.named_modules():
        if name in values and _overrides(part, "set_extra_state"):
            part.set_extra_state(values[name])


@contextlib.contextmanager
def unchanged(*modules: nn.Module | None, other: Any = None) -> Iterator[None]:
    """Undo on exit what a forward pass changes: buffers, and state behind hooks or extra state.

    Args:
        modules: Modules, each restored separately; None is ignored.
        other: An object whose state `state_dict` returns and `load_state_dict` restores.
    """
    kept = [(module, _copied_state(module)) for module in modules if module is not None]
    before = copy.deepcopy(other.state_dict()) if hasattr(other, "load_state_dict") else None
    yield
    for module, (state, buffers) in kept:
        if state is not None:
            # A module that rejects its own state is refused at the first save, on all ranks at once.
            with contextlib.suppress(CheckpointCorrupt):
                restore_module(module, state, "the state of before")
        with torch.no_grad():
            for name, b in module.named_buffers():
                b.copy_(buffers[name])
    if before is not None:
        with contextlib.suppress(CheckpointCorrupt):
            restore_object("loss", other, before, "the state of before")


def _copied_state(module: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """Return copies of the state dict (None if it has only parameters and buffers), and of the buffers."""
    buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    if loads_by_name(module):
        return None, buffers
    state = module.state_dict()
    for name, value in state.items():
        state[name] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return state, buffers


def loads_by_name(module: nn.Module) -> bool:
    """Return whether `state_dict` and `load_state_dict` handle each parameter and buffer only under its own name.

    False if a class or a hook takes part: values may then have other names and forms, or not be tensors.
    """
    return not any(_has_own_state(m) for m in module.modules())


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict, without a module's extra state of other types."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


_METHODS = (
    "state_dict",
    "load_state_dict",
    "_save_to_state_dict",
    "_load_from_state_dict",
    "get_extra_state",
    "set_extra_state",
)
_HOOKS = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _has_own_state(module: nn.Module) -> bool:
    if any(_overrides(module, method) for method in _METHODS):
        return True
    hooks = [hook for name in _HOOKS for hook in getattr(module, name).values()]
    # FSDP2's own hooks only install the sharded parameters.
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in map(_inner, hooks))


def _overrides(module: nn.Module, method: str) -> bool:
    owner = next(kind for kind in type(module).__mro__ if method in vars(kind))
    # Batch norm's own method only adds what a very old version lacks.
    return owner is not nn.Module and not owner.__module__.startswith(
        ("torch.nn.modules.batchnorm", "torch.distributed.")
    )


def _inner(hook: Any) -> Any:
    """Return a hook without torch's wrapper."""
    return getattr(hook, "hook", hook)


def _difference(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Return how a state's names and shapes differ from the module's, as the end of a sentence; empty if equal."""
    own, other = tensors_of(module.state_dict()), tensors_of(state)
    return match({n: tuple(t.shape) for n, t in own.items()}, {n: tuple(t.shape) for n, t in other.items()}).problem


def _with_metadata(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    metadata = getattr(module.state_dict(), "_metadata", None)
    if metadata is None:
        return state
    with_metadata: Any = OrderedDict(state)
    with_metadata._metadata = metadata
    result: Mapping[str, Any] = with_metadata
    return result


@contextlib.contextmanager
def _placing_shards(module: nn.Module) -> Iterator[None]:
    """Let the sharded parameters of `module` load whole tensors within the context, after its own hooks."""
    sharded = module.modules() if is_sharded(module) else ()
    handles = [
        part._register_load_state_dict_pre_hook(_place_shards, with_module=True)
        for part in sharded
        if any(is_sharded(parameter) for parameter in part._parameters.values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place_shards(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, own in module._parameters.items():
        value = state.get(prefix + name)
        if own is not None and is_sharded(own) and isinstance(value, Tensor) and value.shape == own.shape:
            state[prefix + name] = placed_as(own, value)
