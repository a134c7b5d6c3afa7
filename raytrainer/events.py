"""The single protocol by which the training loop reports events: to progress, tracking, checkpoints and user callbacks.

A listener is any object with some of the hooks below; each is called as `hook(trainer, event)` in the loop's thread. A
hook that no listener has costs a step nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from raytrainer.errors import ConfigError

Hook = Callable[[Any, Any], None]


@dataclass(frozen=True, slots=True)
class FitStart:
    """Training begins, or continues at `step`.

    `total_steps` is None if only time ends it. Of the model's `parameters`, the `trainable` ones get a gradient.
    """

    step: int
    total_steps: int | None
    steps_per_epoch: int | None
    world_size: int
    parameters: int
    trainable: int


@dataclass(frozen=True, slots=True)
class StepEnd:
    """Optimizer step number `step` (from 1) is done; its kernels may still be running on the device."""

    step: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Logged:
    """The means over the steps since the last log, reduced over all workers."""

    step: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EvalEnd:
    """The validation metrics after step `step`."""

    step: int
    epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint was handed to the writer; it is valid once its manifest is committed."""

    step: int
    metric: float | None
    stall_s: float


@dataclass(frozen=True, slots=True)
class FitEnd:
    """Training is over: `reason` is finished, early_stopping, max_time or stopped."""

    step: int
    epoch: int
    reason: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder for the run's artifacts, from `Trainer.log_artifact`."""

    path: str
    folder: str | None = None


HOOKS = ("on_fit_start", "on_step_end", "on_log", "on_eval_end", "on_checkpoint", "on_artifact", "on_fit_end")


def check_hooks(listener: Any, key: str) -> None:
    """Check the hooks of a callback, or of its class, because a misspelt hook would never be called.

    Args:
        listener: The object, or its class.
        key: The configuration key, for the error.

    Raises:
        ConfigError: It has none of the hooks, a method whose name is nearly a hook's, or a hook that cannot be called
            with (trainer, event).
    """
    kind = listener if isinstance(listener, type) else type(listener)
    if not any(hasattr(listener, hook) for hook in HOOKS):
        if isinstance(listener, type):
            raise ConfigError("has none of the hooks", key=key, value=kind.__name__, choices=HOOKS)
        raise ConfigError(f"builds a {kind.__name__}, which has none of the hooks", key=key, choices=HOOKS)
    for name in sorted(n for n in dir(listener) if n.startswith("on_") and callable(getattr(listener, n, None))):
        if name not in HOOKS:
            if close := get_close_matches(name, HOOKS, n=1, cutoff=0.8):
                raise ConfigError(
                    f"has a method {name}, which is never called. Did you mean {close[0]}?",
                    key=key,
                    value=kind.__name__,
                )
            continue
        given = ("self", "trainer", "event") if isinstance(listener, type) else ("trainer", "event")
        try:
            inspect.signature(getattr(listener, name)).bind(*given)
        except ValueError:  # it has no signature
            continue
        except TypeError as error:
            if isinstance(inspect.getattr_static(kind, name, None), staticmethod | classmethod):
                continue
            raise ConfigError(
                f"has a hook {name} that cannot be called as {name}(trainer, event): {error}",
                key=key,
                value=kind.__name__,
            ) from error


class Events:
    """Calls each hook of each listener, in the given order. The lists are built once."""

    def __init__(self, listeners: Iterable[Any]) -> None:
        listeners = list(listeners)
        self._hooks: dict[str, list[Hook]] = {
            name: [hook for x in listeners if callable(hook := getattr(x, name, None))] for name in HOOKS
        }

    def fit_start(self, trainer: Any, event: FitStart) -> None:
        self._call("on_fit_start", trainer, event)

    def step_end(self, trainer: Any, step: int, epoch: int) -> None:
        # The event is created only if there is a listener, because this is called at every step.
        if self._hooks["on_step_end"]:
            self._call("on_step_end", trainer, StepEnd(step, epoch))

    def log(self, trainer: Any, event: Logged) -> None:
        self._call("on_log", trainer, event)

    def eval_end(self, trainer: Any, event: EvalEnd) -> None:
        self._call("on_eval_end", trainer, event)

    def checkpoint(self, trainer: Any, event: CheckpointSaved) -> None:
        self._call("on_checkpoint", trainer, event)

    def artifact(self, trainer: Any, event: Artifact) -> None:
        self._call("on_artifact", trainer, event)

    def fit_end(self, trainer: Any, event: FitEnd) -> None:
        self._call("on_fit_end", trainer, event)

    def _call(self, name: str, trainer: Any, event: Any) -> None:
        for hook in self._hooks[name]:
            hook(trainer, event)
