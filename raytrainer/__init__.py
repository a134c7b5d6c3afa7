"""raytrainer: distributed PyTorch training on Ray, configured with Hydra and tracked with MLflow.

The public names are imported when they are first used, so that `import raytrainer` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer import errors, events
    from raytrainer.attempt import Outcome, check, launch
    from raytrainer.config import Composition, Experiment
    from raytrainer.config.compose import compose
    from raytrainer.events import Callback
    from raytrainer.plugins import Backend, Job
    from raytrainer.tracking import Tracker
    from raytrainer.trainer import FitResult, Trainer

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Callback",
    "Composition",
    "Experiment",
    "FitResult",
    "Job",
    "Outcome",
    "Tracker",
    "Trainer",
    "__version__",
    "check",
    "compose",
    "errors",
    "events",
    "launch",
]

_MODULES = ("errors", "events")
# Public name → the module that it is imported from.
_HOMES = {
    "Backend": "raytrainer.plugins",
    "Callback": "raytrainer.events",
    "Job": "raytrainer.plugins",
    "Composition": "raytrainer.config",
    "Experiment": "raytrainer.config",
    "compose": "raytrainer.config",
    "Outcome": "raytrainer.attempt",
    "check": "raytrainer.attempt",
    "launch": "raytrainer.attempt",
    "Tracker": "raytrainer.tracking",
    "FitResult": "raytrainer.trainer",
    "Trainer": "raytrainer.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"raytrainer.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
