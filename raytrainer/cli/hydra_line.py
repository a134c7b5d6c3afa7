"""A command line in Hydra's syntax: compose its config and call a task with it, with raytrainer's errors and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

from raytrainer import config, provenance
from raytrainer.cli import completion
from raytrainer.cli.exit_codes import exit_code_of
from raytrainer.errors import ConfigError

_FULL_ERROR = "HYDRA_FULL_ERROR"


class _LeaveHydra(BaseException):
    """The end of Hydra at once. Hydra reports an `Exception` in its own words, or continues with the next job."""


class HydraLine:
    """A command line in Hydra's syntax. Hydra calls this object with the composed config of each job.

    Args:
        arguments: The arguments after the program's name, or after the verb.
        task: Called with a composed config and the arguments. Returns the exit code.
        sweep_task: Called with the plan of a sweep and the arguments. Returns the exit code.
        prefix: The words in front of the arguments, to suggest a complete command line in an error.

    Raises:
        ConfigError: The arguments are not options and overrides.
    """

    __module__ = "raytrainer.cli"  # Hydra names its job after the task's module

    def __init__(
        self,
        arguments: list[str],
        task: Callable[[config.Composition, list[str]], int],
        sweep_task: Callable[[Any, list[str]], int],
        prefix: Sequence[str] = (),
    ) -> None:
        self._arguments, self._task, self._sweep_task, self._prefix = arguments, task, sweep_task, prefix
        self._parser = _argument_parser()
        self._parsed = self._parser.parse_intermixed_args(arguments)  # `experiment=mlp -m seed=1,2` too
        self._overrides = list(self._parsed.overrides)
        self._exit_codes: list[int] = []
        self._bug: Exception | None = None
        self._users_full_error = os.environ.get(_FULL_ERROR)  # None: it is not set

    def run(self) -> int:
        """Run the command line and return the highest exit code of its jobs.

        Raises:
            ConfigError: The command line, or the config that it composes, is wrong.
        """
        parsed = self._parsed
        choice = self._sweep_choice()
        if choice is not None and not _only_shows(parsed):
            self._check_sweep_choice(choice)
        if parsed.help:  # help does not need the other overrides, and Hydra would refuse `sweep=`
            parsed.overrides = [o for o in self._overrides if config.key_of(o).startswith("hydra")]
        typed_choices = completion.prepare(parsed) if parsed.shell_completion else ""
        if typed_choices is None:
            return 0
        if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
            raise ConfigError("is not a directory", key="--config-dir", value=parsed.config_dir)
        parsed.overrides = config.with_number_keys(parsed.overrides, parsed.config_dir)
        try:
            if parsed.multirun and choice is None:
                config.check_sweep(self._overrides, parsed.config_dir)
            elif parsed.cfg in ("job", "all"):
                config.check_keys(self._overrides, parsed.config_dir)
            self._run_hydra(typed_choices)
        except _LeaveHydra:
            if self._bug is not None:
                raise self._bug from None
        except Exception as error:
            if self._users_full_error == "1":
                raise
            raise self._explained(error) from error
        return max(self._exit_codes, default=0)

    def __call__(self, cfg: DictConfig) -> None:
        """Run one job of Hydra: a whole run."""
        try:
            with _full_error(self._users_full_error):
                self._exit_codes.append(exit_code_of(lambda: self._run_task(cfg)))
        except Exception as error:
            self._bug = error
            raise _LeaveHydra from error
        if self._exit_codes[-1] >= 128:  # stopped, so the remaining jobs do not run either
            raise _LeaveHydra

    def sweep(self, overrides: list[str], cfg: DictConfig) -> None:
        """Run all trials as one task. `hydra/sweeper=ray_tune` calls this once, not the object for each trial."""
        with _full_error(self._users_full_error):
            self._exit_codes.append(exit_code_of(lambda: self._run_sweep_task(overrides, cfg)))

    def _sweep_choice(self) -> str | None:
        """Return the last `sweep=` on the command line, if there is one."""
        named = [o for o in self._overrides if config.key_of(o) == "sweep" and not o.startswith("~")]
        return named[-1].partition("=")[2] if named else None

    def _check_sweep_choice(self, choice: str) -> None:
        if not self._parsed.multirun:
            raise self._needs_multirun(None)
        if "," in choice or "(" in choice:
            raise ConfigError(
                "has several choices, and a sweep has one searcher: random, grid, asha, optuna or pbt",
                key="sweep",
                value=choice,
            )

    def _run_hydra(self, typed_choices: str) -> None:
        from hydra import version

        from raytrainer.config.hydra_internals import run_hydra

        version.setbase("1.3")
        config.register_schema()
        # With the variable set, Hydra raises its errors. Without it, Hydra prints them and ends the process with 1.
        with _full_error("1"), config.quiet(), completion.prefixed(typed_choices):
            run_hydra(
                args=self._parsed,
                args_parser=self._parser,
                task_function=self,
                config_path=f"pkg://{config.CONFIG_MODULE}",
                config_name=config.CONFIG_NAME,
            )

    def _run_task(self, cfg: DictConfig) -> int:
        try:
            composition = config.from_hydra(cfg)
        except Exception as error:
            raise self._explained(error) from error
        if sweep := dict(composition.choices).get("sweep"):  # chosen by an experiment, or by several
            if not self._parsed.multirun:
                raise self._needs_multirun(sweep)
            raise ConfigError(
                "is chosen by only some of the experiments; add it to the command line, for all of them",
                key="sweep",
                value=sweep,
            )
        config.refuse_settings_of_no_sweep(self._overrides)
        return self._task(composition, self._arguments)

    def _run_sweep_task(self, overrides: list[str], cfg: DictConfig) -> int:
        from raytrainer.sweep import make_plan

        config_dir, config_name = self._parsed.config_dir, self._parsed.config_name
        choice = cfg.hydra.runtime.choices.get("sweep")
        if choice is None:
            raise ConfigError("is needed with hydra/sweeper=ray_tune: random, grid, asha, optuna, pbt", key="sweep")
        if config_name not in (None, config.CONFIG_NAME):
            raise ConfigError(
                "is the root of a run, not of a sweep; put what differs into experiment/NAME.yaml of a --config-dir",
                key="--config-name",
                value=config_name,
            )
        # Of Hydra's own overrides, the plan needs only this one: it decides which configs the others find.
        searchpath = [o for o in self._overrides if config.key_of(o) == "hydra.searchpath"]
        plan = make_plan(
            [*searchpath, *overrides],
            choice=choice,
            space=config.written_space(cfg),
            groups=config.group_names(config_dir, cfg.hydra.searchpath),
            config_dir=config_dir,
        )
        return self._sweep_task(plan, self._arguments)

    def _explained(self, error: Exception) -> Exception:
        """Return Hydra's error as one of raytrainer, with the key, the value and the valid choices."""
        config_dir = self._parsed.config_dir
        return config.explain(error, self._overrides, lambda: config.composed_keys(self._overrides, config_dir))

    def _needs_multirun(self, choice: str | None) -> ConfigError:
        command = shlex.join([*self._prefix, "-m", *self._arguments])
        return ConfigError(f"needs -m (multirun). Run: {provenance.program()} {command}", key="sweep", value=choice)


def _only_shows(parsed: argparse.Namespace) -> bool:
    return bool(parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion)


def _argument_parser() -> argparse.ArgumentParser:
    """Return Hydra's parser, with raytrainer's name, version and errors."""
    from importlib.metadata import version

    from raytrainer.config.hydra_internals import argument_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {provenance.program()} --help lists the options")

    shown = f"raytrainer {sys.modules['raytrainer'].__version__} (Hydra {version('hydra-core')})"
    parser = argument_parser(provenance.program(), shown)
    parser.error = refuse  # type: ignore[method-assign]
    return parser


@contextlib.contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    """Set HYDRA_FULL_ERROR for a while; None unsets it."""
    before = os.environ.get(_FULL_ERROR)
    try:
        _set_full_error(value)
        yield
    finally:
        _set_full_error(before)


def _set_full_error(value: str | None) -> None:
    if value is None:
        os.environ.pop(_FULL_ERROR, None)
    else:
        os.environ[_FULL_ERROR] = value
