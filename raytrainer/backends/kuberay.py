"""`cluster=kuberay`: a RayJob on Kubernetes, whose Ray cluster exists for as long as the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from raytrainer.backends.kubernetes.kubectl import Kubectl
from raytrainer.backends.kubernetes.namespace import SCHEME, Namespace, RayJobStatus, address_of
from raytrainer.backends.kubernetes.rayjob import documents
from raytrainer.config import ClusterConfig, Experiment
from raytrainer.errors import ClusterError, ConfigError, JobExists
from raytrainer.plugins import Job
from raytrainer.submission.job_backend import JobBackend
from raytrainer.submission.request import Request, Sources, to_yaml
from raytrainer.submission.target import Target

_PATCH_BYTES = 2**18  # of uncommitted changes, because the files go into a ConfigMap of 1 MiB


class KubeRay(JobBackend):
    name = "kuberay"
    location = "elsewhere"
    schemes = (SCHEME,)
    sends_code = False  # the image has it
    resends = False  # KubeRay retries a job itself

    def address(self, experiment: Experiment) -> str:
        cluster = experiment.cluster
        context = cluster.context
        if context is None:
            # The current context may change later. Without kubectl, the manifest can still be printed.
            with suppress(ConfigError, ClusterError):
                context = Kubectl(None, cluster.namespace).current_context()
        return address_of(context or "", cluster.namespace)

    def sources(self, target: Target, argv: Sequence[str], folder: Path) -> Sources:
        sources = super().sources(target, argv, folder)
        return replace(sources, origin=sources.origin.cut(_PATCH_BYTES))

    def text(self, request: Request) -> str:
        return to_yaml(*documents(request))

    def start(self, request: Request, previous: Job | None = None) -> Job:
        client, (config_map, job) = Namespace.at(request.address), documents(request)
        if previous is not None:
            client.remove(previous.submission_id)
        if not client.kubectl.apply(config_map, job):
            raise JobExists(f"{request.address} already has a job {request.submission_id}")
        return RayJobStatus(
            name=request.name,
            object=job["metadata"]["name"],
            submission_id=request.submission_id,
            status="PENDING",
            client=client,
        )

    def jobs(self, address: str, settings: ClusterConfig) -> Sequence[Job]:
        return Namespace.at(address).list()

    def job(self, submission_id: str, address: str, settings: ClusterConfig) -> Job | None:
        return Namespace.at(address).find(submission_id)
