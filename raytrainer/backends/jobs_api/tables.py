"""Parse Ray's state tables: a cluster's capacity, what a job holds, and what it waits for. It makes no requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raytrainer.backends.jobs_api.facts import ClusterFacts, Holder, total_of

Row = Mapping[str, Any]

# The name of a job's supervisor: the actor that starts its driver and holds the driver's resources.
SUPERVISOR = "_ray_internal_job_actor_"


@dataclass(frozen=True)
class Tables:
    """Rows as the dashboard returns them: all of them, or those of one job.

    Attributes:
        nodes: In all states.
        actors: Including dead ones, whose processes may still exist.
        groups: Placement groups in all states.
        tasks: Running ones.
        jobs: Submissions, and drivers without a submission.
        workers: Live processes, including drivers.
    """

    nodes: Sequence[Row] = ()
    actors: Sequence[Row] = ()
    groups: Sequence[Row] = ()
    tasks: Sequence[Row] = ()
    jobs: Sequence[Row] = ()
    workers: Sequence[Row] = ()


@dataclass
class _Held:
    """Resources by holder (a driver's job id, or SUPERVISOR with the submission id) and by node."""

    by_job: dict[str, dict[str, float]] = field(default_factory=dict)
    by_node: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, job: str, node: str | None, resources: Mapping[str, float]) -> None:
        for place in (self.by_job.setdefault(job, {}), self.by_node.setdefault(node or "", {})):
            for name, share in resources.items():
                place[name] = place.get(name, 0.0) + share


def read(address: str, ray_version: str, python_version: str | None, tables: Tables, grows: bool) -> ClusterFacts:
    """Return the facts that the tables contain.

    Args:
        address, ray_version, python_version: As in `ClusterFacts`.
        tables: The current tables.
        grows: Whether the cluster may add nodes.
    """
    held = _held(tables)
    alive = [node for node in tables.nodes if node["state"] == "ALIVE"]
    nodes = tuple(dict(node["resources_total"] or {}) for node in alive)
    free = tuple(
        {name: max(0.0, n - held.by_node.get(node["node_id"], {}).get(name, 0.0)) for name, n in has.items()}
        for node, has in zip(alive, nodes, strict=True)
    )
    return ClusterFacts(
        address=address,
        ray_version=ray_version,
        python_version=python_version,
        nodes=nodes,
        free=free,
        may_grow=grows or not nodes,  # a cluster that is starting has no nodes yet
        holders=_holders(held.by_job, tables.jobs),
        head=next((node.get("node_ip") for node in alive if node.get("is_head_node")), None),
    )


def held_by(submission_id: str, tables: Tables) -> dict[str, float]:
    """Return what a submission holds: CPUs, GPUs and others, and the number of its `processes`. Empty if nothing."""
    jobs = _jobs_of(submission_id, tables.jobs)
    living = {worker["worker_id"] for worker in tables.workers}
    # Ray reports a killed task as running for about 15 s.
    tables = replace(tables, tasks=[task for task in tables.tasks if task["worker_id"] in living])
    by_job = _held(tables).by_job
    held = total_of(by_job[job] for job in jobs if job in by_job)
    if count := _processes(jobs, tables):
        held["processes"] = float(count)
    return {name: share for name, share in held.items() if share}


def asked_by(submission_id: str, tables: Tables) -> list[list[dict[str, float]]]:
    """Return what a submission waits for: lists of bundles that a driver, placement group or actor wants at once."""
    jobs = _jobs_of(submission_id, tables.jobs)
    demands = [
        [dict(bundle["unit_resources"]) for bundle in group["bundles"] if not bundle["node_id"]]
        for group in tables.groups
        if group["creator_job_id"] in jobs and group["state"] in ("PENDING", "RESCHEDULING")
    ]
    demands += [
        [dict(actor["required_resources"])]
        for actor in tables.actors
        if _job_of(actor) in jobs and actor["state"] == "PENDING_CREATION" and not _in_group(actor)
    ]
    return [bundles for bundles in demands if any(any(bundle.values()) for bundle in bundles)]


