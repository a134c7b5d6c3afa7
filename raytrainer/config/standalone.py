"""Write a composed config as an experiment of its own: one YAML that composes to the same config and takes overrides.

Like any experiment, it can be edited, moved and shared. References such as `${oc.env:…}` stay references.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from raytrainer.config.compose import CONFIG_MODULE, CONFIG_NAME
from raytrainer.config.typed import defaults

# Keys that belong to one launch and not to the experiment.
_KEYS_OF_A_LAUNCH = ("name", "storage_path", "sweep")


def as_experiment(text: str, about: Sequence[str] = ()) -> str:
    """Return a saved `Composition.text` as the file `experiment/NAME.yaml` of a config directory.

    `cluster` is the only group with a choice, so that the experiment can run on another cluster (`cluster=existing`).
    The choices of the other groups are written out: an override `optimizer.lr=0.1` changes a value, but `optimizer=sgd`
    would only be merged in.

    Args:
        text: The text of the composition; its name, storage path and sweep are left out.
        about: Comments for the top of the file, one line each.
    """
    # Include the defaults: a key that an override removed must not come back from the root config.
    config = OmegaConf.merge(OmegaConf.create(defaults()), OmegaConf.create(text))
    assert isinstance(config, DictConfig)
    for name in _KEYS_OF_A_LAUNCH:
        config.pop(name, None)
    overrides: dict[str, str | None] = dict.fromkeys(_chosen())
    overrides["cluster"], rest = _cluster(OmegaConf.to_container(config.cluster, resolve=False))
    if rest:
        config.cluster = rest
    else:
        config.pop("cluster")
    lines = ["# @package _global_", *(f"# {' '.join(line.split())}" for line in about), "defaults:"]
    lines += [f"  - override /{group}: {choice or 'null'}" for group, choice in overrides.items()]
    return "\n".join(lines) + "\n\n" + OmegaConf.to_yaml(config)


def _chosen() -> list[str]:
    """Return the groups for which the root config has a default choice."""
    entries = _read(f"{CONFIG_NAME}.yaml")["defaults"]
    choices = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    return [group for group, choice in choices if choice is not None and not group.startswith("override ")]


def _cluster(section: Any) -> tuple[str | None, dict[str, Any]]:
    """Return raytrainer's choice of the group `cluster` for a section, and the keys in which the section differs."""
    kind = section["kind"]
    if not importlib.resources.files(CONFIG_MODULE).joinpath(f"cluster/{kind}.yaml").is_file():
        return None, section  # a reference such as `${oc.env:CLUSTER}`
    chosen = {**defaults()["cluster"], **_read(f"cluster/{kind}.yaml")}
    return kind, {name: value for name, value in section.items() if value != chosen.get(name)}


def _read(name: str) -> dict[str, Any]:
    content = yaml.safe_load(importlib.resources.files(CONFIG_MODULE).joinpath(name).read_text())
    assert isinstance(content, dict)
    return content
