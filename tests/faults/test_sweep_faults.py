"""Faults 38 and 39, and the signals and server failures of other faults during a sweep: whole commands, real kills."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT, SIGTERM

import psutil
import pytest

from raytrainer.sweep import Trial
from tests.launches import (
    ENDS_S,
    Launch,
    Runs,
    launch,
    launched,
    observed_trials,
    record,
    seen,
    summary,
    trials,
)
from tests.promises import Within
from tests.tracking.test_mlflow_server import MlflowServer, Proxy

pytestmark = pytest.mark.slow

SWEEP = ["-m", "experiment=mlp", "name=sweep", "model.width=16", "model.dropout=0.2", "trainer.log_every_n_steps=5"]
LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"
ALWAYS = "checkpoint.min_interval_s=0"  # a checkpoint at each evaluation
END_S = 20.0  # twice the promised time, because a machine may be busy


def told(trial: Trial) -> list[tuple[int, int, float, dict[str, float]]]:
    """Return everything that a trial reported, except metrics that measure time."""
    return [
        (r.evaluation, r.step, r.value, {k: v for k, v in r.metrics.items() if "samples_per_second" not in k})
        for r in trial.reports
    ]


def assert_in_mlflow(runs: Runs, found: dict[str, Trial], ended: dict[str, str] | None = None) -> None:
    """Check that each trial has one MLflow run below the sweep's, with its status, and each row once."""
    kinds = {"finished": "FINISHED", "failed": "FAILED", "pruned": "KILLED", "stopped": "KILLED"}
    parent = runs.id_of("sweep")
    for trial in found.values():
        name = f"sweep.{trial.id}"
        assert runs.status(name) == kinds[trial.status], name
        assert runs.tags(name)["raytrainer.trial_status"] == trial.status
        assert runs.tags(name)["mlflow.parentRunId"] == parent
        for key, value in trial.parameters.items():
            assert runs.params(name)[key.lstrip("+")] == str(value)
            assert f"space/{key.lstrip('+')}" in runs.params("sweep")
        assert runs.id_of(name) == trial.run_id
        rows = runs.results(name)
        for key, found_rows in rows.items():
            steps = [step for step, _ in found_rows]
            assert len(steps) == len(set(steps)), f"{name} {key}: a step twice"
        assert rows.get("val/accuracy", []) == [(report.step, report.value) for report in trial.reports], name


