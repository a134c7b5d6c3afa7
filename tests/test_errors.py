"""The tree of exceptions: the drawing is correct, each exception survives pickling, and the messages read well."""

from __future__ import annotations

import inspect
import pickle
import re
from typing import Any

import pytest

from raytrainer import errors
from raytrainer.errors import (
    ConfigError,
    PreflightError,
    RaytrainerError,
    Refused,
    Stopped,
    TrainingError,
    WorkerError,
    nearest,
)

KINDS = [x for _, x in inspect.getmembers(errors, inspect.isclass) if issubclass(x, RaytrainerError)]
WITH_FIELDS: list[RaytrainerError] = [
    ConfigError("is not a key", key="trainer.max_epoch", value=3, choices=("trainer.max_epochs",)),
    PreflightError(["no GPU", "no disk"]),
    WorkerError("ValueError: x", rank=1, node="n", traceback="Traceback…", when=3.0, retry=False),
    Stopped("interrupted", exit_code=143),
]


def test_the_drawn_tree_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if m := re.match(r"([│ ]*)(?:[├└]── )?(\w+)(?:  |$)", line):
            depth = len(m[1]) // 4 + (1 if "──" in line else 0)
            if m[2] in {k.__name__ for k in KINDS}:
                above[depth:] = [m[2]]
                drawn[m[2]] = above[depth - 1] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in KINDS if kind.__base__}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_is_documented(kind: type[RaytrainerError]) -> None:
    assert kind.__doc__ is not None
    assert kind.__doc__ != (kind.__base__.__doc__ if kind.__base__ else None)


@pytest.mark.parametrize(
    "error", [*(k("said") for k in KINDS if k is not PreflightError), *WITH_FIELDS], ids=lambda e: type(e).__name__
)
def test_each_survives_pickling(error: RaytrainerError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__
    assert again.args == error.args


class OddError(TrainingError):
    """A user's subclass whose constructor has other parameters."""

    def __init__(self, a: int, *, b: int) -> None:
        self.a, self.b = a, b
        super().__init__(f"{a} and {b}")


def test_so_does_a_subclass_with_a_constructor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, OddError.__module__, sys.modules[__name__])
    again = pickle.loads(pickle.dumps(OddError(1, b=2)))
    assert (again.a, again.b, str(again)) == (1, 2, "1 and 2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "is bad"),
        ({"key": "a.b"}, "a.b is bad"),
        ({"key": "a.b", "value": 3}, "a.b=3 is bad"),
        ({"key": "a.b", "value": True}, "a.b=true is bad"),
        ({"key": "a.b", "value": [1, None, {"x": False}]}, "a.b=[1,null,{x:false}] is bad"),
        ({"key": "a.b", "value": ""}, "a.b= is bad"),
        ({"key": "a", "value": "sdg", "choices": ["adamw", "sgd", "sgd"]}, "a=sdg is bad; valid: sgd, adamw"),
        ({"key": "a.lrr", "choices": ["beta", "lr"]}, "a.lrr is bad; valid: lr, beta"),
        ({"key": "a", "value": "?", "choices": [f"c{i}" for i in range(20)]}, None),
    ],
)
def test_a_config_error_names_key_value_and_the_nearest_first(arguments: dict[str, Any], said: str | None) -> None:
    message = str(ConfigError("is bad", **arguments))
    assert message == said or (said is None and message.endswith("c11, …"))


def test_a_long_value_is_cut() -> None:
    assert len(str(ConfigError("is bad", key="a", value="x" * 10_000))) < 300


def test_refused_launches_exit_with_2() -> None:
    assert all(issubclass(k, Refused) for k in (ConfigError, PreflightError, errors.RunNotFound))
    assert not issubclass(WorkerError, Refused)


def test_a_worker_error_says_who() -> None:
    assert str(WorkerError("ValueError: x", rank=1, node="n")) == "rank 1 on node n: ValueError: x"
    assert str(WorkerError("died")) == "a worker: died"


@pytest.mark.parametrize(
    ("word", "choices", "first"),
    [
        ("experimnt", ["checkpoint", "experiment", "optimizer"], "experiment"),
        ("modle", ["module", "model", "middle"], "model"),  # two letters swapped
        ("optimzer", ["optimizer", "optimize"], "optimizer"),
        ("Resnet18", ["resnet50", "resnet18"], "resnet18"),
        ("max_epoch", ["max_steps", "max_time", "max_epochs"], "max_epochs"),
    ],
)
def test_the_nearest_takes_the_fewest_changes(word: str, choices: list[str], first: str) -> None:
    assert nearest(word, choices)[0] == first


def test_nearest() -> None:
    assert nearest("chek", ["check", "resume"]) == ["check"]
    assert nearest("zzz", ["check", "resume"]) == []
