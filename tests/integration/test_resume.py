"""Exact resume: runs whose workers or driver are killed at random points give, bit for bit, the losses and the weights
of the run that nobody disturbed. Real processes, SIGKILL; the seed of the kill points is printed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launches import (
    ENDS_S,
    Launch,
    Runs,
    Step,
    assert_equal_states,
    checkpoints,
    final_state,
    launch,
    launched,
    observed,
    restarts,
    seeded,
    steps_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, EVERY, PAUSE_S = 48, 7, 0.02
# Workers outlive a killed driver by up to two seconds, and must not get to the end in them.
SLOWER_S = 0.2
SLOWER = f"callbacks.steps.pause_s={SLOWER_S}"
KILLS = 2  # the second hits a run that has gone on once
COMMON = [
    f"trainer.max_steps={STEPS}",
    "trainer.max_epochs=null",
    "trainer.eval_every_n_steps=11",
    f"checkpoint.every_n_steps={EVERY}",
    "tracking.log_model=false",
    *observed(PAUSE_S),
]
# Every source of randomness that a step has: augmentation, dropout, batch statistics; an odd batch that two ranks share
# unevenly, accumulation, a second copy of the weights, and a window of metrics that is open when a checkpoint is made.
EXPERIMENTS = {
    "resnet": ["experiment=resnet", "trainer.log_every_n_steps=1"],
    "mlp": [
        "experiment=mlp",
        "model.dropout=0.3",
        "data.global_batch_size=101",
        "data.micro_batch_size=20",
        "trainer.ema_decay=0.9",
        "trainer.log_every_n_steps=3",
    ],
}
WORKERS = {2: ["scaling.num_workers=2"], 4: ["scaling.num_workers=4", "scaling.resources_per_worker={CPU: 0.5}"]}


@dataclass(frozen=True)
class Undisturbed:
    arguments: list[str]
    state: dict[str, Any]
    results: dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`undisturbed(experiment, workers)`: the run that others are compared with, trained once."""
    known: dict[tuple[str, int], Undisturbed] = {}

    def train(experiment: str, workers: int) -> Undisturbed:
        if (experiment, workers) not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            arguments = [*EXPERIMENTS[experiment], *COMMON, *WORKERS[workers], "name=run"]
            ended = launched(folder, *arguments)
            ended.exits(0)
            known[experiment, workers] = Undisturbed(arguments, final_state(folder, "run"), Runs(folder).results("run"))
        return known[experiment, workers]

    return train


def points(draw: random.Random, count: int, margin: int = 6) -> list[int]:
    """Steps to kill after, one in each part of the run; none before the first checkpoint, or in the last `margin`."""
    first, part = EVERY + 2, (STEPS - EVERY - margin) // count
    return [first + part * i + draw.randrange(part) for i in range(count)]


def kill_worker(run: Launch, draw: random.Random, step: int, workers: int, killed: set[int]) -> Step:
    """SIGKILL of a random rank, some time in the step after `step`, or in the save, evaluation or log before it."""
    rank = draw.randrange(workers)
    at = run.reaches(step, rank, but=frozenset(killed))
    time.sleep(draw.uniform(0, 3 * PAUSE_S))
    os.kill(at.pid, signal.SIGKILL)
    # The others of the group go too, when it is restarted.
    killed.update(run.reaches(0, other).pid for other in range(workers))
    return at


def assert_went_on(run: Launch, kills: list[Step], workers: int) -> None:
    """Each restart went on after a checkpoint that is at most one interval and the save in flight behind, on each rank."""
    for rank in range(workers):
        steps = steps_of(run.steps, rank)
        assert steps[-1].step == STEPS
        found = restarts(steps)
        assert len(found) == len(kills)
        for before, after in found:
            assert after > 1
            assert before - 2 * EVERY < after <= before + 1


def assert_as_undisturbed(folder: Path, reference: Undisturbed) -> None:
    results = Runs(folder).results("run")
    assert {"train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy"} < results.keys()
    for key, rows in results.items():
        steps = [step for step, _ in rows]
        assert len(steps) == len(set(steps)), f"{key}: a step twice"
        assert rows == reference.results[key], key
    assert results.keys() == reference.results.keys()
    assert_equal_states(final_state(folder, "run"), reference.state)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_killed_workers_change_nothing(experiment: str, undisturbed: Any, tmp_path: Path) -> None:
    """Fault 1: Ray restarts the workers by itself, and each kill uses one of `failure.max_failures`."""
    reference, draw = undisturbed(experiment, 2), seeded(f"workers of {experiment}")
    with launch(tmp_path, *reference.arguments, f"failure.max_failures={KILLS}") as run:
        killed: set[int] = set()
        kills = [kill_worker(run, draw, step, 2, killed) for step in points(draw, KILLS)]
        ended = run.wait()
        run.nothing_left()
    ended.exits(0)
    assert f"({KILLS} of {KILLS})" in ended.err
    assert_went_on(run, kills, 2)
    assert Runs(tmp_path).status("run") == "FINISHED"
    assert_as_undisturbed(tmp_path, reference)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_killed_driver_changes_nothing(experiment: str, undisturbed: Any, tmp_path: Path) -> None:
    """Fault 4: `resume` goes on, in the same MLflow run, which is then closed as it ended."""
    reference, draw = undisturbed(experiment, 2), seeded(f"driver of {experiment}")
    arguments, kills = [*reference.arguments, SLOWER], []
    for step in points(draw, KILLS, margin=20):
        kills.append(kill_driver(tmp_path, draw, step, *arguments))
        arguments = ["resume", "run"]
    with launch(tmp_path, *arguments) as run:
        ended = run.wait()
        run.nothing_left()
    ended.exits(0)
    assert_went_on(run, kills, 2)
    assert Runs(tmp_path).status("run") == "FINISHED"
    assert_as_undisturbed(tmp_path, reference)


def test_four_workers(undisturbed: Any, tmp_path: Path) -> None:
    """More than two ranks add up gradients in an order that a restart must not change: a killed driver, then a worker."""
    reference, draw = undisturbed("mlp", 4), seeded("four workers")
    first, second = points(draw, 2, margin=20)
    kills = [kill_driver(tmp_path, draw, first, *reference.arguments, SLOWER)]
    with launch(tmp_path, "resume", "run") as run:
        gone = pids(run, 4)
        kills.append(kill_worker(run, draw, second, 4, gone))
        ended = run.wait()
        run.nothing_left()
    ended.exits(0)
    assert_went_on(run, kills, 4)
    assert_as_undisturbed(tmp_path, reference)


def kill_driver(folder: Path, draw: random.Random, step: int, *arguments: str) -> Step:
    """A launch whose driver is killed some time after `step`; everything else of it ends by itself, in time."""
    with launch(folder, *arguments) as run:
        at = run.reaches(step, but=frozenset(pids(run, 4)))
        time.sleep(draw.uniform(SLOWER_S / 2, SLOWER_S + 0.06))
        run.kill()
        took = run.nothing_left(ENDS_S)
    print(f"driver killed after step {at.step}; its workers were gone after {took:.1f} s")
    assert Runs(folder).status("run") == "RUNNING"
    assert checkpoints(folder, "run")
    return at


def pids(run: Launch, workers: int) -> set[int]:
    """The processes that have trained so far in the launch's directory."""

    return {step.pid for rank in range(workers) for step in steps_of(run.steps, rank)}
