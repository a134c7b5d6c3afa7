"""Runs of many trials through one thread: each arrives once despite any failure, nobody waits, and the last costs as
much as the first."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrainer.errors import StorageFull, TrackingDenied, TrackingUnreachable
from raytrainer.tracking import ChildRunUploader, default_tracking_uri, open_run
from raytrainer.tracking.child_runs import PARENT_TAG
from raytrainer.tracking.segments import SegmentWriter, line
from raytrainer.tracking.sender import LOCAL_ID_TAG
from raytrainer.tracking.server import Server
from raytrainer.tracking.spool import Spool
from tests.promises import Within, slowness
from tests.tracking.fakes import FakeRun, FakeServer

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Raised at the point where the driver is killed."""


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def uploader(server: FakeServer, **options: object) -> ChildRunUploader:
    arguments = {"parent": lambda: "sweep", "interval_s": 0.005, "server": server, **options}
    return ChildRunUploader("http://tracking.example", "exp", **arguments)  # type: ignore[arg-type]


def rows(spool_dir: Path, steps: range, time_ms: int = 1000) -> None:
    """Log as a trial's process that then ends: at each step one metric of its own and one of its node."""
    writer = SegmentWriter(Spool(spool_dir), 1 << 20)
    for step in steps:
        writer.append(line("m", time_ms + step, step, {"loss": step / 10, "system/cpu": 1.0}))
    writer.close()


def trial(of: ChildRunUploader, spool_dir: Path, steps: range = range(3), **options: object) -> str:
    run_id = of.open(spool_dir, spool_dir.name, params={"lr": "0.1"}, tags={"trial": spool_dir.name}, **options)  # type: ignore[arg-type]
    rows(spool_dir, steps)
    of.finish(spool_dir, "FINISHED", tags={"pruned": "true"}, metrics={"best/loss": (0.0, 0, 1.0)})
    return run_id


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def whole(run: FakeRun, steps: range = range(3)) -> bool:
    return (
        run.count() == {(key, step): 1 for key in ("loss", "system/cpu") for step in steps} | {("best/loss", 0): 1}
        and (run.params, run.status, run.experiment_id) == ({"lr": "0.1"}, "FINISHED", "1")
        and (run.tags[PARENT_TAG], run.tags["trial"], run.tags["pruned"]) == ("sweep", run.name, "true")
        and run.tags["mlflow.source.name"] == "raytrainer"
        and run.end_time is not None
    )


def test_a_trial_costs_three_requests_and_leaves_nothing_behind(tmp_path: Path, server: FakeServer) -> None:
    created: dict[Path, str] = {}
    threads = threading.active_count()
    # Nothing is sent before `close`, because the first round is also the last.
    of = uploader(server, interval_s=60.0, on_created=created.__setitem__)
    for name in "ab":
        assert trial(of, tmp_path / name).startswith("offline-")
    assert threading.active_count() == threads + 1
    assert server.calls == []
    assert of.close()
    each = ["create_run", "log_batch", "set_terminated"]
    assert server.calls == ["experiment", *each, "experiment", *each]
    assert [run.name for run in server.runs.values()] == ["a", "b"]
    assert all(whole(run) for run in server.runs.values())
    assert created == {tmp_path / "a": "run0", tmp_path / "b": "run1"}
    assert list(tmp_path.iterdir()) == []


