"""The sweep's own record: which trials were drawn, what each reported and how it ended; append-only JSON lines.
What a sweep resumes from and what its tables are made of. Neither Ray nor torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["min", "max"]
Status = Literal["running", "finished", "pruned", "failed", "stopped"]


@dataclass(frozen=True)
class Report:
    """What a trial reported at one evaluation.

    Attributes:
        evaluation: Its number, from 1.
        step: Optimizer steps done.
        value: The sweep's metric; NaN or infinite where the trial diverged.
        metrics: All metrics of the evaluation, by name.
        time: Seconds since the epoch.
    """

    evaluation: int
    step: int
    value: float
    metrics: Mapping[str, float]
    time: float


@dataclass
class Trial:
    """A trial and all that is known of it.

    Attributes:
        id: `0001`, `0002`, …: its directory's name, in the order in which they were drawn.
        parameters: Key → value, as drawn.
        overrides: The same as Hydra's overrides.
        started: Seconds since the epoch; `ended` likewise.
        run_id: Its run in MLflow, or the id made for it while there is no server.
        reports: In order.
        cause: Why it failed, was pruned or stopped; one line.
        inherited: What population based training copied into it: `evaluation`, `from` and `parameters` of each.
    """

    id: str
    parameters: dict[str, Any]
    overrides: list[str]
    started: float
    run_id: str | None = None
    reports: list[Report] = field(default_factory=list)
    status: Status = "running"
    cause: str | None = None
    ended: float | None = None
    inherited: list[dict[str, Any]] = field(default_factory=list)

    def best(self, mode: Mode) -> Report | None:
        """The report with the best value, the earliest of equals; None where no value is finite."""
        finite = [report for report in self.reports if math.isfinite(report.value)]
        if not finite:
            return None
        return min(finite, key=lambda report: report.value if mode == "min" else -report.value)
