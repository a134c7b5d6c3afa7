"""How far a cluster can grow, by the configuration of its autoscaler; whoever has that, from wherever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEAD = "node:__internal_head__"  # a resource that the head node alone has


@dataclass(frozen=True)
class Growth:
    """The nodes that a cluster's autoscaler can add to those that are there.

    Attributes:
        nodes: What each has.
        most: How many of them at a time.
        known: False where the autoscaler does not say: KubeRay's runs beside Ray, in a container of its own.
    """

    nodes: tuple[Mapping[str, float], ...] = ()
    most: int = 0
    known: bool = True


def addable(config: Mapping[str, Any], there: Sequence[Mapping[str, float]]) -> Growth | None:
    """What an autoscaler's configuration allows beyond the nodes that are there.

    Args:
        config: As a `ray up` file, its node types' resources filled in.
        there: What each living node has, the head included.
    """
    most = int(config["max_workers"] if config.get("max_workers") is not None else 2)  # Ray's default
    left = {}
    for name, kind in config["available_node_types"].items():
        limit = kind.get("max_workers")
        if kind["resources"]:
            left[name] = most if limit is None else min(int(limit), most)
    for node in there:
        if HEAD in node:
            continue
        # A node does not say of which type it is: one with the same CPUs and GPUs is.
        for name in left:
            wanted = config["available_node_types"][name]["resources"]
            if left[name] and all(node.get(k, 0) == wanted.get(k, 0) for k in ("CPU", "GPU")):
                left[name] -= 1
                most -= 1
                break
    types = config["available_node_types"]
    found = tuple(types[name]["resources"] for name, count in left.items() for _ in range(min(count, most)))
    return Growth(found, max(most, 0)) if found else None
