"""How an attempt at a sweep ended, and the words for it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from raytrainer.run import Record, took
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import parameter_segments, parameters_at
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.table import command_line, final_table, ranked, schedule_text

_MOST_FAILED = 5  # trials whose causes are told at the end
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class SweepOutcome:
    """How an attempt at a sweep ended.

    Attributes:
        status, exit_code, record, where, cause, mlflow, mlflow_command, seconds: As `run.Outcome`'s.
        plan: What was swept.
        trials: All, of earlier attempts too.
        note: What ended it before all trials were drawn.
        weights: Which weights of the best trial there are, and where.
        resumable: Whether going on would help; else it takes another config.
    """

    status: Status
    exit_code: int
    record: Record
    where: str
    plan: Plan
    trials: Sequence[Trial] = ()
    cause: str | None = None
    note: str | None = None
    weights: str | None = None
    resumable: bool = True
    mlflow: str | None = None
    mlflow_command: str | None = None
    seconds: float = 0.0
    traceback: str | None = field(default=None, repr=False)


def summary(outcome: SweepOutcome, program: str) -> str:
    """The last words of a sweep: what came out, where everything is, and what to type next."""
    record, plan, mode = outcome.record, outcome.plan, cast(Mode, outcome.plan.mode)
    words = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}[outcome.status]
    counts = Counter(t.status for t in outcome.trials)
    told = ", ".join(f"{counts[s]} {s}" for s in ("finished", "pruned", "failed", "stopped") if counts[s])
    rows = [
        (
            "outcome",
            f"{words}: {len(outcome.trials)} trials ({told or 'none ended'}) in {took(record, outcome.seconds)}",
        )
    ]
    if outcome.note:
        rows.append(("", f"{outcome.note}; resume goes on"))
    if outcome.cause and outcome.status == "FAILED":
        rows.append(("cause", outcome.cause))
    failed = [t for t in outcome.trials if t.status == "failed"]
    for trial in failed[:_MOST_FAILED]:
        # What ended the sweep is told already.
        whole = outcome.cause is None or not (trial.cause or "").endswith(outcome.cause)
        rows.append(("failed", f"{trial.id}: {trial.cause}" if whole else f"{trial.id}: that was its cause"))
        if trial.error is not None:
            rows.append(("", f"{record.run_dir}/{trial.error}"))
    if counts["failed"] > _MOST_FAILED:
        rows.append(("", f"and {counts['failed'] - _MOST_FAILED} more"))
    rows.append(("where", outcome.where))
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {record.run_id}"))
    rows.append(("output", record.run_dir))
    best = ranked(outcome.trials, mode)[:1]
    if best:
        report = best[0].best(mode)
        assert report is not None
        rows.append(("best", f"{plan.metric} {report.value:.4g} at step {report.step} of trial {best[0].id}"))
        overrides = plan.overrides_of(parameters_at(best[0], report))
        rows.append(("", command_line(program, plan.options, plan.fixed, overrides)))
        if len(path := parameter_segments(best[0], report, outcome.trials)) > 1:
            rows.append(("", f"schedule: {schedule_text(path)}; trained under all of it, the command has the last"))
        if outcome.weights is not None:
            rows.append(("weights", outcome.weights))
    following = [outcome.mlflow_command] if outcome.mlflow_command else []
    if best and "://" not in record.run_dir:
        following.append(f"{program} --config-dir={shlex.quote(record.run_dir + '/best')} experiment=best")
    whole = outcome.status == "FINISHED" and outcome.note is None
    # Fewer than were asked for are all combinations that there are.
    all_drawn = plan.total is not None and len(outcome.trials) >= plan.total
    more = f" sweep.num_samples={2 * len(outcome.trials)}" if whole and all_drawn else ""
    if failed and outcome.resumable:  # alone it fails again, where a person can look
        following.append(f"{program} rerun {record.name}.{failed[0].id}")
    if not outcome.resumable:
        following.append(f"{program} rerun {record.name} key=value…")
    elif whole or outcome.note is not None or not all_drawn or counts["stopped"]:
        following += [f"{program} resume {record.name}{more}"] if more or not whole else []
    elif any(not trial.diverged for trial in failed):  # nothing is left to go on with but what failed
        more = f" sweep.max_trial_failures={plan.experiment.sweep.max_trial_failures + 1}"
        following.append(f"{program} resume {record.name}{more}")
    rows += [("next" if not i else "", text) for i, text in enumerate(following)]
    lines = [f"{name:<8} {text}" for name, text in rows]
    if best and len(outcome.trials) > 1:
        table = final_table(outcome.trials, metric=plan.metric, mode=mode, keys=[p.key for p in plan.parameters])
        lines = [table, "", *lines]
    return "\n".join(lines)
