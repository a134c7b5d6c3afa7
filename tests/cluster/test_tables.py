"""Tests of reading Ray's tables. Rows are as in the dashboard of Ray 2.60, with only the columns that are read."""

from __future__ import annotations

from typing import Any

import pytest

from raytrainer.backends.jobs_api import tables
from raytrainer.backends.jobs_api.facts import Holder
from raytrainer.backends.jobs_api.tables import SUPERVISOR, Tables

HEAD, OTHER = "node-1", "node-2"


def node(id_: str, state: str = "ALIVE", *more: str) -> dict[str, Any]:
    own = dict.fromkeys([f"node:{id_}", *more], 1.0)
    return {"node_id": id_, "state": state, "resources_total": {"CPU": 4.0, "GPU": 2.0, **own}}


def actor(job: str, pid: int = 0, state: str = "ALIVE", name: str = "", place: str | None = HEAD, **more: Any) -> Any:
    row = {"job_id": job, "pid": pid, "state": state, "name": name, "node_id": place if pid else None}
    return {**row, "placement_group_id": None, "required_resources": {"CPU": 1.0}, **more}


def task(job: str, worker: str, **more: Any) -> dict[str, Any]:
    row = {"job_id": job, "worker_id": worker, "state": "RUNNING", "type": "NORMAL_TASK", "node_id": HEAD}
    return {**row, "placement_group_id": None, "required_resources": {"CPU": 1.0}, **more}


def group(job: str, state: str, *bundles: tuple[dict[str, float], str | None]) -> dict[str, Any]:
    rows = [{"unit_resources": resources, "node_id": place} for resources, place in bundles]
    return {"creator_job_id": job, "state": state, "bundles": rows}


def job(id_: str | None, submission: str | None, **more: Any) -> dict[str, Any]:
    driver = {"id": id_, "node_ip_address": "10.0.0.1", "pid": "77"} if id_ else None
    row = {"job_id": id_, "submission_id": submission, "driver_info": driver, "metadata": {}, "start_time": 5000}
    return {**row, **more}


def worker(id_: str, pid: int, type_: str = "WORKER", place: str = HEAD) -> dict[str, Any]:
    return {"worker_id": id_, "pid": pid, "worker_type": type_, "node_id": place}


# A run with two workers that have a GPU each, a notebook, and a submission that waits.
ROWS = Tables(
    nodes=[node(HEAD, "ALIVE", "node:__internal_head__"), node(OTHER), node("gone", "DEAD")],
    groups=[
        group("02000000", "CREATED", ({"CPU": 1.0, "GPU": 1.0}, HEAD), ({"CPU": 1.0, "GPU": 1.0}, OTHER)),
        group("02000000", "REMOVED", ({"CPU": 4.0}, HEAD)),
        group("04000000", "PENDING", ({"GPU": 2.0}, None), ({"GPU": 2.0}, None)),
        group("04000000", "RESCHEDULING", ({"GPU": 1.0}, OTHER), ({"GPU": 1.0}, None)),
    ],
    actors=[
        actor("01000000", 10, name=f"{SUPERVISOR}resnet-a", required_resources={"CPU": 0.5}),
        actor("02000000", 20, placement_group_id="g", required_resources={"CPU_group_g": 1.0}),
        actor("02000000", 21, required_resources={"CPU_group_0_g": 1.0}),
        actor("02000000", 22, required_resources={}),
        actor("03000000", 30, place=OTHER),
        actor("04000000", 0, "PENDING_CREATION", required_resources={"CPU": 8.0}),
        actor("04000000", 0, "PENDING_CREATION", placement_group_id="h"),
        actor("04000000", 0, "PENDING_CREATION", required_resources={}),
    ],
    tasks=[task("03000000", "w3"), task("03000000", "w4", type="ACTOR_TASK")],
    jobs=[
        job("02000000", "resnet-a", metadata={"raytrainer.name": "resnet-a", "raytrainer.user": "anna\x1b]0;x\x07"}),
        job("03000000", None),
        job("04000000", "waits"),
        job(None, "starts"),
    ],
)


