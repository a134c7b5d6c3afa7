"""The plan of a sweep: its parameters, and one composed config for each combination of group choices. Every problem
that can be found before the start is refused here."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytrainer import preflight
from raytrainer.config import (
    Composition,
    Experiment,
    Parameter,
    check_modes,
    compose,
    experiment_of,
    from_text,
    key_of,
    new_name,
    parse_space,
    sweep_mode,
    with_modes,
)
from raytrainer.errors import ConfigError, StorageError
from raytrainer.storage import Storage

PLAN = "sweep.json"
VERSION = 1
_MOST_COMBINATIONS = 1000  # combinations of group choices; each is composed and kept in memory
_MOST_PROBES = 400  # values checked over all combinations
_LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.eval_every_n_steps")


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep.

    Attributes:
        choice: The choice of the group `sweep`, e.g. `asha`.
        fixed: The overrides from the command line that all trials have.
        parameters: The search space.
        compositions: The config of each combination of group choices, by `choices_of`. All have the sweep's name.
        options: Options from the command line on which the overrides depend: `--config-dir`.
    """

    choice: str
    fixed: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    compositions: Mapping[str, Composition]
    options: tuple[str, ...] = ()

    @property
    def first(self) -> Composition:
        return next(iter(self.compositions.values()))

    @property
    def experiment(self) -> Experiment:
        """The first combination's experiment. All have the same `sweep`, `cluster`, `tracking` and `scaling`."""
        return self.first.experiment

    @property
    def example(self) -> Composition:
        """The whole config of a possible trial: the first combination with one value of each parameter."""
        return replace(
            from_text(self.first.text, list(_one_of_each(self.parameters).values())), choices=self.first.choices
        )

    @property
    def metric(self) -> str:
        return self.experiment.sweep.metric or self.experiment.checkpoint.monitor

    @property
    def mode(self) -> str:
        return sweep_mode(self.experiment)

    @property
    def total(self) -> int | None:
        """`sweep.num_samples`; None for every combination of a grid, or until the time budget is over."""
        return self.experiment.sweep.num_samples

    @property
    def evaluations(self) -> int | None:
        """The largest number of evaluations of any trial; None if the config does not determine it."""
        lengths = [[p.override(v) for v in p.probes()] for p in self.parameters if p.key in _LENGTHS]
        counts = [
            _evaluations(experiment_of(c.text, chosen) if chosen else c.experiment)
            for c in self.compositions.values()
            for chosen in itertools.product(*lengths)
        ]
        return max((c for c in counts if c is not None), default=None) if None not in counts else None

    def text_of(self, values: Mapping[str, Any]) -> str:
        """Return the config text of the combination that a trial with these parameters belongs to."""
        return self.compositions[choices_of(self.parameters, values)].text

    def composition_of(self, values: Mapping[str, Any]) -> Composition:
        """Return the whole config of a trial with these parameters."""
        base = self.compositions[choices_of(self.parameters, values)]
        set_ = [p.override(values[p.key]) for p in self.parameters if not p.group and p.key in values]
        return replace(from_text(base.text, set_), choices=base.choices)

    def overrides_of(self, values: Mapping[str, Any]) -> list[str]:
        """Return a trial's parameters as overrides for the command line."""
        return [p.override(values[p.key]) for p in self.parameters if p.key in values]

    def with_overrides(self, overrides: Sequence[str]) -> Plan:
        """Return a copy with overrides in the sections that all trials share."""
        changed = {
            key: replace(from_text(c.text, overrides), choices=c.choices) for key, c in self.compositions.items()
        }
        return replace(self, compositions=changed, fixed=tuple(_replaced(self.fixed, overrides)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `from_dict`."""
        return {
            "version": VERSION,
            "choice": self.choice,
            "options": list(self.options),
            "fixed": list(self.fixed),
            "parameters": [p.to_dict() for p in self.parameters],
            "compositions": [
                {"of": key, "text": c.text, "choices": dict(c.choices)} for key, c in self.compositions.items()
            ],
        }

    @classmethod
    def from_dict(cls, plan: Mapping[str, Any]) -> Plan:
        compositions = {
            c["of"]: replace(from_text(c["text"]), choices=tuple(sorted(c["choices"].items())))
            for c in plan["compositions"]
        }
        parameters = tuple(Parameter.from_dict(p) for p in plan["parameters"])
        options = tuple(plan.get("options", ()))
        return cls(plan["choice"], tuple(plan["fixed"]), parameters, compositions, options)

    def write(self, storage: Storage) -> None:
        """Write the plan to the sweep's directory."""
        storage.write_bytes(PLAN, json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def read(cls, storage: Storage) -> Plan:
        """Read the plan in a sweep's directory.

        Raises:
            StorageError: The file does not exist, is invalid, or was written by a later version.
        """
        try:
            plan = json.loads(storage.read_bytes(PLAN))
            if plan["version"] > VERSION:
                raise StorageError(f"{storage.where(PLAN)} was written by a later version of raytrainer")
            return cls.from_dict(plan)
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{storage.where(PLAN)} is not a valid sweep plan: {error}") from error


def make_plan(
    overrides: Sequence[str],
    *,
    choice: str,
    space: Mapping[str, Any],
    groups: Callable[[str], bool] | Collection[str],
    config_dir: str | Path | None = None,
) -> Plan:
    """Make the plan of a sweep from a command line. Compose every combination of group choices and check the values.

    Args:
        overrides: The overrides from the command line, including those with several values.
        choice: The choice of the group `sweep`.
        space: `sweep.space` of the config.
        groups: The names of config groups, or a function that says whether a name is one.
        config_dir: The value of `--config-dir`.

    Raises:
        ConfigError: The first problem.
    """
    parameters, fixed = parse_space(overrides, space, groups=groups, config_dir=config_dir)
    lists = {key_of(o): o.partition("=")[2] for o in fixed if re.fullmatch(r"(?!hydra)[^=]+=\[.+\]", o)}
    try:
        return _planned(parameters, fixed, choice, config_dir)
    except ConfigError as error:
        key = error.key if error.key in lists else next(iter(lists), None) if not parameters else None
        if key is None:
            raise
        # In Hydra's grammar, a list is one value, but the user may have meant several values.
        hint = f"; {key}={lists[key]} is one list, and several values are {key}={lists[key][1:-1]}"
        raise ConfigError(f"{error.args[0]}{hint}", key=error.key, value=error.value, choices=error.choices) from error


def _planned(parameters: list[Parameter], fixed: list[str], choice: str, config_dir: str | Path | None) -> Plan:
    if not parameters:
        preflight.check_objects(compose(fixed, config_dir).experiment)  # perhaps a sweep that was read as one value
        raise ConfigError(
            "needs something to sweep over: optimizer.lr=0.1,0.01, 'optimizer.lr=tag(log,interval(1e-4,1e-1))', "
            "model=mlp,resnet_digits, or sweep.space in an experiment",
            key="sweep",
            value=choice,
        )
    grouped = [p for p in parameters if p.group]
    combinations = list(itertools.islice(itertools.product(*(p.values for p in grouped)), _MOST_COMBINATIONS + 1))
    if len(combinations) > _MOST_COMBINATIONS:
        raise ConfigError(
            f"have more than {_MOST_COMBINATIONS} combinations; sweep over fewer groups or values",
            key=", ".join(p.key for p in grouped),
        )
    compositions: dict[str, Composition] = {}
    named = list(fixed)
    for combination in combinations:
        chosen = [p.override(v) for p, v in zip(grouped, combination, strict=True)]
        composition = _composed([*named, *chosen], parameters, config_dir)
        if not compositions and not any(o.startswith("name=") for o in fixed):
            many_experiments = any(key_of(p.key) == "experiment" for p in grouped)
            stem = "sweep" if many_experiments else dict(composition.choices).get("experiment", "run")
            named.append(f"name={new_name(f'{stem}-{choice}')}")
            composition = _composed([*named, *chosen], parameters, config_dir)
        compositions[" ".join(sorted(chosen))] = with_modes(composition)
    options = () if config_dir is None else (f"--config-dir={Path(config_dir).absolute()}",)
    plan = Plan(choice, tuple(fixed), tuple(parameters), compositions, options)
    check_plan(plan)
    return plan


def _replaced(fixed: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Return overrides with new values for some keys. A key that was added with `+` keeps the `+`."""
    by_key = {key_of(o): o for o in fixed}
    for override in overrides:
        key = key_of(override)
        before = by_key.pop(key, override).partition("=")[0]
        by_key[key] = override if before.startswith("~") else f"{before}={override.partition('=')[2]}"
    return list(by_key.values())


def _composed(overrides: Sequence[str], parameters: Sequence[Parameter], config_dir: str | Path | None) -> Composition:
    """Compose the config to which trials add their values. If it is invalid without them, compose it with one value of
    each parameter."""
    try:
        return compose(overrides, config_dir)
    except ConfigError:
        return compose([*overrides, *_one_of_each(parameters).values()], config_dir)


def _one_of_each(parameters: Sequence[Parameter]) -> dict[str, str]:
    """Return one override for each parameter that is not a group."""
    return {p.key: p.override(p.probes()[0]) for p in parameters if not p.group}


def choices_of(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> str:
    """Return the group choices among a trial's values as one text, the key of its composition."""
    return " ".join(sorted(p.override(values[p.key]) for p in parameters if p.group and p.key in values))


def check_plan(plan: Plan) -> None:
    """Check that the sweep and each of its trials can run.

    Raises:
        ConfigError: They cannot. The error names the key.
    """
    e = plan.experiment
    if e.debug:
        raise ConfigError("is one batch of one run; leave out -m and what is swept", key="debug", value=True)
    for composition in plan.compositions.values():
        check_modes(composition.experiment, objects=True, sweep=True)
    _check_objective(plan)
    if e.backend.ray == "none":
        raise ConfigError("has no processes for trials; use cluster=local", key="cluster", value=e.cluster.kind)
    if isinstance(e.scaling.num_workers, list):
        raise ConfigError(
            "is elastic; every trial of a sweep has the same number of workers",
            key="scaling.num_workers",
            value=e.scaling.num_workers,
        )
    if e.tracking.register_model:
        raise ConfigError(
            "registers the model of one run; train the sweep's best experiment with it",
            key="tracking.register_model",
            value=e.tracking.register_model,
        )
    search = str((e.sweep.search_alg or {}).get("_target_", ""))
    if e.sweep.num_samples is None and e.sweep.time_budget_s is None and not search.endswith("GridSearch"):
        raise ConfigError(
            "is not set, so the sweep would never end; set it, or sweep.time_budget_s", key="sweep.num_samples"
        )
    _check_values(plan)


def _check_objective(plan: Plan) -> None:
    objectives = {
        f"{c.experiment.sweep.metric or c.experiment.checkpoint.monitor} ({sweep_mode(c.experiment)})": None
        for c in plan.compositions.values()
    }
    if len(objectives) > 1:
        raise ConfigError(
            f"must be the same for all trials, and their experiments have {', '.join(objectives)}; set sweep.metric and "
            "sweep.mode to one of these",
            key="sweep.metric",
        )


def _check_values(plan: Plan) -> None:
    """Check values of each parameter with each combination of group choices."""
    # Required keys may be set only by the sweep, so each value is checked together with one value of every other
    # parameter.
    each = _one_of_each(plan.parameters)
    changes = [{p.key: p.override(value)} for p in plan.parameters if not p.group for value in p.probes()[1:]]
    checks = 0
    for composition in plan.compositions.values():
        for change in ({}, *changes):
            checks += bool(change)
            if not change or checks <= _MOST_PROBES:
                overrides = {**each, **change}
                preflight.check_objects(experiment_of(composition.text, list(overrides.values())))


def _evaluations(e: Experiment) -> int | None:
    t = e.trainer
    if not e.data.val or t.eval_every_n_steps == 0:
        return 1
    if t.eval_every_n_steps is None:
        return t.max_epochs
    return -(-t.max_steps // t.eval_every_n_steps) if t.max_steps is not None else None
