"""A run on Kubernetes as plain data: the `RayJob` for the KubeRay operator, and the ConfigMap with the request's files.

Nothing is uploaded: the image contains the code, and only these two documents are sent. The fields follow the
documentation of KubeRay 1.6 (ray.io/v1); token authentication needs 1.5.1 or later.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import yaml

from raytrainer import preflight
from raytrainer.config import Experiment
from raytrainer.errors import ConfigError
from raytrainer.submission.entrypoint import MOUNTED

NAME, CONTENT, SUBMISSION = "raytrainer.dev/name", "raytrainer.dev/content", "raytrainer.dev/submission-id"
JOB = "raytrainer.dev/job"  # a label of pods: their RayJob
MANAGED = {"app.kubernetes.io/managed-by": "raytrainer"}
QUEUE = "kueue.x-k8s.io/queue-name"
_LONGEST_NAME = 47  # of a RayJob, because KubeRay derives the names of services from it
_LONGEST_LABEL = 63
_FILES_BYTES = 2**20  # the limit of a ConfigMap
_FILES_AT = "/etc/raytrainer"
_USER = 1000  # the image's user, not root
_TTL_S = 30  # how long the cluster stays after the job, so that its last log lines arrive
_IDLE_S = 60
# For a pod whose workers have no resources set.
_CPU_POD = {"cpu": "1", "memory": "4Gi"}
_GPU_POD = {"cpu": "4", "memory": "16Gi"}
_HEAD = {"cpu": "2", "memory": "8Gi"}
_GPU = "nvidia.com/gpu"
_SUFFIXES = {
    name: base**power
    for base, names in ((1e3, ("", "k", "M", "G", "T", "P")), (2.0**10, ("", "Ki", "Mi", "Gi", "Ti", "Pi")))
    for power, name in enumerate(names)
} | {"m": 1e-3}
_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": _USER, "seccompProfile": {"type": "RuntimeDefault"}}
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

Document = dict[str, Any]


def documents(
    e: Experiment,
    *,
    submission_id: str,
    entrypoint: str,
    files: Mapping[str, bytes],
    job_metadata: Mapping[str, str],
    runtime_env: Mapping[str, Any],
    content: str,
    workers: tuple[int, int] | None = None,
) -> tuple[Document, Document]:
    """Return the ConfigMap with the request's files, and the RayJob.

    Args:
        e: The experiment, whose `scaling` and `cluster` say what to request.
        submission_id: The id of the Ray job.
        entrypoint: Its command.
        files: The files for the entrypoint: name → content.
        job_metadata, runtime_env: For the Ray job; visible to all users.
        content: The digest that decides whether two requests are the same.
        workers: The least and the most training processes at a time; None: those of one run. A sweep has more.

    Raises:
        ConfigError: A setting is not possible in a RayJob; the message names the key and the fix.
    """
    c, name = e.cluster, object_name(e.name or "")
    if c.image is None:
        raise ConfigError(
            "is not set: the image that all pods run, with your code in it. The repository's Dockerfile builds one: "
            "docker build -t REGISTRY/NAME:TAG . && docker push REGISTRY/NAME:TAG, then cluster.image=REGISTRY/NAME:TAG",
            key="cluster.image",
        )
    if e.scaling.label_selector:
        raise ConfigError(
            "has no meaning with cluster=kuberay: the pods are created for the run, and cluster.pod_resources sets their "
            "resources",
            key="scaling.label_selector",
        )
    _check_shell(job_metadata, "the job's metadata")
    _check_shell(runtime_env, "cluster.runtime_env")
    for key in ("working_dir", "py_modules"):
        for where in [v] if isinstance(v := runtime_env.get(key) or [], str) else v:
            if "://" not in str(where):
                raise ConfigError(
                    "is not a URI, and nothing is uploaded to Kubernetes: the image has the code",
                    key=f"cluster.runtime_env.{key}",
                    value=where,
                )
    if c.forward_env and not (c.secrets or c.env_file):
        raise ConfigError(
            "needs cluster.secrets, names of Kubernetes secrets whose keys are these variables: kubectl "
            f"create secret generic NAME --namespace={c.namespace} --from-literal={c.forward_env[0]}=…",
            key="cluster.forward_env",
            value=c.forward_env,
        )
    labels = {**MANAGED, NAME: _label(e.name or ""), JOB: name}
    notes = {NAME: e.name or "", CONTENT: content, SUBMISSION: submission_id}
    pods = {"labels": labels, "annotations": {SUBMISSION: submission_id}}
    # Another content gets another ConfigMap, so that the files of a running job never change.
    config_map = _config_map(f"{name}-{_short(content)}", c.namespace, labels, notes, files)
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": name,
            "namespace": c.namespace,
            "labels": {**labels, **({QUEUE: c.queue} if c.queue else {})},
            "annotations": notes,
        },
        "spec": {
            "entrypoint": entrypoint,
            "jobId": submission_id,
            "metadata": dict(job_metadata),
            **({"runtimeEnvYAML": to_text(dict(runtime_env))} if runtime_env else {}),
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": {"metadata": pods, "spec": _submitter(e)},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _TTL_S,
            "backoffLimit": c.retries,
            # Only Kueue may resume it.
            **({"suspend": True} if c.queue else {}),
            "rayClusterSpec": _cluster(e, config_map["metadata"]["name"], pods, workers or _workers(e)),
        },
    }
    return config_map, job


def to_text(*found: Document) -> str:
    """Return documents as a YAML stream, for `kubectl` and for people."""
    return yaml.dump_all(found, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def object_name(run: str) -> str:
    """Return a unique object name for a run: at most 47 lower-case letters, digits and `-`, the first a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    # A run's name that ends like a generated one could equal the generated name of another run.
    if name == run and len(name) <= _LONGEST_NAME and not re.search("-[0-9a-f]{8}$", run):
        return name
    return f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{_short(run)}"


