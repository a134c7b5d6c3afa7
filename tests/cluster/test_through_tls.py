"""Test of a whole command through the proxy that docs/clusters.md shows: nginx, TLS with an own authority, and a token.
It runs nightly; test_api.py tests the parts with the same configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raytrainer.backends.jobs_api.api import JobsClient
from tests.launches import Ended, Runs, launched, record
from tests.outside.head import Head
from tests.outside.servers import Certificates, Nginx

pytestmark = [pytest.mark.nightly, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def documented() -> str:
    """Return the page's own configuration with a second location below a path, as on a server that a company shares."""
    found = re.search(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    text = found[1]
    for written, here in (
        ("listen 443 ssl", "listen 127.0.0.1:PORT ssl"),
        ("server_name ray.example.com", "server_name localhost"),
        ("/etc/nginx/tls/ray.example.com.pem", "CERTIFICATE"),
        ("/etc/nginx/tls/ray.example.com.key", "KEY"),
        ("http://127.0.0.1:8265", "http://127.0.0.1:TARGET"),
    ):
        assert text.count(written) == 1, written
        text = text.replace(written, here)
    location = re.search(r"    location / \{.*?\n    \}\n", text, re.DOTALL)
    assert location is not None
    below = location[0].replace("location / {", "location /ray/ {").replace(":TARGET;", ":TARGET/;")
    return text.replace(location[0], location[0] + below)


@pytest.fixture(scope="module")
def proxy(
    head: Head,
    certificates: Certificates,
    system_program: Callable[[str, str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Nginx]:
    nginx = system_program("nginx", "nginx")
    server = Nginx(tmp_path_factory.mktemp("nginx"), nginx, head.port, certificates.issue(), documented())
    server.start()
    yield server
    server.stop()


def test_from_the_command_to_the_verbs(
    proxy: Nginx, head: Head, certificates: Certificates, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(in_tmp))  # this directory holds no token
    to = ["cluster=job", f"cluster.address={proxy.uri}", f"cluster.token_file={head.token_file}"]
    arguments = ["experiment=smoke", "name=tls", "trainer.max_steps=4", *to, f"cluster.ca_file={certificates.ca_file}"]
    (in_tmp / ".rayignore").write_text("/launch-*\n")
    # Nothing is sent to a server whose certificate is not trusted.
    unknown = launched(in_tmp, *arguments[:-1])
    assert unknown.code in (1, 2), str(unknown)
    assert "cluster.ca_file=PATH" in unknown.err
    assert not (in_tmp / "runs").exists()

    ended = launched(in_tmp, *arguments).exits(0)
    assert "outcome  finished, 4 steps" in ended.out
    requests = proxy.requests.read_text()
    assert '/api/jobs/tls/logs/tail HTTP/1.1" 101' in requests
    assert Runs(in_tmp).status("tls") == record(in_tmp, "tls")["status"] == "FINISHED"

    def verb(*words: str) -> Ended:
        before = len(proxy.requests.read_text())
        done = launched(in_tmp, *words).exits(0)
        assert "/api/jobs/" in proxy.requests.read_text()[before:], words
        return done

    told = json.loads(verb("status", "tls", "--json").out)
    assert (told["status"], told["job"]["status"]) == ("FINISHED", "SUCCEEDED")
    # An address with a path works, too.
    below = JobsClient(f"{proxy.uri}/ray", ca_file=str(certificates.ca_file), token_file=str(head.token_file))
    assert "tls" in {job.submission_id for job in below.list()}
    assert "".join(below.tail("tls")) == below.logs("tls")
    assert '/ray/api/jobs/tls/logs/tail HTTP/1.1" 101' in proxy.requests.read_text()

    files = [path for place in (in_tmp, proxy.folder) for path in place.rglob("*") if path.is_file()]
    assert not [str(path) for path in files if head.token.encode() in path.read_bytes()]
