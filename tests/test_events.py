"""The hooks: each is called once for its event, in the order that events.py describes, and an unused one costs nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import raytrainer
from raytrainer import events
from raytrainer.errors import ConfigError
from raytrainer.events import (
    HOOKS,
    Artifact,
    Callback,
    CheckpointSaved,
    EvalEnd,
    Events,
    FitEnd,
    FitStart,
    Logged,
    StepEnd,
    Training,
    check_hooks,
)
from raytrainer.parallel import World
from raytrainer.trainer import Trainer
from tests import training
from tests.training import EarlyStopping, Recorder, checkpointer, experiment, fitted, node

EVENTS: dict[str, Any] = {
    "on_fit_start": FitStart(0, 10, 5, 1, 99, 99),
    "on_step_end": StepEnd(7, 1),
    "on_log": Logged(5, 0, {"train/loss": 1.0}),
    "on_eval_end": EvalEnd(5, 0, {"val/loss": 1.0}),
    "on_checkpoint": CheckpointSaved(5, None, 0.1),
    "on_artifact": Artifact("a.png", "plots"),
    "on_fit_end": FitEnd(10, 2, "finished"),
}


class AllHooks:
    """A listener with every hook."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, event, hook=hook: calls.append((name, hook, trainer, event)))


def test_each_event_has_its_hook() -> None:
    calls: list[Any] = []
    dispatcher = Events([AllHooks("first", calls), AllHooks("second", calls)])
    for hook, event in EVENTS.items():
        dispatcher.send("trainer", event)
        assert calls == [("first", hook, "trainer", event), ("second", hook, "trainer", event)]
        calls.clear()
    dispatcher.step_end("trainer", 7, 1)
    assert calls == [(name, "on_step_end", "trainer", StepEnd(7, 1)) for name in ("first", "second")]
    assert tuple(EVENTS) == HOOKS


class OneHook:
    on_log = None  # switched off

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_eval_end(self, trainer: Any, event: Any) -> None:
        self.events.append(event)


