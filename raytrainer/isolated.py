"""Run one function in a process of its own that can be ended at any time: for user code that may hang, crash or take memory.

The process starts fresh, as a worker does, in the same directory and with the same variables. It has a private TMPDIR,
no GPU and no process group, and it ends with everything that it has started: at its time limit, or when its parent is gone.
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

_ROOT = str(Path(__file__).resolve().parent.parent)
_REQUEST, _RESULT, _OUTPUT = "request.json", "result.json", "output.txt"
# `-c`: its `sys.path` begins with the current directory, as a worker's; our own place comes last, so that nothing that is
# installed beside us hides a module of the standard library.
_BOOT = "import sys; sys.path.append(sys.argv[-1]); from raytrainer import isolated; isolated._serve(*sys.argv[1:3])"
# What says which rank of a group a process is: in this one, a group of its own would wait for the others.
_GROUP = (
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
class Ended:
    """How an isolated process ended.

    Attributes:
        value: What the function returned; None where it did not return.
        problem: Why there is no value, in words: a time limit, a signal, an exception; None where there is one.
        timed_out: Whether it was ended at its time limit.
        output: The last lines that it printed.
    """

    value: Any = None
    problem: str | None = None
    timed_out: bool = False
    output: str = ""


class Isolated:
    """A process that calls `function(**request)` and hands back what it returns.

    Args:
        function: `package.module:name`; its result must be JSON.
        request: Its keyword arguments, as JSON.
        path: Directories in front of the process's own `sys.path`.
        environment: Variables on top of this process's; None removes one.
        niceness: Added to this process's.
        threads: Of OpenMP and of BLAS.
        memory: The most bytes of private memory, where the platform can limit it; None: no limit.

    Attributes:
        folder: Its private directory, which is its TMPDIR too.
        environment: Its variables; they may be changed until it starts.
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
            **dict.fromkeys(_GROUP),
            "TMPDIR": str(self.folder),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            **(environment or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: Ended | None = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the process. What the function needs as files may be in `folder` by now."""
        asked = {"function": self._function, "request": dict(self._request), **self._options}
        (self.folder / _REQUEST).write_text(json.dumps(asked))
        environment = {k: v for k, v in {**os.environ, **self.environment}.items() if v is not None}
        with (self.folder / _OUTPUT).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(self.folder / _REQUEST), str(self.folder / _RESULT), _ROOT],
                stdin=subprocess.PIPE,  # its end is how the process learns that this one is gone
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, timeout_s: float) -> Ended | None:
        """How it ended; None while it still runs after `timeout_s`."""
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

    def run(self, timeout_s: float) -> Ended:
        """Starts it, and waits for its end or for its time limit; nothing of it is left afterwards."""
        try:
            self.start()
            ended = self.wait(timeout_s)
            return ended or Ended(
                problem=f"it did not end within {timeout_s:g} s", timed_out=True, output=self._output()
            )
        finally:
            self.close()

    def close(self) -> None:
        """Ends the process with all that it has started, and removes its folder."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        # A grandchild may have left the process group; while its parent lives it is still found below it.
        for descendant in _descendants(process.pid):
            with contextlib.suppress(Exception):
                descendant.kill()
        # Not yet waited for, so the number of the group is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _result(self) -> Ended:
        try:
            found = json.loads((self.folder / _RESULT).read_text())
        except (OSError, ValueError):
            assert self._process is not None
            return Ended(problem=_death(self._process), output=self._output())
        return Ended(found.get("value"), found.get("problem"), output=self._output())

    def _output(self, lines: int = 30) -> str:
        with contextlib.suppress(OSError):
            return "\n".join((self.folder / _OUTPUT).read_text(errors="replace").splitlines()[-lines:])
        return ""


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, without collecting it: its number, and that of its group, stay taken."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _death(process: subprocess.Popen[bytes]) -> str:
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
    """The whole life of an isolated process."""
    sys.argv[1:] = []
    _end_with_parent()
    asked = json.loads(Path(request).read_text())
    sys.path[:0] = [folder for folder in asked["path"] if folder not in sys.path]
    _be_modest(asked["niceness"], asked["memory"])
    answer: dict[str, Any] = {}
    try:
        module, _, name = asked["function"].partition(":")
        answer["value"] = getattr(importlib.import_module(module), name)(**asked["request"])
    except BaseException as error:  # noqa: BLE001  whatever it is, the parent is told
        answer["problem"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    # Renamed into place: a process that is ended meanwhile has no half an answer.
    Path(f"{result}.part").write_text(json.dumps(answer))
    Path(f"{result}.part").rename(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of the user's code must not keep it


def _end_with_parent() -> None:
    """Ends the process group when the other end of standard input is gone; the code that runs here reads nothing."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(lifeline, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _be_modest(niceness: int, memory: int | None) -> None:
    with contextlib.suppress(OSError):
        os.nice(niceness)
    # When the machine runs out of memory, this process goes first, and not the run beside it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if memory is not None:
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (memory, resource.getrlimit(resource.RLIMIT_DATA)[1]))
