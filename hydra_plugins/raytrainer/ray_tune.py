"""`hydra/sweeper=ray_tune`: Hydra's multirun as a search by Ray Tune, for raytrainer's experiments and any application's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


# Plain values: Hydra executes this module outside of sys.modules, where dataclasses cannot look up annotations.
SETTINGS = {"_target_": "hydra_plugins.raytrainer.ray_tune.RayTuneSweeper"}


class RayTuneSweeper(Sweeper):
    """Runs what `-m` gives as the trials of a sweep."""

    def __init__(self) -> None:
        self._task: TaskFunction | None = None
        self._config: DictConfig | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._task, self._config = task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        # An application that has its own idea of a trial says so by an attribute of its task function.
        own: Callable[[list[str], Any], Any] = self._task.sweep  # type: ignore[union-attr]
        return own(arguments, self._config)


ConfigStore.instance().store(group="hydra/sweeper", name="ray_tune", node=SETTINGS, provider="raytrainer")
