"""Fix the values of a composed config that another process would resolve differently: times and relative paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


def _leaves(node: DictConfig | ListConfig) -> Iterator[tuple[DictConfig | ListConfig, Any]]:
    """Yield each value that is not a section, as the section and the name in it. Nothing is resolved."""
    names: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
    for name in names:
        raw = node._get_node(name)
        if isinstance(raw, DictConfig | ListConfig) and not (
            raw._is_none() or raw._is_interpolation() or raw._is_missing()
        ):
            yield from _leaves(raw)
        else:
            yield node, name


def failing_key(cfg: DictConfig) -> str | None:
    """Return the first key that cannot be resolved, because OmegaConf's error does not name it."""
    for node, name in _leaves(cfg):
        try:
            node[name]
        except OmegaConfBaseException:
            return str(node._get_full_key(name))
    return None


def fix_times(cfg: DictConfig) -> None:
    """Resolve `${now:…}` and `${hydra:…}`, which another process would resolve differently or not at all."""
    for node, name in list(_leaves(cfg)):
        if OmegaConf.is_interpolation(node, name):
            # Resolve only those parts: `${oc.env:TOKEN}-${now:%Y}` must not put the token into the logged text.
            written = str(node._get_node(name)._value())  # type: ignore[union-attr]
            fixed = re.sub(r"\$\{(?:now|hydra):[^{}]*\}", lambda m: str(OmegaConf.create({"x": m[0]}).x), written)
            if fixed != written:
                node[name] = fixed


def make_absolute(cfg: DictConfig) -> None:
    """Make paths absolute that are relative to the launching directory, because a worker runs in another directory."""
    for name in ("storage_path", "init_from", "init_from.source"):
        value = OmegaConf.select(cfg, name) if "." not in name or isinstance(cfg.get("init_from"), DictConfig) else None
        if isinstance(value, str) and "://" not in value:
            path = Path(value).expanduser()
            # `init_from` may also be the name of a run, so it is a path only if the file exists.
            if str(path.absolute()) != value and (name == "storage_path" or path.exists()):
                OmegaConf.update(cfg, name, str(path.absolute()))