class OneHookOfCallback(Callback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_eval_end(self, trainer: Training, event: EvalEnd) -> None:
        self.events.append(event)


@pytest.mark.parametrize("kind", [OneHook, OneHookOfCallback])
def test_only_the_hooks_of_a_listener_are_called(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = kind()
    dispatcher = Events([listener, object()])
    for event in EVENTS.values():
        dispatcher.send(None, event)
    assert listener.events == [EVENTS["on_eval_end"]]
    # No event is made for a step that nobody listens to.
    made: list[Any] = []
    monkeypatch.setattr(StepEnd, "__init__", lambda self, *values: made.append(values))
    dispatcher.step_end(None, 1, 0)
    assert made == []
    Events([AllHooks("one", [])]).step_end(None, 1, 0)
    assert made == [(1, 0)]


def test_an_exception_of_a_hook_is_not_swallowed() -> None:
    class Broken:
        def on_log(self, trainer: Any, event: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Events([Broken()]).send(None, EVENTS["on_log"])


def test_a_callback_that_overrides_no_hook_is_refused() -> None:
    class Misspelt(Callback):
        def on_step_ends(self, trainer: Training, event: StepEnd) -> None:
            pass

    for listener in (Misspelt, Misspelt()):
        with pytest.raises(ConfigError, match=r"callbacks\.mine.* none of the hooks"):
            check_hooks(listener, "callbacks.mine")
    check_hooks(OneHookOfCallback, "callbacks.mine")


# -- the order ---------------------------------------------------------------------------------------------------------


def pattern(lines: list[str], indent: int = 4) -> str:
    """Return the pseudocode as a regular expression over the names of hooks, each followed by a space."""
    result = ""
    while lines:
        depth = len(lines[0]) - len(lines[0].lstrip())
        if depth < indent:
            break
        line = lines.pop(0).strip()
        if line.startswith("for "):
            result += f"(?:{pattern(lines, depth + 4)})*"
        elif line.startswith("if "):
            result += f"(?:{pattern(lines, depth + 4)})?"
        else:
            assert line in HOOKS, line
            result += f"{line} "
    return result


def documented_order() -> re.Pattern[str]:
    assert events.__doc__ is not None
    return re.compile(pattern([line for line in events.__doc__.splitlines() if line.startswith("    ")]))


def test_the_pseudocode_names_every_hook_but_that_of_artifacts() -> None:
    assert set(re.findall(r"on_\w+", documented_order().pattern)) == set(HOOKS) - {"on_artifact"}


def order(recorder: Recorder) -> list[tuple[str, int]]:
    return [(hook, event.step) for hook, event in recorder.told]


def test_the_hooks_are_called_in_the_documented_order(tmp_path: Path) -> None:
    """Two epochs of four steps, with logs, evaluations, checkpoints and an early stop."""
    e = experiment(trainer={"max_steps": None, "max_epochs": 5, "log_every_n_steps": 3})
    e.trainer.early_stopping = EarlyStopping(monitor="val/accuracy", mode="max", patience=1, min_delta=1.0)
    _, recorder = fitted(e, checkpointer=checkpointer(World(), tmp_path))
    calls = order(recorder)
    assert calls == [
        ("on_fit_start", 0),
        *(("on_step_end", step) for step in (1, 2, 3)),
        ("on_log", 3),
        ("on_step_end", 4),
        ("on_eval_end", 4),
        ("on_checkpoint", 4),
        *(("on_step_end", step) for step in (5, 6)),
        ("on_log", 6),
        *(("on_step_end", step) for step in (7, 8)),
        ("on_eval_end", 8),
        ("on_checkpoint", 8),
        ("on_fit_end", 8),
    ]
    assert recorder.told[-1][1].reason == "early_stopping"
    documented, hooks = documented_order(), "".join(f"{hook} " for hook, _ in calls)
    assert documented.fullmatch(hooks)
    for wrong in (
        hooks.replace("on_eval_end on_checkpoint", "on_checkpoint on_eval_end"),
        hooks.replace("on_fit_start", "on_fit_start on_log"),
        hooks.replace("on_checkpoint on_fit_end", "on_fit_end on_checkpoint"),
        hooks.removeprefix("on_fit_start "),
    ):
        assert wrong != hooks
        assert not documented.fullmatch(wrong), wrong


def test_a_figure_after_the_last_log_is_logged_before_the_end() -> None:
    class Late(Callback):
        def on_eval_end(self, trainer: Training, event: EvalEnd) -> None:
            trainer.log({"mine": event.step})

    _, recorder = fitted(experiment(), listeners=[Late()])
    assert order(recorder)[-3:] == [("on_eval_end", 4), ("on_log", 4), ("on_fit_end", 4)]
    assert documented_order().fullmatch("".join(f"{hook} " for hook, _ in order(recorder)))


# -- what callbacks read -----------------------------------------------------------------------------------------------


class Reads(Callback):
    """Records what the documentation says that a callback may read."""

    def __init__(self) -> None:
        self.events: dict[str, Any] = {}
        self.seen: list[Any] = []

    def on_fit_start(self, trainer: Training, event: FitStart) -> None:
        self.events["on_fit_start"] = event
        assert (trainer.world.rank, trainer.world.size, trainer.experiment.seed) == (0, 1, 3)

    def on_step_end(self, trainer: Training, event: StepEnd) -> None:
        self.events["on_step_end"] = event
        assert trainer.step == event.step
        self.seen.append((trainer.epoch, trainer.optimizer.param_groups[0]["lr"]))

    def on_log(self, trainer: Training, event: Logged) -> None:
        self.events["on_log"] = event
        assert trainer.metrics["train/loss"] == event.metrics["train/loss"]

    def on_eval_end(self, trainer: Training, event: EvalEnd) -> None:
        self.events["on_eval_end"] = event
        assert trainer.metrics["val/loss"] == event.metrics["val/loss"]
        Path("figure.txt").write_text("1")
        trainer.log_artifact("figure.txt", "figures")

    def on_checkpoint(self, trainer: Training, event: CheckpointSaved) -> None:
        self.events["on_checkpoint"] = event

    def on_artifact(self, trainer: Training, event: Artifact) -> None:
        self.events["on_artifact"] = event

    def on_fit_end(self, trainer: Training, event: FitEnd) -> None:
        self.events["on_fit_end"] = event
        step, weights = trainer.best_weights()
        assert step == 8
        assert weights.keys() == trainer.raw_model.state_dict().keys()


def test_callbacks_read_what_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    e = experiment(trainer={"max_steps": 8}, callbacks={"reads": node(Reads), "counter": node(training.Counter)})
    trainer = Trainer(e, checkpointer=checkpointer(World(), tmp_path))
    trainer.fit()
    reads = trainer.callbacks["reads"]
    assert reads.seen == [(step // 4, 0.1) for step in range(1, 9)]
    assert set(reads.events) == set(HOOKS)
    documented = Path(__file__).resolve().parents[1].joinpath("docs/your-code.md").read_text()
    for hook, fields in re.findall(r"^\| `(on_\w+)[^|]*\|[^|]*\| `([\w, ]+)` \|$", documented, re.MULTILINE):
        assert all(hasattr(reads.events[hook], field) for field in fields.split(", ")), hook
    assert reads.events["on_fit_start"].parameters == sum(p.numel() for p in trainer.raw_model.parameters())
    assert reads.events["on_artifact"] == Artifact("figure.txt", "figures")
    assert (trainer.best.step, trainer.evaluations) == (reads.events["on_checkpoint"].step, 2)
    assert isinstance(trainer.best.value, float)
    assert isinstance(trainer.model, torch.nn.Module)


def test_the_public_names_are_those_of_the_modules() -> None:
    from raytrainer.tracking import NullTracker, Tracker

    assert raytrainer.Callback is Callback
    assert raytrainer.Tracker is Tracker
    assert raytrainer.events is events
    assert isinstance(NullTracker(), raytrainer.Tracker)