def _processes(jobs: set[str], tables: Tables) -> int:
    places = {(actor["node_id"], actor["pid"]) for actor in tables.actors if _job_of(actor) in jobs}
    ids = {task["worker_id"] for task in tables.tasks if task["job_id"] in jobs}
    return sum(
        (worker["node_id"], worker["pid"]) in places
        or worker["worker_id"] in ids
        # A driver's worker id is its job id, padded with `f`.
        or (worker["worker_type"] == "DRIVER" and worker["worker_id"].rstrip("f") in {job.rstrip("f") for job in jobs})
        for worker in tables.workers
    )


def _held(tables: Tables) -> _Held:
    held = _Held()
    for group in tables.groups:
        if group["state"] != "REMOVED":
            for bundle in group["bundles"]:
                if bundle["node_id"]:  # it is placed
                    held.add(group["creator_job_id"], bundle["node_id"], bundle["unit_resources"])
    for actor in tables.actors:
        if actor["state"] == "ALIVE" and not _in_group(actor):
            held.add(_job_of(actor), actor["node_id"], actor["required_resources"] or {})
    for task in tables.tasks:
        if task["state"] == "RUNNING" and task["type"] == "NORMAL_TASK" and not _in_group(task):
            held.add(task["job_id"], task["node_id"], task["required_resources"] or {})
    return held


def _in_group(row: Row) -> bool:
    """Return whether the row's resources belong to a placement group, which is counted as a whole."""
    return row["placement_group_id"] is not None or any("_group_" in name for name in row["required_resources"] or {})


def _job_of(actor: Row) -> str:
    """Return an actor's job id, or a supervisor's name, because a supervisor has the job id of Ray's agent."""
    return str(actor["name"] if (actor["name"] or "").startswith(SUPERVISOR) else actor["job_id"])


def _jobs_of(submission_id: str, jobs: Sequence[Row]) -> set[str]:
    ids = {job["job_id"] for job in jobs if job["submission_id"] == submission_id and job["job_id"]}
    return {*ids, f"{SUPERVISOR}{submission_id}"}


def _holders(by_job: Mapping[str, Mapping[str, float]], jobs: Sequence[Row]) -> tuple[Holder, ...]:
    owners: dict[str, Row] = {job["job_id"]: job for job in jobs if job["job_id"]}
    owners |= {f"{SUPERVISOR}{job['submission_id']}": job for job in jobs if job["submission_id"]}
    resources: dict[str, dict[str, float]] = {}
    rows: dict[str, Row] = {}
    for job, held in by_job.items():
        owner = owners.get(job, {"job_id": job})
        key = owner.get("submission_id") or owner["job_id"]
        rows[key] = owner
        resources[key] = total_of([resources.get(key, {}), held])
    holders = [_holder(row, resources[key]) for key, row in rows.items() if any(resources[key].values())]
    return tuple(sorted(holders, key=lambda holder: holder.name))


def _holder(row: Row, resources: Mapping[str, float]) -> Holder:
    metadata, driver = row.get("metadata") or {}, row.get("driver_info") or {}
    # Without the command line, which may hold another user's secrets.
    place = f"a driver on {driver['node_ip_address']} (process {driver['pid']})" if driver else f"job {row['job_id']}"
    submission, started = row.get("submission_id"), row.get("start_time")
    return Holder(
        name=plain(metadata.get("raytrainer.name") or submission or place),
        user=plain(metadata["raytrainer.user"]) if metadata.get("raytrainer.user") else None,
        submission_id=submission,
        resources={name: share for name, share in resources.items() if share and not name.startswith("node:")},
        started=started / 1e3 if started else None,
    )


def plain(text: str, most: int = 500) -> str:
    """Return another user's text without control characters, which a terminal would interpret."""
    return "".join(c if c.isprintable() else " " for c in text)[:most].strip()


def may_grow(status: Mapping[str, Any]) -> bool:
    """Return whether a cluster may get more nodes by itself, from the answer of `/api/cluster_status`.

    A fixed cluster has a monitor that names each node's type after the node's id; such a cluster cannot grow. Real
    autoscalers report types of their own. Ray's second autoscaler and KubeRay's report nothing here.
    """
    try:
        report = status["data"]["clusterStatus"]["autoscalerReport"]
        types = dict(report["nodeTypeMapping"])
    except (KeyError, TypeError):
        return True
    return not types or any(kind != f"node_{node}" for node, kind in types.items())
