"""`hydra/sweeper=ray_tune` with the applications in tests/outside/hydra_app/, which use raytrainer only to report. Also
one process of such a sweep, driven by hand as Tune drives it."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray import cloudpickle

from raytrainer.config import Parameter
from raytrainer.errors import ConfigError, WorkerError
from raytrainer.storage import Storage
from raytrainer.sweep import report, stepped
from raytrainer.sweep.application import search
from raytrainer.sweep.application_setup import ApplicationJobs, unchangeable
from raytrainer.sweep.function import FunctionProcess, FunctionSetup
from raytrainer.sweep.journal import WORST, Mode, Report, Trial, TrialJournal
from raytrainer.sweep.reporting import as_number
from raytrainer.sweep.settings import Settings
from raytrainer.sweep.tune_space import RUN, TRIAL
from tests import forkserver
from tests.launches import OUTSIDE, Ended, launch, launched

APP = (str(OUTSIDE / "hydra_app" / "app.py"),)
SWEEPER = ("-m", "hydra/sweeper=ray_tune", "hydra.sweep.dir=swept")


def trials_in(folder: Path) -> list[Trial]:
    return list(TrialJournal.open(Storage(folder)).trials.values())


def noted(file: Path) -> list[dict[str, Any]]:
    """Return the complete JSON lines that the application has written."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


# --- whole sweeps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A sweep that has ended.

    Attributes:
        folder: The directory from which it was launched.
        ended: The exit code and the output of the command.
        trials: The trials in its journal.
        calls: What the application noted, by job number.
    """

    folder: Path
    ended: Ended
    trials: list[Trial]
    calls: dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Run a sweep with random draws over every kind of parameter. Some of its calls fail, each in a different way."""
    folder = tmp_path_factory.mktemp("mixed")
    what = "what=value,raises,nothing,several,undefined,leaves,changes"
    space = ("x=interval(-1,1)", "n=range(1,4)", "shape=parabola,cone", what)
    ended = launched(folder, *SWEEPER, *space, "hydra.sweeper.num_samples=32", "hydra.sweeper.seed=1", program=APP)
    calls = {call["num"]: call for call in noted(folder / "calls")}
    return Sweep(folder, ended.exits(0), trials_in(folder / "swept"), calls)


def of_kind(sweep: Sweep, what: str) -> list[Trial]:
    found = [trial for trial in sweep.trials if trial.parameters["what"] == what]
    assert found, f"no trial had {what}: choose another seed"
    return found


def test_each_trial_is_one_job_of_hydras(mixed: Sweep) -> None:
    assert len(mixed.trials) == len(mixed.calls) == len(noted(mixed.folder / "calls")) == 32
    for number, trial in enumerate(mixed.trials):
        call, place = mixed.calls[number], mixed.folder / "swept" / str(number)
        assert (trial.id, call["id"]) == (f"{number + 1:04d}", f"app_{number}")
        assert call["output_dir"] == str(place)
        assert call["overrides"] == trial.overrides == yaml.safe_load((place / ".hydra/overrides.yaml").read_text())
        assert {"config.yaml", "hydra.yaml"} < {file.name for file in (place / ".hydra").iterdir()}
        log = (place / "app.log").read_text()
        assert log.count("[__main__][INFO] - x is ") == 1
        assert f"x is {trial.parameters['x']}" in log
    keys = ["x", "n", "shape", "what"]
    assert all(list(trial.parameters) == keys for trial in mixed.trials)
    assert {trial.parameters["shape"] for trial in mixed.trials} == {"parabola", "cone"}
    assert {trial.parameters["n"] for trial in mixed.trials} == {1, 2, 3}


def test_processes_go_from_trial_to_trial(mixed: Sweep) -> None:
    pids = [call["pid"] for call in mixed.calls.values()]
    assert len(set(pids)) <= len(os.sched_getaffinity(0))
    # This holds after a failed trial too. What one trial changes does not reach the next one.
    assert all((call["folder"], call["left"]) == (str(mixed.folder), None) for call in mixed.calls.values())


def test_what_the_function_returns_is_the_objective(mixed: Sweep) -> None:
    for what in ("value", "changes"):
        for trial in of_kind(mixed, what):
            (only,) = trial.reports
            assert (trial.status, only.value) == ("finished", mixed.calls[int(trial.id) - 1]["value"])


