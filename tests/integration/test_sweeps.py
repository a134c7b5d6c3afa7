"""Whole sweep commands, whose trials are compared, bit for bit, with runs of the same configuration.

All processes are real; tests/outside/probes.py notes what a trial did in which process.
"""

from __future__ import annotations

import itertools
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from raytrainer.sweep import Trial
from tests.launches import Ended, Runs, Seen, launch, launched, observed_trials, seen, summary, trials

pytestmark = pytest.mark.slow

TINY = ["model.width=16", "model.dropout=0.2", "trainer.log_every_n_steps=5"]
TINY += ["tracking.log_model=false"]
INLINE = ["cluster.kind=inline", "trainer.num_threads=1"]  # a trial's process has one CPU
LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"


@dataclass(frozen=True)
class Swept:
    """A sweep that has ended."""

    folder: Path
    ended: Ended

    @property
    def trials(self) -> dict[str, Trial]:
        return trials(self.folder)

    @property
    def runs(self) -> Runs:
        return Runs(self.folder)


def swept(folder: Path, *arguments: str) -> Swept:
    return Swept(folder, launched(folder, "-m", "experiment=mlp", "name=sweep", *arguments).exits(0))


def metrics(trial: Trial) -> list[tuple[int, float, float]]:
    return [(report.step, report.metrics["val/loss"], report.metrics["val/accuracy"]) for report in trial.reports]


def assert_whole(runs: Runs, name: str, kind: str) -> None:
    """Check that a run has ended with this status, and that no row is logged twice."""
    assert runs.status(name) == kind
    for key, rows in runs.results(name).items():
        steps = [step for step, _ in rows]
        assert len(steps) == len(set(steps)), f"{name} {key}: a step twice"


# --- a reused process -------------------------------------------------------------------------------------------------

# The same value at both ends; in between, everything that a trial could leave behind in its process.
WHATS = "quiet raises diverges dtype device seeds threads arithmetic gradients environment folder warnings output thread nothing"


