"""Convert a nested state to JSON with its tensors extracted by name, and restore it exactly.
Tuples, non-string keys, non-finite floats and other types that JSON lacks (values.py) become objects with a `$` key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raytrainer.checkpoint import values
from raytrainer.errors import CheckpointCorrupt, CheckpointError

TensorReader = Callable[[str, str, tuple[int, ...], Any], torch.Tensor]
"""(name, dtype, shape, the template's leaf or None) -> the tensor to put there."""

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def flatten(state: Mapping[str, Any]) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return the JSON text of `state`, and its tensors by name.

    A name is the path of keys, joined by `/` with the escapes of RFC 6901.

    Raises:
        CheckpointError: A value is neither a tensor, nor JSON, nor one of the types in values.py. The message has its
            path.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, (), tensors)
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode(), tensors


def restore(data: bytes, read: TensorReader, template: Any = None) -> dict[str, Any]:
    """Return the state that `flatten` wrote; `read` supplies each tensor.

    Raises:
        CheckpointCorrupt: The data does not have this form.
    """
    try:
        state = _decode(json.loads(data), read, template)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as exc:
        raise CheckpointCorrupt(f"not a state: {type(exc).__name__}: {exc}") from exc
    if not isinstance(state, dict):
        raise CheckpointCorrupt(f"not a state: {type(state).__name__} instead of a dict")
    return state


def as_read(state: Any) -> Any:
    """Return a state as it would be read back from a checkpoint, with the same tensors."""
    text, tensors = flatten({"": state})
    return restore(text, lambda name, *_: tensors[name])[""]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _encode(value: Any, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return _named(value, path, tensors)
    if value is None or type(value) in (bool, int, str):
        return value
    if (known := values.encode(value)) is not None:
        kind, content, about = known
        # Keep the path, so that a state dict's tensors have the same names whatever kind of dict it is.
        node = {kind: _encode(content, path, tensors)}
        return node if about is None else {**node, "of": _encode(about, (*path, "of"), tensors)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if isinstance(value, list | tuple):
        items = [_encode(item, (*path, i), tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float):  # includes NumPy's float64
        number = float(value)
        return number if math.isfinite(number) else {"$float": repr(number)}
    raise CheckpointError(
        f"the state at {_shown(path)} is {_kind(value)}, which a checkpoint cannot hold. It holds {values.HELD}; "
        "let state_dict() return those."
    )


def _encode_mapping(value: Mapping[Any, Any], path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> Any:
    items = {key: _encode(item, (*path, key), tensors) for key, item in value.items()}
    if all(type(key) is str and not key.startswith("$") for key in value):
        return items
    return {"$items": [[_key(key, path), item] for key, item in items.items()]}


def _named(value: torch.Tensor, path: tuple[Any, ...], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    name = "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in path)
    if name in ("", "__metadata__"):
        raise CheckpointError(f"a tensor of the state may not be called {name!r}; rename its key")
    # Keys of different types may have the same text, such as 1 and "1". No path contains "~~" itself, because "~" is
    # escaped.
    path_name, number = name, 2
    while name in tensors:
        name, number = f"{path_name}~~{number}", number + 1
    tensors[name] = value
    return {"$tensor": name, "dtype": dtype_name(value.dtype), "shape": list(value.shape)}


def _key(key: Any, path: tuple[Any, ...]) -> Any:
    inside: dict[str, torch.Tensor] = {}
    try:
        node = _encode(key, (*path, key), inside)
    except CheckpointError:
        inside = {"": torch.empty(0)}
    if inside:
        raise CheckpointError(
            f"the state at {_shown(path)} has the key {key!r}, which is {_kind(key)}. A checkpoint holds keys that are "
            f"{values.HELD_AS_KEYS}."
        )
    return node


def _kind(value: Any) -> str:
    dtype = f" of dtype {value.dtype}" if type(value).__name__ == "ndarray" else ""
    return f"a {type(value).__module__}.{type(value).__qualname__}{dtype}"


def _decode(node: Any, read: TensorReader, template: Any) -> Any:
    if isinstance(node, list):
        return [_decode(item, read, _below(template, i)) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return _decode_tensor(node, read, template)
    if "$items" in node:
        pairs = [(_decode(key, read, None), item) for key, item in node["$items"]]
        return {key: _decode(item, read, _below(template, key)) for key, item in pairs}
    if "$tuple" in node:
        return tuple(_decode(item, read, _below(template, i)) for i, item in enumerate(node["$tuple"]))
    if "$float" in node:
        return _FLOATS[node["$float"]]
    if (kind := next(iter(node), "")) in values.KINDS:
        about = _decode(node["of"], read, None) if "of" in node else None
        return values.decode(kind, _decode(node[kind], read, template), about)
    return {key: _decode(item, read, _below(template, key)) for key, item in node.items()}


def _decode_tensor(node: dict[str, Any], read: TensorReader, template: Any) -> torch.Tensor:
    shape = tuple(node["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"the shape {shape} of {node['$tensor']!r}")
    return read(str(node["$tensor"]), str(node["dtype"]), shape, template)


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
