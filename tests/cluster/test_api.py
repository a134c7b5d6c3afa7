"""Tests of the Jobs API on a real cluster that requires a token: submission, lost connections, stops and resources."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest

from raytrainer.backends.cluster_job import ClusterJob
from raytrainer.backends.jobs_api import follow, packages
from raytrainer.backends.jobs_api.api import JobsClient, check_environment
from raytrainer.backends.jobs_api.connection import Connection
from raytrainer.backends.jobs_api.facts import impossible
from raytrainer.errors import ClusterDenied, ClusterError, ClusterUnreachable, ConfigError, JobExists
from raytrainer.submission.request import Request
from tests import forkserver
from tests.cluster.test_connection import saying, serving
from tests.cluster.test_through_tls import documented
from tests.launches import OUTSIDE
from tests.outside.ports import free_port

if TYPE_CHECKING:
    from tests.outside.head import Head
    from tests.outside.servers import Certificates

_names = itertools.count()


@dataclass
class Sent:
    """The part of a request that is sent: a script and the module `given` that it reads."""

    script: str
    given: str = ""
    submission_id: str = field(default_factory=lambda: f"job-{next(_names)}")
    resources: dict[str, float] = field(default_factory=dict)
    entrypoint: str = "python -u script.py"

    @property
    def metadata(self) -> dict[str, str]:
        return {"raytrainer.name": self.submission_id, "raytrainer.user": "anna"}


def stage(sent: Sent, folder: Path) -> dict[str, Any]:
    """Replaces `packages.stage`."""
    for name, file, text in (("tree", "script.py", sent.script), ("given", "__init__.py", sent.given)):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(text)
    return {"working_dir": str(folder / "tree"), "py_modules": [str(folder / "given")]}


Submit = Callable[..., str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty home directory, because the developer's own may hold a token."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def token_file(head: Head, tmp_path: Path) -> str:
    (tmp_path / "token").write_text(head.token)
    (tmp_path / "token").chmod(0o600)
    return str(tmp_path / "token")


@pytest.fixture
def jobs(head: Head, token_file: str) -> Iterator[JobsClient]:
    """The cluster's Jobs API. At the end all jobs of the test are stopped and have ended."""
    found = JobsClient(head.address, token_file=token_file)
    before = {job.submission_id for job in found.list()}
    yield found
    mine = [job.submission_id for job in found.list() if job.submission_id not in before]
    for name in mine:
        found.stop(name)
    for name in mine:
        ended(found, name)


@pytest.fixture
def submit(jobs: JobsClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    folders = itertools.count()
    monkeypatch.setattr(packages, "stage", stage)

    def send(sent: Sent, to: JobsClient = jobs) -> str:
        return to.submit(cast("Request", sent), tmp_path / f"staged-{next(folders)}")

    return send


def until(holds: Callable[[], Any], within_s: float = 60) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)
    return found


def ended(jobs: JobsClient, name: str) -> ClusterJob:
    """Wait until a job has ended and holds no resources or processes, and return it."""

    def found() -> ClusterJob | None:
        job = jobs.info(name)
        return job if job is not None and not job.is_active and not jobs.held_by(name) else None

    job: ClusterJob = until(found)
    return job


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def logged(jobs: JobsClient, name: str) -> list[str]:
    """Return the lines that the script has printed."""
    return [line.removeprefix("> ") for line in jobs.logs(name).splitlines() if line.startswith("> ")]


