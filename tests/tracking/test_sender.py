"""Exactly once: whichever call is lost or not acknowledged, and whatever is trained again, each key and step arrives
once."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrainer.errors import StorageError, TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.tracking.failures import RunGone
from raytrainer.tracking.segments import SegmentWriter, line
from raytrainer.tracking.sender import DROPPED_TAG, LOCAL_ID_TAG, Busy, Sender, recorded_run_id
from raytrainer.tracking.spool import RunNote, Spool
from raytrainer.tracking.uploader import Uploader, replay
from tests.tracking.fakes import FakeServer


class Killed(BaseException):
    """Raised at the point where the process is killed."""


def write(spool: Spool, steps: range, attempt_time: int, *, keys: tuple[str, ...] = ("a", "b"), size: int = 90) -> None:
    """Write one attempt: a row per key and step. Then the process dies, which releases its lock."""
    writer = SegmentWriter(spool, size)
    for step in steps:
        writer.append(line("m", attempt_time + step, step, dict.fromkeys(keys, attempt_time + step / 10)))
    writer.close()


def test_rows_arrive_once_and_the_spool_is_empty_then(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    write(spool, range(20), 1000)
    assert Sender(spool, "r", server).send() == 40
    assert run.count() == {(key, step): 1 for key in "ab" for step in range(20)}
    assert not spool.pending()
    assert spool.segments() == []
    assert Sender(spool, "r", server).send() == 0


def test_steps_trained_again_are_dropped_also_when_nothing_had_been_sent(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    write(spool, range(1, 11), 1000)
    write(spool, range(6, 16), 5000)
    assert replay(tmp_path, "r", "", server=server) == 30
    assert run.count() == {(key, step): 1 for key in "ab" for step in range(1, 16)}
    assert {row.time for row in run.rows if row.step == 8} == {1008}


def test_steps_trained_again_are_dropped_when_the_disk_with_the_spool_is_gone(tmp_path: Path) -> None:
    server = FakeServer()
    run = server.add()
    write(Spool(tmp_path / "one"), range(1, 11), 1000)
    replay(tmp_path / "one", "r", "", server=server)
    write(Spool(tmp_path / "two"), range(6, 16), 5000)
    replay(tmp_path / "two", "r", "", server=server)
    assert run.count() == {(key, step): 1 for key in "ab" for step in range(1, 16)}


def test_a_key_may_go_back_within_an_attempt(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    writer = SegmentWriter(spool, 60)
    for when, step in enumerate([5, 6, 2, 7]):
        writer.append(line("m", when, step, {"a": 1.0}))
        Sender(spool, "r", server).send()
    assert run.count() == {("a", step): 1 for step in (5, 6, 2, 7)}


def test_system_metrics_go_on_counting(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    write(spool, range(3), 1000, keys=("system/cpu",))
    write(spool, range(2), 9000, keys=("system/cpu",))
    replay(tmp_path, "r", "", server=server)
    assert run.count() == {("system/cpu", step): 1 for step in range(5)}


def test_each_nodes_system_metrics_go_on_counting(tmp_path: Path) -> None:
    """Nodes write at their own pace and differ between attempts, but each node's steps continue without a gap."""
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    write(spool, range(5), 1000, keys=("system/cpu", "system/disk"))
    write(spool, range(2), 1001, keys=("system/node-1/cpu",))
    replay(tmp_path, "r", "", server=server)
    write(spool, range(1), 9000, keys=("system/disk",))
    write(spool, range(2), 9001, keys=("system/node-1/cpu",))
    write(spool, range(1), 9002, keys=("system/node-2/cpu",))
    replay(tmp_path, "r", "", server=server)
    steps = {"system/cpu": 5, "system/disk": 6, "system/node-1/cpu": 4, "system/node-2/cpu": 1}
    assert run.count() == {(key, step): 1 for key, count in steps.items() for step in range(count)}


