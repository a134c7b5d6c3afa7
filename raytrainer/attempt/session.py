"""A Ray session for one launch: start or join a cluster, and always stop or leave it at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from raytrainer import preflight
from raytrainer.config import Experiment
from raytrainer.core import garbage
from raytrainer.core.interrupts import Interrupts
from raytrainer.errors import ClusterLost, ConfigError


@contextlib.contextmanager
def ray_session(e: Experiment, interrupts: Interrupts, *, all_of_it: bool = False) -> Iterator[preflight.Resources]:
    """Start or join Ray by the section `cluster`, and yield its resources. At the end, stop all that this launch started.

    Args:
        e: The experiment.
        interrupts: The signal handlers. Signals are deferred while a local Ray starts.
        all_of_it: As for `cluster_resources`.

    Raises:
        Interrupted: A signal arrived during the start.
    """
    import ray

    from raytrainer import ray_internals

    ray_internals.prepare(embedded=e.backend.ray == "embedded")
    available = preflight.this_machine()
    try:
        if e.backend.ray == "embedded":
            interrupts.deferred = True  # an interrupted start would leave processes behind
            ray_internals.start_embedded(int(available.cpus), int(available.gpus), available.memory)
            interrupts.deferred = False
        else:
            if not ray.is_initialized():
                ray_internals.attach(e.cluster.address or "auto", e.cluster.runtime_env, e.name or "")
            available = cluster_resources(e, all_of_it=all_of_it)
        interrupts.install()  # again: Ray's core has set a SIGTERM handler below Python's, which prints a stack
        interrupts.check()
        garbage.collect_as_usual()
        yield available
    finally:
        interrupts.deferred = True
        ray_internals.stop()


def cluster_resources(e: Experiment, *, all_of_it: bool = False) -> preflight.Resources:
    """Return the resources of the joined cluster and, if they are too few, those that its autoscaler can add.

    Args:
        e: The experiment.
        all_of_it: Whether to query the autoscaler in any case. A sweep does, because it uses all resources.
    """
    from raytrainer import ray_internals

    nodes = ray_internals.nodes()
    now = preflight.Resources.of_nodes(nodes)
    enough = not preflight.check_resources(e, now, "") and (e.scaling.use_gpu != "auto" or preflight.uses_gpu(e, now))
    if (enough and not all_of_it) or (growth := ray_internals.growth()) is None:
        return now
    return preflight.Resources.of_nodes(nodes, growth.nodes, growth.most, endless=not growth.known)


def join_cluster(address: str, runtime_env: Mapping[str, Any], name: str, key: str) -> str:
    """Join a running cluster, and return its address.

    Args:
        address: The address; `auto` for the cluster of this machine.
        runtime_env: Ray's environment for the workers.
        name: The name that the cluster shows for this process.
        key: The config key of the address, for the error.

    Raises:
        ConfigError: There is no cluster at the address.
    """
    from raytrainer import ray_internals

    ray_internals.prepare(embedded=False)
    try:
        if address != "auto":
            ray_internals.find_cluster(address)
        return ray_internals.attach(address, runtime_env, name)
    except ray_internals.VersionMismatch as error:
        raise ConfigError(str(error), key=key, value=address) from error
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"is not a running Ray cluster: {first}", key=key, value=address) from error


def ray_error(error: BaseException) -> BaseException:
    """Return `ClusterLost` for an error of Ray itself, in one line, and any other error unchanged."""
    if type(error).__module__.partition(".")[0] != "ray":
        return error
    return ClusterLost(f"Ray: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