class Between:
    """A TCP proxy on loopback that can drop connections."""

    def __init__(self, port: int) -> None:
        self._target, self._open = port, set[socket.socket]()
        self.refused: bytes | None = None  # a connection is closed when its request contains this
        self.unanswered: bytes | None = None  # a connection is closed when the answer to such a request arrives
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Close all connections, and return the number of their sockets."""
        lost, self._open = self._open, set()
        for one in lost:
            self._close(one)
        return len(lost)

    def close(self) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open |= {client, server}
                asked = threading.Event()
                threading.Thread(target=self._pass, args=(client, server, asked, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, asked, False), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, asked: threading.Event, asks: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if asks and self.refused is not None and self.refused in data:
                    break
                if asks and self.unanswered is not None and self.unanswered in data:
                    asked.set()
                if not asks and asked.is_set():
                    break
                sink.sendall(data)
        for one in (source, sink):
            self._close(one)

    @staticmethod
    def _close(one: socket.socket) -> None:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


@pytest.fixture
def between(head: Head) -> Iterator[Between]:
    found = Between(head.port)
    yield found
    found.close()


# --- submission -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_from_its_submission_to_its_end(
    jobs: JobsClient, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[str] = []
    really = Connection.request

    def counting(self: Connection, method: str, path: str, **options: Any) -> Any:
        uploads.extend([path] if method == "PUT" else [])
        return really(self, method, path, **options)

    monkeypatch.setattr(Connection, "request", counting)
    script = f"import given, sys\nprint('> ' + given.TEXT)\nsys.exit(given.CODE)  # {time.time()}"
    first, second = Sent(script, "TEXT, CODE = 'one', 0"), Sent(script, "TEXT, CODE = 'zwei ü', 3")
    began = time.time()
    assert submit(first) == first.submission_id
    assert len(uploads) == 2
    assert submit(second) == second.submission_id
    assert len(uploads) == 3  # the same tree is not uploaded again
    done, failed = ended(jobs, first.submission_id), ended(jobs, second.submission_id)
    assert (done.status, done.exit_code, done.metadata) == ("SUCCEEDED", 0, first.metadata)
    assert (failed.status, failed.exit_code) == ("FAILED", 3)
    assert "exit code 3" in failed.message
    assert began - 1 < (done.started or 0) < (done.ended or 0) < time.time() + 1
    assert [logged(jobs, name) for name in (first.submission_id, second.submission_id)] == [["one"], ["zwei ü"]]
    assert {first.submission_id, second.submission_id} <= {job.submission_id for job in jobs.list()}
    assert list(jobs.tail(second.submission_id)) == [jobs.logs(second.submission_id)]
    with pytest.raises(JobExists, match=rf"already has a job {first.submission_id}"):
        submit(Sent(script, "TEXT, CODE = 'other', 0", first.submission_id))


def test_sent_by_several_at_once_it_is_one_job(jobs: JobsClient, submit: Submit) -> None:
    sent = Sent("print('> once')")

    def send(_: int) -> str:
        try:
            return submit(sent)
        except JobExists:
            return "there"

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(send, range(4)))
    assert found == sorted([sent.submission_id, "there", "there", "there"])
    ended(jobs, sent.submission_id)
    assert logged(jobs, sent.submission_id) == ["once"]


def test_a_lost_answer_is_no_lost_job(jobs: JobsClient, submit: Submit, between: Between, token_file: str) -> None:
    between.unanswered = b"POST /api/jobs/ "
    sent = Sent("print('> once')")
    assert submit(sent, JobsClient(between.address, token_file=token_file)) == sent.submission_id
    ended(jobs, sent.submission_id)
    between.unanswered, between.refused = None, b"POST /api/jobs/ "  # the request itself is lost, so there is no job
    lost = Sent("")
    with pytest.raises(ClusterUnreachable):
        submit(lost, JobsClient(between.address, token_file=token_file))
    assert jobs.info(lost.submission_id) is None


def test_what_ray_does_not_take(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "stage", lambda sent, folder: {"working_dir": str(folder / "missing")})
    with pytest.raises(ConfigError, match=r"^cluster\.runtime_env .*missing"):
        submit(Sent(""))


# --- following the log ------------------------------------------------------------------------------------------------

LINES = "import time\nfor i in range(300):\n    print('>', i)\n    time.sleep(0.02)"


@pytest.mark.slow
def test_lost_connections_lose_no_line_and_repeat_none(
    jobs: JobsClient, submit: Submit, between: Between, token_file: str
) -> None:
    name, cuts, text = submit(Sent(LINES)), 0, ""
    for piece in JobsClient(between.address, token_file=token_file).tail(name):
        text += piece
        if cuts < 3 and ">" in piece:
            cuts += between.cut() > 0
    assert cuts == 3
    assert text == jobs.logs(name)
    assert logged(jobs, name) == [str(i) for i in range(300)]


@pytest.mark.slow
def test_where_no_websocket_comes_through(submit: Submit, jobs: JobsClient, between: Between, token_file: str) -> None:
    between.refused = b"/logs/tail"
    name = submit(Sent(LINES))
    pieces = list(JobsClient(between.address, token_file=token_file).tail(name))
    assert len(pieces) > 1
    assert "".join(pieces) == jobs.logs(name)


def test_a_log_that_is_no_text(jobs: JobsClient, submit: Submit) -> None:
    """Ray's own API returns an error for such a log, followed or read at once."""
    name = submit(Sent("import os, time\nos.write(1, b'> a\\xff\\r\\n> \\xc3\\xbc\\n')\ntime.sleep(1)\nprint('> end')"))
    text = "".join(jobs.tail(name))
    assert "> a\ufffd\n> ü\n> end\n" in text
    assert text == jobs.logs(name)


