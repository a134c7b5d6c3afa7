"""The end of a job on a shared cluster: the run's status, the exit code, and the cause in one line.

Ray and KubeRay quote the end of a job's log in its message. The entrypoint prints the cause as one line of that log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

REFUSED = 2  # the exit code of an entrypoint that refused the run and started nothing
# The exit codes by which the entrypoint says how the run ended. With any other exit code its driver was killed.
STATUSES = {0: "FINISHED", 1: "FAILED", REFUSED: "REFUSED", 129: "KILLED", 130: "KILLED", 143: "KILLED"}
_MOST = 500  # characters of a cause
_FEW = 3  # lines: a wrapped sentence from Ray; more lines are a traceback

_REPORTED = re.compile(r"raytrainer: (?:refused|failed|stopped): (.+)")
_ROW = re.compile(r"cause    (.+)")  # in a summary
_LOG = ", last available logs"
_ERROR = re.compile(r"(?:[\w.]+(?:Error|Exception)|ERROR)\b.*")


class EndedJob(Protocol):
    """The part of a job that says how it ended."""

    @property
    def status(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def exit_code(self) -> int | None: ...


@dataclass(frozen=True)
class Ending:
    """The end of a job.

    Attributes:
        status: FINISHED, FAILED, KILLED or REFUSED.
        exit_code: The exit code for the command that submitted the job.
        cause: One line that says why the job did not finish; None if it finished.
        reported: Whether the entrypoint reported how the run ended. Otherwise its driver was killed or never started.
    """

    status: str
    exit_code: int
    cause: str | None = None
    reported: bool = True


def ending_of(job: EndedJob) -> Ending:
    """Return how a job ended. The job must be neither PENDING nor RUNNING."""
    if job.status == "SUCCEEDED":
        return Ending("FINISHED", 0)
    if job.status == "STOPPED":
        return Ending("KILLED", 143, "the job was stopped")
    if job.exit_code in STATUSES:
        cause = _printed_cause(job.message) or f"exit code {job.exit_code}; the last lines of its log say why"
        return Ending(STATUSES[job.exit_code], job.exit_code, cause)
    return Ending("FAILED", 1, one_line(job.message) or "Ray does not say why", reported=False)


def one_line(message: str) -> str:
    """Return a job's message without its log. Of a long message, keep the first line and the last error in it."""
    head, _, _ = message.partition(_LOG)
    lines = [" ".join(line.split()) for line in head.splitlines() if line.strip()]
    if len(lines) <= _FEW:
        return " ".join(lines)[:_MOST]
    errors = [line for line in lines[1:] if _ERROR.match(line)]
    return ": ".join([lines[0].rstrip(":"), *errors[-1:]])[:_MOST]


def _printed_cause(message: str) -> str | None:
    """Return the cause that the entrypoint printed last."""
    lines = message.splitlines()
    for pattern in (_REPORTED, _ROW):
        causes = [match[1].strip() for line in lines if (match := pattern.search(line))]
        if causes:
            return causes[-1][:_MOST]
    return None
