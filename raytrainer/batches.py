"""The tensors of a batch in any container: one traversal that moves, casts, pins or finds them.

A batch is what a dataset or `data.collate_fn` returns, so its type is the user's. `torch.utils._pytree` is not used,
because it treats a `UserDict` or a dataclass as a leaf unless each class is first registered for the whole process.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raytrainer.errors import ConfigError

Change = Callable[[Tensor], Tensor]

_VALUES = frozenset({type(None), bool, int, float, complex, str, bytes})  # the most frequent types, never containers
# Code, not data: its attributes are not part of the batch. A dataset may hold gigabytes.
_CODE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    nn.Module,
    Dataset,
    DataLoader,
    torch.Generator,
    torch.device,
    torch.dtype,
)


def map_tensors(data: Any, change: Change) -> Any:
    """Return the same structure with `change` applied to each tensor. Containers are copied and keep their types.

    Args:
        data: Dicts, lists, tuples, named tuples, any other mapping, dataclasses and other objects, in any nesting; an
            object's tensors are those in its attributes. Everything else is unchanged.
        change: Called once for each tensor, even if the batch refers to it several times.

    Raises:
        ConfigError: An object holds tensors and cannot be copied.
    """
    return _Walk(change)(data)


def as_tensors(data: Any) -> Any:
    """Return the same structure with numeric numpy arrays as tensors that share their memory."""
    return _Walk(lambda tensor: tensor, arrays=True)(data)


def cast(data: Any, dtype: torch.dtype) -> Any:
    """Return the same structure with floating-point tensors in `dtype`."""
    return map_tensors(data, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def move(data: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Return the same structure on `device`. An object with `to(device)` moves itself.

    Raises:
        ConfigError: An object holds tensors and cannot be moved.
    """

    def itself(value: Any) -> Any:
        return _moved_by_itself(value, device, non_blocking)

    return _Walk(lambda tensor: tensor.to(device, non_blocking=non_blocking), itself)(data)


