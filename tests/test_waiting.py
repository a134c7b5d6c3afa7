"""Messages while a run waits for resources: what is missing, who holds it, what is on its way, and not too often."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

from raytrainer.attempt.waiting import Waiting, selected_nodes
from raytrainer.preflight import Resources
from raytrainer.progress import Display
from raytrainer.ray_internals.autoscaling import addable
from tests.terminal import Terminal


class Cluster:
    """A stand-in for `ray_internals`."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, float]] = {}
        self.coming: dict[str, int] = {}
        self.failed: list[str] = []
        self.available = {"CPU": 1.0, "GPU": 0.0}

    def free(self) -> Mapping[str, float]:
        return self.available

    def holders(self) -> Mapping[str, Mapping[str, float]]:
        return self.held

    def nodes_to_come(self) -> tuple[Mapping[str, int], list[str]]:
        return self.coming, self.failed


def lines(
    cluster: Cluster, times: list[float], available: Resources | None = None, waits: list[bool] | None = None
) -> list[str]:
    stream = io.StringIO()
    wanted = {"CPU": 4.0, "GPU": 2.0, "memory": 0.0}
    waiting = Waiting(Display(stream), cluster, wanted, available or Resources(8, 2))
    for time, yes in zip(times, waits or [True] * len(times), strict=True):
        waiting.look(lambda yes=yes: yes, time)  # type: ignore[misc]
    return stream.getvalue().splitlines()


def test_what_is_missing_and_who_holds_it() -> None:
    cluster = Cluster()
    cluster.held = {"run-b": {"GPU": 2.0, "CPU": 4.0, "TPU": 1.0}, "run-a": {"GPU": 1.0}, "run-c": {"TPU": 1.0}}
    (line,) = lines(cluster, [100.0, 103.0])
    assert line == (
        "waiting for 4 CPUs, 2 GPUs (0:03): 1 CPU free, 0 GPUs free; run-a holds 1 GPU; run-b holds 2 GPUs, 4 CPUs"
    ).replace("2 GPUs, 4 CPUs", "4 CPUs, 2 GPUs")


def test_which_nodes_it_waits_for() -> None:
    stream = io.StringIO()
    nodes = selected_nodes("A100", {"zone": "a"})
    waiting = Waiting(Display(stream), Cluster(), {"CPU": 1.0}, Resources(8), nodes)
    waiting.look(lambda: True, 0.0)
    waiting.look(lambda: True, 3.0)
    assert stream.getvalue() == "waiting for 1 CPU on nodes with A100, zone=a (0:03): 1 CPU free\n"
    assert selected_nodes(None, None) == ""


def test_nodes_on_their_way_and_those_that_do_not_come() -> None:
    cluster = Cluster()
    grows = Resources.of_nodes([{"CPU": 1}], [{"CPU": 8, "GPU": 4}], 1)
    assert lines(cluster, [0, 3], grows)[0].endswith("; the cluster adds nodes")
    cluster.coming, cluster.failed = {"gpu": 2}, ["gpu: InsufficientInstanceCapacity"]
    (line,) = lines(cluster, [0, 3], grows)
    assert line.endswith("; the cluster adds nodes: 2 × gpu; it could not add gpu: InsufficientInstanceCapacity")


def test_it_is_said_every_ten_seconds_and_later_once_a_minute() -> None:
    said = lines(Cluster(), [float(t) for t in range(301)])
    assert [line.split("(")[1].split(")")[0] for line in said] == [
        *("0:03", "0:13", "0:23", "0:33", "0:43", "0:53", "1:53", "2:53", "3:53", "4:53")
    ]


def test_a_place_that_comes_at_once_is_not_worth_a_word() -> None:
    assert lines(Cluster(), [0, 1, 2, 3, 4], waits=[True, True, False, False, False]) == []


def test_a_restart_that_waits_is_told_too() -> None:
    said = lines(Cluster(), [0, 1, 50, 52, 53], waits=[True, False, True, True, True])
    assert [line.split(":")[0] + ":" + line.split(":")[1][:2] for line in said] == ["waiting for 4 CPUs, 2 GPUs (0:03"]


def test_a_cluster_that_does_not_answer_ends_no_run() -> None:
    class Silent(Cluster):
        def free(self) -> Mapping[str, float]:
            raise RuntimeError("no answer")

    (line,) = lines(Silent(), [0, 3])
    assert line.endswith("the cluster does not say why (RuntimeError)")


def test_on_a_terminal_it_is_one_line_that_goes() -> None:
    terminal = Terminal()
    waiting = Waiting(Display(terminal), Cluster(), {"CPU": 2.0}, Resources(8))
    for time in range(30):
        waiting.look(lambda: True, float(time))
    assert "\n".join(terminal.screen()).strip() == "waiting for 2 CPUs (0:23): 1 CPU free"
    waiting.look(lambda: False, 30.0)
    assert "\n".join(terminal.screen()).strip() == ""


TYPES = {
    "max_workers": 3,
    "available_node_types": {
        "head": {"resources": {"CPU": 2}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        "cpu": {"resources": {"CPU": 4}, "max_workers": None},
        "unknown": {"resources": {}, "max_workers": 4},
    },
}
HEAD = {"CPU": 2.0, "node:__internal_head__": 1.0}


@pytest.mark.parametrize(
    ("there", "most", "gpus", "cpu_nodes"),
    [
        ([HEAD], 3, 2, 3),
        ([HEAD, {"CPU": 8.0, "GPU": 1.0, "memory": 1e9}], 2, 1, 2),
        ([HEAD, *[{"CPU": 8.0, "GPU": 1.0}] * 2], 1, 0, 1),
        ([HEAD, {"CPU": 64.0}], 3, 2, 3),  # a node was added by hand
    ],
)
def test_what_an_autoscaler_can_add(there: list[dict[str, float]], most: int, gpus: int, cpu_nodes: int) -> None:
    found = addable(TYPES, there)
    assert found is not None
    assert found.most == most
    assert sum(node.get("GPU", 0) for node in found.nodes) == gpus
    assert sum("GPU" not in node for node in found.nodes) == cpu_nodes


def test_a_cluster_that_is_full_grows_no_more() -> None:
    assert addable(TYPES, [HEAD, *[{"CPU": 4.0}] * 3]) is None
