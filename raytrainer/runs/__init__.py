"""The commands for existing runs and sweeps. They take a run's name, its MLflow id or its Ray submission id.

    finding     the run that an ID means            listing    list: my runs or all, the newest first
    again       resume and rerun: what they launch  status     status: all that is known of one run
    tree        rerun: the code of the original     logs       logs: of driver and ranks, live or afterwards
    liveness    whether a run's driver is alive     stopping   stop: and wait until all resources are free
    reconcile   closing runs whose driver is dead   jobs       shared clusters, as the commands need them
    trained     the run of a checkpoint             evaluating evaluate: validate a checkpoint
    exporting   export: weights and config          pruning    prune: delete what is no longer needed
    commands    the commands' arguments and output  run_summary what `list` and `status` show of a run

Names are imported when they are first used, so that listing runs needs neither Ray nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrainer.runs.evaluate import to_evaluate
    from raytrainer.runs.resolve import find, trial_of
    from raytrainer.runs.resume import to_rerun, to_rerun_sweep, to_resume, to_resume_sweep
    from raytrainer.runs.verbs import command, completions, outcome_json, parser
    from raytrainer.runs.worktree import rerun_there

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
    "command": "verbs",
    "completions": "verbs",
    "find": "resolve",
    "outcome_json": "verbs",
    "parser": "verbs",
    "rerun_there": "worktree",
    "to_evaluate": "evaluate",
    "to_rerun": "resume",
    "to_rerun_sweep": "resume",
    "to_resume": "resume",
    "to_resume_sweep": "resume",
    "trial_of": "resolve",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raytrainer.runs' has no attribute {name!r}")
    found = getattr(import_module(f"raytrainer.runs.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
