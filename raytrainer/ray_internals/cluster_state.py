"""Query the resources of the cluster that this process has joined: nodes, free resources, other runs, the autoscaler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.core.generated.gcs_pb2 import ActorTableData, JobTableData, PlacementGroupTableData
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrainer.ray_internals.autoscaling import HEAD, Growth, addable

NAME = "raytrainer.name"  # key in the metadata of a run's Ray job
_PROBE_S = 5.0
_growths: dict[str, Growth | None] = {}  # by Ray job, because it is needed before a launch and again during it


def nodes() -> list[dict[str, float]]:
    """Return the resources of each live node of the cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def growth() -> Growth | None:
    """Return what the autoscaler can add to the cluster; None if there is none, or if it does not answer within 5 s."""
    job = ray.get_runtime_context().get_job_id()
    if job not in _growths:
        _growths[job] = _growth()
    return _growths[job]


def _growth() -> Growth | None:
    head = next((node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)
    if head is None:
        return None
    # Ray's own query, `get_max_resources_from_cluster_config`, works only on Anyscale. The autoscaler's configuration
    # is a file on the head node, and the command line of the monitor process has its path.
    read_on_head = ray.remote(num_cpus=0)(_reader()).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(head["NodeID"], soft=False), max_retries=0
    )
    reply = read_on_head.remote(ray.get_runtime_context().gcs_address)
    try:
        monitor, config = ray.get(reply, timeout=_PROBE_S)
    except Exception:  # noqa: BLE001  the head is too busy, or its files cannot be read
        ray.cancel(reply, force=True)
        return None
    if not monitor:
        return Growth(known=False) if _is_autoscaled() else None
    return addable(config, nodes()) if config else None


def _reader() -> Any:
    """Return the task for the head node. It is a nested function, so that it is pickled by value and raytrainer need
    not be installed there."""

    def read(gcs_address: str) -> tuple[bool, Any]:
        import psutil
        import yaml

        for process in psutil.process_iter():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if not any(part.endswith("/monitor.py") for part in command):
                continue
            options = dict(part.removeprefix("--").partition("=")[::2] for part in command if part.startswith("--"))
            if options.get("gcs-address", "").rpartition(":")[2] != gcs_address.rpartition(":")[2]:
                continue  # the monitor of another cluster on the same machine
            if "autoscaling-config" not in options:
                return True, None
            with open(options["autoscaling-config"]) as file:  # noqa: PTH123
                config = yaml.safe_load(file)
            # Only these keys, because others may contain secrets.
            return True, {
                "max_workers": config.get("max_workers"),
                "available_node_types": {
                    name: {"resources": dict(t.get("resources") or {}), "max_workers": t.get("max_workers")}
                    for name, t in (config.get("available_node_types") or {}).items()
                },
            }
        return False, None

    return read


def _is_autoscaled() -> bool:
    """Return whether an autoscaler has reported to the cluster."""
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except Exception:  # noqa: BLE001  a cluster that gives no answer is treated as one without an autoscaler
        return False
    return int(status.stats.autoscaler_version or 0) > 0


def free() -> dict[str, float]:
    """Return the free resources of the cluster."""
    return dict(ray.available_resources())


def holders() -> dict[str, dict[str, float]]:
    """Return the resources that each other driver holds, by its run's name, submission id, or host and process id.

    Placement groups, and actors outside them, are counted. Tasks are not, because the tables do not list them.
    """
    state = ray._private.state.state._connect_and_get_accessor()
    held: dict[bytes, dict[str, float]] = {}

    def count(job: bytes, resources: Mapping[str, float]) -> None:
        own = held.setdefault(job, {})
        for name, amount in resources.items():
            if amount and not name.startswith("node:"):
                own[name] = own.get(name, 0.0) + amount

    for data in state.get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        if group.state == PlacementGroupTableData.CREATED:
            for bundle in group.bundles:
                count(group.creator_job_id, bundle.unit_resources)
    for data in state.get_actor_table(None, None):
        actor = ActorTableData.FromString(data)
        if actor.state == ActorTableData.ALIVE and not any("_group_" in name for name in actor.required_resources):
            count(actor.job_id, actor.required_resources)
    mine = ray.get_runtime_context().get_job_id()
    others: dict[str, dict[str, float]] = {}
    for data in state.get_job_table():
        job = JobTableData.FromString(data)
        if held.get(job.job_id) and job.job_id.hex() != mine:
            about = dict(job.config.metadata)
            # Not its command line, which may contain secrets of other users, because this text is logged.
            driver = f"a driver on {job.driver_ip_address} (process {job.driver_pid})"
            others[about.get(NAME) or about.get("job_submission_id") or driver] = held[job.job_id]
    return others


def nodes_to_come() -> tuple[dict[str, int], list[str]]:
    """Return what the autoscaler is adding: node type → number of nodes, and the launches that failed with the reasons.

    Both are empty if the cluster has no autoscaler, or one that is too old to report it.
    """
    try:
        status = get_cluster_status(ray.get_runtime_context().gcs_address, timeout=2)
    except Exception:  # noqa: BLE001  the answer is only for display
        return {}, []
    coming: dict[str, int] = {}
    for launch in status.pending_launches:
        coming[launch.ray_node_type_name] = coming.get(launch.ray_node_type_name, 0) + launch.count
    for node in status.pending_nodes:
        coming[node.ray_node_type_name] = coming.get(node.ray_node_type_name, 0) + 1
    failed = [
        f"{launch.ray_node_type_name}: {' '.join(launch.details.split())[:200]}"
        for launch in status.failed_launches
        if launch.details
    ]
    return coming, failed
