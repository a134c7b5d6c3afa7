"""The text of a composition, with which a run is saved and sent: change values in it, and flatten it.

A saved text keeps the modes (`min` or `max`) that were derived for it, because another version may derive others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config import number_keys, resolvers
from raytrainer.config.direction import by_name
from raytrainer.config.schema import Experiment, known_keys
from raytrainer.config.typed import OPEN, defaults, is_below_node, node_keys, unknown_key
from raytrainer.errors import ConfigError


def with_overrides(text: str, overrides: Sequence[str]) -> DictConfig:
    """Return a saved `Composition.text` as a config, with value overrides on top.

    Raises:
        ConfigError: An override is a deletion or a sweep, or names a key that the saved config does not have.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    saved = _saved(text)
    cfg = saved.copy()
    known: list[str] | None = None
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = override.key_or_group
        if override.is_delete():
            raise ConfigError("cannot be deleted here; give it a value", key=name)
        if override.is_sweep_override():
            raise ConfigError("is a sweep; here it must be one value", key=name, value=str(override.value()))
        known = known or [*known_keys(), *node_keys(OmegaConf.to_container(cfg, resolve=False))]
        added = (override.is_add() or override.is_force_add()) and is_below_node(name)
        if name not in known and not added and not name.startswith(tuple(f"{section}." for section in OPEN)):
            raise unknown_key(name, override.value(), known)
        if isinstance(override.value(), dict | list):
            known = None  # the value may add further keys
        OmegaConf.update(cfg, *number_keys.nested(cfg, name, override.value()), force_add=True)
    _forget_modes(cfg, saved)
    return cfg


# Each key that names a metric, and the key that says whether lower or higher values are better.
_MODES = (
    ("checkpoint.monitor", "checkpoint.mode"),
    ("trainer.early_stopping.monitor", "trainer.early_stopping.mode"),
    ("sweep.metric", "sweep.mode"),
)


def _forget_modes(cfg: DictConfig, saved: DictConfig) -> None:
    """Clear a mode that followed from the previous metric if an override has changed the metric."""
    for metric, mode in _MODES:
        before, now = value_of_key(saved, metric), value_of_key(cfg, metric)
        if before == now or before is None or value_of_key(saved, mode) != value_of_key(cfg, mode):
            continue
        if _is_own(cfg, before) or by_name(str(before)) == value_of_key(saved, mode):
            OmegaConf.update(cfg, mode, None)


@functools.lru_cache(maxsize=8)
def _saved(text: str) -> DictConfig:
    resolvers.load_for(text)
    cfg = OmegaConf.merge(OmegaConf.create(defaults()), OmegaConf.create(text))
    assert isinstance(cfg, DictConfig)
    early = "trainer.early_stopping"
    monitor, mode = value_of_key(cfg, f"{early}.monitor"), value_of_key(cfg, f"{early}.mode")
    if monitor is not None and mode is None and not _is_own(cfg, monitor):
        # Saved by a version that used the mode of the checkpoints for every mode that was not set.
        OmegaConf.update(cfg, f"{early}.mode", value_of_key(cfg, "checkpoint.mode"), force_add=True)
    return cfg


def _is_own(cfg: DictConfig, metric: Any) -> bool:
    """Return whether a metric comes from the section `metrics`."""
    return str(metric).rpartition("/")[2] in (value_of_key(cfg, "metrics") or {})


def resolved(text: str) -> str:
    """Return a text with its references resolved on this machine; unchanged if one of them cannot be resolved."""
    try:
        resolvers.load_for(text)
        return str(OmegaConf.create({"x": text}).x)
    except (OmegaConfBaseException, ValueError):
        return text


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """Return a `Composition.text` in which some keys have other values."""
    if not values:
        return text
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    for name, value in values.items():
        OmegaConf.update(cfg, name, value, merge=False, force_add=True)
    return OmegaConf.to_yaml(cfg)


def flattened(text: str) -> dict[str, str]:
    """Return a composition's text as a flat mapping `a.b.c` → value, for tracking. Empty nodes are left out.

    Names become valid for MLflow: `sweep.space.+model.dropout` loses its `+`, and other characters become `_`.
    """
    flat: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                part = re.sub(r"[^\w./: -]", "_", str(name).lstrip("+"))
                walk(child, f"{prefix}.{part}" if prefix else part)
        elif not isinstance(node, dict):
            flat[prefix] = "null" if node is None else str(node).lower() if isinstance(node, bool) else str(node)

    walk(OmegaConf.to_container(OmegaConf.create(text), resolve=False), "")
    return flat


def write_modes(cfg: DictConfig, e: Experiment) -> bool:
    """Write the derived modes into the config, for other versions. Return whether any was missing."""
    early = e.trainer.early_stopping
    modes = {
        "checkpoint.mode": e.checkpoint.mode,
        "trainer.early_stopping.mode": early.mode if early is not None and early.monitor is not None else None,
        "sweep.mode": e.sweep.mode if e.sweep.metric is not None else None,
    }
    missing = {key: mode for key, mode in modes.items() if mode is not None and value_of_key(cfg, key) is None}
    for key, mode in missing.items():
        OmegaConf.update(cfg, key, mode, force_add=True)
    return bool(missing)


def value_of_key(cfg: DictConfig, key: str) -> Any:
    """Return the value of a dotted key; None if it is not set or cannot be resolved."""
    return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
