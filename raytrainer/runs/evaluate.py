"""`evaluate ID`: a new run, below the evaluated one in MLflow, that validates one of its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from raytrainer.attempt import tracking_uri
from raytrainer.config import Composition, compose, from_text, group_names, new_name, with_values
from raytrainer.errors import ConfigError
from raytrainer.plugins import backend_named
from raytrainer.runs.arguments import VerbParser
from raytrainer.runs.recorded import base_name, trained_run
from raytrainer.storage import redacted

ABOUT = "Validate a checkpoint (the best) on its own validation set or another, in a new child run in MLflow."
# The sections of a group that matter for an evaluation. The other groups belong to the model and its training.
_CHOICES = {"data": ("data.val", "data.collate_fn"), "cluster": ("cluster",)}
_FIXED_SECTIONS = {
    "model",
    "optimizer",
    "lr_scheduler",
    "init_from",
    "seed",
    "storage_path",
    "sweep",
    "evaluate",
    "debug",
}
_FIXED_KEYS = ("trainer.ema_decay", "trainer.freeze")


def add_arguments(parser: VerbParser) -> None:
    parser.add_checkpoint()
    about = "a further directory with choices of data=…"
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help=about)
    parser.add_id()
    parser.add_overrides()


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
    source = trained_run(identifier, checkpoint)
    record, text, root = source.record, source.text, source.root
    choices, values = _split(overrides, config_dir)
    fixed: dict[str, Any] = {
        "name": new_name(f"{base_name(record)[:50]}-evaluate"),
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
    if root.display != redacted(record.run_dir):  # the run was moved or copied
        fixed["storage_path"] = root.display.rpartition("/")[0]
    for group, choice in choices.items():
        fixed.update(_section(group, choice, values, config_dir))
    if "cluster" in choices and backend_named(fixed["cluster"]["kind"]).ray == "none":
        fixed["scaling.num_workers"] = 1
    composition = from_text(with_values(text, fixed), values)
    if not composition.experiment.data.val_sets:
        raise ConfigError("is not set: there is nothing to evaluate on", key="data.val")
    return replace(composition, choices=tuple(sorted({**record.choices, **choices}.items())))


def _split(overrides: Sequence[str], config_dir: str | None) -> tuple[dict[str, str], list[str]]:
    """Split overrides into choices of groups and values."""
    choices: dict[str, str] = {}
    values = []
    for override in overrides:
        name, _, value = override.partition("=")
        name = name.lstrip("+~")
        section = name.partition(".")[0]
        if name in _CHOICES and not value.startswith("{"):
            choices[name] = value
        elif section in _FIXED_SECTIONS or name in _FIXED_KEYS or ("." not in name and name in group_names(config_dir)):
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


def _section(group: str, choice: str, overrides: Sequence[str], config_dir: str | None) -> dict[str, Any]:
    """Return what a choice of a group adds to the config, with its references unresolved."""
    own = [value for value in overrides if value.lstrip("+").startswith(f"{group}.")]
    folder = None if config_dir is None else Path(config_dir)
    # Make it a valid experiment: a length, training data, and `evaluate`, with which monitors are not checked.
    rest = ["trainer.max_steps=1", "evaluate={checkpoint:best}", "data.train={_target_:builtins.dict}"]
    composed = yaml.safe_load(compose([f"{group}={choice}", *own, *rest], folder).text)
    values: dict[str, Any] = {}
    for name in _CHOICES[group]:
        node = composed
        for part in name.split("."):
            node = node.get(part) if node else None
        values[name] = node
    return values
