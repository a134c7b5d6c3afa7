"""The recorded configs, checkpoints and MLflow runs of runs and trials."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from raytrainer.attempt import CONFIG, Record
from raytrainer.config import Composition, from_text, with_values
from raytrainer.errors import ConfigError, RunNotFound, nearest
from raytrainer.runs.resolve import find, trial_of
from raytrainer.runs.summary import saved_checkpoints
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Mode, TrialJournal
from raytrainer.sweep.lineage import best_parameters
from raytrainer.sweep.plan import Plan


@dataclass(frozen=True)
class TrainedRun:
    """A run, or a trial of a sweep, that has a checkpoint.

    Attributes:
        name: Its name; `SWEEP.0007` for a trial.
        text: The `Composition.text` of its config.
        place: The directory that contains its `checkpoints`.
        run_id: Its MLflow run.
        record: The record of the run, or of the trial's sweep.
        root: The directory of the record.
    """

    name: str
    text: str
    place: Storage
    run_id: str | None
    record: Record
    root: Storage


def trained_run(identifier: str, checkpoint: str) -> TrainedRun:
    """Return the run or trial of an ID, and check that it has a checkpoint.

    Args:
        identifier: The ID of a run or trial.
        checkpoint: `best`, `last`, or a step.

    Raises:
        RunNotFound: There is no such run or trial, or it has no checkpoint.
        ConfigError: The ID names a sweep, or there is no such checkpoint.
    """
    record, storage = find(identifier)
    number = trial_of(identifier, record)
    if number is not None:
        plan = Plan.read(storage)
        # The best checkpoint of a trial is the best by the sweep's metric.
        best_by = {"checkpoint.monitor": plan.metric, "checkpoint.mode": plan.mode}
        text = with_values(composition_of_trial(number, record, storage).text, best_by)
        run_id = TrialJournal.open(storage).trials[number].run_id
        run = TrainedRun(f"{record.name}.{number}", text, storage.child(f"trials/{number}"), run_id, record, storage)
    elif record.kind == "sweep":
        raise ConfigError(f"{record.name} is a sweep; name one of its trials: {record.name}.0001")
    else:
        run = TrainedRun(record.name, _config_text(record, storage), storage, record.run_id, record, storage)
    steps = [str(saved.step) for saved in saved_checkpoints(run.place)]
    if not steps:
        raise RunNotFound(f"{run.name} has no checkpoint in {run.place.display}")
    if checkpoint not in ("best", "last", *steps):
        raise ConfigError("is not one of its checkpoints", key="--step", value=checkpoint, choices=steps)
    return run


def composition_of(record: Record, storage: Storage, overrides: Sequence[str]) -> Composition:
    """Return the config of a run, with overrides.

    Args:
        record: The run record.
        storage: The run directory.
        overrides: Value overrides, as on the command line.

    Raises:
        RunNotFound: Its config file is gone.
    """
    composition = from_text(_config_text(record, storage), overrides)
    return replace(composition, choices=tuple(sorted(record.choices.items())))


def composition_of_trial(number: str, record: Record, storage: Storage) -> Composition:
    """Return the config of a sweep's trial, with the parameters of its best evaluation.

    Args:
        number: The trial's id: `0007`.
        record: The sweep's record.
        storage: The sweep's directory.

    Raises:
        RunNotFound: There is no such trial.
    """
    plan, trials = Plan.read(storage), TrialJournal.open(storage).trials
    if number not in trials:
        raise RunNotFound(
            f"{record.name} has no trial {number}; it has {', '.join(nearest(number, trials, 5)) or 'none'}"
        )
    return plan.composition_of(best_parameters(trials[number], cast(Mode, plan.mode)))


def base_name(record: Record) -> str:
    """Return a run's name without the time and the digits that `new_name` appends."""
    return re.sub(r"-\d{8}-\d{6}-[0-9a-f]{4}$", "", record.name)


def _config_text(record: Record, storage: Storage) -> str:
    data = storage.read_if_exists(CONFIG)
    if data is None:
        raise RunNotFound(f"{record.name}: its {CONFIG} in {record.run_dir} is gone")
    return data.decode()
