"""A lock that names its owner and needs no more of a storage than files: a claim each, and a listing.
It works the same on a local disk, a shared mount and an object store, and outlives a killed owner by little."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from raytrainer.errors import StorageError, StorageGone, StorageLocked

if TYPE_CHECKING:
    from types import TracebackType

    from raytrainer.storage.files import Storage

_log = logging.getLogger("raytrainer.storage")

_POLL_S = 0.05
_CLAIM = re.compile(r"[0-9a-f]{32}\.json")


class Lock:
    """One claim on a directory. Each contender writes a claim under a name of its own, then looks at the others'
    (Lamport's bakery): who has announced itself first is seen by the later one, so at most one holds. A stale claim
    is deleted by whoever finds it; as no name is ever used twice, that cannot delete another's.

    Stale is a claim of a process that is gone (same machine since its boot, same process namespace), or one whose
    heartbeat is older than `limit_s`, by the storage's own clock.

    Use it as a context manager, or with `acquire` and `release`. StorageLocked names the owner: its fields, host, pid
    and since when.
    """

    def __init__(self, directory: Storage, owner: Mapping[str, str], *, limit_s: float = 60.0) -> None:
        self._directory, self._limit_s = directory, limit_s
        self._name = uuid.uuid4().hex
        self._owner = {
            **owner,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._machine, self._started = machine(), process_start(os.getpid())
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = False

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> Lock:
        """Take it, or raise StorageLocked at once (after some seconds where two ask at the same moment)."""
        claim = {"owner": self._owner, "machine": self._machine, "started": self._started}
        self._content = json.dumps(claim, indent=1).encode()
        self._directory.write_bytes(f"{self._name}.json", self._content)
        try:
            deadline = time.monotonic() + self._limit_s
            while True:
                rivals = self._rivals()
                for rival in rivals:
                    # Of two that ask at once the lower name waits for the other to decide; the higher gives up.
                    if rival.held or rival.name < self._name or time.monotonic() > deadline:
                        raise StorageLocked(f"{self._directory.display} is in use by {named(rival.owner)}")
                if not rivals:
                    break
                time.sleep(_POLL_S)
            # A second file rather than another content: a name that is replaced while a rival lists might escape it.
            self._directory.write_bytes(f"{self._name}.held", b"")
        except BaseException:
            self._remove(self._name)
            raise
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="raytrainer-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Give it up; nothing if it was not held."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._remove(self._name)

    def check(self) -> None:
        """StorageLocked if another took this claim for stale and removed it (after a long loss of contact); StorageGone if
        the whole directory is not there any more."""
        if self._is_gone():
            raise StorageGone(
                f"The run's directory {self._directory.local_path.parent} is gone: it was deleted or moved while the run was "
                "going on"
            )
        if self._lost:
            raise StorageLocked(f"{self._directory.display} was taken over while {named(self._owner)} was out of touch")

    def _remove(self, name: str) -> None:
        self._directory.delete(f"{name}.held")
        self._directory.delete(f"{name}.json")

    def _rivals(self) -> list[Claim]:
        """The live claims of others; stale ones are removed on the way."""
        found = {claim.name: claim for claim in claims(self._directory)}
        mine = found.pop(self._name, None)
        rivals = []
        for claim in found.values():
            # Both times are the storage's own, of our claim and of that one: no clock of ours takes part.
            age = mine.beat - claim.beat if mine is not None else 0.0
            if not claim.lives if claim.is_here else age > self._limit_s:
                _log.warning("taking over the stale lock of %s", named(claim.owner))
                withdraw(self._directory, claim)
            else:
                rivals.append(claim)
        return rivals

    def _beat(self) -> None:
        while not self._stop.wait(self._limit_s / 6):
            try:
                if not self._touch():
                    self._lost = True
                    if self._is_gone():  # `check` says so
                        return
                    _log.error("the lock %s was taken over by another", self._directory.display)
                    return
            except StorageError as exc:  # the next beat may get through; a takeover is seen then
                _log.warning("no heartbeat for the lock: %s", exc)

    def _is_gone(self) -> bool:
        """Whether the directory that the lock is of was deleted, rather than the claim."""
        return self._directory.is_local and not self._directory.local_path.parent.is_dir()

    def _touch(self) -> bool:
        """Renew the claim's time; False if it is gone."""
        claim = f"{self._name}.json"
        if self._directory.is_local:
            try:
                os.utime(self._directory.local_path / claim)
            except FileNotFoundError:
                return False
            except OSError as exc:
                raise StorageError(f"{self._directory.where(claim)}: {exc.strerror}") from exc
            return True
        if not self._directory.exists(claim):
            return False
        self._directory.write_bytes(claim, self._content)
        return True


@dataclass(frozen=True, slots=True)
class Claim:
    """What a contender for a lock, or its owner, has written.

    Attributes:
        name: Of its file, used once.
        held: Whether it has the lock, rather than asks for it.
        owner: As given to `Lock`, with `host`, `pid` and `since`.
        machine, started: Of its process: see `machine` and `process_start`.
        beat: When it last showed life, in seconds since the epoch by the storage's clock; 0.0 where unknown.
    """

    name: str
    held: bool
    owner: dict[str, str]
    machine: str | None
    started: str | None
    beat: float = 0.0

    @property
    def is_here(self) -> bool:
        """Whether its process is, or was, one of this machine's: then it is known whether it lives."""
        return self.machine is not None and self.machine == machine()

    @property
    def lives(self) -> bool:
        """Whether its process, one of this machine's, is there: a later one with its number is another."""
        pid = self.owner.get("pid", "")
        return pid.isdecimal() and process_start(int(pid)) == self.started is not None


def claims(directory: Storage) -> list[Claim]:
    """All that is written in a lock's directory, stale ones too; nothing is changed."""
    entries = {entry.name: entry for entry in directory.list()}
    found = []
    for name in (entry.removesuffix(".json") for entry in entries if _CLAIM.fullmatch(entry)):
        data = directory.read_if_exists(f"{name}.json")
        if data is not None:  # else given up since the listing
            held = f"{name}.held" in entries
            found.append(_parse(name, data, held=held, beat=entries[f"{name}.json"].mtime))
    return found


def withdraw(directory: Storage, claim: Claim) -> None:
    """Removes a claim whose process is known to be dead by another way, before it is old."""
    for kind in ("held", "json"):
        directory.delete(f"{claim.name}.{kind}")


@cache
def machine() -> str | None:
    """This machine since its boot and this process namespace, within which process numbers mean something; None where
    it cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot: with its number it names one process. None if
    there is none (a zombie, which only waits to be reaped, counts as none)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the command in parentheses, may hold anything: count from its last parenthesis.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _parse(name: str, data: bytes, *, held: bool, beat: float) -> Claim:
    """A claim; one that cannot be read is a live stranger's, judged by its age alone."""
    try:
        claim = json.loads(data)
        owner = {str(key): str(value) for key, value in claim["owner"].items()}
        return Claim(name, held, owner, claim["machine"], claim["started"], beat)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Claim(name, held, {"run": "an unreadable claim"}, None, None, beat)


def named(owner: Mapping[str, str]) -> str:
    """An owner in words, e.g. `NAME (host HOST, pid 12, since …)`."""
    rest = ", ".join(f"{key} {value}" for key, value in owner.items() if key != "run")
    return f"{owner.get('run', 'another process')} ({rest})" if rest else owner.get("run", "another process")
