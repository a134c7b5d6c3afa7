"""Tests of a submission from its command to its end, with a cluster in memory: repeated and concurrent commands create
one job, and its end is reported correctly."""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from raytrainer.attempt import STOP, SUBMITTED, Record
from raytrainer.backends import ray_jobs
from raytrainer.backends.cluster_job import ClusterJob
from raytrainer.backends.jobs_api.facts import ClusterFacts
from raytrainer.config import Composition, compose
from raytrainer.errors import ClusterUnreachable, ConfigError, JobExists, PreflightError, Stopped
from raytrainer.runs.resolve import resolve_run
from raytrainer.storage import Storage
from raytrainer.submission import sending
from raytrainer.submission.request import Request
from raytrainer.submission.sending import Submission

ADDRESS = "https://203.0.113.7"
ASKED = [
    "experiment=mlp",
    "name=one",
    "cluster=job",
    f"cluster.address={ADDRESS}",
    "tracking.tracking_uri=https://mlflow.example.com",
]

pytestmark = pytest.mark.usefixtures("in_tmp")


@dataclass
class Cluster:
    """The Jobs API in memory. `ends` says how each submitted job ends, in order."""

    ends: list[tuple[str, int | None, str]] = field(default_factory=lambda: [("SUCCEEDED", 0, "")])
    jobs: dict[str, ClusterJob] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    known: ClusterFacts = field(
        default_factory=lambda: ClusterFacts(
            ADDRESS, metadata.version("ray"), platform.python_version(), ({"CPU": 8.0},)
        )
    )
    while_sending: Callable[[Request], None] = lambda request: None
    while_following: Callable[[], None] = lambda: None
    waits: int = 0
    silent: int = 0

    def list(self) -> list[ClusterJob]:
        return [*self.jobs.values()]

    def info(self, submission_id: str) -> ClusterJob | None:
        if self.silent:
            self.silent -= 1
            raise ClusterUnreachable("no answer")
        job = self.jobs.get(submission_id)
        if job is not None and job.status == "PENDING":
            if self.waits:
                self.waits -= 1
            else:
                self.put(submission_id, "RUNNING")
        return self.jobs.get(submission_id)

    def facts(self) -> ClusterFacts:
        return self.known

    def submit(self, request: Request, staged: Path) -> str:
        self.while_sending(request)
        if request.submission_id in self.jobs:
            raise JobExists(request.submission_id)
        self.requests.append(request)
        self.put(request.submission_id, "PENDING", metadata=dict(request.metadata))
        return request.submission_id

    def tail(self, submission_id: str) -> Iterator[str]:
        yield f"a line of {submission_id}\n"
        self.while_following()
        if submission_id not in self.jobs:  # forgotten
            return
        status, code, message = self.ends.pop(0)
        self.put(submission_id, status, exit_code=code, message=message)

    def stop(self, submission_id: str) -> None:
        self.put(submission_id, "STOPPED")

    def logs(self, submission_id: str) -> str:
        return f"a line of {submission_id}\n"

    def held_by(self, submission_id: str) -> dict[str, float]:
        return {}

    def explain_waiting(self, submission_id: str) -> str:
        return "other-run holds 8 GPU"

    def put(self, submission_id: str, status: str, **fields: Any) -> None:
        old = self.jobs.get(submission_id)
        fields = {"metadata": old.metadata if old else {}, "message": "", "started": None, "ended": None, **fields}
        self.jobs[submission_id] = ClusterJob(submission_id=submission_id, status=status, client=self, **fields)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(ray_jobs, "_client", lambda address, settings: found)
    return found


def asked(*overrides: str) -> Composition:
    shared = Path.cwd() / "shared"
    return compose([*ASKED, f"cluster.shared_paths=[{shared}]", f"storage_path={shared}/runs", *overrides])


