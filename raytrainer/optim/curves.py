"""Learning-rate curves as pure functions of the step and the length of the run.
A curve returns the factor for the base learning rate, so a resumed run needs only its step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from raytrainer.errors import ConfigError
from raytrainer.optim.groups import Factory, arguments
from raytrainer.optim.protocols import check_scheduler


class Curve(Protocol):
    """The factor for the base learning rate at `step` (from 0) of a run of `total_steps` (None: unknown)."""

    def __call__(self, step: int, total_steps: int | None, /) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Warm-up, then 1.

    Args:
        warmup_steps: Steps in which the factor rises linearly from `1 / (warmup_steps + 1)` to 1: a number of steps, or
            a fraction of the run if below 1.

    Raises:
        ConfigError: The number is negative, or neither whole nor a fraction below 1.
    """

    warmup_steps: float = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def __call__(self, step: int, total_steps: int | None, /) -> float:
        return _warmup(step, _in_steps(self.warmup_steps, total_steps))


@dataclass(frozen=True, kw_only=True)
class _Decay:
    """The common part of the falling curves: warm-up as in `Constant`, then from 1 to `min_factor` at `total_steps`."""

    warmup_steps: float = 0
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        _check_fraction("min_factor", self.min_factor)

    def __call__(self, step: int, total_steps: int | None, /) -> float:
        total = _known(total_steps)
        warmup = _in_steps(self.warmup_steps, total)
        if step < warmup:
            return _warmup(step, warmup)
        start = self._start(warmup, total)
        if step >= total:
            return self.min_factor
        if step <= start:
            return 1.0
        return self.min_factor + (1 - self.min_factor) * self._shape((step - start) / (total - start))

    def _start(self, warmup: int, total: int) -> int:
        """Return the step from which the curve falls."""
        return warmup

    def _shape(self, progress: float) -> float:
        """Return a value that falls from 1 at progress 0 to 0 at progress 1."""
        raise NotImplementedError


class Linear(_Decay):
    """Warm-up, then a linear decrease to `min_factor`."""

    def _shape(self, progress: float) -> float:
        return 1 - progress


class Cosine(_Decay):
    """Warm-up, then half a cosine down to `min_factor` (Loshchilov and Hutter 2016, arXiv:1608.03983, one cycle)."""

    def _shape(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WSD(_Decay):
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395).

    The factor is 1 until the last `decay_fraction` of the run, then it decreases linearly to `min_factor`. A run can be
    extended from a checkpoint taken before the decay.
    """

    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("decay_fraction", self.decay_fraction)

    def _start(self, warmup: int, total: int) -> int:
        return max(warmup, total - round(self.decay_fraction * total))

    def _shape(self, progress: float) -> float:
        return 1 - progress


def build_scheduler(factory: Factory, optimizer: Optimizer, total_steps: int | None) -> LRScheduler:
    """Build the scheduler of `optimizer`, to be stepped once after every optimizer step.

    Args:
        factory: If it takes an `optimizer`, a torch scheduler with everything else bound. If it takes a `step`, a curve
            itself, `(step, total_steps) -> factor`. Otherwise it is called and returns a curve: `partial(Cosine, ...)`.
        optimizer: Its current learning rates are the base.
        total_steps: Optimizer steps in the whole run, also when it resumes; None if the data's length is unknown.

    Raises:
        ConfigError: The curve needs an unknown length or refuses a value, or a scheduler needs a metric.
    """
    accepted = arguments(factory)
    try:
        if "optimizer" in accepted:
            scheduler = factory(optimizer)
            check_scheduler(scheduler)
            return cast("LRScheduler", scheduler)
        curve: Curve = factory if "step" in accepted else factory()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"is refused by its constructor: {error}", key="lr_scheduler") from error
    # A function, because LambdaLR saves an object's fields in its state, and loading them would overwrite values that
    # were given with `resume`.
    return LambdaLR(optimizer, lambda step: curve(step, total_steps))


def _warmup(step: int, warmup: int) -> float:
    # Never 0, so that the first step is not wasted; 1 is first reached after exactly `warmup` steps.
    return min(1.0, (step + 1) / (warmup + 1))


def _in_steps(warmup: float, total_steps: int | None) -> int:
    return int(warmup) if warmup >= 1 or warmup == 0 else round(warmup * _known(total_steps))


def _known(total_steps: int | None) -> int:
    if total_steps is None:
        raise ConfigError(
            "needs the length of the run; set trainer.max_steps, or lr_scheduler=constant with whole warmup_steps",
            key="lr_scheduler",
        )
    return total_steps


def _check_warmup(value: float) -> None:
    if isinstance(value, bool) or value < 0 or (value > 1 and value != int(value)):
        raise ConfigError(
            "must be a whole number of steps, or a fraction of the run below 1",
            key="lr_scheduler.warmup_steps",
            value=value,
        )


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError("must be between 0 and 1", key=f"lr_scheduler.{name}", value=value)
