"""Record in the journal what a killed or stopped trial could not report. It is read from the trial's directory."""

from __future__ import annotations

import contextlib

from raytrainer.checkpoint import import_note
from raytrainer.errors import StorageError
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Report, Trial, TrialJournal
from raytrainer.sweep.plan import Plan
from raytrainer.tracking.keys import metric_key
from raytrainer.tracking.segments import last_logged
from raytrainer.tracking.spool import Spool, spool_of


def record_exploits(journal: TrialJournal, storage: Storage, plan: Plan) -> None:
    """Record what trials copied from others if the sweep was killed before they reported it."""
    for trial in journal.trials.values():
        if trial.status.is_open:
            note = import_note(storage.child(f"trials/{trial.id}/checkpoints"))
            if note is not None and note not in trial.inherited[-1:]:
                own = note["parameters"]
                journal.inherit(trial.id, note["from"], note["evaluation"], own, plan.overrides_of(own))


def record_last_evaluation(journal: TrialJournal, trial: Trial, directory: Storage, metric: str) -> None:
    """Record the evaluation that a trial logged but could not report before it was stopped, so that the journal agrees
    with MLflow. A trial waits after each report, so there is at most one.

    It does nothing for `train/…`, which is logged more often than it is reported, or if the spool is on another machine.
    Do not call it with a scheduler that pauses trials: the report would also have said which weights the trial copied.

    Args:
        journal: The journal.
        trial: The trial.
        directory: The trial's directory.
        metric: The metric of the sweep.
    """
    key = metric_key(metric)
    if key.startswith("train/"):
        return
    logged = None
    with contextlib.suppress(StorageError):  # the spool is a copy, so a damaged one must not fail the sweep
        logged = last_logged(Spool(spool_of(directory)), key)
    if logged is None:
        return
    at, step, metrics = logged
    last = trial.reports[-1] if trial.reports else None
    if last is None or step > last.step:
        number = 1 if last is None else last.evaluation + 1
        journal.report(trial.id, Report(number, step, metrics[key], metrics, at))
