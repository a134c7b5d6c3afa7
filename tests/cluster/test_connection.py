"""Tests of HTTP to a dashboard: requests are bounded in time, and each failure names its fix and never the token."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from raytrainer.backends.jobs_api import connection
from raytrainer.backends.jobs_api.auth import Token
from raytrainer.backends.jobs_api.connection import Connection, NotThere
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError
from tests.promises import Within

if TYPE_CHECKING:
    from tests.outside.servers import Certificates

SECRET = "planted-secret-0123456789"
TOKEN = Token("HERE", SECRET)
Answer = Callable[[BaseHTTPRequestHandler], None]


def saying(status: int, text: str = "", **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        request.wfile.write(text.encode())

    return answer


@contextmanager
def serving(answer: Answer, certificate: tuple[Path, Path] | None = None) -> Iterator[int]:
    """Run a web server on loopback, with TLS if a certificate is given, and yield its port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def told(address: str, kind: type[ClusterError] = ClusterUnreachable, **options: Any) -> str:
    """Return the message of a failed request. Its error has this type, and neither it nor its causes show the token."""
    with pytest.raises(ClusterError) as caught:
        Connection(address, token=TOKEN, **options).get("/api/version", dict)
    assert type(caught.value) is kind, caught.value
    shown, error = str(caught.value), caught.value
    while error is not None:  # a traceback also shows causes and contexts
        assert SECRET not in f"{error!r} {error}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)  # type: ignore[assignment]
    assert "Traceback" not in shown
    assert "\n" not in shown
    return shown


# --- requests ---------------------------------------------------------------------------------------------------------


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The requests library prefers a password in this file to any header.
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login anna password hers")
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        seen.append((request.path, request.headers.get("Authorization")))
        saying(200, "{}")(request)

    with serving(answer) as port:
        assert Connection(f"http://127.0.0.1:{port}/ray/", token=TOKEN).get("/api/version", dict, a="b c") == {}
        Connection(f"http://127.0.0.1:{port}").get("/x", dict)
    assert seen == [("/ray/api/version?a=b+c", f"Bearer {SECRET}"), ("/x", None)]


def test_the_rows_of_a_table() -> None:
    seen = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.path)
        saying(200, json.dumps({"data": {"result": {"result": [{"state": "ALIVE"}]}}}))(request)

    with serving(answer) as port:
        found = Connection(f"http://127.0.0.1:{port}").state("actors", job_id="01", state="!DEAD")
    assert found == [{"state": "ALIVE"}]
    for part in (
        "/api/v0/actors?",
        "filter_keys=job_id&filter_keys=state",
        "filter_predicates=%3D&",
        "filter_values=DEAD",
    ):
        assert part in seen[0]
    assert "filter_predicates=%21%3D" in seen[0]


def test_a_kept_connection_that_was_closed_meanwhile() -> None:
    counted = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        counted.append(request.path)
        saying(200, "{}")(request)
        request.close_connection = True  # without announcing it in a header

    with serving(answer) as port:
        asked = Connection(f"http://127.0.0.1:{port}")
        for _ in range(3):
            assert asked.get("/api/version", dict) == {}
    assert len(counted) == 3


# --- answers ----------------------------------------------------------------------------------------------------------

PAGE = "<html><h1>502</h1></html>"


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (saying(200, PAGE), ClusterError, ["is not a Ray dashboard: is cluster.address right?"]),
        (saying(200, "[]"), ClusterError, ["is not a Ray dashboard"]),
        (saying(404, PAGE), NotThere, ["answers 404: Not Found"]),
        (saying(404, "Job x does not exist"), NotThere, ["Job x does not exist"]),
        (
            saying(500, "Traceback…\n  File\nValueError: bad\x1b[31m thing\n"),
            ClusterError,
            ["500: ValueError: bad [31m thing"],
        ),
        (saying(500, f"the token {SECRET} is odd"), ClusterError, ["the token *** is odd"]),
        (saying(502, PAGE), ClusterUnreachable, ["answers 502", "no answer from Ray"]),
        (saying(503), ClusterUnreachable, ["answers 503"]),
        (saying(413, PAGE), ClusterError, ["client_max_body_size", ".rayignore"]),
        (saying(401, "Unauthorized: Missing authentication token"), ClusterDenied, ["that of HERE was sent", "401"]),
        (saying(403, "Forbidden: Invalid authentication token"), ClusterDenied, ["refuses the token of HERE (403)"]),
        (saying(403, PAGE), ClusterDenied, ["the answer is not from Ray"]),
        (saying(401, PAGE, WWW_Authenticate="Basic realm=x"), ClusterDenied, ["Basic authentication"]),
        (
            saying(301, Location="https://there/api/version"),
            ClusterError,
            ["to another address: cluster.address=https://there"],
        ),
        (saying(302, Location="https://login.example.com/?to=x"), ClusterError, ["(https://login.example.com/?to=x)"]),
        (
            saying(400, "The plain HTTP request was sent to HTTPS port"),
            ClusterUnreachable,
            ["cluster.address=https://127."],
        ),
    ],
)
def test_an_answer_that_is_none(answer: Answer, kind: type[ClusterError], words: list[str]) -> None:
    with serving(answer) as port:
        said = told(f"http://127.0.0.1:{port}", kind)
    assert f"http://127.0.0.1:{port}" in said
    for word in words:
        assert word in said


