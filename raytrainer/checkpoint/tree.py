"""A nested state as JSON, with its tensors taken out under names, and back again, exactly.
Tuples, non-string keys and non-finite floats, which JSON lacks, are written as objects with one `$` key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raytrainer.errors import CheckpointCorrupt, CheckpointError

TensorReader = Callable[[str, str, tuple[int, ...], Any], torch.Tensor]
"""(name, dtype, shape, the template's leaf or None) -> the tensor to put there."""

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def flatten(state: Mapping[str, Any]) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The JSON text of `state` and its tensors by name: the path of keys, joined by `/` (RFC 6901's escapes).

    CheckpointError names the path of a value that is neither a tensor nor JSON: None, bool, int, float, str, and lists,
    tuples and dicts (keys: str or int) of them.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, (), tensors)
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode(), tensors


def restore(data: bytes, read: TensorReader, template: Any = None) -> dict[str, Any]:
    """The state that `flatten` wrote; `read` supplies each tensor. CheckpointCorrupt where it is not of that form."""
    try:
        state = _decode(json.loads(data), read, template)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointCorrupt(f"not a state: {type(exc).__name__}: {exc}") from exc
    if not isinstance(state, dict):
        raise CheckpointCorrupt(f"not a state: {type(state).__name__} instead of a dict")
    return state


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _encode(value: Any, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)
        if name in tensors or name in ("", "__metadata__"):
            raise CheckpointError(f"two tensors of the state are called {name!r}, or the name is not allowed")
        tensors[name] = value
        return {"$tensor": name, "dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"the state's key {key!r} at {_shown(path)} is a {type(key).__name__}: str or int"
                )
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
        return {"$items": [[key, _encode(item, (*path, key), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, (*path, i), tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"the state at {_shown(path)} is a {kind}: a checkpoint holds tensors, and None, bool, int, float, str, list, "
        "tuple and dict"
    )


def _decode(node: Any, read: TensorReader, template: Any) -> Any:
    if isinstance(node, list):
        return [_decode(item, read, _below(template, i)) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        shape = tuple(node["shape"])
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"the shape {shape} of {node['$tensor']!r}")
        return read(str(node["$tensor"]), str(node["dtype"]), shape, template)
    if "$items" in node:
        return {key: _decode(item, read, _below(template, key)) for key, item in node["$items"]}
    if "$tuple" in node:
        return tuple(_decode(item, read, _below(template, i)) for i, item in enumerate(node["$tuple"]))
    if "$float" in node:
        return _FLOATS[node["$float"]]
    return {key: _decode(item, read, _below(template, key)) for key, item in node.items()}


def _below(template: Any, key: Any) -> Any:
    if callable(template):
        return template
    if isinstance(template, Mapping):
        return template.get(key)
    if isinstance(template, list | tuple) and isinstance(key, int) and key < len(template):
        return template[key]
    return None


def _shown(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path)) or "its top"
