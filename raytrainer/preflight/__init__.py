"""All checks before a run starts: pure checks over an experiment and the results of probes.

Each check returns its problems as sentences with the key, the value and the fix; `PreflightError` has them all.
"""

from __future__ import annotations

from raytrainer.errors import PreflightError
from raytrainer.preflight.first_batch import FirstBatch, Verdict, is_free_beside_ray, why_not_tried
from raytrainer.preflight.objects import check_init_from, check_objects, unbuilt_model
from raytrainer.preflight.reach import (
    check_environment,
    check_reach,
    check_storage,
    check_tracking,
    is_elsewhere,
    is_this_machine,
    local_files,
)
from raytrainer.preflight.resources import (
    Resources,
    amount,
    bundle,
    check_resources,
    least_workers,
    per_worker,
    this_machine,
    uses_gpu,
)
from raytrainer.preflight.temporary import check_temporary

__all__ = [
    "FirstBatch",
    "Resources",
    "Verdict",
    "amount",
    "bundle",
    "check_environment",
    "check_init_from",
    "check_objects",
    "check_reach",
    "check_resources",
    "check_storage",
    "check_temporary",
    "check_tracking",
    "is_elsewhere",
    "is_free_beside_ray",
    "is_this_machine",
    "least_workers",
    "local_files",
    "per_worker",
    "refuse",
    "this_machine",
    "unbuilt_model",
    "uses_gpu",
    "why_not_tried",
]


def refuse(problems: list[str]) -> None:
    """Raise the problems, if there are any.

    Raises:
        PreflightError: `problems` is not empty.
    """
    if problems:
        raise PreflightError(problems)