def wants_gpu(e: Experiment) -> bool:
    """Return `scaling.use_gpu`; for `auto`, whether the config requests GPUs, because no cluster exists yet."""
    s = e.scaling
    asked = bool(
        s.accelerator_type or (s.resources_per_worker or {}).get("GPU") or _gpu_of(e.cluster.pod_resources or {})
    )
    return asked if s.use_gpu == "auto" else bool(s.use_gpu)


def quantity(text: str) -> float:
    """Parse a Kubernetes quantity: `500m` → 0.5, `8Gi` → 2^33.

    Raises:
        ValueError: The text is not a quantity.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([A-Za-z]*)", text)
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(text)
    return float(match[1]) * _SUFFIXES[match[2]]


# --- pods ---------------------------------------------------------------------------------------------------------------


def _workers(e: Experiment) -> tuple[int, int]:
    return preflight.least_workers(e), e.max_workers


def _cluster(e: Experiment, config_map: str, pods: Document, workers: tuple[int, int]) -> Document:
    pod, fit = _pod(e)
    least, most = _bounds(e, workers, fit)
    grows = least < most
    return {
        "rayVersion": metadata.version("ray"),  # the same as in the image, by constraints.txt
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": grows,
        **(
            {
                "autoscalerOptions": {
                    "version": "v2",
                    "idleTimeoutSeconds": _IDLE_S,
                    "securityContext": dict(_CONTAINER_SECURITY),
                }
            }
            if grows
            else {}
        ),
        "headGroupSpec": {
            # The head's pod runs only the driver; workers run in the workers' pods.
            "rayStartParams": {"num-cpus": "0"},
            "template": {
                "metadata": dict(pods),
                "spec": _pod_spec(
                    e,
                    _container(
                        e,
                        "ray-head",
                        _head(e),
                        env=[{"name": MOUNTED, "value": _FILES_AT}],
                        mounts=[{"name": "request", "mountPath": _FILES_AT, "readOnly": True}],
                        ports={"gcs-server": 6379, "dashboard": 8265, "client": 10001},
                    ),
                    volumes=[{"name": "request", "configMap": {"name": config_map}}],
                    # The autoscaler runs in the head's pod, and adds and removes pods.
                    uses_kubernetes=grows,
                ),
            },
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": least,
                "minReplicas": least,
                "maxReplicas": most,
                # Whole CPUs, rounded down, because KubeRay would round up.
                "rayStartParams": {"num-cpus": str(max(1, math.floor(quantity(pod["cpu"]))))},
                "template": {
                    "metadata": dict(pods),
                    "spec": _pod_spec(e, _container(e, "ray-worker", pod)),
                },
            }
        ],
    }


def _pod(e: Experiment) -> tuple[dict[str, str], int]:
    """Return the resources of a worker's pod, and how many workers fit into it."""
    c, gpu = e.cluster, wants_gpu(e)
    each = preflight.per_worker(e, gpu)
    if other := sorted(set(each) - {"CPU", "GPU", "memory"}):
        raise ConfigError(
            "has no meaning with cluster=kuberay: a pod has CPU, GPU and memory",
            key=f"scaling.resources_per_worker.{other[0]}",
            value=each[other[0]],
        )
    if c.pod_resources is None:
        default = _GPU_POD if gpu else _CPU_POD
        pod = {
            "cpu": str(math.ceil(each["CPU"])) if each.get("CPU") else default["cpu"],
            "memory": str(math.ceil(each["memory"])) if each.get("memory") else default["memory"],
            **({_GPU: str(math.ceil(each["GPU"]))} if each.get("GPU") else {}),
        }
    else:
        pod = {"cpu": "1", "memory": "4Gi", **{name: str(amount) for name, amount in c.pod_resources.items()}}
    has = {}
    for name, amount in pod.items():
        try:
            has[name] = quantity(amount)
        except ValueError:
            raise ConfigError(
                "is not a Kubernetes quantity: 4, 500m, 64Gi", key=f"cluster.pod_resources.{name}", value=amount
            ) from None
    # Ray counts the whole CPUs of a pod, at least one.
    rays = {"CPU": max(1.0, math.floor(has["cpu"])), "memory": has["memory"], "GPU": has.get(_gpu_of(pod) or "", 0.0)}
    fit = min((int(rays[name] / amount + 1e-9) for name, amount in each.items() if amount), default=1)
    if fit < 1:
        short = next(name for name, amount in each.items() if amount > rays[name])
        raise ConfigError(
            f"has no room for one worker, which asks for {preflight.amount(short, each[short])}: the pod has "
            f"{preflight.amount(short, rays[short])}",
            key="cluster.pod_resources",
            value=pod,
        )
    return pod, fit


