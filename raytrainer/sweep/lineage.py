"""The sequence of parameters that led to a trial's value.

Population based training changes parameters during a trial. The sequence begins with the parameters of the trials whose
weights were copied, and ends with those at the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raytrainer.sweep.journal import Mode, Report, Trial


@dataclass(frozen=True)
class ParameterSegment:
    """A part of a training with constant parameters.

    Attributes:
        trial: The trial that trained it.
        parameters: The parameters, by key.
        step: The optimizer step at which the segment ended.
    """

    trial: str
    parameters: Mapping[str, Any]
    step: int


def parameters_at(trial: Trial, report: Report | None) -> dict[str, Any]:
    """Return the trial's parameters at one of its reports, or its latest parameters if `report` is None."""
    index = _segment_index(trial, report)
    return trial.before[index][1] if index < len(trial.before) else trial.parameters


def best_parameters(trial: Trial, mode: Mode) -> dict[str, Any]:
    """Return the parameters of the trial's best value, or its latest parameters if it has no value."""
    return parameters_at(trial, trial.best(mode))


def parameter_segments(trial: Trial, report: Report, trials: Iterable[Trial]) -> list[ParameterSegment]:
    """Return the segments that led to a report, in their order. Neighbours with equal parameters are merged.

    Args:
        trial: The trial that made the report.
        report: The report.
        trials: All trials of the sweep.
    """
    by_id = {trial.id: trial for trial in trials}
    segments: list[ParameterSegment] = []
    while True:
        values = parameters_at(trial, report)
        if not segments or dict(segments[0].parameters) != values:
            segments.insert(0, ParameterSegment(trial.id, values, report.step))
        index = _segment_index(trial, report)
        if index == 0:
            return segments
        exploit, count = trial.inherited[index - 1], trial.before[index - 1][0]
        source = by_id.get(exploit["from"])
        # The source may have reported that evaluation twice, if it copied another trial in between.
        until = trial.reports[count].time
        of = [r for r in source.reports if r.evaluation == exploit["evaluation"] and r.time <= until] if source else []
        if source is None or not of:
            return segments
        trial, report = source, of[-1]


def _segment_index(trial: Trial, report: Report | None) -> int:
    """Return how many entries of `inherited` are older than a report."""
    if report is None:
        return len(trial.before)
    place = next(i for i, other in enumerate(trial.reports) if other is report)
    return sum(count <= place for count, _ in trial.before)