# --- trials that fail -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a sweep in which one trial raises, one is killed for memory, one diverges and two finish. Return its
    directory and output."""
    folder = tmp_path_factory.mktemp("failing")
    memory = psutil.virtual_memory()
    most = min(0.98, (memory.total - memory.available + 5 * 2**30) / memory.total)
    environment = {"RAY_memory_usage_threshold": f"{most:.3f}", "RAY_memory_monitor_refresh_ms": "50"}
    whats = "+callbacks.changes.what=nothing,raises,memory,diverges,quiet"
    options = ["sweep=grid", "sweep.max_concurrent_trials=1", "trainer.max_epochs=2"]
    changes = ["+callbacks.changes._target_=probes.Changes", whats]
    return folder, launched(folder, *SWEEP, *options, *changes, environment=environment).exits(0).out


def test_what_fails_does_not_end_the_sweep(failing: tuple[Path, str]) -> None:
    """Fault 39: failed trials are FAILED with their causes, and the sweep ends with the best of the others."""
    folder, said = failing
    found = trials(folder)
    assert [trial.status for trial in found.values()] == ["finished", "failed", "failed", "failed", "finished"]
    causes = [trial.cause or "" for trial in found.values() if trial.status == "failed"]
    assert causes[0] == "ValueError: bad luck"
    assert causes[1].startswith("killed for using too much memory")
    assert causes[2].startswith("NonFiniteLoss: the loss became nan")
    assert told(found["0005"]) == told(found["0001"])
    for trial, cause in zip(("0002", "0003", "0004"), causes, strict=True):
        assert f"{trial}: {cause}" in said
        assert Runs(folder).tags(f"sweep.{trial}")["raytrainer.cause"] == cause
        told_whole = (folder / "runs/sweep" / (found[trial].error or "")).read_text()
        assert told_whole.startswith("Traceback") or "memory" in told_whole
        (artifact,) = folder.rglob(f"{found[trial].run_id}/artifacts/error.txt")
        assert artifact.read_text() == told_whole
    assert "probes.py" in (folder / "runs/sweep/trials/0002/error.txt").read_text()
    assert "of trial 0001" in summary(said)["best"]
    assert_in_mlflow(Runs(folder), found)
    assert Runs(folder).status("sweep") == record(folder, "sweep")["status"] == "FINISHED"


def test_failures_that_are_not_allowed_are_named(failing: tuple[Path, str]) -> None:
    """With `sweep.allow_failed=false` the same sweep has failed; no trial is run again to decide this."""
    folder, _ = failing
    ended = launched(folder, "resume", "sweep", "sweep.allow_failed=false").exits(1)
    assert "3 of 5 trials failed, and sweep.allow_failed=false" in summary(ended.out)["cause"]
    assert "0002: ValueError: bad luck" in ended.out
    assert len(trials(folder)) == 5
    assert Runs(folder).status("sweep") == record(folder, "sweep")["status"] == "FAILED"


def test_a_failed_trial_is_tried_again(tmp_path: Path) -> None:
    """`sweep.max_trial_failures=1`: the trial continues from its checkpoint, with every row once and the same
    result."""
    once = [
        "+callbacks.once._target_=probes.Once",
        "+callbacks.once.step=26",
        "+callbacks.once.what=raises,killed,nothing",
    ]
    options = ["sweep=grid", "sweep.max_trial_failures=1", "trainer.max_epochs=3", ALWAYS]
    ended = launched(tmp_path, *SWEEP, *options, *once, *observed_trials()).exits(0)
    found = trials(tmp_path)
    assert [trial.status for trial in found.values()] == ["finished"] * 3
    assert told(found["0001"]) == told(found["0002"]) == told(found["0003"])
    assert [report.evaluation for report in found["0001"].reports] == [1, 2, 3]
    starts = [[line.step for line in seen(tmp_path, "start", trial)] for trial in found]
    # The checkpoint of the evaluation just before may not have been committed.
    assert starts[0] in ([0, 11], [0, 22])
    assert starts[1] in ([0, 11], [0, 22])
    assert starts[2] == [0]
    assert "trial 0001: OSError: raises, this once; retrying" in ended.err
    assert "trial 0002: the process died" in ended.err
    assert_in_mlflow(Runs(tmp_path), found)


def test_a_metric_that_is_not_there_ends_the_sweep(tmp_path: Path) -> None:
    """The sweep ends at once, because every trial would fail for the same reason."""
    metric = ["sweep.metric=val/acuracy", "sweep.mode=max"]
    ended = launched(tmp_path, *SWEEP, "sweep=random", LR, "sweep.num_samples=50", *metric).exits(1)
    cause = summary(ended.out)["cause"]
    assert cause.startswith("sweep.metric=val/acuracy is not logged by the first evaluation, at step 11")
    assert "valid: val/accuracy, " in cause
    assert len(trials(tmp_path)) < 5
    assert "rerun sweep" in ended.out
    assert Runs(tmp_path).status("sweep") == "FAILED"
    assert {trial.status for trial in trials(tmp_path).values()} <= {"failed", "stopped"}


# --- killed sweeps ----------------------------------------------------------------------------------------------------

RANDOM = ["sweep=random", LR, "model.depth=1,2", "sweep.num_samples=6", "trainer.max_epochs=4", ALWAYS]


def in_the_middle(run: Launch) -> dict[str, Trial]:
    """Wait until two trials have ended and another is partly done. Return all trials."""

    def found() -> dict[str, Trial] | None:
        now = trials(run.folder)
        ended = sum(trial.status == "finished" for trial in now.values())
        part = any(trial.status == "running" and 2 <= len(trial.reports) < 4 for trial in now.values())
        return now if ended >= 2 and part and len(now) < 6 else None

    return run.until("the middle of the sweep", found)  # type: ignore[no-any-return]


def assert_went_on(folder: Path, before: dict[str, Trial], after: dict[str, Trial]) -> None:
    """Check that ended trials were kept, running ones continued where they were, and the remaining ones were
    sampled."""
    for trial in after.values():
        starts = [line.step for line in seen(folder, "start", trial.id)]
        old = before.get(trial.id)
        if old is None or (old.status == "running" and not old.reports):
            assert starts[0] == 0
        elif old.status == "finished":
            assert starts == [0], trial.id
            assert told(trial) == told(old)
        else:
            # The checkpoint of the last report may not have been committed.
            assert len(starts) == 2
            assert starts[1] >= 11 * (len(old.reports) - 1), trial.id


def test_a_killed_driver_changes_nothing(tmp_path: Path) -> None:
    """Fault 38: the trials, their parameters and all their reports equal those of an undisturbed sweep."""
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    folder.mkdir()
    # Both run at once, because the start of Ray is mostly waiting.
    with (
        launch(undisturbed, *SWEEP, *RANDOM, "sweep.num_samples=8", *observed_trials()) as reference,
        launch(folder, *SWEEP, *RANDOM, *observed_trials(0.03)) as run,
    ):
        before = in_the_middle(run)
        run.kill()
        took = run.nothing_left(ENDS_S)
        reference.wait().exits(0)
    expected = trials(undisturbed)
    print(f"all gone after {took:.1f} s")
    assert record(folder, "sweep")["status"] == "RUNNING"
    ended = launched(folder, "resume", "sweep").exits(0)
    found = trials(folder)
    assert_went_on(folder, before, found)
    for count in (6, 8):
        assert list(found) == list(expected)[:count]
        for trial in found.values():
            assert trial.status == "finished"
            assert trial.parameters == expected[trial.id].parameters
            assert told(trial) == told(expected[trial.id]), trial.id
            assert Runs(folder).results(f"sweep.{trial.id}") == Runs(undisturbed).results(f"sweep.{trial.id}")
        assert_in_mlflow(Runs(folder), found)
        assert Runs(folder).status("sweep") == record(folder, "sweep")["status"] == "FINISHED"
        if count == 6:
            assert "resume sweep sweep.num_samples=12" in ended.out
            launched(folder, "resume", "sweep", "sweep.num_samples=8").exits(0)
            found = trials(folder)
            assert {trial: len(seen(folder, "start", trial)) for trial in ("0007", "0008")} == {"0007": 1, "0008": 1}


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), pytest.param(SIGTERM, 143, marks=pytest.mark.nightly)])
def test_a_signal_ends_it_and_resume_goes_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Nothing is left, every MLflow run has its final status, and the suggested command works."""
    with launch(tmp_path, *SWEEP, *RANDOM, *observed_trials(0.03)) as run:
        before = in_the_middle(run)
        within = Within(END_S)
        run.signal(number, group=number == SIGINT)
        ended = run.wait(3 * END_S).exits(code)
        run.nothing_left(END_S)
        within.check(ended)
    assert "Traceback" not in ended.err
    assert "resume sweep" in ended.out
    stopped, runs = trials(tmp_path), Runs(tmp_path)
    assert {trial.status for trial in stopped.values()} == {"finished", "stopped"}
    assert_in_mlflow(runs, stopped)
    assert runs.status("sweep") == record(tmp_path, "sweep")["status"] == "KILLED"
    assert runs.tags("sweep")["raytrainer.exit_code"] == str(code)
    if number == SIGINT:
        launched(tmp_path, "resume", "sweep").exits(0)
        found = trials(tmp_path)
        assert {trial.status for trial in found.values()} == {"finished"}
        assert len(found) == 6
        assert_went_on(tmp_path, before, found)
        assert_in_mlflow(runs, found)
        assert runs.status("sweep") == record(tmp_path, "sweep")["status"] == "FINISHED"


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.stop()


