"""Tests of the phases of an attempt, with a stand-in for its work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer import tracking
from raytrainer.attempt.lifecycle import NEXT_PHASES, Attempt, Phase
from raytrainer.attempt.locking import locked_attempt
from raytrainer.attempt.outcome import AttemptOutcome
from raytrainer.attempt.record import Record
from raytrainer.attempt.work import TrackedRun, Work
from raytrainer.config import compose
from raytrainer.errors import ConfigError, PreflightError, StorageError
from raytrainer.progress import Display


class Steps(Work[str, AttemptOutcome]):
    """A work that records in which phase each of its methods was called."""

    def __init__(self, attempt: Attempt, error: Exception | None = None) -> None:
        self.attempt, self.error, self.phases = attempt, error, dict[str, Phase]()

    def tracked_run(self) -> TrackedRun:
        return TrackedRun("a: 1", {})

    def execute(self) -> str:
        self.phases["execute"] = self.attempt.phase
        self.attempt.ray_is_up()
        self.attempt.begin_work()
        self.phases["work"] = self.attempt.phase
        if self.error is not None:
            raise self.error
        return "done"

    def outcome(self, result: str | None, error: BaseException | None) -> AttemptOutcome:
        attempt = self.attempt
        base = AttemptOutcome("FINISHED", 0, attempt.record, attempt.where)
        if attempt.interrupts.requested:
            return attempt.killed(base)
        return base if error is None else replace(base, status="FAILED", exit_code=1, cause=str(error))

    def upload(self, run: tracking.Run | None, outcome: AttemptOutcome, timeout_s: float) -> bool:
        self.phases["upload"] = self.attempt.phase
        return run is not None

    def close(self, outcome: AttemptOutcome) -> None:
        self.phases["close"] = self.attempt.phase


@pytest.fixture
def attempt(in_tmp: Path) -> Iterator[Attempt]:
    e = compose(["experiment=mlp", "name=one", f"tracking.tracking_uri=sqlite:///{in_tmp}/mlflow.db"]).experiment
    with locked_attempt(e, new=True, display=Display()) as made:
        made.prepare(Record("one", made.storage.display, experiment_name="exp").begun(1.0), "here")
        made.open_logs()
        yield made


def status(folder: Path) -> tuple[str, str]:
    record = json.loads((folder / "runs/one/run.json").read_text())
    return record["status"], record["cause"]


def test_the_phases_of_an_attempt_follow_each_other(attempt: Attempt, in_tmp: Path) -> None:
    steps = Steps(attempt)
    assert attempt.run(steps).status == "FINISHED"
    assert list(steps.phases.values()) == [Phase.STARTING, Phase.RUNNING, Phase.CLOSING, Phase.CLOSING]
    assert attempt.phase is Phase.CLOSED
    assert status(in_tmp) == ("FINISHED", "")


def test_an_error_closes_the_attempt(attempt: Attempt, in_tmp: Path) -> None:
    outcome = attempt.run(Steps(attempt, StorageError("no space")))
    assert (outcome.status, attempt.phase) == ("FAILED", Phase.CLOSED)
    assert status(in_tmp) == ("FAILED", "no space")


def test_a_refusal_leaves_no_record(attempt: Attempt, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Steps) -> None:
        raise PreflightError(["The first batch fails."])

    monkeypatch.setattr(Steps, "admit", refuse)
    with pytest.raises(PreflightError, match="The first batch fails"):
        attempt.run(Steps(attempt))
    assert attempt.phase is Phase.REFUSED
    assert not (in_tmp / "runs/one/run.json").exists()


def test_a_phase_that_cannot_follow_is_an_error(attempt: Attempt) -> None:
    for phase in set(Phase) - NEXT_PHASES[attempt.phase]:
        with pytest.raises(RuntimeError, match=f"from LOCKED to {phase.name}"):
            attempt.move(phase)


def test_one_attempt_at_a_time_and_no_run_twice(attempt: Attempt) -> None:
    with pytest.raises(PreflightError, match="in use"), locked_attempt(attempt.e, new=True, display=Display()):
        pass
    attempt.held.close()
    attempt.record_start(compose(["experiment=mlp", "name=one"]))
    with (
        pytest.raises(ConfigError, match="name of an existing run"),
        locked_attempt(attempt.e, new=True, display=Display()),
    ):
        pass
