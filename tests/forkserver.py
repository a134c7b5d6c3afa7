"""Launches without the seconds in which a new interpreter imports torch, Ray and MLflow: a server has imported them, and
forks a child for each launch. `tests/launches.py` says which launches are started so, and which by a new interpreter.

The child is what `python -m raytrainer ARGUMENTS` is: a session of its own with its own working directory, environment,
output and `sys.path`, without other threads, and with the interpreter's usual signal handlers and exit. Two things differ:
its modules are imported already, and the variables that a library reads on import are those of the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import re
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What a launch on this machine imports; `raytrainer.__main__` is run, not imported.
PRELOADED = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),  # by optimizers and by DDP
    *("ray", "ray.train.torch", "ray.tune", "hydra", "pyarrow.fs", "pyarrow.parquet", "sklearn.datasets"),
    *(
        "mlflow",
        "mlflow.pytorch",
        "mlflow.store.tracking.sqlalchemy_store",
        "sqlalchemy.dialects.sqlite",
        "alembic.command",
    ),
    *("mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.db.utils"),
    *(
        f"raytrainer.{name}"
        for name in ("cli", "run", "sweep", "history", "worker", "trainer", "checkpoint", "parallel")
    ),
    *(f"raytrainer.{name}" for name in ("data", "models", "losses", "optim", "metrics", "preflight", "tracking")),
)
# Variables that Python, the C library or a preloaded package reads when it starts or is imported. A launch that wants
# another value than the server's needs an interpreter of its own.
_READ_ON_IMPORT = re.compile(
    r"(PYTHON(?!PATH$)|RAY_|TUNE_|OMP_|MKL_|KMP_|GOMP_|OPENBLAS_|TORCH|PYTORCH_|CUDA_|ARROW_|LC_|LD_|MALLOC_)\w*"
    r"|LANG|LANGUAGE|TZ|HOME|TMPDIR|MLFLOW_(?!TRACKING_)\w*"
)


_KIND = socket.SOCK_SEQPACKET  # a message is received whole, and alone
_LONGEST = 2**20


class Forked:
    """A launch that the server started: the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._connection = connection

    returncode: int | None

    def poll(self) -> int | None:
        """Return its exit code, or minus the number of the signal that ended it; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                line = self._connection.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired("raytrainer", timeout or 0.0) from None
            if not line:
                raise RuntimeError(f"The fork server ended before its child {self.pid}.")
            self.returncode = int(line)
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Server:
    """The server of this process. It ends with this process, however that ends."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self._folder = Path(tempfile.mkdtemp(prefix="forkserver-"))
        self._log = self._folder / "log"
        self._address = str(self._folder / "socket")
        with socket.socket(socket.AF_UNIX, _KIND) as listener, self._log.open("wb") as log:
            listener.bind(self._address)
            listener.listen(64)
            # Its output is a file, as a launch's is: the children keep its `sys.stdout`, with that buffering.
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[listener.fileno()],
                env={name: value for name, value in self.environment.items() if name != "PYTHONPATH"},
            )
        atexit.register(self.end)

    def can_start(self, environment: Mapping[str, str]) -> bool:
        """Return whether a child with these variables is what a new interpreter would be."""
        names = {name for name in {*environment, *self.environment} if _READ_ON_IMPORT.fullmatch(name)}
        return all(environment.get(name) == self.environment.get(name) for name in names)

    def start(
        self,
        program: Sequence[str],
        arguments: Sequence[str],
        folder: Path,
        out: Path,
        err: Path,
        environment: Mapping[str, str],
    ) -> Forked:
        """Start a program in `folder`, in a session of its own.

        Args:
            program: What stands before the arguments: `-m` and a module, `-c` and code, or the path of a script.
            out, err: The files that its output replaces.
        """
        for file in (out, err):
            file.write_bytes(b"")  # there when this returns, whenever the child comes to open it
        connection = socket.socket(socket.AF_UNIX, _KIND)
        connection.connect(self._address)
        request = {
            "program": list(program),
            "arguments": list(arguments),
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
            "environment": dict(environment),
        }
        connection.sendall(json.dumps(request).encode())
        pid = b""
        with contextlib.suppress(ConnectionResetError):
            pid = connection.recv(64)
        if not pid:
            raise RuntimeError(f"The fork server did not start a child:\n{self._log.read_text(errors='replace')}")
        return Forked(connection, int(pid))

    def end(self) -> None:
        """End the server; its children go on."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def server() -> Server:
    """The server of this process, started by the first launch that wants it."""
    return Server()


# --- the server's side ------------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a child for each request. Returns in each child, with its request; and None when stdin is closed."""
    children: dict[int, socket.socket] = {}
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wakes.fileno())
    waits = selectors.DefaultSelector()
    for source in (listener, woken, sys.stdin):
        waits.register(source, selectors.EVENT_READ)
    while True:
        ready = {key.fileobj for key, _ in waits.select()}
        if sys.stdin in ready:
            return None
        if woken in ready:
            woken.recv(4096)
            _tell_ends(children)
        if listener not in ready:
            continue
        connection, _ = listener.accept()
        request: dict[str, Any] = json.loads(connection.recv(_LONGEST))
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            waits.close()
            for own in (listener, woken, wakes, connection, *children.values()):
                own.close()
            return request
        children[pid] = connection
        with contextlib.suppress(OSError):  # whoever asked is gone
            connection.sendall(str(pid).encode())


def _tell_ends(children: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):  # there are no more
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with children.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def become(request: Mapping[str, Any], path: Sequence[str]) -> None:
    """Run the launch of a request in this process, with `path` as what is always in `sys.path`."""
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name, how in ((0, os.devnull, os.O_RDONLY), (1, request["out"], write), (2, request["err"], write)):
        file = os.open(name, how, 0o666)
        os.dup2(file, number)
        os.close(file)
    program, arguments = request["program"], request["arguments"]
    first = {"-m": request["folder"], "-c": ""}.get(program[0], str(Path(program[0]).parent))
    sys.path[:] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.orig_argv[:] = [sys.executable, *program, *arguments]
    importlib.invalidate_caches()
    if program[0] == "-m":
        sys.argv[1:] = arguments
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = [program[0], *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if program[0] == "-c":
        exec(program[1], vars(main))
    else:
        main.__file__ = program[0]
        exec(compile(Path(program[0]).read_bytes(), program[0], "exec"), vars(main))


def main() -> None:
    path = sys.path[1:]  # less the directory of this file
    sys.path[:] = path
    for name in PRELOADED:
        importlib.import_module(name)
    # mlflow.pytorch configures the root logger when it is imported, for errors alone. A launch does not import it.
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    gc.collect()
    gc.freeze()  # a collection in a child does not copy the pages of what all have in common
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        become(request, path)


if __name__ == "__main__":
    main()