def test_a_trial_is_seen_while_it_runs(tmp_path: Path, server: FakeServer) -> None:
    of = uploader(server)
    of.open(tmp_path / "a", "a", params={"lr": "0.1"}, tags={"trial": "a"})
    until(lambda: server.runs and server.runs["run0"].params)
    run = server.runs["run0"]
    assert (run.status, run.tags[PARENT_TAG]) == ("RUNNING", "sweep")
    writer = SegmentWriter(Spool(tmp_path / "a"), 1 << 20)
    for step in range(3):
        writer.append(line("m", step, step, {"loss": step / 10, "system/cpu": 1.0}))
        until(lambda: len(run.rows) == 2 * (step + 1))  # noqa: B023
    # The process has not closed its spool yet. What it still writes must arrive before the end.
    before = time.time()
    texts = {"error.txt": "Traceback\n  of it"}
    of.finish(tmp_path / "a", "FAILED", "it diverged", tags={"pruned": "true"}, texts=texts)
    until(lambda: "pruned" in run.tags)
    assert run.status == "RUNNING"
    writer.append(line("m", 3, 3, {"loss": 1.0}))
    until(lambda: len(run.rows) == 7)
    assert run.status == "RUNNING"
    writer.close()
    until(lambda: not (tmp_path / "a").exists())
    assert (run.status, run.tags["raytrainer.cause"]) == ("FAILED", "it diverged")
    assert run.artifacts == texts
    assert run.end_time is not None
    assert 1000 * before - 1 <= run.end_time <= 1000 * time.time()
    # This thread created the run, so it neither reads it nor looks it up.
    assert {"run", "find_run"}.isdisjoint(server.calls)
    assert server.calls[-1] == "set_terminated"
    assert of.close()


def test_a_process_that_never_closes_its_spool_holds_the_end_back_for_a_moment(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.tracking.child_runs._WRITER_S", 0.05)
    of = uploader(server)
    of.open(tmp_path / "a", "a", params={}, tags={})
    writer = SegmentWriter(Spool(tmp_path / "a"), 1 << 20)
    of.finish(tmp_path / "a", "KILLED")
    until(lambda: server.runs and server.runs["run0"].status == "KILLED")
    writer.append(line("m", 0, 0, {"loss": 1.0}))
    until(lambda: server.runs["run0"].rows)
    writer.close()
    until(lambda: not (tmp_path / "a").exists())
    assert server.calls.count("set_terminated") == 1
    assert of.close()


# For three trials, 12 requests can be lost. 9 of them change something, so they can also be done but not acknowledged.
FAILURES = [*(("lost", at) for at in range(12)), *(("unacknowledged", at) for at in range(9))]


@pytest.mark.parametrize(("how", "at"), FAILURES)
def test_once_whatever_request_fails(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, how: str, at: int
) -> None:
    monkeypatch.setattr("raytrainer.tracking.child_runs._LAST_PAUSE_S", 0.01)
    failed = fail_at(server, at, how, TrackingUnreachable("gone"))
    of = uploader(server, interval_s=60.0)
    for name in "abc":
        trial(of, tmp_path / name)
    assert of.close()
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.name for run in server.runs.values()) == ["a", "b", "c"]
    assert all(whole(run) for run in server.runs.values())
    assert len(failed) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("how", "at"), FAILURES)