def sent(*overrides: str, record: Record | None = None) -> tuple[Submission, str, list[str]]:
    """Submit a run, and return the submission, what the job printed and the lines that were reported."""
    out, said = io.StringIO(), list[str]()
    target = asked(*overrides)
    argv = [*ASKED, *overrides]
    found = target.experiment.backend.submit(target, argv, record=record, say=said.append, out=out)
    return found, out.getvalue(), said


def test_a_job_is_submitted_and_followed_to_its_end(cluster: Cluster) -> None:
    found, printed, said = sent()
    assert found == Submission("one", "one", ADDRESS, "FINISHED", 0, sent=True)
    assert printed == "a line of one\n"
    assert f"one: submitted to {ADDRESS} as job one" in said
    assert found.text("raytrainer").splitlines() == [
        "outcome  finished",
        f"where    job one at {ADDRESS}",
        "next     raytrainer status one",
        "         raytrainer logs one",
    ]
    assert json.loads(json.dumps(found.to_json()))["exit_code"] == 0


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        (("FAILED", 1, "Job entrypoint command failed"), "FAILED", 1),
        (("FAILED", 2, "Job entrypoint command failed"), "REFUSED", 2),
        (("FAILED", 143, "Job entrypoint command failed"), "KILLED", 143),
        (("STOPPED", None, ""), "KILLED", 143),
        (("FAILED", None, "the supervisor\n actor died"), "FAILED", 1),
    ],
)
def test_the_exit_code_is_the_one_it_would_have_here(
    cluster: Cluster, end: tuple[str, int | None, str], status: str, code: int
) -> None:
    cluster.ends = [end]
    found, _, _ = sent()
    assert (found.status, found.exit_code) == (status, code)
    assert found.cause


