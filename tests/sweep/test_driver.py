"""An attempt at a sweep without Ray: what is recorded of its trials when a disk, a server or a person ends it early.

A script plays the trials; the journal, the spools and the uploader thread are real.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from raytrainer import preflight, ray_internals, tracking
from raytrainer.attempt import Record, lifecycle
from raytrainer.attempt.locking import locked_attempt
from raytrainer.checkpoint import Checkpointer, import_checkpoint
from raytrainer.config import group_names
from raytrainer.errors import StorageFull
from raytrainer.progress import Display
from raytrainer.storage import Storage
from raytrainer.sweep import Plan, driver, make_plan, pictures
from raytrainer.sweep.driver import SweepDriver
from raytrainer.sweep.engine import Search
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.outcome import SweepOutcome
from raytrainer.sweep.room import at_once
from raytrainer.sweep.schedule import make_scheduler
from raytrainer.sweep.trial_state import Status
from raytrainer.tracking.segments import SegmentWriter, line
from raytrainer.tracking.spool import Spool, spool_of
from tests.promises import Within
from tests.tracking.fakes import FakeServer

Script = Callable[["Acting"], str]


@pytest.fixture(scope="module")
def plan() -> Plan:
    given = ["experiment=mlp", "sweep=random", "optimizer.lr=interval(0,1)", "name=sweep", "storage_path=/nowhere"]
    return make_plan(
        [*given, "tracking.tracking_uri=http://tracking.example"], choice="random", space={}, groups=group_names()
    )


class Acting(SweepDriver):
    """A driver that runs a script instead of Tune and its processes."""

    script: Script

    def _search(self, available: preflight.Resources) -> str:
        self.attempt.interrupts.deferred = True
        return self.script(self)

    def starts(self, *, run: bool = True) -> Trial:
        number = len(self.journal.trials) + 1
        trial = Trial(f"{number:04d}", {"optimizer.lr": number / 10}, [f"optimizer.lr={number / 10}"], time.time())
        self.journal.start(trial)
        self._trial_started(trial)
        return trial

    def reports(self, trial: Trial, *values: float) -> None:
        for value in values:
            n = len(trial.reports) + 1
            self.journal.report(trial.id, Report(n, 10 * n, value, {"val/loss": value}, time.time()))

    def ends(self, trial: Trial, status: Status = Status.FINISHED, cause: str | None = None) -> None:
        self.journal.end(trial.id, status, cause)
        self._trial_ended(trial)


@dataclass
class Place:
    """A sweep's directory and its tracking server, for consecutive attempts."""

    storage: Storage
    plan: Plan
    server: FakeServer = field(default_factory=FakeServer)
    shown: io.StringIO = field(default_factory=io.StringIO)

    def attempt(self, script: Script, *overrides: str) -> SweepOutcome:
        self.shown = io.StringIO()
        display = Display(self.shown)
        before = Record.read(self.storage) or Record("sweep", self.storage.uri, experiment_name="exp", kind="sweep")
        record = replace(before, attempts=before.attempts + 1)
        plan = self.plan.with_overrides(["tracking.required=false", *overrides])
        e = replace(plan.experiment, storage_path=str(self.storage.local_path.parent))
        journal = TrialJournal.open(self.storage)
        journal.begin({})
        with locked_attempt(e, new=False, display=display) as attempt:
            attempt.prepare(record, "here", needs_tracking=False)
            attempt.open_logs()
            scheduler = make_scheduler(None, plan.parameters, mode="max", evaluations=None)
            driver = Acting(plan, attempt, journal, scheduler)
            driver.script = script
            return attempt.run(driver)

    def status(self, trial: str = "") -> str:
        """Return the MLflow status of a trial, or of the sweep if `trial` is empty."""
        name = f"sweep.{trial}" if trial else "sweep"
        (run,) = [run for run in self.server.runs.values() if run.name == name]
        return run.status


