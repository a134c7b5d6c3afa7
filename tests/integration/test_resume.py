"""Exact resume: runs whose workers or driver are killed at random points give, bit for bit, the losses and weights of
an undisturbed run. Processes and SIGKILL are real; the seed of the kill points is printed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

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

pytestmark = pytest.mark.slow

STEPS, EVERY, PAUSE_S = 48, 7, 0.02
# Workers outlive a killed driver by up to two seconds, and must not finish the run in that time.
SLOWER_S = 0.2
SLOWER = {"STEPS_PAUSE_S": f"{SLOWER_S}"}
COMMON = [
    f"trainer.max_steps={STEPS}",
    "trainer.max_epochs=null",
    "trainer.eval_every_n_steps=11",
    f"checkpoint.every_n_steps={EVERY}",
    "tracking.log_model=false",
    *observed(PAUSE_S),
]
# Every source of randomness in a step: augmentation, dropout and batch statistics. Also an odd batch that two ranks
# share unevenly, accumulation, a second copy of the weights, and a window of metrics that is open at a checkpoint.
EXPERIMENTS = {
    "resnet": ["experiment=resnet", "model.width=8", "trainer.log_every_n_steps=1"],
    "mlp": [
        "experiment=mlp",
        "model.dropout=0.3",
        "data.global_batch_size=101",
        "data.micro_batch_size=20",
        "trainer.ema_decay=0.9",
        "trainer.log_every_n_steps=3",
    ],
}
# With more than two ranks, a restart must not change the order in which gradients are summed.
WORKERS = {2: ["scaling.num_workers=2"], 3: ["scaling.num_workers=3", "scaling.resources_per_worker={CPU: 0.5}"]}


def points(draw: random.Random, first: int, last: int, count: int) -> list[int]:
    """Return the steps to kill after, one in each part of `first` to `last`."""
    part = (last - first) // count
    return [first + part * i + draw.randrange(part) for i in range(count)]


def kill_worker(run: Launch, draw: random.Random, step: int, workers: int, killed: set[int]) -> Step:
    """Send SIGKILL to a random rank: in the step after `step`, or in the save, evaluation or log before it."""
    rank = draw.randrange(workers)
    at = run.reaches(step, rank, but=frozenset(killed))
    time.sleep(draw.uniform(0, 3 * PAUSE_S))
    os.kill(at.pid, signal.SIGKILL)
    # When the group restarts, its other processes end too.
    killed.update(run.reaches(0, other).pid for other in range(workers))
    return at


def assert_went_on(run: Launch, kills: list[Step], workers: int) -> None:
    """Check that each rank continued after each kill, from at most one interval and one unfinished save before it."""
    for rank in range(workers):
        steps = steps_of(run.steps, rank)
        assert steps[-1].step == STEPS
        found = restarts(steps)
        assert len(found) == len(kills)
        for before, after in found:
            assert after > 1
            assert before - 2 * EVERY < after <= before + 1


@pytest.mark.parametrize(
    ("experiment", "workers", "count"),
    [
        ("resnet", 2, 1),
        # The second kill hits a run that was resumed once.
        pytest.param("resnet", 2, 2, marks=pytest.mark.nightly),
        pytest.param("mlp", 3, 2, marks=pytest.mark.nightly),
    ],
)
def test_killed_drivers_and_workers_change_nothing(experiment: str, workers: int, count: int, tmp_path: Path) -> None:
    """Faults 4 and 1: `resume` continues after a killed driver, in the same MLflow run, which then gets its final
    status. Ray restarts killed workers itself, and each kill uses one of `failure.max_failures`."""
    arguments = [*EXPERIMENTS[experiment], *COMMON, *WORKERS[workers], "name=run"]
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    folder.mkdir()
    launched(undisturbed, *arguments).exits(0)

    draw = seeded(f"{experiment} on {workers}")
    # The first checkpoint exists, and the workers cannot finish the run after their driver's death.
    kills, command = [], [*arguments, f"failure.max_failures={count}"]
    for step in points(draw, EVERY + 2, STEPS - 29, count):
        kills.append(kill_driver(folder, draw, step, workers, *command))
        command = ["resume", "run"]
    with launch(folder, *command) as run:
        gone = pids(run, workers)
        late = points(draw, STEPS - 17, STEPS - 6, count)
        kills += [kill_worker(run, draw, step, workers, gone) for step in late]
        ended = run.wait()
        run.nothing_left()
    ended.exits(0)
    assert f"({count} of {count})" in ended.err
    assert_went_on(run, kills, workers)
    assert Runs(folder).status("run") == "FINISHED"
    assert_as_undisturbed(folder, undisturbed)


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    results, expected = Runs(folder).results("run"), Runs(undisturbed).results("run")
    assert {"train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy"} < results.keys()
    for key, rows in results.items():
        steps = [step for step, _ in rows]
        assert len(steps) == len(set(steps)), f"{key}: a step twice"
        assert rows == expected[key], key
    assert results.keys() == expected.keys()
    assert_equal_states(final_state(folder, "run"), final_state(undisturbed, "run"))


def kill_driver(folder: Path, draw: random.Random, step: int, workers: int, *arguments: str) -> Step:
    """Kill the driver of a launch some time after `step`. Check that everything else of it ends by itself, in time."""
    with launch(folder, *arguments, environment=SLOWER) as run:
        at = run.reaches(step, but=frozenset(pids(run, workers)))
        time.sleep(draw.uniform(SLOWER_S / 2, SLOWER_S + 0.06))
        run.kill()
        took = run.nothing_left(ENDS_S)
    print(f"driver killed after step {at.step}; its workers were gone after {took:.1f} s")
    assert Runs(folder).status("run") == "RUNNING"
    assert checkpoints(folder, "run")
    return at


def pids(run: Launch, workers: int) -> set[int]:
    """Return the processes that have trained so far in the launch's directory."""

    return {step.pid for rank in range(workers) for step in steps_of(run.steps, rank)}