def test_what_waits_says_for_what(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_REPORT_S", 0.0)
    cluster.waits = 2
    assert sent()[2].count("one waits: other-run holds 8 GPU") == 2


def test_detached(cluster: Cluster) -> None:
    found, printed, _ = sent("cluster.wait=false")
    assert (found.status, found.exit_code, found.sent, printed) == ("PENDING", 0, True, "")
    assert "next     x logs -f one" in found.text("x")
    assert "         x stop one" in found.text("x")


def test_detached_it_is_checked_here(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"model\.wdth"):
        sent("cluster.wait=false", "+model.wdth=3")
    assert cluster.jobs == {}


# --- one job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["RUNNING", "PENDING", "SUCCEEDED", "FAILED"])
def test_the_same_again_is_the_same_job(cluster: Cluster, status: str) -> None:
    sent("cluster.wait=false")
    cluster.put("one", status, exit_code={"SUCCEEDED": 0, "FAILED": 1}.get(status))
    cluster.ends = [("FAILED", 1, "")] if status == "FAILED" else [("SUCCEEDED", 0, "")]
    found, printed, said = sent()
    assert (found.sent, len(cluster.requests)) == (False, 1)
    assert printed == "a line of one\n"
    assert found.exit_code == (1 if status == "FAILED" else 0)
    assert f"one was submitted before: job one is {status}" in said


def test_how_it_is_sent_is_not_what_is_sent(cluster: Cluster) -> None:
    sent("cluster.wait=false")
    assert not sent("cluster.retries=3", "cluster.package_limit_mb=50")[0].sent


@pytest.mark.parametrize("status", ["RUNNING", "SUCCEEDED"])
def test_another_of_this_name_is_refused_with_the_difference(cluster: Cluster, status: str) -> None:
    sent("cluster.wait=false")
    cluster.put("one", status)
    with pytest.raises(ConfigError, match=r"^name=one .* with another config") as caught:
        sent("trainer.max_epochs=7")
    assert ("resume one" in str(caught.value)) == (status == "SUCCEEDED")
    assert len(cluster.requests) == 1


def test_two_at_once_are_one_job(cluster: Cluster) -> None:
    """The other job appears between our check and our submission."""

    def other(request: Request) -> None:
        cluster.put("one", "RUNNING", metadata=dict(request.metadata))

    cluster.while_sending = other
    found, _, _ = sent()
    assert (found.sent, found.submission_id, found.exit_code) == (False, "one", 0)
    assert list(cluster.jobs) == ["one"]


def test_an_answer_that_is_lost_is_no_second_job(cluster: Cluster) -> None:
    def lost(request: Request) -> None:
        cluster.put("one", "PENDING", metadata=dict(request.metadata))
        cluster.while_sending = lambda request: None
        raise ClusterUnreachable("no answer")

    cluster.while_sending = lost
    with pytest.raises(ClusterUnreachable):
        sent()
    found, _, _ = sent()
    assert (found.sent, list(cluster.jobs)) == (False, ["one"])


def test_a_run_that_goes_on_is_the_next_attempt(cluster: Cluster) -> None:
    sent()
    cluster.ends = [("SUCCEEDED", 0, "")] * 2
    record = Record("one", f"{Path.cwd()}/shared/runs/one", attempts=1, job={"submission_id": "one"})
    found, _, _ = sent("trainer.max_epochs=9", record=record)
    assert found.submission_id == "one--2"
    job = json.loads(cluster.requests[-1].files["request.json"])["job"]
    assert (job["submission_id"], job["resumes"]) == ("one--2", "true")
    cluster.put("one--2", "RUNNING", metadata=cluster.jobs["one--2"].metadata)
    assert not sent("trainer.max_epochs=9", record=record)[0].sent
    cluster.put("one--2", "RUNNING", metadata=cluster.jobs["one--2"].metadata)
    with pytest.raises(ConfigError, match="of a job that runs"):
        sent("trainer.max_epochs=10", record=record)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        ("RUNNING", None, ("RUNNING", 0)),
        ("SUCCEEDED", 0, ("FINISHED", 0)),
        ("FAILED", 1, ("FAILED", 1)),
        ("STOPPED", None, ("KILLED", 143)),
    ],
)
def test_detached_it_tells_how_the_same_is(
    cluster: Cluster, status: str, code: int | None, told: tuple[str, int]
) -> None:
    sent("cluster.wait=false")
    cluster.put("one", status, exit_code=code)
    found, _, _ = sent("cluster.wait=false")
    assert (found.status, found.exit_code, found.sent) == (*told, False)


def test_what_was_refused_is_not_in_the_way(cluster: Cluster) -> None:
    """The same run is sent again, as its cause may be fixed, and so is another config, as no run exists."""
    cluster.ends = [("FAILED", 2, ""), ("FAILED", 2, ""), ("SUCCEEDED", 0, "")]
    assert sent()[0].status == "REFUSED"
    assert sent()[0].status == "REFUSED"
    assert sent("trainer.max_epochs=7")[0].submission_id == "one--3"


def test_what_could_not_be_set_up_is_tried_again(cluster: Cluster) -> None:
    cluster.ends = [("FAILED", None, "runtime_env setup failed: pip"), ("SUCCEEDED", 0, "")]
    assert sent()[0].exit_code == 1
    assert sent()[0].submission_id == "one--2"


def test_an_id_that_is_somebody_elses(cluster: Cluster) -> None:
    cluster.put("one", "RUNNING")
    with pytest.raises(ConfigError, match=r"^name=one .* not submitted by raytrainer"):
        sent()


# --- dead drivers -----------------------------------------------------------------------------------------------------

DIED = ("FAILED", 137, "the driver was killed")


def test_a_job_whose_driver_died_is_sent_again(cluster: Cluster) -> None:
    cluster.ends = [DIED, ("FAILED", None, "the supervisor died"), ("SUCCEEDED", 0, "")]
    found, printed, said = sent("cluster.retries=2")
    assert (found.submission_id, found.exit_code) == ("one--3", 0)
    assert printed == "a line of one\na line of one--2\na line of one--3\n"
    assert "one died: the driver was killed; submitting it again (1 of 2)" in said
    told = [json.loads(r.files["request.json"])["job"] for r in cluster.requests]
    assert [(j["submission_id"], j.get("replaces")) for j in told] == [
        ("one", None),
        ("one--2", "one"),
        ("one--3", "one--2"),
    ]
    assert len({r.content for r in cluster.requests}) == 1


