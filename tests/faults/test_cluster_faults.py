"""Faults 4, 5, 8 and 29, and runs on a cluster that exists before and after them: they leave nothing on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import forkserver
from tests.launches import (
    ENDS_S,
    OUTSIDE,
    Launch,
    Runs,
    assert_equal_states,
    checkpoints,
    final_state,
    launch,
    launched,
    name_of,
    observed,
    record,
    restarts,
    steps_of,
)
from tests.promises import Within

pytestmark = pytest.mark.slow

RUN = ["experiment=mlp", "name=run", "tracking.log_model=false", "trainer.max_epochs=4", "scaling.num_workers=2"]


class RayCluster:
    """tests/outside/cluster.py in its own process."""

    def __init__(self, folder: Path, cpus: int) -> None:
        self.log = folder / "cluster.log"
        self.process = subprocess.Popen(
            [sys.executable, str(OUTSIDE / "cluster.py"), str(cpus), forkserver.server().python],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            text=True,
            start_new_session=True,
            # Its workers find the user's package, as on a cluster where it is installed.
            env={**os.environ, "PYTHONPATH": str(OUTSIDE)},
        )
        self.address = self._answer()
        assert ":" in self.address, self.log.read_text()

    def running(self) -> dict[str, list[str]]:
        """Return the existing actors and placement groups."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, list[str]] = json.loads(self._answer())
        return found

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def is_clean(self, within_s: float) -> None:
        """Wait until nothing runs on the cluster."""
        within = Within(within_s)
        while any((found := self.running()).values()):
            within.check(found)
            time.sleep(0.2)

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
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    cluster = RayCluster(tmp_path_factory.mktemp("cluster"), cpus=2)
    yield cluster
    cluster.end()


def on(cluster: RayCluster) -> list[str]:
    return ["cluster=existing", f"cluster.address={cluster.address}"]


@pytest.fixture(scope="module")
def undisturbed(cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of an undisturbed run on the cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = launched(folder, *RUN, *on(cluster), *observed(), f"+callbacks.steps.folder={folder}/steps").exits(0)
    assert f"Ray at {cluster.address}, 2 workers on CPU" in ended.out
    cluster.is_clean(5)
    return folder


def test_existing_cluster(cluster: RayCluster, undisturbed: Path) -> None:
    """A run trains on the cluster, and leaves it unchanged."""
    assert Runs(undisturbed).status("run") == "FINISHED"
    assert checkpoints(undisturbed, "run")[-1].step == 44
    assert cluster.process.poll() is None


def test_killed_driver_on_an_existing_cluster(cluster: RayCluster, undisturbed: Path, tmp_path: Path) -> None:
    """Fault 4: workers and placement group go although the cluster stays, and `resume` ends with the same weights."""
    arguments = [*RUN, *on(cluster), *observed(0.1), f"+callbacks.steps.folder={tmp_path}/steps"]
    with launch(tmp_path, *arguments) as run:
        run.reaches(14)
        workers = [psutil.Process(steps_of(run.steps, rank)[-1].pid) for rank in range(2)]
        assert any("TrainWorker" in actor for actor in cluster.running()["actors"]), cluster.running()
        assert cluster.running()["placement_groups"]
        run.kill()
        cluster.is_clean(ENDS_S)
        _, alive = psutil.wait_procs(workers, timeout=ENDS_S)
        assert not alive
    launched(tmp_path, "resume", "run").exits(0)
    cluster.is_clean(5)
    ((before, after),) = restarts(steps_of(run.steps))
    assert 11 < after <= before + 1
    assert Runs(tmp_path).status("run") == "FINISHED"
    assert Runs(tmp_path).results("run") == Runs(undisturbed).results("run")
    assert_equal_states(final_state(tmp_path, "run"), final_state(undisturbed, "run"))


def test_stopped_on_an_existing_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    """Faults 26 and 27: a signal ends the run, not the cluster."""
    arguments = [*RUN, *on(cluster), *observed(0.1), f"+callbacks.steps.folder={tmp_path}/steps"]
    with launch(tmp_path, *arguments, "trainer.log_every_n_steps=2") as run:
        run.reaches(14)
        run.signal(signal.SIGTERM)
        run.wait(20).exits(143)
        run.nothing_left()
        cluster.is_clean(5)
    assert Runs(tmp_path).status("run") == "KILLED"
    assert checkpoints(tmp_path, "run")[-1].step >= 14


@pytest.mark.parametrize("where", ["local", "existing"])
def test_more_workers_than_there_are_cpus(where: str, cluster: RayCluster, tmp_path: Path) -> None:
    """Fault 29: the run is refused within 10 s, and the message says what fits."""
    place = on(cluster) if where == "existing" else []
    within = Within(10.0)
    ended = launched(tmp_path, *RUN, *place, "scaling.num_workers=64", fresh=True).exits(2)
    within.check()
    assert "scaling.num_workers=64" in ended.err
    assert "fits" in ended.err
    assert not (tmp_path / "runs").exists()
    cluster.is_clean(5)


def killed_part(run: Launch, name: str) -> None:
    """Send SIGKILL to one of Ray's processes of a launch."""
    (process,) = (process for process in run.left() if name in name_of(process).split(" ")[0])
    process.kill()


@pytest.mark.parametrize("part", [pytest.param("gcs_server", marks=pytest.mark.nightly), "raylet"])
def test_ray_dies(part: str, tmp_path: Path) -> None:
    """Faults 5 and 8 with an embedded Ray: the controller is the driver, and a dead Ray is a lost cluster. The driver
    ends in bounded time with the true status in MLflow, and the checkpoints can be resumed from."""
    with launch(tmp_path, *RUN, "trainer.max_epochs=100", *observed(0.1)) as run:
        run.reaches(14)
        killed_part(run, part)
        ended = run.wait(30).exits(1)
        run.nothing_left(ENDS_S)
    assert Runs(tmp_path).status("run") == record(tmp_path, "run")["status"] == "FAILED"
    assert "Ray" in Runs(tmp_path).tags("run")["raytrainer.cause"], str(ended)
    assert checkpoints(tmp_path, "run")[-1].step >= 11
