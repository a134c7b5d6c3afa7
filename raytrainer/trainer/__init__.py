"""The training loop: `Trainer` trains an experiment in one process of many; `FitResult` says how it ended.

It imports neither Ray nor MLflow.
"""

from __future__ import annotations

from raytrainer.trainer.loop import Trainer
from raytrainer.trainer.train_state import FitResult, Objective, TrainState

__all__ = ["FitResult", "Objective", "TrainState", "Trainer"]