def test_the_floor_is_fixed_before_the_first_row_goes(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    writer = SegmentWriter(spool, 1 << 20)
    for when, step in enumerate([5, 6, 2]):
        writer.append(line("m", when, step, {"a": 1.0}) + line("m", when, when, {"system/cpu": 1.0}))

    def die(name: str) -> None:
        if name == "log_batch":
            raise Killed

    server.after = die
    with pytest.raises(Killed):
        Sender(spool, "r", server).send()
    server.after = lambda name: None
    writer.append(line("m", 9, 3, {"a": 1.0}))
    Sender(spool, "r", server).send()
    expected = {("a", step): 1 for step in (5, 6, 2, 3)} | {("system/cpu", step): 1 for step in range(3)}
    assert run.count() == expected


@settings(max_examples=150, deadline=None)
@given(
    attempts=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), min_size=1, max_size=4),
    failures=st.lists(
        st.sampled_from(["fine", "lost", "unacknowledged", "killed before", "killed after"]), max_size=12
    ),
    same_disk=st.lists(st.booleans(), min_size=4, max_size=4),
    size=st.sampled_from([40, 200, 10_000]),
)
def test_exactly_once_whatever_fails(
    attempts: list[tuple[int, int]], failures: list[str], same_disk: list[bool], size: int
) -> None:
    server = FakeServer()
    run = server.add()
    script = iter(failures)
    mode = "fine"

    def before(_: str) -> None:
        nonlocal mode
        mode = next(script, "fine")
        if mode == "killed before":
            raise Killed
        if mode == "lost":
            raise TrackingUnreachable("lost")

    def after(_: str) -> None:
        if mode == "killed after":
            raise Killed
        if mode == "unacknowledged":
            raise TrackingUnreachable("timed out")

    server.before, server.after = before, after
    with TemporaryDirectory() as folder:
        expected: set[int] = set()
        spool = Spool(Path(folder, "0"))
        for number, (start, length) in enumerate(attempts):
            # A restart begins at or before the step after the last one. In this test, a new disk means that all rows
            # were sent.
            start = min(start, max(expected, default=-1) + 1)
            if number and not same_disk[number]:
                send_all(spool, server)
                spool = Spool(Path(folder, str(number)))
            write(spool, range(start, start + length), 1000 * (number + 1), size=size)
            expected |= set(range(start, start + length))
            try_to_send(spool, server)
        send_all(spool, server)
        assert run.count() == {(key, step): 1 for key in "ab" for step in expected}
        assert not spool.pending()


def try_to_send(spool: Spool, server: FakeServer) -> bool:
    try:
        Sender(spool, "r", server).send()
    except (TrackingUnreachable, Killed):
        return False
    return True


def send_all(spool: Spool, server: FakeServer) -> None:
    while not try_to_send(spool, server):
        pass


def test_rejected_rows_are_skipped_alone_counted_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    server.refuses = {"b", "bad tag"}
    writer = SegmentWriter(spool, 1 << 20)
    for step in range(10):
        writer.append(line("m", step, step, {"a": 1.0, "b": 2.0}))
    writer.append(line("t", {"good": "1", "bad tag": "2"}) + line("dropped", 7))
    with caplog.at_level(logging.WARNING):
        assert Sender(spool, "r", server).send() == 10
    assert run.count() == {("a", step): 1 for step in range(10)}
    assert run.tags == {"good": "1", DROPPED_TAG: "18"}
    assert sum("'b'" in message for message in caplog.messages) == 1
    assert Sender(spool, "r", server).send() == 0
    assert run.tags[DROPPED_TAG] == "18"


def test_a_deleted_run_drops_nothing(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    write(spool, range(3), 0)
    run.active = False
    with pytest.raises(RunGone):
        replay(tmp_path, "r", "", server=server)
    run.active = True
    assert replay(tmp_path, "r", "", server=server) == 6


def test_artifacts_go_once_they_can(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path / "spool"), FakeServer()
    run = server.add()
    (tmp_path / "log.txt").write_text("text")
    spool.add_artifact(tmp_path / "log.txt", "logs")
    server.down = True
    with pytest.raises(TrackingUnreachable):
        Sender(spool, "r", server).send()
    server.down = False
    Sender(spool, "r", server).send()
    assert run.artifacts == {"logs/log.txt": "text"}
    assert not spool.pending()


@pytest.mark.parametrize("fails_at", range(7))
def test_a_run_described_offline_is_made_once(tmp_path: Path, fails_at: int) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    spool.write_note(RunNote("offline-1", "exp", "n", None, {"p": "1"}, {"t": "x"}, 5, "FAILED", 9))
    write(spool, range(4), 100, size=1 << 20)
    count = itertools.count()

    def after(_: str) -> None:
        if next(count) == fails_at:
            raise Killed

    server.after = after
    with pytest.raises(Killed) if fails_at < 6 else nullcontext():
        Sender(spool, "offline-1", server).send()
    Sender(spool, "offline-1", server).send()
    (run,) = server.runs.values()
    assert (run.name, run.params, run.status, run.start_time, run.end_time) == ("n", {"p": "1"}, "FAILED", 5, 9)
    assert run.tags["t"] == "x"
    assert run.count() == {(key, step): 1 for key in "ab" for step in range(4)}
    assert recorded_run_id(tmp_path) == "run0"
    assert not spool.pending()


def test_an_offline_run_without_its_description_waits(tmp_path: Path) -> None:
    write(Spool(tmp_path), range(2), 0)
    with pytest.raises(TrackingUnreachable, match="no description"):
        Sender(Spool(tmp_path), "offline-1", FakeServer()).send()


def test_two_senders_do_not_meet(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    server.add()
    write(spool, range(3), 0)
    with spool.lock(), pytest.raises(Busy):
        Sender(spool, "r", server).send()
    with spool.lock(), pytest.raises(Busy):
        replay(tmp_path, "r", "", timeout_s=0.0, server=server)


def test_replay_says_when_time_is_up(tmp_path: Path) -> None:
    server = FakeServer()
    server.add()
    write(Spool(tmp_path), range(3), 0)
    with pytest.raises(TrackingError, match="not everything"):
        replay(tmp_path, "r", "", timeout_s=-1.0, server=server)
    server.down = True
    with pytest.raises(TrackingUnreachable):
        replay(tmp_path, "r", "", timeout_s=0.5, server=server)
    assert replay(tmp_path / "nothing", "r", "", server=server) == 0


class Turn:
    """Lets a test wait until the uploader's thread makes a call."""

    def __init__(self, server: FakeServer) -> None:
        self.called = threading.Event()
        server.before = lambda name: self.called.set()


def test_the_uploader_sends_while_rows_come_and_logs_an_outage_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.01, 0.02))
    spool, server = Spool(tmp_path), FakeServer()
    run = server.add()
    server.down = True
    writer = SegmentWriter(spool, 1 << 20)
    writer.append(line("m", 0, 0, {"a": 1.0}))
    uploader = Uploader(tmp_path, "r", "", interval_s=0.01, server=server)
    while len(server.calls) < 5:
        threading.Event().wait(0.01)
    turn = Turn(server)
    server.down = False
    assert turn.called.wait(10)
    writer.append(line("m", 1, 1, {"a": 1.0}))
    writer.close()
    assert uploader.close()
    assert run.count() == {("a", 0): 1, ("a", 1): 1}
    assert sum("connection refused" in message for message in caplog.messages) == 1
    assert sum("is back" in message for message in caplog.messages) == 1


