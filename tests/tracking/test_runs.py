"""The driver's run: opened, reopened, described without a server, and closed with its true status; nothing is sent
twice or lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytrainer.errors import StorageFull, TrackingDenied, TrackingUnreachable
from raytrainer.tracking import MlflowTracker, Run, open_run, recorded_run_id, replay
from raytrainer.tracking.segments import line
from raytrainer.tracking.spool import Spool
from tests.tracking.fakes import FakeServer

URI = "http://user:secret@tracking.example:5000/"


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def start(server: FakeServer, spool: Path | None = None, **options: object) -> Run:
    arguments = {"params": {"lr": "0.1"}, "tags": {"git": "abc"}, "spool_dir": spool, "server": server, **options}
    return open_run(URI, "exp", "name", **arguments)  # type: ignore[arg-type]


def test_a_run_from_opening_to_the_end(server: FakeServer) -> None:
    run = start(server)
    kept = server.runs[run.run_id]
    assert (kept.params, kept.tags["git"], kept.status) == ({"lr": "0.1"}, "abc", "RUNNING")
    assert kept.tags["mlflow.source.name"] == "raytrainer"
    run.set_tags({"a": "1"})
    run.log_text("yaml", "config/all.yaml")
    assert run.finish("FAILED", "rank 1: out of memory")
    assert (kept.params, kept.tags["a"]) == ({"lr": "0.1"}, "1")
    assert (kept.status, kept.tags["raytrainer.cause"]) == ("FAILED", "rank 1: out of memory")
    assert kept.artifacts == {"config/all.yaml": "yaml"}


def test_addresses_show_no_credentials(server: FakeServer) -> None:
    run = start(server)
    assert run.url == f"http://tracking.example:5000/#/experiments/1/runs/{run.run_id}"
    assert run.ui_command is None
    local = open_run("sqlite:////a b/mlflow.db", "e", "n", params={}, tags={}, server=server)
    assert local.url == "sqlite:////a b/mlflow.db"
    assert local.ui_command == "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"


def test_a_reopened_run_is_running_keeps_its_parameters_and_gets_a_new_end(server: FakeServer) -> None:
    first = start(server)
    first.finish("KILLED")
    ended = server.runs[first.run_id].end_time
    again = start(server, params={"lr": "0.5", "new": "1"}, tags={"override": "lr=0.5"}, run_id=first.run_id)
    kept = server.runs[first.run_id]
    assert again.run_id == first.run_id
    assert (kept.status, kept.params) == ("RUNNING", {"lr": "0.1", "new": "1"})
    assert kept.tags["override"] == "lr=0.5"
    again.finish("FINISHED")
    assert kept.status == "FINISHED"
    assert ended is not None
    assert kept.end_time is not None
    assert kept.end_time >= ended
    assert len(server.runs) == 1


@pytest.mark.parametrize("how", ["deleted", "database"])
def test_a_run_that_is_gone_continues_in_a_new_one(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """The new run also gets what was logged after the old one was deleted, in the middle of the earlier attempt."""
    first = start(server, tmp_path)
    if how == "deleted":
        server.runs[first.run_id].active = False
    else:
        server.runs.clear()
        server.add("of another")
    tracker = MlflowTracker(first.run_id, URI, tmp_path, ship=False, system_metrics=False)
    tracker.log_metrics({"a": 1.0}, 7)
    tracker.close()
    first.set_tags({"a": "1"})  # no error: training continues
    first.log_text("text", "config.yaml")
    assert not first.finish("FINISHED", timeout_s=0.0)
    caplog.clear()
    second = start(server, tmp_path, run_id=first.run_id)
    kept = server.runs[second.run_id]
    assert second.run_id != first.run_id
    assert (kept.params, kept.status, kept.tags["a"]) == ({"lr": "0.1"}, "RUNNING", "1")
    assert kept.tags["raytrainer.continues"] == first.run_id
    assert f"continues in the new MLflow run {second.run_id}" in caplog.text
    assert second.finish("FINISHED")
    assert kept.count() == {("a", 7): 1}
    assert kept.artifacts == {"config.yaml": "text"}


def test_a_cause_lasts_until_a_later_attempt(server: FakeServer, tmp_path: Path) -> None:
    first = start(server, tmp_path)
    first.finish("FAILED", "out of memory")
    kept = server.runs[first.run_id]
    assert kept.tags["raytrainer.cause"] == "out of memory"
    second = start(server, tmp_path, run_id=first.run_id)
    assert kept.tags["raytrainer.cause"] == ""
    kept.tags["raytrainer.cause"] = "its driver died"  # another process marked it FAILED meanwhile
    second.finish("FINISHED")
    assert (kept.status, kept.tags["raytrainer.cause"]) == ("FINISHED", "")


def test_the_end_is_logged_with_its_time(server: FakeServer) -> None:
    run = start(server, started=1000.5)
    run.finish("FINISHED", tags={"raytrainer.seconds": "2.250"}, ended=1002.75)
    kept = server.runs[run.run_id]
    assert (kept.start_time, kept.end_time, kept.tags["raytrainer.seconds"]) == (1_000_500, 1_002_750, "2.250")


@pytest.mark.parametrize("error", [TrackingUnreachable, TrackingDenied])
def test_a_required_server_is_a_refusal(server: FakeServer, error: type[Exception], tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise error("no")

    server.before = refuse
    with pytest.raises(error):
        start(server, tmp_path)
    with pytest.raises(error):
        start(server, required=False)
    assert start(server, tmp_path, required=False).offline


def test_a_run_without_a_server_is_made_later_with_everything(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.down = True
    run = start(server, tmp_path, required=False)
    assert "required=false" in caplog.text
    assert run.offline
    tracker = MlflowTracker(run.run_id, URI, tmp_path, ship=False, system_metrics=False)
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.close()
    run.set_tags({"git": "def", "a": "1"})
    run.log_text("yaml", "config.yaml")
    assert not run.finish("FINISHED", timeout_s=0.0)
    server.down = False
    assert replay(tmp_path, run.run_id, URI, server=server) == 1
    (kept,) = server.runs.values()
    assert (kept.params, kept.tags["git"], kept.tags["a"]) == ({"lr": "0.1"}, "def", "1")
    assert (kept.artifacts, kept.status) == ({"config.yaml": "yaml"}, "FINISHED")
    assert kept.count() == {("a", 1): 1}
    assert recorded_run_id(tmp_path) in server.runs
    # A resume by the local id finds the same run.
    again = start(server, tmp_path, run_id=run.run_id)
    assert again.run_id == recorded_run_id(tmp_path)
    assert len(server.runs) == 1


def test_a_resume_uploads_a_run_that_was_never_sent(server: FakeServer, tmp_path: Path) -> None:
    server.down = True
    first = start(server, tmp_path, required=False)
    assert not first.finish("FAILED", "why", timeout_s=0.0)
    second = start(server, tmp_path, required=False, run_id=first.run_id, params={"lr": "9"})
    assert second.run_id == first.run_id
    server.down = False
    third = start(server, tmp_path, required=False, run_id=first.run_id)
    kept = server.runs[third.run_id]
    assert (kept.params, kept.status, kept.tags["raytrainer.cause"]) == ({"lr": "0.1"}, "RUNNING", "why")
    assert not Spool(tmp_path).pending()
    assert len(server.runs) == 1


@pytest.mark.parametrize("fails", ["set_running", "run", "log_batch", "create_run", "experiment"])
def test_a_server_that_goes_while_the_run_is_opened(server: FakeServer, tmp_path: Path, fails: str) -> None:
    def fail(name: str) -> None:
        if name == fails:
            raise TrackingUnreachable("gone")

    server.before = fail
    reopened = server.add("known") if fails == "set_running" else None
    run = start(server, tmp_path, required=False, run_id="known" if reopened else None)
    server.before = lambda name: None
    assert run.finish("FINISHED")
    (kept,) = server.runs.values()
    assert (kept.status, kept.params, kept.tags["git"]) == ("FINISHED", {"lr": "0.1"}, "abc")


def test_a_server_that_goes_later_costs_nothing_and_order_is_kept(server: FakeServer, tmp_path: Path) -> None:
    run = start(server, tmp_path)
    kept = server.runs[run.run_id]
    run.set_tags({"best": "1"})
    server.down = True
    run.set_tags({"best": "2", "other": "x"})
    run.log_text("text", "log.txt")
    server.down = False
    run.set_tags({"best": "3"})
    assert kept.tags["best"] == "1"
    replay(tmp_path, run.run_id, URI, server=server)
    assert (kept.tags["best"], kept.tags["other"], kept.artifacts) == ("3", "x", {"log.txt": "text"})
    run.set_tags({"best": "4"})
    assert kept.tags["best"] == "4"
    server.down = True
    assert not run.finish("KILLED", timeout_s=0.0)
    assert kept.status == "RUNNING"
    server.down = False
    replay(tmp_path, run.run_id, URI, server=server)
    assert kept.status == "KILLED"


def test_without_a_spool_a_server_that_goes_is_an_error(server: FakeServer) -> None:
    run = start(server)
    server.down = True
    with pytest.raises(TrackingUnreachable):
        run.set_tags({"a": "1"})
    with pytest.raises(TrackingUnreachable):
        run.finish("FINISHED")


def test_the_status_is_sent_past_an_uploader_that_hangs_and_a_full_disk(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(server, tmp_path)
    with Spool(tmp_path).lock():
        assert run.finish("FAILED", timeout_s=0.0)
    kept = server.runs[run.run_id]
    assert kept.status == "FAILED"

    def full(*_: object) -> None:
        raise StorageFull(f"no space at {tmp_path}")

    for name in ("write_note", "add_artifact", "write_state", "lock"):
        monkeypatch.setattr(Spool, name, full)
    (tmp_path / "metrics-000001-00000000.jsonl").write_bytes(line("segment", 1) + line("m", 1, 1, {"a": 1.0}))
    assert not run.finish("KILLED")
    assert kept.status == "KILLED"
    server.down = True
    run.set_tags({"a": "1"})
    run.log_text("text", "x.txt")
    assert not run.finish("FINISHED", timeout_s=0.0)


def test_a_hanging_server_is_waited_for_once(server: FakeServer, tmp_path: Path) -> None:
    run = start(server, tmp_path)
    server.calls.clear()
    server.down = True
    run.log_text("text", "a.txt")
    run.log_text("text", "b.txt")
    run.set_tags({"a": "1"})
    assert len(server.calls) == 1
    server.down = False
    assert run.finish("FINISHED")
    kept = server.runs[run.run_id]
    assert (set(kept.artifacts), kept.tags["a"]) == ({"a.txt", "b.txt"}, "1")