def test_who_holds_what_and_what_is_free() -> None:
    found = tables.read("http://x", "2.60.0", "3.12.1", ROWS, True)
    assert found.holders == (
        Holder("a driver on 10.0.0.1 (process 77)", None, None, {"CPU": 2.0}, 5.0),
        Holder("resnet-a", "anna ]0;x", "resnet-a", {"CPU": 2.5, "GPU": 2.0}, 5.0),
        Holder("waits", None, "waits", {"GPU": 1.0}, 5.0),
    )
    assert [node["CPU"] for node in found.free] == [1.5, 2.0]
    assert [node["GPU"] for node in found.free] == [1.0, 0.0]
    assert (found.total["CPU"], found.available["GPU"]) == (8.0, 1.0)
    assert found.may_grow


def test_what_a_submission_asks_for() -> None:
    assert tables.asked_by("waits", ROWS) == [[{"GPU": 2.0}, {"GPU": 2.0}], [{"GPU": 1.0}], [{"CPU": 8.0}]]
    assert tables.asked_by("resnet-a", ROWS) == []
    waiting = actor("01000000", 0, "PENDING_CREATION", f"{SUPERVISOR}starts", required_resources={"CPU": 2.0})
    assert tables.asked_by("starts", Tables(actors=[waiting], jobs=ROWS.jobs)) == [[{"CPU": 2.0}]]
    assert tables.asked_by("unknown", ROWS) == []


def test_what_a_submission_still_has() -> None:
    workers = [worker("s", 10), worker("w2", 20), worker("02000000ffff", 77, "DRIVER"), worker("w3", 30, place=OTHER)]
    living = Tables(actors=ROWS.actors, groups=ROWS.groups, tasks=ROWS.tasks, jobs=ROWS.jobs, workers=workers)
    assert tables.held_by("resnet-a", living) == {"CPU": 2.5, "GPU": 2.0, "processes": 3.0}
    # Its actors are dead, but one of their processes has not ended.
    dead = [actor("02000000", pid, "DEAD") for pid in (20, 21)]
    assert tables.held_by("resnet-a", Tables(actors=dead, jobs=ROWS.jobs, workers=workers[1:2])) == {"processes": 1.0}
    # The same process id on another node, and another job's driver, do not count.
    others = [worker("x", 20, place=OTHER), worker("20000000ffff", 78, "DRIVER")]
    assert tables.held_by("resnet-a", Tables(actors=dead, jobs=ROWS.jobs, workers=others)) == {}


def test_a_task_that_was_killed_holds_nothing() -> None:
    rows = Tables(tasks=[task("02000000", "w2")], jobs=ROWS.jobs)
    assert tables.held_by("resnet-a", rows) == {}
    living = Tables(tasks=rows.tasks, jobs=rows.jobs, workers=[worker("w2", 20)])
    assert tables.held_by("resnet-a", living) == {"CPU": 1.0, "processes": 1.0}


# --- growth -----------------------------------------------------------------------------------------------------------


def status(**types: str) -> dict[str, Any]:
    """Return the part of an answer of `/api/cluster_status` that is read: node → its type."""
    return {"data": {"clusterStatus": {"autoscalerReport": {"nodeTypeMapping": types}}}}


@pytest.mark.parametrize(
    ("answer", "grows"),
    [
        (status(a1="node_a1", b2="node_b2"), False),  # the monitor of a fixed cluster
        (status(a1="head"), True),
        (status(a1="head", b2="gpu"), True),
        (status(), True),
        ({"data": {"clusterStatus": {"loadMetricsReport": {}}}}, True),  # its first report is still to come
        ({"data": {"clusterStatus": None}}, True),  # the second version of the autoscaler
        ({}, True),
    ],
)
def test_whether_it_may_grow(answer: dict[str, Any], grows: bool) -> None:
    assert tables.may_grow(answer) is grows


def test_a_cluster_that_is_being_started() -> None:
    found = tables.read("http://x", "2.60.0", None, Tables(nodes=[node("gone", "DEAD")]), False)
    assert (found.nodes, found.may_grow) == ((), True)
