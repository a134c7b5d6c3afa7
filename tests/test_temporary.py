"""A temporary directory that an embedded Ray cannot use is refused, with the variable and the fix."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from raytrainer.config import ClusterConfig, Experiment, TrainerConfig
from raytrainer.preflight import check_environment, check_temporary

LOCAL = Experiment(cluster=ClusterConfig(kind="local"))


def test_the_usual_one_is_fine() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        assert check_temporary(LOCAL, {"TMPDIR": folder}) == []
        assert list(Path(folder).iterdir()) == []


@pytest.mark.parametrize("over", [0, 1])
def test_how_long_it_may_be_is_how_long_a_socket_can_be(over: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1234567)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        behind = len("/ray/session_2026-11-30_09-13-00_123456_1234567/sockets/plasma_store")
        folder = Path(short, "é" + "x" * (107 + over - behind - len(short) - 3))
        folder.mkdir()
        bound = Path(f"{folder}/ray/session_2026-11-30_09-13-00_123456_1234567/sockets/plasma_store")
        bound.parent.mkdir(parents=True)
        problems = check_temporary(LOCAL, {"TMPDIR": str(folder)})
        with socket.socket(socket.AF_UNIX) as probe:
            if not over:
                probe.bind(str(bound))
                assert problems == []
                return
            with pytest.raises(OSError):
                probe.bind(str(bound))
    (problem,) = problems
    assert f"TMPDIR={folder} is too long" in problem
    assert "at most 39 bytes" in problem


def test_ray_takes_its_own_variable_first(tmp_path: Path) -> None:
    (problem,) = check_temporary(LOCAL, {"RAY_TMPDIR": "/nowhere", "TMPDIR": str(tmp_path)})
    assert problem.startswith("RAY_TMPDIR=/nowhere does not exist")


def a_file(folder: Path) -> None:
    folder.touch()


def a_file_called_ray(folder: Path) -> None:
    folder.mkdir()
    (folder / "ray").touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist, .*: mkdir -p /tmp/"),
        (a_file, "is not a directory"),
        (a_file_called_ray, "/ray is not a directory.*remove it"),
    ],
)
def test_what_is_no_directory(make: Callable[[Path], None], message: str) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        make(Path(short, "a"))
        (problem,) = check_temporary(LOCAL, {"TMPDIR": f"{short}/a"})
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(problem))


@pytest.mark.parametrize("text", ["", "tmp", "~/tmp"])
def test_a_relative_one(text: str) -> None:
    (problem,) = check_temporary(LOCAL, {"TMPDIR": text})
    assert problem.startswith(f"TMPDIR={text} is not an absolute path")


@pytest.mark.parametrize(
    ("error", "has_ray", "message"),
    [
        (PermissionError(13, "Permission denied"), True, r"/ray belongs to \w+ and cannot be written.*RAY_TMPDIR=DIR"),
        (PermissionError(13, "Permission denied"), False, r"cannot be written \(Permission denied\)"),
        (OSError(30, "Read-only file system"), False, r"cannot be written \(Read-only file system\)"),
        (OSError(28, "No space left on device"), True, r"cannot be written \(No space left on device\)"),
    ],
)
def test_one_that_cannot_be_written(
    error: OSError, has_ray: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's folder is one case. The errors are simulated, because a test may run as root, which may write
    anywhere."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if has_ray:
            Path(folder, "ray").mkdir()

        def refuse(**_: object) -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(tempfile, "TemporaryDirectory", refuse)
            (problem,) = check_temporary(LOCAL, {"TMPDIR": folder})
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(problem))


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(f_bavail=100, f_frsize=4096, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    (problem,) = check_temporary(LOCAL, {"TMPDIR": "/tmp"})
    assert "has 0.4 MiB left" in problem


def test_compiled_code_cannot_be_on_noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    noexec = SimpleNamespace(f_bavail=10**9, f_frsize=4096, f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: noexec)
    for kind in ("local", "inline"):
        compiled = Experiment(cluster=ClusterConfig(kind=kind), trainer=TrainerConfig(compile=True))
        (problem,) = check_temporary(compiled, {"TMPDIR": "/tmp"})
        assert "noexec" in problem
        assert "TORCHINDUCTOR_CACHE_DIR" in problem
    assert check_temporary(LOCAL, {"TMPDIR": "/tmp"}) == []


@pytest.mark.parametrize("kind", ["inline", "job", "existing"])
def test_elsewhere_it_does_not_matter(kind: str) -> None:
    assert check_environment(Experiment(cluster=ClusterConfig(kind=kind)), {"TMPDIR": "/nowhere"}) == []
