"""The hooks: each is called once for its event, in the order of the listeners. A hook that no listener has costs
nothing."""

from __future__ import annotations

from typing import Any

import pytest

from raytrainer import events
from raytrainer.events import HOOKS, Artifact, CheckpointSaved, EvalEnd, Events, FitEnd, FitStart, Logged, StepEnd

TOLD: dict[str, tuple[Any, Any]] = {
    "on_fit_start": (Events.fit_start, FitStart(0, 10, 5, 1, 99, 99)),
    "on_log": (Events.log, Logged(5, 0, {"train/loss": 1.0})),
    "on_eval_end": (Events.eval_end, EvalEnd(5, 0, {"val/loss": 1.0})),
    "on_checkpoint": (Events.checkpoint, CheckpointSaved(5, None, 0.1)),
    "on_artifact": (Events.artifact, Artifact("a.png", "plots")),
    "on_fit_end": (Events.fit_end, FitEnd(10, 2, "finished")),
}


class All:
    """A listener with every hook."""

    def __init__(self, name: str, told: list[Any]) -> None:
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, event, hook=hook: told.append((name, hook, trainer, event)))


def test_each_event_has_its_hook() -> None:
    told: list[Any] = []
    made = Events([All("first", told), All("second", told)])
    for hook, (tell, event) in TOLD.items():
        tell(made, "trainer", event)
        assert told == [("first", hook, "trainer", event), ("second", hook, "trainer", event)]
        told.clear()
    made.step_end("trainer", 7, 1)
    assert told == [(name, "on_step_end", "trainer", StepEnd(7, 1)) for name in ("first", "second")]
    assert {*TOLD, "on_step_end"} == set(HOOKS)


class Few:
    on_log = None  # switched off

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_eval_end(self, trainer: Any, event: Any) -> None:
        self.told.append(event)


def test_a_listener_has_the_hooks_that_it_wants() -> None:
    few = Few()
    made = Events([few, object()])
    for tell, event in TOLD.values():
        tell(made, None, event)
    assert few.told == [TOLD["on_eval_end"][1]]


def test_a_step_that_nobody_listens_to_makes_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("made for nobody")

    monkeypatch.setattr(events, "StepEnd", fail)
    Events([Few()]).step_end(None, 1, 0)
    with pytest.raises(AssertionError, match="made for nobody"):
        Events([All("one", [])]).step_end(None, 1, 0)


def test_what_a_hook_raises_is_not_swallowed() -> None:
    class Broken:
        def on_log(self, trainer: Any, event: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Events([Broken()]).log(None, TOLD["on_log"][1])
