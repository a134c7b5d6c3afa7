"""A real `mlflow server` on loopback: unreachable, slow or failing, and with a writer killed by SIGKILL. Rows are
counted in its database.

The module shares one server. A proxy in front of it delays, refuses or loses requests.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from raytrainer.errors import TrackingDenied, TrackingUnreachable
from raytrainer.tracking import (
    MlflowTracker,
    Run,
    Uploader,
    check_tracking,
    default_tracking_uri,
    lookup,
    open_run,
    replay,
)
from raytrainer.tracking.rest import Rest
from raytrainer.tracking.segments import SpoolRow
from raytrainer.tracking.server import Server
from raytrainer.tracking.spool import Spool
from tests import forkserver
from tests.launches import empty_store
from tests.outside.ports import free_port
from tests.promises import Within

ROOT = Path(__file__).parents[2]
SLOW_S = 30.0


# `mlflow ARGUMENTS` in one process. The command would start the server as a second program. Instead, the process itself
# becomes the server, and imports again the modules that read the variables that the command has set.
SERVER = """
import os, runpy, sys
from mlflow import cli, server

def become(command, extra_env, **how):
    os.environ.update(extra_env)
    for name in [name for name in sys.modules if name.startswith("mlflow.server")]:
        del sys.modules[name]
    sys.argv[:] = command[2:]
    runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)

