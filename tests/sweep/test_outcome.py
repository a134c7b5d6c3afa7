"""The summary of a sweep: the commands that it prints do what it says."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from raytrainer import attempt, cli
from raytrainer.attempt import Record
from raytrainer.cli import dispatch
from raytrainer.config import Composition
from raytrainer.sweep import Plan, SweepOutcome, Trial, summary
from raytrainer.sweep.journal import Report
from raytrainer.sweep.trial_state import Status
from tests.launches import OUTSIDE

MINE = """
# @package _global_
defaults:
  - override /sweep: random
trainer:
  max_epochs: 4
sweep:
  space:
    optimizer.lr: tag(log,interval(1e-4,${oc.env:HIGHEST}))
    +callbacks.changes.what: "nothing,${oc.env:A_SECRET}"
callbacks:
  changes: {_target_: probes.Changes}
"""


@pytest.fixture
def own(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a directory of configs with an experiment that is a sweep by itself, and return it."""
    path = in_tmp / "my conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(MINE)
    path.with_name("other.yaml").write_text(MINE.partition("sweep:\n")[0])
    monkeypatch.syspath_prepend(str(OUTSIDE))
    monkeypatch.setenv("HIGHEST", "1e-1")
    monkeypatch.setenv("A_SECRET", "hunter2")
    return path.parent.parent


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Plan:
    """Return the plan that a command line makes."""
    plans: list[Plan] = []

    def launch(plan: Plan, *_: object, **__: object) -> int:
        plans.append(plan)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_run_sweep", launch)
        assert cli.main(arguments) == 0
    (plan,) = plans
    return plan