@pytest.mark.parametrize(
    "end", [("FAILED", 1, ""), ("STOPPED", None, ""), ("FAILED", None, "runtime_env setup failed")]
)
def test_what_would_end_so_again_is_not(cluster: Cluster, end: tuple[str, int | None, str]) -> None:
    cluster.ends = [end]
    sent("cluster.retries=2")
    assert len(cluster.requests) == 1


def test_no_more_often_than_asked_and_again_by_another_command(cluster: Cluster) -> None:
    cluster.ends = [DIED] * 2
    assert sent("cluster.retries=1")[0].exit_code == 1
    assert len(cluster.requests) == 2
    cluster.ends = [("SUCCEEDED", 0, "")]
    assert sent()[0].submission_id == "one--3"
    assert json.loads(cluster.requests[-1].files["request.json"])["job"]["replaces"] == "one--2"


def test_a_cluster_that_forgets_a_job_is_sent_it_again(cluster: Cluster) -> None:
    cluster.while_following = lambda: cluster.jobs.clear() if len(cluster.requests) == 1 else None
    found, _, said = sent("cluster.retries=1")
    assert (found.submission_id, found.exit_code) == ("one--2", 0)
    assert any("its head was restarted; submitting it again (1 of 1)" in text for text in said)


def test_room_is_no_question_for_another_attempt(cluster: Cluster) -> None:
    """A further attempt does not check for room, because the node that failed may come back."""
    cluster.ends = [DIED, ("SUCCEEDED", 0, "")]
    cluster.while_following = lambda: setattr(cluster, "known", replace(cluster.known, nodes=()))
    assert sent("cluster.retries=1")[0].exit_code == 0


def test_what_was_to_stop_is_not_sent_again(cluster: Cluster) -> None:
    cluster.ends = [DIED]
    place = Storage(Path.cwd() / "shared" / "runs" / "one")
    cluster.while_following = lambda: place.write_bytes(STOP, b"{}")
    found, _, _ = sent("cluster.retries=1")
    assert (found.status, found.exit_code, len(cluster.requests)) == ("KILLED", 143, 1)


def test_an_answer_that_does_not_come_is_waited_for(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_RETRY_S", 0.0)
    monkeypatch.setattr(sending, "_REPORT_S", 0.0)
    cluster.waits, cluster.silent = 2, 3
    found, _, said = sent()
    assert found.exit_code == 0
    assert said.count(f"no answer; trying again for {sending._PATIENCE_S:g} s") == 1
    cluster.silent = 1
    monkeypatch.setattr(sending, "_PATIENCE_S", -1.0)
    with pytest.raises(ClusterUnreachable):
        sent()


# --- refusals and signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "overrides", "said"),
    [
        ({}, ["scaling.num_workers=9"], r"scaling\.num_workers=9 × 1 CPU = 9 CPUs, and the cluster at .* has 8 CPUs"),
        ({}, ["cluster.driver_resources={GPU: 1}"], r"cluster\.driver_resources=.*GPU"),
        ({"ray_version": "2.9.0"}, [], r"has ray 2\.9\.0, and this raytrainer supports ray>=2\.\d+"),
        ({"python_version": "3.9.1"}, [], r"has Python 3\.9\.1, and this raytrainer supports Python>=3\.11"),
    ],
)
def test_a_cluster_that_never_can_is_sent_nothing(
    cluster: Cluster, facts: dict[str, Any], overrides: list[str], said: str
) -> None:
    cluster.known = replace(cluster.known, **facts)
    with pytest.raises(PreflightError, match=said):
        sent(*overrides)
    assert (cluster.jobs, Path("runs", SUBMITTED).exists()) == ({}, False)


