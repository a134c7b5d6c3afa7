"""Decide which trials in its journal a resumed sweep keeps, continues or retries, and how many it samples."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from raytrainer.attempt import Record
from raytrainer.errors import ConfigError
from raytrainer.sweep.journal import Trial, TrialJournal
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.trial_state import Status

_FAILURES = "max_trial_failures"  # key in the journal: the setting of an attempt


def begin_attempt(journal: TrialJournal, plan: Plan, record: Record, argv: Sequence[str]) -> None:
    """Record a new attempt in the journal, and the failed trials that it tries again."""
    retried = to_retry(plan, journal)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    info = {"attempt": record.attempts, "argv": list(argv), "created": now}
    journal.begin({**info, _FAILURES: plan.experiment.sweep.max_trial_failures})
    for trial in retried:
        journal.reopen(trial.id)


def to_retry(plan: Plan, journal: TrialJournal) -> list[Trial]:
    """Return the failed trials that this attempt tries again, if it permits more failures than the previous attempt.
    Diverged trials are not among them, because the same parameters would diverge again."""
    before = journal.attempts[-1].get(_FAILURES, 0) if journal.attempts else None
    if before is None or plan.experiment.sweep.max_trial_failures <= before:
        return []
    return [t for t in journal.trials.values() if t.status is Status.FAILED and not t.diverged]


def describe_resume(plan: Plan, journal: TrialJournal) -> str:
    """Describe what a resumed sweep does with the trials in its journal.

    Raises:
        ConfigError: The journal has more trials than `sweep.num_samples`.
    """
    trials, total = list(journal.trials.values()), plan.total
    if total is not None and total < len(trials):
        raise ConfigError(
            f"is less than the {len(trials)} trials that were sampled; trials can be added, but not removed",
            key="sweep.num_samples",
            value=total,
        )
    retried = len(to_retry(plan, journal))
    open_ = sum(t.status.is_open for t in trials)
    failed = sum(t.status is Status.FAILED and not t.diverged for t in trials) - retried
    kept = len(trials) - open_ - retried
    parts = [f"{kept} ended trial{' is' if kept == 1 else 's are'} kept"]
    parts += [f"{open_} {'continues' if open_ == 1 else 'continue'}"] if open_ else []
    parts += [f"{retried} failed trial{' is' if retried == 1 else 's are'} retried"] if retried else []
    if total is None or total > len(trials):
        parts.append(
            "the remaining trials will be sampled" if total is None else f"{total - len(trials)} more will be sampled"
        )
    text = "resuming: " + ", ".join(parts)
    if failed and not retried:
        more = plan.experiment.sweep.max_trial_failures + 1
        text += f"; sweep.max_trial_failures={more} would retry the {failed} that failed"
    return text
