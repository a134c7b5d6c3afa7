"""What `evaluate ID` launches: a new run, below the evaluated one in MLflow, that validates one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from raytrainer.config import Composition, compose, from_text, group_names, new_name, with_values
from raytrainer.errors import ConfigError
from raytrainer.runs.again import stem
from raytrainer.runs.trained import trained
from raytrainer.attempt import tracking_uri
from raytrainer.plugins import backend_named
from raytrainer.storage import redacted

# The sections of a group that matter for an evaluation. The other groups belong to the model and its training.
_CHOICES = {"data": ("data.val", "data.collate_fn"), "cluster": ("cluster",)}
_OF_THE_MODEL = (
    "model",
    "optimizer",
    "lr_scheduler",
    "init_from",
    "seed",
    "storage_path",
    "sweep",
    "evaluate",
    "debug",
)
_OF_ITS_STATE = ("trainer.ema_decay", "trainer.freeze")


def to_evaluate(
    identifier: str, overrides: Sequence[str], *, checkpoint: str = "best", config_dir: str | None = None
) -> Composition:
    """Return the config of the evaluation, for `launch`.

    Args:
        identifier: The ID of a run, or of a trial of a sweep.
        overrides: Values, and choices of the groups `data` (for `data.val` and `data.collate_fn`) and `cluster`.
        checkpoint: `best`, `last`, or a step.
        config_dir: A directory with further choices.

    Raises:
        RunNotFound: There is no such run, or it has no checkpoint.
        ConfigError: An override would change the model, or the run does not have this checkpoint.
    """
    source = trained(identifier, checkpoint)
    record, text, storage = source.record, source.text, source.root
    choices, values = _sorted(overrides, config_dir)
    fixed: dict[str, Any] = {
        "name": new_name(f"{stem(record)[:50]}-evaluate"),
        "evaluate": {"run_dir": source.place.display, "checkpoint": checkpoint, "run_id": source.run_id},
        "tracking.register_model": None,
        "tracking.log_model": False,
        "trainer.early_stopping": None,
        "trainer.profile": None,
    }
    if record.experiment_name:
        fixed["tracking.experiment_name"] = record.experiment_name
    if record.tracking_uri and tracking_uri(from_text(text).experiment, record.tracking_uri) == record.tracking_uri:
        fixed["tracking.tracking_uri"] = record.tracking_uri  # the server of the evaluated run, wherever this is typed
    if storage.display != redacted(record.run_dir):  # the run was moved or copied
        fixed["storage_path"] = storage.display.rpartition("/")[0]
    for group, choice in choices.items():
        fixed.update(_section(group, choice, values, config_dir))
    if "cluster" in choices and backend_named(fixed["cluster"]["kind"]).ray == "none":
        fixed["scaling.num_workers"] = 1
    composition = from_text(with_values(text, fixed), values)
    if not composition.experiment.data.val_sets:
        raise ConfigError("is not set: there is nothing to evaluate on", key="data.val")
    return replace(composition, choices=tuple(sorted({**record.choices, **choices}.items())))


def _sorted(overrides: Sequence[str], config_dir: str | None) -> tuple[dict[str, str], list[str]]:
    """Split overrides into choices of groups and values."""
    choices: dict[str, str] = {}
    values = []
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~")
        section = name.partition(".")[0]
        if name in _CHOICES and not value.startswith("{"):
            choices[name] = value
        elif section in _OF_THE_MODEL or name in _OF_ITS_STATE or _is_group(name, config_dir):
            raise ConfigError(
                "cannot be changed in an evaluation, which uses a checkpoint as it is; values of data, loss, metrics, "
                "scaling, cluster and tracking can be changed",
                key=name,
                value=value,
                choices=[f"{group}=…" for group in _CHOICES],
            )
        else:
            values.append(override)
    return choices, values


def _is_group(name: str, config_dir: str | None) -> bool:
    return "." not in name and name in group_names(config_dir)


def _section(group: str, choice: str, values: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Return what a choice of a group adds to the config, with its references unresolved."""
    own = [value for value in values if value.lstrip("+").startswith(f"{group}.")]
    folder = None if config_dir is None else Path(config_dir)
    # Make it a valid experiment: a length, training data, and `evaluate`, with which monitors are not checked.
    rest = ["trainer.max_steps=1", "evaluate={checkpoint:best}", "data.train={_target_:builtins.dict}"]
    composed = yaml.safe_load(compose([f"{group}={choice}", *own, *rest], folder).text)
    found: dict[str, Any] = {}
    for name in _CHOICES[group]:
        node = composed
        for part in name.split("."):
            node = node.get(part) if node else None
        found[name] = node
    return found