def test_the_results_are_the_best_of_the_journal(mixed: Sweep) -> None:
    found = yaml.safe_load((mixed.folder / "swept/optimization_results.yaml").read_text())
    valued = [t for t in mixed.trials if t.status == "finished" and math.isfinite(t.reports[0].value)]
    best = min(valued, key=lambda trial: trial.reports[0].value)
    assert found == {"name": "ray_tune", "best_params": best.parameters, "best_value": best.reports[0].value}
    assert list(found) == ["name", "best_params", "best_value"]
    assert " ".join(best.overrides) in mixed.ended.out
    assert f"of trial {best.id}, in {int(best.id) - 1}" in mixed.ended.out
    # The same call without a sweep, in its own process, gives exactly the same value.
    launched(mixed.folder, *best.overrides, "hydra.run.dir=alone", program=APP).exits(0)
    alone = noted(mixed.folder / "calls")[-1]
    assert (alone["output_dir"], alone["value"]) == (str(mixed.folder / "alone"), found["best_value"])


def test_a_table_of_the_trials(mixed: Sweep) -> None:
    rows = list(csv.DictReader((mixed.folder / "swept/trials.csv").open()))
    assert [(row["id"], row["status"]) for row in rows] == [(t.id, t.status) for t in mixed.trials]
    assert (mixed.folder / "swept/trials.parquet").exists()
    assert not (mixed.folder / "swept/tune").exists(), "what Tune keeps for itself is gone"
    assert yaml.safe_load((mixed.folder / "swept/multirun.yaml").read_text())["n"] == 1


def test_a_trial_that_raises_fails_by_its_cause(mixed: Sweep) -> None:
    for trial in of_kind(mixed, "raises"):
        assert (trial.status, trial.cause) == ("failed", "ValueError: as it was told")
        log = (mixed.folder / "swept" / str(int(trial.id) - 1) / "app.log").read_text()
        assert "Traceback" in log
        assert "ValueError: as it was told" in log
    for trial in of_kind(mixed, "leaves"):
        assert (trial.status, trial.cause) == ("failed", "RuntimeError: main() raised SystemExit('enough')")
        told = (mixed.folder / "swept" / (trial.error or "")).read_text()
        assert told.startswith("Traceback")
        assert told.endswith("SystemExit: enough\n")
    assert "ValueError: as it was told" in mixed.ended.err
    assert mixed.ended.out.count("/error.txt") == 5  # only the first five failures are listed


def test_a_trial_without_a_number_is_told_what_to_return(mixed: Sweep) -> None:
    for trial in of_kind(mixed, "nothing"):
        words = "needs a number: return the value that is to be minimized"
        assert trial.cause == f"TypeError: main() returned None, and hydra/sweeper=ray_tune {words}"
        assert trial.status == "failed"
    for trial in of_kind(mixed, "several"):
        assert trial.status == "failed"
        assert trial.cause is not None
        assert "returned a tuple of 2" in trial.cause
        assert "several objectives cannot be searched for" in trial.cause


def test_nan_is_kept_and_never_the_best(mixed: Sweep) -> None:
    for trial in of_kind(mixed, "undefined"):
        assert trial.status == "finished"
        assert math.isnan(trial.reports[0].value)
        assert trial.best("min") is None


def test_what_the_trials_print_is_in_one_file(mixed: Sweep) -> None:
    text = (mixed.folder / "swept/output.log").read_text()
    for trial in mixed.trials:
        assert f"[{trial.id}] printed for {trial.parameters['x']}\n" in text
    assert "printed for" not in mixed.ended.out + mixed.ended.err


def test_what_a_stopped_function_does_at_its_end_is_waited_for(tmp_path: Path) -> None:
    """The sweep waits for the clean-up of every stopped function, also of the last trials."""
    program = ("-c", "from hydra_app.curves import main; main()")
    last_is_worst = [
        "-m",
        "x=choice(0.1,0.2,5.0,6.0)",
        "hydra.sweeper.search_alg=grid",
        "hydra.sweeper.num_samples=null",
    ]
    launched(tmp_path, *last_is_worst, program=program, environment={"CURVES_CLEAN_UP_S": "1.5"}).exits(0)
    assert [trial.status for trial in trials_in(tmp_path / "swept")][-1] == "pruned"
    assert sorted(call["x"] for call in noted(tmp_path / "curves")) == [0.1, 0.2, 5.0, 6.0]


