"""Faults 17, 18 and 19: a tracking server that is down, dies, fails or refuses, seen from whole launches.

tests/tracking/ tests the spool in each of these cases, including calls that take 30 s.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.launches import Runs, launch, launched, observed, record, steps_of
from tests.promises import Within
from tests.tracking.test_mlflow_server import MlflowServer, Proxy

pytestmark = pytest.mark.slow

INLINE = ["experiment=mlp", "name=run", "cluster=inline", "tracking.log_model=false", "trainer.log_every_n_steps=1"]
FIRST = ["experiment=mlp", "cluster=inline", "tracking.log_model=false", "trainer.max_steps=2"]
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens


@pytest.mark.parametrize(
    "names", [("a", "b", "b"), pytest.param(("a", "b", "c", "d", "e", "f"), marks=pytest.mark.nightly)]
)
def test_first_launches_at_once(names: tuple[str, ...], tmp_path: Path) -> None:
    """Concurrent first launches create one MLflow database. Of two launches with one name, one is refused."""
    with contextlib.ExitStack() as ending:
        runs = [
            ending.enter_context(launch(tmp_path, *FIRST, f"name={name}", "trainer.max_epochs=null", store=False))
            for name in names
        ]
        ended = [run.wait(200) for run in runs]
    refused = len(names) - len(set(names))
    assert sorted(each.code for each in ended) == [0] * len(set(names)) + [2] * refused, "\n".join(map(str, ended))
    assert [Runs(tmp_path).status(name) for name in sorted(set(names))] == ["FINISHED"] * len(set(names))


def test_down_at_start(tmp_path: Path) -> None:
    """Fault 17: the launch is refused within 15 s."""
    within = Within(15.0)
    ended = launched(tmp_path, *INLINE, f"tracking.tracking_uri={NOBODY}", fresh=True).exits(2)
    within.check()
    assert NOBODY in ended.err
    assert "tracking.required=false" in ended.err
    assert not (tmp_path / "runs").exists()


def test_down_and_not_required(tmp_path: Path) -> None:
    """Fault 17: the run warns and keeps everything. The next command on the run uploads it when the server is back."""
    server = MlflowServer(tmp_path)
    arguments = [*INLINE, f"tracking.tracking_uri=http://127.0.0.1:{server.port}", "tracking.required=false"]
    ended = launched(tmp_path, *arguments, "trainer.max_epochs=2").exits(0)
    assert "warning" in ended.err
    assert record(tmp_path, "run")["status"] == "FINISHED"
    server.start()
    try:
        launched(tmp_path, "resume", "run", "trainer.max_epochs=3").exits(0)
    finally:
        server.stop()
    runs = Runs(tmp_path, tmp_path / "db")
    assert [step for step, _ in runs.rows("run")["train/loss"]] == list(range(1, 34))
    assert runs.params("run")["trainer.max_epochs"] == "2"
    assert runs.status("run") == "FINISHED"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path)
    server.start()
    yield server
    server.stop()


def test_dies_in_the_middle(server: MlflowServer, tmp_path: Path) -> None:
    """Fault 18: the server answers 500, is killed, and comes back. No step waits for it, and every row arrives once."""
    proxy = Proxy(server.port)
    options = [f"tracking.tracking_uri={proxy.uri}", "trainer.max_epochs=26", "trainer.eval_every_n_steps=0"]
    with launch(tmp_path, *INLINE, *options, "checkpoint.every_n_steps=1000", *observed(0.03)) as run:
        run.reaches(20)
        proxy.status = 500
        run.reaches(90)
        server.stop()
        proxy.status = None
        run.reaches(180)
        server.start()
        run.wait().exits(0)
    proxy.close()
    gaps = [b.time - a.time for a, b in itertools.pairwise(steps_of(run.steps))]
    # A call that waited for the failing server would take its timeout of 10 s; no gap comes near that.
    assert max(gaps) < 5.0
    assert statistics.median(gaps[90:]) < 2 * statistics.median(gaps[:19]) + 0.02
    runs = Runs(tmp_path, tmp_path / "db")
    assert [step for step, _ in runs.rows("run")["train/loss"]] == list(range(1, 287))
    assert runs.status("run") == "FINISHED"


def test_dead_until_the_end(server: MlflowServer, tmp_path: Path) -> None:
    """Fault 18: a server that never comes back delays the end by a bounded time. The status stays, and a message names
    the spool."""
    options = [f"tracking.tracking_uri=http://127.0.0.1:{server.port}", "trainer.max_epochs=2"]
    with launch(tmp_path, *INLINE, *options, *observed(0.05)) as run:
        run.reaches(10)
        server.stop()
        run.reaches(22)
        within = Within(75.0)
        ended = run.wait().exits(0)
        within.check(ended)
        run.nothing_left()
    assert record(tmp_path, "run")["status"] == "FINISHED"
    assert "runs/run/spool" in ended.err


class _Refusing(ThreadingHTTPServer):
    """Answers every request with one status, and records the requests."""

    def __init__(self, status: int) -> None:
        self.requests: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            server: _Refusing

            def answer(self) -> None:
                self.server.requests.append(self.path)
                self.send_error(status)

            do_GET = do_POST = answer  # noqa: N815  # the names of the base class

            def log_message(self, *_: object) -> None:
                """Print nothing to the test's output."""

        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials(status: int, tmp_path: Path) -> None:
    """Fault 19: the launch is refused at once, without a retry, and without the secret in its output."""
    server = _Refusing(status)
    uri = f"http://127.0.0.1:{server.server_address[1]}"
    secret = {"MLFLOW_TRACKING_USERNAME": "user", "MLFLOW_TRACKING_PASSWORD": "s3cr3t-word"}
    within = Within(10.0)
    with launch(tmp_path, *INLINE, environment={"MLFLOW_TRACKING_URI": uri, **secret}, fresh=True) as run:
        ended = run.wait().exits(2)
    within.check()
    server.shutdown()
    assert len(server.requests) == 1
    assert uri in ended.err
    assert str(status) in ended.err
    assert "s3cr3t-word" not in ended.err + ended.out
    assert not (tmp_path / "runs").exists()
