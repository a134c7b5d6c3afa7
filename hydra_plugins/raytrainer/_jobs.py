"""A Hydra application's task function as jobs of a sweep: composed and run in any process, as by Hydra's launchers.
Hydra does not import a plugin module whose name begins with `_` before it is used.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus, run_job, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from raytrainer.config.hydra_internals import result_of

_log = logging.getLogger("raytrainer.sweep")


@dataclass(frozen=True)
class HydraJobs:
    """The jobs of one application. A pickled instance sets up Hydra in another process when it is loaded.

    Attributes:
        task: The application's function, or a reference to it.
        context: Hydra's config loader and callbacks.
        config: The master config.
        name: The function's name, for messages.
        state: Hydra's singletons, including the config store.
        main: What the script itself defines, so that `_target_: __main__.Model` also works in another process.
    """

    task: Any
    context: HydraContext
    config: DictConfig
    name: str
    state: Mapping[str, Any] | None = None
    main: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: TaskFunction, context: HydraContext, config: DictConfig) -> HydraJobs:
        """Return the jobs of the application that runs in this process."""
        name = getattr(task, "__name__", type(task).__name__)
        return cls(_Reference.to(task) or task, context, config, name)

    def __call__(self, number: int, overrides: Sequence[str]) -> Any:
        """Run a job. Return what the function returns, and raise what it raises.

        Args:
            number: The number of the trial, from 0.
            overrides: Overrides of the task's config.
        """
        task = self.task.function if isinstance(self.task, _Reference) else self.task
        returned = run_job(
            task_function=task,
            config=self.compose(number, overrides),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.context,
        )
        if returned.status is JobStatus.FAILED:
            error = result_of(returned)
            _log.error("%s() failed", self.name, exc_info=error)  # here it still goes to the job's own log
            raise error
        return returned.return_value

    def compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """Return a job's config."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return config

    def check(self, overrides: Sequence[str]) -> None:
        """Compose a job, to raise its errors."""
        self.compose(0, overrides)

    def subfolder(self, number: int, overrides: Sequence[str]) -> str:
        """Return the folder of a job's output, relative to the sweep's folder."""
        return str(self.compose(number, overrides).hydra.sweep.subdir)

    def is_group(self, name: str) -> bool:
        """Return whether a name is a config group."""
        return bool(self.context.config_loader.get_group_options(name, results_filter=ObjectType.CONFIG))

    def keeping(self, wanted: Callable[[Any], bool]) -> HydraJobs:
        """Return a copy that keeps only the wanted parts of the script."""
        return replace(self, main={name: part for name, part in _of_main().items() if wanted(part)})

    def __getstate__(self) -> dict[str, Any]:
        # One pickle, so that an object that several of them share is also one object in the other process.
        return {**self.__dict__, "state": Singleton.get_state(), "main": self.main or _of_main()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        setup_globals()
        Singleton.set_state(self.state)
        module = sys.modules["__main__"]
        for name, part in self.main.items():
            if not hasattr(module, name):
                setattr(module, name, part)


@dataclass(frozen=True)
class _Reference:
    """Where to find a function. `hydra.main` leaves its wrapper in the module; ours is `depth` wrappers below it."""

    module: str
    qualname: str
    depth: int

    @classmethod
    def to(cls, task: Any) -> _Reference | None:
        """Return a reference, or None for a function of the script or without a module, which is pickled by value."""
        module, qualname = getattr(task, "__module__", None), getattr(task, "__qualname__", None)
        if module in (None, "__main__") or qualname is None or "<locals>" in qualname:
            return None
        function, depth = _named(module, qualname), 0
        while function is not None and function is not task:
            function, depth = getattr(function, "__wrapped__", None), depth + 1
        return None if function is None else cls(module, qualname, depth)

    @property
    def function(self) -> Any:
        function = _named(self.module, self.qualname)
        for _ in range(self.depth):
            function = function.__wrapped__
        return function


def _named(module: str, qualname: str) -> Any:
    try:
        return functools.reduce(getattr, qualname.split("."), import_module(module))
    except (ImportError, AttributeError):
        return None


def _of_main() -> dict[str, Any]:
    """Return what a `_target_` or an annotation may name, but not data, which may be large."""
    kinds = (inspect.isclass, inspect.isroutine, inspect.ismodule)
    return {
        name: part
        for name, part in vars(sys.modules["__main__"]).items()
        if not name.startswith("__") and (any(kind(part) for kind in kinds) or type(part).__module__ == "typing")
    }


def split(params: Mapping[str, Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split `hydra.sweeper.params` into overrides for single values, and sweeps. The command line overrides both."""
    parser = OverridesParser.create()
    on_command_line = {o.get_key_element().lstrip("+~") for o in parser.parse_overrides(list(arguments))}
    fixed, space = [], {}
    for key, content in params.items():
        text = {None: "null", True: "true", False: "false"}.get(content, content) if _is_plain(content) else None
        override = f"{key}={text}"
        if text in (None, "") or _is_sweep(parser, override):
            space[key] = content
        elif key.lstrip("+~") not in on_command_line:
            fixed.append(override)
    return fixed, space


def _is_plain(content: Any) -> bool:
    return content is None or isinstance(content, bool | int | float | str)


def _is_sweep(parser: OverridesParser, override: str) -> bool:
    """Return whether an override is a sweep; True if it cannot be parsed, because the sweep's parser explains why."""
    try:
        return bool(parser.parse_override(override).is_sweep_override())
    except HydraException:
        return True


def folder_of(config: DictConfig) -> Path:
    """Return the sweep's folder. It is resolved only once, here, so that all jobs have the same time in its name."""
    return Path(str(config.hydra.sweep.dir)).absolute()
