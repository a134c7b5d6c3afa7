"""Requests to shared clusters, and how they are sent: for backends that submit, in raytrainer and in other packages.

    job_backend  the common part of such backends         request     a complete submission, as one value
    sending      from a request to a job and its end      secrets     what must not be sent
    code         the code that goes along: `package`, `sent_files`, `imports`, `sizes`
    entrypoint   the driver of a job, on the cluster      ending      how a job ended, and its cause in one line

The driver on the cluster does not need the cluster's client, and a submission does not need the driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.submission.entrypoint import MOUNTED
    from raytrainer.submission.job_backend import JobBackend
    from raytrainer.submission.request import Request, Sources
    from raytrainer.submission.sending import Submission

# These names are for backends of other packages.
__all__ = ["MOUNTED", "JobBackend", "Request", "Sources", "Submission"]

_HOMES = {
    "JobBackend": "job_backend",
    "MOUNTED": "entrypoint",
    "Request": "request",
    "Sources": "request",
    "Submission": "sending",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.submission' has no attribute {name!r}")
    return getattr(import_module(f"raytrainer.submission.{_HOMES[name]}"), name)
