"""The nodes that a cluster can add, from its autoscaler's configuration. The caller reads that configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = "node:__internal_head__"  # a resource that only the head node has


@dataclass(frozen=True)
class Growth:
    """The nodes that a cluster's autoscaler can add to the present ones.

    Attributes:
        nodes: The resources of each.
        most: How many of them it can add at a time.
        known: False if the autoscaler's limit is unknown: KubeRay's runs beside Ray, in a separate container.
    """

    nodes: tuple[Mapping[str, float], ...] = ()
    most: int = 0
    known: bool = True


def addable(config: Mapping[str, Any], there: Sequence[Mapping[str, float]]) -> Growth | None:
    """Return what an autoscaler's configuration allows beyond the present nodes.

    Args:
        config: As a `ray up` file, with the resources of its node types filled in.
        there: The resources of each live node, including the head.
    """
    most = int(config["max_workers"] if config.get("max_workers") is not None else 2)  # Ray's default is 2
    left = {}
    for name, kind in config["available_node_types"].items():
        limit = kind.get("max_workers")
        if kind["resources"]:
            left[name] = most if limit is None else min(int(limit), most)
    for node in there:
        if HEAD in node:
            continue
        # A node does not say which type it has, so it counts as a type with the same CPUs and GPUs.
        for name in left:
            wanted = config["available_node_types"][name]["resources"]
            if left[name] and all(node.get(k, 0) == wanted.get(k, 0) for k in ("CPU", "GPU")):
                left[name] -= 1
                most -= 1
                break
    types = config["available_node_types"]
    nodes = tuple(types[name]["resources"] for name, count in left.items() for _ in range(min(count, most)))
    return Growth(nodes, max(most, 0)) if nodes else None
