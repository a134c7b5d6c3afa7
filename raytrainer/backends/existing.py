"""`cluster=existing`: join a running Ray cluster, as a driver on one of its machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrainer.plugins import Backend

if TYPE_CHECKING:
    from raytrainer.config import Experiment
    from raytrainer.preflight import Resources


class Existing(Backend):
    name = "existing"
    location = "address"
    address_form = (r"auto|(\[[\da-fA-F:.]+\]|[\w.-]+):\d{1,5}", "auto or host:port (10.0.0.1:6379)")

    def resources(self, experiment: Experiment) -> tuple[Resources, str]:
        """Join the cluster. Return its resources, including those that it can add, and its name."""
        from raytrainer.attempt.session import cluster_resources, join_cluster

        cluster = experiment.cluster
        address = join_cluster(cluster.address or "auto", cluster.runtime_env, experiment.name or "", "cluster.address")
        return cluster_resources(experiment), f"the cluster at {address}"
