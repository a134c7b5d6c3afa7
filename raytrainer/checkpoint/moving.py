"""A checkpoint carried from one run's storage to another's, as population based training does with its best trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrainer.checkpoint import files
from raytrainer.checkpoint import manifest as manifests
from raytrainer.checkpoint.checkpointer import Checkpointer
from raytrainer.checkpoint.manifest import CheckpointInfo
from raytrainer.errors import CheckpointNotFound
from raytrainer.storage import Storage

_NOTE = "taken_in.json"  # beside the checkpoints: where the first of them came from


def copy_out(storage: Storage, directory: Path) -> CheckpointInfo:
    """Copies the newest committed checkpoint below `storage` into the local `directory`, under its own name.

    Raises:
        CheckpointNotFound: There is none.
    """
    found = Checkpointer(storage).list()
    if not found:
        raise CheckpointNotFound(f"no checkpoint in {storage.display}")
    storage.download_tree(found[-1].name, directory / found[-1].name)
    return found[-1]


def take_in(
    directory: Path, storage: Storage, note: Mapping[str, Any] | None = None, *, mode: str | None = None
) -> None:
    """Makes the checkpoint in the local `directory` the only one below `storage` that is gone on from.

    Killed on the way it leaves that checkpoint uncommitted, never a mixture: the manifest comes last.

    Args:
        directory: As `copy_out` has left it.
        storage: Of the run that goes on with it.
        note: Plain JSON that `taken_in` finds from the moment in which the checkpoint is committed.
        mode: `max` or `min`: the best of the checkpoints that are there is put aside, where `Checkpointer.best` finds it.
            None: all of them are deleted.

    Raises:
        CheckpointNotFound: `directory` has none.
    """
    source = Storage(str(directory))
    found = Checkpointer(source).list()
    if not found:
        raise CheckpointNotFound(f"no checkpoint in {directory}")
    if mode is not None:
        _put_aside(storage, mode)
    for entry in storage.list():
        if entry.name != files.ASIDE or mode is None:
            storage.delete(entry.name)
    if note is not None:
        storage.write_bytes(_NOTE, json.dumps(dict(note)).encode())
    _copy(source, found[-1].name, storage, found[-1].name)


def _copy(source: Storage, name: str, storage: Storage, new: str) -> None:
    """Copies a checkpoint; its manifest comes last."""
    for file in source.list(name):
        if file.name != manifests.NAME:
            with source.open_read(f"{name}/{file.name}") as read, storage.open_write(f"{new}/{file.name}") as write:
                while block := read.read(8 << 20):
                    write.write(block)
    storage.write_bytes(f"{new}/{manifests.NAME}", source.read_bytes(f"{name}/{manifests.NAME}"))


def _put_aside(storage: Storage, mode: str) -> None:
    """Keeps the best checkpoint below `storage` in a place of its own, and none that is worse."""
    winner = files.best([*files.put_aside(storage), *files.committed(files.scan(storage))], mode)
    if winner is None or winner.name.startswith(f"{files.ASIDE}/"):
        return
    aside = storage.child(files.ASIDE)
    aside.delete(winner.name)
    _copy(storage, winner.name, aside, winner.name)
    for entry in aside.list():
        if entry.name != winner.name:
            aside.delete(entry.name)


def taken_in(storage: Storage) -> dict[str, Any] | None:
    """The note of the last checkpoint that was taken in below `storage`, also when others have followed it.

    That of one which never was committed is deleted.
    """
    data = storage.read_if_exists(_NOTE)
    if data is None:
        return None
    if not Checkpointer(storage).list():
        storage.delete(_NOTE)
        return None
    found: dict[str, Any] = json.loads(data)
    return found