def test_a_cluster_that_may_grow_is_a_warning(cluster: Cluster) -> None:
    cluster.known = replace(cluster.known, may_grow=True)
    submission, _, said = sent("scaling.num_workers=9")
    assert submission.exit_code == 0
    (warning,) = (line for line in said if line.startswith("warning: scaling.num_workers=9 "))
    assert "has 8 CPUs" in warning
    assert "adds nodes" in warning


def test_a_forwarded_port_is_not_this_machine(cluster: Cluster) -> None:
    local = (f"storage_path={Path.cwd()}/runs", "tracking.tracking_uri=sqlite:///mlflow.db")
    here = "cluster.address=http://127.0.0.1:8265"
    cluster.known = replace(cluster.known, head="203.0.113.7")
    with pytest.raises(PreflightError) as caught:
        sent(here, *local)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == ["storage_path", "tracking.tracking_uri"]
    assert cluster.jobs == {}
    cluster.known = replace(cluster.known, head="127.0.0.1")
    assert sent(here, *local)[0].exit_code == 0


def test_another_python_is_told(cluster: Cluster) -> None:
    cluster.known = replace(cluster.known, python_version="3.99.1")
    here = platform.python_version()
    assert f"warning: the cluster at {ADDRESS} has Python 3.99.1, and here it is {here}" in sent()[2]


def test_what_it_cannot_reach_is_refused(cluster: Cluster) -> None:
    with pytest.raises(PreflightError, match="storage_path"):
        sent(f"storage_path={Path.cwd()}/runs")
    assert cluster.jobs == {}


def test_whoever_interrupts_stops_nothing(cluster: Cluster) -> None:
    cluster.while_following = lambda: os.kill(os.getpid(), signal.SIGINT)
    found, _, said = sent()
    assert (found.status, found.exit_code) == ("RUNNING", 130)
    assert f"no longer followed: one continues at {ADDRESS}" in said
    assert "next     x logs -f one" in found.text("x")
    assert cluster.jobs["one"].status == "RUNNING"
    assert threading.current_thread() is threading.main_thread()


def test_an_interrupt_before_it_is_sent(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "facts", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as caught:
        sent()
    assert (caught.value.exit_code, cluster.jobs) == (143, {})


def test_an_interrupt_while_it_is_sent(cluster: Cluster) -> None:
    """Its thread still sends the request, so the job may exist."""
    cluster.while_sending = lambda request: os.kill(os.getpid(), signal.SIGTERM)
    found, _, said = sent()
    assert (found.status, found.exit_code) == ("RUNNING", 143)
    assert f"no longer followed: one may have been sent at {ADDRESS}" in said
    assert "         x status one" in found.text("x")


def test_the_verbs_know_it_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(request: Request) -> None:
        known = resolve_run("one")
        assert (known.submission_id, known.cluster_address) == ("one", ADDRESS)
        assert known.record.run_dir == "s3://bucket/runs/one"

    cluster.while_sending = look
    monkeypatch.setenv("STORE", "s3://KEY:password@bucket/runs")
    monkeypatch.setattr("raytrainer.runs.resolve.with_directory", lambda known: known)  # the bucket does not exist
    sent("cluster.wait=false", "storage_path=${oc.env:STORE}", "cluster.forward_env=[STORE]")
    known = resolve_run("one").record
    assert (known.run_dir, known.storage_path) == ("s3://bucket/runs/one", "${oc.env:STORE}")
    assert known.storage.uri == "s3://KEY:password@bucket/runs/one"
    assert not [path for path in Path.cwd().rglob("*") if path.is_file() and b"password" in path.read_bytes()]
    assert Record.read(Storage(Path.cwd() / "runs" / SUBMITTED / "one")) is not None
