"""Which checkpoints of a run that has ended nobody needs any more, and deleting them. During a run `files.retain` does it."""

from __future__ import annotations

from dataclasses import dataclass

from raytrainer.checkpoint import files
from raytrainer.checkpoint import manifest as manifests
from raytrainer.storage import Storage


@dataclass(frozen=True)
class Surplus:
    """What can go of a run's checkpoints, by the names of their directories.

    Attributes:
        old: Beyond the last and the best.
        unfinished: Saves that never came to be.
        kept: The last and the best.
    """

    old: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def surplus(storage: Storage, *, mode: str, keep: int = 1) -> Surplus:
    """What of the checkpoints below `storage` is neither among the `keep` last ones nor the best. One that is corrupt, or that
    a newer format wrote, is left alone.

    Raises:
        StorageError: It cannot be looked at.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: the last one always stays")
    found = files.scan(storage)
    valid = files.committed(found)
    kept = {item.name for item in valid[-keep:]}
    if (winner := files.best(valid, mode)) is not None:
        kept.add(winner.name)
    old = tuple(item.name for item in found if item.manifest is not None and item.name not in kept)
    unfinished = tuple(item.name for item in found if item.manifest is None and item.problem is None)
    return Surplus(old, unfinished, tuple(sorted(kept)))


def verify(storage: Storage, name: str) -> None:
    """Reads a whole checkpoint and compares it with its checksums.

    Raises:
        CheckpointCorrupt, StorageError: It is not what was written, or cannot be read.
    """
    place = f"{name}/{manifests.NAME}"
    manifest = manifests.decode(storage.read_bytes(place), storage.where(place))
    manifests.verify(storage, name, manifest, sorted(manifest.files))


def delete(storage: Storage, name: str) -> None:
    """Deletes a checkpoint's directory, its manifest first, so that what a kill leaves is no checkpoint.

    Raises:
        StorageError: It cannot be deleted.
    """
    files.delete(storage, name)
