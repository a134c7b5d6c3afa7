"""Virtual environments that differ from this one in one library, and Ray clusters that run in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.outside.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
_PARTS = {"mlflow": ("mlflow", "mlflow-skinny", "mlflow-tracing")}  # libraries that are several packages of one version
_START_S, _END_S = 180.0, 60.0


@dataclass(frozen=True)
class Environment:
    """A virtual environment. `python` is its interpreter, `name` what differs, such as `ray 2.59.0`."""

    name: str
    python: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its processes, without addresses and secrets of this machine's Ray."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        return {**own, "PATH": f"{Path(self.python).parent}{os.pathsep}{own.get('PATH', '')}"}


def this_environment(library: str, version: str) -> Environment:
    return Environment(f"{library} {version}", sys.executable)


def make(folder: Path, library: str, version: str, pip: tuple[str, ...] = ()) -> Environment:
    """Return an environment with another version of a library and everything else of this one. It is made once.

    Args:
        folder: Where environments are kept.
        library: The name on the package index.
        version: Its version.
        pip: More arguments of `pip install`.
    """
    place = folder / f"{library}-{version}"
    python, finished = str(place / "bin" / "python"), place / "finished"
    if not finished.exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        packages = [f"{part}=={version}" for part in _PARTS.get(library, (library,))]
        command = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            *pip,
            *packages,
        ]
        subprocess.run(command, check=True)
        share_packages(place)
        finished.touch()
    return Environment(f"{library} {version}", python)


def share_packages(folder: Path) -> None:
    """Put this environment's packages behind those of the environment in `folder`, and raytrainer's sources."""
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (purelib / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")


class Head:
    """A cluster of one node, `ray start --head`, on ports of its own. It ends by a signal to this one process.

    Attributes:
        dashboard: The address for `cluster=job`.
        gcs: The address for `cluster=existing`.
    """

    def __init__(self, environment: Environment, folder: Path) -> None:
        self._environment, self._folder = environment, folder
        dashboard, gcs = free_port(), free_port()
        self.dashboard, self.gcs = f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}"
        self._options = [
            *("start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", "--num-cpus=4"),
            *("--num-gpus=0", f"--object-store-memory={100 * 2**20}", f"--port={gcs}", f"--dashboard-port={dashboard}"),
            *(f"--{name}-port={free_port()}" for name in ("ray-client-server", "dashboard-agent-listen")),
            *(f"--{name}-port={free_port()}" for name in ("dashboard-agent-grpc", "metrics-export")),
        ]

    def __enter__(self) -> Head:
        # A short path, because the paths of its sockets, which are below it, may have at most 107 characters.
        self._session = tempfile.mkdtemp(prefix="ray", dir="/tmp")
        home = self._folder / "home"
        home.mkdir(parents=True)
        command = [self._environment.python, "-m", "ray.scripts.scripts", *self._options, f"--temp-dir={self._session}"]
        with (self._folder / "ray.log").open("w") as log:
            self._process = subprocess.Popen(
                command,
                env={**self._environment.variables, "HOME": str(home)},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError(
                    f"{self._environment.name} did not start: {(self._folder / 'ray.log').read_text()[-2000:]}"
                )
            time.sleep(0.5)
        return self

    def _answers(self) -> bool:
        # The jobs are answered only when the agent of the head node takes them.
        with suppress(OSError), urllib.request.urlopen(f"{self.dashboard}/api/jobs/", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._session, ignore_errors=True)