server._exec_cmd = become
cli.cli()
"""


class MlflowServer:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self._process: forkserver.Forked | None = None

    def start(self) -> None:
        if not (self.folder / "db").exists():
            (self.folder / "db").write_bytes(empty_store())
        command = ["server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        out, log = self.folder / "server.out", self.folder / "server.log"
        self._process = forkserver.server().start(("-c", SERVER), command, self.folder, out, log, environment)
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def counts(self, run_id: str) -> dict[tuple[str, int], int]:
        with closing(sqlite3.connect(self.folder / "db", timeout=30)) as database:
            rows = database.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall()
        return dict(Counter((str(key), int(step)) for key, step in rows))


class Proxy:
    """A proxy that forwards one request per connection after `delay(path)` seconds, or answers `status` itself. If
    `loses(path)` is true, the connection ends without the server's answer."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.status: int | None = None
        self.delay: Callable[[str], float] = lambda path: 0.0
        self.loses: Callable[[str], bool] = lambda path: False
        self.paths: list[str] = []
        self.ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = self._read(connection)
            if not request:
                return
            path = request.split(b" ", 2)[1].decode()
            self.paths.append(path)
            self.ended.wait(self.delay(path))
            if self.status is not None:
                connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % self.status)
                return
            loses = self.loses(path)
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                while data := server.recv(65536):
                    if not loses:
                        connection.sendall(data)

    @staticmethod
    def _read(connection: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (new := connection.recv(65536)):
                return b""
            data += new
        head, body = data.split(b"\r\n\r\n", 1)
        lines = [line.split(b":", 1) for line in head.split(b"\r\n")[1:]]
        length = next((int(value) for name, value in lines if name.lower() == b"content-length"), 0)
        while len(body) < length:
            body += connection.recv(65536)
        kept = [head.split(b"\r\n")[0], *(b":".join(pair) for pair in lines if pair[0].lower() != b"connection")]
        return b"\r\n".join(kept) + b"\r\n\r\n" + body

    def close(self) -> None:
        self.ended.set()
        self._listener.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def begin(uri: str, spool: Path | None, **options: object) -> Run:
    return open_run(uri, "faults", "run", **{"params": {}, "tags": {}, "spool_dir": spool, **options})  # type: ignore[arg-type]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def expected(keys: str, last: int) -> dict[tuple[str, int], int]:
    return {(key, step): 1 for key in keys for step in range(last)}


def test_plain_http_finds_what_mlflows_client_finds(server: MlflowServer, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{server.port}"
    for name, where in (("one", "here"), ("two", None)):
        tags = {"raytrainer.name": name, "raytrainer.run_dir": "/x", **({"raytrainer.where": where} if where else {})}
        run = open_run(uri, "searched", name, params={"a": "1"}, tags=tags, artifact_root=str(tmp_path))
        Server(uri).log_batch(
            run.run_id, [SpoolRow("val/loss", float("nan"), 5, 7), SpoolRow("train/loss", 0.5, 6, 9)], {}
        )
        run.finish("FAILED", "why")
    everything = "attributes.run_name LIKE '%'"
    plain, client = Rest(uri).search(everything, 1000), Server(uri).search(everything, 1000)
    assert len(plain) >= 2
    assert repr(plain) == repr(client)  # as text, because NaN does not equal itself
    (listed,) = lookup.search_runs(uri, limit=5)
    assert (listed.name, listed.status, listed.tags["raytrainer.cause"]) == ("one", "FAILED", "why")
    assert listed.metrics["train/loss"] == (0.5, 9)
    two = lookup.find_run(uri, "two")
    assert two is not None
    assert lookup.run_dir_of(two) == "/x"
    tags = {"raytrainer.run_dir": "/x/many/trials/0003", "raytrainer.sweep": "many"}
    trial = open_run(uri, "searched", "many.0003", params={}, tags=tags, artifact_root=str(tmp_path))
    stored = lookup.find_run(uri, trial.run_id)
    assert stored is not None
    assert lookup.run_dir_of(stored) == "/x/many"
    assert lookup.find_own_dir(uri, trial.run_id) == "/x/many/trials/0003"


@pytest.mark.parametrize("how", ["lost", "late"])
def test_a_batch_without_an_answer_is_sent_again_and_stored_once(
    how: str, server: MlflowServer, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(f"http://127.0.0.1:{server.port}", tmp_path)
    first = iter([True])
    if how == "lost":
        proxy.loses = lambda path: path.endswith("log-batch") and next(first, False)
    else:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")  # even a slow machine answers the others in time
        proxy.delay = lambda path: 10.0 if path.endswith("log-batch") and next(first, False) else 0.0
    tracker = MlflowTracker(run.run_id, proxy.uri, tmp_path, flush_interval_s=0.1, system_metrics=False)
    for step in range(1200):
        tracker.log_metrics({"a": float("inf"), "b": step / 3}, step)
    tracker.close()
    until(lambda: len(server.counts(run.run_id)) == 2400)
    # The first batch reached the database twice.
    assert sum(path.endswith("log-batch") for path in proxy.paths) >= 4
    assert server.counts(run.run_id) == expected("ab", 1200)


def test_a_server_that_answers_500_in_between(server: MlflowServer, proxy: Proxy, tmp_path: Path) -> None:
    check_tracking(proxy.uri)
    run = begin(proxy.uri, tmp_path, params={"p": "x" * 7000})
    proxy.status = 500
    with pytest.raises(TrackingUnreachable, match="500"):
        check_tracking(proxy.uri)
    tracker = MlflowTracker(run.run_id, proxy.uri, tmp_path, flush_interval_s=0.1, system_metrics=False)
    requests_before = len(proxy.paths)
    for step in range(500):
        tracker.log_metrics({"a": step / 7, "b": float("nan")}, step)
    until(lambda: len(proxy.paths) > requests_before)
    assert server.counts(run.run_id) == {}
    proxy.status = None
    tracker.close()
    assert server.counts(run.run_id) == expected("ab", 500)
    assert not Spool(tmp_path).pending()


def test_the_default_store_works_in_any_folder_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a é#% b" / ("long" * 40)
    folder.mkdir(parents=True)
    uri = default_tracking_uri(folder)
    check_tracking(uri)
    run = begin(uri, folder / "spool", params={"p": "1"})
    tracker = MlflowTracker(run.run_id, uri, folder / "spool", system_metrics=False)
    tracker.log_metrics({"a": 1.0}, 1)
    tracker.close()
    run.log_text("text", "logs/x.txt")
    assert run.finish("FAILED", "why")
    assert (folder / "mlartifacts" / run.run_id / "artifacts" / "logs" / "x.txt").read_text() == "text"
    assert sorted(path.name for path in folder.iterdir()) == ["mlartifacts", "mlflow.db", "spool"]
    assert capfd.readouterr() == ("", "")


def test_two_that_create_an_experiment_at_once_get_the_same(server: MlflowServer) -> None:
    uri = f"http://127.0.0.1:{server.port}"
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: Server(uri).experiment("race", None), range(4)))
    assert len(set(made)) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_refused(proxy: Proxy, tmp_path: Path, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "very-secret")
    proxy.status = status
    with pytest.raises(TrackingDenied, match=str(status)) as caught:
        begin(proxy.uri, tmp_path)
    assert "very-secret" not in str(caught.value)
    assert len(proxy.paths) == 1


WRITER = """
    import sys
    from pathlib import Path
    from raytrainer.tracking import MlflowTracker
    run_id, uri, folder, first, last = sys.argv[1:]
    tracker = MlflowTracker(run_id, uri, Path(folder), flush_interval_s=0.05, system_interval_s=0.2)
    import time
    for step in range(int(first), int(last)):
        tracker.log_metrics({"a": time.time(), "b": step / 3}, step)
        time.sleep(0.002)
        if step % 100 == 0:
            print(step, flush=True)
    tracker.close()
"""


def writer(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"},
    )


def test_a_writer_killed_while_it_sends_and_started_again_at_an_earlier_step(
    server: MlflowServer, tmp_path: Path
) -> None:
    uri = f"http://127.0.0.1:{server.port}"
    run = begin(uri, tmp_path)
    process = writer(run.run_id, uri, tmp_path, 0, 10**6)
    until(lambda: len(server.counts(run.run_id)) > 300)
    process.kill()
    process.wait()
    sent = max(step for key, step in server.counts(run.run_id) if key == "a")
    # The driver sends what was on disk. Then the worker trains the last steps again, on a node with another disk.
    replay(tmp_path, run.run_id, uri)
    spooled = max(step for key, step in server.counts(run.run_id) if key == "a")
    assert spooled >= sent
    assert {key: n for key, n in server.counts(run.run_id).items() if key[0] in "ab"} == expected("ab", spooled + 1)
    process = writer(run.run_id, uri, tmp_path / "other", spooled - 150, spooled + 200)
    assert process.wait(60) == 0
    counts = server.counts(run.run_id)
    assert {key: n for key, n in counts.items() if key[0] in "ab"} == expected("ab", spooled + 200)
    assert set(counts.values()) == {1}  # system metrics continue counting
    assert run.finish("FINISHED")


def test_a_server_that_takes_30_seconds_a_call(server: MlflowServer, proxy: Proxy, tmp_path: Path) -> None:
    run = begin(proxy.uri, tmp_path)
    proxy.delay = lambda path: SLOW_S if path.endswith("log-batch") else 0.0
    tracker = MlflowTracker(run.run_id, proxy.uri, tmp_path, flush_interval_s=0.1, system_metrics=False)
    tracker.log_metrics({"a": 0.0}, 0)
    until(lambda: any(path.endswith("log-batch") for path in proxy.paths))
    within = Within(10.0)
    for step in range(1, 400):
        tracker.log_metrics({"a": float(step)}, step)
    until(lambda: Spool(tmp_path).size() > 400 * 20, SLOW_S / 2)  # on disk, although the uploader waits for a call
    tracker.close(timeout_s=1.0)
    within.check()
    assert Spool(tmp_path).pending()
    assert not server.counts(run.run_id)
    proxy.ended.set()
    # What the hanging call sends and what the driver sends after it arrive once each.
    replay(tmp_path, run.run_id, f"http://127.0.0.1:{server.port}")
    until(lambda: server.counts(run.run_id) == expected("a", 400))


def test_a_server_that_is_away_when_it_starts_while_it_trains_and_when_it_ends(
    server: MlflowServer, tmp_path: Path
) -> None:
    uri = f"http://127.0.0.1:{server.port}"
    before = begin(uri, tmp_path / "before")
    live = MlflowTracker(before.run_id, uri, tmp_path / "before", flush_interval_s=0.1, system_metrics=False)
    live.log_metrics({"a": 0.0}, 0)
    until(lambda: server.counts(before.run_id) == expected("a", 1))
    server.stop()

    with pytest.raises(TrackingUnreachable, match="cannot be used"):
        begin(uri, tmp_path / "required")
    offline = begin(uri, tmp_path / "offline", required=False, params={"p": "1"}, tags={"t": "x"})
    worker = MlflowTracker(offline.run_id, uri, tmp_path / "offline", ship=False, system_metrics=False)
    within = Within(2.0)
    for step in range(1, 1000):
        live.log_metrics({"a": float(step)}, step)
        worker.log_metrics({"a": float(step - 1)}, step - 1)
    within.check()  # 1 ms per call
    before.set_tags({"late": "1"})
    before.log_text("hello", "logs/x.txt")
    worker.close()
    live.close(timeout_s=5.0)
    assert not before.finish("KILLED", timeout_s=0.0)

    server.start()
    follower = Uploader(tmp_path / "offline", offline.run_id, uri, interval_s=0.05)
    replay(tmp_path / "before", before.run_id, uri)
    assert server.counts(before.run_id) == expected("a", 1000)
    until(lambda: not Spool(tmp_path / "offline").pending())
    assert follower.close()
    made = begin(uri, tmp_path / "offline", run_id=offline.run_id)
    assert server.counts(made.run_id) == expected("a", 999)

    import mlflow

    client = mlflow.MlflowClient(uri)
    first, second = client.get_run(before.run_id), client.get_run(made.run_id)
    assert (first.info.status, first.data.tags["late"]) == ("KILLED", "1")
    assert first.info.end_time < time.time() * 1000
    assert (second.data.params, second.data.tags["t"]) == ({"p": "1"}, "x")
    assert [file.path for file in client.list_artifacts(before.run_id, "logs")] == ["logs/x.txt"]