@pytest.fixture
def place(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    found = Place(Storage(tmp_path / "sweep"), plan)

    @contextmanager
    def no_ray(*_: Any, **__: Any) -> Iterator[preflight.Resources]:
        yield preflight.this_machine()

    monkeypatch.setattr(driver, "ray_session", no_ray)
    monkeypatch.setattr(pictures, "progress_png", lambda *_, **__: b"png")
    monkeypatch.setattr(pictures, "parameters_png", lambda *_, **__: b"png")
    monkeypatch.setattr(tracking, "open_run", functools.partial(tracking.open_run, server=found.server))
    uploader = functools.partial(tracking.ChildRunUploader, server=found.server)
    monkeypatch.setattr(
        tracking, "ChildRunUploader", lambda *args, **more: uploader(*args, **{**more, "interval_s": 0.01})
    )
    monkeypatch.setattr("raytrainer.tracking.uploader.Server", lambda *_, **__: found.server)
    monkeypatch.setattr("raytrainer.tracking.child_runs._LAST_PAUSE_S", 0.01)
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.05, 0.2))
    yield found
    # A stopped sweep does not wait for the thread that opens its run. That thread must not reach the next test's
    # server.
    for thread in threading.enumerate():
        if thread.name == "mlflow-open":
            thread.join(60)


def ended(of: Place) -> dict[str, str]:
    return {trial.id: trial.status for trial in TrialJournal.open(of.storage).trials.values()}


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_undisturbed_one(place: Place) -> None:
    def script(sweep: Acting) -> str:
        for value in (0.5, 0.4):
            trial = sweep.starts()
            sweep.reports(trial, 1.0, value)
            sweep.ends(trial)
        return "finished"

    outcome = place.attempt(script)
    assert (outcome.status, outcome.exit_code, outcome.cause) == ("FINISHED", 0, None)
    assert {place.status(), place.status("0001"), place.status("0002")} == {"FINISHED"}
    assert ended(place) == {"0001": "finished", "0002": "finished"}
    rows = {run.name: [row for row in run.rows if row.key == "best/val/accuracy"] for run in place.server.runs.values()}
    best = {name: [(row.value, row.step) for row in found] for name, found in rows.items()}
    # A trial logs its best value at its step, and the sweep at the number of its trials.
    assert best == {"sweep.0001": [(1.0, 10)], "sweep.0002": [(1.0, 10)], "sweep": [(1.0, 2)]}
    place.attempt(lambda sweep: "finished")
    assert sum(len(run.rows) for run in place.server.runs.values()) == 3


