"""Overrides of mappings with numeric keys, such as class weights: `loss.weights.1=9.0` sets the entry 1, not '1'.

Hydra reads each part of a key as text. An override that means a number is rewritten as a mapping,
`loss.weights={1:9.0}`, which Hydra merges into the existing one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config.hydra_internals import has_entries

_POSSIBLE_NUMBER_KEY = re.compile(r"(\+{0,2})([A-Za-z_][\w./@-]*\.(?:-?\d+|true|false)(?:\.[\w.-]+)?)=(.*)", re.DOTALL)


def rewritten(overrides: Sequence[str], composed: Callable[[], DictConfig]) -> list[str]:
    """Return the overrides, with those rewritten as mappings whose key means a number or a truth value.

    Args:
        overrides: The overrides of the command line.
        composed: Returns the config without values. It is called only if an override may need it.
    """
    if not any(_POSSIBLE_NUMBER_KEY.fullmatch(o) for o in overrides):
        return list(overrides)
    cfg = composed()
    return [_written(override, cfg) for override in overrides]


def nested(cfg: DictConfig, name: str, value: Any) -> tuple[str, Any]:
    """Return a key and value for `OmegaConf.update`: the key up to the first part that is not text, then a mapping."""
    parts = _keys_of(cfg, name, new=True)
    first = next((i for i, part in enumerate(parts) if not isinstance(part, str)), None)
    if first is None:
        return name, value
    for part in reversed(parts[first:]):
        value = {part: value}
    return ".".join(str(part) for part in parts[:first]), value


def _keys_of(cfg: DictConfig, name: str, *, new: bool) -> list[Any]:
    """Return the parts of a key, typed as in the config. With `new`, a new key among whole numbers is a number."""
    parts: list[Any] = []
    node: Any = cfg
    for part in name.split("."):
        key: Any = part
        if isinstance(node, DictConfig) and has_entries(node):
            others = [k for k in node if not isinstance(k, str)]
            if part not in node and others:
                key = next((k for k in others if str(k).lower() == part), part)
                if new and key is part and re.fullmatch(r"-?\d+", part) and all(type(k) is int for k in node):
                    key = int(part)
            try:
                node = node.get(key)
            except OmegaConfBaseException:  # a reference that cannot be resolved here
                node = None
        else:
            node = None
        parts.append(key)
    return parts


def _written(override: str, cfg: DictConfig) -> str:
    match = _POSSIBLE_NUMBER_KEY.fullmatch(override)
    if match is None:
        return override
    sign, name, text = match.groups()
    parts = _keys_of(cfg, name, new=bool(sign))
    first = next((i for i, part in enumerate(parts) if not isinstance(part, str)), None)
    if first is None:
        return override
    head, tail = "{" + "".join(f"{_literal(part)}:{{" for part in parts[first:-1]), "}" * (len(parts) - first)
    wrapped = (f"{head}{_literal(parts[-1])}:{value}{tail}" for value in _values(override, text))
    return f"{sign}{'.'.join(parts[:first])}={','.join(wrapped)}"


def _values(override: str, text: str) -> list[str]:
    """Return the value of an override, or each value of a sweep over a list."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
        if parsed.is_sweep_override() and parsed.is_discrete_sweep():
            return list(parsed.sweep_string_iterator())
    except HydraException:  # reported when the config is composed
        pass
    return [text]


def _literal(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)