def _bounds(e: Experiment, workers: tuple[int, int], fit: int) -> tuple[int, int]:
    """Return the least and the most number of pods."""
    c, (least, most) = e.cluster, (math.ceil(n / fit) for n in workers)
    low = least if c.min_pods is None else c.min_pods
    high = max(most, low) if c.max_pods is None else c.max_pods
    low = min(low, high)
    if high < least:
        raise ConfigError(
            f"is fewer than scaling.num_workers={workers[0]} need, at {fit} in a pod: {least}",
            key="cluster.max_pods",
            value=high,
        )
    if not c.queue:
        return low, high
    if c.min_pods is not None and low < high:
        # Kueue reserves a job's resources once, and refuses a job that grows by itself.
        raise ConfigError(
            f"is less than the maximum of {high}, and Kueue (cluster.queue={c.queue}) starts all pods of a job at "
            "once: leave it out",
            key="cluster.min_pods",
            value=low,
        )
    return high, high


def _head(e: Experiment) -> dict[str, str]:
    """Return the resources of the head's pod, which runs the driver."""
    asked = e.cluster.driver_resources or {}
    if other := sorted(set(asked) - {"CPU", "memory"}):
        raise ConfigError(
            "has no meaning with cluster=kuberay: the driver's pod has CPU and memory",
            key=f"cluster.driver_resources.{other[0]}",
            value=asked[other[0]],
        )
    return {
        "cpu": _written(asked["CPU"]) if "CPU" in asked else _HEAD["cpu"],
        "memory": str(math.ceil(asked["memory"])) if "memory" in asked else _HEAD["memory"],
    }


