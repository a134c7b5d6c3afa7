"""Tests of a run's RayJob: it follows KubeRay's schema without unknown fields and equals the recorded manifest.
Jobs that Kubernetes could never start are refused."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raytrainer.backends.kubernetes import rayjob
from raytrainer.config import Experiment, compose
from raytrainer.errors import ConfigError
from raytrainer.submission.request import Request, to_yaml
from tests.cluster.crd import SCHEMA, problems

FIXTURES = SCHEMA.parent
IMAGE = "registry.example.com/team/trainer:1.4"
PLAIN = ["name=run", f"cluster.image={IMAGE}"]
FULL = [
    "name=A-Run.7",
    f"cluster.image={IMAGE}",
    "cluster.context=staging",
    "cluster.namespace=research",
    "cluster.service_account=trainer",
    "cluster.secrets=[wandb,bucket]",
    "cluster.forward_env=[WANDB_API_KEY]",
    "cluster.retries=2",
    "cluster.pod_resources={cpu: '16', memory: 128Gi, nvidia.com/gpu: '4'}",
    "cluster.driver_resources={CPU: 1.5, memory: 4294967296}",
    "scaling.num_workers=[4,16]",
]
QUEUED = ["name=run", f"cluster.image={IMAGE}", "cluster.queue=gpus", "scaling.num_workers=3", "scaling.use_gpu=true"]


def experiment(*overrides: str) -> Experiment:
    return compose(["experiment=mlp", "cluster=kuberay", "data.global_batch_size=64", *overrides]).experiment


def documents(*overrides: str, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    target = compose(["experiment=mlp", "cluster=kuberay", "data.global_batch_size=64", *overrides])
    name = target.experiment.name or ""
    request = Request(
        kind="run",
        name=name,
        address="",
        submission_id=name,
        entrypoint="python -m raytrainer.cluster.entry",
        environment=(),
        runtime_env={},
        metadata={"raytrainer.name": name, "raytrainer.user": "me"},
        resources={},
        files={"config.yaml": b"seed: 0\nmodel:\n  width: 8\n", "request.json": b'{"kind": "run"}'},
        content="5e" * 32,
        package=None,
        modules=(),
        target=target,
    )
    return rayjob.documents(replace(request, **fields))


def manifests() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield one manifest of each kind. tests/fixtures/rayjob-schema.json has exactly the fields that they set."""
    yield documents(*PLAIN)
    yield documents(*FULL, runtime_env={"env_vars": {"NCCL_DEBUG": "INFO"}, "pip": ["einops==0.8.1"]})
    yield documents(*QUEUED)


