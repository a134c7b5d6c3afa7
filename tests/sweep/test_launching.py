"""What a resumed sweep says that it will do, and which failed trials it retries."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrainer.attempt import Record
from raytrainer.config import group_names
from raytrainer.errors import ConfigError
from raytrainer.storage import Storage
from raytrainer.sweep import make_plan
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.launching import build_scheduler
from raytrainer.sweep.outcome import SweepOutcome, summary
from raytrainer.sweep.resuming import describe_resume, to_retry
from raytrainer.sweep.trial_state import Status


def plan(total: int | None = 6, failures: int = 0) -> Any:
    sweep = SimpleNamespace(max_trial_failures=failures)
    return SimpleNamespace(
        total=total, experiment=SimpleNamespace(sweep=sweep, name="s"), mode="max", metric="m", parameters=()
    )


@pytest.fixture
def journal(tmp_path: Path) -> TrialJournal:
    """The journal of an attempt with six trials: two finished, one stopped, two failed and one diverged."""
    found = TrialJournal.open(Storage(tmp_path))
    found.begin({"max_trial_failures": 0})
    ends: list[Status] = [Status.FINISHED, Status.FINISHED, Status.STOPPED, Status.FAILED, Status.FAILED, Status.FAILED]
    for number, status in enumerate(ends, 1):
        found.start(Trial(f"{number:04d}", {}, [], 0.0))
        value = math.nan if number == 6 else 0.5
        found.report(f"{number:04d}", Report(1, 1, value, {}, 1.0))
        found.end(f"{number:04d}", status, "OSError: no" if status == "failed" else None)
    found.close()
    return found


def test_what_going_on_does(journal: TrialJournal) -> None:
    words = describe_resume(plan(total=10), journal)
    assert words == (
        "resuming: 5 ended trials are kept, 1 continues, 4 more will be sampled; "
        "sweep.max_trial_failures=1 would retry the 2 that failed"
    )
    words = describe_resume(plan(failures=1), journal)
    assert words == "resuming: 3 ended trials are kept, 1 continues, 2 failed trials are retried"
    assert "the remaining trials will be sampled" in describe_resume(plan(total=None), journal)


def test_fewer_trials_than_there_are_already(journal: TrialJournal) -> None:
    with pytest.raises(ConfigError, match=r"^sweep\.num_samples=5 is less than the 6 trials"):
        describe_resume(plan(total=5), journal)


def test_failed_trials_are_tried_again_where_more_failures_are_permitted(journal: TrialJournal) -> None:
    """A diverged trial is not retried, and a second resume with the same limit retries none."""
    assert to_retry(plan(), journal) == []
    assert [trial.id for trial in to_retry(plan(failures=1), journal)] == ["0004", "0005"]
    journal.attempts.append({"max_trial_failures": 1})
    assert to_retry(plan(failures=1), journal) == []
    assert len(to_retry(plan(failures=2), journal)) == 2


@pytest.mark.parametrize(
    ("failed", "advice"),
    [("OSError: no", "resume s sweep.max_trial_failures=1"), ("NonFiniteLoss: the loss became nan", None)],
)
def test_what_to_type_when_only_failed_trials_are_left(failed: str, advice: str | None) -> None:
    """Plain `resume` is not suggested, because it would find nothing to do."""
    trials = [Trial("0001", {}, [], 0.0, status=Status.FAILED, cause=failed)]
    outcome = SweepOutcome(
        "FAILED", 1, Record("s", "/s", kind="sweep"), "here", plan(total=1), trials, cause="no trial finished"
    )
    found = [line for line in summary(outcome, "raytrainer").splitlines() if "raytrainer resume" in line]
    assert [line.rpartition("raytrainer ")[2] for line in found] == ([advice] if advice else [])


def test_a_scheduler_that_pauses_needs_a_number_of_trials() -> None:
    """HyperBand samples all trials before it compares any, so an unlimited number of trials is refused."""
    swept = make_plan(
        [
            "experiment=mlp",
            "optimizer.lr=interval(0,1)",
            "sweep.num_samples=null",
            "sweep.time_budget_s=60",
            "+sweep.scheduler._target_=ray.tune.schedulers.HyperBandScheduler",
        ],
        choice="random",
        space={},
        groups=group_names(),
    )
    with pytest.raises(ConfigError, match=r"sweep\.num_samples.*HyperBandScheduler"):
        build_scheduler(swept)
