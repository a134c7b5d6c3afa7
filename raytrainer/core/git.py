"""Run git with limits on time and output, and with the same result whatever the user's environment sets.

All git calls go through this module. It imports nothing of raytrainer. Only the arguments decide whether git writes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TIME_LIMIT_S = 20.0
_OUTPUT_BYTES = 2**28
# Git sets these variables for its hooks. They name another repository than that of the given folder.
_HOOK_VARIABLES = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_COMMON_DIR",
    "GIT_OBJECT_DIRECTORY",
    "GIT_NAMESPACE",
    "GIT_LITERAL_PATHSPECS",
    "GIT_GLOB_PATHSPECS",
    "GIT_NOGLOB_PATHSPECS",
    "GIT_ICASE_PATHSPECS",
}
_SETTINGS = {
    "LC_ALL": "C",  # its messages are parsed
    "GIT_OPTIONAL_LOCKS": "0",  # reading neither waits for nor disturbs a concurrent commit
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_PAGER": "cat",
}
# Run no program that the repository names, and do not quote names of files for a terminal.
_OPTIONS = ("-c", "core.quotepath=off", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


@dataclass(frozen=True)
class Answer:
    """The result of a git call.

    Attributes:
        code: The exit code; None if git could not be run or did not end in time.
        out: The output, up to the maximum size of the call.
        error: The last line of the error output, or why there is none.
        is_cut: Whether there was more output.
    """

    code: int | None
    out: bytes = b""
    error: str = ""
    is_cut: bool = False

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def text(self) -> str:
        """The output without a final line end. Bytes that are not UTF-8 are kept as surrogates."""
        return self.out.decode("utf-8", "surrogateescape").removesuffix("\n")

    @property
    def names(self) -> list[str]:
        """The parts of an output that the option `-z` separates by NUL."""
        return [name for name in self.out.decode("utf-8", "surrogateescape").split("\0") if name]

    @property
    def is_foreign(self) -> bool:
        """Whether git refuses a repository that belongs to another user."""
        return "safe.directory" in self.error


def run(
    folder: Path,
    *arguments: str,
    stdin: bytes = b"",
    time_limit_s: float = TIME_LIMIT_S,
    most_bytes: int = _OUTPUT_BYTES,
) -> Answer:
    """Run `git ARGUMENTS` in a folder.

    Args:
        folder: The working directory.
        arguments: The arguments after `git`.
        stdin: The standard input of git.
        time_limit_s: Seconds after which git and everything that it started is killed.
        most_bytes: The maximum size of the output that is kept.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _HOOK_VARIABLES} | _SETTINGS
    try:
        process = subprocess.Popen(
            ["git", "-C", str(folder), *_OPTIONS, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C does not reach git, and a kill reaches its children too
        )
    except (OSError, ValueError) as error:  # git is missing or not executable; ValueError: the path has a NUL byte
        return Answer(None, error=f"git cannot be run: {error}")
    out, errors, is_late = _communicate(process, stdin, time_limit_s, most_bytes + 1)
    if is_late:
        return Answer(None, error=f"git did not answer within {time_limit_s:g} s")
    is_cut = len(out) > most_bytes
    reason = _reason(errors) or f"git {arguments[0]} fails"
    return Answer(0 if is_cut else process.returncode, out[:most_bytes], reason, is_cut)


def _communicate(
    process: subprocess.Popen[bytes], stdin: bytes, time_limit_s: float, most_bytes: int
) -> tuple[bytes, bytes, bool]:
    """Return at most `most_bytes` of the output, the error output, and whether git was killed at its time limit.

    It is also killed as soon as it has written `most_bytes`.
    """
    is_late = threading.Event()

    def expire() -> None:
        is_late.set()
        _kill(process)

    timer = threading.Timer(time_limit_s, expire)
    timer.daemon = True
    errors: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: errors.append(_read(process.stderr)), name="git-stderr", daemon=True),
        threading.Thread(target=_write, args=(process, stdin), name="git-stdin", daemon=True),
    ]
    assert process.stdout is not None
    try:
        for thread in (timer, *threads):
            thread.start()
        out = process.stdout.read(most_bytes)
        if len(out) == most_bytes:
            _kill(process)
        process.wait()
    finally:
        timer.cancel()
        if process.returncode is None:
            _kill(process)
            process.wait()
        for thread in threads:
            thread.join(1.0)
        process.stdout.close()
    return out, b"".join(errors), is_late.is_set()


def submodules(folder: Path, time_limit_s: float = TIME_LIMIT_S) -> dict[str, str]:
    """Return the submodules in the index of a checkout: path → commit. They need not be checked out."""
    listed = run(folder, "ls-files", "--stage", "-z", time_limit_s=time_limit_s).names
    entries = [line.partition("\t")[::2] for line in listed if line.startswith("160000 ")]
    return {path: entry.split()[1] for entry, path in entries}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill git and everything that it started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _reason(output: bytes) -> str:
    """Return the last line of git's error output."""
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    # The advice about a repository of another user has several lines.
    return " ".join(lines if any("safe.directory" in line for line in lines) else lines[-1:])


def _read(stream: IO[bytes] | None) -> bytes:
    assert stream is not None
    with stream:
        return stream.read()


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # git has ended without reading everything
        process.stdin.write(data)
    with contextlib.suppress(OSError):
        process.stdin.close()
