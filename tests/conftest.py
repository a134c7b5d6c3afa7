"""What every test gets: an environment without the developer's own settings, and no way to the outside.
Fixtures of one subject live beside its tests.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import shutil
import signal
import socket
import sys
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import settings

from tests import forkserver

if TYPE_CHECKING:
    from raytrainer.storage import Storage
    from tests.outside.head import Head
    from tests.outside.servers import S3, Certificates, Mlflow, Nginx, Postgres

T = TypeVar("T", "Head", "S3", "Postgres", "Mlflow", "Nginx")

AT_START = frozenset(os.environ)
# Variables that would aim a test at somebody's server or cluster, or that a library sets for good when it is used.
FOREIGN = (
    *("AWS_", "MLFLOW_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "RAY_RUNTIME_ENV", "HYDRA_"),
    *("TORCHINDUCTOR_", "TRITON_"),
)
QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A proxy never stands between a test and its own server.
    "NO_PROXY": "127.0.0.1,localhost,::1",
    "no_proxy": "127.0.0.1,localhost,::1",
}

# The machine is small and shared: no example has a deadline. CI looks at the same examples every time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def _clean(patch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        patch.delenv(name)
    for name, value in QUIET.items():
        patch.setenv(name, value)


def pytest_configure(config: pytest.Config) -> None:
    """Restore the signals that a shell ignores for a background job or under `nohup`, since launches would inherit that.
    Then choose the servers that fork launches."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    started_by = getattr(config, "workerinput", {}).get("forkserver")
    forkserver.use(
        {**{name: value for name, value in os.environ.items() if name not in _left_behind()}, **QUIET},
        Path(started_by) if started_by else None,
    )


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Share one fork server among the processes of pytest-xdist."""
    node.workerinput["forkserver"] = str(forkserver.server().folder)


@pytest.fixture(scope="session", autouse=True)
def _session_environment() -> Iterator[None]:
    """Set up the environment for the fixtures of a session or module, which run before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        _clean(patch)
        patch.setattr(socket.socket, "connect", _refusing(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _refusing(socket.socket.connect_ex))
        yield


def _left_behind() -> list[str]:
    """Return variables that would direct a test to a real server, or prevent a launch from being forked."""
    return [
        name
        for name in os.environ
        if name not in QUIET
        and (name.startswith(FOREIGN) or (forkserver.is_read_on_import(name) and name not in AT_START))
    ]


@pytest.fixture(scope="module", autouse=True)
def _module_environment() -> None:
    """Remove variables that earlier modules left behind. MLflow stores its address in one, and a Ray that ran in this process
    sets variables that prevent launches from being forked."""
    for name in _left_behind():
        del os.environ[name]


@pytest.fixture(autouse=True)
def _test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset the environment for each test."""
    _clean(monkeypatch)


@pytest.fixture(autouse=True)
def _imported_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a test imports from a temporary folder are forgotten: another test's `mine.py` is another module."""
    before = set(sys.modules)
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        # Not by attribute: a lazy module would import what it names.
        values = getattr(sys.modules[name], "__dict__", {})
        places = [values.get("__file__"), *(values.get("__path__") or ())]
        if any(str(place).startswith(folder) for place in places):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    """A Trainer sets the threads and the determinism of its process: those of one test are not the next one's."""
    before = _torch_settings()
    yield
    if (torch := sys.modules.get("torch")) is not None and before is not None:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def _torch_settings() -> tuple[int, bool] | None:
    # Looked up, not imported: most tests do without, and it takes a second.
    torch = sys.modules.get("torch")
    return None if torch is None else (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())


def _refusing(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        # A datagram socket sends nothing when it connects; Ray finds its own address that way.
        internet = self.family in (socket.AF_INET, socket.AF_INET6) and self.type & socket.SOCK_STREAM
        if internet and _is_outside(str(address[0])):
            raise AssertionError(f"a test reached for {address}: tests use no network")
        return connect(self, address)

    return guarded


def _is_outside(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return host not in {"localhost", socket.gethostname()} and not host.endswith(".localhost")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in an empty directory of its own, which is the value."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def system_program() -> Callable[[str, str], str]:
    """`system_program("nginx", "nginx")`: the path of a program from a system package; without it the test is skipped.

    `.ci/run` installs what is named here, and fails on such a skip.
    """
    # Where Debian has servers, which are on no user's path.
    more = ["/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]

    def find(program: str, package: str) -> str:
        found = shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *more]))
        if found is None:
            pytest.skip(f"system package missing: {package} (has {program})")
        return found

    return find


# --- servers that tests of several subjects use, started once each ----------------------------------------------------


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    from tests.outside.servers import Certificates

    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """An S3 with the bucket `bucket`. Each test keeps to a prefix of its own."""
    from tests.outside.servers import S3

    yield from _running(S3(tmp_path_factory.mktemp("s3")))


@pytest.fixture
def in_s3(s3: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a place of the test's own there; the variables are set that users set."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "pyarrow", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind; `indirect` chooses."""
    from pyarrow import fs

    from raytrainer.storage import Storage

    if request.param == "s3":
        return Storage(request.getfixturevalue("in_s3"))
    if request.param == "local":
        return Storage(tmp_path / "bucket")
    # The code of a URI, on a local directory.
    return Storage("bucket", filesystem=fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()))


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory, system_program: Callable[[str, str], str]) -> Iterator[Postgres]:
    from tests.outside.servers import Postgres

    programs = Path(system_program("initdb", "postgresql")).resolve().parent  # with the others, of the same version
    yield from _running(Postgres(tmp_path_factory.mktemp("postgres"), programs))


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, s3: S3) -> Iterator[Mlflow]:
    """MLflow as a team has it: users with passwords, PostgreSQL, artifacts in S3."""
    from tests.outside.servers import Mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    yield from _running(Mlflow(folder, postgres.uri, "s3://bucket/artifacts", s3.environment))


