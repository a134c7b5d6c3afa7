"""Sweeps: many trials of one experiment, drawn by a searcher, pruned by a scheduler of Ray Tune and kept in a journal.

    plan        what a sweep is, composed and checked      journal     what its trials did, append-only
    space       its parameters, as Tune takes them         search     what draws their values
    engine      Tune's loop, and who is told               schedule   what stops, pauses and clones trials
    driver      one attempt: Ray, MLflow, the status       trial      what runs in a trial's process
    table       what a person sees meanwhile               launching  the lock, the record, the directory
    outcome     and at the end                             results    what is left: tables, pictures, the best config
    lineage     whose parameters a population's value is of

Of a sweep over any other Hydra application (`hydra/sweeper=ray_tune`):

    settings    its `hydra.sweeper.*`                   application  one attempt, from beginning to end
    function    what runs in a trial's process          reporting    `report`, which applications call

Names are imported when they are first used: the plan and the journal need neither Ray nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.sweep.journal import Report, Trial, TrialJournal
    from raytrainer.sweep.launching import check, in_words, launch
    from raytrainer.sweep.outcome import SweepOutcome, summary
    from raytrainer.sweep.plan import Plan, make_plan
    from raytrainer.sweep.reporting import report
    from raytrainer.sweep.search import GridSearch, RandomSearch

__all__ = [
    "GridSearch",
    "Plan",
    "RandomSearch",
    "Report",
    "SweepOutcome",
    "Trial",
    "TrialJournal",
    "check",
    "in_words",
    "launch",
    "make_plan",
    "report",
    "summary",
]

_HOMES = {
    "GridSearch": "search",
    "TrialJournal": "journal",
    "Plan": "plan",
    "RandomSearch": "search",
    "Report": "journal",
    "SweepOutcome": "outcome",
    "Trial": "journal",
    "check": "launching",
    "in_words": "launching",
    "launch": "launching",
    "make_plan": "plan",
    "report": "reporting",
    "summary": "outcome",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.sweep' has no attribute {name!r}")
    found = getattr(import_module(f"raytrainer.sweep.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
