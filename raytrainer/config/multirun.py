"""Check the jobs of a multirun by Hydra's own sweeper, `-m optimizer.lr=0.1,0.2`, before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raytrainer.config.compose import CONFIG_NAME, compose, quiet, searching
from raytrainer.config.explain import explain, key_of, value_of
from raytrainer.config.nodes import check_targets
from raytrainer.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def check_sweep(overrides: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Compose every value of every sweep (`optimizer.lr=0.1,0.2`) once, to find wrong values before any job starts.

    Raises:
        ConfigError: A key, type, choice or argument is wrong, or all jobs would have the same name.
    """
    sweeps, fixed = _parsed(overrides, config_dir)
    fixed_lines = [str(o.input_line) for o in fixed]
    # Only lists of values can be checked. An interval is left to the sweeper that supports it.
    values = {
        str(o.input_line): [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        for o in sweeps
        if o.is_discrete_sweep()
    }
    first = {line: choices[0] for line, choices in values.items()}
    if _chosen("sweep", [*fixed_lines, *first.values()], config_dir):
        return  # the experiment itself chooses a sweep, which is checked later
    refuse_settings_of_no_sweep(overrides)
    if sweeps:
        _check_sweeps(sweeps, fixed)
    jobs = [{**first, line: value} for line, choices in values.items() for value in choices] or [first]
    for job in dict.fromkeys(tuple(job.values()) for job in jobs):
        check_targets(compose([*fixed_lines, *job], config_dir).experiment)


def _parsed(overrides: Sequence[str], config_dir: str | Path | None) -> tuple[list[Override], list[Override]]:
    """Return the overrides that are sweeps, and the others."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        with searching(config_dir):
            loader = GlobalHydra.instance().config_loader()
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
            for override in parsed:
                if override.is_sweep_override() and override.is_discrete_sweep():
                    list(override.sweep_string_iterator())
    except Exception as error:
        raise explain(error, overrides) from error
    return [o for o in parsed if o.is_sweep_override()], [o for o in parsed if not o.is_sweep_override()]


def _check_sweeps(sweeps: Sequence[Override], fixed: Sequence[Override]) -> None:
    for override in sweeps:
        if not override.is_discrete_sweep():
            raise ConfigError(
                "has no list of values to run one after the other; sweep=random, asha or optuna draws from it",
                key=override.key_or_group,
                value=str(override.input_line).partition("=")[2],
            )
    for override in fixed:
        if override.key_or_group == "name":
            raise ConfigError("would be the name of every job; leave it out", key="name", value=override.value())


def refuse_settings_of_no_sweep(overrides: Sequence[str]) -> None:
    """Refuse settings of a sweep if the group `sweep` has no choice, because they would be ignored.

    Raises:
        ConfigError: An override sets a key of the section `sweep`.
    """
    for override in overrides:
        if key_of(override).startswith("sweep."):
            raise ConfigError(
                "needs a sweep: choose sweep=random, grid, asha, optuna or pbt, with -m first",
                key=key_of(override),
                value=value_of(override),
            )


def _chosen(group: str, overrides: Sequence[str], config_dir: str | Path | None) -> str | None:
    """Return the choice of a group; None also if the config cannot be composed, which is reported elsewhere."""
    from hydra import compose as hydra_compose

    try:
        with searching(config_dir), quiet():
            choices = hydra_compose(CONFIG_NAME, list(overrides), return_hydra_config=True).hydra.runtime.choices
    except Exception:  # noqa: BLE001  every error is reported elsewhere
        return None
    return str(choices[group]) if choices.get(group) is not None else None
