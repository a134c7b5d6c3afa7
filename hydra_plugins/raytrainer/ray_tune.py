"""`hydra/sweeper=ray_tune`: Hydra's multirun as a Ray Tune search, for raytrainer's experiments and any application."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from raytrainer.core import streams
from raytrainer.errors import ConfigError, RaytrainerError, Stopped
from raytrainer.sweep.settings import KEY, Settings

# Plain values, because Hydra executes this module outside sys.modules, where dataclasses cannot resolve annotations.
DEFAULTS: Mapping[str, Any] = asdict(Settings())
_HYDRAS = {"_target_": "hydra_plugins.raytrainer.ray_tune.RayTuneSweeper", "_recursive_": False, "_convert_": "all"}
# The names of settings in an experiment of raytrainer.
_IN_EXPERIMENTS = {
    "direction": "sweep.mode",
    "params": "sweep.space",
    "resources_per_trial": "scaling.resources_per_worker",
    "address": "cluster.address",
    "resume": "python -m raytrainer resume ID",
}


class RayTuneSweeper(Sweeper):
    """Runs the jobs of `-m` as the trials of a sweep.

    Args:
        settings: `hydra.sweeper`, with the fields of `raytrainer.sweep.settings.Settings`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> Any:
        # An application that defines trials itself has an attribute `sweep` on its task function.
        own = getattr(self._task, "sweep", None)
        if own is not None:
            self._refuse_settings()
            return own(arguments, self._config)
        try:
            return self._search(arguments)
        except Stopped as stopped:
            streams.write(sys.stderr, f"stopped: {stopped}\n")
            raise SystemExit(stopped.exit_code) from None
        except RaytrainerError as error:
            raise CompactHydraException(str(error)) from error  # Hydra prints it without a traceback

    def _refuse_settings(self) -> None:
        for name, value in self._settings.items():
            if name not in DEFAULTS or value != DEFAULTS[name]:
                here = _IN_EXPERIMENTS.get(name, f"sweep.{name}")
                raise ConfigError(
                    f"is for other applications; an experiment's is {here}", key=f"{KEY}.{name}", value=value
                )

    def _search(self, arguments: list[str]) -> Any:
        from hydra_plugins.raytrainer import _jobs as jobs
        from raytrainer.config import written_space
        from raytrainer.config.hydra_internals import BASIC_LAUNCHER
        from raytrainer.sweep import application

        launcher = OmegaConf.select(self._config, "hydra.launcher._target_")
        if launcher != BASIC_LAUNCHER:
            raise ConfigError(
                "has no use with hydra/sweeper=ray_tune, whose trials are processes of Ray; leave it out",
                key="hydra/launcher",
                value=OmegaConf.select(self._config, "hydra.runtime.choices.hydra/launcher") or launcher,
            )
        application_jobs = jobs.HydraJobs.of(self._task, self._context, self._config)
        params = self._settings.get("params")
        if isinstance(params, dict):  # instantiating it has resolved interpolations, including secrets
            params = written_space(self._config, f"{KEY}.params")
        fixed, space = jobs.split(params, arguments) if isinstance(params, dict) else ([], {})
        ended = application.search(
            application_jobs,
            self._settings,
            [*fixed, *arguments],
            space=space,
            groups=application_jobs.is_group,
            folder=jobs.folder_of(self._config),
            subfolder=application_jobs.subfolder,
            config=OmegaConf.to_yaml(self._config),
            verbose=self._config.hydra.verbose is True,
        )
        streams.write(sys.stdout, ended.text + "\n")
        if ended.exit_code > 1:
            raise SystemExit(ended.exit_code)
        if ended.cause is not None:
            raise CompactHydraException(ended.cause)
        return ended.results


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="ray_tune",
    # Not a struct, so that an unknown setting reaches us, and the error lists the valid ones.
    node=OmegaConf.create({**_HYDRAS, **DEFAULTS}, flags={"struct": False}),
    provider="raytrainer",
)
