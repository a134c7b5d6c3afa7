"""Check after a process's first save that each object can restore its saved state, value by value.

State that a resume would lose is thus reported now. Small objects are tried on a copy. For a large model, each value is
compared as it is loaded into a copy without memory. The training itself is not changed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raytrainer import parallel, seeds
from raytrainer.checkpoint import as_read
from raytrainer.errors import CheckpointError
from raytrainer.sharding import is_sharded, placed_as
from raytrainer.state import loads_by_name, named_optimizer_state, restore_optimizer_state
from raytrainer.trainer.components import Components

_COPIED = 64 << 20  # bytes; a larger state is not copied for a check


def verify(t: Components, state: Mapping[str, Any]) -> None:
    """Check that `state`, from `snapshot.shared`, can be restored. Every rank calls it, and all of them raise.

    Raises:
        CheckpointError: An object has no `load_state_dict`, or it fails on the result of `state_dict` or restores other
            values. The message names the object and the key.
    """
    random = seeds.random_state()
    try:
        problem = next(filter(None, _problems(t, state)), None)
    finally:
        seeds.set_random_state(random)
    failed = t.world.all_reduce(torch.tensor(float(problem is not None), device=t.world.device))
    if problem is not None:
        raise CheckpointError(
            f"{problem}. The checkpoint of step {t.step} has the weights, but a run resumed from it would not be the "
            "same run."
        )
    if float(failed):
        raise CheckpointError("the saved state of another rank cannot be restored; its message says which")


def _problems(t: Components, state: Mapping[str, Any]) -> Iterable[str | None]:
    # Objects that others refer to. A copy of those must not copy these, too.
    kept: list[Any] = [t, t.loss, t.optimizer, t.events, t.state, t.train_loader, *t.val_loaders.values()]
    for model in (t.raw_model, t.ema_model, t.loss_state):
        kept += [] if model is None else [model, *model.modules(), *model.parameters()]
    memo = {id(x): x for x in kept}
    # Uses the current state, because the saved one has the buffers' mean over ranks.
    yield _of_module("model", t.raw_model)
    if t.loss_state is not None:
        yield _of_module("loss", t.loss_state)
    if state.get("loss_object"):
        yield _of_object("loss", t.loss, state["loss_object"], {k: v for k, v in memo.items() if k != id(t.loss)})
    yield _of_optimizer(t, state["optimizer"])
    if t.scheduler is not None:
        yield _of_object("lr_scheduler", t.scheduler, state["scheduler"], memo)
    for name, callback in t.callbacks.items():
        if name in state["callbacks"]:
            yield _of_object(f"callbacks.{name}", callback, state["callbacks"][name], memo)
    for name, metric in t.val_metrics.objects().items():
        if name in state.get("metric_objects", {}):
            yield _of_object(f"metrics.{name}", metric, state["metric_objects"][name], memo)


# --- objects with state_dict and load_state_dict ---------------------------------------------------------------------


def _of_object(key: str, thing: Any, state: Any, kept: Mapping[int, Any]) -> str | None:
    """Return what is wrong with an object's state; None if it is right, or if the object cannot be copied to try it."""
    who = f"{key} ({type(thing).__name__})"
    if not callable(getattr(thing, "load_state_dict", None)):
        return f"{who} has state_dict() but no load_state_dict(), so its state would be lost; add one, or remove both"
    if _nbytes(state) > _COPIED:
        return None
    try:
        twin = copy.deepcopy(thing, dict(kept))
    except Exception:  # noqa: BLE001  it may hold a lock or an open file
        return None
    try:
        twin.load_state_dict(as_read(state))
        restored = twin.state_dict()
    except Exception as error:  # noqa: BLE001  user code may raise anything
        return f"{who}: load_state_dict() fails on the result of state_dict(): {type(error).__name__}: {error}"
    # A value that changes by itself, such as a clock, is ignored.
    return _changed(who, state, restored, thing.state_dict())


def _of_optimizer(t: Components, state: Mapping[str, Any]) -> str | None:
    who = f"optimizer ({type(t.optimizer).__name__})"
    if _nbytes(state) > _COPIED:
        return None
    try:
        twin = _twin(t.optimizer, {id(p): p for p in t.system.parameters()})
    except Exception:  # noqa: BLE001  as above
        return None
    try:
        restore_optimizer_state(twin, t.system, as_read(state))
        restored = named_optimizer_state(twin, t.system)
    except Exception as error:  # noqa: BLE001  as above
        return f"{who}: load_state_dict() fails on what state_dict() gave: {type(error).__name__}: {error}"
    return _changed(who, state, restored, named_optimizer_state(t.optimizer, t.system))


def _twin(optimizer: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an optimizer over the same parameters, with all attributes, some of which torch's copy omits."""
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer) and id(value) not in memo:
            _twin(value, memo)
    twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(optimizer).items()})
    return twin


def _changed(who: str, before: Any, restored: Any, again: Any) -> str | None:
    path = _difference(before, restored, again)
    if path is None:
        return None
    return f"{who}: load_state_dict() does not restore {path or 'its state'} as state_dict() gave it"