def test_the_uploader_does_not_retry_denied_credentials_until_it_is_closed(tmp_path: Path) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    server.add()
    write(spool, range(2), 0)
    is_called = threading.Event()

    def deny(name: str) -> None:
        is_called.set()
        raise TrackingDenied("401")

    server.before = deny
    uploader = Uploader(tmp_path, "r", "", interval_s=0.001, server=server)
    assert is_called.wait(10)
    threading.Event().wait(0.1)
    assert len(server.calls) == 1
    assert not uploader.close()
    assert len(server.calls) == 2


def test_the_uploader_survives_unknown_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool, server = Spool(tmp_path), FakeServer()
    server.add()
    write(spool, range(2), 0)

    def fail(name: str) -> None:
        server.before = lambda name: None
        raise ZeroDivisionError("a bug")

    server.before = fail
    uploader = Uploader(tmp_path, "r", "", interval_s=0.001, server=server)
    while not caplog.messages:
        threading.Event().wait(0.01)
    assert "a bug" in caplog.messages[0]
    assert uploader.close()


def test_closing_without_draining_leaves_the_rows(tmp_path: Path) -> None:
    server = FakeServer()
    server.add()
    uploader = Uploader(tmp_path, "r", "", interval_s=60.0, server=server)
    write(Spool(tmp_path), range(2), 0)
    assert not uploader.close(drain=False)
    assert server.calls == []
    assert Spool(tmp_path).pending()


def test_a_spool_of_another_version_is_not_sent(tmp_path: Path) -> None:
    write(Spool(tmp_path), range(2), 0)
    (tmp_path / "state.json").write_text('{"version": 99}')
    with pytest.raises(StorageError, match="version 1"):
        replay(tmp_path, "r", "", server=FakeServer())


def test_the_uploader_waits_for_a_run_of_another_process_and_leaves_its_note_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process on another node than the driver uploads its rows once the driver has created the run, even after the
    trial has ended, and leaves the run's status unchanged."""
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.01, 0.05))
    server, spool = FakeServer(), Spool(tmp_path / "here")
    server.down = True
    uploader = Uploader(spool.root, "offline-1", "http://x", interval_s=0.005, awaited_in="exp", server=server)
    write(spool, range(5), 1000)
    assert not uploader.close(timeout_s=5.0)
    server.down = False
    own = RunNote("offline-1", "exp", "trial", tags={"a": "b"}, status="FINISHED", end_time=9)
    spool.write_note(own)  # the driver's note, if both are on one machine
    until(lambda: "find_run" in server.calls)
    assert server.runs == {}
    run_id = server.create_run(server.experiment("exp", None), "trial", {LOCAL_ID_TAG: "offline-1"}, None)
    until(lambda: len(server.runs[run_id].rows) == 10)
    assert server.runs[run_id].status == "RUNNING"
    assert spool.note() == own
    until(lambda: not spool.pending(notes=False))
    assert all(thread.name != "tracking-uploads" for thread in threading.enumerate())
    until(lambda: all(thread.name != "tracking-leftovers" for thread in threading.enumerate()))


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
