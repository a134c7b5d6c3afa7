"""Tests of which limit a launch reports at its end, without a launch."""

from __future__ import annotations

from typing import Any

import pytest

from raytrainer.attempt.launching import _reached_limit
from tests.training import experiment


@pytest.mark.parametrize(
    ("limits", "result", "key"),
    [
        ({"max_steps": 10, "max_epochs": None}, {"step": 10, "reason": "finished"}, "trainer.max_steps"),
        ({"max_steps": None, "max_epochs": 2}, {"step": 10, "reason": "finished"}, "trainer.max_epochs"),
        ({"max_steps": 10, "max_epochs": 2}, {"step": 10, "reason": "finished"}, "trainer.max_steps"),
        ({"max_steps": 10, "max_epochs": 2}, {"step": 8, "reason": "finished"}, "trainer.max_epochs"),
        ({"max_steps": 10, "max_epochs": 2, "max_time": 5.0}, {"step": 3, "reason": "max_time"}, "trainer.max_time"),
        ({"max_steps": None, "max_epochs": None, "max_time": 5.0}, None, "trainer.max_time"),
        ({"max_steps": 10, "max_time": 5.0}, None, "trainer.max_steps"),
    ],
)
def test_the_limit_that_ended_a_run_is_the_one_to_raise(
    limits: dict[str, Any], result: dict[str, Any] | None, key: str
) -> None:
    assert _reached_limit(experiment(trainer=limits), result) == key
