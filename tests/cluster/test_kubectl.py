"""Tests of what raytrainer does to Kubernetes, with a program in place of kubectl: each job is sent once, its status is
true, errors are explained, and calls are bounded in time. The error messages are those of kubectl 1.32."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from raytrainer.attempt import Record
from raytrainer.backends.kubernetes import kubectl, namespace
from raytrainer.backends.kubernetes.kubectl import Kubectl
from raytrainer.backends.kubernetes.namespace import Namespace, RayJobStatus, address_of, status_of
from raytrainer.config import compose
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError
from raytrainer.submission import Submission
from raytrainer.submission.ending import ending_of
from tests.cluster.test_kuberay import PLAIN, documents
from tests.launches import OUTSIDE
from tests.promises import Within


class Kubernetes:
    """A directory in place of Kubernetes: its objects, the calls of kubectl, and scripted answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def says(self, to: str, **answer: Any) -> None:
        (self.folder / "says").write_text(json.dumps({"to": to, **answer}))

    def is_itself(self) -> None:
        (self.folder / "says").unlink()

    def objects(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.json"))

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found

    def put(self, name: str, found: dict[str, Any]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(found))


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubernetes:
    folder, programs = tmp_path / "kubernetes", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    program = programs / "kubectl"
    program.write_text(f"#!{sys.executable}\n" + (OUTSIDE / "fake_kubectl.py").read_text())
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_KUBERNETES", str(folder))
    return Kubernetes(folder)


HERE = Kubectl("staging", "research")
TEAM = ["cluster.namespace=research", *PLAIN]
CONFIG_MAP = "configmap-run-dec9ff32"


def test_sent(kubernetes: Kubernetes) -> None:
    config_map, job = documents(*TEAM)
    assert HERE.apply(config_map, job)
    sent = kubernetes.read("rayjob-run")
    assert sent["spec"] == job["spec"]
    (config,) = (name for name in kubernetes.objects() if name.startswith("configmap"))
    # Deleting the RayJob also deletes the ConfigMap with its request.
    assert kubernetes.read(config)["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "run", "uid": "uid-of-run"}
    ]
    for call in kubernetes.calls():
        assert call[:3] == ["--context=staging", "--namespace=research", "--request-timeout=30s"]
    (apply,) = (call for call in kubernetes.calls() if "apply" in call)
    assert apply[3:5] == ["apply", "--server-side"]
    assert "--validate=strict" in apply
    assert not any(call[3] == "config" for call in kubernetes.calls())


def test_a_configmap_that_cannot_be_made_its_jobs_fails_nothing(kubernetes: Kubernetes) -> None:
    kubernetes.says("patch", code=1, stderr=FORBIDDEN)
    assert HERE.apply(*documents(*TEAM))
    assert "rayjob-run" in kubernetes.objects()


def test_the_current_context_is_kubectls(kubernetes: Kubernetes) -> None:
    assert Kubectl(None, "default").rayjob("run") is None
    assert kubernetes.calls()[0][0] == "--namespace=default"


def test_the_same_again_is_one_job(kubernetes: Kubernetes) -> None:
    assert HERE.apply(*documents(*TEAM))
    assert not HERE.apply(*documents(*TEAM))
    # Kueue has admitted the job and now manages its `suspend` field.
    found = kubernetes.read("rayjob-run")
    kubernetes.put("rayjob-run", {**found, "managed": "kueue"})
    assert not HERE.apply(*documents(*TEAM))
    assert len([call for call in kubernetes.calls() if "apply" in call]) == 1


def test_the_name_of_another_run_is_refused(kubernetes: Kubernetes) -> None:
    assert HERE.apply(*documents(*TEAM))
    before = kubernetes.read("rayjob-run")
    with pytest.raises(ConfigError, match=r"^name=run .*namespace research with other content"):
        HERE.apply(*documents(*TEAM, content="other"))
    assert kubernetes.read("rayjob-run") == before


@pytest.mark.parametrize("contents", [["same", "same", "same"], ["one", "two", "three"]])
def test_sent_by_several_at_once(kubernetes: Kubernetes, contents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All senders have seen that the job does not exist before any of them sends it."""
    seen = threading.Barrier(len(contents))
    first = threading.local()
    rayjob = Kubectl.rayjob

    def together(self: Kubectl, name: str) -> dict[str, Any] | None:
        found = rayjob(self, name)
        if not getattr(first, "asked", False):
            first.asked = True
            seen.wait(30)
        return found

    monkeypatch.setattr(Kubectl, "rayjob", together)
    outcomes: list[str] = []

    def send(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
        try:
            outcomes.append("sent" if HERE.apply(*pair) else "there")
        except ConfigError:
            outcomes.append("refused")

    pairs = [documents(*TEAM, content=content) for content in contents]
    threads = [threading.Thread(target=send, args=[pair]) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    jobs = [name for name in kubernetes.objects() if name.startswith("rayjob")]
    assert jobs == ["rayjob-run"]
    if len(set(contents)) == 1:
        # The server accepts the same object again, so each sender believes that it created the one job.
        assert outcomes == ["sent"] * 3
    else:
        assert sorted(outcomes) == ["refused", "refused", "sent"]
    (config,) = (name for name in kubernetes.objects() if name.startswith("configmap"))
    mounted = kubernetes.read("rayjob-run")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"][1]
    assert config == f"configmap-{mounted['configMap']['name']}"


def test_what_there_is_of_a_run(kubernetes: Kubernetes) -> None:
    assert HERE.rayjob("run") is None
    jobs = Namespace(HERE)
    assert jobs.list() == []
    HERE.apply(*documents("name=Run.1", *TEAM[:1], TEAM[2]))
    (listed,) = jobs.list()
    assert (listed.name, listed.submission_id, listed.content) == ("Run.1", "Run.1", "5e" * 32)
    assert listed.metadata["raytrainer.name"] == "Run.1"
    assert (listed.status, listed.deployment, listed.started) == ("PENDING", "", None)
    found = kubernetes.read(f"rayjob-{listed.object}")
    found["status"] = {
        "jobId": "Run.1--2",
        "jobStatus": "FAILED",
        "jobDeploymentStatus": "Failed",
        "reason": "AppFailed",
        "message": "Job entrypoint command failed with exit code 1, last available logs:\nraytrainer: failed: no",
        "startTime": "2026-11-24T09:00:00Z",
        "endTime": "2026-11-24T09:10:00Z",
        "dashboardURL": "run-head-svc.research.svc.cluster.local:8265",
    }
    kubernetes.put(f"rayjob-{listed.object}", found)
    now = jobs.info("Run.1--2")
    assert (now.submission_id, now.deployment) == ("Run.1--2", "Failed")
    assert now.status == "FAILED"
    assert now.started is not None
    assert now.ended == now.started + 600
    assert now.exit_code == 1
    assert now.message.startswith("AppFailed: Job entrypoint command failed with exit code 1")
    assert ending_of(now).cause == "no"


def pod(name: str, status: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"raytrainer.dev/job": "run"}}, "status": status}


def test_why_pods_do_not_run(kubernetes: Kubernetes) -> None:
    unplaced = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x"'}}
    killed = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    kubernetes.put("pod-a", pod("run-workers-a", {"conditions": [unplaced]}))
    kubernetes.put("pod-b", pod("run-workers-b", {"conditions": [unplaced]}))
    kubernetes.put("pod-c", pod("run-head", {"containerStatuses": [{"state": pull}]}))
    kubernetes.put("pod-d", pod("run-workers-d", {"containerStatuses": [{"state": killed}]}))
    coming = {"waiting": {"reason": "ContainerCreating"}}
    kubernetes.put(
        "pod-e", pod("run-workers-e", {"containerStatuses": [{"state": coming}, {"state": {"running": {}}}]})
    )
    assert HERE.waiting("run") == [
        "run-workers-a: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        'run-head: ImagePullBackOff: Back-off pulling image "x"',
        "run-workers-d: OOMKilled (exit code 137)",
    ]


def test_deleted_when_its_pods_are_gone(kubernetes: Kubernetes) -> None:
    HERE.apply(*documents(*TEAM))
    kubernetes.put("pod-a", pod("run-workers-a", {}))
    left: list[list[str]] = []
    deleting = threading.Thread(target=lambda: left.append(HERE.delete("run", within_s=60)))
    deleting.start()
    while len([call for call in kubernetes.calls() if "pods" in call]) < 2:
        assert deleting.is_alive()
        time.sleep(0.05)
    (kubernetes.folder / "pod-a.json").unlink()
    deleting.join(30)
    assert left == [[]]
    assert kubernetes.objects() == []
    # An object that is not deleted in time is reported.
    kubernetes.put("pod-a", pod("run-workers-a", {}))
    assert HERE.delete("run", within_s=0) == ["run-workers-a"]


def test_logs(kubernetes: Kubernetes) -> None:
    kubernetes.says("logs", stdout="one\ntwo\n")
    assert list(HERE.logs("run")) == ["one", "two"]
    assert kubernetes.calls()[-1] == ["--context=staging", "--namespace=research", "logs", "job/run", "--tail=-1"]
    assert list(HERE.logs("run", follow=True)) == ["one", "two"]
    assert kubernetes.calls()[-1][-1] == "--follow"
    kubernetes.says("logs", code=1, stderr='Error from server (NotFound): jobs.batch "run" not found\n')
    with pytest.raises(ClusterError, match=r'jobs.batch "run" not found'):
        list(HERE.logs("run"))


@pytest.mark.parametrize(
    ("deployment", "job", "status"),
    [
        ("", "", "PENDING"),
        ("Initializing", "", "PENDING"),
        ("Suspended", "", "PENDING"),
        ("Running", "", "PENDING"),
        ("Running", "PENDING", "PENDING"),
        ("Running", "RUNNING", "RUNNING"),
        ("Running", "FAILED", "RUNNING"),
        ("Retrying", "FAILED", "PENDING"),
        ("Complete", "SUCCEEDED", "SUCCEEDED"),
        ("Complete", "STOPPED", "STOPPED"),
        ("Failed", "", "FAILED"),
        ("ValidationFailed", "", "FAILED"),
    ],
)
def test_in_rays_words(deployment: str, job: str, status: str) -> None:
    assert status_of(deployment, job) == status


def test_as_the_verbs_see_it(kubernetes: Kubernetes) -> None:
    address = address_of("arn:aws:eks:us-east-1:1:cluster/x", "research")
    assert address == "kubernetes://arn%3Aaws%3Aeks%3Aus-east-1%3A1%3Acluster%2Fx/research"
    jobs = Namespace.at(address)
    assert jobs.kubectl == Kubectl("arn:aws:eks:us-east-1:1:cluster/x", "research")
    HERE.apply(*documents(*TEAM, "cluster.queue=gpus"))
    assert [job.submission_id for job in jobs.list()] == ["run"]
    assert jobs.info("run").status == "PENDING"
    assert jobs.explain_waiting("run") == "it waits for Kueue to admit it (queue gpus)"
    sent = kubernetes.read("rayjob-run")
    sent["spec"]["suspend"] = False
    kubernetes.put("rayjob-run", sent)
    assert jobs.explain_waiting("run") == "KubeRay: has not started it"
    group = sent["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    kubernetes.put("pod-a", {"metadata": {"name": "a", **group["metadata"]}, "spec": group["spec"], "status": {}})
    over = {"metadata": {"name": "b", **group["metadata"]}, "spec": group["spec"], "status": {"phase": "Succeeded"}}
    kubernetes.put("pod-b", over)
    assert jobs.held_by("run") == {"CPU": 1.0, "memory": 4 * 2.0**30}
    kubernetes.says("logs", stdout="one\ntwo\n")
    assert jobs.logs("run") == "one\ntwo\n"
    kubernetes.is_itself()
    jobs.stop("run")
    stopped = jobs.info("run")
    assert (stopped.status, stopped.message) == ("STOPPED", "its RayJob no longer exists")
    assert jobs.held_by("run")  # its pods have not ended yet
    (kubernetes.folder / "pod-a.json").unlink()
    assert not jobs.held_by("run")
    with pytest.raises(ClusterError, match=r"no RayJob of run \(context arn:"):
        jobs.logs("run")


class Looks(Namespace):
    """Namespace with one scripted status for each look and one scripted output for each `kubectl logs`."""

    def __init__(self, looks: list[RayJobStatus | ClusterError], logs: list[list[str] | ClusterError]) -> None:
        super().__init__(Kubectl(None, "research"))
        self.looks, self.follows = looks, logs

    def info(self, submission_id: str) -> RayJobStatus:
        found = self.looks.pop(0)
        if isinstance(found, ClusterError):
            raise found
        return found

    def _lines(self, job: RayJobStatus, follow: bool) -> Generator[str]:
        found = self.follows.pop(0)
        if isinstance(found, ClusterError):
            raise found
        yield from found


def at(deployment: str, job: str = "", cluster: str = "a", name: str = "run") -> RayJobStatus:
    status = status_of(deployment, job)
    client = Namespace(HERE)
    return RayJobStatus(name="run", object=name, submission_id="run", status=status, cluster=cluster, client=client)


NO_LOGS = ClusterError("jobs.batch not found")


@pytest.mark.parametrize(
    ("looks", "logs", "printed"),
    [
        # The submitter's pod is created after the cluster has started.
        ([at("Running"), at("Running", "RUNNING"), at("Complete", "SUCCEEDED")], [["1", "2"]], "12"),
        # `kubectl logs` ends early or fails, and the last lines come after the job's end.
        ([at("Running", "RUNNING")] * 3 + [at("Complete")], [["1"], NO_LOGS, ["1", "2"]], "12"),
        ([at("Running", "RUNNING"), at("Failed", "FAILED")], [NO_LOGS, ["1"]], "1"),
        # The submitter's Job is gone.
        ([at("Complete", "SUCCEEDED")], [NO_LOGS], ""),
        # KubeRay retries the job on a new cluster.
        (
            [
                at("Running", "RUNNING"),
                at("Retrying", "FAILED"),
                at("Running", "RUNNING", "b"),
                at("Complete", "", "b"),
            ],
            [["1", "2"], ["3", "4"]],
            "1234",
        ),
        # The RayJob is deleted while it waits.
        ([at("Initializing"), at("Complete", "STOPPED", "", "")], [], ""),
        ([ClusterUnreachable("away"), at("Running", "RUNNING"), at("Complete")], [["1"]], "1"),
    ],
)
def test_followed_to_its_end(looks: list[Any], logs: list[Any], printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace, "_RETRY_S", 0.0)
    jobs = Looks(list(looks), list(logs))
    assert "".join(jobs.tail("run")).replace("\n", "") == printed
    assert (jobs.looks, jobs.follows) == ([], [])


KUBERAY = [
    "experiment=mlp",
    "name=one",
    "cluster=kuberay",
    "cluster.image=x:1",
    "cluster.wait=false",
    "storage_path=s3://bucket/runs",
    "tracking.tracking_uri=https://mlflow.example.com",
]


def submitted(*overrides: str, record: Record | None = None) -> Submission:
    target = compose([*KUBERAY, *overrides])
    return target.experiment.backend.submit(target, [], record=record, say=lambda text: None, out=io.StringIO())


def test_a_run_goes_on_in_place_of_its_ended_attempt(kubernetes: Kubernetes, in_tmp: Path) -> None:
    assert submitted().submission_id == "one"
    again = submitted()
    assert (again.submission_id, again.status, again.sent) == ("one", "PENDING", False)
    record = Record("one", "s3://bucket/runs/one", attempts=1)
    going = submitted(record=record)
    assert (going.submission_id, going.sent) == ("one", False)
    for attempt, overrides in ((2, ()), (3, ("optimizer.lr=0.5",))):
        found = kubernetes.read("rayjob-one")
        status = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "it failed with exit code 1"}
        kubernetes.put("rayjob-one", {**found, "status": {**status, "jobId": found["spec"]["jobId"]}})
        told = submitted()
        assert (told.status, told.exit_code) == ("FAILED", 1)
        # The record does not count attempts that ended before they could write it.
        went_on = submitted(*overrides, record=record)
        assert (went_on.submission_id, went_on.status, went_on.sent) == (f"one--{attempt}", "PENDING", True)
        assert kubernetes.read("rayjob-one")["spec"]["jobId"] == f"one--{attempt}"
    with pytest.raises(ConfigError, match="with another config"):
        submitted(record=record)


def test_the_current_context(kubernetes: Kubernetes) -> None:
    kubernetes.says("config", stdout="staging\n")
    assert Kubectl(None, "default").current_context() == "staging"
    kubernetes.says("config", code=1, stderr="error: current-context is not set\n")
    with pytest.raises(ConfigError, match="kubectl has no current one"):
        Kubectl(None, "default").current_context()


FORBIDDEN = (
    'Error from server (Forbidden): rayjobs.ray.io "run" is forbidden: User "me" cannot patch resource "rayjobs" in API '
    'group "ray.io" in the namespace "research"'
)
REFUSED = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"


@pytest.mark.parametrize(
    ("said", "kind", "explained"),
    [
        (
            "Error in configuration: context was not found for specified context: staging",
            ConfigError,
            "cluster.context=staging is no",
        ),
        ('error: context "staging" does not exist', ConfigError, "kubectl config get-contexts"),
        (FORBIDDEN, ClusterDenied, "kubectl auth can-i create rayjobs.ray.io --namespace=research"),
        ("error: You must be logged in to the server (Unauthorized)", ClusterDenied, "log in again"),
        (
            (
                'error: error validating "STDIN": error validating data: failed to download openapi: the server has asked for '
                "the client to provide credentials; if you choose to ignore these errors, turn validation off with "
                "--validate=false"
            ),
            ClusterDenied,
            "does not accept your credentials (context staging, namespace research)",
        ),
        (
            (
                'error: resource mapping not found for name: "run" namespace: "research" from "STDIN": no matches for kind '
                '"RayJob" in version "ray.io/v1"\nensure CRDs are installed first'
            ),
            ConfigError,
            "helm install kuberay-operator",
        ),
        (
            (
                'error: error validating "STDIN": error validating data: the server could not find the requested resource; if '
                "you choose to ignore these errors, turn validation off with --validate=false"
            ),
            ConfigError,
            "helm install kuberay-operator",
        ),
        ('error: the server doesn\'t have a resource type "rayjob"', ConfigError, "needs the KubeRay operator"),
        (
            (
                'Error from server (BadRequest): RayJob in version "v1" cannot be handled as a RayJob: strict decoding error: '
                'unknown field "spec.rayClusterSpec.authOptions"'
            ),
            ConfigError,
            "does not know spec.rayClusterSpec.authOptions: raytrainer's RayJobs need 1.5.1 or later",
        ),
        (
            'Error from server (Forbidden): admission webhook "vrayjob.kb.io" denied the request: spec.suspend: no',
            ConfigError,
            "vrayjob.kb.io says: spec.suspend: no",
        ),
        (
            'Error from server (NotFound): namespaces "research" not found',
            ConfigError,
            "kubectl create namespace research",
        ),
        (REFUSED, ClusterUnreachable, "does not answer (context staging, namespace research): The connection to the"),
        (
            "Unable to connect to the server: dial tcp: lookup k8s on 1.1.1.1:53: no such host",
            ClusterUnreachable,
            "no such host",
        ),
        ("Unable to connect to the server: x509: certificate signed by unknown authority", ClusterUnreachable, "x509"),
        (
            'E1124 09:50:31.7 11262 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API"\n'
            + REFUSED,
            ClusterUnreachable,
            "namespace research): The connection to the server",
        ),
        ("error: something new", ClusterError, "kubectl (context staging, namespace research): something new"),
        ("", ClusterError, "exit code 1"),
    ],
)
def test_what_kubectl_says_is_explained(
    kubernetes: Kubernetes, said: str, kind: type[Exception], explained: str
) -> None:
    kubernetes.says("apply", code=1, stderr=said + "\n")
    with pytest.raises(kind) as refused:
        HERE.apply(*documents(*TEAM))
    assert type(refused.value) is kind
    assert explained in str(refused.value)
    assert kubernetes.objects() == []


def test_no_context_at_all(kubernetes: Kubernetes) -> None:
    kubernetes.says("get", code=1, stderr=REFUSED.replace("10.0.0.1:6443", "localhost:8080"))
    with pytest.raises(ConfigError, match="kubectl has no current one"):
        Kubectl(None, "default").rayjob("run")


def test_no_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"needs kubectl.*\(No such file or directory\)"):
        HERE.rayjob("run")


def test_a_job_that_is_not_accepted_leaves_nothing(kubernetes: Kubernetes) -> None:
    """The ConfigMap is sent before the job, so it must be deleted if the job is refused."""
    config_map, job = documents(*TEAM)
    kubernetes.put(CONFIG_MAP, config_map)
    kubernetes.says("apply", code=1, stderr=FORBIDDEN)
    config_map["metadata"]["name"] = CONFIG_MAP.removeprefix("configmap-")
    with pytest.raises(ClusterDenied):
        HERE.apply(config_map, job)
    assert kubernetes.objects() == []


def test_no_answer_is_waited_for_a_bounded_time(kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubectl, "_ANSWER_S", 1.0)
    for verb in ("get", "logs"):
        kubernetes.says(verb, hangs=True)
        within = Within(10.0)
        with pytest.raises(ClusterError):
            HERE.rayjob("run") if verb == "get" else list(HERE.logs("run"))
        within.check()