def test_trials_do_not_wait_for_mlflow(server: MlflowServer, tmp_path: Path) -> None:
    """MLflow takes 30 s per call and then dies. Trials still stop and start, and later MLflow gets every row once."""
    proxy = Proxy(server.port)
    options = ["sweep=asha", LR, "sweep.num_samples=12", "trainer.max_epochs=3", f"tracking.tracking_uri={proxy.uri}"]
    # The pause keeps most trials for the time after the first trial's run is created, which takes seconds.
    with launch(tmp_path, *SWEEP, *options, *observed_trials(0.05)) as run:
        run.until(
            "the first trial's run is made",
            lambda: any(trial.run_id and not trial.run_id.startswith("offline") for trial in trials(tmp_path).values()),
        )
        proxy.delay = lambda path: 30.0
        within, there = Within(20.0), len([t for t in trials(tmp_path).values() if t.status != "running"])

        def all_ended() -> bool:
            now = trials(tmp_path)
            return len(now) == 12 and all(trial.status != "running" for trial in now.values())

        run.until("all trials have ended", all_ended)
        within.check(f"for {12 - there} trials")
        assert there < 8
        server.stop()
        proxy.ended.set()  # pending requests get no answer
        ended = run.wait().exits(0)
        run.nothing_left()
    assert "resume uploads them" in ended.err
    assert "pruned" in {trial.status for trial in trials(tmp_path).values()}
    assert record(tmp_path, "sweep")["status"] == "FINISHED"
    before = trials(tmp_path)
    server.start()
    launched(tmp_path, "resume", "sweep").exits(0)
    proxy.close()
    runs = Runs(tmp_path, tmp_path / "db")
    found = trials(tmp_path)
    assert {key: told(trial) for key, trial in found.items()} == {key: told(trial) for key, trial in before.items()}
    assert_in_mlflow(runs, found)
    assert runs.status("sweep") == "FINISHED"
    assert not list(tmp_path.glob("runs/sweep/trials/*/spool"))
