"""Proxies from the environment: never used for this machine's own addresses, and named if a server cannot be
reached."""

from __future__ import annotations

import http.server
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import requests

from raytrainer.backends.jobs_api.connection import Connection
from raytrainer.core import proxies
from raytrainer.errors import ClusterUnreachable, TrackingUnreachable
from raytrainer.tracking.rest import Rest
from raytrainer.tracking.server import Server

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set every variable to a proxy that does not exist, and exempt nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        for name in VARIABLES:
            monkeypatch.setenv(name, f"http://anna:hunter2@127.0.0.1:{taken.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"experiments": [{"experiment_id": "0", "name": "a"}]}).encode())

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_server_on_this_machine_is_asked_directly(dead_proxy: str, server: str) -> None:
    Server(server).probe()  # MLflow's client
    assert Rest(server).search("", 1) == []
    assert "experiments" in Connection(server).get("/", dict)
    assert Connection(server).proxy() is None


def test_the_program_exempts_loopback_for_whatever_it_starts(dead_proxy: str, server: str) -> None:
    program = f"""
import urllib.request, requests
from raytrainer import __main__, cli
def main():
    assert urllib.request.urlopen({server!r}).status == 200
    return requests.get({server!r}).status_code % 100
cli.main = main
__main__.entry()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("address", ["http://mlflow.example.com", "https://mlflow.example.com"])
def test_the_proxy_is_named_where_a_server_is_not_reached(address: str, dead_proxy: str) -> None:
    variable = f"{address.partition(':')[0]}_proxy"
    asks = (
        lambda: Server(address).probe(),
        lambda: Rest(address).search("", 1),
        lambda: Connection(address).get("/api/version", dict),
    )
    for ask in asks:
        with pytest.raises((TrackingUnreachable, ClusterUnreachable)) as caught:
            ask()
        message = str(caught.value)
        assert f"through the proxy {dead_proxy} of {variable}" in message
        assert "NO_PROXY=mlflow.example.com" in message
        assert "hunter2" not in message
        assert "anna" not in message


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"NO_PROXY": "corp"}, {}),  # without a proxy there is nothing to exempt
        ({"HTTP_PROXY": "p"}, "localhost,127.0.0.1,127.0.0.0/8,::1"),
        ({"https_proxy": "p", "NO_PROXY": "corp, ::1"}, "corp,::1,localhost,127.0.0.1,127.0.0.0/8"),
        ({"all_proxy": "p", "no_proxy": "a", "NO_PROXY": "b"}, "a,localhost,127.0.0.1,127.0.0.0/8,::1"),
        ({"HTTP_PROXY": "p", "NO_PROXY": "*"}, {}),
    ],
)
def test_what_the_user_has_exempted_stays(environment: dict[str, str], expected: str | dict[str, str]) -> None:
    exempt = proxies.exemptions(environment)
    assert exempt == ({"no_proxy": expected, "NO_PROXY": expected} if expected else {})
    again = proxies.exemptions({**environment, **exempt})
    assert again == exempt


@pytest.mark.parametrize("exempt", ["", "corp.example", ".corp.example", "10.0.0.0/8", "*", "corp.example:8080", "ple"])
@pytest.mark.parametrize("address", ["http://x.corp.example:8080/a", "http://10.1.2.3", "http://corp.example"])
def test_which_addresses_are_exempt_is_as_requests_has_it(
    address: str, exempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"http_proxy": "http://p:1", "no_proxy": exempt}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_PROXY")
    theirs = requests.utils.select_proxy(address, requests.utils.get_environ_proxies(address))
    if exempt == "ple":  # requests compares the ends of names; urllib and curl compare whole labels
        theirs = "http://p:1"
    proxy = proxies.proxy_of(address, environment)
    assert (proxy and proxy[1]) == theirs


def test_the_variable_that_counts() -> None:
    both = {"HTTPS_PROXY": "big", "https_proxy": "small", "ALL_PROXY": "all"}
    assert proxies.proxy_of("https://a.example", both) == ("https_proxy", "small")
    assert proxies.proxy_of("http://a.example", both) == ("ALL_PROXY", "all")
    assert proxies.proxy_of("postgresql://a.example/db", both) is None


@pytest.mark.parametrize(
    ("proxy", "shown"),
    [
        ("http://me:p@ss@proxy:3128", "http://proxy:3128"),
        ("me:secret@proxy:3128", "proxy:3128"),
        ("socks5://proxy", "socks5://proxy"),
        ("http://proxy:3128/?a@b", "http://proxy:3128/?a@b"),
    ],
)
def test_no_password_of_a_proxy_is_shown(proxy: str, shown: str) -> None:
    assert proxies.redacted(proxy) == shown
    if "secret" in proxy:
        assert proxies.passwords({"HTTP_PROXY": proxy}) == ["secret", "secret"]
