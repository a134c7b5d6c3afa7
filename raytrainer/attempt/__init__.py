"""One attempt of a run or a sweep, from the checks before it to its final status.

launching   check and launch a run           driver         what an attempt of a run does
locking     the lock on the directory        ray_training   training with Ray Train
lifecycle   the phases of an attempt         waiting        what a run waits for
work        what a driver implements         session        starting and joining Ray
record      `run.json`, its MLflow tags      outcome        how it ended, as text
log_files   the files of driver and ranks
"""

from __future__ import annotations

from raytrainer.attempt.launching import check, launch, probe_first_batch
from raytrainer.attempt.log_files import Logs
from raytrainer.attempt.outcome import Outcome, summary, table, took
from raytrainer.attempt.record import (
    CONFIG,
    FIXED,
    STOP,
    SUBMITTED,
    Record,
    StopRequest,
    changes_meaning,
    tracking_uri,
    written_storage_path,
)

__all__ = [
    "CONFIG",
    "FIXED",
    "STOP",
    "SUBMITTED",
    "Logs",
    "Outcome",
    "Record",
    "StopRequest",
    "changes_meaning",
    "check",
    "launch",
    "probe_first_batch",
    "summary",
    "table",
    "took",
    "tracking_uri",
    "written_storage_path",
]
