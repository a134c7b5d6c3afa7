"""A function in its own process: what it returns, how it can end, and what is left of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytrainer.core.isolated import Isolated

CODE = """
import os, subprocess, sys, time

def answer(**given):
    return {**given, "argv": sys.argv, "cwd": os.getcwd(), "variables": dict(os.environ), "stdin": sys.stdin.read()}

def fail():
    print("before it failed")
    raise LookupError("no such thing")

def die():
    os.kill(os.getpid(), 11)

def leave():
    os._exit(7)

def hang(folder):
    same_group = subprocess.Popen(["sleep", "600"])
    own_group = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(os.path.join(folder, "pids.part"), "w") as file:
        file.write(f"[{os.getpid()}, {same_group.pid}, {own_group.pid}]")
    os.rename(os.path.join(folder, "pids.part"), os.path.join(folder, "pids"))
    while True:
        time.sleep(600)

def eat():
    return len(bytearray(400_000_000))

def path():
    return sys.path
"""


@pytest.fixture
def isolated(tmp_path: Path) -> Callable[..., Isolated]:
    (tmp_path / "user_code.py").write_text(CODE)

    def make(function: str, request: dict[str, Any] | None = None, **options: Any) -> Isolated:
        return Isolated(f"user_code:{function}", request or {}, path=[str(tmp_path)], **options)

    return make


def gone(pids: list[int], within_s: float = 10) -> bool:
    """Return whether the processes end in time. A zombie has ended, too."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        states = [psutil.Process(pid).status() for pid in pids if psutil.pid_exists(pid)]
        if all(state == psutil.STATUS_ZOMBIE for state in states):
            return True
        time.sleep(0.02)
    return False


def test_the_answer_and_the_surroundings(isolated: Callable[..., Isolated], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("OF_THE_USER", "kept")
    process = isolated("answer", {"x": [1, 2]}, environment={"EXTRA": "here"})
    ended = process.run(60)
    assert ended.problem is None, ended
    assert ended.value["x"] == [1, 2]
    assert (ended.value["argv"], ended.value["cwd"], ended.value["stdin"]) == (["-c"], str(Path.cwd()), "")
    variables = ended.value["variables"]
    assert "WORLD_SIZE" not in variables  # it is not a rank of its parent's group
    assert (variables["OF_THE_USER"], variables["EXTRA"], variables["CUDA_VISIBLE_DEVICES"]) == ("kept", "here", "")
    assert variables["TMPDIR"] == str(process.folder)
    assert not process.folder.exists()


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("fail", "LookupError: no such thing"),
        ("die", "its process was ended by SIGSEGV"),
        ("leave", "its process ended with exit code 7"),
        ("missing", "AttributeError: module 'user_code' has no attribute 'missing'"),
    ],
)
def test_how_it_can_end_without_an_answer(isolated: Callable[..., Isolated], function: str, problem: str) -> None:
    ended = isolated(function).run(60)
    assert (ended.value, ended.problem, ended.timed_out) == (None, problem, False)
    if function == "fail":
        assert "before it failed" in ended.output


def test_a_time_limit_ends_it_with_all_that_it_has_started(isolated: Callable[..., Isolated], tmp_path: Path) -> None:
    process = isolated("hang", {"folder": str(tmp_path)})
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < deadline
        assert process.wait(0.02) is None
    pids = json.loads((tmp_path / "pids").read_text())
    process.close()
    assert gone(pids)
    assert not process.folder.exists()
    ended = isolated("hang", {"folder": str(tmp_path)}).run(0.05)
    assert ended.timed_out
    assert "within 0.05 s" in str(ended.problem)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "user_code.py").write_text(CODE)
    program = (
        "import time; from raytrainer.core.isolated import Isolated\n"
        f"Isolated('user_code:hang', {{'folder': {str(tmp_path)!r}}}, path=[{str(tmp_path)!r}]).start(); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pids").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child, same_group, own_group = json.loads((tmp_path / "pids").read_text())
    finally:
        parent.kill()
        parent.wait()
    assert gone([child, same_group])
    psutil.Process(own_group).kill()  # nothing ends a process that left the group of a killed parent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of private memory are Linux's")
def test_a_limit_of_memory(isolated: Callable[..., Isolated]) -> None:
    ended = isolated("eat", memory=200_000_000).run(60)
    assert ended.problem is not None
    assert ended.problem.startswith("MemoryError")


def test_it_imports_this_package_wherever_it_lies(isolated: Callable[..., Isolated]) -> None:
    with isolated("path") as process:
        path = process.run(60).value
    assert path[-1] == str(Path(__file__).resolve().parents[1])
