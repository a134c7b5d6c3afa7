"""Copy a checkpoint from one run's storage to another's. Population based training does this with its best trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrainer.checkpoint import checkpoint_files
from raytrainer.checkpoint import manifest as manifests
from raytrainer.checkpoint.checkpointer import Checkpointer
from raytrainer.checkpoint.manifest import CheckpointInfo
from raytrainer.errors import CheckpointNotFound
from raytrainer.storage import Storage

_NOTE = "import_note.json"  # beside the checkpoints: says where the first of them came from


def copy_out(storage: Storage, directory: Path) -> CheckpointInfo:
    """Copy the newest committed checkpoint below `storage` into the local `directory`, under the same name.

    Raises:
        CheckpointNotFound: There is none.
    """
    checkpoints = Checkpointer(storage).list()
    if not checkpoints:
        raise CheckpointNotFound(f"no checkpoint in {storage.display}")
    storage.download_tree(checkpoints[-1].name, directory / checkpoints[-1].name)
    return checkpoints[-1]


def import_checkpoint(
    directory: Path, storage: Storage, note: Mapping[str, Any] | None = None, *, mode: str | None = None
) -> None:
    """Make the checkpoint in the local `directory` the only one below `storage` from which a run continues.

    The manifest is copied last, so an interruption leaves that checkpoint uncommitted and never mixes two.

    Args:
        directory: The directory that `copy_out` filled.
        storage: The storage of the run that continues from the checkpoint.
        note: Plain JSON that `import_note` returns once the checkpoint is committed.
        mode: `max` or `min`: keep the best of the existing checkpoints aside, where `Checkpointer.best` finds it. None:
            delete all of them.

    Raises:
        CheckpointNotFound: `directory` has no checkpoint.
    """
    source = Storage(str(directory))
    checkpoints = Checkpointer(source).list()
    if not checkpoints:
        raise CheckpointNotFound(f"no checkpoint in {directory}")
    if mode is not None:
        _put_aside(storage, mode)
    for entry in storage.list():
        if entry.name != checkpoint_files.ASIDE or mode is None:
            storage.delete(entry.name)
    if note is not None:
        storage.write_bytes(_NOTE, json.dumps(dict(note)).encode())
    _copy(source, checkpoints[-1].name, storage, checkpoints[-1].name)


def _copy(source: Storage, name: str, storage: Storage, new: str) -> None:
    """Copy a checkpoint, its manifest last."""
    for file in source.list(name):
        if file.name != manifests.NAME:
            with source.open_read(f"{name}/{file.name}") as read, storage.open_write(f"{new}/{file.name}") as write:
                while block := read.read(8 << 20):
                    write.write(block)
    storage.write_bytes(f"{new}/{manifests.NAME}", source.read_bytes(f"{name}/{manifests.NAME}"))


def _put_aside(storage: Storage, mode: str) -> None:
    """Keep the best checkpoint below `storage` in `ASIDE`, and delete worse ones there."""
    winner = checkpoint_files.best(
        [*checkpoint_files.put_aside(storage), *checkpoint_files.committed(checkpoint_files.scan(storage))], mode
    )
    if winner is None or winner.name.startswith(f"{checkpoint_files.ASIDE}/"):
        return
    aside = storage.child(checkpoint_files.ASIDE)
    aside.delete(winner.name)
    _copy(storage, winner.name, aside, winner.name)
    for entry in aside.list():
        if entry.name != winner.name:
            aside.delete(entry.name)


def import_note(storage: Storage) -> dict[str, Any] | None:
    """Return the note of the last checkpoint that was taken in below `storage`, even if later checkpoints exist.

    A note whose checkpoint was never committed is deleted.
    """
    data = storage.read_if_exists(_NOTE)
    if data is None:
        return None
    if not Checkpointer(storage).list():
        storage.delete(_NOTE)
        return None
    note: dict[str, Any] = json.loads(data)
    return note