def _submitter(e: Experiment) -> Document:
    """Return the pod that submits the job and prints its log; KubeRay sets its command."""
    container = {
        "name": "ray-job-submitter",
        "image": e.cluster.image,
        "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": dict(_CONTAINER_SECURITY),
    }
    return _pod_spec(e, container)


def _pod_spec(
    e: Experiment, container: Document, volumes: list[Document] | None = None, uses_kubernetes: bool = False
) -> Document:
    shared = any(mount["name"] == "shm" for mount in container.get("volumeMounts", []))
    found = [*([{"name": "shm", "emptyDir": {"medium": "Memory"}}] if shared else []), *(volumes or [])]
    return {
        "restartPolicy": "Never",
        **({"serviceAccountName": e.cluster.service_account} if e.cluster.service_account else {}),
        # Training code must not access the Kubernetes API.
        "automountServiceAccountToken": uses_kubernetes,
        # Otherwise a service named mlflow would set MLFLOW_PORT, and one named ray RAY_PORT.
        "enableServiceLinks": False,
        "securityContext": dict(_POD_SECURITY),
        "containers": [container],
        **({"volumes": found} if found else {}),
    }


def _container(
    e: Experiment,
    name: str,
    resources: Mapping[str, str],
    *,
    env: list[Document] | None = None,
    mounts: list[Document] | None = None,
    ports: Mapping[str, int] | None = None,
) -> Document:
    return {
        "name": name,
        "image": e.cluster.image,
        **({"ports": [{"name": n, "containerPort": port} for n, port in ports.items()]} if ports else {}),
        **({"env": env} if env else {}),
        # By reference, so that no manifest contains the values.
        **({"envFrom": [{"secretRef": {"name": s}} for s in e.cluster.secrets]} if e.cluster.secrets else {}),
        # Requests equal limits, because Ray counts the limits.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": dict(_CONTAINER_SECURITY),
        # Ray's object store and NCCL share memory between processes; a container's default of 64 MB is too little.
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *(mounts or [])],  # noqa: S108
    }


def _config_map(
    name: str, namespace: str, labels: Mapping[str, str], notes: Mapping[str, str], files: Mapping[str, bytes]
) -> Document:
    total = sum(len(key) + len(value) for key, value in files.items())
    if total > _FILES_BYTES:
        largest = max(files, key=lambda key: len(files[key]))
        raise ConfigError(
            f"the request's files have {total:,} bytes ({largest}: {len(files[largest]):,}), and a Kubernetes "
            f"ConfigMap holds {_FILES_BYTES:,}: put what is large into a file of the image or of the storage, and its "
            "path into the config"
        )
    text, binary = {}, {}
    for key, value in sorted(files.items()):
        try:
            text[key] = value.decode()
        except UnicodeDecodeError:
            binary[key] = base64.b64encode(value).decode()
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, "labels": dict(labels), "annotations": dict(notes)},
        **({"data": text} if text else {}),
        **({"binaryData": binary} if binary else {}),
    }


def _check_shell(value: Any, key: str) -> None:
    """Check for `$` and backticks, because KubeRay puts these values within double quotes into a shell command."""
    if isinstance(value, Mapping):
        for name, below in value.items():
            _check_shell(str(name), key)
            _check_shell(below, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for below in value:
            _check_shell(below, key)
    elif isinstance(value, str) and (found := re.search(r"[$`\x00-\x08\x0b-\x1f\x7f]", value)):
        raise ConfigError(f"has a {found[0]!r}, which KubeRay passes to a shell", key=key)


def _gpu_of(pod: Mapping[str, str]) -> str | None:
    """Return the name of a pod's GPU resource, found as Ray finds it."""
    return next((name for name in pod if name.endswith("gpu")), None)


def _label(run: str) -> str:
    """Return a run's name as a label's value."""
    valid = len(run) <= _LONGEST_LABEL and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", run)
    return run if valid else object_name(run)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _written(cpus: float) -> str:
    return f"{cpus:g}" if cpus == int(cpus) else f"{math.ceil(cpus * 1000)}m"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, so that people can read the config in the ConfigMap."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Quoted if it begins like a number, because another YAML parser may read `1e3` as one.
    style = "|" if "\n" in text else "'" if text[:1] in "0123456789+-." else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
