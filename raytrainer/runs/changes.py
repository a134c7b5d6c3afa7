"""Find what a resume changes: compare the config as it resolves now with the recorded values.

A value may change without being named, through a reference such as `T_max: ${trainer.max_steps}`. A change is refused
if the restored state would silently override it or does not fit it. Any other change takes effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raytrainer.attempt import Record, changes_meaning
from raytrainer.config import Experiment, key_of, parameters_of
from raytrainer.errors import ConfigError

# Sections that are built again with their new values, which no saved state overrides.
_REBUILT_SECTIONS = ("loss", "callbacks", "metrics", "data.val", "tracking")
# Schedulers that overwrite settings of the optimizer, so that its own values are never used.
_SET_BY_SCHEDULER = {
    "torch.optim.lr_scheduler.OneCycleLR": ("lr", "momentum", "betas"),
    "torch.optim.lr_scheduler.CyclicLR": ("lr", "momentum", "betas"),
}
# Settings of optimizers that need a state which a run without them has not kept.
_NEEDS_STATE = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
_ABSENT = object()


def check_changes(before: Experiment, after: Experiment, record: Record, overrides: Sequence[str]) -> list[str]:
    """Return the optimizer's settings whose new values must replace those in the checkpoint.

    Args:
        before: The recorded config, resolved here and now.
        after: The same config with the overrides of this resume.
        record: The run record, with the values that references had.
        overrides: The overrides as they were typed.

    Raises:
        ConfigError: A value changes that the checkpoint cannot follow.
    """
    named = {key_of(o): o for o in overrides}
    old, new = dict(_leaves(asdict(before))), dict(_leaves(asdict(after)))
    for key, override in named.items():
        same = key in old and repr(old[key]) == repr(new.get(key, _ABSENT))
        if changes_meaning(key) and not same:
            raise _meaning(record, key, override.partition("=")[2], override)
    for key in _changed(old, new):
        if changes_meaning(key) and not _is_below(key, _REBUILT_SECTIONS) and not _is_below(key, named):
            raise ConfigError(
                f"was {_shown(old.get(key))} when the run was recorded: it refers to what {_named(named)} changes, and the "
                f"run's checkpoint does not fit another value. raytrainer rerun {record.name} "
                f"{' '.join(named.values())} starts a new run",
                key=key,
                value=_shown(new.get(key)),
            )
    _check_scheduler(before, after, record, named)
    return _optimizer(before, after, record, named)


def _meaning(record: Record, key: str, value: str, override: str) -> ConfigError:
    return ConfigError(
        "changes what the run's checkpoint means, so it cannot be resumed with it; "
        f"raytrainer rerun {record.name} {override} starts a new run",
        key=key,
        value=value,
    )


def _check_scheduler(before: Experiment, after: Experiment, record: Record, named: Mapping[str, str]) -> None:
    old, new = _recorded(record, "lr_scheduler", before.lr_scheduler), _flat("lr_scheduler", after.lr_scheduler)
    changed = list(_changed(old, new))
    if not changed or not after.lr_scheduler or "optimizer" not in parameters_of("lr_scheduler", after.lr_scheduler):
        return  # a curve is a function of the step, so new values take effect
    key, target, more = changed[0], after.lr_scheduler["_target_"], " ".join(named.values())
    was, fix = old.get(key), ""
    if was is not None and not key.endswith(".total_steps"):  # keeping it would not allow a longer run
        fix = f"keep it with {key}={_shown(was)}, or "
    reason = "" if key in named else ", since it refers to another value that has changed"
    raise ConfigError(
        f"was {_shown(was)} when the run was recorded{reason}, and {target} cannot follow: its state in the checkpoint was "
        f"made with {_shown(was)}. To continue, {fix}start a new run from the weights: "
        f"raytrainer rerun {record.name} init_from={record.name}{f' {more}' if more else ''}. Only curves of raytrainer.optim "
        "(lr_scheduler=cosine, linear, wsd) and your own functions of (step, total_steps) follow new values and a longer run",
        key=key,
        value=_shown(new.get(key)),
    )


def _optimizer(before: Experiment, after: Experiment, record: Record, named: Mapping[str, str]) -> list[str]:
    old, new = _recorded(record, "optimizer", before.optimizer), _flat("optimizer", after.optimizer)
    changed = [*(key for key in named if key.startswith("optimizer.")), *_changed(old, new)]
    settings = list(dict.fromkeys(key.split(".")[1] for key in changed))
    scheduler = str((after.lr_scheduler or {}).get("_target_"))
    for name in settings:
        key = f"optimizer.{name}"
        value, was = new.get(key), old.get(key)
        if repr(value) == repr(was):
            continue
        if name in _SET_BY_SCHEDULER.get(scheduler, ()):
            raise ConfigError(
                f"would be ignored: {scheduler} sets it at each step from values of its own, which are in the checkpoint; "
                f"raytrainer rerun {record.name} init_from={record.name} starts a new run from the weights",
                key=key,
                value=_shown(value),
            )
        rms_momentum = name == "momentum" and "RMSprop" in str((after.optimizer or {}).get("_target_")) and not was
        if value and (name in _NEEDS_STATE or rms_momentum):
            raise ConfigError(
                f"was {_shown(was)}: the optimizer's state in the checkpoint lacks what it needs "
                f"({_NEEDS_STATE.get(name, 'momentum_buffer')}); raytrainer rerun {record.name} init_from={record.name} "
                f"{key}={_shown(value)} starts a new run from the weights",
                key=key,
                value=_shown(value),
            )
    return settings


def _recorded(record: Record, section: str, before: Any) -> dict[str, Any]:
    """Return a node as it was resolved at the last launch, as far as the record has it, else as it resolves now."""
    now = _flat(section, before)
    if section not in record.resolved:
        return now
    values = _flat(section, record.resolved[section])
    return {key: now.get(key) if "${" in str(value) else value for key, value in values.items()}


def _flat(section: str, node: Any) -> dict[str, Any]:
    return dict(_leaves(node or {}, section))


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; a list is one value. Tuples become lists, because a record is JSON."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, list(values) if isinstance(values, tuple) else values


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        numbers = type(was) in (int, float) and type(now) in (int, float)
        if was != now if numbers else repr(was) != repr(now):
            yield key


def _is_below(key: str, sections: Any) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _named(named: Mapping[str, str]) -> str:
    return ", ".join(named.values()) or "the environment"


def _shown(value: Any) -> Any:
    return {True: "true", False: "false", None: "null"}.get(value, value) if isinstance(value, bool | None) else value
