"""A Ray for the time of one launch: started here or joined, left again whatever happens in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from raytrainer import preflight
from raytrainer.config import Experiment
from raytrainer.interrupts import Interrupts


@contextlib.contextmanager
def ray_session(e: Experiment, interrupts: Interrupts) -> Iterator[preflight.Resources]:
    """Ray as `cluster` says, and ended with everything of ours that runs on it; yields what it has.

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
                supervise.attach(e.cluster.address or "auto", e.cluster.runtime_env)
            available = preflight.Resources.of_ray(ray.cluster_resources())
        interrupts.install()  # Ray's core sets a handler of SIGTERM below Python's, which prints its stack
        interrupts.check()
        yield available
    finally:
        interrupts.deferred = True
        supervise.stop()
