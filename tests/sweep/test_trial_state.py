"""Tests of the states of a trial, and of how its end is decided."""

from __future__ import annotations

import math

import pytest

from raytrainer.errors import WorkerError
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Trial, TrialJournal
from raytrainer.sweep.trial_state import (
    NEXT_STATUSES,
    Status,
    TrialEnd,
    check_transition,
    end_by_error,
    end_by_result,
)


def test_a_trial_that_has_ended_does_not_run_again() -> None:
    assert {status for status in Status if Status.RUNNING in NEXT_STATUSES[status]} == {
        Status.RUNNING,
        Status.STOPPED,
        Status.FAILED,
    }
    for before in (Status.FINISHED, Status.PRUNED):
        for after in Status:
            with pytest.raises(RuntimeError, match=f"0001 cannot go from {before} to {after}"):
                check_transition("0001", before, after)


def test_the_journal_refuses_a_transition_and_records_nothing_of_it(storage: Storage) -> None:
    journal = TrialJournal.open(storage)
    journal.begin({})
    journal.start(Trial("0001", {}, [], 0.0))
    journal.end("0001", Status.PRUNED)
    with pytest.raises(RuntimeError, match="0001 cannot go from pruned to running"):
        journal.reopen("0001")
    journal.close()
    assert TrialJournal.open(storage).trials["0001"].status is Status.PRUNED


def test_an_error_is_retried_only_if_that_may_help() -> None:
    for retries, retry, retried in ((True, True, True), (True, False, False), (False, True, False)):
        end = end_by_error(WorkerError("OSError: no", retry=retry), retries=retries)
        assert (end is None) is retried


@pytest.mark.parametrize(
    ("cause", "diverged", "non_retryable"),
    [
        ("OSError: no space", False, False),
        ("NonFiniteLoss: the loss became nan at step 3", True, False),
        ("ConfigError: sweep.metric=x is not logged", False, True),
    ],
)
def test_what_an_error_says_of_other_trials(cause: str, diverged: bool, non_retryable: bool) -> None:
    end = end_by_error(WorkerError(cause), retries=False, trace="trace")
    assert end == TrialEnd(Status.FAILED, cause, "trace", diverged=diverged, non_retryable=non_retryable)
    assert end is not None
    assert TrialEnd.from_json(end.to_json()) == end


def test_how_a_trial_ended_by_its_last_result() -> None:
    def status(result: dict[str, str], *values: float, full_length: bool = False) -> Status:
        return end_by_result(result, values, full_length=full_length, needs_value=True).status

    assert status({}, 0.5) is Status.PRUNED
    assert status({}, 0.5, full_length=True) is Status.FINISHED
    assert status({"end": TrialEnd(Status.FINISHED).to_json()}, math.nan, 0.5) is Status.FINISHED
    assert status({"end": TrialEnd(Status.FINISHED).to_json()}, math.nan, math.inf) is Status.FAILED
