"""Tests of the messages about resources that a job waits for, who holds them, or that a cluster can never provide."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import pytest

from raytrainer.backends.jobs_api.facts import ClusterFacts, Holder, explain_waiting, impossible
from raytrainer.config import Experiment, compose

ADDRESS = "http://ray:8265"
NODE = {"CPU": 8.0, "GPU": 4.0, "memory": 64 * 2.0**30, "node:10.0.0.1": 1.0}
NOW = 1_000_000.0


def facts(**fields: Any) -> ClusterFacts:
    nodes = fields.pop("nodes", (NODE, NODE))
    return ClusterFacts(ADDRESS, metadata.version("ray"), "3.12.1", nodes, fields.pop("free", nodes), **fields)


def holding(name: str, since: float | None = 0.0, user: str | None = None, **resources: float) -> Holder:
    return Holder(name, user, name, resources, None if since is None else NOW - since)


def free(**resources: float) -> tuple[Mapping[str, float], ...]:
    return ({**NODE, **resources}, {**NODE, **resources})


def experiment(*overrides: str) -> Experiment:
    to = ["cluster=job", f"cluster.address={ADDRESS}", "scaling.use_gpu=false"]
    return compose(["experiment=mlp", *to, *overrides]).experiment


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_what_is_missing_and_who_has_it() -> None:
    holders = (
        holding("resnet-a", 3 * 3600, "anna", GPU=6.0, CPU=2.0),
        holding("nobody", 90, CPU=1.0),
        holding("mine", 5, GPU=1.0),
        holding("notebook", None, GPU=1.0),
    )
    said = explain_waiting([[{"GPU": 1.0, "CPU": 1.0}] * 2], facts(free=free(GPU=0.0), holders=holders), "mine", NOW)
    assert said == "for 2 GPUs: 0 of 8 GPUs free; resnet-a (anna) holds 6 GPUs for 3 h; notebook holds 1 GPU"


@pytest.mark.parametrize(
    ("since", "words"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (90_000, "25 h"), (172_800, "2 days"), (-5, "0 s")],
)
def test_for_how_long(since: float, words: str) -> None:
    known = facts(free=free(GPU=0.0), holders=(holding("a", since, GPU=8.0),))
    assert explain_waiting([[{"GPU": 1.0}]], known, now=NOW).endswith(f"a holds 8 GPUs for {words}")


def test_several_resources_and_many_holders() -> None:
    known = facts(
        free=free(CPU=1.0, GPU=0.0, memory=2.0**30),
        holders=tuple(holding(f"run-{i}", 0, CPU=1.0 + i) for i in range(7)),
        may_grow=True,
    )
    said = explain_waiting([[{"CPU": 4.0, "memory": 3 * 2.0**30}]], known, now=NOW)
    assert said.startswith(
        "for 4 CPUs, 3.0 GiB of memory: 2 of 16 CPUs free, 2.0 of 128.0 GiB of memory free; run-6 holds 7"
    )
    assert "run-2" in said
    assert "run-1" not in said
    assert said.endswith("2 other jobs hold the rest; the cluster can add nodes")


def test_enough_but_not_together() -> None:
    said = explain_waiting([[{"GPU": 3.0}]], facts(free=free(GPU=2.0), holders=(holding("a", 0, GPU=4.0),)), now=NOW)
    assert said == "for 3 GPUs: enough is free, but at most 2 GPUs on one node; a holds 4 GPUs for 0 s"
    assert explain_waiting([[{"GPU": 2.0}] * 2], facts(free=free(GPU=2.0))) == (
        "for 4 GPUs: enough is free, and it is about to be placed"
    )


def test_what_comes_one_after_the_other_is_possible() -> None:
    one = [{"GPU": 3.0}]  # must fit on one node
    assert "never" not in explain_waiting([one, one, one], facts(free=free(GPU=0.0)))
    assert "the job can never run" in explain_waiting([one * 3], facts(free=free(GPU=0.0)))


# --- resources that the cluster can never provide ---------------------------------------------------------------------


def test_what_can_never_be() -> None:
    assert impossible([{"GPU": 4.0}] * 2, facts()) is None
    assert (
        impossible([{"GPU": 1.0}] * 9, facts()) == f"9 GPUs asked for, and {ADDRESS} has 8 GPUs: the job can never run"
    )
    assert impossible([{"TPU": 1.0}], facts()) == f"1 TPU asked for, and {ADDRESS} has 0 TPU: the job can never run"
    assert impossible([{"GPU": 3.0}] * 3, facts(nodes=(NODE,) * 3 + ({"CPU": 1.0},))) is None
    said = impossible([{"GPU": 3.0, "CPU": 1.0}] * 2, facts(nodes=(NODE, {"GPU": 2.0, "CPU": 8.0})))
    assert said == f"2 × (1 CPU, 3 GPUs), each on one node, and {ADDRESS} has room for 1: the job can never run"


def test_what_can_once_it_has_grown() -> None:
    assert "the job can never run" in str(impossible([{"GPU": 4.0}] * 5, facts()))
    assert impossible([{"GPU": 4.0}] * 5, facts(may_grow=True)) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["scaling.num_workers=16"], None),
        (["scaling.num_workers=17"], f"17 CPUs, and the cluster at {ADDRESS} has 16 CPUs; scaling.num_workers=16 fits"),
        (["scaling.num_workers=[2,40]"], None),
        (
            ["scaling.resources_per_worker={CPU: 9}", "scaling.num_workers=1"],
            "a worker asks for 9 CPUs, and no node of",
        ),
        (["cluster.driver_resources={CPU: 1}", "scaling.num_workers=15"], None),
        (
            ["cluster.driver_resources={CPU: 1}", "scaling.num_workers=16"],
            f"cluster.driver_resources={{CPU: 1}} and the workers: 17 CPUs asked for, and {ADDRESS} has 16 CPUs",
        ),
        (["cluster.driver_resources={GPU: 5}"], "cluster.driver_resources={GPU: 5}: 1 × (5 GPUs), each on one node"),
        (["cluster.driver_resources={CPU: 0}", "scaling.num_workers=16"], None),
    ],
)
def test_a_run_that_never_fits(overrides: list[str], said: str | None) -> None:
    found = facts().problems(experiment(*overrides))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ray", "python", "said"),
    [
        ("2.60.0", "3.11.0", None),
        ("2.61.0rc1", "3.13.2", None),
        ("2.60.0", None, None),
        ("2.57.0", "3.11.0", None),
        ("2.56.1", "3.12.1", "has ray 2.56.1, and this raytrainer supports ray>=2.57,<2.62 there"),
        ("2.62.0", "3.12.1", "has ray 2.62.0, and this raytrainer supports ray>=2.57,<2.62 there"),
        ("3.0.0", "3.12.1", "has ray 3.0.0, and this raytrainer supports ray>=2.57,<2.62 there"),
        ("2.60.0", "3.10.14", "has Python 3.10.14, and this raytrainer supports Python>=3.11 there"),
        ("", "3.12.1", "has ray , and"),
    ],
)
def test_versions_that_cannot_work(ray: str, python: str | None, said: str | None) -> None:
    found = ClusterFacts(ADDRESS, ray, python, ()).version_problem()
    assert (found is None) == (said is None)
    assert said is None or f"{ADDRESS} {said}" in str(found)
