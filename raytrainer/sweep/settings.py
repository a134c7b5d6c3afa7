"""The settings `hydra.sweeper.*` of a sweep over any Hydra application: their defaults and their checks.
This module must import quickly, because Hydra imports the plugin, which uses it, at every start of every application.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from raytrainer.errors import ConfigError

KEY = "hydra.sweeper"
DIRECTIONS = {"minimize": "min", "maximize": "max"}
# Short names. Any other value must be a node.
SEARCHES: Mapping[str, Mapping[str, Any] | None] = {
    "random": None,
    "grid": {"_target_": "raytrainer.sweep.GridSearch"},
    "optuna": {"_target_": "ray.tune.search.optuna.OptunaSearch"},
}
SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "asha": {"_target_": "ray.tune.schedulers.ASHAScheduler", "grace_period": 1, "reduction_factor": 3},
    "median": {"_target_": "ray.tune.schedulers.MedianStoppingRule", "grace_period": 3},
}
_LEAST = {"num_samples": 1, "max_concurrent_trials": 1, "max_trial_failures": 0, "seed": 0}
_OPTIONAL = ("num_samples", "max_concurrent_trials")


@dataclass(kw_only=True)
class Settings:
    """The section `hydra.sweeper`.

    Attributes:
        num_samples: The number of trials. None: all of a grid; for other searches 20, or as many as the time budget
            allows.
        direction: `minimize` or `maximize` the value that the function returns.
        search_alg: A short name or a node; None for random search.
        scheduler: A short name or a node; None if no trial is stopped early.
        seed: The seed for sampling.
        params: Key → a sweep as on the command line, a list, or one value.
        max_concurrent_trials: None for as many as fit.
        time_budget_s: Seconds, or a text such as `1h30m`.
        resources_per_trial: Ray's name of a resource → amount.
        max_trial_failures: How often a failed trial is tried again.
        resume: Whether to continue a sweep that is in the folder.
        address: The address of a Ray cluster; None to start Ray on this machine.
    """

    num_samples: int | None = None
    direction: str = "minimize"
    search_alg: Any = None
    scheduler: Any = None
    seed: int = 0
    params: dict[str, Any] = field(default_factory=dict)
    max_concurrent_trials: int | None = None
    time_budget_s: Any = None
    resources_per_trial: dict[str, float] = field(default_factory=lambda: {"CPU": 1})
    max_trial_failures: int = 0
    resume: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                or_null = ", or null" if name in _OPTIONAL else ""
                raise ConfigError(
                    f"must be a whole number of at least {least}{or_null}", key=f"{KEY}.{name}", value=value
                )
        if not isinstance(self.direction, str) or self.direction not in DIRECTIONS:
            raise ConfigError(
                "must be one direction, since a sweep optimizes one number",
                key=f"{KEY}.direction",
                value=self.direction,
                choices=DIRECTIONS,
            )
        if not isinstance(self.resume, bool):
            raise ConfigError("must be true or false", key=f"{KEY}.resume", value=self.resume)
        if self.address is not None and not isinstance(self.address, str):
            raise ConfigError("must be the address of a Ray cluster, or null", key=f"{KEY}.address", value=self.address)
        if not isinstance(self.params, dict):
            raise ConfigError("must be a mapping of keys to sweeps", key=f"{KEY}.params", value=self.params)
        self._check_resources()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Settings:
        """Make the settings from those of an application or a command line.

        Raises:
            ConfigError: A setting does not exist (the error lists those that do), or its value is invalid.
        """
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError("is not a setting of ray_tune", key=f"{KEY}.{name}", choices=known)
        return cls(**settings)

    @property
    def search_node(self) -> dict[str, Any] | None:
        """The searcher's node.

        Raises:
            ConfigError: The short name does not exist.
        """
        return _node("search_alg", self.search_alg, SEARCHES)

    @property
    def scheduler_node(self) -> dict[str, Any] | None:
        """The scheduler's node. It raises the same error as `search_node`."""
        return _node("scheduler", self.scheduler, SCHEDULERS)

    def _check_resources(self) -> None:
        key, resources = f"{KEY}.resources_per_trial", self.resources_per_trial
        if not isinstance(resources, dict):
            raise ConfigError("must be names with amounts, as {CPU: 1}", key=key, value=resources)
        for name, amount in resources.items():
            if str(name) in ("cpu", "gpu", "Cpu", "Gpu"):
                raise ConfigError(f"is written {str(name).upper()}", key=f"{key}.{name}")
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < float("inf"):
                raise ConfigError("must be a number, not below 0", key=f"{key}.{name}", value=amount)
        if not any(resources.values()):
            raise ConfigError("must have an amount above 0: nothing else limits how many trials run at a time", key=key)


def _node(name: str, value: Any, short: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value not in short:
            raise ConfigError(
                "is neither a short name nor a node with a _target_", key=f"{KEY}.{name}", value=value, choices=short
            )
        node = short[value]
        return None if node is None else dict(node)
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
        raise ConfigError(
            "must be a node with a _target_, null or a short name", key=f"{KEY}.{name}", value=value, choices=short
        )
    return dict(value)
