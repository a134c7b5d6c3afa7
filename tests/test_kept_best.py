"""The best evaluation's weights are kept, whichever checkpoints are due, so that `evaluate` and `export` can use
them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raytrainer import worker
from raytrainer.checkpoint import Checkpointer, copy_out, import_checkpoint
from raytrainer.config import compose
from raytrainer.parallel import World
from raytrainer.storage import Storage
from raytrainer.trainer import Objective, Trainer
from tests.training import experiment

BEST_IN_THE_MIDDLE = (0.5, 0.9, 0.7, 0.8, 0.6)
SPARSE = {"monitor": "val/score", "mode": "max", "min_interval_s": 1000.0}


def trained(
    place: Path, values: Sequence[float], *, objective: Objective | None = None, **checkpoint: Any
) -> tuple[Trainer, Checkpointer]:
    """Return a trainer that has evaluated after each step and got these values of `val/score`, and its checkpointer."""
    e = experiment(
        trainer={"max_steps": len(values), "eval_every_n_steps": 1},
        checkpoint={**SPARSE, "num_to_keep": 1, **checkpoint},
    )
    mode = objective.mode if objective else "max"
    checkpoints = Checkpointer(Storage(place), num_to_keep=1, mode=mode)
    trainer = Trainer(e, checkpointer=checkpoints, objective=objective)
    evaluated = iter(values)
    trainer.evaluate = lambda: {"val/score": (value := next(evaluated)), "val/loss": -value}  # type: ignore[method-assign]
    trainer.fit()
    return trainer, checkpoints


def steps_written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the steps of the checkpoints written from now on."""
    written: list[int] = []
    start = Checkpointer._start

    def noted(self: Checkpointer, step: int, *rest: Any) -> None:
        written.append(step)
        start(self, step, *rest)

    monkeypatch.setattr(Checkpointer, "_start", noted)
    return written


@pytest.mark.parametrize("checkpoint", [{}, {"every_n_steps": 4}, {"min_interval_s": None}])
def test_the_best_evaluation_has_a_checkpoint(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    trainer, checkpoints = trained(tmp_path, BEST_IN_THE_MIDDLE, **checkpoint)
    best = checkpoints.best()
    assert best is not None
    assert (trainer.best.step, best.step, best.metric) == (2, 2, 0.9)
    assert [info.step for info in checkpoints.list()] == [2, 5]
    shared, _ = checkpoints.load(best)
    assert shared["step"] == 2


def test_checkpoints_are_no_closer_than_they_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that improve each time are kept in memory; only the best and the last are written."""
    written = steps_written(monkeypatch)
    trained(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5, 0.45])
    assert written == [5, 6]


def test_a_trial_keeps_the_best_by_its_sweeps_metric(tmp_path: Path) -> None:
    """The sweep's metric may differ from the run's own monitor, and have the other mode."""
    objective = Objective("val/loss", "max")  # best where val/score is lowest
    trainer, checkpoints = trained(tmp_path, [0.5, 0.1, 0.7, 0.6], objective=objective)
    best = checkpoints.best()
    assert best is not None
    assert (trainer.best.step, best.step, best.metric) == (3, 2, -0.1)


def test_one_that_may_be_killed_writes_its_best_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = steps_written(monkeypatch)
    trained(tmp_path, BEST_IN_THE_MIDDLE, objective=Objective("val/score", "max", at_once=True))
    assert written == [1, 2, 5]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_trial_that_is_stopped_writes_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type) -> None:
    """A trial that a scheduler stops after a worse evaluation still writes its best, whichever exception the report
    raises."""
    monkeypatch.chdir(tmp_path)
    values = iter(BEST_IN_THE_MIDDLE)
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"val/accuracy": next(values), "val/loss": 1.0})
    overrides = ["experiment=smoke", "cluster=inline", "trainer.max_steps=9", "trainer.eval_every_n_steps=1"]
    text = compose([*overrides, "checkpoint.min_interval_s=1000", "name=one"]).text
    job = worker.WorkerJob(
        text=text, run_dir=str(tmp_path / "one"), label="0001", objective="val/accuracy", objective_mode="max"
    )

    def report(trainer: Trainer, ends: bool) -> None:
        if trainer.step == 3:
            raise error

    with pytest.raises(error):
        worker.run(job, World(), emit=lambda _: None, report=report)
    best = Checkpointer(Storage(tmp_path / "one").child("checkpoints"), mode="max").best()
    assert best is not None
    assert (best.step, best.metric) == (2, 0.9)


def states(place: Storage, *metrics: float, first: int = 1) -> Checkpointer:
    checkpoints = Checkpointer(place, num_to_keep=None, mode="max")
    for step, metric in enumerate(metrics, start=first):
        checkpoints.save(step, {"model": {"step": step}}, {}, metric=metric)
    checkpoints.close()
    return checkpoints


def test_held_states(tmp_path: Path) -> None:
    checkpoints = Checkpointer(Storage(tmp_path), num_to_keep=None, mode="max")
    checkpoints.hold(1, {"n": 1}, {}, metric=1.0)
    checkpoints.hold(2, {"n": 2}, {}, metric=2.0)
    assert checkpoints.list() == []
    checkpoints.save(4, {"n": 4}, {}, metric=0.0)  # the held state is written first
    checkpoints.hold(5, {"n": 5}, {}, metric=5.0)
    checkpoints.drop_held()
    checkpoints.write_held()
    checkpoints.hold(6, {"n": 6}, {}, metric=6.0)
    checkpoints.write_held()
    found = checkpoints.list()
    assert [(info.step, checkpoints.load(info)[0]["n"]) for info in found] == [(2, 2), (4, 4), (6, 6)]


def test_what_is_taken_in_does_not_cost_a_trial_its_best(tmp_path: Path) -> None:
    """Population based training replaces a trial's own checkpoint with that of another trial."""
    own, other = Storage(tmp_path / "own"), Storage(tmp_path / "other")
    states(own, 0.3, 0.9, 0.2)
    states(other, 0.6, first=2)
    for number in range(2):
        copy_out(other, tmp_path / f"carried-{number}")
        import_checkpoint(tmp_path / f"carried-{number}", own, {"from": "other"}, mode="max")
        checkpoints = Checkpointer(own, mode="max")
        latest, best = checkpoints.latest(), checkpoints.best()
        assert latest is not None
        assert best is not None
        assert (latest.step, latest.metric, [info.step for info in checkpoints.list()]) == (2, 0.6, [2])
        assert (best.step, best.metric, checkpoints.load(best)[0]["model"]["step"]) == (2, 0.9, 2)
    states(own, 0.95, first=3)
    copy_out(other, tmp_path / "again")
    import_checkpoint(tmp_path / "again", own, mode="max")
    assert [entry.name for entry in own.child("aside").list()] == ["step-000000003"]
    better = Checkpointer(own, mode="max").best()
    assert better is not None
    assert (better.step, better.metric) == (3, 0.95)
    assert json.loads((tmp_path / "own" / "step-000000002" / "manifest.json").read_text())["step"] == 2
