"""A Ray cluster as `ray start` makes it, with each node in its own process: a head whose dashboard requires a token,
and more nodes beside it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests import forkserver
from tests.outside.ports import free_port
from tests.outside.servers import START_S, Server

_END_S = 60.0  # for `ray start` to end everything that it has started


class _Node(Server):
    """`ray start` with its own ports and directory. On the node, `python` is this interpreter.

    Attributes:
        session: The directory in which Ray keeps everything that it writes.
    """

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        # A short path, because the paths of its sockets, which are below it, may have at most 107 characters.
        self.session = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))

    def start_with(
        self, options: Sequence[str], cpus: int, home: Path, secrets: Mapping[str, str], ready: Callable[[], bool]
    ) -> None:
        programs = Path(sys.executable).parent
        (self.folder / "bin").mkdir(exist_ok=True)
        with suppress(FileExistsError):
            (self.folder / "bin/python").symlink_to(forkserver.server().python)  # the interpreter in a job's command
        ports = ("dashboard-agent-listen-", "dashboard-agent-grpc-", "metrics-export-")
        self.begin(
            [
                *forkserver.server().ray,
                *("start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
                *(f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={100 * 2**20}"),
                *(f"--{name}port={free_port()}" for name in ports),
                f"--temp-dir={self.session}",
                *options,
            ],
            ready,
            environment={
                "HOME": str(home),
                "PATH": os.pathsep.join([str(self.folder / "bin"), str(programs), os.environ.get("PATH", "")]),
                "RAY_AUTH_MODE": "token",
                **secrets,
            },
            cwd=self.folder,
        )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the node and everything that it has started. A second call does nothing."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        shutil.rmtree(self.session, ignore_errors=True)


class Head(_Node):
    """The head of a cluster, which takes jobs at `address`.

    Args:
        folder: The directory for its output and its home directory, which holds the token.
        token: The secret that its dashboard requires.
        cpus: The number of CPUs of its node.
        secrets: Environment variables on the cluster's side.
    """

    def __init__(
        self, folder: Path, token: str, cpus: int = 2, secrets: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(folder, "ray")
        self.secrets = secrets
        self.token, self.address, self._cpus = token, f"http://127.0.0.1:{self.port}", cpus
        self.home = folder / "home"
        self.token_file = self.home / ".ray" / "auth_token"
        self.token_file.parent.mkdir(parents=True)
        self.token_file.write_text(token)
        self.token_file.chmod(0o600)
        self._inner = f"127.0.0.1:{free_port()}"
        self.others: list[_Node] = []

    def start(self) -> None:
        options = ["--head", f"--port={self._inner.partition(':')[2]}", f"--ray-client-server-port={free_port()}"]
        options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}"]
        self.start_with(options, self._cpus, self.home, self.secrets, self._takes_jobs)

    def add_node(self, cpus: int) -> None:
        """Add another node on this machine, which ends with the head."""
        node = _Node(self.folder, f"ray-{len(self.others) + 2}")
        self.others.append(node)
        deadline = time.monotonic() + START_S
        while not self._has(len(self.others)):  # the head answers before its own node is listed
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ready = lambda: self._has(len(self.others) + 1)  # noqa: E731
        node.start_with([f"--address={self._inner}"], cpus, self.home, self.secrets, ready)

    def _has(self, nodes: int) -> bool:
        return len(self.table("nodes", state="ALIVE")) == nodes

    def table(self, name: str, **filters: str) -> list[dict[str, Any]]:
        """Return the entries of one of Ray's tables: `nodes`, `actors`, `jobs`, …"""
        query = "".join(f"&filter_keys={key}&filter_predicates==&filter_values={v}" for key, v in filters.items())
        answer: dict[str, Any] = json.loads(self.ask(f"/api/v0/{name}?detail=1&limit=10000{query}"))
        return list(answer["data"]["result"]["result"])

    def ask(self, path: str) -> str:
        """Return the dashboard's answer to a request with the token."""
        request = urllib.request.Request(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        for node in self.others:
            node.stop(number)
        super().stop(number)

    def _takes_jobs(self) -> bool:
        try:
            self.ask("/api/jobs/")
        except OSError:
            return False
        return True