def test_a_ledger_that_cannot_be_written_fails_the_sweep_and_every_run_is_told(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep fails, every MLflow run gets its final status, and the results are written from the journaled
    reports."""

    def script(sweep: Acting) -> str:
        first, second = sweep.starts(), sweep.starts()
        sweep.reports(first, 0.5)

        def full(data: bytes) -> None:
            raise StorageFull("no space at ledger.jsonl")

        monkeypatch.setattr(sweep.journal._sink, "append", full)
        sweep.reports(second, 0.4)
        return "finished"

    outcome = place.attempt(script)
    assert (outcome.status, outcome.exit_code) == ("FAILED", 1)
    assert "no space at ledger.jsonl" in (outcome.cause or "")
    assert (place.status(), place.status("0001"), place.status("0002")) == ("FAILED", "KILLED", "KILLED")
    assert place.storage.exists("trials.csv")
    assert [trial.status for trial in outcome.trials] == ["stopped", "stopped"]


def killed(place: Place, *after: Callable[[Acting], None]) -> None:
    """Run an attempt whose driver is killed in the middle of two trials, so that their ends are not recorded."""

    class Killed(BaseException):
        pass

    def script(sweep: Acting) -> str:
        for value in (0.5, 0.4):
            sweep.reports(sweep.starts(), value)
        until(lambda: len([run for run in place.server.runs.values() if run.name != "sweep"]) == 2)
        for one in after:
            one(sweep)
        sweep._runs._uploader._abandon.set()  # type: ignore[union-attr]
        sweep._runs._uploader._closing.set()  # type: ignore[union-attr]
        raise Killed

    with pytest.raises(Killed):
        place.attempt(script)


def interrupted(sweep: Acting) -> str:
    sweep.attempt.interrupts.ask("interrupted", 130)
    sweep.attempt.interrupts.check()
    raise AssertionError


def test_a_resume_that_is_stopped_at_once_ends_the_runs_that_a_killed_driver_left(place: Place) -> None:
    killed(place)
    assert (place.status("0001"), place.status("0002")) == ("RUNNING", "RUNNING")
    # Trial 0002 was uploaded completely and has no spool here, as when the sweep continues on another machine.
    shutil.rmtree(place.storage.local_path / "trials/0002/spool")
    outcome = place.attempt(interrupted)
    assert (outcome.status, outcome.exit_code) == ("KILLED", 130)
    assert place.shown.getvalue().count("interrupted: stopping 2 trials, which can continue") == 1
    assert (place.status(), place.status("0001"), place.status("0002")) == ("KILLED", "KILLED", "KILLED")
    assert ended(place) == {"0001": "stopped", "0002": "stopped"}
    tags = [run.tags for run in place.server.runs.values() if run.name != "sweep"]
    assert {tag["raytrainer.trial_status"] for tag in tags} == {"stopped"}


def test_mlflow_away_at_the_start_has_it_all_soon_after_it_is_back(place: Place) -> None:
    """The sweep's run is created when the server is back, and its trials' runs only after that, below it."""
    place.server.down = True

    def script(sweep: Acting) -> str:
        first = sweep.starts()
        until(lambda: sweep.attempt.run_opened)
        sweep.reports(first, 0.5)
        sweep.ends(first)
        place.server.down = False
        until(lambda: any(run.name == "sweep.0001" and run.status == "FINISHED" for run in place.server.runs.values()))
        sweep.ends(sweep.starts())
        return "finished"

    outcome = place.attempt(script)
    assert (place.status(), place.status("0002")) == ("FINISHED", "FINISHED")
    (parent,) = [run_id for run_id, run in place.server.runs.items() if run.name == "sweep"]
    assert {run.tags["mlflow.parentRunId"] for run in place.server.runs.values() if run.name != "sweep"} == {parent}
    assert outcome.record.run_id == parent
    assert not list(place.storage.local_path.glob("trials/*/spool"))


def test_mlflow_away_at_the_start_and_back_at_the_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (60.0, 60.0))
    place.server.down = True

    def script(sweep: Acting) -> str:
        until(lambda: sweep.attempt.run_opened)
        trial = sweep.starts()
        sweep.reports(trial, 0.5)
        sweep.ends(trial)
        place.server.down = False
        return "finished"

    place.attempt(script)
    assert (place.status(), place.status("0001")) == ("FINISHED", "FINISHED")


def test_a_stopped_sweep_does_not_wait_for_a_server_that_hangs_when_it_is_opened(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (driver, lifecycle):
        monkeypatch.setattr(module, "CLOSE_STOPPED_S", 0.2)
    answers = threading.Event()

    def hangs(name: str) -> None:
        answers.wait(60)

    place.server.before = hangs
    within = Within(5.0)
    outcome = place.attempt(interrupted)
    within.check()
    answers.set()
    assert outcome.status == "KILLED"
    assert "MLflow does not answer" in place.shown.getvalue()


def test_a_file_that_cannot_be_told_holds_up_no_end(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(sweep: Acting) -> str:
        sweep.starts()
        monkeypatch.setattr(sweep.attempt.logs, "write_marks", no_space)
        return "finished"

    def no_space() -> None:
        raise StorageFull("no space for the marks")

    place.attempt(script)
    assert "no space for the marks" in place.shown.getvalue()
    assert (place.status(), place.status("0001")) == ("FAILED", "KILLED")


def test_no_more_at_a_time_than_there_is_room_for() -> None:
    assert at_once(None, 4) == (4, None)
    assert at_once(3, 4) == (3, None)
    assert at_once(9, 4) == (4, "sweep.max_concurrent_trials=9: there is room for 4 at a time")
    assert at_once(9, 4, grows=True) == (9, None)


def test_time_that_was_over_before_a_trial_had_finished_is_told_as_that(place: Place) -> None:
    def script(sweep: Acting) -> str:
        sweep.reports(sweep.starts(), 0.5)
        return "time budget"

    outcome = place.attempt(script, "sweep.time_budget_s=90")
    assert (outcome.status, outcome.exit_code) == ("FAILED", 1)
    assert outcome.cause == "the time budget of 1:30 (sweep.time_budget_s) ended before any trial finished"
    assert outcome.note == "time budget reached"


def test_without_a_value_that_is_a_number_a_sweep_has_failed(place: Place) -> None:
    def script(sweep: Acting) -> str:
        trial = sweep.starts()
        sweep.reports(trial, math.nan, math.inf)
        sweep.ends(trial)
        return "finished"

    outcome = place.attempt(script)
    assert (outcome.status, outcome.exit_code) == ("FAILED", 1)
    assert outcome.cause == "no trial has a value of val/accuracy that is a number"


def test_a_stopped_sweep_leaves_its_results_and_nothing_of_tunes(place: Place) -> None:
    def script(sweep: Acting) -> str:
        sweep.reports(sweep.starts(), 0.5)
        place.storage.write_bytes("tune/checkpoint_000001/trial.json", b"{}")
        return interrupted(sweep)

    assert place.attempt(script).status == "KILLED"
    left = {path.name for path in place.storage.local_path.iterdir()}
    assert left >= {"trials.csv", "trials.parquet", "best", "progress.png", "parameters.png"}
    assert "tune" not in left
    (parent,) = [run for run in place.server.runs.values() if run.name == "sweep"]
    assert {"sweep/trials.csv", "sweep/progress.png"} <= parent.artifacts.keys()


def logs(sweep: Acting, trial: Trial, *lines: tuple[int, dict[str, float]]) -> None:
    """Write metrics as the trial's process does, which is then killed."""
    spool = Spool(spool_of(sweep._directory(trial)))
    writer = SegmentWriter(spool, 1_000_000)
    for step, metrics in lines:
        writer.append(line("m", 1000 * step, step, metrics))
    writer.close()


@pytest.mark.parametrize("reported", [0, 1])
def test_an_evaluation_that_a_stopped_trial_could_not_report_is_recorded(place: Place, reported: int) -> None:
    """The journal gets an evaluation that a stopped trial has logged but not reported, even if MLflow has it
    already."""

    def script(sweep: Acting) -> str:
        trial = sweep.starts()
        sweep.reports(trial, *[0.5] * reported)
        logs(sweep, trial, (10, {"val/loss": 1.0, "val/accuracy": 0.5}), (15, {"train/loss": 1.0}))
        logs(sweep, trial, (20, {"val/loss": 0.5, "val/accuracy": 0.75}), (25, {"train/loss": 0.5}))
        until(lambda: any(row.step == 25 for run in place.server.runs.values() for row in run.rows))
        return interrupted(sweep)

    assert place.attempt(script).status == "KILLED"
    (trial,) = TrialJournal.open(place.storage).trials.values()
    last = trial.reports[-1]
    assert (last.evaluation, last.step, last.value, last.time) == (reported + 1, 20, 0.75, 20.0)
    assert last.metrics == {"val/loss": 0.5, "val/accuracy": 0.75}
    assert trial.status == "stopped"
    (run,) = [run for run in place.server.runs.values() if run.name == "sweep.0001"]
    assert run.tags["raytrainer.best_value"] == "0.75"
    assert not list(place.storage.local_path.glob("trials/*/spool"))


def test_what_was_reported_is_not_recorded_twice(place: Place) -> None:
    def script(sweep: Acting) -> str:
        trial = sweep.starts()
        sweep.reports(trial, 0.5)
        logs(sweep, trial, (10, {"val/loss": 1.0, "val/accuracy": 0.5}), (15, {"train/loss": 1.0}))
        return interrupted(sweep)

    place.attempt(script)
    (trial,) = TrialJournal.open(place.storage).trials.values()
    assert [report.value for report in trial.reports] == [0.5]


def test_a_spool_that_cannot_be_read_does_not_hide_how_a_stopped_sweep_ended(place: Place) -> None:
    def script(sweep: Acting) -> str:
        trial = sweep.starts()
        sweep.reports(trial, 0.5)
        (sweep._directory(trial).local_path / "spool/metrics-000001-00000000.jsonl").mkdir(parents=True)
        return interrupted(sweep)

    assert place.attempt(script).status == "KILLED"
    (trial,) = TrialJournal.open(place.storage).trials.values()
    assert (trial.status, [report.value for report in trial.reports]) == ("stopped", [0.5])


def test_trials_request_the_nodes_that_scaling_selects(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: dict[str, Any] = {}

    def run(self: Search, trainable: type, **arguments: Any) -> str:
        requested.update(arguments)
        return "finished"

    monkeypatch.setattr(Search, "run", run)
    monkeypatch.setattr("ray.tune.with_parameters", lambda trainable, **_: trainable)
    monkeypatch.setattr(ray_internals, "nodes", lambda: [{"CPU": 9.0}, {"CPU": 3.0, "accelerator_type:A100": 1.0}])
    monkeypatch.setattr(ray_internals, "WorkerOutput", lambda *_: contextlib.nullcontext())
    scaling = ["scaling.accelerator_type=A100", "scaling.label_selector={zone: a}", "scaling.num_workers=2"]
    place.attempt(lambda sweep: SweepDriver._search(sweep, preflight.this_machine()), *scaling)
    bundle = {"CPU": 1.0, "accelerator_type:A100": 0.001}
    assert requested["resources"] == ray_internals.trial_resources(bundle, 2, "PACK", {"zone": "a"})
    assert requested["limit"] == 1  # the node with the accelerator has three CPUs


def test_pictures_of_a_stopped_sweep_hold_up_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = threading.Event()
    monkeypatch.setattr(driver, "_DRAW_STOPPED_S", 0.05)
    monkeypatch.setattr(pictures, "progress_png", lambda *_, **__: drawn.wait(30) and b"png")

    def script(sweep: Acting) -> str:
        sweep.reports(sweep.starts(), 0.5)
        return interrupted(sweep)

    within = Within(5.0)
    assert place.attempt(script).status == "KILLED"
    within.check()
    assert place.storage.exists("trials.csv")
    drawn.set()


def test_what_was_taken_over_before_all_was_killed_is_written_down(place: Place, tmp_path: Path) -> None:
    """Trial 0002 has taken over 0001's checkpoint and is killed before it reports; the journal then gets the
    exploit."""
    killed(place)
    checkpointer = Checkpointer(Storage(tmp_path / "carried"))
    checkpointer.save(10, {}, {})
    checkpointer.close()
    note = {"from": "0001", "evaluation": 1, "parameters": {"optimizer.lr": 0.7}}
    import_checkpoint(tmp_path / "carried", place.storage.child("trials/0002/checkpoints"), note)

    def script(sweep: Acting) -> str:
        first, second = sweep.journal.trials.values()
        assert (first.parameters, first.inherited) == ({"optimizer.lr": 0.1}, [])
        assert (second.parameters, second.overrides) == ({"optimizer.lr": 0.7}, ["optimizer.lr=0.7"])
        assert second.inherited == [note]
        return "finished"

    for _ in range(2):  # the second attempt does not record it again
        place.attempt(script)


def test_which_weights_of_the_best_there_are_is_told(place: Place) -> None:
    """If the best evaluation has no checkpoint, the outcome says from which step the weights are."""

    def script(sweep: Acting) -> str:
        trial = sweep.starts()
        sweep.reports(trial, 0.5, 0.6, 0.9 + 0.01 * len(saved), 0.7)
        for step, value in saved:
            checkpoints = Checkpointer(sweep._directory(trial).child("checkpoints"), num_to_keep=None, mode="max")
            checkpoints.save(step, {"model": {}}, {}, metric=value)
            checkpoints.close()
        sweep.ends(trial)
        return "finished"

    saved: list[tuple[int, float]] = []
    assert place.attempt(script).weights is None
    saved = [(20, 0.6), (40, 0.7)]
    weights = place.attempt(script).weights or ""
    assert weights.startswith("of step 40: the trial was stopped before those of step 30 were written")
    assert weights.endswith(
        next(path.name for path in (place.storage.local_path / "trials/0002/checkpoints").glob("*40*"))
    )
