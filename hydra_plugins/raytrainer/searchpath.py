"""Lets any Hydra application compose our configs: `model: resnet18` in its own defaults, without a word about where."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

CONFIGS = "pkg://raytrainer.configs"


class RaytrainerSearchPath(SearchPathPlugin):
    """Appends our configs, so that a config of the application with the same name wins."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if all(element.path != CONFIGS for element in search_path.get_path()):
            search_path.append(provider="raytrainer", path=CONFIGS)
