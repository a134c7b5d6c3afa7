"""The outcome of an attempt of a sweep, and its summary as text."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import cast

from raytrainer.attempt.outcome import WORDS, AttemptOutcome, Row, as_text, next_rows, took
from raytrainer.attempt.session import ray_error
from raytrainer.errors import ConfigError, RaytrainerError, WorkerError
from raytrainer.progress import duration
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.lineage import parameter_segments, parameters_at
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.table import command_line, final_table, ranked, schedule_text
from raytrainer.sweep.trial_state import Status

_MOST_FAILED = 5  # trials whose causes are shown


@dataclass(frozen=True)
class SweepOutcome(AttemptOutcome):
    """The end of an attempt of a sweep.

    Attributes:
        plan: The sweep.
        trials: All trials, including those of earlier attempts.
        note: The limit that ended the sweep before all trials were sampled.
        weights: Where the best trial's weights are, with their step if it is not that of the best value.
        resumable: Whether a resume can help. If not, the config must change.
    """

    plan: Plan
    trials: Sequence[Trial] = ()
    _: KW_ONLY
    note: str | None = None
    weights: str | None = None
    resumable: bool = True

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status is Status.FAILED]

    @property
    def best(self) -> Trial | None:
        """The trial with the best value; None if no trial has one."""
        return next(iter(ranked(self.trials, cast(Mode, self.plan.mode))), None)


# --- how a sweep ended --------------------------------------------------------------------------------------------------


def make_outcome(outcome: SweepOutcome, reason: str | None, error: BaseException | None) -> SweepOutcome:
    """Return the outcome of a sweep that was not asked to stop.

    Args:
        outcome: The outcome so far, with its trials.
        reason: `finished`, or the limit that ended the sweep; None after an error.
        error: The error that ended the sweep.
    """
    failed = replace(outcome, status="FAILED", exit_code=1)
    if error is not None:
        return replace(
            failed,
            cause=_cause_of(ray_error(error)),
            traceback=error.traceback if isinstance(error, WorkerError) else None,
            resumable=not isinstance(error, ConfigError),
        )
    note = None if reason == "finished" else f"{reason} reached"
    trials, mode = outcome.trials, cast(Mode, outcome.plan.mode)
    if not any(t.status is Status.FINISHED and t.best(mode) is not None for t in trials):
        return replace(failed, cause=_why_none(outcome, reason), note=note)
    allowed = outcome.plan.experiment.sweep.allow_failed
    if allowed is not True and len(outcome.failed) > int(allowed):
        limit = f"sweep.allow_failed={str(allowed).lower()}"
        return replace(failed, cause=f"{len(outcome.failed)} of {len(trials)} trials failed, and {limit}", note=note)
    return replace(outcome, note=note)


def _cause_of(error: BaseException) -> str:
    if isinstance(error, RaytrainerError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"  # other libraries write many lines


def _why_none(outcome: SweepOutcome, reason: str | None) -> str:
    """Return as text why no trial has finished with a value."""
    trials, failed = outcome.trials, outcome.failed
    if failed:
        return f"no trial finished: {len(failed)} of {len(trials)} failed, the first by {failed[0].cause}"
    if any(trial.status is Status.FINISHED for trial in trials):
        return f"no trial has a value of {outcome.plan.metric} that is a number"
    if reason != "finished":
        budget = duration(outcome.plan.experiment.sweep.time_budget_s or 0)
        return f"the time budget of {budget} (sweep.time_budget_s) ended before any trial finished"
    return "no trial finished: all were pruned" if trials else "no trial was sampled"


# --- the summary --------------------------------------------------------------------------------------------------------


def summary(outcome: SweepOutcome, program: str) -> str:
    """Return the summary of a sweep: the result, where everything is, and the next command."""
    record, plan = outcome.record, outcome.plan
    rows = [("outcome", f"{WORDS[outcome.status]}: {trial_counts(outcome.trials)} in {took(record, outcome.seconds)}")]
    if outcome.note:
        rows.append(("", f"{outcome.note}; resume continues the sweep"))
    if outcome.cause and outcome.status == "FAILED":
        rows.append(("cause", outcome.cause))
    rows += failed_rows(outcome.failed, record.run_dir, cause_above=outcome.cause)
    rows.append(("where", outcome.where))
    if outcome.mlflow:
        rows.append(("mlflow", f"{outcome.mlflow}  run {record.run_id}"))
    rows.append(("output", record.run_dir))
    if outcome.best is not None:
        rows += _best_rows(outcome, outcome.best, program)
    rows += next_rows(_next_commands(outcome, program))
    text = as_text(rows)
    if outcome.best is None or len(outcome.trials) < 2:
        return text
    keys = [p.key for p in plan.parameters]
    return f"{final_table(outcome.trials, metric=plan.metric, mode=cast(Mode, plan.mode), keys=keys)}\n\n{text}"


def trial_counts(trials: Sequence[Trial]) -> str:
    """Return e.g. `9 trials (6 finished, 2 pruned, 1 failed)`."""
    counts = Counter(trial.status for trial in trials)
    order = (Status.FINISHED, Status.PRUNED, Status.FAILED, Status.STOPPED)
    ended = ", ".join(f"{counts[status]} {status}" for status in order if counts[status])
    return f"{len(trials)} trials ({ended or 'none ended'})"


def failed_rows(failed: Sequence[Trial], directory: str, *, cause_above: str | None = None) -> list[Row]:
    """Return rows with the causes of the first failed trials, and the files with their tracebacks.

    Args:
        failed: The failed trials.
        directory: The sweep's directory.
        cause_above: The cause of the sweep's end, which is shown above and not repeated.
    """
    rows: list[Row] = []
    for trial in failed[:_MOST_FAILED]:
        ended_it = cause_above is not None and (trial.cause or "").endswith(cause_above)
        rows.append(("failed", f"{trial.id}: {'this failure ended the sweep' if ended_it else trial.cause}"))
        if trial.error is not None:
            rows.append(("", f"{directory}/{trial.error}"))
    if len(failed) > _MOST_FAILED:
        rows.append(("", f"and {len(failed) - _MOST_FAILED} more"))
    return rows


def _best_rows(outcome: SweepOutcome, best: Trial, program: str) -> list[Row]:
    plan, report = outcome.plan, best.best(cast(Mode, outcome.plan.mode))
    assert report is not None
    overrides = plan.overrides_of(parameters_at(best, report))
    rows = [
        ("best", f"{plan.metric} {report.value:.4g} at step {report.step} of trial {best.id}"),
        ("", command_line(program, plan.options, plan.fixed, overrides)),
    ]
    if len(path := parameter_segments(best, report, outcome.trials)) > 1:
        path_text = f"schedule: {schedule_text(path)}"
        rows.append(("", f"{path_text}; the trial trained with all of it, the command has the last values"))
    if outcome.weights is not None:
        rows.append(("weights", outcome.weights))
    return rows


def _next_commands(outcome: SweepOutcome, program: str) -> list[str | None]:
    """Return the commands that the user may want to type next."""
    record, failed, count = outcome.record, outcome.failed, len(outcome.trials)
    commands = [outcome.mlflow_command]
    if outcome.best is not None and "://" not in record.run_dir:
        commands.append(f"{program} --config-dir={shlex.quote(record.run_dir + '/best')} experiment=best")
    if not outcome.resumable:
        return [*commands, f"{program} rerun {record.name} key=value…"]
    if failed:  # as a run of its own it fails again, and the user can debug it
        commands.append(f"{program} rerun {record.name}.{failed[0].id}")
    complete = outcome.status == "FINISHED" and outcome.note is None
    # A finite search space can have fewer combinations than the number of trials that was asked for.
    all_sampled = outcome.plan.total is not None and count >= outcome.plan.total
    stopped = any(trial.status is Status.STOPPED for trial in outcome.trials)
    resume = f"{program} resume {record.name}"
    if complete:
        return [*commands, f"{resume} sweep.num_samples={2 * count}"] if all_sampled else commands
    if outcome.note is not None or not all_sampled or stopped:
        commands.append(resume)
    elif any(not trial.diverged for trial in failed):  # only failed trials are left to continue
        failures = outcome.plan.experiment.sweep.max_trial_failures + 1
        commands.append(f"{resume} sweep.max_trial_failures={failures}")
    return commands
