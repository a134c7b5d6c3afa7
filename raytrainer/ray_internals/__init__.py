"""The integration with Ray. Only this package uses private parts of Ray, Ray Train and Ray Tune, and sets Ray's
environment variables.

cluster        start, join and leave a cluster
cluster_state  query the resources of a cluster
autoscaling    how far a cluster can grow
output         the output of workers
train          Ray Train: the workers of one run
tune           Ray Tune: the trials of a sweep
schedulers     Tune's schedulers: which ones pause trials, and how a resumed sweep restores their records
job_client     Ray's client of the Jobs API

`tests/contracts/private_parts.py` lists each private part and what it is used for. Names are imported when they are
first used, because the client of the Jobs API needs neither Ray Train nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.ray_internals.cluster import (
        VersionMismatch,
        attach,
        dead_part,
        find_cluster,
        prepare,
        start_embedded,
        stop,
    )
    from raytrainer.ray_internals.cluster_state import free, growth, holders, nodes, nodes_to_come
    from raytrainer.ray_internals.job_client import JobClient
    from raytrainer.ray_internals.output import WorkerOutput
    from raytrainer.ray_internals.schedulers import (
        METRIC,
        draws_brackets,
        is_full_length,
        keep_own_values,
        pauses,
        record_of,
        rename,
    )
    from raytrainer.ray_internals.train import Retries, SupervisedTrainer, first_error, make_trainer
    from raytrainer.ray_internals.tune import (
        TrialController,
        TrialEvents,
        TrialSettings,
        capacity,
        make_controller,
        trial_resources,
    )

__all__ = [
    "METRIC",
    "JobClient",
    "Retries",
    "SupervisedTrainer",
    "TrialController",
    "TrialEvents",
    "TrialSettings",
    "VersionMismatch",
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

_NAMES = {
    "cluster": "VersionMismatch attach dead_part find_cluster prepare start_embedded stop",
    "job_client": "JobClient",
    "output": "WorkerOutput",
    "cluster_state": "free growth holders nodes nodes_to_come",
    "schedulers": "METRIC draws_brackets is_full_length keep_own_values pauses record_of rename",
    "train": "Retries SupervisedTrainer first_error make_trainer",
    "tune": "TrialController TrialEvents TrialSettings capacity make_controller trial_resources",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.ray_internals' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"raytrainer.ray_internals.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