def spec(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["rayClusterSpec"]
    return found


def pod_of(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["template"]["spec"]
    return found


def group(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = spec(job)["workerGroupSpecs"]
    return dict(found)


# --- the schema -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCHEMA.read_text())
    return found


def test_the_schema_accepts_every_kind(schema: dict[str, Any]) -> None:
    for _, job in manifests():
        assert problems(job, schema) == []


def keys(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every field, except below maps with free names (labels, limits, …)."""
    free = {"labels", "annotations", "limits", "requests", "rayStartParams", "metadata"}
    if isinstance(value, dict):
        for name, below in value.items():
            yield (*path, name)
            inside = name != "metadata" or path[-1:] == ("template",) or path[-1:] == ("submitterPodTemplate",)
            if name not in free or (name == "metadata" and inside):
                yield from keys(below, (*path, name))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from keys(below, (*path, number))


def test_every_misspelt_field_is_refused(schema: dict[str, Any]) -> None:
    """Each field of each manifest is refused with one letter added; otherwise the test above would prove nothing."""
    tried = 0
    for _, job in manifests():
        for *path, name in keys(job):
            mutant = copy.deepcopy(job)
            at = mutant
            for part in path:
                at = at[part]
            at[f"{name}x"] = at.pop(name)
            assert any(f"{name}x" in text for text in problems(mutant, schema)), (path, name)
            tried += 1
    assert tried > 200


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "backoffLimit"], "2"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "tokens"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplicas"], None),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (
            [
                "spec",
                "rayClusterSpec",
                "headGroupSpec",
                "template",
                "spec",
                "containers",
                0,
                "resources",
                "limits",
                "cpu",
            ],
            "2 CPUs",
        ),
    ],
)
def test_a_wrong_value_is_refused(path: list[Any], value: Any, schema: dict[str, Any]) -> None:
    _, job = documents(*PLAIN)
    at: Any = job
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    assert problems(job, schema)


@pytest.mark.parametrize(("name", "number"), [("plain", 0), ("full", 1), ("queued", 2)])
def test_the_manifest_is_the_recorded_one(name: str, number: int) -> None:
    """After an intended change, run `RECORD=1 pytest tests/cluster/test_kuberay.py` and review the diff."""
    text = to_yaml(*list(manifests())[number])
    file = FIXTURES / f"rayjob-{name}.yaml"
    if os.environ.get("RECORD"):
        file.write_text(text)
    assert text == file.read_text()


def test_the_text_is_what_it_was_made_of() -> None:
    for pair in manifests():
        assert tuple(yaml.safe_load_all(to_yaml(*pair))) == pair
    # A YAML 1.2 parser reads an unquoted 1e3 as a number.
    assert "'1e3'" in to_yaml({"a": "1e3"})


# --- contents -------------------------------------------------------------------------------------------------------


def test_the_cluster_ends_with_the_job_and_wants_a_token() -> None:
    _, job = documents(*PLAIN)
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert spec(job)["authOptions"] == {"mode": "token"}
    assert "activeDeadlineSeconds" not in job["spec"]
    assert spec(job)["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert "suspend" not in job["spec"]


def test_nothing_runs_as_root_or_may_become_it() -> None:
    _, job = documents(*FULL)
    pods = [pod_of(spec(job)["headGroupSpec"]), pod_of(group(job)), job["spec"]["submitterPodTemplate"]["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    # The autoscaler runs beside the head and calls the Kubernetes API. The other pods do not.
    assert [pod["automountServiceAccountToken"] for pod in pods] == [True, False, False]
    _, job = documents(*PLAIN)
    assert pod_of(spec(job)["headGroupSpec"])["automountServiceAccountToken"] is False


def test_secrets_go_by_reference() -> None:
    _, job = documents(*FULL)
    for pod in (pod_of(spec(job)["headGroupSpec"]), pod_of(group(job))):
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "bucket"}}]
    assert "WANDB_API_KEY" not in json.dumps(job)


def test_what_is_asked_for_is_mounted_where_the_entrypoint_looks() -> None:
    config_map, job = documents(*PLAIN, files={"config.yaml": "é: 1\n".encode(), "weights": b"\xff\x00"})
    assert config_map["data"] == {"config.yaml": "é: 1\n"}
    assert config_map["binaryData"] == {"weights": "/wA="}
    head = pod_of(spec(job)["headGroupSpec"])
    (variable,) = head["containers"][0]["env"]
    mount = next(m for m in head["containers"][0]["volumeMounts"] if m["name"] == "request")
    assert variable == {"name": "RAYTRAINER_REQUEST", "value": mount["mountPath"]}
    assert {"name": "request", "configMap": {"name": config_map["metadata"]["name"]}} in head["volumes"]
    assert head["volumes"][0] == {"name": "shm", "emptyDir": {"medium": "Memory"}}
    # Other content gets another name, so a job that uses this ConfigMap keeps it.
    other, _ = documents(*PLAIN, content="other")
    assert other["metadata"]["name"] != config_map["metadata"]["name"]


@pytest.mark.parametrize(
    ("overrides", "resources", "pods", "cpus"),
    [
        (["scaling.num_workers=3"], {"cpu": "1", "memory": "4Gi"}, (3, 3), "1"),
        (
            ["scaling.num_workers=2", "scaling.use_gpu=true"],
            {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"},
            (2, 2),
            "4",
        ),
        (
            ["scaling.num_workers=2", "+scaling.resources_per_worker={CPU: 2.5, GPU: 0.5, memory: 1e9}"],
            {"cpu": "3", "memory": "1000000000", "nvidia.com/gpu": "1"},
            (2, 2),
            "3",
        ),
        (
            ["scaling.num_workers=5", "cluster.pod_resources={cpu: '2', memory: 8Gi}"],
            {"cpu": "2", "memory": "8Gi"},
            (3, 3),
            "2",
        ),
        (
            ["scaling.num_workers=8", "cluster.pod_resources={cpu: '32', nvidia.com/gpu: '4'}"],
            {"cpu": "32", "memory": "4Gi", "nvidia.com/gpu": "4"},
            (2, 2),
            "32",
        ),
        (["scaling.num_workers=[2,6]"], {"cpu": "1", "memory": "4Gi"}, (2, 6), "1"),
        (["scaling.num_workers=2", "cluster.max_pods=9"], {"cpu": "1", "memory": "4Gi"}, (2, 9), "1"),
        (["scaling.num_workers=4", "cluster.min_pods=0"], {"cpu": "1", "memory": "4Gi"}, (0, 4), "1"),
        (["scaling.num_workers=[2,6]", "cluster.queue=q"], {"cpu": "1", "memory": "4Gi"}, (6, 6), "1"),
        (
            ["scaling.use_gpu=auto", "cluster.pod_resources={cpu: '2', amd.com/gpu: '1'}"],
            {"cpu": "2", "memory": "4Gi", "amd.com/gpu": "1"},
            (1, 1),
            "2",
        ),
    ],
)
def test_pods(overrides: list[str], resources: dict[str, str], pods: tuple[int, int], cpus: str) -> None:
    _, job = documents(*PLAIN, *overrides)
    found = group(job)
    assert pod_of(found)["containers"][0]["resources"] == {"requests": resources, "limits": resources}
    assert (found["minReplicas"], found["maxReplicas"]) == pods
    assert found["replicas"] == pods[0]
    assert found["rayStartParams"] == {"num-cpus": cpus}
    assert spec(job)["enableInTreeAutoscaling"] is (pods[0] < pods[1])
    assert ("autoscalerOptions" in spec(job)) is (pods[0] < pods[1])


def test_a_queue_of_kueue() -> None:
    _, job = documents(*QUEUED)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["spec"]["suspend"] is True
    assert spec(job)["enableInTreeAutoscaling"] is False


@pytest.mark.parametrize(
    ("overrides", "asked", "key", "says"),
    [
        (["name=run"], {}, "cluster.image", "docker build"),
        ([*PLAIN, "+scaling.label_selector={zone: a}"], {}, "scaling.label_selector", "pods are created for the run"),
        (
            [*PLAIN, "+scaling.resources_per_worker.TPU=4"],
            {},
            "scaling.resources_per_worker.TPU",
            "CPU, GPU and memory",
        ),
        ([*PLAIN, "cluster.driver_resources={GPU: 1}"], {}, "cluster.driver_resources.GPU", "CPU and memory"),
        ([*PLAIN, "cluster.pod_resources={memory: lots}"], {}, "cluster.pod_resources.memory", "64Gi"),
        ([*PLAIN, "cluster.pod_resources={cpu: '8'}", "scaling.use_gpu=true"], {}, "cluster.pod_resources", "1 GPU"),
        ([*PLAIN, "cluster.max_pods=2", "scaling.num_workers=3"], {}, "cluster.max_pods", "at 1 in a pod: 3"),
        ([*PLAIN, "cluster.queue=q", "cluster.min_pods=1", "scaling.num_workers=3"], {}, "cluster.min_pods", "Kueue"),
        ([*PLAIN, "cluster.forward_env=[TOKEN]"], {}, "cluster.forward_env", "create secret generic"),
        (PLAIN, {"runtime_env": {"working_dir": "."}}, "cluster.runtime_env.working_dir", "the image has the code"),
        (
            PLAIN,
            {"runtime_env": {"py_modules": ["s3://b/a.zip", "/x"]}},
            "cluster.runtime_env.py_modules",
            "is not a URI",
        ),
        (PLAIN, {"runtime_env": {"env_vars": {"A": "$(id)"}}}, "cluster.runtime_env.env_vars.A", "shell"),
        (PLAIN, {"runtime_env": {"pip": ["a`id`"]}}, "cluster.runtime_env.pip", "shell"),
        (PLAIN, {"metadata": {"user": "$HOME"}}, "the job's metadata.user", "shell"),
        (PLAIN, {"files": {"config.yaml": b"x" * 2**20}}, None, "a Kubernetes ConfigMap holds 1,048,576"),
    ],
)
def test_refused(overrides: list[str], asked: dict[str, Any], key: str | None, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        documents(*overrides, **asked)
    assert refused.value.key == key
    assert says in str(refused.value)


def test_a_refusal_does_not_show_a_value_of_the_environment() -> None:
    with pytest.raises(ConfigError) as refused:
        documents(*PLAIN, runtime_env={"env_vars": {"A": "sekrit$"}})
    assert "sekrit" not in str(refused.value)


# --- names ----------------------------------------------------------------------------------------------------------

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RUN_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)


@given(RUN_NAMES)
def test_a_name_is_one_of_kubernetes(run: str) -> None:
    name = rayjob.object_name(run)
    assert DNS_LABEL.fullmatch(name)
    assert len(name) <= 47
    label = rayjob._label(run)
    assert len(label) <= 63
    assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", label)


@given(RUN_NAMES, RUN_NAMES)
def test_two_runs_have_two_names(one: str, other: str) -> None:
    assert (rayjob.object_name(one) == rayjob.object_name(other)) is (one == other)


def test_names_that_people_choose_stay() -> None:
    assert rayjob.object_name("resnet-20261124-041832-4b1d") == "resnet-20261124-041832-4b1d"
    assert rayjob.object_name("A.b").startswith("a-b-")
    assert rayjob.object_name("1-2").startswith("run-1-2-")
    # A run whose name equals another run's generated name gets a different one.
    made = rayjob.object_name("A")
    assert rayjob.object_name(made) != made
