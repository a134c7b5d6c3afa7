"""The parameters with which a value was reached, if population based training changed them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from raytrainer.storage import Storage
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.lineage import best_parameters, parameter_segments, parameters_at
from raytrainer.sweep.table import final_table, schedule_text
from raytrainer.sweep.trial_state import Status


@pytest.fixture
def population(tmp_path: Path) -> list[Trial]:
    """Two trials, as a resumed sweep reads them: 0001 copies 0002 after evaluation 2, and 0002 copies that 0001 after
    3. The best value is before the last change."""
    clock = itertools.count(1.0)
    journal = TrialJournal.open(Storage(tmp_path), clock=lambda: next(clock))
    journal.begin({})

    def report(number: str, evaluation: int, value: float) -> None:
        journal.report(number, Report(evaluation, 10 * evaluation, value, {}, next(clock)))

    for number, rate in (("0001", 0.1), ("0002", 0.2)):
        journal.start(Trial(number, {"optimizer.lr": rate, "model.width": 8}, [], next(clock)))
    for evaluation in (1, 2):
        report("0001", evaluation, 0.1)
        report("0002", evaluation, 0.5)
    journal.inherit("0001", "0002", 2, {"optimizer.lr": 0.24, "model.width": 8}, [])
    report("0001", 3, 0.7)
    report("0002", 3, 0.4)
    journal.inherit("0002", "0001", 3, {"optimizer.lr": 0.3, "model.width": 8}, [])
    report("0002", 4, 0.9)
    report("0001", 4, 0.3)
    journal.inherit("0002", "0001", 4, {"optimizer.lr": 0.2, "model.width": 8}, [])
    report("0002", 5, 0.6)
    for number in ("0001", "0002"):
        journal.end(number, Status.FINISHED)
    journal.close()
    return list(TrialJournal.open(Storage(tmp_path)).trials.values())


def test_the_parameters_are_those_at_the_report(population: list[Trial]) -> None:
    first, second = population
    assert second.parameters["optimizer.lr"] == 0.2
    assert best_parameters(second, "max")["optimizer.lr"] == 0.3
    assert [parameters_at(second, r)["optimizer.lr"] for r in second.reports] == [0.2, 0.2, 0.2, 0.3, 0.2]
    assert [parameters_at(first, r)["optimizer.lr"] for r in first.reports] == [0.1, 0.1, 0.24, 0.24]
    assert parameters_at(first, None)["optimizer.lr"] == 0.24
    table = final_table(population, metric="val/accuracy", mode="max", keys=["optimizer.lr"]).splitlines()
    assert [line.split()[-1] for line in table] == ["lr", "0.3", "0.24"]


def test_the_weights_were_trained_under_the_parameters_of_those_they_come_from(population: list[Trial]) -> None:
    best = population[1].best("max")
    assert best is not None
    found = parameter_segments(population[1], best, population)
    assert [(s.trial, s.parameters["optimizer.lr"], s.step) for s in found] == [
        ("0002", 0.2, 20),
        ("0001", 0.24, 30),
        ("0002", 0.3, 40),
    ]
    assert schedule_text(found) == "lr 0.2 to step 20, lr 0.24 to step 30, lr 0.3 to step 40"
    # A trial whose parameters never changed has no schedule.
    untouched = Trial("0003", {"optimizer.lr": 0.1}, [], 1.0, reports=[Report(1, 10, 0.5, {}, 2.0)])
    assert len(parameter_segments(untouched, untouched.reports[0], population)) == 1
