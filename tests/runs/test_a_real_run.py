"""Tests of the commands on real launches: list, follow, stop with all processes, and mark a killed run FAILED."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launches import Runs, launch, launched, observed, record

pytestmark = pytest.mark.slow


def told(folder: Path, *arguments: str) -> Any:
    return json.loads(launched(folder, *arguments, "--json").exits(0).out)


def test_a_run_with_ray_is_followed_and_stopped(in_tmp: Path) -> None:
    arguments = ["experiment=smoke", "name=one", "trainer.max_steps=100000", "trainer.max_epochs=null"]
    with launch(in_tmp, *arguments, "trainer.log_every_n_steps=5", *observed(0.02)) as started:
        started.reaches(10)
        (listed,) = told(in_tmp, "list")
        assert (listed["name"], listed["status"], listed["life"]) == ("one", "RUNNING", "alive")
        follow = [sys.executable, "-m", "raytrainer", "logs", "-f", "one"]
        with subprocess.Popen(follow, cwd=in_tmp, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            assert following.stdout.readline().startswith("one: local Ray, 1 worker on ")
            stopped = launched(in_tmp, "stop", "one").exits(0)
            left = started.left()
            assert not left, left
            rest = following.stdout.read()
            assert following.wait(30) == 0
        started.wait().exits(143)
    assert "stopped by SIGTERM: saving a checkpoint" in rest
    assert stopped.out.startswith("one is stopped (KILLED) after ")
    assert stopped.out.rstrip().endswith(" processes are gone")
    assert Runs(in_tmp).status("one") == record(in_tmp, "one")["status"] == "KILLED"
    found = told(in_tmp, "status", "one")
    assert found["total_steps"] == 100000
    assert found["step"] >= 10
    assert found["checkpoints"]
    assert found["workers"] == "1"


def test_a_run_whose_driver_is_killed_is_closed_by_the_next_list(in_tmp: Path) -> None:
    arguments = ["experiment=smoke", "name=one", "cluster=inline", "trainer.max_steps=100000"]
    with launch(in_tmp, *arguments, "trainer.max_epochs=null", *observed(0.02)) as started:
        started.reaches(10)
        started.kill()
    assert Runs(in_tmp).status("one") == "RUNNING"
    done = launched(in_tmp, "list")
    assert done.err.startswith(f"raytrainer: one is marked FAILED: its driver is dead (process {started.pid} on ")
    assert [line.split()[:2] for line in done.out.splitlines()[1:]] == [["one", "FAILED"]]
    assert Runs(in_tmp).status("one") == record(in_tmp, "one")["status"] == "FAILED"
    assert Runs(in_tmp).tags("one")["raytrainer.cause"].startswith("its driver died: process ")
