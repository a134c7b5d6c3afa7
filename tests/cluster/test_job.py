"""Tests of whole jobs on a real cluster that requires a token: submit, follow, inspect, kill, stop and resume."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytrainer.backends.jobs_api.api import JobsClient
from tests.launches import Ended, Runs, launch, launched, observed, record
from tests.outside.head import Head
from tests.promises import Within

pytestmark = pytest.mark.slow
# So many steps that the run ends only when it is stopped.
LONG = ["trainer.max_steps=1000000", "trainer.log_every_n_steps=20"]


@pytest.fixture(autouse=True)
def project(head: Head, monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    # Files that the tests write there are not part of the package.
    (in_tmp / ".rayignore").write_text("/launch-*\n/steps/\n")


@pytest.fixture
def submit(head: Head, in_tmp: Path) -> Callable[..., Any]:
    def begin(name: str, *overrides: str) -> Any:
        to = ["cluster=job", f"cluster.address={head.address}"]
        return launch(in_tmp, "experiment=smoke", f"name={name}", *to, *overrides)

    return begin


def verb(folder: Path, *arguments: str) -> Any:
    """Return a command's JSON output."""
    return json.loads(launched(folder, *arguments, "--json").exits(0).out)


def driver_of(head: Head) -> psutil.Process:
    """Return the driver process of the running job."""
    (found,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if "raytrainer.cluster.entry" in (process.info["cmdline"] or [])
        and process.info["cmdline"][0] != "/bin/sh"
        and process.environ().get("HOME") == str(head.home)
    )
    return found


def driven(head: Head) -> bool:
    try:
        driver_of(head)
    except ValueError:
        return False
    return True


# --- one job with a secret, submitted twice at once -------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A job that has ended. It was submitted twice at the same time."""

    folder: Path
    command: list[str]
    environment: dict[str, str]
    first: Ended
    second: Ended

    def submitted(self, *overrides: str) -> Ended:
        """Submit the same run again."""
        with launch(self.folder, *self.command, *overrides, environment=self.environment) as again:
            return again.wait()