def test_an_application_that_reports_is_pruned(tmp_path: Path) -> None:
    """Optuna samples the trials and ASHA stops them. The sweeper and all its settings are in the application's config,
    and the function is in a module."""
    program = ("-c", "from hydra_app.curves import main; main()")
    ended = launched(tmp_path, "-m", "x=interval(0,1)", program=program).exits(0)
    trials, calls = trials_in(tmp_path / "swept"), {call["x"]: call for call in noted(tmp_path / "curves")}
    assert len(trials) == len(calls) == 16
    pruned = [trial for trial in trials if trial.status == "pruned"]
    finished = [trial for trial in trials if trial.status == "finished"]
    assert pruned
    assert len(pruned) + len(finished) == 16
    for trial in trials:
        x = trial.parameters["x"]
        interim = [(r.evaluation, r.step, r.value) for r in trial.reports if r.interim]
        assert interim == [(n, 10 * n, x + 1 / n) for n in range(1, calls[x]["last"] + 1)]
        assert not calls[x]["swallowed"]
        if trial in pruned:
            assert len(interim) in (1, 3, 9)
            assert len(trial.reports) == len(interim)
            assert trial.best("min") is None
        else:
            assert len(interim) == 9
            assert replace(trial.reports[-1], time=0.0, seconds=None) == Report(10, 90, x, {}, 0.0)
    best = min(trial.parameters["x"] for trial in finished)
    found = yaml.safe_load((tmp_path / "swept/optimization_results.yaml").read_text())
    assert (found["best_params"], found["best_value"]) == ({"x": best}, best)
    # A process imports the module once and does not copy it for each call, so a call sees the state that earlier calls
    # left.
    assert all(call["call"] == call["calls"] for call in calls.values())
    assert max(call["calls"] for call in calls.values()) > 1
    assert f"({len(finished)} finished, {len(pruned)} pruned)" in ended.out


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_and_a_sweep_goes_on(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    arguments = (*SWEEPER, "n=1,2,3", "what=holds", "hydra.sweeper.search_alg=grid", "hydra.sweeper.direction=maximize")
    with launch(tmp_path, *arguments, program=APP) as started:

        def held() -> bool:
            trials = trials_in(tmp_path / "swept")
            running = len([call for call in noted(tmp_path / "calls") if call["num"]])
            return bool(trials) and trials[0].status == "finished" and running == min(2, len(os.sched_getaffinity(0)))

        started.until("one trial has ended and others hold", held)
        started.signal(signal.SIGINT, group=True)
        ended = started.wait(10).exits(130)
        started.nothing_left(10)
    assert "Traceback" not in ended.err
    assert "hydra.sweeper.resume=true" in ended.out
    before = trials_in(tmp_path / "swept")
    assert [trial.status for trial in before if trial.id != "0001"] == ["stopped"] * (len(before) - 1)
    assert yaml.safe_load((tmp_path / "swept/optimization_results.yaml").read_text())["best_params"] == {"n": 1}

    (tmp_path / "hold").unlink()
    launched(tmp_path, *arguments, "hydra.sweeper.resume=true", program=APP).exits(0)
    after = trials_in(tmp_path / "swept")
    assert [(trial.id, trial.status) for trial in after] == [(f"000{n}", "finished") for n in (1, 2, 3)]
    assert after[0].reports == before[0].reports, "what had finished did not run again"
    assert yaml.safe_load((tmp_path / "swept/optimization_results.yaml").read_text())["best_params"] == {"n": 3}


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the address of a running Ray cluster and a function that returns what runs on it."""
    program = [sys.executable, str(OUTSIDE / "cluster.py"), "2", forkserver.server().python]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, answers = process.stdin, process.stdout

        def running() -> Any:
            print("what runs?", file=to, flush=True)
            return json.loads(answers.readline())

        yield answers.readline().strip(), running
        to.close()
        process.wait(60)


@pytest.mark.slow
def test_on_a_cluster_that_runs_already(tmp_path: Path, cluster: tuple[str, Callable[[], Any]]) -> None:
    address, running = cluster
    arguments = (*SWEEPER, "x=0.25,1", "shape=parabola,cone", f"hydra.sweeper.address={address}")
    launched(tmp_path, *arguments, "hydra.sweeper.search_alg=grid", program=APP).exits(0)
    assert [trial.status for trial in trials_in(tmp_path / "swept")] == ["finished"] * 4
    assert running() == {"actors": [], "placement_groups": []}


@pytest.mark.slow
def test_an_application_that_returns_nothing(tmp_path: Path, cluster: tuple[str, Callable[[], Any]]) -> None:
    arguments = (*SWEEPER, "n=1,2", "what=nothing", "hydra.sweeper.search_alg=grid")
    ended = launched(tmp_path, *arguments, f"hydra.sweeper.address={cluster[0]}", program=APP).exits(1)
    assert re.search(r"no trial has a value: 2 of 2 failed.* TypeError: main\(\) returned None", ended.err)
    assert "Traceback" not in ended.err
    assert not (tmp_path / "swept/optimization_results.yaml").exists()
    assert [trial.parameters["n"] for trial in trials_in(tmp_path / "swept")] == [1, 2]


def test_without_the_sweeper_hydra_sweeps_as_ever(tmp_path: Path) -> None:
    ended = launched(tmp_path, "-m", "x=0.5,1", "what=nothing", "hydra.sweep.dir=swept", program=APP).exits(0)
    assert "Launching 2 jobs locally" in ended.out
    assert len({call["pid"] for call in noted(tmp_path / "calls")}) == 1
    assert not (tmp_path / "swept/ledger.jsonl").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nm_samples": 3}, "hydra.sweeper.nm_samples is not a setting of ray_tune; valid: num_samples, "),
        ({"num_samples": 0}, "hydra.sweeper.num_samples=0 must be a whole number of at least 1, or null"),
        ({"num_samples": "3"}, "hydra.sweeper.num_samples=3 must be"),
        ({"max_concurrent_trials": True}, "hydra.sweeper.max_concurrent_trials=true must be"),
        ({"seed": None}, "hydra.sweeper.seed must be a whole number of at least 0"),
        ({"max_trial_failures": -1}, "hydra.sweeper.max_trial_failures=-1 must be"),
        ({"direction": "up"}, "hydra.sweeper.direction=up must be one direction.*valid: minimize, maximize"),
        (
            {"direction": ["minimize", "maximize"]},
            r"hydra.sweeper.direction=\[minimize,maximize\] must be one direction",
        ),
        ({"resume": "yes"}, "hydra.sweeper.resume=yes must be true or false"),
        ({"address": 6379}, "hydra.sweeper.address=6379 must be the address"),
        ({"params": ["x"]}, r"hydra.sweeper.params=\[x\] must be a mapping of keys"),
        ({"resources_per_trial": {"cpu": 1}}, "hydra.sweeper.resources_per_trial.cpu is written CPU"),
        ({"resources_per_trial": {"CPU": -1}}, "hydra.sweeper.resources_per_trial.CPU=-1 must be a number"),
        ({"resources_per_trial": {"CPU": 0}}, "hydra.sweeper.resources_per_trial must have an amount above 0"),
        ({"resources_per_trial": 2}, "hydra.sweeper.resources_per_trial=2 must be names"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings.of(settings)


@dataclass(frozen=True)
class Fake:
    """An application that is never called."""

    name: str = "main"
    holds: Any = None

    def __call__(self, number: int, overrides: Sequence[str]) -> Any:
        raise AssertionError("nothing may start")

    def check(self, overrides: Sequence[str]) -> None:
        if "x=7" in overrides:
            raise KeyError("x")

    def keeping(self, wanted: Callable[[Any], bool]) -> ApplicationJobs:
        return self


def refused(
    folder: Path, *overrides: str, jobs: ApplicationJobs | None = None, space: Any = None, **settings: Any
) -> str:
    """Return the message with which a sweep is refused before Ray starts."""
    with pytest.raises(ConfigError) as caught:
        search(
            jobs or Fake(),
            settings,
            overrides,
            space=space or {},
            groups=lambda name: False,
            folder=folder / "swept",
            subfolder=lambda number, overrides: str(number),
            config="",
            verbose=False,
        )
    assert not list((folder / "swept").glob("[0-9]*"))
    return str(caught.value)


def node(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"search_alg": "bayes"},
            "hydra.sweeper.search_alg=bayes is neither a short name nor a node with a _target_; valid: ",
        ),
        ({"search_alg": {"a": 1}}, "hydra.sweeper.search_alg={a:1} must be a node"),
        ({"search_alg": node("ray.tune.search.ax.AxSearch")}, "hydra.sweeper.search_alg._target_"),
        (
            {"search_alg": node("raytrainer.sweep.RandomSearch", sed=1)},
            "hydra.sweeper.search_alg.sed=1 is not an argument",
        ),
        ({"search_alg": "grid"}, "choose hydra.sweeper.search_alg=random"),
        (
            {"scheduler": "asah"},
            "hydra.sweeper.scheduler=asah is neither a short name nor a node with a _target_; valid: asha",
        ),
        ({"scheduler": node("ray.tune.schedulers.ASHA")}, "hydra.sweeper.scheduler._target_"),
        ({"scheduler": node("raytrainer.sweep.RandomSearch")}, "hydra.sweeper.scheduler._target_"),
        (
            {"scheduler": node("ray.tune.schedulers.HyperBandScheduler")},
            "hydra.sweeper.scheduler=HyperBandScheduler pauses",
        ),
        ({"scheduler": node("ray.tune.schedulers.PopulationBasedTraining")}, "a function has none"),
        ({"time_budget_s": "soon"}, "hydra.sweeper.time_budget_s=soon must be a duration"),
    ],
)
def test_what_cannot_be_made_is_refused_before_ray_starts(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refused(tmp_path, "x=interval(0,1)", **settings)


def test_a_sweep_needs_something_to_search(tmp_path: Path) -> None:
    assert "hydra/sweeper=ray_tune needs " in refused(tmp_path, "x=1")
    assert "(in hydra.sweeper.params)" in refused(tmp_path, space={"x": "interval(1,"})


def test_every_value_is_composed_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        refused(tmp_path, "x=range(1,8)", "n=1,2")


def test_a_function_that_cannot_travel(tmp_path: Path) -> None:
    words = refused(tmp_path, "x=1,2", jobs=Fake(holds=threading.Lock()))
    assert re.search(r"main\(\) to another process: TypeError: cannot pickle", words)


def test_a_folder_with_a_sweep_is_not_gone_on_with_by_accident(tmp_path: Path) -> None:
    x = Parameter("x", "choice", (1, 2), ("1", "2"))
    journal = TrialJournal.open(Storage(tmp_path / "swept"))
    journal.begin(unchangeable(Settings(), [x], ["n=3"]))
    journal.start(Trial("0001", {"x": 1}, ["x=1"], 0.0))
    journal.close()
    assert "hydra.sweeper.resume=true continues it" in refused(tmp_path, "x=1,2", "n=3")
    assert "other parameters" in refused(tmp_path, "x=1,2,3", "n=3", resume=True)
    assert "other overrides" in refused(tmp_path, "x=1,2", "n=4", resume=True)
    assert "another direction" in refused(tmp_path, "x=1,2", "n=3", resume=True, direction="maximize")


# --- one process ------------------------------------------------------------------------------------------------------


def shared(job: Callable[[int, Sequence[str]], Any], mode: Mode = "min", retries: bool = False) -> FunctionSetup:
    return FunctionSetup(
        job=cloudpickle.dumps(job),
        name="main",
        parameters=[Parameter("x", "interval", low=0.0, high=9.0)],
        fixed=["y=1"],
        mode=mode,
        path=["/nowhere", *sys.path],
        folder=str(Path.cwd()),
        retries=retries,
    )


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FunctionProcess]]:
    """Yield `process(job, mode, retries)`, which makes a process of Tune inside this one, with its first trial."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    made: list[FunctionProcess] = []

    def make(job: Callable[[int, Sequence[str]], Any], **options: Any) -> FunctionProcess:
        class Own(FunctionProcess):
            def setup(self, config: dict[str, Any]) -> None:  # type: ignore[override]
                super().setup(config, shared(job, **options))

            def _setup_logdir(self) -> None:
                """Do nothing: Tune's log directory would be below the home directory."""

        made.append(Own(config(1)))
        return made[-1]

    yield make
    for one in made:
        one.cleanup()


def config(number: int, x: float = 2.0) -> dict[str, Any]:
    return {TRIAL: f"{number:04d}", RUN: "", "x": x}


def told(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the objective, the iteration and the done flag of a result, then its report and its end."""
    found = json.loads(result.get("report", "null"))
    return (
        result["objective"],
        result["training_iteration"],
        result["done"],
        found,
        json.loads(result.get("end", "null")),
    )


def test_a_job_gets_its_number_and_its_overrides(process: Callable[..., FunctionProcess]) -> None:
    def job(number: int, overrides: Sequence[str]) -> float:
        assert "/nowhere" in sys.path
        return number + float(overrides[1].removeprefix("x=")) if list(overrides) == ["y=1", "x=0.5"] else -1.0

    one = process(job)
    assert one.step()["objective"] == -1.0
    assert one.reset_config(config(8, x=0.5))
    value = {"evaluation": 1, "step": 1, "value": 7.5, "metrics": {}, "interim": False}
    assert told(one.step()) == (7.5, 1, True, value, {"status": "finished"})


def test_reports_wait_for_tune_and_a_stopped_function_ends_there(
    process: Callable[..., FunctionProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys.modules[__name__], "SEEN", seen)  # the job is pickled by reference to this module
    one = process(_reporting, mode="max")
    first = {"evaluation": 1, "step": 1, "value": 0.5, "metrics": {}, "interim": True}
    assert told(one.step()) == (0.5, 1, False, first, None)
    assert seen == ["begins"], "it waits"
    objective, iteration, done, found, _ = told(one.step())
    assert (objective, iteration, done, found["step"]) == (-WORST, 2, False, 40)
    assert math.isnan(found["value"])
    assert one.reset_config(config(2))
    assert seen == ["begins", "cleaned up"], "the rest of it was left out"
    for _ in range(2):
        one.step()
    last = {"evaluation": 3, "step": 40, "value": 9.0, "metrics": {}, "interim": False}
    assert told(one.step()) == (9.0, 2, True, last, {"status": "finished"})


SEEN: list[Any] = []


def _reporting(number: int, overrides: Sequence[str]) -> float:
    SEEN.append("begins")
    try:
        report(np.float32(0.5))
        report(torch.tensor(math.nan), step=40)
        SEEN.append("went on")
    finally:
        SEEN.append("cleaned up")
    return 9.0


def test_a_function_that_goes_on_when_it_was_stopped(
    process: Callable[..., FunctionProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepped, "ENDS_S", 0.2)
    free = threading.Event()
    monkeypatch.setattr(sys.modules[__name__], "FREE", free)
    one = process(_stubborn)
    one.step()
    with pytest.raises(WorkerError, match=r"trial 0001 was stopped.* did not end"):
        one.reset_config(config(2))
    free.set()


FREE = threading.Event()


def _stubborn(number: int, overrides: Sequence[str]) -> float:
    for _ in range(3):
        try:
            report(1.0)
        except BaseException:  # noqa: BLE001  # user code that wrongly swallows the stop
            FREE.wait()
    return 1.0


def test_another_thread_cannot_report(process: Callable[..., FunctionProcess]) -> None:
    def job(number: int, overrides: Sequence[str]) -> str:
        caught: list[BaseException] = []

        def elsewhere() -> None:
            try:
                report(1.0)
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        raise caught[0]

    *_, end = told(process(job).step())
    assert end["status"] == "failed"
    assert re.search("report .*thread", end["cause"])


def test_a_failed_trial_may_be_tried_again_unless_it_returned_no_number(
    process: Callable[..., FunctionProcess],
) -> None:
    def raises(number: int, overrides: Sequence[str]) -> float:
        raise OSError("away")

    with pytest.raises(WorkerError, match="OSError: away"):
        process(raises, retries=True).step()
    *_, end = told(process(lambda number, overrides: "9", retries=True).step())
    assert re.match(r"TypeError: main\(\) returned a str, .*hydra/sweeper=ray_tune needs a number", end["cause"])


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (np.int64(3), 3.0),
        (np.float32(0.5), 0.5),
        (np.array([2.0]), 2.0),
        (torch.tensor(2.5, requires_grad=True), 2.5),
        (math.inf, math.inf),
        (True, None),
        (np.True_, None),
        ("1.0", None),
        (None, None),
        ((1.0,), None),
        (np.array([1.0, 2.0]), None),
        (np.array([]), None),
        (torch.zeros(2), None),
        (1j, None),
    ],
)
def test_numbers(value: Any, number: float | None) -> None:
    assert as_number(value) == number
    if number is None:
        with pytest.raises(TypeError, match="report takes a number, not "):
            report(value)
    else:
        report(value, step=3)  # outside a sweep this does nothing


def test_a_number_larger_than_any_float_is_none_of_the_best() -> None:
    assert math.isnan(as_number(10**400) or 0.0)
