"""Check the directory for temporary files.

An embedded Ray keeps its sockets, logs and session there, and an unusable one causes obscure errors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raytrainer.config import Experiment

_SOCKET_BYTES = 107  # the longest path of a Unix socket on Linux, without its final zero byte
# The path that Ray appends to the directory; only the process id varies in length.
_SESSION = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_LEAST_BYTES = 20 * 2**20  # the logs of Ray's processes, and a little more


def check_temporary(e: Experiment, environ: Mapping[str, str]) -> list[str]:
    """Return what is wrong with the temporary directory of an embedded Ray or a compiled model, with the fix.

    Args:
        e: The experiment.
        environ: The environment, which may name the directory.
    """
    problems = []
    if e.backend.ray == "embedded":
        problems += _check_of_ray(environ)
    if e.trainer.compile and e.backend.location == "here" and not problems:
        problems += _check_of_compiler(environ)
    return problems


def _check_of_ray(environ: Mapping[str, str]) -> list[str]:
    # As Ray reads them: an empty one counts, too.
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in environ), None)
    text = environ[name] if name is not None else "/tmp"  # noqa: S108  Ray's default
    shown = f"{name}={text}" if name is not None else text
    other = f"{name}=/tmp, or another short path on a local disk" if name else "RAY_TMPDIR=DIR names another directory"
    problem = _problem_of_path(text, shown, other) or _problem_of_space(Path(text), shown, other)
    return [problem] if problem else []


def _problem_of_path(text: str, shown: str, other: str) -> str | None:
    """Return why Ray cannot use a path, whatever is in it."""
    if not text.startswith("/"):
        return f"{shown} is not an absolute path, and Ray keeps its sockets and logs there: {other}"
    length, session = len(os.fsencode(text.rstrip("/"))), len(_SESSION.format(pid=os.getpid()))
    if length + session > _SOCKET_BYTES:
        return (
            f"{shown} is too long: Ray's sockets in it would have paths of {length + session} bytes, and the limit is"
            f" {_SOCKET_BYTES}; it may have at most {_SOCKET_BYTES - session} bytes: {other}"
        )
    if not Path(text).exists():
        return f"{shown} does not exist, and Ray keeps its sockets and logs there: mkdir -p {text}, or {other}"
    if not Path(text).is_dir():
        return f"{shown} is not a directory, and Ray keeps its sockets and logs there: {other}"
    return None


def _problem_of_space(folder: Path, shown: str, other: str) -> str | None:
    """Return why Ray cannot write into an existing directory, or to `ray` in it."""
    own = folder / "ray"
    if (own.exists() or own.is_symlink()) and not own.is_dir():
        return f"{own} is not a directory, and Ray would keep its sockets and logs there: remove it, or {other}"
    place = own if own.is_dir() else folder
    try:
        with tempfile.TemporaryDirectory(prefix=".raytrainer-", dir=place):
            pass
    except OSError as error:
        if place == own and isinstance(error, PermissionError):
            return (
                f"{own} belongs to {_owner(own)} and cannot be written, and Ray would keep its sockets and logs there:"
                f" chmod 1777 {own} by its owner, or RAY_TMPDIR=DIR names another directory"
            )
        return f"{shown} cannot be written ({error.strerror}), and Ray keeps its sockets and logs in {place}: {other}"
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    if free < _LEAST_BYTES:
        return f"{shown} has {free / 2**20:.1f} MiB left, and Ray's logs need {_LEAST_BYTES / 2**20:.0f} MiB: {other}"
    return None


def _check_of_compiler(environ: Mapping[str, str]) -> list[str]:
    """Check that code can be loaded from the compiler's directory, which a `noexec` file system forbids."""
    name = next((name for name in ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR") if environ.get(name)), None)
    text = environ[name] if name is not None else "/tmp"  # noqa: S108  Python's default
    folder = next(parent for parent in (Path(text).absolute(), *Path(text).absolute().parents) if parent.exists())
    if not os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return []
    shown = f"{name}={text}" if name else text
    return [
        (
            f"{shown} is on a file system from which no code can be loaded (noexec), and trainer.compile keeps its code there:"
            " TORCHINDUCTOR_CACHE_DIR=DIR names another directory, and trainer.compile=false needs none"
        )
    ]


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):  # a user id without a name
        return f"user {path.stat().st_uid}"