@pytest.fixture(scope="module")
def whole(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    (folder / ".rayignore").write_text("/launch-*\n/digest\n")
    ((name, secret),) = head.secrets.items()
    command = ["experiment=smoke", "name=whole", "trainer.max_steps=4", "cluster=job"]
    command += [f"cluster.address={head.address}", f"cluster.forward_env=[{name}]"]
    command += ["+callbacks.digest._target_=probes.Digest", f"+callbacks.digest.path={folder}/digest"]
    command += ["+callbacks.digest.value=${oc.env:" + name + "}"]
    environment = {"RAY_AUTH_TOKEN": head.token, name: secret}
    with (
        launch(folder, *command, environment=environment) as one,
        launch(folder, *command, environment=environment) as two,
    ):
        ended = [each.wait().exits(0) for each in (one, two)]
    return Whole(folder, command, environment, *sorted(ended, key=lambda each: each.out.splitlines()[-4]))


def test_a_job_from_its_command_to_its_logs(whole: Whole) -> None:
    lines = whole.first.out.splitlines()
    assert any(line.startswith("raytrainer: job whole on ") for line in lines)
    assert "outcome  finished, 4 steps" in whole.first.out
    assert lines[-4] == "outcome  finished"
    assert Runs(whole.folder).status("whole") == record(whole.folder, "whole")["status"] == "FINISHED"
    told = verb(whole.folder, "status", "whole")
    assert (told["status"], told["submission_id"], told["job"]["status"]) == ("FINISHED", "whole", "SUCCEEDED")


def test_two_at_once_are_one_job(whole: Whole) -> None:
    assert whole.second.out.splitlines()[-4] == "outcome  finished, submitted before"
    assert record(whole.folder, "whole")["attempts"] == 1
    assert len([run for run in verb(whole.folder, "list") if run["name"] == "whole"]) == 1


def test_once_more_is_no_second_job(whole: Whole) -> None:
    assert whole.submitted().exits(0).out.splitlines()[-4] == "outcome  finished, submitted before"
    assert "is the name of a job that was submitted" in whole.submitted("trainer.max_steps=5").exits(2).err


def test_its_evaluation_is_a_job_too(whole: Whole) -> None:
    """The evaluation runs on the run's cluster by default, as a child run, and leaves the run's record unchanged."""
    before = record(whole.folder, "whole")
    with launch(whole.folder, "evaluate", "whole", environment=whole.environment) as evaluating:
        said = evaluating.wait().exits(0).out
    assert "outcome      step 4 evaluated" in said
    runs = Runs(whole.folder)
    (name,) = (path.name for path in (whole.folder / "runs").glob("whole-evaluate-*"))
    assert f"where    job {name} at " in said
    assert runs.status(name) == "FINISHED"
    assert runs.tags(name)["mlflow.parentRunId"] == before["run_id"]
    assert runs.rows(name)["val/loss"] == runs.rows("whole")["val/loss"]
    assert record(whole.folder, "whole") == before


def test_no_secret_is_anywhere(whole: Whole, head: Head) -> None:
    """A worker uses the secret and the config refers to it, but nothing that Ray or MLflow stores contains it."""
    ((_, secret),) = head.secrets.items()
    assert (whole.folder / "digest").read_text() == hashlib.sha256(secret.encode()).hexdigest()
    jobs = JobsClient(head.address)
    texts = {"the command": f"{whole.first}{whole.second}", "the log": jobs.logs("whole"), "the job": repr(jobs.list())}
    files = [p for place in (whole.folder, head.session, head.folder) for p in place.rglob("*") if p.is_file()]
    found = [str(p) for p in files if secret.encode() in p.read_bytes()]
    assert any("logs/driver" in str(p) or "job-driver" in p.name for p in files)
    assert any(p.name == "mlflow.db" for p in files)
    assert found + [place for place, text in texts.items() if secret in text or head.token in text] == []


# --- jobs that are inspected, killed and stopped ----------------------------------------------------------------------


def test_whoever_follows_may_go_and_the_verbs_go_on(submit: Callable[..., Any], in_tmp: Path, head: Head) -> None:
    with submit("long", *LONG) as started:
        started.until("it trains", lambda: "epoch 1" in started.output().out)
        started.signal(signal.SIGINT)
        ended = started.wait().exits(130)
        assert "long continues at " in ended.err
        assert driven(head)
        (listed,) = [run for run in verb(in_tmp, "list") if run["name"] == "long"]
        assert (listed["status"], listed["life"]) == ("RUNNING", "alive")
        follow = [sys.executable, "-m", "raytrainer", "logs", "-f", "long"]
        with subprocess.Popen(follow, cwd=in_tmp, stdout=subprocess.PIPE, text=True) as following:
            told = verb(in_tmp, "stop", "long")
            assert (told["status"], told["done"]) == ("KILLED", True)
            assert following.stdout is not None
            assert "saving a checkpoint, then stopping" in following.stdout.read()
        assert not driven(head)
        saved = verb(in_tmp, "status", "long")["checkpoints"][-1]["step"]
    # A resume continues from the saved step.
    with launch(in_tmp, "resume", "long", f"trainer.max_steps={saved + 3}") as resumed:
        assert f"outcome  finished, {saved + 3} steps" in resumed.wait().exits(0).out
    assert record(in_tmp, "long")["job"]["submission_id"] == "long--2"


def test_a_job_whose_driver_is_killed_goes_on_in_the_same_run(
    submit: Callable[..., Any], in_tmp: Path, head: Head
) -> None:
    with submit(
        "dies",
        "trainer.max_steps=60",
        *observed(0.1),
        f"+callbacks.steps.folder={in_tmp}/steps",
        "checkpoint.every_n_steps=5",
        "cluster.retries=1",
    ) as started:
        started.reaches(12)
        before = record(in_tmp, "dies")["run_id"]
        driver_of(head).kill()
        ended = started.wait().exits(0)
    assert "dies died: " in ended.err
    assert "submitting it again (1 of 1)" in ended.err
    assert "outcome  finished, 60 steps" in ended.out
    found = record(in_tmp, "dies")
    assert (found["run_id"], found["attempts"], found["job"]["submission_id"]) == (before, 2, "dies--2")
    assert Runs(in_tmp).status("dies") == "FINISHED"


@pytest.mark.nightly  # tests/cluster/test_entry.py tests the job of a sweep without a cluster
def test_a_sweep_as_a_job(in_tmp: Path, head: Head) -> None:
    to = ["cluster=job", f"cluster.address={head.address}"]
    swept = ["experiment=smoke", "name=swept", "trainer.max_steps=2", "sweep=grid", "optimizer.lr=0.1,0.01"]
    with launch(in_tmp, "-m", *swept, *to) as started:
        ended = started.wait().exits(0)
    assert "sweep=grid over optimizer.lr" in ended.out
    assert verb(in_tmp, "status", "swept")["trials"]["finished"] == 2


def test_what_the_cluster_never_can_is_refused_at_once(submit: Callable[..., Any], in_tmp: Path) -> None:
    within = Within(10.0)
    with submit("much", "scaling.num_workers=64") as started:
        ended = started.wait().exits(2)
    within.check()
    assert "scaling.num_workers=64 × 1 CPU = 64 CPUs, and the cluster at " in ended.err
    assert not (in_tmp / "runs").exists()


def test_a_wrong_token(submit: Callable[..., Any], head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-of-somebody")
    with submit("denied") as started:
        ended = started.wait().exits(1)
    assert "refuses the token of RAY_AUTH_TOKEN (403)" in ended.err
    assert "another-token-of-somebody" not in ended.err
