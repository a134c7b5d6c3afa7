"""`TrainState`: the position and measurements of a training, which each checkpoint holds; and `FitResult`, its result.

The model, the optimizer and other objects keep their own state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrainer.config import Experiment, checkpoint_mode, early_stopping_mode
from raytrainer.metrics import Monitor


@dataclass(frozen=True)
class Objective:
    """The metric of the best checkpoint if it is not `checkpoint.monitor`; for a trial, the sweep's metric.

    Attributes:
        metric: A metric of the evaluation, or `train/…` as last logged before it.
        mode: `max` or `min`.
        at_once: Whether the best is written as soon as it is evaluated, because this process may be killed at any time.
    """

    metric: str
    mode: str
    at_once: bool = False


@dataclass(kw_only=True)
class TrainState:
    """The position of a training, and what it has measured so far.

    The objects of a training (model, optimizer, loader, callbacks, random generators, …) keep their own state, and
    snapshot.py saves it beside this one. Two identical runs have equal states.

    Attributes:
        step: The optimizer steps done. It is the number of global batches consumed, so it is also the position in the
            data.
        evaluations: The evaluations done since the beginning of the run.
        metrics: The last value of each metric.
        callback_metrics: Figures that callbacks gave to `Trainer.log` since the last log.
        evaluated_at, saved_at, logged_at: The steps of the last evaluation, checkpoint and log.
        best: The best value of `checkpoint.monitor`.
        early_stopping: The monitor of `trainer.early_stopping`, which counts evaluations without a gain.
        objective: The monitor of the best checkpoint; often the same object as `best`.
        earlier_s: Seconds of training before this process.
        began: When this process began to train, less `earlier_s`, by the monotonic clock.
    """

    best: Monitor
    early_stopping: Monitor
    objective: Monitor
    step: int = 0
    evaluations: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    callback_metrics: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = 0
    saved_at: int = 0
    logged_at: int = 0
    earlier_s: float = 0.0
    began: float = 0.0

    @classmethod
    def of(cls, e: Experiment, objective: Objective | None = None) -> TrainState:
        """Return the state before the first step of an experiment."""
        monitor, mode, early = e.checkpoint.monitor, checkpoint_mode(e), e.trainer.early_stopping
        best = Monitor(monitor, mode)
        differs = objective is not None and (objective.metric, objective.mode) != (monitor, mode)
        return cls(
            best=best,
            objective=Monitor(objective.metric, objective.mode) if objective is not None and differs else best,
            early_stopping=Monitor(
                (early and early.monitor) or monitor, early_stopping_mode(e), early.min_delta if early else 0.0
            ),
        )

    def start_clock(self) -> None:
        """Start to measure the time of training, including the time before this process."""
        self.began = time.monotonic() - self.earlier_s

    def seconds(self) -> float:
        """Return the seconds of training since the beginning of the run."""
        return time.monotonic() - self.began

    @property
    def is_evaluated(self) -> bool:
        """Whether there was an evaluation after the current step."""
        return self.evaluated_at == self.step

    @property
    def is_best(self) -> bool:
        """Whether the evaluation after the current step is the best one so far."""
        return self.is_evaluated and self.objective.step == self.step

    def update_monitors(self, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an evaluation after the current step."""
        self.metrics.update(metrics)
        self.evaluated_at = self.step
        self.evaluations += 1
        self.best.update(metrics, self.step)
        if self.objective is not self.best:
            self.objective.update(self.metrics, self.step)  # it may be a metric of the training
        self.early_stopping.update(metrics, self.step)

    def state_dict(self, *, timed: bool) -> dict[str, Any]:
        """Return the entries of a checkpoint.

        Args:
            timed: Whether to save the time of training, which differs between two identical runs.
        """
        return {
            "step": self.step,
            "metrics": self.metrics,
            "evaluated_at": self.evaluated_at,
            "evaluations": self.evaluations,
            "logged_at": self.logged_at,
            "extra": dict(self.callback_metrics),
            "elapsed": self.seconds() if timed else 0.0,
            "best": self.best.state_dict(),
            "progress": self.early_stopping.state_dict(),
            **({"objective": self.objective.state_dict()} if self.objective is not self.best else {}),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the entries of a checkpoint. An older one may lack some of them."""
        self.step = self.saved_at = int(saved["step"])
        self.metrics, self.callback_metrics = dict(saved["metrics"]), dict(saved["extra"])
        self.earlier_s = float(saved.get("elapsed", 0.0))
        self.evaluations = int(saved.get("evaluations", 0))
        self.evaluated_at, self.logged_at = int(saved["evaluated_at"]), int(saved["logged_at"])
        self.best.load_state_dict(saved["best"])
        self.early_stopping.load_state_dict(saved["progress"])
        if self.objective is not self.best and "objective" in saved:
            self.objective.load_state_dict(saved["objective"])


@dataclass(frozen=True)
class FitResult:
    """The end of a training.

    Attributes:
        step: Optimizer steps done since the beginning of the run.
        epoch: The epoch that the next step would belong to.
        reason: `finished`, `early_stopping`, `max_time` or `stopped`.
        metrics: The last train and validation metrics.
        best: The best value of `checkpoint.monitor`, and its step.
    """

    step: int
    epoch: int
    reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: tuple[float, int] | None = None
