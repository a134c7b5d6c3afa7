"""The checkpoints of a sweep's trials: which are kept, and where the weights of the best trial are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from raytrainer.errors import RaytrainerError, StorageError
from raytrainer.storage import Storage
from raytrainer.sweep.journal import Mode, Trial
from raytrainer.sweep.table import ranked

INTERVAL_S = 10  # seconds between checkpoints of a trial, if the config does not set it
_log = logging.getLogger("raytrainer.sweep")


class TrialRetention:
    """The retention of checkpoints: those of the best ended trials are kept, those of the others are deleted.

    Args:
        storage: The sweep's directory.
        keep: `sweep.num_to_keep`; None to keep all.
        mode: The mode of the objective.
        ended: The trials that have ended in earlier attempts.
    """

    def __init__(self, storage: Storage, keep: int | None, mode: Mode, ended: Iterable[Trial]) -> None:
        self._storage, self._keep, self._mode = storage, keep, mode
        ended = list(ended)
        self._kept = ranked(ended, mode)[:keep]
        # Trials to delete again, because a process may have written one more checkpoint.
        self._deleted: list[Trial] = []
        # In a thread, because deletion on a slow disk takes long.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sweep-retention")
        if keep is not None:  # again, because a driver that was killed may not have deleted them
            for trial in ended:
                if trial not in self._kept:
                    self._delete(trial)

    def end(self, trial: Trial, at_once: int) -> None:
        """Take an ended trial into account. `at_once` is how many trials run at a time."""
        if self._keep is None:
            return
        self._kept.append(trial)
        while len(self._kept) > self._keep:
            valued = ranked(self._kept, self._mode)
            worst = next((t for t in self._kept if t not in valued), None) or valued[-1]
            self._kept.remove(worst)
            self._delete(worst)
            self._deleted.append(worst)
        while len(self._deleted) > at_once + 1:
            self._delete(self._deleted.pop(0))

    def close(self, *, wait: bool) -> None:
        """Delete what is left to delete. Without `wait`, give up what has not begun."""
        for trial in self._deleted:
            self._delete(trial)
        self._thread.shutdown(wait=wait, cancel_futures=not wait)

    def _delete(self, trial: Trial) -> None:
        self._thread.submit(_delete_checkpoints, self._storage.child(f"trials/{trial.id}"))


def _delete_checkpoints(directory: Storage) -> None:
    try:
        directory.delete("checkpoints")
    except StorageError as error:
        _log.warning("the checkpoints of a trial could not be deleted: %s", error)


def best_weights(storage: Storage, trials: Sequence[Trial], mode: Mode, *, min_interval_s: float | None) -> str | None:
    """Return as text where the best trial's weights are; None if there are none.

    They belong to another step than the best value only if the process was killed before it wrote the weights that were
    in memory.

    Args:
        storage: The sweep's directory.
        trials: All trials.
        mode: The mode of the objective.
        min_interval_s: `checkpoint.min_interval_s`.
    """
    from raytrainer.checkpoint import Checkpointer

    for trial in ranked(trials, mode)[:1]:
        report = trial.best(mode)
        assert report is not None
        try:
            checkpointer = Checkpointer(storage.child(f"trials/{trial.id}/checkpoints"), mode=mode)
            checkpoints, best = checkpointer.list(), checkpointer.best()
        except RaytrainerError as error:
            return f"cannot be read: {error}"
        exact = [info for info in (best, *checkpoints) if info is not None and info.step == report.step]
        if exact:
            return exact[0].path
        if checkpoints:
            info = best or checkpoints[-1]
            apart = INTERVAL_S if min_interval_s is None else min_interval_s
            return (
                f"of step {info.step}: the trial was stopped before those of step {report.step} were written, since "
                f"checkpoints are at least {apart:g} s apart (checkpoint.min_interval_s): {info.path}"
            )
    return None