def test_a_log_that_is_gone_with_its_node() -> None:
    """The log of an ended job is lost with its node: following it ends normally, and reading it raises an error."""
    row = {"submission_id": "x", "status": "FAILED", "message": "its node has died", "start_time": 1, "end_time": 2}

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path == "/api/jobs/x":
            saying(200, json.dumps(row))(request)
        else:
            saying(500, "aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 10.0.0.2")(request)

    with serving(answer) as port:
        gone = JobsClient(f"http://127.0.0.1:{port}")
        assert list(gone.tail("x")) == []
        with pytest.raises(ClusterError, match=r"log of job x: .*node .*is gone"):
            gone.logs("x")


def test_a_cluster_that_is_gone_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [1000.0], [0]

    def gone() -> bool:
        asked[0] += 1
        raise ClusterUnreachable("nothing listens")

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("raytrainer.backends.jobs_api.follow.time.monotonic", lambda: clock[0])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nowhere = Connection(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ClusterUnreachable, match="nothing listens"):
            list(follow.follow(nowhere, "x", gone, str, sleep))
    assert 120 < clock[0] - 1000 < 130
    assert asked[0] < 40


# --- resources and their holders --------------------------------------------------------------------------------------

HOLD = """
import os, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
class Worker:
    def pid(self):
        return os.getpid()
group = ray.util.placement_group([{"CPU": 1}])
ray.get(group.ready())
worker = Worker.remote()
print(">", os.getpid())
print(">", ray.get(worker.pid.remote()))
ray.get(ray.util.placement_group([{"CPU": 2}]).ready())
"""


@pytest.mark.slow
def test_who_holds_it_what_waits_and_when_it_is_free(jobs: JobsClient, submit: Submit) -> None:
    facts = until(lambda: (found := jobs.facts()).nodes and not found.may_grow and found)
    assert (facts.total["CPU"], facts.available["CPU"], facts.holders) == (2, 2, ())
    assert facts.python_version == ".".join(map(str, sys.version_info[:3]))
    assert (facts.version_problem(), facts.may_grow) == (None, False)
    holds = submit(Sent(HOLD))
    until(lambda: len(logged(jobs, holds)) == 2)
    pids = [int(pid) for pid in logged(jobs, holds)]
    waits = submit(Sent("print('> mine')", resources={"CPU": 2}))
    until(lambda: "CPU" in jobs.explain_waiting(waits))
    assert jobs.explain_waiting(waits).startswith(f"for 2 CPUs: 0 of 2 CPUs free; {holds} (anna) holds 2 CPUs for ")
    assert jobs.explain_waiting(holds) == "for 2 CPUs: 0 of 2 CPUs free"
    assert jobs.held_by(holds) == {"CPU": 2, "processes": 3}  # the driver, its supervisor and the actor
    facts = jobs.facts()
    assert [(one.name, one.user, one.resources) for one in facts.holders] == [(holds, "anna", {"CPU": 2})]
    jobs.stop(holds)
    assert ended(jobs, holds).status == "STOPPED"
    assert not any(lives(pid) for pid in pids)
    ended(jobs, waits)
    assert logged(jobs, waits) == ["mine"]
    assert jobs.explain_waiting(waits) == "for nothing: it is SUCCEEDED"


