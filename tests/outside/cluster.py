"""A Ray cluster of one node for tests, as `ray start` makes it.

`python cluster.py CPUS PYTHON` prints its address, then a JSON line with what runs on it for each line on stdin. It
ends when stdin closes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TextIO

import ray
from ray.cluster_utils import Cluster


def running() -> dict[str, list[str]]:
    """Return the actors that are not dead and the placement groups that are not removed, of all jobs."""
    actors = ray._private.state.actors().values()
    groups = ray.util.placement_group_table().values()
    return {
        "actors": [f"{a['ActorClassName']} {a['State']}" for a in actors if a["State"] != "DEAD"],
        "placement_groups": [f"{g['name']} {g['state']}" for g in groups if g["state"] != "REMOVED"],
    }


def own_output() -> TextIO:
    """Reserve standard output for the answers; whatever Ray or a library prints there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def fork_rays_processes(python: str) -> None:
    """Fork Ray's processes as `tests.forkserver` does. This process does not have that module on its path."""
    sys.path.append(str(Path(__file__).parents[2]))
    from tests import forkserver

    sys.path.pop()
    forkserver.fork_rays_processes(python)


def main(cpus: int) -> None:
    answers = own_output()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    print(cluster.address, file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(running()), file=answers, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    fork_rays_processes(sys.argv[2])  # the fork server's `Server.python`
    main(int(sys.argv[1]))
