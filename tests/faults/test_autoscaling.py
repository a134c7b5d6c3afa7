"""A cluster that grows: a run waits for nodes that can be added and says so, and the nodes are removed after it. A
request that can never be served is refused. The cluster is Ray's own autoscaler with fake machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import forkserver
from tests.launches import OUTSIDE, Runs, launch, launched
from tests.promises import Within

pytestmark = pytest.mark.slow

RUN = ["experiment=mlp", "name=run", "tracking.log_model=false", "trainer.max_epochs=1"]
WITHOUT_TOKEN = {"RAY_AUTH_MODE": "disabled"}  # whoever runs the tests may have a token for their own cluster


class Growing:
    """tests/outside/autoscaling.py in its own session: 1 CPU, and at most 1 + 1 + 2 more."""

    def __init__(self, folder: Path) -> None:
        self.gate, self.log = folder / "gate", folder / "cluster.log"
        self.process = subprocess.Popen(
            [sys.executable, str(OUTSIDE / "autoscaling.py"), json.dumps(forkserver.server().ray), str(self.gate)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            text=True,
            start_new_session=True,
            env={**os.environ, **WITHOUT_TOKEN, "PYTHONPATH": str(OUTSIDE)},
        )
        self.address = self._answer()
        assert ":" in self.address, self.log.read_text()

    def ask(self, command: str = "") -> dict[str, list[Any]]:
        """Send a command, and return the CPUs of the nodes and the states of the placement groups."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        found: dict[str, list[Any]] = json.loads(self._answer())
        return found

    def until(self, found: dict[str, list[Any]], within_s: float) -> None:
        within = Within(within_s)
        while (last := self.ask()) != found:
            within.check(last)
            time.sleep(0.2)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    process.kill()
            except (psutil.Error, ProcessLookupError):
                continue


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growing]:
    cluster = Growing(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.end()


@pytest.fixture
def on(cluster: Growing) -> Iterator[list[str]]:
    """Yield the arguments to run on the cluster, which has its initial size and cannot add a machine yet."""
    cluster.until({"nodes": [1], "placement_groups": []}, 60)
    cluster.gate.unlink(missing_ok=True)
    yield ["cluster=existing", f"cluster.address={cluster.address}"]
    cluster.gate.touch()


def test_a_run_waits_for_nodes_that_go_after_it(cluster: Growing, on: list[str], tmp_path: Path) -> None:
    with launch(tmp_path, *RUN, *on, "scaling.num_workers=3") as run:
        run.said("waiting for 3 CPUs (0:03): 1 CPU free")
        run.said("the cluster adds nodes")
        assert cluster.ask()["nodes"] == [1]
        cluster.gate.touch()
        ended = run.wait(120).exits(0)
        run.nothing_left()
    assert "3 workers on CPU" in ended.out
    assert Runs(tmp_path).status("run") == "FINISHED"
    cluster.until({"nodes": [1], "placement_groups": []}, 60)


def test_what_it_can_never_serve_is_refused(cluster: Growing, on: list[str], tmp_path: Path) -> None:
    within = Within(10.0)
    ended = launched(tmp_path, *RUN, *on, "scaling.num_workers=6", fresh=True).exits(2)
    within.check()
    assert "scaling.num_workers=6 × 1 CPU = 6 CPUs" in ended.err
    assert f"the cluster at {cluster.address} has at most 5 CPUs, including nodes that it can add" in ended.err
    assert "scaling.num_workers=5 fits" in ended.err
    # There are enough CPUs in total, but not on one node.
    ended = launched(tmp_path, "check", *RUN, *on, "+scaling.resources_per_worker.CPU=3").exits(2)
    assert "a worker asks for 3 CPUs, and no node of" in ended.err
    assert not (tmp_path / "runs").exists()


def test_check_accepts_what_can_come(on: list[str], tmp_path: Path) -> None:
    asked = [*RUN, *on, "scaling.num_workers=5", "preflight.first_batch=false"]
    ended = launched(tmp_path, "check", *asked).exits(0)
    assert "5 workers on CPU" in ended.out


def test_interrupted_while_it_waits(cluster: Growing, on: list[str], tmp_path: Path) -> None:
    """Fault 26: an interrupted run also leaves no request for nodes."""
    with launch(tmp_path, *RUN, *on, "scaling.num_workers=2") as run:
        run.said("waiting for 2 CPUs")
        run.signal(signal.SIGINT)
        run.wait(10).exits(130)
        run.nothing_left()
    assert Runs(tmp_path).status("run") == "KILLED"
    cluster.until({"nodes": [1], "placement_groups": []}, 5)


def test_who_holds_what_is_waited_for(cluster: Growing, on: list[str], tmp_path: Path) -> None:
    cluster.gate.touch()
    assert cluster.ask("hold") == {"nodes": [1, 1, 1, 2], "placement_groups": ["CREATED"]}
    with launch(tmp_path, *RUN, *on, "scaling.num_workers=2") as run:
        run.said("waiting for 2 CPUs (0:03): 0 CPUs free; somebody-elses holds 5 CPUs")
        cluster.ask("release")
        run.wait(120).exits(0)