@pytest.mark.slow
def test_a_cluster_that_grows(tmp_path: Path) -> None:
    """Ray's own autoscaler with fake machines: 1 CPU now. The Jobs API does not tell how many more there can be."""
    port = free_port()
    with subprocess.Popen(
        [
            sys.executable,
            str(OUTSIDE / "autoscaling.py"),
            json.dumps(forkserver.server().ray),
            str(tmp_path / "gate"),
            str(port),
        ],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("wb"),
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(OUTSIDE)},
    ) as cluster:
        try:
            assert cluster.stdout is not None
            assert cluster.stdout.readline(), (tmp_path / "log").read_text()
            jobs = JobsClient(f"http://127.0.0.1:{port}")
            facts = until(lambda: (found := jobs.facts()).nodes and found)
            assert (facts.total["CPU"], facts.may_grow) == (1, True)
            assert impossible([{"CPU": 1.0}] * 100, facts) is None
        finally:
            cluster.communicate()  # the program ends when its input is closed


def test_a_job_that_there_is_not(jobs: JobsClient) -> None:
    assert jobs.info("nobody's") is None
    assert jobs.held_by("nobody's") == {}
    for ask in (jobs.stop, jobs.logs, jobs.explain_waiting):
        with pytest.raises(ClusterError, match="nobody's"):
            ask("nobody's")
    with pytest.raises(ClusterError, match="has no job nobody's"):
        list(jobs.tail("nobody's"))


def test_another_server_s_404_is_no_job_s_end() -> None:
    with serving(saying(404, "<html>not here</html>")) as port, pytest.raises(ClusterError, match="answers 404"):
        JobsClient(f"http://127.0.0.1:{port}").info("x")


def test_another_ray_is_told_before_its_tables_are_read() -> None:
    with serving(saying(200, '{"ray_version": "2.9.3"}')) as port:
        found = JobsClient(f"http://127.0.0.1:{port}").facts()
    assert "has ray 2.9.3" in str(found.version_problem())


# --- access -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, "none was found"), ("planted-secret-0123", r"refuses the token of RAY_AUTH_TOKEN \(403")],
)
def test_without_the_token(
    head: Head, submit: Submit, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
) -> None:
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    shut = JobsClient(head.address)
    for ask in (shut.list, shut.facts, lambda: list(shut.tail("x")), lambda: submit(Sent(""), shut)):
        with pytest.raises(ClusterDenied, match=words) as caught:
            ask()
        assert "planted" not in str(caught.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    JobsClient(head.address).list()


def test_a_variable_that_names_another_cluster(
    jobs: JobsClient, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://10.0.0.9:8265")
        with pytest.raises(
            ConfigError, match=rf"cluster\.address={jobs.address} .*{name}=http://10\.0\.0\.9:8265 is set"
        ):
            submit(Sent(""))
        jobs.list()  # the variable does not affect our own requests
        monkeypatch.setenv(name, f"{jobs.address}/")
        check_environment(jobs.address)


@pytest.mark.slow
def test_behind_a_proxy_that_speaks_tls(
    head: Head,
    jobs: JobsClient,
    submit: Submit,
    token_file: str,
    certificates: Certificates,
    system_program: Callable[[str, str], str],
    tmp_path: Path,
) -> None:
    from tests.outside.servers import Nginx

    program = system_program("nginx", "nginx")
    nginx = Nginx(tmp_path / "nginx", program, head.port, certificates.issue(), documented())
    nginx.start()
    try:
        behind = JobsClient(nginx.uri, ca_file=str(certificates.ca_file), token_file=token_file)
        name = submit(Sent(LINES), behind)
        assert "".join(behind.tail(name)) == jobs.logs(name)
        assert '/logs/tail HTTP/1.1" 101' in nginx.requests.read_text()
        below = JobsClient(f"{nginx.uri}/ray", ca_file=str(certificates.ca_file), token_file=token_file)
        assert "".join(below.tail(name)) == jobs.logs(name)
        with pytest.raises(ClusterUnreachable, match=r"cluster\.ca_file=PATH"):
            submit(Sent(""), JobsClient(nginx.uri, token_file=token_file))
    finally:
        nginx.stop()