@pytest.fixture(scope="module")
def reused(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Run 15 trials in one process, one after the other, which differ only in what they leave behind."""
    changes = ["+callbacks.changes._target_=probes.Changes", f"+callbacks.changes.what={','.join(WHATS.split())}"]
    options = ["sweep=grid", "sweep.max_concurrent_trials=1", "sweep.metric=val/loss", "sweep.mode=min"]
    options += ["trainer.max_epochs=2", "trainer.nonfinite=warn", "checkpoint.monitor=val/loss", "checkpoint.mode=min"]
    return swept(tmp_path_factory.mktemp("reused"), *TINY, *options, *changes, *observed_trials())


def by_what(reused: Swept) -> dict[str, Trial]:
    return {str(trial.parameters["+callbacks.changes.what"]): trial for trial in reused.trials.values()}


def test_all_trials_are_in_one_process_one_at_a_time(reused: Swept) -> None:
    assert list(by_what(reused)) == WHATS.split()
    assert len({line.pid for line in seen(reused.folder)}) == 1
    assert [trial for trial, _ in itertools.groupby(line.trial for line in seen(reused.folder))] == list(reused.trials)


def test_a_trial_after_many_others_is_as_the_first_and_as_a_run_alone(reused: Swept) -> None:
    """The command that the sweep prints for its best trial trains it alone, with its own Ray and process."""
    first, last = by_what(reused)["quiet"], by_what(reused)["nothing"]
    assert len(first.reports) == 2
    assert metrics(last) == metrics(first)
    said = summary(reused.ended.out)
    assert f"of trial {first.id}" in said["best"]
    command = shlex.split(
        next(line for line in reused.ended.out.splitlines() if "callbacks.changes.what=quiet" in line)
    )
    launched(reused.folder, *command[command.index("raytrainer") + 1 :], "name=alone").exits(0)
    runs = reused.runs
    alone = runs.results("alone")
    assert {"train/loss", "train/lr", "val/loss", "val/accuracy"} < alone.keys()
    for trial in (first, last):
        assert runs.results(f"sweep.{trial.id}") == alone
        assert [(step, value) for step, value, _ in metrics(trial)] == alone["val/loss"]


def test_what_became_of_each(reused: Swept) -> None:
    """Fault 39: a trial that raised is FAILED with its cause, NaN is never the best, and the others give what they give
    alone."""
    found, runs = by_what(reused), reused.runs
    raised = found["raises"]
    assert (raised.status, raised.cause) == ("failed", "ValueError: bad luck")
    assert_whole(runs, f"sweep.{raised.id}", "FAILED")
    assert runs.tags(f"sweep.{raised.id}")["raytrainer.cause"] == "ValueError: bad luck"
    assert f"{raised.id}: ValueError: bad luck" in reused.ended.out
    diverged = found["diverges"]
    assert (diverged.status, diverged.cause) == ("failed", "diverged: all of its 2 values are nan or infinite")
    assert all(math.isnan(report.value) for report in diverged.reports)
    assert diverged.best("min") is None
    untouched = ["environment", "folder", "warnings", "output", "thread", "threads", "nothing"]
    assert {found[what].status for what in untouched} == {"finished"}
    assert {tuple(metrics(found[what])) for what in untouched} == {tuple(metrics(found["quiet"]))}
    for trial in found.values():
        assert_whole(runs, f"sweep.{trial.id}", "FAILED" if trial.status == "failed" else "FINISHED")
        assert runs.tags(f"sweep.{trial.id}")["mlflow.parentRunId"] == runs.id_of("sweep")
    assert runs.status("sweep") == "FINISHED"
    assert runs.tags("sweep")["raytrainer.best_trial"] == found["quiet"].id


def test_the_best_as_an_experiment_gives_its_metrics(reused: Swept) -> None:
    config_dir = f"--config-dir={reused.folder}/runs/sweep/best"
    assert f"{config_dir} experiment=best" in reused.ended.out
    launched(reused.folder, config_dir, "experiment=best", "name=best", *INLINE).exits(0)
    best = by_what(reused)["quiet"]
    assert reused.runs.results("best") == reused.runs.results(f"sweep.{best.id}")


def test_a_trial_trained_anew(reused: Swept) -> None:
    """`rerun SWEEP.0015` starts a run of that trial's configuration."""
    last = by_what(reused)["nothing"]
    launched(reused.folder, "rerun", f"sweep.{last.id}", "name=again", *INLINE).exits(0)
    assert reused.runs.results("again") == reused.runs.results(f"sweep.{last.id}")
    assert reused.runs.params("again")["callbacks.changes.what"] == "nothing"


@pytest.mark.nightly  # tests/runs/test_resume_rerun.py composes the same rerun
def test_a_sweep_run_anew(reused: Swept) -> None:
    """`rerun SWEEP` starts another sweep, under its own name."""
    ended = launched(reused.folder, "rerun", "sweep", "sweep.num_samples=1", "name=second").exits(0)
    assert "1 trials of sweep=grid" in ended.err
    (trial,) = trials(reused.folder, "second").values()
    assert metrics(trial) == metrics(by_what(reused)["quiet"])
    assert len(reused.trials) == len(WHATS.split())
    assert reused.runs.results(f"second.{trial.id}") == reused.runs.results(f"sweep.{by_what(reused)['quiet'].id}")


# --- population based training ----------------------------------------------------------------------------------------

PBT = ["sweep=pbt", "sweep.num_samples=4", "trainer.max_epochs=6", LR, "lr_scheduler=constant"]


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Run a sweep of four trials, one at a time."""
    options = [*PBT, "sweep.max_concurrent_trials=1", *observed_trials(0.002)]
    return swept(tmp_path_factory.mktemp("population"), *TINY, *options)


def test_an_exploit_copies_the_very_state(population: Swept) -> None:
    exploits = [(trial, exploit) for trial in population.trials.values() for exploit in trial.inherited]
    assert exploits
    for trial, exploit in exploits:
        step = 11 * exploit["evaluation"]
        (source,) = [line for line in seen(population.folder, "evaluation", exploit["from"]) if line.step == step]
        starts = [line for line in seen(population.folder, "start", trial.id) if line.step == step]
        assert source.weights in {line.weights for line in starts}
        own = [line for line in seen(population.folder, "evaluation", trial.id) if line.step == step]
        assert source.weights not in {line.weights for line in own}
    for trial in population.trials.values():
        assert [report.step for report in trial.reports] == [11, 22, 33, 44, 55, 66]
        assert trial.status == "finished"


def test_a_perturbed_value_is_used_and_told(population: Swept) -> None:
    runs = population.runs
    for trial in population.trials.values():
        rates = {line.step: line.lr for line in seen(population.folder, "step", trial.id)}
        changed = {11 * exploit["evaluation"]: exploit["parameters"]["optimizer.lr"] for exploit in trial.inherited}
        expected = float(runs.params(f"sweep.{trial.id}")["optimizer.lr"])
        for step in range(1, 67):
            expected = changed.get(step - 1, expected)
            assert rates[step] == expected, f"{trial.id} at {step}"
            assert 1e-4 <= rates[step] <= 1e-1
        assert trial.parameters["optimizer.lr"] == rates[66]
        assert runs.rows(f"sweep.{trial.id}").get("parameter/optimizer.lr", []) == list(changed.items())
        tags = runs.tags(f"sweep.{trial.id}")
        for exploit in trial.inherited:
            assert f"from {exploit['from']}: optimizer.lr=" in tags[f"raytrainer.inherited.{exploit['evaluation']}"]
        assert tags["raytrainer.overrides"] == f"optimizer.lr={trial.parameters['optimizer.lr']}"
        assert_whole(runs, f"sweep.{trial.id}", "FINISHED")


def test_one_at_a_time_is_one_also_where_trials_pause(population: Swept) -> None:
    """One process trains one trial at a time, even if trials pause."""
    assert len({line.pid for line in seen(population.folder)}) == 1
    assert_one_at_a_time(seen(population.folder))


def assert_one_at_a_time(lines: Sequence[Seen]) -> None:
    """Check that no trial does anything between two steps of another trial's epoch."""
    for before, after in itertools.pairwise(lines):
        if before.kind == "step" and before.step % 11:
            assert (after.trial, after.pid, after.step) == (before.trial, before.pid, before.step + 1)


# --- several workers ------------------------------------------------------------------------------------------------

TWO = [*TINY, "trainer.max_epochs=2", "scaling.num_workers=2"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """Run two whole runs with -m, without `sweep=`."""
    folder = tmp_path_factory.mktemp("grid")
    options = ["experiment=mlp,smoke", "optimizer.lr=0.03", "trainer.max_steps=null"]
    return Swept(folder, launched(folder, "-m", *TWO, *options).exits(0))


def test_a_grid_of_whole_runs(grid: Swept) -> None:
    """The runs train one after the other, each with two workers and its own MLflow run."""
    names = sorted(path.name for path in (grid.folder / "runs").iterdir() if (path / "run.json").exists())
    assert [name.split("-")[0] for name in names] == ["mlp", "smoke"]
    for name in names:
        assert_whole(grid.runs, name, "FINISHED")
        assert re.search(rf"^{name} +finished ", grid.ended.out, re.MULTILINE)


def test_trials_of_two_workers(grid: Swept, tmp_path: Path) -> None:
    """With CPUs for only one trial there is no deadlock. The second trial is pruned, and its workers are gone before
    the third starts. A trial that is not pruned equals the same run alone."""
    scheduler = "sweep.scheduler={_target_: ray.tune.schedulers.ASHAScheduler, grace_period: 1, reduction_factor: 2}"
    options = ["sweep=grid", scheduler, "sweep.max_concurrent_trials=1", "optimizer.lr=0.03,1e-6,0.02"]
    with launch(tmp_path, "-m", "experiment=mlp", "name=sweep", *TWO, *options, *observed_trials(0.02)) as sweep:
        sweep.until("the third trial", lambda: seen(tmp_path, "start", "0003"))
        workers = {line.pid for line in seen(tmp_path, trial="0002")}
        assert not [pid for pid in workers if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        ended = sweep.wait().exits(0)
        sweep.nothing_left()
    found = trials(tmp_path)
    assert [trial.status for trial in found.values()] == ["finished", "pruned", found["0003"].status]
    assert len(found["0002"].reports) == 1
    assert [line.step for line in seen(tmp_path, "step", "0002")] == list(range(1, 12))  # not one step more
    assert [report.evaluation for report in found["0001"].reports] == [1, 2]
    runs = Runs(tmp_path)
    assert_whole(runs, "sweep.0002", "KILLED")
    assert runs.tags("sweep.0002")["raytrainer.trial_status"] == "pruned"
    assert "pruned" in ended.err
    (alone,) = (path.name for path in (grid.folder / "runs").glob("mlp-*"))
    assert grid.runs.results(alone) == runs.results("sweep.0001")


def test_shares_of_a_cpu_let_as_many_run(tmp_path: Path) -> None:
    """`scaling.resources_per_worker={CPU: 0.5}`: four trials run at the same time, for which two CPUs would otherwise
    not suffice."""
    meets = ["+callbacks.meets._target_=probes.Meets", "+callbacks.meets.count=4"]
    options = ["sweep=grid", "seed=1,2,3,4", "trainer.max_epochs=2", "scaling.resources_per_worker={CPU: 0.5}"]
    found = swept(tmp_path, *TINY, *options, *meets)
    assert [trial.status for trial in found.trials.values()] == ["finished"] * 4
    assert len({tuple(metrics(trial)) for trial in found.trials.values()}) == 4
    count = re.search(r"(\d+) trials at a time", found.ended.out)
    assert count is not None
    assert int(count[1]) >= 4
