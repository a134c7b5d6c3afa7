"""Types that a checkpoint can hold besides tensors and JSON types, and how each is written and read without pickle.
A value becomes plain values, and arrays become tensors. The tree of the state (tree.py) then encodes both."""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from typing import Any

import numpy as np
import torch

HELD = (
    "tensors, NumPy arrays and numbers, None, bool, int, float, complex, str, bytes, lists, tuples, sets, deques, dates "
    "and times, and dicts of them"
)
HELD_AS_KEYS = "None, bool, int, float, complex, str, bytes, a date, or a tuple or frozenset of them"

# The only defaultdict factories that can be written. Other factories could not be found again without pickle.
_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "": None,
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set)},
}
_DATES: dict[str, Any] = {kind.__name__: kind for kind in (date, datetime, time)}


Encoded = tuple[str, Any, Any]
"""The `$` key of a type, the content of a value, and what else there is to say of it (None: nothing)."""


def encode(value: Any) -> Encoded | None:
    """Return a value in terms of other values; None if its type is not known here."""
    if isinstance(value, OrderedDict):
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:  # a torch state dict: the metadata tells each module which version wrote its state
            return "$state_dict", dict(value), dict(metadata)
        return ("$ordered", dict(value), None) if type(value) is OrderedDict else None
    if (encoder := _ENCODERS.get(type(value))) is not None:
        return encoder(value)
    if isinstance(value, np.generic) and not isinstance(value, np.float64 | np.object_):
        return "$scalar", _text(value.tobytes()), value.dtype.str
    return None


def decode(kind: str, content: Any, about: Any) -> Any:
    """Return the value that `encode` converted.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: The content does not have the form that `encode` returns.
    """
    return KINDS[kind](content, about)


def _text(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _encode_array(value: np.ndarray[Any, Any]) -> Encoded | None:
    if value.dtype.hasobject or value.dtype.names:
        return None
    try:
        return "$array", torch.from_numpy(np.require(value, requirements=["C", "W"])), None
    except (TypeError, ValueError):  # torch has no dtype for text, dates and other byte orders
        return "$array", _text(value.tobytes()), [value.dtype.str, list(value.shape)]


def _decode_array(content: Any, about: Any) -> Any:
    if isinstance(content, torch.Tensor):
        return content if content.is_meta else content.numpy()  # a tensor on the meta device has no values to convert
    dtype, shape = about
    return np.frombuffer(_bytes(content), dtype=_plain_type(dtype)).reshape(shape).copy()


def _plain_type(dtype: str) -> np.dtype[Any]:
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"an array of {dtype}")
    return kind


def _encode_defaultdict(value: defaultdict[Any, Any]) -> Encoded | None:
    name = next((name for name, factory in _FACTORIES.items() if value.default_factory is factory), None)
    return None if name is None else ("$defaultdict", dict(value), name)


def _decode_state_dict(content: Any, metadata: Any) -> Any:
    state: Any = OrderedDict(content)
    state._metadata = OrderedDict(metadata)
    return state


def _torch_type(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is not a dtype")
    return dtype


_ENCODERS: dict[type, Callable[[Any], Encoded | None]] = {
    bytes: lambda v: ("$bytes", _text(v), None),
    bytearray: lambda v: ("$bytearray", _text(v), None),
    complex: lambda v: ("$complex", [v.real, v.imag], None),
    set: lambda v: ("$set", list(v), None),
    frozenset: lambda v: ("$frozenset", list(v), None),
    deque: lambda v: ("$deque", list(v), v.maxlen),
    Counter: lambda v: ("$counter", dict(v), None),
    defaultdict: _encode_defaultdict,
    np.ndarray: _encode_array,
    torch.Size: lambda v: ("$size", list(v), None),
    torch.dtype: lambda v: ("$dtype", str(v).removeprefix("torch."), None),
    torch.device: lambda v: ("$device", str(v), None),
    timedelta: lambda v: ("$timedelta", [v.days, v.seconds, v.microseconds], None),
    **{kind: lambda v: ("$date", v.isoformat(), type(v).__name__) for kind in _DATES.values()},
}

KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "$state_dict": _decode_state_dict,
    "$ordered": lambda c, _: OrderedDict(c),
    "$scalar": lambda c, dtype: np.frombuffer(_bytes(c), dtype=_plain_type(dtype))[0],
    "$bytes": lambda c, _: _bytes(c),
    "$bytearray": lambda c, _: bytearray(_bytes(c)),
    "$complex": lambda c, _: complex(*c),
    "$set": lambda c, _: set(c),
    "$frozenset": lambda c, _: frozenset(c),
    "$deque": deque,
    "$counter": lambda c, _: Counter(c),
    "$defaultdict": lambda c, name: defaultdict(_FACTORIES[name], c),
    "$array": _decode_array,
    "$size": lambda c, _: torch.Size(c),
    "$dtype": lambda c, _: _torch_type(c),
    "$device": lambda c, _: torch.device(c),
    "$timedelta": lambda c, _: timedelta(*c),
    "$date": lambda c, kind: _DATES[kind].fromisoformat(c),
}
"""`$` key of a type → the function that makes a value from its content, and from what `Encoded` says besides."""
