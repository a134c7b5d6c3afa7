"""Submit a job with Ray's own client, which builds, names and uploads the packages, over our `connection`.

Importing it imports ray, so import it only to submit a job.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import requests

from raytrainer.backends.jobs_api.connection import Connection
from raytrainer.errors import ClusterError, ConfigError, JobExists
from raytrainer.ray_internals import JobClient

_SUBMIT_S = 60.0  # the dashboard waits up to half a minute for the agent that starts the driver
_PARTS = {"CPU": "entrypoint_num_cpus", "GPU": "entrypoint_num_gpus", "memory": "entrypoint_memory"}


def submit(
    connection: Connection,
    *,
    submission_id: str,
    entrypoint: str,
    runtime_env: Mapping[str, Any],
    metadata: Mapping[str, str],
    resources: Mapping[str, float],
) -> str:
    """Upload the parts of a runtime environment that the cluster lacks, and start a job. Return the job's id.

    Args:
        connection: The connection to the cluster.
        submission_id: The job's id.
        entrypoint: Its command.
        runtime_env: Ray's runtime environment, with paths on this machine.
        metadata: The job's metadata.
        resources: The resources that its driver reserves.

    Raises:
        JobExists: A job with this id exists, possibly one submitted at the same moment.
        ConfigError: Ray's client rejects the job.
        ClusterError: The cluster cannot be reached or refuses the job.
    """
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # they log each package
        logging.getLogger(name).setLevel(logging.WARNING)
    own = {_PARTS[name]: share for name, share in resources.items() if name in _PARTS}
    if "entrypoint_memory" in own:
        own["entrypoint_memory"] = int(own["entrypoint_memory"])
    try:
        return str(
            JobClient(connection.address, partial(_send, connection)).submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=dict(runtime_env),
                metadata=dict(metadata),
                entrypoint_resources={name: n for name, n in resources.items() if name not in _PARTS} or None,
                **own,
            )
        )
    except (ClusterError, ConfigError):
        raise
    except (ValueError, TypeError, RuntimeError, OSError) as error:  # it validates packages and runtime environments
        raise ConfigError(f"cannot be sent: {error}", key="cluster.runtime_env") from error


def _send(connection: Connection, method: str, endpoint: str, *, data: bytes | None, json: Any) -> requests.Response:
    """Send a request of Ray's client over our connection, which limits its duration and explains failures."""
    if method == "POST" and endpoint == "/api/jobs/":
        # 400 and 500: an existing job is reported as the server's traceback.
        answer = connection.request(method, endpoint, body=json, read_s=_SUBMIT_S, ok=(400, 500))
        if answer.status_code >= 400 and "already exists" in answer.text:
            raise JobExists(f"{connection.address} already has a job {json['submission_id']}")
        return connection.checked(answer)
    # 404: a package that is not uploaded yet.
    return connection.request(method, endpoint, data=data, body=json, ok=(404,))
