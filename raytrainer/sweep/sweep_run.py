"""The MLflow run of a sweep: what it is opened with, and its tags at the end. Those of its trials are in `trial_runs`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

from raytrainer import tracking
from raytrainer.attempt.work import TrackedRun
from raytrainer.config import Parameter, flattened
from raytrainer.sweep.journal import Mode
from raytrainer.sweep.outcome import SweepOutcome
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.trial_runs import mlflow_name
from raytrainer.tracking.keys import metric_key


def tracked_run(plan: Plan, argv: Sequence[str]) -> TrackedRun:
    """Return what a sweep's run is opened with: the parameters that all trials share, and the search space."""
    swept = {p.key.lstrip("+") for p in plan.parameters}
    params = {key: value for key, value in flattened(plan.first.text).items() if key not in swept}
    space = {f"space/{mlflow_name(p.key)}": _described(p) for p in plan.parameters}
    tags = {
        "raytrainer.kind": "sweep",
        "raytrainer.sweep.metric": plan.metric,
        "raytrainer.sweep.mode": plan.mode,
        **{f"raytrainer.choice.{group}": choice for group, choice in plan.first.choices if group not in swept},
    }
    return TrackedRun(plan.first.text, {**params, **space}, tags, " ".join(argv))


def upload_tags(run: tracking.Run, outcome: SweepOutcome) -> None:
    """Upload how many trials ended in which state, and the best of them."""
    counts = Counter(trial.status for trial in outcome.trials)
    tags: dict[str, str] = {"raytrainer.exit_code": str(outcome.exit_code)}
    tags |= {f"raytrainer.trials.{status}": str(count) for status, count in counts.items()}
    if (best := outcome.best) is not None:
        report = best.best(cast(Mode, outcome.plan.mode))
        assert report is not None
        tags |= {
            "raytrainer.best_trial": best.id,
            "raytrainer.best_value": repr(report.value),
            "raytrainer.best_step": str(report.step),
            "raytrainer.best_overrides": " ".join(best.overrides),
        }
        # The step is the number of trials, which grows with each attempt.
        key = metric_key(f"best/{outcome.plan.metric}")
        run.log_metrics({key: report.value}, len(outcome.trials), report.time)
    run.set_tags(tags)


def _described(p: Parameter) -> str:
    if p.kind == "choice":
        return ", ".join(p.texts)
    return f"{p.kind} {p.low!r} to {p.high!r}{', log' if p.log else ''}{', integers' if p.integer else ''}"
