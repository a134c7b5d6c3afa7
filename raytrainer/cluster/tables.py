"""Ray's tables, as its dashboard shows them, read: what a cluster has, what a job holds, what it asks for. Nothing here
asks anybody.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from raytrainer.autoscaling import Growth, addable
from raytrainer.cluster.facts import ClusterFacts, Holder, total_of

Row = Mapping[str, Any]

# Of a job's supervisor: the actor that starts its driver, and holds what the driver reserves.
SUPERVISOR = "_ray_internal_job_actor_"


@dataclass(frozen=True)
class Tables:
    """Rows as the dashboard gives them: all of them, or those that are about one job.

    Attributes:
        nodes: Of all states.
        actors: Also dead ones, whose processes may be there still.
        groups: Placement groups of all states.
        tasks: Those that run.
        jobs: Submissions, and drivers outside of them.
        workers: Processes that live, drivers included.
    """

    nodes: Sequence[Row] = ()
    actors: Sequence[Row] = ()
    groups: Sequence[Row] = ()
    tasks: Sequence[Row] = ()
    jobs: Sequence[Row] = ()
    workers: Sequence[Row] = ()


@dataclass
class _Held:
    """Resources by who holds them (a driver's job id, or SUPERVISOR and the submission's), and by node."""

    by_job: dict[str, dict[str, float]] = field(default_factory=dict)
    by_node: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, job: str, node: str | None, resources: Mapping[str, float]) -> None:
        for place in (self.by_job.setdefault(job, {}), self.by_node.setdefault(node or "", {})):
            for name, share in resources.items():
                place[name] = place.get(name, 0.0) + share


def read(address: str, ray_version: str, python_version: str | None, tables: Tables, log: str | None) -> ClusterFacts:
    """The facts that are in the tables.

    Args:
        address, ray_version, python_version: As `ClusterFacts`.
        tables: Of this moment.
        log: What the autoscaler has logged; None: it cannot be read, and what it can add is not known.
    """
    held = _held(tables)
    alive = [node for node in tables.nodes if node["state"] == "ALIVE"]
    nodes = tuple(dict(node["resources_total"] or {}) for node in alive)
    free = tuple(
        {name: max(0.0, n - held.by_node.get(node["node_id"], {}).get(name, 0.0)) for name, n in has.items()}
        for node, has in zip(alive, nodes, strict=True)
    )
    growth = _growth(log, nodes) if log is not None else None
    return ClusterFacts(
        address=address,
        ray_version=ray_version,
        python_version=python_version,
        nodes=nodes,
        free=free,
        addable=growth.nodes if growth is not None else (),
        most_addable=growth.most if growth is not None else 0,
        endless=growth is None or not nodes,  # one that is being started has none
        holders=_holders(held.by_job, tables.jobs),
        head=next((node.get("node_ip") for node in alive if node.get("is_head_node")), None),
    )


def held_by(submission_id: str, tables: Tables) -> dict[str, float]:
    """What a submission has: CPUs, GPUs and the like, and the number of its `processes`; empty: nothing."""
    jobs = _jobs_of(submission_id, tables.jobs)
    living = {worker["worker_id"] for worker in tables.workers}
    # A task that was killed is said to run for a quarter of a minute.
    tables = replace(tables, tasks=[task for task in tables.tasks if task["worker_id"] in living])
    found = _held(tables).by_job
    held = total_of(found[job] for job in jobs if job in found)
    if count := _processes(jobs, tables):
        held["processes"] = float(count)
    return {name: share for name, share in held.items() if share}


def asked_by(submission_id: str, tables: Tables) -> list[list[dict[str, float]]]:
    """What a submission asks for and has not got: the bundles that its driver, each placement group and each actor want
    at once."""
    jobs = _jobs_of(submission_id, tables.jobs)
    found = [
        [dict(bundle["unit_resources"]) for bundle in group["bundles"] if not bundle["node_id"]]
        for group in tables.groups
        if group["creator_job_id"] in jobs and group["state"] in ("PENDING", "RESCHEDULING")
    ]
    found += [
        [dict(actor["required_resources"])]
        for actor in tables.actors
        if _job_of(actor) in jobs and actor["state"] == "PENDING_CREATION" and not _in_group(actor)
    ]
    return [bundles for bundles in found if any(any(bundle.values()) for bundle in bundles)]


def _processes(jobs: set[str], tables: Tables) -> int:
    places = {(actor["node_id"], actor["pid"]) for actor in tables.actors if _job_of(actor) in jobs}
    ids = {task["worker_id"] for task in tables.tasks if task["job_id"] in jobs}
    return sum(
        (worker["node_id"], worker["pid"]) in places
        or worker["worker_id"] in ids
        # A driver's id is its job's, filled up.
        or (worker["worker_type"] == "DRIVER" and worker["worker_id"].rstrip("f") in {job.rstrip("f") for job in jobs})
        for worker in tables.workers
    )


def _held(tables: Tables) -> _Held:
    found = _Held()
    for group in tables.groups:
        if group["state"] != "REMOVED":
            for bundle in group["bundles"]:
                if bundle["node_id"]:  # it has its place
                    found.add(group["creator_job_id"], bundle["node_id"], bundle["unit_resources"])
    for actor in tables.actors:
        if actor["state"] == "ALIVE" and not _in_group(actor):
            found.add(_job_of(actor), actor["node_id"], actor["required_resources"] or {})
    for task in tables.tasks:
        if task["state"] == "RUNNING" and task["type"] == "NORMAL_TASK" and not _in_group(task):
            found.add(task["job_id"], task["node_id"], task["required_resources"] or {})
    return found


def _in_group(row: Row) -> bool:
    """Whether what it holds is a placement group's, which is counted as a whole."""
    return row["placement_group_id"] is not None or any("_group_" in name for name in row["required_resources"] or {})


def _job_of(actor: Row) -> str:
    """The job id; of a supervisor, whose own is that of Ray's agent, its name."""
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
    found = [_holder(row, resources[key]) for key, row in rows.items() if any(resources[key].values())]
    return tuple(sorted(found, key=lambda holder: holder.name))


def _holder(row: Row, resources: Mapping[str, float]) -> Holder:
    metadata, driver = row.get("metadata") or {}, row.get("driver_info") or {}
    # Not its command line: others' may hold secrets.
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
    """A text of somebody else's for a terminal, which takes some characters for commands."""
    return "".join(c if c.isprintable() else " " for c in text)[:most].strip()


# --- what can be added ------------------------------------------------------------------------------------------------

_V1, _V2 = "StandardAutoscaler: {", "Using Autoscaling Config:"
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", re.MULTILINE)


def _growth(log: str, there: Sequence[Mapping[str, float]]) -> Growth | None:
    """What an autoscaler can add, by the configuration that it began with, which the dashboard shows in its log alone.
    None: it is not there, or not as Ray 2.60's autoscalers write it. The rest of it may hold secrets."""
    first, second = log.rfind(_V1), log.rfind(_V2)
    found: Any
    try:
        if second > first:
            text = log[second + len(_V2) :]
            stamp = _STAMP.search(text)
            found = yaml.safe_load(text[: stamp.start()]) if stamp is not None else None
        elif first >= 0:
            found = ast.literal_eval(log[first + len(_V1) - 1 :].partition("\n")[0])
        else:
            return None
        return addable(found, there) or Growth()
    except (yaml.YAMLError, ValueError, SyntaxError, KeyError, TypeError, AttributeError):
        return None
