"""Answers and timeouts of a server as our errors: in bounded time, without a retry and without a secret."""

from __future__ import annotations

import ctypes
import errno
import http.server
import os
import pickle
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytrainer.errors import ConfigError, TrackingDenied, TrackingError, TrackingUnreachable
from raytrainer.tracking import check_tracking, checking, default_tracking_uri
from raytrainer.tracking.database import default_artifact_root, sqlite_path
from raytrainer.tracking.failures import Rejected, redacted
from raytrainer.tracking.request_settings import request_settings
from raytrainer.tracking.segments import SpoolRow
from raytrainer.tracking.server import Server
from tests.promises import Within

SECRET = "hunter2-token"


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request with `status` and `body`, which may repeat the request's credentials."""

    status, body = 500, "{}"
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = self.body.format(auth=self.headers.get("Authorization", "")).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PATCH = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def http_server() -> Iterator[tuple[str, type[Answers]]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", Answers
    server.shutdown()
    server.server_close()


@pytest.fixture
def answers(http_server: tuple[str, type[Answers]]) -> type[Answers]:
    http_server[1].seen = []
    return http_server[1]


@pytest.fixture
def uri(http_server: tuple[str, type[Answers]]) -> str:
    return http_server[0]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("body", ["you sent {auth}", '{{"error_code": "X", "message": "{auth}"}}'])
def test_denied_credentials_are_reported_at_once_without_them(
    uri: str, answers: type[Answers], status: int, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    answers.status, answers.body = status, body
    with pytest.raises(TrackingDenied, match=f"answers {status}.*MLFLOW_TRACKING_TOKEN") as caught:
        check_tracking(uri)
    assert SECRET not in repr(caught.value)
    assert caught.value.__cause__ is None
    assert len(answers.seen) <= 2  # a second one finds the status of an answer that hides it
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("status", [429, 500, 503, 404])
def test_a_server_in_trouble_is_unreachable_and_asked_once(uri: str, answers: type[Answers], status: int) -> None:
    answers.status, answers.body = status, "<html>"
    with pytest.raises(TrackingUnreachable, match=uri):
        check_tracking(uri)
    assert len(answers.seen) == 1


def test_rejected_content_has_an_error_of_its_own(uri: str, answers: type[Answers]) -> None:
    answers.status, answers.body = 400, '{{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}}'
    with pytest.raises(Rejected, match="bad name"):
        Server(uri).log_batch("a" * 32, [SpoolRow("a", 1.0, 1, 1)], {})


def test_passwords_in_addresses_are_never_shown(uri: str, answers: type[Answers]) -> None:
    answers.status, answers.body = 401, "{auth}"
    secret = uri.replace("http://", f"http://me:{SECRET}@")
    with pytest.raises(TrackingDenied) as caught:
        check_tracking(secret)
    assert SECRET not in str(caught.value)
    with pytest.raises(TrackingUnreachable) as unreachable:
        check_tracking(f"http://me:{SECRET}@127.0.0.1:{free_port()}")
    assert SECRET not in str(unreachable.value)
    assert redacted(f"postgresql://me:{SECRET}@db:5432/x") == "postgresql://db:5432/x"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_unreachable_server_is_reported_within_seconds_with_the_reason() -> None:
    within = Within(10.0)
    with pytest.raises(TrackingUnreachable, match="Connection refused"):
        check_tracking(f"http://127.0.0.1:{free_port()}")
    within.check()


def test_silence_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHECK_SECONDS", 0.5)
    silent = pytest.raises(TrackingUnreachable, match=r"no answer in 0\.5 s")
    with socket.create_server(("127.0.0.1", 0)) as listener, silent:
        check_tracking(f"http://127.0.0.1:{listener.getsockname()[1]}")
    for thread in threading.enumerate():  # the thread keeps our MLflow settings until it ends
        if thread.name == "tracking-check":
            thread.join()


def test_mlflows_settings_are_ours_during_a_call_and_the_users_after(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    before = dict(os.environ)
    first, second = request_settings(10), request_settings(60)
    with first:
        # MLflow reads them at each call, not at import.
        assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()) == (0, 10)
        second.__enter__()
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 60
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 0
    second.__exit__(None, None, None)
    assert dict(os.environ) == before
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    with request_settings(10):
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 33


def test_a_call_leaves_the_environment_of_native_code_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call changes only `os.environ`. Native code reads the C environment without a lock, as when another thread
    starts Ray."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    for _ in range(2):
        with request_settings(10):
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"
            assert getenv(b"MLFLOW_HTTP_REQUEST_TIMEOUT") is None
            assert getenv(b"MLFLOW_HTTP_REQUEST_MAX_RETRIES") == b"3"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_importing_mlflow_in_a_call_does_not_write_the_environment() -> None:
    """MLflow's telemetry would set variables and report every launch, so it is off."""
    program = """
import os
from raytrainer.tracking.request_settings import request_settings
written = []
write = os.putenv
os.putenv = lambda name, value: (written.append(os.fsencode(name)), write(name, value))
with request_settings(10):
    from mlflow.tracking import MlflowClient
    from mlflow.telemetry.client import get_telemetry_client
assert not [name for name in written if b"MLFLOW" in name], written
assert get_telemetry_client() is None
"""
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_sqlite_store_is_checked_without_making_it(tmp_path: Path) -> None:
    uri = default_tracking_uri(tmp_path)
    check_tracking(uri)
    assert list(tmp_path.iterdir()) == []
    sqlite3.connect(sqlite_path(uri)).close()
    check_tracking(uri)
    sqlite_path(uri).write_bytes(b"not a database, but long enough to have a header" * 10)
    with pytest.raises(TrackingUnreachable, match="is not a SQLite database"):
        check_tracking(uri)
    sqlite_path(uri).unlink()


def test_a_sqlite_store_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = default_tracking_uri(tmp_path)
    sqlite3.connect(sqlite_path(uri)).close()
    sqlite_path(uri).touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda *_: False)  # a test may run as root, which may write anywhere
        with pytest.raises(TrackingUnreachable, match=r"mlflow.db cannot be written: permission denied$"):
            check_tracking(uri)

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(TrackingUnreachable, match="cannot be written: No space left on device"):
        check_tracking(uri)


def test_the_default_store_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(Path()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert default_artifact_root(default_tracking_uri(Path("a é#"))) == (tmp_path / "a é#" / "mlartifacts").as_uri()
    assert default_artifact_root("http://tracking") is None
    for name in ("a?b", "a%20b"):
        with pytest.raises(ConfigError, match="tracking server"):
            default_tracking_uri(Path(name))


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "/tmp/mlruns"])
def test_a_directory_is_refused_as_a_store(uri: str) -> None:
    with pytest.raises(TrackingUnreachable, match="sqlite:////ABSOLUTE"):
        check_tracking(uri)


def test_a_scheme_that_mlflow_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="gopher"):
        check_tracking("gopher://tracking")
