"""Tests of how a job ended: its status, exit code and one-line cause, whatever part of the log Ray quotes."""

from __future__ import annotations

import pytest

from raytrainer.errors import ConfigError, PreflightError, RaytrainerError
from raytrainer.submission.ending import Ending, ending_of, one_line
from tests.runs.past import FakeJob


def message(code: int, *log: str) -> str:
    """Return the message that Ray 2.60 writes when a driver has ended."""
    return "\n".join(
        [f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):", *log]
    )


REFUSAL = "raytrainer: refused: model.width=-1 must be positive"


@pytest.mark.parametrize(
    ("job", "ending"),
    [
        (FakeJob(submission_id="x", status="SUCCEEDED"), Ending("FINISHED", 0)),
        (FakeJob(submission_id="x", status="STOPPED"), Ending("KILLED", 143, "the job was stopped")),
        (
            FakeJob(
                submission_id="x",
                status="FAILED",
                message=message(2, "raytrainer: job x on node", REFUSAL),
                exit_code=2,
            ),
            Ending("REFUSED", 2, "model.width=-1 must be positive"),
        ),
        (
            FakeJob(
                submission_id="x",
                status="FAILED",
                message=message(1, "epoch 1", "outcome  failed", "cause    rank 0: bad", "where    Ray"),
                exit_code=1,
            ),
            Ending("FAILED", 1, "rank 0: bad"),
        ),
        (
            FakeJob(
                submission_id="x",
                status="FAILED",
                message=message(143, "raytrainer: stopped: stopped by SIGTERM"),
                exit_code=143,
            ),
            Ending("KILLED", 143, "stopped by SIGTERM"),
        ),
        (
            FakeJob(submission_id="x", status="FAILED", message=message(2, "nothing of ours"), exit_code=2),
            Ending("REFUSED", 2, "exit code 2; the last lines of its log say why"),
        ),
        (
            FakeJob(submission_id="x", status="FAILED", message=message(-9, "epoch 1", "epoch 2"), exit_code=-9),
            Ending("FAILED", 1, "Job entrypoint command failed with exit code -9", reported=False),
        ),
        (FakeJob(submission_id="x", status="FAILED"), Ending("FAILED", 1, "Ray does not say why", reported=False)),
    ],
)
def test_how_a_job_ended(job: FakeJob, ending: Ending) -> None:
    assert ending_of(job) == ending


def test_a_long_message_becomes_a_line() -> None:
    text = "runtime_env setup failed: Failed to set up runtime environment.\nCould not create the actor.\nTraceback\n"
    text += "RuntimeError: pip failed\n  ERROR: No matching distribution found for no-such-package\nset up"
    first = "runtime_env setup failed: Failed to set up runtime environment."
    assert one_line(text) == f"{first}: ERROR: No matching distribution found for no-such-package"
    assert one_line("the supervisor\n died") == "the supervisor died"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("is no number", key="optimizer.lr", value="x"),
        PreflightError([f"problem {number}" for number in range(40)]),
        ConfigError("has\nlines", key="model"),
    ],
)
def test_the_last_line_of_the_entrypoint_has_the_cause(
    error: RaytrainerError, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray keeps the last ten lines of a log, and a refusal may be longer; the cause is still found."""
    from raytrainer.submission import entrypoint

    entrypoint._say_end("refused", error)
    lines = capsys.readouterr().err.splitlines()
    assert set(str(error).splitlines()) <= {line.removeprefix("raytrainer: refused: ").strip() for line in lines}
    ending = ending_of(FakeJob(submission_id="x", status="FAILED", message=message(2, *lines[-10:]), exit_code=2))
    assert ending.status == "REFUSED"
    assert (ending.cause or "").startswith(str(error).splitlines()[0])
