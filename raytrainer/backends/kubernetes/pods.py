"""The pods of a RayJob: what they run, their resources, and how many there are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from raytrainer import preflight
from raytrainer.config import Experiment
from raytrainer.errors import ConfigError
from raytrainer.submission.entrypoint import MOUNTED

_FILES_AT = "/etc/raytrainer"
USER = 1000  # the image's user, not root
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
_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": USER, "seccompProfile": {"type": "RuntimeDefault"}}
_CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

Document = dict[str, Any]


def cluster_spec(e: Experiment, config_map: str, pods: Document, workers: tuple[int, int]) -> Document:
    """Return the `rayClusterSpec`.

    Args:
        e: The experiment, whose `scaling` and `cluster` say what to request.
        config_map: The name of the ConfigMap with the request's files.
        pods: The metadata of every pod.
        workers: The least and the most training processes at a time.

    Raises:
        ConfigError: The pods cannot have these resources.
    """
    pod, fit = _pod(e)
    least, most = _bounds(e, workers, fit)
    grows = least < most
    autoscaler = {
        "version": "v2",
        "idleTimeoutSeconds": _IDLE_S,
        "securityContext": dict(_CONTAINER_SECURITY),
    }
    head = _container(
        e,
        "ray-head",
        _head(e),
        env=[{"name": MOUNTED, "value": _FILES_AT}],
        mounts=[{"name": "request", "mountPath": _FILES_AT, "readOnly": True}],
        ports={"gcs-server": 6379, "dashboard": 8265, "client": 10001},
    )
    # The autoscaler runs in the head's pod, and adds and removes pods.
    volumes = [{"name": "request", "configMap": {"name": config_map}}]
    head_pod = _pod_spec(e, head, volumes=volumes, uses_kubernetes=grows)
    worker_pod = _pod_spec(e, _container(e, "ray-worker", pod))
    return {
        "rayVersion": metadata.version("ray"),  # the same as in the image, by constraints.txt
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": grows,
        **({"autoscalerOptions": autoscaler} if grows else {}),
        "headGroupSpec": {
            # The head's pod runs only the driver; workers run in the workers' pods.
            "rayStartParams": {"num-cpus": "0"},
            "template": {"metadata": dict(pods), "spec": head_pod},
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": least,
                "minReplicas": least,
                "maxReplicas": most,
                # Whole CPUs, rounded down, because KubeRay would round up.
                "rayStartParams": {"num-cpus": str(max(1, math.floor(quantity(pod["cpu"]))))},
                "template": {"metadata": dict(pods), "spec": worker_pod},
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
    resources = e.cluster.driver_resources or {}
    if other := sorted(set(resources) - {"CPU", "memory"}):
        raise ConfigError(
            "has no meaning with cluster=kuberay: the driver's pod has CPU and memory",
            key=f"cluster.driver_resources.{other[0]}",
            value=resources[other[0]],
        )
    return {
        "cpu": _written(resources["CPU"]) if "CPU" in resources else _HEAD["cpu"],
        "memory": str(math.ceil(resources["memory"])) if "memory" in resources else _HEAD["memory"],
    }


def submitter(e: Experiment) -> Document:
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
    all_volumes = [*([{"name": "shm", "emptyDir": {"medium": "Memory"}}] if shared else []), *(volumes or [])]
    return {
        "restartPolicy": "Never",
        **({"serviceAccountName": e.cluster.service_account} if e.cluster.service_account else {}),
        # Training code must not access the Kubernetes API.
        "automountServiceAccountToken": uses_kubernetes,
        # Otherwise a service named mlflow would set MLFLOW_PORT, and one named ray RAY_PORT.
        "enableServiceLinks": False,
        "securityContext": dict(_POD_SECURITY),
        "containers": [container],
        **({"volumes": all_volumes} if all_volumes else {}),
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


def wants_gpu(e: Experiment) -> bool:
    """Return `scaling.use_gpu`; for `auto`, whether the config requests GPUs, because no cluster exists yet."""
    s = e.scaling
    has_gpus = bool(
        s.accelerator_type or (s.resources_per_worker or {}).get("GPU") or _gpu_of(e.cluster.pod_resources or {})
    )
    return has_gpus if s.use_gpu == "auto" else bool(s.use_gpu)


def quantity(text: str) -> float:
    """Parse a Kubernetes quantity: `500m` → 0.5, `8Gi` → 2^33.

    Raises:
        ValueError: The text is not a quantity.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([A-Za-z]*)", text)
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(text)
    return float(match[1]) * _SUFFIXES[match[2]]


def _gpu_of(pod: Mapping[str, str]) -> str | None:
    """Return the name of a pod's GPU resource, found as Ray finds it."""
    return next((name for name in pod if name.endswith("gpu")), None)


def _written(cpus: float) -> str:
    return f"{cpus:g}" if cpus == int(cpus) else f"{math.ceil(cpus * 1000)}m"
