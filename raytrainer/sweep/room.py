"""Determine how many trials of a sweep run at a time, and with which resources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytrainer import preflight
from raytrainer.config import Experiment


@dataclass(frozen=True)
class Room:
    """The room for trials on a cluster.

    Attributes:
        at_once: How many trials run at a time.
        resources: The resources of one, for Tune.
        notes: Lines for the user.
    """

    at_once: int
    resources: Any
    notes: tuple[str, ...]


def make_room(e: Experiment, *, gpu: bool, available: preflight.Resources) -> Room:
    """Return the room for trials on the cluster that Ray is connected to.

    Args:
        e: The experiment.
        gpu: Whether the trials train on GPUs.
        available: The resources that the cluster has and can add.
    """
    from raytrainer import ray_internals

    bundle, workers, strategy = preflight.bundle(e, gpu), preflight.least_workers(e), e.scaling.placement_strategy
    # Include the nodes that an autoscaler can add.
    nodes = [*ray_internals.nodes(), *available.more[: available.most_more]]
    fit = max(1, ray_internals.capacity(bundle, workers, nodes, strategy))
    limit, note = at_once(e.sweep.max_concurrent_trials, fit, grows=available.endless)
    resources = ray_internals.trial_resources(bundle, workers, strategy, e.scaling.label_selector)
    return Room(limit, resources, () if note is None else (note,))


def at_once(setting: int | None, fit: int, *, grows: bool = False) -> tuple[int, str | None]:
    """Return how many trials run at a time, and a note for the user if that differs from the setting.

    Args:
        setting: `sweep.max_concurrent_trials`.
        fit: How many trials the cluster can place. More would only wait.
        grows: Whether the cluster can grow beyond its known size.
    """
    if setting is None or (setting > fit and not grows):
        note = None if setting is None else f"sweep.max_concurrent_trials={setting}: there is room for {fit} at a time"
        return fit, note
    return setting, None
