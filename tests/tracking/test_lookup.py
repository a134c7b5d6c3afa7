"""Searches for runs in a store: MLflow's client and plain HTTP find the same runs, and no message contains a secret."""

from __future__ import annotations

import base64
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from raytrainer.errors import TrackingDenied, TrackingUnreachable
from raytrainer.tracking import lookup
from raytrainer.tracking.failures import Rejected
from raytrainer.tracking.rest import Rest, is_plain
from raytrainer.tracking.server import Server, StoredRun

SECRET = "hunter2 and more"

RUN = {
    "info": {
        "run_id": "r1",
        "run_name": "one",
        "experiment_id": "3",
        "status": "FINISHED",
        "start_time": 1000,
        "end_time": "61000",  # JSON may hold a 64-bit number as text
    },
    "data": {
        "metrics": [
            {"key": "val/loss", "value": "NaN", "timestamp": 2000, "step": 7},
            {"key": "train/loss", "value": 0.5, "timestamp": "3000", "step": "9"},
        ],
        "params": [{"key": "a", "value": "1"}, {"key": "empty"}],
        "tags": [{"key": "raytrainer.run_dir", "value": "/x"}],
    },
}


class Mlflow:
    """A server's REST interface: the requests that it got, and its answers by path."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.pages: list[dict[str, Any]] = [{"experiments": [{"experiment_id": "0"}, {"experiment_id": "3"}]}]
        self.status, self.body = 200, b""
        self.runs: list[dict[str, Any]] = [RUN]
        self.delay_s = 0.0

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805
                length = int(handler.headers.get("Content-Length", 0))
                path, body = handler.path, json.loads(handler.rfile.read(length) or b"{}")
                self.asked.append((path, body, handler.headers.get("Authorization")))
                time.sleep(self.delay_s)
                data = self.body
                if not data and path.endswith("experiments/search"):
                    data = json.dumps(self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]).encode()
                elif not data:
                    data = json.dumps({"runs": self.runs}).encode()
                handler.send_response(self.status)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def mlflow() -> Iterator[Mlflow]:
    server = Mlflow()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_a_run_as_a_server_tells_it(mlflow: Mlflow) -> None:
    (run,) = Rest(mlflow.uri).search("tags.x = 'y'", 7)
    assert run.metrics["val/loss"][0] != run.metrics["val/loss"][0]
    assert run.metrics["val/loss"][1] == 7
    assert run == StoredRun(
        run_id="r1",
        name="one",
        experiment_id="3",
        status="FINISHED",
        started=1.0,
        ended=61.0,
        params={"a": "1", "empty": ""},
        tags={"raytrainer.run_dir": "/x"},
        metrics=run.metrics,
        logged=3.0,
    )
    assert mlflow.asked[-1][1] == {
        "experiment_ids": ["0", "3"],
        "filter": "tags.x = 'y'",
        "max_results": 7,
        "order_by": ["attributes.start_time DESC"],
    }


def test_all_pages_of_experiments_are_asked_for(mlflow: Mlflow) -> None:
    mlflow.pages = [
        {"experiments": [{"experiment_id": "0"}], "next_page_token": "more"},
        {"experiments": [{"experiment_id": "1"}]},
    ]
    Rest(mlflow.uri).search("", 1)
    assert [body.get("page_token") for path, body, _ in mlflow.asked if "experiments" in path] == [None, "more"]
    assert mlflow.asked[-1][1]["experiment_ids"] == ["0", "1"]


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("environment", "user_info", "expected"),
    [
        ({}, "", None),
        ({"MLFLOW_TRACKING_TOKEN": SECRET}, "", f"Bearer {SECRET}"),
        ({"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": SECRET}, "", basic(f"me:{SECRET}")),
        ({"MLFLOW_TRACKING_TOKEN": "x"}, "you:p%40ss@", basic("you:p@ss")),
    ],
)
def test_credentials_as_mlflow_takes_them(
    mlflow: Mlflow,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    user_info: str,
    expected: str | None,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Rest(mlflow.uri.replace("://", f"://{user_info}")).search("", 1)
    assert {header for _, _, header in mlflow.asked} == {expected}


def test_credentials_of_a_file(mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = it\n"
    )
    Rest(mlflow.uri).search("", 1)
    assert mlflow.asked[0][2] == basic("me:it")


@pytest.mark.parametrize(
    ("status", "body", "error", "reason"),
    [
        (401, b"", TrackingDenied, "answers 401 to the credentials given .MLFLOW_TRACKING_TOKEN"),
        (403, b"", TrackingDenied, "answers 403"),
        (400, b"{}", Rejected, "answers 400"),
        (503, b"", TrackingUnreachable, "answers 503"),
        (200, b"<html>", TrackingUnreachable, "does not answer like an MLflow server"),
        (200, b"[]", TrackingUnreachable, "does not answer like an MLflow server"),
    ],
)
def test_answers_that_are_none(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, error: type[Exception], reason: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    mlflow.status, mlflow.body = status, body or b" "
    with pytest.raises(error, match=reason) as caught:
        Rest(mlflow.uri.replace("://", f"://me:{SECRET.replace(' ', '%20')}@")).search("", 1)
    assert SECRET not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_silence_ends(mlflow: Mlflow) -> None:
    mlflow.delay_s = 1.0
    with pytest.raises(TrackingUnreachable, match="timed out"):
        Rest(mlflow.uri, timeout_s=0.1).search("", 1)
    with pytest.raises(TrackingUnreachable, match="refused"):
        Rest("http://127.0.0.1:9").search("", 1)


def test_a_certificate_that_is_not_trusted(mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority, chain = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    mlflow.server.socket = context.wrap_socket(mlflow.server.socket, server_side=True)
    uri = mlflow.uri.replace("http:", "https:")
    with pytest.raises(TrackingUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
        Rest(uri).search("", 1)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(authority))
    assert Rest(uri).search("", 1)
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    assert Rest(uri).search("", 1)


def certificate(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1. Return the file to trust and the file to serve with."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = made.public_bytes(Encoding.PEM)
    (folder / "ca.pem").write_bytes(public)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "chain.pem").write_bytes(private + public)
    return folder / "ca.pem", folder / "chain.pem"


def test_what_is_left_to_mlflows_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_plain("https://x")
    assert not is_plain("sqlite:////x.db")
    assert not is_plain("databricks")
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "kubernetes")
    assert not is_plain("https://x")


def test_a_denial_is_tried_by_the_client_that_knows_more_ways(mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.status, mlflow.body = 401, b"{}"
    filters = []

    def search(self: object, where: str, limit: int) -> list[StoredRun]:
        filters.append(where)
        return []

    monkeypatch.setattr(Server, "search", search)
    assert lookup.search_runs(mlflow.uri, limit=1, user="o'me", status="FAILED") == []
    assert filters == [
        "tags.`raytrainer.where` LIKE '%' AND tags.`mlflow.user` = 'ome' AND attributes.status = 'FAILED'"
    ]


def test_where_a_trials_sweep_is() -> None:
    def run(tags: dict[str, str]) -> StoredRun:
        return StoredRun("r", "n", "0", "RUNNING", 0.0, None, {}, tags, {}, None)

    assert lookup.run_dir_of(run({"raytrainer.run_dir": "/a/b"})) == "/a/b"
    of_trial = {"raytrainer.sweep": "s", "raytrainer.run_dir": "s3://b/s/trials/0001?region=x&y=/trials/"}
    assert lookup.run_dir_of(run(of_trial)) == "s3://b/s?region=x&y=/trials/"
