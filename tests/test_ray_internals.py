"""Which failure of a worker group is the cause, and which failures are retried; driven by hand, without Ray."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from raytrainer import ray_internals
from raytrainer.errors import WorkerError
from raytrainer.progress import to_line
from raytrainer.ray_internals import Retries, first_error


def group(failures: dict[int, Exception]) -> WorkerGroupError:
    return WorkerGroupError("workers failed", failures)


def raised(cause: str, rank: int, when: float, *, retry: bool = True) -> WorkerError:
    return WorkerError(cause, rank=rank, when=when, retry=retry, traceback=f"Traceback: {cause}")


def died() -> Exception:
    error: Exception = ray.exceptions.RayActorError(error_msg="it is gone")
    return error


def test_the_first_that_raised_is_the_cause_not_the_noise_of_the_others() -> None:
    found = first_error(
        group(
            {
                0: raised("RuntimeError: Connection closed by peer [127.0.0.1]", 0, 10.0),
                1: raised("ValueError: bad sample", 1, 11.0, retry=False),
            }
        )
    )
    assert isinstance(found, WorkerError)
    assert (found.rank, found.cause) == (1, "ValueError: bad sample")


@pytest.mark.parametrize(
    "noise",
    [
        "CheckpointError: rank 0: the other ranks cannot be reached: Broken pipe",
        "RuntimeError: Connection closed by peer",
        "DistBackendError: NCCL error",
    ],
)
def test_a_process_that_died_without_a_word_comes_before_those_that_lost_it(noise: str) -> None:
    found = first_error(group({0: raised(noise, 0, 1.0, retry=False), 1: died()}))
    assert isinstance(found, WorkerError)
    assert found.rank == 1
    assert "the process died" in found.cause
    assert found.retry


def test_a_network_that_broke_between_living_ranks_is_worth_a_retry() -> None:
    noise = "CheckpointError: rank 0: the other ranks cannot be reached: Timed out waiting 1800000ms"
    found = first_error(group({0: raised(noise, 0, 1.0, retry=False), 1: raised(noise, 1, 2.0, retry=False)}))
    assert isinstance(found, WorkerError)
    assert found.retry


def retries(step: list[int], told: list[str], limit: int = 3) -> Retries:
    return Retries(FailureConfig(max_failures=limit), lambda: step[0], told.append)


def test_a_death_is_retried_within_the_budget_and_told() -> None:
    told: list[str] = []
    policy = retries([0], told, limit=1)
    assert policy.make_decision(group({1: died()})) == FailureDecision.RETRY
    assert policy.make_decision(group({1: died()})) == FailureDecision.RAISE
    assert len(told) == 1
    assert "rank 1: the process died" in told[0]
    assert "(1 of 1)" in told[0]


def test_what_no_retry_mends_ends_the_run() -> None:
    policy = retries([0], [])
    assert policy.make_decision(group({0: raised("TypeError: no", 0, 1.0, retry=False)})) == FailureDecision.RAISE


def test_the_same_error_without_a_step_in_between_ends_the_run() -> None:
    step = [5]
    policy = retries(step, [])
    error = group({0: raised("RuntimeError: shapes", 0, 1.0)})
    assert policy.make_decision(error) == FailureDecision.RETRY
    assert policy.make_decision(error) == FailureDecision.RAISE
    step[0] = 6
    assert policy.make_decision(error) == FailureDecision.RETRY


def test_the_last_lines_of_the_ranks_are_waited_for() -> None:
    """Ray's log monitor delivers the lines late. A process that another one of its rank has replaced is not waited
    for."""
    lines: list[tuple[int | None, str]] = []
    output = ray_internals.WorkerOutput(lambda rank, message: None, lambda rank, line: lines.append((rank, line)))

    def printed(pid: int, *said: str | dict[str, Any]) -> None:
        output._take({"ip": "here", "pid": pid, "lines": [s if isinstance(s, str) else to_line(s) for s in said]})

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
