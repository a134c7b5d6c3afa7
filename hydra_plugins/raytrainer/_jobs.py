"""A Hydra application's task function as jobs of a sweep: composed, and run in whatever process, as Hydra's launchers do.
Hydra does not import a plugin's module with a `_` before it is used.
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

_log = logging.getLogger("raytrainer.sweep")


@dataclass(frozen=True)
class HydraJobs:
    """The jobs of one application. In another process, an instance that was pickled makes itself at home when it is
    first called.

    Attributes:
        task: The application's function, or where it is found.
        context: Hydra's config loader and callbacks.
        config: The master config.
        name: Of the function, for messages.
        state: Hydra's singletons, the config store among them.
        main: What the script itself defines: `_target_: __main__.Model` finds it in another process too.
    """

    task: Any
    context: HydraContext
    config: DictConfig
    name: str
    state: Mapping[str, Any] | None = None
    main: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, task: TaskFunction, context: HydraContext, config: DictConfig) -> HydraJobs:
        """The jobs of the application that runs in this process."""
        name = getattr(task, "__name__", type(task).__name__)
        return cls(_Reference.to(task) or task, context, config, name)

    def __call__(self, number: int, overrides: Sequence[str]) -> Any:
        """Runs a job; returns what the function returns, and raises what it raises.

        Args:
            number: Of the trial, from 0.
            overrides: Of the task.
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
            error = returned._return_value
            _log.error("%s() failed", self.name, exc_info=error)  # while the log is the job's own
            raise error
        return returned.return_value

    def compose(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """A job's config."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return config

    def check(self, overrides: Sequence[str]) -> None:
        """Composes a job, for the errors of it."""
        self.compose(0, overrides)

    def subfolder(self, number: int, overrides: Sequence[str]) -> str:
        """Where a job's output is, below the sweep's folder."""
        return str(self.compose(number, overrides).hydra.sweep.subdir)

    def is_group(self, name: str) -> bool:
        """Whether a name is a config group."""
        return bool(self.context.config_loader.get_group_options(name, results_filter=ObjectType.CONFIG))

    def keeping(self, wanted: Callable[[Any], bool]) -> HydraJobs:
        """The same with those parts of the script alone."""
        return replace(self, main={name: part for name, part in _of_main().items() if wanted(part)})

    def __getstate__(self) -> dict[str, Any]:
        # One pickle: what is in several of them is in the other process one thing, too.
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
    """Where a function is found. `hydra.main` leaves its own in the module: ours is `depth` wrappers below it."""

    module: str
    qualname: str
    depth: int

    @classmethod
    def to(cls, task: Any) -> _Reference | None:
        """None for what is in the script, or in no module: it travels by value."""
        module, qualname = getattr(task, "__module__", None), getattr(task, "__qualname__", None)
        if module in (None, "__main__") or qualname is None or "<locals>" in qualname:
            return None
        found, depth = _named(module, qualname), 0
        while found is not None and found is not task:
            found, depth = getattr(found, "__wrapped__", None), depth + 1
        return None if found is None else cls(module, qualname, depth)

    @property
    def function(self) -> Any:
        found = _named(self.module, self.qualname)
        for _ in range(self.depth):
            found = found.__wrapped__
        return found


def _named(module: str, qualname: str) -> Any:
    try:
        return functools.reduce(getattr, qualname.split("."), import_module(module))
    except (ImportError, AttributeError):
        return None


def _of_main() -> dict[str, Any]:
    """What a `_target_` or an annotation may call by name; no data, which may be large."""
    kinds = (inspect.isclass, inspect.isroutine, inspect.ismodule)
    return {
        name: part
        for name, part in vars(sys.modules["__main__"]).items()
        if not name.startswith("__") and (any(kind(part) for kind in kinds) or type(part).__module__ == "typing")
    }


def split(params: Mapping[str, Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`hydra.sweeper.params`: what is one value as overrides, and the sweeps. The command line wins over both."""
    parser = OverridesParser.create()
    given = {o.get_key_element().lstrip("+~") for o in parser.parse_overrides(list(arguments))}
    fixed, space = [], {}
    for key, content in params.items():
        text = {None: "null", True: "true", False: "false"}.get(content, content) if _is_plain(content) else None
        override = f"{key}={text}"
        if text in (None, "") or _is_sweep(parser, override):
            space[key] = content
        elif key.lstrip("+~") not in given:
            fixed.append(override)
    return fixed, space


def _is_plain(content: Any) -> bool:
    return content is None or isinstance(content, bool | int | float | str)


def _is_sweep(parser: OverridesParser, override: str) -> bool:
    """Also what cannot be read: whoever reads it as a sweep says why."""
    try:
        return bool(parser.parse_override(override).is_sweep_override())
    except HydraException:
        return True


def folder_of(config: DictConfig) -> Path:
    """The sweep's folder. Looked up here once, which keeps the time in its name for all jobs."""
    return Path(str(config.hydra.sweep.dir)).absolute()
