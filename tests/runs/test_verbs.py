"""Tests of the verbs as users type them: output for people and programs, exit codes, help, and CPU time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from raytrainer import cli
from raytrainer.attempt import Outcome, Record
from raytrainer.config import compose
from raytrainer.runs import logs, stop, verbs
from raytrainer.runs.arguments import VerbParser
from raytrainer.runs.printing import outcome_json
from raytrainer.runs.stop import StopResult
from raytrainer.sweep import SweepOutcome
from raytrainer.sweep.journal import Report, Trial
from tests.runs.past import Store, local_owner, write_lease
from tests.runs.test_listing import METRICS, TAGS


class Output(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Output]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(sys, "argv", ["/bin/raytrainer"])

    def call(*arguments: str) -> Output:
        code = cli.main(arguments)
        return Output(code, *capsys.readouterr())

    return call


@pytest.fixture
def two(store: Store) -> Store:
    _, storage = store.add("one", status="RUNNING", tags=TAGS, metrics=METRICS)
    write_lease(storage, **local_owner(os.getpid()))
    storage.write_bytes("logs/driver.log", b"hello\n")
    store.add("two", status="FAILED", user="somebody", cause="no more memory")
    return store


def test_list(two: Store, run: Run) -> None:
    output = run("list")
    assert (output.code, output.err) == (0, "")
    lines = output.out.splitlines()
    assert [line.split()[:2] for line in lines] == [["NAME", "STATUS"], ["one", "RUNNING"]]
    output = run("list", "--all", "--json", "--status", "failed")
    assert [(found["name"], found["cause"]) for found in json.loads(output.out)] == [("two", "no more memory")]
    assert run("list", "-a", "-n1").out.splitlines()[1].split()[:2] == ["two", "somebody"]


def test_status(two: Store, run: Run) -> None:
    assert run("status", "one").out.startswith("name     one\nstatus   RUNNING\n")
    found = json.loads(run("status", "--json", "one").out)
    assert (found["name"], found["step"], found["best"]) == ("one", 30, 0.97)
    output = run("status", "nope")
    assert (output.code, output.out) == (2, "")
    assert output.err.startswith("raytrainer: refused: nope: no run ")


def test_logs(two: Store, run: Run) -> None:
    assert run("logs", "one") == Output(0, "hello\n", "")
    assert json.loads(run("logs", "one", "--json").out) == {"line": "hello"}
    output = run("logs", "one", "--rank", "3")
    assert (output.code, output.err) == (2, "raytrainer: refused: --rank=3 has no log\n")


def test_ctrl_c_ends_the_following_only(two: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[str]:
        yield "hello"
        raise KeyboardInterrupt

    monkeypatch.setattr(logs, "log_lines", interrupted)
    output = run("logs", "-f", "one")
    assert (output.code, output.out) == (130, "hello\n")
    assert output.err == "raytrainer: stopped following; the run continues. raytrainer stop one stops it\n"


@pytest.mark.parametrize("done", [True, False])
def test_stop(two: Store, run: Run, monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    given: dict[str, Any] = {}

    class Stopper:
        def __init__(self, identifier: str, **options: Any) -> None:
            given.update(options, id=identifier)

        def stop(self) -> StopResult:
            return StopResult("one", "KILLED" if done else "RUNNING", done, "as told", 2.0)

    monkeypatch.setattr(stop, "Stopper", Stopper)
    output = run("stop", "one", "--force", "--timeout=7")
    assert output.code == (0 if done else 1)
    assert output.out.startswith("one is stopped (KILLED) after 0:02" if done else "one is not stopped after 0:02")
    assert (given["id"], given["force"], given["timeout_s"]) == ("one", True, 7.0)
    assert json.loads(run("stop", "one", "--json").out)["done"] is done


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_help(verb: str, run: Run) -> None:
    output = run(verb, "--help")
    assert output.code == 0
    assert output.out.startswith(f"usage: raytrainer {verb} ")
    assert "--json" in output.out
    assert output.err == ""


def test_a_wrong_option_names_the_right_ones(run: Run) -> None:
    output = run("logs", "x", "--folow")
    expected = "--folow has no meaning here (did you mean --follow?); logs takes ID, --json, -f, --follow, -r, --rank"
    assert (output.code, output.err) == (2, f"raytrainer: refused: {expected}\n")


def test_options_and_values_in_any_order() -> None:
    for arguments in (["--here", "one", "seed=1", "~x", "+y=2"], ["one", "seed=1", "~x", "+y=2", "--here"]):
        parsed = verbs.parser("rerun").parse(arguments)
        assert (parsed.id, parsed.overrides, parsed.here) == ("one", ["seed=1", "~x", "+y=2"], True)
    assert isinstance(verbs.parser("list"), VerbParser)


def test_outcomes_for_programs() -> None:
    made = Record("one", "/x/one", "r1")
    result = {"step": 3, "best": (0.5, 2), "metrics": {"val/loss": float("nan")}}
    found = json.loads(outcome_json(Outcome("FINISHED", 0, made, "inline", result)))
    assert (found["name"], found["run_id"], found["status"], found["exit_code"]) == ("one", "r1", "FINISHED", 0)
    assert found["result"] == {"step": 3, "best": [0.5, 2], "metrics": {"val/loss": None}}
    trial = Trial("0001", {"optimizer.lr": 0.1}, ["optimizer.lr=0.1"], 1.0, reports=[Report(1, 2, 0.5, {}, 1.0)])
    sweep = SweepOutcome("FAILED", 1, made, "local", None, [trial], cause="x")  # type: ignore[arg-type]
    found = json.loads(outcome_json(sweep))
    assert found["trials"] == [
        {
            "id": "0001",
            "status": "running",
            "parameters": {"optimizer.lr": 0.1},
            "overrides": ["optimizer.lr=0.1"],
            "run_id": None,
            "cause": None,
            "reports": 1,
        }
    ]


def _processor_seconds(program: str, *arguments: str) -> float:
    """Return the CPU seconds of a program, which other work on the machine affects less than wall time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=60, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_list_and_status_need_no_torch_and_little_time(two: Store) -> None:
    """Each needs less than 1.1 times the CPU time of a bare query to the same store by MLflow's own client."""
    asks = "from mlflow.tracking import MlflowClient; asked = MlflowClient('sqlite:///mlflow.db'); "
    asks += "found = asked.search_runs([e.experiment_id for e in asked.search_experiments()]); assert len(found) == 2"
    verb = "import sys; from raytrainer.__main__ import entry\n"
    verb += "try: entry()\nfinally: assert not {'torch', 'ray'} & set(sys.modules)"
    for arguments in (["list"], ["status", "one"]):
        # Measure both in turn, and again if other work slowed the machine in between.
        assert any(_processor_seconds(verb, *arguments) < 1.1 * _processor_seconds(asks) for _ in range(4))


def test_the_outcome_of_a_resumed_run_as_json(two: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytrainer import attempt as running
    from raytrainer.runs import resume

    made = Record("two", "/x", "r")
    monkeypatch.setattr(resume, "to_resume", lambda *_: (compose(["experiment=mlp", "name=two"]), made, []))
    monkeypatch.setattr(running, "launch", lambda *_, **__: Outcome("KILLED", 143, made, "here"))
    output = run("resume", "two", "--json")
    assert output.code == 143
    assert json.loads(output.out)["status"] == "KILLED"
    assert Path("mlflow.db").exists()
