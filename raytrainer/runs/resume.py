"""`resume ID`: the config that continues a run or a sweep, and the overrides that are refused."""

from __future__ import annotations

from collections.abc import Sequence

from raytrainer.attempt import FIXED, Record
from raytrainer.config import Composition, SweepConfig, key_of
from raytrainer.errors import ConfigError, RunNotFound
from raytrainer.runs.arguments import VerbParser
from raytrainer.runs.changes import check_changes
from raytrainer.runs.recorded import composition_of
from raytrainer.runs.resolve import find, trial_of
from raytrainer.storage import Storage, redacted
from raytrainer.sweep.plan import Plan

ABOUT = "Continue a run or sweep where it stopped, in the same MLflow run."
# The keys that may change when a sweep is resumed. Any other key would make later trials differ from earlier ones.
_SWEEP_KEYS = ["sweep.num_samples", "sweep.max_concurrent_trials", "sweep.time_budget_s", "sweep.max_trial_failures"]
_SWEEP_KEYS += ["sweep.allow_failed", "sweep.num_to_keep"]


def add_arguments(parser: VerbParser) -> None:
    parser.add_id()
    parser.add_overrides()


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
    recorded, composition = (composition_of(record, storage, changes) for changes in ((), overrides))
    return composition, record, check_changes(recorded.experiment, composition.experiment, record, overrides)


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
            raise ConfigError("is not a key", key=name, choices=_SWEEP_KEYS)
        if name not in _SWEEP_KEYS:
            raise ConfigError(
                "would make later trials of the sweep differ from earlier ones; rerun starts a new sweep with it",
                key=name,
                value=value,
                choices=_SWEEP_KEYS,
            )
    _refuse_moved(record, storage)
    return Plan.read(storage).with_overrides(overrides), record


def _refuse_moved(record: Record, storage: Storage) -> None:
    if storage.display != redacted(record.run_dir):
        raise RunNotFound(
            f"{record.name} is in {storage.display}, but it ran in {record.run_dir}, where its config, metrics and checkpoints "
            f"are written to; move it back, or start a new run from its weights: init_from={storage.display}"
        )
