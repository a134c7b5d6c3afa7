"""Runs and sweeps that are or were, wherever: one verb each, for a run's name, its MLflow id or its Ray submission id.

    finding     which run an ID means               listing    list: mine or all, the newest first
    again       resume and rerun: what is launched  status     status: one run, all that is known of it
    tree        rerun: the code that it ran with    logs       logs: of driver and ranks, now and afterwards
    liveness    whether a run's driver lives        stopping   stop: and waiting until all is free
    reconcile   closing runs that are surely dead   jobs       a shared cluster, as the verbs need it
    trained     whose checkpoints a verb reads       evaluating evaluate: one of them validated
    exporting   export: its weights and config      pruning    prune: what nobody needs any more
    commands    the verbs' arguments and output

Names are imported when they are first used: listing runs needs neither Ray nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.history.again import to_rerun, to_rerun_sweep, to_resume, to_resume_sweep
    from raytrainer.history.commands import command, completions, outcome_json, parser
    from raytrainer.history.evaluating import to_evaluate
    from raytrainer.history.finding import find, trial_of
    from raytrainer.history.tree import rerun_there

__all__ = [
    "command",
    "completions",
    "find",
    "outcome_json",
    "parser",
    "rerun_there",
    "to_evaluate",
    "to_rerun",
    "to_rerun_sweep",
    "to_resume",
    "to_resume_sweep",
    "trial_of",
]

_HOMES = {
    "command": "commands",
    "completions": "commands",
    "find": "finding",
    "outcome_json": "commands",
    "parser": "commands",
    "rerun_there": "tree",
    "to_evaluate": "evaluating",
    "to_rerun": "again",
    "to_rerun_sweep": "again",
    "to_resume": "again",
    "to_resume_sweep": "again",
    "trial_of": "finding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.history' has no attribute {name!r}")
    found = getattr(import_module(f"raytrainer.history.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
