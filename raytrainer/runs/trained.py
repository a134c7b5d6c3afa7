"""A trained run or trial as the commands use it: its config, its checkpoints, and its MLflow run."""

from __future__ import annotations

from dataclasses import dataclass

from raytrainer.attempt import CONFIG, Record
from raytrainer.config import with_values
from raytrainer.errors import ConfigError, RunNotFound
from raytrainer.runs.resolve import find, trial_of
from raytrainer.runs.resume import trial_composition
from raytrainer.runs.summary import checkpoints
from raytrainer.storage import Storage
from raytrainer.sweep.journal import TrialJournal
from raytrainer.sweep.plan import Plan


@dataclass(frozen=True)
class Trained:
    """A run, or a trial of a sweep.

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


def trained(identifier: str, checkpoint: str) -> Trained:
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
        text = with_values(trial_composition(number, record, storage).text, best_by)
        run_id = TrialJournal.open(storage).trials[number].run_id
        found = Trained(f"{record.name}.{number}", text, storage.child(f"trials/{number}"), run_id, record, storage)
    elif record.kind == "sweep":
        raise ConfigError(f"{record.name} is a sweep; name one of its trials: {record.name}.0001")
    else:
        data = storage.read_if_exists(CONFIG)
        if data is None:
            raise RunNotFound(f"{record.name}: its {CONFIG} in {record.run_dir} is gone")
        found = Trained(record.name, data.decode(), storage, record.run_id, record, storage)
    steps = [saved.step for saved in checkpoints(found.place)]
    if not steps:
        raise RunNotFound(f"{found.name} has no checkpoint in {found.place.display}")
    if checkpoint not in ("best", "last", *map(str, steps)):
        raise ConfigError(
            "is not one of its checkpoints", key="--step", value=checkpoint, choices=[str(step) for step in steps]
        )
    return found
