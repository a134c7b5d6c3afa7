"""Sweeps: many trials of one experiment, sampled by a searcher, pruned by a Ray Tune scheduler, recorded in a journal.

    plan          the composed and checked sweep          journal      the events of its trials; `journal_file`
    tune_space    the parameters as Tune's domains        search       the searchers that sample their values
    sampling      random draws and grids                  suggestions  the trials that Tune gets, in their order
    engine        the loop of Ray Tune                    schedule     the schedulers that stop, pause and clone trials
    launching     check, lock and start                   driver       one attempt: Ray, MLflow, the status
    room          how many trials run at a time           resuming     which trials a resumed sweep continues
    trial_state   the states of a trial                   stepped      what both kinds of trial processes share
    trial         the process that trains a trial         reuse        the reset of that process between two trials
    recovery      what a killed trial could not report    best_weights the checkpoints that are kept
    trial_runs    the MLflow runs of the trials           sweep_run    the MLflow run of the sweep
    board         the live table                          table        trials as text
    outcome       the summary at the end                  results      the files: tables, pictures, the best config
    lineage       parameters that changed during a trial  pictures     the two pictures; `picture_parts`

A sweep over any other Hydra application (`hydra/sweeper=ray_tune`):

    settings      the section `hydra.sweeper`             application  one attempt; `application_setup` checks it
    function      the process that calls the function     reporting    `report`, which applications call

Names are imported when they are first used, because the plan and the journal need neither Ray nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.sweep.journal import Report, Trial, TrialJournal
    from raytrainer.sweep.launching import check, describe_sweep, launch
    from raytrainer.sweep.outcome import SweepOutcome, summary
    from raytrainer.sweep.plan import Plan, make_plan
    from raytrainer.sweep.reporting import report
    from raytrainer.sweep.sampling import GridSearch, RandomSearch

__all__ = [
    "GridSearch",
    "Plan",
    "RandomSearch",
    "Report",
    "SweepOutcome",
    "Trial",
    "TrialJournal",
    "check",
    "describe_sweep",
    "launch",
    "make_plan",
    "report",
    "summary",
]

_HOMES = {
    "GridSearch": "sampling",
    "TrialJournal": "journal",
    "Plan": "plan",
    "RandomSearch": "sampling",
    "Report": "journal",
    "SweepOutcome": "outcome",
    "Trial": "journal",
    "check": "launching",
    "describe_sweep": "launching",
    "launch": "launching",
    "make_plan": "plan",
    "report": "reporting",
    "summary": "outcome",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.sweep' has no attribute {name!r}")
    value = getattr(import_module(f"raytrainer.sweep.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
