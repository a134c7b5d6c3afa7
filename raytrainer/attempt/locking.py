"""The lock on the directory of a run or a sweep, which makes sure that one attempt at a time works on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from raytrainer.attempt.lifecycle import Attempt
from raytrainer.attempt.record import CONFIG
from raytrainer.config import Experiment
from raytrainer.core.interrupts import Interrupts
from raytrainer.errors import ConfigError, PreflightError, StorageLocked
from raytrainer.progress import Display
from raytrainer.storage import Storage, redacted


@contextlib.contextmanager
def locked_attempt(
    e: Experiment,
    *,
    new: bool,
    display: Display,
    argv: Sequence[str] = (),
    job: Mapping[str, str] | None = None,
) -> Iterator[Attempt]:
    """Install the signal handlers, lock the directory, and yield an attempt in it. At the end, undo both.

    Args:
        e: The experiment, whose `storage_path` and `name` give the directory.
        new: Whether the run or sweep must not exist yet.
        display: The display.
        argv: The command line, for the records.
        job: The job on a shared cluster, as in `Record.job`.

    Raises:
        PreflightError: Another process holds the lock.
        ConfigError: `new`, and there is one.
        Stopped: A signal arrived outside `Attempt.run`.
    """
    with Interrupts() as interrupts, ExitStack() as held:
        storage = Storage(storage_path(e)).child(e.name or "")
        try:
            lock = held.enter_context(storage.lock("lock", lock_owner(e.name or "", job)))
        except StorageLocked as error:
            raise PreflightError([str(error)]) from error
        if new:
            refuse_existing(e, storage)  # again after `check`, now that this process has the lock
        yield Attempt(e, storage, lock, interrupts, display, argv, held)


def refuse_existing(e: Experiment, storage: Storage) -> None:
    """Refuse a new run whose directory has a run already, so that it is never continued by accident.

    Raises:
        ConfigError: The run exists.
    """
    if storage.exists(CONFIG) or storage.exists("checkpoints"):
        raise ConfigError(
            f"is the name of an existing run in {shown(e)}; resume {e.name} continues it, another name starts a new run",
            key="name",
            value=e.name,
        )


def lock_owner(name: str, job: Mapping[str, str] | None) -> dict[str, str]:
    """Return the owner for the lease on a run directory. It names the job, so that others can query its status."""
    submission = (job or {}).get("submission_id")
    return {"run": name} if submission is None else {"run": name, "job": submission}


def storage_path(e: Experiment) -> str:
    assert e.storage_path is not None  # the configuration makes it absolute
    return e.storage_path


def shown(e: Experiment) -> str:
    """Return `storage_path` without a password, for messages."""
    return redacted(storage_path(e))