def pin(data: Any) -> Any:
    """Return the same structure in pinned host memory if possible. An object with `pin_memory()` pins itself."""

    def itself(value: Any) -> Any:
        pinned = value.pin_memory() if callable(getattr(value, "pin_memory", None)) else None
        return value if pinned is None else pinned

    def pinned(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if is_dense(tensor) and tensor.device.type == "cpu" else tensor

    return _Walk(pinned, itself)(data)


def is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is one block of memory: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def tensors(data: Any) -> Iterator[Tensor]:
    """Yield each tensor of a batch, once."""
    return (part for part in parts(data) if isinstance(part, Tensor))


def parts(data: Any) -> Iterator[Any]:
    """Yield each object of a batch, once: containers, tensors, and the attributes of other objects."""
    yield from _parts(data, {})


def moves_itself(value: Any) -> bool:
    """Return whether an object has its own `to(device)`, as a graph or a packed sequence has."""
    return not isinstance(value, Tensor | Mapping | type) and callable(getattr(value, "to", None))


def _parts(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    if type(value) in _VALUES or isinstance(value, _CODE) or id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that no other object gets its id
    yield value
    if isinstance(value, Tensor | np.ndarray):
        return
    if isinstance(value, Mapping):
        for key in value:
            yield from _parts(value[key], seen)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        for item in value:
            yield from _parts(item, seen)
    for item in _attributes(value).values():
        yield from _parts(item, seen)


def _attributes(value: Any) -> dict[str, Any]:
    """Return the contents of an object's `__dict__` and slots, by name."""
    attributes: dict[str, Any] = dict(getattr(value, "__dict__", None) or {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if private else slot
            if slot not in ("__dict__", "__weakref__") and hasattr(value, name):
                attributes[name] = getattr(value, name)
    return attributes


class _Walk:
    """One pass over a batch.

    Args:
        change: As in `map_tensors`.
        itself: Converts an object that has `to(device)` as a whole; None: its tensors are changed one by one.
        arrays: Whether numeric numpy arrays become tensors.
    """

    def __init__(self, change: Change, itself: Callable[[Any], Any] | None = None, *, arrays: bool = False) -> None:
        self._change, self._itself, self._arrays = change, itself, arrays
        self._done: dict[int, tuple[Any, Any]] = {}  # with each original, so that no other object gets its id

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _VALUES:
            return value
        if (done := self._done.get(id(value))) is not None:
            return done[1]
        if isinstance(value, Tensor):
            return self._keep(value, self._change(value))
        if kind is dict:
            new: Any = self._keep(value, {})
            for key, item in value.items():
                new[key] = self(item)
            return new
        if kind is list:
            new = self._keep(value, [])
            new.extend(map(self, value))
            return new
        if isinstance(value, np.ndarray):
            return self._keep(value, _as_tensor(value)) if self._arrays else value
        if isinstance(value, _CODE):
            return value
        return self._other(value)

    def _keep(self, value: Any, new: Any) -> Any:
        # Stored before its parts are visited, because one of them may refer to it.
        self._done[id(value)] = (value, new)
        return new

    def _other(self, value: Any) -> Any:
        if self._itself is not None and moves_itself(value):
            return self._keep(value, self._itself(value))
        if isinstance(value, tuple):
            return self._keep(value, self._tuple(value))
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list | deque):
            new = self._keep(value, _copied(value))
            items = [self(item) for item in value]
            new.clear()
            new.extend(items)
            return self._with_attributes(value, new)
        if isinstance(value, set | frozenset):
            return self._keep(value, _made(type(value), [self(item) for item in value]))
        if self._arrays:
            # Only arrays in declared data become tensors; other objects may use theirs as arrays.
            if not any(hasattr(type(value), name) for name in ("__dataclass_fields__", "__attrs_attrs__")):
                return value
        elif next(tensors(value), None) is None:
            return value
        apply = getattr(value, "apply", None)
        if callable(apply) and moves_itself(value):  # torch_geometric, tensordict: in place, or a new one
            new = _copied(value)
            applied = new.apply(self)
            return self._keep(value, new if applied is None else applied)
        return self._with_attributes(value, self._keep(value, _copied(value)))

    def _tuple(self, value: Any) -> Any:
        items = [self(item) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value  # also a torch.Size, and any other tuple of plain values
        return type(value)._make(items) if hasattr(value, "_make") else _made(type(value), items)

    def _mapping(self, value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return self._keep(value, _made(type(value), {key: self(value[key]) for key in value}))
        new = self._keep(value, _copied(value))
        for key in list(value):
            new[key] = self(value[key])
        return self._with_attributes(value, new)

    def _with_attributes(self, value: Any, new: Any) -> Any:
        for name, item in _attributes(value).items():
            changed = self(item)
            if changed is not item:
                try:
                    object.__setattr__(new, name, changed)  # a frozen dataclass refuses its own setattr
                except (AttributeError, TypeError) as error:
                    raise _unmovable(value, f"its attribute {name!r} cannot be set ({error})") from error
        return new


def _as_tensor(value: np.ndarray[Any, Any]) -> Any:
    if value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def _copied(value: Any) -> Any:
    try:
        return copy.copy(value)
    except Exception as error:
        raise _unmovable(value, f"it cannot be copied ({type(error).__name__}: {error})") from error


def _made(kind: Any, items: Iterable[Any]) -> Any:
    try:
        return kind(items)
    except Exception as error:
        reason = f"{kind.__name__}(…) with the changed tensors raises {type(error).__name__}: {error}"
        raise _unmovable(kind, reason) from error


def _moved_by_itself(value: Any, device: torch.device, non_blocking: bool) -> Any:
    try:
        # Some move in place and return nothing, which must not move the caller's own object.
        own = copy.copy(value)
    except Exception:  # noqa: BLE001  an object that cannot be copied can still move
        own = value
    try:
        try:
            moved = own.to(device, non_blocking=non_blocking) if non_blocking else own.to(device)
        except TypeError:
            if not non_blocking:
                raise
            moved = own.to(device)
    except Exception as error:
        if next(tensors(value), None) is None:  # a `to` with another meaning, e.g. of a date to a time zone
            return value
        raise _unmovable(value, f"its to({device}) raises {type(error).__name__}: {error}") from error
    return own if moved is None else moved


def _unmovable(value: Any, reason: str) -> ConfigError:
    kind = value if isinstance(value, type) else type(value)
    return ConfigError(
        f"A batch holds a {kind.__module__}.{kind.__qualname__}, whose tensors cannot be moved or cast: {reason}. Return "
        "a dict, list, tuple or dataclass from data.collate_fn, or give the class a method to(device) that returns "
        "the moved object"
    )
