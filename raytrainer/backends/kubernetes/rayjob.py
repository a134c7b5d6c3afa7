"""A run on Kubernetes as plain data: the `RayJob` for the KubeRay operator, and the ConfigMap with the request's files.

Nothing is uploaded: the image contains the code, and only these two documents are sent. The fields follow the
documentation of KubeRay 1.6 (ray.io/v1); token authentication needs 1.5.1 or later.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from raytrainer import preflight
from raytrainer.backends.kubernetes.pods import Document, cluster_spec, submitter
from raytrainer.errors import ConfigError
from raytrainer.submission.request import Request, to_yaml
from raytrainer.submission.target import Target
from raytrainer.sweep import Plan

NAME, CONTENT, SUBMISSION = "raytrainer.dev/name", "raytrainer.dev/content", "raytrainer.dev/submission-id"
JOB = "raytrainer.dev/job"  # a label of pods: their RayJob
MANAGED = {"app.kubernetes.io/managed-by": "raytrainer"}
QUEUE = "kueue.x-k8s.io/queue-name"
_LONGEST_NAME = 47  # of a RayJob, because KubeRay derives the names of services from it
_LONGEST_LABEL = 63
_FILES_BYTES = 2**20  # the limit of a ConfigMap
_TTL_S = 30  # how long the cluster stays after the job, so that its last log lines arrive


def documents(request: Request) -> tuple[Document, Document]:
    """Return the ConfigMap with the request's files, and the RayJob.

    Raises:
        ConfigError: A setting is not possible in a RayJob; the message names the key and the fix.
    """
    _check(request)
    e, c = request.experiment, request.experiment.cluster
    name = object_name(e.name or "")
    labels = {**MANAGED, NAME: _label(e.name or ""), JOB: name}
    notes = {NAME: e.name or "", CONTENT: request.content, SUBMISSION: request.submission_id}
    pods = {"labels": labels, "annotations": {SUBMISSION: request.submission_id}}
    # Another content gets another ConfigMap, so that the files of a running job never change.
    config_map = _config_map(f"{name}-{_short(request.content)}", c.namespace, labels, notes, request.files)
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
            "entrypoint": request.entrypoint,
            "jobId": request.submission_id,
            "metadata": dict(request.metadata),
            **({"runtimeEnvYAML": to_yaml(request.runtime_env)} if request.runtime_env else {}),
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": {"metadata": pods, "spec": submitter(e)},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _TTL_S,
            "backoffLimit": c.retries,
            # Only Kueue may resume it.
            **({"suspend": True} if c.queue else {}),
            "rayClusterSpec": cluster_spec(e, config_map["metadata"]["name"], pods, _workers(request.target)),
        },
    }
    return config_map, job


def _check(request: Request) -> None:
    e, c = request.experiment, request.experiment.cluster
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
    _check_shell(request.metadata, "the job's metadata")
    _check_shell(request.runtime_env, "cluster.runtime_env")
    for key in ("working_dir", "py_modules"):
        for where in [v] if isinstance(v := request.runtime_env.get(key) or [], str) else v:
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


def _workers(target: Target) -> tuple[int, int]:
    """Return the least and the most training processes at a time."""
    e = target.experiment
    least = preflight.least_workers(e)
    if not isinstance(target, Plan):
        return least, e.max_workers
    return least, least * (e.sweep.max_concurrent_trials or target.total or 1)


def object_name(run: str) -> str:
    """Return a unique object name for a run: at most 47 lower-case letters, digits and `-`, the first a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    # A run's name that ends like a generated one could equal the generated name of another run.
    if name == run and len(name) <= _LONGEST_NAME and not re.search("-[0-9a-f]{8}$", run):
        return name
    return f"{name[: _LONGEST_NAME - 9].rstrip('-')}-{_short(run)}"


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
    elif isinstance(value, str) and (match := re.search(r"[$`\x00-\x08\x0b-\x1f\x7f]", value)):
        raise ConfigError(f"has a {match[0]!r}, which KubeRay passes to a shell", key=key)


def _label(run: str) -> str:
    """Return a run's name as a label's value."""
    valid = len(run) <= _LONGEST_LABEL and re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", run)
    return run if valid else object_name(run)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
