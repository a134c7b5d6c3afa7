"""Start or resume a sweep: check the plan, lock the sweep's directory, write the record and run the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from raytrainer import attempt
from raytrainer.attempt import Record, changes_meaning
from raytrainer.attempt.locking import locked_attempt
from raytrainer.attempt.record import next_attempt
from raytrainer.config import mode_problem, parameters_of
from raytrainer.progress import Display
from raytrainer.sweep.driver import SweepDriver
from raytrainer.sweep.journal import Mode, TrialJournal
from raytrainer.sweep.outcome import SweepOutcome
from raytrainer.sweep.plan import Plan
from raytrainer.sweep.resuming import begin_attempt, describe_resume
from raytrainer.sweep.schedule import changes_parameters, check_bounded, make_scheduler
from raytrainer.sweep.search import check_search, total_of

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler


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
    build_scheduler(plan)
    # Last, because the first-batch probe takes seconds, and the checks above are fast.
    return attempt.check(plan.example, record, first_batch=first_batch, say=say)


def build_scheduler(plan: Plan) -> TrialScheduler:
    """Check the searcher and the scheduler of a sweep. Return the scheduler, which serves one attempt.

    Raises:
        ConfigError: One of them cannot be built, or they do not support the parameters.
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
    return scheduler


def describe_sweep(plan: Plan) -> str:
    """Describe the sweep, e.g. `64 trials of sweep=asha over optimizer.lr, model.width`."""
    s = plan.experiment.sweep
    total = total_of(s.search_alg, plan.parameters, s.num_samples, distinct=not changes_parameters(s.scheduler))
    count = "" if total is None else f"{total} trials of "
    return f"{count}sweep={plan.choice} over {', '.join(p.key for p in plan.parameters)}"


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
    scheduler = build_scheduler(plan)
    where = attempt.check(plan.example, record, first_batch=e.preflight.first_batch is True, say=display.say)
    with locked_attempt(e, new=record is None, display=display, argv=argv, job=job) as this:
        journal = TrialJournal.open(this.storage)
        resumption = None if record is None else describe_resume(plan, journal)
        record = next_attempt(record, plan.first, this.storage, launched=launched, job=job, kind="sweep")
        this.prepare(record, where, needs_tracking=e.tracking.required)
        plan.write(this.storage)
        this.record_start(plan.first)
        begin_attempt(journal, plan, record, argv)
        this.open_logs()
        display.say(f"{record.name}: {describe_sweep(plan)}, {where}")
        if resumption is not None:
            display.say(resumption)
            if problem := mode_problem(e, objects=True, sweep=True):
                display.say(f"warning: {problem}. This sweep keeps the mode that it was recorded with.")
        outcome = this.run(SweepDriver(plan, this, journal, scheduler))
    return replace(outcome, seconds=max(0.0, outcome.record.ended - launched))


def may_change(plan: Plan) -> Callable[[str], bool]:
    """Return a function that says whether a parameter may change during a trial, as in population based training."""

    def may(key: str) -> bool:
        key = key.lstrip("+")
        if changes_meaning(key):
            return False
        nodes = (
            [c.experiment.lr_scheduler for c in plan.compositions.values()] if key.startswith("lr_scheduler.") else []
        )
        # A scheduler with an optimizer has a state, which would restore the old values.
        return not any(node and "optimizer" in parameters_of("lr_scheduler", node) for node in nodes)

    return may
