"""The lock over an in-memory directory and a clock that the test drives. Real files and stores are in test_storage.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytrainer.errors import StorageLocked
from raytrainer.storage import Lock, Storage
from raytrainer.storage.lock import LeaseDirectory, leases_in

LIMIT_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class File:
    name: str
    mtime: float
    data: bytes


class Memory:
    """A directory in memory, whose times are those of the clock."""

    is_local = False
    display = "memory://run/lock"

    def __init__(self, clock: Clock) -> None:
        self.clock, self.files = clock, dict[str, File]()

    @property
    def local_path(self) -> Path:
        raise AssertionError("it is not local")

    def list(self) -> list[File]:
        return list(self.files.values())

    def read_if_exists(self, rel: str) -> bytes | None:
        return self.files[rel].data if rel in self.files else None

    def write_bytes(self, rel: str, data: bytes) -> None:
        self.files[rel] = File(rel, self.clock(), data)

    def delete(self, rel: str) -> None:
        self.files.pop(rel, None)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory(clock: Clock) -> Memory:
    return Memory(clock)


def lock(memory: Memory, run: str = "mine") -> Lock:
    # The thread sends its first heartbeat after LIMIT_S / 6 real seconds, so each heartbeat is one that the test asks for.
    return Lock(memory, {"run": run}, limit_s=LIMIT_S, clock=memory.clock, sleep=memory.clock.sleep)


def plant(memory: Memory, name: str, *, held: bool = True) -> None:
    """Add the lease of a process on another machine."""
    owner = {"run": "elsewhere", "host": "other", "pid": "1"}
    memory.write_bytes(f"{name}.json", json.dumps({"owner": owner, "machine": "other", "started": "1"}).encode())
    if held:
        memory.write_bytes(f"{name}.held", b"")


def test_the_protocol_is_what_a_storage_offers(memory: Memory, tmp_path: Path) -> None:
    directories: list[LeaseDirectory] = [memory, Storage(tmp_path)]  # checked by mypy
    names = {name for name in vars(LeaseDirectory) if not name.startswith("_")}
    assert all(hasattr(type(directory), name) for directory in directories for name in names)


def test_one_owner_at_a_time(memory: Memory) -> None:
    with lock(memory, "first"):
        (lease,) = leases_in(memory)
        assert (lease.owner["run"], lease.held, lease.heartbeat) == ("first", True, 1000.0)
        with pytest.raises(StorageLocked, match="first"):
            lock(memory, "second").acquire()
    assert memory.files == {}


def test_the_age_of_the_heartbeat_decides_about_another_machine(memory: Memory, clock: Clock) -> None:
    plant(memory, "a" * 32)
    clock.now += LIMIT_S
    with pytest.raises(StorageLocked, match="elsewhere"):
        lock(memory).acquire()
    clock.now += 1.0
    with lock(memory):
        assert [lease.owner["run"] for lease in leases_in(memory)] == ["mine"]


def test_a_heartbeat_keeps_the_lease_alive(memory: Memory, clock: Clock) -> None:
    with lock(memory) as held:
        clock.now += LIMIT_S + 1
        assert held.renew()
        assert leases_in(memory)[0].heartbeat == clock.now


def test_a_lease_that_was_taken_over_is_not_renewed(memory: Memory) -> None:
    with lock(memory) as held:
        memory.files.clear()
        assert not held.renew()
        assert memory.files == {}


def test_of_two_contenders_the_lower_name_waits_for_the_other(memory: Memory, clock: Clock) -> None:
    mine = lock(memory)
    mine._name = "0" * 32
    plant(memory, "f" * 32, held=False)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds
        if len(slept) == 3:  # the other contender gives up
            memory.delete("f" * 32 + ".json")

    mine._sleep = sleep
    with mine:
        assert len(slept) == 3
        assert [lease.name for lease in leases_in(memory)] == ["0" * 32]


def test_the_higher_name_gives_up_at_once(memory: Memory, clock: Clock) -> None:
    mine = lock(memory)
    mine._name = "f" * 32
    plant(memory, "0" * 32, held=False)
    with pytest.raises(StorageLocked, match="elsewhere"):
        mine.acquire()
    assert clock.now == 1000.0
    assert [lease.name for lease in leases_in(memory)] == ["0" * 32]


def test_a_contender_that_never_decides_is_waited_for_until_the_limit(memory: Memory, clock: Clock) -> None:
    mine = lock(memory)
    mine._name = "0" * 32
    plant(memory, "f" * 32, held=False)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        plant(memory, "f" * 32, held=False)  # it stays alive

    mine._sleep = sleep
    with pytest.raises(StorageLocked, match="elsewhere"):
        mine.acquire()
    assert LIMIT_S < clock.now - 1000.0 < LIMIT_S + 1