def _difference(before: Any, restored: Any, again: Any, path: str = "") -> str | None:
    """Return the path at which `restored` differs from `before` although `again` does not; None if there is none."""
    if isinstance(before, Mapping) and isinstance(again, Mapping):
        for key in before.keys() & again.keys():
            below = f"{path}.{key}".lstrip(".")
            if not isinstance(restored, Mapping) or key not in restored:
                return below
            if (path_below := _difference(before[key], restored[key], again[key], below)) is not None:
                return path_below
        return None
    if isinstance(before, list | tuple) and isinstance(again, list | tuple) and len(before) == len(again):
        if not isinstance(restored, list | tuple) or len(restored) != len(before):
            return path
        triples = enumerate(zip(before, restored, again, strict=True))
        return next((d for i, three in triples if (d := _difference(*three, f"{path}.{i}")) is not None), None)
    return path if _same(before, again) and not _same(before, restored) else None


def _same(a: Any, b: Any) -> bool:
    try:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return _equal(a, b)
        if hasattr(a, "dtype") and hasattr(a, "shape"):  # a NumPy value
            return bool(a.dtype == b.dtype and a.shape == b.shape and ((a == b) | ((a != a) & (b != b))).all())
        return bool(a == b or (a != a and b != b))
    except Exception:  # noqa: BLE001  values that cannot be compared count as equal
        return True


def _equal(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors, or this rank's parts of sharded ones. NaN equals NaN."""
    if a is b:
        return True
    with torch.no_grad():
        a, b = parallel.local_parts([a, b])
        if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
            return a.is_meta or b.is_meta
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.device == b.device:
            return True
        b = b.to(a.device)
        return bool(((a == b) | ((a != a) & (b != b))).all())


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return sum(part.nbytes for part in parallel.local_parts([value]))
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_nbytes, value))
    return getattr(value, "nbytes", 0) if hasattr(value, "dtype") else 0


# --- modules ----------------------------------------------------------------------------------------------------------


def _of_module(key: str, module: nn.Module) -> str | None:
    """Return what is wrong with a module's state dict; None if nothing is."""
    if loads_by_name(module):
        return None  # its state dict holds the parameters and buffers themselves, and load_state_dict copies them
    who = f"{key} ({type(module).__name__})"
    small = _nbytes([*module.parameters(), *module.buffers()]) <= _COPIED
    twin = None if is_sharded(module) else _copied(module, whole=small)
    compared = twin if small else None  # a copy to compare after loading; else each value is compared as it is loaded
    read, lost = as_read(module.state_dict()), list[str]()
    handles = [] if compared is not None else _watch(module, twin or module, lost)
    if compared is not None:
        _spoil(compared)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that copying to the meta device copies nothing
            result = (twin or module).load_state_dict(read)
    except Exception as error:  # noqa: BLE001  a user's hook may raise anything
        if twin is not None and not small and "meta" in str(error).lower():
            return None  # a hook reads values, which this copy lacks
        reason = " ".join(str(error).split())
        return f"{who}: load_state_dict() fails on the result of state_dict(): {type(error).__name__}: {reason}"
    finally:
        for handle in handles:
            handle.remove()
    if compared is not None:
        lost += _unlike(module, compared)
    lost += sorted(_skipped(module, result) - set(lost))
    if not lost:
        return None
    rest = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return f"{who}: load_state_dict() does not restore {lost[0]}{rest} to the value that state_dict() was taken of"


def _skipped(module: nn.Module, result: Any) -> set[str]:
    """Return the trained parameters that a `load_state_dict` with `strict=False` of its own did not find."""
    missing = set(getattr(result, "missing_keys", None) or ())
    return missing & {name for name, p in module.named_parameters() if p.requires_grad}


def _copied(module: nn.Module, *, whole: bool) -> nn.Module | None:
    """Return a copy with values, or on the meta device; None if it cannot be copied."""
    memo: dict[int, Any] = {}
    if not whole:
        for tensor in (*module.parameters(), *module.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # noqa: BLE001  it may hold a lock or a tensor with a history
        return None


@torch.no_grad()
def _spoil(module: nn.Module) -> None:
    """Change all trained values, so that a value that load_state_dict skips is noticed."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.copy_((parameter == 0).to(parameter.dtype))


def _unlike(module: nn.Module, twin: nn.Module) -> list[str]:
    theirs = dict([*twin.named_parameters(), *twin.named_buffers()])
    own = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in own if name in theirs and not _equal(tensor, theirs[name])]


def _watch(module: nn.Module, loaded: nn.Module, lost: list[str]) -> list[Any]:
    """Compare each value that `loaded` is about to load with `module`'s. One module for both keeps its own values."""
    parts = dict(module.named_modules())

    def compare(own: nn.Module) -> Any:
        def hook(state: dict[str, Any], prefix: str, *_: Any) -> None:
            for name, tensor in (*own._parameters.items(), *own._buffers.items()):
                value = state.get(prefix + name)
                if tensor is None or not isinstance(value, Tensor) or value.shape != tensor.shape:
                    continue  # load_state_dict reports it itself
                if not _equal(tensor.detach(), placed_as(tensor, value).to(tensor.dtype)):
                    lost.append(prefix + name)
                if loaded is module:
                    state[prefix + name] = tensor.detach()

        return hook

    return [part._register_load_state_dict_pre_hook(compare(parts[name])) for name, part in loaded.named_modules()]