def test_once_whenever_the_driver_is_killed(tmp_path: Path, server: FakeServer, how: str, at: int) -> None:
    failed = fail_at(server, at, how, Killed())
    ids: dict[Path, str] = {}
    of = uploader(server, interval_s=60.0)
    for name in "abc":
        ids[tmp_path / name] = trial(of, tmp_path / name)
    assert not of.close()
    assert len(failed) == 1
    again = uploader(server)
    # A resume knows the ids from its own record, but it cannot know what was uploaded.
    for folder, run_id in ids.items():
        again.adopt(folder, run_id)
        again.finish(folder, "FINISHED", ended=2.5)
    assert again.close()
    assert sorted(run.name for run in server.runs.values()) == ["a", "b", "c"]
    assert all(whole(run) for run in server.runs.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("at", range(9))
def test_once_whenever_the_driver_is_killed_between_two_files(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    of = uploader(server, interval_s=60.0)
    run_id = trial(of, tmp_path / "a")
    count = iter(range(100))

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def change(*args: object, **options: object) -> object:
            if threading.current_thread().name == "tracking-uploader" and next(count) == at:
                raise Killed
            return real(*args, **options)

        return change

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        of.close()
    assert next(count) > at  # it was killed there
    again = uploader(server)
    again.adopt(tmp_path / "a", run_id)
    assert again.close()
    assert [whole(run) for run in server.runs.values()] == [True]
    # Only an empty directory may remain, if the driver was killed before its last change.
    assert [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")] == []


def fail_at(server: FakeServer, at: int, how: str, error: BaseException) -> list[str]:
    """Make the `at`-th call fail before or after it is done. Return the list of failed calls, which is filled later."""
    failed: list[str] = []
    count = iter(range(1000))

    def fail(name: str) -> None:
        if next(count) == at:
            failed.append(name)
            raise error

    setattr(server, "before" if how == "lost" else "after", fail)
    return failed


def test_a_hanging_server_does_not_block_trials(tmp_path: Path, server: FakeServer) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def hang(name: str) -> None:
        hanging.set()
        go_on.wait(60)

    server.before = hang
    of = uploader(server)
    seconds = []
    for number in range(30):
        within, cpu = Within(5.0), time.thread_time()
        of.open(tmp_path / str(number), "n", params={"lr": "0.1"}, tags={})
        of.finish(tmp_path / str(number), "FINISHED")
        seconds.append((time.thread_time() - cpu) / 2)
        within.check()
        if not number:
            assert hanging.wait(10)
    median = sorted(seconds)[15]
    # Half a millisecond of CPU time; wall time would include other tests on the same CPUs.
    assert median < 0.002 or median < 0.002 * slowness()
    within = Within(1.0)
    assert not of.close(0.1)
    within.check()
    go_on.set()
    # The abandoned thread does not begin another trial.
    until(lambda: not any(thread.name == "tracking-uploader" for thread in threading.enumerate()))
    assert len(server.runs) <= 1


def test_the_thread_does_not_hold_up_the_end_of_the_process(tmp_path: Path) -> None:
    code = f"""
        import threading, time
        from pathlib import Path
        from raytrainer.tracking import ChildRunUploader
        from tests.tracking.fakes import FakeServer
        server, called = FakeServer(), threading.Event()
        def hang(name):
            called.set()
            time.sleep(600)
        server.before = hang
        uploader = ChildRunUploader("http://x", "e", parent=lambda: "p", interval_s=0.01, server=server)
        uploader.open(Path({str(tmp_path)!r}, "a"), "a", params={{}}, tags={{}})
        called.wait(60)
        print("end", flush=True)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "end\n"
    assert Spool(tmp_path / "a").pending()


def test_an_outage_and_its_end_are_logged_once(
    tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.005, 0.01))
    server.down = True
    of = uploader(server)
    for name in "abc":
        trial(of, tmp_path / name)
    until(lambda: len(server.calls) > 5)
    server.down = False
    until(lambda: not any(tmp_path.iterdir()))
    assert of.close()
    assert all(whole(run) for run in server.runs.values())
    assert [message.split(".")[0] for message in caplog.messages] == [
        "connection refused",
        "the tracking server is back",
    ]


def test_refused_credentials_are_tried_once_more_at_the_end(
    tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    def deny(name: str) -> None:
        raise TrackingDenied("401")

    server.before = deny
    of = uploader(server)
    for name in "abc":
        trial(of, tmp_path / name)
    until(lambda: caplog.messages)
    threading.Event().wait(0.05)
    assert len(server.calls) == 1
    assert not of.close()
    assert len(server.calls) == 2
    assert len(caplog.messages) == 1
    server.before = lambda name: None
    again = uploader(server)
    for name in "abc":
        note = Spool(tmp_path / name).note()
        assert note is not None
        again.adopt(tmp_path / name, note.run_id)
    assert again.close()
    assert [whole(run) for run in server.runs.values()] == 3 * [True]


def test_a_run_that_is_deleted_by_hand_is_logged_once_and_stops_no_other(
    tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.005, 0.01))
    of = uploader(server)
    of.open(tmp_path / "a", "a", params={"lr": "0.1"}, tags={"trial": "a"})
    until(lambda: server.runs)
    server.runs["run0"].active = False
    rows(tmp_path / "a", range(3))
    trial(of, tmp_path / "b")
    until(lambda: caplog.messages and not (tmp_path / "b").exists())
    of.finish(tmp_path / "a", "FINISHED", tags={"pruned": "true"}, metrics={"best/loss": (0.0, 0, 1.0)})
    calls = len(server.calls)
    until(lambda: len(server.calls) > calls + 6)
    assert sum("deleted" in message for message in caplog.messages) == len(caplog.messages) == 1
    assert server.runs["run0"].rows == set()
    server.runs["run0"].active = True  # the run is restored
    until(lambda: not (tmp_path / "a").exists())
    assert [whole(run) for run in server.runs.values()] == [True, True]
    assert of.close()


def test_a_trial_that_goes_on_without_its_run_gets_a_new_one(
    tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A trial gets a new MLflow run if the database or its old run was deleted before the sweep continued."""
    created: dict[Path, str] = {}
    of = uploader(server, on_created=created.__setitem__)
    server.add("old").active = False
    for name, run_id in (("a", "old"), ("b", "of a lost database")):
        assert of.open(tmp_path / name, name, params={"lr": "0.1"}, tags={"trial": name}, run_id=run_id) == run_id
        rows(tmp_path / name, range(3))
        of.finish(tmp_path / name, "FINISHED", tags={"pruned": "true"}, metrics={"best/loss": (0.0, 0, 1.0)})
    assert of.close()
    new = [server.runs[created[tmp_path / name]] for name in "ab"]
    assert [whole(run) for run in new] == [True, True]
    assert [run.tags["raytrainer.continues"] for run in new] == ["old", "of a lost database"]
    assert server.runs["old"].rows == set()
    assert sum("continue in new ones" in message for message in caplog.messages) == 1


def test_children_wait_for_their_parent(tmp_path: Path, server: FakeServer) -> None:
    parents: list[str] = []
    is_called = threading.Event()

    def parent() -> str | None:
        is_called.set()
        return parents[0] if parents else None

    of = uploader(server, parent=parent)
    trial(of, tmp_path / "a")
    assert is_called.wait(10)
    assert server.calls == []
    parents.append("sweep")
    until(lambda: not (tmp_path / "a").exists())
    # From now on the spool itself names the parent.
    of.open(tmp_path / "b", "b", params={}, tags={})
    note = Spool(tmp_path / "b").note()
    if note is not None:  # not uploaded yet
        assert note.tags[PARENT_TAG] == "sweep"
    of.close()
    assert [run.tags[PARENT_TAG] for run in server.runs.values()] == ["sweep", "sweep"]


def test_without_a_parent_nothing_is_made_and_all_is_kept(tmp_path: Path, server: FakeServer) -> None:
    of = uploader(server, parent=lambda: None)
    run_id = trial(of, tmp_path / "a")
    assert not of.close()  # does not wait for a parent that cannot come
    assert server.calls == []
    again = uploader(server)
    again.adopt(tmp_path / "a", run_id)
    assert again.close()
    assert [whole(run) for run in server.runs.values()] == [True]


@pytest.mark.parametrize("by", ["local", "real"])
def test_a_run_goes_on(tmp_path: Path, server: FakeServer, by: str) -> None:
    created: dict[Path, str] = {}
    of = uploader(server, on_created=created.__setitem__)
    local = trial(of, tmp_path / "a")
    until(lambda: not (tmp_path / "a").exists() and (by == "local" or tmp_path / "a" in created))
    run_id = local if by == "local" else created.pop(tmp_path / "a")
    run = server.runs["run0"]
    assert of.open(tmp_path / "a", "a", params={"lr": "9", "new": "1"}, tags={"trial": "a"}, run_id=run_id) == run_id
    until(lambda: run.status == "RUNNING")
    until(lambda: "new" in run.params)
    # It continues from a checkpoint. Repeated steps are not sent again, and its node's values continue counting.
    rows(tmp_path / "a", range(1, 5), 9000)
    of.finish(tmp_path / "a", "FINISHED")
    until(lambda: not (tmp_path / "a").exists())
    assert of.close()
    assert run.count() == {("loss", step): 1 for step in range(5)} | {
        ("system/cpu", step): 1 for step in (*range(3), *range(4, 8))
    } | {("best/loss", 0): 1}
    assert (run.status, run.params) == ("FINISHED", {"lr": "0.1", "new": "1"})
    assert len(server.runs) == 1
    assert created == {tmp_path / "a": "run0"}
    assert run.tags[LOCAL_ID_TAG] == local


def test_a_trial_that_is_tried_again_at_once_is_one_run(tmp_path: Path, server: FakeServer) -> None:
    of = uploader(server, interval_s=60.0)
    run_id = trial(of, tmp_path / "a")
    of.open(tmp_path / "a", "a", params={"lr": "0.1"}, tags={"trial": "a"}, run_id=run_id)
    note = Spool(tmp_path / "a").note()
    assert note is not None
    assert (note.status, note.end_time, note.tags["pruned"]) == ("RUNNING", None, "true")
    rows(tmp_path / "a", range(2, 6), 9000)
    of.finish(tmp_path / "a", "FINISHED")
    assert of.close()
    (run,) = server.runs.values()
    assert {step for key, step in run.count() if key == "loss"} == set(range(6))
    assert set(run.count().values()) == {1}
    assert run.status == "FINISHED"


def test_nothing_to_adopt(tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    of = uploader(server)
    of.adopt(tmp_path / "none", "run0")
    of.finish(tmp_path / "none", "FINISHED")
    (tmp_path / "lost").mkdir()
    of.adopt(tmp_path / "lost", "offline-1")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"version": 99}')
    of.adopt(tmp_path / "foreign", "offline-2")
    assert of.close()
    assert server.calls == []
    assert not (tmp_path / "none").exists()
    assert ["no description" in message or "version" in message for message in caplog.messages] == [True, True]


def test_what_mlflow_refuses_is_left_out_alone(
    tmp_path: Path, server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses = {"bad+", "system/cpu", "bad tag"}
    of = uploader(server, interval_s=60.0)
    of.open(tmp_path / "a", "a", params={"lr": "0.1", "bad+": "1", "wd": "0"}, tags={})
    rows(tmp_path / "a", range(3))
    of.finish(tmp_path / "a", "FINISHED", tags={"bad tag": "1", "pruned": "true"})
    assert of.close()
    (run,) = server.runs.values()
    assert run.count() == {("loss", step): 1 for step in range(3)}
    assert run.params == {"lr": "0.1", "wd": "0"}
    assert (run.tags["pruned"], run.status) == ("true", "FINISHED")
    assert sum("refuses" in message for message in caplog.messages) == 2  # tags of a new run are not validated


def test_a_full_disk_keeps_the_notes_in_memory(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.005, 0.01))
    tried = threading.Event()

    def full(self: Spool, note: object, **_: object) -> None:
        if threading.current_thread().name == "tracking-uploader":
            tried.set()
        raise StorageFull("no space")

    of = uploader(server)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write_note", full)
        for name in "abc":
            trial(of, tmp_path / name)
        assert tried.wait(10)
    until(lambda: not any(tmp_path.iterdir()))
    assert [whole(run) for run in server.runs.values()] == 3 * [True]
    assert len(caplog.messages) <= 2
    assert of.close()


def test_the_thread_survives_a_bug_and_a_callback_that_fails(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.005, 0.01))
    failed = fail_at(server, 2, "lost", ZeroDivisionError("a bug"))

    def note(spool_dir: Path, run_id: str) -> None:
        raise OSError("the journal is full")

    of = uploader(server, on_created=note)
    for name in "ab":
        trial(of, tmp_path / name)
    until(lambda: not any(tmp_path.iterdir()))
    assert of.close()
    assert failed
    assert [whole(run) for run in server.runs.values()] == [True, True]
    assert sum("a bug" in message for message in caplog.messages) == 1
    assert sum("journal" in message for message in caplog.messages) == 2


def _bare(uri: str, trials: int) -> float:
    """Return the CPU seconds per trial of MLflow's own client, which logs the same and keeps no record."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(uri)
    experiment = client.create_experiment("bare")
    began = time.thread_time()
    for _ in range(trials):
        run_id = client.create_run(experiment, tags={"sweep": "s"}).info.run_id
        rows = [Metric(f"m{n}", step / 7, step, step) for step in range(10) for n in range(10)]
        params = [Param(f"p{n}", "1") for n in range(5)]
        client.log_batch(run_id, rows, params, [RunTag("pruned", "true")])
        client.set_terminated(run_id, "FINISHED")
    return (time.thread_time() - began) / trials


@pytest.mark.parametrize("block", [10, pytest.param(50, marks=pytest.mark.nightly)])
def test_many_trials_on_a_real_store(tmp_path: Path, caplog: pytest.LogCaptureFixture, block: int) -> None:
    """Every trial arrives once and completely, its files are deleted, and the last ones cost as little as the first."""
    uri = default_tracking_uri(tmp_path)
    parent = open_run(uri, "sweeps", "sweep", params={}, tags={})
    of = ChildRunUploader(uri, "sweeps", parent=lambda: parent.run_id, interval_s=0.01)
    folder = tmp_path / "trials"
    folder.mkdir()
    costs, open_files = [], []
    with caplog.at_level(logging.WARNING):
        for start in range(0, 4 * block, block):
            before = of.cpu_s
            for number in range(start, start + block):
                spool_dir = folder / f"{number:04d}"
                of.open(spool_dir, f"t{number:04d}", params={f"p{n}": "1" for n in range(5)}, tags={"sweep": "s"})
                writer = SegmentWriter(Spool(spool_dir), 1 << 20)
                writer.append(
                    b"".join(line("m", step, step, {f"m{n}": step / 7 for n in range(10)}) for step in range(10))
                )
                writer.close()
                of.finish(spool_dir, "KILLED" if number % 2 else "FINISHED", tags={"pruned": "true"})
            until(lambda: not any(folder.iterdir()), 60.0)
            cpu = of.cpu_s
            until(lambda: of.cpu_s > cpu)  # noqa: B023  # counts the round that deleted the last one
            costs.append((of.cpu_s - before) / block)
            open_files.append(len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0)
    assert of.close()
    assert caplog.messages == []
    assert max(costs[1:]) < 2.0 * costs[1] + 0.005
    assert costs[-1] < 2.0 * _bare(uri, block)
    assert max(open_files) <= open_files[0] + 4
    with Server(uri)._call() as client:
        experiment = client.get_experiment_by_name("sweeps").experiment_id
        runs = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{parent.run_id}'", max_results=500)
        names = sorted(run.info.run_name for run in runs)
        assert names == [f"t{number:04d}" for number in range(4 * block)]
        for run in runs[:: block // 5]:
            assert run.data.params == {f"p{n}": "1" for n in range(5)}
            assert run.data.tags["pruned"] == "true"
            assert run.info.status == ("KILLED" if int(run.info.run_name[1:]) % 2 else "FINISHED")
            assert run.info.end_time >= run.info.start_time
            history = client.get_metric_history(run.info.run_id, "m3")
            assert [(metric.step, metric.value) for metric in history] == [(step, step / 7) for step in range(10)]


def test_a_run_and_an_experiment_that_are_deleted_in_a_real_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytrainer.core.retry.LIMITS_S", (0.02, 0.05))
    uri = default_tracking_uri(tmp_path)
    parent = open_run(uri, "sweeps", "sweep", params={}, tags={})
    created: dict[Path, str] = {}
    of = ChildRunUploader(uri, "sweeps", parent=lambda: parent.run_id, interval_s=0.01, on_created=created.__setitem__)
    for name in "ab":
        of.open(tmp_path / name, name, params={}, tags={})
    until(lambda: len(created) == 2)
    with Server(uri)._call() as client:
        client.delete_run(created[tmp_path / "a"])
        for name in "ab":
            rows(tmp_path / name, range(3))
            of.finish(tmp_path / name, "FINISHED")
        until(lambda: not (tmp_path / "b").exists() and caplog.messages)
        assert "deleted" in caplog.messages[0]
        client.restore_run(created[tmp_path / "a"])
        until(lambda: not (tmp_path / "a").exists())
        experiment = client.get_experiment_by_name("sweeps").experiment_id
        client.delete_experiment(experiment)
        caplog.clear()
        of.open(tmp_path / "c", "c", params={}, tags={})
        until(lambda: any("experiment" in message for message in caplog.messages))
        messages_before = len(caplog.messages)
        client.restore_experiment(experiment)
        until(lambda: tmp_path / "c" in created)
        of.finish(tmp_path / "c", "FINISHED")
        until(lambda: not (tmp_path / "c").exists())
        assert len(caplog.messages) <= messages_before + 1  # one message says that the server is back
    assert of.close()
