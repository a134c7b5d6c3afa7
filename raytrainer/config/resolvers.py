"""The user's own resolvers `${NAME:…}`, which Hydra plugins register, in every process that resolves a config.

Hydra imports every module below `hydra_plugins` when it composes. A worker resolves a composed text without Hydra, so
this module imports the same plugins first.
"""

from __future__ import annotations

import re

from omegaconf import DictConfig, OmegaConf

from raytrainer.errors import ConfigError

_NAME = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:")
_HYDRA_RESOLVERS = frozenset({"now", "hydra", "python_version"})


def load_for(text: str) -> None:
    """Import the modules of `hydra_plugins` if a text uses a resolver that is not registered in this process.

    Raises:
        ConfigError: One of the modules raised an error while it was imported.
    """
    if all(OmegaConf.has_resolver(name) for name in _custom_resolvers(text)):
        return
    from hydra.core.plugins import Plugins

    from raytrainer.config.nodes import plain_argv

    try:
        with plain_argv():
            Plugins.instance()
    except Exception as error:
        raise ConfigError(
            f"a module below hydra_plugins, which registers resolvers, cannot be imported: {type(error).__name__}: {error}"
        ) from error


def check_same(cfg: DictConfig, text: str) -> None:
    """Refuse a custom resolver that returns a different value each time, because every process resolves for itself.

    Args:
        cfg: The composed config.
        text: The same config as YAML.

    Raises:
        ConfigError: A value differs; the message names the first such key.
    """
    if not _custom_resolvers(text):
        return
    values = []
    for _ in range(2):
        OmegaConf.clear_cache(cfg)
        values.append(OmegaConf.to_container(cfg, resolve=True))
    if key := _different(values[0], values[1], ""):
        raise ConfigError(
            "has another value each time it is resolved, and every worker resolves it for itself: a resolver must give the "
            "same value for the same arguments; put one value into the config or on the command line",
            key=key,
        )


def _custom_resolvers(text: str) -> set[str]:
    return {name for name in _NAME.findall(text) if not name.startswith("oc.")} - _HYDRA_RESOLVERS


def _different(a: object, b: object, path: str) -> str | None:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        keys = (_different(a[name], b[name], f"{path}.{name}" if path else str(name)) for name in a)
        return next((key for key in keys if key is not None), None)
    return None if repr(a) == repr(b) else path
