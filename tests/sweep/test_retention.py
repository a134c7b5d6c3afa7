"""Which checkpoints of a sweep's trials are kept."""

from __future__ import annotations

from pathlib import Path

from raytrainer.storage import Storage
from raytrainer.sweep.best_weights import TrialRetention
from raytrainer.sweep.journal import Report, Trial
from raytrainer.sweep.trial_state import Status


def ended(storage: Storage, number: str, value: float) -> Trial:
    """Return an ended trial whose checkpoint is on disk."""
    trial = Trial(number, {}, [], 0.0)
    trial.reports.append(Report(1, 10, value, {}, 1.0))
    trial.status = Status.FINISHED
    storage.write_bytes(f"trials/{number}/checkpoints/step-000000010/manifest.json", b"{}")
    return trial


def kept(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("trials/*/checkpoints")}


def test_only_the_best_are_kept(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    retention = TrialRetention(storage, 1, "min", [])
    for number, value in (("0001", 0.5), ("0002", 0.25), ("0003", 0.75)):
        retention.end(ended(storage, number, value), at_once=1)
    retention.close(wait=True)
    assert kept(tmp_path) == {"0002"}


def test_a_resume_deletes_what_a_killed_driver_left(tmp_path: Path) -> None:
    """A process may have finished a save after the first deletion; the second one is only in the driver's memory."""
    storage = Storage(str(tmp_path))
    trials = [ended(storage, number, value) for number, value in (("0001", 0.5), ("0002", 0.25), ("0003", 0.75))]
    TrialRetention(storage, 2, "min", trials).close(wait=True)
    assert kept(tmp_path) == {"0001", "0002"}


def test_all_are_kept_without_a_limit(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    TrialRetention(storage, None, "min", [ended(storage, "0001", 0.5)]).close(wait=True)
    assert kept(tmp_path) == {"0001"}
