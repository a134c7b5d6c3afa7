"""Run one function in a separate process that can be killed at any time: for user code that may hang, crash or use too
much memory.

The process is a new interpreter, as a worker is, with the same directory and environment variables. It has a private
TMPDIR, no GPU and no process group. At its time limit, or when its parent ends, it is killed with all its descendants.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrainer.core.atomic import write_atomically

_ROOT = str(Path(__file__).resolve().parents[2])  # the folder that contains the package
_REQUEST, _RESULT, _OUTPUT = "request.json", "result.json", "output.txt"
# With `-c`, `sys.path` begins with the current directory, as in a worker. Our own directory comes last, so that
# packages installed beside ours cannot hide a module of the standard library.
_PROGRAM = (
    "import sys; sys.path.append(sys.argv[-1]); from raytrainer.core import isolated; isolated._serve(*sys.argv[1:3])"
)
# Variables that name a rank. User code that sees them would create a process group and wait for other ranks.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_TICK_S = 0.02


@dataclass(frozen=True)
class ProcessEnded:
    """The end of an isolated process.

    Attributes:
        value: The function's return value; None if it did not return.
        problem: Why there is no value, as text: the time limit, a signal or an exception; None if there is one.
        timed_out: Whether the process was killed at its time limit.
        output: The last lines that the process printed.
    """

    value: Any = None
    problem: str | None = None
    timed_out: bool = False
    output: str = ""


class Isolated:
    """A process that calls `function(**request)` and returns the result.

    Args:
        function: `package.module:name`. Its result must be JSON.
        request: The keyword arguments, as JSON.
        path: Directories to put in front of the process's `sys.path`.
        environment: Environment variables beside those of this process; None removes one.
        niceness: Added to the niceness of this process.
        threads: The number of OpenMP and BLAS threads.
        memory: The limit of private memory in bytes, on platforms that support one; None for no limit.

    Attributes:
        folder: The process's private directory, which is also its TMPDIR.
        environment: The process's environment variables. They can be changed until it starts.
    """

    def __init__(
        self,
        function: str,
        request: Mapping[str, Any],
        *,
        path: Sequence[str] = (),
        environment: Mapping[str, str | None] | None = None,
        niceness: int = 0,
        threads: int = 1,
        memory: int | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="raytrainer-"))
        self._function, self._request = function, request
        self._options = {"path": list(path), "niceness": niceness, "memory": memory}
        self.environment: dict[str, str | None] = {
            **dict.fromkeys(_RANK_VARIABLES),
            "TMPDIR": str(self.folder),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: ProcessEnded | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process. Files that the function needs can be put into `folder` before."""
        call = {"function": self._function, "request": dict(self._request), **self._options}
        (self.folder / _REQUEST).write_text(json.dumps(call))
        environment = {k: v for k, v in {**os.environ, **self.environment}.items() if v is not None}
        with (self.folder / _OUTPUT).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(self.folder / _REQUEST), str(self.folder / _RESULT), _ROOT],
                stdin=subprocess.PIPE,  # the process ends when this pipe is closed
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> ProcessEnded | None:
        """Return how the process ended, or None if it still runs after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while self._ended is None and self._process is not None:
            if _has_ended(self._process):
                self._ended = self._result()
                self._end()
            elif time.monotonic() >= deadline:
                return None
            else:
                time.sleep(_TICK_S)
        return self._ended

    def run(self, timeout_s: float) -> ProcessEnded:
        """Run the process to its end or its time limit in seconds. Nothing of it is left afterwards."""
        try:
            self.start()
            ended = self.wait(timeout_s)
            return ended or ProcessEnded(
                problem=f"it did not end within {timeout_s:g} s", timed_out=True, output=self._output()
            )
        finally:
            self.close()

    def close(self) -> None:
        """Kill the process and its descendants, and delete its folder."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        # A descendant may have left the process group, but while its parent is alive it is still in the process tree.
        for descendant in _descendants(process.pid):
            with contextlib.suppress(Exception):
                descendant.kill()
        # The process was not waited for yet, so its group id cannot belong to another group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _result(self) -> ProcessEnded:
        try:
            result = json.loads((self.folder / _RESULT).read_text())
        except (OSError, ValueError):
            assert self._process is not None
            return ProcessEnded(problem=_cause_of_death(self._process), output=self._output())
        return ProcessEnded(result.get("value"), result.get("problem"), output=self._output())

    def _output(self, lines: int = 30) -> str:
        with contextlib.suppress(OSError):
            return "\n".join((self.folder / _OUTPUT).read_text(errors="replace").splitlines()[-lines:])
        return ""


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether the process has ended, without reaping it, so that its process and group ids are not reused."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _cause_of_death(process: subprocess.Popen[bytes]) -> str:
    info = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None:
        return "its process ended without an answer"
    if info.si_code == os.CLD_EXITED:
        return f"its process ended with exit code {info.si_status}"
    with contextlib.suppress(ValueError):
        return f"its process was ended by {signal.Signals(info.si_status).name}"
    return f"its process was ended by signal {info.si_status}"


def _descendants(pid: int) -> list[Any]:
    import psutil

    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


# --- in the process ---------------------------------------------------------------------------------------------------


def _serve(request: str, result: str) -> None:
    """Run the function and write its result: the main function of an isolated process."""
    sys.argv[1:] = []
    _end_with_parent()
    call = json.loads(Path(request).read_text())
    sys.path[:0] = [folder for folder in call["path"] if folder not in sys.path]
    _limit_resources(call["niceness"], call["memory"])
    answer: dict[str, Any] = {}
    try:
        module, _, name = call["function"].partition(":")
        answer["value"] = getattr(importlib.import_module(module), name)(**call["request"])
    except BaseException as error:  # noqa: BLE001  the parent process gets every error
        answer["problem"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    # A process that is killed meanwhile leaves no partial result.
    write_atomically(Path(result), json.dumps(answer).encode(), durable=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of user code must not keep the process alive


def _end_with_parent() -> None:
    """Kill the process group when the parent closes standard input. The function itself reads an empty input."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _limit_resources(niceness: int, memory: int | None) -> None:
    with contextlib.suppress(OSError):
        os.nice(niceness)
    # If the machine runs out of memory, the kernel kills this process first, and not the run beside it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if memory is not None:
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
