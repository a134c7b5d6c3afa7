"""What `resume` and `rerun` of a run or sweep launch, and which overrides they refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from raytrainer.attempt import FIXED, Record
from raytrainer.config import Composition, SweepConfig, from_text, key_of, new_name
from raytrainer.errors import ConfigError, RunNotFound, nearest
from raytrainer.runs.changes import check_changes
from raytrainer.runs.resolve import find, trial_of
from raytrainer.storage import Storage, redacted
from raytrainer.sweep.journal import Mode, TrialJournal
from raytrainer.sweep.lineage import best_parameters
from raytrainer.sweep.plan import Plan


def to_resume(identifier: str, overrides: Sequence[str]) -> tuple[Composition, Record, list[str]]:
    """Return what `launch` needs to continue a run: its config with overrides, its record, changed optimizer settings.

    Raises:
        RunNotFound: There is no such run, it was moved, or it has nothing to continue from.
        ConfigError: An override is not a value, or changes what the checkpoint's state means.
    """
    record, storage = find(identifier)
    for override in overrides:
        name, value = key_of(override), override.partition("=")[2]
        if "." not in name and name not in FIXED:
            raise ConfigError(
                "is a choice of a group; resume takes values (trainer.max_epochs=20). For another choice: "
                f"raytrainer rerun {record.name} … starts a new run",
                key=name,
                value=value,
            )
    _refuse_moved(record, storage)
    if record.status == "FINISHED" and not storage.exists("checkpoints"):
        raise RunNotFound(
            f"{record.name} finished, and has no checkpoint to continue from; raytrainer rerun {record.name} repeats it"
        )
    recorded, composition = (_composed(record, storage, given) for given in ((), overrides))
    return composition, record, check_changes(recorded.experiment, composition.experiment, record, overrides)


def to_rerun(identifier: str, overrides: Sequence[str]) -> Composition:
    """Return the config of a run under a new name, with value overrides, for `launch`.

    Raises:
        RunNotFound, ConfigError: As for `to_resume`.
    """
    record, storage = find(identifier)
    if not any(o.partition("=")[0] == "name" for o in overrides):
        overrides = [*overrides, f"name={new_name(stem(record))}"]
    if number := trial_of(identifier, record):
        composition = trial_composition(number, record, storage)
        return replace(
            from_text(composition.text, overrides),
            choices=composition.choices,
        )
    return _composed(record, storage, overrides)


# The keys that may change when a sweep is resumed. Any other key would make later trials differ from earlier ones.
_OF_A_SWEEP = (
    "num_samples",
    "max_concurrent_trials",
    "time_budget_s",
    "max_trial_failures",
    "allow_failed",
    "num_to_keep",
)


def to_resume_sweep(identifier: str, overrides: Sequence[str]) -> tuple[Plan, Record]:
    """Return what `sweep.launch` needs to continue a sweep.

    Raises:
        RunNotFound: There is no such sweep.
        ConfigError: An override would change what its trials are, or the ID names a trial.
    """
    record, storage = find(identifier)
    if trial_of(identifier, record):
        raise ConfigError(
            f"{identifier} is a trial of {record.name}: resume {record.name} continues it; rerun {identifier} "
            "trains its configuration in a new run"
        )
    for override in overrides:
        name, _, value = override.partition("=")
        if name.startswith("sweep.") and name.removeprefix("sweep.") not in SweepConfig.__dataclass_fields__:
            raise ConfigError("is not a key", key=name, choices=[f"sweep.{key}" for key in _OF_A_SWEEP])
        if name.removeprefix("sweep.") not in _OF_A_SWEEP or not name.startswith("sweep."):
            raise ConfigError(
                "would make later trials of the sweep differ from earlier ones; rerun starts a new sweep with it",
                key=name,
                value=value,
                choices=[f"sweep.{key}" for key in _OF_A_SWEEP],
            )
    _refuse_moved(record, storage)
    return Plan.read(storage).with_overrides(overrides), record


def to_rerun_sweep(identifier: str, overrides: Sequence[str]) -> Plan:
    """Return the plan of a sweep under a new name, with value overrides.

    Raises:
        RunNotFound: There is no such sweep.
        ConfigError: An override is wrong, or sets a parameter of the sweep.
    """
    record, storage = find(identifier)
    if not any(o.partition("=")[0] == "name" for o in overrides):
        overrides = [*overrides, f"name={new_name(stem(record))}"]
    plan = Plan.read(storage)
    swept = {key_of(p.key) for p in plan.parameters}
    for key in map(key_of, overrides):
        if key in swept:
            raise ConfigError("is a parameter of the sweep; start another sweep with -m", key=key)
    return plan.with_overrides(overrides)


def trial_composition(number: str, record: Record, storage: Storage) -> Composition:
    """Return the config of a sweep's trial, with the parameters of its best evaluation.

    Raises:
        RunNotFound: There is no such trial.
    """
    plan, trials = Plan.read(storage), TrialJournal.open(storage).trials
    if number not in trials:
        raise RunNotFound(
            f"{record.name} has no trial {number}; it has {', '.join(nearest(number, trials, 5)) or 'none'}"
        )
    return plan.composition_of(best_parameters(trials[number], cast(Mode, plan.mode)))


def stem(record: Record) -> str:
    """Return a run's name without the time and the digits that `new_name` appends."""
    return re.sub(r"-\d{8}-\d{6}-[0-9a-f]{4}$", "", record.name)


def _refuse_moved(record: Record, storage: Storage) -> None:
    if storage.display != redacted(record.run_dir):
        raise RunNotFound(
            f"{record.name} is in {storage.display}, but it ran in {record.run_dir}, where its config, metrics and checkpoints "
            f"are written to; move it back, or start a new run from its weights: init_from={storage.display}"
        )


def _composed(record: Record, storage: Storage, overrides: Sequence[str]) -> Composition:
    text = storage.read_if_exists("config.yaml")
    if text is None:
        raise RunNotFound(f"{record.name}: its config.yaml in {record.run_dir} is gone")
    return replace(from_text(text.decode(), overrides), choices=tuple(sorted(record.choices.items())))
