"""raytrainer: distributed PyTorch training on Ray, configured with Hydra and tracked with MLflow.

The public names are imported when they are first used, so that `import raytrainer` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer import errors
    from raytrainer.attempt import Outcome, check, launch
    from raytrainer.config import Composition, Experiment
    from raytrainer.config.compose import compose
    from raytrainer.plugins import Backend, Job
    from raytrainer.trainer import FitResult, Trainer

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Composition",
    "Experiment",
    "FitResult",
    "Job",
    "Outcome",
    "Trainer",
    "__version__",
    "check",
    "compose",
    "errors",
    "launch",
]

_HOMES = {
    "Backend": "raytrainer.plugins",
    "Job": "raytrainer.plugins",
    "Composition": "raytrainer.config",
    "Experiment": "raytrainer.config",
    "compose": "raytrainer.config",
    "Outcome": "raytrainer.attempt",
    "check": "raytrainer.attempt",
    "launch": "raytrainer.attempt",
    "FitResult": "raytrainer.trainer",
    "Trainer": "raytrainer.trainer",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("raytrainer.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
