"""Fix the values of a composed config that another process would resolve differently: times and relative paths."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raytrainer.config import hydra_internals


def failing_key(cfg: DictConfig) -> str | None:
    """Return the first key that cannot be resolved, because OmegaConf's error does not name it."""
    for container, name in hydra_internals.leaves(cfg):
        try:
            container[name]
        except OmegaConfBaseException:
            return hydra_internals.full_key(container, name)
    return None


def fix_times(cfg: DictConfig) -> None:
    """Resolve `${now:…}` and `${hydra:…}`, which another process would resolve differently or not at all."""
    for container, name in list(hydra_internals.leaves(cfg)):
        if OmegaConf.is_interpolation(container, name):
            # Resolve only those parts: `${oc.env:TOKEN}-${now:%Y}` must not put the token into the logged text.
            written = hydra_internals.written(container, name)
            fixed = re.sub(r"\$\{(?:now|hydra):[^{}]*\}", lambda m: str(OmegaConf.create({"x": m[0]}).x), written)
            if fixed != written:
                container[name] = fixed


def make_absolute(cfg: DictConfig) -> None:
    """Make paths absolute that are relative to the launching directory, because a worker runs in another directory."""
    for name in ("storage_path", "init_from", "init_from.source"):
        value = OmegaConf.select(cfg, name) if "." not in name or isinstance(cfg.get("init_from"), DictConfig) else None
        if isinstance(value, str) and "://" not in value:
            path = Path(value).expanduser()
            # `init_from` may also be the name of a run, so it is a path only if the file exists.
            if str(path.absolute()) != value and (name == "storage_path" or path.exists()):
                OmegaConf.update(cfg, name, str(path.absolute()))