def trained(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> Composition:
    """Return the configuration that a command line would train."""
    found: list[Composition] = []

    def launch(composition: Composition, *_: object, **__: object) -> attempt.Outcome:
        found.append(composition)
        return attempt.Outcome(
            "FINISHED", 0, Record("r", "/r"), "here", {"reason": "finished", "step": 1, "best": None, "monitor": ""}
        )

    with monkeypatch.context() as patch:
        patch.setattr(attempt, "launch", launch)
        assert cli.main(arguments) == 0
    (composition,) = found
    return composition


def outcome(plan: Plan, *trials: Trial, exit_code: int = 0) -> SweepOutcome:
    record = Record("sweep", "/runs/sweep", kind="sweep")
    return SweepOutcome("FAILED" if exit_code else "FINISHED", exit_code, record, "here", plan, trials)


def trial_of(plan: Plan, **values: object) -> Trial:
    parameters = {p.key: values.get(p.key.rpartition(".")[2], p.probes()[0]) for p in plan.parameters}
    reports = [Report(1, 10, 0.5, {}, 2.0)]
    return Trial(
        "0001", parameters, plan.overrides_of(parameters), 1.0, reports=reports, status=Status.FINISHED, ended=3.0
    )


def best_command(plan: Plan, trial: Trial) -> list[str]:
    said = summary(outcome(plan, trial), "raytrainer").splitlines()
    line = next(i for i, text in enumerate(said) if text.startswith("best "))
    words = shlex.split(said[line + 1])
    assert words[0] == "raytrainer"
    return words[1:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir=my conf", "experiment=mine", "seed=7"],
        ["--config-dir=my conf", "experiment=mine", "seed=7", "optimizer.lr=interval(0.01,0.1)"],
        ["hydra.searchpath=['file://my conf']", "experiment=mine", "seed=7"],
        ["--config-dir=my conf", "experiment=other,mlp", "sweep=grid", "sweep.metric=val/loss", "seed=7"],
        [
            "experiment=mlp",
            "sweep=asha",
            "sweep.num_samples=3",
            "optimizer.lr=0.01,0.1",
            "trainer.max_epochs=4",
            "seed=7",
        ],
    ],
)
def test_the_command_of_the_best_trains_its_configuration(
    own: Path, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    plan = planned(monkeypatch, "-m", *arguments)
    best = trial_of(plan)
    found = trained(monkeypatch, best_command(plan, best)).experiment
    expected = plan.composition_of(best.parameters).experiment
    assert found.optimizer == expected.optimizer
    assert found.model == expected.model
    assert (found.seed, found.trainer.max_epochs) == (7, 4)
    # This also holds after a rerun has changed overrides and the plan was saved and loaded.
    again = Plan.from_dict(plan.with_overrides(["trainer.max_epochs=3", "name=other"]).to_dict())
    found = trained(monkeypatch, best_command(again, best)).experiment
    assert (found.seed, found.trainer.max_epochs) == (7, 3)
    assert found.name != "other"


def test_a_config_dir_is_found_from_elsewhere(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, "-m", "--config-dir=my conf", "experiment=mine")
    (own / "deep").mkdir()
    monkeypatch.chdir(own / "deep")
    assert trained(monkeypatch, best_command(plan, trial_of(plan))).experiment.trainer.max_epochs == 4


def test_a_secret_stays_a_reference_in_all_that_is_kept(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, "-m", "--config-dir=my conf", "experiment=mine")
    rate, what = plan.parameters
    assert (rate.kind, rate.high) == ("interval", 0.1)  # the variable is resolved, because sampling needs a number
    assert what.values == ("nothing", "${oc.env:A_SECRET}")
    best = trial_of(plan, what="${oc.env:A_SECRET}")
    composition = plan.composition_of(best.parameters)
    assert composition.experiment.callbacks["changes"]["what"] == "hunter2"
    said = summary(outcome(plan, best), "raytrainer")
    for kept in (str(plan.to_dict()), composition.text, str(best), said):
        assert "oc.env:A_SECRET" in kept
        assert "hunter2" not in kept


def test_what_was_added_stays_added_when_a_rerun_changes_it(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(
        monkeypatch, "-m", "experiment=mlp", "sweep=random", "+optimizer.maximize=true", "optimizer.lr=0.1,0.2"
    )
    again = plan.with_overrides(["optimizer.maximize=false", "trainer.max_epochs=2"])
    assert again.fixed == ("experiment=mlp", "sweep=random", "+optimizer.maximize=false", "trainer.max_epochs=2")


def test_the_best_of_a_population_is_told_with_its_schedule(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, "-m", "experiment=mlp", "sweep=pbt", "optimizer.lr=interval(0.01,0.1)")
    best = trial_of(plan, lr=0.03)
    best.reports += [Report(2, 20, 0.9, {}, 3.0), Report(3, 30, 0.6, {}, 4.0)]
    best.before = [(1, {"optimizer.lr": 0.01}), (2, {"optimizer.lr": 0.02})]
    best.inherited = [{"evaluation": n, "from": "0001", "parameters": {}} for n in (1, 2)]
    assert "optimizer.lr=0.02" in best_command(plan, best)
    said = summary(outcome(plan, best), "raytrainer")
    assert (
        "schedule: lr 0.01 to step 10, lr 0.02 to step 20; the trial trained with all of it, the command has the last values"
        in said
    )


def test_failed_trials_are_told_with_their_tracebacks_and_what_to_do(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(monkeypatch, "-m", "experiment=mlp", "sweep=grid", "optimizer.lr=0.01,0.1")
    failed = trial_of(plan)
    failed.status, failed.cause, failed.error = Status.FAILED, "ValueError: bad luck", "trials/0001/error.txt"
    said = summary(outcome(plan, failed), "raytrainer")
    assert "failed   0001: ValueError: bad luck\n         /runs/sweep/trials/0001/error.txt\n" in said
    assert "raytrainer rerun sweep.0001" in said


def test_what_every_trial_would_fail_by_is_told_once(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(monkeypatch, "-m", "experiment=mlp", "sweep=grid", "optimizer.lr=0.01,0.1")
    failed = trial_of(plan)
    failed.status, failed.cause = Status.FAILED, "ConfigError: sweep.metric=val/nope is not logged"
    ended = replace(outcome(plan, failed, exit_code=1), cause="sweep.metric=val/nope is not logged", resumable=False)
    assert summary(ended, "raytrainer").count("is not logged") == 1
