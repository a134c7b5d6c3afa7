"""`cluster=existing`: join a running Ray cluster, as a driver on one of its machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytrainer.errors import ConfigError
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
        from raytrainer import attempt, ray_internals

        ray_internals.prepare(embedded=False)
        cluster, address = experiment.cluster, experiment.cluster.address or "auto"
        try:
            if address != "auto":
                ray_internals.find_cluster(address)
            gcs_address = ray_internals.attach(address, cluster.runtime_env, experiment.name or "")
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"is not a running Ray cluster: {first}", key="cluster.address", value=address) from error
        return attempt.cluster_resources(experiment), f"the cluster at {gcs_address}"
