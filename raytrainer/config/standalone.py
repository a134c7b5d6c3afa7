"""A composed config as an experiment of its own: one YAML that composes to the same again, and takes overrides on top.

As any experiment it can be edited, moved and given to others; what it refers to by `${oc.env:…}` stays a reference.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from raytrainer.config.compose import CONFIG_MODULE, CONFIG_NAME
from raytrainer.config.typed import defaults

# What is one launch's and not the experiment's.
_OF_A_LAUNCH = ("name", "storage_path", "sweep")


def as_experiment(text: str, about: Sequence[str] = ()) -> str:
    """A saved `Composition.text` as the file `experiment/NAME.yaml` of a config directory.

    No group is chosen from but `cluster`, so that an experiment that was found in one place can be run in another
    (`cluster=existing`). The choices of the other groups are written out: `optimizer.lr=0.1` on top changes a value,
    but `optimizer=sgd` would only be mixed in.

    Args:
        text: The composition's; its name, place and sweep are left out.
        about: Comments, a line each, for the top of the file.
    """
    # The defaults stand in it too: a key that an override took out must not come back from the root.
    config = OmegaConf.merge(OmegaConf.create(defaults()), OmegaConf.create(text))
    assert isinstance(config, DictConfig)
    for name in _OF_A_LAUNCH:
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
    """The groups that the root config chooses from by default."""
    entries = _read(f"{CONFIG_NAME}.yaml")["defaults"]
    found = [next(iter(entry.items())) for entry in entries if isinstance(entry, dict)]
    return [group for group, choice in found if choice is not None and not group.startswith("override ")]


def _cluster(section: Any) -> tuple[str | None, dict[str, Any]]:
    """The choice of ours that a section `cluster` comes closest to, and in what it differs."""
    kind = section["kind"]
    if not importlib.resources.files(CONFIG_MODULE).joinpath(f"cluster/{kind}.yaml").is_file():
        return None, section  # a reference, as `${oc.env:CLUSTER}`
    chosen = {**defaults()["cluster"], **_read(f"cluster/{kind}.yaml")}
    return kind, {name: value for name, value in section.items() if value != chosen.get(name)}


def _read(name: str) -> dict[str, Any]:
    found = yaml.safe_load(importlib.resources.files(CONFIG_MODULE).joinpath(name).read_text())
    assert isinstance(found, dict)
    return found
