"""A lock on a directory that names its owner. It needs only files and a listing, so it works the same on a local disk, a
shared mount and an object store. Soon after its owner is killed, others can take it."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from raytrainer.errors import StorageError, StorageGone, StorageLocked

if TYPE_CHECKING:
    from types import TracebackType

_log = logging.getLogger("raytrainer.storage")

_POLL_S = 0.05
_LEASE = re.compile(r"[0-9a-f]{32}\.json")


class LeaseFile(Protocol):
    """One file in a listing. `mtime` is in seconds since the epoch, by the storage's clock."""

    @property
    def name(self) -> str: ...
    @property
    def mtime(self) -> float: ...


class LeaseDirectory(Protocol):
    """The directory in which a lock keeps its leases. A `Storage` is one; see there for each method."""

    @property
    def display(self) -> str: ...
    @property
    def is_local(self) -> bool: ...
    @property
    def local_path(self) -> Path: ...
    def list(self) -> Sequence[LeaseFile]: ...
    def read_if_exists(self, rel: str, /) -> bytes | None: ...
    def write_bytes(self, rel: str, data: bytes, /) -> None: ...
    def delete(self, rel: str, /) -> None: ...


class Lock:
    """A lease on a directory, as a context manager or with `acquire` and `release`.

    Each contender writes a lease file with a unique name and then lists the leases of the others, as in Lamport's bakery
    algorithm. The later of two contenders always sees the earlier one, so at most one holds the lock. Whoever finds a
    stale lease deletes it. Names are never reused, so this cannot delete another owner's lease.

    A lease is stale if its process has ended (on the same machine since its boot, in the same process namespace), or if
    its heartbeat is older than `limit_s` by the storage's own clock.

    Args:
        directory: The directory for the lease files.
        owner: What an error says about the owner; `host`, `pid` and `since` are added.
        limit_s: The age, in seconds, at which another machine's lease is stale.
        clock, sleep: Replaced in tests.
    """

    def __init__(
        self,
        directory: LeaseDirectory,
        owner: Mapping[str, str],
        *,
        limit_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._directory, self._limit_s, self._clock, self._sleep = directory, limit_s, clock, sleep
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
        """Take the lock.

        Raises:
            StorageLocked: Another process holds it; the message names that process. It is raised at once, or after some
                seconds if two processes ask at the same moment.
        """
        lease = {"owner": self._owner, "machine": self._machine, "started": self._started}
        self._content = json.dumps(lease, indent=1).encode()
        self._directory.write_bytes(f"{self._name}.json", self._content)
        try:
            deadline = self._clock() + self._limit_s
            while True:
                rivals = self._rivals()
                for rival in rivals:
                    # Of two contenders, the one with the lower name waits for the decision of the other, which gives up.
                    if rival.held or rival.name < self._name or self._clock() > deadline:
                        raise StorageLocked(f"{self._directory.display} is in use by {named(rival.owner)}")
                if not rivals:
                    break
                self._sleep(_POLL_S)
            # A second file, not new content: a rival's listing could miss a file that is replaced meanwhile.
            self._directory.write_bytes(f"{self._name}.held", b"")
        except BaseException:
            self._remove(self._name)
            raise
        self._stop.clear()
        self._thread = threading.Thread(target=self._send_heartbeats, name="raytrainer-lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Release the lock. Does nothing if it is not held."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._remove(self._name)

    def check(self) -> None:
        """Check that the lock is still held.

        Raises:
            StorageLocked: Another process took over, after this one had no contact with the storage for too long.
            StorageGone: The whole directory was deleted or moved.
        """
        if self._is_gone():
            raise StorageGone(
                f"The run's directory {self._directory.local_path.parent} is gone: it was deleted or moved "
                "during the run"
            )
        if self._lost:
            raise StorageLocked(
                f"{self._directory.display} was taken over while {named(self._owner)} sent no heartbeat"
            )

    def _remove(self, name: str) -> None:
        self._directory.delete(f"{name}.held")
        self._directory.delete(f"{name}.json")

    def _rivals(self) -> list[Lease]:
        """Return the live leases of others, and remove stale ones."""
        leases = {lease.name: lease for lease in leases_in(self._directory)}
        mine = leases.pop(self._name, None)
        rivals = []
        for lease in leases.values():
            # Both times come from the storage's clock, so this machine's clock does not matter.
            age = mine.heartbeat - lease.heartbeat if mine is not None else 0.0
            if not lease.lives if lease.is_here else age > self._limit_s:
                _log.warning("taking over the stale lock of %s", named(lease.owner))
                withdraw(self._directory, lease)
            else:
                rivals.append(lease)
        return rivals

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(self._limit_s / 6):
            try:
                if not self.renew():
                    self._lost = True
                    if self._is_gone():  # `check` raises it
                        return
                    _log.error("the lock %s was taken over by another process", self._directory.display)
                    return
            except StorageError as exc:  # the next heartbeat may succeed, or show a takeover
                _log.warning("could not write the heartbeat of the lock: %s", exc)

    def _is_gone(self) -> bool:
        """Return whether the locked directory was deleted, and not only the lease."""
        return self._directory.is_local and not self._directory.local_path.parent.is_dir()

    def renew(self) -> bool:
        """Renew the lease, which a thread does while the lock is held. Return False if the lease is gone.

        Raises:
            StorageError: The storage cannot be written.
        """
        lease = f"{self._name}.json"
        if self._directory.is_local:
            try:
                os.utime(self._directory.local_path / lease)
            except FileNotFoundError:
                return False
            except OSError as exc:
                raise StorageError(f"{self._directory.display}/{lease}: {exc.strerror}") from exc
            return True
        if self._directory.read_if_exists(lease) is None:
            return False
        self._directory.write_bytes(lease, self._content)
        return True


@dataclass(frozen=True, slots=True)
class Lease:
    """The lease of a lock's owner, or of a contender.

    Attributes:
        name: The unique name of its file.
        held: Whether its process holds the lock, or only asks for it.
        owner: The owner as given to `Lock`, with `host`, `pid` and `since`.
        machine, started: What `machine` and `process_start` return for its process.
        heartbeat: The last heartbeat, in seconds since the epoch by the storage's clock; 0.0 if it is unknown.
    """

    name: str
    held: bool
    owner: dict[str, str]
    machine: str | None
    started: str | None
    heartbeat: float = 0.0

    @property
    def is_here(self) -> bool:
        """Whether its process belongs to this machine, so that `lives` is exact."""
        return self.machine is not None and self.machine == machine()

    @property
    def lives(self) -> bool:
        """Whether its process on this machine is alive. A later process with the same id does not count."""
        pid = self.owner.get("pid", "")
        return pid.isdecimal() and process_start(int(pid)) == self.started is not None


def leases_in(directory: LeaseDirectory) -> list[Lease]:
    """Return all leases in a lock's directory, stale ones included. Nothing is changed."""
    entries = {entry.name: entry for entry in directory.list()}
    leases = []
    for name in (entry.removesuffix(".json") for entry in entries if _LEASE.fullmatch(entry)):
        data = directory.read_if_exists(f"{name}.json")
        if data is not None:  # else it was released since the listing
            held = f"{name}.held" in entries
            leases.append(_parse(name, data, held=held, heartbeat=entries[f"{name}.json"].mtime))
    return leases


def withdraw(directory: LeaseDirectory, lease: Lease) -> None:
    """Remove a lease whose process is known to be dead, before the lease is stale."""
    for kind in ("held", "json"):
        directory.delete(f"{lease.name}.{kind}")


@cache
def machine() -> str | None:
    """Return an id of this machine, this boot and this process namespace, within which a process id is meaningful; None if
    the platform does not provide it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """Return when a process on this machine started, in clock ticks since boot. With the process id it identifies one
    process. None if the process does not exist or is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the command in parentheses, may contain any character, so split after its last parenthesis.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _parse(name: str, data: bytes, *, held: bool, heartbeat: float) -> Lease:
    """Parse a lease. One that cannot be parsed counts as alive until its age makes it stale."""
    try:
        lease = json.loads(data)
        owner = {str(key): str(value) for key, value in lease["owner"].items()}
        return Lease(name, held, owner, lease["machine"], lease["started"], heartbeat)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Lease(name, held, {"run": "an unreadable lease"}, None, None, heartbeat)


def named(owner: Mapping[str, str]) -> str:
    """Return an owner as text, e.g. `NAME (host HOST, pid 12, since …)`."""
    rest = ", ".join(f"{key} {value}" for key, value in owner.items() if key != "run")
    return f"{owner.get('run', 'another process')} ({rest})" if rest else owner.get("run", "another process")