def test_statuses_that_the_caller_knows() -> None:
    with serving(saying(404, "no package")) as port:
        answer = Connection(f"http://127.0.0.1:{port}").request("GET", "/api/packages/x", ok=(404,))
        assert (answer.status_code, answer.text) == (404, "no package")
        with pytest.raises(NotThere):
            Connection(f"http://127.0.0.1:{port}").request("PUT", "/api/packages/x", data=b"", ok=(500,))


# --- no answer --------------------------------------------------------------------------------------------------------


def test_a_closed_port_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        said = told(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert said.startswith("nothing listens at 127.0.0.1:")
    assert "8265" in said


def test_no_host_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "no host has the name ray.example.com" in told("http://ray.example.com")


def test_a_name_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def silent(*_: Any, **__: Any) -> Any:
        released.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr(connection, "_CONNECT_S", 0.1)
    within = Within(10.0)
    with pytest.raises(ClusterUnreachable, match=r"does not answer within.*VPN, firewall"):
        Connection("http://ray.example.com").request("GET", "/", read_s=0.1)
    within.check()
    released.set()


def test_one_that_takes_the_connection_and_says_nothing() -> None:
    released = threading.Event()

    def say_nothing(request: BaseHTTPRequestHandler) -> None:
        released.wait(60)

    with serving(say_nothing) as port:
        within = Within(5.0)
        with pytest.raises(ClusterUnreachable, match=r"has not answered within 0\.2 s"):
            Connection(f"http://127.0.0.1:{port}").get("/api/version", dict, read_s=0.2)
        within.check()
        released.set()


def test_one_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends bytes often enough for the socket's timeout, but never completes its answer."""
    released = threading.Event()

    def drip(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not released.wait(0.05):
            request.wfile.write(b" ")

    monkeypatch.setattr(connection, "_CONNECT_S", 0.1)
    with serving(drip) as port:
        with pytest.raises(ClusterUnreachable):
            Connection(f"http://127.0.0.1:{port}").get("/api/version", dict, read_s=0.2)
        released.set()


def test_no_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_PROBE_S", 0.3)

    def hang_up(server: socket.socket) -> None:
        while True:
            try:
                other, _ = server.accept()
            except OSError:
                return
            with other:
                other.recv(100)
                other.sendall(b"\x00\x00\x12\x04 no words of ours")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=hang_up, args=(server,), daemon=True).start()
        said = told(f"http://127.0.0.1:{server.getsockname()[1]}")
        server.shutdown(socket.SHUT_RDWR)
    assert "does not speak HTTP" in said
    assert "cluster=existing" in said


def test_a_proxy_of_the_environment_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://anna:hers@127.0.0.1:{taken.getsockname()[1]}")
        said = told("http://ray.example.com:8265")
    assert "through the proxy http://127.0.0.1" in said
    assert "NO_PROXY=ray.example.com" in said
    assert "hers" not in said


# --- TLS --------------------------------------------------------------------------------------------------------------

OK = saying(200, '{"ray_version": "2"}')


def test_a_certificate_of_ones_own_authority(certificates: Certificates, tmp_path: Path) -> None:
    ca = str(certificates.ca_file)
    with serving(OK, certificates.issue()) as port:
        for host in ("localhost", "127.0.0.1"):
            found = Connection(f"https://{host}:{port}", ca, TOKEN).get("/api/version", dict)
            assert found == {"ray_version": "2"}
        said = told(f"https://localhost:{port}")
        assert "signed by an authority that is not in what this machine trusts" in said
        assert "cluster.ca_file=PATH" in said


def test_an_authority_that_the_environment_names(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates.ca_file))
    with serving(OK, certificates.issue()) as port:
        asked = Connection(f"https://localhost:{port}")
        assert asked.get("/api/version", dict) == {"ray_version": "2"}
        context = asked.ssl_context()  # for the websocket
        assert context is not None
        with socket.create_connection(("localhost", port)) as plain:
            context.wrap_socket(plain, server_hostname="localhost").close()


def test_a_certificate_that_has_expired(certificates: Certificates) -> None:
    with serving(OK, certificates.issue(days=-1)) as port:
        said = told(f"https://localhost:{port}", ca_file=str(certificates.ca_file))
    assert f"the certificate of https://localhost:{port} has expired" in said


def test_a_certificate_of_somebody_else(certificates: Certificates) -> None:
    with serving(OK, certificates.issue("ray.example.com")) as port:
        ca = str(certificates.ca_file)
        assert "is for other names than localhost" in told(f"https://localhost:{port}", ca_file=ca)
        assert "is for other addresses than 127.0.0.1" in told(f"https://127.0.0.1:{port}", ca_file=ca)


def test_http_where_tls_is_spoken_and_the_other_way_round(certificates: Certificates) -> None:
    with serving(OK, certificates.issue()) as port:
        assert f"speaks https: cluster.address=https://localhost:{port}" in told(f"http://localhost:{port}")
    with serving(OK) as port:
        said = told(f"https://localhost:{port}", ca_file=str(certificates.ca_file))
    assert f"speaks http: cluster.address=http://localhost:{port}" in said
    assert "the token too" in said


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate\n")
    for address, ca, words in (
        ("https://x", tmp_path / "missing.pem", "cannot be read: No such file"),
        ("https://x", empty, "holds no certificate"),
        ("http://x", empty, "is for https, and cluster.address=http://x is not"),
    ):
        with pytest.raises(ConfigError, match=rf"cluster\.ca_file={ca} .*{words}"):
            Connection(address, str(ca))
