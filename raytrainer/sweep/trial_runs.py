"""The MLflow runs of a sweep's trials: opened when a trial starts, filled from its spool, and ended with its status."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path

from raytrainer import tracking
from raytrainer.attempt.lifecycle import Attempt
from raytrainer.attempt.outcome import Status as RunStatus
from raytrainer.errors import StorageError
from raytrainer.storage import Storage
from raytrainer.sweep.journal import ERROR, Mode, Trial, TrialJournal
from raytrainer.sweep.trial_state import Status
from raytrainer.tracking.keys import metric_key
from raytrainer.tracking.spool import spool_of

_PARENT_S = 2.0  # timeout for creating the sweep's own run from its spool
# Between two looks at the spools. With trial processes that upload by themselves, another process waits for the
# creation of each MLflow run.
_INTERVAL_S, _INTERVAL_WAITED_FOR_S = 2.0, 0.3

# MLflow's status for each status of a trial. The tag raytrainer.trial_status has our own.
_IN_MLFLOW: Mapping[Status, RunStatus] = {
    Status.FINISHED: "FINISHED",
    Status.PRUNED: "KILLED",
    Status.STOPPED: "KILLED",
    Status.FAILED: "FAILED",
}


class TrialRuns:
    """The child runs of one attempt of a sweep. A thread uploads them.

    Args:
        attempt: The attempt.
        journal: The journal, which gets the id of each MLflow run.
        metric, mode: The objective.
        trials_upload: Whether trial processes upload their metrics themselves, because this machine cannot read their
            spools.
    """

    def __init__(
        self, attempt: Attempt, journal: TrialJournal, *, metric: str, mode: Mode, trials_upload: bool
    ) -> None:
        self._attempt, self._journal, self._mode = attempt, journal, mode
        self._best_metric = metric_key(f"best/{metric}")
        self._parent: str | None = None
        self._trial_of: dict[Path, str] = {}  # the trial of each spool
        self._opened: set[str] = set()  # trials that the uploader knows
        self._uploader = tracking.ChildRunUploader(
            attempt.tracking_uri,
            attempt.record.experiment_name,
            parent=self._parent_run,
            on_created=self._created,
            interval_s=_INTERVAL_WAITED_FOR_S if trials_upload else _INTERVAL_S,
        )

    def adopt_unsent(self) -> None:
        """Upload the unsent metrics of earlier attempts, for every trial that has an MLflow run. Otherwise those of a
        trial that this attempt never reaches would not be uploaded."""
        for trial in self._journal.trials.values():
            if trial.run_id is not None:
                spool = spool_of(self._directory(trial))
                self._trial_of[spool] = trial.id
                if self._uploader.adopt(spool, trial.run_id):
                    self._opened.add(trial.id)

    def open(self, trial: Trial) -> str:
        """Open the trial's run. Return its id, which is a local one until the server has created the run.

        Raises:
            StorageGone: The sweep's directory was deleted.
        """
        self._attempt.storage.check_there()
        directory, name = self._directory(trial), self._attempt.record.name
        spool = spool_of(directory)
        self._trial_of[spool] = trial.id
        self._opened.add(trial.id)
        return self._uploader.open(
            spool,
            f"{name}.{trial.id}",
            params={mlflow_name(key): str(value) for key, value in trial.parameters.items()},
            tags={
                "raytrainer.name": f"{name}.{trial.id}",
                "raytrainer.kind": "trial",
                "raytrainer.sweep": name,
                "raytrainer.run_dir": directory.display,
                "raytrainer.overrides": " ".join(trial.overrides),
            },
            run_id=trial.run_id,
        )

    def finish(self, trial: Trial) -> None:
        """Set the final status of the trial's run, and its best value."""
        if trial.id not in self._opened:  # this attempt did not reach the trial
            self.open(trial)
        tags = {"raytrainer.trial_status": str(trial.status)}
        if trial.inherited:  # the overrides are no longer those of its start
            tags["raytrainer.overrides"] = " ".join(trial.overrides)
        metrics, texts = {}, {}
        if (best := trial.best(self._mode)) is not None:
            tags |= {"raytrainer.best_value": repr(best.value), "raytrainer.best_step": str(best.step)}
            metrics[self._best_metric] = (best.value, best.step, best.time)
        if trial.error is not None:
            with contextlib.suppress(StorageError):  # the cause is recorded in any case
                texts[ERROR] = self._attempt.storage.read_bytes(trial.error).decode(errors="replace")
        spool = spool_of(self._directory(trial))
        self._uploader.finish(spool, _IN_MLFLOW[trial.status], trial.cause, tags=tags, metrics=metrics, texts=texts)

    def close(self, timeout_s: float) -> bool:
        """Upload what is left, for at most `timeout_s`. Return whether everything is in MLflow."""
        return self._uploader.close(timeout_s)

    def _directory(self, trial: Trial) -> Storage:
        return self._attempt.storage.child(f"trials/{trial.id}")

    def _created(self, spool_dir: Path, run_id: str) -> None:
        """Record the MLflow run of a trial. The uploader's thread calls this when the run is created."""
        # The disk may be full or the journal closed; the run's tag has the id too.
        with contextlib.suppress(StorageError, AssertionError, KeyError):
            self._journal.note_run(self._trial_of[spool_dir], run_id)

    def _parent_run(self) -> str | None:
        """Return the sweep's MLflow run, or None. The uploader's thread calls this, and creates the run here if the
        server was unreachable at first."""
        run = self._attempt.run_opened
        if run is None:
            return None
        if not run.offline:
            return run.run_id
        if self._parent is None:
            try:
                tracking.replay(self._attempt.spool_dir, run.run_id, self._attempt.tracking_uri, timeout_s=_PARENT_S)
            finally:
                self._parent = tracking.recorded_run_id(self._attempt.spool_dir)
        return self._parent


def mlflow_name(key: str) -> str:
    """Return a parameter's key with the characters that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", key.lstrip("+"))
