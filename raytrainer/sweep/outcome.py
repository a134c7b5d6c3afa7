"""The outcome of an attempt of a sweep, and its summary as text."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from raytrainer.attempt import Record, took
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import parameter_segments, parameters_at
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.table import command_line, final_table, ranked, schedule_text

_MOST_FAILED = 5  # trials whose causes are shown
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class SweepOutcome:
    """How an attempt of a sweep ended.

    Attributes:
        status, exit_code, record, where, cause, mlflow, mlflow_command, seconds: As in `run.Outcome`.
        plan: The sweep.
        trials: All trials, including those of earlier attempts.
        note: The limit that ended the sweep before all trials were sampled.
        weights: Where the best trial's weights are, with their step if it is not that of the best value.
        resumable: Whether a resume can help. If not, the config must change.
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
    """Return the summary of a sweep: the result, where everything is, and the next command."""
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
        rows.append(("", f"{outcome.note}; resume continues the sweep"))
    if outcome.cause and outcome.status == "FAILED":
        rows.append(("cause", outcome.cause))
    failed = [t for t in outcome.trials if t.status == "failed"]
    for trial in failed[:_MOST_FAILED]:
        # The cause of the sweep's end is shown above.
        whole = outcome.cause is None or not (trial.cause or "").endswith(outcome.cause)
        rows.append(("failed", f"{trial.id}: {trial.cause}" if whole else f"{trial.id}: this failure ended the sweep"))
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
            rows.append(
                (
                    "",
                    f"schedule: {schedule_text(path)}; the trial trained with all of it, the command has the last values",
                )
            )
        if outcome.weights is not None:
            rows.append(("weights", outcome.weights))
    following = [outcome.mlflow_command] if outcome.mlflow_command else []
    if best and "://" not in record.run_dir:
        following.append(f"{program} --config-dir={shlex.quote(record.run_dir + '/best')} experiment=best")
    whole = outcome.status == "FINISHED" and outcome.note is None
    # A finite search space can have fewer combinations than the number of trials that was asked for.
    all_drawn = plan.total is not None and len(outcome.trials) >= plan.total
    more = f" sweep.num_samples={2 * len(outcome.trials)}" if whole and all_drawn else ""
    if failed and outcome.resumable:  # as a run of its own it fails again, and the user can debug it
        following.append(f"{program} rerun {record.name}.{failed[0].id}")
    if not outcome.resumable:
        following.append(f"{program} rerun {record.name} key=value…")
    elif whole or outcome.note is not None or not all_drawn or counts["stopped"]:
        following += [f"{program} resume {record.name}{more}"] if more or not whole else []
    elif any(not trial.diverged for trial in failed):  # only failed trials are left to continue
        more = f" sweep.max_trial_failures={plan.experiment.sweep.max_trial_failures + 1}"
        following.append(f"{program} resume {record.name}{more}")
    rows += [("next" if not i else "", text) for i, text in enumerate(following)]
    lines = [f"{name:<8} {text}" for name, text in rows]
    if best and len(outcome.trials) > 1:
        table = final_table(outcome.trials, metric=plan.metric, mode=mode, keys=[p.key for p in plan.parameters])
        lines = [table, "", *lines]
    return "\n".join(lines)
