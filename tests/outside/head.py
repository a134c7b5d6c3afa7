"""The head of a Ray cluster as `ray start` makes it, a process of its own: with its dashboard, and a token that it wants."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from tests.outside.servers import Server, free_port

_END_S = 60.0  # of `ray start`, which ends all that it has started


class Head(Server):
    """`ray start --head`, on ports of its own, for jobs at `address`. Its jobs have this interpreter as `python`.

    Args:
        folder: For its home directory, in which its token is, and its output.
        token: The secret.
        cpus: What its node has.
        secrets: Variables of the cluster's side.

    Attributes:
        session: Where Ray keeps all that it writes.
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
        # A short path: those of its sockets, below it, may have 107 characters.
        self.session = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))

    def start(self) -> None:
        programs = Path(sys.executable).parent
        ports = ("", "dashboard-agent-listen-", "dashboard-agent-grpc-", "metrics-export-", "ray-client-server-")
        self.begin(
            [
                str(programs / "ray"),
                *("start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}", f"--temp-dir={self.session}"),
                *(f"--num-cpus={self._cpus}", "--num-gpus=0", f"--object-store-memory={100 * 2**20}"),
                *(f"--{name}port={free_port()}" for name in ports),
            ],
            self._takes_jobs,
            environment={
                "HOME": str(self.home),
                "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
                "RAY_AUTH_MODE": "token",
                **self.secrets,
            },
            cwd=self.folder,
        )

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends it, and what it has started; again: nothing."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        shutil.rmtree(self.session, ignore_errors=True)

    def _takes_jobs(self) -> bool:
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"})
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except OSError:
            return False
        return True
