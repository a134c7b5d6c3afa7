"""`cluster=ray_jobs`, or `cluster=job`: a job of a shared cluster, sent to the Ray Jobs API of its dashboard."""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from raytrainer import preflight
from raytrainer.attempt import tracking_uri
from raytrainer.backends.cluster_job import ClusterJob
from raytrainer.backends.jobs_api.api import JobsClient, check_environment
from raytrainer.backends.jobs_api.auth import Token, find_token
from raytrainer.backends.jobs_api.packages import marked
from raytrainer.config import ClusterConfig, Experiment
from raytrainer.errors import ConfigError, PreflightError
from raytrainer.plugins import Job
from raytrainer.preflight import Resources
from raytrainer.submission.code import collect_code
from raytrainer.submission.job_backend import JobBackend
from raytrainer.submission.request import Request, Sources, to_yaml
from raytrainer.submission.secrets import check_package, secrets_of
from raytrainer.submission.target import Target, compositions_of


class RayJobs(JobBackend):
    name = "ray_jobs"
    location = "address"
    address_form = (r"https?://[^\s/?#@]+(/[^\s?#]*)?", "http(s)://host[:port], of the cluster's dashboard")
    schemes = ("http", "https")

    def validate(self, experiment: Experiment) -> Sequence[ConfigError]:
        address = experiment.cluster.address
        problems = []
        if address is None:
            problems = [ConfigError(f"is not set: {self.address_form[1]}", key="cluster.address")]
        elif re.fullmatch(r"[^/@]+:\d+", address):
            hint = f"{self.address_form[1]}; http://{address} or https://{address}, or use cluster=existing"
            problems = [ConfigError(f"must be {hint}", key="cluster.address", value=address)]
        return [*problems, *super().validate(experiment)]

    def resources(self, experiment: Experiment) -> tuple[Resources, str]:
        cluster = experiment.cluster
        return _client(self.address(experiment), cluster).facts().resources, f"the cluster at {cluster.address}"

    def address(self, experiment: Experiment) -> str:
        return (experiment.cluster.address or "").rstrip("/")

    def sources(self, target: Target, argv: Sequence[str], folder: Path) -> Sources:
        """Return what a request takes from this machine: the code, but nothing with the value of a secret."""
        sources, code = super().sources(target, argv, folder), collect_code(target, folder)
        cluster, secrets = target.experiment.cluster, {}
        if (token := _token(cluster)) is not None:
            secrets = {token.source: token.value}
        for package in code.packages:
            check_package(package, secrets_of(cluster, sources.environ, secrets))
        return replace(
            sources, package=code.package, modules=code.modules, runtime_env=code.runtime_env, secrets=secrets
        )

    def text(self, request: Request) -> str:
        return to_yaml(marked(request).shown())

    def warnings(self, experiment: Experiment) -> list[str]:
        """Return a warning if the token could be read on its way to the cluster."""
        address, token = self.address(experiment), _token(experiment.cluster)
        if token is None or not address.startswith("http://") or not preflight.is_elsewhere(experiment):
            return []
        warning = (
            f"the token of {token.source} goes to {address} over plain http, and anyone who intercepts it controls the "
            "cluster: use https://, through a proxy, unless the network is trusted (docs/clusters.md shows one with nginx)"
        )
        return [warning]

    def check_capacity(self, request: Request, say: Callable[[str], None]) -> None:
        """Check that the whole cluster could run the request, unless it may grow. Say which versions differ.

        Raises:
            PreflightError: It could not.
        """
        facts = _client(request.address, request.experiment.cluster).facts()
        if problem := facts.version_problem():
            raise PreflightError([problem])
        experiments = [composition.experiment for composition in compositions_of(request.target)]
        shortage = list(dict.fromkeys(problem for e in experiments for problem in facts.problems(e)))
        problems = [] if facts.may_grow else shortage
        if facts.head is not None and not preflight.is_this_machine(facts.head):
            # Also for a loopback address, which may be a forwarded port.
            problems += [p for e in experiments for p in preflight.check_reach(e, tracking_uri(e), lambda host: False)]
        preflight.refuse(list(dict.fromkeys(problems)))
        for problem in shortage:
            say(f"warning: {problem}. It starts only if the cluster adds nodes")
        for text in facts.other_versions(metadata.version("ray"), platform.python_version()):
            say(f"warning: {text}")

    def check_access(self, request: Request) -> None:
        check_environment(request.address)

    def start(self, request: Request, previous: Job | None = None) -> Job:
        client = _client(request.address, request.experiment.cluster)
        with tempfile.TemporaryDirectory(prefix="raytrainer-") as folder:
            client.submit(request, Path(folder))
        return ClusterJob(
            submission_id=request.submission_id, status="PENDING", metadata=request.metadata, client=client
        )

    def jobs(self, address: str, settings: ClusterConfig) -> Sequence[Job]:
        return _client(address, settings).list()

    def job(self, submission_id: str, address: str, settings: ClusterConfig) -> Job | None:
        return _client(address, settings).info(submission_id)


def _client(address: str, settings: ClusterConfig) -> JobsClient:
    return JobsClient(address, ca_file=settings.ca_file, token_file=settings.token_file)


def _token(settings: ClusterConfig) -> Token | None:
    with suppress(ConfigError):  # the connection to the cluster reports it
        return find_token(settings.token_file)
    return None