@pytest.fixture(scope="session")
def mlflow_behind_tls(
    tmp_path_factory: pytest.TempPathFactory,
    system_program: Callable[[str, str], str],
    mlflow_server: Mlflow,
    certificates: Certificates,
) -> Iterator[Nginx]:
    """nginx before it, which alone is to be reached."""
    from tests.outside.servers import Nginx

    folder, program = tmp_path_factory.mktemp("nginx"), system_program("nginx", "nginx")
    yield from _running(Nginx(folder, program, mlflow_server.port, certificates.issue()))


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A shared cluster of two CPUs that wants a token, and has a secret variable. Each test has job names of its own, and
    leaves nothing running."""
    from tests.outside.head import Head

    secrets = {"PLANTED_API_KEY": "planted-3f9c1e5d7a"}
    yield from _running(Head(tmp_path_factory.mktemp("head"), token="a-token-of-the-tests", secrets=secrets))


def _running(server: T) -> Iterator[T]:
    try:
        server.start()
        yield server
    finally:
        server.stop()


# --- how the suite is divided -----------------------------------------------------------------------------------------

SLOW_S, QUICK_S = 20.0, 0.2  # what a test is thought to take, marked `slow` or not


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="Run only part I of N of the files, for instance 1/3.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests by files, the longest first, so that the processes of pytest-xdist (`--dist loadfile`) end at about
    the same time; and leave out the files of other shards."""
    _skip_without_gpu(items)
    by_file: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_file[item.nodeid.partition("::")[0]].append(item)
    cost = {
        file: sum(SLOW_S if item.get_closest_marker("slow") else QUICK_S for item in tests)
        for file, tests in by_file.items()
    }
    order = sorted(cost, key=lambda file: (-cost[file], file))
    if shard := config.getoption("--shard"):
        part, count = map(int, shard.split("/"))
        mine = shares(order, cost, count)[part - 1]
        config.hook.pytest_deselected(items=[item for file in order if file not in mine for item in by_file[file]])
        order = [file for file in order if file in mine]
    items[:] = [item for file in order for item in by_file[file]]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """No garbage collection while everything is imported: it would take half of that time. What is imported stays, so that
    later collections, of which composing a config causes many, need not look at it again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def shares(files: Sequence[str], cost: Mapping[str, float], count: int) -> list[set[str]]:
    """Divide files, the most expensive first, into `count` shares of about the same cost."""
    shares: list[set[str]] = [set() for _ in range(count)]
    totals = [0.0] * count
    for file in files:
        least = totals.index(min(totals))
        shares[least].add(file)
        totals[least] += cost[file]
    return shares


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch  # only here: most runs collect no such test

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
