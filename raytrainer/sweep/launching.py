"""Start or resume a sweep: check the plan, lock the sweep's directory, write the record and run the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

from raytrainer import attempt, tracking
from raytrainer.attempt import (
    CONFIG,
    Logs,
    Record,
    experiment_name,
    lock_owner,
    refuse_existing,
    tracking_uri,
    written_storage_path,
)
from raytrainer.config import mode_problem
from raytrainer.core.interrupts import Interrupts
from raytrainer.errors import ConfigError, PreflightError, StorageLocked
from raytrainer.progress import Display
from raytrainer.storage import Storage
from raytrainer.sweep.driver import SweepDriver, may_change
from raytrainer.sweep.journal import Mode, Trial, TrialJournal
from raytrainer.sweep.outcome import SweepOutcome
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.schedule import changes_parameters, check_bounded, make_scheduler
from raytrainer.sweep.search import check_search, total_of

_FAILURES = "max_trial_failures"  # key in the journal: the setting of an attempt


def check(
    plan: Plan,
    record: Record | None = None,
    *,
    first_batch: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Check everything that can be checked before the start. Return as text where a trial would run.

    Args:
        plan: The sweep.
        record: The record of the sweep to resume; None for a new sweep.
        first_batch, say: As for `attempt.check`, for the plan's example.

    Raises:
        Refused: A check failed.
    """
    s = plan.experiment.sweep
    check_search(s.search_alg, plan.parameters)
    scheduler = make_scheduler(
        s.scheduler,
        plan.parameters,
        mode=cast(Mode, plan.mode),
        evaluations=plan.evaluations,
        may_change=may_change(plan),
        search=s.search_alg,
    )
    check_bounded(scheduler, s.search_alg, s.num_samples)
    # Last, because the first-batch probe takes seconds, and the checks above are fast.
    return attempt.check(plan.example, record, first_batch=first_batch, say=say)


def describe_sweep(plan: Plan) -> str:
    """Describe the sweep, e.g. `64 trials of sweep=asha over optimizer.lr, model.width`."""
    s = plan.experiment.sweep
    total = total_of(s.search_alg, plan.parameters, s.num_samples, distinct=not changes_parameters(s.scheduler))
    count = "" if total is None else f"{total} trials of "
    return f"{count}sweep={plan.choice} over {', '.join(p.key for p in plan.parameters)}"


def to_retry(plan: Plan, journal: TrialJournal) -> list[Trial]:
    """Return the failed trials that this attempt tries again, if it permits more failures than the previous attempt.
    Diverged trials are not among them, because the same parameters would diverge again."""
    before = journal.attempts[-1].get(_FAILURES, 0) if journal.attempts else None
    if before is None or plan.experiment.sweep.max_trial_failures <= before:
        return []
    return [t for t in journal.trials.values() if t.status == "failed" and not t.diverged]


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
    open_ = sum(t.status in ("running", "stopped") for t in trials)
    failed = sum(t.status == "failed" and not t.diverged for t in trials) - retried
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


def launch(
    plan: Plan,
    *,
    argv: Sequence[str] = (),
    record: Record | None = None,
    display: Display | None = None,
    job: Mapping[str, str] | None = None,
) -> SweepOutcome:
    """Run a new sweep to its end, or resume one.

    Args:
        plan: The sweep. A resumed sweep needs the plan with which it was started.
        argv: The command line, for the records.
        record: The record of the sweep to resume; None for a new sweep.
        display: The display for progress.
        job: As for `attempt.launch`.

    Raises:
        Refused: The sweep was refused before anything started.
        Stopped: A signal arrived before anything started.
    """
    launched, e = time.time(), plan.experiment
    display = display or Display()
    where = check(plan, record, first_batch=e.preflight.first_batch is True, say=display.say)
    with Interrupts() as interrupts:
        storage = Storage(e.storage_path or "").child(e.name or "")
        with ExitStack() as held:
            try:
                lock = held.enter_context(storage.lock("lock", lock_owner(e.name or "", job)))
            except StorageLocked as error:
                raise PreflightError([str(error)]) from error
            if record is None:
                refuse_existing(e, storage)  # again, now that this process has the lock
            now = datetime.now(UTC).isoformat(timespec="seconds")
            journal = TrialJournal.open(storage)
            resumption = None if record is None else describe_resume(plan, journal)
            written = written_storage_path(plan.first)
            old = record or Record(e.name or "", storage.display, created=now, kind="sweep", storage_path=written)
            record = replace(
                old,
                tracking_uri=old.tracking_uri or tracking.redacted(tracking_uri(e)),
                choices=old.choices or dict(plan.first.choices),
                experiment_name=old.experiment_name or experiment_name(plan.first),
                job=dict(job or {}),
            ).begun(launched)
            storage.write_bytes(CONFIG, plan.first.text.encode())
            plan.write(storage)
            record.write(storage)
            storage = storage.anchored()  # if it is deleted from now on, no part of it is created again
            retried = to_retry(plan, journal)
            info = {"attempt": record.attempts, "argv": list(argv), "created": now}
            journal.begin({**info, _FAILURES: e.sweep.max_trial_failures})
            for trial in retried:
                journal.reopen(trial.id)
            with Logs(storage, display) as logs:
                logs.mark("checked")
                display.say(f"{record.name}: {describe_sweep(plan)}, {where}")
                if resumption is not None:
                    display.say(resumption)
                    if problem := mode_problem(e, objects=True, sweep=True):
                        display.say(f"warning: {problem}. This sweep keeps the mode that it was recorded with.")
                outcome = SweepDriver(
                    plan, record, storage, display, logs, lock, interrupts, journal, argv, where
                ).run()
    return replace(outcome, seconds=max(0.0, outcome.record.ended - launched))
