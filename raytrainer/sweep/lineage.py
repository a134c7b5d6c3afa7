"""Which parameters a trial's value was reached with, where population based training changed them on the way: those at
the report, and before them those of the trials whose weights it took over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raytrainer.sweep.journal import Mode, Report, Trial


@dataclass(frozen=True)
class ParameterSegment:
    """A part of a training: its parameters, those of `trial`, and the step that it ended at."""

    trial: str
    parameters: Mapping[str, Any]
    step: int


def parameters_at(trial: Trial, report: Report | None) -> dict[str, Any]:
    """A trial's parameters when it made a report of its own; None: its latest."""
    index = _segment_index(trial, report)
    return trial.before[index][1] if index < len(trial.before) else trial.parameters


def best_parameters(trial: Trial, mode: Mode) -> dict[str, Any]:
    """Those that a trial's best value was reported with; its latest where it has none."""
    return parameters_at(trial, trial.best(mode))


def parameter_segments(trial: Trial, report: Report, trials: Iterable[Trial]) -> list[ParameterSegment]:
    """What led to a report, the first first; one that is followed by the same parameters is one with it.

    Args:
        trial: Whose report it is.
        trials: All of the sweep.
    """
    named = {one.id: one for one in trials}
    found: list[ParameterSegment] = []
    while True:
        values = parameters_at(trial, report)
        if not found or dict(found[0].parameters) != values:
            found.insert(0, ParameterSegment(trial.id, values, report.step))
        index = _segment_index(trial, report)
        if index == 0:
            return found
        exploit, count = trial.inherited[index - 1], trial.before[index - 1][0]
        source = named.get(exploit["from"])
        # It may have had that evaluation more than once, having taken over another's in between.
        until = trial.reports[count].time
        of = [r for r in source.reports if r.evaluation == exploit["evaluation"] and r.time <= until] if source else []
        if source is None or not of:
            return found
        trial, report = source, of[-1]


def _segment_index(trial: Trial, report: Report | None) -> int:
    """How many of `inherited` came before a report."""
    if report is None:
        return len(trial.before)
    place = next(i for i, one in enumerate(trial.reports) if one is report)
    return sum(count <= place for count, _ in trial.before)
