"""The integration with Ray. This package uses Ray's private interfaces and sets Ray's environment variables.

cluster     start, join and leave a cluster, and query its resources
output      the output of workers
train       Ray Train: the workers of one run
schedulers  Tune's schedulers: which pause trials, and how a resumed sweep restores their records
tune        Ray Tune: the trials of a sweep
"""

from __future__ import annotations

from raytrainer.ray_internals.cluster import (
    attach,
    dead_part,
    find_cluster,
    free,
    growth,
    holders,
    nodes,
    nodes_to_come,
    prepare,
    start_embedded,
    stop,
)
from raytrainer.ray_internals.output import WorkerOutput
from raytrainer.ray_internals.schedulers import (
    draws_brackets,
    is_full_length,
    keep_own_values,
    pauses,
    record_of,
    rename,
)
from raytrainer.ray_internals.train import Retries, SupervisedTrainer, first_error, make_trainer
from raytrainer.ray_internals.tune import (
    METRIC,
    TrialController,
    TrialEvents,
    TrialSettings,
    capacity,
    make_controller,
    trial_resources,
)

__all__ = [
    "METRIC",
    "Retries",
    "SupervisedTrainer",
    "TrialController",
    "TrialEvents",
    "TrialSettings",
    "WorkerOutput",
    "attach",
    "capacity",
    "dead_part",
    "draws_brackets",
    "find_cluster",
    "first_error",
    "free",
    "growth",
    "holders",
    "is_full_length",
    "keep_own_values",
    "make_controller",
    "make_trainer",
    "nodes",
    "nodes_to_come",
    "pauses",
    "prepare",
    "record_of",
    "rename",
    "start_embedded",
    "stop",
    "trial_resources",
]
