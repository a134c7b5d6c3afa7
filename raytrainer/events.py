"""The events of a training and the hooks that receive them: for progress, tracking and the user's callbacks.

Hooks are called in this order. For each hook, progress and tracking come first, then the callbacks in the order of the
configuration. The loop waits for each.

    on_fit_start
    for each step:
        on_step_end
        if a log is due (trainer.log_every_n_steps, and the last step):
            on_log
        if an evaluation is due (trainer.eval_every_n_steps or the end of an epoch, and the last step):
            on_eval_end
        if a checkpoint is due (section checkpoint, and the last step):
            on_checkpoint
    if a callback called trainer.log after the last log:
        on_log
    on_fit_end

`on_artifact` is called within `trainer.log_artifact`. The evaluation of a checkpoint calls only `on_eval_end`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

from raytrainer.errors import ConfigError

__all__ = [
    "HOOKS",
    "Artifact",
    "Callback",
    "CheckpointSaved",
    "EvalEnd",
    "FitEnd",
    "FitStart",
    "Logged",
    "Place",
    "StepEnd",
    "Training",
]

Hook = Callable[[Any, Any], None]


class Place(Protocol):
    """The place of this process among all processes of the training."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class Training(Protocol):
    """The part of the `Trainer` that a callback may use.

    Attributes:
        world: The rank of this process, and the number of ranks.
        experiment: The configuration, by its keys: `experiment.trainer.max_steps`.
        step: The optimizer steps done.
        epoch: The epoch that the next step belongs to.
        metrics: The last value of each metric.
        raw_model: The model itself, without DDP around it.
        optimizer: The optimizer.
    """

    @property
    def world(self) -> Place: ...
    @property
    def experiment(self) -> Any: ...
    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def raw_model(self) -> Any: ...
    @property
    def optimizer(self) -> Any: ...
    def log(self, metrics: Mapping[str, float], /) -> None: ...
    def log_artifact(self, path: str, folder: str | None = None, /) -> None: ...
    def best_weights(self) -> tuple[int, dict[str, Any]]: ...


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


class Callback:
    """An optional base class of callbacks, for type checkers and editors: override the hooks that you need.

    Any object with some of these methods is a callback. One that inherits a hook without overriding it does not have the
    hook, and a hook that no callback has costs a step nothing. Hooks run on every rank, in the loop's thread. With
    `state_dict` and `load_state_dict` the callback's own state is in the checkpoint.
    """

    def on_fit_start(self, trainer: Training, event: FitStart) -> None: ...
    def on_step_end(self, trainer: Training, event: StepEnd) -> None: ...
    def on_log(self, trainer: Training, event: Logged) -> None: ...
    def on_eval_end(self, trainer: Training, event: EvalEnd) -> None: ...
    def on_checkpoint(self, trainer: Training, event: CheckpointSaved) -> None: ...
    def on_artifact(self, trainer: Training, event: Artifact) -> None: ...
    def on_fit_end(self, trainer: Training, event: FitEnd) -> None: ...


_HOOK_OF: dict[type, str] = {
    FitStart: "on_fit_start",
    StepEnd: "on_step_end",
    Logged: "on_log",
    EvalEnd: "on_eval_end",
    CheckpointSaved: "on_checkpoint",
    Artifact: "on_artifact",
    FitEnd: "on_fit_end",
}
HOOKS = tuple(_HOOK_OF.values())


def _hook(listener: Any, name: str) -> Any:
    """Return a listener's hook; None if it has none, or only that of `Callback`."""
    method = getattr(listener, name, None)
    return None if getattr(method, "__func__", method) is getattr(Callback, name) else method


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
    if not any(_hook(listener, name) is not None for name in HOOKS):
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
        arguments = ("self", "trainer", "event") if isinstance(listener, type) else ("trainer", "event")
        try:
            inspect.signature(getattr(listener, name)).bind(*arguments)
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
    """The hooks of all listeners. They are called in the given order. The lists are built once."""

    def __init__(self, listeners: Iterable[Any]) -> None:
        listeners = list(listeners)
        self._hooks: dict[type, list[Hook]] = {
            kind: [hook for listener in listeners if callable(hook := _hook(listener, name))]
            for kind, name in _HOOK_OF.items()
        }

    def send(self, trainer: Any, event: Any) -> None:
        """Call the hooks of an event's class."""
        for hook in self._hooks[type(event)]:
            hook(trainer, event)

    def step_end(self, trainer: Any, step: int, epoch: int) -> None:
        """Send a `StepEnd`. It is created only if there is a listener, because this is called at every step."""
        if self._hooks[StepEnd]:
            self.send(trainer, StepEnd(step, epoch))
