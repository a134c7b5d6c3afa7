"""The states of a trial, and how a trial process tells the driver that its trial has ended. Both kinds of trials share
them: those of an experiment and those of any other Hydra application. This module imports neither Ray nor torch.

                 ┌────────── reopen ─────────┐      reopen: a resumed sweep continues the trial
                 v                           │      retry: a resume permits more failures than before
    start ──> RUNNING ──> STOPPED ───────────┤
                 │  ├────> FAILED ── retry ──┘
                 │  ├────> PRUNED
                 └──┴────> FINISHED
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from raytrainer.errors import NonFiniteLoss, WorkerError

# How the cause of a failure begins if every other trial would fail in the same way.
_EVERY_TRIAL_FAILS = ("ConfigError: sweep.metric=", "ConfigError: storage_path=")


class Status(StrEnum):
    """The state of a trial, as it is written in the journal, in tables and in tags."""

    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"  # the scheduler stopped it, because others were better
    FAILED = "failed"
    STOPPED = "stopped"  # the sweep ended before the trial

    @property
    def is_open(self) -> bool:
        """Whether a resumed sweep continues the trial."""
        return self in (Status.RUNNING, Status.STOPPED)


NEXT_STATUSES: Mapping[Status, frozenset[Status]] = {
    # RUNNING → RUNNING: a resumed sweep continues a trial of a driver that was killed.
    Status.RUNNING: frozenset(Status),
    Status.STOPPED: frozenset({Status.RUNNING}),
    Status.FAILED: frozenset({Status.RUNNING}),
    Status.PRUNED: frozenset(),
    Status.FINISHED: frozenset(),
}


def check_transition(trial: str, before: Status, after: Status) -> None:
    """Check that a trial can go from one state to another.

    Raises:
        RuntimeError: It cannot.
    """
    if after not in NEXT_STATUSES[before]:
        raise RuntimeError(f"trial {trial} cannot go from {before} to {after}")


@dataclass(frozen=True)
class TrialEnd:
    """The end of a trial.

    Attributes:
        status: The last state.
        cause: Why it failed.
        traceback: The traceback of the failure.
        diverged: Whether its loss became NaN or infinite, so that the same parameters would fail again.
        non_retryable: Whether every other trial would fail too.
    """

    status: Status
    cause: str | None = None
    traceback: str | None = None
    diverged: bool = False
    non_retryable: bool = False

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value})

    @classmethod
    def from_json(cls, text: str) -> TrialEnd:
        fields = json.loads(text)
        return cls(**{**fields, "status": Status(fields["status"])})


def end_by_error(error: WorkerError, *, retries: bool, trace: str | None = None) -> TrialEnd | None:
    """Return how a trial ends by an error; None if it is tried again in another process.

    Args:
        error: The error.
        retries: Whether a failed trial may be tried again.
        trace: The traceback, if it is another one than that of the error.
    """
    if retries and error.retry:
        return None
    return TrialEnd(
        Status.FAILED,
        error.cause,
        trace or error.traceback,
        diverged=is_divergence(error.cause),
        non_retryable=error.cause.startswith(_EVERY_TRIAL_FAILS),
    )


def end_by_result(
    result: Mapping[str, Any], values: Sequence[float], *, full_length: bool, needs_value: bool
) -> TrialEnd:
    """Return how a trial ended by its last result.

    Args:
        result: The last result that Tune got.
        values: The values of all of its evaluations.
        full_length: Whether the trial has reached the full length of a trial.
        needs_value: Whether a trial without a finite value counts as failed.
    """
    if "end" in result:
        end = TrialEnd.from_json(result["end"])
    else:  # Tune stopped it because it was worse than others, or because it reached the full length of a trial
        end = TrialEnd(Status.FINISHED if full_length else Status.PRUNED)
    if needs_value and end.status is not Status.FAILED and values and not any(map(math.isfinite, values)):
        cause = f"diverged: all of its {len(values)} values are nan or infinite"
        return TrialEnd(Status.FAILED, cause, diverged=True)
    return end


def is_divergence(cause: str | None) -> bool:
    """Return whether a trial's cause says that its loss became NaN or infinite."""
    return cause is not None and NonFiniteLoss.__name__ in cause.partition(":")[0]
