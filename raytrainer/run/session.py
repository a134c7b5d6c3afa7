"""A Ray for the time of one launch: started here or joined, left again whatever happens in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from raytrainer import garbage, preflight
from raytrainer.config import Experiment
from raytrainer.interrupts import Interrupts


@contextlib.contextmanager
def ray_session(e: Experiment, interrupts: Interrupts, *, all_of_it: bool = False) -> Iterator[preflight.Resources]:
    """Ray as `cluster` says, and ended with everything of ours that runs on it; yields what it has.

    Args:
        e: The experiment.
        interrupts: Signals, while it starts.
        all_of_it: As `cluster_resources`.

    Raises:
        Interrupted: A signal came while it started.
    """
    import ray

    from raytrainer import supervise

    supervise.prepare(embedded=e.cluster.kind == "local")
    available = preflight.this_machine()
    try:
        if e.cluster.kind == "local":
            interrupts.deferred = True  # half a Ray would leave processes behind
            supervise.start_embedded(int(available.cpus), int(available.gpus), available.memory)
            interrupts.deferred = False
        else:
            if not ray.is_initialized():
                supervise.attach(e.cluster.address or "auto", e.cluster.runtime_env, e.name or "")
            available = cluster_resources(e, all_of_it=all_of_it)
        interrupts.install()  # Ray's core sets a handler of SIGTERM below Python's, which prints its stack
        interrupts.check()
        garbage.collect_as_usual()
        yield available
    finally:
        interrupts.deferred = True
        supervise.stop()


def cluster_resources(e: Experiment, *, all_of_it: bool = False) -> preflight.Resources:
    """What the cluster that this process has joined has and, where that is too little, may have when it grows.

    Args:
        e: The experiment.
        all_of_it: Whether what it may have is asked for also where enough is there: of a sweep, which takes all.
    """
    from raytrainer import supervise

    nodes = supervise.nodes()
    now = preflight.Resources.of_nodes(nodes)
    enough = not preflight.check_resources(e, now, "") and (e.scaling.use_gpu != "auto" or preflight.uses_gpu(e, now))
    if (enough and not all_of_it) or (growth := supervise.growth()) is None:
        return now
    return preflight.Resources.of_nodes(nodes, growth.nodes, growth.most, endless=not growth.known)
