"""Which failure of a worker group is the cause, and which failures are retried; driven by hand, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from raytrainer import ray_internals
from raytrainer.errors import WorkerError
from raytrainer.progress import to_line
from raytrainer.ray_internals import Retries, cluster, first_error, train


def group(failures: dict[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError("workers failed", failures)


def raised(cause: str, rank: int, when: float, *, retry: bool = True) -> WorkerError:
    return WorkerError(cause, rank=rank, when=when, retry=retry, traceback=f"Traceback: {cause}")


def died() -> Exception:
    error: Exception = ray.exceptions.RayActorError(error_msg="it is gone")
    return error


def test_first_exception_is_the_cause() -> None:
    error = first_error(
        group(
            {
                0: raised("RuntimeError: Connection closed by peer [127.0.0.1]", 0, 10.0),
                1: raised("ValueError: bad sample", 1, 11.0, retry=False),
            }
        )
    )
    assert isinstance(error, WorkerError)
    assert (error.rank, error.cause) == (1, "ValueError: bad sample")


@pytest.mark.parametrize(
    "noise",
    [
        "CheckpointError: rank 0: the other ranks cannot be reached: Broken pipe",
        "RuntimeError: Connection closed by peer",
        "DistBackendError: NCCL error",
    ],
)
def test_dead_process_takes_precedence_over_collateral_errors(noise: str) -> None:
    error = first_error(group({0: raised(noise, 0, 1.0, retry=False), 1: died()}))
    assert isinstance(error, WorkerError)
    assert error.rank == 1
    assert "the process died" in error.cause
    assert error.retry


def test_broken_network_between_live_ranks_is_retried() -> None:
    noise = "CheckpointError: rank 0: the other ranks cannot be reached: Timed out waiting 1800000ms"
    error = first_error(group({0: raised(noise, 0, 1.0, retry=False), 1: raised(noise, 1, 2.0, retry=False)}))
    assert isinstance(error, WorkerError)
    assert error.retry


def retries(step: list[int], messages: list[str], limit: int = 3) -> Retries:
    return Retries(FailureConfig(max_failures=limit), lambda: step[0], messages.append)


def test_death_is_retried_within_the_budget() -> None:
    messages: list[str] = []
    policy = retries([0], messages, limit=1)
    assert policy.make_decision(group({1: died()})) == FailureDecision.RETRY
    assert policy.make_decision(group({1: died()})) == FailureDecision.RAISE
    assert len(messages) == 1
    assert "rank 1: the process died" in messages[0]
    assert "(1 of 1)" in messages[0]


def test_non_retryable_error_ends_the_run() -> None:
    policy = retries([0], [])
    assert policy.make_decision(group({0: raised("TypeError: no", 0, 1.0, retry=False)})) == FailureDecision.RAISE


def test_same_error_without_a_step_in_between_ends_the_run() -> None:
    step = [5]
    policy = retries(step, [])
    error = group({0: raised("RuntimeError: shapes", 0, 1.0)})
    assert policy.make_decision(error) == FailureDecision.RETRY
    assert policy.make_decision(error) == FailureDecision.RAISE
    step[0] = 6
    assert policy.make_decision(error) == FailureDecision.RETRY


def test_last_lines_of_the_ranks_are_awaited() -> None:
    """Ray's log monitor delivers the lines late. A process that another one of its rank has replaced is not waited
    for."""
    lines: list[tuple[int | None, str]] = []
    output = ray_internals.WorkerOutput(lambda rank, message: None, lambda rank, line: lines.append((rank, line)))

    def printed(pid: int, *lines_or_messages: str | dict[str, Any]) -> None:
        output._take(
            {"ip": "here", "pid": pid, "lines": [s if isinstance(s, str) else to_line(s) for s in lines_or_messages]}
        )

    assert not output.wait_for_end(0.0), "nobody has said hello"
    printed(1, {"kind": "hello", "rank": 0, "label": ""})
    printed(2, {"kind": "hello", "rank": 1, "label": ""})
    printed(3, {"kind": "hello", "rank": 1, "label": ""}, {"kind": "end"})
    assert not output.wait_for_end(0.0), "rank 0 has not ended"
    late = threading.Timer(0.1, printed, (1, "the last line", {"kind": "end"}))
    late.start()
    assert output.wait_for_end(30.0)
    late.join()
    assert lines == [(0, "the last line")]


def test_new_token_of_a_local_ray_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray writes it with mode 0644 when it starts a local cluster, and `cluster=job` would refuse it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    with cluster._private_token():
        pass
    token.parent.mkdir()
    with cluster._private_token():
        token.write_text("secret")
        token.chmod(0o644)
    assert token.stat().st_mode & 0o777 == 0o600
    token.chmod(0o644)
    with cluster._private_token():
        pass
    assert token.stat().st_mode & 0o777 == 0o644, "a file that was there before stays as it is"


class OldFailureConfig:
    """`FailureConfig` of Ray 2.57."""

    def __init__(self, max_failures: int = 0, controller_failure_limit: int = -1) -> None:
        self.max_failures = max_failures


def test_ray_without_a_budget_for_preemptions_gets_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    assert train._failure_config(3, -1, messages.append).max_preemption_failures == -1
    assert not messages
    monkeypatch.setattr(train, "FailureConfig", OldFailureConfig)
    assert train._failure_config(3, -1, messages.append).max_failures == 3
    (message,) = messages
    assert message.startswith(f"warning: ray {ray.__version__} ")
    for part in ("failure.max_failures=3", "failure.max_preemption_failures=-1", "Ray 2.58"):
        assert part in message
    train._failure_config(3, 3, messages.append)
    assert len(messages) == 1, "the two budgets are equal"
