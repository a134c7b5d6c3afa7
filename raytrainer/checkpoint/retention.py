"""Find and delete the superfluous checkpoints of a run that has ended. During a run, `checkpoint_files.retain` does this."""

from __future__ import annotations

from dataclasses import dataclass

from raytrainer.checkpoint import checkpoint_files
from raytrainer.checkpoint import manifest as manifests
from raytrainer.storage import Storage


@dataclass(frozen=True)
class Surplus:
    """The superfluous checkpoints of a run, as names of directories.

    Attributes:
        old: Committed checkpoints that are neither among the last nor the best.
        unfinished: Saves that were never committed.
        kept: The last ones and the best.
    """

    old: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def surplus(storage: Storage, *, mode: str, keep: int = 1) -> Surplus:
    """Find the checkpoints below `storage` that are neither among the `keep` last ones nor the best.

    Checkpoints that are corrupt or that a newer format version wrote are left unchanged.

    Raises:
        StorageError: The storage cannot be read.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: must be at least 1, because the last checkpoint is always kept")
    entries = checkpoint_files.scan(storage)
    valid = checkpoint_files.committed(entries)
    kept = {item.name for item in valid[-keep:]}
    if (winner := checkpoint_files.best(valid, mode)) is not None:
        kept.add(winner.name)
    old = tuple(item.name for item in entries if item.manifest is not None and item.name not in kept)
    unfinished = tuple(item.name for item in entries if item.manifest is None and item.problem is None)
    return Surplus(old, unfinished, tuple(sorted(kept)))


def verify(storage: Storage, name: str) -> None:
    """Read a whole checkpoint and compare it with its checksums.

    Raises:
        CheckpointCorrupt, StorageError: It does not match its checksums, or cannot be read.
    """
    place = f"{name}/{manifests.NAME}"
    manifest = manifests.decode(storage.read_bytes(place), storage.where(place))
    manifests.verify(storage, name, manifest, sorted(manifest.files))


def delete(storage: Storage, name: str) -> None:
    """Delete a checkpoint's directory, its manifest first, so that an interrupted deletion leaves no valid checkpoint.

    Raises:
        StorageError: It cannot be deleted.
    """
    checkpoint_files.delete(storage, name)
